//! `chancery root rotate`: the whole way from the active root to the next one. Where it is says the CA; so it can be stopped anywhere, and
//! the next call goes on from there.

use std::io::Write;
use std::time::{Duration, Instant};

use chancery_process::output::{Format, Json, Listing, OutputError, fields};
use chancery_proto::chancery::v1::{ListRootsRequest, MoveRootRequest, MoveRootResponse, PrepareRootRequest, RootRecord, RootState};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use time::OffsetDateTime;
use tonic::Code;

use super::gate::{self, GateReport};
use super::list::word;
use super::{OverrideArgs, Roots, connect};
use crate::client::{CliError, Way};
use crate::output::{moment, remark};

pub(super) const EXAMPLES: &str = "\
Examples:
  chancery root rotate --dry-run
  chancery root rotate --reason 'once a year' --deadline 6h
  chancery root rotate --reason 'node-7 is being repaired' --except node-7 --output json";

/// How often is looked whether a gate is open.
const LOOK: Duration = Duration::from_millis(500);
/// How many who are missing are named at the end.
const NAMED: usize = 10;

#[derive(Debug, Args)]
pub(crate) struct RotateArgs {
    /// Why: recorded with each act.
    #[arg(long, required_unless_present = "dry_run")]
    reason: Option<String>,
    /// Give up after so long, with exit status 1 and who is missing; what was done stays, and the next call goes on.
    #[arg(long)]
    deadline: Option<humantime::Duration>,
    /// Only say which steps are left, and what is in the way of the next one.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    overrides: OverrideArgs,
}

/// Something that happened on the way, as a line of JSON or for a person.
#[derive(Debug, Default, Serialize)]
struct Event {
    time: String,
    /// `prepared`, …, `retired`: what the root became, or is to become.
    phase: &'static str,
    /// `done`, or `waiting`.
    outcome: &'static str,
    root: String,
    /// The act's.
    #[serde(skip_serializing_if = "Option::is_none")]
    entry: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    counted: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    missing: Option<u64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    obstacles: Vec<String>,
}

/// Of a whole rotation, as their commands are called.
const STEPS: [&str; 4] = ["prepare", "publish", "activate", "retire"];

/// What a rotation would do.
#[derive(Debug, Serialize)]
struct DryRun {
    steps: &'static [&'static str],
    /// The next step's, if it has one.
    gate: Option<GateReport>,
}

const COLUMNS: [&str; 7] = ["time", "phase", "outcome", "root", "entry", "missing", "counted"];

/// A rotation under way.
struct Walk<'a, W> {
    way: &'a Way,
    args: &'a RotateArgs,
    ca: Roots,
    begun: Instant,
    events: Listing<'a, W>,
    format: Format,
    /// What was told last of a gate, so that only changes are.
    told: Option<(RootState, u64, usize)>,
    bar: ProgressBar,
}

/// What is to be done next.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Next {
    Prepare,
    /// A root, and where to.
    Move(String, RootState),
}

pub(super) async fn run(way: &Way, args: &RotateArgs, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let ca = connect(way).await?;
    if args.dry_run {
        return dry_run(ca, args, out, format).await;
    }
    let events = Listing::begin(out, format, Json::Lines, &COLUMNS)?;
    let bar = ProgressBar::hidden();
    let mut walk = Walk { way, args, ca, begun: Instant::now(), events, format, told: None, bar };
    // Made by this call, or on its way already.
    let mut target = None;
    loop {
        let step = next(&walk.roots().await?, target.as_deref());
        let Some(step) = step else { return Ok(walk.events.finish()?) };
        let root = walk.step(&step).await?;
        if matches!(step, Next::Move(_, RootState::Retired)) {
            return Ok(walk.events.finish()?);
        }
        target = Some(root);
    }
}

async fn dry_run(mut ca: Roots, args: &RotateArgs, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let roots = ca.list_roots(ListRootsRequest {}).await?.into_inner().roots;
    let newest =
        roots.iter().filter(|root| matches!(root.state(), RootState::Prepared | RootState::Published)).max_by_key(|root| root.entry);
    let step = next(&roots, newest.map(|root| &*root.fingerprint)).unwrap_or(Next::Prepare);
    let done = match &step {
        Next::Prepare => 0,
        Next::Move(_, RootState::Published) => 1,
        Next::Move(_, RootState::Active) => 2,
        Next::Move(..) => 3,
    };
    let steps = &STEPS[done..];
    let gate = match step {
        Next::Prepare => None,
        Next::Move(root, to) => Some(gate::check(&mut ca, &root, to, &args.overrides).await?),
    };
    if format != Format::Table {
        return Ok(fields(out, format, &DryRun { steps, gate })?);
    }
    writeln!(out, "steps that are left: {}", steps.join(", ")).map_err(OutputError::Write)?;
    let Some(gate) = gate else { return Ok(()) };
    writeln!(out).map_err(OutputError::Write)?;
    gate.print(out, format)
}

/// What is due on the way to `target`: a root that drains is retired before another is activated, so that a rotation which was stopped is
/// finished first. Nothing if something else has finished it, a distrust perhaps.
fn next(roots: &[RootRecord], target: Option<&str>) -> Option<Next> {
    let draining = roots.iter().filter(|root| root.state() == RootState::Draining).min_by_key(|root| root.entry);
    if let Some(root) = draining {
        return Some(Next::Move(root.fingerprint.clone(), RootState::Retired));
    }
    let Some(target) = target else { return Some(Next::Prepare) };
    let to = match roots.iter().find(|root| root.fingerprint == target)?.state() {
        RootState::Prepared => RootState::Published,
        RootState::Published => RootState::Active,
        _ => return None,
    };
    Some(Next::Move(target.to_owned(), to))
}

impl<W: Write> Walk<'_, W> {
    /// Makes a step, when its gate is open, and returns the root that it was about.
    async fn step(&mut self, step: &Next) -> Result<String, CliError> {
        let reason = self.args.reason.clone().unwrap_or_default();
        match step {
            Next::Prepare => {
                let request = PrepareRootRequest { reason, self_signed: false };
                let moved = self.ask(async |ca| Ok(ca.prepare_root(request.clone()).await?.into_inner())).await?;
                self.done(RootState::Prepared, moved)
            }
            Next::Move(root, to) => {
                let overrides = self.args.overrides.clone();
                loop {
                    let report = self.ask(async |ca| gate::check(ca, root, *to, &overrides).await).await?;
                    if report.open {
                        let (root, overrides) = (root.clone(), Some(overrides.to_wire()));
                        let request = MoveRootRequest { root, to: (*to).into(), reason: reason.clone(), overrides };
                        match self.ask(async |ca| Ok(ca.move_root(request.clone()).await?.into_inner())).await {
                            Ok(moved) => return self.done(*to, moved),
                            // Closed again in between.
                            Err(CliError::Refused(status)) if status.code() == Code::FailedPrecondition && !self.is_late() => {}
                            Err(error) => return Err(error),
                        }
                    } else {
                        self.waiting(*to, &report)?;
                    }
                    if self.is_late() {
                        return Err(late(&report));
                    }
                    tokio::time::sleep(LOOK).await;
                }
            }
        }
    }

    async fn roots(&mut self) -> Result<Vec<RootRecord>, CliError> {
        self.ask(async |ca| Ok(ca.list_roots(ListRootsRequest {}).await?.into_inner().roots)).await
    }

    /// Asks again, over a new connection, while the CA is away.
    async fn ask<T>(&mut self, question: impl AsyncFn(&mut Roots) -> Result<T, CliError>) -> Result<T, CliError> {
        loop {
            match question(&mut self.ca).await {
                Err(CliError::Refused(status)) if is_away(status.code()) && !self.is_late() => {
                    self.bar.set_message("the CA is away");
                }
                answer => return answer,
            }
            tokio::time::sleep(LOOK).await;
            if let Ok(ca) = connect(self.way).await {
                self.ca = ca;
            }
        }
    }

    fn is_late(&self) -> bool {
        self.args.deadline.is_some_and(|deadline| self.begun.elapsed() >= *deadline)
    }

    fn done(&mut self, to: RootState, moved: MoveRootResponse) -> Result<String, CliError> {
        self.bar.finish_and_clear();
        self.told = None;
        let root = moved.root.unwrap_or_default();
        if moved.changed {
            let (phase, entry, root) = (word(to), Some(root.entry), root.fingerprint.clone());
            self.tell(Event { phase, outcome: "done", entry, root, ..Event::now() })?;
        }
        Ok(root.fingerprint)
    }

    fn waiting(&mut self, to: RootState, report: &GateReport) -> Result<(), CliError> {
        let known = (to, report.missing_total, report.obstacles.len());
        if self.told == Some(known) {
            return Ok(());
        }
        let before = self.told.replace(known);
        if self.format == Format::Table {
            if before.is_none() {
                self.bar = progress(report.counted);
            }
            self.bar.set_position(report.counted.saturating_sub(report.missing_total));
            let first = report.missing.first().map(|one| format!(": {}", one.told())).unwrap_or_default();
            self.bar.set_message(format!("until it can be {}{first}", word(to)));
            return Ok(());
        }
        self.tell(Event {
            phase: word(to),
            outcome: "waiting",
            root: report.root.clone(),
            counted: Some(report.counted),
            missing: Some(report.missing_total),
            obstacles: report.obstacles.clone(),
            ..Event::now()
        })
    }

    fn tell(&mut self, event: Event) -> Result<(), CliError> {
        Ok(self.events.add(&[event])?)
    }
}

impl Event {
    fn now() -> Self {
        let millis = OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000;
        Self { time: moment(i64::try_from(millis).unwrap_or_default()), ..Self::default() }
    }
}

fn is_away(code: Code) -> bool {
    matches!(code, Code::Unavailable | Code::Unknown | Code::Cancelled)
}

fn late(report: &GateReport) -> CliError {
    for one in report.missing.iter().take(NAMED) {
        remark(format!("missing: {}", one.told()));
    }
    CliError::Failed(format!("the deadline has come, and the root stays where it is: {}", report.obstacles.join("; ")))
}

/// On standard error, if somebody watches.
fn progress(counted: u64) -> ProgressBar {
    let bar = ProgressBar::new(counted);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len}, {eta} left, {wide_msg}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(LOOK);
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(number: u8, state: RootState) -> RootRecord {
        RootRecord { fingerprint: number.to_string(), state: state.into(), entry: number.into(), ..RootRecord::default() }
    }

    #[test]
    fn a_rotation_goes_on_where_it_was_stopped() {
        use RootState::{Active, Draining, Prepared, Published, Retired};
        let go = |root: &str, to| Some(Next::Move(root.into(), to));
        assert_eq!(next(&[root(1, Active)], None), Some(Next::Prepare));
        assert_eq!(next(&[root(1, Active), root(2, Published)], None), Some(Next::Prepare), "the CA says which one it is");
        assert_eq!(next(&[root(1, Active), root(2, Prepared)], Some("2")), go("2", Published));
        assert_eq!(next(&[root(1, Active), root(2, Published)], Some("2")), go("2", Active));
        for target in [None, Some("2")] {
            assert_eq!(next(&[root(1, Draining), root(2, Active), root(3, Published)], target), go("1", Retired));
        }
        assert_eq!(next(&[root(1, Retired), root(2, Active)], Some("2")), None);
    }
}
