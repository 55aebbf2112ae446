//! The last refused issuances, for people who ask why a pod has no certificate.
//!
//! A bounded list, not part of the log, so that strangers cannot fill it: the last 10,000, at most 100 of one agent. In memory; a restart
//! forgets it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use chancery_process::text::cut;
use chancery_proto::chancery::v1 as wire;
use time::OffsetDateTime;
use uuid::Uuid;

use super::entry::to_millis;
use super::filter::PodFilter;

const MAX_REFUSALS: usize = 10_000;
const MAX_PER_AGENT: usize = 100;
/// Longer texts are cut, so that the list's memory is bounded.
const MAX_TEXT_BYTES: usize = 512;

/// A refused issuance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// When.
    pub time: OffsetDateTime,
    /// SPIFFE ID of the agent or sidecar that asked; empty for a caller that has none yet.
    pub agent: String,
    /// A stable word: `token_expired`, `csr_signature`, …
    pub reason: String,
    /// What failed, on what, and what to do.
    pub message: String,
    /// As far as the token was verified; empty before.
    pub namespace: String,
    /// As far as the token was verified; empty before.
    pub service_account: String,
    /// The pod's name, as far as the token was verified; empty before.
    pub pod: String,
    /// As far as the token was verified.
    pub pod_uid: Option<Uuid>,
    /// As the agent named it.
    pub request_id: String,
}

/// Which refusals; every condition given must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RefusalFilter {
    /// SPIFFE ID of the agent or sidecar that asked.
    pub agent: Option<String>,
    /// A stable word.
    pub reason: Option<String>,
    /// The pod.
    pub pod: Option<PodFilter>,
}

/// The last refusals.
#[derive(Debug, Default)]
pub struct Refusals(Mutex<List>);

#[derive(Debug, Default)]
struct List {
    next: u64,
    refusals: BTreeMap<u64, Refusal>,
    of_agent: HashMap<String, VecDeque<u64>>,
}

impl Refusals {
    /// An empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `refusal`; the agent's oldest or the oldest of all makes room.
    pub fn add(&self, mut refusal: Refusal) {
        let Refusal { agent, reason, message, namespace, service_account, pod, request_id, .. } = &mut refusal;
        for text in [agent, reason, message, namespace, service_account, pod, request_id] {
            cut(text, MAX_TEXT_BYTES);
        }
        self.list().add(refusal);
    }

    /// The refusals that match `filter`, newest first, at most `limit`.
    pub fn list_newest(&self, filter: &RefusalFilter, limit: usize) -> Vec<Refusal> {
        let list = self.list();
        list.refusals.values().rev().filter(|refusal| filter.matches(refusal)).take(limit).cloned().collect()
    }

    fn list(&self) -> MutexGuard<'_, List> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl List {
    fn add(&mut self, refusal: Refusal) {
        let of_agent = self.of_agent.entry(refusal.agent.clone()).or_default();
        of_agent.push_back(self.next);
        let crowded_out = (of_agent.len() > MAX_PER_AGENT).then(|| of_agent.pop_front()).flatten();
        self.refusals.insert(self.next, refusal);
        self.next += 1;
        if let Some(number) = crowded_out {
            self.refusals.remove(&number);
        } else if self.refusals.len() > MAX_REFUSALS
            && let Some((_, oldest)) = self.refusals.pop_first()
        {
            self.forget_oldest_of(&oldest.agent);
        }
    }

    fn forget_oldest_of(&mut self, agent: &str) {
        if let Some(of_agent) = self.of_agent.get_mut(agent) {
            of_agent.pop_front();
            if of_agent.is_empty() {
                self.of_agent.remove(agent);
            }
        }
    }
}

impl RefusalFilter {
    fn matches(&self, refusal: &Refusal) -> bool {
        let pod = self.pod.as_ref().is_none_or(|pod| match pod {
            PodFilter::Uid(uid) => refusal.pod_uid == Some(*uid),
            PodFilter::Name { namespace, name } => {
                refusal.pod == *name && namespace.as_ref().is_none_or(|namespace| refusal.namespace == *namespace)
            }
        });
        pod && self.agent.as_ref().is_none_or(|agent| refusal.agent == *agent)
            && self.reason.as_ref().is_none_or(|reason| refusal.reason == *reason)
    }
}

impl From<Refusal> for wire::RefusalRecord {
    fn from(refusal: Refusal) -> Self {
        Self {
            time_ms: to_millis(refusal.time),
            agent: refusal.agent,
            reason: refusal.reason,
            message: refusal.message,
            namespace: refusal.namespace,
            service_account: refusal.service_account,
            pod: refusal.pod,
            request_id: refusal.request_id,
        }
    }
}
