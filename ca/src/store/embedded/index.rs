//! Finds entries by term: derived from the log, and rebuilt from it when it is missing or damaged.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use crate::store::{StoreError, Term, Terms};

/// The index of the entries' terms. All calls block; [`EmbeddedStore`](super::EmbeddedStore) makes them on threads where that is allowed.
#[derive(Debug)]
pub(crate) struct Index {
    terms: Arc<dyn Terms>,
    dictionary_dimensions: Vec<u8>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    indexed: u64,
    postings: BTreeMap<(u8, Bytes), BTreeSet<u64>>,
}

impl Index {
    /// Opens the index in `dir`; an unreadable one is replaced by an empty one. Keeps a dictionary of the values of `dictionary_dimensions`.
    pub(crate) fn open(_dir: &Path, terms: Arc<dyn Terms>, dictionary_dimensions: &[u8]) -> Result<Self, StoreError> {
        Ok(Self { terms, dictionary_dimensions: dictionary_dimensions.to_vec(), state: Mutex::default() })
    }

    /// How many entries, from the first on, are indexed durably; at most what was applied. After opening, applying goes on there.
    pub(crate) fn indexed(&self) -> u64 {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).indexed
    }

    /// Indexes `entries`, whose first has the index `first`. They follow what was applied before without a gap. Visible at once to look-ups.
    pub(crate) fn apply(&self, first: u64, entries: &[Bytes]) -> Result<(), StoreError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, entry) in (first..).zip(entries) {
            for term in self.terms.terms(entry) {
                state.postings.entry((term.dimension, term.value)).or_default().insert(index);
            }
            state.indexed = index + 1;
        }
        Ok(())
    }

    /// Forgets everything, durably: the index had entries that the log has not.
    pub(crate) fn clear(&self) -> Result<(), StoreError> {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = State::default();
        Ok(())
    }

    /// Makes what was applied durable; called before closing.
    pub(crate) fn flush(&self) -> Result<(), StoreError> {
        Ok(())
    }

    /// See [`Store::look_up`](crate::store::Store::look_up).
    pub(crate) fn look_up(&self, term: &Term, before: u64, limit: usize) -> Result<Vec<u64>, StoreError> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let found = state.postings.get(&(term.dimension, term.value.clone()));
        Ok(found.into_iter().flat_map(|indexes| indexes.range(..before).rev()).take(limit).copied().collect())
    }

    /// See [`Store::values`](crate::store::Store::values).
    pub(crate) fn values(&self, dimension: u8, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<Bytes>, StoreError> {
        if !self.dictionary_dimensions.contains(&dimension) {
            return Err(StoreError::Invalid(format!("there is no dictionary of dimension {dimension}")));
        }
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let values = state
            .postings
            .keys()
            .filter(|(of, value)| *of == dimension && value.starts_with(prefix) && after.is_none_or(|after| value.as_ref() > after));
        Ok(values.map(|(_, value)| value.clone()).take(limit).collect())
    }
}
