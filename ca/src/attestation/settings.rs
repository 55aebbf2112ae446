//! What the configuration says of a cluster.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

use http::Uri;
use serde::{Deserialize, Serialize};

use super::{AccountPattern, OPERATORS_AUDIENCE};
use crate::kubernetes::{KubernetesSettings, PublishSettings};

/// A cluster whose workloads and agents may get identities, as a `[[cluster]]` of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterSettings {
    /// Names it in SPIFFE IDs, logs and the ledger: 1 to 63 of a-z, 0-9 and `-`.
    pub name: String,
    /// What `iss` must be in its tokens. Clusters may share one; keys are never chosen by it.
    pub issuer: String,
    /// A workload's token must be for one of these.
    #[serde(default = "workload_audiences")]
    pub audiences: Vec<String>,
    /// A joining agent's token must be for this one.
    #[serde(default = "agent_audience")]
    pub agent_audience: String,
    /// The service accounts (`namespace/name`) that agents run under.
    #[serde(default)]
    pub agent_accounts: Vec<AccountPattern>,
    /// The service accounts that it may speak for: `*`, `namespace/*`, `namespace/name`.
    pub service_accounts: Vec<AccountPattern>,
    /// How its API server is reached, which is then asked whether a token's pod exists. Without it, tokens are verified offline alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kubernetes: Option<KubernetesSettings>,
    /// Whether people may operate the CA by tokens of its service accounts, as its RBAC says ([`super::OPERATORS_AUDIENCE`]).
    #[serde(default)]
    pub operators: bool,
    /// Which copies of the trust bundle are kept up to date in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub publish: Option<PublishSettings>,
    /// Where its public keys are; at its API server unless told otherwise.
    #[serde(default, skip_serializing_if = "JwksSource::is_api_server")]
    pub jwks: JwksSource,
    /// Whether another cluster, which must say so too, may produce the same SPIFFE IDs.
    #[serde(default)]
    pub shared_identities: bool,
}

/// Where a cluster's public keys (RFC 7517) are: `{ file = "…" }` or `{ url = "https://…", ca_file = "…" }`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawSource", into = "RawSource")]
pub enum JwksSource {
    /// At the API server that `kubernetes` names, fetched now and then.
    #[default]
    ApiServer,
    /// In a file; whoever watches it calls [`super::Clusters::reload_keys`].
    File(PathBuf),
    /// At an HTTPS address, fetched now and then.
    Url {
        /// `https` only.
        url: Uri,
        /// PEM; instead of the system's authorities.
        ca_file: Option<PathBuf>,
    },
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSource {
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    url: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ca_file: Option<PathBuf>,
}

/// A rule that a `[[cluster]]` breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cluster {cluster:?}: {problem}")]
pub struct ClusterSettingsError {
    /// Its name.
    pub cluster: String,
    /// What is wrong and what to do.
    pub problem: String,
}

fn workload_audiences() -> Vec<String> {
    vec!["chancery".to_owned()]
}

fn agent_audience() -> String {
    "chancery-agent".to_owned()
}

/// Checks what no single value can tell.
///
/// # Errors
/// The first cluster that breaks a rule.
pub fn check(clusters: &[ClusterSettings]) -> Result<(), ClusterSettingsError> {
    let mut names = BTreeSet::new();
    for cluster in clusters {
        if let Some(problem) = problem_of(cluster, !names.insert(cluster.name.as_str())) {
            return Err(ClusterSettingsError { cluster: cluster.name.clone(), problem });
        }
    }
    Ok(())
}

fn problem_of(cluster: &ClusterSettings, twice: bool) -> Option<String> {
    let named = (1..=63).contains(&cluster.name.len()) && cluster.name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
    if !named {
        Some("`name` is 1 to 63 of a-z, 0-9 and `-`".into())
    } else if twice {
        Some("the name comes twice; give each cluster its own".into())
    } else if cluster.issuer.is_empty() {
        Some("`issuer` is empty; it is the `iss` of the cluster's tokens".into())
    } else if cluster.audiences.is_empty() || cluster.audiences.iter().any(String::is_empty) {
        Some("`audiences` names no audience for the tokens of workloads".into())
    } else if cluster.agent_audience.is_empty() || cluster.audiences.contains(&cluster.agent_audience) {
        Some("`agent_audience` must be set and none of `audiences`, or a workload's token would make an agent".into())
    } else if cluster.jwks.is_api_server() && cluster.kubernetes.is_none() {
        Some("give `jwks`, where its public keys are, or `kubernetes`, how its API server is reached, which has them".into())
    } else if cluster.operators && cluster.kubernetes.is_none() {
        Some("`operators` needs `kubernetes`, how its API server is reached, which is asked who may do what".into())
    } else if cluster.operators && cluster.audiences.iter().chain([&cluster.agent_audience]).any(|one| one == OPERATORS_AUDIENCE) {
        Some(format!("{OPERATORS_AUDIENCE:?} is the audience of people's tokens; give those of workloads and agents another"))
    } else if cluster.publish.is_some() && cluster.kubernetes.is_none() {
        Some("`publish` needs `kubernetes`, how its API server is reached".into())
    } else if let Some(problem) = cluster.publish.as_ref().and_then(PublishSettings::problem) {
        Some(problem)
    } else if cluster.service_accounts.is_empty() {
        Some("`service_accounts` is empty, so it could speak for nobody; name some (`*` for all)".into())
    } else {
        let wide = cluster.agent_accounts.iter().find(|account| !account.is_exact())?;
        Some(format!("`agent_accounts` has {wide}; name each account of an agent in full (`namespace/name`)"))
    }
}

impl JwksSource {
    fn is_api_server(&self) -> bool {
        *self == Self::ApiServer
    }
}

impl TryFrom<RawSource> for JwksSource {
    type Error = String;

    fn try_from(raw: RawSource) -> Result<Self, String> {
        match (raw.file, raw.url, raw.ca_file) {
            (Some(file), None, None) => Ok(Self::File(file)),
            (None, Some(url), ca_file) => {
                let url: Uri = url.parse().map_err(|error| format!("jwks: the url {url:?}: {error}"))?;
                if url.scheme_str() != Some("https") || url.host().is_none_or(str::is_empty) {
                    return Err(format!("jwks: {url} is no https address; keys are only fetched over TLS"));
                }
                Ok(Self::Url { url, ca_file })
            }
            _ => Err("jwks: give either `file`, or `url` with an optional `ca_file`".into()),
        }
    }
}

impl fmt::Display for JwksSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ApiServer => f.write_str("the API server"),
            Self::File(path) => path.display().fmt(f),
            Self::Url { url, .. } => url.fmt(f),
        }
    }
}

impl From<JwksSource> for RawSource {
    fn from(source: JwksSource) -> Self {
        match source {
            JwksSource::ApiServer => Self { file: None, url: None, ca_file: None },
            JwksSource::File(file) => Self { file: Some(file), url: None, ca_file: None },
            JwksSource::Url { url, ca_file } => Self { file: None, url: Some(url.to_string()), ca_file },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(more: &str) -> Result<ClusterSettings, String> {
        let text = format!("name = \"east\"\nissuer = \"https://k\"\nservice_accounts = [\"*\"]\n{more}");
        toml::from_str(&text).map_err(|error| error.to_string())
    }

    #[test]
    fn the_defaults_are_those_of_the_documentation() {
        let cluster = parse("jwks = { file = \"keys.json\" }").unwrap();
        assert_eq!(cluster.audiences, ["chancery"]);
        assert_eq!(cluster.agent_audience, "chancery-agent");
        assert!(!cluster.shared_identities && check(&[cluster]).is_ok());
    }

    #[test]
    fn an_unknown_key_and_a_jwks_without_tls_are_refused() {
        assert!(parse("jwks = { file = \"k\" }\ncolour = 1").unwrap_err().contains("unknown field"));
        assert!(parse("jwks = { file = \"k\", colour = 1 }").unwrap_err().contains("unknown field"));
        for source in ["{ url = \"http://k/jwks\" }", "{ }", "{ file = \"a\", url = \"https://k\" }", "{ url = \"/jwks\" }"] {
            assert!(parse(&format!("jwks = {source}")).unwrap_err().contains("jwks"), "{source}");
        }
        assert!(parse("jwks = { url = \"https://k/openid/v1/jwks\", ca_file = \"ca.pem\" }").is_ok());
    }

    #[test]
    fn keys_come_from_the_api_server_where_nothing_else_is_said() {
        let cluster = parse("kubernetes = { in_cluster = true }").unwrap();
        assert!(cluster.jwks.is_api_server() && check(&[cluster]).is_ok());
        let neither = parse("").unwrap();
        assert!(check(&[neither]).unwrap_err().problem.contains("`kubernetes`"));
    }

    #[test]
    fn settings_that_contradict_themselves_are_refused() {
        let good = parse("jwks = { file = \"k\" }").unwrap();
        let refused = |change: fn(&mut ClusterSettings)| {
            let mut cluster = good.clone();
            change(&mut cluster);
            assert!(check(&[cluster.clone()]).is_err(), "{cluster:?}");
        };
        refused(|c| c.name = "a/b".into());
        refused(|c| c.name = String::new());
        refused(|c| c.issuer = String::new());
        refused(|c| c.audiences.clear());
        refused(|c| c.agent_audience = "chancery".into());
        refused(|c| c.service_accounts.clear());
        refused(|c| c.operators = true);
        refused(|c| {
            (c.operators, c.kubernetes) = (true, Some(KubernetesSettings::InCluster));
            c.agent_audience = OPERATORS_AUDIENCE.into();
        });
        refused(|c| c.publish = Some(PublishSettings { namespaces: vec!["shop".into()], signer_name: None }));
        refused(|c| c.agent_accounts = vec!["kube-system/*".parse().unwrap()]);
        assert!(check(&[good.clone(), good.clone()]).unwrap_err().problem.contains("twice"));
    }
}
