//! Finds entries by term: derived from the log, and rebuilt from it when it is missing or damaged.
//!
//! Under the hash of each term are the indexes of the entries that have it, newest first. The last ones are in memory ([`staged`]); once they
//! are many they become a batch of an LSM tree ([`tree`]), which is durable and tells how far it goes. What a crash loses of them the log
//! fills in: [`Derived::applied`] tells from where on.
//!
//! A tree that cannot be opened, or turns out to be damaged while it is read, is replaced by an empty one with a warning;
//! [`Derived::applied`] then begins at 0 again, and questions are refused until it is where it was: an answer is never silently incomplete.

mod postings;
mod staged;
#[cfg(test)]
mod tests;
mod tree;

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use bytes::Bytes;

use self::postings::{Hasher, TermHash};
use self::staged::Staged;
use self::tree::{Failure, Tree};
use super::follower::Derived;
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
    opened: RwLock<Option<Opened>>,
    /// Held by who adds to it or writes it out.
    adding: Mutex<Hasher>,
    /// Hashes of values that are in a dictionary.
    remembered: Mutex<HashSet<TermHash>>,
    /// How many entries were indexed before a failure took some away: until then questions are refused.
    reached: AtomicU64,
    /// How often the tree was opened again since its background work failed first.
    reopened: AtomicU32,
}

#[derive(Debug)]
struct Opened {
    tree: Tree,
    /// Follows what is in the tree.
    staged: Staged,
}

impl Opened {
    fn indexed(&self) -> u64 {
        self.staged.entries().end
    }
}

impl Derived for Index {
    const NAME: &'static str = "index";

    /// How many entries, from the first on, are indexed; applying goes on there. Smaller than before if the tree failed and had to be opened
    /// again or replaced.
    fn applied(&self) -> u64 {
        self.with_opened(|opened| Ok(opened.indexed())).unwrap_or(0)
    }

    /// Indexes `entries`, whose first has the index `first`. They follow what was applied before without a gap. Visible at once to look-ups.
    ///
    /// # Errors
    /// After one, ask [`Derived::applied`] where to go on.
    fn apply(&self, first: u64, entries: &[Bytes]) -> Result<(), StoreError> {
        let mut hasher = self.adding();
        let next = self.applied();
        if next != first {
            return Err(StoreError::Invalid(format!("entry {next} is to be indexed next, not {first}")));
        }
        let mut postings = Vec::with_capacity(entries.len() * 8);
        let mut values = HashMap::new();
        for (index, entry) in (first..).zip(entries) {
            for term in self.terms.terms(entry) {
                let hash = hasher.hash(&term);
                postings.push((hash, index));
                if self.dictionary_dimensions.contains(&term.dimension) && !self.remembered().contains(&hash) {
                    values.insert(hash, (term.dimension, term.value));
                }
            }
        }
        let end = first + entries.len() as u64;
        let hashes: Vec<_> = values.keys().copied().collect();
        let is_full = self.stage(first..end, postings, values.into_values())?;
        self.remember(hashes);
        if is_full { self.write_out() } else { Ok(()) }
    }

    /// Forgets everything, durably: the index had entries that the log has not.
    fn clear(&self) -> Result<(), StoreError> {
        let _adding = self.adding();
        self.close(true)?;
        self.reached.store(0, Ordering::Release);
        self.with_opened(|_| Ok(()))
    }

    /// Makes what was applied durable, unless it is so little that it is indexed again as quickly; called before closing.
    fn flush(&self) -> Result<(), StoreError> {
        let _adding = self.adding();
        let is_worth_it = self.with_opened(|opened| Ok(opened.staged.is_worth_a_batch()))?;
        if is_worth_it { self.write_out() } else { Ok(()) }
    }
}

impl Index {
    /// Opens the index in `dir`; an unreadable one is replaced by an empty one. Keeps a dictionary of the values of `dictionary_dimensions`.
    pub(crate) fn open(dir: &Path, terms: Arc<dyn Terms>, dictionary_dimensions: &[u8]) -> Result<Self, StoreError> {
        let index = Self {
            dir: dir.to_owned(),
            terms,
            dictionary_dimensions: dictionary_dimensions.to_vec(),
            opened: RwLock::default(),
            adding: Mutex::default(),
            remembered: Mutex::default(),
            reached: AtomicU64::default(),
            reopened: AtomicU32::default(),
        };
        let indexed = index.with_opened(|opened| Ok(opened.indexed()))?;
        index.reached.store(indexed, Ordering::Release);
        Ok(index)
    }

    /// See [`Store::look_up`](crate::store::Store::look_up).
    pub(crate) fn look_up(&self, term: &Term, before: u64, limit: usize) -> Result<Vec<u64>, StoreError> {
        let hash = postings::hash(term);
        self.with_whole(|Opened { tree, staged }| {
            let mut found: Vec<_> = staged.look_up(hash, before).take(limit).collect();
            // What is just being written out is in both.
            let older = tree.look_up(hash, before.min(staged.entries().start), limit - found.len())?;
            found.extend(older);
            Ok(found)
        })
    }

    /// See [`Store::values`](crate::store::Store::values).
    pub(crate) fn values(&self, dimension: u8, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<Bytes>, StoreError> {
        if !self.dictionary_dimensions.contains(&dimension) {
            return Err(StoreError::Invalid(format!("there is no dictionary of dimension {dimension}")));
        }
        self.with_whole(|Opened { tree, staged }| {
            let mut values = tree.values(dimension, prefix, after, limit)?;
            values.extend(staged.values_of(dimension, prefix, after).take(limit));
            values.sort_unstable();
            values.dedup();
            values.truncate(limit);
            Ok(values)
        })
    }

    /// Adds what belongs to `entries` to what is staged, and tells whether that is to be written out now.
    fn stage(
        &self,
        entries: Range<u64>,
        postings: Vec<(TermHash, u64)>,
        values: impl Iterator<Item = (u8, Bytes)>,
    ) -> Result<bool, StoreError> {
        let mut opened = self.opened.write().unwrap_or_else(PoisonError::into_inner);
        let staged = opened.as_mut().map(|opened| &mut opened.staged).filter(|staged| staged.entries().end == entries.start);
        let staged = staged.ok_or_else(|| self.io_error("it failed while it was added to".into()))?;
        staged.add(postings, values, entries.end);
        self.reached.fetch_max(entries.end, Ordering::AcqRel);
        Ok(staged.is_full())
    }

    /// Makes a batch of what is staged. Questions go on meanwhile.
    fn write_out(&self) -> Result<(), StoreError> {
        let written = self.with_opened(|Opened { tree, staged }| tree.write(staged).map(|()| staged.entries()))?;
        let mut opened = self.opened.write().unwrap_or_else(PoisonError::into_inner);
        // A question may have met damage, so that everything begins anew.
        if let Some(opened) = opened.as_mut().filter(|opened| opened.staged.entries() == written) {
            opened.staged = Staged::from(written.end);
        }
        Ok(())
    }

    /// Asks `question`, unless something still lacks that a failure took away.
    fn with_whole<T>(&self, question: impl FnOnce(&Opened) -> Result<T, Failure>) -> Result<T, StoreError> {
        self.with_opened(|opened| match self.reached.load(Ordering::Acquire) {
            reached if opened.indexed() < reached => Err(Failure::Behind { indexed: opened.indexed(), reached }),
            _ => question(opened),
        })
    }

    /// Does `work`; the tree is opened before if a failure closed it.
    fn with_opened<T>(&self, work: impl FnOnce(&Opened) -> Result<T, Failure>) -> Result<T, StoreError> {
        let failure = loop {
            if let Some(opened) = &*self.opened.read().unwrap_or_else(PoisonError::into_inner) {
                match work(opened) {
                    Ok(done) => return Ok(done),
                    Err(failure) => break failure,
                }
            }
            let mut opened = self.opened.write().unwrap_or_else(PoisonError::into_inner);
            if opened.is_none() {
                let tree = self.open_tree()?;
                *opened = Some(Opened { staged: Staged::from(tree.indexed()), tree });
            }
        };
        let damaged = match &failure {
            Failure::Behind { .. } => return Err(self.io_error(failure.to_string())),
            Failure::Io(_) | Failure::InUse => false,
            Failure::Stopped => self.reopened.fetch_add(1, Ordering::Relaxed) >= MAX_REOPENED,
            Failure::Damaged(_) => true,
        };
        tracing::warn!(index = %self.dir.display(), %failure, replaced = damaged, "the ledger's index failed and is opened again");
        self.close(damaged)?;
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

    /// Closes the tree, which forgets what was staged; and removes it if `remove`.
    fn close(&self, remove: bool) -> Result<(), StoreError> {
        let mut opened = self.opened.write().unwrap_or_else(PoisonError::into_inner);
        *opened = None;
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

    fn remember(&self, hashes: Vec<TermHash>) {
        let mut remembered = self.remembered();
        if remembered.len() + hashes.len() > MAX_REMEMBERED_VALUES {
            remembered.clear();
        }
        remembered.extend(hashes.into_iter().take(MAX_REMEMBERED_VALUES));
    }

    fn adding(&self) -> MutexGuard<'_, Hasher> {
        self.adding.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remembered(&self) -> MutexGuard<'_, HashSet<TermHash>> {
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn io_error(&self, detail: String) -> StoreError {
        StoreError::Io { place: self.dir.display().to_string(), detail }
    }
}
