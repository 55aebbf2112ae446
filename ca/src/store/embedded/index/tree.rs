//! The LSM tree of the index: a fjall database with one keyspace.
//!
//! One keyspace, since its tables are flushed as a whole: even where the journal is lost (it is never synced for an insertion's sake), what
//! is on disk is what a whole number of insertions wrote, the count of indexed entries included.

use std::fmt;
use std::fs::DirBuilder;
use std::ops::{Bound, Range};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use fjall::compaction::Leveled;
use fjall::config::{CompressionPolicy, FilterPolicy};
use fjall::{CompressionType, Database, Keyspace, KeyspaceCreateOptions, LsmError, PersistMode};

use super::postings::{self, TermHash};
use crate::store::Term;

/// Memory for blocks of tables. Small, since the CA's whole budget is; the page cache holds more.
const CACHE_BYTES: u64 = 4 << 20;
/// Memory for what is not yet in a table; up to four of these wait for the disk.
const MEMTABLE_BYTES: u64 = 4 << 20;
/// Size of a table file.
const TABLE_BYTES: u64 = 32 << 20;
const OPEN_FILES: usize = 128;
/// One flushes while the other compacts.
const WORKERS: usize = 2;

/// First byte of a key: what it is.
const STATE: u8 = 0;
const VALUE: u8 = 1;
const POSTING: u8 = 2;
/// Under this key: format (one byte) and how many entries are indexed.
const INDEXED_KEY: [u8; 1] = [STATE];
/// Raised when keys, values or the meaning of terms change; a tree of another format is built anew.
const FORMAT: u8 = 1;

/// Why the tree did not do it.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// What was to be inserted does not follow what is there.
    #[error("entry {next} is to be indexed next, not {given}")]
    Gap { next: u64, given: u64 },
    /// It lacks what it had before it failed.
    #[error("the index is being built anew: {indexed} of {reached} entries; try again")]
    Behind { indexed: u64, reached: u64 },
    /// The system's doing.
    #[error("{0}")]
    Io(String),
    /// Background work failed, so that the tree accepts no more.
    #[error("the index's background work failed")]
    Stopped,
    /// Another process has it open.
    #[error("the index is in use by another process")]
    InUse,
    /// It contradicts itself.
    #[error("{0}")]
    Damaged(String),
}

pub(super) struct Tree {
    indexed: AtomicU64,
    keys: Keyspace,
    database: Database,
}

impl Tree {
    /// Opens the tree in `dir`, creating it if there is none.
    pub(super) fn open(dir: &Path) -> Result<Self, Failure> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|error| Failure::Io(error.to_string()))?;
        let database = Database::builder(dir).cache_size(CACHE_BYTES).worker_threads(WORKERS).max_cached_files(Some(OPEN_FILES)).open()?;
        let keys = database.keyspace("index", options)?;
        let indexed = match keys.get(INDEXED_KEY)? {
            None => 0,
            Some(state) => match state.split_first() {
                Some((&FORMAT, count)) if count.len() == 8 => u64::from_be_bytes(count.try_into().unwrap_or_default()),
                _ => return Err(Failure::Damaged("it has another format".into())),
            },
        };
        Ok(Self { indexed: indexed.into(), keys, database })
    }

    /// How many entries are indexed.
    pub(super) fn indexed(&self) -> u64 {
        self.indexed.load(Ordering::Acquire)
    }

    /// Adds `terms` (sorted) of `entries` and new dictionary `values`, all or nothing.
    pub(super) fn insert<'a>(
        &self,
        terms: &[(TermHash, u64)],
        values: impl Iterator<Item = &'a Term>,
        entries: Range<u64>,
    ) -> Result<(), Failure> {
        if self.indexed() != entries.start {
            return Err(Failure::Gap { next: self.indexed(), given: entries.start });
        }
        let mut batch = self.database.batch();
        for posting in terms.chunk_by(|(left, _), (right, _)| left == right) {
            let [(hash, oldest), ..] = posting else { continue };
            let value = postings::value(posting.iter().map(|(_, index)| *index));
            batch.insert(&self.keys, postings::key(POSTING, *hash, *oldest), value);
        }
        for value in values {
            batch.insert(&self.keys, [&[VALUE, value.dimension], &value.value[..]].concat(), []);
        }
        batch.insert(&self.keys, INDEXED_KEY, [&[FORMAT], &entries.end.to_be_bytes()[..]].concat());
        batch.durability(Some(PersistMode::Buffer)).commit()?;
        self.indexed.store(entries.end, Ordering::Release);
        Ok(())
    }

    /// Indexes under `hash` that are smaller than `before`, newest first, at most `limit`.
    pub(super) fn look_up(&self, hash: TermHash, before: u64, limit: usize) -> Result<Vec<u64>, Failure> {
        let mut found = Vec::new();
        if before == 0 || limit == 0 {
            return Ok(found);
        }
        let range = postings::key(POSTING, hash, before - 1)..=postings::key(POSTING, hash, 0);
        for posting in self.keys.range(range) {
            let (key, value) = posting.into_inner()?;
            let indexes = postings::read(&key, &value).ok_or_else(|| Failure::Damaged("a posting cannot be read".into()))?;
            found.extend(indexes.into_iter().rev().filter(|index| *index < before));
            if found.len() >= limit {
                found.truncate(limit);
                break;
            }
        }
        Ok(found)
    }

    /// Values of `dimension` that begin with `prefix`, in order, after `after`, at most `limit`.
    pub(super) fn values(&self, dimension: u8, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<Bytes>, Failure> {
        let key = |value: &[u8]| [&[VALUE, dimension], value].concat();
        let start = match after {
            Some(after) if after >= prefix => Bound::Excluded(key(after)),
            _ => Bound::Included(key(prefix)),
        };
        let mut values = Vec::new();
        for entry in self.keys.range((start, Bound::Unbounded)).take(limit) {
            let found = entry.key()?;
            match found.strip_prefix(&[VALUE, dimension]).filter(|value| value.starts_with(prefix)) {
                Some(value) => values.push(Bytes::copy_from_slice(value)),
                None => break,
            }
        }
        Ok(values)
    }

    /// Makes durable what was inserted.
    pub(super) fn sync(&self) -> Result<(), Failure> {
        Ok(self.database.persist(PersistMode::SyncAll)?)
    }
}

/// Every question is a scan, which filters would not help; compressed from the third level on, where nearly all of it lies.
fn options() -> KeyspaceCreateOptions {
    KeyspaceCreateOptions::default()
        .max_memtable_size(MEMTABLE_BYTES)
        .filter_policy(FilterPolicy::disabled())
        .data_block_compression_policy(CompressionPolicy::new([CompressionType::None, CompressionType::None, CompressionType::Lz4]))
        .compaction_strategy(Arc::new(Leveled::default().with_table_target_size(TABLE_BYTES)))
}

impl fmt::Debug for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tree").field("indexed", &self.indexed).finish_non_exhaustive()
    }
}

impl From<fjall::Error> for Failure {
    fn from(error: fjall::Error) -> Self {
        match error {
            fjall::Error::Io(error) | fjall::Error::Storage(LsmError::Io(error)) => io(&error),
            fjall::Error::Locked => Self::InUse,
            fjall::Error::Poisoned => Self::Stopped,
            error => Self::Damaged(error.to_string()),
        }
    }
}

/// A file that is missing, or ends where it should not, is damage; anything else may pass.
fn io(error: &std::io::Error) -> Failure {
    use std::io::ErrorKind::{InvalidData, InvalidInput, NotFound, UnexpectedEof};
    match error.kind() {
        NotFound | UnexpectedEof | InvalidData | InvalidInput => Failure::Damaged(error.to_string()),
        _ => Failure::Io(error.to_string()),
    }
}

#[cfg(test)]
impl Tree {
    /// Moves what is in memory to a table, as happens by itself once it is enough.
    pub(super) fn write_table(&self) {
        self.keys.rotate_memtable_and_wait().unwrap();
    }
}
