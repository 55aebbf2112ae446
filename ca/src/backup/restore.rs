//! The way back: a new data directory from a backup.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chancery_identity::Clock;
use chancery_identity::checkpoint::{Checkpoint, CheckpointVerifier, MAX_NOTE_BYTES, unverified, verify};
use chancery_process::files;

use super::contents::{self, Contents};
use super::create::parent;
use super::loss::{self, AcceptLoss, NewLog};
use super::restored::{self, Restoration};
use super::{BackupError, Info, LEDGER_KEYS, keys};

/// What to restore, and where to.
#[derive(Clone, Debug)]
pub struct Restore<'a> {
    /// The backup.
    pub backup: &'a Path,
    /// The data directory to make: absent or empty.
    pub data_dir: &'a Path,
    /// Decrypts the keys in the backup: a file that `age-keygen` wrote.
    pub identity: Option<&'a Path>,
    /// The newest checkpoints that are known: the CA's own, if it survived, auditors', agents'.
    pub checkpoints: &'a [PathBuf],
    /// Begin a new ledger with what the backup has, since entries are lost.
    pub loss: Option<&'a AcceptLoss<'a>>,
    /// Who restores, as acts name people: `local:uid=N`.
    pub actor: String,
    /// The time now.
    pub clock: Arc<dyn Clock>,
}

/// What was restored.
#[derive(Clone, Debug)]
pub struct Restored {
    /// What the backup says.
    pub info: Info,
    /// The ledger that continues the backup's, if a loss was accepted.
    pub new_log: Option<NewLog>,
    /// What is missing or has to be looked at before the CA is started, one sentence each.
    pub next_steps: Vec<String>,
}

/// A checkpoint that is known outside the backup.
#[derive(Debug)]
pub(super) struct Known<'a> {
    path: &'a Path,
    /// Signed.
    pub(super) note: String,
    pub(super) checkpoint: Checkpoint,
}

/// Restores a backup. `progress` is told how many bytes of how many were worked on.
///
/// # Errors
/// If the backup is not intact, ends before the checkpoint that is known, or something is in its place. Nothing is left behind then.
pub fn restore(restore: &Restore<'_>, mut progress: impl FnMut(u64, u64)) -> Result<Restored, BackupError> {
    check_place(restore.data_dir)?;
    let known = restore.checkpoints.iter().map(|path| Known::read(path)).collect::<Result<Vec<_>, _>>()?;
    let staging = staging(restore.data_dir)?;
    let restored = unpack(restore, &known, &staging, &mut progress).and_then(|restored| {
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
    known: &[Known<'_>],
    staging: &Path,
    progress: &mut impl FnMut(u64, u64),
) -> Result<Restored, BackupError> {
    files::create_private_dir(staging)?;
    let total = fs::metadata(restore.backup).map_err(BackupError::io("open", restore.backup))?.len();
    let mut done = 0;
    let sizes: Vec<u64> = known.iter().map(|known| known.checkpoint.size).collect();
    let unpack = |name: &str, bytes: &[u8]| {
        done += bytes.len() as u64;
        progress(done, total);
        write(staging, name, bytes)
    };
    let contents = contents::read(restore.backup, &sizes, unpack, |_, _| Ok(()))?;
    for known in known {
        known.check(&contents)?;
    }
    let newest = known.iter().max_by_key(|known| known.checkpoint.size).filter(|newest| newest.checkpoint.size > contents.info.entries);
    let mut next_steps = restore_keys(restore, &contents, staging)?;
    let new_log = match (restore.loss, newest) {
        (Some(loss), newest) => Some(loss::begin(restore, loss, staging, &contents, newest)?),
        (None, Some(newest)) => return Err(newest.missing(&contents)),
        (None, None) => {
            next_steps.extend(unknown_end(restore, &contents));
            next_steps.push(note(restore, &contents, staging)?);
            None
        }
    };
    next_steps.extend(new_log.as_ref().map(|new| new.next_step(restore.data_dir)));
    Ok(Restored { info: contents.info, new_log, next_steps })
}

impl<'a> Known<'a> {
    fn read(path: &'a Path) -> Result<Self, BackupError> {
        let note = fs::read_to_string(path).map_err(BackupError::io("read", path))?;
        let refused = |problem| BackupError::Checkpoint { path: path.to_owned(), problem };
        if note.len() > MAX_NOTE_BYTES {
            return Err(refused("it is longer than a signed checkpoint".into()));
        }
        let checkpoint = unverified(&note).map_err(|error| refused(error.to_string()))?;
        Ok(Self { path, note, checkpoint })
    }

    /// It must be the ledger's, and what the entries lead to, as far as there are as many.
    fn check(&self, contents: &Contents) -> Result<(), BackupError> {
        let refused = |problem| BackupError::Checkpoint { path: self.path.to_owned(), problem };
        let (found, ours) = (&self.checkpoint.origin, &contents.checkpoint.origin);
        if found != ours {
            return Err(refused(format!("it is of the ledger {found}, and the backup of {ours}")));
        }
        let keys: Result<Vec<_>, _> = contents.checkpoint_keys.iter().map(|key| CheckpointVerifier::new(ours, *key)).collect();
        let keys = keys.map_err(|error| refused(error.to_string()))?;
        if !keys.is_empty() {
            verify(&self.note, &keys).map_err(|error| refused(error.to_string()))?;
        }
        let size = self.checkpoint.size;
        if contents.roots.get(&size).is_some_and(|root| *root != self.checkpoint.root) {
            return Err(refused(format!(
                "it is another history: the backup's first {size} entries are not those of this checkpoint. Keep both"
            )));
        }
        Ok(())
    }

    fn missing(&self, contents: &Contents) -> BackupError {
        BackupError::EntriesMissing { entries: contents.info.entries, known: self.checkpoint.size, path: self.path.to_owned() }
    }
}

/// The ledger may lack entries that nobody knows of, which the CA records when it starts.
fn note(restore: &Restore<'_>, contents: &Contents, staging: &Path) -> Result<String, BackupError> {
    let longest_lifetime = restored::longest_lifetime(&staging.join("ledger"))?;
    let restoration = Restoration {
        actor: restore.actor.clone(),
        restored_at: restore.clock.now(),
        made_at: contents.info.made_at,
        entries: contents.info.entries,
        longest_lifetime_s: longest_lifetime.as_secs(),
    };
    restoration.note(staging)?;
    let until = restoration.restored_at + longest_lifetime;
    Ok(format!(
        "what was issued after the backup's newest checkpoint is not in the ledger; agents tell what they have of it. No root is activated or \
         retired before {until}, but by `chancery root distrust`"
    ))
}

fn unknown_end(restore: &Restore<'_>, contents: &Contents) -> Option<String> {
    let entries = contents.info.entries;
    restore.checkpoints.is_empty().then(|| {
        format!(
            "whether the ledger went on after its {entries} entries was not checked: no `--checkpoint` was given. As soon as an agent shows that \
             it did, the CA issues nothing more, and `restore --accept-loss` is due"
        )
    })
}

/// Tells what is missing.
fn restore_keys(restore: &Restore<'_>, contents: &Contents, staging: &Path) -> Result<Vec<String>, BackupError> {
    let mut next_steps = Vec::new();
    let ledger_keys = restore.loss.and_then(|loss| loss.ledger_keys);
    let directories = if ledger_keys.is_some() { "`keys`" } else { "`keys` and `ledger-keys`" };
    let missing = format!(
        "copy {directories} of the old data directory into the new one (0700, files 0600), or restore a backup made with `--with-keys`; the CA \
         does not start without them"
    );
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
    if let Some(directory) = ledger_keys {
        for (name, bytes) in keys::read_directory(directory, LEDGER_KEYS)? {
            write(staging, &name, &bytes)?;
        }
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
