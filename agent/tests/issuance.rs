//! The agent's first certificates, many at once, and what it refuses.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail wherever it likes")]

mod support;

use std::time::Duration;

use chancery_agent::ca_client::Role;
use chancery_agent::svids::{AttachError, SvidState, Token};
use chancery_identity::Clock;
use chancery_proto::chancery::v1::Refusal;
use support::{FakeCa, Place, SOON, Signer, TokenPlan, a_while, eventually, ready, renewed};
use uuid::Uuid;

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_joins_and_a_pod_gets_its_certificate() {
    let ca = FakeCa::start();
    let agent = Place::new(&ca).start(&ca);
    let mut cart = agent.svids.attach(ca.token(&TokenPlan::pod(10, "shop", "cart"))).await.unwrap();
    assert_eq!(ready(&mut cart).await.id().as_str(), "spiffe://example.org/ns/shop/sa/cart");
    eventually("the CA hears of it", || ca.behaviour.reports.lock().unwrap().last().is_some_and(|report| report.workloads == 1)).await;
    let status = agent.svids.status().await.unwrap();
    assert!(status.ca_reachable && status.workloads.len() == 1 && status.workloads[0].streams == 1);
    assert!(matches!(agent.svids.attach_own().await, Err(AttachError::WrongPlace(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_of_one_pod_share_one_certificate() {
    let ca = FakeCa::start();
    let agent = Place::new(&ca).start(&ca);
    let token = ca.token(&TokenPlan::pod(10, "shop", "cart"));
    let mut first = agent.svids.attach(token.clone()).await.unwrap();
    let mut second = agent.svids.attach(token).await.unwrap();
    assert_eq!(ready(&mut first).await.serial(), ready(&mut second).await.serial());
    assert_eq!(ca.calls(), [1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_workloads_at_once_need_few_calls_and_no_call_is_too_large() {
    let ca = FakeCa::start();
    let agent = Place::new(&ca).start(&ca);
    agent.connected().await;
    let gate = ca.behaviour.gate.lock().await;
    let mut all = Vec::new();
    for number in 0..500 {
        all.push(agent.svids.attach(ca.token(&TokenPlan::pod(1000 + number, "shop", "cart"))).await.unwrap());
    }
    a_while().await;
    assert!(ca.calls().len() <= 4, "{:?}", ca.calls());
    drop(gate);
    for subscription in &mut all {
        ready(subscription).await;
    }
    let calls = ca.calls();
    assert!(calls.iter().sum::<usize>() == 500 && calls.iter().all(|size| *size <= 64), "{calls:?}");
    assert!(calls.len() <= 20, "{calls:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forged_token_is_refused_though_the_pod_has_a_certificate() {
    let ca = FakeCa::start();
    let agent = Place::new(&ca).start(&ca);
    let plan = TokenPlan::pod(10, "shop", "cart");
    let mut cart = agent.svids.attach(ca.token(&plan)).await.unwrap();
    ready(&mut cart).await;
    let forged = Signer::new("k1").token(&plan, ca.clock.now());
    let refused = agent.svids.attach(Token::new(forged.into())).await.unwrap_err();
    assert!(matches!(refused, AttachError::Unauthenticated { reason: "token_signature", .. }), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_signed_with_the_clusters_new_key_makes_the_ca_look_for_it() {
    let ca = FakeCa::start();
    let agent = Place::new(&ca).start(&ca);
    agent.connected().await;
    let (next, stranger) = (Signer::new("k2"), Signer::new("k3"));
    *ca.behaviour.new_keys.lock().unwrap() = Some(next.keys());
    let plan = TokenPlan::pod(10, "shop", "cart");
    agent.svids.attach(Token::new(next.token(&plan, ca.clock.now()).into())).await.unwrap();
    let asked = ca.calls().len();
    let refused = agent.svids.attach(Token::new(stranger.token(&plan, ca.clock.now()).into())).await.unwrap_err();
    assert_eq!(refused.reason(), "token_unknown_key");
    assert!(ca.calls().len() <= asked + 1, "strangers do not make it look again and again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_for_another_node_or_audience_is_refused() {
    let ca = FakeCa::start();
    let agent = Place::new(&ca).start(&ca);
    let elsewhere = TokenPlan { node: Uuid::from_u128(8), ..TokenPlan::pod(10, "shop", "cart") };
    assert!(matches!(agent.svids.attach(ca.token(&elsewhere)).await, Err(AttachError::WrongPlace(_))));
    let joining = agent.svids.attach(ca.token(&TokenPlan::agent())).await.unwrap_err();
    assert_eq!(joining.reason(), "token_audience");
    assert_eq!(ca.calls(), [0_usize; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_told_to_the_proxy_and_tried_again() {
    let ca = FakeCa::start();
    let agent = Place::new(&ca).start(&ca);
    let refusal = Refusal { reason: "policy".into(), message: "not this one".into(), retryable: false };
    *ca.behaviour.refuse.lock().unwrap() = Some(refusal);
    let mut cart = agent.svids.attach(ca.token(&TokenPlan::pod(10, "shop", "cart"))).await.unwrap();
    let refused = cart.svid.wait_for(|state| matches!(state, SvidState::Refused { .. }));
    match &*tokio::time::timeout(SOON, refused).await.unwrap().unwrap() {
        SvidState::Refused { reason, message, retryable: false } => {
            assert!(reason == "policy" && message.contains("not this one"), "{message}");
        }
        other => panic!("{other:?}"),
    }
    *ca.behaviour.refuse.lock().unwrap() = None;
    ca.clock.advance(time::Duration::seconds(30));
    ready(&mut cart).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workloads_and_streams_beyond_the_limits_are_refused_with_the_limit() {
    let ca = FakeCa::start();
    let mut place = Place::new(&ca);
    place.max_workloads = 2;
    let agent = place.start(&ca);
    let mut held = Vec::new();
    for number in [10, 11] {
        held.push(agent.svids.attach(ca.token(&TokenPlan::pod(number, "shop", "cart"))).await.unwrap());
    }
    let refused = agent.svids.attach(ca.token(&TokenPlan::pod(12, "shop", "cart"))).await.unwrap_err();
    assert!(matches!(&refused, AttachError::Busy(text) if text.contains("2 workloads")), "{refused}");
    for _ in 0..3 {
        held.push(agent.svids.attach(ca.token(&TokenPlan::pod(10, "shop", "cart"))).await.unwrap());
    }
    let refused = agent.svids.attach(ca.token(&TokenPlan::pod(10, "shop", "cart"))).await.unwrap_err();
    assert!(matches!(&refused, AttachError::Busy(text) if text.contains("4 streams")), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sidecar_serves_its_own_pod_and_reads_its_token_for_every_use() {
    let ca = FakeCa::start();
    let mut place = Place::new(&ca);
    place.role = Role::Sidecar;
    let plan = TokenPlan { life: Duration::from_secs(1000), ..TokenPlan::pod(10, "shop", "cart") };
    place.write_token(ca.token(&plan).secret());
    let agent = place.start(&ca);
    let mut own = agent.svids.attach_own().await.unwrap();
    assert!(own.token.is_none(), "a sidecar's stream need not be ended for its token");
    let first = ready(&mut own).await;
    assert_eq!(first.id().as_str(), "spiffe://example.org/ns/shop/sa/cart");
    assert!(matches!(agent.svids.attach(ca.token(&plan)).await, Err(AttachError::WrongPlace(_))));

    ca.clock.advance(time::Duration::seconds(2200));
    a_while().await;
    let fresh = ca.token(&plan);
    place.write_token(fresh.secret());
    ca.clock.advance(time::Duration::seconds(200));
    renewed(&mut own, &first).await;
    assert_eq!(ca.behaviour.tokens.lock().unwrap().last().unwrap(), fresh.secret());
}
