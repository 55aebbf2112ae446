//! How a cluster's API server is reached, as the configuration says it.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// `{ in_cluster = true }`, or `{ kubeconfig = "…", context = "…" }`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawSettings", into = "RawSettings")]
pub enum KubernetesSettings {
    /// The cluster that this process runs in, by its own service account.
    InCluster,
    /// By what a kubeconfig file says.
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// Which of its contexts; the current one if not said.
        context: Option<String>,
    },
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSettings {
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    in_cluster: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    kubeconfig: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    context: Option<String>,
}

impl TryFrom<RawSettings> for KubernetesSettings {
    type Error = String;

    fn try_from(raw: RawSettings) -> Result<Self, String> {
        match (raw.in_cluster, raw.kubeconfig, raw.context) {
            (true, None, None) => Ok(Self::InCluster),
            (false, Some(path), context) => Ok(Self::Kubeconfig { path, context }),
            _ => Err("kubernetes: give either `in_cluster = true`, or `kubeconfig` with an optional `context`".into()),
        }
    }
}

impl From<KubernetesSettings> for RawSettings {
    fn from(settings: KubernetesSettings) -> Self {
        match settings {
            KubernetesSettings::InCluster => Self { in_cluster: true, kubeconfig: None, context: None },
            KubernetesSettings::Kubeconfig { path, context } => Self { in_cluster: false, kubeconfig: Some(path), context },
        }
    }
}

impl fmt::Display for KubernetesSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InCluster => f.write_str("the cluster that this process runs in"),
            Self::Kubeconfig { path, context: None } => path.display().fmt(f),
            Self::Kubeconfig { path, context: Some(context) } => write!(f, "{}, context {context}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<KubernetesSettings, String> {
        #[derive(Deserialize)]
        struct Cluster {
            kubernetes: KubernetesSettings,
        }
        toml::from_str::<Cluster>(&format!("kubernetes = {text}")).map(|cluster| cluster.kubernetes).map_err(|error| error.to_string())
    }

    #[test]
    fn either_the_own_cluster_or_a_kubeconfig_is_named() {
        assert_eq!(parse("{ in_cluster = true }").unwrap(), KubernetesSettings::InCluster);
        let named = parse("{ kubeconfig = \"a\", context = \"east\" }").unwrap();
        assert_eq!(named, KubernetesSettings::Kubeconfig { path: "a".into(), context: Some("east".into()) });
        for text in ["{ }", "{ in_cluster = false }", "{ in_cluster = true, kubeconfig = \"a\" }", "{ context = \"east\" }"] {
            assert!(parse(text).unwrap_err().contains("kubernetes: give either"), "{text}");
        }
        assert!(parse("{ in_cluster = true, colour = 1 }").unwrap_err().contains("unknown field"));
    }
}
