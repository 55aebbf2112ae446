//! Follows the ledger: the identities that match a filter, oldest first, as they become durable.
//!
//! A watch reads the log at its reader's pace and keeps nothing but its place there. So each entry is told once and none is left out,
//! however entries arrive, and a slow reader costs no memory. What was recorded long before is found through the index, block by block.

use tokio::sync::watch;

use super::candidates::Candidates;
use super::filter::IdentityFilter;
use super::query::{Identity, identity};
use super::{Ledger, LedgerError};
use crate::store::Head;

/// The most entries that are gone through at once, and so the most identities told at once.
const BLOCK: usize = 1000;
/// So few entries are read sooner than the index has caught up with them.
const FEW: u64 = 64;

/// A place in the ledger that moves with what is recorded.
#[derive(Debug)]
pub struct Watch {
    ledger: Ledger,
    filter: IdentityFilter,
    next: u64,
    head: watch::Receiver<Head>,
}

impl Ledger {
    /// Watches for identities that match `filter`: from the entry `from` on; without it from `filter.since` on; without that, those recorded
    /// from now on.
    ///
    /// # Errors
    /// [`LedgerError::NotThere`] if `from` is beyond what is recorded; others on the store's account.
    pub async fn watch(&self, filter: IdentityFilter, from: Option<u64>) -> Result<Watch, LedgerError> {
        let head = self.queue.watch_head();
        let entries = head.borrow().entries;
        let next = match (from, filter.since) {
            (Some(from), _) if from > entries => return Err(LedgerError::NotThere { index: from, entries }),
            (Some(from), _) => from,
            (None, Some(since)) => self.first_since(since, entries).await?,
            (None, None) => entries,
        };
        Ok(Watch { ledger: self.clone(), filter, next, head })
    }
}

impl Watch {
    /// The entry that is looked at next: what matched before it was told. A watch from there goes on where this one stands.
    pub fn next_entry(&self) -> u64 {
        self.next
    }

    /// The next identities, oldest first; waits until there are some. Nothing is lost if this is dropped while it waits.
    ///
    /// # Errors
    /// [`LedgerError::Closed`] at the ledger's end; others on the store's account.
    pub async fn next(&mut self) -> Result<Vec<Identity>, LedgerError> {
        loop {
            let entries = self.head.borrow_and_update().entries;
            if self.next >= entries {
                self.head.changed().await.map_err(|_| LedgerError::Closed)?;
                continue;
            }
            let end = entries.min(self.next + BLOCK as u64);
            let found = self.matches_before(end).await?;
            self.next = end;
            if !found.is_empty() {
                return Ok(found);
            }
            // Decoding is work: let others have their turn.
            tokio::task::yield_now().await;
        }
    }

    async fn matches_before(&self, end: u64) -> Result<Vec<Identity>, LedgerError> {
        let Self { ledger, filter, next, .. } = self;
        let state = ledger.acts.current();
        let mut candidates = match end - next {
            ..=FEW => Candidates::all(&ledger.store, *next, end),
            _ => Candidates::find(&ledger.store, filter, &state, *next, end).await?,
        };
        let mut found = Vec::new();
        loop {
            let entries = candidates.next(BLOCK).await?;
            if entries.is_empty() {
                found.reverse();
                return Ok(found);
            }
            let now = ledger.clock.now();
            for (index, entry) in entries {
                found.extend(identity(index, entry)?.filter(|identity| filter.matches(identity, now, &state)));
            }
        }
    }
}
