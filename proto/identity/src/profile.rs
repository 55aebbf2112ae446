//! What a certificate must look like to be an X509-SVID, or an authority that may issue some.
//!
//! Only the certificate itself is judged here, by the X509-SVID standard; who signed it and when it is valid is for the callers. The CA
//! holds every leaf against this after building it and before releasing it, the agent what it was given, and TLS what a peer shows.

use rustls_pki_types::{CertificateDer, SubjectPublicKeyInfoDer};
use time::OffsetDateTime;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{BasicConstraints, ExtendedKeyUsage, GeneralName, KeyUsage, ParsedExtension, SubjectAlternativeName};
use x509_parser::oid_registry::{
    OID_X509_EXT_BASIC_CONSTRAINTS, OID_X509_EXT_EXTENDED_KEY_USAGE, OID_X509_EXT_KEY_USAGE, OID_X509_EXT_SUBJECT_ALT_NAME,
};
use x509_parser::prelude::FromDer;

use crate::{Serial, SpiffeId, SvidError};

/// What a leaf says, once it was found to obey the rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeafFacts {
    /// Its one URI SAN.
    pub id: SpiffeId,
    /// Its serial number.
    pub serial: Serial,
    /// Its validity begins.
    pub not_before: OffsetDateTime,
    /// Its validity ends.
    pub not_after: OffsetDateTime,
    /// Its DNS SANs, in order.
    pub dns_names: Vec<String>,
}

/// What an authority's certificate says, once it was found to obey the rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthorityFacts {
    /// The trust domain's ID, if the certificate carries it (X509-SVID §3.2).
    pub id: Option<SpiffeId>,
    /// Its validity begins.
    pub not_before: OffsetDateTime,
    /// Its validity ends.
    pub not_after: OffsetDateTime,
}

/// Holds a leaf against the X509-SVID standard.
///
/// # Errors
/// The first rule that it breaks, with its section.
pub fn check_leaf(leaf: &CertificateDer<'_>) -> Result<LeafFacts, SvidError> {
    check(leaf).map(|(facts, _)| facts)
}

/// Like [`check_leaf`], and that `public_key` (`SubjectPublicKeyInfo`, DER) is what the leaf certifies.
///
/// # Errors
/// Likewise, or that it is another key.
pub fn check_leaf_of(leaf: &CertificateDer<'_>, public_key: &[u8]) -> Result<LeafFacts, SvidError> {
    let (facts, certified) = check(leaf)?;
    if *certified == *public_key { Ok(facts) } else { Err(SvidError::Malformed("its public key is another".into())) }
}

/// What it says, and its public key.
fn check<'a>(leaf: &'a CertificateDer<'_>) -> Result<(LeafFacts, SubjectPublicKeyInfoDer<'a>), SvidError> {
    let certificate = parse(leaf)?;
    // A second, stricter reader: DER only, version 3, no extension twice, no critical one that it does not know.
    let strict = webpki::EndEntityCert::try_from(leaf).map_err(|error| SvidError::Malformed(error.to_string()))?;
    let extensions = Extensions::of(&certificate)?;

    if let Some((_, constraints)) = extensions.basic_constraints {
        if constraints.ca {
            return broken("§4.1", "a leaf's basic constraints say that it is a CA");
        }
        if constraints.path_len_constraint.is_some() {
            return broken("§4.1", "a leaf has a path length constraint");
        }
    }
    check_leaf_usage(&extensions)?;
    let Some((critical, names)) = extensions.names else {
        return broken("§2", "a leaf has no subject alternative name");
    };
    if !critical && certificate.subject().iter_rdn().next().is_none() {
        return broken("§3.1", "the subject is empty, and the subject alternative name is not critical");
    }
    let Some(id) = spiffe_id(names)? else {
        return broken("§2", "a leaf has no URI among its subject alternative names");
    };
    if id.path().is_empty() {
        return broken("§3.1", "a leaf's SPIFFE ID has no path");
    }
    let dns_names =
        names.general_names.iter().filter_map(|name| if let GeneralName::DNSName(name) = name { Some((*name).to_owned()) } else { None });
    let facts = LeafFacts {
        id,
        serial: Serial::from_der_integer_bytes(certificate.raw_serial())?,
        not_before: certificate.validity().not_before.to_datetime(),
        not_after: certificate.validity().not_after.to_datetime(),
        dns_names: dns_names.collect(),
    };
    Ok((facts, strict.subject_public_key_info()))
}

/// Holds a root's or an issuing certificate against the X509-SVID standard.
///
/// # Errors
/// The first rule that it breaks, with its section.
pub fn check_authority(authority: &CertificateDer<'_>) -> Result<AuthorityFacts, SvidError> {
    let certificate = parse(authority)?;
    webpki::anchor_from_trusted_cert(authority).map_err(|error| SvidError::Malformed(error.to_string()))?;
    let extensions = Extensions::of(&certificate)?;

    if !extensions.basic_constraints.is_some_and(|(_, constraints)| constraints.ca) {
        return broken("§4.1", "the basic constraints do not say that it is a CA");
    }
    match extensions.key_usage {
        None => return broken("§4.3", "the key usage is missing"),
        Some((false, _)) => return broken("§4.3", "the key usage is not critical"),
        Some((true, usage)) if !usage.key_cert_sign() => return broken("§4.3", "an authority's key usage lacks keyCertSign"),
        Some((true, _)) => {}
    }
    let id = extensions.names.map(|(_, names)| spiffe_id(names)).transpose()?.flatten();
    if id.as_ref().is_some_and(|id| !id.path().is_empty()) {
        return broken("§3.2", "an authority's SPIFFE ID has a path");
    }
    Ok(AuthorityFacts {
        id,
        not_before: certificate.validity().not_before.to_datetime(),
        not_after: certificate.validity().not_after.to_datetime(),
    })
}

fn check_leaf_usage(extensions: &Extensions<'_>) -> Result<(), SvidError> {
    match extensions.key_usage {
        None => return broken("§4.3", "the key usage is missing"),
        Some((false, _)) => return broken("§4.3", "the key usage is not critical"),
        Some((true, usage)) if !usage.digital_signature() => return broken("§4.3", "a leaf's key usage lacks digitalSignature"),
        Some((true, usage)) if usage.key_cert_sign() => return broken("§4.3", "a leaf's key usage has keyCertSign"),
        Some((true, usage)) if usage.crl_sign() => return broken("§4.3", "a leaf's key usage has cRLSign"),
        Some((true, _)) => {}
    }
    match extensions.extended_key_usage {
        Some((_, usage)) if !(usage.server_auth && usage.client_auth) => {
            broken("§4.4", "a leaf's extended key usage lacks serverAuth or clientAuth")
        }
        _ => Ok(()),
    }
}

/// The one URI among the names, which must be a SPIFFE ID; nothing if there is no URI.
fn spiffe_id(names: &SubjectAlternativeName<'_>) -> Result<Option<SpiffeId>, SvidError> {
    let mut uri = None;
    for name in &names.general_names {
        match name {
            GeneralName::URI(_) if uri.is_some() => return broken("§2", "more than one URI among the subject alternative names"),
            GeneralName::URI(text) => uri = Some(*text),
            GeneralName::Invalid(..) => return broken("§2", "a subject alternative name that cannot be read"),
            _ => {}
        }
    }
    uri.map(|text| {
        text.parse().map_err(|error| SvidError::Profile { rule: format!("the URI {text:?} is no SPIFFE ID: {error}"), section: "§2" })
    })
    .transpose()
}

/// The extensions that the standard speaks of, each with whether it is critical.
struct Extensions<'a> {
    basic_constraints: Option<(bool, &'a BasicConstraints)>,
    key_usage: Option<(bool, &'a KeyUsage)>,
    extended_key_usage: Option<(bool, &'a ExtendedKeyUsage<'a>)>,
    names: Option<(bool, &'a SubjectAlternativeName<'a>)>,
}

impl<'a> Extensions<'a> {
    fn of(certificate: &'a X509Certificate<'_>) -> Result<Self, SvidError> {
        macro_rules! find {
            ($oid:ident, $variant:ident) => {
                match certificate.get_extension_unique(&$oid) {
                    Err(_) => return Err(SvidError::Malformed("an extension comes twice".into())),
                    Ok(None) => None,
                    Ok(Some(extension)) => match extension.parsed_extension() {
                        ParsedExtension::$variant(value) => Some((extension.critical, value)),
                        _ => return Err(SvidError::Malformed(concat!("unreadable extension ", stringify!($variant)).into())),
                    },
                }
            };
        }
        Ok(Self {
            basic_constraints: find!(OID_X509_EXT_BASIC_CONSTRAINTS, BasicConstraints),
            key_usage: find!(OID_X509_EXT_KEY_USAGE, KeyUsage),
            extended_key_usage: find!(OID_X509_EXT_EXTENDED_KEY_USAGE, ExtendedKeyUsage),
            names: find!(OID_X509_EXT_SUBJECT_ALT_NAME, SubjectAlternativeName),
        })
    }
}

fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, SvidError> {
    let (rest, certificate) = X509Certificate::from_der(der).map_err(|error| SvidError::Malformed(error.to_string()))?;
    if !rest.is_empty() {
        return Err(SvidError::Malformed(format!("{} bytes after its end", rest.len())));
    }
    Ok(certificate)
}

fn broken<T>(section: &'static str, rule: &str) -> Result<T, SvidError> {
    Err(SvidError::Profile { rule: rule.to_owned(), section })
}
