//! Revocation reaches real Envoys: who is revoked is refused in the next handshake, and nobody else is.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::time::{Duration, Instant};

use chancery_tests::lab::Lab;
use chancery_tests::load::Load;
use chancery_tests::mesh::{Mesh, Settings, Workload};
use chancery_tests::{http, tools, wait};
use serde_json::Value;

/// A revoked peer's next connection is refused within so long.
const AT_ONCE: Duration = Duration::from_secs(1);
/// An agent that was refused asks again within so long.
const SOON: Duration = Duration::from_secs(45);

/// Two workloads that call a third.
struct Shop {
    mesh: Mesh,
    cart: Workload,
    payments: Workload,
    checkout: Workload,
}

async fn shop() -> Option<Shop> {
    let mesh = Mesh::start(Lab::new().unwrap(), Settings::lasting(tools::envoy()?)).await.unwrap();
    let (cart, checkout) = mesh.pair().await.unwrap();
    let payments = mesh.workload("payments", Some(checkout.envoy.at.inbound)).await.unwrap();
    Some(Shop { mesh, cart, payments, checkout })
}

impl Shop {
    /// Revokes, when everybody has acknowledged it.
    fn revoke(&self, arguments: &[&str]) -> Value {
        let all = [&["identity", "revoke", "--reason", "a test wants it", "-o", "json"], arguments].concat();
        serde_json::from_str(&self.mesh.chancery(&all).unwrap()).unwrap()
    }

    /// Whether the next connection of a caller's is let in.
    async fn is_let_in(caller: &Workload) -> bool {
        match http::get(caller.envoy.at.outbound, "/").await {
            Ok((200, _)) => true,
            Ok((503, _)) => false,
            other => panic!("{other:?}"),
        }
    }

    async fn until_let_in(caller: &Workload) {
        let let_in = async || if Self::is_let_in(caller).await { Ok(()) } else { Err("it is refused") };
        wait::until("it is let in", SOON, let_in).await.unwrap();
    }

    /// A load that the revocation of others does not touch.
    fn load(&self) -> Load {
        Load::start(self.payments.envoy.at.outbound, 2, Duration::from_millis(5))
    }

    async fn assert_no_failure(&self, load: Load) {
        let counts = load.counts();
        wait::until("it was a load", SOON, async || if counts.ok() > 100 { Ok(()) } else { Err(counts.ok()) }).await.unwrap();
        let counts = load.finish().await;
        assert_eq!(counts.failed(), 0, "{:?}", counts.failures());
        assert_eq!(self.payments.envoy.stat("cluster.outbound.ssl.handshake").await.unwrap(), counts.ok(), "each was a handshake");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_peers_next_connection_is_refused_at_once_and_everybody_elses_works() {
    let Some(shop) = shop().await else { return };
    let load = shop.load();
    assert!(Shop::is_let_in(&shop.cart).await);
    let serial = shop.cart.envoy.certificate().await.unwrap().serial;
    let errors = async || shop.checkout.envoy.stat("listener.inbound.ssl.fail_verify_error").await.unwrap();
    assert_eq!(errors().await, 0);

    let begun = Instant::now();
    let outcome = shop.revoke(&["--pod", "shop/cart-0"]);
    assert!(!Shop::is_let_in(&shop.cart).await);
    let took = begun.elapsed();
    assert!(took < AT_ONCE, "{took:?}");
    assert!(errors().await > 0, "it was refused for its certificate");
    assert_eq!((&outcome["revoked"], &outcome["acknowledged"]), (&1.into(), &true.into()), "{outcome}");
    assert!(outcome["not_reached"][0].as_str().unwrap().starts_with("connections that are open"));
    let listed = shop.mesh.ca.ask(&["identity", "list", "--revoked"]).unwrap();
    assert_eq!((listed.as_array().unwrap().len(), listed[0]["serial"].as_str()), (1, Some(&*serial)));

    // By its pod it gets no other, until it is allowed.
    wait::until("the agent asks for another", SOON, async || {
        let refusals = shop.mesh.chancery(&["identity", "refusals"])?;
        if refusals.contains("forbidden") { Ok(()) } else { Err(refusals) }
    })
    .await
    .unwrap();
    assert!(!Shop::is_let_in(&shop.cart).await);
    shop.mesh.chancery(&["identity", "allow", "--pod", "shop/cart-0", "--reason", "it was mended"]).unwrap();
    Shop::until_let_in(&shop.cart).await;
    assert_ne!(shop.cart.envoy.certificate().await.unwrap().serial, serial, "what was revoked stays so");
    shop.assert_no_failure(load).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn by_serial_its_holder_gets_another_and_a_restart_of_the_ca_hands_out_the_same_crls() {
    let Some(mut shop) = shop().await else { return };
    let load = shop.load();
    let revoked = shop.cart.envoy.certificate().await.unwrap();
    let outcome = shop.revoke(&["--serial", &revoked.serial]);
    assert!(outcome["issuance"].as_str().unwrap().starts_with("goes on"), "{outcome}");
    let next = shop.cart.envoy.next_certificate(&revoked, SOON).await.unwrap();
    assert_ne!(next.serial, revoked.serial);
    Shop::until_let_in(&shop.cart).await;

    let crl = std::fs::read(shop.mesh.ca.data().join("crl.pem")).unwrap();
    shop.mesh.ca.kill().unwrap();
    shop.mesh.ca.run(&shop.mesh.lab).await.unwrap();
    let reached = async || shop.mesh.chancery(&["identity", "list", "--revoked"]).and_then(|_| connected(&shop));
    wait::until("the agent is back", SOON, reached).await.unwrap();
    assert_eq!(std::fs::read(shop.mesh.ca.data().join("crl.pem")).unwrap(), crl);
    let log = shop.mesh.agent.log().unwrap();
    assert!(!log.contains("was not taken over"), "the agent was told a fork:\n{log}");
    assert!(Shop::is_let_in(&shop.cart).await);
    shop.assert_no_failure(load).await;
}

fn connected(shop: &Shop) -> Result<(), String> {
    let agents: Value = serde_json::from_str(&shop.mesh.chancery(&["agent", "list", "-o", "json"])?).unwrap();
    if agents[0]["connected"] == true { Ok(()) } else { Err(agents.to_string()) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotation_with_a_crl_for_each_issuing_certificate_fails_no_connection() {
    let Some(shop) = shop().await else { return };
    let load = shop.load();
    let revoked = shop.cart.envoy.certificate().await.unwrap();
    shop.revoke(&["--pod", "shop/cart-0"]);
    for step in ["prepare", "publish"] {
        shop.mesh.chancery(&["root", step, "--reason", "a test"]).unwrap();
    }
    let pem = std::fs::read_to_string(shop.mesh.ca.data().join("crl.pem")).unwrap();
    assert_eq!(pem.matches("BEGIN X509 CRL").count(), 2, "that of a root that nothing chains to yet is there");
    // Cart keeps its certificate under the old root, since it gets no other: it holds the retirement.
    let open = async || shop.mesh.chancery(&["root", "activate", "--dry-run"]).map(|_| ());
    wait::until("the gate is open", SOON, open).await.unwrap();
    shop.mesh.chancery(&["root", "activate", "--reason", "a test"]).unwrap();
    let payments = shop.payments.envoy.certificate().await.unwrap();
    let checkout = shop.checkout.envoy.certificate().await.unwrap();
    shop.payments.envoy.next_certificate(&payments, SOON).await.unwrap();
    shop.checkout.envoy.next_certificate(&checkout, SOON).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!Shop::is_let_in(&shop.cart).await, "revoked under the old root");
    assert_eq!(shop.cart.envoy.certificate().await.unwrap().serial, revoked.serial);
    shop.assert_no_failure(load).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_banned_agent_is_cut_off_and_comes_back_by_itself_when_the_ban_is_taken_back() {
    let Some(shop) = shop().await else { return };
    let load = shop.load();
    let agents: Value = serde_json::from_str(&shop.mesh.chancery(&["agent", "list", "-o", "json"]).unwrap()).unwrap();
    let agent = agents[0]["spiffe_id"].as_str().unwrap().to_owned();
    let banned = shop.mesh.chancery(&["agent", "ban", &agent, "--reason", "a test", "-o", "json"]).unwrap();
    let banned: Value = serde_json::from_str(&banned).unwrap();
    assert_eq!((&banned["subject"], &banned["revoked"]), (&agent.as_str().into(), &1.into()), "{banned}");
    assert!(banned["not_reached"].to_string().contains("is cut off"), "{banned}");
    wait::until("it is cut off", SOON, async || connected(&shop).map_or(Ok(()), |()| Err("it is connected"))).await.unwrap();
    assert!(Shop::is_let_in(&shop.cart).await, "what its workloads have stays good");
    shop.mesh.chancery(&["agent", "unban", &agent, "--reason", "a test"]).unwrap();
    wait::until("it is back", SOON, async || connected(&shop)).await.unwrap();
    shop.assert_no_failure(load).await;
}
