//! Drives what is made of the entries, the index and the tree, behind the commits: each on a thread of its own, which takes what was committed
//! from memory, or, when it lags, from the log.
//!
//! The path of a commit never waits for it: what does not fit into the memory between them is dropped there and read again.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;
use tracing::{error, info, warn};

use super::blocking;
use super::directory::Directory;
use super::reader::Segments;
use crate::store::StoreError;

/// The most bytes of entries that wait in memory.
const WAITING_BYTES: usize = 4 << 20;
/// The most bytes of entries, and the most entries, that are applied in one go.
const BATCH_BYTES: usize = 1 << 20;
const BATCH_ENTRIES: u64 = 8192;
/// So many entries are worth a turn at once; fewer wait for more, unless somebody asks …
const TURN_ENTRIES: u64 = 512;
/// … but no longer than this: a turn for each small group would cost more than the groups themselves.
const LINGER: Duration = Duration::from_millis(20);
/// How long to wait after an error before the next try.
const RETRY: Duration = Duration::from_secs(1);

/// Something that is made of the entries, in their order, and can be made anew.
pub(super) trait Derived: Send + Sync + 'static {
    /// Of its thread, and in messages: the ledger's …
    const NAME: &'static str;

    /// How many entries, from the first on, are in it; smaller than before if it failed.
    fn applied(&self) -> u64;

    /// Adds `entries`, the first of which has the index `first`. They follow what was applied before without a gap.
    fn apply(&self, first: u64, entries: &[Bytes]) -> Result<(), StoreError>;

    /// Forgets everything, durably.
    fn clear(&self) -> Result<(), StoreError>;

    /// Makes what was applied durable; called before closing.
    fn flush(&self) -> Result<(), StoreError>;
}

/// Between the commits and what is made of them.
#[derive(Debug)]
pub(super) struct Feed {
    state: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug)]
struct Waiting {
    groups: VecDeque<(u64, Vec<Bytes>)>,
    bytes: usize,
    /// How many entries are committed.
    head: u64,
    /// How many of them somebody waits for.
    wanted: u64,
    /// How many were applied when the thread came for more.
    applied: u64,
    /// What is made of them may have gone back.
    recheck: bool,
    stop: bool,
}

/// What is applied next.
enum Next {
    Entries(Vec<Bytes>),
    /// Entries up to this one are in the log only.
    InLog(u64),
    /// Nothing; what is made of them has to be asked again how far it is.
    Recheck,
    Stop,
}

impl Feed {
    /// For a log with `head` entries.
    pub(super) fn new(head: u64) -> Self {
        let state = Waiting { groups: VecDeque::new(), bytes: 0, head, wanted: 0, applied: head, recheck: false, stop: false };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Takes the committed `entries`, the first of which has the index `first`.
    pub(super) fn push(&self, first: u64, entries: Vec<Bytes>) {
        let mut state = self.lock();
        state.head = first + entries.len() as u64;
        state.bytes += bytes_of(&entries);
        state.groups.push_back((first, entries));
        while state.bytes > WAITING_BYTES {
            let Some((_, dropped)) = state.groups.pop_front() else { break };
            state.bytes -= bytes_of(&dropped);
        }
        // The thread sleeps until the first entry, then until they are enough; between the two it has a deadline of its own.
        let matters = state.is_idle_before(first) || state.is_turn();
        drop(state);
        if matters {
            self.changed.notify_one();
        }
    }

    /// Somebody waits until the first `entries` entries are applied.
    fn want(&self, entries: u64) {
        let mut state = self.lock();
        state.wanted = state.wanted.max(entries);
        drop(state);
        self.changed.notify_all();
    }

    /// Ends [`Feed::next`] and [`Feed::pause`].
    fn stop(&self) {
        self.lock().stop = true;
        self.changed.notify_all();
    }

    fn recheck(&self) {
        self.lock().recheck = true;
        self.changed.notify_all();
    }

    /// Waits for what follows the first `applied` entries.
    fn next(&self, applied: u64) -> Next {
        let mut state = self.lock();
        state.applied = applied;
        let idle = |state: &mut Waiting| !state.stop && !state.recheck && state.head <= applied;
        state = self.changed.wait_while(state, idle).unwrap_or_else(PoisonError::into_inner);
        let gathers = |state: &mut Waiting| !state.stop && !state.recheck && !state.is_turn();
        (state, _) = self.changed.wait_timeout_while(state, LINGER, gathers).unwrap_or_else(PoisonError::into_inner);
        if state.stop {
            return Next::Stop;
        }
        if std::mem::take(&mut state.recheck) {
            return Next::Recheck;
        }
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while let Some((first, entries)) = state.groups.pop_front() {
            let end = first + entries.len() as u64;
            let due = applied + batch.len() as u64;
            let size = bytes_of(&entries);
            let is_full = !batch.is_empty() && (bytes + size > BATCH_BYTES || end - applied > BATCH_ENTRIES);
            if first > due || is_full {
                state.groups.push_front((first, entries));
                break;
            }
            state.bytes -= size;
            if first == due {
                bytes += size;
                batch.extend(entries);
            }
        }
        if batch.is_empty() {
            return Next::InLog(state.groups.front().map_or(state.head, |(first, _)| *first));
        }
        Next::Entries(batch)
    }

    /// Waits for `time`; tells whether it was stopped meanwhile.
    fn pause(&self, time: Duration) -> bool {
        let (state, _) = self.changed.wait_timeout_while(self.lock(), time, |state| !state.stop).unwrap_or_else(PoisonError::into_inner);
        state.stop
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    /// Whether there was nothing to apply before the entry `first`.
    fn is_idle_before(&self, first: u64) -> bool {
        first <= self.applied
    }

    /// Whether what waits is to be applied now.
    fn is_turn(&self) -> bool {
        self.head >= self.applied + TURN_ENTRIES || self.wanted > self.applied
    }
}

/// What an entry costs in memory: its bytes and its handle.
fn bytes_of(entries: &[Bytes]) -> usize {
    entries.iter().map(|entry| entry.len() + size_of::<Bytes>()).sum()
}

/// How far it is.
#[derive(Clone, Debug)]
struct Progress {
    applied: u64,
    error: Option<StoreError>,
}

/// The thread that keeps a [`Derived`] up to date.
#[derive(Debug)]
pub(super) struct Follower<D> {
    derived: Arc<D>,
    feed: Arc<Feed>,
    progress: Arc<watch::Sender<Progress>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl<D: Derived> Follower<D> {
    /// Starts the thread, which holds on to `directory` while it may write.
    pub(super) fn start(derived: D, segments: Arc<Segments>, directory: Arc<Directory>) -> std::io::Result<Self> {
        let (derived, feed) = (Arc::new(derived), Arc::new(Feed::new(segments.head().entries)));
        let progress = Arc::new(watch::Sender::new(Progress { applied: 0, error: None }));
        let (its_derived, its_feed, report) = (derived.clone(), feed.clone(), progress.clone());
        let thread = Builder::new().name(format!("ledger-{}", D::NAME)).spawn(move || {
            run(its_derived.as_ref(), &segments, &its_feed, &report);
            report.send_modify(|progress| progress.error = Some(StoreError::Closed));
            drop(directory);
        })?;
        Ok(Self { derived, feed, progress, thread: Mutex::new(Some(thread)) })
    }

    /// Where the committed entries are to be pushed.
    pub(super) fn feed(&self) -> Arc<Feed> {
        self.feed.clone()
    }

    /// What `question` finds once the first `entries` entries are in it; an error if they cannot be at the moment.
    pub(super) async fn ask<T: Send + 'static>(
        &self,
        entries: u64,
        question: impl Fn(&D) -> Result<T, StoreError> + Clone + Send + 'static,
    ) -> Result<T, StoreError> {
        loop {
            self.wait_for(entries).await?;
            let (derived, question) = (self.derived.clone(), question.clone());
            let (answer, applied) = blocking(move || Ok((question(&derived), derived.applied()))).await?;
            if applied >= entries {
                return answer;
            }
            // It failed and was opened again with less in it, or anew: the answer may lack entries.
            self.progress.send_modify(|progress| progress.applied = applied);
            self.feed.recheck();
        }
    }

    #[cfg(test)]
    pub(super) fn derived(&self) -> &D {
        &self.derived
    }

    async fn wait_for(&self, entries: u64) -> Result<(), StoreError> {
        let mut progress = self.progress.subscribe();
        if progress.borrow().applied < entries {
            self.feed.want(entries);
        }
        let reached = progress.wait_for(|progress| progress.applied >= entries || progress.error.is_some()).await;
        match reached.map(|progress| progress.clone()) {
            Ok(Progress { applied, error: Some(error) }) if applied < entries => Err(error),
            Ok(_) => Ok(()),
            Err(_) => Err(StoreError::Closed),
        }
    }

    /// Applies nothing more; what is not applied yet is when the store is opened again.
    pub(super) fn stop(&self) {
        self.feed.stop();
    }

    /// Waits until the thread has ended; [`Follower::stop`] was called.
    pub(super) fn join(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Err(_)) = thread.map(JoinHandle::join) {
            error!("the thread of the ledger's {} panicked", D::NAME);
        }
    }
}

fn run<D: Derived>(derived: &D, segments: &Segments, feed: &Feed, report: &watch::Sender<Progress>) {
    let (applied, head) = (derived.applied(), segments.head().entries);
    if applied < head {
        info!(applied, head, "the ledger's {} catches up", D::NAME);
    }
    loop {
        match step(derived, segments, feed, report) {
            Ok(true) => {}
            Ok(false) => break,
            Err(error) => {
                warn!(%error, "the ledger's {} lags behind", D::NAME);
                report.send_modify(|progress| progress.error = Some(error));
                if feed.pause(RETRY) {
                    break;
                }
            }
        }
    }
    if let Err(error) = derived.flush() {
        warn!(%error, "the ledger's {} was not closed cleanly; it catches up at the next start", D::NAME);
    }
}

/// Applies one batch, from where it is: after an error it may have gone back. Tells whether there is another step.
fn step<D: Derived>(derived: &D, segments: &Segments, feed: &Feed, report: &watch::Sender<Progress>) -> Result<bool, StoreError> {
    let from = derived.applied();
    let head = segments.head().entries;
    if from > head {
        // It was made from another log, or this log was restored from an older backup.
        warn!(applied = from, head, "the ledger's {} knows more entries than there are; it is built anew", D::NAME);
        derived.clear()?;
        return Ok(true);
    }
    report.send_replace(Progress { applied: from, error: None });
    let entries = match feed.next(from) {
        Next::Stop => return Ok(false),
        Next::Recheck => return Ok(true),
        Next::Entries(entries) => entries,
        Next::InLog(until) => segments.read(from..until.min(from + BATCH_ENTRIES), BATCH_BYTES)?,
    };
    derived.apply(from, &entries)?;
    Ok(true)
}
