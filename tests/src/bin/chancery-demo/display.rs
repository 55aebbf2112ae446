//! What the demo shows while it runs: lines that change in place on a terminal, a line every few seconds elsewhere.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use chancery_tests::load::Counts;
use chancery_tests::mesh::Mesh;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::Watched;

const LINE_EVERY: Duration = Duration::from_secs(5);

/// The live part of the screen.
pub(crate) struct Display {
    start: Instant,
    bars: Option<(MultiProgress, Vec<ProgressBar>)>,
    last_line: Option<Instant>,
}

impl Display {
    pub(crate) fn new() -> Self {
        let bars = io::stderr().is_terminal().then(|| (MultiProgress::new(), Vec::new()));
        Self { start: Instant::now(), bars, last_line: None }
    }

    /// Something happened; stays on the screen.
    pub(crate) fn say(&self, what: &str) {
        let line = format!("[{:>5.1} s] {what}", self.start.elapsed().as_secs_f64());
        match &self.bars {
            Some((screen, _)) => {
                let _ = screen.println(line);
            }
            None => {
                let _ = writeln!(io::stderr(), "{line}");
            }
        }
    }

    /// How things stand.
    pub(crate) fn show(&mut self, mesh: &Mesh, watched: &[Watched], counts: &Counts) {
        // With the agent away nobody knows the next renewal.
        let agent = mesh.agent.ask(&["status"]).unwrap_or_default();
        let mut lines: Vec<String> = watched.iter().map(|one| describe(one, &agent)).collect();
        lines.push(format!("requests, each a new connection: {} ok, {} failed", counts.ok(), counts.failed()));
        let Some((screen, bars)) = &mut self.bars else {
            if self.last_line.is_none_or(|last| last.elapsed() >= LINE_EVERY) {
                self.last_line = Some(Instant::now());
                for line in &lines {
                    self.say(line);
                }
            }
            return;
        };
        if bars.is_empty() {
            let style = ProgressStyle::with_template("  {msg}").unwrap_or_else(|_| ProgressStyle::default_spinner());
            bars.extend(lines.iter().map(|_| screen.add(ProgressBar::new_spinner().with_style(style.clone()))));
        }
        for (bar, line) in bars.iter().zip(lines) {
            bar.set_message(line);
            bar.tick();
        }
    }

    /// Leaves the last state on the screen.
    pub(crate) fn end(&self) {
        if let Some((_, bars)) = &self.bars {
            bars.iter().for_each(ProgressBar::abandon);
        }
    }
}

fn describe(one: &Watched, agent: &Value) -> String {
    let expires = seconds_until(&one.certificate.expires);
    let spiffe_id = one.workload.spiffe_id();
    let known = agent["workloads"].as_array().and_then(|all| all.iter().find(|each| each["spiffe_id"] == spiffe_id));
    let renewal = match known.map(|workload| workload["next_try_at"].as_str()) {
        _ if agent["ca_reachable"] == false => "CA away".to_owned(),
        Some(Some(moment)) => format!("renewed in {:>2} s", seconds_until(moment)),
        Some(None) => "being renewed".to_owned(),
        None => "agent away".to_owned(),
    };
    let serial = one.certificate.serial.get(..12).unwrap_or(&one.certificate.serial);
    format!("{:<13} holds {serial}…, expires in {expires:>2} s, {renewal}; {} rotations", one.workload.name(), one.rotations)
}

fn seconds_until(moment: &str) -> i64 {
    OffsetDateTime::parse(moment, &Rfc3339).map_or(0, |moment| (moment - OffsetDateTime::now_utc()).whole_seconds())
}
