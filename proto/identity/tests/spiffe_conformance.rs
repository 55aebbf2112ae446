//! Every rule of the SPIFFE-ID and X509-SVID standards, and of bundles as far as X.509 goes; each test names the section it is about.

#![allow(clippy::unwrap_used, reason = "a test may fail wherever it likes")]

mod support;

use chancery_identity::profile::{check_authority, check_leaf};
use chancery_identity::{
    BundleError, Fingerprint, PrivateKey, Serial, SpiffeId, SpiffeIdError, SvidError, TrustBundle, TrustDomain, TrustState, X509Svid,
};
use proptest::prelude::*;
use rcgen::{CertificateParams, CustomExtension, DnType, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType, SerialNumber};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use time::Duration;
use zeroize::Zeroizing;

use support::{Authority, Pki, authority_params, domain, id, leaf_params, now, uri};

const DOMAIN: &str = "example.org";
const CART: &str = "spiffe://example.org/ns/shop/sa/cart";

mod spiffe_ids {
    use super::*;

    fn refused(text: &str) -> SpiffeIdError {
        text.parse::<SpiffeId>().unwrap_err()
    }

    #[test]
    fn the_scheme_is_spiffe_section_2() {
        for text in ["", "example.org", "https://example.org/a", "spiffe:/example.org/a", "spiffe//example.org", "spiffes://example.org"] {
            assert_eq!(refused(text), SpiffeIdError::Scheme, "{text}");
        }
    }

    #[test]
    fn the_trust_domain_is_not_empty_section_2() {
        assert_eq!(refused("spiffe://"), SpiffeIdError::EmptyTrustDomain);
        assert_eq!(refused("spiffe:///a"), SpiffeIdError::EmptyTrustDomain);
    }

    #[test]
    fn there_is_no_query_and_no_fragment_section_2() {
        for text in ["spiffe://example.org/a?b", "spiffe://example.org/a#b"] {
            assert!(matches!(refused(text), SpiffeIdError::PathCharacter('?' | '#')), "{text}");
        }
        for text in ["spiffe://example.org?b", "spiffe://example.org#b"] {
            assert!(matches!(refused(text), SpiffeIdError::TrustDomainCharacter('?' | '#')), "{text}");
        }
    }

    #[test]
    fn the_trust_domain_has_no_userinfo_port_or_percent_encoding_section_2_1() {
        for name in ["user@example.org", "example.org:443", "ex%61mple.org", "exämple.org", "example org", "[::1]"] {
            assert!(matches!(refused(&format!("spiffe://{name}/a")), SpiffeIdError::TrustDomainCharacter(_)), "{name}");
        }
        assert!("spiffe://a-b_c.9/a".parse::<SpiffeId>().is_ok());
    }

    #[test]
    fn the_trust_domain_has_at_most_255_bytes_section_2_1() {
        assert!(format!("spiffe://{}/a", "a".repeat(255)).parse::<SpiffeId>().is_ok());
        assert_eq!(refused(&format!("spiffe://{}/a", "a".repeat(256))), SpiffeIdError::TrustDomainTooLong);
    }

    #[test]
    fn path_segments_are_not_empty_and_no_dots_section_2_2() {
        for path in ["/", "//a", "/a//b", "/a/"] {
            assert_eq!(refused(&format!("spiffe://example.org{path}")), SpiffeIdError::EmptySegment, "{path}");
        }
        for path in ["/.", "/..", "/a/./b", "/a/../b", "/a/.."] {
            assert_eq!(refused(&format!("spiffe://example.org{path}")), SpiffeIdError::DotSegment, "{path}");
        }
        assert!("spiffe://example.org/.../a.b/_-".parse::<SpiffeId>().is_ok());
    }

    #[test]
    fn the_path_has_no_percent_encoding_section_2_2() {
        for path in ["/a%2fb", "/a b", "/ä", "/a:b", "/a\\b", "/a\0"] {
            assert!(matches!(refused(&format!("spiffe://example.org{path}")), SpiffeIdError::PathCharacter(_)), "{path}");
        }
    }

    #[test]
    fn ids_up_to_2048_bytes_are_supported_section_2_3() {
        let longest = format!("spiffe://example.org/{}", "a".repeat(2048 - 21));
        assert_eq!(longest.len(), 2048);
        assert!(longest.parse::<SpiffeId>().is_ok());
        assert_eq!(refused(&format!("{longest}a")), SpiffeIdError::TooLong);
    }

    #[test]
    fn scheme_and_trust_domain_ignore_case_and_the_path_does_not_section_2_4() {
        assert_eq!(id("SPIFFE://Example.ORG/a"), id("spiffe://example.org/a"));
        assert_ne!(id("spiffe://example.org/A"), id("spiffe://example.org/a"));
        assert_eq!(domain("Example.ORG"), domain("spiffe://example.org"));
    }

    #[test]
    fn a_variable_cannot_fill_more_than_one_segment() {
        for value in ["a/b", "..", ".", "", "a/"] {
            assert!(domain(DOMAIN).member(["ns", value, "sa", "cart"]).is_err(), "{value}");
        }
    }

    /// Mostly near misses: texts out of the alphabet in which the rules are written.
    fn nearly_an_id() -> impl Strategy<Value = String> {
        prop_oneof![
            "(spiffe|SPIFFE|Spiffe|http)(://|:/|:)[a-zA-Z0-9._%@:-]{0,12}(/[a-zA-Z0-9._%?#-]{0,6}){0,5}/?",
            "spiffe://[a-z0-9.]{1,8}(/(\\.|\\.\\.|[a-zA-Z]{1,4}|)){0,4}",
            ".{0,40}",
        ]
    }

    proptest! {
        #[test]
        fn an_id_survives_being_written_and_read(
            name in "[a-z0-9._-]{1,40}",
            segments in proptest::collection::vec("[a-zA-Z0-9._-]{1,20}".prop_filter("no dots alone", |s| s != "." && s != ".."), 0..6),
        ) {
            let built = domain(&name).member(&segments).unwrap();
            let read: SpiffeId = built.to_string().parse().unwrap();
            prop_assert_eq!(&read, &built);
            prop_assert_eq!(read.trust_domain().as_str(), name);
            prop_assert_eq!(read.segments().collect::<Vec<_>>(), segments);
        }

        #[test]
        fn our_verdict_on_ids_is_that_of_the_spiffe_crate(text in nearly_an_id()) {
            match (text.parse::<SpiffeId>(), spiffe::SpiffeId::new(&text)) {
                (Ok(ours), Ok(theirs)) => prop_assert_eq!(ours.as_str(), theirs.to_string()),
                (Err(_), Err(_)) => {}
                (ours, theirs) => prop_assert!(false, "{:?}: {:?}, {:?}", text, ours, theirs),
            }
        }

        #[test]
        fn our_verdict_on_trust_domains_is_that_of_the_spiffe_crate(name in "[a-zA-Z0-9._%@:-]{0,12}") {
            match (name.parse::<TrustDomain>(), spiffe::TrustDomain::new(&name)) {
                (Ok(ours), Ok(theirs)) => prop_assert_eq!(ours.as_str(), theirs.as_str()),
                (Err(_), Err(_)) => {}
                (ours, theirs) => prop_assert!(false, "{:?}: {:?}, {:?}", name, ours, theirs),
            }
        }
    }
}

mod x509_svids {
    use super::*;

    /// Issues a leaf after `change` and holds it against the profile.
    fn leaf(change: impl FnOnce(&mut CertificateParams)) -> Result<SpiffeId, SvidError> {
        let mut params = leaf_params(CART);
        change(&mut params);
        let (leaf, _key) = Authority::root(authority_params("root")).leaf(&params);
        check_leaf(&leaf).map(|facts| facts.id)
    }

    fn authority(change: impl FnOnce(&mut CertificateParams)) -> Result<Option<SpiffeId>, SvidError> {
        let mut params = authority_params("root");
        change(&mut params);
        check_authority(&Authority::root(params).certificate).map(|facts| facts.id)
    }

    #[track_caller]
    fn assert_breaks<T: std::fmt::Debug>(result: Result<T, SvidError>, expected: &str) {
        match result {
            Err(SvidError::Profile { section, .. }) => assert_eq!(section, expected),
            other => panic!("{other:?}"),
        }
    }

    fn extension(last_arc: u64, content: &[u8]) -> CustomExtension {
        CustomExtension::from_oid_content(&[2, 5, 29, last_arc], content.to_vec())
    }

    #[test]
    fn a_leaf_tells_its_facts() {
        let mut params = leaf_params(CART);
        params.subject_alt_names.push(SanType::DnsName("cart.shop.svc".try_into().unwrap()));
        let serial = Serial::generate().unwrap();
        params.serial_number = Some(SerialNumber::from_slice(&serial.0));
        let (leaf, _key) = Authority::root(authority_params("root")).leaf(&params);
        let facts = check_leaf(&leaf).unwrap();
        assert_eq!((facts.id, facts.serial, facts.dns_names), (id(CART), serial, vec!["cart.shop.svc".to_owned()]));
        assert_eq!((facts.not_before, facts.not_after), (now() - Duration::seconds(30), now() + Duration::hours(1)));
    }

    #[test]
    fn there_is_exactly_one_uri_san_section_2() {
        assert_breaks(leaf(|params| params.subject_alt_names.push(uri("spiffe://example.org/other"))), "§2");
        assert_breaks(leaf(|params| params.subject_alt_names.push(uri("https://example.org/"))), "§2");
        assert_breaks(leaf(|params| params.subject_alt_names = vec![SanType::DnsName("a.example".try_into().unwrap())]), "§2");
        assert_breaks(leaf(|params| params.subject_alt_names.clear()), "§2");
    }

    #[test]
    fn the_uri_is_a_spiffe_id_section_2() {
        for text in ["https://example.org/a", "spiffe://example.org/a/../b", "spiffe://example.org/a?b"] {
            assert_breaks(leaf(|params| params.subject_alt_names = vec![uri(text)]), "§2");
        }
    }

    #[test]
    fn a_leafs_path_is_not_the_root_section_3_1() {
        assert_breaks(leaf(|params| params.subject_alt_names = vec![uri("spiffe://example.org")]), "§3.1");
    }

    #[test]
    fn the_san_is_critical_when_the_subject_is_empty_section_3_1() {
        // SEQUENCE { [6] "spiffe://a/b" }, not critical
        let names = extension(17, b"\x30\x0e\x86\x0cspiffe://a/b");
        assert_breaks(
            leaf(|params| {
                params.subject_alt_names.clear();
                params.custom_extensions.push(names.clone());
            }),
            "§3.1",
        );
        let with_subject = leaf(|params| {
            params.subject_alt_names.clear();
            params.custom_extensions.push(names);
            params.distinguished_name.push(DnType::CommonName, "cart");
        });
        assert_eq!(with_subject.unwrap(), id("spiffe://a/b"));
    }

    #[test]
    fn a_signing_certificates_id_has_no_path_section_3_2() {
        assert_eq!(
            authority(|params| params.subject_alt_names = vec![uri("spiffe://example.org")]).unwrap(),
            Some(id("spiffe://example.org"))
        );
        assert_breaks(authority(|params| params.subject_alt_names = vec![uri("spiffe://example.org/ca")]), "§3.2");
        assert_eq!(authority(|_| {}).unwrap(), None);
    }

    #[test]
    fn a_signing_certificate_never_authenticates_section_3_2() {
        let mut params = authority_params("root");
        params.subject_alt_names = vec![uri("spiffe://example.org")];
        params.key_usages.push(KeyUsagePurpose::DigitalSignature);
        assert!(check_leaf(&Authority::root(params).certificate).is_err());
    }

    #[test]
    fn a_leaf_is_no_ca_and_an_authority_is_one_section_4_1() {
        assert_breaks(leaf(|params| params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained)), "§4.1");
        assert!(leaf(|params| params.is_ca = IsCa::NoCa).is_ok(), "absent means false (RFC 5280 §4.2.1.9)");
        assert_breaks(authority(|params| params.is_ca = IsCa::ExplicitNoCa), "§4.1");
        assert_breaks(authority(|params| params.is_ca = IsCa::NoCa), "§4.1");
    }

    #[test]
    fn key_usage_is_present_and_critical_section_4_3() {
        assert_breaks(leaf(|params| params.key_usages.clear()), "§4.3");
        assert_breaks(authority(|params| params.key_usages.clear()), "§4.3");
        let not_critical = |bits: &'static [u8]| {
            move |params: &mut CertificateParams| {
                params.key_usages.clear();
                params.custom_extensions.push(extension(15, bits));
            }
        };
        assert_breaks(leaf(not_critical(b"\x03\x02\x07\x80")), "§4.3");
        assert_breaks(authority(not_critical(b"\x03\x02\x02\x04")), "§4.3");
    }

    #[test]
    fn a_leaf_signs_and_does_nothing_of_a_ca_section_4_3() {
        assert_breaks(leaf(|params| params.key_usages = vec![KeyUsagePurpose::KeyEncipherment]), "§4.3");
        assert_breaks(leaf(|params| params.key_usages.push(KeyUsagePurpose::KeyCertSign)), "§4.3");
        assert_breaks(leaf(|params| params.key_usages.push(KeyUsagePurpose::CrlSign)), "§4.3");
        assert!(leaf(|params| params.key_usages.push(KeyUsagePurpose::KeyEncipherment)).is_ok());
    }

    #[test]
    fn an_authority_has_key_cert_sign_section_4_3() {
        assert_breaks(authority(|params| params.key_usages = vec![KeyUsagePurpose::CrlSign]), "§4.3");
    }

    #[test]
    fn extended_key_usage_has_both_or_is_absent_section_4_4() {
        for usage in [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::Any] {
            assert_breaks(leaf(|params| params.extended_key_usages = vec![usage]), "§4.4");
        }
        assert!(leaf(|params| params.extended_key_usages.clear()).is_ok());
    }

    #[test]
    fn a_validator_looks_at_every_certificate_of_the_chain_section_5_2() {
        let root = Authority::root(authority_params("root"));
        let mut params = authority_params("issuing");
        params.key_usages = vec![KeyUsagePurpose::CrlSign];
        let issuing = root.subordinate(params);
        let (leaf, key) = issuing.leaf(&leaf_params(CART));
        assert_breaks(X509Svid::new(vec![leaf, issuing.certificate], key), "§4.3");
    }

    #[test]
    fn what_is_no_certificate_is_refused() {
        let (leaf, _key) = Authority::root(authority_params("root")).leaf(&leaf_params(CART));
        let mut longer = leaf.to_vec();
        longer.push(0);
        for bytes in [vec![], vec![0x30; 1 << 20], leaf[..leaf.len() - 1].to_vec(), longer] {
            assert!(matches!(check_leaf(&CertificateDer::from(bytes.clone())), Err(SvidError::Malformed(_))));
            assert!(matches!(check_authority(&CertificateDer::from(bytes)), Err(SvidError::Malformed(_))));
        }
    }

    #[test]
    fn an_extension_that_comes_twice_or_is_unknown_and_critical_is_refused() {
        let twice = leaf(|params| params.custom_extensions = vec![extension(15, b"\x03\x02\x07\x80")]);
        assert!(matches!(twice, Err(SvidError::Malformed(_))), "{twice:?}");
        let mut unknown = CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99999, 1], vec![5, 0]);
        assert!(leaf(|params| params.custom_extensions = vec![unknown.clone()]).is_ok());
        unknown.set_criticality(true);
        assert!(leaf(|params| params.custom_extensions = vec![unknown]).is_err());
    }

    #[test]
    fn a_serial_number_that_chancery_would_not_give_is_refused() {
        for serial in [vec![1], vec![1; 20], vec![0x80; 16]] {
            let result = leaf(|params| params.serial_number = Some(SerialNumber::from_slice(&serial)));
            assert!(matches!(result, Err(SvidError::Malformed(_))), "{serial:?}: {result:?}");
        }
    }

    #[test]
    fn serial_numbers_are_random_positive_and_of_one_length() {
        let serials: std::collections::BTreeSet<Serial> = (0..2000).map(|_| Serial::generate().unwrap()).collect();
        assert_eq!(serials.len(), 2000);
        for serial in serials {
            assert_eq!(Serial::from_der_integer_bytes(&serial.0).unwrap(), serial);
            assert_eq!(serial.to_string().parse::<Serial>().unwrap(), serial);
        }
        assert!("0123456789abcdef0123456789abcde".parse::<Serial>().is_err());
        assert_eq!("01:23:45:67:89:AB:CD:EF:01:23:45:67:89:AB:CD:EF".parse::<Serial>(), "0123456789abcdef0123456789abcdef".parse());
    }

    #[test]
    fn a_key_of_another_certificate_is_refused() {
        let pki = Pki::new("root");
        let (leaf, _key) = pki.issuing.leaf(&leaf_params(CART));
        let (_leaf, other) = pki.issuing.leaf(&leaf_params(CART));
        assert_eq!(X509Svid::new(vec![leaf.clone()], other).unwrap_err(), SvidError::KeyMismatch(id(CART)));
        let garbage = PrivateKey::from_pkcs8(Zeroizing::new(vec![1, 2, 3]));
        assert_eq!(X509Svid::new(vec![leaf], garbage.clone()).unwrap_err(), SvidError::Key(id(CART)));
        assert!(X509Svid::new(vec![], garbage).is_err());
    }

    #[test]
    fn a_chain_that_leads_to_the_bundle_verifies_while_in_time() {
        let pki = Pki::new("root");
        let (svid, trust) = (pki.svid(CART), pki.trust(DOMAIN));
        svid.verify(&trust, now()).unwrap();
        svid.verify(&trust, svid.not_after()).unwrap();
        let late = svid.not_after() + Duration::seconds(1);
        assert_eq!(svid.verify(&trust, late).unwrap_err(), SvidError::Expired { id: id(CART), not_after: svid.not_after() });
        let early = svid.not_before() - Duration::seconds(1);
        assert_eq!(svid.verify(&trust, early).unwrap_err(), SvidError::NotYetValid { id: id(CART), not_before: svid.not_before() });
    }

    #[test]
    fn a_chain_that_does_not_lead_to_the_bundle_of_its_trust_domain_is_refused() {
        let pki = Pki::new("root");
        let svid = pki.svid(CART);
        assert!(matches!(svid.verify(&Pki::new("other").trust(DOMAIN), now()), Err(SvidError::Chain { .. })));
        assert_eq!(svid.verify(&pki.trust("elsewhere.org"), now()).unwrap_err(), SvidError::UnknownTrustDomain(id(CART)));
        let distrusted = pki.trust(DOMAIN).with_distrusted(vec![Fingerprint::of(&pki.root.certificate)]);
        assert!(matches!(svid.verify(&distrusted, now()), Err(SvidError::Chain { .. })));
    }

    #[test]
    fn the_spiffe_crate_accepts_our_svids() {
        let svid = Pki::new("root").svid(CART);
        let chain: Vec<u8> = svid.chain().iter().flat_map(|certificate| certificate.to_vec()).collect();
        let theirs = spiffe::X509Svid::parse_from_der(&chain, svid.key().secret_pkcs8()).unwrap();
        assert_eq!(theirs.spiffe_id().to_string(), CART);
    }

    #[test]
    fn pem_carries_the_same_chain_and_key() {
        let svid = Pki::new("root").svid(CART);
        let chain: Vec<_> = CertificateDer::pem_slice_iter(svid.chain_pem().as_bytes()).map(Result::unwrap).collect();
        assert_eq!(chain, svid.chain());
        let key = PrivatePkcs8KeyDer::from_pem_slice(svid.key().secret_pem().as_bytes()).unwrap();
        assert_eq!(key.secret_pkcs8_der(), svid.key().secret_pkcs8());
    }

    #[test]
    fn an_svid_shows_nothing_of_its_key() {
        let svid = Pki::new("root").svid(CART);
        assert!(format!("{svid:?}").contains("PrivateKey(..)"));
    }

    #[test]
    fn a_leaf_with_any_one_bit_changed_is_never_served() {
        let pki = Pki::new("root");
        let (trust, svid) = (pki.trust(DOMAIN), pki.svid(CART));
        for bit in 0..svid.chain()[0].len() * 8 {
            let mut leaf = svid.chain()[0].to_vec();
            leaf[bit / 8] ^= 1 << (bit % 8);
            let verdict = X509Svid::new(vec![leaf.into(), svid.chain()[1].clone()], svid.key().clone())
                .and_then(|changed| changed.verify(&trust, now()));
            assert!(verdict.is_err(), "byte {}", bit / 8);
        }
    }
}

mod bundles {
    use super::*;

    #[test]
    fn a_bundle_without_an_authority_is_none_section_4_1_3() {
        assert_eq!(TrustBundle::new(domain(DOMAIN), vec![]).unwrap_err(), BundleError::Empty(domain(DOMAIN)));
        assert_eq!(TrustBundle::from_pem(domain(DOMAIN), b"nothing here").unwrap_err(), BundleError::Empty(domain(DOMAIN)));
    }

    #[test]
    fn an_authority_that_may_not_be_one_is_refused_by_its_number() {
        let pki = Pki::new("root");
        let (leaf, _key) = pki.issuing.leaf(&leaf_params(CART));
        match TrustBundle::new(domain(DOMAIN), vec![pki.root.certificate, leaf]).unwrap_err() {
            BundleError::Authority { number: 2, problem, .. } => assert!(problem.contains("§4.1"), "{problem}"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_authority_of_another_trust_domain_is_refused() {
        let mut params = authority_params("root");
        params.subject_alt_names = vec![uri("spiffe://elsewhere.org")];
        let refused = TrustBundle::new(domain(DOMAIN), vec![Authority::root(params).certificate]).unwrap_err();
        assert!(refused.to_string().contains("spiffe://elsewhere.org"), "{refused}");
    }

    #[test]
    fn authorities_keep_their_order_and_come_once() {
        let [one, two] = ["one", "two"].map(|name| Pki::new(name).root.certificate);
        let bundle = TrustBundle::new(domain(DOMAIN), vec![two.clone(), one.clone(), two.clone()]).unwrap();
        assert_eq!(bundle.x509_authorities(), [two, one]);
    }

    #[test]
    fn a_bundle_survives_pem_with_text_between() {
        let bundle = TrustBundle::new(domain(DOMAIN), vec![Pki::new("one").root.certificate, Pki::new("two").root.certificate]).unwrap();
        let pem = format!("# roots\n{}\nmore text\n", bundle.to_pem());
        assert_eq!(TrustBundle::from_pem(domain(DOMAIN), pem.as_bytes()).unwrap(), bundle);
        assert!(matches!(
            TrustBundle::from_pem(domain(DOMAIN), b"-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----"),
            Err(BundleError::Malformed(_))
        ));
    }

    #[test]
    fn a_trust_domain_that_comes_twice_is_refused_section_5_1_1() {
        let [one, two] = ["one", "two"].map(|name| Pki::new(name).bundle(DOMAIN));
        assert!(matches!(TrustState::new(1, domain(DOMAIN), [one, two]), Err(BundleError::Malformed(_))));
    }

    #[test]
    fn a_state_has_the_bundle_of_its_own_trust_domain() {
        let foreign = Pki::new("root").bundle("elsewhere.org");
        assert_eq!(TrustState::new(1, domain(DOMAIN), [foreign]).unwrap_err(), BundleError::OwnMissing(domain(DOMAIN)));
    }

    #[test]
    fn the_spiffe_crate_accepts_our_bundles() {
        let bundle = TrustBundle::new(domain(DOMAIN), vec![Pki::new("one").root.certificate, Pki::new("two").root.certificate]).unwrap();
        let authorities: Vec<&[u8]> = bundle.x509_authorities().iter().map(AsRef::as_ref).collect();
        let theirs = spiffe::X509Bundle::from_x509_authorities(spiffe::TrustDomain::new(DOMAIN).unwrap(), &authorities).unwrap();
        assert_eq!(theirs.authorities().len(), 2);
    }

    #[test]
    fn a_fingerprint_is_read_as_openssl_prints_it() {
        let fingerprint = Fingerprint::of(&Pki::new("root").root.certificate);
        let text = fingerprint.to_string();
        let with_colons =
            text.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).unwrap().to_uppercase()).collect::<Vec<_>>().join(":");
        assert_eq!((text.parse(), with_colons.parse()), (Ok(fingerprint), Ok(fingerprint)));
        assert!("00".parse::<Fingerprint>().is_err());
    }
}
