//! Trust bundles: which authorities speak for which trust domain.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use crate::profile::check_authority;
use crate::{Crl, TrustDomain, pem};

/// How many authorities a bundle may have. A rotation needs two or three.
const MAX_AUTHORITIES: usize = 64;

/// The SHA-256 of a certificate's DER: names a trust root in configurations and logs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// Of this certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, certificate);
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest.as_ref());
        Self(bytes)
    }
}

/// Why a bundle is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    /// No authority: an empty bundle is never handed on, since Envoy would let everybody in.
    #[error("the bundle of {0} has no X.509 authority")]
    Empty(TrustDomain),
    /// An authority that may not be one.
    #[error("authority {number} of the bundle of {trust_domain}: {problem}")]
    Authority {
        /// Whose bundle.
        trust_domain: TrustDomain,
        /// Counted from 1.
        number: usize,
        /// Which rule it breaks.
        problem: String,
    },
    /// Not what was expected at this place.
    #[error("{0}")]
    Malformed(String),
    /// The state's own trust domain has no bundle in it.
    #[error("the trust state has no bundle for its own trust domain {0}")]
    OwnMissing(TrustDomain),
}

/// The authorities of one trust domain. A value that exists holds at least one X.509 authority, each a CA certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustBundle {
    trust_domain: TrustDomain,
    x509_authorities: Vec<CertificateDer<'static>>,
    jwt_authorities: Vec<String>,
    refresh_hint: Option<Duration>,
}

/// The full map of trust at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustState {
    /// Grows with every change; a smaller one is refused.
    pub sequence: u64,
    /// The trust domain that the CA issues for.
    pub trust_domain: TrustDomain,
    /// By trust domain; the own one is always among them.
    bundles: BTreeMap<TrustDomain, TrustBundle>,
    /// What is revoked; none before anything was, and after all of it has expired.
    pub crl: Option<Crl>,
    /// Roots that must never come back.
    pub distrusted: Vec<Fingerprint>,
}

impl TrustBundle {
    /// A bundle of these authorities (DER), in this order, duplicates dropped.
    ///
    /// # Errors
    /// If there is none, or one that is no CA certificate.
    pub fn new(trust_domain: TrustDomain, x509_authorities: Vec<CertificateDer<'static>>) -> Result<Self, BundleError> {
        let mut distinct: Vec<CertificateDer<'static>> = Vec::with_capacity(x509_authorities.len().min(MAX_AUTHORITIES));
        for (index, authority) in x509_authorities.into_iter().enumerate() {
            let refused = |problem: String| BundleError::Authority { trust_domain: trust_domain.clone(), number: index + 1, problem };
            let facts = check_authority(&authority).map_err(|error| refused(error.to_string()))?;
            if let Some(id) = facts.id.filter(|id| *id.trust_domain() != trust_domain) {
                return Err(refused(format!("it belongs to another trust domain, {id}")));
            }
            if distinct.contains(&authority) {
                continue;
            }
            if distinct.len() == MAX_AUTHORITIES {
                return Err(refused(format!("a bundle has at most {MAX_AUTHORITIES}")));
            }
            distinct.push(authority);
        }
        if distinct.is_empty() {
            return Err(BundleError::Empty(trust_domain));
        }
        Ok(Self { trust_domain, x509_authorities: distinct, jwt_authorities: Vec::new(), refresh_hint: None })
    }

    /// Reads PEM certificates. Text and blocks of another kind between them are passed over.
    pub fn from_pem(trust_domain: TrustDomain, pem: &[u8]) -> Result<Self, BundleError> {
        let authorities = CertificateDer::pem_slice_iter(pem)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| BundleError::Malformed(format!("the bundle of {trust_domain} is no PEM: {error}")))?;
        Self::new(trust_domain, authorities)
    }

    /// With these JWKs (JSON) in the place of its JWT authorities.
    #[must_use]
    pub fn with_jwt_authorities(mut self, jwt_authorities: Vec<String>) -> Self {
        self.jwt_authorities = jwt_authorities;
        self
    }

    /// With this refresh hint.
    #[must_use]
    pub fn with_refresh_hint(mut self, refresh_hint: Option<Duration>) -> Self {
        self.refresh_hint = refresh_hint;
        self
    }

    /// Whose bundle it is.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// DER; never empty.
    pub fn x509_authorities(&self) -> &[CertificateDer<'static>] {
        &self.x509_authorities
    }

    /// JWKs as JSON; may be empty.
    pub fn jwt_authorities(&self) -> &[String] {
        &self.jwt_authorities
    }

    /// How often a holder should look for a newer one.
    pub fn refresh_hint(&self) -> Option<Duration> {
        self.refresh_hint
    }

    /// The X.509 authorities as PEM, one after the other.
    pub fn to_pem(&self) -> String {
        let mut text = String::new();
        for authority in &self.x509_authorities {
            pem::push(&mut text, "CERTIFICATE", authority);
        }
        text
    }
}

impl TrustState {
    /// A state of these bundles.
    ///
    /// # Errors
    /// If the own trust domain's bundle is missing, or a trust domain comes twice.
    pub fn new(sequence: u64, trust_domain: TrustDomain, bundles: impl IntoIterator<Item = TrustBundle>) -> Result<Self, BundleError> {
        let mut by_domain = BTreeMap::new();
        for bundle in bundles {
            if let Some(twice) = by_domain.insert(bundle.trust_domain.clone(), bundle) {
                return Err(BundleError::Malformed(format!("the trust domain {} has two bundles", twice.trust_domain)));
            }
        }
        if !by_domain.contains_key(&trust_domain) {
            return Err(BundleError::OwnMissing(trust_domain));
        }
        Ok(Self { sequence, trust_domain, bundles: by_domain, crl: None, distrusted: Vec::new() })
    }

    /// With these CRLs.
    #[must_use]
    pub fn with_crl(mut self, crl: Option<Crl>) -> Self {
        self.crl = crl;
        self
    }

    /// With these roots distrusted: nothing verifies against them any more, whatever the bundles say.
    #[must_use]
    pub fn with_distrusted(mut self, distrusted: Vec<Fingerprint>) -> Self {
        self.distrusted = distrusted;
        self
    }

    /// The bundle of the own trust domain.
    pub fn own(&self) -> &TrustBundle {
        &self.bundles[&self.trust_domain]
    }

    /// The bundle of `trust_domain`, if it is trusted at all.
    pub fn bundle(&self, trust_domain: &TrustDomain) -> Option<&TrustBundle> {
        self.bundles.get(trust_domain)
    }

    /// The authorities of `bundle` that certificates may be verified against: all but the distrusted.
    pub fn anchors<'a>(&self, bundle: &'a TrustBundle) -> impl Iterator<Item = &'a CertificateDer<'static>> {
        bundle
            .x509_authorities
            .iter()
            .filter(|authority| self.distrusted.is_empty() || !self.distrusted.contains(&Fingerprint::of(authority)))
    }

    /// All bundles, by trust domain.
    pub fn bundles(&self) -> impl Iterator<Item = &TrustBundle> {
        self.bundles.values()
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = BundleError;

    /// 64 hexadecimal digits; colons between them, as OpenSSL prints them, are allowed.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text.replace(':', ""), &mut bytes)
            .map_err(|_| BundleError::Malformed("a fingerprint is the SHA-256 of a certificate: 64 hexadecimal digits".into()))?;
        Ok(Self(bytes))
    }
}
