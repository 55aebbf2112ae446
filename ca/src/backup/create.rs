//! Making a backup, of a CA that may be running.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use age::x25519::Recipient;
use chancery_identity::checkpoint::{MAX_NOTE_BYTES, unverified};
use chancery_process::files;
use time::OffsetDateTime;

use super::archive::Writer;
use super::keys::KeyFile;
use super::last::{self, LastBackup};
use super::{BackupError, CHECKPOINT, FLOOR, FORMAT, INFO, Info, KEYS, KIND, LOG, PREVIOUS, SMALL_FILES, keys, verify};
use crate::store::StoreError;
use crate::store::embedded::audit::{Audit, Walk};

/// How often the keys are read again if they are not what they were: they change a few times a day.
const KEYS_READ_AGAIN: usize = 10;

/// What to back up, and where to.
#[derive(Clone, Copy, Debug)]
pub struct Backup<'a> {
    /// The CA's data directory.
    pub data_dir: &'a Path,
    /// The file to make.
    pub to: &'a Path,
    /// Put the keys in, encrypted to this public key of age.
    pub recipient: Option<&'a str>,
    /// The time now.
    pub now: OffsetDateTime,
}

/// A backup that was made, and read back.
#[derive(Clone, Debug)]
pub struct Written {
    /// What is in it.
    pub info: Info,
    /// The newest checkpoint in it: a signed note.
    pub checkpoint: String,
    /// Its size.
    pub bytes: u64,
    /// How long it took.
    pub took: Duration,
}

/// Makes a backup and reads it back. `progress` is told how many bytes of how many were worked on.
///
/// # Errors
/// If something cannot be read or written, or is damaged. There is no file then, but for the last error: that it could not be noted.
pub fn create(backup: &Backup<'_>, mut progress: impl FnMut(u64, u64)) -> Result<Written, BackupError> {
    let started = Instant::now();
    let recipient = backup.recipient.map(keys::recipient).transpose()?;
    if backup.to.try_exists().map_err(BackupError::io("look for", backup.to))? {
        return Err(BackupError::Exists(backup.to.to_owned()));
    }
    let temporary = temporary(backup.to)?;
    let written = write(backup, recipient.as_ref(), &temporary, &mut progress).and_then(|info| {
        fs::rename(&temporary, backup.to).map_err(BackupError::io("create", backup.to))?;
        files::sync_directory(parent(backup.to))?;
        Ok(info)
    });
    if written.is_err() {
        // What is left is replaced by the next try, too.
        let _ = fs::remove_file(&temporary);
    }
    let (info, checkpoint) = written?;
    let bytes = fs::metadata(backup.to).map_err(BackupError::io("read", backup.to))?.len();
    last::note(backup.data_dir, LastBackup { made_at: info.made_at, entries: info.entries })?;
    Ok(Written { info, checkpoint, bytes, took: started.elapsed() })
}

/// Beside the backup, so that it can get its name in one step; hidden, and the same each time, so that leftovers do not pile up.
fn temporary(to: &Path) -> Result<PathBuf, BackupError> {
    let name = to.file_name().ok_or_else(|| BackupError::Exists(to.to_owned()))?;
    Ok(parent(to).join(format!(".{}.new", name.to_string_lossy())))
}

pub(super) fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn write(
    backup: &Backup<'_>,
    recipient: Option<&Recipient>,
    path: &Path,
    progress: &mut impl FnMut(u64, u64),
) -> Result<(Info, String), BackupError> {
    let data = backup.data_dir;
    let small = small_files(data)?;
    let previous = previous_logs(data)?;
    // Before the log: what the checkpoint covers is durable and never changes again, whatever is recorded meanwhile.
    let (note, found) = note_and_keys(data, recipient.is_some())?;
    let checkpoint =
        unverified(&note).map_err(|error| BackupError::Checkpoint { path: data.join(CHECKPOINT), problem: error.to_string() })?;
    let log = Audit::of(&data.join("ledger"))?.up_to(checkpoint.size);
    let info = Info {
        // An older program reads what has no previous log.
        format: if previous.is_empty() { 1 } else { FORMAT },
        chancery: env!("CARGO_PKG_VERSION").to_owned(),
        made_at: backup.now,
        kind: small
            .iter()
            .find(|(name, _)| name == KIND)
            .map(|(_, kind)| String::from_utf8_lossy(kind).trim().to_owned())
            .unwrap_or_default(),
        origin: checkpoint.origin.clone(),
        entries: checkpoint.size,
        segments: log.segments().len(),
        keys: recipient.is_some(),
    };
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(BackupError::io("remove", path)(error)),
        _ => {}
    }
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(BackupError::io("create", path))?;
    let mut writer = Writer::new(file, path, backup.now);
    writer.add(INFO, &serde_json::to_vec_pretty(&info).map_err(|error| BackupError::io("write", path)(error.into()))?)?;
    for (name, bytes) in small {
        writer.add(&name, &bytes)?;
    }
    writer.add(CHECKPOINT, note.as_bytes())?;
    for (name, path) in previous {
        writer.add(&name, &fs::read(&path).map_err(BackupError::io("read", &path))?)?;
    }
    // Read twice: here and when it is read back.
    let total = log.bytes().saturating_mul(2);
    let mut done = 0;
    let floor = copy_log(&log, checkpoint.size, &mut writer, |bytes| {
        done += bytes;
        progress(done, total);
    })?;
    writer.add(FLOOR, floor.as_bytes())?;
    if let Some(recipient) = recipient {
        writer.add(KEYS, &keys::pack(&found, recipient)?)?;
    }
    writer.finish()?;
    let read_back = |bytes| {
        done += bytes;
        progress(done, total);
    };
    verify(path, |_, _| Ok(()), read_back)?;
    Ok((info, note))
}

/// Copies the log's segments, and of the last one what the first `entries` entries take; tells where it must not end before.
fn copy_log(log: &Audit, entries: u64, writer: &mut Writer, mut copied: impl FnMut(u64)) -> Result<String, BackupError> {
    let mut walk = Walk::default();
    for (number, path) in log.segments().iter().enumerate() {
        let mut bytes = fs::read(path).map_err(BackupError::io("read", path))?;
        if number + 1 < log.segments().len() {
            walk.full(path, &bytes, |_, _| Ok::<_, StoreError>(()))?;
        } else {
            let end = walk.beginning(path, &bytes, entries)?;
            bytes.truncate(end);
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        writer.add(&format!("{LOG}{name}"), &bytes)?;
        copied(bytes.len() as u64);
    }
    walk.floor().ok_or_else(|| StoreError::Damaged { place: LOG.into(), detail: "there is no segment".into() }.into())
}

/// What else lies in a data directory and cannot be made anew.
fn small_files(data: &Path) -> Result<Vec<(String, Vec<u8>)>, BackupError> {
    let mut found = Vec::new();
    for name in SMALL_FILES {
        match fs::read(data.join(name)) {
            Ok(bytes) => found.push((name.to_owned(), bytes)),
            Err(error) if error.kind() == ErrorKind::NotFound && name != KIND => {}
            Err(error) => return Err(BackupError::NotData { path: data.to_owned(), problem: format!("{name}: {error}") }),
        }
    }
    Ok(found)
}

/// The files of the logs that this one continues, by their names in the backup: what [`loss`](super::loss) put there, which never changes.
fn previous_logs(data: &Path) -> Result<Vec<(String, PathBuf)>, BackupError> {
    let (mut found, mut left) = (Vec::new(), vec![(PREVIOUS.trim_end_matches('/').to_owned(), data.join(PREVIOUS))]);
    while let Some((name, directory)) = left.pop() {
        let listed = match fs::read_dir(&directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            listed => listed.map_err(BackupError::io("read", &directory))?,
        };
        for entry in listed {
            let entry = entry.map_err(BackupError::io("read", &directory))?;
            let member = format!("{name}/{}", entry.file_name().to_string_lossy());
            if entry.path().is_dir() { left.push((member, entry.path())) } else { found.push((member, entry.path())) }
        }
    }
    found.sort();
    Ok(found)
}

/// The newest checkpoint, and the keys as they were when it was that: one that its entries call for is among them.
fn note_and_keys(data: &Path, with_keys: bool) -> Result<(String, Vec<KeyFile>), BackupError> {
    if !with_keys {
        return Ok((read_note(data)?, Vec::new()));
    }
    let mut before = keys::collect(data)?;
    for _ in 0..KEYS_READ_AGAIN {
        let note = read_note(data)?;
        let after = keys::collect(data)?;
        if after == before {
            return Ok((note, after));
        }
        before = after;
    }
    Err(BackupError::Keys("they were made or destroyed all the while; try again".into()))
}

fn read_note(data: &Path) -> Result<String, BackupError> {
    let path = data.join(CHECKPOINT);
    let note =
        fs::read(&path).map_err(|error| BackupError::NotData { path: data.to_owned(), problem: format!("{CHECKPOINT}: {error}") })?;
    let note = String::from_utf8(note).ok().filter(|note| note.len() <= MAX_NOTE_BYTES);
    note.ok_or_else(|| BackupError::Checkpoint { path, problem: "it is no signed checkpoint".into() })
}
