//! What strangers can cause again and again is logged now and then.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const PAUSE: Duration = Duration::from_secs(1);

/// Allows something once a second.
#[derive(Debug, Default)]
pub struct Occasionally(Mutex<Option<Instant>>);

impl Occasionally {
    /// Whether it may be done now.
    pub fn allow(&self) -> bool {
        // Nothing that is done under this lock can panic halfway.
        let (mut last, now) = (self.0.lock().unwrap_or_else(PoisonError::into_inner), Instant::now());
        let allowed = last.is_none_or(|last| now.duration_since(last) >= PAUSE);
        if allowed {
            *last = Some(now);
        }
        allowed
    }
}
