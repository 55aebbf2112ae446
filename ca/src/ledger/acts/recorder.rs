//! Records the state whenever a segment of the log was sealed, so that opening reads only what came after.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::watch;
use tracing::warn;

use super::Acts;
use crate::ledger::committer::Queue;
use crate::ledger::{LedgerError, SharedStore};

/// After a state could not be recorded. It is not urgent: until it is, opening reads a few acts more.
const RETRY: Duration = Duration::from_secs(5);

/// Runs until the ledger is closed or its last clone has gone. `sealed` tells how many entries lie in sealed segments.
pub(in crate::ledger) async fn run(acts: Arc<Acts>, store: SharedStore, queue: Weak<Queue>, mut sealed: watch::Receiver<u64>) {
    loop {
        let before = *sealed.borrow_and_update();
        let Some(queue) = queue.upgrade() else { return };
        let recorded = acts.record_state(&store, &queue, before).await;
        drop(queue);
        match recorded {
            Ok(()) if sealed.changed().await.is_err() => return,
            Ok(()) => {}
            Err(LedgerError::Closed | LedgerError::Contradicted(_)) => return,
            Err(error) => {
                warn!(%error, "the ledger's state was not recorded; trying again");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}
