//! `chancery identity allow`: has issuance go on for what was revoked.

use std::io::Write;

use chancery_process::output::{Format, fields};
use chancery_proto::chancery::v1::AllowRequest;
use clap::Args;
use serde::Serialize;

use super::revoke::SubjectArgs;
use crate::client::{CliError, Way};
use crate::revocation;

#[derive(Debug, Args)]
pub(crate) struct AllowArgs {
    #[command(flatten)]
    subject: SubjectArgs,
    /// Why: recorded with the act.
    #[arg(long)]
    reason: String,
}

/// The answer to an act.
#[derive(Debug, Serialize)]
struct Allowed {
    subject: String,
    /// The act's entry in the ledger.
    entry: u64,
}

pub(super) async fn run(way: &Way, args: AllowArgs, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let request = AllowRequest { subject: Some(args.subject.into_wire()), reason: args.reason };
    let done = revocation::connect(way).await?.allow(request).await?.into_inner();
    Ok(fields(out, format, &Allowed { subject: done.subject, entry: done.entry })?)
}
