//! Drives the index behind the commits: its thread takes what was committed from memory, or, when it lags, from the log.
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
use super::index::Index;
use super::reader::Segments;
use crate::store::StoreError;

/// The most bytes of entries that wait in memory.
const WAITING_BYTES: usize = 4 << 20;
/// The most bytes of entries, and the most entries, that are indexed in one go.
const BATCH_BYTES: usize = 1 << 20;
const BATCH_ENTRIES: u64 = 8192;
/// How long to wait after an error before the next try.
const RETRY: Duration = Duration::from_secs(1);

/// Between the commits and the index.
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
    /// The index may have gone back.
    recheck: bool,
    stop: bool,
}

/// What the index gets next.
enum Next {
    Entries(Vec<Bytes>),
    /// Entries up to this one are in the log only.
    InLog(u64),
    /// Nothing; the index has to be asked again how far it is.
    Recheck,
    Stop,
}

impl Feed {
    /// For a log with `head` entries.
    pub(super) fn new(head: u64) -> Self {
        let state = Waiting { groups: VecDeque::new(), bytes: 0, head, recheck: false, stop: false };
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
        drop(state);
        self.changed.notify_one();
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
        while !state.stop && !state.recheck && state.head <= applied {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
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

/// What an entry costs in memory: its bytes and its handle.
fn bytes_of(entries: &[Bytes]) -> usize {
    entries.iter().map(|entry| entry.len() + size_of::<Bytes>()).sum()
}

/// How far the index is.
#[derive(Clone, Debug)]
struct Progress {
    applied: u64,
    error: Option<StoreError>,
}

/// The thread that indexes.
#[derive(Debug)]
pub(super) struct Indexer {
    index: Arc<Index>,
    feed: Arc<Feed>,
    progress: Arc<watch::Sender<Progress>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Indexer {
    /// Starts the thread, which holds on to `directory` while it may write.
    pub(super) fn start(index: Arc<Index>, segments: Arc<Segments>, feed: Arc<Feed>, directory: Arc<Directory>) -> std::io::Result<Self> {
        let progress = Arc::new(watch::Sender::new(Progress { applied: 0, error: None }));
        let (its_index, its_feed, report) = (index.clone(), feed.clone(), progress.clone());
        let thread = Builder::new().name("ledger-index".into()).spawn(move || {
            run(&its_index, &segments, &its_feed, &report);
            report.send_modify(|progress| progress.error = Some(StoreError::Closed));
            drop(directory);
        })?;
        Ok(Self { index, feed, progress, thread: Mutex::new(Some(thread)) })
    }

    /// What `question` finds in the index once the first `entries` entries are in it; an error if they cannot be at the moment.
    pub(super) async fn ask<T: Send + 'static>(
        &self,
        entries: u64,
        question: impl Fn(&Index) -> Result<T, StoreError> + Clone + Send + 'static,
    ) -> Result<T, StoreError> {
        loop {
            self.wait_for(entries).await?;
            let (index, question) = (self.index.clone(), question.clone());
            let (answer, indexed) = blocking(move || Ok((question(&index), index.indexed()))).await?;
            if indexed >= entries {
                return answer;
            }
            // It failed and was opened again with less in it, or anew: the answer may lack entries.
            self.progress.send_modify(|progress| progress.applied = indexed);
            self.feed.recheck();
        }
    }

    #[cfg(test)]
    pub(super) fn index(&self) -> &Index {
        &self.index
    }

    async fn wait_for(&self, entries: u64) -> Result<(), StoreError> {
        let mut progress = self.progress.subscribe();
        let reached = progress.wait_for(|progress| progress.applied >= entries || progress.error.is_some()).await;
        match reached.map(|progress| progress.clone()) {
            Ok(Progress { applied, error: Some(error) }) if applied < entries => Err(error),
            Ok(_) => Ok(()),
            Err(_) => Err(StoreError::Closed),
        }
    }

    /// Indexes nothing more; what is not indexed yet is when the store is opened again.
    pub(super) fn stop(&self) {
        self.feed.stop();
    }

    /// Waits until the thread has ended; [`Indexer::stop`] was called.
    pub(super) fn join(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Err(_)) = thread.map(JoinHandle::join) {
            error!("the thread that indexes the ledger panicked");
        }
    }
}

fn run(index: &Index, segments: &Segments, feed: &Feed, report: &watch::Sender<Progress>) {
    let (indexed, head) = (index.indexed(), segments.head().entries);
    if indexed < head {
        info!(indexed, head, "the ledger's index catches up");
    }
    loop {
        match step(index, segments, feed, report) {
            Ok(true) => {}
            Ok(false) => break,
            Err(error) => {
                warn!(%error, "the ledger's index lags behind");
                report.send_modify(|progress| progress.error = Some(error));
                if feed.pause(RETRY) {
                    break;
                }
            }
        }
    }
    if let Err(error) = index.flush() {
        warn!(%error, "the ledger's index was not closed cleanly; it catches up at the next start");
    }
}

/// Indexes one batch, from where the index is: after an error it may have gone back. Tells whether there is another step.
fn step(index: &Index, segments: &Segments, feed: &Feed, report: &watch::Sender<Progress>) -> Result<bool, StoreError> {
    let from = index.indexed();
    let head = segments.head().entries;
    if from > head {
        // It was made from another log, or this log was restored from an older backup.
        warn!(indexed = from, head, "the ledger's index knows more entries than there are; it is built anew");
        index.clear()?;
        return Ok(true);
    }
    report.send_replace(Progress { applied: from, error: None });
    let entries = match feed.next(from) {
        Next::Stop => return Ok(false),
        Next::Recheck => return Ok(true),
        Next::Entries(entries) => entries,
        Next::InLog(until) => segments.read(from..until.min(from + BATCH_ENTRIES), BATCH_BYTES)?,
    };
    index.apply(from, &entries)?;
    Ok(true)
}
