//! A pod with a socket of its own: what the agent does for it with the tokens that the kubelet brings. (The plugin itself, with real mounts,
//! is tried by the end-to-end tests.)

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail wherever it likes")]

mod support;

use std::time::Duration;

use chancery_agent::svids::{AttachError, SvidState, Tenant, Token};
use chancery_identity::Clock;
use support::{Agent, FakeCa, GRACE, Place, Signer, TokenPlan, a_while, eventually, ready, renewed, serves};
use uuid::Uuid;

/// As the kubelet asks for them.
const TOKEN_LIFE: Duration = Duration::from_secs(600);
/// More than half of a certificate's.
const UNTIL_RENEWAL: time::Duration = time::Duration::seconds(2400);

fn cart() -> TokenPlan {
    TokenPlan { life: TOKEN_LIFE, ..TokenPlan::pod(10, "shop", "cart") }
}

async fn admit(agent: &Agent, token: Token) -> Tenant {
    agent.svids.recognise(token).await.unwrap().admit().await.unwrap()
}

fn last_token(ca: &FakeCa) -> String {
    ca.behaviour.tokens.lock().unwrap().last().cloned().unwrap()
}

async fn workloads(agent: &Agent) -> usize {
    agent.svids.status().await.unwrap().workloads.len()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pods_certificate_is_asked_for_at_once_and_renewed_with_the_newest_token() {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let agent = place.start(&ca);
    let tenant = admit(&agent, ca.token(&cart())).await;
    eventually("issued without a stream", || agent.metrics.issued.get() == 1).await;
    let mut stream = tenant.attach().await.unwrap();
    assert_eq!(stream.token, None, "a stream is never ended for a token that the kubelet brings");
    let first = ready(&mut stream).await;

    // The token that the certificate was asked for with has expired: the stream serves on, and waits for the kubelet.
    ca.clock.advance(UNTIL_RENEWAL);
    a_while().await;
    assert!(serves(&stream, &first));
    assert_eq!(agent.metrics.issued.get(), 1, "nothing is asked for with an expired token");
    let newest = ca.token(&cart());
    let _again = admit(&agent, newest.clone()).await;
    renewed(&mut stream, &first).await;
    assert_eq!(last_token(&ca), newest.secret());

    // An older one, as a kubelet may still bring, takes nothing back.
    let older = Token::new(ca.signer.token(&cart(), ca.clock.now() - time::Duration::seconds(60)).into());
    admit(&agent, older).await;
    assert_eq!(workloads(&agent).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_without_a_stream_is_kept_until_its_last_volume_is_gone_and_not_longer() {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let agent = place.start(&ca);
    let tenant = admit(&agent, ca.token(&cart())).await;
    let second_volume = admit(&agent, ca.token(&cart())).await;
    ready(&mut tenant.attach().await.unwrap()).await;
    ca.clock.advance(time::Duration::try_from(GRACE).unwrap() * 2);
    a_while().await;
    assert_eq!(workloads(&agent).await, 1, "its volume keeps it");
    tenant.leave().await;
    a_while().await;
    assert_eq!(workloads(&agent).await, 1, "as does its other volume");
    second_volume.leave().await;
    let mut left = usize::MAX;
    for _ in 0..100 {
        left = workloads(&agent).await;
        if left == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(left, 0, "nobody comes back for it: it is not kept for a restart");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_agent_serves_a_pod_what_it_has_and_asks_for_more_when_the_kubelet_has_come() {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let agent = place.start(&ca);
    let tenant = admit(&agent, ca.token(&cart())).await;
    let first = ready(&mut tenant.attach().await.unwrap()).await;
    let (workload, pod) = (tenant.workload().clone(), tenant.pod_name().to_owned());
    drop(tenant);
    agent.stop().await;

    let agent = place.start(&ca);
    let tenant = agent.svids.readmit(workload.clone(), pod.clone()).await.unwrap();
    let mut stream = tenant.attach().await.unwrap();
    assert!(serves(&stream, &first), "at once");
    let unknown = chancery_agent::svids::WorkloadKey { pod_uid: Uuid::from_u128(11), ..workload };
    let other = agent.svids.readmit(unknown, pod).await.unwrap();
    assert!(matches!(&*other.attach().await.unwrap().svid.borrow(), SvidState::Pending), "and nobody else");
    agent.connected().await;
    ca.clock.advance(UNTIL_RENEWAL);
    a_while().await;
    assert_eq!(agent.metrics.issued.get(), 0);
    admit(&agent, ca.token(&cart())).await;
    renewed(&mut stream, &first).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_forged_or_of_another_node_admits_nobody() {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let agent = place.start(&ca);
    let forged = Token::new(Signer::new("k1").token(&cart(), ca.clock.now()).into());
    let refused = agent.svids.recognise(forged).await.unwrap_err();
    assert!(matches!(refused, AttachError::Unauthenticated { reason: "token_signature", .. }), "{refused:?}");
    let elsewhere = ca.token(&TokenPlan { node: Uuid::from_u128(8), ..cart() });
    let refused = agent.svids.recognise(elsewhere).await.unwrap_err();
    assert!(matches!(refused, AttachError::WrongPlace(_)), "{refused:?}");
    // Nor is anything done for a pod whose token is good before somebody has taken it on.
    agent.svids.recognise(ca.token(&cart())).await.unwrap();
    a_while().await;
    assert_eq!((workloads(&agent).await, agent.metrics.issued.get()), (0, 0));
}
