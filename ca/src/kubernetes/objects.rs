//! Pods and service accounts as far as anything here is decided by them: whatever else they hold is not even read into memory.

use std::borrow::Cow;

use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::Resource;
use kube::core::NamespaceResourceScope;
use serde::{Deserialize, Deserializer};
use time::OffsetDateTime;
use uuid::Uuid;

/// A pod.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct WorkloadPod {
    #[serde(default, deserialize_with = "bare")]
    metadata: ObjectMeta,
    #[serde(default)]
    spec: Spec,
    #[serde(default)]
    status: Status,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    service_account_name: String,
    node_name: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Status {
    phase: String,
}

/// A service account; the API server is asked for its metadata alone.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct ServiceAccountObject {
    #[serde(default, deserialize_with = "bare")]
    metadata: ObjectMeta,
}

/// What is read of an object's metadata. Managed fields and annotations are most of a pod.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Bare {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    deletion_timestamp: Option<Time>,
}

fn bare<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ObjectMeta, D::Error> {
    let Bare { name, namespace, uid, resource_version, deletion_timestamp } = Bare::deserialize(deserializer)?;
    Ok(ObjectMeta { name, namespace, uid, resource_version, deletion_timestamp, ..ObjectMeta::default() })
}

impl WorkloadPod {
    /// Kubernetes UID.
    pub fn uid(&self) -> Option<Uuid> {
        uid(&self.metadata)
    }

    /// Its namespace.
    pub fn namespace(&self) -> &str {
        self.metadata.namespace.as_deref().unwrap_or_default()
    }

    /// The name of its service account.
    pub fn service_account(&self) -> &str {
        &self.spec.service_account_name
    }

    /// The name of its node; none before it is scheduled.
    pub fn node(&self) -> Option<&str> {
        Some(self.spec.node_name.as_str()).filter(|node| !node.is_empty())
    }

    /// Whether all its containers have ended for good.
    pub fn is_finished(&self) -> bool {
        matches!(self.status.phase.as_str(), "Succeeded" | "Failed")
    }

    /// When its deletion was or is to be over, if it is being deleted.
    pub fn deleted_at(&self) -> Option<OffsetDateTime> {
        deleted_at(&self.metadata)
    }
}

impl ServiceAccountObject {
    /// Kubernetes UID.
    pub fn uid(&self) -> Option<Uuid> {
        uid(&self.metadata)
    }

    /// Its namespace.
    pub fn namespace(&self) -> &str {
        self.metadata.namespace.as_deref().unwrap_or_default()
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.metadata.name.as_deref().unwrap_or_default()
    }

    /// When it was deleted, if something still holds it.
    pub fn deleted_at(&self) -> Option<OffsetDateTime> {
        deleted_at(&self.metadata)
    }
}

fn uid(metadata: &ObjectMeta) -> Option<Uuid> {
    Uuid::parse_str(metadata.uid.as_deref()?).ok()
}

fn deleted_at(metadata: &ObjectMeta) -> Option<OffsetDateTime> {
    OffsetDateTime::from_unix_timestamp(metadata.deletion_timestamp.as_ref()?.0.as_second()).ok()
}

impl Resource for WorkloadPod {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        Pod::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        Pod::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        Pod::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        Pod::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

impl Resource for ServiceAccountObject {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        ServiceAccount::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        ServiceAccount::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        ServiceAccount::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        ServiceAccount::plural(&())
    }

    fn metadata_api() -> bool {
        true
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_pod_only_what_is_decided_by_is_read() {
        let pod: WorkloadPod = serde_json::from_value(serde_json::json!({
            "kind": "Pod",
            "metadata": {
                "name": "cart-1", "namespace": "shop", "uid": "0b9a2c5e-8f5e-4f51-9c0e-6f1d6f0c7a11", "resourceVersion": "7",
                "deletionTimestamp": "2027-01-15T08:00:00Z", "annotations": { "a": "b" }, "managedFields": [{ "manager": "kubelet" }],
            },
            "spec": { "serviceAccountName": "cart", "nodeName": "node-a", "containers": [] },
            "status": { "phase": "Succeeded" },
        }))
        .unwrap();
        assert_eq!((pod.namespace(), pod.service_account(), pod.node()), ("shop", "cart", Some("node-a")));
        assert!(pod.is_finished() && pod.uid().is_some());
        assert_eq!(pod.deleted_at().unwrap().unix_timestamp(), 1_800_000_000);
        assert!(pod.metadata.annotations.is_none() && pod.metadata.managed_fields.is_none());
    }

    #[test]
    fn a_pod_that_is_not_scheduled_has_no_node() {
        let pod: WorkloadPod = serde_json::from_str("{\"metadata\":{},\"spec\":{\"serviceAccountName\":\"cart\"}}").unwrap();
        assert!(pod.node().is_none() && !pod.is_finished() && pod.deleted_at().is_none());
    }
}
