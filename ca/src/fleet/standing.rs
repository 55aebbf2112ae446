//! The acts that keep somebody from certificates, for the agents: should entries be lost, they bring them back.

use std::sync::Arc;
use std::time::Duration;

use chancery_proto::chancery::v1::StandingActs;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::wire;
use crate::ledger::{Ledger, LedgerError};

/// After a failure to read the ledger.
const RETRY: Duration = Duration::from_secs(10);

/// Keeps `told` at what `ledger` says, until `shutdown`.
pub async fn tell_standing_acts(ledger: Ledger, told: watch::Sender<Arc<StandingActs>>, shutdown: CancellationToken) {
    let mut state = ledger.state();
    let tell = async {
        loop {
            state.mark_unchanged();
            match standing(&ledger).await {
                Ok(acts) => {
                    told.send_if_modified(|known| {
                        // The epoch alone is no news.
                        let is_known = StandingActs { epoch: known.epoch, ..acts.clone() } == **known;
                        if !is_known {
                            *known = Arc::new(acts);
                        }
                        !is_known
                    });
                    if state.changed().await.is_err() {
                        return;
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "the ledger could not be read for the acts that agents keep; trying again");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    };
    shutdown.run_until_cancelled(tell).await;
}

async fn standing(ledger: &Ledger) -> Result<StandingActs, LedgerError> {
    let state = ledger.current_state();
    let entries = ledger.standing_acts().await?.into_iter().map(Vec::from).collect();
    let restored_ms = state.restored.map_or(0, |restored| wire::millis(restored.since));
    Ok(StandingActs { origin: ledger.origin().to_owned(), entries, epoch: state.epoch, restored_ms })
}
