//! The default engine: append-only segments, an index behind the commit, and sled for what is small and can be rebuilt.
//!
//! ```text
//! lock         claimed by the one process that has it open
//! version      the format, and the oldest version that reads it
//! checkpoint   the last published checkpoint: the log is never cut below it
//! closed       where the log ended when it was closed cleanly; away while it is open
//! log/         the segments, and the spare that becomes the next one; the only thing that cannot be rebuilt
//! index/       finds entries by term; rebuilt from the log when it is missing or damaged
//! tree/        the hashes of the Merkle tree over the entries; rebuilt likewise
//! catalogue/   cells and leases; begun anew when it is damaged
//! ```
//!
//! One thread writes the log ([`committer`]), one the index and one the tree ([`follower`]); readers use none of them.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use chancery_identity::Clock;

use self::catalogue::Catalogue;
use self::checkpoint::Checkpoints;
use self::committer::Committer;
use self::directory::Directory;
use self::files::{LogFiles, SystemFiles};
use self::follower::Follower;
use self::index::Index;
use self::log::Layout;
use self::merkle::HashTree;
use self::reader::Segments;
use self::segment::LogId;
use super::{Group, Head, Lease, MAX_ENTRY_BYTES, Store, StoreError, Term, Terms};

pub mod audit;
mod catalogue;
mod checkpoint;
mod committer;
mod directory;
#[cfg(any(test, feature = "testing"))]
pub mod faulty;
pub mod files;
mod follower;
mod frame;
mod index;
mod log;
#[cfg(test)]
mod log_tests;
mod merkle;
#[cfg(test)]
mod merkle_tests;
#[cfg(test)]
pub(crate) mod power_cuts;
#[cfg(test)]
mod properties;
mod reader;
mod recovery;
mod segment;
#[cfg(test)]
mod store_tests;

/// The sizes that a segment may have, in bytes. Opening reads one whole segment, and offsets have 32 bits.
const SEGMENT_BYTES: std::ops::RangeInclusive<u64> = 4096..=256 << 20;

/// How an [`EmbeddedStore`] is laid out and what it is told about the entries.
#[derive(Clone, Debug)]
pub struct Options {
    /// Tells an entry's terms, so that it can be found.
    pub terms: Arc<dyn Terms>,
    /// The dimensions whose distinct values can be listed.
    pub dictionary_dimensions: Vec<u8>,
    /// Size of a segment in bytes, allocated in advance.
    pub segment_bytes: u64,
    /// How much at the end of a segment only a group with an act may fill while there is no room for another segment, in bytes.
    pub act_reserve_bytes: u64,
    /// Tells when leases end.
    pub clock: Arc<dyn Clock>,
    /// What the log lies on.
    pub files: Arc<dyn LogFiles>,
}

impl Options {
    /// Segments of 16 MiB, 256 KiB of which are reserved for acts, on the machine's file system.
    pub fn new(terms: Arc<dyn Terms>, clock: Arc<dyn Clock>) -> Self {
        let (segment_bytes, act_reserve_bytes) = (16 << 20, 256 << 10);
        Self { terms, dictionary_dimensions: Vec::new(), segment_bytes, act_reserve_bytes, clock, files: Arc::new(SystemFiles) }
    }
}

/// A store that was opened.
#[derive(Debug)]
pub struct Opened {
    /// The store, which can be used at once; its index may still catch up.
    pub store: EmbeddedStore,
    /// What had to be repaired, one sentence each; also logged as warnings.
    pub repairs: Vec<String>,
}

/// The ledger's entries in a directory of this machine. Dropping it without [`Store::close`] waits for the commit under way, and makes the
/// next opening a little slower.
#[derive(Debug)]
pub struct EmbeddedStore {
    id: LogId,
    segments: Arc<Segments>,
    checkpoints: Arc<Checkpoints>,
    committer: Arc<Committer>,
    index: Arc<Follower<Index>>,
    tree: Arc<Follower<HashTree>>,
    catalogue: Arc<Catalogue>,
    is_closed: AtomicBool,
    _directory: Arc<Directory>,
}

impl EmbeddedStore {
    /// Opens the store in `dir`, creating it if there is none. Refused are a directory in use, one in a newer format, and a damaged log.
    pub async fn open(dir: &Path, options: Options) -> Result<Opened, StoreError> {
        let dir = dir.to_owned();
        blocking(move || Self::open_blocking(&dir, &options)).await
    }

    fn open_blocking(dir: &Path, options: &Options) -> Result<Opened, StoreError> {
        if !SEGMENT_BYTES.contains(&options.segment_bytes) {
            let detail = format!("segments of {} bytes: they may have {SEGMENT_BYTES:?}", options.segment_bytes);
            return Err(StoreError::Invalid(detail));
        }
        let directory = Arc::new(Directory::claim(dir)?);
        let layout = Layout { segment_bytes: options.segment_bytes, act_reserve_bytes: options.act_reserve_bytes };
        let (log, mut repairs) = recovery::open(options.files.clone(), dir, layout)?;
        let catalogue = Arc::new(Catalogue::open(&dir.join("catalogue"), options.clock.clone(), &mut repairs)?);
        let index = Index::open(&dir.join("index"), options.terms.clone(), &options.dictionary_dimensions)?;
        let (id, segments, checkpoints) = (log.id(), log.segments().clone(), log.checkpoints().clone());
        let tree = HashTree::open(options.files.clone(), dir.join("tree"), id, &segments)?;
        let index = Follower::start(index, segments.clone(), directory.clone()).map_err(failed_in(dir))?;
        let tree = Follower::start(tree, segments.clone(), directory.clone()).map_err(failed_in(dir))?;
        let committer = Committer::start(log, vec![index.feed(), tree.feed()], directory.clone()).map_err(failed_in(dir))?;
        let store = Self {
            id,
            segments,
            checkpoints,
            committer: Arc::new(committer),
            index: Arc::new(index),
            tree: Arc::new(tree),
            catalogue,
            is_closed: AtomicBool::new(false),
            _directory: directory,
        };
        Ok(Opened { store, repairs })
    }

    /// How many groups were synced since the store was opened.
    pub fn syncs(&self) -> u64 {
        self.segments.syncs()
    }

    fn check_open(&self) -> Result<(), StoreError> {
        if self.is_closed.load(Ordering::Acquire) { Err(StoreError::Closed) } else { Ok(()) }
    }

    /// Tells all threads to end.
    fn stop(&self) {
        self.is_closed.store(true, Ordering::Release);
        self.committer.stop();
        self.index.stop();
        self.tree.stop();
    }
}

#[async_trait]
impl Store for EmbeddedStore {
    fn log_id(&self) -> [u8; 16] {
        self.id
    }

    fn sealed(&self) -> u64 {
        self.segments.open_first()
    }

    async fn head(&self) -> Result<Head, StoreError> {
        self.check_open()?;
        Ok(self.segments.head())
    }

    async fn commit(&self, expected: Head, group: Group) -> Result<Head, StoreError> {
        self.committer.commit(expected, group).await
    }

    async fn make_room(&self) -> Result<(), StoreError> {
        self.committer.make_room().await
    }

    async fn publish_checkpoint(&self, head: Head) -> Result<(), StoreError> {
        self.check_open()?;
        let durable = self.segments.head();
        if head.entries > durable.entries || (head.entries == durable.entries && head != durable) {
            return Err(StoreError::Invalid(format!("the checkpoint with {} entries is not one of this log", head.entries)));
        }
        let checkpoints = self.checkpoints.clone();
        blocking(move || checkpoints.publish(&head)).await
    }

    async fn read(&self, range: Range<u64>, max_bytes: usize) -> Result<Vec<Bytes>, StoreError> {
        self.check_open()?;
        let segments = self.segments.clone();
        blocking(move || segments.read(range, max_bytes)).await
    }

    async fn read_each(&self, indexes: Vec<u64>) -> Result<Vec<Bytes>, StoreError> {
        self.check_open()?;
        let segments = self.segments.clone();
        // One way to another thread and back for all of them, which costs more than to read one.
        blocking(move || {
            let mut entries = Vec::with_capacity(indexes.len());
            for index in indexes {
                entries.extend(segments.read(index..index + 1, MAX_ENTRY_BYTES)?);
            }
            Ok(entries)
        })
        .await
    }

    async fn look_up(&self, term: &Term, before: u64, limit: usize) -> Result<Vec<u64>, StoreError> {
        self.check_open()?;
        let term = term.clone();
        self.index.ask(self.segments.head().entries, move |index| index.look_up(&term, before, limit)).await
    }

    async fn values(&self, dimension: u8, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<Bytes>, StoreError> {
        self.check_open()?;
        let (prefix, after) = (prefix.to_owned(), after.map(<[u8]>::to_owned));
        let question = move |index: &Index| index.values(dimension, &prefix, after.as_deref(), limit);
        self.index.ask(self.segments.head().entries, question).await
    }

    async fn hashes(&self, level: u8, range: Range<u64>) -> Result<Vec<[u8; 32]>, StoreError> {
        self.check_open()?;
        let needed = merkle::entries_below(level, range.end).filter(|needed| *needed <= self.segments.head().entries);
        let needed = needed.ok_or_else(|| StoreError::Invalid(format!("the log does not reach to hash {} of level {level}", range.end)))?;
        self.tree.ask(needed, move |tree| tree.hashes(level, range.clone())).await
    }

    async fn cell(&self, name: &str) -> Result<Option<Bytes>, StoreError> {
        self.check_open()?;
        let (catalogue, name) = (self.catalogue.clone(), name.to_owned());
        blocking(move || catalogue.cell(&name)).await
    }

    async fn compare_and_swap(&self, name: &str, expected: Option<&[u8]>, new: Option<Bytes>) -> Result<bool, StoreError> {
        self.check_open()?;
        let (catalogue, name, expected) = (self.catalogue.clone(), name.to_owned(), expected.map(<[u8]>::to_owned));
        blocking(move || catalogue.compare_and_swap(&name, expected.as_deref(), new.as_deref())).await
    }

    async fn lease(&self, name: &str, holder: &str, for_: Duration) -> Result<Option<Lease>, StoreError> {
        self.check_open()?;
        let (catalogue, name, holder) = (self.catalogue.clone(), name.to_owned(), holder.to_owned());
        blocking(move || catalogue.lease(&name, &holder, for_)).await
    }

    async fn scrub(&self, bytes_per_second: u64) -> Result<u64, StoreError> {
        let mut total = 0;
        for first in self.segments.firsts() {
            self.check_open()?;
            let segments = self.segments.clone();
            let bytes = blocking(move || segments.scrub(first)).await?;
            total += bytes;
            tokio::time::sleep(Duration::from_millis(bytes.saturating_mul(1000) / bytes_per_second.max(1))).await;
        }
        Ok(total)
    }

    async fn failed(&self) -> StoreError {
        self.committer.failed().await
    }

    async fn close(&self) -> Result<(), StoreError> {
        self.stop();
        let (committer, index, tree) = (self.committer.clone(), self.index.clone(), self.tree.clone());
        blocking(move || {
            committer.join();
            index.join();
            tree.join();
            Ok(())
        })
        .await
    }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        self.stop();
        self.committer.join();
        self.index.join();
        self.tree.join();
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, StoreError> + Send + 'static) -> Result<T, StoreError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(StoreError::Io { place: "the ledger".into(), detail: error.to_string() }))
}

/// Turns what the system said about `path` into the error of that place.
fn failed_in(path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    move |error| {
        let (place, detail) = (path.display().to_string(), error.to_string());
        if is_full(&error) { StoreError::Full { place, detail } } else { StoreError::Io { place, detail } }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn damaged(path: &Path, offset: u64, detail: String) -> StoreError {
    StoreError::Damaged { place: format!("{}, offset {offset}", path.display()), detail }
}

fn remove_if_there(files: &dyn LogFiles, path: &Path) -> io::Result<()> {
    match files.remove(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
