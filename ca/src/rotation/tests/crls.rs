//! Issuing certificates and roots wait for their CRLs while there are any.

use rustls_pki_types::CertificateDer;

use super::world::*;
use crate::ledger::acts::Subject;
use crate::rotation::*;

/// Agents of which the first one's pod is revoked, and everybody knows it.
async fn revoked(agents: u128) -> World {
    let mut world = World::new(agents).await;
    let subject = Subject::Pod(uuid::Uuid::from_u128(1));
    let done = world.run.authority.revoke("local:uid=0", subject, WHY).await.unwrap();
    assert_eq!(done.certificates, 1);
    world.everybody_reports();
    world
}

#[tokio::test(start_paused = true)]
async fn a_root_is_activated_when_everybody_has_the_crl_of_its_issuing_certificate() {
    let mut world = revoked(2).await;
    world.go(RootState::Prepared).await.unwrap();
    let published = world.go(RootState::Published).await.unwrap().now.entry + 1;
    let with_crl = world.run.authority.trust().borrow().sequence;
    assert!(with_crl > published, "the CRL follows the publication");
    world.report(1);
    world.report_as(2, |report| {
        report.trust_sequence = published;
        report.convergence.as_mut().unwrap().trust_sequence = published;
    });
    world.rotation.walk_on().await.unwrap();
    let words = refused(world.go(RootState::Active).await);
    assert!(words.contains("1 who count are missing"), "{words}");
    world.report(2);
    assert!(world.go(RootState::Active).await.unwrap().changed);
}

fn issuer(world: &World) -> CertificateDer<'static> {
    world.run.authority.issuer().certificate().clone()
}

/// A CA with two agents whose next issuing certificate waits for its CRL, and the one that it signs with.
async fn due_for_an_issuing_certificate() -> (World, CertificateDer<'static>) {
    let mut world = revoked(2).await;
    let old = issuer(&world);
    world.pass(time::Duration::hours(84)).await;
    // Everybody has renewed meanwhile, and something is revoked again.
    for agent in [1, 2] {
        world.issue(agent).await;
    }
    world.run.authority.revoke("local:uid=0", Subject::Pod(uuid::Uuid::from_u128(1)), WHY).await.unwrap();
    world.run.authority.tick(world.ca.clock.now()).await.unwrap();
    (world, old)
}

#[tokio::test(start_paused = true)]
async fn a_new_issuing_certificate_signs_when_the_last_one_has_reported_its_crl() {
    let (mut world, old) = due_for_an_issuing_certificate().await;
    world.report(1);
    world.rotation.walk_on().await.unwrap();
    assert_eq!(issuer(&world), old, "one has not reported");
    world.report(2);
    world.rotation.walk_on().await.unwrap();
    assert_ne!(issuer(&world), old);
}

#[tokio::test(start_paused = true)]
async fn a_new_issuing_certificate_does_not_sign_because_a_wrong_clock_says_that_whoever_is_missing_has_expired() {
    let (mut world, old) = due_for_an_issuing_certificate().await;
    world.ca.clock.advance(time::Duration::DAY);
    world.report_as(1, |report| report.clock_ms -= i64::try_from(time::Duration::DAY.whole_milliseconds()).unwrap());
    world.rotation.walk_on().await.unwrap();
    assert_eq!(issuer(&world), old);
    world.ca.clock.advance(-time::Duration::DAY);
    world.everybody_reports();
    world.rotation.walk_on().await.unwrap();
    assert_ne!(issuer(&world), old);
}

#[tokio::test(start_paused = true)]
async fn a_distrust_waits_for_no_crl() {
    let world = revoked(2).await;
    let old = world.run.authority.root_fingerprint();
    world.distrust(old, Duration::from_secs(30)).await;
    assert_ne!(world.run.authority.root_fingerprint(), old);
    assert_eq!(world.run.authority.issuer().root_fingerprint(), world.run.authority.root_fingerprint());
}

#[tokio::test(start_paused = true)]
async fn what_has_expired_leaves_the_crls_only_by_a_clock_that_is_believed() {
    let mut world = revoked(2).await;
    let has_crl = |world: &World| world.run.authority.trust().borrow().crl.is_some();
    world.rotation.walk_on().await.unwrap();
    // The clock is set by a day: everything seems to have expired.
    world.ca.clock.advance(time::Duration::DAY);
    world.rotation.walk_on().await.unwrap();
    world.run.authority.tick(world.ca.clock.now()).await.unwrap();
    assert!(has_crl(&world));
    world.ca.clock.advance(-time::Duration::DAY);
    world.pass(CERTIFICATE + time::Duration::minutes(6)).await;
    world.everybody_renews().await;
    world.rotation.walk_on().await.unwrap();
    world.run.authority.tick(world.ca.clock.now()).await.unwrap();
    assert!(!has_crl(&world));
}
