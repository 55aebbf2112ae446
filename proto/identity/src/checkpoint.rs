//! Checkpoints of the ledger, and what follows from two of them: the rules that the CA which signs and everybody who verifies share.
//!
//! A checkpoint (C2SP tlog-checkpoint) says how many entries a ledger has and what the root of their Merkle tree (RFC 6962, SHA-256) is. It is
//! signed as a C2SP signed note with Ed25519. The ledger's *origin* is also the name of its keys.
//!
//! - [`CheckpointVerifier`]: an origin with a public key, in the text form that other tlog tools read, too.
//! - [`verify`]: a note's checkpoint, if one of the keys has signed it.
//! - [`unverified`]: a note's checkpoint, whoever signed it.
//! - [`verify_inclusion`], [`verify_consistency`]: an entry is in the tree; one tree is the beginning of another.
//! - [`GrowingTree`]: the root of entries that are read one after the other.
//! - [`assemble`]: a note of a checkpoint's text and its signatures, made wherever the keys are.

mod merkle;
mod note;

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::TrustDomain;

pub use merkle::{GrowingTree, Hash, ProofError, empty_root, leaf_hash, node_hash, root_of, verify_consistency, verify_inclusion};
pub use note::{CheckpointVerifier, MAX_NOTE_BYTES, MAX_SIGNATURES, Signature, assemble, unverified, verify};

/// Why a text is no checkpoint, or is not believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// Not what C2SP signed-note or tlog-checkpoint prescribes.
    #[error("it is no signed checkpoint: {0}")]
    Malformed(&'static str),
    /// Not a key in the text form of C2SP signed-note.
    #[error("it is no verifier key (`<name>+<hash>+<base64>`, C2SP signed-note): {0}")]
    Key(&'static str),
    /// None of the known keys has signed it.
    #[error("the checkpoint is signed by none of the known keys: {0}")]
    NotSigned(String),
    /// A known key's signature does not fit: somebody else made it, or changed the text.
    #[error("the signature of the key {0} does not fit the checkpoint")]
    Signature(String),
    /// It is another ledger's.
    #[error("the checkpoint is of the ledger {found}, and the key is of {wanted}")]
    OtherOrigin {
        /// In the checkpoint.
        found: String,
        /// The key's name.
        wanted: String,
    },
}

/// How many entries a ledger has, and the root of the tree over them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Which ledger.
    pub origin: String,
    /// How many entries.
    pub size: u64,
    /// Of the tree over these entries.
    pub root: Hash,
    /// Further lines, whose meaning others define. Kept as they are; none of ours has any.
    pub extensions: Vec<String>,
}

/// The origin of the ledger `log_id` of a trust domain's CA: `<trust domain>/chancery/<log ID, 32 hexadecimal digits>`.
pub fn origin(trust_domain: &TrustDomain, log_id: [u8; 16]) -> String {
    format!("{trust_domain}/chancery/{}", hex::encode(log_id))
}

/// The text that is signed.
impl fmt::Display for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n{}\n{}", self.origin, self.size, STANDARD.encode(self.root))?;
        self.extensions.iter().try_for_each(|line| writeln!(f, "{line}"))
    }
}

/// Reads the text that is signed, in no other form than [`Checkpoint`] prints.
impl FromStr for Checkpoint {
    type Err = CheckpointError;

    fn from_str(text: &str) -> Result<Self, CheckpointError> {
        let malformed = CheckpointError::Malformed;
        let text = text.strip_suffix('\n').ok_or(malformed("the text does not end with a line break"))?;
        let mut lines = text.split('\n');
        let origin = lines.next().filter(|line| !line.is_empty()).ok_or(malformed("the first line, the origin, is empty"))?;
        let size = lines.next().and_then(|line| line.parse::<u64>().ok().filter(|size| size.to_string() == line));
        let size = size.ok_or(malformed("the second line is no number of entries"))?;
        let root = lines.next().and_then(|line| STANDARD.decode(line).ok()).and_then(|root| root.try_into().ok());
        let root = root.ok_or(malformed("the third line is no hash of 32 bytes in base64"))?;
        let extensions: Vec<String> = lines.map(str::to_owned).collect();
        if extensions.iter().any(String::is_empty) {
            return Err(malformed("a line is empty"));
        }
        Ok(Self { origin: origin.to_owned(), size, root, extensions })
    }
}
