//! `chancery identity list`: identities of the past, newest first.

use std::io::Write;

use chancery_process::output::Format;
use chancery_proto::chancery::v1::{IdentityFilter, ListIdentitiesRequest};
use clap::Args;

use super::filter::{FilterArgs, moment_or_ago};
use super::row::{IdentityRow, columns};
use crate::client::{CliError, Operator};
use crate::pages::PageArgs;

pub(super) const EXAMPLES: &str = "\
Examples:
  chancery identity list --pod shop/cart-0                      what this pod was issued
  chancery identity list --node node-7 --unexpired              what is alive on a node
  chancery identity list --prefix spiffe://example.org/ns/shop/ --since 2h
  chancery identity list --root 3f9a4c21 --until 2026-11-01T00:00:00Z --all -o csv";

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    pages: PageArgs,
    #[command(flatten)]
    filter: FilterArgs,
    /// Issued before this time, or longer ago than this.
    #[arg(long, value_parser = moment_or_ago, value_name = "TIME", help_heading = "Conditions")]
    until: Option<i64>,
    /// Only those that an operator revoked, until they would have expired.
    #[arg(long, help_heading = "Conditions")]
    revoked: bool,
}

pub(super) async fn run(mut ca: Operator, args: ListArgs, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let filter = IdentityFilter { until_ms: args.until.unwrap_or_default(), revoked: args.revoked, ..args.filter.read()? };
    let fetch = async |page_size, page_token| {
        let request = ListIdentitiesRequest { filter: Some(filter.clone()), page_size, page_token };
        let page = ca.list_identities(request).await?.into_inner();
        Ok((page.identities.iter().map(IdentityRow::of).collect(), page.next_page_token))
    };
    args.pages.print(out, format, columns(format), fetch).await
}
