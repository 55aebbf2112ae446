//! `chancery log acts --follow`: acts as they are recorded, oldest first, until somebody has seen enough.
//!
//! There are few acts, and so the CA is asked now and then whether there is another one.

use std::io::Write;
use std::time::Duration;

use chancery_process::output::{Format, Json, Listing};
use chancery_process::shutdown;
use chancery_proto::chancery::v1::{ActFilter, ActRecord, ListActsRequest};

use super::acts::{ActRow, columns};
use crate::client::{CliError, Log};

/// Between two questions.
const PAUSE: Duration = Duration::from_secs(1);
/// The most that one answer of the CA holds.
const PAGE: u32 = 1000;

/// Acts that are told as they come.
struct Follower {
    ca: Log,
    filter: ActFilter,
    /// What matched before this entry was told.
    next: u64,
}

/// Prints the acts that match `filter`: from the entry `from` on; without it, since the time that `filter` says; without that, from now on.
pub(super) async fn run(ca: Log, filter: ActFilter, from: Option<u64>, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let interrupted = shutdown::on_signal().map_err(|error| CliError::Failed(format!("signals cannot be handled: {error}")))?;
    let mut follower = Follower { ca, filter, next: from.unwrap_or_default() };
    if from.is_none() && follower.filter.since_ms == 0 {
        follower.next = follower.newest().await?.map_or(0, |newest| newest.entry + 1);
    }
    let mut listing = Listing::begin(out, format, Json::Lines, columns(format))?;
    loop {
        let next = follower.next;
        let found = tokio::select! {
            found = follower.recorded() => found,
            () = interrupted.cancelled() => return Ok(listing.finish()?),
        };
        let found = found.map_err(|error| match error {
            CliError::Refused(status) => {
                let reason = status.message();
                CliError::Failed(format!("no answer from the CA: {reason}; go on with `--from-entry {next}` beside the same conditions"))
            }
            error => error,
        })?;
        listing.add(&found.into_iter().map(ActRow::of).collect::<Vec<_>>())?;
        tokio::select! {
            () = tokio::time::sleep(PAUSE) => {}
            () = interrupted.cancelled() => return Ok(listing.finish()?),
        }
    }
}

impl Follower {
    /// What has been recorded since the last time, oldest first.
    async fn recorded(&mut self) -> Result<Vec<ActRecord>, CliError> {
        let Some(newest) = self.newest().await?.filter(|newest| newest.entry >= self.next) else { return Ok(Vec::new()) };
        let (mut found, mut page_token) = (Vec::new(), String::new());
        loop {
            let request = ListActsRequest { filter: Some(self.filter.clone()), page_size: PAGE, page_token };
            let page = self.ca.list_acts(request).await?.into_inner();
            let is_told = page.acts.iter().any(|act| act.entry < self.next);
            found.extend(page.acts.into_iter().filter(|act| act.entry >= self.next));
            page_token = page.next_page_token;
            if is_told || page_token.is_empty() {
                break;
            }
        }
        found.reverse();
        self.next = found.last().map_or(0, |last| last.entry).max(newest.entry) + 1;
        // Times never decrease, so nothing before is gone through again.
        self.filter.since_ms = self.filter.since_ms.max(newest.time_ms);
        Ok(found)
    }

    async fn newest(&mut self) -> Result<Option<ActRecord>, CliError> {
        let request = ListActsRequest { page_size: 1, ..ListActsRequest::default() };
        Ok(self.ca.list_acts(request).await?.into_inner().acts.pop())
    }
}
