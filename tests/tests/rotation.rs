//! Trust roots follow each other while two real Envoys talk: no connection fails, and both end under the new root.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::io::Write;
use std::time::{Duration, Instant};

use chancery_tests::envoy::inbound_tls;
use chancery_tests::lab::Lab;
use chancery_tests::load::Steady;
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
    async fn load(&self) -> Steady {
        Steady::begin(&self.cart.envoy).await.unwrap()
    }

    async fn assert_no_failure(&self, load: Steady) {
        load.end(&self.cart.envoy, &self.checkout.envoy).await.unwrap();
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

    /// Both serve a certificate under the active root, and trust no other.
    async fn until_both_have_the_active_root_alone(&self) {
        let active = self.roots().into_iter().find(|(_, state)| state == "active").unwrap().0;
        let alone = async || {
            let mut trusted = Vec::new();
            for workload in [&self.cart, &self.checkout] {
                trusted.push(workload.envoy.trusts().await.map_err(|error| error.to_string())?);
            }
            let used = self.roots_in_use().await;
            let there = trusted.iter().all(|roots| *roots == [active.as_str()]) && used.iter().all(|root| *root == active);
            if there { Ok(()) } else { Err(format!("the active root is {active}; trusted: {trusted:?}; in use: {used:?}")) }
        };
        wait::until("both Envoys have the active root alone", SOON, alone).await.unwrap();
    }

    async fn kill_ca(&mut self) {
        self.mesh.ca.kill().unwrap();
        self.mesh.ca.run(&self.mesh.lab).await.unwrap();
    }

    async fn until_open(&self, to: &str) {
        let open = async || self.mesh.chancery(&["root", to, "--dry-run"]).map(|_| ());
        wait::until("the gate is open", SOON, open).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_rotation_fails_no_connection() {
    let Some(pair) = pair().await else { return };
    let load = pair.load().await;
    let rotated = pair.mesh.chancery(&["root", "rotate", "--reason", "once a year", "--deadline", "90s", "-o", "json"]);
    let rotated = rotated.unwrap_or_else(|error| panic!("{error}\n{}", pair.mesh.ca.log().unwrap()));
    let done: Vec<Value> = rotated.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let done: Vec<_> = done.iter().filter(|event| event["outcome"] == "done").map(|event| event["phase"].as_str().unwrap()).collect();
    assert_eq!(done, ["prepared", "published", "active", "retired"], "{rotated}");
    assert_eq!(pair.states(), ["retired", "active"]);
    pair.until_both_have_the_active_root_alone().await;
    pair.assert_no_failure(load).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotation_goes_on_when_the_ca_is_killed_after_each_step() {
    let Some(mut pair) = pair().await else { return };
    let load = pair.load().await;
    for step in ["prepare", "publish", "activate", "retire"] {
        if step == "activate" || step == "retire" {
            pair.until_open(step).await;
        }
        pair.mesh.chancery(&["root", step, "--reason", "a test"]).unwrap_or_else(|error| panic!("{step}: {error}"));
        pair.kill_ca().await;
    }
    assert_eq!(pair.states(), ["retired", "active"]);
    pair.until_both_have_the_active_root_alone().await;
    pair.assert_no_failure(load).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotation_that_is_under_way_goes_on_when_the_ca_and_the_agent_were_away() {
    let Some(mut pair) = pair().await else { return };
    let load = pair.load().await;
    let mut rotate = std::process::Command::new(tools::chancery("chancery").unwrap());
    rotate.arg("--socket").arg(pair.mesh.ca.admin_socket()).args(["root", "rotate", "--reason", "a test", "--deadline", "90s"]);
    // The gate is held while nobody speaks for the two proxies.
    pair.mesh.agent.kill().unwrap();
    let mut rotate = rotate.stdout(std::process::Stdio::null()).spawn().unwrap();
    let published = async || if pair.states() == ["active", "published"] { Ok(()) } else { Err(format!("{:?}", pair.states())) };
    wait::until("the next root is published", SOON, published).await.unwrap();
    let held = pair.mesh.chancery(&["root", "activate", "--reason", "a test"]).unwrap_err();
    assert!(held.contains("are missing") && held.contains("node-1") && held.contains("not connected since"), "{held}");
    pair.kill_ca().await;
    pair.mesh.agent.run(&pair.mesh.lab).await.unwrap();
    let status = tokio::task::block_in_place(|| rotate.wait()).unwrap();
    assert!(status.success(), "{status}: {}", pair.mesh.chancery(&["root", "list"]).unwrap());
    assert_eq!(pair.states(), ["retired", "active"]);
    pair.until_both_have_the_active_root_alone().await;
    pair.assert_no_failure(load).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_envoy_that_refuses_the_next_root_holds_the_rotation_in_its_own_words_until_it_is_left_out() {
    let Some(pair) = pair().await else { return };
    // Nobody staples an OCSP response to what we issue, so that this Envoy can use no certificate of ours, and refuses whatever it is sent
    // once it has both secrets.
    let must_staple = |bootstrap: &mut Value| inbound_tls(bootstrap)["ocsp_staple_policy"] = "MUST_STAPLE".into();
    let _billing = pair.mesh.changed_workload("billing", None, must_staple).await.unwrap();
    let load = pair.load().await;
    for step in ["prepare", "publish"] {
        pair.mesh.chancery(&["root", step, "--reason", "a test"]).unwrap();
    }
    let refused = async || {
        let gate = pair.mesh.chancery(&["root", "activate", "--reason", "a test"]).unwrap_err();
        let alone = gate.contains("shop/billing-0") && !gate.contains("shop/cart-0") && !gate.contains("shop/checkout-0");
        if alone && gate.contains("OCSP") { Ok(()) } else { Err(gate) }
    };
    wait::until("the third Envoy alone holds the activation, in its own words", SOON, refused).await.unwrap();
    let rotate = ["root", "rotate", "--reason", "billing is being repaired"];
    let held = pair.mesh.chancery(&[&rotate[..], &["--deadline", "2s"]].concat()).unwrap_err();
    assert!(held.contains("the deadline has come") && held.contains("missing: shop/billing-0"), "{held}");
    assert_eq!(pair.states(), ["active", "published"]);
    pair.mesh.chancery(&[&rotate[..], &["--except", "shop/billing-0", "--deadline", "90s"]].concat()).unwrap();
    assert_eq!(pair.states(), ["retired", "active"]);
    pair.until_both_have_the_active_root_alone().await;
    pair.assert_no_failure(load).await;
    for action in ["root.activate", "root.retire"] {
        let acts = pair.mesh.ca.ask(&["log", "acts", "--action", action]).unwrap();
        assert_eq!(acts[0]["why"], "billing is being repaired", "{acts}");
        assert_eq!(acts[0]["overrides"], "--except shop/billing-0", "{acts}");
    }
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
    let load = pair.load().await;
    let old = pair.roots()[0].0.clone();
    let begun = Instant::now();
    let finished = pair.mesh.chancery(&["root", "distrust", &old[..16], "--reason", "its key was stolen", "-o", "json"]).unwrap();
    let finished: Value = serde_json::from_str(&finished).unwrap();
    assert!(finished["total_ms"].as_u64().unwrap() < 30_000, "{finished}");
    assert_eq!(pair.states(), ["distrusted", "active"]);
    pair.until_both_have_the_active_root_alone().await;
    let took = begun.elapsed();
    writeln!(std::io::stdout(), "distrust, until two Envoys were without the old root and with new certificates: {took:?}; {finished}")
        .unwrap();
    assert!(took < SOON, "{took:?}");
    pair.assert_no_failure(load).await;
}
