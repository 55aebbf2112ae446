//! What a rotation that waits tells whoever watches: by a bar on a terminal, by remarks in a log.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::gate::GateReport;
use crate::output::remark;

/// How often the bar moves.
const MOVES: Duration = Duration::from_millis(500);
/// A log is told of changes so often: a large fleet changes all the time.
const REMARKS: Duration = Duration::from_secs(5);
/// How many who are missing are named.
pub(super) const NAMED: usize = 10;

/// What is in the way, as far as it was told.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Told {
    root: String,
    to: &'static str,
    missing: u64,
    obstacles: Vec<String>,
    names: Vec<String>,
}

/// Tells it.
pub(super) struct Waiting {
    told: Option<Told>,
    bar: Option<ProgressBar>,
    remarked: Option<(Instant, Told)>,
}

impl Waiting {
    pub(super) fn new() -> Self {
        Self { told: None, bar: None, remarked: None }
    }

    /// Whether anything has changed since the last time.
    pub(super) fn notes(&mut self, report: &GateReport) -> bool {
        let now = Told::of(report);
        self.told.replace(now.clone()) != Some(now)
    }

    /// For a person, or for the log of whoever has none.
    pub(super) fn show(&mut self, report: &GateReport) {
        if io::stderr().is_terminal() {
            self.move_bar(report);
        } else {
            self.remark(report);
        }
    }

    /// It waits no longer.
    pub(super) fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        *self = Self::new();
    }

    fn move_bar(&mut self, report: &GateReport) {
        let bar = self.bar.get_or_insert_with(|| {
            let bar = ProgressBar::new(report.counted);
            bar.enable_steady_tick(MOVES);
            bar
        });
        // Where nobody is missing there is nothing to count, nor an estimate.
        let style = match report.missing_total {
            0 => "{spinner} {elapsed} {wide_msg}",
            _ => "{bar:40} {pos}/{len}, {eta} left, {wide_msg}",
        };
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style);
        }
        bar.set_length(report.counted);
        bar.set_position(report.counted.saturating_sub(report.missing_total));
        bar.set_message(message(report));
    }

    fn remark(&mut self, report: &GateReport) {
        let now = Told::of(report);
        let is_due = self.remarked.as_ref().is_none_or(|(at, told)| *told != now && at.elapsed() >= REMARKS);
        if is_due {
            remark(message(report));
            self.remarked = Some((Instant::now(), now));
        }
    }
}

impl Told {
    fn of(report: &GateReport) -> Self {
        let GateReport { root, to, missing_total, obstacles, .. } = report;
        Self { root: root.clone(), to, missing: *missing_total, obstacles: obstacles.clone(), names: names(report) }
    }
}

/// The first of those who are missing, each in a sentence.
pub(super) fn names(report: &GateReport) -> Vec<String> {
    report.missing.iter().take(NAMED).map(super::gate::MissingRow::told).collect()
}

/// What is waited for: somebody by name if anybody is missing, otherwise what else is in the way.
fn message(report: &GateReport) -> String {
    let reason = report.missing.first().map(super::gate::MissingRow::told).or_else(|| report.obstacles.first().cloned());
    let more = match report.missing_total {
        0 | 1 => String::new(),
        total => format!(" (and {} more)", total - 1),
    };
    let reason = reason.map(|reason| format!(": {reason}{more}")).unwrap_or_default();
    format!("waiting for the root {} to be {}{reason}", short(&report.root), report.to)
}

/// As much of a fingerprint as names a root.
fn short(fingerprint: &str) -> &str {
    fingerprint.get(..8).unwrap_or(fingerprint)
}

#[cfg(test)]
mod tests {
    use super::super::gate::MissingRow;
    use super::*;

    fn report() -> GateReport {
        GateReport { root: "0123456789abcdef".into(), to: "active", counted: 7, ..GateReport::default() }
    }

    fn missing(names: &[&str]) -> GateReport {
        let row = |name: &&str| MissingRow { name: (*name).into(), reason: "has not reported".into(), ..MissingRow::default() };
        let missing: Vec<_> = names.iter().map(row).collect();
        let total = missing.len() as u64;
        GateReport { missing, missing_total: total, obstacles: vec![format!("{total} who count are missing")], ..report() }
    }

    #[test]
    fn whoever_is_missing_is_named_and_otherwise_the_obstacle() {
        assert_eq!(message(&missing(&["shop/cart-0"])), "waiting for the root 01234567 to be active: shop/cart-0 has not reported");
        assert_eq!(message(&missing(&["a", "b", "c"])), "waiting for the root 01234567 to be active: a has not reported (and 2 more)");
        let held = GateReport { obstacles: vec!["this machine's clock is 60 s ahead".into()], ..report() };
        assert_eq!(message(&held), "waiting for the root 01234567 to be active: this machine's clock is 60 s ahead");
    }

    #[test]
    fn another_name_or_another_obstacle_is_a_change_although_the_numbers_are_the_same() {
        let mut waiting = Waiting::new();
        let clock = |words: &str| GateReport { obstacles: vec![words.into()], ..report() };
        for report in [missing(&["a"]), missing(&["b"]), clock("set by 60 s"), clock("set by 90 s")] {
            assert!(waiting.notes(&report), "{report:?}");
            assert!(!waiting.notes(&report), "{report:?}");
        }
    }
}
