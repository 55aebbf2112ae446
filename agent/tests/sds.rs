//! The SDS service as a proxy sees it: over a real socket, through a real gRPC client.

#![allow(clippy::unwrap_used, reason = "a test may fail wherever it likes")]

mod sds_support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use chancery_agent::sds::{Server, Settings};
use chancery_agent::svids::SvidState;
use sds_support::pki::Pki;
use sds_support::proxy::{authorities, certificate, owned, secret};
use sds_support::{CART, DOMAIN, Serving, eventually, trust};
use tonic::Code;

const ROOT: &str = "spiffe://example.org";

#[tokio::test]
async fn a_proxy_gets_its_certificate_and_its_bundle_under_every_name() {
    let serving = Serving::ready();
    let svid = serving.pki.svid(CART);
    serving.stub.ready("cart", svid.clone());
    let mut proxy = serving.proxy().await;
    for name in ["default", CART] {
        let response = proxy.world(&[name]).await.next().await;
        let secret = secret(&response.resources);
        assert_eq!(secret.name, name);
        assert_eq!(certificate(&secret), (svid.chain_pem(), svid.key().secret_pem().to_string()));
    }
    for name in ["ROOTCA", ROOT] {
        let response = proxy.world(&[name]).await.next().await;
        let secret = secret(&response.resources);
        assert_eq!(secret.name, name);
        assert_eq!(authorities(&secret), (serving.pki.bundle(DOMAIN).to_pem(), None));
    }
}

#[tokio::test]
async fn a_crl_is_delivered_with_the_bundle() {
    let serving = Serving::start();
    let mut state = trust(1, &[&serving.pki]);
    let crl = serving.pki.crl(&[]);
    state.crl = Some(crl.clone());
    serving.stub.trust.send_replace(Some(Arc::new(state)));
    let mut proxy = serving.proxy().await;
    let response = proxy.world(&["ROOTCA"]).await.next().await;
    assert_eq!(authorities(&secret(&response.resources)).1.map(String::into_bytes).as_deref(), Some(crl.pem()));
}

#[tokio::test]
async fn a_bundle_that_is_not_there_is_held_back_and_never_sent_empty() {
    let serving = Serving::start();
    let mut proxy = serving.proxy().await;
    let (mut world, mut delta) = (proxy.world(&["ROOTCA"]).await, proxy.delta(&["ROOTCA"], &[]).await);
    world.quiet().await;
    delta.quiet().await;
    serving.trust(1, &[&serving.pki]);
    assert_eq!(authorities(&secret(&world.next().await.resources)).0, serving.pki.bundle(DOMAIN).to_pem());
    let response = delta.next().await;
    assert_eq!(response.resources.len(), 1);
    assert!(response.removed_resources.is_empty());
}

#[tokio::test]
async fn a_certificate_is_pushed_when_it_comes_and_stays_when_it_is_gone() {
    let serving = Serving::start();
    serving.trust(1, &[&serving.pki]);
    let mut proxy = serving.proxy().await;
    let mut stream = proxy.world(&["default"]).await;
    let refused = SvidState::Refused { reason: "policy".to_owned(), message: "no".to_owned(), retryable: false };
    serving.stub.publish("cart", refused);
    stream.quiet().await;
    serving.stub.ready("cart", serving.pki.svid(CART));
    stream.accept(&["default"]).await;
    serving.stub.publish("cart", SvidState::Pending);
    stream.quiet().await;
}

#[tokio::test]
async fn a_name_of_somebody_else_is_held_back_and_breaks_nothing() {
    let (serving, mut proxy) = Serving::with_a_proxy().await;
    let others = ["spiffe://example.org/ns/shop/sa/other", "spiffe://elsewhere.org", "kubernetes://secret", "ROOTCA"];
    let mut world = proxy.world(&others).await;
    assert_eq!(secret(&world.accept(&others).await.resources).name, "ROOTCA");
    let mut delta = proxy.delta(&[&others[..], &["default"]].concat(), &[]).await;
    let response = delta.accept().await;
    let mut names: Vec<_> = response.resources.iter().map(|resource| &*resource.name).collect();
    names.sort_unstable();
    assert_eq!(names, ["ROOTCA", "default"]);
    assert!(response.removed_resources.is_empty());
    world.quiet().await;

    let listed = serving.registry.list();
    let standing: Vec<_> = listed[0].names.iter().map(|name| &*name.standing).collect();
    assert_eq!(standing, ["withheld", "withheld", "withheld", "served"]);
    assert_eq!(serving.metrics.names_withheld.get(), 6);
    assert!(serving.registry.problems().iter().any(|problem| problem.contains("spiffe://elsewhere.org")));
}

#[tokio::test]
async fn a_proxy_that_comes_back_with_what_is_served_gets_nothing() {
    let (serving, mut proxy) = Serving::with_a_proxy().await;
    let first = proxy.world(&["default"]).await.next().await;
    let mut proxy = serving.proxy().await;
    let mut again = proxy.world_with(&["default"], &first.version_info).await;
    again.quiet().await;
    serving.stub.ready("cart", serving.pki.svid(CART));
    assert_ne!(again.next().await.version_info, first.version_info);

    let first = proxy.delta(&["ROOTCA"], &[]).await.next().await;
    let has = [("ROOTCA", &*first.resources[0].version)];
    proxy.delta(&["ROOTCA"], &has).await.quiet().await;
    let mut partly = proxy.delta(&["ROOTCA", "default"], &has).await;
    let response = partly.next().await;
    assert_eq!(response.resources.iter().map(|resource| &*resource.name).collect::<Vec<_>>(), ["default"]);
}

#[tokio::test]
async fn what_a_returning_proxy_names_counts_as_acknowledged() {
    let (serving, mut proxy) = Serving::with_a_proxy().await;
    let first = proxy.world(&["ROOTCA"]).await.next().await;
    drop(proxy);
    eventually("the old stream is gone", || serving.registry.is_empty()).await;
    let mut proxy = serving.proxy().await;
    let _again = proxy.world_with(&["ROOTCA"], &first.version_info).await;
    eventually("its bundle is known", || serving.registry.list().iter().any(|stream| stream.trust_sequence == Some(1))).await;
    assert_eq!(serving.summary().lagging_total, 0);
}

#[tokio::test]
async fn a_refused_version_is_not_offered_again_until_the_content_changes() {
    let (serving, mut proxy) = Serving::with_a_proxy().await;
    let (mut world, mut delta) = (proxy.world(&["default"]).await, proxy.delta(&["default"], &[]).await);
    let good = world.accept(&["default"]).await;
    delta.accept().await;
    serving.stub.ready("cart", serving.pki.svid(CART));
    let bad = world.next().await;
    world.nack(&["default"], &bad, &good.version_info, "key mismatch").await;
    let response = delta.next().await;
    delta.answer(&response, Some("key mismatch")).await;
    world.quiet().await;
    delta.quiet().await;
    assert_eq!(serving.metrics.nacks.get(), 2);
    let listed = serving.registry.list();
    assert_eq!(listed[0].nack, "key mismatch");
    assert_eq!((&listed[0].names[0].held, &listed[0].names[0].sent), (&good.version_info, &bad.version_info));

    serving.stub.ready("cart", serving.pki.svid(CART));
    world.accept(&["default"]).await;
    delta.accept().await;
    eventually("an accepted version ends the complaint", || serving.registry.list().iter().all(|stream| stream.nack.is_empty())).await;
}

#[tokio::test]
async fn an_answer_to_an_older_response_is_ignored() {
    let (serving, mut proxy) = Serving::with_a_proxy().await;
    let mut stream = proxy.world(&["default"]).await;
    let first = stream.next().await;
    serving.stub.ready("cart", serving.pki.svid(CART));
    let second = stream.next().await;
    stream.ack(&["default"], &first).await;
    stream.quiet().await;
    assert_eq!(serving.registry.list()[0].names[0].held, "");
    assert_eq!(serving.metrics.acks.get(), 0);
    stream.ack(&["default"], &second).await;
    eventually("the newest answer counts", || serving.registry.list()[0].names[0].held == second.version_info).await;
}

#[tokio::test]
async fn a_stream_without_a_good_token_is_refused_with_the_reason() {
    let serving = Serving::ready();
    let proxy = serving.proxy().await;
    let cases =
        [(None, "no token"), (Some("Basic token"), "Bearer"), (Some("Bearer "), "Bearer"), (Some("Bearer forged-secret"), "signature")];
    for (authorization, reason) in cases {
        let mut proxy = proxy.with_authorization(authorization);
        for status in [proxy.open_world().await.err().unwrap(), proxy.open_delta().await.err().unwrap()] {
            assert_eq!(status.code(), Code::Unauthenticated, "{authorization:?}");
            assert!(status.message().contains(reason), "{status}");
            assert!(!status.message().contains("forged-secret"), "{status}");
        }
    }
    assert!(serving.registry.is_empty());
}

#[tokio::test]
async fn in_sidecar_mode_no_token_is_asked_for() {
    let serving = Serving::with(false, 10, 10);
    serving.trust(1, &[&serving.pki]);
    serving.stub.ready("cart", serving.pki.svid(CART));
    let mut proxy = serving.proxy().await.with_authorization(None);
    let mut stream = proxy.world(&["default"]).await;
    stream.accept(&["default"]).await;
    serving.at_part_of_the_tokens_life(2.0);
    stream.quiet().await;
}

#[tokio::test]
async fn other_resources_and_fetching_are_refused_with_a_sentence() {
    let (_serving, mut proxy) = Serving::with_a_proxy().await;
    let status = proxy.fetch().await;
    assert_eq!(status.code(), Code::Unimplemented);
    assert!(status.message().contains("StreamSecrets"), "{status}");
    let mut stream = proxy.open_world().await.unwrap();
    let type_url = "type.googleapis.com/envoy.config.cluster.v3.Cluster".to_owned();
    let request = chancery_proto::envoy::service::discovery::v3::DiscoveryRequest { type_url, ..Default::default() };
    stream.send(request).await;
    assert_eq!(stream.end().await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn the_bundle_is_with_the_proxy_before_the_certificate_that_depends_on_it() {
    let (serving, _proxy, mut bundle, mut leaf) = Serving::with_a_bundle_and_a_certificate().await;
    let next = Pki::new("next");
    let started = Instant::now();
    serving.trust(2, &[&serving.pki, &next]);
    serving.stub.ready("cart", next.svid(CART));
    let pushed = bundle.next().await;
    leaf.quiet().await;
    bundle.ack(&["ROOTCA"], &pushed).await;
    leaf.accept(&["default"]).await;
    assert!(started.elapsed() < Duration::from_millis(900), "it did not wait for the ACK, but for the limit");
}

#[tokio::test]
async fn a_certificate_waits_a_second_for_the_bundle_and_no_longer() {
    let (serving, mut proxy) = Serving::with_a_proxy().await;
    let mut both = proxy.delta(&["ROOTCA", "default"], &[]).await;
    both.accept().await;
    let next = Pki::new("next");
    serving.trust(2, &[&serving.pki, &next]);
    serving.stub.ready("cart", next.svid(CART));
    let started = Instant::now();
    assert_eq!(both.next().await.resources[0].name, "ROOTCA");
    assert_eq!(both.next().await.resources[0].name, "default");
    assert!(started.elapsed() >= Duration::from_millis(900));
}

#[tokio::test]
async fn a_first_certificate_and_one_without_a_validation_context_do_not_wait() {
    let (serving, mut proxy) = Serving::with_a_proxy().await;
    let mut leaf = proxy.world(&["default"]).await;
    leaf.accept(&["default"]).await;
    let next = Pki::new("next");
    let started = Instant::now();
    serving.trust(2, &[&serving.pki, &next]);
    serving.stub.ready("cart", next.svid(CART));
    leaf.accept(&["default"]).await;
    let _unanswered = proxy.world(&["ROOTCA"]).await.next().await;
    proxy.world(&[CART]).await.next().await;
    assert!(started.elapsed() < Duration::from_millis(900));
}

#[tokio::test]
async fn the_summary_names_the_proxies_that_lag() {
    let (serving, mut proxy) = Serving::with_a_proxy().await;
    let (mut prompt, mut slow) = (proxy.world(&["ROOTCA"]).await, proxy.world(&[ROOT]).await);
    prompt.accept(&["ROOTCA"]).await;
    let good = slow.accept(&[ROOT]).await;
    let mut summaries = serving.stub.summary.subscribe();
    summaries.wait_for(|summary| summary.acks == 2 && summary.lagging.is_empty()).await.unwrap();

    serving.trust(7, &[&serving.pki, &Pki::new("next")]);
    prompt.accept(&["ROOTCA"]).await;
    let refused = slow.next().await;
    slow.nack(&[ROOT], &refused, &good.version_info, "no such curve").await;
    let summary = summaries.wait_for(|summary| summary.nacks == 1 && summary.lagging_total == 1).await.unwrap().clone();
    let [lagging] = &summary.lagging[..] else { panic!("{summary:?}") };
    assert_eq!((&*lagging.proxy, &*lagging.pod, lagging.trust_sequence), ("cart-envoy", "shop/cart-0", 1));
    assert_eq!(lagging.nack, "no such curve");
}

#[tokio::test]
async fn streams_and_connections_over_the_limits_are_told_so() {
    let serving = Serving::with(true, 1, 1);
    serving.trust(1, &[&serving.pki]);
    let mut proxy = serving.proxy().await;
    let first = proxy.world(&["ROOTCA"]).await;
    let status = proxy.open_world().await.err().unwrap();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.message().contains("1 streams"), "{status}");
    let mut other = serving.proxy().await;
    let status = other.open_world().await.err().unwrap();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.message().contains("1 connections"), "{status}");

    drop((first, proxy, other));
    eventually("a place is free again", || serving.registry.is_empty() && serving.stub.attached() == 0).await;
    let mut proxy = serving.proxy().await;
    proxy.world(&["ROOTCA"]).await.next().await;
}

#[tokio::test]
async fn too_many_names_end_the_stream_with_a_sentence() {
    let (_serving, mut proxy) = Serving::with_a_proxy().await;
    let names: Vec<_> = (0..100).map(|number| format!("name-{number}")).collect();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    assert_eq!(proxy.world(&names).await.end().await.unwrap_err().code(), Code::ResourceExhausted);
    assert_eq!(proxy.delta(&names, &[]).await.end().await.unwrap_err().code(), Code::ResourceExhausted);
}

#[tokio::test]
async fn a_subscription_that_changes_brings_what_is_new() {
    let (serving, mut proxy) = Serving::with_a_proxy().await;
    let mut world = proxy.world(&["ROOTCA"]).await;
    let first = world.accept(&["ROOTCA"]).await;
    world.ack(&["ROOTCA", "default"], &first).await;
    let second = world.next().await;
    assert_eq!(second.resources.len(), 2);
    world.ack(&[], &second).await;
    eventually("nothing is asked for", || serving.registry.list()[0].names.is_empty()).await;
    serving.stub.ready("cart", serving.pki.svid(CART));
    world.quiet().await;

    let mut delta = proxy.delta(&["ROOTCA"], &[]).await;
    delta.accept().await;
    let subscribe = |names: &[&str]| chancery_proto::envoy::service::discovery::v3::DeltaDiscoveryRequest {
        resource_names_subscribe: owned(names),
        ..Default::default()
    };
    delta.send(subscribe(&["default"])).await;
    assert_eq!(delta.accept().await.resources[0].name, "default");
    // A proxy that asks again has lost what it had.
    delta.send(subscribe(&["ROOTCA"])).await;
    assert_eq!(delta.accept().await.resources[0].name, "ROOTCA");
}

#[tokio::test]
async fn shutting_down_ends_every_stream_with_a_sentence() {
    let (serving, _proxy, mut stream, _held) = Serving::with_a_certificate().await;
    serving.shutdown.cancel();
    let status = stream.end().await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("shutting down"), "{status}");
}

#[tokio::test]
async fn the_socket_of_a_living_agent_is_not_taken_over_and_a_dead_ones_is() {
    let serving = Serving::ready();
    let settings = Settings { socket: serving.socket(), socket_mode: 0o660, max_connections: 1, tick: Duration::from_secs(1) };
    assert!(Server::bind(settings.clone()).unwrap_err().to_string().contains("another process"));
    drop(serving.proxy().await);
    serving.shutdown.cancel();
    tokio::time::timeout(sds_support::DEADLINE, async {
        while Server::bind(settings.clone()).is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
}
