//! The way back: a new data directory from a backup.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use chancery_identity::checkpoint::Checkpoint;
use chancery_process::files;

use super::contents::{self, Contents};
use super::create::parent;
use super::{BackupError, Info, keys, unsigned};

/// What to restore, and where to.
#[derive(Clone, Copy, Debug)]
pub struct Restore<'a> {
    /// The backup.
    pub backup: &'a Path,
    /// The data directory to make: absent or empty.
    pub data_dir: &'a Path,
    /// Decrypts the keys in the backup: a file that `age-keygen` wrote.
    pub identity: Option<&'a Path>,
    /// The newest checkpoint that anybody knows: the CA's own, if it survived, or an auditor's.
    pub checkpoint: Option<&'a Path>,
}

/// What was restored.
#[derive(Clone, Debug)]
pub struct Restored {
    /// What the backup says.
    pub info: Info,
    /// What is missing or has to be looked at before the CA is started, one sentence each.
    pub next_steps: Vec<String>,
}

/// Restores a backup. `progress` is told how many bytes of how many were worked on.
///
/// # Errors
/// If the backup is not intact, ends before the checkpoint that is known, or something is in its place. Nothing is left behind then.
pub fn restore(restore: &Restore<'_>, mut progress: impl FnMut(u64, u64)) -> Result<Restored, BackupError> {
    check_place(restore.data_dir)?;
    let known = restore.checkpoint.map(|path| Ok::<_, BackupError>((path, read_checkpoint(path)?))).transpose()?;
    let known = known.as_ref().map(|(path, checkpoint)| (*path, checkpoint));
    let staging = staging(restore.data_dir)?;
    let restored = unpack(restore, known, &staging, &mut progress).and_then(|restored| {
        // In one step: a data directory that is there is complete.
        fs::rename(&staging, restore.data_dir).map_err(BackupError::io("create", restore.data_dir))?;
        files::sync_directory(parent(restore.data_dir))?;
        Ok(restored)
    });
    if restored.is_err() {
        // What is left is removed by the next try, too.
        let _ = fs::remove_dir_all(&staging);
    }
    restored
}

fn unpack(
    restore: &Restore<'_>,
    known: Option<(&Path, &Checkpoint)>,
    staging: &Path,
    progress: &mut impl FnMut(u64, u64),
) -> Result<Restored, BackupError> {
    files::create_private_dir(staging)?;
    let total = fs::metadata(restore.backup).map_err(BackupError::io("open", restore.backup))?.len();
    let mut done = 0;
    let contents = contents::read(restore.backup, known, |name, bytes| {
        done += bytes.len() as u64;
        progress(done, total);
        write(staging, name, bytes)
    })?;
    if let Some((path, known)) = known {
        check_known(&contents, path, known)?;
    }
    let next_steps = restore_keys(restore, &contents, staging)?;
    Ok(Restored { info: contents.info, next_steps })
}

/// The backup must not end before what is known.
fn check_known(contents: &Contents, path: &Path, known: &Checkpoint) -> Result<(), BackupError> {
    if known.origin != contents.checkpoint.origin {
        let problem = format!("it is of the ledger {}, and the backup of {}", known.origin, contents.checkpoint.origin);
        return Err(BackupError::Checkpoint { path: path.to_owned(), problem });
    }
    let entries = contents.info.entries;
    if known.size > entries {
        return Err(BackupError::EntriesMissing { entries, known: known.size, path: path.to_owned() });
    }
    Ok(())
}

/// Tells what is missing.
fn restore_keys(restore: &Restore<'_>, contents: &Contents, staging: &Path) -> Result<Vec<String>, BackupError> {
    let mut next_steps = Vec::new();
    let missing = "copy `keys` and `ledger-keys` of the old data directory into the new one (0700, files 0600), or restore a backup made with \
                   `--with-keys`; the CA does not start without them";
    match (&contents.keys, restore.identity) {
        (Some(sealed), Some(identity)) => {
            for (name, bytes) in keys::unpack(sealed, identity)? {
                write(staging, &name, &bytes)?;
            }
        }
        (Some(_), None) => {
            next_steps.push(format!("the keys are in the backup but were not restored: give `--identity FILE`; or {missing}"));
        }
        (None, Some(_)) => return Err(BackupError::Keys("there are none, so `--identity` cannot decrypt them".into())),
        (None, None) => next_steps.push(format!("the keys are not in the backup: {missing}")),
    }
    if restore.checkpoint.is_none() {
        next_steps.push(format!(
            "whether the ledger went on after its {} entries was not checked: no `--checkpoint` was given. Agents that know more will raise an alarm",
            contents.info.entries
        ));
    }
    Ok(next_steps)
}

fn write(staging: &Path, name: &str, bytes: &[u8]) -> Result<(), BackupError> {
    let path = staging.join(name);
    files::create_private_dir(parent(&path))?;
    Ok(files::write_private(&path, bytes)?)
}

/// Only what is empty is written to.
fn check_place(data_dir: &Path) -> Result<(), BackupError> {
    let entries = match fs::read_dir(data_dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(BackupError::io("read", data_dir))?,
    };
    if entries.count() == 0 { Ok(()) } else { Err(BackupError::NotEmpty(data_dir.to_owned())) }
}

/// An empty place beside the data directory, so that this one can appear in one step.
fn staging(data_dir: &Path) -> Result<PathBuf, BackupError> {
    let name = data_dir.file_name().ok_or_else(|| BackupError::NotEmpty(data_dir.to_owned()))?;
    let staging = parent(data_dir).join(format!(".{}.restoring", name.to_string_lossy()));
    match fs::remove_dir_all(&staging) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(BackupError::io("remove", &staging)(error)),
        _ => Ok(staging),
    }
}

fn read_checkpoint(path: &Path) -> Result<Checkpoint, BackupError> {
    let note = fs::read_to_string(path).map_err(BackupError::io("read", path))?;
    unsigned(&note).map_err(|problem| BackupError::Checkpoint { path: path.to_owned(), problem })
}
