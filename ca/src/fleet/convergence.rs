//! Who is missing? Whether everybody who counts has proven to hold a trust state, or to have let go of certificates.
//!
//! Who counts comes from the ledger: whoever holds a certificate that has not expired, connected or not, unless its pod is known to be gone. What they hold comes from the reports
//! that their agents have sent since this CA started; nothing of it is kept on disk, so whoever has not reported since then is missing, by
//! name, with the reason. An agent that is not connected counts with its last report.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;

use chancery_identity::SpiffeId;
use chancery_process::moment::moment;
use chancery_proto::chancery::v1::{Convergence, ProxyLag};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::attestation::{Caller, Clusters, Holder};
use crate::fleet::alive::{Issued, Newest};
use crate::fleet::explain::moment_ms;
use crate::fleet::{Fleet, Record};
use crate::ledger::{Ledger, LedgerError};

/// The capability of agents that report what their proxies hold, and of a CA that reads it.
pub(super) const CONVERGENCE: &str = "convergence";
/// How many are named one by one.
pub const MAX_NAMED: usize = 1000;
/// How many pods of one agent are remembered (agent.proto allows it no more).
pub(super) const MAX_PODS: usize = 4096;

/// What everybody who counts has to prove.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// To have acknowledged the trust state with this sequence, or a newer one.
    Trust(u64),
    /// To use no certificate that was recorded up to this entry.
    Certificates {
        /// Certificates behind it are good.
        after_entry: u64,
    },
}

/// What is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum MissingKind {
    /// The CA's own server certificate.
    Ca,
    /// An agent or sidecar: itself, and so all that it serves.
    Agent,
    /// One proxy of a pod.
    Proxy,
    /// A pod that nobody speaks for.
    Pod,
}

/// One that has not proven it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissingOne {
    /// An agent's SPIFFE ID, or `namespace/name` of a pod.
    pub name: String,
    /// What it is.
    pub kind: MissingKind,
    /// The cluster of the agent that speaks for it; empty for the CA.
    pub cluster: String,
    /// The name of its node; empty if not known.
    pub node: String,
    /// The SPIFFE ID of the agent that speaks for it.
    pub agent: String,
    /// Why it is missing, in a sentence.
    pub reason: String,
    /// The proxy's words when it refused what it was sent; empty if it did not.
    pub nack: String,
}

/// One that cannot prove anything: a proxy without a validation context from us, or a copy of the bundle whose readers nobody knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unproven {
    /// `namespace/name` of its pod, or what the copy is.
    pub name: String,
    /// Its node ID, or which cluster the copy is in.
    pub proxy: String,
    /// Its cluster.
    pub cluster: String,
    /// The name of its node; empty for a copy.
    pub node: String,
    /// The SPIFFE ID of the agent that speaks for it; empty for a copy.
    pub agent: String,
}

/// The answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// The first [`MAX_NAMED`] of them.
    pub who: Vec<MissingOne>,
    /// How many more there are, by their agent's SPIFFE ID and node.
    pub more: BTreeMap<(String, String), u64>,
    /// The agents among these that are missing themselves.
    pub more_agents: BTreeSet<String>,
    /// The clusters that there are: names are unique in one alone.
    pub clusters: BTreeSet<String>,
    /// How many were asked about: agents, servers and pods.
    pub counted: u64,
    /// The first [`MAX_NAMED`] that cannot prove anything.
    pub unproven: Vec<Unproven>,
    /// How many more these are, likewise.
    pub unproven_more: BTreeMap<(String, String), u64>,
}

/// A name that more than one may have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} does not say which cluster's it is: give {}", candidates.join(" or "))]
pub struct AmbiguousName {
    name: String,
    candidates: Vec<String>,
}

/// Who has not reached `goal`.
///
/// # Errors
/// If the ledger cannot be read.
pub async fn missing(ledger: &Ledger, fleet: &Fleet, goal: Goal) -> Result<Missing, LedgerError> {
    let mut alive = fleet.alive.lock().await;
    let now = fleet.clock.now();
    alive.catch_up(ledger, now).await?;
    let clusters = fleet.clusters.as_deref();
    let known = clusters.map(Clusters::names).unwrap_or_default().into_iter().collect();
    let missing = Missing { clusters: known, ..Missing::default() };
    let mut asked = Asked { goal, now, clusters, missing, pods: Vec::new() };
    for (id, newest) in alive.servers().filter(|(_, newest)| newest.is_alive(now)) {
        asked.server(id, newest);
    }
    for (id, issued) in alive.agents() {
        // Locked for each anew: sessions go on meanwhile.
        asked.agent(id, issued, fleet.lock().by_id.get(id));
    }
    drop(alive);
    asked.copies();
    asked.named(ledger).await
}

impl Missing {
    /// Whether nobody is.
    pub fn is_empty(&self) -> bool {
        self.total() == 0
    }

    /// How many are.
    pub fn total(&self) -> u64 {
        self.who.len() as u64 + self.more.values().sum::<u64>()
    }

    /// How many cannot prove anything.
    pub fn unproven_total(&self) -> u64 {
        self.unproven.len() as u64 + self.unproven_more.values().sum::<u64>()
    }

    /// Takes out of the count whoever one of `names` means: an agent's SPIFFE ID, `CLUSTER/NODE` (with everybody there), or
    /// `CLUSTER/NAMESPACE/POD`; the cluster may be left out where there is only one.
    ///
    /// # Errors
    /// If there are several clusters, and a name is of none of them.
    pub fn without(mut self, names: &[String]) -> Result<Self, AmbiguousName> {
        let several = self.clusters.len() > 1;
        let is_whole =
            |name: &str| name.starts_with("spiffe://") || name.split_once('/').is_some_and(|(cluster, _)| self.clusters.contains(cluster));
        if let Some(name) = names.iter().find(|name| several && !is_whole(name)) {
            let candidates = self.clusters.iter().map(|cluster| format!("{cluster}/{name}")).collect();
            return Err(AmbiguousName { name: name.clone(), candidates });
        }
        let is_named = |cluster: &str, agent: &str, node: &str, own: &str| {
            names.iter().any(|name| {
                let within = name.strip_prefix(cluster).and_then(|rest| rest.strip_prefix('/'));
                let alone = Some(&**name).filter(|_| !several);
                let is_local = within.into_iter().chain(alone).any(|name| !name.is_empty() && (name == node || name == own));
                is_local || (!name.is_empty() && name == agent)
            })
        };
        let is_left = |(agent, node): &(String, String)| {
            let cluster = agent.parse().map(|id| cluster_of(&id)).unwrap_or_default();
            !is_named(&cluster, agent, node, "")
        };
        self.who.retain(|one| !is_named(&one.cluster, &one.agent, &one.node, &one.name));
        self.unproven.retain(|one| !is_named(&one.cluster, &one.agent, &one.node, &one.name));
        if !names.is_empty() {
            self.more.retain(|whose, _| is_left(whose));
            self.unproven_more.retain(|whose, _| is_left(whose));
        }
        Ok(self)
    }

    fn add(&mut self, one: MissingOne) {
        if self.who.len() < MAX_NAMED {
            self.who.push(one);
        } else {
            if one.kind == MissingKind::Agent {
                self.more_agents.insert(one.agent.clone());
            }
            self.count(one.agent, one.node, 1);
        }
    }

    fn count(&mut self, agent: String, node: String, more: u64) {
        *self.more.entry((agent, node)).or_default() += more;
    }
}

/// A question, while it is being answered.
struct Asked<'a> {
    goal: Goal,
    now: OffsetDateTime,
    /// Which pods are gone.
    clusters: Option<&'a Clusters>,
    missing: Missing,
    /// Pods that are missing, whose names the ledger has.
    pods: Vec<(MissingOne, u64)>,
}

/// The agent that is being asked about.
struct Speaker<'a> {
    id: &'a SpiffeId,
    cluster: String,
    node: &'a str,
    /// `not connected since …`, if it is not.
    away: Option<String>,
    /// Those of its pods that are known to be gone.
    gone: HashSet<Uuid>,
}

impl Asked<'_> {
    fn server(&mut self, id: &SpiffeId, newest: &Newest) {
        self.missing.counted += 1;
        if let Some(reason) = self.outdated(newest) {
            let one = MissingOne {
                name: id.to_string(),
                kind: MissingKind::Ca,
                cluster: String::new(),
                node: String::new(),
                agent: id.to_string(),
                reason,
                nack: String::new(),
            };
            self.missing.add(one);
        }
    }

    fn agent(&mut self, id: &SpiffeId, issued: &Issued, record: Option<&Record>) {
        let gone = self.gone(id, issued);
        let pods = issued.pods_at(self.now).filter(|(uid, _)| !gone.contains(uid)).count();
        let own = issued.svid_at(self.now).is_some_and(|svid| !self.is_gone_sidecar(id, svid));
        if pods == 0 && !own {
            return;
        }
        self.missing.counted += pods as u64 + u64::from(own);
        let node = record.map(|record| &*record.member.node).filter(|node| !node.is_empty()).unwrap_or(&issued.node);
        let away = record.filter(|record| record.line.is_none());
        let away = away.map(|record| format!("not connected since {}", moment(record.last_seen)));
        let speaker = Speaker { id, cluster: cluster_of(id), node, away, gone };
        self.missing.clusters.insert(speaker.cluster.clone());
        let Some(record) = record.filter(|record| record.reported.is_some()) else {
            return self.missing.add(speaker.missing(&hanging("has not reported since the CA started", pods)));
        };
        let Some(convergence) = &record.report.convergence else {
            let old = format!("is too old to report what its proxies hold (version {}): upgrade it", record.version);
            return self.missing.add(speaker.missing(&hanging(&old, pods)));
        };
        self.itself(&speaker, issued, record, convergence);
        self.proxies(&speaker, issued, record, convergence);
        self.pods_of(&speaker, issued, record);
        self.unproven_of(&speaker, convergence);
    }

    /// The agent's pods that its cluster is known to have no more.
    fn gone(&self, id: &SpiffeId, issued: &Issued) -> HashSet<Uuid> {
        let Some((clusters, caller)) = self.clusters.zip(Caller::from_peer(id, id.trust_domain()).ok()) else { return HashSet::new() };
        // A pod that the ledger does not tell the UID of has none to look for.
        let known = issued.pods_at(self.now).filter(|(uid, _)| !uid.is_nil());
        known.filter(|(uid, newest)| clusters.is_gone(caller.cluster(), **uid, newest.time)).map(|(uid, _)| *uid).collect()
    }

    fn is_gone_sidecar(&self, id: &SpiffeId, svid: &Newest) -> bool {
        let Some((clusters, caller)) = self.clusters.zip(Caller::from_peer(id, id.trust_domain()).ok()) else { return false };
        matches!(caller.holder(), Holder::Sidecar { pod } if clusters.is_gone(caller.cluster(), pod, svid.time))
    }

    /// What the agent itself holds.
    fn itself(&mut self, speaker: &Speaker<'_>, issued: &Issued, record: &Record, convergence: &Convergence) {
        let reason = match self.goal {
            Goal::Trust(sequence) if record.report.trust_sequence < sequence => {
                let has = record.report.trust_sequence;
                Some(format!("has taken over the bundle with sequence {has} and not yet the one with sequence {sequence}"))
            }
            Goal::Certificates { after_entry } if convergence.svid_entry <= after_entry => match issued.svid_at(self.now) {
                Some(svid) if svid.entry > after_entry => Some("has not yet taken over its own new certificate".to_owned()),
                Some(svid) => self.outdated(svid),
                None => None,
            },
            Goal::Trust(_) | Goal::Certificates { .. } => None,
        };
        if let Some(reason) = reason {
            self.missing.add(speaker.missing(&reason));
        }
    }

    /// What its proxies hold.
    fn proxies(&mut self, speaker: &Speaker<'_>, issued: &Issued, record: &Record, convergence: &Convergence) {
        let report = &record.report;
        // `explained`: that they are behind follows from what is said of the agent itself or of their pods.
        let (reached, total, explained) = match self.goal {
            Goal::Trust(sequence) => (convergence.trust_sequence >= sequence, report.lagging_total, report.trust_sequence < sequence),
            Goal::Certificates { after_entry } => {
                let old = issued.pods_at(self.now).any(|(_, newest)| newest.entry <= after_entry);
                (convergence.certificate_entry > after_entry, convergence.outdated_total, old)
            }
        };
        if reached {
            return;
        }
        let (gone, behind): (Vec<_>, Vec<_>) =
            report.lagging.iter().filter(|lag| self.is_behind(lag)).partition(|lag| speaker.has_lost(lag));
        let named = (gone.len() + behind.len()) as u64;
        for lag in behind {
            let reason = why_proxy(self.goal, lag);
            let one = MissingOne { kind: MissingKind::Proxy, nack: lag.nack.clone(), ..speaker.one(lag.pod.clone(), &reason) };
            self.missing.add(one);
        }
        // The agent names only so many; and if it says that somebody is behind, somebody is.
        let unnamed = u64::from(total).saturating_sub(report.lagging.len() as u64).max(u64::from(named == 0 && !explained));
        if unnamed > 0 {
            self.missing.count(speaker.id.to_string(), speaker.node.to_owned(), unnamed);
        }
    }

    fn is_behind(&self, lag: &ProxyLag) -> bool {
        match self.goal {
            Goal::Trust(sequence) => lag.trust_sequence < sequence,
            Goal::Certificates { after_entry } => lag.certificate_entry <= after_entry,
        }
    }

    /// Pods whose certificates are too old, or that their agent does not speak for.
    fn pods_of(&mut self, speaker: &Speaker<'_>, issued: &Issued, record: &Record) {
        for (uid, newest) in issued.pods_at(self.now).filter(|(uid, _)| !speaker.gone.contains(uid)) {
            let reason = match self.outdated(newest) {
                Some(reason) => reason,
                None if record.pods.binary_search(uid).is_ok() => continue,
                None => format!(
                    "its agent does not know who has its certificate, which is good until {}: it lost its state, or has not heard of it yet",
                    moment(newest.until)
                ),
            };
            if self.missing.who.len() + self.pods.len() < MAX_NAMED {
                let one = MissingOne { kind: MissingKind::Pod, ..speaker.one(uid.to_string(), &reason) };
                self.pods.push((one, newest.entry));
            } else {
                self.missing.count(speaker.id.to_string(), speaker.node.to_owned(), 1);
            }
        }
    }

    fn unproven_of(&mut self, speaker: &Speaker<'_>, convergence: &Convergence) {
        let gone = convergence.unproven.iter().filter(|lag| speaker.has_lost(lag)).count();
        let there = convergence.unproven.iter().filter(|lag| !speaker.has_lost(lag));
        let named = (convergence.unproven.len() - gone).min(MAX_NAMED - self.missing.unproven.len());
        let (node, agent) = (speaker.node, speaker.id.to_string());
        self.missing.unproven.extend(there.take(named).map(|lag| Unproven {
            name: lag.pod.clone(),
            proxy: lag.proxy.clone(),
            cluster: speaker.cluster.clone(),
            node: node.to_owned(),
            agent: agent.clone(),
        }));
        let more = u64::from(convergence.unproven_total).saturating_sub((named + gone) as u64);
        if more > 0 {
            self.missing.unproven_more.insert((agent, node.to_owned()), more);
        }
    }

    /// Whoever reads a copy of the bundle from its cluster does not say so.
    fn copies(&mut self) {
        let Some(clusters) = self.clusters else { return };
        let room = MAX_NAMED - self.missing.unproven.len();
        self.missing.unproven.extend(clusters.copies().into_iter().take(room).map(|(cluster, copy)| Unproven {
            name: copy.to_string(),
            proxy: format!("of cluster {cluster}"),
            cluster,
            node: String::new(),
            agent: String::new(),
        }));
    }

    /// Why a certificate is one of those that must go.
    fn outdated(&self, newest: &Newest) -> Option<String> {
        match self.goal {
            Goal::Certificates { after_entry } if newest.entry <= after_entry => {
                Some(format!("its newest certificate is an old one, ledger entry {}, good until {}", newest.entry, moment(newest.until)))
            }
            Goal::Certificates { .. } | Goal::Trust(_) => None,
        }
    }

    /// The answer, with the pods' names.
    async fn named(mut self, ledger: &Ledger) -> Result<Missing, LedgerError> {
        for (mut one, entry) in self.pods {
            if let Some(identity) = ledger.show_entry(entry).await? {
                one.name = format!("{}/{}", identity.issuance.namespace, identity.issuance.pod);
            }
            self.missing.add(one);
        }
        Ok(self.missing)
    }
}

impl Speaker<'_> {
    /// Whether the proxy's pod is known to be gone.
    fn has_lost(&self, lag: &ProxyLag) -> bool {
        Uuid::from_slice(&lag.pod_uid).is_ok_and(|uid| self.gone.contains(&uid))
    }

    /// The agent itself.
    fn missing(&self, what: &str) -> MissingOne {
        let away = self.away.as_ref().map(|away| format!(" ({away})")).unwrap_or_default();
        MissingOne { kind: MissingKind::Agent, reason: format!("{what}{away}"), ..self.one(self.id.to_string(), what) }
    }

    /// A pod, or a proxy of one.
    fn one(&self, name: String, what: &str) -> MissingOne {
        let away = self.away.as_ref().map(|away| format!(" (its agent is {away})")).unwrap_or_default();
        let reason = format!("{what}{away}");
        MissingOne {
            name,
            kind: MissingKind::Pod,
            cluster: self.cluster.clone(),
            node: self.node.to_owned(),
            agent: self.id.to_string(),
            reason,
            nack: String::new(),
        }
    }
}

/// That an agent or sidecar belongs to; empty if it is neither.
fn cluster_of(id: &SpiffeId) -> String {
    Caller::from_peer(id, id.trust_domain()).map(|caller| caller.cluster().to_owned()).unwrap_or_default()
}

/// With how much else hangs on the agent.
fn hanging(what: &str, pods: usize) -> String {
    match pods {
        0 => what.to_owned(),
        pods => format!("{what}, and speaks for {pods} pods"),
    }
}

fn why_proxy(goal: Goal, lag: &ProxyLag) -> String {
    let proxy = if lag.proxy.is_empty() { "its proxy".to_owned() } else { format!("its proxy {}", lag.proxy) };
    let what = match goal {
        _ if lag.not_back => return format!("{proxy} has not come back since its agent restarted"),
        Goal::Trust(sequence) => {
            let held = if lag.trust_sequence == 0 { "none yet".to_owned() } else { format!("the one with {}", lag.trust_sequence) };
            format!("{proxy} has not acknowledged the bundle with sequence {sequence}, but {held}")
        }
        Goal::Certificates { .. } if lag.certificate_entry == 0 => format!("{proxy} has not acknowledged the new certificate"),
        Goal::Certificates { .. } => {
            format!("{proxy} has not acknowledged the new certificate, but that of ledger entry {}", lag.certificate_entry)
        }
    };
    match lag.away_since_ms {
        0 => what,
        away => format!("{what}; away since {}", moment_ms(away)),
    }
}

/// What is wrong with a proxy, for people.
pub(super) fn describe(lag: &ProxyLag) -> String {
    let held = match lag.trust_sequence {
        0 => "no bundle of ours".to_owned(),
        sequence => format!("the bundle with sequence {sequence}"),
    };
    let state = match (lag.not_back, lag.away_since_ms) {
        (true, _) => "; not back since the agent restarted".to_owned(),
        (false, 0) => String::new(),
        (false, away) => format!("; away since {}", moment_ms(away)),
    };
    let nack = if lag.nack.is_empty() { String::new() } else { format!("; refused: {}", lag.nack) };
    format!("{} {}: {held}{state}{nack}", lag.pod, lag.proxy)
}

/// The UIDs as they are looked up.
pub(super) fn pods(convergence: &mut Convergence) -> Box<[Uuid]> {
    let sent = std::mem::take(&mut convergence.pods);
    let mut pods: Vec<Uuid> = sent.iter().take(MAX_PODS).filter_map(|uid| Uuid::from_slice(uid).ok()).collect();
    pods.sort_unstable();
    pods.into()
}

impl fmt::Display for MissingOne {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, kind, node, reason, nack, .. } = self;
        let on_node = if node.is_empty() { String::new() } else { format!(" on node {node}") };
        match kind {
            MissingKind::Ca => write!(f, "the CA's own server certificate: {reason}")?,
            MissingKind::Agent => write!(f, "agent {name}{on_node} {reason}")?,
            MissingKind::Proxy | MissingKind::Pod => write!(f, "pod {name}{on_node}: {reason}")?,
        }
        if nack.is_empty() { Ok(()) } else { write!(f, "; it refused what it was sent: {nack}") }
    }
}
