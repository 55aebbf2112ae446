//! Acts that the agent keeps for the CA: who is kept from certificates, in the ledger's own signed entries. The agent does not read them.

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use chancery_proto::chancery::v1 as wire;
use serde::{Deserialize, Serialize};

use super::LedgerMemory;

/// The CA tells no more of a log.
const MAX_ACTS: usize = 256;
/// All of a log's; an act is a few hundred bytes.
const MAX_BYTES: usize = 1 << 20;
/// Those of the present log and of the one before.
const MAX_LOGS: usize = 2;

/// What one log says of who is kept from certificates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StandingActs {
    /// The log's.
    pub origin: String,
    /// Its entries, as they are stored; base64.
    pub entries: Vec<String>,
    /// The log's epoch then.
    #[serde(default)]
    pub epoch: u64,
    /// When the log was restored from a backup last, Unix milliseconds; 0 if it never was.
    #[serde(default)]
    pub restored_ms: i64,
}

impl StandingActs {
    pub(in crate::ca_client) fn to_wire(&self) -> wire::StandingActs {
        wire::StandingActs {
            origin: self.origin.clone(),
            entries: self.entries.iter().filter_map(|entry| STANDARD.decode(entry).ok()).collect(),
            epoch: self.epoch,
            restored_ms: self.restored_ms,
        }
    }

    /// One that was restored from a backup in between may have lost acts, and so is another one.
    fn is_of_the_log_of(&self, other: &Self) -> bool {
        (&self.origin, self.restored_ms) == (&other.origin, other.restored_ms)
    }
}

/// What is to be remembered instead of `memory`, if `told` is news. Another log's acts stay: they are what the CA asks for when it lost them. So do
/// those of this log if it has gone back to an earlier epoch: nothing took them away.
pub(super) fn take(mut memory: LedgerMemory, told: wire::StandingActs) -> Option<LedgerMemory> {
    let wire::StandingActs { origin, entries, epoch, restored_ms } = told;
    if entries.len() > MAX_ACTS || entries.iter().map(Vec::len).sum::<usize>() + origin.len() > MAX_BYTES {
        tracing::error!(acts = entries.len(), "the CA's acts are not kept: they are more than it may tell");
        return None;
    }
    let entries = entries.iter().map(|entry| STANDARD.encode(entry)).collect();
    let told = Arc::new(StandingActs { origin, entries, epoch, restored_ms });
    if let Some(known) = memory.acts.iter().find(|known| known.is_of_the_log_of(&told)) {
        if told.epoch < known.epoch {
            let (known, told) = (known.epoch, told.epoch);
            tracing::error!(
                known,
                told,
                "the CA's acts are not kept: its ledger has gone back to an earlier epoch, and may have lost some"
            );
            return None;
        }
        if told.entries == known.entries {
            return None;
        }
    }
    memory.acts.retain(|known| !known.is_of_the_log_of(&told));
    memory.acts.push(told);
    memory.acts.drain(..memory.acts.len().saturating_sub(MAX_LOGS));
    Some(memory)
}
