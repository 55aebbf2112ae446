//! What the members of a backup have to be, and whether they belong together.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use chancery_identity::checkpoint::{Checkpoint, GrowingTree, Hash, leaf_hash, unverified};

use super::{BackupError, CHECKPOINT, FLOOR, FORMAT, INFO, Info, KEYS, LOG, OLD_BUNDLE, OLD_CERTIFICATES, PREVIOUS, SMALL_FILES, archive};
use crate::ledger::acts::named_checkpoint_keys;
use crate::store::StoreError;
use crate::store::embedded::audit::Walk;

/// A backup that was read, and is intact.
#[derive(Debug)]
pub(super) struct Contents {
    pub(super) info: Info,
    /// The newest one in it.
    pub(super) checkpoint: Checkpoint,
    /// The same, signed.
    pub(super) note: String,
    /// The keys that have signed checkpoints, as far as the entries name them.
    pub(super) checkpoint_keys: BTreeSet<[u8; 32]>,
    /// Of the trees over so many entries as were asked for.
    pub(super) roots: BTreeMap<u64, Hash>,
    /// The keys, encrypted.
    pub(super) keys: Option<Vec<u8>>,
}

/// Reads a backup, and checks all that can be checked. The roots of the trees of these `sizes` are told, as far as there are as many entries.
/// `member` is told name and content of what lies in a data directory, and `entry` of each entry its index and bytes.
///
/// # Errors
/// What is not intact, or what `member` or `entry` says; what was handed over before is then not to be used.
pub(super) fn read(
    path: &Path,
    sizes: &[u64],
    mut member: impl FnMut(&str, &[u8]) -> Result<(), BackupError>,
    mut entry: impl FnMut(u64, &[u8]) -> Result<(), String>,
) -> Result<Contents, BackupError> {
    let mut reading = Reading {
        path,
        sizes,
        info: None,
        note: None,
        keys: None,
        segments: 0,
        walk: Walk::default(),
        tree: GrowingTree::default(),
        roots: BTreeMap::new(),
        checkpoint_keys: BTreeSet::new(),
    };
    archive::read(path, |name, bytes| {
        let is_data = reading.look_at(name, &bytes, &mut entry)?;
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
    sizes: &'a [u64],
    info: Option<Info>,
    note: Option<String>,
    keys: Option<Vec<u8>>,
    segments: usize,
    walk: Walk,
    tree: GrowingTree,
    roots: BTreeMap<u64, Hash>,
    checkpoint_keys: BTreeSet<[u8; 32]>,
}

impl Reading<'_> {
    /// Whether the member belongs into a data directory.
    fn look_at(&mut self, name: &str, bytes: &[u8], entry: &mut impl FnMut(u64, &[u8]) -> Result<(), String>) -> Result<bool, BackupError> {
        let Some(info) = &self.info else {
            self.info = Some(self.read_info(name, bytes)?);
            return Ok(false);
        };
        if let Some(segment) = name.strip_prefix(LOG) {
            let is_last = self.segments + 1 == info.segments;
            self.segments += 1;
            // Named as in the backup, for errors.
            let path = self.path.join(name);
            self.segment(&path, bytes, is_last, entry)?;
            return if is_plain(segment) { Ok(true) } else { Err(self.unknown(name)) };
        }
        match name {
            KEYS => return Ok(false),
            CHECKPOINT => self.note = Some(String::from_utf8_lossy(bytes).into_owned()),
            FLOOR => {}
            name if SMALL_FILES.contains(&name) => {}
            OLD_BUNDLE => return Ok(false),
            name if name.starts_with(OLD_CERTIFICATES) => return Ok(false),
            name if name.strip_prefix(PREVIOUS).is_some_and(|rest| rest.split('/').all(is_plain)) => {}
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
            Some(1..=FORMAT) => serde_json::from_value(value).map_err(|error| damaged(format!("{INFO}: {error}"))),
            Some(found) if found > FORMAT => Err(BackupError::Newer { path: self.path.to_owned(), found }),
            _ => Err(damaged(format!("{INFO} does not say its format"))),
        }
    }

    fn segment(
        &mut self,
        path: &Path,
        bytes: &[u8],
        is_last: bool,
        entry: &mut impl FnMut(u64, &[u8]) -> Result<(), String>,
    ) -> Result<(), BackupError> {
        let Self { tree, sizes, roots, checkpoint_keys, path: backup, .. } = self;
        let mut entry = |index, bytes: &[u8]| {
            tree.push(leaf_hash(bytes));
            checkpoint_keys.extend(named_checkpoint_keys(bytes));
            if sizes.contains(&tree.size()) {
                roots.insert(tree.size(), tree.root());
            }
            entry(index, bytes).map_err(|problem| BackupError::Damaged { path: (*backup).to_owned(), problem })
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
        let checkpoint = unverified(&note).map_err(|problem| damaged(&format!("its checkpoint: {problem}")))?;
        if self.segments != info.segments || self.tree.size() != info.entries || checkpoint.size != info.entries {
            let found = self.tree.size();
            return Err(damaged(&format!("it has {found} entries, its checkpoint {}, and {} were written", checkpoint.size, info.entries)));
        }
        let log_id = self.walk.log_id().map(hex::encode).unwrap_or_default();
        if checkpoint.origin != info.origin || !checkpoint.origin.ends_with(&log_id) {
            return Err(damaged("its checkpoint is of another ledger"));
        }
        if self.tree.root() != checkpoint.root {
            return Err(BackupError::OtherEntries { path: self.path.to_owned(), entries: info.entries, note });
        }
        if self.keys.is_some() != info.keys {
            return Err(damaged("its keys are missing"));
        }
        let (keys, checkpoint_keys, roots) = (self.keys, self.checkpoint_keys, self.roots);
        Ok(Contents { info, checkpoint, note, checkpoint_keys, roots, keys })
    }

    fn unknown(&self, name: &str) -> BackupError {
        BackupError::Damaged { path: self.path.to_owned(), problem: format!("the member {name:?} is none of a backup's") }
    }
}

/// A name without a way out of its directory.
pub(super) fn is_plain(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with('.')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}
