//! Logs: one line or one JSON object per event, to stderr, times in UTC. Standard output belongs to answers.

use serde::{Deserialize, Serialize};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{Registry, fmt, reload};

/// The `[log]` table of a configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogSettings {
    /// How an event is written. Takes effect when the process starts.
    pub format: LogFormat,
    /// What is written at all. Takes effect at once.
    pub level: LogLevel,
}

/// How an event is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// A line for people.
    #[default]
    Text,
    /// One object per line for machines.
    Json,
}

/// `error`, `warn`, `info`, `debug`, `trace`, or directives such as `info,chancery=debug`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LogLevel(String);

impl Default for LogLevel {
    fn default() -> Self {
        Self("info".to_owned())
    }
}

impl TryFrom<String> for LogLevel {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        // `Targets` takes a misspelt level for a target that shall log everything, so each level is looked at here.
        let level = |directive: &str| {
            let level = directive.rsplit('=').next().unwrap_or_default().trim();
            !level.is_empty() && level.parse::<LevelFilter>().is_ok()
        };
        match text.parse::<Targets>() {
            Ok(_) if text.split(',').all(level) => Ok(Self(text)),
            _ => Err(format!("`{text}` is no log level; use error, warn, info, debug, trace, or directives such as `info,chancery=debug`")),
        }
    }
}

impl From<LogLevel> for String {
    fn from(level: LogLevel) -> Self {
        level.0
    }
}

/// Libraries whose everyday work is of no interest; a directive of their own brings them back.
const QUIET: &str = "fjall=warn,kube_client=off,kube_runtime=off,lsm_tree=warn";

impl LogLevel {
    fn filter(&self) -> Targets {
        // It was parsed before. What is given for a library counts more than what stands in front of it.
        format!("{QUIET},{}", self.0).parse().unwrap_or_else(|_| Targets::new().with_default(LevelFilter::INFO))
    }
}

/// Changes the level of a process that logs already.
#[derive(Clone)]
pub struct LogHandle(reload::Handle<Targets, Registry>);

impl LogHandle {
    /// Applies the level. The format stays as it was at the start.
    pub fn apply(&self, settings: &LogSettings) {
        if let Err(error) = self.0.reload(settings.level.filter()) {
            tracing::error!(%error, "the log level could not be changed");
        }
    }
}

/// Starts logging for the whole process; fails if it has been started before.
pub fn init(settings: &LogSettings) -> Result<LogHandle, TryInitError> {
    let (filter, handle) = reload::Layer::new(settings.level.filter());
    let layer = fmt::layer().with_writer(std::io::stderr);
    let registry = tracing_subscriber::registry().with(filter);
    match settings.format {
        LogFormat::Text => {
            use std::io::IsTerminal;
            registry.with(layer.with_ansi(std::io::stderr().is_terminal())).try_init()?;
        }
        LogFormat::Json => registry.with(layer.json().flatten_event(true)).try_init()?,
    }
    Ok(LogHandle(handle))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_default_to_text_at_info() {
        let settings: LogSettings = toml::from_str("").unwrap();
        assert_eq!(settings, LogSettings { format: LogFormat::Text, level: LogLevel("info".into()) });
    }

    #[test]
    fn a_wrong_level_is_refused_with_the_right_ones() {
        for bad in ["level = \"inof\"", "level = \"info,chancery=loud\"", "level = \"\"", "level = \"a=b=c\""] {
            let error = toml::from_str::<LogSettings>(bad).unwrap_err().to_string();
            assert!(error.contains("use error, warn, info"), "{error}");
        }
    }

    #[test]
    fn the_level_changes_while_the_process_runs() {
        let handle = init(&LogSettings::default()).unwrap();
        assert!(!tracing::enabled!(tracing::Level::DEBUG));
        handle.apply(&LogSettings { level: LogLevel::try_from("debug".to_owned()).unwrap(), ..LogSettings::default() });
        assert!(tracing::enabled!(tracing::Level::DEBUG));
        assert!(!tracing::enabled!(target: "lsm_tree::tree", tracing::Level::INFO));
        handle.apply(&LogSettings { level: LogLevel::try_from("info,lsm_tree=debug".to_owned()).unwrap(), ..LogSettings::default() });
        assert!(tracing::enabled!(target: "lsm_tree::tree", tracing::Level::DEBUG));
        handle.apply(&LogSettings { level: LogLevel::try_from("info,chancery=debug".to_owned()).unwrap(), ..LogSettings::default() });
        assert!(tracing::enabled!(target: "chancery_agent::svids", tracing::Level::DEBUG));
        assert!(tracing::enabled!(target: "chancery_ca::server", tracing::Level::DEBUG));
        assert!(init(&LogSettings::default()).is_err());
    }
}
