//! Finds entries by term: derived from the log, and rebuilt from it when it is missing or damaged.
//!
//! An LSM tree ([`tree`]) holds, under the hash of each term, the indexes of the entries that have it, newest first. What one call of
//! [`Index::apply`] adds under the same term is one key, so that common terms cost little under load. Nothing is synced on its own: the tree
//! holds always what a whole number of calls applied, and [`Index::indexed`] tells how far that is, so that the log fills in what is missing.
//!
//! A tree that cannot be opened, or turns out to be damaged while it is read, is replaced by an empty one with a warning;
//! [`Index::indexed`] then begins at 0 again, and questions are refused until it is where it was: an answer is never silently incomplete.

mod postings;
#[cfg(test)]
mod tests;
mod tree;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use bytes::Bytes;

use self::postings::TermHash;
use self::tree::{Failure, Tree};
use crate::store::{StoreError, Term, Terms};

/// How many values of the dictionaries are remembered as written, so that they are not written again.
const MAX_REMEMBERED_VALUES: usize = 16_384;
/// How often a tree whose background work failed is opened again before it is replaced: a full disk passes, damage does not.
const MAX_REOPENED: u32 = 3;

/// The index of the entries' terms. All calls block; [`EmbeddedStore`](super::EmbeddedStore) makes them on threads where that is allowed.
#[derive(Debug)]
pub(crate) struct Index {
    dir: PathBuf,
    terms: Arc<dyn Terms>,
    dictionary_dimensions: Vec<u8>,
    /// None after a failure, until the next call opens it again.
    tree: RwLock<Option<Tree>>,
    /// Hashes of values that are in a dictionary.
    remembered: Mutex<HashSet<TermHash>>,
    /// How many entries were indexed before a failure took some away: until then questions are refused.
    reached: AtomicU64,
    /// How often the tree was opened again since its background work failed first.
    reopened: AtomicU32,
}

impl Index {
    /// Opens the index in `dir`; an unreadable one is replaced by an empty one. Keeps a dictionary of the values of `dictionary_dimensions`.
    pub(crate) fn open(dir: &Path, terms: Arc<dyn Terms>, dictionary_dimensions: &[u8]) -> Result<Self, StoreError> {
        let index = Self {
            dir: dir.to_owned(),
            terms,
            dictionary_dimensions: dictionary_dimensions.to_vec(),
            tree: RwLock::default(),
            remembered: Mutex::default(),
            reached: AtomicU64::default(),
            reopened: AtomicU32::default(),
        };
        let indexed = index.with_tree(|tree| Ok(tree.indexed()))?;
        index.reached.store(indexed, Ordering::Release);
        Ok(index)
    }

    /// How many entries, from the first on, are indexed; applying goes on there. Smaller than before if the tree failed and had to be opened
    /// again or replaced.
    pub(crate) fn indexed(&self) -> u64 {
        self.with_tree(|tree| Ok(tree.indexed())).unwrap_or(0)
    }

    /// Indexes `entries`, whose first has the index `first`. They follow what was applied before without a gap. Visible at once to look-ups.
    ///
    /// # Errors
    /// After one, ask [`Self::indexed`] where to go on.
    pub(crate) fn apply(&self, first: u64, entries: &[Bytes]) -> Result<(), StoreError> {
        for (start, chunk) in (first..).step_by(postings::MAX_ENTRIES).zip(entries.chunks(postings::MAX_ENTRIES)) {
            self.apply_chunk(start, chunk)?;
        }
        Ok(())
    }

    fn apply_chunk(&self, first: u64, entries: &[Bytes]) -> Result<(), StoreError> {
        let mut hashed = Vec::with_capacity(entries.len() * 8);
        let mut values = HashMap::new();
        for (index, entry) in (first..).zip(entries) {
            for term in self.terms.terms(entry) {
                let hash = postings::hash(&term);
                hashed.push((hash, index));
                if self.dictionary_dimensions.contains(&term.dimension) && !self.remembered().contains(&hash) {
                    values.insert(hash, term);
                }
            }
        }
        // One key for each term, and keys in order, which the tree takes fastest.
        hashed.sort_unstable();
        hashed.dedup();
        let end = first + entries.len() as u64;
        self.with_tree(|tree| tree.insert(&hashed, values.values(), first..end))?;
        self.reached.fetch_max(end, Ordering::AcqRel);
        let mut remembered = self.remembered();
        if remembered.len() + values.len() > MAX_REMEMBERED_VALUES {
            remembered.clear();
        }
        remembered.extend(values.into_keys().take(MAX_REMEMBERED_VALUES));
        Ok(())
    }

    /// Forgets everything, durably: the index had entries that the log has not.
    pub(crate) fn clear(&self) -> Result<(), StoreError> {
        self.close_tree(true)?;
        self.reached.store(0, Ordering::Release);
        self.with_tree(|_| Ok(()))
    }

    /// Makes what was applied durable; called before closing.
    pub(crate) fn flush(&self) -> Result<(), StoreError> {
        self.with_tree(Tree::sync)
    }

    /// See [`Store::look_up`](crate::store::Store::look_up).
    pub(crate) fn look_up(&self, term: &Term, before: u64, limit: usize) -> Result<Vec<u64>, StoreError> {
        let hash = postings::hash(term);
        self.with_whole_tree(|tree| tree.look_up(hash, before, limit))
    }

    /// See [`Store::values`](crate::store::Store::values).
    pub(crate) fn values(&self, dimension: u8, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<Bytes>, StoreError> {
        if !self.dictionary_dimensions.contains(&dimension) {
            return Err(StoreError::Invalid(format!("there is no dictionary of dimension {dimension}")));
        }
        self.with_whole_tree(|tree| tree.values(dimension, prefix, after, limit))
    }

    /// Asks `question` of the tree, unless it still lacks what a failure took away.
    fn with_whole_tree<T>(&self, question: impl FnOnce(&Tree) -> Result<T, Failure>) -> Result<T, StoreError> {
        self.with_tree(|tree| match self.reached.load(Ordering::Acquire) {
            reached if tree.indexed() < reached => Err(Failure::Behind { indexed: tree.indexed(), reached }),
            _ => question(tree),
        })
    }

    /// Does `work` on the tree, which is opened before if a failure closed it.
    fn with_tree<T>(&self, work: impl FnOnce(&Tree) -> Result<T, Failure>) -> Result<T, StoreError> {
        let failure = loop {
            if let Some(tree) = &*self.tree.read().unwrap_or_else(PoisonError::into_inner) {
                match work(tree) {
                    Ok(done) => return Ok(done),
                    Err(failure) => break failure,
                }
            }
            let mut tree = self.tree.write().unwrap_or_else(PoisonError::into_inner);
            if tree.is_none() {
                *tree = Some(self.open_tree()?);
            }
        };
        let damaged = match &failure {
            Failure::Gap { .. } => return Err(StoreError::Invalid(failure.to_string())),
            Failure::Behind { .. } => return Err(self.io_error(failure.to_string())),
            Failure::Io(_) | Failure::InUse => false,
            Failure::Stopped => self.reopened.fetch_add(1, Ordering::Relaxed) >= MAX_REOPENED,
            Failure::Damaged(_) => true,
        };
        tracing::warn!(index = %self.dir.display(), %failure, replaced = damaged, "the ledger's index failed and is opened again");
        self.close_tree(damaged)?;
        Err(self.io_error(failure.to_string()))
    }

    fn open_tree(&self) -> Result<Tree, StoreError> {
        let opened = match Tree::open(&self.dir) {
            Err(Failure::Damaged(detail)) => {
                tracing::warn!(index = %self.dir.display(), detail, "the ledger's index cannot be read and is built anew");
                self.remove()?;
                Tree::open(&self.dir)
            }
            opened => opened,
        };
        opened.map_err(|failure| match failure {
            Failure::InUse => StoreError::InUse(self.dir.display().to_string()),
            failure => self.io_error(failure.to_string()),
        })
    }

    /// Closes the tree, and removes it if `remove`.
    fn close_tree(&self, remove: bool) -> Result<(), StoreError> {
        let mut tree = self.tree.write().unwrap_or_else(PoisonError::into_inner);
        *tree = None;
        self.remembered().clear();
        if remove {
            self.reopened.store(0, Ordering::Relaxed);
            self.remove()?;
        }
        Ok(())
    }

    fn remove(&self) -> Result<(), StoreError> {
        match std::fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(self.io_error(format!("cannot be removed: {error}"))),
            _ => Ok(()),
        }
    }

    fn remembered(&self) -> MutexGuard<'_, HashSet<TermHash>> {
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn io_error(&self, detail: String) -> StoreError {
        StoreError::Io { place: self.dir.display().to_string(), detail }
    }
}
