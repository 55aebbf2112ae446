//! Certificate signing requests: what the CA reads, and what it refuses.
//!
//! The files under `data/` were made by OpenSSL 3.0 (`openssl req -new -newkey … -addext …`), since rcgen makes no such keys.

#![allow(clippy::unwrap_used, reason = "a test may fail wherever it likes")]

use chancery_identity::SpiffeId;
use chancery_identity::csr::{self, CsrError, KeyType, MAX_CSR_BYTES, VerifiedCsr};
use proptest::prelude::*;
use rcgen::{
    Attribute, BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls_pki_types::CertificateSigningRequestDer;
use rustls_pki_types::pem::PemObject;

const CART: &str = "spiffe://example.org/ns/shop/sa/cart";

macro_rules! from_openssl {
    ($name:literal) => {{
        let pem = include_bytes!(concat!("data/", $name, ".csr.pem"));
        VerifiedCsr::from_der(&CertificateSigningRequestDer::from_pem_slice(pem).unwrap())
    }};
}

fn id() -> SpiffeId {
    CART.parse().unwrap()
}

/// Without subject and names.
fn bare() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params
}

fn read(params: &CertificateParams) -> Result<VerifiedCsr, CsrError> {
    read_with(params, Vec::new())
}

fn read_with(params: &CertificateParams, attributes: Vec<Attribute>) -> Result<VerifiedCsr, CsrError> {
    let key = KeyPair::generate().unwrap();
    VerifiedCsr::from_der(params.serialize_request_with_attributes(&key, attributes).unwrap().der())
}

fn asking_for(names: Vec<SanType>) -> Result<VerifiedCsr, CsrError> {
    let mut params = bare();
    params.subject_alt_names = names;
    read(&params)
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn dns(text: &str) -> SanType {
    SanType::DnsName(text.try_into().unwrap())
}

#[track_caller]
fn assert_asks(result: Result<VerifiedCsr, CsrError>, what: &str) {
    match result {
        Err(CsrError::Asks(problem)) => assert!(problem.contains(what), "{problem}"),
        other => panic!("not refused for what it asks: {other:?}"),
    }
}

#[track_caller]
fn assert_key(result: Result<VerifiedCsr, CsrError>, what: &str) {
    match result {
        Err(CsrError::Key(problem)) => assert!(problem.contains(what), "{problem}"),
        other => panic!("not refused for its key: {other:?}"),
    }
}

#[test]
fn a_generated_request_of_every_key_type_is_read_back() {
    for key_type in [KeyType::EcdsaP256, KeyType::EcdsaP384, KeyType::Ed25519, KeyType::Rsa2048, KeyType::Rsa3072, KeyType::Rsa4096] {
        let (der, _key) = csr::generate(key_type, Some(&id())).unwrap();
        let read = VerifiedCsr::from_der(&der).unwrap_or_else(|error| panic!("{key_type}: {error}"));
        assert_eq!((read.key_type, read.spiffe_id, read.dns_names), (key_type, Some(id()), vec![]));
    }
}

#[test]
fn a_request_may_leave_its_id_out() {
    let (der, _key) = csr::generate(KeyType::EcdsaP256, None).unwrap();
    assert_eq!(VerifiedCsr::from_der(&der).unwrap().spiffe_id, None);
}

#[test]
fn the_public_key_is_taken_over_as_it_stands() {
    let key = KeyPair::generate().unwrap();
    let read = VerifiedCsr::from_der(bare().serialize_request(&key).unwrap().der()).unwrap();
    assert_eq!(read.public_key, rcgen::PublicKeyData::subject_public_key_info(&key));
}

#[test]
fn rsa_requests_may_be_signed_with_any_sha_2() {
    for algorithm in [&rcgen::PKCS_RSA_SHA384, &rcgen::PKCS_RSA_SHA512] {
        let key = KeyPair::generate_for(algorithm).unwrap();
        assert_eq!(VerifiedCsr::from_der(bare().serialize_request(&key).unwrap().der()).unwrap().key_type, KeyType::Rsa2048);
    }
}

#[test]
fn harmless_wishes_of_a_leaf_are_passed_over() {
    let read = from_openssl!("p256_usual_wishes").unwrap();
    assert_eq!(read.spiffe_id, Some(id()));
    assert_eq!(read.dns_names, ["cart.shop.svc"], "DNS names compare in lower case");
}

#[test]
fn a_csr_with_a_broken_signature_is_refused() {
    let (mut der, _key) = csr::generate(KeyType::Ed25519, Some(&id())).unwrap();
    *der.last_mut().unwrap() ^= 1;
    assert_eq!(VerifiedCsr::from_der(&der).unwrap_err(), CsrError::Signature);
}

#[test]
fn a_csr_signed_by_another_key_is_refused() {
    let [(one, _), (other, _)] = [(); 2].map(|()| csr::generate(KeyType::Ed25519, None).unwrap());
    let mut mixed = one.clone();
    let signature = one.len() - 64;
    mixed[signature..].copy_from_slice(&other[signature..]);
    assert_eq!(VerifiedCsr::from_der(&mixed).unwrap_err(), CsrError::Signature);
}

#[test]
fn a_csr_with_rsa_1024_is_refused() {
    assert_key(from_openssl!("rsa_1024"), "it has 1024");
}

#[test]
fn a_csr_with_rsa_8192_is_refused() {
    assert_key(from_openssl!("rsa_8192"), "it has 8192");
}

#[test]
fn a_csr_with_a_small_rsa_exponent_is_refused() {
    assert_key(from_openssl!("rsa_2048_exponent_3"), "65537");
}

#[test]
fn a_csr_with_a_p384_key_and_a_sha256_signature_is_refused() {
    assert_key(from_openssl!("p384_with_sha256"), "does not go with a key of type ecdsa-p384");
}

#[test]
fn a_csr_with_another_curve_is_refused() {
    assert_key(from_openssl!("p521"), "it must be P-256");
}

#[test]
fn a_csr_with_a_curve_spelled_out_is_refused() {
    assert_key(from_openssl!("p256_explicit_curve"), "it must be P-256");
}

#[test]
fn a_csr_with_trailing_bytes_is_refused() {
    let (mut der, _key) = csr::generate(KeyType::EcdsaP256, None).unwrap();
    der.push(0);
    assert_eq!(VerifiedCsr::from_der(&der).unwrap_err(), CsrError::Malformed("1 bytes after its end".into()));
}

#[test]
fn a_csr_that_asks_to_be_a_ca_is_refused() {
    let mut params = bare();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    assert_asks(read(&params), "CA:TRUE");
}

#[test]
fn a_csr_that_asks_for_the_key_usage_of_a_ca_is_refused() {
    for (usage, name) in [(KeyUsagePurpose::KeyCertSign, "keyCertSign"), (KeyUsagePurpose::CrlSign, "cRLSign")] {
        let mut params = bare();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, usage];
        assert_asks(read(&params), name);
    }
}

#[test]
fn a_csr_that_asks_for_another_extended_key_usage_is_refused() {
    for usage in [ExtendedKeyUsagePurpose::CodeSigning, ExtendedKeyUsagePurpose::Any, ExtendedKeyUsagePurpose::Other(vec![1, 3, 6, 1])] {
        let mut params = bare();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, usage];
        assert_asks(read(&params), "extended key usage");
    }
}

#[test]
fn a_csr_that_asks_for_any_other_extension_is_refused() {
    let mut params = bare();
    params.custom_extensions = vec![CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99999, 1], vec![5, 0])];
    assert_asks(read(&params), "1.3.6.1.4.1.99999.1");
}

#[test]
fn a_csr_with_two_ids_is_refused() {
    assert_asks(asking_for(vec![uri(CART), uri(CART)]), "more than one URI");
}

#[test]
fn a_csr_with_a_uri_that_is_no_spiffe_id_is_refused() {
    assert_asks(asking_for(vec![uri("https://example.org/")]), "no SPIFFE ID");
    assert_asks(asking_for(vec![uri("spiffe://example.org/ns/../sa/cart")]), "no SPIFFE ID");
}

#[test]
fn a_csr_with_names_of_another_kind_is_refused() {
    assert_asks(asking_for(vec![SanType::IpAddress([127, 0, 0, 1].into())]), "IP address");
    assert_asks(asking_for(vec![SanType::Rfc822Name("a@example.org".try_into().unwrap())]), "e-mail");
    assert_asks(asking_for(vec![SanType::OtherName((vec![1, 3, 6], "x".into()))]), "neither");
}

#[test]
fn a_csr_with_a_wildcard_or_malformed_dns_name_is_refused() {
    for name in ["*.example.org", "a b", "", "-a.example"] {
        assert_asks(asking_for(vec![dns(name)]), "DNS name");
    }
}

#[test]
fn the_subject_may_name_an_organization_but_nothing_else() {
    let mut params = bare();
    params.distinguished_name.push(DnType::CommonName, "cart");
    params.distinguished_name.push(DnType::OrganizationName, "shop");
    assert!(read(&params).is_ok());
    params.distinguished_name.push(DnType::CountryName, "CH");
    assert_asks(read(&params), "subject attribute");
}

#[test]
fn a_csr_with_another_attribute_is_refused() {
    // challengePassword, SET of a PrintableString
    let challenge = Attribute { oid: &[1, 2, 840, 113_549, 1, 9, 7], values: vec![0x31, 0x03, 0x13, 0x01, b'x'] };
    assert_asks(read_with(&bare(), vec![challenge]), "1.2.840.113549.1.9.7");
}

#[test]
fn a_csr_whose_second_extension_request_hides_behind_the_first_is_refused() {
    const EXTENSION_REQUEST: &[u64] = &[1, 2, 840, 113_549, 1, 9, 14];
    let empty_list = [0x30, 0x00];
    let one = Attribute { oid: EXTENSION_REQUEST, values: [&[0x31, 0x02], &empty_list[..]].concat() };
    assert!(read_with(&bare(), vec![one.clone()]).is_ok());
    let two_values = Attribute { oid: EXTENSION_REQUEST, values: [&[0x31, 0x04], &empty_list[..], &empty_list[..]].concat() };
    assert!(matches!(read_with(&bare(), vec![two_values]), Err(CsrError::Malformed(_))));
    assert_asks(read_with(&bare(), vec![one.clone(), one]), "more than one attribute");
}

#[test]
fn one_megabyte_of_garbage_is_refused_by_its_size() {
    assert_eq!(VerifiedCsr::from_der(&vec![0x30; 1 << 20]).unwrap_err(), CsrError::TooLarge(1 << 20));
    assert!(matches!(VerifiedCsr::from_der(&[0x30; MAX_CSR_BYTES]), Err(CsrError::Malformed(_))));
}

#[test]
fn a_private_key_shows_nothing_of_itself() {
    let (_der, key) = csr::generate(KeyType::EcdsaP256, None).unwrap();
    assert_eq!(format!("{key:?}"), "PrivateKey(..)");
}

#[test]
fn a_request_with_any_one_bit_changed_is_refused() {
    let (der, _key) = csr::generate(KeyType::EcdsaP256, Some(&id())).unwrap();
    for bit in 0..der.len() * 8 {
        let mut changed = der.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert!(VerifiedCsr::from_der(&changed).is_err(), "byte {}", bit / 8);
    }
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        prop_assert!(VerifiedCsr::from_der(&bytes).is_err());
    }
}
