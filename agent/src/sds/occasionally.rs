//! What strangers can cause again and again is logged now and then.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::lock;

const PAUSE: Duration = Duration::from_secs(1);

/// Allows something once a second.
#[derive(Debug, Default)]
pub(super) struct Occasionally(Mutex<Option<Instant>>);

impl Occasionally {
    pub(super) fn allow(&self) -> bool {
        let (mut last, now) = (lock(&self.0), Instant::now());
        let allowed = last.is_none_or(|last| now.duration_since(last) >= PAUSE);
        if allowed {
            *last = Some(now);
        }
        allowed
    }
}
