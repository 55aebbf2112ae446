//! Lists that come from the CA in pages: how many lines are wanted, and printing them page by page.

use std::io::Write;

use chancery_process::output::{Format, Json, Listing};
use clap::Args;
use serde::Serialize;

use crate::client::CliError;
use crate::output;

/// The most that one answer of the CA holds.
const PAGE: u64 = 1000;

#[derive(Debug, Args)]
pub(crate) struct PageArgs {
    /// How many at most.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    limit: u64,
    /// However many there are.
    #[arg(long, conflicts_with = "limit")]
    all: bool,
}

impl PageArgs {
    /// Prints what `fetch`, given a page's size and the token that the page before came with, answers: rows, and the next token, empty on
    /// the last page.
    pub(crate) async fn print<T: Serialize>(
        self,
        out: &mut impl Write,
        format: Format,
        columns: &[&str],
        mut fetch: impl AsyncFnMut(u32, String) -> Result<(Vec<T>, String), CliError>,
    ) -> Result<(), CliError> {
        let mut left = if self.all { u64::MAX } else { self.limit };
        let mut listing = Listing::begin(out, format, Json::Array, columns)?;
        let mut page_token = String::new();
        loop {
            let page_size = u32::try_from(left.min(PAGE)).unwrap_or_default();
            let (rows, next) = fetch(page_size, page_token).await?;
            listing.add(&rows)?;
            left = left.saturating_sub(rows.len() as u64);
            page_token = next;
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
}
