//! Whether this machine's clock can be believed, since it opens gates.

use std::sync::{Mutex, PoisonError};

use time::{Duration, OffsetDateTime};
use tokio::time::Instant;

/// Clocks that are further apart are not believed.
const MOST_APART: Duration = Duration::seconds(30);

/// The wall clock and the monotonic clock at one moment, from which they may not part.
#[derive(Debug)]
pub(super) struct ClockWatch(Mutex<(OffsetDateTime, Instant)>);

impl ClockWatch {
    pub(super) fn new(now: OffsetDateTime) -> Self {
        Self(Mutex::new((now, Instant::now())))
    }

    /// Somebody has looked at the clock: it counts from now on.
    pub(super) fn confirm(&self, now: OffsetDateTime) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = (now, Instant::now());
    }

    /// Why the clock, which says `now`, is not believed. `agents` is the median of the agents' clocks less this one.
    pub(super) fn problem(&self, now: OffsetDateTime, agents: Option<Duration>) -> Option<String> {
        if let Some(apart) = agents.filter(|apart| apart.abs() > MOST_APART) {
            let which = if apart.is_negative() { "ahead of" } else { "behind" };
            return Some(format!("this machine's clock is {} s {which} the median of the agents' clocks", apart.abs().whole_seconds()));
        }
        let (wall, monotonic) = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let jumped = (now - wall) - monotonic.elapsed();
        (jumped.abs() > MOST_APART).then(|| format!("this machine's clock was set by {} s while the CA ran", jumped.whole_seconds()))
    }
}
