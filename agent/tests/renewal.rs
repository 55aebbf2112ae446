//! Certificates through their lives: renewed in time, kept while renewals fail, let go when nobody needs them.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail wherever it likes")]

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use chancery_agent::ca_client::Anchor;
use chancery_agent::svids::SvidState;
use chancery_proto::chancery::v1::{self as wire, Refusal};
use support::{FakeCa, Pki, Place, TokenPlan, a_while, eventually, ready, renewed, serves};

const PAST_HALF: time::Duration = time::Duration::seconds(2400);

fn cart() -> TokenPlan {
    TokenPlan::pod(10, "shop", "cart")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_renewed_from_half_of_its_life_with_a_new_key() {
    let ca = FakeCa::start();
    let agent = Place::new(&ca).start(&ca);
    let mut stream = agent.svids.attach(ca.token(&cart())).await.unwrap();
    let first = ready(&mut stream).await;
    ca.clock.advance(time::Duration::seconds(1700));
    a_while().await;
    assert!(serves(&stream, &first), "not before half of its life");
    ca.clock.advance(PAST_HALF - time::Duration::seconds(1700));
    let second = renewed(&mut stream, &first).await;
    assert_ne!(first.key().secret_pkcs8(), second.key().secret_pkcs8());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lifetime_shorter_than_the_backdating_does_not_renew_all_the_time() {
    let ca = FakeCa::start();
    ca.behaviour.lifetime.store(20, Ordering::SeqCst);
    let agent = Place::new(&ca).start(&ca);
    let mut stream = agent.svids.attach(ca.token(&cart())).await.unwrap();
    ready(&mut stream).await;
    a_while().await;
    assert_eq!(ca.calls(), [1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_good_certificate_is_kept_while_renewals_are_refused_and_until_it_expires() {
    let ca = FakeCa::start();
    let agent = Place::new(&ca).start(&ca);
    let mut stream = agent.svids.attach(ca.token(&cart())).await.unwrap();
    let first = ready(&mut stream).await;
    *ca.behaviour.refuse.lock().unwrap() = Some(Refusal { reason: "policy".into(), message: "no".into(), retryable: false });
    ca.clock.advance(PAST_HALF);
    eventually("a renewal fails", || agent.metrics.renewals_failed.get() > 0).await;
    assert!(serves(&stream, &first));
    ca.clock.advance(time::Duration::seconds(3600 - 2400 - 2));
    a_while().await;
    assert!(serves(&stream, &first), "two seconds before it expires");
    ca.clock.advance(time::Duration::seconds(3));
    eventually("it is let go once expired", || !matches!(&*stream.svid.borrow(), SvidState::Ready(_))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ca_that_was_away_for_longer_than_half_a_life_is_asked_as_soon_as_it_is_back() {
    let mut ca = FakeCa::start();
    let agent = Place::new(&ca).start(&ca);
    let mut stream = agent.svids.attach(ca.token(&cart())).await.unwrap();
    let first = ready(&mut stream).await;
    ca.kill();
    eventually("it is noticed", || !*agent.svids.ca_reachable().borrow()).await;
    ca.clock.advance(time::Duration::seconds(3000));
    a_while().await;
    assert!(serves(&stream, &first));
    assert_eq!(agent.metrics.first_expiry.get(), 600);
    let status = agent.svids.status().await.unwrap();
    assert!(status.workloads[0].problem.contains("waits for the CA"), "{}", status.workloads[0].problem);
    ca.resume();
    renewed(&mut stream, &first).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_is_not_valid_by_the_own_clock_is_refused_and_the_last_one_kept() {
    let ca = FakeCa::start();
    let agent = Place::new(&ca).start(&ca);
    let mut stream = agent.svids.attach(ca.token(&cart())).await.unwrap();
    let first = ready(&mut stream).await;
    for (skew, sign) in [(86_400, "ahead"), (-86_400, "behind")] {
        let before = agent.metrics.rejected.get();
        ca.behaviour.skew.store(skew, Ordering::SeqCst);
        ca.clock.advance(if skew > 0 { PAST_HALF } else { time::Duration::seconds(600) });
        eventually(sign, || agent.metrics.rejected.get() > before).await;
        assert!(serves(&stream, &first));
    }
    ca.behaviour.skew.store(0, Ordering::SeqCst);
    ca.clock.advance(time::Duration::seconds(300));
    renewed(&mut stream, &first).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_token_stops_issuance_but_not_serving_until_a_fresh_one_comes() {
    let ca = FakeCa::start();
    let agent = Place::new(&ca).start(&ca);
    let short = TokenPlan { life: Duration::from_secs(600), ..cart() };
    let mut stream = agent.svids.attach(ca.token(&short)).await.unwrap();
    let first = ready(&mut stream).await;
    ca.clock.advance(PAST_HALF);
    a_while().await;
    assert!(serves(&stream, &first));
    assert_eq!(ca.calls(), [1], "an expired token is not sent");
    assert!(agent.svids.status().await.unwrap().workloads[0].problem.contains("token expired"));
    let fresh = ca.token(&short);
    let again = agent.svids.attach(fresh.clone()).await.unwrap();
    renewed(&mut stream, &first).await;
    assert!(!serves(&again, &first));
    assert_eq!(ca.behaviour.tokens.lock().unwrap().last().unwrap(), fresh.secret());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_token_does_not_replace_a_newer_one() {
    let ca = FakeCa::start();
    let agent = Place::new(&ca).start(&ca);
    let older = ca.token(&cart());
    ca.clock.advance(time::Duration::seconds(10));
    let newer = ca.token(&cart());
    let mut stream = agent.svids.attach(newer.clone()).await.unwrap();
    let first = ready(&mut stream).await;
    let _second = agent.svids.attach(older).await.unwrap();
    ca.clock.advance(PAST_HALF);
    renewed(&mut stream, &first).await;
    assert!(ca.behaviour.tokens.lock().unwrap().iter().all(|token| token == newer.secret()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_is_dropped_some_minutes_after_its_last_stream_and_not_before() {
    let ca = FakeCa::start();
    let agent = Place::new(&ca).start(&ca);
    let mut stream = agent.svids.attach(ca.token(&cart())).await.unwrap();
    let first = ready(&mut stream).await;
    drop(stream);
    a_while().await;
    ca.clock.advance(time::Duration::seconds(290));
    a_while().await;
    let again = agent.svids.attach(ca.token(&cart())).await.unwrap();
    assert!(serves(&again, &first), "a restarted proxy gets the certificate that is there");
    drop(again);
    a_while().await;
    ca.clock.advance(time::Duration::seconds(310));
    a_while().await;
    assert!(agent.svids.status().await.unwrap().workloads.is_empty());
    ca.clock.advance(PAST_HALF);
    a_while().await;
    assert_eq!(ca.calls(), [1], "and is no longer renewed");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_to_issue_everything_anew_is_obeyed() {
    let ca = FakeCa::start();
    let agent = Place::new(&ca).start(&ca);
    let mut streams = Vec::new();
    for number in 10..30 {
        let mut stream = agent.svids.attach(ca.token(&TokenPlan::pod(number, "shop", "cart"))).await.unwrap();
        let first = ready(&mut stream).await;
        streams.push((stream, first));
    }
    let order = wire::Order { order: Some(wire::order::Order::ReissueAll(wire::ReissueAll {})) };
    ca.send(wire::ca_message::Message::Order(order)).await;
    a_while().await;
    ca.clock.advance(time::Duration::seconds(1));
    for (stream, first) in &mut streams {
        renewed(stream, first).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ca_that_lost_entries_is_told_every_certificate() {
    const PODS: u128 = 150;
    let ca = FakeCa::start();
    let agent = Place::new(&ca).start(&ca);
    let mut streams = Vec::new();
    for number in 10..10 + PODS {
        let mut stream = agent.svids.attach(ca.token(&TokenPlan::pod(number, "shop", "cart"))).await.unwrap();
        let held = ready(&mut stream).await;
        streams.push((stream, held));
    }
    let order = wire::Order { order: Some(wire::order::Order::TellCertificates(wire::TellCertificates {})) };
    ca.send(wire::ca_message::Message::Order(order)).await;
    eventually("the CA was told", || ca.behaviour.told.lock().unwrap().len() == 2).await;
    let calls = ca.behaviour.told.lock().unwrap().clone();
    assert!(calls.iter().all(|call| call.certificates.len() <= 128));
    let told: Vec<_> = calls.into_iter().flat_map(|call| call.certificates).collect();
    let own = agent.client.own().borrow().as_ref().unwrap().chain();
    assert_eq!(told.last().unwrap(), &wire::HeldCertificate { chain: own, ..wire::HeldCertificate::default() });
    assert_eq!(told.len(), streams.len() + 1);
    for (stream, held) in &streams {
        let told = told.iter().find(|told| told.pod_uid == stream.workload.pod_uid.as_bytes()).unwrap();
        let chain: Vec<_> = held.chain().iter().map(|certificate| certificate.to_vec()).collect();
        assert_eq!((&told.chain, &told.pod), (&chain, &stream.pod_name));
        assert_eq!((told.namespace.as_str(), told.service_account.as_str()), ("shop", "cart"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_whose_root_is_trusted_no_more_is_replaced_at_once_also_after_a_restart() {
    let mut ca = FakeCa::start();
    let place = Place::new(&ca);
    let agent = place.start(&ca);
    let mut cart = agent.svids.attach(ca.token(&cart())).await.unwrap();
    let old = ready(&mut cart).await;
    agent.stop().await;
    ca.kill();
    let next = Arc::new(Pki::new("next"));
    let Anchor::BundleFile(path) = &place.anchor else { unreachable!() };
    std::fs::write(path, format!("# sequence: 7\n{}", next.trust(7).own().to_pem())).unwrap();
    ca.pki = next;
    ca.behaviour.trust_sequence.store(7, Ordering::SeqCst);
    ca.resume();
    let agent = place.start(&ca);
    let mut again = agent.svids.attach(ca.token(&self::cart())).await.unwrap();
    renewed(&mut again, &old).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_is_revoked_is_replaced_at_once_and_others_are_not() {
    let ca = FakeCa::start();
    let agent = Place::new(&ca).start(&ca);
    let mut cart = agent.svids.attach(ca.token(&cart())).await.unwrap();
    let mut checkout = agent.svids.attach(ca.token(&TokenPlan::pod(11, "shop", "checkout"))).await.unwrap();
    let (revoked, other) = (ready(&mut cart).await, ready(&mut checkout).await);
    let trust = ca.pki.trust(7).with_crl(Some(ca.pki.crl(&[revoked.serial()])));
    ca.send(wire::ca_message::Message::Trust(chancery_agent::ca_client::trust::to_wire(&trust))).await;
    assert_ne!(renewed(&mut cart, &revoked).await.serial(), revoked.serial());
    assert!(serves(&checkout, &other));
}
