//! Where the time comes from: a parameter, so that expiry is tested in microseconds.

use std::fmt::Debug;

use time::OffsetDateTime;

/// Tells the wall-clock time, in UTC.
///
/// Deadlines of certificates and tokens are compared with this, never with a monotonic clock: a machine that slept must notice on waking
/// that its certificates have aged.
pub trait Clock: Debug + Send + Sync {
    /// The time now.
    fn now(&self) -> OffsetDateTime;
}

/// The operating system's wall clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> OffsetDateTime {
        OffsetDateTime::now_utc()
    }
}
