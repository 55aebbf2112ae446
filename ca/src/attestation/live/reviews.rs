//! `TokenReview`s: how many at once, which verdicts are remembered, and when not to ask at all.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use time::OffsetDateTime;
use tokio::sync::SemaphorePermit;
use tokio::time::Instant;

use super::informer::Away;
use crate::attestation::answers::{self, Key, Recent, Turns};

/// How many tokens an API server is asked about at the same time.
pub(super) const AT_ONCE: usize = 8;
/// How long after a failure the API server is not asked again.
const PAUSE: Duration = Duration::from_secs(1);
const MAX_REMEMBERED: usize = 8192;

/// One cluster's reviews.
#[derive(Debug)]
pub(super) struct Reviews {
    turns: Turns,
    accepted: Recent<()>,
    failure: Mutex<Option<Failure>>,
    counts: Counts,
}

#[derive(Debug, Default)]
struct Counts {
    accepted: AtomicU64,
    refused: AtomicU64,
    failed: AtomicU64,
}

/// Reviews since the start of the CA.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReviewCounts {
    /// Tokens that the API server bears out.
    pub accepted: u64,
    /// Tokens that it does not.
    pub refused: u64,
    /// Questions without an answer.
    pub failed: u64,
}

/// What came of a review.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Accepted,
    Refused,
}

#[derive(Clone, Debug)]
struct Failure {
    away: Away,
    newest: Instant,
}

impl Reviews {
    pub(super) fn new() -> Self {
        Self { turns: Turns::new(AT_ONCE), accepted: Recent::new(MAX_REMEMBERED), failure: Mutex::default(), counts: Counts::default() }
    }

    /// Waits a little for a turn; nothing if there is none.
    pub(super) async fn turn(&self) -> Option<SemaphorePermit<'_>> {
        self.turns.take().await
    }

    /// Why the API server should not be asked right now: it has just failed to answer.
    pub(super) fn obstacle(&self) -> Option<Away> {
        let failure = self.failure();
        failure.as_ref().filter(|failure| failure.newest.elapsed() < PAUSE).map(|failure| failure.away.clone())
    }

    pub(super) fn answered(&self, outcome: Outcome) {
        *self.failure() = None;
        let count = match outcome {
            Outcome::Accepted => &self.counts.accepted,
            Outcome::Refused => &self.counts.refused,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }

    /// Tells since when it fails.
    pub(super) fn failed(&self, problem: String, now: OffsetDateTime) -> Away {
        self.counts.failed.fetch_add(1, Ordering::Relaxed);
        let mut failure = self.failure();
        let since = failure.as_ref().map_or(now, |failure| failure.away.since);
        let away = Away { since, problem };
        *failure = Some(Failure { away: away.clone(), newest: Instant::now() });
        away
    }

    /// Whether this token was accepted a moment ago.
    pub(super) fn remembers(&self, key: &Key, now: OffsetDateTime) -> bool {
        self.accepted.recall(key, now).is_some()
    }

    pub(super) fn remember(&self, key: Key, now: OffsetDateTime) {
        self.accepted.remember(key, (), now);
    }

    pub(super) fn counts(&self) -> ReviewCounts {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let Counts { accepted, refused, failed } = &self.counts;
        ReviewCounts { accepted: read(accepted), refused: read(refused), failed: read(failed) }
    }

    fn failure(&self) -> MutexGuard<'_, Option<Failure>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Of a token and the audiences that it is asked about for.
pub(super) fn key(token: &str, audiences: &[String]) -> Key {
    answers::key(audiences.iter().map(String::as_str).chain([token]))
}
