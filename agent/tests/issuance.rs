//! The agent's first certificates, many at once, and what it refuses.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail wherever it likes")]

mod support;

use chancery_agent::svids::{AttachError, Subscription, SvidState};
use support::{FakeCa, Place, SOON, TokenPlan, eventually};

async fn ready(subscription: &mut Subscription) -> String {
    let state = subscription.svid.wait_for(|state| matches!(state, SvidState::Ready(_)));
    match &*tokio::time::timeout(SOON, state).await.expect("a certificate").unwrap() {
        SvidState::Ready(svid) => svid.id().to_string(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_joins_and_a_pod_gets_its_certificate() {
    let ca = FakeCa::start();
    let agent = Place::new(&ca).start(&ca);
    let mut cart = agent.svids.attach(ca.token(&TokenPlan::pod(10, "shop", "cart"))).await.unwrap();
    assert_eq!(ready(&mut cart).await, "spiffe://example.org/ns/shop/sa/cart");
    eventually("the CA hears of it", || ca.behaviour.reports.lock().unwrap().last().is_some_and(|report| report.workloads == 1)).await;
    let status = agent.svids.status().await.unwrap();
    assert!(status.ca_reachable && status.workloads.len() == 1 && status.workloads[0].streams == 1);
    assert!(matches!(agent.svids.attach_own().await, Err(AttachError::WrongPlace(_))));
}
