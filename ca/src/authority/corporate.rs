//! What a corporate CA answers to a request for a trust root, held against the rules before anything relies on it.
//!
//! The certificate that it signed is itself the anchor in the bundle, and nothing above it ever is. So verifiers judge it as an anchor, each
//! in its own way (webpki, OpenSSL, Envoy, all without what is above it), and what any of them would refuse is refused here.

use std::time::Duration;

use chancery_identity::{TrustDomain, profile};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::asn1_rs::FromDer;
use x509_parser::certificate::X509Certificate;
use x509_parser::oid_registry::{
    OID_X509_EXT_BASIC_CONSTRAINTS, OID_X509_EXT_EXTENDED_KEY_USAGE, OID_X509_EXT_KEY_USAGE, OID_X509_EXT_NAME_CONSTRAINTS,
    OID_X509_EXT_SUBJECT_ALT_NAME, OID_X509_EXT_SUBJECT_KEY_IDENTIFIER,
};

use super::issuer::is_named_exactly;
use super::{RootStatus, is_past_half};
use crate::keys::PublicKey;
use crate::ledger::acts::RootState;

/// How long before its end a root of a corporate CA is to be asked for anew: such a CA takes its time, and nobody but an operator can ask it.
const ASK_BEFORE: time::Duration = time::Duration::days(90);
/// What to do then.
pub const RENEWAL: &str = "the CA cannot make the next root by itself under a corporate CA: `chancery root prepare --csr FILE`, have it \
     signed, `chancery root prepare --certificate FILE`, then `chancery root rotate`";

/// The critical extensions that every verifier knows.
const KNOWN: [x509_parser::der_parser::Oid<'static>; 4] =
    [OID_X509_EXT_BASIC_CONSTRAINTS, OID_X509_EXT_KEY_USAGE, OID_X509_EXT_EXTENDED_KEY_USAGE, OID_X509_EXT_SUBJECT_ALT_NAME];
/// It has to last for so many issuing certificates, or the next request is due before this one is in use.
const ISSUING_LIFETIMES: u32 = 2;

/// Whether `root`, one of `roots`, is a corporate CA's that ends in time to ask for the next one, and none is on its way.
pub fn is_renewal_due(root: &RootStatus, roots: &[RootStatus], now: OffsetDateTime) -> bool {
    let is_used = matches!(root.state, RootState::Published | RootState::Active);
    let is_next = |next: &RootStatus| matches!(next.state, RootState::Prepared | RootState::Published) && next.not_after > root.not_after;
    let window = ASK_BEFORE.min((root.not_after - root.not_before) / 2);
    root.signed_by.is_some() && is_used && root.not_after - now < window && !roots.iter().any(is_next)
}

/// What an answer is held against.
pub(super) struct Rules<'a> {
    pub(super) trust_domain: &'a TrustDomain,
    /// The key that was requested for.
    pub(super) key: &'a PublicKey,
    pub(super) issuing_lifetime: Duration,
    pub(super) now: OffsetDateTime,
}

impl Rules<'_> {
    /// # Errors
    /// The first rule that `certificate` breaks, and what to ask the corporate CA for.
    pub(super) fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), String> {
        let facts = profile::check_authority(certificate).map_err(|error| error.to_string())?;
        let (_, parsed) = X509Certificate::from_der(certificate).map_err(|error| error.to_string())?;
        if parsed.public_key().raw != self.key.spki {
            return Err("it certifies another key than the one that was requested for".into());
        }
        if let Some(id) = facts.id.filter(|id| *id != self.trust_domain.id()) {
            return Err(format!(
                "its SPIFFE ID is {id}, and this CA's trust domain is {}: leave it out, or sign the request's",
                self.trust_domain
            ));
        }
        check_constraints(&parsed)?;
        check_usage(&parsed)?;
        check_extensions(&parsed)?;
        self.check_names(certificate, &parsed)?;
        self.check_validity(facts.not_before, facts.not_after)
    }

    fn check_names(&self, certificate: &CertificateDer<'_>, parsed: &X509Certificate<'_>) -> Result<(), String> {
        if parsed.issuer() == parsed.subject() {
            return Err("its issuer has the name of its subject, and verifiers would take it for self-signed".into());
        }
        let mut attributes = parsed.subject().iter_rdn().map(|rdn| rdn.iter().count()).peekable();
        if attributes.peek().is_none() {
            return Err("its subject is empty (RFC 5280 §4.1.2.6): sign the request's".into());
        }
        let is_plain = attributes.all(|count| count == 1);
        if !is_plain || !is_named_exactly(certificate, self.key).unwrap_or(false) {
            return Err(format!(
                "its subject ({}) cannot be repeated exactly as the issuer of what it signs: give it one attribute of a type, or sign the request's subject",
                parsed.subject()
            ));
        }
        Ok(())
    }

    fn check_validity(&self, not_before: OffsetDateTime, not_after: OffsetDateTime) -> Result<(), String> {
        let Self { now, .. } = *self;
        if now < not_before {
            return Err(format!("it is valid from {not_before} on, and the clock says {now}: come back then, or set the clock right"));
        }
        let least = self.issuing_lifetime.saturating_mul(ISSUING_LIFETIMES);
        if now + least > not_after {
            let days = least.as_secs_f64() / 86_400.0;
            return Err(format!("it ends at {not_after}: it has to last for two issuing certificates at least, which is {days:.1} days"));
        }
        if is_past_half(now, not_before, not_after) {
            return Err(format!("it is valid from {not_before} to {not_after}, and half of that has passed: have it signed anew"));
        }
        Ok(())
    }
}

fn check_constraints(parsed: &X509Certificate<'_>) -> Result<(), String> {
    let constraints = parsed.basic_constraints().map_err(|error| error.to_string())?.ok_or("it has no basic constraints")?;
    if !constraints.critical {
        return Err("its basic constraints are not critical (RFC 5280 §4.2.1.9)".into());
    }
    if constraints.value.path_len_constraint == Some(0) {
        return Err("its path length is 0, and an issuing certificate has to fit below it: ask for a path length of 1, or for none".into());
    }
    Ok(())
}

fn check_usage(parsed: &X509Certificate<'_>) -> Result<(), String> {
    let usage = parsed.key_usage().map_err(|error| error.to_string())?.ok_or("it has no key usage")?;
    if !usage.value.crl_sign() {
        return Err("its key usage lacks cRLSign (RFC 5280 §4.2.1.3): ask for keyCertSign and cRLSign".into());
    }
    let extended = parsed.extended_key_usage().map_err(|error| error.to_string())?;
    if extended.is_some_and(|usage| !(usage.value.server_auth && usage.value.client_auth)) {
        return Err("its extended key usage lacks serverAuth or clientAuth, which binds what is below it: ask for none, or for both".into());
    }
    Ok(())
}

fn check_extensions(parsed: &X509Certificate<'_>) -> Result<(), String> {
    let has = |oid| parsed.extensions().iter().any(|extension| extension.oid == oid);
    if has(OID_X509_EXT_NAME_CONSTRAINTS) {
        return Err("it has name constraints: webpki judges none of URIs and would refuse every SPIFFE ID below it; ask for none".into());
    }
    if !has(OID_X509_EXT_SUBJECT_KEY_IDENTIFIER) {
        return Err("it has no subject key identifier (RFC 5280 §4.2.1.2)".into());
    }
    match parsed.extensions().iter().find(|extension| extension.critical && !KNOWN.contains(&extension.oid)) {
        Some(unknown) => {
            Err(format!("its extension {} is critical, and verifiers refuse what they do not know: ask for none", unknown.oid))
        }
        None => Ok(()),
    }
}
