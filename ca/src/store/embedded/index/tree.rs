//! The LSM tree of the index: a fjall database with two keyspaces, the batches of [`postings`] and a dictionary of values.
//!
//! Filled by sorted tables only, each of them durable and visible as a whole; the batches say how many entries are indexed. Its journal and
//! its memory for single insertions stay empty: through these, an entry would cost three times as much.

use std::fmt;
use std::ops::{Bound, Range};
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use fjall::compaction::Leveled;
use fjall::config::{BloomConstructionPolicy, CompressionPolicy, FilterPolicy, FilterPolicyEntry, PartitioningPolicy, PinningPolicy};
use fjall::{CompressionType, Database, Keyspace, KeyspaceCreateOptions, LsmError};

use super::postings::{self, TermHash};
use super::staged::Staged;
use crate::store::embedded::files::{LogFiles as _, SystemFiles};

/// Memory for blocks of tables. Small, since the CA's whole budget is; the page cache holds more.
const CACHE_BYTES: u64 = 32 << 20;
/// Size of a table file.
const TABLE_BYTES: u64 = 8 << 20;
/// To open one for a question takes longer than to read from it.
const OPEN_FILES: usize = 256;
/// With more than one, one spins while another compacts.
const WORKERS: usize = 1;
/// One look-up in a hundred reads a batch in vain.
const FILTER_BITS_PER_KEY: f32 = 10.0;
/// So many new tables of the dictionary are merged into the others …
const NEW_TABLES: u8 = 8;
/// … and no more are written while so many wait for that, or to be put beside the other batches.
const MAX_NEW_TABLES: usize = 24;
const MAX_WAIT: Duration = Duration::from_secs(60);
const WAIT: Duration = Duration::from_millis(10);
/// Where the library has a directory for each keyspace.
const KEYSPACES: &str = "keyspaces";

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
    /// Which there are, the oldest first; they follow each other without a gap from the first entry on.
    batches: RwLock<Vec<Range<u64>>>,
    postings: Keyspace,
    /// Keys are a dimension and a value. May be ahead of the batches.
    values: Keyspace,
    _database: Database,
}

impl Tree {
    /// Opens the tree in `dir`, creating it if there is none.
    pub(super) fn open(dir: &Path) -> Result<Self, Failure> {
        SystemFiles.create_dir(dir).map_err(|error| io(&error))?;
        let database = Database::builder(dir).cache_size(CACHE_BYTES).worker_threads(WORKERS).max_cached_files(Some(OPEN_FILES)).open()?;
        let filter = FilterPolicyEntry::Bloom(BloomConstructionPolicy::BitsPerKey(FILTER_BITS_PER_KEY));
        let postings = database.keyspace("index", || options(filter))?;
        // Nothing is looked for in the dictionary but ranges, which filters do not help.
        let values = database.keyspace("values", || options(FilterPolicyEntry::None))?;
        // The library does not do it, and would take a keyspace whose directory a power cut took for an empty one.
        sync_dir(&dir.join(KEYSPACES))?;
        Ok(Self { batches: RwLock::new(read_batches(&postings)?), postings, values, _database: database })
    }

    /// How many entries are indexed.
    pub(super) fn indexed(&self) -> u64 {
        let batches = self.batches.read().unwrap_or_else(PoisonError::into_inner);
        batches.last().map_or(0, |newest| newest.end)
    }

    /// Adds what is `staged`, which follows what is there, durably, all or nothing but for values.
    pub(super) fn write(&self, staged: &Staged) -> Result<(), Failure> {
        self.write_values(staged)?;
        let batch = staged.entries();
        wait_for_compaction(&self.postings)?;
        // In the order of the keys, as a table has it.
        let mut table = self.postings.start_ingestion()?;
        table.write(postings::batch_key(batch.start), postings::batch_value(&batch))?;
        let postings = staged.postings();
        for of_term in postings.chunk_by(|(hash, _), (next, _)| hash == next) {
            let hash = of_term[0].0;
            let indexes: Vec<_> = of_term.iter().map(|(_, index)| *index).collect();
            let mut parts = indexes.rchunks(postings::MAX_ENTRIES);
            if let Some(newest) = parts.next() {
                table.write(postings::newest_key(&batch, hash), postings::value(&batch, newest))?;
            }
            for older in parts {
                table.write(postings::older_key(&batch, hash, older[0]), postings::value(&batch, older))?;
            }
        }
        table.finish()?;
        self.batches.write().unwrap_or_else(PoisonError::into_inner).push(batch);
        Ok(())
    }

    fn write_values(&self, staged: &Staged) -> Result<(), Failure> {
        let mut values = staged.values().peekable();
        if values.peek().is_none() {
            return Ok(());
        }
        wait_for_compaction(&self.values)?;
        let mut table = self.values.start_ingestion()?;
        for (dimension, value) in values {
            table.write([&[*dimension], &value[..]].concat(), [])?;
        }
        Ok(table.finish()?)
    }

    /// Indexes under `hash` that are smaller than `before`, newest first, at most `limit`.
    pub(super) fn look_up(&self, hash: TermHash, before: u64, limit: usize) -> Result<Vec<u64>, Failure> {
        let mut found = Vec::new();
        let mut next = before;
        while let Some(batch) = self.batch_before(next).filter(|_| found.len() < limit) {
            self.look_up_in(&batch, hash, before, limit, &mut found)?;
            next = batch.start;
        }
        found.truncate(limit);
        Ok(found)
    }

    /// The newest batch that begins before the entry `before`.
    fn batch_before(&self, before: u64) -> Option<Range<u64>> {
        let batches = self.batches.read().unwrap_or_else(PoisonError::into_inner);
        let behind = batches.partition_point(|batch| batch.start < before);
        batches[..behind].last().cloned()
    }

    fn look_up_in(&self, batch: &Range<u64>, hash: TermHash, before: u64, limit: usize, found: &mut Vec<u64>) -> Result<(), Failure> {
        let damaged = || Failure::Damaged("a posting cannot be read".into());
        let Some(newest) = self.postings.get(postings::newest_key(batch, hash))? else { return Ok(()) };
        let newest = postings::read(batch, &newest).ok_or_else(damaged)?;
        let has_older = newest.len() == postings::MAX_ENTRIES;
        found.extend(newest.into_iter().rev().filter(|index| *index < before));
        if !has_older {
            return Ok(());
        }
        for older in self.postings.range(postings::older_keys(batch, hash, before)) {
            if found.len() >= limit {
                break;
            }
            let older = postings::read(batch, &older.value()?).ok_or_else(damaged)?;
            found.extend(older.into_iter().rev().filter(|index| *index < before));
        }
        Ok(())
    }

    /// Values of `dimension` that begin with `prefix`, in order, after `after`, at most `limit`.
    pub(super) fn values(&self, dimension: u8, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<Bytes>, Failure> {
        let key = |value: &[u8]| [&[dimension], value].concat();
        let start = match after {
            Some(after) if after >= prefix => Bound::Excluded(key(after)),
            _ => Bound::Included(key(prefix)),
        };
        let mut values = Vec::new();
        for entry in self.values.range((start, Bound::Unbounded)).take(limit) {
            let found = entry.key()?;
            match found.strip_prefix(&[dimension]).filter(|value| value.starts_with(prefix)) {
                Some(value) => values.push(Bytes::copy_from_slice(value)),
                None => break,
            }
        }
        Ok(values)
    }
}

fn sync_dir(dir: &Path) -> Result<(), Failure> {
    SystemFiles.sync_dir(dir).map_err(|error| io(&error))
}

/// What the batches say of themselves.
fn read_batches(postings: &Keyspace) -> Result<Vec<Range<u64>>, Failure> {
    let mut batches = Vec::new();
    let mut newest = postings.first_key_value();
    while let Some(first) = newest.take() {
        let (key, value) = first.into_inner()?;
        let batch = postings::read_batch(&key, &value).ok_or_else(|| Failure::Damaged("it has another format".into()))?;
        if batches.last().is_some_and(|newer: &Range<u64>| newer.start != batch.end) {
            return Err(Failure::Damaged(format!("entry {} is in no batch", batch.end)));
        }
        if let Some(before) = batch.start.checked_sub(1) {
            newest = postings.range(postings::batch_key(before)..).next();
            if newest.is_none() {
                return Err(Failure::Damaged(format!("entry {before} is in no batch")));
            }
        }
        batches.push(batch);
    }
    batches.reverse();
    Ok(batches)
}

/// Waits while more tables await compaction than look-ups should have to go through.
fn wait_for_compaction(keyspace: &Keyspace) -> Result<(), Failure> {
    let mut waited = Duration::ZERO;
    while keyspace.l0_table_count() > MAX_NEW_TABLES {
        if waited >= MAX_WAIT {
            return Err(Failure::Stopped);
        }
        std::thread::sleep(WAIT);
        waited += WAIT;
    }
    Ok(())
}

/// A table's index and filter are read in parts, so that what they take of memory does not grow with the tables.
fn options(filter: FilterPolicyEntry) -> KeyspaceCreateOptions {
    KeyspaceCreateOptions::default()
        .filter_policy(FilterPolicy::all(filter))
        .data_block_compression_policy(CompressionPolicy::all(CompressionType::Lz4))
        .filter_block_partitioning_policy(PartitioningPolicy::all(true))
        .index_block_partitioning_policy(PartitioningPolicy::all(true))
        .filter_block_pinning_policy(PinningPolicy::disabled())
        .index_block_pinning_policy(PinningPolicy::disabled())
        .compaction_strategy(Arc::new(Leveled::default().with_l0_threshold(NEW_TABLES).with_table_target_size(TABLE_BYTES)))
}

impl fmt::Debug for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tree").field("batches", &self.batches).finish_non_exhaustive()
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

/// A file that is missing, ends where it should not, or is there before it is created, is damage; anything else may pass.
fn io(error: &std::io::Error) -> Failure {
    use std::io::ErrorKind::{AlreadyExists, InvalidData, InvalidInput, NotFound, UnexpectedEof};
    match error.kind() {
        AlreadyExists | NotFound | UnexpectedEof | InvalidData | InvalidInput => Failure::Damaged(error.to_string()),
        _ => Failure::Io(error.to_string()),
    }
}
