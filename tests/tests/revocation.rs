//! Revocation reaches real Envoys: who is revoked is refused in the next handshake, and nobody else is.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::time::{Duration, Instant};

use chancery_tests::ca::Ca;
use chancery_tests::caller::Caller;
use chancery_tests::envoy::inbound_tls;
use chancery_tests::lab::Lab;
use chancery_tests::load::Steady;
use chancery_tests::mesh::{Mesh, Settings, Workload};
use chancery_tests::{http, tools, wait};
use serde_json::{Value, json};
use tokio::time::timeout;

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
    fn revoke(&self, arguments: &[&str]) -> Value {
        revoke(&self.mesh, arguments)
    }

    /// A load that the revocation of others does not touch.
    async fn load(&self) -> Steady {
        Steady::begin(&self.payments.envoy).await.unwrap()
    }

    async fn assert_no_failure(&self, load: Steady) {
        load.end(&self.payments.envoy, &self.checkout.envoy).await.unwrap();
    }
}

/// Revokes, when everybody has acknowledged it.
fn revoke(mesh: &Mesh, arguments: &[&str]) -> Value {
    let all = [&["identity", "revoke", "--reason", "a test wants it", "-o", "json"], arguments].concat();
    serde_json::from_str(&mesh.chancery(&all).unwrap()).unwrap()
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
    let let_in = async || if is_let_in(caller).await { Ok(()) } else { Err("it is refused") };
    wait::until("it is let in", SOON, let_in).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_peers_next_connection_is_refused_at_once_and_everybody_elses_works() {
    let Some(shop) = shop().await else { return };
    let load = shop.load().await;
    assert!(is_let_in(&shop.cart).await);
    let serial = shop.cart.envoy.certificate().await.unwrap().serial;
    let errors = async || shop.checkout.envoy.stat("listener.inbound.ssl.fail_verify_error").await.unwrap();
    assert_eq!(errors().await, 0);

    let begun = Instant::now();
    let outcome = shop.revoke(&["--pod", "shop/cart-0"]);
    assert!(!is_let_in(&shop.cart).await);
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
    assert!(!is_let_in(&shop.cart).await);
    shop.mesh.chancery(&["identity", "allow", "--pod", "shop/cart-0", "--reason", "it was mended"]).unwrap();
    until_let_in(&shop.cart).await;
    assert_ne!(shop.cart.envoy.certificate().await.unwrap().serial, serial, "what was revoked stays so");
    shop.assert_no_failure(load).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn by_serial_its_holder_gets_another_and_a_restart_of_the_ca_hands_out_the_same_crls() {
    let Some(mut shop) = shop().await else { return };
    let load = shop.load().await;
    let revoked = shop.cart.envoy.certificate().await.unwrap();
    let outcome = shop.revoke(&["--serial", &revoked.serial]);
    assert!(outcome["issuance"].as_str().unwrap().starts_with("goes on"), "{outcome}");
    let next = shop.cart.envoy.next_certificate(&revoked, SOON).await.unwrap();
    assert_ne!(next.serial, revoked.serial);
    until_let_in(&shop.cart).await;

    let crl = std::fs::read(shop.mesh.ca.data().join("crl.pem")).unwrap();
    shop.mesh.ca.kill().unwrap();
    shop.mesh.ca.run(&shop.mesh.lab).await.unwrap();
    let reached = async || shop.mesh.chancery(&["identity", "list", "--revoked"]).and_then(|_| connected(&shop));
    wait::until("the agent is back", SOON, reached).await.unwrap();
    assert_eq!(std::fs::read(shop.mesh.ca.data().join("crl.pem")).unwrap(), crl);
    let log = shop.mesh.agent.log().unwrap();
    assert!(!log.contains("was not taken over"), "the agent was told a fork:\n{log}");
    assert!(is_let_in(&shop.cart).await);
    shop.assert_no_failure(load).await;
}

fn connected(shop: &Shop) -> Result<(), String> {
    let agents: Value = serde_json::from_str(&shop.mesh.chancery(&["agent", "list", "-o", "json"])?).unwrap();
    if agents[0]["connected"] == true { Ok(()) } else { Err(agents.to_string()) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotation_with_a_crl_for_each_issuing_certificate_fails_no_connection() {
    let Some(shop) = shop().await else { return };
    let load = shop.load().await;
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
    assert!(!is_let_in(&shop.cart).await, "revoked under the old root");
    assert_eq!(shop.cart.envoy.certificate().await.unwrap().serial, revoked.serial);
    shop.assert_no_failure(load).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_banned_agent_is_cut_off_and_comes_back_by_itself_when_the_ban_is_taken_back() {
    let Some(shop) = shop().await else { return };
    let load = shop.load().await;
    let agents: Value = serde_json::from_str(&shop.mesh.chancery(&["agent", "list", "-o", "json"]).unwrap()).unwrap();
    let agent = agents[0]["spiffe_id"].as_str().unwrap().to_owned();
    let banned = shop.mesh.chancery(&["agent", "ban", &agent, "--reason", "a test", "-o", "json"]).unwrap();
    let banned: Value = serde_json::from_str(&banned).unwrap();
    assert_eq!((&banned["subject"], &banned["revoked"]), (&agent.as_str().into(), &1.into()), "{banned}");
    assert!(banned["not_reached"].to_string().contains("is cut off"), "{banned}");
    wait::until("it is cut off", SOON, async || connected(&shop).map_or(Ok(()), |()| Err("it is connected"))).await.unwrap();
    assert!(is_let_in(&shop.cart).await, "what its workloads have stays good");
    shop.mesh.chancery(&["agent", "unban", &agent, "--reason", "a test"]).unwrap();
    wait::until("it is back", SOON, async || connected(&shop)).await.unwrap();
    shop.assert_no_failure(load).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_whose_roots_come_from_elsewhere_is_named_among_what_a_revocation_does_not_reach() {
    let Some(settings) = tools::envoy().map(Settings::lasting) else { return };
    let mesh = Mesh::start(Lab::new().unwrap(), settings).await.unwrap();
    let roots = mesh.ca.bundle();
    let from_a_file = |bootstrap: &mut Value| {
        let context = inbound_tls(bootstrap)["common_tls_context"].as_object_mut().unwrap();
        context.remove("combined_validation_context");
        context.insert("validation_context".into(), json!({"trusted_ca": {"filename": roots}}));
    };
    let mut checkout = mesh.changed_workload("checkout", None, from_a_file).await.unwrap();
    checkout.envoy.ready().await.unwrap();
    let cart = mesh.workload("cart", Some(checkout.envoy.at.inbound)).await.unwrap();
    until_let_in(&cart).await;

    let outcome = revoke(&mesh, &["--pod", "shop/cart-0"]);
    assert_eq!((&outcome["acknowledged"], &outcome["unproven_total"]), (&true.into(), &1.into()), "{outcome}");
    assert!(outcome["unproven"][0].as_str().unwrap().contains("shop/checkout-0"), "{outcome}");
    assert!(outcome["not_reached"].to_string().contains("1 proxies that have no validation context from the CA"), "{outcome}");
    assert!(is_let_in(&cart).await, "and that is true");
}

#[tokio::test]
async fn an_agent_that_is_revoked_by_its_id_or_its_node_loses_the_connections_that_it_has_open() {
    let lab = Lab::new().unwrap();
    let ca = Ca::start(&lab, Duration::from_secs(3600)).await.unwrap();
    for (node, by) in [("node-b", "--agent"), ("node-c", "--node")] {
        let caller = Caller::join(&lab, &ca, node).await.unwrap();
        let (mut open, id) = (caller.open_connection(&ca).await.unwrap(), caller.spiffe_id().unwrap());
        let whom = if by == "--agent" { &*id } else { node };
        assert!(timeout(Duration::from_millis(500), &mut open).await.is_err(), "the CA ended it of itself");
        // Whoever the test plays acknowledges no CRLs.
        let outcome = ca.ask(&["identity", "revoke", by, whom, "--reason", "a test wants it", "--wait", "0s"]).unwrap();
        timeout(AT_ONCE, open).await.expect("its connection is open").unwrap();
        caller.cut_off(AT_ONCE).await.unwrap();
        assert!(outcome["not_reached"].to_string().contains(&format!("the proxies of {id}: it is cut off")), "{outcome}");
    }
}
