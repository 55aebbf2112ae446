//! Doing by hand what controllers, the scheduler and kubelets do in a cluster: nodes, service accounts, pods, and the tokens of pods.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use k8s_openapi::api::authentication::v1::{TokenRequest, TokenReview, TokenReviewStatus};
use k8s_openapi::api::core::v1;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::Result;

/// Namespaces and nodes that tests share a server with have names of their own.
static NEXT: AtomicU32 = AtomicU32::new(1);

/// Somebody who may do everything.
#[derive(Clone)]
pub struct Admin {
    client: Client,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: Uuid,
}

/// A pod that was created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: Uuid,
    /// Its service account.
    pub account: String,
    /// The name of its node.
    pub node: String,
}

impl Admin {
    pub(super) fn new(client: Client) -> Self {
        Self { client }
    }

    /// For whatever is not here.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Creates a namespace whose name begins with this, and returns its name.
    pub async fn namespace(&self, prefix: &str) -> Result<String> {
        let name = distinct(prefix);
        create(&Api::<v1::Namespace>::all(self.client.clone()), &json!({"metadata": {"name": name}})).await?;
        Ok(name)
    }

    /// Creates a node whose name begins with this.
    pub async fn node(&self, prefix: &str) -> Result<Node> {
        self.node_named(&distinct(prefix)).await
    }

    /// Creates a node of this very name.
    pub async fn node_named(&self, name: &str) -> Result<Node> {
        let node = create(&self.nodes(), &json!({"metadata": {"name": name}})).await?;
        Ok(Node { name: name.to_owned(), uid: uid_of(&node)? })
    }

    /// Deletes a node; its pods stay.
    pub async fn delete_node(&self, node: &Node) -> Result<()> {
        delete(&self.nodes(), &node.name, 0).await
    }

    /// Creates a service account and returns its UID.
    pub async fn account(&self, namespace: &str, name: &str) -> Result<Uuid> {
        uid_of(&create(&self.accounts(namespace), &json!({"metadata": {"name": name}})).await?)
    }

    /// Deletes a service account; its pods stay.
    pub async fn delete_account(&self, namespace: &str, name: &str) -> Result<()> {
        delete(&self.accounts(namespace), name, 0).await
    }

    /// Takes away from a service account whatever it was allowed in the whole cluster.
    pub async fn forbid(&self, namespace: &str, account: &str) -> Result<()> {
        let bindings = Api::<ClusterRoleBinding>::all(self.client.clone());
        for binding in bindings.list(&ListParams::default()).await? {
            let mut subjects = binding.subjects.iter().flatten();
            if subjects.any(|subject| subject.name == account && subject.namespace.as_deref() == Some(namespace)) {
                bindings.delete(&binding.name_any(), &DeleteParams::default()).await?;
            }
        }
        Ok(())
    }

    /// Allows a service account, in the whole cluster, what these RBAC rules say.
    pub async fn allow(&self, namespace: &str, account: &str, rules: &Value) -> Result<()> {
        let name = distinct(account);
        create(&Api::<ClusterRole>::all(self.client.clone()), &json!({"metadata": {"name": name}, "rules": rules})).await?;
        let binding = json!({
            "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
            "subjects": [{"kind": "ServiceAccount", "namespace": namespace, "name": account}],
        });
        create(&Api::<ClusterRoleBinding>::all(self.client.clone()), &binding).await?;
        Ok(())
    }

    /// Creates a pod of a service account on a node, as the scheduler would have bound it.
    pub async fn pod(&self, namespace: &str, name: &str, account: &str, node: &str) -> Result<Pod> {
        let object = json!({
            "metadata": {"name": name},
            "spec": {"serviceAccountName": account, "nodeName": node, "containers": [{"name": "main", "image": "image.test/main"}]},
        });
        let created = create(&self.pods(namespace), &object).await?;
        let (namespace, name, account, node) = (namespace.to_owned(), name.to_owned(), account.to_owned(), node.to_owned());
        Ok(Pod { namespace, name, uid: uid_of(&created)?, account, node })
    }

    /// Deletes a pod at once.
    pub async fn delete_pod(&self, pod: &Pod) -> Result<()> {
        delete(&self.pods(&pod.namespace), &pod.name, 0).await
    }

    /// Begins to delete a pod: it has a deletion timestamp from now on, so much in the future, and stays, since no kubelet finishes it.
    pub async fn terminate_pod(&self, pod: &Pod, grace: Duration) -> Result<()> {
        delete(&self.pods(&pod.namespace), &pod.name, u32::try_from(grace.as_secs())?).await
    }

    /// Sets a pod's phase, as its kubelet would: `Running`, `Succeeded`, `Failed`.
    pub async fn set_phase(&self, pod: &Pod, phase: &str) -> Result<()> {
        let patch = Patch::Merge(json!({"status": {"phase": phase}}));
        self.pods(&pod.namespace).patch_status(&pod.name, &PatchParams::default(), &patch).await?;
        Ok(())
    }

    /// The token that the kubelet would get for this pod. The API server grants ten minutes at least.
    pub async fn token(&self, pod: &Pod, audience: &str, lifetime: Duration) -> Result<String> {
        let bound = json!({"apiVersion": "v1", "kind": "Pod", "name": pod.name, "uid": pod.uid});
        self.request_token(&pod.namespace, &pod.account, audience, lifetime, &bound).await
    }

    /// A token of a service account that is bound to no pod.
    pub async fn unbound_token(&self, namespace: &str, account: &str, audience: &str, lifetime: Duration) -> Result<String> {
        self.request_token(namespace, account, audience, lifetime, &Value::Null).await
    }

    /// What the API server thinks of a token, asked for this audience.
    pub async fn review(&self, token: &str, audience: &str) -> Result<TokenReviewStatus> {
        let review = json!({"spec": {"token": token, "audiences": [audience]}});
        let answer = create(&Api::<TokenReview>::all(self.client.clone()), &review).await?;
        Ok(answer.status.ok_or("a TokenReview without a status")?)
    }

    /// The public keys of tokens, as the API server publishes them.
    pub async fn jwks(&self) -> Result<String> {
        self.get("/openid/v1/jwks").await
    }

    /// What the API server answers at this path.
    pub async fn get(&self, path: &str) -> Result<String> {
        Ok(self.client.request_text(http::Request::get(path).body(Vec::new())?).await?)
    }

    async fn request_token(&self, namespace: &str, account: &str, audience: &str, lifetime: Duration, bound: &Value) -> Result<String> {
        let spec = json!({"audiences": [audience], "expirationSeconds": lifetime.as_secs(), "boundObjectRef": bound});
        let request: TokenRequest =
            serde_json::from_value(json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}))?;
        let answer = self.accounts(namespace).create_token_request(account, &PostParams::default(), &request).await?;
        Ok(answer.status.and_then(|status| status.token).ok_or("a TokenRequest without a token")?)
    }

    fn nodes(&self) -> Api<v1::Node> {
        Api::all(self.client.clone())
    }

    fn accounts(&self, namespace: &str) -> Api<v1::ServiceAccount> {
        Api::namespaced(self.client.clone(), namespace)
    }

    fn pods(&self, namespace: &str) -> Api<v1::Pod> {
        Api::namespaced(self.client.clone(), namespace)
    }
}

fn distinct(prefix: &str) -> String {
    format!("{prefix}-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// `apiVersion` and `kind` come with the type.
async fn create<K>(api: &Api<K>, object: &Value) -> Result<K>
where
    K: Clone + std::fmt::Debug + DeserializeOwned + Serialize + k8s_openapi::Resource,
{
    let mut object = object.clone();
    object["apiVersion"] = K::API_VERSION.into();
    object["kind"] = K::KIND.into();
    Ok(api.create(&PostParams::default(), &serde_json::from_value(object)?).await?)
}

async fn delete<K: Clone + std::fmt::Debug + DeserializeOwned>(api: &Api<K>, name: &str, grace_seconds: u32) -> Result<()> {
    let params = DeleteParams { grace_period_seconds: Some(grace_seconds), ..DeleteParams::default() };
    api.delete(name, &params).await?;
    Ok(())
}

fn uid_of(object: &impl Resource) -> Result<Uuid> {
    Ok(object.uid().ok_or("an object without a UID")?.parse()?)
}
