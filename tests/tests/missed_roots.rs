//! An agent that missed a change of the trust roots comes back by itself, from a newer bundle file, and its proxies go on; while it is away,
//! the CA names it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::time::Duration;

use chancery_tests::ca::Ca;
use chancery_tests::lab::Lab;
use chancery_tests::load::{Load, PER_SECOND};
use chancery_tests::mesh::{Mesh, Settings, Workload};
use chancery_tests::{http, tools, wait};
use serde_json::Value;

const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(30);

/// Two Envoys, one of which calls the other, and a CA whose next root everybody has.
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
    fn roots(&self) -> Vec<Value> {
        let roots: Value = serde_json::from_str(&self.mesh.chancery(&["root", "list", "-o", "json"]).unwrap()).unwrap();
        roots.as_array().unwrap().clone()
    }

    fn states(&self) -> Vec<String> {
        self.roots().iter().map(|root| root["state"].as_str().unwrap().to_owned()).collect()
    }

    /// What the CA says of the one agent.
    fn agent(&self) -> Value {
        let agents: Value = serde_json::from_str(&self.mesh.chancery(&["agent", "list", "-o", "json"]).unwrap()).unwrap();
        assert_eq!(agents.as_array().unwrap().len(), 1, "{agents}");
        agents[0].clone()
    }

    /// Walks onto the next root, whoever is away.
    fn rotate_without_the_agent(&self) {
        // No other agent is there to confirm the clock, and a proxy may have proven nothing yet when its agent went away.
        let gated = &["--except", "node-1", "--confirm-clock", "--accept-unproven"][..];
        for (step, more) in [("prepare", &[][..]), ("publish", &[]), ("activate", gated), ("retire", gated)] {
            let arguments = [&["root", step, "--reason", "node-1 is being repaired"], more].concat();
            self.mesh.chancery(&arguments).unwrap_or_else(|error| panic!("{step}: {error}"));
        }
        assert_eq!(self.states(), ["retired", "active"]);
    }

    /// The agent is back with the newest trust state, both Envoys are under the active root, and new connections work.
    async fn is_whole_again(&self) {
        let active = self.roots().iter().find(|root| root["state"] == "active").unwrap()["fingerprint"].clone();
        for workload in [&self.cart, &self.checkout] {
            let under_the_new = async || {
                let serial = workload.envoy.certificate().await.map_err(|error| error.to_string())?.serial;
                let shown: Value = serde_json::from_str(&self.mesh.chancery(&["identity", "show", &serial, "-o", "json"])?).unwrap();
                if shown["trust_root"]["fingerprint"] == active { Ok(()) } else { Err(format!("{shown}")) }
            };
            wait::until("a certificate under the active root", SOON, under_the_new)
                .await
                .unwrap_or_else(|error| panic!("{error}\n{}", self.mesh.agent.log().unwrap()));
        }
        let works = async || match http::get(self.cart.envoy.at.outbound, "/").await {
            Ok((200, _)) => Ok(()),
            other => Err(format!("{other:?}")),
        };
        wait::until("a connection", SOON, works).await.unwrap();
        let load = Load::start(self.cart.envoy.at.outbound, PER_SECOND);
        tokio::time::sleep(Duration::from_secs(1)).await;
        let counts = load.finish().await;
        assert_eq!(counts.failed(), 0, "{:?}", counts.failures());
        let current = async || match self.agent()["trust"].as_str() {
            Some("current") => Ok(()),
            other => Err(format!("{other:?}")),
        };
        wait::until("the agent is no longer behind", SOON, current).await.unwrap();
    }

    fn is_named(&self) {
        let agent = self.agent();
        assert_eq!((&agent["connected"], &agent["trust"]), (&false.into(), &"missed".into()), "{agent}");
        let doctor = self.mesh.chancery(&["doctor", "-o", "json"]).unwrap_or_else(|error| error);
        assert!(doctor.contains("missed a change of the trust roots") && doctor.contains("dev/node-1"), "{doctor}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_was_down_during_a_rotation_that_left_it_out_comes_back_by_itself() {
    let Some(mut pair) = pair().await else { return };
    pair.mesh.agent.kill().unwrap();
    pair.rotate_without_the_agent();
    pair.is_named();
    // It is not forgotten with a restart either.
    pair.mesh.ca.kill().unwrap();
    pair.mesh.ca.run(&pair.mesh.lab).await.unwrap();
    let agent = pair.agent();
    assert_eq!((&agent["node"], &agent["trust"]), (&"node-1".into(), &"unknown".into()), "{agent}");
    pair.mesh.agent.run(&pair.mesh.lab).await.unwrap();
    pair.is_whole_again().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_was_down_during_a_distrust_comes_back_by_itself() {
    let Some(mut pair) = pair().await else { return };
    pair.mesh.agent.kill().unwrap();
    let old = pair.roots()[0]["fingerprint"].as_str().unwrap().to_owned();
    pair.mesh.chancery(&["root", "distrust", &old, "--reason", "its key was stolen", "--now"]).unwrap();
    assert_eq!(pair.states(), ["distrusted", "active"]);
    pair.is_named();
    pair.mesh.agent.run(&pair.mesh.lab).await.unwrap();
    pair.is_whole_again().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_stayed_up_but_was_cut_off_during_a_rotation_comes_back_by_itself() {
    let Some(mut pair) = pair().await else { return };
    // The agent's CA is away; the one that it does not see goes on at another address, with the same data.
    pair.mesh.ca.stop().await.unwrap();
    let elsewhere = Lab::new().unwrap();
    let mut hidden = Ca::start_in(&elsewhere, pair.mesh.ca.data(), HOUR, "").await.unwrap();
    std::mem::swap(&mut pair.mesh.ca, &mut hidden);
    pair.rotate_without_the_agent();
    std::mem::swap(&mut pair.mesh.ca, &mut hidden);
    hidden.stop().await.unwrap();
    pair.mesh.ca.run(&pair.mesh.lab).await.unwrap();
    pair.is_whole_again().await;
}
