//! One CA for two clusters, each with an API server of its own; the CA runs in one of them.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::path::Path;
use std::time::Duration;

use chancery_tests::ca::{CLUSTER, Ca};
use chancery_tests::caller::Caller;
use chancery_tests::kubernetes::ApiServer;
use chancery_tests::kubernetes::place::{Territory, by_kubeconfig, granted, refused};
use chancery_tests::lab::Lab;
use chancery_tests::node::Node;

const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(30);
const OTHER: &str = "west";
/// Where a pod finds the token of its service account.
const ACCOUNT: &str = "/run/secrets/kubernetes.io/serviceaccount";

/// What the kubelet puts into a pod, as the account `ca` of a cluster.
async fn mount_account(node: &Node, of: &Territory, server: &ApiServer) {
    let arguments = ["-t", "tmpfs", "tmpfs", "/run"].map(Path::new);
    node.run("mount", &arguments).unwrap();
    let directory = node.see(Path::new(ACCOUNT));
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("token"), of.ca_token().await.unwrap()).unwrap();
    std::fs::write(directory.join("namespace"), &of.system).unwrap();
    std::fs::copy(server.ca_file(), directory.join("ca.crt")).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_ca_serves_the_cluster_that_it_runs_in_and_another_each_by_its_own_api_server() {
    let Some(own_server) = ApiServer::start().await.unwrap() else { return };
    let Some(mut other_server) = ApiServer::start().await.unwrap() else { return };
    let (own, other) = (Territory::new(&own_server).await.unwrap(), Territory::new(&other_server).await.unwrap());
    let lab = Lab::new().unwrap();
    let Some(node) = Node::boot(&lab).await.unwrap() else { return };
    mount_account(&node, &own, &own_server).await;

    let kubeconfig = by_kubeconfig(&other.ca_kubeconfig(&other_server).await.unwrap());
    let sections = own.section(CLUSTER, "{ in_cluster = true }", &format!("{}/*", own.shop))
        + &other.section(OTHER, &kubeconfig, &format!("{}/*", other.shop));
    let mut ca = Ca::configure(&lab, &lab.at("ca"), HOUR, &sections).unwrap();
    ca.set_environment("KUBERNETES_SERVICE_HOST", &own_server.address().ip().to_string());
    ca.set_environment("KUBERNETES_SERVICE_PORT", &own_server.address().port().to_string());
    ca.run(&lab).await.unwrap();

    let mut callers = Vec::new();
    let mut tokens = Vec::new();
    for (cluster, of) in [(CLUSTER, &own), (OTHER, &other)] {
        let join_token = of.join_token(&of.agent_pod(&of.node).await.unwrap()).await.unwrap();
        callers.push(Caller::join_cluster(&lab, &ca, cluster, &of.node.name, &join_token).await.unwrap());
        let pod = of.pod("cart-0").await.unwrap();
        tokens.push(of.token(&pod).await.unwrap());
        granted(callers.last().unwrap(), tokens.last().unwrap()).await.unwrap();
        let listed = ca.ask(&["identity", "list", "--pod", &pod.uid.to_string()]).unwrap();
        assert_eq!(listed[0]["cluster"], cluster, "{listed}");
    }
    // Both sign with the same issuer's name, and not with the same keys.
    refused(&callers[0], &tokens[1], "token_unknown_key", SOON).await.unwrap();
    refused(&callers[1], &tokens[0], "token_unknown_key", SOON).await.unwrap();

    other_server.kill().unwrap();
    for again in [false, true] {
        if again {
            ca.kill().unwrap();
            ca.run(&lab).await.expect("it is ready for the one whose API server is there");
        }
        let pod = own.pod(&format!("later-{again}")).await.unwrap();
        callers[0].connected().await.unwrap();
        granted(&callers[0], &own.token(&pod).await.unwrap()).await.unwrap();
        granted(&callers[1], &tokens[1]).await.expect("it has a certificate");
    }
}
