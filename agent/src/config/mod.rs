//! The agent's configuration: read and checked as a whole.
//!
//! The log level applies again whenever the file changes or on SIGHUP; everything else when the agent starts, and a file that changes any
//! of that is refused whole. Files that the configuration names (token, bundle) are read anew for each use.

mod csi;
mod example;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use chancery_identity::csr::KeyType;
use chancery_identity::{Fingerprint, TrustDomain};
use chancery_process::config;
use chancery_process::logging::LogSettings;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use crate::ca_client::{self, Anchor, Role};
use crate::sds;
use crate::svids::{self, StateFile};

pub use chancery_process::config::ConfigError;
pub use csi::{Csi, DriverName};
pub use example::EXAMPLE;

/// Deadlines are compared with the clock at least this often.
const TICK: Duration = Duration::from_secs(1);
/// What one call to the CA may carry.
const MAX_BATCH: usize = 512;
/// The CA may take four seconds to ask a cluster about a pod that it does not know, and known ones of the same call wait as long.
const LEAST_CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// What all workloads together may have on average; one alone may have more.
const STREAMS_PER_PROXY: usize = 8;

/// What the agent is told.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The trust domain that the CA issues for.
    pub trust_domain: TrustDomain,
    /// The cluster that this agent belongs to, as the CA's configuration calls it.
    pub cluster: Cluster,
    /// Where the CA listens.
    pub ca_address: Address,
    /// Whom this process serves.
    #[serde(default)]
    pub mode: Mode,
    /// The service-account token to join with; in sidecar mode also the pod's own for its certificates.
    pub token_file: PathBuf,
    /// What trust starts from.
    pub trust: Trust,
    /// Of the workloads' keys and the agent's own.
    #[serde(default = "default_key_type")]
    pub key_type: KeyType,
    /// Where the state is kept for a restart.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// Whether the state may lie on a disk.
    #[serde(default)]
    pub allow_disk_state: bool,
    /// The socket for proxies.
    #[serde(default)]
    pub sds: Sds,
    /// The plugin that gives each pod a socket of its own; none if it is left out.
    pub csi: Option<Csi>,
    /// For `/metrics`, `/livez`, `/readyz`.
    #[serde(default = "default_http_listen")]
    pub http_listen: SocketAddr,
    /// For `chancery-agent status` and `streams`.
    #[serde(default = "default_admin_socket")]
    pub admin_socket: PathBuf,
    /// When and how certificates are renewed.
    #[serde(default)]
    pub renewal: Renewal,
    /// What is refused.
    #[serde(default)]
    pub limits: Limits,
    /// What is logged, and how.
    #[serde(default)]
    pub log: LogSettings,
}

/// Whom the agent serves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Every pod on its node: streams carry their pod's token.
    #[default]
    Node,
    /// The pod that it runs in: whoever reaches the socket is that pod.
    Sidecar,
}

/// A cluster's name: one segment of a SPIFFE ID.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Cluster(pub String);

/// `host:port`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Address(pub String);

/// What trust starts from: exactly one of the two keys.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "TrustKeys")]
pub struct Trust(pub Anchor);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TrustKeys {
    bundle_file: Option<PathBuf>,
    root_fingerprint: Option<String>,
}

/// The socket for proxies.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sds {
    /// Its path.
    pub socket: PathBuf,
    /// Its permissions.
    pub socket_mode: SocketMode,
}

/// Permissions, written `0o660`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "u32")]
pub struct SocketMode(pub u32);

/// When and how certificates are renewed.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Renewal {
    /// The part of the lifetime after which a certificate is renewed.
    pub from: Part,
    /// How long a workload without a stream is kept.
    #[serde(with = "config::duration")]
    pub keep: Duration,
    /// For each call to the CA; at least [`LEAST_CALL_TIMEOUT`].
    #[serde(deserialize_with = "call_timeout")]
    pub call_timeout: Duration,
}

/// Between 0.1 and 0.8.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(try_from = "f64")]
pub struct Part(pub f64);

/// What is refused.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// More workloads at a time.
    pub workloads: usize,
    /// More connections of proxies at a time.
    pub connections: usize,
    /// More streams of one workload at a time.
    pub streams_per_workload: usize,
    /// More requests in one call to the CA.
    pub batch: Batch,
}

/// 1 to 512.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "usize")]
pub struct Batch(pub usize);

impl Config {
    /// Reads and checks the file at `path`.
    ///
    /// # Errors
    /// With the place of what is wrong.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        config::load(path)
    }

    /// What keeps the agent from starting, or from joining, on this machine as it is now; a sentence each, with its place in `text`, which
    /// was read from `path`.
    pub fn problems(&self, path: &Path, text: &str) -> Vec<String> {
        let mut problems = Vec::new();
        let mut add = |key: &[&str], problem: String| {
            let line = config::line_of(text, key).map(|line| format!(":{line}")).unwrap_or_default();
            problems.push(format!("{}{line}: {problem}", path.display()));
        };
        if self.csi.is_some() && self.mode == Mode::Sidecar {
            add(&["csi"], "csi: a sidecar serves its own pod only, and has no volumes to publish; leave the section out".to_owned());
        }
        if let Err(error) = self.trust.0.check(&self.trust_domain) {
            add(&["trust", "bundle_file"], error.to_string());
        }
        if let Err(error) = std::fs::File::open(&self.token_file) {
            add(&["token_file"], format!("token_file: {}: {error}", self.token_file.display()));
        }
        if let Err(error) = StateFile::check_directory(&self.state_dir, self.allow_disk_state) {
            add(&["state_dir"], format!("state_dir: {error}"));
        }
        problems
    }

    /// The keys that differ in `new` and take effect only when the agent starts.
    pub fn needs_restart(&self, new: &Self) -> Vec<&'static str> {
        let keys = [
            ("trust_domain", self.trust_domain != new.trust_domain),
            ("cluster", self.cluster != new.cluster),
            ("ca_address", self.ca_address != new.ca_address),
            ("mode", self.mode != new.mode),
            ("token_file", self.token_file != new.token_file),
            ("trust", self.trust != new.trust),
            ("key_type", self.key_type != new.key_type),
            ("state_dir", self.state_dir != new.state_dir),
            ("allow_disk_state", self.allow_disk_state != new.allow_disk_state),
            ("sds", self.sds != new.sds),
            ("csi", self.csi != new.csi),
            ("http_listen", self.http_listen != new.http_listen),
            ("admin_socket", self.admin_socket != new.admin_socket),
            ("renewal", self.renewal != new.renewal),
            ("limits", self.limits != new.limits),
            ("log.format", self.log.format != new.log.format),
        ];
        keys.into_iter().filter(|(_, differs)| *differs).map(|(key, _)| key).collect()
    }

    /// What the connection to the CA needs.
    pub fn ca_client(&self) -> ca_client::Settings {
        ca_client::Settings {
            trust_domain: self.trust_domain.clone(),
            cluster: self.cluster.0.clone(),
            address: self.ca_address.0.clone(),
            role: match self.mode {
                Mode::Node => Role::Agent,
                Mode::Sidecar => Role::Sidecar,
            },
            token_file: self.token_file.clone(),
            anchor: self.trust.0.clone(),
            key_type: self.key_type,
            call_timeout: self.renewal.call_timeout,
            renew_from: self.renewal.from.0,
            tick: TICK,
        }
    }

    /// What the workloads' certificates need.
    pub fn svids(&self, state: StateFile) -> svids::Settings {
        svids::Settings {
            key_type: self.key_type,
            renew_from: self.renewal.from.0,
            grace: self.renewal.keep,
            max_workloads: self.limits.workloads,
            max_streams: self.limits.streams_per_workload,
            max_batch: self.limits.batch.0,
            tick: TICK,
            state: Some(state),
        }
    }

    /// What the service for proxies needs.
    pub fn sds(&self) -> sds::Settings {
        sds::Settings {
            socket: self.sds.socket.clone(),
            socket_mode: self.sds.socket_mode.0,
            max_connections: self.limits.connections,
            tick: TICK,
        }
    }

    /// What the CSI plugin needs, if there is to be one.
    pub fn csi(&self) -> Option<crate::csi::Settings> {
        let csi = self.csi.as_ref().filter(|_| self.mode == Mode::Node)?;
        Some(csi.settings(self.state_dir.clone(), self.limits.workloads))
    }

    /// Streams at a time, of all workloads together.
    pub fn max_streams(&self) -> usize {
        self.limits.workloads.saturating_mul(STREAMS_PER_PROXY)
    }
}

impl PartialEq for Trust {
    fn eq(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (Anchor::BundleFile(a), Anchor::BundleFile(b)) => a == b,
            (Anchor::RootFingerprint(a), Anchor::RootFingerprint(b)) => a == b,
            _ => false,
        }
    }
}

impl TryFrom<TrustKeys> for Trust {
    type Error = String;

    fn try_from(keys: TrustKeys) -> Result<Self, String> {
        match (keys.bundle_file, keys.root_fingerprint) {
            (Some(path), None) => Ok(Self(Anchor::BundleFile(path))),
            (None, Some(text)) => text.parse::<Fingerprint>().map(|root| Self(Anchor::RootFingerprint(root))).map_err(|e| e.to_string()),
            (Some(_), Some(_)) => Err("bundle_file and root_fingerprint exclude each other".into()),
            (None, None) => Err("one of bundle_file and root_fingerprint is needed: trust never starts from nothing".into()),
        }
    }
}

impl TryFrom<String> for Cluster {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if name.is_empty() || matches!(name.as_str(), "." | "..") || !name.chars().all(allowed) {
            return Err(format!("{name:?} is no name of a cluster: letters, digits, `.`, `-` and `_`"));
        }
        Ok(Self(name))
    }
}

impl TryFrom<String> for Address {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0) => Ok(Self(text)),
            _ => Err(format!("{text:?} is no address: host:port")),
        }
    }
}

impl TryFrom<u32> for SocketMode {
    type Error = String;

    fn try_from(mode: u32) -> Result<Self, String> {
        if mode > 0o777 { Err(format!("{mode:#o} are no permissions; write them as 0o660")) } else { Ok(Self(mode)) }
    }
}

impl TryFrom<f64> for Part {
    type Error = String;

    fn try_from(part: f64) -> Result<Self, String> {
        if (0.1..=0.8).contains(&part) { Ok(Self(part)) } else { Err(format!("{part} is not between 0.1 and 0.8")) }
    }
}

impl TryFrom<usize> for Batch {
    type Error = String;

    fn try_from(count: usize) -> Result<Self, String> {
        if (1..=MAX_BATCH).contains(&count) { Ok(Self(count)) } else { Err(format!("{count} is not between 1 and {MAX_BATCH}")) }
    }
}

impl Default for Sds {
    fn default() -> Self {
        Self { socket: "/run/chancery/sds.sock".into(), socket_mode: SocketMode(0o666) }
    }
}

impl Default for Renewal {
    fn default() -> Self {
        Self { from: Part(0.5), keep: Duration::from_secs(300), call_timeout: Duration::from_secs(10) }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self { workloads: 1000, connections: 2000, streams_per_workload: 64, batch: Batch(64) }
    }
}

fn call_timeout<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let timeout = config::duration::deserialize(deserializer)?;
    if timeout < LEAST_CALL_TIMEOUT {
        return Err(D::Error::custom(format!("{timeout:?} is too short for the CA to ask a cluster about a new pod; at least 5s")));
    }
    Ok(timeout)
}

fn default_key_type() -> KeyType {
    KeyType::EcdsaP256
}

fn default_state_dir() -> PathBuf {
    "/run/chancery/agent-state".into()
}

fn default_http_listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 9465))
}

/// Where `chancery-agent status` and `streams` ask if nothing else is configured.
pub fn default_admin_socket() -> PathBuf {
    "/run/chancery/agent-admin.sock".into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str = r#"
        trust_domain = "example.org"
        cluster = "east"
        ca_address = "ca:8443"
        token_file = "/token"
        trust.bundle_file = "/bundle.pem"
    "#;

    fn read(text: &str) -> Result<Config, String> {
        config::parse(Path::new("agent.toml"), text).map_err(|e| e.to_string())
    }

    #[test]
    fn the_example_says_what_the_defaults_are() {
        let example = read(EXAMPLE).unwrap();
        let mut defaults = read(LEAST).unwrap();
        defaults.ca_address = example.ca_address.clone();
        defaults.token_file = example.token_file.clone();
        defaults.trust = example.trust.clone();
        assert_eq!(example, defaults);
    }

    #[test]
    fn the_examples_section_that_is_commented_out_says_what_its_defaults_are() {
        let shown: Vec<_> =
            EXAMPLE.lines().map(|line| line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).unwrap_or(line)).collect();
        let csi = read(&shown.join("\n")).unwrap().csi.unwrap();
        let settings = |csi: &Csi| format!("{:?}", csi.settings("/state".into(), 1));
        assert_eq!(settings(&Csi { node_id: None, ..csi.clone() }), settings(&Csi::default()));
        assert_eq!(csi.settings("/state".into(), 1).node_id, "node-1");
    }

    #[test]
    fn a_sidecar_has_no_csi_plugin() {
        let text = format!("mode = \"sidecar\"\n{LEAST}\n[csi]\n");
        let config = read(&text).unwrap();
        assert!(config.csi().is_none());
        assert!(config.problems(Path::new("agent.toml"), &text).iter().any(|problem| problem.starts_with("agent.toml:9: csi: ")));
        assert!(read(&format!("{LEAST}\n[csi]\n")).unwrap().csi().is_some());
    }

    #[test]
    fn the_example_explains_every_key() {
        let keys = EXAMPLE.lines().filter(|line| line.contains(" = ") && !line.starts_with("# "));
        for key in keys {
            let before = EXAMPLE[..EXAMPLE.find(key).unwrap()].trim_end();
            assert!(before.lines().last().unwrap().starts_with("# "), "{key} is not explained");
        }
        let mut spoiled = EXAMPLE.to_owned();
        spoiled.push_str("\nbatches = 1\n");
        assert!(read(&spoiled).unwrap_err().contains("unknown field `batches`"));
    }

    #[test]
    fn a_check_names_what_is_missing_on_this_machine() {
        let text = LEAST.replace("/token", "/nonexistent/token").replace("/bundle.pem", "/nonexistent/bundle");
        let problems = read(&text).unwrap().problems(Path::new("agent.toml"), &text);
        let named = |start: &str| problems.iter().any(|problem| problem.starts_with(start));
        assert!(named("agent.toml:6: trust.bundle_file: /nonexistent/bundle: "), "{problems:?}");
        assert!(named("agent.toml:5: token_file: /nonexistent/token: "), "{problems:?}");
    }

    #[test]
    fn every_key_but_the_log_level_is_named_as_one_that_needs_a_restart() {
        let running = read(LEAST).unwrap();
        let changed = |key: &str, text: &str| running.needs_restart(&read(text).unwrap_or_else(|error| panic!("{key}: {error}")));
        let replaced = |key: &str, old: &str, new: &str| assert_eq!(changed(key, &LEAST.replace(old, new)), [key]);
        replaced("trust_domain", "example.org", "example.com");
        replaced("cluster", "\"east\"", "\"west\"");
        replaced("ca_address", "ca:8443", "ca:8444");
        replaced("token_file", "/token", "/tokens");
        replaced("trust", "/bundle.pem", "/bundles.pem");
        let added = [
            ("mode", "mode = \"sidecar\""),
            ("key_type", "key_type = \"ed25519\""),
            ("state_dir", "state_dir = \"/run/state\""),
            ("allow_disk_state", "allow_disk_state = true"),
            ("sds", "sds.socket_mode = 0o660"),
            ("csi", "csi.driver = \"csi.example.org\""),
            ("http_listen", "http_listen = \"127.0.0.1:1\""),
            ("admin_socket", "admin_socket = \"/run/admin.sock\""),
            ("renewal", "renewal.from = 0.6"),
            ("limits", "limits.batch = 7"),
            ("log.format", "log.format = \"json\""),
        ];
        for (key, line) in added {
            assert_eq!(changed(key, &format!("{line}\n{LEAST}")), [key]);
        }
        assert!(changed("log.level", &format!("log.level = \"debug\"\n{LEAST}")).is_empty());
        assert!(changed("limits", &format!("limits.batch = 64\n{LEAST}")).is_empty(), "a default that is written out changes nothing");
    }

    #[test]
    fn mistakes_are_refused_with_their_line() {
        let cases = [
            ("trust_domain = \"example.org\"", "trust_domain = \"Exa mple\"", "the character"),
            ("cluster = \"east\"", "cluster = \"a/b\"", "is no name of a cluster"),
            ("cluster = \"east\"", "cluster = \"..\"", "is no name of a cluster"),
            ("cluster = \"east\"", "cluster = \"east\"\nrenewal.call_timeout = \"4s\"", "at least 5s"),
            ("ca_address = \"ca:8443\"", "ca_address = \"ca\"", "host:port"),
            ("token_file = \"/token\"", "token_files = \"/token\"", "unknown field `token_files`"),
            ("trust.bundle_file = \"/bundle.pem\"", "trust.root_fingerprint = \"ab\"", "64 hexadecimal digits"),
            ("trust.bundle_file = \"/bundle.pem\"", "trust = {}", "trust never starts from nothing"),
            ("cluster = \"east\"", "cluster = \"east\"\nrenewal.from = 0.99", "not between 0.1 and 0.8"),
            ("cluster = \"east\"", "cluster = \"east\"\nlimits.batch = 513", "not between 1 and 512"),
            ("cluster = \"east\"", "cluster = \"east\"\nsds.socket_mode = 0o1777", "no permissions"),
            ("cluster = \"east\"", "cluster = \"east\"\ncsi.driver = \"csi/x\"", "no name of a CSI driver"),
            ("cluster = \"east\"", "cluster = \"east\"\ncsi.driver = \"csi.\"", "no name of a CSI driver"),
        ];
        for (good, bad, expected) in cases {
            let error = read(&LEAST.replace(good, bad)).unwrap_err();
            assert!(error.contains(expected) && error.starts_with("agent.toml:"), "{bad}: {error}");
        }
        let both = LEAST.replace("trust.bundle_file = \"/bundle.pem\"", "trust = {bundle_file = \"/b\", root_fingerprint = \"ab\"}");
        assert!(read(&both).unwrap_err().contains("exclude each other"));
    }
}
