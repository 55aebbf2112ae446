//! Takes a changed configuration over, whole or not at all: the log level; whatever else changes needs a restart, and is refused by name.

use std::path::PathBuf;

use chancery_process::logging::LogHandle;
use chancery_process::watch::{FileWatch, WatchError};
use tokio::sync::watch;

use crate::config::{Config, ConfigError};
use crate::telemetry::Metrics;

/// Why a changed configuration is not in force.
#[derive(Debug, thiserror::Error)]
enum ReloadError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("these keys take effect only after a restart: {0}; nothing was changed")]
    NeedsRestart(String),
}

/// Reloads a running agent's configuration.
pub struct Reloader {
    path: PathBuf,
    running: Config,
    log: LogHandle,
    metrics: Metrics,
    watch: FileWatch,
    refused: watch::Sender<Option<String>>,
}

impl Reloader {
    /// Watches the file at `path`, which `running` was read from. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// If the system offers no way to watch it.
    pub fn new(path: PathBuf, running: Config, log: LogHandle, metrics: Metrics) -> Result<Self, WatchError> {
        let watch = FileWatch::new([path.clone()])?;
        metrics.config_reloaded.set(1);
        Ok(Self { path, running, log, metrics, watch, refused: watch::Sender::new(None) })
    }

    /// Why the file is not in force; `None` while it is.
    pub fn refused(&self) -> watch::Receiver<Option<String>> {
        self.refused.subscribe()
    }

    /// Reloads on every change and on SIGHUP, for ever.
    pub async fn run(mut self) {
        loop {
            // The first time for what changed between the reading of the file and the beginning of the watch.
            match self.reload() {
                Ok(changed) => {
                    self.metrics.config_reloaded.set(1);
                    let was_refused = self.refused.send_replace(None).is_some();
                    if changed {
                        tracing::info!("the changed configuration is in force");
                    } else if was_refused {
                        tracing::info!("the configuration on disk is the one in force again");
                    }
                }
                Err(error) => {
                    tracing::error!(%error, "the configuration on disk is refused; the one before stays in force");
                    self.metrics.config_refused.inc();
                    self.metrics.config_reloaded.set(0);
                    self.refused.send_replace(Some(error.to_string()));
                }
            }
            self.watch.changed().await;
        }
    }

    /// Tells whether anything changed.
    fn reload(&mut self) -> Result<bool, ReloadError> {
        let new = Config::load(&self.path)?;
        let restart = self.running.needs_restart(&new);
        if !restart.is_empty() {
            return Err(ReloadError::NeedsRestart(restart.join(", ")));
        }
        let changed = self.running.log != new.log;
        if changed {
            self.log.apply(&new.log);
            self.running = new;
        }
        Ok(changed)
    }
}
