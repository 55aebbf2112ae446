//! `chancery log export`: entries in a file, from the first to the newest checkpoint, in one go or in many.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use chancery_identity::checkpoint::{Checkpoint, leaf_hash, unverified};
use chancery_process::output::{Format, OutputError, fields};
use chancery_proto::chancery::v1::{GetCheckpointRequest, IdentityFilter, ReadEntriesRequest, StoredEntry};
use clap::Args;
use serde::Serialize;

use super::checkpoint::open;
use super::line::{CheckpointLine, EntryLine, ReadLine, header};
use super::prove;
use super::verify::progress;
use crate::client::{CliError, Log};
use crate::identity::{FilterArgs, moment_or_ago};

/// No line is as long as this.
const TAIL_BYTES: u64 = 1 << 20;

#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// Where to write to, instead of standard output. The file is new, and for its owner alone.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Go on where FILE ends, which may have been cut off. Give the same format and filter as before.
    #[arg(long, requires = "file")]
    resume: bool,
    /// Only what was issued before this time, or longer ago than this.
    #[arg(long, value_parser = moment_or_ago, value_name = "TIME", help_heading = "Conditions")]
    until: Option<i64>,
    /// Only what an operator revoked, until it would have expired.
    #[arg(long, help_heading = "Conditions")]
    revoked: bool,
    #[command(flatten)]
    filter: FilterArgs,
}

#[derive(Serialize)]
struct Exported {
    file: String,
    first: u64,
    entries: u64,
    checkpoint_entries: u64,
}

/// How an export ends.
enum End {
    Entry {
        entry: u64,
        /// Only in JSON.
        leaf_hash: Option<String>,
    },
    /// All entries of it that were to be written stand before it.
    Checkpoint(Checkpoint),
}

pub(super) async fn run(log: Log, args: ExportArgs, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let filter = IdentityFilter { until_ms: args.until.unwrap_or_default(), revoked: args.revoked, ..args.filter.read()? };
    let filter = (filter != IdentityFilter::default()).then_some(filter);
    let is_csv = format == Format::Csv;
    let Some(path) = &args.file else {
        return Export::new(log, filter, is_csv).write(out, false).await.map(drop);
    };
    let failed = |error: io::Error| CliError::Failed(format!("{}: {error}", path.display()));
    let (mut file, end) = if args.resume { resumed(path, is_csv)? } else { (created(path)?, None) };
    let is_begun = file.stream_position().map_err(failed)? > 0;
    let mut export = Export::new(log, filter, is_csv);
    if let Some(end) = end {
        export.go_on(end, path).await?;
    }
    let first = export.first;
    let mut writer = BufWriter::with_capacity(1 << 20, file);
    let (entries, size) = export.write(&mut writer, is_begun).await?;
    writer.into_inner().map_err(io::IntoInnerError::into_error).and_then(|file| file.sync_all()).map_err(failed)?;
    let exported = Exported { file: path.display().to_string(), first, entries, checkpoint_entries: size };
    Ok(fields(out, if is_csv { Format::Table } else { format }, &exported)?)
}

struct Export {
    log: Log,
    filter: Option<IdentityFilter>,
    is_csv: bool,
    first: u64,
    /// How many entries the checkpoint has that the file ends with.
    signed: Option<u64>,
}

impl Export {
    /// Of everything.
    fn new(log: Log, filter: Option<IdentityFilter>, is_csv: bool) -> Self {
        Self { log, filter, is_csv, first: 0, signed: None }
    }

    /// Goes on behind `end`. Another ledger's entries would be appended unnoticed if that were not looked at.
    async fn go_on(&mut self, end: End, path: &Path) -> Result<(), CliError> {
        let or = "it is another ledger, or one of the two was changed";
        match end {
            End::Entry { entry, leaf_hash: known } => {
                if known.is_some() && self.leaf_hash(entry).await? != known {
                    return Err(CliError::Failed(format!("the ledger's entry {entry} is not the one in {}: {or}", path.display())));
                }
                self.first = entry + 1;
            }
            End::Checkpoint(checkpoint) => {
                let newest = self.log.get_checkpoint(GetCheckpointRequest {}).await?.into_inner();
                match prove::continued(&mut self.log, &checkpoint, newest, &[]).await {
                    Err(CliError::Inconsistent { problem, .. }) => {
                        let problem =
                            format!("the ledger does not continue the checkpoint that {} ends with: {or}: {problem}", path.display());
                        return Err(CliError::Failed(problem));
                    }
                    newer => drop(newer?),
                }
                (self.first, self.signed) = (checkpoint.size, Some(checkpoint.size));
            }
        }
        Ok(())
    }

    /// Writes what there is up to the newest checkpoint; tells how many entries that were, and how many the checkpoint has.
    async fn write(mut self, out: &mut impl Write, is_begun: bool) -> Result<(u64, u64), CliError> {
        let newest = self.log.get_checkpoint(GetCheckpointRequest {}).await?.into_inner();
        let size = open(&newest.note, &newest.verifier_keys)?.size;
        let write = OutputError::Write;
        if self.is_csv && !is_begun {
            csv_line(out, header()).map_err(write)?;
        }
        let written = if self.first < size { self.write_entries(out, size).await? } else { 0 };
        // Whoever ended the export before may have done so just before its checkpoint.
        if !self.is_csv && self.signed != Some(size) {
            let line = CheckpointLine { checkpoint: &newest.note, verifier_keys: &newest.verifier_keys };
            json_line(out, &line).map_err(write)?;
        }
        out.flush().map_err(write)?;
        Ok((written, size))
    }

    /// Writes the entries below `end`; tells how many.
    async fn write_entries(&mut self, out: &mut impl Write, end: u64) -> Result<u64, CliError> {
        let mut written = 0;
        let bar = progress(end - self.first, "entries");
        let request = ReadEntriesRequest { first: self.first, end, filter: self.filter.clone() };
        let mut messages = self.log.read_entries(request).await?.into_inner();
        while let Some(message) = messages.message().await? {
            for StoredEntry { index, bytes } in message.entries {
                let line = EntryLine::of(index, &bytes);
                if self.is_csv { csv_line(out, line.cells()) } else { json_line(out, &line) }.map_err(OutputError::Write)?;
                written += 1;
            }
            bar.set_position(message.next - self.first);
        }
        bar.finish_and_clear();
        Ok(written)
    }

    /// Of the ledger's entry, hexadecimal; nothing if there is none.
    async fn leaf_hash(&mut self, entry: u64) -> Result<Option<String>, CliError> {
        let request = ReadEntriesRequest { first: entry, end: entry + 1, filter: None };
        let mut found = self.log.read_entries(request).await?.into_inner();
        let entry = found.message().await?.and_then(|message| message.entries.into_iter().next());
        Ok(entry.map(|entry| hex::encode(leaf_hash(&entry.bytes))))
    }
}

fn created(path: &Path) -> Result<File, CliError> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(|error| {
        let hint = if error.kind() == ErrorKind::AlreadyExists { "; go on with it by --resume, or name another file" } else { "" };
        CliError::Failed(format!("{}: {error}{hint}", path.display()))
    })
}

/// The file, cut behind its last whole line and to be written from there, and how it ends.
fn resumed(path: &Path, is_csv: bool) -> Result<(File, Option<End>), CliError> {
    let failed = |error: io::Error| CliError::Failed(format!("{}: {error}", path.display()));
    if !path.exists() {
        return Ok((created(path)?, None));
    }
    let mut file = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    let start = length.saturating_sub(TAIL_BYTES);
    let mut tail = Vec::new();
    file.seek(SeekFrom::Start(start)).and_then(|_| file.read_to_end(&mut tail)).map_err(failed)?;
    tail.truncate(tail.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1));
    let is_empty = start == 0 && tail.is_empty();
    let last = tail.strip_suffix(b"\n").unwrap_or_default().rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
    let end = end_of(last, is_csv);
    let columns = columns().map_err(failed)?;
    if is_csv && !is_empty && !begins_with(&file, &columns).map_err(failed)? {
        let problem = format!("{} is no export in CSV with the columns of this version; begin another file", path.display());
        return Err(CliError::Failed(problem));
    }
    if end.is_none() && !is_empty && !(is_csv && tail == columns) {
        let format = if is_csv { "CSV (--output csv)" } else { "JSON Lines" };
        return Err(CliError::Failed(format!("{} does not end like an export in {format}", path.display())));
    }
    let length = start + tail.len() as u64;
    file.set_len(length).and_then(|()| file.seek(SeekFrom::Start(length))).map_err(failed)?;
    Ok((file, end))
}

/// The header of a CSV.
fn columns() -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    csv_line(&mut line, header())?;
    Ok(line)
}

fn begins_with(file: &File, beginning: &[u8]) -> io::Result<bool> {
    let mut found = vec![0; beginning.len()];
    match file.read_exact_at(&mut found, 0) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
        read => read.map(|()| found == beginning),
    }
}

/// How an export with this last line ends; nothing if it is no entry and no checkpoint.
fn end_of(line: &[u8], is_csv: bool) -> Option<End> {
    if is_csv {
        let number = line.split(|byte| *byte == b',').next()?;
        return Some(End::Entry { entry: std::str::from_utf8(number).ok()?.parse().ok()?, leaf_hash: None });
    }
    let line: ReadLine<'_> = serde_json::from_slice(line).ok()?;
    match (line.entry, line.checkpoint) {
        (Some(entry), None) => Some(End::Entry { entry, leaf_hash: Some(line.leaf_hash?.to_owned()) }),
        (None, Some(note)) => unverified(&note).ok().map(End::Checkpoint),
        _ => None,
    }
}

fn json_line(out: &mut impl Write, line: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *out, line)?;
    out.write_all(b"\n")
}

fn csv_line<T: AsRef<[u8]>>(out: &mut impl Write, cells: Vec<T>) -> io::Result<()> {
    let mut writer = csv::Writer::from_writer(out);
    writer.write_record(cells)?;
    writer.flush()
}
