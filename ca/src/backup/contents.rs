//! What the members of a backup have to be, and whether they belong together.

use std::path::Path;

use chancery_identity::checkpoint::{Checkpoint, GrowingTree, leaf_hash};

use super::{AUTHORITY, BackupError, CHECKPOINT, FLOOR, FORMAT, INFO, Info, KEYS, LOG, SMALL_FILES, archive, unsigned};
use crate::store::StoreError;
use crate::store::embedded::audit::Walk;

/// A backup that was read, and is intact.
#[derive(Debug)]
pub(super) struct Contents {
    pub(super) info: Info,
    /// The newest one in it.
    pub(super) checkpoint: Checkpoint,
    /// The keys, encrypted.
    pub(super) keys: Option<Vec<u8>>,
}

/// Reads a backup, and checks all that can be checked. `known` are checkpoints, with their files, that the entries have to lead to, as far as
/// there are as many. `member` is told name and content of what lies in a data directory.
///
/// # Errors
/// What is not intact, or what `member` says; what was handed over before is then not to be used.
pub(super) fn read(
    path: &Path,
    known: Option<(&Path, &Checkpoint)>,
    mut member: impl FnMut(&str, &[u8]) -> Result<(), BackupError>,
) -> Result<Contents, BackupError> {
    let mut reading =
        Reading { path, known, info: None, note: None, keys: None, segments: 0, walk: Walk::default(), tree: GrowingTree::default() };
    archive::read(path, |name, bytes| {
        let is_data = reading.look_at(name, &bytes)?;
        if is_data {
            member(name, &bytes)?;
        } else if name == KEYS {
            reading.keys = Some(bytes);
        }
        Ok(())
    })?;
    reading.finish()
}

struct Reading<'a> {
    path: &'a Path,
    known: Option<(&'a Path, &'a Checkpoint)>,
    info: Option<Info>,
    note: Option<String>,
    keys: Option<Vec<u8>>,
    segments: usize,
    walk: Walk,
    tree: GrowingTree,
}

impl Reading<'_> {
    /// Whether the member belongs into a data directory.
    fn look_at(&mut self, name: &str, bytes: &[u8]) -> Result<bool, BackupError> {
        let Some(info) = &self.info else {
            self.info = Some(self.read_info(name, bytes)?);
            return Ok(false);
        };
        if let Some(segment) = name.strip_prefix(LOG) {
            let is_last = self.segments + 1 == info.segments;
            self.segments += 1;
            // Named as in the backup, for errors.
            let path = self.path.join(name);
            self.segment(&path, bytes, is_last)?;
            return if is_plain(segment) { Ok(true) } else { Err(self.unknown(name)) };
        }
        match name {
            KEYS => return Ok(false),
            CHECKPOINT => self.note = Some(String::from_utf8_lossy(bytes).into_owned()),
            FLOOR => {}
            name if SMALL_FILES.contains(&name) => {}
            name if name.strip_prefix(AUTHORITY).is_some_and(is_plain) => {}
            name => return Err(self.unknown(name)),
        }
        Ok(true)
    }

    fn read_info(&self, name: &str, bytes: &[u8]) -> Result<Info, BackupError> {
        let damaged = |problem: String| BackupError::Damaged { path: self.path.to_owned(), problem };
        if name != INFO {
            return Err(damaged(format!("its first member is {name:?}, not {INFO}: it was not made by chancery-ca backup")));
        }
        // The format alone first: what else a newer one has cannot be known.
        let value: serde_json::Value = serde_json::from_slice(bytes).map_err(|error| damaged(format!("{INFO}: {error}")))?;
        let found = value.get("format").and_then(serde_json::Value::as_u64).and_then(|found| u32::try_from(found).ok());
        match found {
            Some(FORMAT) => serde_json::from_value(value).map_err(|error| damaged(format!("{INFO}: {error}"))),
            Some(found) if found > FORMAT => Err(BackupError::Newer { path: self.path.to_owned(), found }),
            _ => Err(damaged(format!("{INFO} does not say its format"))),
        }
    }

    fn segment(&mut self, path: &Path, bytes: &[u8], is_last: bool) -> Result<(), BackupError> {
        let (tree, known) = (&mut self.tree, self.known);
        let mut entry = |_, entry: &[u8]| {
            tree.push(leaf_hash(entry));
            match known {
                Some((path, known)) if known.size == tree.size() && known.root != tree.root() => Err(other_history(path, known)),
                _ => Ok(()),
            }
        };
        if !is_last {
            return self.walk.full(path, bytes, &mut entry);
        }
        if self.walk.last(path, bytes, &mut entry)? {
            return Err(StoreError::Damaged { place: path.display().to_string(), detail: "bytes follow that are no entries".into() }.into());
        }
        Ok(())
    }

    fn finish(self) -> Result<Contents, BackupError> {
        let damaged = |problem: &str| BackupError::Damaged { path: self.path.to_owned(), problem: problem.to_owned() };
        let info = self.info.ok_or_else(|| damaged("it is empty"))?;
        let note = self.note.ok_or_else(|| damaged("it has no checkpoint"))?;
        let checkpoint = unsigned(&note).map_err(|problem| damaged(&format!("its checkpoint: {problem}")))?;
        if self.segments != info.segments || self.tree.size() != info.entries || checkpoint.size != info.entries {
            let found = self.tree.size();
            return Err(damaged(&format!("it has {found} entries, its checkpoint {}, and {} were written", checkpoint.size, info.entries)));
        }
        if self.tree.root() != checkpoint.root {
            return Err(damaged("its entries do not lead to its checkpoint"));
        }
        let log_id = self.walk.log_id().map(hex::encode).unwrap_or_default();
        if checkpoint.origin != info.origin || !checkpoint.origin.ends_with(&log_id) {
            return Err(damaged("its checkpoint is of another ledger"));
        }
        if self.keys.is_some() != info.keys {
            return Err(damaged("its keys are missing"));
        }
        Ok(Contents { info, checkpoint, keys: self.keys })
    }

    fn unknown(&self, name: &str) -> BackupError {
        BackupError::Damaged { path: self.path.to_owned(), problem: format!("the member {name:?} is none of a backup's") }
    }
}

fn other_history(path: &Path, known: &Checkpoint) -> BackupError {
    let problem = format!("it is another history: the backup's first {} entries are not those of this checkpoint. Keep both", known.size);
    BackupError::Checkpoint { path: path.to_owned(), problem }
}

/// A name without a way out of its directory.
pub(super) fn is_plain(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with('.')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}
