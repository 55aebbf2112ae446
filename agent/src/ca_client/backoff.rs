//! How long to wait after a failure: doubling, jittered, bounded.

use std::time::Duration;

/// Doubles from `first` to `most`; half of each delay is random, so that those who failed together do not come back together.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    failures: u32,
}

impl Backoff {
    /// The first delay is at most `first`.
    pub fn new(first: Duration) -> Self {
        Self { first, failures: 0 }
    }

    /// The delay after one more failure, at most `most`.
    pub fn next(&mut self, most: Duration) -> Duration {
        let delay = self.first.saturating_mul(1_u32.checked_shl(self.failures.min(16)).unwrap_or(u32::MAX)).min(most);
        self.failures = self.failures.saturating_add(1);
        delay.mul_f64(0.5 + rand::random::<f64>() / 2.0)
    }

    /// After a success.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// How often it failed since the last success.
    pub fn failures(&self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_bound_and_start_over_after_a_success() {
        let mut backoff = Backoff::new(Duration::from_millis(50));
        let most = Duration::from_secs(2);
        for expected_ms in [50, 100, 200, 400, 800, 1600, 2000, 2000] {
            let (delay, expected) = (backoff.next(most), Duration::from_millis(expected_ms));
            assert!(delay >= expected / 2 && delay <= expected, "{delay:?} for {expected:?}");
        }
        for _ in 0..1000 {
            assert!(backoff.next(most) <= most);
        }
        backoff.reset();
        assert!(backoff.next(most) <= Duration::from_millis(50));
    }
}
