//! What the three kinds of certificates, and CRLs, say: data, without a key or a clock.
//!
//! | | trust root | issuing certificate | leaf |
//! |---|---|---|---|
//! | subject | `Chancery trust root …` | `Chancery issuing certificate …` | empty |
//! | subject alternative name | the trust domain's ID | the trust domain's ID | critical: SPIFFE ID, DNS names |
//! | basic constraints (critical) | CA, path length 1 | CA, path length 0 | no CA |
//! | key usage (critical) | keyCertSign, cRLSign | keyCertSign, cRLSign | digitalSignature |
//! | extended key usage | | | serverAuth, clientAuth |
//!
//! All carry a subject key identifier, those that another signed an authority key identifier. There are no name constraints: webpki cannot
//! judge those of URIs, and would refuse every leaf.

use chancery_identity::{Serial, TrustDomain};
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyIdMethod, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
};
use time::{Duration, OffsetDateTime};

use super::crl::Listed;
use super::issuer::{IssuerError, LeafRequest};

/// The longest common name, in characters (RFC 5280 appendix A.1, `ub-common-name`).
const MAX_COMMON_NAME: usize = 64;
/// How far CRLs reach back at least, for peers whose clocks are behind.
const CRL_BACKDATE: Duration = Duration::hours(1);
/// How long CRLs outlive their issuing certificate.
const CRL_OUTLIVES: Duration = Duration::days(1);

type Validity = (OffsetDateTime, OffsetDateTime);

pub(super) fn root(
    trust_domain: &TrustDomain,
    development: bool,
    serial: Serial,
    validity: Validity,
) -> Result<CertificateParams, IssuerError> {
    let (year, month) = (validity.0.year(), u8::from(validity.0.month()));
    let kind = if development { "Chancery DEVELOPMENT trust root" } else { "Chancery trust root" };
    // Part of the serial, so that no two have the same name: a verifier that looks roots up by name finds the right one.
    let number = hex::encode(&serial.0[..4]);
    authority(kind, trust_domain, &format!("{year}-{month:02} {number}"), 1, serial, validity)
}

pub(super) fn issuing(trust_domain: &TrustDomain, serial: Serial, validity: Validity) -> Result<CertificateParams, IssuerError> {
    // Part of the serial, so that no two have the same name: a verifier that looks issuers up by name finds the right one.
    let number = hex::encode(&serial.0[..4]);
    let mut params = authority("Chancery issuing certificate", trust_domain, &number, 0, serial, validity)?;
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

pub(super) fn leaf(leaf: &LeafRequest<'_>, serial: Serial, validity: Validity) -> Result<CertificateParams, IssuerError> {
    let mut params = common(serial, validity);
    // Empty, which makes the subject alternative name critical (X509-SVID §3.1).
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names.push(uri(leaf.id.as_str())?);
    for name in leaf.dns_names {
        params.subject_alt_names.push(SanType::DnsName(ia5(name)?));
    }
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// The CRL of an issuing certificate that is valid from `not_before` to `not_after`: valid at least as long, so that nobody is locked out by
/// a CA that is away, or by a clock. The key identifier is still to be set.
pub(super) fn crl<'l>(
    number: u64,
    revoked: impl IntoIterator<Item = (&'l Serial, &'l Listed)>,
    now: OffsetDateTime,
    not_before: OffsetDateTime,
    not_after: OffsetDateTime,
) -> CertificateRevocationListParams {
    let entry = |(serial, listed): (&Serial, &Listed)| RevokedCertParams {
        serial_number: SerialNumber::from_slice(&serial.0),
        revocation_time: whole_seconds(listed.since),
        reason_code: None,
        invalidity_date: None,
    };
    CertificateRevocationListParams {
        this_update: whole_seconds((now - CRL_BACKDATE).min(not_before)),
        next_update: not_after + CRL_OUTLIVES,
        crl_number: SerialNumber::from(number),
        issuing_distribution_point: None,
        revoked_certs: revoked.into_iter().map(entry).collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    }
}

fn whole_seconds(moment: OffsetDateTime) -> OffsetDateTime {
    moment.replace_nanosecond(0).unwrap_or(moment)
}

fn authority(
    kind: &str,
    trust_domain: &TrustDomain,
    distinction: &str,
    path_length: u8,
    serial: Serial,
    validity: Validity,
) -> Result<CertificateParams, IssuerError> {
    let room = MAX_COMMON_NAME.saturating_sub(kind.len() + distinction.len() + 2);
    // ASCII, so bytes are characters; the whole trust domain stands in the URI.
    let domain = trust_domain.as_str();
    let domain = &domain[..domain.len().min(room)];
    let mut params = common(serial, validity);
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, format!("{kind} {domain} {distinction}"));
    params.subject_alt_names.push(uri(trust_domain.id().as_str())?);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_length));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn common(serial: Serial, (not_before, not_after): Validity) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.serial_number = Some(SerialNumber::from_slice(&serial.0));
    params.not_before = not_before;
    params.not_after = not_after;
    params
}

fn uri(text: &str) -> Result<SanType, IssuerError> {
    Ok(SanType::URI(ia5(text)?))
}

fn ia5(text: &str) -> Result<Ia5String, IssuerError> {
    Ia5String::try_from(text).map_err(|error| IssuerError::Encoding(error.to_string()))
}
