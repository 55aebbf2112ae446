//! `chancery log acts`: what operators did and were refused.

use std::io::Write;

use chancery_process::output::Format;
use chancery_proto::chancery::v1::{ActFilter, ActRecord, ListActsRequest, RootTransition, act::Change};
use clap::Args;
use serde::Serialize;

use super::follow;
use crate::client::{CliError, Log};
use crate::identity::moment_or_ago;
use crate::output::moment;
use crate::pages::PageArgs;

const COLUMNS: [&str; 10] = ["time", "actor", "action", "target", "outcome", "why", "overrides", "count", "entry", "epoch"];

#[derive(Debug, Args)]
pub(crate) struct ActsArgs {
    /// Who: a SPIFFE ID, or `local:uid=N`.
    #[arg(long)]
    actor: Option<String>,
    /// What: `agent.ban`, or all of a kind: `agent`.
    #[arg(long)]
    action: Option<String>,
    /// About what, as the acts name it: an agent's SPIFFE ID, `pod UID`, a root's fingerprint; refused acts name what was asked for.
    #[arg(long)]
    target: Option<String>,
    /// Recorded at or after this time, or within this long (`2026-11-01T12:00:00Z`, `1h`).
    #[arg(long, value_parser = moment_or_ago, value_name = "TIME")]
    since: Option<i64>,
    /// Recorded before this time, or longer ago than this.
    #[arg(long, value_parser = moment_or_ago, value_name = "TIME")]
    until: Option<i64>,
    /// Go on with what is recorded from now on, or `--since` then, oldest first; with `--output json`, each line is an object. Ends with Ctrl-C.
    #[arg(long, conflicts_with_all = ["until", "limit", "all"])]
    follow: bool,
    /// From this entry of the ledger on.
    #[arg(long, value_name = "ENTRY", requires = "follow", conflicts_with = "since")]
    from_entry: Option<u64>,
    #[command(flatten)]
    pages: PageArgs,
}

/// An act, as it is printed.
#[derive(Debug, Default, Serialize)]
pub(super) struct ActRow {
    time: String,
    actor: String,
    action: String,
    target: String,
    /// `done`, or what the person was told.
    outcome: String,
    why: String,
    /// What of a gate did not count, as the options of `chancery root` are called; empty if all of it did.
    overrides: String,
    /// How often, for what was refused.
    count: u64,
    entry: u64,
    epoch: u64,
}

pub(super) async fn list(mut ca: Log, args: ActsArgs, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let filter = ActFilter {
        actor: args.actor.unwrap_or_default(),
        action: args.action.unwrap_or_default(),
        since_ms: args.since.unwrap_or_default(),
        until_ms: args.until.unwrap_or_default(),
        target: args.target.unwrap_or_default(),
    };
    if args.follow {
        return follow::run(ca, filter, args.from_entry, out, format).await;
    }
    let fetch = async |page_size, page_token| {
        let request = ListActsRequest { filter: Some(filter.clone()), page_size, page_token };
        let page = ca.list_acts(request).await?.into_inner();
        Ok((page.acts.into_iter().map(ActRow::of).collect(), page.next_page_token))
    };
    args.pages.print(out, format, columns(format), fetch).await
}

/// The columns of a list.
pub(super) fn columns(format: Format) -> &'static [&'static str] {
    if format == Format::Table { &COLUMNS[..6] } else { &COLUMNS }
}

impl ActRow {
    pub(super) fn of(record: ActRecord) -> Self {
        let act = record.act.unwrap_or_default();
        let overrides = if let Some(Change::Root(moved)) = &act.change { overrides(moved) } else { String::new() };
        let (outcome, count) = match act.change {
            Some(Change::Refused(refused)) => (format!("refused: {}", refused.message), refused.count),
            _ => (act.outcome, 1),
        };
        Self {
            time: moment(record.time_ms),
            actor: act.actor,
            action: act.action,
            target: act.target,
            outcome,
            why: act.why,
            overrides,
            count,
            entry: record.entry,
            epoch: act.epoch,
        }
    }
}

fn overrides(moved: &RootTransition) -> String {
    let excepted = moved.except.iter().map(|name| format!("--except {name}"));
    let others = [(moved.accept_unproven, "--accept-unproven"), (moved.confirm_clock, "--confirm-clock"), (moved.force, "--force")];
    let others = others.into_iter().filter(|(given, _)| *given).map(|(_, option)| option.to_owned());
    excepted.chain(others).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_did_not_count_of_a_gate_is_shown() {
        let except = vec!["shop/cart-0".to_owned(), "node-7".into()];
        let moved = RootTransition { except, force: true, accept_unproven: true, confirm_clock: true, ..RootTransition::default() };
        assert_eq!(overrides(&moved), "--except shop/cart-0 --except node-7 --accept-unproven --confirm-clock --force");
        assert_eq!(overrides(&RootTransition::default()), "");
    }

    #[test]
    fn every_column_of_the_csv_is_a_field() {
        let row = serde_json::to_value(ActRow::default()).unwrap();
        let mut fields: Vec<&str> = row.as_object().unwrap().keys().map(String::as_str).collect();
        let mut columns = COLUMNS;
        fields.sort_unstable();
        columns.sort_unstable();
        assert_eq!(fields, columns);
    }
}
