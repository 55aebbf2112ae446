//! A small certificate authority for tests, on rcgen alone: so that what the crate reads was not made by what it tests.

#![allow(clippy::unwrap_used, reason = "a test may fail wherever it likes")]
#![allow(unreachable_pub, reason = "shared by the test files, each a crate of its own")]
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use chancery_identity::{Clock, Crl, PrivateKey, Serial, SpiffeId, TrustBundle, TrustDomain, TrustState, X509Svid};
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType};
use rcgen::{CertificateRevocationListParams, ExtendedKeyUsagePurpose, KeyIdMethod, RevokedCertParams, SerialNumber};
use rustls_pki_types::CertificateDer;
use time::{Duration, OffsetDateTime};
use zeroize::Zeroizing;

/// The moment at which the tests play.
pub fn now() -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap()
}

/// A clock that stands until it is set.
#[derive(Debug)]
pub struct SetClock(AtomicI64);

impl SetClock {
    pub fn at(moment: OffsetDateTime) -> Arc<Self> {
        Arc::new(Self(AtomicI64::new(moment.unix_timestamp())))
    }

    pub fn set(&self, moment: OffsetDateTime) {
        self.0.store(moment.unix_timestamp(), Ordering::SeqCst);
    }
}

impl Clock for SetClock {
    fn now(&self) -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(self.0.load(Ordering::SeqCst)).unwrap()
    }
}

pub fn domain(name: &str) -> TrustDomain {
    name.parse().unwrap()
}

pub fn id(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

pub fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

/// Whoever issues.
pub struct Authority {
    pub certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// A root of its own.
    pub fn root(params: CertificateParams) -> Self {
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().der().clone();
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    /// An authority under this one.
    pub fn subordinate(&self, params: CertificateParams) -> Self {
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    /// A CRL of what this one issued, DER.
    pub fn crl(&self, revoked: &[Serial]) -> Vec<u8> {
        let entry = |serial: &Serial| RevokedCertParams {
            serial_number: SerialNumber::from_slice(&serial.0),
            revocation_time: now(),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: now() - Duration::hours(1),
            next_update: now() + Duration::days(400),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.iter().map(entry).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().der().to_vec()
    }

    /// A leaf under this one, with its key.
    pub fn leaf(&self, params: &CertificateParams) -> (CertificateDer<'static>, PrivateKey) {
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        (certificate, PrivateKey::from_pkcs8(Zeroizing::new(key.serialize_der())))
    }
}

/// As an authority should be.
pub fn authority_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = now() - Duration::days(1);
    params.not_after = now() + Duration::days(365);
    params
}

/// As a leaf should be.
pub fn leaf_params(id: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![uri(id)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.serial_number = Some(SerialNumber::from_slice(&Serial::generate().unwrap().0));
    params.is_ca = IsCa::ExplicitNoCa;
    params.use_authority_key_identifier_extension = true;
    params.not_before = now() - Duration::seconds(30);
    params.not_after = now() + Duration::hours(1);
    params
}

/// A root with an issuing authority, as a CA has them.
pub struct Pki {
    pub root: Authority,
    pub issuing: Authority,
}

impl Pki {
    pub fn new(name: &str) -> Self {
        let root = Authority::root(authority_params(name));
        let issuing = root.subordinate(authority_params(&format!("{name} issuing")));
        Self { root, issuing }
    }

    pub fn svid(&self, id: &str) -> X509Svid {
        self.svid_of(&leaf_params(id))
    }

    pub fn svid_of(&self, params: &CertificateParams) -> X509Svid {
        let (leaf, key) = self.issuing.leaf(params);
        X509Svid::new(vec![leaf, self.issuing.certificate.clone()], key).unwrap()
    }

    pub fn bundle(&self, trust_domain: &str) -> TrustBundle {
        TrustBundle::new(domain(trust_domain), vec![self.root.certificate.clone()]).unwrap()
    }

    /// The CRL of the issuing authority.
    pub fn crl(&self, revoked: &[Serial]) -> Crl {
        Crl::from_der([&*self.issuing.crl(revoked)]).unwrap()
    }

    /// Trust in this root alone.
    pub fn trust(&self, trust_domain: &str) -> TrustState {
        TrustState::new(1, domain(trust_domain), [self.bundle(trust_domain)]).unwrap()
    }
}
