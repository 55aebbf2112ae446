//! What a recorded certificate says of itself.
//!
//! Reads without judging: the certificate was checked against the profile before it was released, and one that was issued under an older
//! profile must stay readable.

use std::str::FromStr;

use chancery_identity::{Serial, SpiffeId};
use time::OffsetDateTime;
use x509_parser::certificate::X509CertificateParser;
use x509_parser::extensions::{GeneralName, SubjectAlternativeName};
use x509_parser::nom::Parser;
use x509_parser::oid_registry::OID_X509_EXT_SUBJECT_ALT_NAME;
use x509_parser::prelude::FromDer;

use super::entry::EntryError;

/// The facts of an issued certificate that queries are about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Whose it is.
    pub spiffe_id: SpiffeId,
    /// Its serial number.
    pub serial: Serial,
    /// Its validity begins.
    pub not_before: OffsetDateTime,
    /// Its validity ends.
    pub not_after: OffsetDateTime,
    /// The DNS names that it carries beside the SPIFFE ID.
    pub dns_names: Vec<String>,
}

impl Leaf {
    /// Reads a certificate's DER.
    pub(super) fn read(der: &[u8]) -> Result<Self, EntryError> {
        let mut dns_names = Vec::new();
        let mut spiffe_id = None;
        let (serial, not_before, not_after) = visit(der, |name| match name {
            GeneralName::URI(uri) => spiffe_id = Some(SpiffeId::from_str(uri)),
            GeneralName::DNSName(name) => dns_names.push((*name).to_owned()),
            _ => {}
        })?;
        let spiffe_id = spiffe_id.ok_or_else(|| unreadable("has no URI name"))?.map_err(|e| unreadable(&e.to_string()))?;
        Ok(Self { spiffe_id, serial, not_before, not_after, dns_names })
    }

    /// Serial and SPIFFE ID alone, which is all that the index needs.
    pub(super) fn read_names(der: &[u8]) -> Result<(Serial, String), EntryError> {
        let mut spiffe_id = None;
        let (serial, ..) = visit(der, |name| {
            if let GeneralName::URI(uri) = name {
                spiffe_id = Some((*uri).to_owned());
            }
        })?;
        Ok((serial, spiffe_id.ok_or_else(|| unreadable("has no URI name"))?))
    }
}

fn visit(der: &[u8], mut name: impl FnMut(&GeneralName<'_>)) -> Result<(Serial, OffsetDateTime, OffsetDateTime), EntryError> {
    let (_, certificate) =
        X509CertificateParser::new().with_deep_parse_extensions(false).parse(der).map_err(|e| unreadable(&e.to_string()))?;
    let serial = certificate.raw_serial().try_into().map_err(|_| unreadable("has a serial number that has not 16 bytes"))?;
    let alternative_names = certificate.extensions().iter().find(|extension| extension.oid == OID_X509_EXT_SUBJECT_ALT_NAME);
    if let Some(extension) = alternative_names {
        let (_, names) = SubjectAlternativeName::from_der(extension.value).map_err(|e| unreadable(&e.to_string()))?;
        names.general_names.iter().for_each(&mut name);
    }
    let validity = certificate.validity();
    Ok((Serial(serial), validity.not_before.to_datetime(), validity.not_after.to_datetime()))
}

fn unreadable(problem: &str) -> EntryError {
    EntryError::Field { field: "certificate", problem: format!("cannot be read: {problem}") }
}
