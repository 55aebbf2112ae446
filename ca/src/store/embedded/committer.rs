//! The one thread that writes the log: takes groups from a bounded queue, one durable before the next.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use tokio::sync::{mpsc, oneshot, watch};
use tracing::error;

use super::directory::Directory;
use super::follower::Feed;
use super::log::Log;
use crate::store::{Group, Head, StoreError};

/// How many commits may wait. Callers collect their entries in groups, so few ever do.
const QUEUE: usize = 64;

enum Job {
    Commit { expected: Head, group: Group, answer: oneshot::Sender<Result<Head, StoreError>> },
    MakeRoom { answer: oneshot::Sender<Result<(), StoreError>> },
}

/// Hands groups to the thread.
#[derive(Debug)]
pub(super) struct Committer {
    jobs: Mutex<Option<mpsc::Sender<Job>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    failure: watch::Receiver<Option<StoreError>>,
}

impl Committer {
    /// Starts the thread, which tells `feeds` what it committed and holds on to `directory` while it may write.
    pub(super) fn start(log: Log, feeds: Vec<Arc<Feed>>, directory: Arc<Directory>) -> std::io::Result<Self> {
        let (jobs, queue) = mpsc::channel(QUEUE);
        let (failed, failure) = watch::channel(None);
        let thread = Builder::new().name("ledger-commit".into()).spawn(move || {
            run(log, queue, &feeds, &failed);
            drop(directory);
        })?;
        Ok(Self { jobs: Mutex::new(Some(jobs)), thread: Mutex::new(Some(thread)), failure })
    }

    pub(super) async fn commit(&self, expected: Head, group: Group) -> Result<Head, StoreError> {
        self.hand_over(|answer| Job::Commit { expected, group, answer }).await
    }

    pub(super) async fn make_room(&self) -> Result<(), StoreError> {
        self.hand_over(|answer| Job::MakeRoom { answer }).await
    }

    async fn hand_over<T>(&self, job: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> Job) -> Result<T, StoreError> {
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or(StoreError::Closed)?;
        let (answer, answered) = oneshot::channel();
        jobs.send(job(answer)).await.map_err(|_| ended())?;
        answered.await.map_err(|_| ended())?
    }

    /// Waits until nothing can be committed any more because of a failure.
    pub(super) async fn failed(&self) -> StoreError {
        let mut failure = self.failure.clone();
        match failure.wait_for(Option::is_some).await.map(|failure| failure.clone()) {
            Ok(Some(failure)) => failure,
            _ if self.jobs.lock().unwrap_or_else(PoisonError::into_inner).is_none() => std::future::pending().await,
            _ => ended(),
        }
    }

    /// Accepts nothing more.
    pub(super) fn stop(&self) {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Waits until everything accepted was answered and the log is closed; [`Committer::stop`] was called.
    pub(super) fn join(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Err(_)) = thread.map(JoinHandle::join) {
            error!("the thread that writes the ledger panicked");
        }
    }
}

fn run(mut log: Log, mut queue: mpsc::Receiver<Job>, feeds: &[Arc<Feed>], failed: &watch::Sender<Option<StoreError>>) {
    while let Some(job) = queue.blocking_recv() {
        let (expected, group, answer) = match job {
            Job::Commit { expected, group, answer } => (expected, group, answer),
            Job::MakeRoom { answer } => {
                let _ = answer.send(log.prepare());
                continue;
            }
        };
        let result = log.append(&expected, &group);
        match &result {
            Ok(_) => feeds.iter().for_each(|feed| feed.push(expected.entries, group.entries.clone())),
            Err(_) => report(&log, failed),
        }
        // Nobody waits any more if the caller was cancelled; the group is in the log all the same.
        let _ = answer.send(result);
    }
    if let Err(error) = log.close() {
        error!(%error, "the checkpoint was not written when the ledger was closed");
    }
}

fn report(log: &Log, failed: &watch::Sender<Option<StoreError>>) {
    if let Some(failure) = log.failure().filter(|_| failed.borrow().is_none()) {
        error!(error = %failure, "the ledger takes no more entries");
        failed.send_replace(Some(failure.clone()));
    }
}

fn ended() -> StoreError {
    StoreError::NotDurable { place: "the ledger".into(), detail: "the thread that writes it has ended".into() }
}
