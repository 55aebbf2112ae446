//! `chancery identity watch`: identities as they are recorded, oldest first, until somebody has seen enough.

use std::io::Write;

use chancery_process::output::{Format, Json, Listing};
use chancery_process::shutdown;
use chancery_proto::chancery::v1::WatchIdentitiesRequest;
use clap::Args;

use super::filter::FilterArgs;
use super::row::{IdentityRow, columns};
use crate::client::{CliError, Operator};

pub(super) const EXAMPLES: &str = "\
With `--output json`, each line is an object. Ends with Ctrl-C, and when the CA ends; the error says where to go on.

Examples:
  chancery identity watch                                       from now on
  chancery identity watch --namespace shop --since 2h           what was issued since, too
  chancery identity watch -o json | jq -r .spiffe_id
  chancery identity watch --from-entry 20417 -o csv             where a watch before it ended";

#[derive(Debug, Args)]
pub(crate) struct WatchArgs {
    #[command(flatten)]
    filter: FilterArgs,
    /// From this entry of the ledger on.
    #[arg(long, value_name = "ENTRY", conflicts_with = "since")]
    from_entry: Option<u64>,
}

pub(super) async fn run(mut ca: Operator, args: WatchArgs, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let interrupted = shutdown::on_signal().map_err(|error| CliError::Failed(format!("signals cannot be handled: {error}")))?;
    let request = WatchIdentitiesRequest { filter: Some(args.filter.read()?), from_entry: args.from_entry };
    let mut answers = ca.watch_identities(request).await?.into_inner();
    let mut listing = Listing::begin(out, format, Json::Lines, columns(format))?;
    let mut next = None;
    loop {
        let answer = tokio::select! {
            answer = answers.message() => answer,
            () = interrupted.cancelled() => return Ok(listing.finish()?),
        };
        let reason = match answer {
            Ok(Some(answer)) => {
                listing.add(&answer.identities.iter().map(IdentityRow::of).collect::<Vec<_>>())?;
                next = Some(answer.next_entry);
                continue;
            }
            Ok(None) => "the CA ended the watch".to_owned(),
            Err(status) => status.message().to_owned(),
        };
        return Err(CliError::Failed(match next {
            Some(next) => format!("{reason}; go on with `--from-entry {next}` beside the same conditions"),
            None => reason,
        }));
    }
}
