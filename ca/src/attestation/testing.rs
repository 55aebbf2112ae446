//! For tests of other modules: clusters whose pods are known without an API server.

use std::sync::Arc;

use chancery_identity::Clock;
use futures_util::stream;
use serde_json::json;
use uuid::Uuid;

use super::{ClusterSettings, Clusters};
use crate::kubernetes::{Event, WorkloadPod};

/// A cluster `east` that had all of `before` and has `now` left.
pub(crate) async fn watched(before: &[Uuid], now: &[Uuid], clock: Arc<dyn Clock>) -> Arc<Clusters> {
    let text = "name = \"east\"\nissuer = \"https://k\"\nagent_accounts = [\"kube-system/chancery-agent\"]\n\
        service_accounts = [\"*\"]\nkubernetes = { in_cluster = true }";
    let settings: ClusterSettings = toml::from_str(text).unwrap();
    let clusters = Clusters::new("example.org".parse().unwrap(), vec![settings], clock).unwrap();
    let live = clusters.get("east").unwrap().live.clone().unwrap();
    let list = |uids: &[Uuid]| {
        let pods: Vec<_> = uids.iter().map(|uid| Event::InitApply(pod(*uid))).collect();
        stream::iter([Event::Init].into_iter().chain(pods).chain([Event::InitDone]).map(Ok))
    };
    live.hear_pods(list(before)).await;
    live.hear_pods(list(now)).await;
    clusters
}

/// The cluster's API server is away from now on.
pub(crate) fn lose(clusters: &Clusters) {
    clusters.get("east").unwrap().live.as_ref().unwrap().lose();
}

fn pod(uid: Uuid) -> WorkloadPod {
    serde_json::from_value(json!({ "metadata": { "namespace": "shop", "uid": uid }, "spec": { "nodeName": "node-1" } })).unwrap()
}
