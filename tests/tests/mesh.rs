//! The main job on real parts: certificates from the CA, through the agent, into real Envoys that talk mutual TLS.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::time::Duration;

use chancery_tests::envoy::Protocol;
use chancery_tests::lab::Lab;
use chancery_tests::load::{Load, PER_SECOND};
use chancery_tests::mesh::{Mesh, Settings, Workload};
use chancery_tests::{http, soak, tools};

const HOUR: Duration = Duration::from_secs(3600);

async fn mesh(protocol: Protocol, lifetime: Duration, token_lifetime: Duration) -> Option<Mesh> {
    let settings = Settings { envoy: tools::envoy()?, lifetime, token_lifetime, protocol };
    Some(Mesh::start(Lab::new().unwrap(), settings).await.unwrap())
}

/// Fails unless the ledger has exactly this serial, for this workload.
fn assert_in_ledger(mesh: &Mesh, workload: &Workload, serial: &str) {
    let found = mesh.ca.ask(&["identity", "list", "--serial", serial]).unwrap();
    let found = found.as_array().unwrap();
    assert_eq!(found.len(), 1, "serial {serial}: {found:?}");
    assert_eq!(found[0]["spiffe_id"], workload.spiffe_id());
}

#[tokio::test]
async fn an_envoy_gets_its_certificate_over_sds_and_the_ledger_has_it() {
    let Some(mesh) = mesh(Protocol::Stream, HOUR, HOUR).await else { return };
    let cart = mesh.workload("cart", None).await.unwrap();
    let certificate = cart.envoy.certificate().await.unwrap();
    assert_eq!(certificate.spiffe_id, cart.spiffe_id());
    assert_in_ledger(&mesh, &cart, &certificate.serial);
}

async fn two_envoys_talk(protocol: Protocol) {
    let Some(mesh) = mesh(protocol, HOUR, HOUR).await else { return };
    let checkout = mesh.workload("checkout", None).await.unwrap();
    let cart = mesh.workload("cart", Some(checkout.envoy.at.inbound)).await.unwrap();
    let (status, body) = http::get(cart.envoy.at.outbound, "/").await.unwrap();
    assert_eq!((status, body.as_str()), (200, "checkout\n"));
    for workload in [&cart, &checkout] {
        assert_in_ledger(&mesh, workload, &workload.envoy.certificate().await.unwrap().serial);
    }
    assert!(http::get(checkout.envoy.at.inbound, "/").await.is_err(), "a client without TLS is not served");
}

#[tokio::test]
async fn two_envoys_talk_mutual_tls_over_stream_secrets() {
    two_envoys_talk(Protocol::Stream).await;
}

#[tokio::test]
async fn two_envoys_talk_mutual_tls_over_delta_secrets() {
    two_envoys_talk(Protocol::Delta).await;
}

/// Every request is a handshake of its own, none fails, while both workloads' certificates are rotated ten times. In `make soak` it is a
/// hundred times, which takes minutes.
async fn ten_rotations(mesh: &Mesh, within: Duration) {
    let checkout = mesh.workload("checkout", None).await.unwrap();
    let cart = mesh.workload("cart", Some(checkout.envoy.at.inbound)).await.unwrap();
    let load = Load::start(cart.envoy.at.outbound, PER_SECOND);
    let rotations = async |workload: &Workload| {
        let mut certificate = workload.envoy.certificate().await.unwrap();
        for _ in 0..soak(10) {
            certificate = workload.envoy.next_certificate(&certificate, within).await.unwrap();
            assert_in_ledger(mesh, workload, &certificate.serial);
        }
    };
    tokio::join!(rotations(&cart), rotations(&checkout));
    let counts = load.finish().await;
    assert_eq!(counts.failed(), 0, "{:?}", counts.failures());
    assert!(counts.ok() > 100, "{} requests are no load", counts.ok());
    assert_eq!(cart.envoy.stat("cluster.outbound.ssl.handshake").await.unwrap(), counts.ok(), "each request was a handshake");
    for (workload, side) in [(&cart, "cluster.outbound"), (&checkout, "listener.inbound")] {
        assert_eq!(workload.envoy.stat(&format!("{side}.ssl.session_reused")).await.unwrap(), 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_rotations_over_stream_secrets_fail_no_connection() {
    let lifetime = Duration::from_secs(6);
    let Some(mesh) = mesh(Protocol::Stream, lifetime, HOUR).await else { return };
    ten_rotations(&mesh, lifetime).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_rotations_over_delta_secrets_fail_no_connection() {
    let lifetime = Duration::from_secs(6);
    let Some(mesh) = mesh(Protocol::Delta, lifetime, HOUR).await else { return };
    ten_rotations(&mesh, lifetime).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_that_live_a_tenth_of_the_run_cost_no_connection_and_no_renewal() {
    let lifetime = Duration::from_secs(12);
    let Some(mesh) = mesh(Protocol::Stream, lifetime, Duration::from_secs(6)).await else { return };
    // From half of the lifetime on, with jitter: a renewal that was missed would not be seen within nine seconds.
    ten_rotations(&mesh, Duration::from_secs(9)).await;
}
