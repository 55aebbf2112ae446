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
}

impl StandingActs {
    pub(in crate::ca_client) fn to_wire(&self) -> wire::StandingActs {
        wire::StandingActs {
            origin: self.origin.clone(),
            entries: self.entries.iter().filter_map(|entry| STANDARD.decode(entry).ok()).collect(),
        }
    }
}

/// What is to be remembered instead of `memory`, if `told` is news. Another log's acts stay: they are what the CA asks for when it lost them.
pub(super) fn take(mut memory: LedgerMemory, told: wire::StandingActs) -> Option<LedgerMemory> {
    let wire::StandingActs { origin, entries } = told;
    if entries.len() > MAX_ACTS || entries.iter().map(Vec::len).sum::<usize>() + origin.len() > MAX_BYTES {
        tracing::error!(acts = entries.len(), "the CA's acts are not kept: they are more than it may tell");
        return None;
    }
    let told = Arc::new(StandingActs { origin, entries: entries.iter().map(|entry| STANDARD.encode(entry)).collect() });
    if memory.acts.contains(&told) {
        return None;
    }
    memory.acts.retain(|known| known.origin != told.origin);
    memory.acts.push(told);
    memory.acts.drain(..memory.acts.len().saturating_sub(MAX_LOGS));
    Some(memory)
}
