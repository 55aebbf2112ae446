//! Roots that a corporate CA signs: the request, what may be an answer to it, and a life under it.

use std::net::Ipv4Addr;

use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, CustomExtension, DnType, ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, KeyPair,
    KeyUsagePurpose, NameConstraints, SanType,
};
use time::Duration as Span;
use x509_parser::asn1_rs::FromDer;
use x509_parser::certification_request::X509CertificationRequest;

use super::roots::{act, bundle, move_to};
use super::{Duration, KeyType, leaf};
use crate::authority::testing::{Corporate, Run, TestCa};
use crate::authority::*;
use crate::keys::{FileKeyManager, KeyManager};
use crate::ledger::acts::RootState;

const WHO: &str = "local:uid=0";
const WHY: &str = "a test";

async fn request(run: &Run) -> Vec<u8> {
    run.authority.request_root(WHO, WHY).await.unwrap().0
}

async fn answer(run: &Run, certificate: &CertificateDer<'static>) -> Result<Fingerprint, AuthorityError> {
    run.authority.answer_root(vec![certificate.clone()], WHO, WHY).await
}

/// A CA whose active root is a corporate one.
async fn under_corporate(ca: &TestCa, corporate: &Corporate, change: impl FnOnce(&mut CertificateParams)) -> (Run, Fingerprint) {
    let run = ca.start().await;
    let first = run.authority.root_fingerprint();
    let root = answer(&run, &corporate.sign(&request(&run).await, ca.clock.now(), change)).await.unwrap();
    for (root, to) in [(root, RootState::Published), (root, RootState::Active), (first, RootState::Retired)] {
        move_to(&run, root, to).await;
    }
    (run, root)
}

#[tokio::test]
async fn a_request_is_the_same_until_it_is_answered_also_after_a_restart_and_says_what_a_root_says() {
    let ca = TestCa::new();
    let run = ca.start().await;
    let (csr, is_new) = run.authority.request_root(WHO, WHY).await.unwrap();
    assert!(is_new);
    assert_eq!(run.authority.request_root(WHO, WHY).await.unwrap(), (csr.clone(), false));
    assert_eq!(bundle(&run), [run.authority.root_fingerprint()], "nobody sees it");
    drop(run);
    let run = ca.start().await;
    assert_eq!(run.authority.request_root(WHO, WHY).await.unwrap(), (csr.clone(), false));

    let (_, parsed) = X509CertificationRequest::from_der(&csr).unwrap();
    parsed.verify_signature().unwrap();
    let text = format!("{:?}", parsed.requested_extensions().unwrap().collect::<Vec<_>>());
    assert!(text.contains("ca: true, path_len_constraint: Some(1)") && text.contains("spiffe://example.org\""), "{text}");
    let subject = parsed.certification_request_info.subject.to_string();
    assert!(subject.starts_with("CN=Chancery DEVELOPMENT trust root example.org "), "{subject}");

    let root = answer(&run, &Corporate::new().sign(&csr, ca.clock.now(), |_| ())).await.unwrap();
    assert_eq!(run.ledger.current_state().roots[&root].state, RootState::Prepared);
    let (next, is_new) = run.authority.request_root(WHO, WHY).await.unwrap();
    assert!(is_new && next != csr, "the answered one is over, and the next has a key of its own");
}

#[tokio::test]
async fn a_request_whose_key_is_lost_is_made_anew() {
    let ca = TestCa::new();
    let run = ca.start().await;
    let csr = request(&run).await;
    drop(run);
    let (_, parsed) = X509CertificationRequest::from_der(&csr).unwrap();
    let public = parsed.certification_request_info.subject_pki.raw;
    let keys = FileKeyManager::open(ca.data().join("keys")).unwrap();
    for name in keys.list().await.unwrap() {
        if keys.public_key(&name).await.unwrap().spki == public {
            keys.destroy(&name).await.unwrap();
        }
    }
    let run = ca.start().await;
    let lost = answer(&run, &Corporate::new().sign(&csr, ca.clock.now(), |_| ())).await.unwrap_err();
    assert!(matches!(lost, AuthorityError::NotRequested), "{lost}");
    assert_ne!(request(&run).await, csr);
}

#[tokio::test]
async fn what_the_corporate_ca_signed_is_the_anchor_and_goes_the_way_of_every_root() {
    let (ca, corporate) = (TestCa::new(), Corporate::new());
    let run = ca.start().await;
    let old = run.authority.root_fingerprint();
    let signed = corporate.sign(&request(&run).await, ca.clock.now(), |_| ());
    // The whole chain, as such CAs hand it out, in any order.
    let chain = vec![corporate.root.der().clone(), signed.clone(), corporate.signing.der().clone()];
    let new = run.authority.answer_root(chain.clone(), WHO, WHY).await.unwrap();
    assert_eq!(new, Fingerprint::of(&signed));
    let entries = ca.store.len();
    assert_eq!(run.authority.answer_root(chain, WHO, WHY).await.unwrap(), new);
    assert_eq!(ca.store.len(), entries, "brought again, it changes nothing");
    assert_eq!(run.authority.prepare_root(WHO, WHY).await.unwrap(), new, "it is on its way");

    move_to(&run, new, RootState::Published).await;
    assert_eq!(bundle(&run), [old, new], "and nothing above it");
    move_to(&run, new, RootState::Active).await;
    let svid = leaf(&run, ca.clock.now(), KeyType::EcdsaP256, Duration::from_secs(60)).await.unwrap();
    move_to(&run, old, RootState::Retired).await;
    drop(run);
    let run = ca.start().await;
    assert_eq!((run.authority.root_fingerprint(), bundle(&run)), (new, vec![new]));
    // webpki, with this anchor alone.
    svid.verify(&run.authority.trust().borrow(), ca.clock.now()).unwrap();
    let told = run.authority.roots();
    let told = told.iter().find(|root| root.fingerprint == new).unwrap();
    assert_eq!(told.signed_by.as_deref(), Some("CN=Corporate signing CA"));
}

#[tokio::test]
async fn an_answer_that_was_killed_before_the_act_goes_on_with_the_same_root() {
    let (ca, corporate) = (TestCa::new(), Corporate::new());
    let run = ca.start().await;
    let signed = corporate.sign(&request(&run).await, ca.clock.now(), |_| ());
    run.authority.maker.record(&signed, true).await.unwrap();
    drop(run);
    let run = ca.start().await;
    assert_eq!(answer(&run, &signed).await.unwrap(), Fingerprint::of(&signed));
}

type Changed = fn(&mut CertificateParams);

#[tokio::test]
async fn an_answer_that_breaks_a_rule_is_refused_with_the_rule_and_changes_nothing() {
    let broken: [(&str, Changed); 14] = [
        ("another key", |_| ()),
        ("do not say that it is a CA", |params| params.is_ca = IsCa::ExplicitNoCa),
        ("path length is 0", |params| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0))),
        ("lacks keyCertSign", |params| params.key_usages = vec![KeyUsagePurpose::CrlSign]),
        ("lacks cRLSign", |params| params.key_usages = vec![KeyUsagePurpose::KeyCertSign]),
        ("key usage is missing", |params| params.key_usages.clear()),
        ("lacks serverAuth or clientAuth", |params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]),
        ("trust domain is example.org", |params| {
            params.subject_alt_names = vec![SanType::URI("spiffe://example.com".try_into().unwrap())];
        }),
        ("SPIFFE ID has a path", |params| {
            params.subject_alt_names = vec![SanType::URI("spiffe://example.org/ns/x".try_into().unwrap())];
        }),
        ("name constraints", |params| {
            let subnet = GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(Ipv4Addr::LOCALHOST.into(), 8));
            params.name_constraints = Some(NameConstraints { permitted_subtrees: vec![subnet], excluded_subtrees: Vec::new() });
        }),
        ("critical", |params| {
            let mut unknown = CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99999, 1], vec![5, 0]);
            unknown.set_criticality(true);
            params.custom_extensions.push(unknown);
        }),
        ("come back then", |params| params.not_before = params.not_after - Span::days(1)),
        ("two issuing certificates", |params| params.not_after -= Span::days(730 - 13)),
        ("half of that has passed", |params| params.not_before -= Span::days(731)),
    ];
    let (ca, corporate) = (TestCa::new(), Corporate::new());
    let run = ca.start().await;
    let csr = request(&run).await;
    let entries = ca.store.len();
    for (words, change) in broken {
        let signed = corporate.sign(&csr, ca.clock.now(), change);
        let error = if words == "another key" {
            let other = KeyPair::generate().unwrap();
            let csr = CertificateParams::default().serialize_request(&other).unwrap();
            answer(&run, &corporate.sign(csr.der(), ca.clock.now(), |_| ())).await.unwrap_err()
        } else {
            answer(&run, &signed).await.unwrap_err()
        };
        let is_named = error.to_string().contains(words) || (words == "another key" && matches!(error, AuthorityError::NotRequested));
        assert!(is_named, "{words}: {error}");
    }
    assert_eq!(ca.store.len(), entries);
    assert_eq!(request(&run).await, csr, "the request is still open");
    answer(&run, &corporate.sign(&csr, ca.clock.now(), |_| ())).await.unwrap();
}

#[tokio::test]
async fn a_corporate_ca_may_choose_the_name_but_only_one_that_can_be_repeated() {
    let (ca, corporate) = (TestCa::new(), Corporate::new());
    let run = ca.start().await;
    let csr = request(&run).await;
    // Two organizational units, which rcgen would write as one.
    let mut twice = CustomName::default();
    twice.push("2.5.4.11", "Mesh");
    twice.push("2.5.4.11", "Platform");
    let signed = twice.put_into(&corporate.sign(&csr, ca.clock.now(), |_| ()));
    let error = answer(&run, &signed).await.unwrap_err().to_string();
    assert!(error.contains("OU=Mesh, OU=Platform") && error.contains("cannot be repeated"), "{error}");

    let signed = corporate.sign(&csr, ca.clock.now(), |params| {
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CountryName, rcgen::DnValue::PrintableString("DE".try_into().unwrap()));
        params.distinguished_name.push(DnType::OrganizationName, "Example AG");
        params.distinguished_name.push(DnType::CommonName, "Mesh CA 1");
        params.subject_alt_names.clear();
    });
    let root = answer(&run, &signed).await.unwrap();
    move_to(&run, root, RootState::Published).await;
    move_to(&run, root, RootState::Active).await;
    let svid = leaf(&run, ca.clock.now(), KeyType::EcdsaP256, Duration::from_secs(60)).await.unwrap();
    svid.verify(&run.authority.trust().borrow(), ca.clock.now()).unwrap();
    drop(run);
    ca.start().await;
}

#[tokio::test]
async fn nothing_below_a_corporate_root_outlives_it() {
    let (ca, corporate) = (TestCa::new(), Corporate::new());
    let until = ca.clock.now() + Span::days(15);
    let (run, root) = under_corporate(&ca, &corporate, |params| params.not_after = until).await;
    while ca.clock.now() + Span::days(2) < until {
        ca.clock.advance(Span::days(2));
        run.authority.tick(ca.clock.now()).await.unwrap();
        let issuer = run.authority.issuer();
        assert_eq!(issuer.root_fingerprint(), root);
        assert!(issuer.not_after() <= until);
        let svid = leaf(&run, ca.clock.now(), KeyType::EcdsaP256, Duration::from_secs(30 * 86400)).await.unwrap();
        assert!(svid.not_after() <= issuer.not_after());
    }
    assert_eq!(run.authority.issuer().not_after(), until);
}

#[tokio::test]
async fn under_a_corporate_ca_no_root_is_made_unless_an_operator_says_so() {
    let (ca, corporate) = (TestCa::new(), Corporate::new());
    let (run, root) = under_corporate(&ca, &corporate, |_| ()).await;
    for refused in [run.authority.prepare_root(WHO, WHY).await.map(|_| ()), run.authority.check_replaceable().await] {
        let error = refused.unwrap_err();
        assert!(matches!(&error, AuthorityError::Corporate { signed_by } if signed_by == "CN=Corporate signing CA"), "{error}");
        assert!(error.to_string().contains("prepare --csr FILE"), "{error}");
    }
    let next = answer(&run, &corporate.sign(&request(&run).await, ca.clock.now(), |_| ())).await.unwrap();
    run.authority.check_replaceable().await.unwrap();
    assert_eq!(run.authority.prepare_root(WHO, WHY).await.unwrap(), next);
    let own = run.authority.prepare_own_root(WHO, WHY).await.unwrap();
    assert!(own != next && own != root);
    act(&run, own, RootState::Published).await;
    assert_eq!(run.authority.prepare_root(WHO, WHY).await.unwrap(), next, "what an operator brought comes first");
    assert_eq!(run.authority.prepare_own_root(WHO, WHY).await.unwrap(), own);
}

/// A subject that rcgen cannot write.
#[derive(Default)]
struct CustomName(Vec<u8>);

impl CustomName {
    fn push(&mut self, oid: &str, value: &str) {
        let oid: Vec<u8> = oid.split('.').map(|part| part.parse().unwrap()).collect();
        let oid = wrap(0x06, &[&[oid[0] * 40 + oid[1]], &oid[2..]].concat());
        let attribute = wrap(0x30, &[oid, wrap(0x0c, value.as_bytes())].concat());
        self.0.extend(wrap(0x31, &attribute));
    }

    /// In the place of the certificate's subject; whoever takes it as an anchor asks for no signature.
    fn put_into(&self, certificate: &CertificateDer<'_>) -> CertificateDer<'static> {
        let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(certificate).unwrap();
        let (subject, tbs) = (parsed.subject().as_raw(), parsed.tbs_certificate.as_ref());
        let content = &tbs[tbs.len() - length_of(tbs)..];
        let at = content.windows(subject.len()).position(|window| window == subject).unwrap();
        let name = wrap(0x30, &self.0);
        let new = wrap(0x30, &[&content[..at], &name, &content[at + subject.len()..]].concat());
        let place = certificate.windows(tbs.len()).position(|window| window == tbs).unwrap();
        wrap(0x30, &[&new, &certificate[place + tbs.len()..]].concat()).into()
    }
}

fn length_of(der: &[u8]) -> usize {
    let (_, header) = x509_parser::asn1_rs::Header::from_der(der).unwrap();
    header.length().definite().unwrap()
}

fn wrap(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = u16::try_from(content.len()).unwrap().to_be_bytes();
    let mut der = vec![tag];
    match content.len() {
        0..=127 => der.push(length[1]),
        128..=255 => der.extend([0x81, length[1]]),
        _ => der.extend([0x82, length[0], length[1]]),
    }
    der.extend_from_slice(content);
    der
}
