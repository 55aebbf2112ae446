//! How the CA reaches a cluster's API server, while it runs: credentials that are replaced, and rights that are missing.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::path::PathBuf;
use std::time::Duration;

use chancery_tests::ca::{CLUSTER, Ca};
use chancery_tests::kubernetes::place::{Territory, by_kubeconfig};
use chancery_tests::kubernetes::{ApiServer, shared};
use chancery_tests::lab::Lab;
use chancery_tests::wait;
use serde_json::Value;

const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(60);

/// The CA of a cluster, whose account may do no more than this with pods and service accounts; and its kubeconfig.
async fn configured(server: &ApiServer, lab: &Lab, verbs: &[&str]) -> (Ca, PathBuf) {
    let of = Territory::new(server).await.unwrap();
    of.admin.forbid(&of.system, "ca").await.unwrap();
    of.allow_ca(verbs).await.unwrap();
    let kubeconfig = of.ca_kubeconfig(server).await.unwrap();
    let cluster = of.section(CLUSTER, &by_kubeconfig(&kubeconfig), "*");
    (Ca::configure(lab, &lab.at("ca"), HOUR, &cluster).unwrap(), kubeconfig)
}

/// Waits until the CA says this of itself, or no longer says it.
async fn status(ca: &Ca, words: &str, says: bool) {
    let asked = async || {
        let status = ca.chancery(&["status"]).unwrap_or_else(|error| error.to_string());
        if status.contains(words) == says { Ok(()) } else { Err(status) }
    };
    wait::until(&format!("the status says {words:?}: {says}"), SOON, asked).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replaced_kubeconfig_is_taken_over_without_a_restart() {
    let Some(server) = shared().await.unwrap() else { return };
    let lab = Lab::new().unwrap();
    let (mut ca, kubeconfig) = configured(&server, &lab, &["get", "list", "watch"]).await;
    let good = std::fs::read_to_string(&kubeconfig).unwrap();
    ca.run(&lab).await.unwrap();
    let mut expired: Value = serde_json::from_str(&good).unwrap();
    expired["users"][0]["user"]["token"] = "expired".into();
    std::fs::write(&kubeconfig, expired.to_string()).unwrap();
    status(&ca, "does not accept the CA's credentials", true).await;
    std::fs::write(&kubeconfig, &good).unwrap();
    status(&ca, "has not been heard", false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ca_that_may_not_watch_pods_is_not_ready_and_says_what_it_must_be_allowed() {
    let Some(server) = shared().await.unwrap() else { return };
    let lab = Lab::new().unwrap();
    let (mut ca, _) = configured(&server, &lab, &["get"]).await;
    let ready = tokio::time::timeout(Duration::from_secs(5), ca.run(&lab)).await;
    assert!(ready.is_err(), "{ready:?}");
    status(&ca, "the pods of cluster", true).await;
    status(&ca, "resources: [pods, serviceaccounts], verbs: [get, list, watch]", true).await;
}
