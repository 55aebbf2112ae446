//! The section `[csi]`: the plugin that gives each pod a socket of its own.

use std::path::PathBuf;

use serde::Deserialize;

use crate::csi;

/// CSI's limit, which is that of a DNS label.
const MAX_DRIVER_NAME: usize = 63;
const PLUGINS: &str = "/var/lib/kubelet/plugins";
/// Set from the downward API (`spec.nodeName`) in a `DaemonSet`, whose pods share their configuration.
const NODE_NAME: &str = "NODE_NAME";

/// The CSI plugin.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Csi {
    /// The driver's name, as pods' volumes name it.
    pub driver: DriverName,
    /// Where the plugin's socket is; below the kubelet's plugins, under the driver's name, if nothing is said.
    pub plugin_dir: Option<PathBuf>,
    /// Where the kubelet looks for plugins.
    pub registry_dir: PathBuf,
    /// Where the pods' directories are.
    pub socket_root: PathBuf,
    /// What this node is called to the kubelet.
    pub node_id: Option<String>,
    /// Of the pods' tokens.
    pub audience: String,
}

/// Letters, digits, `-` and `.`, at most 63.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct DriverName(pub String);

impl Csi {
    /// What the plugin needs. `state_dir` and `max_volumes` are the agent's.
    pub fn settings(&self, state_dir: PathBuf, max_volumes: usize) -> csi::Settings {
        let hostname = || rustix::system::uname().nodename().to_string_lossy().into_owned();
        let named = || std::env::var(NODE_NAME).ok().filter(|name| !name.is_empty());
        csi::Settings {
            driver: self.driver.0.clone(),
            plugin_dir: self.plugin_dir.clone().unwrap_or_else(|| PathBuf::from(PLUGINS).join(&self.driver.0)),
            registry_dir: self.registry_dir.clone(),
            socket_root: self.socket_root.clone(),
            node_id: self.node_id.clone().or_else(named).unwrap_or_else(hostname),
            audience: self.audience.clone(),
            max_volumes,
            state_dir,
        }
    }
}

impl Default for Csi {
    fn default() -> Self {
        Self {
            driver: DriverName("csi.chancery.dev".to_owned()),
            plugin_dir: None,
            registry_dir: "/var/lib/kubelet/plugins_registry".into(),
            socket_root: "/run/chancery/pods".into(),
            node_id: None,
            audience: "chancery".to_owned(),
        }
    }
}

impl TryFrom<String> for DriverName {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-');
        let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
        if name.len() > MAX_DRIVER_NAME || !ends(name.chars().next()) || !ends(name.chars().last()) || !name.chars().all(allowed) {
            return Err(format!(
                "{name:?} is no name of a CSI driver: letters, digits, `-` and `.`, at most {MAX_DRIVER_NAME}, with a letter or digit at both ends"
            ));
        }
        Ok(Self(name))
    }
}
