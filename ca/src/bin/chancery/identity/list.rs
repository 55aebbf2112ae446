//! `chancery identity list`: identities of the past, newest first.

use std::io::Write;

use chancery_process::output::{Format, Json, Listing};
use chancery_proto::chancery::v1::{IdentityFilter, ListIdentitiesRequest};
use clap::Args;

use super::filter::{FilterArgs, moment_or_ago};
use super::row::{IdentityRow, columns};
use crate::client::{CliError, Operator};
use crate::output;

/// The most that one answer of the CA holds.
const PAGE: u64 = 1000;

pub(super) const EXAMPLES: &str = "\
Examples:
  chancery identity list --pod shop/cart-0                      what this pod was issued
  chancery identity list --node node-7 --unexpired              what is alive on a node
  chancery identity list --prefix spiffe://example.org/ns/shop/ --since 2h
  chancery identity list --root 3f9a4c21 --until 2026-11-01T00:00:00Z --all -o csv";

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    filter: FilterArgs,
    /// Issued before this time, or longer ago than this.
    #[arg(long, value_parser = moment_or_ago, value_name = "TIME", help_heading = "Conditions")]
    until: Option<i64>,
    /// Only those that an operator revoked, until they would have expired.
    #[arg(long, help_heading = "Conditions")]
    revoked: bool,
    /// How many at most.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    limit: u64,
    /// However many there are.
    #[arg(long, conflicts_with = "limit")]
    all: bool,
}

pub(super) async fn run(mut ca: Operator, args: ListArgs, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let mut left = if args.all { u64::MAX } else { args.limit };
    let filter = IdentityFilter { until_ms: args.until.unwrap_or_default(), revoked: args.revoked, ..args.filter.read()? };
    let mut listing = Listing::begin(out, format, Json::Array, columns(format))?;
    let mut page_token = String::new();
    loop {
        let page_size = u32::try_from(left.min(PAGE)).unwrap_or_default();
        let request = ListIdentitiesRequest { filter: Some(filter.clone()), page_size, page_token };
        let page = ca.list_identities(request).await?.into_inner();
        let rows: Vec<_> = page.identities.iter().map(IdentityRow::of).collect();
        listing.add(&rows)?;
        left = left.saturating_sub(rows.len() as u64);
        page_token = page.next_page_token;
        if page_token.is_empty() || left == 0 {
            break;
        }
    }
    listing.finish()?;
    if !page_token.is_empty() && format == Format::Table {
        output::remark("more follow: name a --limit, or --all");
    }
    Ok(())
}
