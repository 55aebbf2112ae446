//! The authority's life: first start, restarts, renewals, and what does not belong together.

mod corporate;
mod crl;
mod roots;

use std::time::Duration;

use chancery_identity::csr::{self, KeyType, VerifiedCsr};
use chancery_identity::{Clock, TrustBundle, X509Svid};
use time::Duration as Span;
use x509_parser::asn1_rs::FromDer;
use x509_parser::certificate::X509Certificate;

use super::testing::{Commits, Run, TestCa};
use super::*;
use crate::keys::{FileKeyManager, KeyManager};

fn parse<'a>(certificate: &'a CertificateDer<'_>) -> X509Certificate<'a> {
    X509Certificate::from_der(certificate).unwrap().1
}

async fn leaf(run: &Run, now: OffsetDateTime, key_type: KeyType, lifetime: Duration) -> Result<X509Svid, IssuerError> {
    let id: SpiffeId = "spiffe://example.org/ns/shop/sa/cart".parse().unwrap();
    let (request, key) = csr::generate(key_type, None).unwrap();
    let request = VerifiedCsr::from_der(&request).unwrap();
    let dns_names = ["cart.shop.svc".to_owned()];
    let issuer = run.authority.issuer();
    let leaf = LeafRequest { id: &id, dns_names: &dns_names, public_key: &request.public_key, key_type, lifetime };
    let leaf = issuer.issue(&leaf, now).await?;
    Ok(X509Svid::new(vec![leaf.certificate, issuer.certificate().clone()], key).unwrap())
}

#[tokio::test]
async fn the_first_start_makes_root_and_issuing_certificate_and_later_ones_reuse_them() {
    let ca = TestCa::new();
    let first = ca.start().await;
    let (root, issuing) = (first.authority.root_fingerprint(), first.authority.issuer().certificate().clone());
    let trust = first.authority.trust().borrow().clone();
    // Root, its activation, issuing certificate, server certificate.
    assert_eq!(ca.store.len(), 4);
    drop(first);
    let again = ca.start().await;
    assert_eq!((again.authority.root_fingerprint(), again.authority.issuer().certificate()), (root, &issuing));
    assert_eq!(*again.authority.trust().borrow(), trust);
    assert_eq!(ca.store.len(), 5, "only a new server certificate was made and recorded");
}

#[tokio::test]
async fn root_and_issuing_certificate_say_what_the_profile_says() {
    let ca = TestCa::new();
    let run = ca.start().await;
    let issuer = run.authority.issuer();
    let (root, issuing) = (parse(issuer.root()), parse(issuer.certificate()));
    let name = &run.authority.status()[0].subject;
    assert!(name.starts_with("Chancery DEVELOPMENT trust root example.org 2027-01 "), "{name}");
    for (certificate, path_length) in [(&root, 1), (&issuing, 0)] {
        let constraints = certificate.basic_constraints().unwrap().unwrap();
        assert!(constraints.critical && constraints.value.ca);
        assert_eq!(constraints.value.path_len_constraint, Some(path_length));
        let usage = certificate.key_usage().unwrap().unwrap();
        assert!(usage.critical && usage.value.key_cert_sign() && usage.value.crl_sign() && !usage.value.digital_signature());
        let names = &certificate.subject_alternative_name().unwrap().unwrap().value.general_names;
        assert_eq!(names.len(), 1);
        assert!(format!("{names:?}").contains("spiffe://example.org\""), "{names:?}");
        assert!(certificate.name_constraints().unwrap().is_none());
        assert_eq!(certificate.raw_serial().len(), 16);
        assert!(certificate.verify_signature(Some(root.public_key())).is_ok());
    }
    assert!(root.validity().not_after.to_datetime() - ca.clock.now() == Span::days(365));
    assert!(issuing.validity().not_before.to_datetime() == ca.clock.now() - Span::seconds(30));
}

#[tokio::test]
async fn a_leaf_of_every_key_type_verifies_against_the_bundle() {
    let ca = TestCa::new();
    let run = ca.start().await;
    let now = ca.clock.now();
    for key_type in [KeyType::EcdsaP256, KeyType::EcdsaP384, KeyType::Ed25519] {
        let svid = leaf(&run, now, key_type, Duration::from_secs(3600)).await.unwrap();
        svid.verify(&run.authority.trust().borrow(), now).unwrap();
        assert_eq!((svid.not_before(), svid.not_after()), (now - Span::seconds(30), now + Span::hours(1)));
    }
}

#[tokio::test]
async fn a_leaf_never_outlives_its_issuer_and_an_issuer_never_its_root() {
    let mut ca = TestCa::new();
    ca.settings.root_lifetime = Duration::from_secs(3600);
    let run = ca.start().await;
    let issuer = run.authority.issuer();
    assert_eq!(issuer.not_after(), ca.clock.now() + Span::hours(1), "7 days, cut at the root's end");
    let svid = leaf(&run, ca.clock.now(), KeyType::EcdsaP256, Duration::from_secs(86400)).await.unwrap();
    assert_eq!(svid.not_after(), issuer.not_after());
    // Nothing to gain from another one.
    ca.clock.advance(Span::minutes(50));
    let before = ca.store.len();
    run.authority.tick(ca.clock.now()).await.unwrap();
    assert_eq!(run.authority.issuer().certificate(), issuer.certificate());
    assert!(ca.store.len() <= before + 1);
}

#[tokio::test]
async fn the_issuing_certificate_is_renewed_from_half_of_its_life_on_and_old_leaves_stay_good() {
    let ca = TestCa::new();
    let run = ca.start().await;
    let before = run.authority.issuer();
    let old = leaf(&run, ca.clock.now(), KeyType::EcdsaP256, Duration::from_secs(6 * 86400)).await.unwrap();
    ca.clock.advance(Span::days(3));
    run.authority.tick(ca.clock.now()).await.unwrap();
    assert_eq!(run.authority.issuer().certificate(), before.certificate());
    ca.clock.advance(Span::days(1));
    run.authority.tick(ca.clock.now()).await.unwrap();
    let after = run.authority.issuer();
    assert_ne!(after.certificate(), before.certificate());
    assert_eq!(after.root(), before.root());
    for svid in [old, leaf(&run, ca.clock.now(), KeyType::EcdsaP256, Duration::from_secs(60)).await.unwrap()] {
        svid.verify(&run.authority.trust().borrow(), ca.clock.now()).unwrap();
    }
    // A batch that holds the issuer before may still finish; its key goes with the renewal after the next.
    let keys = FileKeyManager::open(run.directory.keys()).unwrap();
    assert_eq!(keys.list().await.unwrap().len(), 3, "root, old and new issuing key");
    ca.clock.advance(Span::days(4));
    run.authority.tick(ca.clock.now()).await.unwrap();
    let keys = FileKeyManager::open(run.directory.keys()).unwrap();
    assert_eq!(keys.list().await.unwrap().len(), 3, "the oldest is destroyed");
}

#[tokio::test]
async fn a_ca_that_was_off_for_days_or_weeks_starts_and_issues() {
    for days in [3, 5, 30] {
        let ca = TestCa::new();
        drop(ca.start().await);
        ca.clock.advance(Span::days(days));
        let run = ca.start().await;
        let svid = leaf(&run, ca.clock.now(), KeyType::EcdsaP256, Duration::from_secs(3600)).await.unwrap();
        svid.verify(&run.authority.trust().borrow(), ca.clock.now()).unwrap();
        assert_eq!(svid.not_after(), ca.clock.now() + Span::hours(1), "after {days} days");
        assert_eq!(run.authority.problem(ca.clock.now()), None);
    }
}

#[tokio::test]
async fn the_server_certificate_is_a_recorded_leaf_and_is_renewed_while_running() {
    let mut ca = TestCa::new();
    ca.settings.dns_names = vec!["ca.example.org".into()];
    let run = ca.start().await;
    let current = run.authority.server_certificate();
    let before = current.load_full();
    let facts = chancery_identity::profile::check_leaf(&before.cert[0]).unwrap();
    assert_eq!((facts.id.as_str(), &facts.dns_names[..]), ("spiffe://example.org/chancery/ca", &["ca.example.org".to_owned()][..]));
    assert_eq!(before.cert.last().unwrap(), run.authority.issuer().root(), "for agents that hold the root's fingerprint");
    assert!(run.ledger.show(facts.serial).await.unwrap().is_some());
    ca.clock.advance(Span::hours(13));
    run.authority.tick(ca.clock.now()).await.unwrap();
    let after = current.load_full();
    assert_ne!(before.cert[0], after.cert[0]);
    run.authority.configure(Settings { dns_names: vec!["other.example.org".into()], ..ca.settings.clone() });
    run.authority.tick(ca.clock.now()).await.unwrap();
    let facts = chancery_identity::profile::check_leaf(&current.load().cert[0]).unwrap();
    assert_eq!(facts.dns_names, ["other.example.org"]);
}

#[tokio::test]
async fn a_server_certificate_that_was_made_while_the_clock_was_ahead_is_replaced() {
    let ca = TestCa::new();
    let run = ca.start().await;
    let now = ca.clock.now();
    ca.clock.advance(Span::days(1));
    run.authority.tick(ca.clock.now()).await.unwrap();
    ca.clock.advance(-Span::days(1));
    let not_before = || chancery_identity::profile::check_leaf(&run.authority.server_certificate().load().cert[0]).unwrap().not_before;
    assert!(not_before() > now);
    run.authority.tick(now).await.unwrap();
    assert!(not_before() <= now);
}

#[tokio::test]
async fn an_issuing_certificate_that_was_made_while_the_clock_was_ahead_is_replaced() {
    let ca = TestCa::new();
    let run = ca.start().await;
    ca.clock.advance(Span::days(5));
    run.authority.tick(ca.clock.now()).await.unwrap();
    ca.clock.advance(-Span::days(3));
    let now = ca.clock.now();
    assert!(run.authority.problem(now).is_some());
    run.authority.tick(now).await.unwrap();
    assert_eq!(run.authority.problem(now), None);
    leaf(&run, now, KeyType::EcdsaP256, Duration::from_secs(60)).await.unwrap();
    drop(run);

    // The same at a start.
    ca.clock.advance(-Span::days(1));
    let run = ca.start().await;
    assert_eq!(run.authority.problem(ca.clock.now()), None);
}

#[tokio::test]
async fn what_is_not_recorded_is_not_used() {
    let ca = TestCa::new();
    let run = ca.start().await;
    let (issuing, server) = (run.authority.issuer(), run.authority.server_certificate().load_full());
    ca.clock.advance(Span::days(4));
    ca.store.set_commits(Commits::Full);
    let error = run.authority.tick(ca.clock.now()).await.unwrap_err();
    assert!(matches!(error, AuthorityError::Ledger(LedgerError::Full(_))), "{error}");
    assert_eq!(run.authority.issuer().certificate(), issuing.certificate());
    assert_eq!(run.authority.server_certificate().load().cert, server.cert);
    ca.store.set_commits(Commits::Work);
    run.authority.tick(ca.clock.now()).await.unwrap();
    assert_ne!(run.authority.issuer().certificate(), issuing.certificate());
}

#[tokio::test]
async fn a_ledger_that_does_not_know_the_root_stops_the_start() {
    let mut ca = TestCa::new();
    drop(ca.start().await);
    ca.store = Arc::default();
    let error = ca.try_start(|keys| keys).await.err().unwrap();
    assert!(matches!(error, AuthorityError::UnknownRoot { .. }), "{error}");
    assert_eq!(ca.store.len(), 0, "no second root was made");
}

#[tokio::test]
async fn a_lost_root_key_stops_the_start_and_a_lost_issuing_key_does_not() {
    let ca = TestCa::new();
    let first = ca.start().await;
    let keys = FileKeyManager::open(first.directory.keys()).unwrap();
    let names = keys.list().await.unwrap();
    drop(first);
    let named = |prefix: &str| names.iter().find(|name| name.starts_with(prefix)).unwrap();
    keys.destroy(named("issuing-")).await.unwrap();
    drop(ca.start().await);
    keys.destroy(named("root-")).await.unwrap();
    let error = ca.try_start(|keys| keys).await.err().unwrap();
    assert!(matches!(error, AuthorityError::RootKeyMissing { .. }), "{error}");
}

#[tokio::test]
async fn an_expired_root_and_another_trust_domain_are_clear_errors() {
    let ca = TestCa::new();
    let run = ca.start().await;
    let Run { directory, ledger, .. } = run;
    let keys: Arc<dyn KeyManager> = Arc::new(FileKeyManager::open(directory.keys()).unwrap());
    let open = |trust_domain: &str| {
        Authority::open(trust_domain.parse().unwrap(), Settings::default(), &directory, keys.clone(), ledger.clone(), ca.clock.clone())
    };
    let error = open("other.org").await.unwrap_err().to_string();
    assert!(error.contains("example.org") && error.contains("other.org"), "{error}");
    ca.clock.advance(Span::days(366));
    assert!(matches!(open("example.org").await.unwrap_err(), AuthorityError::RootExpired { .. }));
}

#[tokio::test]
async fn a_clock_that_is_set_back_stops_issuing_with_a_clear_error() {
    let ca = TestCa::new();
    let run = ca.start().await;
    let back = ca.clock.now() - Span::hours(1);
    let error = leaf(&run, back, KeyType::EcdsaP256, Duration::from_secs(60)).await.unwrap_err();
    assert!(matches!(error, IssuerError::Clock { .. }), "{error}");
    assert!(run.authority.problem(back).unwrap().contains("clock"));
}

#[tokio::test]
async fn the_bundle_file_holds_the_root_alone_and_its_sequence() {
    let ca = TestCa::new();
    let run = ca.start().await;
    let pem = std::fs::read(run.directory.bundle()).unwrap();
    let bundle = TrustBundle::from_pem("example.org".parse().unwrap(), &pem).unwrap();
    assert_eq!(bundle.x509_authorities(), [run.authority.issuer().root().clone()]);
    let sequence = run.authority.trust().borrow().sequence;
    assert!(pem.starts_with(format!("# sequence: {sequence}\n").as_bytes()), "a newer file is told by it");
}

#[tokio::test]
async fn a_long_trust_domain_does_not_make_the_names_too_long() {
    let validity = (OffsetDateTime::UNIX_EPOCH, OffsetDateTime::UNIX_EPOCH);
    let domain = format!("{}.example.org", "a".repeat(200)).parse().unwrap();
    let params = profiles::root(&domain, true, chancery_identity::Serial::generate().unwrap(), validity).unwrap();
    let Some(rcgen::DnValue::Utf8String(name)) = params.distinguished_name.get(&rcgen::DnType::CommonName) else { panic!() };
    assert_eq!(name.len(), 64);
    assert!(name.contains(" 1970-01 "), "{name}");
}
