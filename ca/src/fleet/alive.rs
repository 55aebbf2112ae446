//! Who holds a certificate that has not expired, as the ledger has it: the newest one of each pod, agent and server.
//!
//! Read from the ledger once, as far back as the longest lifetime reaches, and from then on only what was recorded since: a question that is
//! asked every second while a root is being walked costs what was issued in that second. Should the clock go back, all is read anew: what had
//! expired by the clock before may be alive.

use std::collections::{BTreeMap, HashMap};

use chancery_identity::SpiffeId;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::ledger::entry::{IssueReason, Role};
use crate::ledger::{Identity, Ledger, LedgerError, read_identity};

/// How much is read at once, in bytes.
const READ_BYTES: usize = 1 << 20;
/// As many entries fit into that, however large they are.
const LARGEST_ENTRIES: u64 = 16;
/// How many entries that is at most.
const READ_ENTRIES: u64 = 4096;
/// What has expired is kept for so long, since clocks are set back a little now and then.
const KEPT: time::Duration = time::Duration::minutes(5);

/// So many of the newest entries tell whether there are agents: as many as a CA without any records in years.
const NEWEST_ENTRIES: u64 = 4096;

/// Whether anything was issued through an agent or sidecar lately, be it alive or not: whatever the clock says.
///
/// # Errors
/// If the ledger cannot be read.
pub async fn has_served(ledger: &Ledger) -> Result<bool, LedgerError> {
    let mut end = ledger.entries();
    let oldest = end.saturating_sub(NEWEST_ENTRIES);
    while end > oldest {
        let first = end.saturating_sub(LARGEST_ENTRIES).max(oldest);
        let entries = ledger.stored_entries(first..end, READ_BYTES).await?;
        for (index, entry) in (first..).zip(&entries) {
            if read_identity(index, entry)?.is_some_and(|identity| identity.issuance.role != Role::Unspecified) {
                return Ok(true);
            }
        }
        end = first;
    }
    Ok(false)
}

/// The newest certificate of somebody.
#[derive(Clone, Copy, Debug)]
pub(super) struct Newest {
    /// Its entry.
    pub(super) entry: u64,
    /// When that was recorded.
    pub(super) time: OffsetDateTime,
    /// When the last of all that were issued to it has expired.
    pub(super) until: OffsetDateTime,
}

/// What was issued through one agent or sidecar.
#[derive(Debug, Default)]
pub(super) struct Issued {
    /// The node's name.
    pub(super) node: String,
    /// The agent's own certificate.
    svid: Option<Newest>,
    /// Pods' certificates.
    pods: HashMap<Uuid, Newest>,
}

/// All certificates that have not expired, by who asked for them.
#[derive(Debug, Default)]
pub(super) struct Alive {
    /// The entry to go on from; none before the first reading.
    next: Option<u64>,
    /// The latest moment that it was asked at.
    latest: Option<OffsetDateTime>,
    agents: BTreeMap<SpiffeId, Issued>,
    servers: BTreeMap<SpiffeId, Newest>,
}

impl Alive {
    /// Takes in what was recorded since the last time, and lets go of what has expired at `now`.
    ///
    /// # Errors
    /// If the ledger cannot be read.
    pub(super) async fn catch_up(&mut self, ledger: &Ledger, now: OffsetDateTime) -> Result<(), LedgerError> {
        if self.latest.is_some_and(|latest| now < latest - KEPT) {
            *self = Self::default();
        }
        self.latest = self.latest.max(Some(now));
        let kept = now - KEPT;
        let end = ledger.entries();
        let mut next = match self.next {
            Some(next) => next,
            None => ledger.first_alive().await?,
        };
        while next < end {
            let entries = ledger.stored_entries(next..end.min(next + READ_ENTRIES), READ_BYTES).await?;
            for entry in &entries {
                if let Some(identity) = read_identity(next, entry)?.filter(|identity| identity.leaf.not_after >= kept) {
                    self.take(&identity);
                }
                next += 1;
            }
            self.next = Some(next);
            // Decoding is work: let others have their turn.
            tokio::task::yield_now().await;
        }
        self.next = Some(next);
        self.forget_expired(kept);
        Ok(())
    }

    /// By the agent's or sidecar's ID; some of it may have expired a moment ago.
    pub(super) fn agents(&self) -> impl Iterator<Item = (&SpiffeId, &Issued)> {
        self.agents.iter()
    }

    /// The CA's own certificates for its ports, by ID; likewise.
    pub(super) fn servers(&self) -> impl Iterator<Item = (&SpiffeId, &Newest)> {
        self.servers.iter()
    }

    fn take(&mut self, identity: &Identity) {
        let Identity { index, time, leaf, issuance, asker, .. } = identity;
        let new = Newest { entry: *index, time: *time, until: leaf.not_after };
        let own = matches!(issuance.reason, IssueReason::Join | IssueReason::AgentRenewal);
        let Some(agent) = (if own { Some(&leaf.spiffe_id) } else { asker.as_ref() }) else {
            if issuance.role == Role::Unspecified {
                self.servers.entry(leaf.spiffe_id.clone()).and_modify(|known| known.replace(new)).or_insert(new);
            }
            return;
        };
        let issued = self.agents.entry(agent.clone()).or_default();
        if !issuance.node.is_empty() {
            issued.node.clone_from(&issuance.node);
        }
        if own {
            issued.svid.get_or_insert(new).replace(new);
        } else {
            issued.pods.entry(issuance.pod_uid.unwrap_or_default()).and_modify(|known| known.replace(new)).or_insert(new);
        }
    }

    fn forget_expired(&mut self, before: OffsetDateTime) {
        self.servers.retain(|_, server| server.is_alive(before));
        self.agents.retain(|_, issued| {
            issued.pods.retain(|_, pod| pod.is_alive(before));
            issued.svid = issued.svid.filter(|svid| svid.is_alive(before));
            issued.svid.is_some() || !issued.pods.is_empty()
        });
    }
}

impl Newest {
    /// Whether one of all that were issued to it is good at `now`.
    pub(super) fn is_alive(&self, now: OffsetDateTime) -> bool {
        self.until >= now
    }

    /// An older certificate may outlive a newer one.
    fn replace(&mut self, new: Self) {
        *self = Self { until: new.until.max(self.until), ..new };
    }
}

impl Issued {
    /// The agent's own certificate, if it is good at `now`.
    pub(super) fn svid_at(&self, now: OffsetDateTime) -> Option<&Newest> {
        self.svid.as_ref().filter(|svid| svid.is_alive(now))
    }

    /// The pods that have one which is good at `now`.
    pub(super) fn pods_at(&self, now: OffsetDateTime) -> impl Iterator<Item = (&Uuid, &Newest)> {
        self.pods.iter().filter(move |(_, newest)| newest.is_alive(now))
    }
}
