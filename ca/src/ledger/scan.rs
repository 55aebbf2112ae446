//! Reading entries from the first to the last, as exports and whoever verifies do.

use std::ops::Range;

use bytes::Bytes;

use super::filter::IdentityFilter;
use super::query::{Identity, identity};
use super::{Ledger, LedgerError};

impl Ledger {
    /// The entries of `range` as they are stored, in order: at most `max_bytes` of them, but at least one.
    ///
    /// # Errors
    /// If the range ends behind the last entry, or the store cannot be read.
    pub async fn stored_entries(&self, range: Range<u64>, max_bytes: usize) -> Result<Vec<Bytes>, LedgerError> {
        Ok(self.store.read(range, max_bytes).await?)
    }

    /// Whether the stored entry `index` is an issuance that `filter` is about, as things stand now.
    ///
    /// # Errors
    /// If the entry cannot be read.
    pub fn selects(&self, filter: &IdentityFilter, index: u64, entry: &Bytes) -> Result<bool, LedgerError> {
        let state = self.state().borrow().clone();
        Ok(read_identity(index, entry)?.is_some_and(|identity| filter.matches(&identity, self.clock.now(), &state)))
    }
}

/// The identity that the stored entry `index` records; none if it is no issuance.
///
/// # Errors
/// If the entry cannot be read.
pub fn read_identity(index: u64, entry: &Bytes) -> Result<Option<Identity>, LedgerError> {
    identity(index, entry.clone())
}
