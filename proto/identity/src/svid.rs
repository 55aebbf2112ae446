//! X509-SVIDs: a chain with its key, checked against the standard and against a bundle before anybody serves it.

use std::fmt;
use std::sync::Arc;

use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use zeroize::Zeroizing;

use crate::{SpiffeId, TrustState};

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
    /// If the leaf breaks a rule of the X509-SVID standard, or the key is another's.
    pub fn new(_chain: Vec<CertificateDer<'static>>, _key: PrivateKey) -> Result<Self, SvidError> {
        unimplemented!()
    }

    /// Whether it may be served at `now` to peers that hold `trust`.
    pub fn verify(&self, _trust: &TrustState, _now: OffsetDateTime) -> Result<(), SvidError> {
        unimplemented!()
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
        unimplemented!()
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
        unimplemented!()
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
