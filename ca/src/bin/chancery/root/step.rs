//! `chancery root publish|activate|retire`: one step.

use std::io::Write;

use chancery_process::output::{Format, fields};
use chancery_proto::chancery::v1::{MoveRootRequest, MoveRootResponse, RootState};
use clap::Args;
use serde::Serialize;

use super::list::RootRow;
use super::{OverrideArgs, Roots, gate};
use crate::client::CliError;

#[derive(Debug, Args)]
pub(crate) struct StepArgs {
    /// The beginning of its fingerprint; without it, the root whose turn it is. Named, it may be asked for again after an answer that was lost:
    /// what is done already is exit status 0.
    root: Option<String>,
    /// Why: recorded with the act.
    #[arg(long, required_unless_present = "dry_run")]
    reason: Option<String>,
    /// Only say what is in the way; exit status 1 if something is.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    overrides: OverrideArgs,
}

/// The answer to an act.
#[derive(Debug, Serialize)]
pub(super) struct Moved {
    /// False if it was there already.
    changed: bool,
    #[serde(flatten)]
    root: Option<RootRow>,
}

pub(super) async fn run(mut ca: Roots, to: RootState, args: StepArgs, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let root = args.root.unwrap_or_default();
    if args.dry_run {
        let report = gate::check(&mut ca, &root, to, &args.overrides).await?;
        let open = report.open;
        report.print(out, format)?;
        return if open { Ok(()) } else { Err(CliError::Failed("something is in the way, see above".into())) };
    }
    let request =
        MoveRootRequest { root, to: to.into(), reason: args.reason.unwrap_or_default(), overrides: Some(args.overrides.to_wire()) };
    let moved = ca.move_root(request).await?.into_inner();
    Ok(fields(out, format, &Moved::from(moved))?)
}

impl From<MoveRootResponse> for Moved {
    fn from(moved: MoveRootResponse) -> Self {
        Self { changed: moved.changed, root: moved.root.as_ref().map(RootRow::from) }
    }
}
