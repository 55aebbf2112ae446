//! Where the CA's private keys live: a key manager knows them by name, signs with them, and never hands one out.
//!
//! `sign` is async because a key may lie in a device or a service far away. Implementations pass the same contract tests.

#[cfg(test)]
mod contract;
mod file;
mod seal;
#[cfg(test)]
mod seal_tests;

use std::fmt::Debug;

use async_trait::async_trait;
use chancery_identity::csr::KeyType;

pub use file::FileKeyManager;
pub use seal::{SealSettings, Secret, reseal};

/// The longest name of a key, in bytes.
const MAX_NAME_BYTES: usize = 64;

/// A key's public half.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey {
    /// What kind of key; a signature's algorithm follows from it: ECDSA with SHA-256 on P-256, with SHA-384 on P-384, Ed25519.
    pub key_type: KeyType,
    /// `SubjectPublicKeyInfo`, DER.
    pub spki: Vec<u8>,
}

/// Why a key manager did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// No key of that name.
    #[error("there is no key {0:?}")]
    Unknown(String),
    /// A key of that name exists, and keys are never overwritten.
    #[error("a key {0:?} exists already")]
    Exists(String),
    /// Not a name.
    #[error("{0:?} cannot name a key: 1 to {MAX_NAME_BYTES} of a-z, 0-9 and `-`")]
    Name(String),
    /// The manager cannot make keys of this type.
    #[error("keys of type {0} cannot be made here; use ecdsa-p256, ecdsa-p384 or ed25519")]
    Unsupported(KeyType),
    /// What is stored under that name is no key.
    #[error("the key {name:?} in {place} cannot be read: {problem}")]
    Damaged {
        /// The key's.
        name: String,
        /// File or service.
        place: String,
        /// What is wrong; nothing of the key.
        problem: String,
    },
    /// The keys are sealed, and do not open; or the secret that they are to be sealed with is no good.
    #[error("{place}: {problem}")]
    Sealed {
        /// A file.
        place: String,
        /// What is wrong, and what to do; nothing of a key or a secret.
        problem: String,
    },
    /// Files or directories that others may enter, or that the system refuses.
    #[error(transparent)]
    File(#[from] chancery_process::files::FileError),
    /// Anything else.
    #[error("the key {name:?}: {problem}")]
    Failed {
        /// The key's; may be empty.
        name: String,
        /// What happened.
        problem: String,
    },
}

/// Keeps private keys and signs with them.
#[async_trait]
pub trait KeyManager: Debug + Send + Sync {
    /// Makes a key, durably, and returns its public half.
    async fn generate(&self, name: &str, key_type: KeyType) -> Result<PublicKey, KeyError>;

    /// The public half of a key.
    async fn public_key(&self, name: &str) -> Result<PublicKey, KeyError>;

    /// Signs `message` (hashing it as the key's type says). ECDSA signatures come as ASN.1 DER, the form that certificates have.
    async fn sign(&self, name: &str, message: &[u8]) -> Result<Vec<u8>, KeyError>;

    /// Destroys a key for good.
    async fn destroy(&self, name: &str) -> Result<(), KeyError>;

    /// The names of all keys, sorted.
    async fn list(&self) -> Result<Vec<String>, KeyError>;
}

fn check_name(name: &str) -> Result<(), KeyError> {
    let fits = (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
    if fits { Ok(()) } else { Err(KeyError::Name(name.to_owned())) }
}
