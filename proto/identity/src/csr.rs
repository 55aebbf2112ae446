//! Certificate signing requests: an agent makes them, the CA reads strangers'.
//!
//! What a request asks for never decides what is issued: the identity comes from the token. A request is held against it, and one that
//! asks for anything else is refused.

use std::fmt;

use rcgen::{CertificateParams, DistinguishedName, KeyPair, RsaKeySize, SanType};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

use crate::{PrivateKey, SpiffeId};

mod asks;
mod read;

/// The longest request that is read, in bytes of DER.
pub const MAX_CSR_BYTES: usize = 8192;

/// What kind of key a leaf may have. In the configuration: `ecdsa-p256` and so on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum KeyType {
    /// NIST P-256; the default.
    #[serde(rename = "ecdsa-p256")]
    EcdsaP256,
    /// NIST P-384.
    #[serde(rename = "ecdsa-p384")]
    EcdsaP384,
    /// Ed25519.
    Ed25519,
    /// RSA of 2048 bits.
    #[serde(rename = "rsa-2048")]
    Rsa2048,
    /// RSA of 3072 bits.
    #[serde(rename = "rsa-3072")]
    Rsa3072,
    /// RSA of 4096 bits.
    #[serde(rename = "rsa-4096")]
    Rsa4096,
}

/// Why a request was refused. Each has a stable word, [`CsrError::reason`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CsrError {
    /// Over [`MAX_CSR_BYTES`].
    #[error("the CSR has {0} bytes; at most {MAX_CSR_BYTES} are read")]
    TooLarge(usize),
    /// Not DER of a PKCS#10 request, or with bytes after it.
    #[error("the CSR cannot be read: {0}")]
    Malformed(String),
    /// The signature is not the key's own.
    #[error("the CSR's signature does not verify with its own key")]
    Signature,
    /// A key, or a pair of key and signature algorithm, that is not accepted at all.
    #[error("the CSR's key is not accepted: {0}")]
    Key(String),
    /// It asks for something other than an identity.
    #[error("the CSR asks for {0}, which is never granted")]
    Asks(String),
}

/// A request that was read: well-formed, signed by its own key, of a known key type, asking for nothing but names.
#[derive(Clone, Debug)]
pub struct VerifiedCsr {
    /// `SubjectPublicKeyInfo`, DER, as it stands in the request.
    pub public_key: Vec<u8>,
    /// What kind of key that is.
    pub key_type: KeyType,
    /// The SPIFFE ID that it asks for, if it does.
    pub spiffe_id: Option<SpiffeId>,
    /// The DNS names that it asks for.
    pub dns_names: Vec<String>,
}

impl VerifiedCsr {
    /// Reads and verifies a request in DER.
    ///
    /// # Errors
    /// If anything about it is not as this module's comment says; nothing is taken over from a request that fails.
    pub fn from_der(der: &[u8]) -> Result<Self, CsrError> {
        read::verified(der)
    }
}

/// Makes a fresh key and a request for it: the DER and the key. `spiffe_id` may be left out, since the CA derives it.
///
/// # Errors
/// Only if the random number generator fails.
pub fn generate(key_type: KeyType, spiffe_id: Option<&SpiffeId>) -> Result<(Vec<u8>, PrivateKey), CsrError> {
    let failed = |error: rcgen::Error| CsrError::Key(format!("no {key_type} key could be made: {error}"));
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    if let Some(id) = spiffe_id {
        params.subject_alt_names.push(SanType::URI(id.as_str().try_into().map_err(failed)?));
    }
    let mut pair = generate_key(key_type).map_err(failed)?;
    let key = PrivateKey::from_pkcs8(Zeroizing::new(pair.serialize_der()));
    let request = params.serialize_request(&pair);
    pair.zeroize();
    Ok((request.map_err(failed)?.der().to_vec(), key))
}

fn generate_key(key_type: KeyType) -> Result<KeyPair, rcgen::Error> {
    let rsa = |size| KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, size);
    match key_type {
        KeyType::EcdsaP256 => KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256),
        KeyType::EcdsaP384 => KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384),
        KeyType::Ed25519 => KeyPair::generate_for(&rcgen::PKCS_ED25519),
        KeyType::Rsa2048 => rsa(RsaKeySize::_2048),
        KeyType::Rsa3072 => rsa(RsaKeySize::_3072),
        KeyType::Rsa4096 => rsa(RsaKeySize::_4096),
    }
}

impl CsrError {
    /// A stable word for metrics and refusals.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::TooLarge(_) => "csr_too_large",
            Self::Malformed(_) => "csr_malformed",
            Self::Signature => "csr_signature",
            Self::Key(_) => "csr_key",
            Self::Asks(_) => "csr_extra",
        }
    }
}

impl KeyType {
    /// As in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::EcdsaP256 => "ecdsa-p256",
            Self::EcdsaP384 => "ecdsa-p384",
            Self::Ed25519 => "ed25519",
            Self::Rsa2048 => "rsa-2048",
            Self::Rsa3072 => "rsa-3072",
            Self::Rsa4096 => "rsa-4096",
        }
    }
}

impl fmt::Display for KeyType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
