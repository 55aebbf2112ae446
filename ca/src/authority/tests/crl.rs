//! What is revoked reaches the trust state, whatever happens in between, and nothing else does.

use bytes::Bytes;
use chancery_identity::Serial;
use time::Duration as Span;
use uuid::Uuid;
use x509_parser::prelude::{CertificateRevocationList, FromDer};

use super::{Duration, KeyType, leaf};
use crate::authority::testing::{Run, TestCa};
use crate::authority::*;
use crate::ledger::Issuance;
use crate::ledger::acts::{Change, Overrides, RootState, Subject};
use crate::ledger::entry::{IssueReason, Provenance, Role};

const LIFETIME: Duration = Duration::from_secs(3600);

/// A certificate of the pod with this number, recorded.
async fn issue(ca: &TestCa, run: &Run, pod: u128) -> Serial {
    let issuer = run.authority.issuer();
    let svid = leaf(run, ca.clock.now(), KeyType::EcdsaP256, LIFETIME).await.unwrap();
    let entry = Issuance {
        certificate: Bytes::copy_from_slice(&svid.chain()[0]),
        issuing_certificate: issuer.certificate_id(),
        root: issuer.root_id(),
        role: Role::Agent,
        reason: IssueReason::First,
        cluster: "east".into(),
        node: "node-1".into(),
        node_uid: Some(Uuid::from_u128(1)),
        namespace: "shop".into(),
        service_account: "cart".into(),
        service_account_uid: None,
        pod: format!("cart-{pod}"),
        pod_uid: Some(Uuid::from_u128(pod)),
        token_id: String::new(),
        request_id: Uuid::new_v4(),
        trust_sequence: 0,
        sidecar_pod_uid: None,
        provenance: Provenance::Issued,
    };
    run.ledger.append(entry.into()).await.unwrap();
    svid.serial()
}

fn pod(number: u128) -> Subject {
    Subject::Pod(Uuid::from_u128(number))
}

async fn revoke(run: &Run, subject: Subject) -> Revoked {
    run.authority.revoke("local:uid=0", subject, "a test").await.unwrap()
}

/// The act alone, as a CA that is killed behind it leaves it.
async fn only_recorded(run: &Run, subject: Subject) {
    let until = run.ledger.all_expired_by();
    run.ledger.act("local:uid=0", Change::Revoke { subject, until }, "a test").await.unwrap();
}

fn trust(run: &Run) -> Arc<TrustState> {
    run.authority.trust().borrow().clone()
}

fn crl(run: &Run) -> chancery_identity::Crl {
    trust(run).crl.clone().unwrap()
}

/// As if the agents' clocks agreed.
fn believe(ca: &TestCa, run: &Run) {
    run.authority.believe_clock(ca.clock.now() + Span::seconds(10));
}

/// A CA with one revoked certificate of two.
async fn with_one_revoked() -> (TestCa, Run, Serial) {
    let ca = TestCa::new();
    let run = ca.start().await;
    let (bad, _good) = (issue(&ca, &run, 1).await, issue(&ca, &run, 2).await);
    revoke(&run, pod(1)).await;
    (ca, run, bad)
}

#[tokio::test]
async fn what_is_revoked_is_on_the_crl_with_a_larger_sequence_and_nothing_else_is() {
    let ca = TestCa::new();
    let run = ca.start().await;
    let (bad, good) = (issue(&ca, &run, 1).await, issue(&ca, &run, 2).await);
    let before = trust(&run);
    assert!(before.crl.is_none(), "there is none before something is revoked");
    let done = revoke(&run, pod(1)).await;
    let after = trust(&run);
    assert_eq!((done.certificates, done.sequence, done.problem), (1, after.sequence, None));
    assert!(after.sequence > before.sequence);
    assert!(crl(&run).revokes(bad) && !crl(&run).revokes(good));
    assert!(crl(&run).speaks_for(run.authority.issuer().certificate()));

    // By serial, and the same again: that of the pod stays on it.
    revoke(&run, Subject::Serial(good)).await;
    assert!(crl(&run).revokes(bad) && crl(&run).revokes(good));
    assert_eq!(revoke(&run, pod(1)).await.certificates, 1);
    let sequence = trust(&run).sequence;
    run.authority.tick(ca.clock.now()).await.unwrap();
    assert_eq!(trust(&run).sequence, sequence, "and nothing is signed that was signed before");
}

#[tokio::test]
async fn a_restart_hands_out_the_very_same_crls() {
    let (ca, run, _) = with_one_revoked().await;
    let before = trust(&run);
    drop(run);
    let run = ca.start().await;
    assert_eq!(*trust(&run), *before, "the same bytes under the same sequence");
    assert_eq!(run.authority.crl_standing().revoked, 1);
}

#[tokio::test]
async fn a_kill_between_the_act_and_the_crl_loses_nothing() {
    let ca = TestCa::new();
    let run = ca.start().await;
    let bad = issue(&ca, &run, 1).await;
    only_recorded(&run, pod(1)).await;
    assert!(trust(&run).crl.is_none());
    drop(run);
    let run = ca.start().await;
    assert!(crl(&run).revokes(bad), "the next start signs it");
}

#[tokio::test]
async fn crls_that_were_lost_or_are_others_are_signed_anew_under_a_larger_sequence() {
    for spoil in [|path: &std::path::Path| std::fs::remove_file(path).unwrap(), |path: &std::path::Path| std::fs::write(path, "x").unwrap()]
    {
        let (ca, run, bad) = with_one_revoked().await;
        let (before, number) = (trust(&run), run.authority.crl_standing().number);
        spoil(&run.directory.crl());
        drop(run);
        let run = ca.start().await;
        let after = trust(&run);
        assert!(after.sequence > before.sequence && after.crl != before.crl, "never other bytes under the same sequence");
        assert!(crl(&run).revokes(bad) && run.authority.crl_standing().number > number);
    }
}

#[tokio::test]
async fn a_disk_that_does_not_take_the_copy_keeps_no_revocation_from_the_proxies() {
    let ca = TestCa::new();
    let run = ca.start().await;
    let bad = issue(&ca, &run, 1).await;
    std::fs::create_dir(run.directory.crl()).unwrap();
    assert_eq!(revoke(&run, pod(1)).await.problem, None);
    assert!(crl(&run).revokes(bad));
}

#[tokio::test]
async fn every_issuing_certificate_has_a_crl_also_that_of_a_root_that_nothing_chains_to() {
    let (ca, run, bad) = with_one_revoked().await;
    let root = run.authority.prepare_root("local:uid=0", "a test").await.unwrap();
    run.ledger
        .act("local:uid=0", Change::Root { root, to: RootState::Published, overrides: Overrides::default() }, "a test")
        .await
        .unwrap();
    run.authority.apply().await.unwrap();
    let pem = String::from_utf8(crl(&run).pem().to_vec()).unwrap();
    assert_eq!(pem.matches("BEGIN X509 CRL").count(), 2);
    assert!(crl(&run).revokes(bad));
    let told = run.authority.roots().iter().find(|told| told.fingerprint == root).cloned().unwrap();
    assert_eq!(told.awaited, Some(trust(&run).sequence), "everybody must have it before the root is activated");
    drop(ca);
}

#[tokio::test]
async fn a_new_issuing_certificate_signs_when_everybody_has_its_crl() {
    let (ca, run, _) = with_one_revoked().await;
    let old = run.authority.issuer().certificate().clone();
    issue(&ca, &run, 3).await;
    ca.clock.advance(Span::hours(84));
    // Something is revoked still.
    issue(&ca, &run, 4).await;
    revoke(&run, pod(4)).await;
    run.authority.tick(ca.clock.now()).await.unwrap();
    let awaited = run.authority.roots()[0].awaited.unwrap();
    assert_eq!(*run.authority.issuer().certificate(), old, "it was made, and waits");
    assert_eq!(awaited, trust(&run).sequence);
    drop(run);
    let run = ca.start().await;
    assert_eq!(*run.authority.issuer().certificate(), old, "a restart does not make it sign");
    run.authority.proven(awaited - 1).await.unwrap();
    assert_eq!(*run.authority.issuer().certificate(), old);
    run.authority.proven(awaited).await.unwrap();
    let new = run.authority.issuer().certificate().clone();
    assert!(new != old && crl(&run).speaks_for(&new) && crl(&run).speaks_for(&old));
    assert_eq!(run.authority.roots()[0].awaited, None);
    issue(&ca, &run, 5).await;
    drop(run);
    let run = ca.start().await;
    assert_eq!(*run.authority.issuer().certificate(), new, "and a restart does not take it back");
}

#[tokio::test]
async fn a_new_issuing_certificate_waits_for_nobody_when_the_old_one_nears_its_end() {
    let (ca, run, _) = with_one_revoked().await;
    let old = run.authority.issuer().certificate().clone();
    ca.clock.advance(Span::hours(84));
    issue(&ca, &run, 4).await;
    revoke(&run, pod(4)).await;
    run.authority.tick(ca.clock.now()).await.unwrap();
    assert_eq!(*run.authority.issuer().certificate(), old);
    ca.clock.advance(Span::days(7) * 3 / 8 - Span::minutes(1));
    run.authority.tick(ca.clock.now()).await.unwrap();
    assert_eq!(*run.authority.issuer().certificate(), old);
    ca.clock.advance(Span::minutes(2));
    run.authority.tick(ca.clock.now()).await.unwrap();
    assert_ne!(*run.authority.issuer().certificate(), old, "one broken proxy does not stop the mesh");
}

#[tokio::test]
async fn what_has_expired_leaves_the_crl_and_with_the_last_the_crl_itself_goes() {
    let (ca, run, bad) = with_one_revoked().await;
    ca.clock.advance(Span::minutes(30));
    let later: Vec<_> = [issue(&ca, &run, 3).await].into();
    revoke(&run, pod(3)).await;
    let before = trust(&run).sequence;
    ca.clock.advance(Span::minutes(36));
    run.authority.tick(ca.clock.now()).await.unwrap();
    assert!(crl(&run).revokes(bad), "nobody has said that the clock is right");
    believe(&ca, &run);
    run.authority.tick(ca.clock.now()).await.unwrap();
    assert!(!crl(&run).revokes(bad) && crl(&run).revokes(later[0]) && trust(&run).sequence > before);
    ca.clock.advance(Span::hours(1));
    let before = trust(&run).sequence;
    believe(&ca, &run);
    run.authority.tick(ca.clock.now()).await.unwrap();
    assert!(trust(&run).crl.is_none() && trust(&run).sequence > before && !run.directory.crl().exists());
    // A proxy that was away may hold it still: the next issuing certificate waits for it.
    ca.clock.advance(Span::hours(84));
    let old = run.authority.issuer().certificate().clone();
    run.authority.tick(ca.clock.now()).await.unwrap();
    assert_eq!((run.authority.issuer().certificate(), run.authority.roots()[0].awaited), (&old, Some(trust(&run).sequence)));
}

#[tokio::test]
async fn a_clock_that_was_ahead_brings_nobody_back() {
    let (ca, run, bad) = with_one_revoked().await;
    let by_serial = issue(&ca, &run, 3).await;
    revoke(&run, Subject::Serial(by_serial)).await;
    believe(&ca, &run);
    ca.clock.advance(Span::DAY);
    run.authority.tick(ca.clock.now()).await.unwrap();
    assert!(crl(&run).revokes(bad) && crl(&run).revokes(by_serial));
    // Even if it was believed: what seemed to have expired comes back with the right time.
    believe(&ca, &run);
    run.authority.tick(ca.clock.now()).await.unwrap();
    assert!(trust(&run).crl.is_none());
    ca.clock.advance(-Span::DAY);
    run.authority.tick(ca.clock.now()).await.unwrap();
    assert!(crl(&run).revokes(bad) && crl(&run).revokes(by_serial));
}

#[tokio::test]
async fn a_crl_is_valid_for_everybody_for_whom_its_issuing_certificate_is() {
    let ca = TestCa::new();
    let run = ca.start().await;
    let issuer = run.authority.issuer();
    // Also if the CA's clock is a day ahead.
    ca.clock.advance(Span::DAY);
    let der = issuer.sign_crl(7, [], ca.clock.now()).await.unwrap();
    let (_, list) = CertificateRevocationList::from_der(&der).unwrap();
    assert!(list.last_update().to_datetime() <= issuer.not_before());
    assert!(list.last_update().to_datetime() <= ca.clock.now() - Span::hours(1));
    assert!(list.next_update().unwrap().to_datetime() > issuer.not_after());
    let issuing = super::parse(issuer.certificate());
    list.verify_signature(issuing.public_key()).unwrap();
    assert_eq!(list.issuer().as_raw(), issuing.subject().as_raw());
    assert_eq!(list.crl_number().unwrap().to_string(), "7");
}

#[tokio::test]
async fn more_than_the_bound_is_refused_before_anything_is_recorded() {
    let (_ca, run, _) = with_one_revoked().await;
    run.authority.crls.lock().await.fill(MAX_REVOKED);
    let entries = run.ledger.entries();
    let error = run.authority.revoke("local:uid=0", pod(2), "a test").await.unwrap_err().to_string();
    assert!(error.contains("at most 10000") && error.contains("chancery root distrust"), "{error}");
    assert_eq!(run.ledger.entries(), entries);
}

#[tokio::test]
async fn what_must_not_be_revoked_is_refused_with_what_to_do() {
    let (ca, run, bad) = with_one_revoked().await;
    let server = chancery_identity::profile::check_leaf(&run.authority.server_certificate().load().cert[0]).unwrap().serial;
    let id = |text: &str| text.parse::<SpiffeId>().unwrap();
    for (subject, words) in [
        (Subject::Serial(server), "restart the CA"),
        (Subject::Serial(Serial([1; 16])), "no certificate with the serial number"),
        (Subject::SpiffeId(run.authority.server_id().clone()), "chancery root distrust"),
        (Subject::SpiffeId(id("spiffe://elsewhere.org/ns/shop/sa/cart")), "another trust domain"),
    ] {
        let error = run.authority.revoke("local:uid=0", subject, "a test").await.unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    ca.clock.advance(Span::hours(2));
    let error = run.authority.revoke("local:uid=0", Subject::Serial(bad), "a test").await.unwrap_err().to_string();
    assert!(error.contains("has expired"), "{error}");
}
