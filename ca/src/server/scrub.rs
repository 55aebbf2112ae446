//! The slow background scrub: reads and checks the whole log again and again, so that damage is found while there are good copies of it.
//!
//! Damage is an alarm (metric, log, `status`, `/readyz` degraded), and stays one until the process ends. Nothing is repaired, and
//! issuance goes on: taking the mesh's identities away would mend nothing.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::server::parts::Parts;
use crate::store::StoreError;

/// So little that nobody notices: a day's log of a large mesh is read in an hour.
const BYTES_PER_SECOND: u64 = 8 << 20;
/// Between the end of one and the beginning of the next.
const PAUSE: Duration = Duration::from_secs(24 * 60 * 60);
/// After one that could not read.
const RETRY: Duration = Duration::from_secs(10 * 60);

/// What scrubbing came to.
#[derive(Debug, Default)]
pub(super) struct Scrubs(Mutex<Standing>);

#[derive(Clone, Debug, Default)]
pub(super) struct Standing {
    /// When the last one that read everything ended.
    pub(super) finished: Option<OffsetDateTime>,
    /// What it read.
    pub(super) bytes: u64,
    /// What was found, with its place.
    pub(super) damage: Option<String>,
}

impl Scrubs {
    pub(super) fn standing(&self) -> Standing {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn change(&self, change: impl FnOnce(&mut Standing)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Scrubs until `stop`.
pub(super) async fn run(parts: Arc<Parts>, stop: CancellationToken) {
    let scrubbing = async {
        loop {
            let pause = once(&parts, BYTES_PER_SECOND).await;
            tokio::time::sleep(pause).await;
        }
    };
    stop.run_until_cancelled(scrubbing).await;
}

/// Reads everything once; tells how long to wait for the next time.
pub(super) async fn once(parts: &Parts, bytes_per_second: u64) -> Duration {
    match parts.ledger.store().scrub(bytes_per_second).await {
        Ok(bytes) => {
            info!(bytes, "the whole ledger was read, and is as it was written");
            let now = parts.clock.now();
            parts.scrubs.change(|standing| (standing.finished, standing.bytes) = (Some(now), bytes));
            PAUSE
        }
        Err(damage @ StoreError::Damaged { .. }) => {
            error!(error = %damage, "the ledger is damaged: keep the files as they are, and restore what is missing from a backup");
            parts.scrubs.change(|standing| standing.damage = Some(damage.to_string()));
            PAUSE
        }
        Err(error) => {
            warn!(%error, "the ledger could not be read as a whole");
            RETRY
        }
    }
}
