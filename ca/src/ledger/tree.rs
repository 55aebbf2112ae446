//! The ledger as a Merkle tree (RFC 6962, SHA-256) over its entries' stored bytes: roots, proofs, and tiles as C2SP tlog-tiles has them.
//!
//! Everything is made of hashes of complete subtrees, which the store keeps ([`Store::hashes`](crate::store::Store::hashes)): a root or a proof
//! reads about two tiles for each level, whatever the size of the ledger. They wait until the tree has the entries they are about, which it
//! gets shortly after they became durable.

use std::collections::BTreeMap;
use std::ops::Range;

use chancery_identity::checkpoint::Hash;

use super::proof::{Part, Plan, TILE_WIDTH};
use super::{Ledger, LedgerError};
use crate::store::StoreError;

/// The highest level of tiles: one hash of it would stand for more entries than can be counted.
const MAX_TILE_LEVEL: u8 = 7;

impl Ledger {
    /// The root of the tree over the first `size` entries.
    ///
    /// # Errors
    /// If there are not that many, or the store cannot be read.
    pub async fn tree_root(&self, size: u64) -> Result<Hash, LedgerError> {
        self.check_size(size)?;
        let hashes = self.make(&Plan::root(size)).await?;
        hashes.first().copied().ok_or_else(too_few)
    }

    /// Shows that the entry `index` is in the tree over the first `size`; the leaf's sibling first.
    ///
    /// # Errors
    /// If it is not, there are not that many, or the store cannot be read.
    pub async fn inclusion_proof(&self, index: u64, size: u64) -> Result<Vec<Hash>, LedgerError> {
        self.check_size(size)?;
        if index >= size {
            return Err(LedgerError::NotInTree { what: format!("entry {index}"), size });
        }
        self.make(&Plan::inclusion(index, size)).await
    }

    /// Shows that the tree over the first `new` entries begins with that over the first `old`.
    ///
    /// # Errors
    /// If `old` is larger than `new`, there are not that many, or the store cannot be read.
    pub async fn consistency_proof(&self, old: u64, new: u64) -> Result<Vec<Hash>, LedgerError> {
        self.check_size(new)?;
        if old > new {
            return Err(LedgerError::NotInTree { what: format!("a tree of {old} entries"), size: new });
        }
        self.make(&Plan::consistency(old, new)).await
    }

    /// `/tile/<level>/<index>`: `width` (1 to 256) hashes of complete subtrees of 256^`level` entries.
    ///
    /// # Errors
    /// If the ledger does not reach so far, or the store cannot be read.
    pub async fn tile(&self, level: u8, index: u64, width: u16) -> Result<Vec<u8>, LedgerError> {
        let size = self.entries();
        let none = || LedgerError::NotInTree { what: format!("tile {index} of level {level} with {width} hashes"), size };
        if level > MAX_TILE_LEVEL {
            return Err(none());
        }
        let range = tile_range(index, width, size >> (8 * u32::from(level))).ok_or_else(none)?;
        Ok(self.store.hashes(level, range).await?.concat())
    }

    /// `/tile/entries/<index>`: `width` (1 to 256) entries as they are stored, each behind its length (two bytes, big-endian).
    ///
    /// # Errors
    /// If the ledger does not reach so far, or the store cannot be read.
    pub async fn entry_bundle(&self, index: u64, width: u16) -> Result<Vec<u8>, LedgerError> {
        let size = self.entries();
        let range = tile_range(index, width, size);
        let range = range.ok_or_else(|| LedgerError::NotInTree { what: format!("tile {index} of entries with {width} entries"), size })?;
        let entries = self.store.read(range, usize::MAX).await?;
        let mut bundle = Vec::with_capacity(entries.iter().map(|entry| 2 + entry.len()).sum());
        for entry in entries {
            bundle.extend_from_slice(&u16::try_from(entry.len()).unwrap_or(u16::MAX).to_be_bytes());
            bundle.extend_from_slice(&entry);
        }
        Ok(bundle)
    }

    fn check_size(&self, size: u64) -> Result<(), LedgerError> {
        let entries = self.entries();
        if size <= entries { Ok(()) } else { Err(LedgerError::NotInTree { what: format!("a tree of {size} entries"), size: entries }) }
    }

    async fn make(&self, plan: &Plan) -> Result<Vec<Hash>, LedgerError> {
        let mut parts = BTreeMap::new();
        for (tile, range) in plan.tiles() {
            let first = range.start;
            parts.insert(tile, Part { first, hashes: self.store.hashes(tile.level, range).await? });
        }
        plan.make(&parts).ok_or_else(too_few)
    }
}

fn too_few() -> LedgerError {
    LedgerError::Store(StoreError::Invalid("the store gave fewer hashes than it was asked for".into()))
}

/// Which of `there` things a tile has.
fn tile_range(index: u64, width: u16, there: u64) -> Option<Range<u64>> {
    let first = index.checked_mul(TILE_WIDTH)?;
    let end = first.checked_add(u64::from(width))?;
    ((1..=TILE_WIDTH).contains(&u64::from(width)) && end <= there).then_some(first..end)
}
