//! How many days the disk under the data directory lasts, at the rate at which the ledger grew within the last day.
//!
//! What the ledger takes is looked at now and then and remembered for a day, so that the estimate follows the mesh as it grows. Segments are
//! allocated in advance and the index is merged from time to time: over less than a day, little growth says nothing.

use std::collections::VecDeque;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration as StdDuration;

use time::{Duration, OffsetDateTime};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::server::parts::Parts;

const EVERY: StdDuration = StdDuration::from_secs(5 * 60);
const WINDOW: Duration = Duration::DAY;
/// Over less time nothing is said …
const LEAST_WINDOW: Duration = Duration::HOUR;
/// … and within less than a day this much growth is not told from the segments that are allocated in advance, in bytes.
const NOISE: u64 = 64 << 20;
/// With less room the disk is full: the ledger cannot go on to another segment, in bytes.
const SEGMENT: u64 = 16 << 20;
/// `st_blocks` counts these, whatever the file system's block is.
const BLOCK_BYTES: u64 = 512;
const SECONDS_PER_DAY: f64 = 86_400.0;

/// What the ledger took within the last day.
#[derive(Debug, Default)]
pub(super) struct Growth(Mutex<Seen>);

#[derive(Debug, Default)]
struct Seen {
    /// When, and how many bytes; the oldest first, a day's at most.
    used: VecDeque<(OffsetDateTime, u64)>,
    days_left: Option<f64>,
}

impl Growth {
    /// How many days; none if the ledger does not grow, or it cannot be told yet.
    pub(super) fn days_left(&self) -> Option<f64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).days_left
    }

    /// At `now` the ledger took `used` bytes, and its disk had `free` more.
    pub(super) fn note(&self, now: OffsetDateTime, used: u64, free: u64) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A clock that was set back: what is remembered lies in no window.
        if seen.used.back().is_some_and(|(last, _)| *last > now) {
            seen.used.clear();
        }
        seen.used.push_back((now, used));
        // The one at the edge of the window stays, so that the window is a whole one.
        while seen.used.get(1).is_some_and(|(time, _)| now - *time >= WINDOW) {
            seen.used.pop_front();
        }
        if free < SEGMENT {
            seen.days_left = Some(0.0);
            return;
        }
        seen.days_left = seen.used.front().and_then(|(since, before)| days_left(now - *since, used.saturating_sub(*before), free));
    }
}

/// How many days `free` bytes last if `grown` were taken within `window`.
fn days_left(window: Duration, grown: u64, free: u64) -> Option<f64> {
    let is_noise = window < WINDOW && grown < NOISE;
    if window < LEAST_WINDOW || grown == 0 || is_noise {
        return None;
    }
    #[allow(clippy::cast_precision_loss, reason = "bytes of a disk are an estimate here")]
    let windows = free as f64 / grown as f64;
    Some(windows * window.as_seconds_f64() / SECONDS_PER_DAY)
}

/// Looks now and then, until `stop`.
pub(super) async fn run(parts: Arc<Parts>, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(EVERY);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        look(&parts).await;
    }
}

/// Looks once.
pub(super) async fn look(parts: &Parts) {
    let ledger = parts.directory.ledger();
    let place = ledger.display().to_string();
    let looked = tokio::task::spawn_blocking(move || {
        let disk = rustix::fs::statvfs(&ledger)?;
        Ok((allocated(&ledger)?, disk.f_bavail.saturating_mul(disk.f_frsize)))
    });
    match looked.await.map_err(io::Error::other).flatten() {
        Ok((used, free)) => parts.growth.note(parts.clock.now(), used, free),
        Err(error) => warn!(place, %error, "it cannot be told how long the ledger's disk lasts"),
    }
}

/// What is allocated for the files below `directory`, in bytes. Files come and go meanwhile.
fn allocated(directory: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for found in std::fs::read_dir(directory)? {
        let found = found?;
        let of_it = found
            .metadata()
            .and_then(|metadata| if metadata.is_dir() { allocated(&found.path()) } else { Ok(metadata.blocks() * BLOCK_BYTES) });
        match of_it {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => bytes += result?,
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: OffsetDateTime = time::macros::datetime!(2026-03-01 12:00 UTC);
    const MIB: u64 = 1 << 20;

    /// A ledger that grows by so many bytes every five minutes, for so long.
    fn grown(bytes: u64, for_: Duration, free: u64) -> Growth {
        let growth = Growth::default();
        let steps = for_.whole_minutes() / 5;
        for step in 0..=steps {
            growth.note(START + Duration::minutes(5 * step), u64::try_from(step).unwrap() * bytes, free);
        }
        growth
    }

    fn is_about(days: Option<f64>, expected: f64) -> bool {
        days.is_some_and(|days| (days / expected - 1.0).abs() < 0.01)
    }

    #[test]
    fn what_is_free_is_divided_by_a_days_growth() {
        // 288 MiB a day, and ten times that is free.
        let growth = grown(MIB, Duration::DAY, 2880 * MIB);
        assert!(is_about(growth.days_left(), 10.0), "{growth:?}");
    }

    #[test]
    fn a_disk_without_room_for_a_segment_is_full_whatever_filled_it() {
        assert_eq!(grown(0, Duration::minutes(5), 15 * MIB).days_left(), Some(0.0));
        assert_eq!(grown(0, Duration::minutes(5), 16 * MIB).days_left(), None);
    }

    #[test]
    fn only_the_last_day_counts_and_no_more_than_that_is_remembered() {
        let growth = grown(0, Duration::days(3), 2880 * MIB);
        assert_eq!(growth.days_left(), None, "it does not grow");
        let base = START + Duration::days(3);
        for step in 1..=288 {
            growth.note(base + Duration::minutes(5) * i32::try_from(step).unwrap(), step * MIB, 2880 * MIB);
        }
        assert!(is_about(growth.days_left(), 10.0), "{growth:?}");
        assert_eq!(growth.0.lock().unwrap().used.len(), 289);
    }

    #[test]
    fn before_an_hour_is_over_and_of_a_segment_or_two_nothing_is_said() {
        assert_eq!(grown(100 * MIB, Duration::minutes(55), 16 * MIB).days_left(), None);
        assert!(grown(100 * MIB, Duration::HOUR, 2400 * MIB).days_left().is_some_and(|days| days < 0.1));
        assert_eq!(grown(MIB, Duration::HOUR, 100 * MIB).days_left(), None);
        assert!(is_about(grown(MIB / 288, Duration::DAY, 50 * MIB).days_left(), 50.0), "of a whole day, everything counts");
    }

    #[test]
    fn a_clock_that_was_set_back_begins_anew() {
        let growth = grown(MIB, Duration::DAY, 2880 * MIB);
        growth.note(START, 0, 2880 * MIB);
        assert_eq!(growth.days_left(), None);
    }
}
