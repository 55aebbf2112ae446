//! Requests from one workload to the other, each on a new connection, so that each is a new TLS handshake.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::{Error, Result, http};

/// Failures whose words are kept.
const KEPT_FAILURES: usize = 10;

/// What was sent so far.
#[derive(Default)]
pub struct Counts {
    ok: AtomicU64,
    failed: AtomicU64,
    failures: std::sync::Mutex<Vec<String>>,
}

impl Counts {
    /// Requests that were answered with 200.
    pub fn ok(&self) -> u64 {
        self.ok.load(Ordering::Relaxed)
    }

    /// All others.
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    /// The first failures, in words.
    pub fn failures(&self) -> Vec<String> {
        self.failures.lock().map(|failures| failures.clone()).unwrap_or_default()
    }

    fn count(&self, outcome: Result<(u16, String), Error>) {
        let failure = match outcome {
            Ok((200, _)) => {
                self.ok.fetch_add(1, Ordering::Relaxed);
                return;
            }
            Ok((status, body)) => format!("status {status}: {body}"),
            Err(error) => error.to_string(),
        };
        self.failed.fetch_add(1, Ordering::Relaxed);
        if let Ok(mut failures) = self.failures.lock()
            && failures.len() < KEPT_FAILURES
        {
            failures.push(failure);
        }
    }
}

/// A client that keeps sending.
pub struct Load {
    counts: Arc<Counts>,
    end: CancellationToken,
    senders: TaskTracker,
}

impl Load {
    /// Starts `senders` tasks that each send a request, wait for the answer, pause, and start over.
    pub fn start(address: SocketAddr, senders: usize, pause: Duration) -> Self {
        let load = Self { counts: Arc::default(), end: CancellationToken::new(), senders: TaskTracker::new() };
        for _ in 0..senders {
            let (counts, end) = (load.counts.clone(), load.end.clone());
            load.senders.spawn(async move {
                while !end.is_cancelled() {
                    counts.count(http::get(address, "/").await);
                    let _ = tokio::time::timeout(pause, end.cancelled()).await;
                }
            });
        }
        load
    }

    /// What was sent so far; readable also after the end.
    pub fn counts(&self) -> Arc<Counts> {
        self.counts.clone()
    }

    /// Sends no more, and waits for the answers to what is under way.
    pub async fn finish(self) -> Arc<Counts> {
        self.end.cancel();
        self.senders.close();
        self.senders.wait().await;
        self.counts.clone()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.end.cancel();
    }
}
