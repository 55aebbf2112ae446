//! A new log in place of one whose end is lost.
//!
//! A log that ends before a checkpoint which somebody holds is never continued: there would be two histories under one name. So the backup's
//! log is put aside, whole and readable, under `previous/<log ID>/`, and a new one with an origin of its own begins with the act that says what
//! is missing and why that was accepted. Behind it stand the state that the old log's acts led to, and copies of what is still in force:
//! the CA's own certificates and every issuance that has not expired, in their old order.
//!
//! The keys are the old log's, which is how agents tell that the new one is no stranger's.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use chancery_identity::TrustDomain;
use chancery_identity::checkpoint::Checkpoint;
use chancery_process::files;
use time::OffsetDateTime;
use tokio::runtime::Runtime;

use super::contents::Contents;
use super::restore::{Known, Restore};
use super::restored::{LEAST_LIFETIME, lifetime, trust_floor};
use super::{BackupError, CHECKPOINT, LEDGER_KEYS, PREVIOUS};
use crate::keys::{FileKeyManager, KeyManager};
use crate::ledger::acts::{ACTS_KEY, ActsVerifier, Change, Fold, State};
use crate::ledger::{
    Body, Checkpoints, DICTIONARY_DIMENSIONS, Entry, EntryTerms, Issuance, Ledger, LedgerError, LedgerOptions, Provenance,
};
use crate::store::embedded::audit::Audit;
use crate::store::embedded::files::SystemFiles;
use crate::store::embedded::{EmbeddedStore, Options as StoreOptions};

/// Copies recorded at once.
const BATCH: usize = 1000;

/// Who accepts a loss, and with what.
#[derive(Clone, Debug)]
pub struct AcceptLoss<'a> {
    /// The operator's words.
    pub why: &'a str,
    /// The directory `ledger-keys` of the old data directory, or a copy, if these keys are not in the backup.
    pub ledger_keys: Option<&'a Path>,
}

/// The log that was begun.
#[derive(Clone, Debug)]
pub struct NewLog {
    /// Its own.
    pub origin: String,
    /// How many entries it has.
    pub entries: u64,
    /// The old log's entries that it lacks; an empty range where nobody knows whether there were any.
    pub missing: Range<u64>,
    /// No root can be retired before.
    pub roots_kept_until: OffsetDateTime,
    /// Where the old log is, in the data directory.
    pub previous: PathBuf,
}

/// What the old log says.
struct Old {
    state: State,
    /// The entries that are copied, in their order.
    copied: Vec<u64>,
    longest_lifetime: Duration,
}

impl NewLog {
    pub(super) fn next_step(&self, data_dir: &Path) -> String {
        format!(
            "a new ledger continues the backup's, which is kept for auditors in {} (`chancery log verify --data-dir`). Tell auditors the new \
             verifier key (`chancery log key`); agents take it over by themselves and say so. No root can be retired before {}",
            data_dir.join(&self.previous).display(),
            self.roots_kept_until
        )
    }
}

/// Puts the log in `staging`, where `restore` restores the data directory, aside, and begins a new one. `newest` is the newest checkpoint that is known, if it is
/// newer than the backup's.
pub(super) fn begin(
    restore: &Restore<'_>,
    loss: &AcceptLoss<'_>,
    staging: &Path,
    contents: &Contents,
    newest: Option<&Known<'_>>,
) -> Result<NewLog, BackupError> {
    let (origin, entries) = (&contents.checkpoint.origin, contents.checkpoint.size);
    let id = origin.rsplit('/').next().unwrap_or_default();
    let previous = Path::new(PREVIOUS).join(id);
    put_aside(staging, &staging.join(&previous))?;
    let (end, note) = newest.map_or((entries, &contents.note), |newest| (newest.checkpoint.size, &newest.note));
    let anew = Anew { restore, loss, staging, old: &staging.join(&previous), origin, missing: entries..end, note };
    // On a thread of its own, whatever the caller runs in.
    let begun = std::thread::scope(|scope| {
        let work = scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            anew.begin(&runtime.map_err(BackupError::io("begin a new ledger in", staging))?)
        });
        work.join().unwrap_or_else(|_| Err(BackupError::NewLog("the work ended without a result".into())))
    });
    begun.map(|begun| NewLog { previous, ..begun })
}

/// Moves the log and its checkpoint.
fn put_aside(staging: &Path, previous: &Path) -> Result<(), BackupError> {
    files::create_private_dir(&staging.join(PREVIOUS))?;
    files::create_private_dir(previous)?;
    for name in ["ledger", CHECKPOINT] {
        fs::rename(staging.join(name), previous.join(name)).map_err(BackupError::io("move", &staging.join(name)))?;
    }
    files::sync_directory(previous)?;
    Ok(files::sync_directory(staging)?)
}

/// A log being begun.
struct Anew<'a> {
    restore: &'a Restore<'a>,
    loss: &'a AcceptLoss<'a>,
    staging: &'a Path,
    /// Where the old log is.
    old: &'a Path,
    /// Of the old log.
    origin: &'a str,
    missing: Range<u64>,
    /// The newest checkpoint that is known of the old log.
    note: &'a str,
}

impl Anew<'_> {
    fn begin(&self, runtime: &Runtime) -> Result<NewLog, BackupError> {
        let keys = self.keys(runtime)?;
        let acts_key = runtime.block_on(keys.public_key(ACTS_KEY))?;
        let now = self.restore.clock.now();
        let old = self.read_old(ActsVerifier::new(self.origin.to_owned(), &acts_key)?, now)?;
        let (missing, roots_kept_until) = (self.missing.clone(), now + old.longest_lifetime);
        let change = Change::AcceptedLoss {
            origin: self.origin.to_owned(),
            checkpoint: self.note.to_owned(),
            trust_floor: trust_floor(&old.state, missing.end, now),
            missing: missing.clone(),
            roots_kept_until,
            epoch: old.state.epoch,
        };
        let (ledger, checkpoints) = runtime.block_on(self.open(keys, old.longest_lifetime))?;
        let state = |first| placed(&old.state, &old.copied, first);
        runtime.block_on(ledger.accept_loss(&self.restore.actor, change, self.loss.why, state))?;
        self.copy(runtime, &ledger, &old.copied)?;
        let Checkpoint { origin, size, .. } = runtime.block_on(checkpoints.publish())?.checkpoint.clone();
        runtime.block_on(ledger.close())?;
        Ok(NewLog { origin, entries: size, missing, roots_kept_until, previous: PathBuf::new() })
    }

    /// The old log's; other ones would make a log that no agent takes for its continuation.
    fn keys(&self, runtime: &Runtime) -> Result<Arc<dyn KeyManager>, BackupError> {
        let keys = FileKeyManager::open(self.staging.join(LEDGER_KEYS))?;
        let names = runtime.block_on(keys.list())?;
        let is_there = |key: &str| names.iter().any(|name| name.starts_with(key));
        if !is_there(ACTS_KEY) || !is_there(CHECKPOINT) {
            let problem = "they are not in what was restored; give `--ledger-keys DIR`, that directory of the old data directory or a copy of it, \
                           or restore a backup made with `--with-keys` and its `--identity`";
            return Err(BackupError::LedgerKeys(problem.into()));
        }
        Ok(Arc::new(keys))
    }

    /// Folds the old log's acts, and finds what is still in force.
    fn read_old(&self, verifier: ActsVerifier, now: OffsetDateTime) -> Result<Old, BackupError> {
        let mut fold = Fold::genesis(verifier);
        let (mut copied, mut longest_lifetime) = (Vec::new(), LEAST_LIFETIME);
        Audit::of(&self.old.join("ledger"))?.read(
            |index, bytes| {
                let act = |problem| LedgerError::Act { index, problem };
                match decode(index, bytes)?.body {
                    Body::Act(_) => fold.act(index, bytes).map_err(act)?,
                    Body::State(_) => fold.check_state(index, bytes).map_err(act)?,
                    Body::Authority(_) => copied.push(index),
                    Body::Issuance(issuance) => {
                        let leaf = issuance.leaf().map_err(|problem| LedgerError::Unreadable { index, problem })?;
                        longest_lifetime = longest_lifetime.max(lifetime(&leaf));
                        if leaf.not_after > now {
                            copied.push(index);
                        }
                    }
                    Body::Start(_) | Body::Configuration(_) => {}
                }
                Ok::<_, BackupError>(())
            },
            |_| (),
        )?;
        Ok(Old { state: fold.state().clone(), copied, longest_lifetime })
    }

    /// The new log, still empty.
    async fn open(&self, keys: Arc<dyn KeyManager>, longest_lifetime: Duration) -> Result<(Ledger, Checkpoints), BackupError> {
        let name = self.origin.split('/').next().unwrap_or_default();
        let trust_domain: TrustDomain = name.parse().map_err(|error| BackupError::NewLog(format!("{name}: {error}")))?;
        let mut options = StoreOptions::new(Arc::new(EntryTerms), Arc::clone(&self.restore.clock));
        options.dictionary_dimensions = DICTIONARY_DIMENSIONS.to_vec();
        let store = Arc::new(EmbeddedStore::open(&self.staging.join("ledger"), options).await?.store);
        let options = LedgerOptions { longest_lifetime, ..LedgerOptions::new(trust_domain, Arc::clone(&keys)) };
        let clock = &self.restore.clock;
        let ledger = Ledger::open(store, Arc::clone(clock), options).await?;
        let path = self.staging.join(CHECKPOINT);
        let checkpoints = Checkpoints::open(ledger.clone(), keys, Arc::new(SystemFiles), path, Arc::clone(clock)).await?;
        Ok((ledger, checkpoints))
    }

    /// Copies the entries `copied` of the old log to the end of the new one.
    fn copy(&self, runtime: &Runtime, ledger: &Ledger, copied: &[u64]) -> Result<(), BackupError> {
        let (mut left, mut batch) = (copied.iter().peekable(), Vec::new());
        Audit::of(&self.old.join("ledger"))?.read(
            |index, bytes| {
                if left.next_if_eq(&&index).is_some() {
                    batch.push(as_copy(index, decode(index, bytes)?.body));
                }
                if batch.len() == BATCH {
                    runtime.block_on(ledger.append_all(std::mem::take(&mut batch)))?;
                }
                Ok::<_, BackupError>(())
            },
            |_| (),
        )?;
        runtime.block_on(ledger.append_all(batch))?;
        Ok(())
    }
}

fn decode(index: u64, bytes: &[u8]) -> Result<Entry, LedgerError> {
    Entry::decode(Bytes::copy_from_slice(bytes)).map_err(|problem| LedgerError::Unreadable { index, problem })
}

fn as_copy(index: u64, body: Body) -> Body {
    match body {
        Body::Issuance(issuance) => Body::from(Issuance { provenance: Provenance::CarriedOver(index), ..*issuance }),
        body => body,
    }
}

/// `state` with the entry numbers that it has in a log whose entries from `first` on are copies of the old log's entries `copied`. They keep
/// their order: what was recorded before a root became active, or before somebody was revoked, still is.
fn placed(state: &State, copied: &[u64], first: u64) -> State {
    // That the old log was restored says nothing of this one.
    let mut state = State { restored: None, ..state.clone() };
    // The first copy of what was recorded behind an act; its revocations are about all before.
    let behind = |act: u64| first + copied.partition_point(|index| *index < act) as u64;
    state.revocations.values_mut().for_each(|revocation| revocation.entry = behind(revocation.entry));
    state.roots.values_mut().for_each(|root| root.entry = behind(root.entry) - 1);
    // Of CRLs that are not there any more others are signed, under a larger number; that there were some must stay known.
    state.crl.iter_mut().for_each(|crl| crl.entry = behind(crl.entry) - 1);
    state.bans.values_mut().for_each(|ban| ban.entry = first - 1);
    state.checkpoint_keys.iter_mut().for_each(|key| key.entry = first - 1);
    state
}

#[cfg(test)]
mod tests {
    use chancery_identity::Fingerprint;
    use uuid::Uuid;

    use super::*;
    use crate::ledger::acts::{Revocation, Root, RootState, Subject};

    const NOW: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

    #[test]
    fn whatever_was_recorded_before_or_after_an_act_is_so_in_the_new_log() {
        let copied = [10, 20, 21, 30];
        for act in [5, 15, 25, 29, 40] {
            let mut state = State::default();
            let subject = Subject::Pod(Uuid::nil());
            state.revocations.insert(subject.clone(), Revocation { since: NOW, entry: act, until: NOW, allowed: None });
            state.roots.insert(Fingerprint([1; 32]), Root { state: RootState::Active, since: NOW, entry: act, leave_by: None });
            let state = placed(&state, &copied, 3);
            for (copy, old) in (3..).zip(copied) {
                assert_eq!(copy < state.revocations[&subject].entry, old < act, "{old} and the revocation {act}");
                assert_eq!(copy > state.roots[&Fingerprint([1; 32])].entry, old > act, "{old} and the activation {act}");
            }
        }
    }
}
