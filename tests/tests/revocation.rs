//! Revocation reaches real Envoys: who is revoked is refused in the next handshake, and nobody else is.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::time::{Duration, Instant};

use chancery_tests::envoy::Protocol;
use chancery_tests::lab::Lab;
use chancery_tests::load::Load;
use chancery_tests::mesh::{Mesh, Settings, Workload};
use chancery_tests::{http, tools};
use serde_json::Value;

const HOUR: Duration = Duration::from_secs(3600);
/// A revoked peer's next connection is refused within so long.
const AT_ONCE: Duration = Duration::from_secs(1);

/// Two workloads that call a third.
struct Shop {
    mesh: Mesh,
    cart: Workload,
    payments: Workload,
    checkout: Workload,
}

async fn shop() -> Option<Shop> {
    let settings = Settings { envoy: tools::envoy()?, lifetime: HOUR, token_lifetime: HOUR, protocol: Protocol::Stream };
    let mesh = Mesh::start(Lab::new().unwrap(), settings).await.unwrap();
    let checkout = mesh.workload("checkout", None).await.unwrap();
    let cart = mesh.workload("cart", Some(checkout.envoy.at.inbound)).await.unwrap();
    let payments = mesh.workload("payments", Some(checkout.envoy.at.inbound)).await.unwrap();
    Some(Shop { mesh, cart, payments, checkout })
}

impl Shop {
    /// Without holding up the load, which runs on the same threads.
    fn chancery(&self, arguments: &[&str]) -> Result<String, String> {
        tokio::task::block_in_place(|| self.mesh.ca.chancery(arguments)).map_err(|error| error.to_string())
    }

    /// Revokes, when everybody has acknowledged it.
    fn revoke(&self, arguments: &[&str]) -> Value {
        let all = [&["identity", "revoke", "--reason", "a test wants it", "-o", "json"], arguments].concat();
        serde_json::from_str(&self.chancery(&all).unwrap()).unwrap()
    }

    async fn is_refused(caller: &Workload) -> Result<(), String> {
        match http::get(caller.envoy.at.outbound, "/").await {
            Ok((200, _)) => Err("it is let in".into()),
            Ok((503, _)) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_peers_next_connection_is_refused_at_once_and_everybody_elses_works() {
    let Some(shop) = shop().await else { return };
    let load = Load::start(shop.payments.envoy.at.outbound, 2, Duration::from_millis(5));
    assert_eq!(Shop::is_refused(&shop.cart).await.unwrap_err(), "it is let in");
    let serial = shop.cart.envoy.certificate().await.unwrap().serial;

    let begun = Instant::now();
    let outcome = shop.revoke(&["--pod", "shop/cart-0"]);
    Shop::is_refused(&shop.cart).await.unwrap();
    let took = begun.elapsed();
    assert!(took < AT_ONCE, "{took:?}");
    assert_eq!((&outcome["revoked"], &outcome["acknowledged"]), (&1.into(), &true.into()), "{outcome}");
    assert!(outcome["not_reached"][0].as_str().unwrap().starts_with("connections that are open"));
    assert_eq!(shop.checkout.envoy.stat("listener.inbound.ssl.fail_verify_error").await.unwrap(), 1);
    let listed = shop.mesh.ca.ask(&["identity", "list", "--revoked"]).unwrap();
    assert_eq!((listed.as_array().unwrap().len(), listed[0]["serial"].as_str()), (1, Some(&*serial)));

    // It stays refused, also with what it might ask for, until it is allowed; a certificate from before stays revoked.
    tokio::time::sleep(Duration::from_secs(1)).await;
    Shop::is_refused(&shop.cart).await.unwrap();
    let counts = load.finish().await;
    assert_eq!(counts.failed(), 0, "{:?}", counts.failures());
    assert!(counts.ok() > 100, "{} requests are no load", counts.ok());
    assert_eq!(shop.payments.envoy.stat("cluster.outbound.ssl.handshake").await.unwrap(), counts.ok(), "each request was a handshake");
}
