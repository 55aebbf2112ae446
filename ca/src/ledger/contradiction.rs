//! Proof that entries are missing here, or are others: a checkpoint that this CA has signed and that the ledger does not continue.
//!
//! Whoever shows one proves that there are two histories under one name, and nothing may be added to either. So the ledger records nothing from
//! then on ([`Ledger::contradicted`]); everything that is recorded can still be read.

use std::fmt;
use std::sync::Arc;

use chancery_identity::checkpoint::{GrowingTree, Hash, leaf_hash};

use super::committer::Queue;
use super::{Ledger, LedgerError, LedgerHealth};

/// The bytes of entries that are read at once.
const READ_BYTES: usize = 1 << 20;

/// A checkpoint that this CA has signed, and what the ledger has instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contradiction {
    /// The agent that showed it.
    pub shown_by: String,
    /// The signed note.
    pub note: String,
    /// How many entries the checkpoint has.
    pub size: u64,
    /// How many the ledger had then: fewer, or as many or more of which the first are others.
    pub entries: u64,
}

impl Ledger {
    /// Records nothing from now on: `proof` shows that this ledger is not the one that it was. The first one counts.
    pub fn contradicted(&self, proof: Contradiction) {
        self.queue.stop_for(proof);
    }

    /// Why nothing is recorded, if an agent has proven that this ledger is not the one that it was.
    pub fn contradiction(&self) -> Option<Arc<Contradiction>> {
        self.queue.contradiction()
    }

    /// The root of the tree over the first `size` entries, made of the entries themselves. Reads all of them: for when the hashes that are kept
    /// are not to be relied on.
    ///
    /// # Errors
    /// If there are not that many, or the store cannot be read.
    pub async fn tree_root_of_entries(&self, size: u64) -> Result<Hash, LedgerError> {
        let (mut tree, mut next) = (GrowingTree::default(), 0);
        while next < size {
            let entries = self.store.read(next..size, READ_BYTES).await?;
            if entries.is_empty() {
                return Err(LedgerError::NotInTree { what: format!("entry {next}"), size: self.entries() });
            }
            next += entries.len() as u64;
            for entry in entries {
                tree.push(leaf_hash(&entry));
            }
        }
        Ok(tree.root())
    }
}

impl Queue {
    fn stop_for(&self, proof: Contradiction) {
        self.set_health(LedgerHealth::Contradicted(Arc::new(proof)));
    }

    fn contradiction(&self) -> Option<Arc<Contradiction>> {
        match &*self.health().borrow() {
            LedgerHealth::Contradicted(proof) => Some(Arc::clone(proof)),
            _ => None,
        }
    }
}

impl Contradiction {
    /// Whether the ledger has as many entries, so that they are others.
    pub fn is_fork(&self) -> bool {
        self.size <= self.entries
    }
}

impl fmt::Display for Contradiction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { shown_by, size, entries, .. } = self;
        write!(f, "nothing more is recorded: {shown_by} showed a checkpoint with {size} entries that this CA has signed, and ")?;
        if self.is_fork() {
            write!(f, "the first {size} of this ledger's {entries} are others, so there are two histories")?;
        } else {
            write!(f, "this ledger has {entries}: a backup was restored, or entries are lost")?;
        }
        f.write_str(
            ". The checkpoint is kept as `checkpoint.conflict` in the data directory, of which a copy is to be kept. Restore the newest backup \
             (`chancery-ca restore FILE --checkpoint` says whether it has these entries); if none has, `chancery-ca restore FILE --accept-loss \
             --reason` begins a new ledger, which agents go over to",
        )
    }
}
