//! A table that a watch keeps up to date, and how well it does.

use std::cmp::Reverse;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use chancery_identity::Clock;
use futures_util::{Stream, StreamExt};
use time::OffsetDateTime;
use tokio::sync::Notify;

use super::records::Table;
use crate::kubernetes::{ApiError, Event};

/// Before a watch that failed is tried again, first and at most. An API server that is back is found soon.
const FIRST_RETRY: Duration = Duration::from_millis(250);
const LAST_RETRY: Duration = Duration::from_secs(5);

/// What is known by a watch.
#[derive(Debug)]
pub(super) struct Informer<T> {
    cluster: String,
    what: &'static str,
    clock: Arc<dyn Clock>,
    table: RwLock<T>,
    /// Those who wait for something to be in the table.
    told: Arc<Notify>,
    progress: Mutex<Progress>,
}

/// How a watch gets on.
#[derive(Clone, Debug, Default)]
struct Progress {
    /// All objects have been listed once.
    synced: bool,
    /// They are being listed again, since too much was missed.
    listing: bool,
    away: Option<Away>,
    /// The API server tells nothing, whatever it is asked; otherwise it answers, though not with what it was asked for.
    unheard: bool,
}

/// Nothing is heard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Away {
    /// Since when.
    pub since: OffsetDateTime,
    /// Why.
    pub problem: String,
}

/// How far what is known of a cluster can be relied upon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Not everything has been listed yet; nobody new can be believed.
    Syncing {
        /// Why not, if it does not get on.
        problem: Option<String>,
    },
    /// Nothing has been listed since the start of the CA, since the API server cannot be reached, or does not know the CA. Who has a
    /// certificate keeps getting others; who has none has to wait.
    Unheard(Away),
    /// The newest.
    Synced,
    /// As it was when the API server was heard last. Who is known keeps getting certificates; who is not has to wait.
    Stale(Away),
}

impl<T: Table> Informer<T> {
    /// Wakes `told` with whatever the watch tells.
    pub(super) fn new(cluster: &str, what: &'static str, clock: Arc<dyn Clock>, told: Arc<Notify>) -> Arc<Self> {
        let cluster = cluster.to_owned();
        Arc::new(Self { cluster, what, clock, table: RwLock::default(), told, progress: Mutex::default() })
    }

    /// For a look at it, not to be held.
    pub(super) fn table(&self) -> RwLockReadGuard<'_, T> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn standing(&self) -> Standing {
        let Progress { synced, away, unheard, .. } = self.progress().clone();
        match (synced, away) {
            (true, None) => Standing::Synced,
            (true, Some(away)) => Standing::Stale(away),
            (false, Some(away)) if unheard => Standing::Unheard(away),
            (false, away) => Standing::Syncing { problem: away.map(|away| away.problem) },
        }
    }

    /// Whether what is not in the table is not in the cluster either, but for what came within the last minutes.
    pub(super) fn is_complete(&self) -> bool {
        let progress = self.progress();
        progress.synced && !progress.listing && progress.away.is_none()
    }

    /// The API server has granted a list or a watch.
    pub(super) fn heard(&self) {
        if let Some(away) = self.progress().away.take() {
            tracing::info!(cluster = self.cluster, since = %away.since, "the cluster's {} are watched again", self.what);
        }
    }

    /// Nothing is heard.
    pub(super) fn failed(&self, error: &ApiError) {
        let problem = error.to_string();
        let mut progress = self.progress();
        // Credentials that have expired, or are not there yet, tell as little of the pods as a server that is away does.
        progress.unheard = matches!(error, ApiError::Away(_) | ApiError::Connect(_) | ApiError::Unauthorized(_));
        if let Some(away) = &mut progress.away {
            away.problem = problem;
        } else {
            tracing::warn!(cluster = self.cluster, problem, "the cluster's {} cannot be watched; trying again", self.what);
            progress.away = Some(Away { since: self.clock.now(), problem });
        }
    }

    /// Takes over what a watch tells, until the CA's credentials are not accepted, and so have to be read anew.
    pub(super) async fn follow(&self, events: impl Stream<Item = Result<Event<T::Object>, ApiError>>) {
        let mut events = std::pin::pin!(events);
        let mut fresh = T::default();
        let mut failures = 0;
        while let Some(event) = events.next().await {
            match event {
                Ok(event) => {
                    // A list that begins has not been answered yet.
                    if !matches!(event, Event::Init) {
                        failures = 0;
                    }
                    self.take(event, &mut fresh);
                }
                Err(error) => {
                    self.failed(&error);
                    tokio::time::sleep(retry_after(failures)).await;
                    failures += 1;
                    if matches!(error, ApiError::Unauthorized(_)) {
                        return;
                    }
                }
            }
        }
    }

    /// `fresh` is filled while a list comes in, and takes its place when that is complete.
    fn take(&self, event: Event<T::Object>, fresh: &mut T) {
        match event {
            Event::Init => {
                *fresh = T::default();
                self.progress().listing = true;
            }
            Event::InitApply(object) => fresh.apply(&object),
            Event::InitDone => {
                let mut fresh = std::mem::take(fresh);
                let objects = fresh.len();
                let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
                let before = std::mem::take(&mut *table);
                fresh.succeed(before);
                *table = fresh;
                drop(table);
                let mut progress = self.progress();
                (progress.synced, progress.listing) = (true, false);
                tracing::info!(cluster = self.cluster, objects, "the cluster's {} are known", self.what);
            }
            Event::Apply(object) => self.table.write().unwrap_or_else(PoisonError::into_inner).apply(&object),
            Event::Delete(object) => self.table.write().unwrap_or_else(PoisonError::into_inner).remove(&object),
        }
        self.told.notify_waiters();
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Standing {
    /// The one that less can be relied upon; of two that are alike, the one that is so for longer.
    pub(super) fn or_worse(self, other: Self) -> Self {
        if self.rank() >= other.rank() { self } else { other }
    }

    fn rank(&self) -> (u8, Option<Reverse<OffsetDateTime>>) {
        match self {
            Self::Synced => (0, None),
            Self::Stale(away) => (1, Some(Reverse(away.since))),
            Self::Unheard(away) => (2, Some(Reverse(away.since))),
            Self::Syncing { problem } => (if problem.is_some() { 4 } else { 3 }, None),
        }
    }
}

fn retry_after(failures: u32) -> Duration {
    let delay = FIRST_RETRY.saturating_mul(1 << failures.min(8)).min(LAST_RETRY);
    delay.mul_f64(0.5 + rand::random::<f64>() / 2.0)
}

#[cfg(test)]
mod tests {
    use chancery_identity::SystemClock;

    use super::*;
    use crate::attestation::live::records::Pods;

    /// The library says before each list that it begins, also where it then fails.
    #[tokio::test(start_paused = true)]
    async fn an_api_server_that_is_down_is_asked_more_and_more_seldom() {
        let pods = Informer::<Pods>::new("east", "pods", Arc::new(SystemClock), Arc::new(Notify::new()));
        let tried = (0..20).flat_map(|_| [Ok(Event::Init), Err(ApiError::Away("refused".into()))]);
        let started = tokio::time::Instant::now();
        pods.follow(futures_util::stream::iter(tried)).await;
        assert!(started.elapsed() > 14 * LAST_RETRY / 2, "{:?}", started.elapsed());
    }
}
