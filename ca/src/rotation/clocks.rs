//! Whether this machine's clock can be believed, since it opens gates.

use std::sync::{Mutex, MutexGuard, PoisonError};

use time::{Duration, OffsetDateTime};
use tokio::time::Instant;

/// Clocks that are further apart are not believed.
const MOST_APART: Duration = Duration::seconds(30);

/// The wall clock and the monotonic clock at one moment, from which they may not part, and whether anybody else's clock agreed since.
#[derive(Debug)]
pub(super) struct ClockWatch(Mutex<Watched>);

#[derive(Clone, Copy, Debug)]
struct Watched {
    wall: OffsetDateTime,
    monotonic: Instant,
    confirmed: bool,
}

impl ClockWatch {
    pub(super) fn new(now: OffsetDateTime) -> Self {
        Self(Mutex::new(Watched { wall: now, monotonic: Instant::now(), confirmed: false }))
    }

    /// Somebody has looked at the clock: it counts from now on.
    pub(super) fn confirm(&self, now: OffsetDateTime) {
        *self.lock() = Watched { wall: now, monotonic: Instant::now(), confirmed: true };
    }

    /// Whether an agent's clock or an operator has confirmed it since the CA started: it may have been wrong from the beginning.
    pub(super) fn is_confirmed(&self) -> bool {
        self.lock().confirmed
    }

    /// Why the clock, which says `now`, is not believed. `agents` is the median of the agents' clocks less this one.
    pub(super) fn problem(&self, now: OffsetDateTime, agents: Option<Duration>) -> Option<String> {
        if let Some(apart) = agents.filter(|apart| apart.abs() > MOST_APART) {
            let which = if apart.is_negative() { "ahead of" } else { "behind" };
            return Some(format!("this machine's clock is {} s {which} the median of the agents' clocks", apart.abs().whole_seconds()));
        }
        let mut watched = self.lock();
        let jumped = (now - watched.wall) - watched.monotonic.elapsed();
        if jumped.abs() > MOST_APART {
            return Some(format!("this machine's clock was set by {} s while the CA ran", jumped.whole_seconds()));
        }
        watched.confirmed |= agents.is_some();
        None
    }

    fn lock(&self) -> MutexGuard<'_, Watched> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
