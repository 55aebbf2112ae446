//! `chancery log verify`: the whole ledger, from an export, a backup or a data directory, without a CA.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use chancery_ca::backup::{self, BackupError};
use chancery_ca::store::StoreError;
use chancery_ca::store::embedded::audit::Audit;
use chancery_identity::checkpoint::{Checkpoint, unverified};
use chancery_process::output::{Format, fields};
use clap::{ArgGroup, Args};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::checkpoint::{open, read_note};
use super::examined::{Examined, Finding};
use super::line::ReadLine;
use super::since::Since;
use super::tiles::Tiles;
use super::words::Words;
use crate::client::CliError;

/// Progress is shown after so many bytes.
const STEP: u64 = 1 << 20;

/// Of a name in a tar file.
const TAR_NAME_BYTES: u64 = 100;

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("what").required(true).args(["file", "data_dir", "since"]))]
pub(crate) struct VerifyArgs {
    /// An export in JSON Lines, of all entries; or a backup.
    #[arg(value_name = "EXPORT|BACKUP.tar")]
    file: Option<PathBuf>,
    /// A CA's data directory, or a copy of one. Nothing in it is changed.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Whether the running CA's ledger begins with the checkpoint in this file.
    #[arg(long, value_name = "FILE")]
    since: Option<PathBuf>,
    /// If so, keep the CA's newer checkpoint in FILE instead, or the first one if there is none yet.
    #[arg(long, requires = "since")]
    save: bool,
    /// A checkpoint that the entries have to lead to; may be given several times.
    #[arg(long, value_name = "FILE", conflicts_with = "since")]
    checkpoint: Vec<PathBuf>,
    /// The ledger's verifier key, or several of them, as `chancery log key` prints them: one has to have signed each checkpoint. Without it the
    /// signatures of checkpoints are not checked.
    #[arg(long, value_name = "KEY")]
    verifier_key: Vec<String>,
    /// Check each certificate's signature, too.
    #[arg(long, conflicts_with = "since")]
    certificates: bool,
    /// Of an export, look at the entries' bytes alone, which is several times as fast: not at what it says of them in words.
    #[arg(long, requires = "file")]
    bytes_only: bool,
}

#[derive(Serialize)]
struct Verified {
    verdict: &'static str,
    entries: u64,
    root: String,
    /// How many entries each checkpoint has that the entries lead to.
    checkpoints: Vec<u64>,
    /// Those of the checkpoints: `verified` or `not checked`.
    signatures: &'static str,
    certificates: Option<u64>,
    notes: Vec<String>,
    seconds: f64,
    entries_per_second: f64,
}

impl VerifyArgs {
    /// What is to be asked of a running CA; nothing if this is about files.
    pub(super) fn since(&self) -> Option<Since<'_>> {
        Some(Since { file: self.since.as_deref()?, save: self.save, keys: &self.verifier_key })
    }

    fn open(&self, note: &str) -> Result<Checkpoint, String> {
        if self.verifier_key.is_empty() {
            return unverified(note).map_err(|error| error.to_string());
        }
        open(note, &self.verifier_key).map_err(|error| error.to_string())
    }
}

pub(super) fn run(args: &VerifyArgs, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let started = Instant::now();
    let mut examined = Examined::new(args.certificates);
    for path in &args.checkpoint {
        let checkpoint = args.open(&read_note(path)?).map_err(|problem| CliError::Failed(format!("{}: {problem}", path.display())))?;
        examined.expect(format!("the checkpoint in {}", path.display()), checkpoint);
    }
    let notes = match (&args.file, &args.data_dir) {
        (Some(file), _) if is_backup(file)? => read_backup(args, file, &mut examined)?,
        (Some(export), _) => read_export(args, export, &mut examined)?,
        (None, Some(directory)) => read_directory(args, directory, &mut examined)?,
        (None, None) => Vec::new(),
    };
    let seen = examined.finish()?;
    let seconds = started.elapsed().as_secs_f64();
    let is_signed = !args.verifier_key.is_empty() && !seen.fitted.is_empty();
    let verified = Verified {
        verdict: match (seen.fitted.is_empty(), is_signed || format != Format::Table) {
            (true, _) => "the entries fit each other; no checkpoint was given",
            (false, true) => "intact",
            (false, false) => "intact, but who signed the checkpoints was not checked: give --verifier-key",
        },
        entries: seen.entries,
        root: STANDARD.encode(seen.root),
        signatures: if is_signed { "verified" } else { "not checked" },
        checkpoints: seen.fitted,
        certificates: seen.certificates,
        notes,
        seconds,
        entries_per_second: rate(seen.entries, seconds),
    };
    Ok(fields(out, format, &verified)?)
}

/// Reads an export line by line.
fn read_export(args: &VerifyArgs, path: &Path, examined: &mut Examined) -> Result<Vec<String>, CliError> {
    let broken = |line: u64, problem: String| CliError::Failed(format!("{}, line {line}: {problem}", path.display()));
    let unread = |error: io::Error| CliError::Failed(format!("{}: {error}", path.display()));
    let file = File::open(path).map_err(unread)?;
    let bar = progress(file.metadata().map_err(unread)?.len(), "bytes");
    let mut lines = BufReader::with_capacity(1 << 20, file);
    let (mut line, mut number, mut read, mut shown) = (Vec::new(), 0, 0, 0);
    let (mut bytes, mut words) = (Vec::new(), Words::default());
    loop {
        line.clear();
        number += 1;
        match lines.read_until(b'\n', &mut line).map_err(unread)? {
            0 => break,
            length => read += length as u64,
        }
        if line.pop() != Some(b'\n') {
            return Err(broken(number, "the line is cut off; `chancery log export --resume` mends that".into()));
        }
        let parsed: ReadLine<'_> =
            serde_json::from_slice(&line).map_err(|error| broken(number, format!("no line of an export: {error}")))?;
        let looked_at = match (parsed.entry, parsed.bytes, parsed.checkpoint) {
            (Some(entry), Some(encoded), None) => {
                bytes.clear();
                let decoded = STANDARD.decode_vec(encoded, &mut bytes);
                decoded.map_err(|error| broken(number, format!("entry {entry}: its bytes are no base64: {error}")))?;
                let looked_at = examined.entry(entry, &bytes, parsed.leaf_hash);
                let untruth = if args.bytes_only { None } else { words.line(number, &line, entry, &bytes) };
                if let Some(untruth) = untruth {
                    examined.differs(untruth);
                }
                looked_at
            }
            (None, None, Some(note)) => match args.open(&note) {
                Ok(checkpoint) => examined.reached(format!("the checkpoint in line {number}"), checkpoint),
                Err(problem) => return Err(broken(number, problem)),
            },
            _ => return Err(broken(number, "neither an entry nor a checkpoint".into())),
        };
        looked_at.map_err(|finding| {
            let also = words.check().map(|untruth| format!("; {untruth}")).unwrap_or_default();
            let said = format!("{finding}{also}");
            if finding.is_earlier() { CliError::Failed(format!("{}: {said}", path.display())) } else { broken(number, said) }
        })?;
        if read >= shown + STEP {
            shown = read;
            bar.set_position(read);
        }
    }
    if let Some(untruth) = words.check() {
        examined.differs(untruth);
    }
    bar.finish_and_clear();
    let unread = "what the export says of its entries in words was not looked at";
    Ok(if args.bytes_only { vec![unread.to_owned()] } else { Vec::new() })
}

/// An export is text, and a tar file has zeros behind the name of its first member.
fn is_backup(path: &Path) -> Result<bool, CliError> {
    let mut beginning = Vec::new();
    let read = File::open(path).and_then(|file| file.take(TAR_NAME_BYTES).read_to_end(&mut beginning));
    read.map_err(|error| CliError::Failed(format!("{}: {error}", path.display())))?;
    Ok(beginning.contains(&0))
}

/// Reads a backup, which is not unpacked.
fn read_backup(args: &VerifyArgs, path: &Path, examined: &mut Examined) -> Result<Vec<String>, CliError> {
    let broken = |problem: String| CliError::Failed(format!("{}: {problem}", path.display()));
    let bar = progress(std::fs::metadata(path).map_err(|error| broken(error.to_string()))?.len(), "bytes");
    let entry = |index, bytes: &[u8]| examined.entry(index, bytes, None).map_err(|finding| finding.to_string());
    let verified = backup::verify(path, entry, |bytes| bar.inc(bytes));
    bar.finish_and_clear();
    // What else is known tells more exactly what does not lead to the checkpoint.
    let note = match &verified {
        Ok(verified) => &verified.note,
        Err(BackupError::OtherEntries { note, .. }) => note,
        Err(error) => return Err(CliError::Failed(error.to_string())),
    };
    let checkpoint = args.open(note).map_err(|problem| broken(format!("its checkpoint: {problem}")))?;
    examined.reached("its checkpoint".into(), checkpoint).map_err(|finding| broken(finding.to_string()))?;
    let verified = verified.map_err(|error| CliError::Failed(error.to_string()))?;
    let previous = "logs that this one continues are in the backup, too: unpack it, and verify each by `--data-dir DIR/previous/ID`";
    Ok(if verified.has_previous { vec![previous.to_owned()] } else { Vec::new() })
}

/// Reads the log in a data directory, and what is derived from it.
fn read_directory(args: &VerifyArgs, directory: &Path, examined: &mut Examined) -> Result<Vec<String>, CliError> {
    let store = Some(directory.join("ledger")).filter(|ledger| ledger.is_dir()).unwrap_or_else(|| directory.to_owned());
    let published = directory.join("checkpoint");
    if published.is_file() && store != directory {
        let checkpoint = args.open(&read_note(&published)?);
        let checkpoint = checkpoint.map_err(|problem| CliError::Failed(format!("{}: {problem}", published.display())))?;
        examined.expect(format!("the checkpoint in {}", published.display()), checkpoint);
    }
    let mut notes = Vec::new();
    match Tiles::open(&store.join("tree")) {
        Ok(Some(tiles)) => examined.compare_tiles(tiles),
        Ok(None) => notes.push("the tree's hashes are not there, and were not compared; the next start makes them anew".to_owned()),
        Err(finding) => examined.differs(finding),
    }
    let audit = Audit::of(&store).map_err(|error| CliError::Failed(error.to_string()))?;
    let bar = progress(audit.bytes(), "bytes");
    let audited = audit.read(|index, bytes| examined.entry(index, bytes, None), |bytes| bar.inc(bytes));
    let audited = audited.map_err(|finding| examined.first(finding))?;
    examined.is_log(audited.log);
    bar.finish_and_clear();
    if audited.is_torn {
        let torn = "a write that was cut off follows the last entry; nobody was told that it was recorded, and the next start removes it";
        notes.push(torn.to_owned());
    }
    Ok(notes)
}

impl From<StoreError> for Finding {
    fn from(error: StoreError) -> Self {
        Self::elsewhere(error.to_string())
    }
}

impl From<Finding> for CliError {
    fn from(finding: Finding) -> Self {
        Self::Failed(finding.to_string())
    }
}

#[allow(clippy::cast_precision_loss, reason = "for people")]
fn rate(entries: u64, seconds: f64) -> f64 {
    (entries as f64 / seconds.max(1e-6)).round()
}

/// On standard error, if somebody watches.
pub(super) fn progress(total: u64, what: &str) -> ProgressBar {
    let counted = if what == "bytes" { "{bytes}/{total_bytes}, {bytes_per_sec}" } else { "{pos}/{len}, {per_sec}" };
    let bar = ProgressBar::new(total);
    let style = ProgressStyle::with_template(&format!("{{bar:40}} {counted}, {{eta}} left"));
    if let Ok(style) = style {
        bar.set_style(style);
    }
    bar
}
