//! The task that owns every workload.
//!
//! Requests that wait together travel together. One is sent at once while no call is under way; otherwise requests gather until a call
//! returns, a call is full, or a moment has passed: so the first pod after a pause waits for nothing, and a thousand pods at once need
//! few calls. At most [`MAX_CALLS`] are under way.
//!
//! Deadlines are wall-clock times, compared with the clock at each tick, so a machine that slept renews on waking.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use chancery_identity::{Clock, TrustState, verify_chain};
use chancery_proto::chancery::v1 as wire;
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::accounts::Accounts;
use super::batch::{self, Answer, Ask, Failure};
use super::keep::Keep;
use super::state::{RestoredWorkload, State};
use super::workload::{TokenSource, Workload};
use super::{AttachError, Hold, Settings, Subscription, WorkloadKey, WorkloadStatus};
use crate::ca_client::{CaClient, Held, Holdings};
use crate::telemetry::{Metrics, Reason};
use chancery_process::moment::moment;

const MAX_CALLS: usize = 4;
/// How long a request waits for company while calls are under way.
const GATHER: Duration = Duration::from_millis(5);
const COMMANDS_AT_ONCE: usize = 64;
/// The clock is not looked at more often than this.
const SHORTEST_TICK: Duration = Duration::from_millis(10);
/// Orders to issue everything anew are spread over this time, since every agent gets them at once.
const ORDER_SPREAD: Duration = Duration::from_millis(200);

/// Which certificates lead to a trusted root. Those that one issuing certificate signed stand and fall together, so that thousands are judged
/// by a few.
struct Chains<'a> {
    trust: &'a TrustState,
    now: OffsetDateTime,
    good: HashSet<CertificateDer<'static>>,
}

impl Chains<'_> {
    fn are_trusted(&mut self, held: &Held) -> bool {
        let chain = held.svid.chain();
        if chain.get(1).is_some_and(|issuing| self.good.contains(issuing)) {
            return true;
        }
        let is_trusted = verify_chain(chain, self.trust, self.now).is_ok();
        if is_trusted {
            self.good.extend(chain.get(1).cloned());
        }
        is_trusted
    }
}

/// What the handles ask of the task.
#[derive(Debug)]
pub(super) enum Command {
    Attach {
        key: WorkloadKey,
        pod_name: String,
        token: TokenSource,
        reply: oneshot::Sender<Result<Subscription, AttachError>>,
    },
    /// Keeps a workload although it has no stream yet.
    Hold {
        key: WorkloadKey,
        pod_name: String,
        token: TokenSource,
        reply: oneshot::Sender<Result<Hold, AttachError>>,
    },
    /// A workload's pod is gone.
    Leave {
        key: WorkloadKey,
    },
    Status {
        reply: oneshot::Sender<Vec<WorkloadStatus>>,
    },
}

pub(super) struct Owner {
    settings: Settings,
    accounts: Accounts,
    ca: CaClient,
    clock: Arc<dyn Clock>,
    metrics: Metrics,
    workloads: HashMap<WorkloadKey, Workload>,
    /// To be sent, in order; each workload at most once, so it is bounded as they are.
    queue: VecDeque<WorkloadKey>,
    /// Until then requests gather.
    gather_until: Option<Instant>,
    calls: JoinSet<Vec<Answer>>,
    /// Whose requests a call carries, should it end without an answer.
    under_way: HashMap<Id, Vec<WorkloadKey>>,
    keep: Keep,
    /// When to look at the clock.
    wake: Instant,
    /// The CA is being told what there is.
    telling: Option<AbortOnDropHandle<()>>,
    /// Below this time to the first expiry the next alarm is due.
    alarm_below: Option<time::Duration>,
}

impl Owner {
    pub(super) fn new(
        settings: Settings,
        restored: Vec<RestoredWorkload>,
        accounts: Accounts,
        ca: CaClient,
        clock: Arc<dyn Clock>,
        metrics: Metrics,
    ) -> Self {
        let now = clock.now();
        for kept in &restored {
            accounts.restored(&kept.key, &kept.pod_name, &kept.held, &kept.proxies);
        }
        let workloads = restored
            .into_iter()
            .take(settings.max_workloads)
            .map(|kept| (kept.key.clone(), Workload::restored(kept.key, kept.pod_name, kept.held, now, settings.renew_from)))
            .collect();
        let keep = Keep::new(settings.state.clone(), metrics.clone());
        Self {
            settings,
            accounts,
            ca,
            clock,
            metrics,
            workloads,
            queue: VecDeque::new(),
            gather_until: None,
            calls: JoinSet::new(),
            under_way: HashMap::new(),
            keep,
            wake: Instant::now(),
            telling: None,
            alarm_below: None,
        }
    }

    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>, shutdown: CancellationToken) {
        let mut reachable = self.ca.reachable();
        let mut orders = self.ca.reissue_orders();
        let mut tell_orders = self.ca.tell_orders();
        let mut remembered = (self.ca.trust(), self.ca.cluster_keys(), self.ca.own());
        let mut buffer = Vec::with_capacity(COMMANDS_AT_ONCE);
        // What was kept may be older than the trust state beside it.
        self.replace_untrusted();
        loop {
            let wake = [Some(self.wake), self.gather_until, self.keep.due()].into_iter().flatten().min().unwrap_or(self.wake);
            tokio::select! {
                received = commands.recv_many(&mut buffer, COMMANDS_AT_ONCE) => {
                    if received == 0 {
                        break;
                    }
                    buffer.drain(..).for_each(|command| self.obey(command));
                }
                Some(ended) = self.calls.join_next_with_id() => self.end_call(ended),
                Ok(()) = reachable.changed() => self.reachability(&mut reachable),
                Ok(()) = orders.changed() => self.reissue_all(),
                Ok(()) = tell_orders.changed() => self.tell_certificates(),
                Ok(()) = remembered.0.changed() => self.trust_changed(&mut remembered.0),
                Ok(()) = remembered.1.changed() => self.keep.changed(),
                Ok(()) = remembered.2.changed() => self.keep.changed(),
                () = self.accounts.changed() => self.keep.changed_soon(),
                released = self.keep.written() => self.publish(&released),
                () = tokio::time::sleep_until(wake) => {}
                () = shutdown.cancelled() => break,
            }
            if Instant::now() >= self.wake {
                self.look_at_clock();
            }
            self.dispatch();
            if self.keep.is_due() {
                self.keep.write(self.state());
            }
        }
        let state = self.state();
        self.keep.finish(state).await;
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Attach { key, pod_name, token, reply } => {
                // Nobody waits if the stream has gone meanwhile; the subscription is then dropped here.
                let _ = reply.send(self.attach(&key, pod_name, token));
            }
            Command::Hold { key, pod_name, token, reply } => {
                let _ = reply.send(self.hold(&key, pod_name, token));
            }
            Command::Leave { key } => {
                if let Some(workload) = self.workloads.get_mut(&key) {
                    workload.leave();
                    self.wake = Instant::now();
                }
            }
            Command::Status { reply } => {
                let away = self.ca.problem();
                let mut all: Vec<_> = self.workloads.values().map(|workload| workload.status(&away)).collect();
                all.sort_by(|a, b| a.workload.cmp(&b.workload));
                let _ = reply.send(all);
            }
        }
    }

    fn attach(&mut self, key: &WorkloadKey, pod_name: String, token: TokenSource) -> Result<Subscription, AttachError> {
        let (now, most) = (self.clock.now(), self.settings.max_streams);
        let workload = self.workload(key, pod_name)?;
        if workload.streams() >= most {
            return Err(AttachError::Busy(format!("{} has {most} streams already; raise limits.streams_per_workload", workload.key())));
        }
        let subscription = workload.attach(token, now);
        self.enqueue(&subscription.workload, now);
        Ok(subscription)
    }

    fn hold(&mut self, key: &WorkloadKey, pod_name: String, token: TokenSource) -> Result<Hold, AttachError> {
        let now = self.clock.now();
        let hold = self.workload(key, pod_name)?.hold(token, now);
        self.enqueue(key, now);
        Ok(hold)
    }

    /// The one that is known, or a new one.
    fn workload(&mut self, key: &WorkloadKey, pod_name: String) -> Result<&mut Workload, AttachError> {
        let most = self.settings.max_workloads;
        if !self.workloads.contains_key(key) && self.workloads.len() >= most {
            return Err(AttachError::Busy(format!("this agent keeps certificates for {most} workloads already; raise limits.workloads")));
        }
        let now = self.clock.now();
        Ok(self.workloads.entry(key.clone()).or_insert_with(|| Workload::new(key.clone(), pod_name, now)))
    }

    /// Its certificate is asked for at once if it is due.
    fn enqueue(&mut self, key: &WorkloadKey, now: OffsetDateTime) {
        if let Some(workload) = self.workloads.get_mut(key) {
            enqueue(&mut self.queue, workload, now);
        }
        self.wake = self.wake.min(Instant::now() + self.settings.tick);
    }

    fn reachability(&mut self, reachable: &mut watch::Receiver<bool>) {
        if *reachable.borrow_and_update() {
            let now = self.clock.now();
            self.workloads.values_mut().for_each(|workload| workload.retry(now));
        }
        self.wake = Instant::now();
    }

    fn trust_changed(&mut self, trust: &mut watch::Receiver<Option<Arc<TrustState>>>) {
        self.keep.changed();
        trust.mark_unchanged();
        self.replace_untrusted();
    }

    /// Asks for others in the place of certificates that nobody takes any more: those that are revoked, and those whose root has left the
    /// bundle, as after a change of the trust roots that this agent was away for.
    fn replace_untrusted(&mut self) {
        let Some(trust) = self.ca.trust().borrow().clone() else { return };
        let now = self.clock.now();
        let mut chains = Chains { trust: &trust, now, good: HashSet::new() };
        for workload in self.workloads.values_mut() {
            let Some(held) = workload.held() else { continue };
            let problem = match &trust.crl {
                Some(crl) if crl.revokes(held.svid.serial()) => "it was revoked",
                _ if chains.are_trusted(held) => continue,
                _ => "no trusted root stands above it any more",
            };
            tracing::warn!(workload = %workload.key(), problem, "asking for another certificate");
            workload.reissue(now);
            self.wake = Instant::now();
        }
    }

    fn reissue_all(&mut self) {
        let at = self.clock.now() + ORDER_SPREAD.mul_f64(rand::random());
        self.workloads.values_mut().for_each(|workload| workload.reissue(at));
        self.wake = Instant::now();
    }

    fn tell_certificates(&mut self) {
        let held = |workload: &Workload| {
            let WorkloadKey { pod_uid, namespace, service_account } = workload.key().clone();
            let (chain, pod) = (workload.held()?.chain(), workload.pod_name().to_owned());
            Some(wire::HeldCertificate { chain, namespace, service_account, pod, pod_uid: pod_uid.as_bytes().to_vec() })
        };
        let held = self.workloads.values().filter_map(held).collect();
        let ca = self.ca.clone();
        let telling = tokio::spawn(async move { ca.tell_certificates(held).await });
        self.telling = Some(AbortOnDropHandle::new(telling));
    }

    /// Compares every deadline with the clock.
    fn look_at_clock(&mut self) {
        let now = self.clock.now();
        let grace = self.settings.grace;
        let mut next = now + self.settings.tick;
        let mut first_expiry: Option<OffsetDateTime> = None;
        let (queue, keep) = (&mut self.queue, &mut self.keep);
        self.workloads.retain(|key, workload| {
            if workload.is_abandoned(now, grace) {
                tracing::info!(workload = %key, "let go: its last stream has been gone for a while");
                queue.retain(|queued| queued != key);
                keep.changed();
                return false;
            }
            if workload.expire(now) {
                tracing::error!(workload = %key, "its certificate has expired");
                keep.changed();
            }
            enqueue(queue, workload, now);
            next = workload.deadline(grace).map_or(next, |deadline| deadline.min(next));
            let expiry = workload.held().map(|held| held.svid.not_after());
            first_expiry = [first_expiry, expiry].into_iter().flatten().min();
            true
        });
        self.wake = Instant::now() + (next - now).try_into().unwrap_or(SHORTEST_TICK).max(SHORTEST_TICK);
        self.tell(first_expiry, now);
    }

    fn tell(&mut self, first_expiry: Option<OffsetDateTime>, now: OffsetDateTime) {
        let workloads = self.workloads.len();
        self.ca.set_holdings(Holdings { workloads: u32::try_from(workloads).unwrap_or(u32::MAX), first_expiry });
        self.metrics.workloads.set(i64::try_from(workloads).unwrap_or(i64::MAX));
        let own_expiry = self.ca.own().borrow().as_ref().map(|own| own.svid.not_after());
        self.metrics.own_expiry.set(own_expiry.map_or(0, |at| (at - now).whole_seconds()));
        let left = first_expiry.map(|at| at - now);
        self.metrics.first_expiry.set(left.map_or(0, time::Duration::whole_seconds));
        let away = !*self.ca.reachable().borrow();
        match left {
            Some(left) if away && self.alarm_below.is_none_or(|below| left < below) => {
                self.alarm_below = Some(left / 2);
                tracing::warn!(
                    seconds = left.whole_seconds(),
                    problem = self.ca.problem(),
                    "the first certificate expires then if the CA stays away"
                );
            }
            _ if !away => self.alarm_below = None,
            _ => {}
        }
    }

    /// Sends what may be sent now.
    fn dispatch(&mut self) {
        let away = !*self.ca.reachable().borrow();
        while !away && !self.queue.is_empty() && self.calls.len() < MAX_CALLS {
            let gathering = !self.calls.is_empty() && self.queue.len() < self.settings.max_batch;
            if gathering && Instant::now() < *self.gather_until.get_or_insert_with(|| Instant::now() + GATHER) {
                break;
            }
            self.gather_until = None;
            self.send_batch();
        }
        if away || self.queue.is_empty() || self.calls.len() >= MAX_CALLS {
            // Nothing to wait for but a call's return or the CA's.
            self.gather_until = None;
        }
        self.metrics.queue.set(i64::try_from(self.queue.len()).unwrap_or(i64::MAX));
    }

    fn send_batch(&mut self) {
        let now = self.clock.now();
        let mut asks = Vec::new();
        while asks.len() < self.settings.max_batch
            && let Some(key) = self.queue.pop_front()
        {
            let asked = self.workloads.get_mut(&key).and_then(|workload| workload.ask(now));
            asks.extend(asked.map(|(token, reason)| Ask { key, token, reason }));
        }
        if asks.is_empty() {
            return;
        }
        let keys = asks.iter().map(|ask| ask.key.clone()).collect();
        let call = batch::run(self.ca.clone(), self.clock.clone(), self.settings.key_type, asks);
        let id = self.calls.spawn(call).id();
        self.under_way.insert(id, keys);
    }

    fn end_call(&mut self, ended: Result<(Id, Vec<Answer>), JoinError>) {
        let now = self.clock.now();
        match ended {
            Ok((id, answers)) => {
                self.under_way.remove(&id);
                for answer in answers {
                    self.take(answer, now);
                }
            }
            Err(error) => {
                tracing::error!(%error, "a call ended without an answer");
                let lost = Failure::Lost(error.to_string());
                for key in self.under_way.remove(&error.id()).unwrap_or_default() {
                    if let Some(workload) = self.workloads.get_mut(&key) {
                        workload.failed(&lost, now);
                    }
                }
            }
        }
        self.wake = Instant::now();
    }

    fn take(&mut self, answer: Answer, now: OffsetDateTime) {
        let Answer { key, request_id, outcome } = answer;
        let Some(workload) = self.workloads.get_mut(&key) else { return };
        match outcome {
            Ok(held) => {
                let (svid, entry) = (&held.svid, held.entry);
                tracing::info!(%request_id, workload = %key, id = %svid.id(), serial = %svid.serial(), expires_at = %moment(svid.not_after()), entry, "issued");
                self.accounts.issued(&key, workload.pod_name(), &held);
                self.metrics.issued.inc();
                workload.succeeded(held, now, self.settings.renew_from);
                if self.keep.issued(&key) {
                    workload.publish();
                }
            }
            Err(failure) => {
                match &failure {
                    Failure::Refused { reason, .. } => {
                        self.metrics.refused.get_or_create(&Reason { reason: reason.clone() }).inc();
                    }
                    Failure::Rejected(_) => {
                        self.metrics.rejected.inc();
                    }
                    Failure::Call(_) | Failure::Lost(_) => {}
                }
                let kept = workload.held().map(|held| held.svid.not_after());
                if let Some(expires_at) = kept {
                    self.metrics.renewals_failed.inc();
                    tracing::error!(%request_id, workload = %key, error = %failure, expires_at = %moment(expires_at), "not renewed; the last certificate is kept until it expires");
                } else {
                    tracing::error!(%request_id, workload = %key, error = %failure, "no certificate");
                }
                workload.failed(&failure, now);
            }
        }
    }

    /// Hands out what the state file has, or will not have soon.
    fn publish(&mut self, released: &[WorkloadKey]) {
        for key in released {
            if let Some(workload) = self.workloads.get(key) {
                workload.publish();
            }
        }
    }

    /// What to keep for a restart.
    fn state(&self) -> State {
        let kept = |workload: &Workload| {
            let held = workload.held()?.clone();
            let proxies = self.accounts.proxies(workload.key().pod_uid);
            Some(RestoredWorkload { key: workload.key().clone(), pod_name: workload.pod_name().to_owned(), held, proxies })
        };
        State { remembered: self.ca.remembered(), workloads: self.workloads.values().filter_map(kept).collect() }
    }
}

fn enqueue(queue: &mut VecDeque<WorkloadKey>, workload: &mut Workload, now: OffsetDateTime) {
    if workload.queue_when_due(now) {
        queue.push_back(workload.key().clone());
    }
}
