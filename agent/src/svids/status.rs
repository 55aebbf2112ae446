//! What `chancery-agent status` shows.

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::WorkloadKey;
use crate::ca_client::{ContinuedLog, LedgerAlarm, LedgerMemory};

/// A workload.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WorkloadStatus {
    /// Which.
    pub workload: WorkloadKey,
    /// The pod's name.
    pub pod: String,
    /// The SPIFFE ID, once there is a certificate.
    pub spiffe_id: Option<String>,
    /// Hexadecimal.
    pub serial: Option<String>,
    /// When the certificate expires.
    #[serde(with = "time::serde::rfc3339::option")]
    pub expires_at: Option<OffsetDateTime>,
    /// When the agent tries next.
    #[serde(with = "time::serde::rfc3339::option")]
    pub next_try_at: Option<OffsetDateTime>,
    /// When the newest token expires.
    #[serde(with = "time::serde::rfc3339::option")]
    pub token_expires_at: Option<OffsetDateTime>,
    /// Attached streams.
    pub streams: usize,
    /// Why the last try failed, or what it waits for; empty if all is well.
    pub problem: String,
}

/// The CA's ledger, as the agent was shown it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LedgerStatus {
    /// Entries of the newest checkpoint; 0 while none was shown.
    pub size: u64,
    /// The newest checkpoint, a signed note.
    pub checkpoint: String,
    /// What does not fit together, if anything.
    pub alarm: Option<LedgerAlarm>,
    /// The log before, if its end was lost and this one continues it.
    #[serde(default)]
    pub continued: Option<ContinuedLog>,
}

impl From<&LedgerMemory> for LedgerStatus {
    fn from(memory: &LedgerMemory) -> Self {
        let checkpoint = memory.known.as_ref().map(|known| known.note.clone()).unwrap_or_default();
        let (alarm, continued) = (memory.alarm.as_deref().cloned(), memory.continued.as_deref().cloned());
        Self { size: memory.size(), checkpoint, alarm, continued }
    }
}

/// The agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AgentStatus {
    /// The agent's version.
    pub version: String,
    /// The configured trust domain.
    pub trust_domain: String,
    /// The configured cluster.
    pub cluster: String,
    /// The agent's own SPIFFE ID, once it has joined.
    pub spiffe_id: Option<String>,
    /// When the agent's own certificate expires.
    #[serde(with = "time::serde::rfc3339::option")]
    pub expires_at: Option<OffsetDateTime>,
    /// Whether there is a session with the CA.
    pub ca_reachable: bool,
    /// That there is none, and why; empty if there is.
    pub ca_problem: String,
    /// Of the trust state being served; 0 while there is none.
    pub trust_sequence: u64,
    /// What the agent knows of the CA's ledger.
    #[serde(default)]
    pub ledger: LedgerStatus,
    /// By namespace, service account and pod.
    pub workloads: Vec<WorkloadStatus>,
}
