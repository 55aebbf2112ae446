//! Acts that somebody known was refused: entries, but at most one a minute for each person and reason, with a count.
//!
//! The first one is recorded at once. What follows within the minute is counted, and recorded when it is over. What is remembered is bounded
//! ([`MAX_REMEMBERED`]); what does not fit is logged alone. What is still only counted when the CA ends is recorded then ([`RefusedActs::flush`]).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chancery_identity::Clock;
use chancery_process::text::cut;
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::change::{Change, RefusedAct};
use crate::ledger::Ledger;

/// Between two entries for one person and reason.
const INTERVAL: time::Duration = time::Duration::minutes(1);
/// How often what was only counted is looked through.
const SWEEP: Duration = Duration::from_secs(5);
/// Persons and reasons at once. Persons come from the configuration, and reasons are a handful.
const MAX_REMEMBERED: usize = 1024;
/// Longer texts are cut: they come from the caller.
const MAX_TEXT_BYTES: usize = 512;

/// Counts refused acts, and records them now and then.
#[derive(Debug)]
pub struct RefusedActs {
    ledger: Ledger,
    clock: Arc<dyn Clock>,
    seen: Mutex<HashMap<(String, String), Seen>>,
}

/// What is remembered about a person and a reason.
#[derive(Debug)]
struct Seen {
    recorded: OffsetDateTime,
    /// The last one that was only counted, with how many of them there are.
    counted: Option<(RefusedAct, String)>,
}

/// One that is to be recorded now.
#[derive(Debug)]
struct Due {
    actor: String,
    refused: RefusedAct,
    why: String,
}

impl RefusedActs {
    /// Nothing yet.
    pub fn new(ledger: Ledger, clock: Arc<dyn Clock>) -> Self {
        Self { ledger, clock, seen: Mutex::default() }
    }

    /// Notes that `actor`, who said `why`, was refused something.
    pub async fn note(&self, actor: &str, refused: RefusedAct, why: &str) {
        let (mut refused, mut why) = (refused, why.to_owned());
        for text in [&mut refused.target, &mut refused.message, &mut why] {
            cut(text, MAX_TEXT_BYTES);
        }
        if let Some(due) = self.count(actor, refused, why) {
            self.record(due).await;
        }
    }

    /// Records what was counted and whose minute is over.
    pub async fn sweep(&self) {
        let now = self.clock.now();
        for due in self.take(now, |seen| !is_within(seen.recorded, now)) {
            self.record(due).await;
        }
    }

    /// Records everything that was only counted, for a CA that ends.
    pub async fn flush(&self) {
        let now = self.clock.now();
        for due in self.take(now, |_| true) {
            self.record(due).await;
        }
    }

    /// Sweeps now and then, until `shutdown`.
    pub async fn run(&self, shutdown: CancellationToken) {
        let mut ticks = tokio::time::interval(SWEEP);
        while shutdown.run_until_cancelled(ticks.tick()).await.is_some() {
            self.sweep().await;
        }
    }

    fn count(&self, actor: &str, mut refused: RefusedAct, why: String) -> Option<Due> {
        let now = self.clock.now();
        let mut seen = self.seen();
        let key = (actor.to_owned(), refused.reason.clone());
        if let Some(before) = seen.get_mut(&key) {
            if let Some((counted, _)) = &before.counted {
                refused.count += counted.count;
            }
            if is_within(before.recorded, now) {
                before.counted = Some((refused, why));
                return None;
            }
        } else if seen.len() >= MAX_REMEMBERED {
            seen.retain(|_, seen| seen.counted.is_some() || is_within(seen.recorded, now));
            if seen.len() >= MAX_REMEMBERED {
                warn!(actor, action = refused.action, "a refused act is not recorded: too many different ones");
                return None;
            }
        }
        seen.insert(key, Seen { recorded: now, counted: None });
        Some(Due { actor: actor.to_owned(), refused, why })
    }

    /// What was only counted, of those that fit; to be recorded `now`.
    fn take(&self, now: OffsetDateTime, fits: impl Fn(&Seen) -> bool) -> Vec<Due> {
        let mut due = Vec::new();
        for ((actor, _), seen) in self.seen().iter_mut().filter(|(_, seen)| fits(seen)) {
            if let Some((refused, why)) = seen.counted.take() {
                seen.recorded = now;
                due.push(Due { actor: actor.clone(), refused, why });
            }
        }
        due
    }

    async fn record(&self, due: Due) {
        let Due { actor, refused, why } = due;
        if let Err(error) = self.ledger.act(&actor, Change::Refused(refused), &why).await {
            warn!(actor, %error, "a refused act could not be recorded");
        }
    }

    fn seen(&self) -> MutexGuard<'_, HashMap<(String, String), Seen>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the minute since `recorded` is not over. A clock that was set back ends it.
fn is_within(recorded: OffsetDateTime, now: OffsetDateTime) -> bool {
    (recorded..recorded + INTERVAL).contains(&now)
}
