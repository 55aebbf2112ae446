//! The Merkle tree of RFC 6962 section 2.1: its hashes, and what proofs prove (RFC 9162 sections 2.1.3.2 and 2.1.4.2, the same tree).

use aws_lc_rs::digest::{Context, SHA256, digest};

use super::Checkpoint;

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
/// If `proof` (RFC 9162 section 2.1.3.1, the leaf's sibling first) does not show it.
pub fn verify_inclusion(entry: &[u8], index: u64, checkpoint: &Checkpoint, proof: &[Hash]) -> Result<(), ProofError> {
    let size = checkpoint.size;
    let mut place = Place { node: index, last: size.saturating_sub(1) };
    if index >= size {
        return Err(ProofError::BeyondCheckpoint { index, size });
    }
    let mut root = leaf_hash(entry);
    for sibling in proof {
        match place.rise() {
            None => return Err(ProofError::NotIncluded { index, size }),
            Some(Side::Left) => root = node_hash(sibling, &root),
            Some(Side::Right) => root = node_hash(&root, sibling),
        }
    }
    if place.last == 0 && root == checkpoint.root { Ok(()) } else { Err(ProofError::NotIncluded { index, size }) }
}

/// Checks that the tree of `new` begins with the tree of `old`: nothing was removed or changed since.
///
/// # Errors
/// If `proof` (RFC 9162 section 2.1.4.1) does not show it; nothing is to be shown where one of them is empty or they are of one size.
pub fn verify_consistency(old: &Checkpoint, new: &Checkpoint, proof: &[Hash]) -> Result<(), ProofError> {
    if old.origin != new.origin {
        return Err(ProofError::OtherOrigin { old: old.origin.clone(), new: new.origin.clone() });
    }
    if begins_with(old, new, proof) { Ok(()) } else { Err(ProofError::NotConsistent { old: old.size, new: new.size }) }
}

fn begins_with(old: &Checkpoint, new: &Checkpoint, proof: &[Hash]) -> bool {
    if old.size == 0 {
        return proof.is_empty() && old.root == empty_root();
    }
    if old.size >= new.size {
        return proof.is_empty() && old.size == new.size && old.root == new.root;
    }
    // The largest complete subtree that ends with the older tree. If that is the whole older tree, its root is known.
    let height = old.size.trailing_zeros();
    let mut place = Place { node: (old.size >> height) - 1, last: (new.size - 1) >> height };
    let (start, proof) = match proof.split_first() {
        _ if old.size.is_power_of_two() => (&old.root, proof),
        Some((start, proof)) => (start, proof),
        None => return false,
    };
    let (mut old_root, mut new_root) = (*start, *start);
    for sibling in proof {
        match place.rise() {
            None => return false,
            Some(Side::Left) => {
                old_root = node_hash(sibling, &old_root);
                new_root = node_hash(sibling, &new_root);
            }
            Some(Side::Right) => new_root = node_hash(&new_root, sibling),
        }
    }
    place.last == 0 && old_root == old.root && new_root == new.root
}

/// A node on the way up: its number in its level, and the last node's of that level.
struct Place {
    node: u64,
    last: u64,
}

/// On which side of a node its sibling is.
enum Side {
    Left,
    Right,
}

impl Place {
    /// Goes up to the next node that has two below it, and tells on which side the sibling was; nothing at the root.
    fn rise(&mut self) -> Option<Side> {
        if self.last == 0 {
            return None;
        }
        let side = if !self.node.is_multiple_of(2) || self.node == self.last { Side::Left } else { Side::Right };
        // The last node of a level without a sibling stands for itself one level higher.
        while self.node.is_multiple_of(2) && self.node == self.last && self.node > 0 {
            self.node >>= 1;
            self.last >>= 1;
        }
        self.node >>= 1;
        self.last >>= 1;
        Some(side)
    }
}

fn finished(digest: &[u8]) -> Hash {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest);
    hash
}
