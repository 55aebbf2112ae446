//! `chancery log verify --since FILE`: for an auditor's cron job, whether the ledger still begins with what it was.

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use chancery_process::files;
use chancery_process::output::{Format, fields};
use chancery_proto::chancery::v1::GetCheckpointRequest;
use serde::Serialize;

use super::checkpoint::{believed, open, read_note};
use super::prove;
use crate::client::{CliError, Log};

/// What is compared with the running CA's ledger.
pub(crate) struct Since<'a> {
    /// Where the checkpoint is that was kept.
    pub(crate) file: &'a Path,
    /// Whether the newer one is kept instead.
    pub(crate) save: bool,
    /// The keys to believe; the CA's own if none.
    pub(crate) keys: &'a [String],
}

#[derive(Serialize)]
struct Verified {
    verdict: &'static str,
    since_entries: u64,
    entries: u64,
    saved: bool,
}

pub(super) async fn run(mut log: Log, since: Since<'_>, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let kept = match std::fs::metadata(since.file) {
        Err(error) if error.kind() == ErrorKind::NotFound && since.save => return first(log, &since, out, format).await,
        _ => read_note(since.file)?,
    };
    let (old, newer) = match prove::since(&mut log, &kept, since.keys).await {
        Err(CliError::Inconsistent { problem, note }) => return Err(alarm(&since, &problem, &note)),
        result => result?,
    };
    if since.save && newer.note != kept {
        save(since.file, &newer.note)?;
    }
    let verified = Verified {
        verdict: "the ledger begins with the checkpoint that was kept",
        since_entries: old.size,
        entries: newer.checkpoint.size,
        saved: since.save,
    };
    Ok(fields(out, format, &verified)?)
}

/// There is nothing to compare with yet.
async fn first(mut log: Log, since: &Since<'_>, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let newest = log.get_checkpoint(GetCheckpointRequest {}).await?.into_inner();
    let checkpoint = open(&newest.note, believed(since.keys, &newest.verifier_keys))?;
    save(since.file, &newest.note)?;
    let verdict = "there was no checkpoint to compare with; the newest is kept from now on";
    let entries = checkpoint.size;
    Ok(fields(out, format, &Verified { verdict, since_entries: entries, entries, saved: true })?)
}

/// Both notes are evidence: the kept one stays, the other lies beside it.
fn alarm(since: &Since<'_>, problem: &str, note: &str) -> CliError {
    let mut beside = since.file.as_os_str().to_owned();
    beside.push(".conflict");
    let beside = PathBuf::from(beside);
    let kept = match save(&beside, note) {
        Ok(()) => format!("the CA's checkpoint is in {}", beside.display()),
        Err(error) => format!("the CA's checkpoint could not be kept ({error}):\n{note}"),
    };
    CliError::Failed(format!(
        "ALARM: the ledger was rolled back or rewritten: {problem}. Keep {} as it is; {kept}. Together they prove it.",
        since.file.display()
    ))
}

fn save(path: &Path, note: &str) -> Result<(), CliError> {
    files::write_private(path, note.as_bytes()).map_err(|error| CliError::Failed(error.to_string()))
}
