//! A certificate in words, for `chancery identity show`.

use std::fmt::Write;

use x509_parser::asn1_rs::Oid;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::objects::{oid_registry, oid2sn};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::api::error::ApiError;

/// Describes a certificate in DER, a line for each thing that it says.
///
/// # Errors
/// If it cannot be read, which for one from the ledger means that the ledger is damaged.
pub(super) fn certificate_text(der: &[u8]) -> Result<String, ApiError> {
    let (_, certificate) =
        X509Certificate::from_der(der).map_err(|error| ApiError::Invalid(format!("the recorded certificate cannot be read: {error}")))?;
    let mut text = String::new();
    let validity = certificate.validity();
    let lines = [
        ("serial", certificate.raw_serial_as_string()),
        ("subject", named(&certificate.subject().to_string())),
        ("issuer", named(&certificate.issuer().to_string())),
        ("not before", validity.not_before.to_string()),
        ("not after", validity.not_after.to_string()),
        ("public key", key(&certificate)),
        ("signature", called(&certificate.signature_algorithm.algorithm)),
    ];
    for (name, value) in lines {
        line(&mut text, name, &value, false);
    }
    for extension in certificate.extensions() {
        if let Some((name, value)) = describe(extension.parsed_extension()) {
            line(&mut text, name, &value, extension.critical);
        }
    }
    Ok(text)
}

fn line(text: &mut String, name: &str, value: &str, critical: bool) {
    let critical = if critical { " (critical)" } else { "" };
    // Writing to a string cannot fail.
    let _infallible = writeln!(text, "{name:<22}{value}{critical}");
}

fn named(name: &str) -> String {
    if name.is_empty() { "(empty)".into() } else { name.into() }
}

fn key(certificate: &X509Certificate<'_>) -> String {
    let spki = certificate.public_key();
    let bits = spki.parsed().map_or(0, |key| key.key_size());
    format!("{} ({bits} bits)", called(&spki.algorithm.algorithm))
}

/// By its name, as far as that is known.
fn called(algorithm: &Oid<'_>) -> String {
    oid2sn(algorithm, oid_registry()).map_or_else(|_| algorithm.to_id_string(), str::to_owned)
}

fn describe(extension: &ParsedExtension<'_>) -> Option<(&'static str, String)> {
    Some(match extension {
        ParsedExtension::SubjectAlternativeName(names) => {
            ("alternative names", names.general_names.iter().map(name).collect::<Vec<_>>().join(", "))
        }
        ParsedExtension::KeyUsage(usage) => ("key usage", usage.to_string()),
        ParsedExtension::ExtendedKeyUsage(usage) => {
            let uses = [(usage.server_auth, "server authentication"), (usage.client_auth, "client authentication")];
            ("extended key usage", uses.iter().filter(|(is, _)| *is).map(|(_, name)| *name).collect::<Vec<_>>().join(", "))
        }
        ParsedExtension::BasicConstraints(constraints) => ("basic constraints", format!("CA: {}", constraints.ca)),
        ParsedExtension::AuthorityKeyIdentifier(id) => ("authority key", hex::encode(id.key_identifier.as_ref()?.0)),
        ParsedExtension::SubjectKeyIdentifier(id) => ("subject key", hex::encode(id.0)),
        _ => return None,
    })
}

fn name(name: &GeneralName<'_>) -> String {
    match name {
        GeneralName::URI(uri) => format!("URI:{uri}"),
        GeneralName::DNSName(dns) => format!("DNS:{dns}"),
        other => format!("{other:?}"),
    }
}
