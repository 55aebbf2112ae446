//! Takes a changed configuration over, whole or not at all, and loads keys anew when their file has changed.

use std::sync::Arc;

use chancery_process::logging::LogHandle;
use chancery_process::watch::FileWatch;
use chancery_proto::chancery::v1::ConfigurationChange;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::attestation::{ClusterSettingsError, Clusters};
use crate::config::{Config, ConfigError, Mode};
use crate::issuance::policy::{Policy, PolicyError};
use crate::ledger::{Body, LedgerError};
use crate::server::parts::Parts;
use crate::telemetry::Metrics;

/// Why a changed configuration is not in force.
#[derive(Debug, thiserror::Error)]
enum ReloadError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("these keys take effect only after a restart: {0}; nothing was changed")]
    NeedsRestart(String),
    #[error(transparent)]
    Cluster(#[from] ClusterSettingsError),
    #[error(transparent)]
    Policy(#[from] PolicyError),
    #[error("the change could not be recorded, so it is not in force: {0}")]
    Ledger(#[from] LedgerError),
}

pub(super) struct Reloader {
    pub(super) parts: Arc<Parts>,
    pub(super) mode: Mode,
    pub(super) log: Option<LogHandle>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) watch: FileWatch,
}

impl Reloader {
    /// Reloads on every change and on SIGHUP until `shutdown`.
    pub(super) async fn run(mut self, shutdown: CancellationToken) {
        loop {
            // The first time for what changed between the reading of the files and the beginning of the watch.
            match self.reload().await {
                Ok(changed) => self.succeeded(&changed),
                Err(error) => self.refused(&error),
            }
            self.watch.replace(self.parts.config.load().files());
            if shutdown.run_until_cancelled(self.watch.changed()).await.is_none() {
                return;
            }
        }
    }

    /// The sections that are other now.
    async fn reload(&self) -> Result<Vec<String>, ReloadError> {
        let before = self.parts.config.load_full();
        let new = Config::load(before.path.as_deref(), &self.mode)?;
        let restart = before.needs_restart(&new);
        if !restart.is_empty() {
            return Err(ReloadError::NeedsRestart(restart.join(", ")));
        }
        let changed = before.changed(&new);
        if changed.is_empty() {
            self.reload_keys().await;
        } else {
            self.apply(&before, new, &changed).await?;
        }
        Ok(changed)
    }

    async fn apply(&self, before: &Config, new: Config, changed: &[String]) -> Result<(), ReloadError> {
        let parts = &self.parts;
        // What can fail comes first, and changes nothing.
        let policy = Policy::new(new.trust_domain.clone(), new.policy.clone(), &new.clusters)?;
        Clusters::new(new.trust_domain.clone(), new.clusters.clone(), Arc::clone(&parts.clock))?;
        parts.ledger.allow_lifetime(new.longest_lifetime()).await?;
        let (digest_before, digest_after) = (before.digest.to_vec(), new.digest.to_vec());
        let change = ConfigurationChange { before: digest_before, after: digest_after, changed: changed.to_vec() };
        parts.ledger.append(Body::Configuration(change)).await?;
        parts.clusters.replace(new.clusters.clone())?;
        parts.issuance.set_policy(policy);
        parts.authority.configure(new.authority.clone());
        parts.rotation.configure(new.rotation.clone());
        parts.people.replace(new.roles.clone());
        if let Some(log) = &self.log {
            log.apply(&new.log);
        }
        parts.config.store(Arc::new(new));
        Ok(())
    }

    /// The configuration is the same, so it is a file of keys or a kubeconfig that changed, or somebody asked by SIGHUP.
    async fn reload_keys(&self) {
        self.parts.clusters.reread_connections();
        for (cluster, path) in self.parts.clusters.key_files() {
            if let Err(error) = self.parts.clusters.reload_keys(&cluster).await {
                warn!(cluster, path = %path.display(), %error, "the cluster's keys stay as they were");
            }
        }
    }

    fn succeeded(&self, changed: &[String]) {
        self.parts.set_configuration_error(None);
        self.metrics.configuration_applied(self.parts.clock.now().unix_timestamp());
        if !changed.is_empty() {
            info!(?changed, "the changed configuration is in force");
        }
    }

    fn refused(&self, error: &ReloadError) {
        error!(%error, "the configuration on disk is refused; the one before stays in force");
        self.parts.set_configuration_error(Some(error.to_string()));
        self.metrics.configuration_refused();
    }
}
