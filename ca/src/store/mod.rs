//! Where the ledger's entries lie: one async trait, engines behind it.
//!
//! The trait speaks the ledger's language, never key-value: a group of entries is committed at an expected head, entries are read by
//! index, looked up by term newest first; small cells change by compare-and-swap; a lease carries an epoch that fences.
//! [`embedded`] is the default engine: append-only segments, an LSM index behind the commit, sled for what can be rebuilt.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

#[cfg(any(test, feature = "testing"))]
#[allow(clippy::unwrap_used, reason = "these are tests, also when another crate runs them")]
pub mod contract;
pub mod embedded;

/// The longest entry, in bytes.
pub const MAX_ENTRY_BYTES: usize = 65_535;

/// The most bytes that the entries of one group may have together.
pub const MAX_GROUP_BYTES: usize = 4 << 20;

/// The most entries that one group may have.
pub const MAX_GROUP_ENTRIES: usize = 16_384;

/// The most bytes that a cell holds.
pub const MAX_CELL_BYTES: usize = 64 << 10;

/// The end of the log: everything before it is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// How many entries there are; the next one's index.
    pub entries: u64,
    /// Raised by every act. A group signed under an older epoch is not committed.
    pub epoch: u64,
    /// Hash of the last group's frame; zero while there is none.
    pub frame: [u8; 32],
}

/// Entries that become durable together or not at all.
#[derive(Clone, Debug, Default)]
pub struct Group {
    /// Encoded; each 1 to [`MAX_ENTRY_BYTES`] bytes, at least one and at most [`MAX_GROUP_ENTRIES`], together at most [`MAX_GROUP_BYTES`].
    pub entries: Vec<Bytes>,
    /// Whether an act is among them, so that the epoch grows by one.
    pub raises_epoch: bool,
}

/// Under which words an entry can be found. The engine hashes `value` with `dimension`; a look-up may therefore return an entry that only
/// collides, and the ledger compares once more.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Term {
    /// Which question it answers; the ledger numbers them.
    pub dimension: u8,
    /// The word: a SPIFFE ID, a serial, a pod's UID …
    pub value: Bytes,
}

/// Tells an entry's terms from its bytes, so that an engine can build its index anew.
pub trait Terms: Debug + Send + Sync {
    /// All terms of `entry`; none for bytes that it does not understand.
    fn terms(&self, entry: &Bytes) -> Vec<Term>;
}

/// Why the store refused or failed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Somebody else committed; read the head again.
    #[error("the log has moved on to {0:?}")]
    HeadMoved(Head),
    /// No room; nothing was written, and a later try may succeed.
    #[error("no space left for the ledger in {place}: {detail}")]
    Full {
        /// Directory or database.
        place: String,
        /// Needed and left.
        detail: String,
    },
    /// A sync failed: what it covered is in doubt, and the process must end (the next start recovers).
    #[error("the ledger could not be made durable in {place}: {detail}; the process ends so that the next start recovers")]
    NotDurable {
        /// File or database.
        place: String,
        /// What the system said.
        detail: String,
    },
    /// What is stored contradicts itself. Never repaired silently.
    #[error("the ledger is damaged at {place}: {detail}")]
    Damaged {
        /// Segment and offset.
        place: String,
        /// What does not fit.
        detail: String,
    },
    /// Another process has it open.
    #[error("{0} is in use by another process")]
    InUse(String),
    /// It was written by a newer version, in a format that this one does not know.
    #[error("{place} has the ledger format {found}, and this version reads up to {known}; use {reader}")]
    NewerFormat {
        /// Directory or database.
        place: String,
        /// The format's number there.
        found: u32,
        /// The newest format that this version reads.
        known: u32,
        /// Which version of Chancery reads it.
        reader: String,
    },
    /// The store was closed, or is closing.
    #[error("the ledger's store is closed")]
    Closed,
    /// An entry or a group that is too large, or an index beyond the head.
    #[error("{0}")]
    Invalid(String),
    /// Anything else of the system's.
    #[error("{place}: {detail}")]
    Io {
        /// File or database.
        place: String,
        /// What the system said.
        detail: String,
    },
}

/// A right to do once-only duties until it ends; `epoch` grows with every holder, so that a late one is recognised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// What for.
    pub name: String,
    /// Fences: acts under a smaller one are refused.
    pub epoch: u64,
}

/// A store of entries. Implementations pass the same contract tests (`store/contract.rs`).
#[async_trait]
pub trait Store: Debug + Send + Sync {
    /// What tells this log from every other one: chosen at random when it is begun, and never changed.
    fn log_id(&self) -> [u8; 16];

    /// How many entries lie in parts of the log that are complete and never written again; 0 for an engine that knows no such parts.
    fn sealed(&self) -> u64;

    /// The head as it is durable now.
    async fn head(&self) -> Result<Head, StoreError>;

    /// Appends `group` durably if the head is still `expected`, and returns the new one. When it returns, no crash can lose the group.
    async fn commit(&self, expected: Head, group: Group) -> Result<Head, StoreError>;

    /// Tries to make room for more groups, for a caller that was told [`StoreError::Full`]; it still is while there is none.
    async fn make_room(&self) -> Result<(), StoreError>;

    /// Notes durably that `head` was shown to others: from now on the store refuses to open a log that ends before it. A head that is older
    /// than one noted before changes nothing.
    async fn publish_checkpoint(&self, head: Head) -> Result<(), StoreError>;

    /// The entries of `range`, at most `max_bytes` of them (but at least one), in order.
    async fn read(&self, range: Range<u64>, max_bytes: usize) -> Result<Vec<Bytes>, StoreError>;

    /// The entries of these indexes, in their order. For a few, far from each other.
    async fn read_each(&self, indexes: Vec<u64>) -> Result<Vec<Bytes>, StoreError> {
        let mut entries = Vec::with_capacity(indexes.len());
        for index in indexes {
            entries.extend(self.read(index..index + 1, MAX_ENTRY_BYTES).await?);
        }
        Ok(entries)
    }

    /// Indexes of entries that have `term`, newest first, all smaller than `before`; at most `limit`. Waits until the index has caught up with
    /// the head at the time of the call.
    async fn look_up(&self, term: &Term, before: u64, limit: usize) -> Result<Vec<u64>, StoreError>;

    /// Distinct values of `dimension` that begin with `prefix`, in order, after `after`; at most `limit`. Only for dimensions that the engine was
    /// told to keep a dictionary of.
    async fn values(&self, dimension: u8, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<Bytes>, StoreError>;

    /// The hashes of a level of the tree (RFC 6962, SHA-256) over the entries' bytes, in order: `range` of the roots of complete subtrees of
    /// 256^`level` entries each, so that level 0 are the entries' own hashes. Waits until the tree has caught up with them.
    async fn hashes(&self, level: u8, range: Range<u64>) -> Result<Vec<[u8; 32]>, StoreError>;

    /// The content of a small cell. A cell may vanish when its storage is damaged: what must not be lost is an entry.
    async fn cell(&self, name: &str) -> Result<Option<Bytes>, StoreError>;

    /// Sets a small cell to `new` (at most [`MAX_CELL_BYTES`]) if it still holds `expected`; tells whether it did.
    async fn compare_and_swap(&self, name: &str, expected: Option<&[u8]>, new: Option<Bytes>) -> Result<bool, StoreError>;

    /// Takes or prolongs a lease for `holder`; nothing if somebody else has it.
    async fn lease(&self, name: &str, holder: &str, for_: Duration) -> Result<Option<Lease>, StoreError>;

    /// Reads and checks everything that is stored, at most `bytes_per_second` on average, and tells how many bytes that were.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] with the first place that is not as it was written. Nothing is repaired.
    async fn scrub(&self, bytes_per_second: u64) -> Result<u64, StoreError>;

    /// Waits until the store can commit nothing more (a sync failed), and tells why. The process must end then; the next start recovers.
    async fn failed(&self) -> StoreError;

    /// Stops accepting, finishes what was accepted, and closes cleanly.
    async fn close(&self) -> Result<(), StoreError>;
}

/// A store that several parts share.
pub type SharedStore = Arc<dyn Store>;
