//! `chancery root distrust`: begins it, and watches the CA finish it. Whoever stops watching stops nothing.

use std::io::Write;
use std::time::{Duration, Instant};

use chancery_process::output::{Format, fields};
use chancery_proto::chancery::v1::{DistrustRootRequest, ListRootsRequest, RootRecord, RootState};
use clap::Args;
use serde::Serialize;

use super::Roots;
use crate::client::CliError;
use crate::output;

/// How often is looked how far it has come.
const LOOK: Duration = Duration::from_millis(100);
/// How long beyond its deadline a root may stay before the command gives up watching.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub(crate) struct DistrustArgs {
    /// The beginning of its fingerprint, at least 8 digits.
    root: String,
    /// Why: recorded with the act.
    #[arg(long)]
    reason: String,
    /// It leaves the bundles within so long, whoever still needs it; without it, as the configuration says (30 s).
    #[arg(long)]
    deadline: Option<humantime::Duration>,
    /// It leaves the bundles now, at the price of every handshake until the new certificates are there.
    #[arg(long, conflicts_with = "deadline")]
    now: bool,
}

/// How long each phase took.
#[derive(Debug, Serialize)]
struct Finished {
    root: String,
    /// Until another root was active, and the CA's own certificates under it.
    replaced_ms: u128,
    /// From then until it was out of the bundles.
    left_ms: u128,
    total_ms: u128,
    /// The entry of the act that took it out.
    entry: u64,
}

pub(super) async fn run(mut ca: Roots, args: DistrustArgs, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let deadline = if args.now { Some(Duration::ZERO) } else { args.deadline.map(Duration::from) };
    let deadline_ms = deadline.map(|deadline| u32::try_from(deadline.as_millis()).unwrap_or(u32::MAX));
    let begun = Instant::now();
    let moved = ca.distrust_root(DistrustRootRequest { root: args.root, reason: args.reason, deadline_ms }).await?.into_inner();
    let replaced = begun.elapsed();
    let mut root = moved.root.ok_or_else(|| CliError::Failed("the CA did not say which root it is".into()))?;
    if root.state() != RootState::Distrusted {
        output::remark("another root is active; the old one leaves when nothing needs it any more, or at the deadline");
    }
    let left_by = Duration::from_millis(u64::try_from(root.leave_by_ms - root.since_ms).unwrap_or(0));
    while root.state() != RootState::Distrusted {
        if begun.elapsed() > left_by.saturating_add(PATIENCE) {
            return Err(CliError::Failed("it is still in the bundles; `chancery status` and the CA's log say why".into()));
        }
        tokio::time::sleep(LOOK).await;
        root = look(&mut ca, &root.fingerprint).await?;
    }
    let (left, total) = (begun.elapsed().saturating_sub(replaced), begun.elapsed());
    let finished = Finished {
        root: root.fingerprint,
        replaced_ms: replaced.as_millis(),
        left_ms: left.as_millis(),
        total_ms: total.as_millis(),
        entry: root.entry,
    };
    Ok(fields(out, format, &finished)?)
}

async fn look(ca: &mut Roots, fingerprint: &str) -> Result<RootRecord, CliError> {
    let roots = ca.list_roots(ListRootsRequest {}).await?.into_inner().roots;
    roots
        .into_iter()
        .find(|root| root.fingerprint == fingerprint)
        .ok_or_else(|| CliError::Failed("the CA does not know it any more".into()))
}
