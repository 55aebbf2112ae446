//! The agent beside its proxy, in the pod: one token file, a socket that needs no token, and certificates for that pod alone.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::time::Duration;

use chancery_ca::attestation::development::TokenRequest;
use chancery_proto::chancery::v1::WorkloadRequest;
use chancery_tests::agent::Agent;
use chancery_tests::ca::{CLUSTER, Ca, TRUST_DOMAIN};
use chancery_tests::caller::Caller;
use chancery_tests::envoy::{Envoy, Plan, Protocol};
use chancery_tests::lab::Lab;
use chancery_tests::mesh::{Mesh, Settings, token_request};
use chancery_tests::tokens::TokenVolume;
use chancery_tests::{secrets, tools};
use serde_json::Value;
use time::OffsetDateTime;

const HOUR: Duration = Duration::from_secs(3600);
const CART: &str = "spiffe://mesh.test/ns/shop/sa/cart";

/// The newest entries of the ledger about a pod of the shop.
fn identities(ca: &Ca, pod: &str) -> Vec<Value> {
    let found = ca.ask(&["identity", "list", "--pod", &format!("shop/{pod}")]).unwrap();
    found.as_array().unwrap().clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_sends_no_token_gets_the_pods_certificates_while_the_token_file_is_replaced() {
    let Some(binary) = tools::envoy() else { return };
    let (lifetime, token_lifetime) = (Duration::from_secs(10), Duration::from_secs(6));
    let settings = Settings { envoy: binary.clone(), lifetime, token_lifetime, protocol: Protocol::Stream };
    let mesh = Mesh::start(Lab::new().unwrap(), settings).await.unwrap();
    let (volume, _kubelet) = mesh.fresh_volume("cart").await.unwrap();
    let sidecar = Agent::sidecar(&mesh.lab, &mesh.ca, &volume).await.unwrap();
    let plan = Plan { sds_socket: sidecar.sds_socket.clone(), token: None, ..mesh.plan("cart", &volume, None) };
    let mut envoy = Envoy::start(&mesh.lab, &binary, &plan).unwrap();
    envoy.ready().await.unwrap();
    let mut certificate = envoy.certificate().await.unwrap();
    assert_eq!(certificate.spiffe_id, CART);
    // Each renewal is later than half of a lifetime, and so nearly a token's life, after the one before.
    for _ in 0..3 {
        certificate = envoy.next_certificate(&certificate, lifetime).await.unwrap();
    }

    let entries = identities(&mesh.ca, "cart-0");
    let newest = entries.iter().find(|entry| entry["spiffe_id"] == CART).unwrap();
    assert_eq!(newest["serial"], certificate.serial);
    let asker = format!("spiffe://{TRUST_DOMAIN}/chancery/sidecar/{CLUSTER}/{}", newest["pod_uid"].as_str().unwrap());
    assert_eq!(newest["agent"], asker);
    let mut tokens: Vec<&str> =
        entries.iter().filter(|entry| entry["spiffe_id"] == CART).map(|entry| entry["token_id"].as_str().unwrap()).collect();
    tokens.sort_unstable();
    tokens.dedup();
    assert!(tokens.len() > 1, "renewals present the token that the file has then: {tokens:?}");

    let streams = sidecar.ask(&["streams"]).unwrap();
    for stream in streams.as_array().unwrap() {
        assert_eq!((&stream["pod"], &stream["token_expires_at"]), (&"cart-0".into(), &Value::Null), "{stream}");
    }
}

#[tokio::test]
async fn a_sidecar_obtains_no_other_pods_identity() {
    let lab = Lab::new().unwrap();
    let ca = Ca::start(&lab, HOUR).await.unwrap();
    let volume = TokenVolume::create(&lab.at("token")).unwrap();
    let present = |request: &TokenRequest| {
        volume.replace(&ca.issuer().unwrap().sign(request, OffsetDateTime::now_utc()).unwrap()).unwrap();
    };
    present(&token_request("cart", HOUR));
    let sidecar = Agent::sidecar(&lab, &ca, &volume).await.unwrap();
    let first = secrets::fetch(&sidecar.sds_socket, None, Duration::from_secs(5)).await.unwrap();
    assert_eq!(first.svid.id().to_string(), CART);

    // The agent refuses a file that has become another pod's, also of the same service account; nothing is taken from the proxy.
    for (account, pod) in [("checkout", "checkout-0"), ("cart", "cart-1")] {
        let mut other = token_request(account, HOUR);
        other.pod = pod.into();
        present(&other);
        let refused = secrets::fetch(&sidecar.sds_socket, None, Duration::from_secs(5)).await;
        let reason = refused.err().expect("a token of another pod is refused").to_string();
        assert!(reason.contains("this sidecar joined as"), "{reason}");
        assert!(identities(&ca, pod).is_empty());
    }
    present(&token_request("cart", HOUR));
    let again = secrets::fetch(&sidecar.sds_socket, None, Duration::from_secs(5)).await.unwrap();
    assert_eq!(again.svid.serial(), first.svid.serial());

    // And a sidecar that does not check has only asked in vain.
    drop(sidecar);
    let caller = Caller::join_sidecar(&ca, volume.token()).await.unwrap();
    for (account, pod) in [("checkout", "checkout-0"), ("cart", "cart-1")] {
        let mut other = token_request(account, HOUR);
        other.pod = pod.into();
        let token = ca.issuer().unwrap().sign(&other, OffsetDateTime::now_utc()).unwrap().to_string();
        let request = WorkloadRequest { token, ..caller.request().unwrap() };
        let refusal = caller.issue(request).await.unwrap().expect_err("another pod's identity");
        assert_eq!(refusal.reason, "token_other_pod");
        assert!(identities(&ca, pod).is_empty());
    }
}
