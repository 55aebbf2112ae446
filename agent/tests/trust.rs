//! What the agent trusts the CA by, what it takes over from it, and its own identity.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail wherever it likes")]

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use chancery_agent::ca_client::{Anchor, trust};
use chancery_agent::readiness::readiness;
use chancery_identity::TrustState;
use chancery_process::http::Readiness;
use chancery_proto::chancery::v1 as wire;
use support::{Agent, FakeCa, Pki, Place, TokenPlan, a_while, eventually, ready};

fn message(state: &TrustState) -> wire::ca_message::Message {
    wire::ca_message::Message::Trust(trust::to_wire(state))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ca_of_another_root_gets_no_token() {
    let (ca, stranger) = (FakeCa::start(), FakeCa::start());
    let mut place = Place::new(&ca);
    let agent = place.start(&stranger);
    eventually("it is refused", || agent.client.problem().contains("no TLS session")).await;
    place.anchor = Anchor::RootFingerprint(ca.pki.fingerprint());
    let second = place.start(&stranger);
    eventually("it is refused", || second.client.problem().contains("no TLS session")).await;
    assert_eq!(stranger.behaviour.joins.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_joins_by_the_roots_fingerprint() {
    let ca = FakeCa::start();
    let mut place = Place::new(&ca);
    place.anchor = Anchor::RootFingerprint(ca.pki.fingerprint());
    place.start(&ca).connected().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bundle_file_that_comes_late_is_found() {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let Anchor::BundleFile(path) = &place.anchor else { unreachable!() };
    let bundle = std::fs::read(path).unwrap();
    std::fs::remove_file(path).unwrap();
    let agent = place.start(&ca);
    eventually("the file is missed", || agent.client.problem().contains("bundle.pem")).await;
    std::fs::write(path, bundle).unwrap();
    agent.connected().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn trust_only_grows_and_a_distrusted_root_never_comes_back() {
    let ca = FakeCa::start();
    let agent = Place::new(&ca).start(&ca);
    agent.connected().await;
    let sequence = || agent.svids.trust().borrow().as_ref().map_or(0, |trust| trust.sequence);
    let (next, bad) = (Pki::new("next"), Pki::new("bad"));
    ca.send(message(&ca.pki.trust_with(5, &[&next, &bad]))).await;
    eventually("the new state is taken over", || sequence() == 5).await;
    eventually("and reported", || ca.behaviour.reports.lock().unwrap().last().unwrap().trust_sequence == 5).await;

    let mut distrusting = ca.pki.trust_with(6, &[&next]);
    distrusting.distrusted = vec![bad.fingerprint()];
    ca.send(message(&distrusting)).await;
    eventually("a root is distrusted", || sequence() == 6).await;

    for refused in [ca.pki.trust(4), ca.pki.trust_with(6, &[&bad]), ca.pki.trust_with(7, &[&next, &bad])] {
        ca.send(message(&refused)).await;
    }
    ca.send(wire::ca_message::Message::Trust(wire::TrustState { sequence: 8, trust_domain: "example.org".into(), ..Default::default() }))
        .await;
    a_while().await;
    assert_eq!(sequence(), 6);
    agent.connected().await;
    ca.send(message(&ca.pki.trust_with(9, &[&next]))).await;
    eventually("a good one is still taken over", || sequence() == 9).await;
    assert_eq!(agent.svids.trust().borrow().as_ref().unwrap().distrusted, [bad.fingerprint()], "what was distrusted is not forgotten");
}

#[tokio::test(flavor = "multi_thread")]
async fn crls_that_cannot_be_read_are_not_taken_over_and_others_are() {
    let ca = FakeCa::start();
    let agent = Place::new(&ca).start(&ca);
    agent.connected().await;
    let broken = wire::TrustState { crl: b"no CRL".to_vec(), ..trust::to_wire(&ca.pki.trust(5)) };
    ca.send(wire::ca_message::Message::Trust(broken)).await;
    let crl = ca.pki.crl(&[]);
    ca.send(message(&ca.pki.trust(6).with_crl(Some(crl.clone())))).await;
    let mut trust = agent.svids.trust();
    let taken = trust.wait_for(|trust| trust.as_ref().is_some_and(|trust| trust.sequence >= 5)).await.unwrap().clone().unwrap();
    assert_eq!((taken.sequence, taken.crl.as_ref()), (6, Some(&crl)));
}

/// Replaces the bundle file by this root, with a line that says how new it is.
fn write_bundle(place: &Place, sequence: Option<u64>, root: &Pki) {
    let Anchor::BundleFile(path) = &place.anchor else { unreachable!() };
    let line = sequence.map(|sequence| format!("# sequence: {sequence}\n")).unwrap_or_default();
    std::fs::write(path, line + &root.trust(1).own().to_pem()).unwrap();
}

/// An agent that has taken over a state of sequence 6, in which `bad` is distrusted, and whose CA is gone.
async fn distrusting(ca: &mut FakeCa, place: &Place, bad: &Pki) -> Agent {
    let agent = place.start(ca);
    agent.connected().await;
    let mut state = ca.pki.trust(6);
    state.distrusted = vec![bad.fingerprint()];
    ca.send(message(&state)).await;
    let mut trust = agent.svids.trust();
    trust.wait_for(|trust| trust.as_ref().is_some_and(|trust| trust.sequence == 6)).await.unwrap();
    ca.kill();
    agent
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bundle_file_never_brings_a_distrusted_root_back_whatever_its_sequence() {
    let mut ca = FakeCa::start();
    let place = Place::new(&ca);
    let bad = Arc::new(Pki::new("bad"));
    let agent = distrusting(&mut ca, &place, &bad).await;
    ca.pki = bad.clone();
    ca.resume();
    for sequence in [None, Some(3), Some(9)] {
        write_bundle(&place, sequence, &bad);
        ca.refused_by_an_agent().await;
    }
    agent.stop().await;
    let _restarted = place.start(&ca);
    ca.refused_by_an_agent().await;
    assert_eq!(ca.behaviour.joins.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_missed_rotation_a_bundle_file_with_a_larger_sequence_is_taken_and_no_other() {
    let mut ca = FakeCa::start();
    let place = Place::new(&ca);
    let agent = distrusting(&mut ca, &place, &Pki::new("bad")).await;
    let next = Arc::new(Pki::new("next"));
    ca.pki = next.clone();
    ca.behaviour.trust_sequence.store(7, Ordering::SeqCst);
    ca.resume();
    for sequence in [None, Some(6)] {
        write_bundle(&place, sequence, &next);
        ca.refused_by_an_agent().await;
    }
    write_bundle(&place, Some(7), &next);
    agent.connected().await;
    assert_eq!(agent.svids.trust().borrow().as_ref().unwrap().sequence, 7);
}

/// An agent that renews its own certificate because of what `cause` does, and never loses the CA over that.
async fn renews(ca: &FakeCa, cause: impl AsyncFnOnce()) -> Agent {
    let agent = Place::new(ca).start(ca);
    agent.connected().await;
    let serial = || agent.client.own().borrow().as_ref().unwrap().svid.serial();
    let first = serial();
    let mut reachable = agent.client.reachable();
    reachable.borrow_and_update();
    cause().await;
    eventually("a new certificate", || serial() != first).await;
    eventually("a session made with it", || ca.behaviour.sessions.lock().unwrap().len() == 2).await;
    assert!(!reachable.has_changed().unwrap(), "the CA was never out of reach");
    assert_eq!((ca.behaviour.joins.load(Ordering::SeqCst), ca.behaviour.renewals.load(Ordering::SeqCst)), (1, 1));
    agent
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_to_renew_the_agents_own_certificate_is_obeyed_without_losing_the_ca() {
    let ca = FakeCa::start();
    let order = wire::Order { order: Some(wire::order::Order::RenewAgent(wire::RenewAgent {})) };
    renews(&ca, async || ca.send(wire::ca_message::Message::Order(order)).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agents_own_certificate_is_renewed_without_losing_the_ca() {
    let ca = FakeCa::start();
    let agent = renews(&ca, async || ca.clock.advance(time::Duration::hours(15))).await;
    let mut stream = agent.svids.attach(ca.token(&TokenPlan::pod(10, "shop", "cart"))).await.unwrap();
    ready(&mut stream).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_whose_certificate_expired_while_the_ca_was_away_joins_again() {
    let mut ca = FakeCa::start();
    let agent = Place::new(&ca).start(&ca);
    agent.connected().await;
    ca.kill();
    ca.clock.advance(time::Duration::hours(72));
    ca.resume();
    eventually("it joins again", || ca.behaviour.joins.load(Ordering::SeqCst) == 2).await;
    agent.connected().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_condition_of_readiness_turns_it() {
    let mut ca = FakeCa::start();
    let place = Place::new(&ca);
    ca.kill();
    let agent = place.start(&ca);
    let now = || readiness(&agent.client, None, ca.clock.as_ref());
    match now() {
        Readiness::NotReady(reasons) => {
            assert!(reasons.iter().any(|reason| reason.contains("no certificate")), "{reasons:?}");
            assert!(reasons.iter().any(|reason| reason.contains("no trust bundle")), "{reasons:?}");
        }
        other => panic!("{other:?}"),
    }
    ca.resume();
    agent.connected().await;
    assert_eq!(readiness(&agent.client, None, ca.clock.as_ref()), Readiness::Ready);
    ca.kill();
    eventually("degraded", || matches!(readiness(&agent.client, None, ca.clock.as_ref()), Readiness::Degraded(_))).await;
    ca.clock.advance(time::Duration::hours(25));
    assert!(matches!(readiness(&agent.client, None, ca.clock.as_ref()), Readiness::NotReady(_)));
}
