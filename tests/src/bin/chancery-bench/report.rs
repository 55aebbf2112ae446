//! The lines, and the verdict on each.

use std::io::{self, Write};
use std::path::Path;

use chancery_tests::Result;
use serde::Serialize;

use crate::bare::Costs;

/// What a budget allows.
#[derive(Clone, Copy)]
pub(crate) enum Limit {
    AtMost(f64),
    AtLeast(f64),
}

/// One line. The names of its fields and of the verdicts are read by other programs.
#[derive(Serialize)]
struct Line {
    name: &'static str,
    value: f64,
    unit: &'static str,
    limit: f64,
    verdict: &'static str,
}

/// What was measured so far.
pub(crate) struct Report {
    lines: Vec<Line>,
    noisy: bool,
    beside: String,
}

impl Report {
    pub(crate) fn new(bare: &Costs) -> Self {
        Self { lines: Vec::new(), noisy: bare.noisy(), beside: bare.to_string() }
    }

    /// A line that does not hang on how busy the machine is.
    pub(crate) fn line(&mut self, name: &'static str, value: f64, unit: &'static str, limit: Limit) -> Result<()> {
        self.judge(name, value, unit, limit, false)
    }

    /// A latency: on a machine that is slower than the budgets assume, it proves nothing.
    pub(crate) fn latency(&mut self, name: &'static str, value: f64, unit: &'static str, limit: Limit) -> Result<()> {
        self.judge(name, value, unit, limit, true)?;
        remark(&format!("beside it: {}", self.beside))
    }

    fn judge(&mut self, name: &'static str, value: f64, unit: &'static str, limit: Limit, latency: bool) -> Result<()> {
        let (kept, limit) = match limit {
            Limit::AtMost(limit) => (value <= limit, limit),
            Limit::AtLeast(limit) => (value >= limit, limit),
        };
        let verdict = match (latency && self.noisy, kept) {
            (true, _) => "noisy",
            (false, true) => "ok",
            (false, false) => "short",
        };
        writeln!(io::stdout(), "{name:<20} {value:>12.2} {unit:<8} {limit:<8} {verdict}")?;
        self.lines.push(Line { name, value, unit, limit, verdict });
        Ok(())
    }

    pub(crate) fn good(&self) -> bool {
        self.lines.iter().all(|line| line.verdict != "short")
    }

    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        Ok(std::fs::write(path, serde_json::to_vec_pretty(&self.lines)?)?)
    }
}

/// Says what belongs to the line before.
pub(crate) fn remark(remark: &str) -> Result<()> {
    Ok(writeln!(io::stdout(), "    {remark}")?)
}
