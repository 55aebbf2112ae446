//! X509-SVIDs: a chain with its key, checked against the standard and against a bundle before anybody serves it.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use time::OffsetDateTime;
use zeroize::Zeroizing;

use crate::chain::{self, Role};
use crate::profile::{LeafFacts, check_authority, check_leaf};
use crate::{Crl, SpiffeId, TrustState, pem};

/// A certificate's serial number: 16 bytes, the first one neither zero nor with its high bit set.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Serial(pub [u8; 16]);

/// A private key as PKCS#8 DER. Zeroized when dropped; `Debug` shows nothing of it.
#[derive(Clone)]
pub struct PrivateKey(Arc<Zeroizing<Vec<u8>>>);

/// Why a chain is no SVID that may be served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SvidError {
    /// A rule of the X509-SVID standard; `section` says which.
    #[error("not an X509-SVID: {rule} (X509-SVID {section})")]
    Profile {
        /// What was violated.
        rule: String,
        /// `§4.3` …
        section: &'static str,
    },
    /// It can't be read at all.
    #[error("cannot read the certificate: {0}")]
    Malformed(String),
    /// A key of no supported kind.
    #[error("cannot read the private key of {0}: it must be PKCS#8 of an ECDSA, Ed25519 or RSA key")]
    Key(SpiffeId),
    /// No random numbers for a new serial number.
    #[error("the random number generator failed")]
    Random,
    /// The key is not the certificate's.
    #[error("the private key does not belong to the certificate of {0}")]
    KeyMismatch(SpiffeId),
    /// No bundle for its trust domain.
    #[error("no trust bundle for the trust domain of {0}")]
    UnknownTrustDomain(SpiffeId),
    /// The chain does not lead to the bundle.
    #[error("the certificate of {id} does not verify against the trust bundle: {problem}")]
    Chain {
        /// Whose.
        id: SpiffeId,
        /// What the verifier said.
        problem: String,
    },
    /// Before its time, by this machine's clock.
    #[error("the certificate of {id} is not valid before {not_before}: is a clock wrong?")]
    NotYetValid {
        /// Whose.
        id: SpiffeId,
        /// From then on.
        not_before: OffsetDateTime,
    },
    /// Past its time.
    #[error("the certificate of {id} expired at {not_after}")]
    Expired {
        /// Whose.
        id: SpiffeId,
        /// Until then.
        not_after: OffsetDateTime,
    },
}

/// What the leaf of `chain` (leaf first, without the root) says, for who does not have its key.
///
/// # Errors
/// If a certificate breaks a rule of the X509-SVID standard, has expired at `now`, or the chain does not lead to `trust`. Whether it is revoked
/// is not asked.
pub fn verify_chain(chain: &[CertificateDer<'_>], trust: &TrustState, now: OffsetDateTime) -> Result<LeafFacts, SvidError> {
    let facts = read_chain(chain)?;
    chain::check_dates(&facts.id, facts.not_before, facts.not_after, now)?;
    check_path(&facts.id, chain, trust, None, now)?;
    Ok(facts)
}

fn read_chain(chain: &[CertificateDer<'_>]) -> Result<LeafFacts, SvidError> {
    let Some((leaf, authorities)) = chain.split_first() else {
        return Err(SvidError::Malformed("the chain is empty".into()));
    };
    if chain.len() > chain::MAX_CHAIN {
        return Err(SvidError::Malformed(format!("the chain has {} certificates; at most {} are read", chain.len(), chain::MAX_CHAIN)));
    }
    let facts = check_leaf(leaf)?;
    for authority in authorities {
        check_authority(authority)?;
    }
    Ok(facts)
}

/// `chain` was read before.
fn check_path(
    id: &SpiffeId,
    chain: &[CertificateDer<'_>],
    trust: &TrustState,
    crl: Option<&Crl>,
    now: OffsetDateTime,
) -> Result<(), SvidError> {
    let Some(bundle) = trust.bundle(id.trust_domain()) else {
        return Err(SvidError::UnknownTrustDomain(id.clone()));
    };
    for role in [Role::Server, Role::Client] {
        chain::verify(&chain[0], &chain[1..], trust.anchors(bundle), crl, now, role)
            .map_err(|problem| SvidError::Chain { id: id.clone(), problem })?;
    }
    Ok(())
}

/// An X509-SVID with its private key. A value that exists obeys the X509-SVID standard and its key matches; whether it is trusted and in
/// time is what [`X509Svid::verify`] tells, for a given bundle and moment.
#[derive(Clone, Debug)]
pub struct X509Svid {
    id: SpiffeId,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKey,
    serial: Serial,
    not_before: OffsetDateTime,
    not_after: OffsetDateTime,
}

impl X509Svid {
    /// Reads a chain (leaf first, without the root) and its key.
    ///
    /// # Errors
    /// If a certificate breaks a rule of the X509-SVID standard, or the key is another's.
    pub fn new(chain: Vec<CertificateDer<'static>>, key: PrivateKey) -> Result<Self, SvidError> {
        let LeafFacts { id, serial, not_before, not_after, .. } = read_chain(&chain)?;
        let signing = key.signing_key().ok_or_else(|| SvidError::Key(id.clone()))?;
        if CertifiedKey::new(vec![chain[0].clone()], signing).keys_match().is_err() {
            return Err(SvidError::KeyMismatch(id));
        }
        Ok(Self { id, chain, key, serial, not_before, not_after })
    }

    /// Whether it may be served at `now` to peers that hold `trust`: none that has expired, and none that is revoked.
    pub fn verify(&self, trust: &TrustState, now: OffsetDateTime) -> Result<(), SvidError> {
        chain::check_dates(&self.id, self.not_before, self.not_after, now)?;
        check_path(&self.id, &self.chain, trust, trust.crl.as_ref(), now)
    }

    /// Whose it is.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// DER, leaf first, without the root.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// The chain as PEM.
    pub fn chain_pem(&self) -> String {
        let mut text = String::new();
        for certificate in &self.chain {
            pem::push(&mut text, "CERTIFICATE", certificate);
        }
        text
    }

    /// The leaf's key.
    pub fn key(&self) -> &PrivateKey {
        &self.key
    }

    /// The leaf's serial number.
    pub fn serial(&self) -> Serial {
        self.serial
    }

    /// The leaf's validity begins.
    pub fn not_before(&self) -> OffsetDateTime {
        self.not_before
    }

    /// The leaf's validity ends.
    pub fn not_after(&self) -> OffsetDateTime {
        self.not_after
    }
}

impl PrivateKey {
    /// Takes PKCS#8 DER over.
    pub fn from_pkcs8(der: Zeroizing<Vec<u8>>) -> Self {
        Self(Arc::new(der))
    }

    /// PKCS#8 DER. The caller keeps it from logs and files wider than 0600.
    pub fn secret_pkcs8(&self) -> &[u8] {
        &self.0
    }

    /// PKCS#8 PEM, zeroized when dropped.
    pub fn secret_pem(&self) -> Zeroizing<String> {
        let mut text = Zeroizing::new(String::with_capacity(pem::encoded_len("PRIVATE KEY", self.0.len())));
        pem::push(&mut text, "PRIVATE KEY", &self.0);
        text
    }

    /// The key as rustls signs with it; nothing if it is of no supported kind.
    pub(crate) fn signing_key(&self) -> Option<Arc<dyn rustls::sign::SigningKey>> {
        let der = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(self.secret_pkcs8()));
        rustls::crypto::aws_lc_rs::sign::any_supported_type(&der).ok()
    }
}

impl Serial {
    /// A new one: 127 random bits, of which the first byte is drawn again while it is zero, so that 126.99 bits of entropy remain.
    ///
    /// # Errors
    /// Only if the random number generator fails.
    pub fn generate() -> Result<Self, SvidError> {
        let mut bytes = [0; 16];
        aws_lc_rs::rand::fill(&mut bytes).map_err(|_| SvidError::Random)?;
        bytes[0] &= 0x7f;
        while bytes[0] == 0 {
            aws_lc_rs::rand::fill(&mut bytes[..1]).map_err(|_| SvidError::Random)?;
            bytes[0] &= 0x7f;
        }
        Ok(Self(bytes))
    }

    /// Takes the content of a DER INTEGER.
    ///
    /// # Errors
    /// If it is not 16 bytes long, negative, or begins with a zero.
    pub fn from_der_integer_bytes(content: &[u8]) -> Result<Self, SvidError> {
        match <[u8; 16]>::try_from(content) {
            Ok(bytes) if (1..=0x7f).contains(&bytes[0]) => Ok(Self(bytes)),
            _ => Err(SvidError::Malformed(format!(
                "the serial number {:?} is not a positive number of 16 bytes, as Chancery gives them",
                hex::encode(&content[..content.len().min(32)])
            ))),
        }
    }
}

impl FromStr for Serial {
    type Err = SvidError;

    /// 32 hexadecimal digits; colons between them, as OpenSSL prints them, are allowed.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = [0; 16];
        hex::decode_to_slice(text.replace(':', ""), &mut bytes)
            .map_err(|_| SvidError::Malformed(format!("the serial number {text:?} is not 32 hexadecimal digits")))?;
        Self::from_der_integer_bytes(&bytes)
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(..)")
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
