//! `chancery root rotate`: the whole way from the active root to the next one. Where it is says the CA; so it can be stopped anywhere, and
//! the next call goes on from there.

use std::io::Write;
use std::time::{Duration, Instant};

use chancery_process::output::{Format, Json, Listing, OutputError, fields};
use chancery_proto::chancery::v1::{MoveRootRequest, MoveRootResponse, PrepareRootRequest, RootRecord, RootState};
use clap::Args;
use serde::Serialize;
use time::OffsetDateTime;
use tonic::{Code, Status};

use super::OverrideArgs;
use super::gate::{self, GateReport};
use super::list::word;
use super::patient::Patient;
use super::waiting::{Waiting, names};
use crate::client::{CliError, Way};
use crate::output::{moment, remark};

pub(super) const EXAMPLES: &str = "\
Examples:
  chancery root rotate --dry-run
  chancery root rotate --reason 'once a year' --deadline 6h
  chancery root rotate --reason 'node-7 is being repaired' --except node-7 --output json";

/// How often is looked whether a gate is open.
const LOOK: Duration = Duration::from_millis(500);
/// The metadata with the word for why an act was refused.
const REASON: &str = "chancery-reason";

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
    /// `prepared`, …, `retired`: what the root became, or is to become; `distrusted` if it leaves by itself.
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
    /// The first of those who are missing, each in a sentence.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    names: Vec<String>,
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
    args: &'a RotateArgs,
    ca: Patient<'a>,
    /// The deadline.
    until: Option<Instant>,
    events: Listing<'a, W>,
    format: Format,
    waiting: Waiting,
    /// The step that was impossible when it was last tried.
    impossible: Option<Next>,
}

/// What is to be done next.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Next {
    Prepare,
    /// A root, and where to.
    Move(String, RootState),
    /// For a root that is being distrusted, which the CA does by itself; by when it is gone.
    Wait(String, String),
    Done,
}

/// What this call is about.
#[derive(Clone, Debug, Default)]
struct Course {
    /// The root that is to be active at the end: made by this call, or on its way already.
    target: Option<String>,
    /// It has finished what was begun before, and begins nothing else.
    finished: bool,
}

pub(super) async fn run(way: &Way, args: &RotateArgs, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let begun = Instant::now();
    let ca = Patient::connect(way).await?;
    if args.dry_run {
        return dry_run(ca, args, out, format).await;
    }
    let events = Listing::begin(out, format, Json::Lines, &COLUMNS)?;
    let until = args.deadline.and_then(|deadline| begun.checked_add(*deadline));
    let mut walk = Walk { args, ca, until, events, format, waiting: Waiting::new(), impossible: None };
    let mut course = Course::default();
    while walk.go_on(&mut course).await? {}
    walk.waiting.end();
    Ok(walk.events.finish()?)
}

async fn dry_run(mut ca: Patient<'_>, args: &RotateArgs, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let roots = ca.list(None).await?.roots;
    let newest =
        roots.iter().filter(|root| matches!(root.state(), RootState::Prepared | RootState::Published)).max_by_key(|root| root.entry);
    let course = Course { target: newest.map(|root| root.fingerprint.clone()), finished: false };
    let step = next(&roots, &course)?;
    let done = match &step {
        Next::Prepare => 0,
        Next::Move(_, RootState::Published) => 1,
        Next::Move(_, RootState::Active) => 2,
        Next::Move(..) => 3,
        Next::Wait(..) | Next::Done => STEPS.len(),
    };
    let steps = &STEPS[done..];
    let gate = match step {
        Next::Prepare | Next::Done => None,
        Next::Move(root, to) => Some(gate::check(&mut ca.ca.roots, &root, to, &args.overrides).await?),
        Next::Wait(root, _) => Some(gate::check(&mut ca.ca.roots, &root, RootState::Retired, &args.overrides).await?),
    };
    if format != Format::Table {
        return Ok(fields(out, format, &DryRun { steps, gate })?);
    }
    let left = if steps.is_empty() { "none".to_owned() } else { steps.join(", ") };
    writeln!(out, "steps that are left: {left}").map_err(OutputError::Write)?;
    let Some(gate) = gate else { return Ok(()) };
    writeln!(out).map_err(OutputError::Write)?;
    gate.print(out, format)
}

/// What is due: a root that drains is retired before another is activated, so that a rotation which was stopped is finished first.
///
/// # Errors
/// If the root that was to become active cannot become it any more: somebody else has ended this rotation.
fn next(roots: &[RootRecord], course: &Course) -> Result<Next, CliError> {
    let draining = roots.iter().filter(|root| root.state() == RootState::Draining);
    // Those that leave by themselves last: nobody has to wait for these to go on.
    if let Some(root) = draining.min_by_key(|root| (root.leave_by_ms != 0, root.entry)) {
        let fingerprint = root.fingerprint.clone();
        let is_leaving = root.leave_by_ms != 0;
        return Ok(if is_leaving {
            Next::Wait(fingerprint, moment(root.leave_by_ms))
        } else {
            Next::Move(fingerprint, RootState::Retired)
        });
    }
    let Some(target) = &course.target else { return Ok(if course.finished { Next::Done } else { Next::Prepare }) };
    let found = roots.iter().find(|root| root.fingerprint == *target);
    match found.map_or(RootState::Unspecified, RootRecord::state) {
        RootState::Prepared => Ok(Next::Move(target.clone(), RootState::Published)),
        RootState::Published => Ok(Next::Move(target.clone(), RootState::Active)),
        RootState::Active | RootState::Draining => Ok(Next::Done),
        state => Err(CliError::Failed(format!(
            "the root {target}, which was to become active, is {} meanwhile, and this rotation has not come to its end: `chancery log acts \
             --action root` says by whom and why; start it again for another root",
            word(state)
        ))),
    }
}

impl<W: Write> Walk<'_, W> {
    /// Takes the next step if its gate is open, or waits a moment; false at the end.
    async fn go_on(&mut self, course: &mut Course) -> Result<bool, CliError> {
        let roots = self.ca.list(self.until).await?.roots;
        let step = next(&roots, course)?;
        let held = match &step {
            Next::Done => return Ok(false),
            Next::Prepare => {
                course.target = Some(self.prepare().await?);
                return Ok(true);
            }
            Next::Move(root, to) => match self.try_move(root, *to).await? {
                None => {
                    course.finished = true;
                    return Ok(true);
                }
                Some(held) => held,
            },
            Next::Wait(root, by) => {
                course.finished = true;
                let obstacles = vec![format!("it is being distrusted, and leaves by itself by {by}")];
                GateReport { root: root.clone(), to: word(RootState::Distrusted), obstacles, ..GateReport::default() }
            }
        };
        if !held.open {
            self.wait(&held)?;
        }
        if self.until.is_some_and(|until| Instant::now() >= until) {
            return Err(self.late(&held));
        }
        tokio::time::sleep(LOOK).await;
        Ok(true)
    }

    async fn prepare(&mut self) -> Result<String, CliError> {
        let request = PrepareRootRequest { reason: self.reason(), self_signed: false };
        let moved = self.ca.ask(self.until, async |ca| Ok(ca.roots.prepare_root(request.clone()).await?.into_inner())).await?;
        self.done(RootState::Prepared, moved)
    }

    /// Nothing if it is done, or else what holds it.
    async fn try_move(&mut self, root: &str, to: RootState) -> Result<Option<GateReport>, CliError> {
        let overrides = self.args.overrides.clone();
        let report = self.ca.ask(self.until, async |ca| gate::check(&mut ca.roots, root, to, &overrides).await).await?;
        if !report.open {
            return Ok(Some(report));
        }
        let request = MoveRootRequest { root: root.to_owned(), to: to.into(), reason: self.reason(), overrides: Some(overrides.to_wire()) };
        match self.ca.ask(self.until, async |ca| Ok(ca.roots.move_root(request.clone()).await?.into_inner())).await {
            Ok(moved) => {
                self.done(to, moved)?;
                Ok(None)
            }
            // Closed again in between.
            Err(CliError::Refused(status)) if is_refused_as(&status, "gate") => Ok(Some(report.refused(&status))),
            // Somebody else has moved it in between: where the roots are then says how to go on. That it would be due again is a mistake.
            Err(CliError::Refused(status)) if is_refused_as(&status, "impossible") => {
                let step = Some(Next::Move(root.to_owned(), to));
                if self.impossible == step {
                    return Err(CliError::Refused(status));
                }
                self.impossible = step;
                Ok(Some(report.refused(&status)))
            }
            Err(error) => Err(error),
        }
    }

    fn reason(&self) -> String {
        self.args.reason.clone().unwrap_or_default()
    }

    fn done(&mut self, to: RootState, moved: MoveRootResponse) -> Result<String, CliError> {
        self.waiting.end();
        self.impossible = None;
        let root = moved.root.unwrap_or_default();
        if moved.changed {
            let (phase, entry, root) = (word(to), Some(root.entry), root.fingerprint.clone());
            self.tell(Event { phase, outcome: "done", entry, root, ..Event::now() })?;
        }
        Ok(root.fingerprint)
    }

    fn wait(&mut self, report: &GateReport) -> Result<(), CliError> {
        let is_news = self.waiting.notes(report);
        if self.format == Format::Table {
            self.waiting.show(report);
            return Ok(());
        }
        if !is_news {
            return Ok(());
        }
        self.tell(Event {
            phase: report.to,
            outcome: "waiting",
            root: report.root.clone(),
            counted: Some(report.counted),
            missing: Some(report.missing_total),
            obstacles: report.obstacles.clone(),
            names: names(report),
            ..Event::now()
        })
    }

    fn tell(&mut self, event: Event) -> Result<(), CliError> {
        Ok(self.events.add(&[event])?)
    }

    fn late(&mut self, report: &GateReport) -> CliError {
        self.waiting.end();
        for name in names(report) {
            remark(format!("missing: {name}"));
        }
        CliError::Failed(format!(
            "the deadline has come, and the root {} is not {} yet: {}",
            report.root,
            report.to,
            report.obstacles.join("; ")
        ))
    }
}

impl Event {
    fn now() -> Self {
        let millis = OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000;
        Self { time: moment(i64::try_from(millis).unwrap_or_default()), ..Self::default() }
    }
}

fn is_refused_as(status: &Status, reason: &str) -> bool {
    let given = status.metadata().get(REASON).and_then(|given| given.to_str().ok());
    status.code() == Code::FailedPrecondition && given == Some(reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(number: u8, state: RootState) -> RootRecord {
        RootRecord { fingerprint: number.to_string(), state: state.into(), entry: number.into(), ..RootRecord::default() }
    }

    fn to(target: Option<&str>) -> Course {
        Course { target: target.map(Into::into), finished: false }
    }

    #[test]
    fn a_rotation_goes_on_where_it_was_stopped() {
        use RootState::{Active, Draining, Prepared, Published, Retired};
        let next = |roots: &[RootRecord], target| next(roots, &to(target)).unwrap();
        let go = |root: &str, to| Next::Move(root.into(), to);
        assert_eq!(next(&[root(1, Active)], None), Next::Prepare);
        assert_eq!(next(&[root(1, Active), root(2, Published)], None), Next::Prepare, "the CA says which one it is");
        assert_eq!(next(&[root(1, Active), root(2, Prepared)], Some("2")), go("2", Published));
        assert_eq!(next(&[root(1, Active), root(2, Published)], Some("2")), go("2", Active));
        for target in [None, Some("2")] {
            assert_eq!(next(&[root(1, Draining), root(2, Active), root(3, Published)], target), go("1", Retired));
        }
        assert_eq!(next(&[root(1, Retired), root(2, Active)], Some("2")), Next::Done);
    }

    #[test]
    fn what_was_finished_for_somebody_else_begins_nothing_more() {
        let course = Course { target: None, finished: true };
        assert_eq!(next(&[root(1, RootState::Retired), root(2, RootState::Active)], &course).unwrap(), Next::Done);
    }

    #[test]
    fn a_root_that_is_being_distrusted_leaves_by_itself_and_is_waited_for() {
        use RootState::{Active, Distrusted, Draining};
        let leaving = RootRecord { leave_by_ms: 1_700_000_000_000, ..root(1, Draining) };
        let wait = Next::Wait("1".into(), "2023-11-14T22:13:20Z".into());
        assert_eq!(next(&[leaving.clone(), root(2, Active)], &to(Some("2"))).unwrap(), wait);
        let both = [leaving, root(2, Draining), root(3, Active)];
        assert_eq!(next(&both, &to(None)).unwrap(), Next::Move("2".into(), RootState::Retired), "nobody waits for it to go on");
        assert_eq!(next(&[root(1, Distrusted), root(2, Active)], &to(Some("2"))).unwrap(), Next::Done);
    }

    #[test]
    fn a_rotation_whose_root_somebody_else_has_taken_away_has_failed() {
        use RootState::{Active, Distrusted, Published, Retired};
        for gone in [Retired, Distrusted] {
            let error = next(&[root(1, Active), root(2, gone), root(3, Published)], &to(Some("2"))).unwrap_err().to_string();
            assert!(error.contains(word(gone)) && error.contains("has not come to its end"), "{error}");
        }
    }
}
