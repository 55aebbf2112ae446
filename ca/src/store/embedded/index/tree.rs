//! The LSM tree of the index: a fjall database with one keyspace.
//!
//! Filled by sorted tables only, each of them durable and visible as a whole, with the count of indexed entries in it. Its journal and its
//! memory for single insertions stay empty: through these, an entry would cost three times as much.

use std::fmt;
use std::fs::DirBuilder;
use std::ops::Bound;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use fjall::compaction::Leveled;
use fjall::config::{CompressionPolicy, FilterPolicy};
use fjall::{CompressionType, Database, Keyspace, KeyspaceCreateOptions, LsmError};

use super::postings::{self, TermHash};
use super::staged::Staged;

/// Memory for blocks of tables. Small, since the CA's whole budget is; the page cache holds more.
const CACHE_BYTES: u64 = 32 << 20;
/// Size of a table file.
const TABLE_BYTES: u64 = 8 << 20;
/// To open one for a question takes longer than to read from it.
const OPEN_FILES: usize = 256;
/// With more than one, one spins while another compacts.
const WORKERS: usize = 1;
/// So many new tables are merged into the others …
const NEW_TABLES: u8 = 8;
/// … and no more are written while so many wait for that.
const MAX_NEW_TABLES: usize = 24;
const MAX_WAIT: Duration = Duration::from_secs(60);
const WAIT: Duration = Duration::from_millis(10);

/// First byte of a key: what it is.
const STATE: u8 = 0;
const VALUE: u8 = 1;
const POSTING: u8 = 2;
/// Under this key: format (one byte) and how many entries are indexed.
const INDEXED_KEY: [u8; 1] = [STATE];
/// Raised when keys, values or the meaning of terms change; a tree of another format is built anew.
const FORMAT: u8 = 3;

/// Why the tree did not do it.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
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
    _database: Database,
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
        Ok(Self { indexed: indexed.into(), keys, _database: database })
    }

    /// How many entries are indexed.
    pub(super) fn indexed(&self) -> u64 {
        self.indexed.load(Ordering::Acquire)
    }

    /// Adds what is `staged`, which follows what is there, durably, all or nothing.
    pub(super) fn write(&self, staged: &Staged) -> Result<(), Failure> {
        self.wait_for_compaction()?;
        let end = staged.entries().end;
        // In the order of the keys, as a table has it.
        let mut table = self.keys.start_ingestion()?;
        table.write(INDEXED_KEY, [&[FORMAT], &end.to_be_bytes()[..]].concat())?;
        for (dimension, value) in staged.values() {
            table.write([&[VALUE, *dimension], &value[..]].concat(), [])?;
        }
        for entries in postings::partitions(staged.entries()) {
            let mut indexes = Vec::new();
            let mut postings = staged.postings(&entries).peekable();
            while let Some((hash, index)) = postings.next() {
                indexes.push(index);
                if postings.peek().is_none_or(|(next, _)| *next != hash) {
                    // Newest first, as the keys have it.
                    for posting in indexes.rchunks(postings::MAX_ENTRIES) {
                        table.write(postings::key(POSTING, hash, posting[0]), postings::value(posting.iter().copied()))?;
                    }
                    indexes.clear();
                }
            }
        }
        table.finish()?;
        self.indexed.store(end, Ordering::Release);
        Ok(())
    }

    /// Waits while more tables await compaction than look-ups should have to go through.
    fn wait_for_compaction(&self) -> Result<(), Failure> {
        let mut waited = Duration::ZERO;
        while self.keys.l0_table_count() > MAX_NEW_TABLES {
            if waited >= MAX_WAIT {
                return Err(Failure::Stopped);
            }
            std::thread::sleep(WAIT);
            waited += WAIT;
        }
        Ok(())
    }

    /// Indexes under `hash` that are smaller than `before`, newest first, at most `limit`.
    pub(super) fn look_up(&self, hash: TermHash, before: u64, limit: usize) -> Result<Vec<u64>, Failure> {
        let mut found = Vec::new();
        if limit == 0 {
            return Ok(found);
        }
        let partitions = postings::partitions(0..before.min(self.indexed()));
        for posting in partitions.flat_map(|entries| self.keys.range(postings::keys(POSTING, hash, &entries))) {
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
}

/// Every question is a scan, which filters would not help. Merging eight new tables at once, and small ones, halves what compaction costs.
fn options() -> KeyspaceCreateOptions {
    KeyspaceCreateOptions::default()
        .filter_policy(FilterPolicy::disabled())
        .data_block_compression_policy(CompressionPolicy::all(CompressionType::Lz4))
        .compaction_strategy(Arc::new(Leveled::default().with_l0_threshold(NEW_TABLES).with_table_target_size(TABLE_BYTES)))
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
