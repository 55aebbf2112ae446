//! `chancery log export`: entries in a file, from the first to the newest checkpoint, in one go or in many.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use chancery_identity::checkpoint::leaf_hash;
use chancery_process::output::{Format, OutputError, fields};
use chancery_proto::chancery::v1::{GetCheckpointRequest, IdentityFilter, ReadEntriesRequest, StoredEntry};
use clap::Args;
use serde::Serialize;

use super::checkpoint::open;
use super::line::{CheckpointLine, EntryLine, ReadLine, header};
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
    /// Go on behind the last entry in FILE; its end may have been cut off. Give the same format and filter as before.
    #[arg(long, requires = "file")]
    resume: bool,
    /// Only what was issued before this time, or longer ago than this.
    #[arg(long, value_parser = moment_or_ago, value_name = "TIME", help_heading = "Conditions")]
    until: Option<i64>,
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

/// The last entry of an export.
struct Last {
    entry: u64,
    /// Only in JSON.
    leaf_hash: Option<String>,
}

pub(super) async fn run(log: Log, args: ExportArgs, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let filter = IdentityFilter { until_ms: args.until.unwrap_or_default(), ..args.filter.read()? };
    let filter = (filter != IdentityFilter::default()).then_some(filter);
    let is_csv = format == Format::Csv;
    let Some(path) = &args.file else {
        return Export { log, filter, is_csv, first: 0 }.write(out, false).await.map(drop);
    };
    let failed = |error: io::Error| CliError::Failed(format!("{}: {error}", path.display()));
    let (mut file, last) = if args.resume { resumed(path, is_csv)? } else { (created(path)?, None) };
    let is_begun = file.stream_position().map_err(failed)? > 0;
    let mut export = Export { log, filter, is_csv, first: 0 };
    if let Some(last) = last {
        export.check_continues(&last, path).await?;
        export.first = last.entry + 1;
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
}

impl Export {
    /// Writes what there is up to the newest checkpoint; tells how many entries that were, and how many the checkpoint has.
    async fn write(mut self, out: &mut impl Write, is_begun: bool) -> Result<(u64, u64), CliError> {
        let newest = self.log.get_checkpoint(GetCheckpointRequest {}).await?.into_inner();
        let size = open(&newest.note, &newest.verifier_keys)?.size;
        let (mut written, write) = (0, OutputError::Write);
        if self.is_csv && !is_begun {
            csv_line(out, header()).map_err(write)?;
        }
        if self.first >= size {
            return Ok((0, size));
        }
        let bar = progress(size - self.first, "entries");
        let request = ReadEntriesRequest { first: self.first, end: size, filter: self.filter.clone() };
        let mut messages = self.log.read_entries(request).await?.into_inner();
        while let Some(message) = messages.message().await? {
            for StoredEntry { index, bytes } in message.entries {
                let line = EntryLine::of(index, &bytes);
                if self.is_csv { csv_line(out, line.cells()) } else { json_line(out, &line) }.map_err(write)?;
                written += 1;
            }
            bar.set_position(message.next - self.first);
        }
        if !self.is_csv {
            let line = CheckpointLine { checkpoint: &newest.note, verifier_keys: &newest.verifier_keys };
            json_line(out, &line).map_err(write)?;
        }
        out.flush().map_err(write)?;
        bar.finish_and_clear();
        Ok((written, size))
    }

    /// Another ledger's entries would be appended unnoticed otherwise.
    async fn check_continues(&mut self, last: &Last, path: &Path) -> Result<(), CliError> {
        let Some(known) = &last.leaf_hash else { return Ok(()) };
        let request = ReadEntriesRequest { first: last.entry, end: last.entry + 1, filter: None };
        let mut found = self.log.read_entries(request).await?.into_inner();
        let bytes = found.message().await?.and_then(|message| message.entries.into_iter().next()).map(|entry| entry.bytes);
        if bytes.is_some_and(|bytes| hex::encode(leaf_hash(&bytes)) == *known) {
            return Ok(());
        }
        let problem = format!(
            "the ledger's entry {} is not the one in {}: it is another ledger, or one of the two was changed",
            last.entry,
            path.display()
        );
        Err(CliError::Failed(problem))
    }
}

fn created(path: &Path) -> Result<File, CliError> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(|error| {
        let hint = if error.kind() == ErrorKind::AlreadyExists { "; go on with it by --resume, or name another file" } else { "" };
        CliError::Failed(format!("{}: {error}{hint}", path.display()))
    })
}

/// The file, cut behind its last whole line and to be written from there, and its last entry.
fn resumed(path: &Path, is_csv: bool) -> Result<(File, Option<Last>), CliError> {
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
    let last = tail.split(|byte| *byte == b'\n').rev().find_map(|line| last_of(line, is_csv));
    if last.is_none() && (start > 0 || !is_beginning(&tail, is_csv)) {
        let format = if is_csv { "CSV (--output csv)" } else { "JSON Lines" };
        return Err(CliError::Failed(format!("{} does not end like an export in {format}", path.display())));
    }
    let end = start + tail.len() as u64;
    file.set_len(end).and_then(|()| file.seek(SeekFrom::Start(end))).map_err(failed)?;
    Ok((file, last))
}

fn last_of(line: &[u8], is_csv: bool) -> Option<Last> {
    if is_csv {
        let number = line.split(|byte| *byte == b',').next()?;
        return Some(Last { entry: std::str::from_utf8(number).ok()?.parse().ok()?, leaf_hash: None });
    }
    let line: ReadLine<'_> = serde_json::from_slice(line).ok()?;
    Some(Last { entry: line.entry?, leaf_hash: line.leaf_hash.map(str::to_owned) })
}

/// Whether nothing but a header, or a checkpoint, was written yet.
fn is_beginning(tail: &[u8], is_csv: bool) -> bool {
    let mut lines = tail.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    lines.all(|line| if is_csv { line.starts_with(b"entry,time,kind,") } else { serde_json::from_slice::<ReadLine<'_>>(line).is_ok() })
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
