//! What a request asks for. Names are read; harmless wishes of a leaf, which OpenSSL and others add by themselves, are passed over; for
//! anything else the whole request is refused.

use rustls_pki_types::DnsName;
use x509_parser::asn1_rs::Header;
use x509_parser::certification_request::X509CertificationRequestInfo;
use x509_parser::cri_attributes::{ParsedCriAttribute, X509CriAttribute};
use x509_parser::extensions::{ExtendedKeyUsage, GeneralName, ParsedExtension, X509Extension};
use x509_parser::oid_registry::{OID_X509_COMMON_NAME, OID_X509_ORGANIZATION_NAME};
use x509_parser::prelude::FromDer;

use crate::SpiffeId;
use crate::csr::CsrError;

#[derive(Default)]
pub(super) struct AskedNames {
    pub(super) spiffe_id: Option<SpiffeId>,
    pub(super) dns_names: Vec<String>,
}

pub(super) fn asked_names(info: &X509CertificationRequestInfo<'_>) -> Result<AskedNames, CsrError> {
    // The subject never gets into a certificate. Common clients put a name or their organization there; more would be a wish.
    for attribute in info.subject.iter_attributes() {
        if *attribute.attr_type() != OID_X509_COMMON_NAME && *attribute.attr_type() != OID_X509_ORGANIZATION_NAME {
            return asks(format!("the subject attribute {}", attribute.attr_type()));
        }
    }
    let mut names = AskedNames::default();
    match info.attributes() {
        [] => {}
        [attribute] => {
            for extension in extension_request(attribute)? {
                read_extension(extension, &mut names)?;
            }
        }
        _ => return asks("more than one attribute".into()),
    }
    Ok(names)
}

fn extension_request<'a>(attribute: &'a X509CriAttribute<'_>) -> Result<&'a [X509Extension<'a>], CsrError> {
    let ParsedCriAttribute::ExtensionRequest(request) = attribute.parsed_attribute() else {
        return asks(format!("the attribute {}", attribute.oid));
    };
    // The parser stops after the first value of the attribute, so a second one would go unread.
    let whole = Header::from_der(attribute.value).is_ok_and(|(value, header)| header.length().definite() == Ok(value.len()));
    if !whole {
        return Err(CsrError::Malformed("the extension request has more than one value".into()));
    }
    let extensions = &request.extensions;
    if extensions.iter().enumerate().any(|(index, extension)| extensions[..index].iter().any(|earlier| earlier.oid == extension.oid)) {
        return Err(CsrError::Malformed("an extension comes twice".into()));
    }
    Ok(extensions)
}

fn read_extension(extension: &X509Extension<'_>, names: &mut AskedNames) -> Result<(), CsrError> {
    match extension.parsed_extension() {
        ParsedExtension::SubjectAlternativeName(value) => value.general_names.iter().try_for_each(|name| read_name(name, names)),
        ParsedExtension::BasicConstraints(constraints) if constraints.ca => asks("CA:TRUE".into()),
        ParsedExtension::KeyUsage(usage) if usage.key_cert_sign() => asks("the key usage keyCertSign".into()),
        ParsedExtension::KeyUsage(usage) if usage.crl_sign() => asks("the key usage cRLSign".into()),
        ParsedExtension::BasicConstraints(_) | ParsedExtension::KeyUsage(_) => Ok(()),
        ParsedExtension::ExtendedKeyUsage(usage) => check_extended_key_usage(usage),
        ParsedExtension::ParseError { .. } => Err(CsrError::Malformed(format!("the extension {} cannot be read", extension.oid))),
        _ => asks(format!("the extension {}", extension.oid)),
    }
}

fn read_name(name: &GeneralName<'_>, names: &mut AskedNames) -> Result<(), CsrError> {
    match name {
        GeneralName::URI(_) if names.spiffe_id.is_some() => asks("more than one URI".into()),
        GeneralName::URI(uri) => {
            let id = uri.parse().map_err(|error| CsrError::Asks(format!("the URI {uri:?}, which is no SPIFFE ID ({error})")))?;
            names.spiffe_id = Some(id);
            Ok(())
        }
        GeneralName::DNSName(name) => {
            let valid = DnsName::try_from(*name).map_err(|_| CsrError::Asks(format!("the DNS name {name:?}, which is none")))?;
            names.dns_names.push(valid.to_lowercase_owned().as_ref().to_owned());
            Ok(())
        }
        GeneralName::IPAddress(_) => asks("an IP address".into()),
        GeneralName::RFC822Name(_) => asks("an e-mail address".into()),
        _ => asks("a name that is neither a URI nor a DNS name".into()),
    }
}

fn check_extended_key_usage(usage: &ExtendedKeyUsage<'_>) -> Result<(), CsrError> {
    let others = usage.any || usage.code_signing || usage.email_protection || usage.time_stamping || usage.ocsp_signing;
    if others || !usage.other.is_empty() {
        return asks("an extended key usage other than serverAuth and clientAuth".into());
    }
    Ok(())
}

fn asks<T>(what: String) -> Result<T, CsrError> {
    Err(CsrError::Asks(what))
}
