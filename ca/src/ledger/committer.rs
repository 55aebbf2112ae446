//! Makes entries durable in groups: while the store syncs one group, everything that arrives waits in a bounded queue and becomes the next.
//!
//! One task owns the head of the log, the time of the last entry and the store's commit; the rest talk to it through the queue. So times and
//! epochs need no lock. Bodies are encoded by their callers; the task only puts version and time in front of them.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::{BufMut, BytesMut};
use chancery_identity::Clock;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use super::entry::{self, Body, Entry, MAX_PREFIX_BYTES};
use super::{LedgerError, LedgerHealth, LedgerStats, MAX_ENTRY_BYTES, SharedStore, StoreError};
use crate::store::{Group, Head, MAX_GROUP_BYTES, MAX_GROUP_ENTRIES};

/// A group takes no further request once it has this many entries …
const GROUP_ENTRIES: usize = 4096;
/// … or bytes. Small enough that the next group never waits long for this one's sync.
const GROUP_BYTES: usize = 1 << 20;
/// For so many turns of the runtime a group waits for more requests, if each turn brings some.
const MOST_TURNS: usize = 8;
/// What a request costs in the queue beside its entries' bytes.
const REQUEST_OVERHEAD_BYTES: usize = 256;
/// How often a group is tried again because another replica committed first, before its callers are told to try again.
const MAX_HEAD_MOVES: usize = 16;
/// How often a full disk is looked at again while nobody asks.
const ROOM_CHECK: Duration = Duration::from_secs(2);

/// A request to record: encoded bodies, and who waits for their indexes.
#[derive(Debug)]
pub(super) struct Append {
    epoch: Option<u64>,
    act: bool,
    bodies: Vec<u8>,
    /// Where each body ends in `bodies`.
    ends: Vec<usize>,
}

#[derive(Debug)]
struct Waiting {
    append: Append,
    reply: oneshot::Sender<Result<Range<u64>, LedgerError>>,
    /// Its share of the queue's bytes, given back when it is answered.
    _room: OwnedSemaphorePermit,
}

#[derive(Debug)]
enum Message {
    Append(Waiting),
    /// End, and say so.
    Stop(oneshot::Sender<()>),
}

/// The way to the committing task.
#[derive(Debug)]
pub(super) struct Queue {
    /// Bounded by `room`, in bytes, which a number of messages would not bound.
    sender: mpsc::UnboundedSender<Message>,
    room: Arc<Semaphore>,
    head: watch::Receiver<Head>,
    sealed: watch::Receiver<u64>,
    health: watch::Sender<LedgerHealth>,
    counters: Arc<Counters>,
}

#[derive(Debug, Default)]
struct Counters {
    groups: AtomicU64,
    entries: AtomicU64,
    last_group_entries: AtomicU64,
    commit_micros: AtomicU64,
    latency: Mutex<Latency>,
    queued_requests: AtomicU64,
    refused_busy: AtomicU64,
}

/// How long durable writes take, whether they succeed or not.
#[derive(Debug, Default)]
struct Latency {
    last: Duration,
    /// When the one under way began.
    since: Option<Instant>,
}

/// The committing task's own state.
#[derive(Debug)]
pub(super) struct Committer {
    store: SharedStore,
    clock: Arc<dyn Clock>,
    /// The end of the log; none if it must be read again.
    end: Option<End>,
    prefix: Vec<u8>,
    head: watch::Sender<Head>,
    sealed: watch::Sender<u64>,
    health: watch::Sender<LedgerHealth>,
    counters: Arc<Counters>,
}

/// The head with the time of the last entry, which the next one's must not be smaller than.
#[derive(Clone, Copy, Debug)]
struct End {
    head: Head,
    time_ms: i64,
}

impl Append {
    /// Encodes `bodies`, of which there is at least one.
    pub(super) fn encode(epoch: Option<u64>, bodies: Vec<Body>) -> Result<Self, LedgerError> {
        let act = bodies.iter().any(Body::is_act);
        let mut append = Self { epoch, act, bodies: Vec::with_capacity(1024 * bodies.len()), ends: Vec::with_capacity(bodies.len()) };
        for body in bodies {
            let start = append.bodies.len();
            body.encode_body(&mut append.bodies);
            let bytes = append.bodies.len() - start + MAX_PREFIX_BYTES;
            if bytes > MAX_ENTRY_BYTES {
                return Err(LedgerError::TooLarge { what: "entry", found: format!("{bytes} bytes"), most: MAX_ENTRY_BYTES });
            }
            append.ends.push(append.bodies.len());
        }
        if append.ends.len() > MAX_GROUP_ENTRIES {
            return Err(LedgerError::TooLarge {
                what: "request",
                found: format!("{} entries", append.ends.len()),
                most: MAX_GROUP_ENTRIES,
            });
        }
        if append.bytes() > MAX_GROUP_BYTES {
            return Err(LedgerError::TooLarge { what: "request", found: format!("{} bytes", append.bytes()), most: MAX_GROUP_BYTES });
        }
        Ok(append)
    }

    /// Upper bound of what its entries take in a group.
    fn bytes(&self) -> usize {
        self.bodies.len() + self.ends.len() * MAX_PREFIX_BYTES
    }
}

impl Queue {
    /// Waits until `append` is durable, and returns the entries' indexes.
    pub(super) async fn append(&self, append: Append) -> Result<Range<u64>, LedgerError> {
        // There is one act at a time, and it must get through.
        let cost = if append.act { 0 } else { append.bytes() + REQUEST_OVERHEAD_BYTES };
        let cost = u32::try_from(cost).unwrap_or(u32::MAX);
        let room = Arc::clone(&self.room).try_acquire_many_owned(cost).map_err(|error| match error {
            tokio::sync::TryAcquireError::Closed => LedgerError::Closed,
            tokio::sync::TryAcquireError::NoPermits => {
                self.counters.refused_busy.fetch_add(1, Ordering::Relaxed);
                LedgerError::Busy
            }
        })?;
        let (reply, answer) = oneshot::channel();
        self.counters.queued_requests.fetch_add(1, Ordering::Relaxed);
        self.sender.send(Message::Append(Waiting { append, reply, _room: room })).map_err(|_| LedgerError::Closed)?;
        answer.await.map_err(|_| LedgerError::Closed)?
    }

    /// Accepts no more and waits until what was accepted is answered.
    pub(super) async fn close(&self) {
        self.room.close();
        let (stopped, ended) = oneshot::channel();
        if self.sender.send(Message::Stop(stopped)).is_ok() {
            // An error says that the task had ended before.
            ended.await.ok();
        }
    }

    pub(super) fn head(&self) -> Head {
        *self.head.borrow()
    }

    /// Word of every group that has become durable. Ends with the committing task.
    pub(super) fn watch_head(&self) -> watch::Receiver<Head> {
        self.head.clone()
    }

    /// How many entries lie in sealed segments, and word of every change.
    pub(super) fn sealed(&self) -> watch::Receiver<u64> {
        self.sealed.clone()
    }

    pub(super) fn health(&self) -> watch::Receiver<LedgerHealth> {
        self.health.subscribe()
    }

    pub(super) fn set_health(&self, health: LedgerHealth) {
        set_health(&self.health, health);
    }

    pub(super) fn stats(&self) -> LedgerStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        LedgerStats {
            groups: read(&self.counters.groups),
            entries: read(&self.counters.entries),
            last_group_entries: read(&self.counters.last_group_entries),
            commit_time: Duration::from_micros(read(&self.counters.commit_micros)),
            commit_latency: self.counters.latency().longest(),
            queued_requests: read(&self.counters.queued_requests),
            refused_busy: read(&self.counters.refused_busy),
        }
    }
}

impl Committer {
    /// Reads where the log ends and starts the task.
    pub(super) async fn start(store: SharedStore, clock: Arc<dyn Clock>, queue_bytes: usize) -> Result<Queue, LedgerError> {
        let end = read_end(&store).await?;
        let (head_sender, head) = watch::channel(end.head);
        let (sealed_sender, sealed) = watch::channel(store.sealed());
        let health = watch::Sender::new(LedgerHealth::Ok);
        let (sender, receiver) = mpsc::unbounded_channel();
        let counters = Arc::new(Counters::default());
        let committer = Self {
            store,
            clock,
            end: Some(end),
            prefix: Vec::with_capacity(MAX_PREFIX_BYTES),
            head: head_sender,
            sealed: sealed_sender,
            health: health.clone(),
            counters: Arc::clone(&counters),
        };
        tokio::spawn(committer.run(receiver));
        let room = Arc::new(Semaphore::new(queue_bytes.min(Semaphore::MAX_PERMITS)));
        Ok(Queue { sender, room, head, sealed, health, counters })
    }

    async fn run(mut self, mut queue: mpsc::UnboundedReceiver<Message>) {
        let mut held = None;
        loop {
            let message = match held.take() {
                Some(message) => Some(message),
                None => self.next(&mut queue).await,
            };
            let first = match message {
                Some(Message::Append(first)) => first,
                Some(Message::Stop(stopped)) => {
                    stopped.send(()).ok();
                    return;
                }
                None => return,
            };
            if !first.append.act {
                wait_for_company(&queue).await;
            }
            let group;
            (group, held) = gather(first, &mut queue);
            self.counters.queued_requests.fetch_sub(group.len() as u64, Ordering::Relaxed);
            self.record(group).await;
        }
    }

    /// The next message. While the disk is full, the store is asked now and then whether there is room again: a CA that is not ready may be
    /// sent no request that would find out.
    async fn next(&mut self, queue: &mut mpsc::UnboundedReceiver<Message>) -> Option<Message> {
        while matches!(*self.health.borrow(), LedgerHealth::Full(_)) {
            match tokio::time::timeout(ROOM_CHECK, queue.recv()).await {
                Ok(message) => return message,
                Err(_) if self.store.make_room().await.is_ok() => self.tell(LedgerHealth::Ok),
                Err(_) => {}
            }
        }
        queue.recv().await
    }

    /// Commits `group` and answers it.
    async fn record(&mut self, mut group: Vec<Waiting>) {
        for _ in 0..MAX_HEAD_MOVES {
            if let LedgerHealth::Contradicted(proof) = &*self.health.borrow() {
                return refuse_all(group, &LedgerError::Contradicted(Arc::clone(proof)));
            }
            let end = match self.end().await {
                Ok(end) => end,
                Err(error) => return self.refuse(group, error),
            };
            group = refuse_older_epochs(group, end.head.epoch);
            if group.is_empty() {
                return;
            }
            // Where the clock was set back, time stands still until it has caught up.
            let time_ms = entry::to_millis(self.clock.now()).max(end.time_ms);
            let entries = self.lay_out(&group, time_ms);
            let started = Instant::now();
            self.counters.latency().since = Some(started);
            let committed = self.store.commit(end.head, entries).await;
            let took = started.elapsed();
            *self.counters.latency() = Latency { last: took, since: None };
            match committed {
                Ok(head) => {
                    self.count(&group, took);
                    self.end = Some(End { head, time_ms });
                    self.head.send_replace(head);
                    let sealed = self.store.sealed();
                    self.sealed.send_if_modified(|before| std::mem::replace(before, sealed) != sealed);
                    self.tell(LedgerHealth::Ok);
                    return answer(group, end.head.entries);
                }
                Err(StoreError::HeadMoved(_)) => self.end = None,
                Err(error) => return self.refuse(group, error),
            }
        }
        refuse_all(group, &LedgerError::Busy);
    }

    /// Where the log ends; read again after another replica moved it, or after a commit of which nothing is known.
    async fn end(&mut self) -> Result<End, StoreError> {
        if let LedgerHealth::Failed(error) = &*self.health.borrow() {
            return Err(error.clone());
        }
        if let Some(end) = self.end {
            return Ok(end);
        }
        let end = read_end(&self.store).await?;
        self.head.send_replace(end.head);
        Ok(*self.end.insert(end))
    }

    /// The group's entries, in one allocation.
    fn lay_out(&mut self, group: &[Waiting], time_ms: i64) -> Group {
        self.prefix.clear();
        entry::encode_prefix(time_ms, &mut self.prefix);
        let mut buffer = BytesMut::with_capacity(group.iter().map(|waiting| waiting.append.bytes()).sum());
        let mut entries = Vec::with_capacity(group.iter().map(|waiting| waiting.append.ends.len()).sum());
        for Waiting { append, .. } in group {
            let mut start = 0;
            for &end in &append.ends {
                buffer.put_slice(&self.prefix);
                buffer.put_slice(&append.bodies[start..end]);
                entries.push(buffer.split().freeze());
                start = end;
            }
        }
        Group { entries, raises_epoch: group.iter().any(|waiting| waiting.append.act) }
    }

    fn refuse(&mut self, group: Vec<Waiting>, error: StoreError) {
        let refusal = LedgerError::from(error.clone());
        match &refusal {
            LedgerError::Full(_) => self.tell(LedgerHealth::Full(error)),
            LedgerError::Failed(_) => self.tell(LedgerHealth::Failed(error)),
            _ => {
                // Whether the store wrote anything is not known.
                self.end = None;
                self.tell(LedgerHealth::Unavailable(error));
            }
        }
        refuse_all(group, &refusal);
    }

    fn tell(&self, health: LedgerHealth) {
        set_health(&self.health, health);
    }

    fn count(&self, group: &[Waiting], took: Duration) {
        let entries = group.iter().map(|waiting| waiting.append.ends.len() as u64).sum();
        self.counters.groups.fetch_add(1, Ordering::Relaxed);
        self.counters.entries.fetch_add(entries, Ordering::Relaxed);
        self.counters.last_group_entries.store(entries, Ordering::Relaxed);
        self.counters.commit_micros.fetch_add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

/// Publishes `health` if it is another kind than before; nothing follows what ends the recording.
fn set_health(of: &watch::Sender<LedgerHealth>, health: LedgerHealth) {
    of.send_if_modified(|current| {
        let changed = std::mem::discriminant(current) != std::mem::discriminant(&health);
        let changed = changed && !matches!(current, LedgerHealth::Failed(_) | LedgerHealth::Contradicted(_));
        if changed {
            *current = health;
        }
        changed
    });
}

impl Counters {
    fn latency(&self) -> MutexGuard<'_, Latency> {
        self.latency.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Latency {
    fn longest(&self) -> Duration {
        self.last.max(self.since.map_or(Duration::ZERO, |since| since.elapsed()))
    }
}

impl Waiting {
    /// Whoever asked may have gone meanwhile; the entries stand all the same.
    fn answer(self, result: Result<Range<u64>, LedgerError>) {
        self.reply.send(result).ok();
    }
}

/// Lets those who are about to ask get into the same group, which saves each of them a write, a sync and a wake-up: a turn of the runtime, and
/// another one as long as that brings more. Nobody else about to ask, nobody waits.
async fn wait_for_company(queue: &mpsc::UnboundedReceiver<Message>) {
    let mut waiting = queue.len();
    for _ in 0..MOST_TURNS {
        tokio::task::yield_now().await;
        let now = queue.len();
        if now == waiting {
            return;
        }
        waiting = now;
    }
}

/// What waits and fits into one group, `first` included; and the message that did not fit. An act is alone in its group, so that it finds room
/// in the space that is reserved for acts, whatever else is waiting.
fn gather(first: Waiting, queue: &mut mpsc::UnboundedReceiver<Message>) -> (Vec<Waiting>, Option<Message>) {
    let (mut entries, mut bytes, alone) = (first.append.ends.len(), first.append.bytes(), first.append.act);
    let mut group = vec![first];
    while !alone && entries < GROUP_ENTRIES && bytes < GROUP_BYTES {
        match queue.try_recv() {
            Ok(Message::Append(next)) => {
                entries += next.append.ends.len();
                bytes += next.append.bytes();
                if next.append.act || entries > GROUP_ENTRIES || bytes > GROUP_BYTES {
                    return (group, Some(Message::Append(next)));
                }
                group.push(next);
            }
            Ok(stop) => return (group, Some(stop)),
            Err(_) => break,
        }
    }
    (group, None)
}

fn refuse_older_epochs(group: Vec<Waiting>, current: u64) -> Vec<Waiting> {
    let (group, older): (Vec<_>, Vec<_>) = group.into_iter().partition(|waiting| waiting.append.epoch.is_none_or(|epoch| epoch == current));
    refuse_all(older, &LedgerError::EpochMoved { current });
    group
}

fn refuse_all(group: Vec<Waiting>, error: &LedgerError) {
    for waiting in group {
        waiting.answer(Err(error.clone()));
    }
}

fn answer(group: Vec<Waiting>, first: u64) {
    let mut next = first;
    for waiting in group {
        let start = next;
        next += waiting.append.ends.len() as u64;
        waiting.answer(Ok(start..next));
    }
}

async fn read_end(store: &SharedStore) -> Result<End, StoreError> {
    let head = store.head().await?;
    let Some(last) = head.entries.checked_sub(1) else { return Ok(End { head, time_ms: 0 }) };
    let entries = store.read(last..head.entries, MAX_ENTRY_BYTES).await?;
    let damaged = |detail: String| StoreError::Damaged { place: format!("entry {last}"), detail };
    let bytes = entries.first().ok_or_else(|| damaged("the last entry is missing".into()))?;
    let time_ms = Entry::decode_time(bytes).map_err(|error| damaged(error.to_string()))?;
    Ok(End { head, time_ms })
}
