//! The append-only record of every issuance and every act, and the questions it answers.
//!
//! [`Ledger::append_all`] returns once its entries are durable: one durable write serves all requests that arrived meanwhile. Times never
//! decrease. An act ([`Ledger::act`]) raises the epoch and changes the [`State`](acts::State); entries that were prepared under an older epoch
//! are not recorded ([`LedgerError::EpochMoved`]): the caller checks and signs again. Questions ([`Ledger::list`], [`Ledger::show`]) read what is durable and never hold up an append.
//! Refused issuances are no entries: [`Refusals`] keeps the last ones. Where the entries lie is the store's business.

pub mod acts;
mod candidates;
mod checkpoints;
mod committer;
mod contradiction;
pub mod entry;
mod filter;
mod follow;
mod leaf;
mod proof;
mod query;
mod refusals;
mod revoked;
mod scan;
mod standing;
mod terms;
#[cfg(test)]
mod tests;
mod tree;

use std::sync::Arc;
use std::time::Duration;

use chancery_identity::{Clock, TrustDomain, checkpoint};
use tokio::sync::watch;

use self::acts::{ActError, Acts};
pub use self::checkpoints::{Checkpoints, PublishError, Published};
use self::committer::{Append, Committer, Queue};
pub use self::contradiction::Contradiction;
pub use self::entry::{Body, Entry, EntryError, Issuance, Provenance};
pub use self::filter::{FilterError, FingerprintFilter, IdentityFilter, NodeFilter, PodFilter, ServiceAccountFilter};
pub use self::follow::Watch;
pub use self::leaf::Leaf;
pub use self::query::{Identity, MAX_PAGE_SIZE, Page};
pub use self::refusals::{Refusal, RefusalFilter, Refusals};
pub use self::revoked::Revocable;
pub use self::scan::read_identity;
pub use self::standing::{IdentityStanding, OwnCertificate};
pub use self::terms::{DICTIONARY_DIMENSIONS, EntryTerms};
use crate::keys::KeyManager;
use crate::store::{MAX_ENTRY_BYTES, SharedStore, StoreError};

/// Why the ledger did not do what it was asked.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LedgerError {
    /// The queue is full; nothing was recorded, and a later try may succeed.
    #[error("the ledger's queue is full; try again")]
    Busy,
    /// An act was recorded since the entries were prepared; nothing was recorded. Check and sign again.
    #[error("the ledger's epoch has moved on to {current}; check and sign again")]
    EpochMoved {
        /// The epoch to prepare the entries under.
        current: u64,
    },
    /// No room; nothing was recorded. Issuance goes on once there is room.
    #[error("{0}")]
    Full(StoreError),
    /// A sync failed or the log is damaged: nothing more is recorded, and the process must end.
    #[error("{0}")]
    Failed(StoreError),
    /// The store did not do it, for a reason that may pass.
    #[error("{0}")]
    Store(StoreError),
    /// More than an entry or one durable write may hold.
    #[error("the {what} has {found}; at most {most} are recorded at once")]
    TooLarge {
        /// `entry`, `request`.
        what: &'static str,
        /// `70000 bytes` …
        found: String,
        /// In the same unit.
        most: usize,
    },
    /// An entry that is stored cannot be read.
    #[error("ledger entry {index}: {problem}")]
    Unreadable {
        /// Which.
        index: u64,
        /// What is wrong with it.
        problem: EntryError,
    },
    /// Something that is not in the tree of that size, or not yet.
    #[error("{what} is not in the ledger's tree of {size} entries")]
    NotInTree {
        /// An entry, a smaller tree, a tile.
        what: String,
        /// How many entries the tree has.
        size: u64,
    },
    /// An act, or a recorded state, that this CA did not make. Nothing may go on: who is banned and what is revoked cannot be told.
    #[error(
        "ledger entry {index}, which decides about roots, bans and revocations, is not accepted: {problem}. Somebody or something changed the \
         ledger: keep a copy of it, and restore the newest backup"
    )]
    Act {
        /// Which.
        index: u64,
        /// What is wrong with it.
        problem: ActError,
    },
    /// Acts that the log's head counts were not found.
    #[error(
        "the ledger's head counts {recorded} acts of operators, and {found} were found. Stop the CA, move the ledger's `index` directory away and \
         start again, which builds it anew; if that does not help, restore the newest backup"
    )]
    ActsMissing {
        /// So many.
        found: u64,
        /// So many should be there.
        recorded: u64,
    },
    /// An act that the state does not allow; nothing was recorded.
    #[error("{0}")]
    Impossible(String),
    /// The key that signs acts.
    #[error("the ledger's keys: {0}")]
    ActsKey(String),
    /// An act or a state is recorded by [`Ledger::act`] alone, which signs it.
    #[error("acts and states are not recorded unsigned")]
    Unsigned,
    /// No checkpoint could be published; [`PublishError`] says more.
    #[error("{0}")]
    Unpublished(String),
    /// A page of no or too many identities.
    #[error("a page has 1 to {MAX_PAGE_SIZE} identities, not {0}")]
    PageSize(usize),
    /// A page token that this ledger did not give, or gave for another filter.
    #[error("the page token {0}; start again without one")]
    PageToken(&'static str),
    /// A place that the ledger has not come to.
    #[error("there is no entry {index} to go on from: the ledger has {entries}. Is it the same ledger as before?")]
    NotThere {
        /// Which.
        index: u64,
        /// How many there are.
        entries: u64,
    },
    /// A beginning that more than one fingerprint has.
    #[error("{field} {beginning} fits more than one certificate ({}); give more of it", found.join(", "))]
    Ambiguous {
        /// As in `operator.proto`.
        field: &'static str,
        /// Hex.
        beginning: String,
        /// Some of those that it fits, first halves, hex.
        found: Vec<String>,
    },
    /// An agent has proven that this ledger is not the one that it was; nothing is recorded.
    #[error("{0}")]
    Contradicted(Arc<Contradiction>),
    /// The ledger was closed.
    #[error("the ledger is closed")]
    Closed,
}

impl LedgerError {
    /// Whether the same request may succeed later without the doing of whoever asks. In the place of a contradicted ledger comes another one.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Busy | Self::EpochMoved { .. } | Self::Full(_) | Self::Store(_) | Self::Contradicted(_) | Self::Closed)
    }
}

/// Whether the ledger records.
#[derive(Clone, Debug)]
pub enum LedgerHealth {
    /// The last durable write succeeded, or there was none yet.
    Ok,
    /// There is no room. Goes back to `Ok` with the first write that succeeds.
    Full(StoreError),
    /// The store refused or could not be reached; the next write tries again.
    Unavailable(StoreError),
    /// Nothing more is recorded: the process must end, and the next start recovers.
    Failed(StoreError),
    /// Nothing more is recorded, and the next start is refused: an agent has proven that this ledger is not the one that it was.
    Contradicted(Arc<Contradiction>),
}

impl LedgerHealth {
    /// What [`Self::name`] may be.
    pub const NAMES: [&'static str; 5] = ["ok", "full", "unavailable", "failed", "contradicted"];

    /// In one word, for metrics.
    pub fn name(&self) -> &'static str {
        let [ok, full, unavailable, failed, contradicted] = Self::NAMES;
        match self {
            Self::Ok => ok,
            Self::Full(_) => full,
            Self::Unavailable(_) => unavailable,
            Self::Failed(_) => failed,
            Self::Contradicted(_) => contradicted,
        }
    }
}

/// What a ledger is told when it is opened.
#[derive(Clone, Debug)]
pub struct LedgerOptions {
    /// Part of the log's origin.
    pub trust_domain: TrustDomain,
    /// Where the key that signs acts lives; apart from the CA's keys.
    pub keys: Arc<dyn KeyManager>,
    /// The longest lifetime that any certificate is issued with now. Questions for unexpired certificates stop at older entries.
    pub longest_lifetime: Duration,
    /// How many bytes of entries may wait for a durable write.
    pub queue_bytes: usize,
}

impl LedgerOptions {
    /// A lifetime of a day, and 8 MiB: about 10,000 issuances.
    pub fn new(trust_domain: TrustDomain, keys: Arc<dyn KeyManager>) -> Self {
        Self { trust_domain, keys, longest_lifetime: Duration::from_secs(24 * 60 * 60), queue_bytes: 8 << 20 }
    }
}

/// Counters since the ledger was opened, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LedgerStats {
    /// Durable writes.
    pub groups: u64,
    /// Entries that they recorded.
    pub entries: u64,
    /// Entries in the last durable write.
    pub last_group_entries: u64,
    /// Time spent waiting for durable writes, together.
    pub commit_time: Duration,
    /// What the last durable write took, or the one under way has taken so far if that is longer.
    pub commit_latency: Duration,
    /// Requests that wait for a durable write now.
    pub queued_requests: u64,
    /// Requests refused because the queue was full.
    pub refused_busy: u64,
}

/// The ledger; clones share it.
#[derive(Clone, Debug)]
pub struct Ledger {
    store: SharedStore,
    clock: Arc<dyn Clock>,
    queue: Arc<Queue>,
    acts: Arc<Acts>,
    origin: Arc<str>,
    longest_lifetime: Arc<query::LongestLifetime>,
}

impl Ledger {
    /// Opens the ledger in `store`, which was told [`EntryTerms`] and [`DICTIONARY_DIMENSIONS`]. Starts a task that ends with the last clone.
    /// Records nothing by itself, until [`Self::record_states`]: whether this is the ledger that was published is not known yet.
    ///
    /// # Errors
    /// If the store cannot be read, its last entry is of a newer version, or an act in it is not this CA's own.
    pub async fn open(store: SharedStore, clock: Arc<dyn Clock>, options: LedgerOptions) -> Result<Self, LedgerError> {
        let longest_lifetime = query::LongestLifetime::open(&store, options.longest_lifetime).await?;
        let origin = checkpoint::origin(&options.trust_domain, store.log_id());
        let acts = Arc::new(Acts::open(&store, options.keys, origin.clone()).await?);
        let queue = Arc::new(Committer::start(Arc::clone(&store), Arc::clone(&clock), options.queue_bytes).await?);
        Ok(Self { store, clock, queue, acts, origin: origin.into(), longest_lifetime: Arc::new(longest_lifetime) })
    }

    /// Records the state whenever a segment of the log was sealed, from now on, in a task that ends with the last clone.
    pub fn record_states(&self) {
        let (acts, store, queue) = (Arc::clone(&self.acts), Arc::clone(&self.store), Arc::downgrade(&self.queue));
        tokio::spawn(acts::recorder::run(acts, store, queue, self.queue.sealed()));
    }

    /// Records `body` durably, whatever the epoch, and returns its index.
    pub async fn append(&self, body: Body) -> Result<u64, LedgerError> {
        let indexes = self.append_all(vec![body]).await?;
        indexes.first().copied().ok_or(LedgerError::Closed)
    }

    /// Records `bodies` durably in one write, in their order, whatever the epoch, and returns their indexes.
    pub async fn append_all(&self, bodies: Vec<Body>) -> Result<Vec<u64>, LedgerError> {
        self.enqueue(None, bodies).await
    }

    /// Like [`Self::append_all`], if no act was recorded since `epoch` was read from [`Self::epoch`].
    ///
    /// # Errors
    /// [`LedgerError::EpochMoved`] if one was: what `bodies` rest on (roots, bans) may have changed.
    pub async fn append_all_at(&self, epoch: u64, bodies: Vec<Body>) -> Result<Vec<u64>, LedgerError> {
        let appended = self.enqueue(Some(epoch), bodies).await;
        if let Err(LedgerError::EpochMoved { current }) = &appended {
            // So that the caller, who tries again at once, finds the state of that epoch.
            self.acts.catch_up(&self.store, *current).await?;
        }
        appended
    }

    /// The epoch under which entries are to be prepared now: the state's.
    pub fn epoch(&self) -> u64 {
        self.acts.current().epoch
    }

    /// What tells this log from every other: `<trust domain>/chancery/<log ID>`.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// How many entries are durable.
    pub fn entries(&self) -> u64 {
        self.queue.head().entries
    }

    /// Whether the ledger records, and word of every change of that.
    pub fn health(&self) -> watch::Receiver<LedgerHealth> {
        self.queue.health()
    }

    /// Counters for metrics.
    pub fn stats(&self) -> LedgerStats {
        self.queue.stats()
    }

    /// The store that the entries lie in, for what is no entry (cells, leases).
    pub fn store(&self) -> &SharedStore {
        &self.store
    }

    /// Notes durably that certificates may live up to `lifetime` from now on. To be called before the first one is issued.
    pub async fn allow_lifetime(&self, lifetime: Duration) -> Result<(), LedgerError> {
        self.longest_lifetime.raise(&self.store, lifetime).await
    }

    /// Accepts no more, records what was accepted, and closes the store.
    pub async fn close(&self) -> Result<(), LedgerError> {
        self.queue.close().await;
        self.store.close().await.map_err(LedgerError::from)
    }

    async fn enqueue(&self, epoch: Option<u64>, bodies: Vec<Body>) -> Result<Vec<u64>, LedgerError> {
        if bodies.is_empty() {
            return Ok(Vec::new());
        }
        if bodies.iter().any(|body| matches!(body, Body::Act(_) | Body::State(_))) {
            return Err(LedgerError::Unsigned);
        }
        let append = Append::encode(epoch, bodies)?;
        let indexes = self.queue.append(append).await?;
        Ok(indexes.collect())
    }
}

impl From<StoreError> for LedgerError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Full { .. } => Self::Full(error),
            StoreError::NotDurable { .. } | StoreError::Damaged { .. } => Self::Failed(error),
            StoreError::Closed => Self::Closed,
            _ => Self::Store(error),
        }
    }
}
