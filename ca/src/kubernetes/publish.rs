//! Copies of the trust bundle as objects of a cluster, for those who ask neither the CA nor an agent.

use std::fmt;

use http::{Request, header};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{ApiError, ApiServer};

/// The `ConfigMap`, in each namespace that gets it.
pub const CONFIG_MAP: &str = "chancery-trust-bundle";
/// What the bundle is under in it.
pub const CONFIG_MAP_KEY: &str = "trust-bundle.pem";
/// By it the API server tells what of an object the CA has set.
const FIELD_MANAGER: &str = "chancery-ca";
/// The newest first; 1.33 to 1.36 have only the other.
const TRUST_BUNDLE_VERSIONS: [&str; 2] = ["v1", "v1beta1"];

/// Which copies a cluster gets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PublishSettings {
    /// The namespaces that get a `ConfigMap`.
    pub namespaces: Vec<String>,
    /// The signer of a `ClusterTrustBundle`; without one there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signer_name: Option<String>,
}

/// One copy.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TrustCopy {
    /// Of this namespace.
    ConfigMap {
        /// Which.
        namespace: String,
    },
    /// Of the whole cluster.
    ClusterTrustBundle {
        /// Who vouches for it.
        signer_name: String,
    },
}

impl PublishSettings {
    /// All of them.
    pub fn copies(&self) -> Vec<TrustCopy> {
        let config_maps = self.namespaces.iter().map(|namespace| TrustCopy::ConfigMap { namespace: namespace.clone() });
        let bundles = self.signer_name.iter().map(|name| TrustCopy::ClusterTrustBundle { signer_name: name.clone() });
        config_maps.chain(bundles).collect()
    }

    /// What is wrong with them.
    pub fn problem(&self) -> Option<String> {
        let is_name = |name: &str| {
            !name.is_empty() && name.len() <= 253 && name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.'))
        };
        if let Some(namespace) = self.namespaces.iter().find(|namespace| !is_name(namespace)) {
            return Some(format!("`publish.namespaces` has {namespace:?}, which is no namespace"));
        }
        match &self.signer_name {
            Some(signer) if !signer.split_once('/').is_some_and(|(domain, path)| is_name(domain) && is_name(path)) => {
                Some(format!("`publish.signer_name` is {signer:?}; a signer is named <domain>/<name>, such as chancery.dev/mesh"))
            }
            None if self.namespaces.is_empty() => Some("`publish` names neither `namespaces` nor a `signer_name`".into()),
            _ => None,
        }
    }
}

impl ApiServer {
    /// Makes a copy of the bundle that has this sequence, or changes it. Fields that somebody else has set in the object stay.
    ///
    /// # Errors
    /// If the API server did not do it, with what the CA's account must be allowed for it.
    pub async fn publish(&self, copy: &TrustCopy, sequence: u64, pem: &str) -> Result<(), ApiError> {
        let published = match copy {
            TrustCopy::ConfigMap { namespace } => self.publish_config_map(namespace, sequence, pem).await,
            TrustCopy::ClusterTrustBundle { signer_name } => self.publish_trust_bundle(signer_name, pem).await,
        };
        published.map_err(|error| match error {
            ApiError::Forbidden(words) => ApiError::Refused(format!("{words}; allow its account {}", copy.needs())),
            error => error,
        })
    }

    async fn publish_config_map(&self, namespace: &str, sequence: u64, pem: &str) -> Result<(), ApiError> {
        let path = format!("/api/v1/namespaces/{namespace}/configmaps/{CONFIG_MAP}");
        // By the line in front, an agent that missed a rotation tells that the file is newer than what it remembers.
        let text = format!("# sequence: {sequence}\n{pem}");
        let object = json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": CONFIG_MAP, "namespace": namespace },
            "data": { CONFIG_MAP_KEY: text },
        });
        let exists = self.apply(&path, &object).await?;
        if exists { Ok(()) } else { Err(ApiError::Refused(format!("404: there is no namespace {namespace}"))) }
    }

    async fn publish_trust_bundle(&self, signer_name: &str, pem: &str) -> Result<(), ApiError> {
        let name = trust_bundle_name(signer_name);
        for version in TRUST_BUNDLE_VERSIONS {
            let path = format!("/apis/certificates.k8s.io/{version}/clustertrustbundles/{name}");
            let object = json!({
                "apiVersion": format!("certificates.k8s.io/{version}"), "kind": "ClusterTrustBundle", "metadata": { "name": name },
                "spec": { "signerName": signer_name, "trustBundle": pem },
            });
            if self.apply(&path, &object).await? {
                return Ok(());
            }
        }
        Err(ApiError::Refused("404: the cluster has no ClusterTrustBundles; leave `signer_name` out".into()))
    }

    /// Server-side apply; whether there is such a kind, and the object's namespace.
    async fn apply(&self, path: &str, object: &Value) -> Result<bool, ApiError> {
        let request = Request::patch(format!("{path}?fieldManager={FIELD_MANAGER}&force=true"));
        let request = request.header(header::CONTENT_TYPE, "application/apply-patch+yaml").body(object.to_string().into_bytes());
        Ok(self.ask(request).await?.is_some())
    }
}

impl TrustCopy {
    /// What the CA's account must be allowed.
    fn needs(&self) -> String {
        match self {
            Self::ConfigMap { namespace } => format!("get, create and patch on the ConfigMap {CONFIG_MAP} in namespace {namespace}"),
            Self::ClusterTrustBundle { signer_name } => {
                format!("get, create and patch on the {self}, and attest on the signer {signer_name}")
            }
        }
    }
}

/// The API server demands that it begins with the signer's.
fn trust_bundle_name(signer_name: &str) -> String {
    format!("{}:trust-bundle", signer_name.replace('/', ":"))
}

impl fmt::Display for TrustCopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ConfigMap { namespace } => write!(f, "ConfigMap {namespace}/{CONFIG_MAP}"),
            Self::ClusterTrustBundle { signer_name } => write!(f, "ClusterTrustBundle {}", trust_bundle_name(signer_name)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(namespaces: &[&str], signer_name: Option<&str>) -> PublishSettings {
        let namespaces = namespaces.iter().map(|&name| name.to_owned()).collect();
        PublishSettings { namespaces, signer_name: signer_name.map(str::to_owned) }
    }

    #[test]
    fn each_copy_has_its_name() {
        let settings = settings(&["chancery-system", "shop"], Some("chancery.dev/mesh"));
        let names: Vec<_> = settings.copies().iter().map(TrustCopy::to_string).collect();
        let expected = [
            "ConfigMap chancery-system/chancery-trust-bundle",
            "ConfigMap shop/chancery-trust-bundle",
            "ClusterTrustBundle chancery.dev:mesh:trust-bundle",
        ];
        assert_eq!(names, expected);
        assert_eq!(settings.problem(), None);
    }

    #[test]
    fn names_that_would_lead_elsewhere_are_refused() {
        for (namespaces, signer_name) in
            [(vec!["a/b"], None), (vec![""], None), (vec![], Some("mesh")), (vec![], Some("a/b/c")), (vec![], None)]
        {
            assert!(settings(&namespaces, signer_name).problem().is_some_and(|problem| problem.contains("publish")), "{namespaces:?}");
        }
    }
}
