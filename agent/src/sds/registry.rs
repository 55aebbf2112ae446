//! Which streams are open, and what their proxies hold: for `chancery-agent streams`, the metrics and the reports to the CA.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use chancery_identity::Clock;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::sync::Notify;

use super::connection::{Connection, StreamId};
use super::holders::{self, Ages, Away, AwayByPod, Sum};
use super::lock;
use super::secret::Version;
use super::stream::{Answer, Standing, StreamState, Variant};
use crate::svids::accounts::{Accounts, Taken};
use crate::svids::{ProxySummary, Subscription, WorkloadKey};
use crate::telemetry::Metrics;

/// One name of a stream, as `chancery-agent streams` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameStatus {
    /// As the proxy asked for it.
    pub name: String,
    /// `waiting`, `served` or `withheld`.
    pub standing: String,
    /// The version sent last on this stream; empty if none was.
    pub sent: String,
    /// The version that the proxy accepted last; empty if none of ours.
    pub held: String,
}

/// One open stream, as `chancery-agent streams` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamStatus {
    /// Among all of the process.
    pub stream: u64,
    /// Streams of one connection are of one proxy.
    pub connection: u64,
    /// `world` (`StreamSecrets`) or `delta` (`DeltaSecrets`).
    pub protocol: String,
    /// The proxy's node ID, as it named itself.
    pub proxy: String,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's service account.
    pub service_account: String,
    /// The pod's name.
    pub pod: String,
    /// What the stream asked for.
    pub names: Vec<NameStatus>,
    /// For a validation context: of the trust state whose bundle the proxy holds; 0 if it is none that this agent has served.
    pub trust_sequence: Option<u64>,
    /// For a certificate: the ledger's entry of the one that the proxy holds; 0 if it is none that this agent has served.
    #[serde(default)]
    pub certificate_entry: Option<u64>,
    /// Why the proxy refused the last response; empty if it did not.
    pub nack: String,
    /// The stream was ended for a fresh token, and its proxy came back with the same one: is its token file refreshed?
    pub stale_token: bool,
    /// When the stream was opened.
    #[serde(with = "time::serde::rfc3339")]
    pub opened_at: OffsetDateTime,
    /// It came by a socket that is its pod's alone: that of a CSI volume.
    #[serde(default)]
    pub own_socket: bool,
    /// When the token it was opened with expires; nothing in sidecar mode and on a pod's own socket.
    #[serde(with = "time::serde::rfc3339::option")]
    pub token_expires_at: Option<OffsetDateTime>,
}

/// Every open stream. Clones are the same registry.
#[derive(Clone, Debug)]
pub struct Registry(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    limit: usize,
    next: AtomicU64,
    streams: Mutex<Streams>,
    ages: Mutex<Ages>,
    acks: AtomicU64,
    nacks: AtomicU64,
    changed: Notify,
    metrics: Metrics,
}

/// Under one lock, so that nobody is counted in neither when a stream ends or comes back.
#[derive(Debug, Default)]
struct Streams {
    open: BTreeMap<StreamId, Arc<Record>>,
    away: AwayByPod,
}

/// What is kept of one stream.
#[derive(Debug)]
pub(super) struct Record {
    connection: u64,
    own_socket: bool,
    variant: Variant,
    workload: WorkloadKey,
    pod_name: String,
    /// `namespace/name`.
    pod: Arc<str>,
    opened_at: OffsetDateTime,
    token_expires_at: Option<OffsetDateTime>,
    pub(super) live: Mutex<Live>,
}

/// The part of it that changes.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) protocol: StreamState,
    pub(super) stale_token: bool,
    /// What the proxy asked for, and what of that its pod's account has.
    asked: Taken,
    told: Taken,
}

/// A stream's place in the registry; dropping it takes the stream out.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) id: StreamId,
    pub(super) record: Arc<Record>,
    registry: Registry,
    clock: Arc<dyn Clock>,
}

/// There are as many streams as the configuration allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the agent serves {0} streams already, as many as its configuration allows")]
pub struct Full(pub usize);

impl Registry {
    /// An empty one, for at most `limit` streams.
    pub fn new(limit: usize, metrics: Metrics) -> Self {
        Self(Arc::new(Shared {
            limit,
            next: AtomicU64::new(1),
            streams: Mutex::default(),
            ages: Mutex::default(),
            acks: AtomicU64::new(0),
            nacks: AtomicU64::new(0),
            changed: Notify::new(),
            metrics,
        }))
    }

    /// Every open stream, in the order of their opening.
    pub fn list(&self) -> Vec<StreamStatus> {
        let records: Vec<_> = lock(&self.0.streams).open.iter().map(|(id, record)| (*id, record.clone())).collect();
        records.iter().map(|(id, record)| self.status(*id, record)).collect()
    }

    /// How many streams are open.
    pub fn len(&self) -> usize {
        lock(&self.0.streams).open.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The sum of it, for the report to the CA. `accounts`: the pods that certificates were issued to.
    pub fn summary(&self, accounts: &Accounts, now: OffsetDateTime) -> ProxySummary {
        // In this order: a stream that opens or ends meanwhile is then counted twice rather than not at all.
        let (accounts, pods_version) = accounts.alive(now);
        let (open, away) = {
            let mut streams = lock(&self.0.streams);
            let open: Vec<_> = streams.open.values().cloned().collect();
            let with_streams: HashSet<_> = open.iter().map(|record| record.workload.pod_uid).collect();
            let counts = |pod: &uuid::Uuid| accounts.contains_key(pod) || with_streams.contains(pod);
            holders::forget(&mut lock(&self.0.ages), &mut streams.away, counts);
            (open, streams.away.clone())
        };
        let ages = lock(&self.0.ages);
        let mut sum = Sum::new(&ages, &accounts);
        for record in &open {
            sum.open(record.workload.pod_uid, &record.pod, &lock(&record.live).protocol);
        }
        for (pod_uid, left) in away.iter().flat_map(|(pod_uid, of_pod)| of_pod.iter().map(move |left| (pod_uid, left))) {
            sum.away(*pod_uid, left);
        }
        let mut pods: Vec<_> = accounts.keys().copied().collect();
        pods.sort_unstable();
        let mut summary = ProxySummary {
            streams: u32::try_from(open.len()).unwrap_or(u32::MAX),
            acks: self.0.acks.load(Ordering::Relaxed),
            nacks: self.0.nacks.load(Ordering::Relaxed),
            pods: pods.into(),
            pods_version,
            ..ProxySummary::default()
        };
        sum.finish(&mut summary);
        summary
    }

    /// Comes back when something has changed since it last did.
    pub async fn changed(&self) {
        self.0.changed.notified().await;
    }

    /// Names of streams that their workloads may not have, with the pod: problems for `status`.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for stream in self.list() {
            let who = format!("{}/{}", stream.namespace, stream.pod);
            for name in stream.names.iter().filter(|name| name.standing == "withheld") {
                problems.push(format!("{who}: asks for the secret {:?}, which is not its own; the name is held back", name.name));
            }
            if stream.stale_token {
                problems.push(format!("{who}: came back with the same token after its stream was ended; is its token file refreshed?"));
            }
            if !stream.nack.is_empty() {
                problems.push(format!("{who}: refused a secret: {}", stream.nack));
            }
        }
        problems
    }

    pub(super) fn open(
        &self,
        connection: &Connection,
        variant: Variant,
        subscription: &Subscription,
        stale_token: bool,
        clock: Arc<dyn Clock>,
    ) -> Result<Entry, Full> {
        let record = Arc::new(Record {
            connection: connection.id(),
            own_socket: connection.tenant().is_some(),
            variant,
            workload: subscription.workload.clone(),
            pod_name: subscription.pod_name.clone(),
            pod: format!("{}/{}", subscription.workload.namespace, subscription.pod_name).into(),
            opened_at: clock.now(),
            token_expires_at: subscription.token.as_ref().map(|token| token.expires_at),
            live: Mutex::new(Live { protocol: StreamState::new(variant), stale_token, asked: Taken::default(), told: Taken::default() }),
        });
        let id = self.0.next.fetch_add(1, Ordering::Relaxed);
        {
            let mut streams = lock(&self.0.streams);
            if streams.open.len() >= self.0.limit {
                return Err(Full(self.0.limit));
            }
            streams.open.insert(id, record.clone());
        }
        self.0.metrics.streams.inc();
        self.note_change();
        Ok(Entry { id, record, registry: self.clone(), clock })
    }

    /// Which bundle is being served from now on, and under which sequence.
    pub(super) fn note_bundle(&self, version: Version, sequence: u64) {
        if lock(&self.0.ages).note_bundle(version, sequence) {
            self.note_change();
        }
    }

    pub(super) fn note_change(&self) {
        self.0.changed.notify_one();
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    fn status(&self, id: StreamId, record: &Record) -> StreamStatus {
        let ages = lock(&self.0.ages);
        let live = lock(&record.live);
        let certificate = live.protocol.uses().find(|used| used.is_certificate && used.given);
        let text = |version: Option<Version>| version.map_or_else(String::new, |version| version.to_string());
        let names = live.protocol.names().map(|name| NameStatus {
            name: name.name.to_owned(),
            standing: match name.standing {
                Standing::Waiting => "waiting",
                Standing::Served => "served",
                Standing::Withheld => "withheld",
            }
            .to_owned(),
            sent: text(name.sent),
            held: text(name.held),
        });
        StreamStatus {
            stream: id,
            connection: record.connection,
            protocol: match record.variant {
                Variant::World => "world",
                Variant::Delta => "delta",
            }
            .to_owned(),
            proxy: live.protocol.node().to_owned(),
            namespace: record.workload.namespace.clone(),
            service_account: record.workload.service_account.clone(),
            pod: record.pod_name.clone(),
            names: names.collect(),
            trust_sequence: live.protocol.bundle_held().map(|held| ages.sequence_of(held)),
            certificate_entry: certificate.map(|used| ages.entry_of(record.workload.pod_uid, used.held)),
            nack: live.protocol.nack().unwrap_or_default().to_owned(),
            stale_token: live.stale_token,
            opened_at: record.opened_at,
            own_socket: record.own_socket,
            token_expires_at: record.token_expires_at,
        }
    }
}

impl Entry {
    /// A certificate is being served, which this entry of the ledger records.
    pub(super) fn note_certificate(&self, version: Version, entry: u64, accounts: &Accounts) {
        lock(&self.registry.0.ages).note_certificate(self.record.workload.pod_uid, version, entry);
        self.tell(accounts);
    }

    /// Tells the pod's account what the proxy asked for; there is none before the first certificate.
    fn tell(&self, accounts: &Accounts) {
        let mut live = lock(&self.record.live);
        if live.asked != live.told && accounts.asked(self.record.workload.pod_uid, live.protocol.node(), live.asked) {
            live.told = live.asked;
        }
    }

    /// Takes in which names the proxy asks for: what it held of them before is replaced by what it says now.
    pub(super) fn note_names(&self, accounts: &Accounts) {
        let (proxy, anew): (Box<str>, _) = {
            let mut live = lock(&self.record.live);
            let anew = live.protocol.asked_anew();
            live.asked = anew.iter().fold(live.asked, |asked, used| asked.and(taken_by(used.is_certificate)));
            (live.protocol.node().into(), anew)
        };
        if anew.is_empty() {
            return;
        }
        {
            let mut streams = lock(&self.registry.0.streams);
            let pod_uid = self.record.workload.pod_uid;
            for used in &anew {
                holders::come_back(&mut streams.away, pod_uid, &proxy, &used.name);
            }
        }
        self.tell(accounts);
        self.registry.note_change();
    }

    /// Counts what a request said.
    pub(super) fn note_answer(&self, answer: &Answer) {
        let shared = &self.registry.0;
        match answer {
            Answer::None => return,
            Answer::Ack => {
                shared.acks.fetch_add(1, Ordering::Relaxed);
                shared.metrics.acks.inc();
            }
            Answer::Nack(words) => {
                shared.nacks.fetch_add(1, Ordering::Relaxed);
                shared.metrics.nacks.inc();
                let Record { workload, pod_name, .. } = &*self.record;
                tracing::warn!(stream = self.id, namespace = workload.namespace, pod = pod_name, %words, "the proxy refused a secret and keeps what it had");
            }
        }
        self.registry.note_change();
    }

    /// Reports names that are held back.
    pub(super) fn note_withheld(&self, names: &[String]) {
        let Record { workload, pod_name, .. } = &*self.record;
        for name in names {
            self.registry.0.metrics.names_withheld.inc();
            tracing::warn!(
                stream = self.id,
                namespace = workload.namespace,
                pod = pod_name,
                ?name,
                "the proxy asks for a secret that is not its workload's; the name is held back. It may have `default`, `ROOTCA`, its own SPIFFE ID and its trust domain's"
            );
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let left: Vec<_> = {
            let live = lock(&self.record.live);
            let away = |used| Away {
                proxy: live.protocol.node().into(),
                used,
                nack: live.protocol.nack().map(Into::into),
                since: self.clock.now(),
            };
            live.protocol.uses().filter(|used| used.given).map(away).collect()
        };
        {
            let mut streams = lock(&self.registry.0.streams);
            streams.open.remove(&self.id);
            for left in left {
                holders::leave(&mut streams.away, self.record.workload.pod_uid, left);
            }
        }
        self.registry.0.metrics.streams.dec();
        self.registry.note_change();
    }
}

fn taken_by(is_certificate: bool) -> Taken {
    Taken { bundle: !is_certificate, certificate: is_certificate }
}
