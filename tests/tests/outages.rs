//! The CA and the agent go away and come back; what was handed out goes on working, and nothing is forgotten.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use chancery_tests::agent::Agent;
use chancery_tests::ca::Ca;
use chancery_tests::envoy::Protocol;
use chancery_tests::lab::Lab;
use chancery_tests::load::Load;
use chancery_tests::mesh::{Mesh, NODE, Settings, token_request};
use chancery_tests::{http, secrets, soak, tools, wait};
use time::OffsetDateTime;

const HOUR: Duration = Duration::from_secs(3600);
/// Of how many received certificates it is proven, one by one, that the ledger's tree has them; all are verified together as well.
const PROVEN: usize = 50;

async fn mesh(lifetime: Duration) -> Option<Mesh> {
    let settings = Settings { envoy: tools::envoy()?, lifetime, token_lifetime: HOUR, protocol: Protocol::Stream };
    Some(Mesh::start(Lab::new().unwrap(), settings).await.unwrap())
}

#[tokio::test]
async fn a_restarted_agent_serves_what_it_kept_while_the_ca_is_down() {
    let Some(mut mesh) = mesh(HOUR).await else { return };
    let checkout = mesh.workload("checkout", None).await.unwrap();
    let mut cart = mesh.workload("cart", Some(checkout.envoy.at.inbound)).await.unwrap();
    let before = cart.envoy.certificate().await.unwrap();
    mesh.agent.kept(&cart.spiffe_id()).await.unwrap();

    mesh.ca.kill().unwrap();
    mesh.agent.kill().unwrap();
    assert_eq!(http::get(cart.envoy.at.outbound, "/").await.unwrap().0, 200, "what the proxies hold goes on working");
    mesh.agent.run(&mesh.lab).await.unwrap();
    let (_, readiness) = http::get(mesh.agent.http, "/readyz").await.unwrap();
    assert!(readiness.starts_with("degraded"), "{readiness}");

    cart.envoy = cart.envoy.restart(&mesh.lab).unwrap();
    cart.envoy.ready().await.unwrap();
    assert_eq!(cart.envoy.certificate().await.unwrap(), before, "a new Envoy of the same pod gets the kept certificate");
    assert_eq!(http::get(cart.envoy.at.outbound, "/").await.unwrap().0, 200);

    // Somebody whom the agent has nothing for, or cannot believe, gets nothing from a cache.
    let issuer = mesh.ca.issuer().unwrap();
    let token = |request| issuer.sign(&request, OffsetDateTime::now_utc()).unwrap().to_string();
    let stranger = token(token_request("stranger", HOUR));
    let forged = format!("{}x", &token(token_request("cart", HOUR))[..100]);
    for refused in [stranger, forged] {
        let outcome = secrets::fetch(&mesh.agent.sds_socket, Some(&refused), Duration::from_secs(1)).await;
        assert!(outcome.is_err(), "served {}", outcome.unwrap().svid.id());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_ca_may_be_away_for_longer_than_half_a_lifetime() {
    let lifetime = Duration::from_secs(20);
    let Some(mut mesh) = mesh(lifetime).await else { return };
    let checkout = mesh.workload("checkout", None).await.unwrap();
    let cart = mesh.workload("cart", Some(checkout.envoy.at.inbound)).await.unwrap();
    let load = Load::start(cart.envoy.at.outbound, 150);
    // From a rotation on, so that the outage covers the time at which the next is due.
    let first = cart.envoy.certificate().await.unwrap();
    let second = cart.envoy.next_certificate(&first, lifetime).await.unwrap();
    mesh.ca.kill().unwrap();
    let renewal_is_late = async || match mesh.agent.ask(&["status"]) {
        Ok(status) if status["workloads"].as_array().is_some_and(|all| all.iter().any(|each| each["problem"] != "")) => Ok(()),
        Ok(status) => Err(status.to_string()),
        Err(error) => Err(error.to_string()),
    };
    wait::until("the agent complains that a renewal failed", lifetime, renewal_is_late).await.unwrap();
    assert_eq!(cart.envoy.certificate().await.unwrap(), second, "the last good certificate is kept");
    mesh.ca.run(&mesh.lab).await.unwrap();
    cart.envoy.next_certificate(&second, lifetime).await.unwrap();
    let counts = load.finish().await;
    assert_eq!(counts.failed(), 0, "{:?}", counts.failures());
}

/// Clients that want certificates for ever new pods, and remember the serial of each that they received.
struct Clients {
    received: Arc<Mutex<Vec<String>>>,
    tasks: tokio::task::JoinSet<()>,
}

impl Clients {
    fn start(mesh: &Mesh, count: usize) -> Self {
        let mut clients = Self { received: Arc::default(), tasks: tokio::task::JoinSet::new() };
        let issuer = Arc::new(mesh.ca.issuer().unwrap());
        for client in 0..count {
            let (issuer, socket, received) = (issuer.clone(), mesh.agent.sds_socket.clone(), clients.received.clone());
            clients.tasks.spawn(async move {
                for number in 0.. {
                    let mut request = token_request("cart", HOUR);
                    request.pod = format!("cart-{client}-{number}");
                    let token = issuer.sign(&request, OffsetDateTime::now_utc()).unwrap();
                    // While the CA is away there is no answer, which is no failure.
                    if let Ok(secrets) = secrets::fetch(&socket, Some(&token), Duration::from_secs(2)).await {
                        received.lock().unwrap().push(secrets.svid.serial().to_string());
                    }
                }
            });
        }
        clients
    }

    fn count(&self) -> usize {
        self.received.lock().unwrap().len()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ca_killed_under_load_has_recorded_every_certificate_that_was_received() {
    let kills = soak(20);
    let lab = Lab::new().unwrap();
    let ca = Ca::start(&lab, HOUR).await.unwrap();
    let mut agent = Agent::configure(&lab, &ca, NODE).unwrap();
    // Every request is another pod's, and the agent keeps a pod for minutes.
    agent.append("\n[limits]\nworkloads = 100000\n").unwrap();
    agent.run(&lab).await.unwrap();
    let settings = Settings::lasting("none".into());
    let mut mesh = Mesh::around(ca, agent, lab, settings).unwrap();
    let clients = Clients::start(&mesh, 4);
    let shown = mesh.lab.at("shown-checkpoint");
    for kill in 0..kills {
        // Somewhere in the middle of the work, at another place each time.
        let target = clients.count() + 3 + kill % 7;
        let start = Instant::now();
        while clients.count() < target {
            assert!(start.elapsed() < Duration::from_secs(30), "after {kill} kills nothing is issued any more");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        mesh.ca.kill().unwrap();
        std::fs::copy(mesh.ca.data().join("checkpoint"), &shown).unwrap();
        mesh.ca.run(&mesh.lab).await.unwrap();
        // The last checkpoint that anybody can have seen is the beginning of what follows.
        mesh.ca.chancery(&["log", "verify", "--since", shown.to_str().unwrap()]).unwrap();
    }
    let Clients { received, mut tasks } = clients;
    tasks.shutdown().await;
    let received = received.lock().unwrap().clone();
    let recorded = mesh.ca.ask(&["identity", "list", "--limit", "1000000"]).unwrap();
    let recorded: Vec<String> =
        recorded.as_array().unwrap().iter().map(|identity| identity["serial"].as_str().unwrap().to_owned()).collect();
    let distinct: BTreeSet<&String> = recorded.iter().collect();
    assert_eq!(distinct.len(), recorded.len(), "a serial was given twice");
    let missing: Vec<&String> = received.iter().filter(|serial| !distinct.contains(serial)).collect();
    assert!(missing.is_empty(), "received, but not in the ledger: {missing:?}");
    assert!(received.len() >= kills * 3, "only {} certificates", received.len());
    for serial in received.iter().step_by(1 + received.len() / PROVEN) {
        mesh.ca.chancery(&["log", "prove", serial]).unwrap();
    }
    let data = mesh.ca.data().to_owned();
    let verified = mesh.ca.ask(&["log", "verify", "--data-dir", data.to_str().unwrap(), "--certificates"]).unwrap();
    assert!(verified["entries"].as_u64().unwrap() >= recorded.len() as u64, "{verified}");
}
