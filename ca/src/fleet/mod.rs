//! The connected agents: one stream each; trust and orders down, acknowledgements up.
//!
//! [`Fleet`] knows every agent that was connected since this CA started and what it last said of itself. A session ([`Fleet::attach`]) lives
//! as long as its stream: it hands down the trust state and the cluster's keys whenever they change, and takes reports. Everything is
//! bounded: one session an agent, a fixed number of agents remembered, a short queue of orders each.

mod alive;
mod convergence;
mod distrusted;
mod explain;
mod ledger;
mod list;
mod session;
mod standing;
mod wire;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chancery_identity::{Clock, SpiffeId};
use chancery_process::text::beginning;
use chancery_proto::chancery::v1::{AgentRecord, Hello, LedgerAlarm, Order, ProxyLag, Report};
use time::OffsetDateTime;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::attestation::Clusters;
use alive::Alive;
use session::LineEnd;

pub use alive::has_served;
pub use convergence::{AmbiguousName, Goal, MAX_NAMED as MAX_MISSING_NAMED, Missing, MissingKind, MissingOne, Unproven, missing};
pub use explain::{Explanation, Level};
pub use ledger::LedgerSource;
pub(crate) use list::note_bans;
pub use session::{Session, SessionEnd, Sources};
pub use standing::tell_standing_acts;
pub use wire::trust_message;

/// How many agents are remembered. The one that has been away longest makes room for a new one; connected ones never do.
pub const MAX_AGENTS: usize = 20_000;
/// How many orders may wait for one agent.
const MAX_ORDERS: usize = 8;
/// How many lagging proxies of one agent are remembered by name (agent.proto allows it no more).
const MAX_LAGGING: usize = 100;
/// How many of these are described in a list of all agents.
const BEHIND_IN_LIST: usize = 3;
/// The longest text that is kept of what an agent says of itself, in bytes.
const MAX_TEXT: usize = 256;
/// The longest note of a checkpoint that is kept in memory, in bytes: a few signatures.
const MAX_NOTE: usize = 2048;
/// How many agents with an alarm about the ledger are named one by one.
const MAX_NAMED: usize = 5;
/// What this CA can do on a session, named in its welcome.
pub const CAPABILITIES: [&str; 6] = [
    "order.reissue_all",
    "order.renew_agent",
    session::LEDGER_CHECKPOINTS,
    convergence::CONVERGENCE,
    session::LEDGER_CONTINUED,
    session::STANDING_ACTS,
];

/// Why the fleet refused something.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FleetError {
    /// [`MAX_AGENTS`] are connected.
    #[error("{MAX_AGENTS} agents are connected already, which is as many as one CA serves")]
    Full,
    /// Nobody to give the order to.
    #[error("agent {0} is not connected; it is given the order's effect when it comes back")]
    NotConnected(SpiffeId),
    /// It does not take its orders.
    #[error("agent {0} has {MAX_ORDERS} orders waiting and takes none; see its log")]
    Busy(SpiffeId),
}

/// An agent or sidecar as its certificate and its join describe it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its SPIFFE ID.
    pub id: SpiffeId,
    /// Its cluster.
    pub cluster: String,
    /// The name of its node; empty while unknown.
    pub node: String,
    /// Until when its certificate is valid.
    pub svid_not_after: OffsetDateTime,
}

/// How the fleet stands, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Sessions open now.
    pub connected: usize,
    /// Certificates that connected agents hold.
    pub workloads: u64,
    /// Proxy streams at connected agents.
    pub streams: u64,
    /// Acknowledgements of their proxies since each of these agents started.
    pub acks: u64,
    /// Refusals of their proxies since each of these agents started.
    pub nacks: u64,
    /// When the first of those certificates expires, in Unix milliseconds.
    pub first_expiry_ms: Option<i64>,
    /// Proxies that have not acknowledged the trust state that their agent has.
    pub lagging: u64,
    /// Proxies that may use an older certificate than their pod's newest.
    pub outdated: u64,
    /// Proxies that hold secrets, connected or not.
    pub holders: u64,
    /// Proxies without a validation context of ours.
    pub unproven: u64,
    /// Agents that joined since this CA started, or are connected, and have not said what their proxies hold.
    pub silent: usize,
    /// Agents, connected or not, whose checkpoint of the ledger and this CA's do not belong together.
    pub ledger_alarms: usize,
    /// Connected agents that have not taken over the newest trust state.
    pub behind: usize,
}

/// Everything known about the agents.
#[derive(Debug)]
pub struct Fleet {
    clock: Arc<dyn Clock>,
    /// Which pods are gone.
    clusters: Option<Arc<Clusters>>,
    agents: Mutex<Agents>,
    /// Who holds a certificate, by the ledger.
    alive: tokio::sync::Mutex<Alive>,
}

#[derive(Debug, Default)]
struct Agents {
    by_id: BTreeMap<SpiffeId, Record>,
    sessions_ever: u64,
}

#[derive(Debug)]
struct Record {
    member: Member,
    line: Option<Line>,
    last_seen: OffsetDateTime,
    version: String,
    /// When the report came; none has since this CA started.
    reported: Option<Instant>,
    report: Report,
    /// The pods that the report is about, in order; taken out of it.
    pods: Box<[Uuid]>,
    clock_offset_ms: i64,
    /// The sequence of the trust state that it was sent last.
    given: u64,
    /// What this CA found when it compared the agent's checkpoint of the ledger with its own.
    found: Option<LedgerAlarm>,
}

/// The way to a connected agent.
#[derive(Debug)]
struct Line {
    number: u64,
    orders: mpsc::Sender<Order>,
    replaced: CancellationToken,
}

impl Fleet {
    /// A fleet of nobody.
    pub fn new(clock: Arc<dyn Clock>) -> Arc<Self> {
        Arc::new(Self { clock, clusters: None, agents: Mutex::default(), alive: tokio::sync::Mutex::default() })
    }

    /// Likewise; what a pod holds that `clusters` know to be gone does not count.
    pub fn with_clusters(clock: Arc<dyn Clock>, clusters: Arc<Clusters>) -> Arc<Self> {
        Arc::new(Self { clock, clusters: Some(clusters), agents: Mutex::default(), alive: tokio::sync::Mutex::default() })
    }

    /// Remembers an agent that has just joined; its session follows.
    ///
    /// # Errors
    /// If there is no room for another agent.
    pub fn joined(&self, member: Member) -> Result<(), FleetError> {
        let now = self.clock.now();
        let mut agents = self.lock();
        agents.make_room(&member.id)?;
        let record = agents.by_id.entry(member.id.clone()).or_insert_with(|| Record::new(member.clone(), now));
        record.member = member;
        record.last_seen = now;
        Ok(())
    }

    /// Begins a session of `member`, who introduced itself with `hello`. Its session before, if there is one, ends: the newest stream counts.
    ///
    /// # Errors
    /// If there is no room for another agent.
    pub fn attach(self: &Arc<Self>, member: Member, hello: &Hello) -> Result<Session, FleetError> {
        let now = self.clock.now();
        let mut agents = self.lock();
        agents.make_room(&member.id)?;
        agents.sessions_ever += 1;
        let number = agents.sessions_ever;
        let (orders, orders_in) = mpsc::channel(MAX_ORDERS);
        let replaced = CancellationToken::new();
        let record = agents.by_id.entry(member.id.clone()).or_insert_with(|| Record::new(member.clone(), now));
        if let Some(before) = record.line.replace(Line { number, orders, replaced: replaced.clone() }) {
            before.replaced.cancel();
        }
        let node_before = std::mem::take(&mut record.member.node);
        record.member = member.clone();
        if record.member.node.is_empty() {
            record.member.node = node_before;
        }
        record.version = shortened(&hello.version);
        record.last_seen = now;
        if let Some(report) = &hello.report {
            record.forget_pods();
            record.take(report.clone(), now);
        }
        drop(agents);
        Ok(Session::new(Arc::clone(self), member, number, LineEnd { orders: orders_in, replaced }, hello))
    }

    /// Gives one agent an order.
    ///
    /// # Errors
    /// If it is not connected, or does not take its orders.
    pub fn order(&self, id: &SpiffeId, order: Order) -> Result<(), FleetError> {
        let agents = self.lock();
        let line = agents.by_id.get(id).and_then(|record| record.line.as_ref()).ok_or_else(|| FleetError::NotConnected(id.clone()))?;
        line.orders.try_send(order).map_err(|_| FleetError::Busy(id.clone()))
    }

    /// Gives every connected agent an order; those that could not be given it.
    pub fn order_all(&self, order: Order) -> Vec<FleetError> {
        let agents = self.lock();
        let connected = agents.by_id.iter().filter_map(|(id, record)| Some((id, record.line.as_ref()?)));
        connected.filter_map(|(id, line)| line.orders.try_send(order).err().map(|_| FleetError::Busy(id.clone()))).collect()
    }

    /// The connected agents with the number of certificates that each holds, those with the first certificate to expire first.
    pub fn by_expiry(&self) -> Vec<(SpiffeId, u32)> {
        let agents = self.lock();
        let connected = agents.by_id.iter().filter(|(_, record)| record.line.is_some());
        let mut found: Vec<_> =
            connected.map(|(id, record)| (record.report.first_expiry_ms, id.clone(), record.report.workloads)).collect();
        found.sort_unstable();
        found.into_iter().map(|(_, id, workloads)| (id, workloads)).collect()
    }

    /// Everyone who was seen since this CA started, by SPIFFE ID.
    pub fn agents(&self) -> Vec<AgentRecord> {
        self.lock().by_id.values().map(|record| record.describe(BEHIND_IN_LIST)).collect()
    }

    /// The agent with this SPIFFE ID, or those on the node of this name, with everyone who is behind there, and the evidence for an alarm.
    pub fn agents_called(&self, name: &str) -> Vec<AgentRecord> {
        let agents = self.lock();
        let is_called = |Member { id, cluster, node, .. }: &Member| list::is_called(name, id.as_str(), cluster, node);
        let called = agents.by_id.values().filter(|record| is_called(&record.member));
        let in_full = |record: &Record| AgentRecord { ledger_evidence: record.ledger_alarm().cloned(), ..record.describe(MAX_LAGGING) };
        called.map(in_full).collect()
    }

    /// The agent on `node` that was seen last, by the node's name.
    pub fn on_node(&self, cluster: &str, node: &str) -> Option<AgentRecord> {
        let agents = self.lock();
        let there = agents.by_id.values().filter(|record| record.member.cluster == cluster && record.member.node == node);
        there.max_by_key(|record| (record.line.is_some(), record.last_seen)).map(|record| record.describe(MAX_LAGGING))
    }

    /// The node's name of an agent, if it was heard before.
    pub fn node_of(&self, id: &SpiffeId) -> Option<String> {
        self.lock().by_id.get(id).map(|record| record.member.node.clone()).filter(|node| !node.is_empty())
    }

    /// How it stands, compared with the trust state of `sequence`.
    pub fn totals(&self, sequence: u64) -> Totals {
        let agents = self.lock();
        let ledger_alarms = agents.by_id.values().filter(|record| record.ledger_alarm().is_some()).count();
        let silent = agents.by_id.values().filter(|record| record.report.convergence.is_none()).count();
        let mut totals = Totals { silent, ledger_alarms, ..Totals::default() };
        for record in agents.by_id.values().filter(|record| record.line.is_some()) {
            totals.connected += 1;
            totals.workloads += u64::from(record.report.workloads);
            totals.streams += u64::from(record.report.streams);
            totals.acks = totals.acks.saturating_add(record.report.acks);
            totals.nacks = totals.nacks.saturating_add(record.report.nacks);
            let first_expiry = Some(record.report.first_expiry_ms).filter(|expiry| *expiry != 0);
            totals.first_expiry_ms = [totals.first_expiry_ms, first_expiry].into_iter().flatten().min();
            totals.lagging += u64::from(record.report.lagging_total);
            if let Some(convergence) = &record.report.convergence {
                totals.outdated += u64::from(convergence.outdated_total);
                totals.holders += u64::from(convergence.holders);
                totals.unproven += u64::from(convergence.unproven_total);
            }
            totals.behind += usize::from(record.report.trust_sequence < sequence);
        }
        totals
    }

    /// What agents say against this CA's ledger, a sentence each; most of them are counted, not named.
    pub fn ledger_problems(&self) -> Vec<String> {
        let agents = self.lock();
        let alarmed = agents.by_id.iter().filter_map(|(id, record)| Some((id, record, record.ledger_alarm()?)));
        let describe = |(id, record, alarm): (&SpiffeId, &Record, &LedgerAlarm)| {
            format!("the ledger and agent {id}, which knows {} entries, contradict each other: {}", record.ledger_size(), alarm.message)
        };
        let mut problems: Vec<_> = alarmed.clone().take(MAX_NAMED).map(describe).collect();
        let more = alarmed.count().saturating_sub(MAX_NAMED);
        if more > 0 {
            problems.push(format!("the ledger and {more} more agents contradict each other (`chancery agent list`)"));
        }
        problems
    }

    /// The median of the connected agents' clocks less this CA's, which may have been set since they reported; none while no agent has.
    pub fn median_clock_offset(&self) -> Option<time::Duration> {
        let now = wire::millis(self.clock.now());
        let agents = self.lock();
        let reporting = agents.by_id.values().filter(|record| record.line.is_some());
        let mut offsets: Vec<i64> = reporting.filter_map(|record| Some(record.clock_at(Instant::now())?.saturating_sub(now))).collect();
        let middle = offsets.len() / 2;
        (!offsets.is_empty()).then(|| time::Duration::milliseconds(*offsets.select_nth_unstable(middle).1))
    }

    /// The sequence of the trust state that an agent was sent last; 0 if it was sent none since this CA started.
    pub fn given_to(&self, id: &SpiffeId) -> u64 {
        self.lock().by_id.get(id).map_or(0, |record| record.given)
    }

    fn given(&self, id: &SpiffeId, number: u64, sequence: u64) {
        if let Some(record) = self.lock().by_id.get_mut(id).filter(|record| record.is_session(number)) {
            record.given = sequence;
        }
    }

    fn report(&self, id: &SpiffeId, number: u64, report: Report) {
        let now = self.clock.now();
        let mut agents = self.lock();
        if let Some(record) = agents.by_id.get_mut(id).filter(|record| record.is_session(number)) {
            record.take(report, now);
        }
    }

    /// Takes in what came of comparing an agent's checkpoint of the ledger with this CA's.
    fn compared(&self, id: &SpiffeId, number: u64, mut alarm: Option<LedgerAlarm>) {
        let now = wire::millis(self.clock.now());
        let mut agents = self.lock();
        let Some(record) = agents.by_id.get_mut(id).filter(|record| record.is_session(number)) else { return };
        if let Some(alarm) = &mut alarm {
            bound(alarm);
            let known = record.found.as_ref().filter(|known| known.reason == alarm.reason && known.remembered == alarm.remembered);
            alarm.raised_at_ms = known.map_or(now, |known| known.raised_at_ms);
            if known.is_none() {
                log_alarm(id, "an agent's checkpoint is not the beginning of this CA's ledger", alarm);
            }
        }
        record.found = alarm;
    }

    fn detach(&self, id: &SpiffeId, number: u64) {
        let now = self.clock.now();
        let mut agents = self.lock();
        if let Some(record) = agents.by_id.get_mut(id).filter(|record| record.is_session(number)) {
            record.line = None;
            record.last_seen = now;
        }
    }

    /// Nothing that holds this lock can panic halfway through a change, so a poisoned one is still whole.
    fn lock(&self) -> MutexGuard<'_, Agents> {
        self.agents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Agents {
    fn make_room(&mut self, for_: &SpiffeId) -> Result<(), FleetError> {
        if self.by_id.len() < MAX_AGENTS || self.by_id.contains_key(for_) {
            return Ok(());
        }
        let away = self.by_id.iter().filter(|(_, record)| record.line.is_none());
        let longest = away.min_by_key(|(_, record)| record.last_seen).map(|(id, _)| id.clone()).ok_or(FleetError::Full)?;
        self.by_id.remove(&longest);
        Ok(())
    }
}

impl Record {
    fn new(member: Member, now: OffsetDateTime) -> Self {
        Self {
            member,
            line: None,
            last_seen: now,
            version: String::new(),
            reported: None,
            report: Report::default(),
            pods: Box::default(),
            clock_offset_ms: 0,
            given: 0,
            found: None,
        }
    }

    fn is_session(&self, number: u64) -> bool {
        self.line.as_ref().is_some_and(|line| line.number == number)
    }

    /// On a new stream the agent names its pods anew.
    fn forget_pods(&mut self) {
        self.pods = Box::default();
        if let Some(convergence) = &mut self.report.convergence {
            convergence.pods_version = 0;
        }
    }

    fn take(&mut self, mut report: Report, now: OffsetDateTime) {
        bound_lags(&mut report.lagging);
        if let Some(convergence) = &mut report.convergence {
            bound_lags(&mut convergence.unproven);
            let known = self.report.convergence.as_ref().map(|known| known.pods_version);
            if known != Some(convergence.pods_version) {
                self.pods = convergence::pods(convergence);
            }
            convergence.pods.clear();
        }
        self.reported = Some(Instant::now());
        if let Some(view) = &mut report.ledger {
            // Only the size is needed on; the session has compared the note itself.
            view.checkpoint = shortened_to(&view.checkpoint, MAX_NOTE);
            if let Some(alarm) = &mut view.alarm {
                bound(alarm);
            }
        }
        let reported = |report: &Report| report.ledger.as_ref().and_then(|view| view.alarm.clone());
        let alarm = reported(&report);
        if let Some(alarm) = alarm.as_ref().filter(|alarm| reported(&self.report).as_ref() != Some(alarm)) {
            log_alarm(&self.member.id, "an agent was shown a ledger that does not continue the one it was shown before", alarm);
        }
        self.last_seen = now;
        self.clock_offset_ms = report.clock_ms.saturating_sub(wire::millis(now));
        self.report = report;
    }

    /// The agent's clock, in Unix milliseconds; none before its first report.
    fn clock_at(&self, now: Instant) -> Option<i64> {
        let since = now.duration_since(self.reported?);
        Some(self.report.clock_ms.saturating_add(i64::try_from(since.as_millis()).ok()?))
    }

    /// What the agent reported, or this CA found.
    fn ledger_alarm(&self) -> Option<&LedgerAlarm> {
        self.found.as_ref().or_else(|| self.report.ledger.as_ref()?.alarm.as_ref())
    }

    fn ledger_size(&self) -> u64 {
        let note = self.report.ledger.as_ref().map(|view| &*view.checkpoint);
        note.and_then(ledger::read).map_or(0, |checkpoint| checkpoint.size)
    }

    /// With so many sentences about who is behind.
    fn describe(&self, behind: usize) -> AgentRecord {
        AgentRecord {
            spiffe_id: self.member.id.to_string(),
            cluster: self.member.cluster.clone(),
            node: self.member.node.clone(),
            connected: self.line.is_some(),
            last_seen_ms: wire::millis(self.last_seen),
            version: self.version.clone(),
            trust_sequence: self.report.trust_sequence,
            workloads: self.report.workloads,
            streams: self.report.streams,
            lagging: self.report.lagging_total,
            clock_offset_ms: self.clock_offset_ms,
            svid_not_after_ms: wire::millis(self.member.svid_not_after),
            ledger_size: self.ledger_size(),
            ledger_alarm: self.ledger_alarm().map(|alarm| format!("{}: {}", alarm.reason, alarm.message)).unwrap_or_default(),
            holders: self.report.convergence.as_ref().map_or(0, |convergence| convergence.holders),
            proven_sequence: self.report.convergence.as_ref().map_or(0, |convergence| convergence.trust_sequence),
            behind: self.report.lagging.iter().take(behind).map(convergence::describe).collect(),
            trust: String::new(),
            ledger_evidence: None,
            // The ledger's state tells it: `list::note_bans`.
            banned_by: 0,
        }
    }
}

fn bound_lags(lags: &mut Vec<ProxyLag>) {
    lags.truncate(MAX_LAGGING);
    for lag in lags {
        for text in [&mut lag.proxy, &mut lag.pod, &mut lag.nack] {
            *text = shortened(text);
        }
    }
}

/// The agent keeps the notes whole; here, as far as an honest one goes.
fn bound(alarm: &mut LedgerAlarm) {
    (alarm.reason, alarm.message) = (shortened(&alarm.reason), shortened(&alarm.message));
    (alarm.remembered, alarm.offered) = (shortened_to(&alarm.remembered, MAX_NOTE), shortened_to(&alarm.offered, MAX_NOTE));
}

fn log_alarm(agent: &SpiffeId, what: &str, alarm: &LedgerAlarm) {
    let LedgerAlarm { reason, message, remembered, offered, .. } = alarm;
    tracing::error!(%agent, reason, message, remembered, offered, "{what}; see docs/ledger.md for what to do");
}

fn shortened(text: &str) -> String {
    shortened_to(text, MAX_TEXT)
}

fn shortened_to(text: &str, most: usize) -> String {
    beginning(text, most).to_owned()
}

#[cfg(test)]
mod tests;
