//! A root that signs.

use chancery_identity::{Crl, Fingerprint, PrivateKey, Serial, TrustBundle, TrustState, X509Svid};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls_pki_types::CertificateDer;
use time::{Duration, OffsetDateTime};
use zeroize::Zeroizing;

use super::trust_domain;

pub struct Pki {
    pub root: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Pki {
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = OffsetDateTime::now_utc() - Duration::days(1);
        params.not_after = OffsetDateTime::now_utc() + Duration::days(3650);
        let key = KeyPair::generate().unwrap();
        let root = params.self_signed(&key).unwrap().der().clone();
        Self { root, issuer: Issuer::new(params, key) }
    }

    /// Trust in this root alone.
    pub fn trust(&self, sequence: u64) -> TrustState {
        self.trust_with(sequence, &[])
    }

    /// Trust in this root and others.
    pub fn trust_with(&self, sequence: u64, others: &[&Self]) -> TrustState {
        let roots = std::iter::once(self).chain(others.iter().copied()).map(|pki| pki.root.clone()).collect();
        TrustState::new(sequence, trust_domain(), [TrustBundle::new(trust_domain(), roots).unwrap()]).unwrap()
    }

    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.root)
    }

    /// A leaf for the key in a CSR.
    pub fn sign(&self, id: &str, public_key: &[u8], from: OffsetDateTime, until: OffsetDateTime) -> CertificateDer<'static> {
        let key = SubjectPublicKeyInfo::from_der(public_key).unwrap();
        leaf(id, from, until).signed_by(&key, &self.issuer).unwrap().der().clone()
    }

    /// A CRL of what this root issued.
    pub fn crl(&self, revoked: &[Serial]) -> Crl {
        let now = OffsetDateTime::now_utc();
        let entry = |serial: &Serial| RevokedCertParams {
            serial_number: SerialNumber::from_slice(&serial.0),
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: now - Duration::hours(1),
            next_update: now + Duration::days(1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.iter().map(entry).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        Crl::from_der([&**params.signed_by(&self.issuer).unwrap().der()]).unwrap()
    }

    /// The CA's own certificate.
    pub fn server(&self) -> X509Svid {
        let key = KeyPair::generate().unwrap();
        let (from, until) = (OffsetDateTime::now_utc() - Duration::days(1), OffsetDateTime::now_utc() + Duration::days(3000));
        let certificate = leaf("spiffe://example.org/chancery/ca", from, until).signed_by(&key, &self.issuer).unwrap();
        X509Svid::new(vec![certificate.der().clone()], PrivateKey::from_pkcs8(Zeroizing::new(key.serialize_der()))).unwrap()
    }
}

fn leaf(id: &str, from: OffsetDateTime, until: OffsetDateTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.serial_number = Some(SerialNumber::from_slice(&Serial::generate().unwrap().0));
    params.use_authority_key_identifier_extension = true;
    params.not_before = from;
    params.not_after = until;
    params
}
