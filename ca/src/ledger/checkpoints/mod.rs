//! The ledger's published checkpoints: signed, durable apart from the log, and each one the beginning of the next.
//!
//! Publishing is a compare-and-swap on the last one: before a new checkpoint is signed, the tree of the last one must be shown to be the
//! beginning of the new tree, and before it is shown to anybody, the log's floor is moved up to it and the note is in its file. So whatever
//! happens to the log, this CA never signs a second history: opening refuses a log that ends before the published checkpoint or has other
//! entries, which is what an old backup looks like.
//!
//! What agents remember is held against the ledger as well. A checkpoint of this CA's that the ledger does not continue
//! ([`Ledger::contradicted`]) is kept beside the published one, in `checkpoint.conflict`: nothing more is published, and opening refuses the log
//! for it too.
//!
//! A checkpoint is published at most once a second while entries arrive ([`Checkpoints::run`]), and on demand ([`Checkpoints::publish`]).

mod file;
mod keys;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use chancery_identity::Clock;
use chancery_identity::checkpoint::{Checkpoint, CheckpointError, CheckpointVerifier, ProofError, empty_root, verify, verify_consistency};
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use self::file::CheckpointFile;
use self::keys::SigningKeys;
use super::acts::{CA_ACTOR, Change};
use super::{Contradiction, Ledger, LedgerError};
use crate::keys::{KeyError, KeyManager};
use crate::store::embedded::files::LogFiles;

/// The extension of the file with a checkpoint that the ledger does not continue.
const CONFLICT: &str = "conflict";
/// How often [`Checkpoints::run`] looks whether there are new entries.
const EVERY: Duration = Duration::from_secs(1);
/// How long checkpoints carry the signatures of both keys after a rotation: agents and auditors learn of the newer one meanwhile.
pub(super) const OVERLAP: Duration = Duration::from_secs(30 * 24 * 60 * 60);
const UNDER_WAY: &str = "a rotation of the checkpoints' key is under way: both keys sign for 30 days, and then the older one is destroyed";

/// Why a checkpoint is not published, or the ledger does not fit the one that was.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError {
    /// The ledger.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// A key, or the key manager.
    #[error("the keys that sign the ledger's checkpoints: {0}")]
    Key(String),
    /// A signature that does not fit, or a key of another kind.
    #[error("the signature of the ledger's checkpoint: {0}")]
    Signature(#[from] CheckpointError),
    /// The file cannot be read or written.
    #[error("the ledger's checkpoint {}: {problem}", path.display())]
    File {
        /// Where it is.
        path: PathBuf,
        /// What the system said.
        problem: String,
    },
    /// What is in the file is not a checkpoint of this CA's.
    #[error(
        "the ledger's checkpoint {} is not accepted: {problem}. Restore the ledger, this file and `ledger-keys` from the same backup (`chancery-ca restore`)",
        path.display()
    )]
    Unreadable {
        /// Where it is.
        path: PathBuf,
        /// Why not.
        problem: CheckpointError,
    },
    /// Entries that were published are missing.
    #[error(
        "the ledger has {entries} entries, and a checkpoint with {published} was published ({}): entries are missing, as after restoring an old \
         backup. Keep a copy of the data directory, and restore the newest backup (`chancery-ca restore FILE --checkpoint` says whether it has \
         them); if none has, `--accept-loss --reason` begins a new ledger, which says what is missing",
        path.display()
    )]
    EntriesMissing {
        /// In the log.
        entries: u64,
        /// In the checkpoint.
        published: u64,
        /// Of the checkpoint.
        path: PathBuf,
    },
    /// The entries are others than those that were published.
    #[error(
        "the ledger's first {size} entries have the root {found}, and a checkpoint with the root {published} was published ({}): this is another \
         history. Keep a copy of it, and restore the newest backup of the published one (`chancery-ca restore`); if there is none, `--accept-loss \
         --reason` begins a new ledger",
        path.display()
    )]
    OtherHistory {
        /// Entries in the checkpoint.
        size: u64,
        /// Of the log; hexadecimal.
        found: String,
        /// Of the checkpoint; hexadecimal.
        published: String,
        /// Of the checkpoint.
        path: PathBuf,
    },
    /// The tree does not continue the last checkpoint.
    #[error(
        "nothing is published, since the ledger does not continue its last checkpoint: {0}. Stop the CA, keep a copy of the data directory, and restore the newest backup (`chancery-ca restore`)"
    )]
    Fork(ProofError),
}

/// A checkpoint as it was shown to everybody.
#[derive(Clone, Debug)]
pub struct Published {
    /// What it says.
    pub checkpoint: Checkpoint,
    /// It, signed: a C2SP signed note.
    pub note: String,
    /// What verifies it: the newest of the keys that have signed it.
    pub verifier: CheckpointVerifier,
    /// The keys that have signed it, the oldest first: two while the key is being rotated.
    pub signed_by: Vec<CheckpointVerifier>,
    /// When it was published; for one that an earlier process published, when this one read it.
    pub time: OffsetDateTime,
}

impl Published {
    fn new(checkpoint: Checkpoint, note: String, signed_by: Vec<CheckpointVerifier>, time: OffsetDateTime) -> Result<Self, PublishError> {
        let verifier = signed_by.last().cloned().ok_or_else(|| PublishError::Key("there is none".into()))?;
        Ok(Self { checkpoint, note, verifier, signed_by, time })
    }
}

/// Publishes the checkpoints of one ledger.
#[derive(Debug)]
pub struct Checkpoints {
    ledger: Ledger,
    clock: Arc<dyn Clock>,
    file: CheckpointFile,
    /// The one that an agent showed, and that the ledger does not continue.
    conflict: CheckpointFile,
    keys: RwLock<SigningKeys>,
    newest: watch::Sender<Arc<Published>>,
    /// Held by who publishes or changes keys.
    publishing: tokio::sync::Mutex<()>,
    problem: Mutex<Option<String>>,
}

impl Checkpoints {
    /// Compares the ledger with the checkpoint in the file `path`, and publishes one if there is none or entries were added. Nothing is to be
    /// recorded before. A first key is made where there is neither key nor checkpoint.
    ///
    /// # Errors
    /// If the ledger is not one that continues the published checkpoint: the CA must not start then.
    pub async fn open(
        ledger: Ledger,
        keys: Arc<dyn KeyManager>,
        files: Arc<dyn LogFiles>,
        path: PathBuf,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, PublishError> {
        let conflict = CheckpointFile::new(Arc::clone(&files), path.with_extension(CONFLICT));
        let file = CheckpointFile::new(files, path);
        let mut keys = SigningKeys::load(keys, ledger.origin().to_owned()).await?;
        if let Some(note) = conflict.read().await? {
            check(&ledger, &keys, &conflict, note).await?;
        }
        let (checkpoint, note) = match file.read().await? {
            Some(note) => check(&ledger, &keys, &file, note).await?,
            None => begin(&ledger, &mut keys, &file).await?,
        };
        let signed_by = keys.verifiers().into_iter().filter(|key| key.verify(&note).is_ok()).collect();
        let newest = watch::Sender::new(Arc::new(Published::new(checkpoint, note, signed_by, clock.now())?));
        let checkpoints = Self {
            ledger,
            clock,
            file,
            conflict,
            keys: RwLock::new(keys),
            newest,
            publishing: tokio::sync::Mutex::default(),
            problem: Mutex::default(),
        };
        checkpoints.publish_with(&checkpoints.keys()).await?;
        if checkpoints.conflict.read().await?.is_some() {
            warn!(file = %checkpoints.conflict.path().display(), "the ledger continues the checkpoint that it was in conflict with; it is forgotten");
            checkpoints.conflict.remove().await?;
        }
        Ok(checkpoints)
    }

    /// The newest published checkpoint.
    pub fn newest(&self) -> Arc<Published> {
        Arc::clone(&self.newest.borrow())
    }

    /// The newest one, and word of every newer one.
    pub fn watch(&self) -> watch::Receiver<Arc<Published>> {
        self.newest.subscribe()
    }

    /// What verifies the checkpoints that are published now, the oldest key first: two while the key is being rotated.
    pub fn verifiers(&self) -> Vec<CheckpointVerifier> {
        self.keys().verifiers()
    }

    /// Why no newer one could be published the last time that [`Self::run`] tried.
    pub fn problem(&self) -> Option<String> {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Publishes a checkpoint of everything that is durable now, unless the newest one covers that, and returns it. Callers that come while one
    /// is being published share the next.
    ///
    /// # Errors
    /// If nothing newer could be published; the newest one stays.
    pub async fn publish(&self) -> Result<Arc<Published>, PublishError> {
        let wanted = self.ledger.entries();
        let _publishing = self.publishing.lock().await;
        let newest = self.newest();
        if newest.checkpoint.size >= wanted {
            return Ok(newest);
        }
        self.publish_with(&self.keys()).await
    }

    /// Publishes what is new, at most once a second, until `shutdown`; and then once more. Failures are logged and tried again.
    pub async fn run(&self, shutdown: CancellationToken) {
        let mut ticks = tokio::time::interval(EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while shutdown.run_until_cancelled(ticks.tick()).await.is_some() {
            self.publish_and_tell().await;
        }
        self.publish_and_tell().await;
    }

    /// Makes a new key, records it as an act of `actor`'s for the reason `why`, and signs with both keys for 30 days, after which the older
    /// one is destroyed ([`Self::run`]).
    ///
    /// # Errors
    /// If two sign already. If the key cannot be made or recorded, and else as [`Self::publish`]. The next call, or the next start, goes on with the key that was
    /// made.
    pub async fn rotate_key(&self, actor: &str, why: &str) -> Result<CheckpointVerifier, PublishError> {
        let _publishing = self.publishing.lock().await;
        let mut keys = self.keys();
        let new = match keys.verifiers().as_slice() {
            [_, .., newest] if self.is_recorded(newest) => return Err(LedgerError::Impossible(UNDER_WAY.into()).into()),
            // One that was interrupted.
            [_, .., newest] => newest.clone(),
            _ => keys.add().await?,
        };
        self.record(&new, actor, why).await?;
        self.set_keys(keys.clone());
        self.publish_with(&keys).await?;
        Ok(new)
    }

    /// Records, as an act of the CA's own, each key that signs and is not in the ledger yet: the first one, and that of a rotation which was
    /// interrupted.
    pub async fn record_keys(&self) -> Result<(), PublishError> {
        let _publishing = self.publishing.lock().await;
        for key in self.verifiers() {
            self.record(&key, CA_ACTOR, "this key signs the ledger's checkpoints").await?;
        }
        Ok(())
    }

    async fn record(&self, key: &CheckpointVerifier, actor: &str, why: &str) -> Result<(), PublishError> {
        if !self.is_recorded(key) {
            self.ledger.act(actor, Change::CheckpointKey(*key.public_key()), why).await?;
        }
        Ok(())
    }

    fn is_recorded(&self, key: &CheckpointVerifier) -> bool {
        self.ledger.state().borrow().checkpoint_keys.iter().any(|known| known.key == *key.public_key())
    }

    /// Ends a rotation that is old enough: the older key signs nothing more, and is destroyed.
    async fn retire_older_key(&self) -> Result<(), PublishError> {
        let _publishing = self.publishing.lock().await;
        let mut keys = self.keys();
        let since = self.ledger.state().borrow().checkpoint_key().map(|newest| newest.since);
        if keys.verifiers().len() < 2 || since.is_none_or(|since| self.clock.now() < since + OVERLAP) {
            return Ok(());
        }
        // First, so that there is never a checkpoint in the file that none of the keys has signed.
        self.publish_with(&keys.newest_alone()).await?;
        self.set_keys(keys.newest_alone());
        keys.destroy_older().await?;
        info!("the older key of the ledger's checkpoints signs nothing more, and is destroyed");
        Ok(())
    }

    async fn publish_with(&self, keys: &SigningKeys) -> Result<Arc<Published>, PublishError> {
        if let Some(proof) = self.ledger.contradiction() {
            return Err(LedgerError::Contradicted(proof).into());
        }
        let head = self.ledger.queue.head();
        let on_disk = self.file.read().await?;
        let last = self.newest();
        let is_newest = last.checkpoint.size == head.entries && last.signed_by == keys.verifiers();
        if is_newest && on_disk.as_deref() == Some(last.note.as_str()) {
            return Ok(last);
        }
        let last = match on_disk {
            // Written by this process, which was then told that it failed. (Or by somebody else; then it does not pass.)
            Some(note) if note != last.note => check(&self.ledger, &self.keys(), &self.file, note).await?.0,
            _ => last.checkpoint.clone(),
        };
        let root = self.ledger.tree_root(head.entries).await?;
        let checkpoint = Checkpoint { origin: self.ledger.origin().to_owned(), size: head.entries, root, extensions: Vec::new() };
        let proof = self.ledger.consistency_proof(last.size, checkpoint.size).await?;
        verify_consistency(&last, &checkpoint, &proof).map_err(PublishError::Fork)?;
        self.ledger.store.publish_checkpoint(head).await.map_err(LedgerError::from)?;
        let note = keys.sign(&checkpoint).await?;
        self.file.write(note.clone()).await?;
        let published = Arc::new(Published::new(checkpoint, note, keys.verifiers(), self.clock.now())?);
        self.newest.send_replace(Arc::clone(&published));
        Ok(published)
    }

    /// Puts what the ledger contradicts where the next start finds it.
    async fn keep(&self, proof: &Contradiction) -> Result<(), PublishError> {
        let _publishing = self.publishing.lock().await;
        if self.conflict.read().await?.as_ref() == Some(&proof.note) {
            return Ok(());
        }
        self.conflict.write(proof.note.clone()).await?;
        error!(file = %self.conflict.path().display(), "{proof}");
        Ok(())
    }

    async fn publish_and_tell(&self) {
        let result = match (self.ledger.contradiction(), self.retire_older_key().await) {
            (Some(proof), _) => self.keep(&proof).await,
            (None, Ok(())) => self.publish().await.map(|_| ()),
            (None, failed) => failed,
        };
        let mut problem = self.problem.lock().unwrap_or_else(PoisonError::into_inner);
        match (result, problem.as_ref()) {
            (Ok(()), None) => {}
            (Ok(()), Some(_)) => {
                info!("the ledger's checkpoints are published again");
                *problem = None;
            }
            (Err(failure), before) => {
                let failure = failure.to_string();
                // Once for each problem, not every second.
                if before != Some(&failure) {
                    error!(error = %failure, "no checkpoint of the ledger was written; trying again");
                }
                *problem = Some(failure);
            }
        }
    }

    fn keys(&self) -> SigningKeys {
        self.keys.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_keys(&self, keys: SigningKeys) {
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = keys;
    }
}

/// A checkpoint of no entries, where none was published, and a key if there is none.
async fn begin(ledger: &Ledger, keys: &mut SigningKeys, file: &CheckpointFile) -> Result<(Checkpoint, String), PublishError> {
    let entries = ledger.entries();
    if entries > 0 {
        warn!(file = %file.path().display(), entries, "no checkpoint of the ledger was published yet; the first one is made of what is there");
    }
    if keys.verifiers().is_empty() {
        keys.add().await?;
    }
    let checkpoint = Checkpoint { origin: ledger.origin().to_owned(), size: 0, root: empty_root(), extensions: Vec::new() };
    let note = keys.sign(&checkpoint).await?;
    Ok((checkpoint, note))
}

/// The checkpoint in `note`, if `ledger` continues it.
async fn check(ledger: &Ledger, keys: &SigningKeys, file: &CheckpointFile, note: String) -> Result<(Checkpoint, String), PublishError> {
    let path = || file.path().to_owned();
    let unreadable = |problem| PublishError::Unreadable { path: path(), problem };
    let found = note.lines().next().unwrap_or_default();
    if found != ledger.origin() {
        return Err(unreadable(CheckpointError::OtherOrigin { found: found.to_owned(), wanted: ledger.origin().to_owned() }));
    }
    let checkpoint = verify(&note, &keys.verifiers()).map_err(unreadable)?;
    let entries = ledger.entries();
    if checkpoint.size > entries {
        return Err(PublishError::EntriesMissing { entries, published: checkpoint.size, path: path() });
    }
    let root = ledger.tree_root(checkpoint.size).await?;
    if root != checkpoint.root {
        let (found, published) = (hex::encode(root), hex::encode(checkpoint.root));
        return Err(PublishError::OtherHistory { size: checkpoint.size, found, published, path: path() });
    }
    Ok((checkpoint, note))
}

impl From<PublishError> for LedgerError {
    fn from(error: PublishError) -> Self {
        match error {
            PublishError::Ledger(error) => error,
            error => Self::Unpublished(error.to_string()),
        }
    }
}

impl From<KeyError> for PublishError {
    fn from(error: KeyError) -> Self {
        Self::Key(error.to_string())
    }
}
