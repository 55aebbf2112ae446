//! Which streams are open, and what their proxies hold: for `chancery-agent streams`, the metrics and the reports to the CA.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::sync::Notify;

use super::connection::StreamId;
use super::lock;
use super::secret::Version;
use super::stream::{Answer, Standing, StreamState, Variant};
use crate::svids::{ProxyLag, ProxySummary, Subscription, WorkloadKey};
use crate::telemetry::Metrics;

/// Proxies named in a summary.
const MAX_LAGGING: usize = 100;
/// Bundles whose sequence is remembered.
const MAX_BUNDLES: usize = 64;

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
    /// Why the proxy refused the last response; empty if it did not.
    pub nack: String,
    /// The stream was ended for a fresh token, and its proxy came back with the same one: is its token file refreshed?
    pub stale_token: bool,
    /// When the stream was opened.
    #[serde(with = "time::serde::rfc3339")]
    pub opened_at: OffsetDateTime,
    /// When the token it was opened with expires; nothing in sidecar mode.
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
    streams: Mutex<BTreeMap<StreamId, Arc<Record>>>,
    bundles: Mutex<Bundles>,
    acks: AtomicU64,
    nacks: AtomicU64,
    changed: Notify,
    metrics: Metrics,
}

/// What is kept of one stream.
#[derive(Debug)]
pub(super) struct Record {
    connection: u64,
    variant: Variant,
    workload: WorkloadKey,
    pod_name: String,
    opened_at: OffsetDateTime,
    token_expires_at: Option<OffsetDateTime>,
    pub(super) live: Mutex<Live>,
}

/// The part of it that changes.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) protocol: StreamState,
    pub(super) stale_token: bool,
}

/// A stream's place in the registry; dropping it takes the stream out.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) id: StreamId,
    pub(super) record: Arc<Record>,
    registry: Registry,
}

/// There are as many streams as the configuration allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the agent serves {0} streams already, as many as its configuration allows")]
pub struct Full(pub usize);

/// The newest sequence under which each bundle was served.
#[derive(Debug, Default)]
struct Bundles {
    current: Option<Version>,
    known: VecDeque<(Version, u64)>,
}

impl Registry {
    /// An empty one, for at most `limit` streams.
    pub fn new(limit: usize, metrics: Metrics) -> Self {
        Self(Arc::new(Shared {
            limit,
            next: AtomicU64::new(1),
            streams: Mutex::default(),
            bundles: Mutex::default(),
            acks: AtomicU64::new(0),
            nacks: AtomicU64::new(0),
            changed: Notify::new(),
            metrics,
        }))
    }

    /// Every open stream, in the order of their opening.
    pub fn list(&self) -> Vec<StreamStatus> {
        let records: Vec<_> = lock(&self.0.streams).iter().map(|(id, record)| (*id, record.clone())).collect();
        records.iter().map(|(id, record)| self.status(*id, record)).collect()
    }

    /// How many streams are open.
    pub fn len(&self) -> usize {
        lock(&self.0.streams).len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The sum of it, for the report to the CA.
    pub fn summary(&self) -> ProxySummary {
        let records: Vec<_> = lock(&self.0.streams).values().cloned().collect();
        let current = lock(&self.0.bundles).current;
        let mut summary = ProxySummary {
            streams: u32::try_from(records.len()).unwrap_or(u32::MAX),
            acks: self.0.acks.load(Ordering::Relaxed),
            nacks: self.0.nacks.load(Ordering::Relaxed),
            ..ProxySummary::default()
        };
        for record in records {
            let live = lock(&record.live);
            let Some(held) = live.protocol.bundle_held().filter(|held| *held != current) else { continue };
            summary.lagging_total += 1;
            if summary.lagging.len() < MAX_LAGGING {
                summary.lagging.push(ProxyLag {
                    proxy: live.protocol.node().to_owned(),
                    pod: format!("{}/{}", record.workload.namespace, record.pod_name),
                    trust_sequence: self.sequence_of(held),
                    nack: live.protocol.nack().unwrap_or_default().to_owned(),
                });
            }
        }
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
        connection: u64,
        variant: Variant,
        subscription: &Subscription,
        stale_token: bool,
        now: OffsetDateTime,
    ) -> Result<Entry, Full> {
        let record = Arc::new(Record {
            connection,
            variant,
            workload: subscription.workload.clone(),
            pod_name: subscription.pod_name.clone(),
            opened_at: now,
            token_expires_at: subscription.token.as_ref().map(|token| token.expires_at),
            live: Mutex::new(Live { protocol: StreamState::new(variant), stale_token }),
        });
        let id = self.0.next.fetch_add(1, Ordering::Relaxed);
        {
            let mut streams = lock(&self.0.streams);
            if streams.len() >= self.0.limit {
                return Err(Full(self.0.limit));
            }
            streams.insert(id, record.clone());
        }
        self.0.metrics.streams.inc();
        self.note_change();
        Ok(Entry { id, record, registry: self.clone() })
    }

    /// Which bundle is being served from now on, and under which sequence.
    pub(super) fn note_bundle(&self, version: Version, sequence: u64) {
        let mut bundles = lock(&self.0.bundles);
        if bundles.current == Some(version) && bundles.known.back() == Some(&(version, sequence)) {
            return;
        }
        bundles.current = Some(version);
        bundles.known.retain(|(known, _)| *known != version);
        if bundles.known.len() == MAX_BUNDLES {
            bundles.known.pop_front();
        }
        bundles.known.push_back((version, sequence));
        drop(bundles);
        self.note_change();
    }

    pub(super) fn note_change(&self) {
        self.0.changed.notify_one();
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    fn sequence_of(&self, held: Option<Version>) -> u64 {
        let bundles = lock(&self.0.bundles);
        let known = bundles.known.iter().find(|(version, _)| Some(*version) == held);
        known.map_or(0, |(_, sequence)| *sequence)
    }

    fn status(&self, id: StreamId, record: &Record) -> StreamStatus {
        let live = lock(&record.live);
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
            trust_sequence: live.protocol.bundle_held().map(|held| self.sequence_of(held)),
            nack: live.protocol.nack().unwrap_or_default().to_owned(),
            stale_token: live.stale_token,
            opened_at: record.opened_at,
            token_expires_at: record.token_expires_at,
        }
    }
}

impl Entry {
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
        lock(&self.registry.0.streams).remove(&self.id);
        self.registry.0.metrics.streams.dec();
        self.registry.note_change();
    }
}
