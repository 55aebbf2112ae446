//! The trust bundle for everyone: `ConfigMaps` and `ClusterTrustBundles` that hold what the CA publishes, for those who do not ask an agent.
//!
//! Each copy follows the bundle: it is written when that changes, again and again while that fails, and now and then although nothing has
//! changed, since others may have changed the copy. Nobody who reads a copy says so, so [`crate::fleet`] counts each as one that cannot
//! prove what it trusts.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chancery_identity::{Clock, TrustState};
use futures_util::future::join_all;
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::attestation::Clusters;
use crate::kubernetes::{ApiError, TrustCopy};

/// How often a copy is written although it should be the newest.
const REFRESH: Duration = Duration::from_secs(300);
/// Before one that failed is written again, first and at most.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(60);

/// Keeps the copies up to date.
#[derive(Debug)]
pub struct Publication {
    trust: watch::Receiver<Arc<TrustState>>,
    clusters: Arc<Clusters>,
    clock: Arc<dyn Clock>,
    copies: Mutex<BTreeMap<(String, TrustCopy), Progress>>,
}

/// How a copy stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyStatus {
    /// Its cluster.
    pub cluster: String,
    /// Which.
    pub copy: TrustCopy,
    /// Whether it holds the newest bundle, as far as is known.
    pub is_current: bool,
    /// Since when it fails, and why, if it does.
    pub failure: Option<(OffsetDateTime, String)>,
}

#[derive(Clone, Debug, Default)]
struct Progress {
    /// What was written last.
    written: Option<Written>,
    failure: Option<Failure>,
}

#[derive(Clone, Debug)]
struct Written {
    sequence: u64,
    at: Instant,
}

#[derive(Clone, Debug)]
struct Failure {
    /// Of the bundle that was not written.
    sequence: u64,
    since: OffsetDateTime,
    problem: String,
    times: u32,
    at: Instant,
}

impl Publication {
    /// Copies of what `trust` says, in `clusters`.
    pub fn new(trust: watch::Receiver<Arc<TrustState>>, clusters: Arc<Clusters>, clock: Arc<dyn Clock>) -> Self {
        Self { trust, clusters, clock, copies: Mutex::default() }
    }

    /// Writes until `shutdown`.
    pub async fn run(&self, shutdown: CancellationToken) {
        shutdown.run_until_cancelled(self.follow()).await;
    }

    /// How each stands.
    pub fn status(&self) -> Vec<CopyStatus> {
        let newest = self.trust.borrow().sequence;
        let copies = self.copies();
        let of = |((cluster, copy), progress): (&(String, TrustCopy), &Progress)| CopyStatus {
            cluster: cluster.clone(),
            copy: copy.clone(),
            is_current: progress.failure.is_none() && progress.written.as_ref().is_some_and(|written| written.sequence == newest),
            failure: progress.failure.as_ref().map(|failure| (failure.since, failure.problem.clone())),
        };
        copies.iter().map(of).collect()
    }

    async fn follow(&self) {
        let (mut trust, mut changes) = (self.trust.clone(), self.clusters.changes());
        loop {
            let state = trust.borrow_and_update().clone();
            changes.borrow_and_update();
            self.publish(&state).await;
            let next = self.next_due(state.sequence);
            tokio::select! {
                () = tokio::time::sleep_until(next) => {}
                changed = trust.changed() => if changed.is_err() { return },
                changed = changes.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Writes whatever is due, in all clusters at once: one whose API server is away holds no other up for longer than a call may take.
    async fn publish(&self, state: &TrustState) {
        let (due, pem) = (self.due(state.sequence), state.own().to_pem());
        join_all(due.iter().map(|(cluster, copy)| async {
            let outcome = self.write(cluster, copy, state.sequence, &pem).await;
            self.note(cluster, copy, state.sequence, outcome);
        }))
        .await;
    }

    /// Which are to be written now, of those that the settings want.
    fn due(&self, sequence: u64) -> Vec<(String, TrustCopy)> {
        let wanted = self.clusters.copies();
        let now = Instant::now();
        let mut copies = self.copies();
        copies.retain(|copy, _| wanted.contains(copy));
        for copy in wanted {
            copies.entry(copy).or_default();
        }
        copies.iter().filter(|(_, progress)| progress.due(sequence, now) <= now).map(|(copy, _)| copy.clone()).collect()
    }

    async fn write(&self, cluster: &str, copy: &TrustCopy, sequence: u64, pem: &str) -> Result<(), ApiError> {
        self.clusters.api_server(cluster).await?.publish(copy, sequence, pem).await
    }

    fn note(&self, cluster: &str, copy: &TrustCopy, sequence: u64, outcome: Result<(), ApiError>) {
        let mut copies = self.copies();
        // The settings may want it no more.
        let Some(progress) = copies.get_mut(&(cluster.to_owned(), copy.clone())) else { return };
        match outcome {
            Ok(()) => {
                let is_new = progress.failure.is_some() || progress.written.as_ref().is_none_or(|written| written.sequence != sequence);
                if is_new {
                    tracing::info!(cluster, %copy, sequence, "the trust bundle is published");
                }
                *progress = Progress { written: Some(Written { sequence, at: Instant::now() }), failure: None };
            }
            Err(error) => {
                let (since, times) = progress.failure.as_ref().map_or((self.clock.now(), 0), |failure| (failure.since, failure.times));
                if times == 0 {
                    tracing::warn!(cluster, %copy, %error, "the trust bundle could not be published; trying again");
                }
                let failure = Failure { sequence, since, problem: error.to_string(), times: times.saturating_add(1), at: Instant::now() };
                progress.failure = Some(failure);
            }
        }
    }

    fn next_due(&self, sequence: u64) -> Instant {
        let now = Instant::now();
        self.copies().values().map(|progress| progress.due(sequence, now)).min().unwrap_or(now + REFRESH)
    }

    fn copies(&self) -> MutexGuard<'_, BTreeMap<(String, TrustCopy), Progress>> {
        self.copies.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Progress {
    /// When it is to be written.
    fn due(&self, sequence: u64, now: Instant) -> Instant {
        match (&self.failure, &self.written) {
            // It may be without a root that is trusted no more.
            (Some(failure), _) if failure.sequence != sequence => now,
            (Some(failure), _) => failure.at + FIRST_RETRY.saturating_mul(1 << failure.times.saturating_sub(1).min(10)).min(LAST_RETRY),
            (None, Some(written)) if written.sequence == sequence => written.at + REFRESH,
            (None, _) => now,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_copy_is_due_at_once_for_a_new_bundle_later_after_failures_and_now_and_then_anyway() {
        let now = Instant::now();
        let written = Progress { written: Some(Written { sequence: 7, at: now }), failure: None };
        assert_eq!(Progress::default().due(7, now), now);
        assert_eq!(written.due(7, now), now + REFRESH);
        assert_eq!(written.due(8, now), now);
        for (times, delay) in [(1, 1), (2, 2), (6, 32), (7, 60), (u32::MAX, 60)] {
            let failure = Failure { sequence: 8, since: OffsetDateTime::UNIX_EPOCH, problem: "away".into(), times, at: now };
            let failing = Progress { failure: Some(failure), ..written.clone() };
            assert_eq!(failing.due(8, now), now + Duration::from_secs(delay), "{times}");
            assert_eq!(failing.due(9, now), now, "nobody has tried to write this one: {times}");
        }
    }
}
