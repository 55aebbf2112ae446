//! Renewals that no token speaks for; and whom the ledger knows: pods with a good certificate, under the very same names and UIDs.

use super::*;
use crate::attestation::testing::{lose, watched};
use crate::ledger::acts::Subject;

async fn verified(f: &Fixture, pod: &str) -> VerifiedToken {
    f.clusters.attest_workload(&f.caller, &f.token(pod), async |_| false).await.unwrap().token().clone()
}

#[tokio::test]
async fn a_pod_with_a_certificate_is_known_and_no_other_of_its_name_account_or_node() {
    let f = fixture().await;
    f.issue(f.request("cart-1").0).await.unwrap();
    let token = verified(&f, "cart-1").await;
    assert!(f.issuance.has_certificate(&token).await);
    assert!(!f.issuance.has_certificate(&verified(&f, "cart-2").await).await, "nothing was issued to it");
    let changes: [fn(&mut VerifiedToken); 7] = [
        |token| token.pod.uid = Uuid::from_u128(1),
        |token| token.pod.name = "cart-2".into(),
        |token| token.namespace = "bank".into(),
        |token| token.service_account.name = "checkout".into(),
        |token| token.service_account.uid = Uuid::from_u128(1),
        |token| token.node.uid = Uuid::from_u128(1),
        |token| token.cluster = "west".into(),
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let mut other = token.clone();
        change(&mut other);
        assert!(!f.issuance.has_certificate(&other).await, "{number}");
    }
}

#[tokio::test]
async fn a_certificate_that_is_revoked_or_has_expired_vouches_for_nobody() {
    let f = fixture().await;
    let token = verified(&f, "cart-1").await;
    let issued = f.issue(f.request("cart-1").0).await.unwrap();
    let revoke = Change::Revoke { subject: Subject::Serial(issued.facts.serial), until: issued.facts.not_after };
    f.ledger.act("local:uid=0", revoke, "a test wants it").await.unwrap();
    assert!(!f.issuance.has_certificate(&token).await);

    let next = f.issue(f.request("cart-1").0).await.unwrap();
    assert!(f.issuance.has_certificate(&token).await);
    f.ca.clock.advance(next.facts.not_after - f.ca.clock.now() + time::Duration::SECOND);
    assert!(!f.issuance.has_certificate(&token).await);
}

#[tokio::test]
async fn what_a_sidecar_joined_with_vouches_for_nobody() {
    let f = fixture().await;
    let attested = f.clusters.attest_agent("east", Role::Sidecar, &f.token("cart-1")).await.unwrap();
    let (csr, _) = csr::generate(KeyType::EcdsaP256, None).unwrap();
    f.issuance.issue_agent(&attested, &csr, Uuid::new_v4()).await.unwrap();
    assert!(!f.issuance.has_certificate(attested.token()).await);
}

#[tokio::test]
async fn a_sidecar_whose_pod_is_gone_renews_no_more() {
    let f = fixture().await;
    let mut renewed = Vec::new();
    for pod in ["there", "gone"] {
        let attested = f.clusters.attest_agent("east", Role::Sidecar, &f.token(pod)).await.unwrap();
        let (csr, _) = csr::generate(KeyType::EcdsaP256, None).unwrap();
        f.issuance.issue_agent(&attested, &csr, Uuid::new_v4()).await.unwrap();
        let [there, gone] = ["there", "gone"].map(|name| pod_uid("shop", name));
        let issuance = in_clusters(&f, watched(&[there, gone], &[there], f.ca.clock.clone()).await);
        renewed.push(issuance.renew_agent(attested.caller(), &csr, Uuid::new_v4()).await.map(drop).map_err(|refusal| refusal.reason));
    }
    assert_eq!(renewed, [Ok(()), Err("pod_gone")]);
}

#[tokio::test]
async fn an_agent_whose_pod_is_gone_renews_no_more_until_it_joins_by_the_token_of_another_one() {
    let f = fixture().await;
    let (csr, _) = csr::generate(KeyType::EcdsaP256, None).unwrap();
    let [first, second] = ["agent-1", "agent-2"].map(|name| pod_uid("kube-system", name));
    let renewed = async |clusters: &Arc<Clusters>| {
        let renewed = in_clusters(&f, Arc::clone(clusters)).renew_agent(&f.caller, &csr, Uuid::new_v4()).await;
        renewed.map(drop).map_err(|refusal| refusal.reason)
    };
    let watching = async |before: &[Uuid], now: &[Uuid]| watched(before, now, f.ca.clock.clone()).await;
    let replaced = watching(&[first], &[second]).await;
    assert_eq!(renewed(&replaced).await, Ok(()), "nothing is known of how it joined");

    join(&f, "agent-1").await;
    assert_eq!(renewed(&watching(&[first], &[first]).await).await, Ok(()));
    assert_eq!(renewed(&watching(&[first], &[]).await).await, Err("pod_gone"));
    assert_eq!(renewed(&replaced).await, Err("pod_gone"));
    let away = watching(&[first], &[second]).await;
    lose(&away);
    assert_eq!(renewed(&away).await, Ok(()), "nobody could bear out another token");

    join(&f, "agent-2").await;
    assert_eq!(renewed(&replaced).await, Ok(()));
}

/// The agent of `node-a`, in this pod.
async fn join(f: &Fixture, pod: &str) {
    let mut own = token_request(pod);
    (own.namespace, own.service_account, own.audience) = ("kube-system".into(), "chancery-agent".into(), "chancery-agent".into());
    let token = f.issuer.sign(&own, f.ca.clock.now()).unwrap();
    let attested = f.clusters.attest_agent("east", Role::Agent, &token).await.unwrap();
    let (csr, _) = csr::generate(KeyType::EcdsaP256, None).unwrap();
    f.issuance.issue_agent(&attested, &csr, Uuid::new_v4()).await.unwrap();
}

/// The same CA, whose clusters are these.
fn in_clusters(f: &Fixture, clusters: Arc<Clusters>) -> Issuance {
    let policy = Policy::new("example.org".parse().unwrap(), PolicySettings::default(), &clusters.settings()).unwrap();
    let (authority, ledger, refusals) = (f.authority.clone(), f.ledger.clone(), f.refusals.clone());
    Issuance::new(authority, clusters, policy, ledger, refusals, f.counts.clone(), f.ca.clock.clone())
}
