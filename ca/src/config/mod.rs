//! The CA's configuration: read, checked, reloaded whole or not at all.
//!
//! A [`Config`] that exists was checked as a whole, except for what lies outside of it: the keys in a cluster's files
//! ([`Config::check_keys`]), and what only a running CA can tell, such as whether a port is free.

mod limits;
mod settings;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use chancery_identity::TrustDomain;
use chancery_process::config::ConfigError as FileError;
use chancery_process::logging::LogSettings;

pub use limits::LimitSettings;

use crate::api::RoleSettings;
use crate::attestation::development::{self, JWKS_FILE};
use crate::attestation::{ClusterSettings, ClusterSettingsError, JwksSource, check_clusters, check_keys};
use crate::authority::Settings as AuthoritySettings;
use crate::issuance::policy::{Policy, PolicySettings};
use crate::keys::SealSettings;
use crate::kubernetes::KubernetesSettings;
use crate::rotation::Settings as RotationSettings;
use settings::Settings;

/// Every key with its default and meaning; what `chancery-ca config example` prints.
pub const EXAMPLE: &str = include_str!("example.toml");
/// Where a development CA keeps its data unless told otherwise.
pub const DEVELOPMENT_DATA_DIR: &str = "chancery-dev";
/// The cluster of the development issuer.
pub const DEVELOPMENT_CLUSTER: &str = "dev";
/// Where in its data directory the development issuer has its keys.
const DEVELOPMENT_ISSUER_DIR: &str = "development";
/// The trust domain of a development CA unless told otherwise.
const DEVELOPMENT_TRUST_DOMAIN: &str = "dev.chancery";
/// The account that development agents run under.
const DEVELOPMENT_AGENT: &str = "chancery/agent";
const ADMIN_SOCKET: &str = "/run/chancery/ca-admin.sock";
const PORT: u16 = 8443;
const HTTP_PORT: u16 = 9464;
/// The shortest lifetime outside of development: less, and a short outage of the CA ends the mesh.
const MIN_LIFETIME: Duration = Duration::from_secs(60);

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not read, or not TOML with the right keys and values.
    #[error(transparent)]
    File(#[from] FileError),
    /// A value that is wrong together with the others, or missing.
    #[error("{place}: {problem}")]
    Value {
        /// File, line and key; the key alone where there is no file.
        place: String,
        /// What is wrong, and what to do.
        problem: String,
    },
}

/// How the CA was started, as far as it decides what may be configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// `serve --config`.
    Production,
    /// `serve --dev`: loopback only, everything has a default, lifetimes may be seconds.
    Development {
        /// In place of what the configuration says.
        data_dir: Option<PathBuf>,
    },
}

/// The configuration in force.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Where it was read; nowhere for a development CA that needs none.
    pub path: Option<PathBuf>,
    /// The SHA-256 of the file's text, as the ledger records it.
    pub digest: [u8; 32],
    /// Loopback only, with an issuer of tokens included.
    pub development: bool,
    /// Whose identities are issued.
    pub trust_domain: TrustDomain,
    /// Keys, certificates, ledger.
    pub data_dir: PathBuf,
    /// The TLS port.
    pub listen: SocketAddr,
    /// The plain HTTP port for metrics and probes.
    pub http_listen: SocketAddr,
    /// The operators' Unix socket.
    pub admin_socket: PathBuf,
    /// What the CA's private keys are sealed with.
    pub keys: SealSettings,
    /// How and what is logged.
    pub log: LogSettings,
    /// What workloads may get.
    pub policy: PolicySettings,
    /// The CA's own certificates.
    pub authority: AuthoritySettings,
    /// How trust roots follow each other.
    pub rotation: RotationSettings,
    /// What each peer may take.
    pub limits: LimitSettings,
    /// Which people may ask and act.
    pub roles: RoleSettings,
    /// Whose tokens count.
    pub clusters: Vec<ClusterSettings>,
}

impl Config {
    /// Reads and checks the configuration at `path`; without one, a development CA's defaults.
    ///
    /// # Errors
    /// The first thing that is wrong with it, and where.
    pub fn load(path: Option<&Path>, mode: &Mode) -> Result<Self, ConfigError> {
        let text = path.map(chancery_process::config::read).transpose()?.unwrap_or_default();
        Self::parse(path, &text, mode)
    }

    /// What `chancery-ca check` says beyond [`Config::load`]: reads the keys of each cluster that are in a file, the authorities that the
    /// addresses of the others are trusted by, and kubeconfigs. A running CA passes over single keys that are broken; whoever changes them wants to know.
    ///
    /// # Errors
    /// The first file that is wrong, what in it, and where it is named.
    pub fn check_keys(&self) -> Result<(), ConfigError> {
        let text = self.path.as_deref().map(chancery_process::config::read).transpose()?.unwrap_or_default();
        let source = Source { path: self.path.as_deref(), text: &text };
        for (number, cluster) in self.clusters.iter().enumerate() {
            if matches!(&cluster.jwks, JwksSource::File(path) if self.is_development_jwks(path) && !path.exists()) {
                continue;
            }
            check_keys(cluster).map_err(|problem| source.problem(&["cluster", &number.to_string(), "jwks"], &problem))?;
        }
        Ok(())
    }

    fn parse(path: Option<&Path>, text: &str, mode: &Mode) -> Result<Self, ConfigError> {
        let settings: Settings = chancery_process::config::parse(path.unwrap_or(Path::new("")), text)?;
        let source = Source { path, text };
        let config = match mode {
            Mode::Production => Self::production(settings, &source)?,
            Mode::Development { data_dir } => Self::development(settings, data_dir.clone(), &source)?,
        };
        config.check(&source)?;
        Ok(config)
    }

    fn production(settings: Settings, source: &Source<'_>) -> Result<Self, ConfigError> {
        let missing = |key| source.problem(&[key], "missing; it has no default");
        let defaults = Defaults {
            development: false,
            trust_domain: settings.trust_domain.clone().ok_or_else(|| missing("trust_domain"))?,
            data_dir: settings.data_dir.clone().ok_or_else(|| missing("data_dir"))?,
            host: Ipv4Addr::UNSPECIFIED,
            admin_socket: ADMIN_SOCKET.into(),
        };
        Ok(Self::with_defaults(settings, defaults, source))
    }

    fn development(mut settings: Settings, data_dir: Option<PathBuf>, source: &Source<'_>) -> Result<Self, ConfigError> {
        let data_dir = data_dir.or(settings.data_dir.take()).unwrap_or_else(|| DEVELOPMENT_DATA_DIR.into());
        let trust_domain = match settings.trust_domain.take() {
            Some(trust_domain) => trust_domain,
            None => DEVELOPMENT_TRUST_DOMAIN.parse().map_err(|_| source.problem(&["trust_domain"], "missing"))?,
        };
        let admin_socket = data_dir.join("admin.sock");
        if !settings.clusters.iter().any(|cluster| cluster.name == DEVELOPMENT_CLUSTER) {
            settings.clusters.push(development_cluster(&data_dir));
        }
        let defaults = Defaults { development: true, trust_domain, data_dir, host: Ipv4Addr::LOCALHOST, admin_socket };
        Ok(Self::with_defaults(settings, defaults, source))
    }

    fn with_defaults(mut settings: Settings, defaults: Defaults, source: &Source<'_>) -> Self {
        settings.rotation.keep_replacement.get_or_insert(!defaults.development);
        Self {
            path: source.path.map(Path::to_owned),
            digest: sha256(source.text),
            development: defaults.development,
            trust_domain: defaults.trust_domain,
            data_dir: defaults.data_dir,
            listen: settings.listen.unwrap_or_else(|| (defaults.host, PORT).into()),
            http_listen: settings.http_listen.unwrap_or_else(|| (Ipv4Addr::LOCALHOST, HTTP_PORT).into()),
            admin_socket: settings.admin_socket.unwrap_or(defaults.admin_socket),
            keys: settings.keys,
            log: settings.log,
            policy: settings.policy,
            authority: settings.authority,
            rotation: settings.rotation,
            limits: settings.limits,
            roles: settings.roles,
            clusters: settings.clusters,
        }
    }

    fn check(&self, source: &Source<'_>) -> Result<(), ConfigError> {
        if self.development && !(self.listen.ip().is_loopback() && self.http_listen.ip().is_loopback()) {
            return Err(source.problem(&["listen"], "a development CA listens on loopback only; leave it out, or start without --dev"));
        }
        if let Some((key, problem)) = self.limits.problem() {
            return Err(source.problem(&["limits", key], problem));
        }
        if let Some((key, problem)) = self.roles.problem(&self.trust_domain) {
            return Err(source.problem(&["roles", key], &problem));
        }
        let shortest = self.policy.lifetimes.min.min(self.policy.lifetimes.agent);
        if !self.development && shortest < MIN_LIFETIME {
            let problem = "`min` and `agent` are at least 60s: shorter ones are for `--dev`, where an outage ends no mesh";
            return Err(source.problem(&["policy", "lifetimes"], problem));
        }
        check_clusters(&self.clusters).map_err(|error| self.cluster_problem(&error, source))?;
        Policy::new(self.trust_domain.clone(), self.policy.clone(), &self.clusters)
            .map_err(|error| source.problem(&["policy"], &error.to_string()))?;
        self.check_files(source)
    }

    /// A file that is named but not there would only be noticed by the first token, or the next start.
    fn check_files(&self, source: &Source<'_>) -> Result<(), ConfigError> {
        self.keys.secret().map_err(|error| source.problem(&["keys"], &error.to_string()))?;
        for (number, cluster) in self.clusters.iter().enumerate() {
            let path = match &cluster.jwks {
                JwksSource::File(path) if !self.is_development_jwks(path) => path,
                JwksSource::Url { ca_file: Some(path), .. } => path,
                _ => continue,
            };
            readable(path).map_err(|problem| source.problem(&["cluster", &number.to_string(), "jwks"], &problem))?;
        }
        for (number, cluster) in self.clusters.iter().enumerate() {
            if let Some(KubernetesSettings::Kubeconfig { path, .. }) = &cluster.kubernetes {
                readable(path).map_err(|problem| source.problem(&["cluster", &number.to_string(), "kubernetes"], &problem))?;
            }
        }
        Ok(())
    }

    /// The development issuer writes its file when the CA starts.
    fn is_development_jwks(&self, path: &Path) -> bool {
        self.development && path == development_jwks(&self.data_dir)
    }

    fn cluster_problem(&self, error: &ClusterSettingsError, source: &Source<'_>) -> ConfigError {
        // Of two clusters with one name, the second is one too many.
        let number = self.clusters.iter().rposition(|cluster| cluster.name == error.cluster).unwrap_or_default();
        source.problem(&["cluster", &number.to_string()], &error.to_string())
    }

    /// The longest that any certificate may live.
    pub fn longest_lifetime(&self) -> Duration {
        self.policy.lifetimes.max.max(self.policy.lifetimes.agent).max(self.authority.server_lifetime)
    }

    /// Every file that decides what is in force, to be watched.
    pub fn files(&self) -> Vec<PathBuf> {
        let of_cluster = |cluster: &ClusterSettings| match &cluster.jwks {
            JwksSource::File(path) => Some(path.clone()),
            JwksSource::Url { ca_file, .. } => ca_file.clone(),
            JwksSource::ApiServer => None,
        };
        let of_connection = |cluster: &ClusterSettings| match &cluster.kubernetes {
            Some(KubernetesSettings::Kubeconfig { path, .. }) => Some(path.clone()),
            Some(KubernetesSettings::InCluster) | None => None,
        };
        let clusters = || self.clusters.iter();
        self.path.iter().cloned().chain(clusters().filter_map(of_cluster)).chain(clusters().filter_map(of_connection)).collect()
    }

    /// The sections in which `new` differs and that take effect at once, as the ledger names them.
    pub fn changed(&self, new: &Self) -> Vec<String> {
        let mut changed = Vec::new();
        let sections = [
            ("log", self.log.level != new.log.level),
            ("policy", self.policy != new.policy),
            ("authority", self.authority != new.authority),
            ("rotation", self.rotation != new.rotation),
            ("roles", self.roles != new.roles),
        ];
        changed.extend(sections.into_iter().filter(|(_, differs)| *differs).map(|(name, _)| name.to_owned()));
        let names = self.clusters.iter().chain(&new.clusters).map(|cluster| cluster.name.as_str());
        for name in names.collect::<BTreeSet<_>>() {
            if cluster_of(&self.clusters, name) != cluster_of(&new.clusters, name) {
                changed.push(format!("cluster.{name}"));
            }
        }
        changed
    }

    /// The keys in which `new` differs and that only take effect after a restart.
    pub fn needs_restart(&self, new: &Self) -> Vec<&'static str> {
        let keys = [
            ("trust_domain", self.trust_domain != new.trust_domain),
            ("data_dir", self.data_dir != new.data_dir),
            ("listen", self.listen != new.listen),
            ("http_listen", self.http_listen != new.http_listen),
            ("admin_socket", self.admin_socket != new.admin_socket),
            ("keys", self.keys != new.keys),
            ("log.format", self.log.format != new.log.format),
            ("limits", self.limits != new.limits),
        ];
        keys.into_iter().filter(|(_, differs)| *differs).map(|(key, _)| key).collect()
    }
}

/// Where a development CA's issuer keeps its keys.
pub fn development_issuer_dir(data_dir: &Path) -> PathBuf {
    data_dir.join(DEVELOPMENT_ISSUER_DIR)
}

struct Defaults {
    development: bool,
    trust_domain: TrustDomain,
    data_dir: PathBuf,
    host: Ipv4Addr,
    admin_socket: PathBuf,
}

/// The text that a problem is to be found in.
struct Source<'a> {
    path: Option<&'a Path>,
    text: &'a str,
}

impl Source<'_> {
    fn problem(&self, key: &[&str], problem: &str) -> ConfigError {
        let name = key.join(".");
        let place = match (self.path, chancery_process::config::line_of(self.text, key)) {
            (Some(path), Some(line)) => format!("{}:{line}: {name}", path.display()),
            (Some(path), None) => format!("{}: {name}", path.display()),
            (None, _) => name,
        };
        ConfigError::Value { place, problem: problem.to_owned() }
    }
}

fn development_jwks(data_dir: &Path) -> PathBuf {
    development_issuer_dir(data_dir).join(JWKS_FILE)
}

fn development_cluster(data_dir: &Path) -> ClusterSettings {
    ClusterSettings {
        name: DEVELOPMENT_CLUSTER.into(),
        issuer: development::ISSUER.into(),
        audiences: vec!["chancery".into()],
        agent_audience: "chancery-agent".into(),
        agent_accounts: DEVELOPMENT_AGENT.parse().into_iter().collect(),
        service_accounts: "*".parse().into_iter().collect(),
        kubernetes: None,
        operators: false,
        publish: None,
        jwks: JwksSource::File(development_jwks(data_dir)),
        shared_identities: true,
    }
}

fn readable(path: &Path) -> Result<(), String> {
    let problem = |error| format!("{}: {error}; check that the file exists and that this process may read it", path.display());
    std::fs::File::open(path).map(drop).map_err(problem)
}

fn cluster_of<'a>(clusters: &'a [ClusterSettings], name: &str) -> Option<&'a ClusterSettings> {
    clusters.iter().find(|cluster| cluster.name == name)
}

fn sha256(text: &str) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest(&SHA256, text.as_bytes()).as_ref());
    bytes
}
