//! Trust roots follow each other while two real Envoys talk: no connection fails, and both end under the new root.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::io::Write;
use std::time::{Duration, Instant};

use chancery_tests::lab::Lab;
use chancery_tests::load::Load;
use chancery_tests::mesh::{Mesh, Settings, Workload};
use chancery_tests::{tools, wait};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(30);

/// Two Envoys, one of which calls the other.
struct Pair {
    mesh: Mesh,
    cart: Workload,
    checkout: Workload,
}

async fn pair() -> Option<Pair> {
    let mesh = Mesh::start(Lab::new().unwrap(), Settings::lasting(tools::envoy()?)).await.unwrap();
    let (cart, checkout) = mesh.pair().await.unwrap();
    Some(Pair { mesh, cart, checkout })
}

impl Pair {
    fn load(&self) -> Load {
        Load::start(self.cart.envoy.at.outbound, 2, Duration::from_millis(5))
    }

    fn roots(&self) -> Vec<(String, String)> {
        let roots: Value = serde_json::from_str(&self.mesh.chancery(&["root", "list", "-o", "json"]).unwrap()).unwrap();
        let word = |root: &Value, key: &str| root[key].as_str().unwrap().to_owned();
        roots.as_array().unwrap().iter().map(|root| (word(root, "fingerprint"), word(root, "state"))).collect()
    }

    fn states(&self) -> Vec<String> {
        self.roots().into_iter().map(|(_, state)| state).collect()
    }

    /// The roots that the two Envoys' certificates chain to, as the ledger has them.
    async fn roots_in_use(&self) -> Vec<String> {
        let mut found = Vec::new();
        for workload in [&self.cart, &self.checkout] {
            let serial = workload.envoy.certificate().await.unwrap().serial;
            let shown = self.mesh.ca.ask(&["identity", "show", &serial]).unwrap();
            found.push(shown["trust_root"]["fingerprint"].as_str().unwrap().to_owned());
        }
        found
    }

    async fn kill_ca(&mut self) {
        self.mesh.ca.kill().unwrap();
        self.mesh.ca.run(&self.mesh.lab).await.unwrap();
    }

    async fn until_open(&self, to: &str) {
        let open = async || self.mesh.chancery(&["root", to, "--dry-run"]).map(|_| ());
        wait::until("the gate is open", SOON, open).await.unwrap();
    }

    /// No request failed, and each was a handshake.
    async fn assert_no_failure(&self, load: Load) {
        let counts = load.finish().await;
        assert_eq!(counts.failed(), 0, "{:?}", counts.failures());
        assert!(counts.ok() > 100, "{} requests are no load", counts.ok());
        assert_eq!(self.cart.envoy.stat("cluster.outbound.ssl.handshake").await.unwrap(), counts.ok(), "each request was a handshake");
        assert_eq!(self.checkout.envoy.stat("listener.inbound.ssl.session_reused").await.unwrap(), 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_rotation_fails_no_connection() {
    let Some(pair) = pair().await else { return };
    let load = pair.load();
    let rotated = pair.mesh.chancery(&["root", "rotate", "--reason", "once a year", "--deadline", "90s", "-o", "json"]);
    let rotated = rotated.unwrap_or_else(|error| panic!("{error}\n{}", pair.mesh.ca.log().unwrap()));
    let done: Vec<Value> = rotated.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let done: Vec<_> = done.iter().filter(|event| event["outcome"] == "done").map(|event| event["phase"].as_str().unwrap()).collect();
    assert_eq!(done, ["prepared", "published", "active", "retired"], "{rotated}");
    assert_eq!(pair.states(), ["retired", "active"]);
    tokio::time::sleep(Duration::from_secs(1)).await;
    pair.assert_no_failure(load).await;
    let bundle = std::fs::read_to_string(pair.mesh.ca.bundle()).unwrap();
    assert_eq!(bundle.matches("BEGIN CERTIFICATE").count(), 1, "both Envoys trust the new root alone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotation_goes_on_when_the_ca_is_killed_after_each_step() {
    let Some(mut pair) = pair().await else { return };
    let load = pair.load();
    for step in ["prepare", "publish", "activate", "retire"] {
        if step == "activate" || step == "retire" {
            pair.until_open(step).await;
        }
        pair.mesh.chancery(&["root", step, "--reason", "a test"]).unwrap_or_else(|error| panic!("{step}: {error}"));
        pair.kill_ca().await;
    }
    assert_eq!(pair.states(), ["retired", "active"]);
    pair.assert_no_failure(load).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotation_that_is_under_way_goes_on_when_the_ca_and_the_agent_were_away() {
    let Some(mut pair) = pair().await else { return };
    let load = pair.load();
    let mut rotate = std::process::Command::new(tools::chancery("chancery").unwrap());
    rotate.arg("--socket").arg(pair.mesh.ca.admin_socket()).args(["root", "rotate", "--reason", "a test", "--deadline", "90s"]);
    // The gate is held while nobody speaks for the two proxies.
    pair.mesh.agent.kill().unwrap();
    let mut rotate = rotate.stdout(std::process::Stdio::null()).spawn().unwrap();
    let published = async || if pair.states() == ["active", "published"] { Ok(()) } else { Err(format!("{:?}", pair.states())) };
    wait::until("the next root is published", SOON, published).await.unwrap();
    let held = pair.mesh.chancery(&["root", "activate", "--dry-run"]).unwrap_err();
    assert!(held.contains("in the way"), "{held}");
    pair.kill_ca().await;
    pair.mesh.agent.run(&pair.mesh.lab).await.unwrap();
    let status = tokio::task::block_in_place(|| rotate.wait()).unwrap();
    assert!(status.success(), "{status}: {}", pair.mesh.chancery(&["root", "list"]).unwrap());
    assert_eq!(pair.states(), ["retired", "active"]);
    pair.assert_no_failure(load).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_root_is_not_retired_while_a_pod_that_nobody_renews_holds_a_certificate_under_it() {
    let Some(mut pair) = pair().await else { return };
    for step in ["prepare", "publish"] {
        pair.mesh.chancery(&["root", step, "--reason", "a test"]).unwrap();
    }
    pair.until_open("activate").await;
    // Gone, it counts with what it reported last; and nothing is issued anew.
    pair.mesh.agent.kill().unwrap();
    pair.mesh.chancery(&["root", "activate", "--reason", "a test"]).unwrap();
    let refused = pair.mesh.chancery(&["root", "retire", "--reason", "a test"]).unwrap_err();
    assert!(refused.contains("shop/") || refused.contains("node-1"), "{refused}");
    assert_eq!(pair.states(), ["draining", "active"]);
    pair.mesh.chancery(&["root", "retire", "--reason", "its node is gone", "--except", "node-1"]).unwrap();
    let acts = pair.mesh.ca.ask(&["log", "acts", "--action", "root.retire"]).unwrap();
    assert_eq!(acts[0]["why"], "its node is gone", "{acts}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_activation_right_after_a_restart_is_refused_and_names_who_has_not_reported() {
    let Some(mut pair) = pair().await else { return };
    for step in ["prepare", "publish"] {
        pair.mesh.chancery(&["root", step, "--reason", "a test"]).unwrap();
    }
    pair.mesh.agent.kill().unwrap();
    pair.kill_ca().await;
    let refused = pair.mesh.chancery(&["root", "activate", "--reason", "a test"]).unwrap_err();
    assert!(refused.contains("has not reported since the CA started") && refused.contains("node-1"), "{refused}");
    assert_eq!(pair.states(), ["active", "published"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_distrusted_root_is_gone_within_its_deadline_and_no_connection_fails() {
    let Some(pair) = pair().await else { return };
    for step in ["prepare", "publish"] {
        pair.mesh.chancery(&["root", step, "--reason", "a test"]).unwrap();
    }
    pair.until_open("activate").await;
    let load = pair.load();
    let before = pair.roots_in_use().await;
    let old = pair.roots()[0].0.clone();
    let begun = Instant::now();
    let finished = pair.mesh.chancery(&["root", "distrust", &old[..16], "--reason", "its key was stolen", "-o", "json"]).unwrap();
    let finished: Value = serde_json::from_str(&finished).unwrap();
    assert!(finished["total_ms"].as_u64().unwrap() < 30_000, "{finished}");
    assert_eq!(pair.states(), ["distrusted", "active"]);
    let sequence = pair.mesh.ca.ask(&["status"]).unwrap()["trust_sequence"].as_u64().unwrap();
    let proven = async || match pair.mesh.ca.ask(&["agent", "list"]).unwrap()[0]["proven_sequence"].as_u64() {
        Some(proven) if proven >= sequence => Ok(()),
        proven => Err(format!("{proven:?} of {sequence}")),
    };
    wait::until("both Envoys are without the old root", SOON, proven).await.unwrap();
    let took = begun.elapsed();
    assert!(pair.roots_in_use().await.iter().all(|root| !before.contains(root)));
    writeln!(std::io::stdout(), "distrust, until two Envoys were without the old root and with new certificates: {took:?}; {finished}")
        .unwrap();
    assert!(took < SOON, "{took:?}");
    pair.assert_no_failure(load).await;
}
