//! The agents as operators see them: those that were seen since the CA started, and those that only the ledger knows, each with how its trust
//! stands. An agent that missed a change of the trust roots may not be able to connect any more, so it must not be the one to tell.

use chancery_identity::SpiffeId;
use chancery_proto::chancery::v1::AgentRecord;

use super::{Fleet, wire};
use crate::ledger::acts::State;
use crate::ledger::{Ledger, LedgerError};

impl Fleet {
    /// Every agent and sidecar that was seen since this CA started or has a certificate that is good, by SPIFFE ID; or the one with the SPIFFE
    /// ID `name`, or those on the node of that name (also `<cluster>/<node>`). `sequence` is the newest trust state's.
    ///
    /// # Errors
    /// If the ledger cannot be read.
    pub async fn list(&self, ledger: &Ledger, sequence: u64, name: &str) -> Result<Vec<AgentRecord>, LedgerError> {
        let mut found = if name.is_empty() { self.agents() } else { self.agents_called(name) };
        let unseen = self.unseen(ledger).await?;
        found.extend(
            unseen.into_iter().filter(|record| name.is_empty() || is_called(name, &record.spiffe_id, &record.cluster, &record.node)),
        );
        found.sort_by(|one, other| one.spiffe_id.cmp(&other.spiffe_id));
        note_bans(&mut found, &ledger.current_state());
        for record in &mut found {
            record.trust = trust(record, sequence).to_owned();
        }
        Ok(found)
    }

    /// Those that have a certificate and were not heard since this CA started.
    async fn unseen(&self, ledger: &Ledger) -> Result<Vec<AgentRecord>, LedgerError> {
        let mut alive = self.alive.lock().await;
        let now = self.clock.now();
        alive.catch_up(ledger, now).await?;
        let agents = self.lock();
        let unseen = alive.agents().filter(|(id, _)| !agents.by_id.contains_key(id));
        let unseen = unseen.filter_map(|(id, issued)| {
            let svid = issued.svid_at(now)?;
            Some(AgentRecord {
                spiffe_id: id.to_string(),
                cluster: cluster_of(id),
                node: issued.node.clone(),
                svid_not_after_ms: wire::millis(svid.until),
                ..AgentRecord::default()
            })
        });
        Ok(unseen.collect())
    }
}

/// Adds to `records` who of them is banned.
pub(crate) fn note_bans(records: &mut [AgentRecord], state: &State) {
    for record in records {
        let ban = record.spiffe_id.parse().ok().and_then(|id: SpiffeId| state.bans.get(&id));
        record.banned_by = ban.map_or(0, |ban| ban.entry);
    }
}

/// Whether the agent `id` on a node is called `name`: its SPIFFE ID, the node's name, or that behind the cluster's.
pub(super) fn is_called(name: &str, id: &str, cluster: &str, node: &str) -> bool {
    id == name || node == name || name.split_once('/') == Some((cluster, node))
}

/// How an agent's trust stands, in a word.
fn trust(record: &AgentRecord, sequence: u64) -> &'static str {
    match record.trust_sequence {
        0 => "unknown",
        known if known >= sequence => "current",
        _ if record.connected => "behind",
        _ => "missed",
    }
}

/// `…/chancery/agent/<cluster>/<node uid>`.
fn cluster_of(id: &SpiffeId) -> String {
    id.segments().nth(2).unwrap_or_default().to_owned()
}
