//! The Merkle tree of RFC 6962 section 2.1: its hashes, and what proofs prove. Proofs are judged by `ct_merkle`, with this process's SHA-256.

use aws_lc_rs::digest::{Context, SHA256, digest};
use ct_merkle::digest::typenum::U32;
use ct_merkle::digest::{FixedOutput, HashMarker, Output, OutputSizeUser, Update};
use ct_merkle::{ConsistencyProof, InclusionProof, RootHash};

use super::Checkpoint;

/// The most entries of a tree, as `ct_merkle` numbers its nodes: 2^63.
const MAX_ENTRIES: u64 = 1 << 63;

/// SHA-256 of a node of the tree.
pub type Hash = [u8; 32];

/// Why a proof proves nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProofError {
    /// The entry would be behind the checkpoint.
    #[error("the checkpoint covers {size} entries, and entry {index} is not among them")]
    BeyondCheckpoint {
        /// The entry's.
        index: u64,
        /// The checkpoint's.
        size: u64,
    },
    /// The entry is not in that place of the tree, or the proof is of another tree.
    #[error("the proof does not show that these bytes are entry {index} of the checkpoint with {size} entries")]
    NotIncluded {
        /// Which entry it should be.
        index: u64,
        /// The checkpoint's.
        size: u64,
    },
    /// The newer tree does not begin with the older one, or the proof is of other trees.
    #[error("the checkpoint with {new} entries is not shown to begin with the one with {old} entries")]
    NotConsistent {
        /// Entries of the older one.
        old: u64,
        /// Entries of the newer one.
        new: u64,
    },
    /// Two ledgers cannot be compared.
    #[error("the checkpoints are of different ledgers: {old} and {new}")]
    OtherOrigin {
        /// Of the older one.
        old: String,
        /// Of the newer one.
        new: String,
    },
}

/// The root of a tree without entries.
pub fn empty_root() -> Hash {
    finished(digest(&SHA256, &[]).as_ref())
}

/// The hash of an entry.
pub fn leaf_hash(entry: &[u8]) -> Hash {
    let mut context = Context::new(&SHA256);
    context.update(&[0]);
    context.update(entry);
    finished(context.finish().as_ref())
}

/// The hash of a node with these two below it.
pub fn node_hash(left: &Hash, right: &Hash) -> Hash {
    let mut bytes = [1; 65];
    bytes[1..33].copy_from_slice(left);
    bytes[33..].copy_from_slice(right);
    finished(digest(&SHA256, &bytes).as_ref())
}

/// The root of the tree over entries with these hashes; of as many nodes of one level, the root of the tree above them.
pub fn root_of(hashes: &[Hash]) -> Hash {
    let mut tree = GrowingTree::default();
    for hash in hashes {
        tree.push(*hash);
    }
    tree.root()
}

/// A tree to which entries are added one by one, of which only the roots of the largest complete subtrees are kept.
#[derive(Clone, Debug, Default)]
pub struct GrowingTree {
    size: u64,
    /// One for each bit of `size`, the largest subtree first.
    complete: Vec<Hash>,
}

impl GrowingTree {
    /// Adds the entry with this [`leaf_hash`].
    pub fn push(&mut self, leaf: Hash) {
        let mut hash = leaf;
        for _ in 0..self.size.trailing_ones() {
            if let Some(left) = self.complete.pop() {
                hash = node_hash(&left, &hash);
            }
        }
        self.complete.push(hash);
        self.size += 1;
    }

    /// How many entries were added.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The root of the tree over them.
    pub fn root(&self) -> Hash {
        let right_to_left = self.complete.iter().rev().copied();
        right_to_left.reduce(|right, left| node_hash(&left, &right)).unwrap_or_else(empty_root)
    }
}

/// Checks that `entry`, as it is stored, is the entry `index` of the tree of `checkpoint`.
///
/// # Errors
/// If `proof` (RFC 6962 section 2.1.1, the leaf's sibling first) does not show it.
pub fn verify_inclusion(entry: &[u8], index: u64, checkpoint: &Checkpoint, proof: &[Hash]) -> Result<(), ProofError> {
    let size = checkpoint.size;
    if index >= size {
        return Err(ProofError::BeyondCheckpoint { index, size });
    }
    let proof = InclusionProof::from_digests(proof.iter().map(Into::into));
    let is_included = size <= MAX_ENTRIES && root_hash(checkpoint).verify_inclusion(&entry, index, &proof).is_ok();
    if is_included { Ok(()) } else { Err(ProofError::NotIncluded { index, size }) }
}

/// Checks that the tree of `new` begins with the tree of `old`: nothing was removed or changed since.
///
/// # Errors
/// If `proof` (RFC 6962 section 2.1.2) does not show it; nothing is to be shown where the older one is empty or they are of one size.
pub fn verify_consistency(old: &Checkpoint, new: &Checkpoint, proof: &[Hash]) -> Result<(), ProofError> {
    if old.origin != new.origin {
        return Err(ProofError::OtherOrigin { old: old.origin.clone(), new: new.origin.clone() });
    }
    let is_consistent = if old.size == 0 {
        proof.is_empty() && old.root == empty_root() && (new.size > 0 || new.root == old.root)
    } else {
        let proof = ConsistencyProof::from_digests(proof.iter().map(Into::into));
        root_hash(new).verify_consistency(&root_hash(old), &proof).is_ok()
    };
    if is_consistent { Ok(()) } else { Err(ProofError::NotConsistent { old: old.size, new: new.size }) }
}

fn root_hash(checkpoint: &Checkpoint) -> RootHash<Sha256> {
    RootHash::new(checkpoint.root.into(), checkpoint.size)
}

/// The process's SHA-256, as `ct_merkle` takes it.
#[derive(Clone)]
struct Sha256(Context);

impl Default for Sha256 {
    fn default() -> Self {
        Self(Context::new(&SHA256))
    }
}

impl Update for Sha256 {
    fn update(&mut self, data: &[u8]) {
        self.0.update(data);
    }
}

impl OutputSizeUser for Sha256 {
    type OutputSize = U32;
}

impl FixedOutput for Sha256 {
    fn finalize_into(self, out: &mut Output<Self>) {
        out.copy_from_slice(self.0.finish().as_ref());
    }
}

impl HashMarker for Sha256 {}

fn finished(digest: &[u8]) -> Hash {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest);
    hash
}
