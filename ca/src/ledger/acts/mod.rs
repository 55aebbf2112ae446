//! What operators did, as a signed chain, and the state that it leads to.
//!
//! An act is recorded by [`Ledger::act`]: signed with the key [`ACTS_KEY`], which the store does not hold, under the epoch that the state
//! before it had. Each act raises the epoch by one, so that the epoch numbers the acts and a missing, foreign, forged or repeated one shows
//! ([`LedgerError::Act`]): then the CA does not go on. The state is published ([`Ledger::state`]) before anything that was prepared under its
//! epoch can be recorded; what was prepared under an older one is refused.
//!
//! Opening reads the newest recorded state and the acts after it. A state is recorded whenever a segment of the log was sealed.

mod change;
mod fold;
mod loss;
mod query;
pub(super) mod recorder;
mod refused;
mod signature;
mod snapshot;
mod standing;
mod state;

use std::sync::Arc;

use chancery_proto::chancery::v1 as wire;
use tokio::sync::{Mutex, watch};

pub use self::change::{Change, Crls, Overrides, RefusedAct, RootState, Subject};
pub use self::fold::Fold;
pub use self::query::{ActFilter, ActsPage, RecordedAct};
pub use self::refused::RefusedActs;
pub use self::signature::{ACTS_KEY, ActsVerifier, named_checkpoint_keys};
pub use self::standing::MAX_STANDING;
pub use self::state::{
    AcceptedLoss, Applicant, Ban, CheckpointKey, CrlRecord, Deadline, MAX_STATE_BYTES, Restored, Revocation, Root, State,
};

use self::signature::ActsSigner;
use super::committer::{Append, Queue};
use super::entry::Body;
use super::{Ledger, LedgerError, SharedStore};
use crate::keys::KeyManager;

/// Who acts where the CA does so by itself.
pub const CA_ACTOR: &str = "ca";
/// How often an act is checked and signed again because another replica's came first.
const MAX_ATTEMPTS: usize = 16;

/// Why an act, or a recorded state, is not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ActError {
    /// No protobuf, or not the one that is due.
    #[error("it cannot be read: {0}")]
    Malformed(String),
    /// A field holds what it may not.
    #[error("its field `{field}` {problem}")]
    Field {
        /// As in `ledger.proto`.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// It does not end with a signature.
    #[error("it is not signed")]
    Unsigned,
    /// By another key than this CA's.
    #[error("it is signed by the key {found}, and this CA's key for acts is {own}")]
    ForeignKey {
        /// The key's ID in the entry.
        found: String,
        /// The ID of the key `acts`.
        own: String,
    },
    /// It was changed, or made for another log, or never signed by that key.
    #[error("its signature does not verify")]
    Signature,
    /// It is not the next one: an act is missing, or repeated.
    #[error("it was made under epoch {found}, and one made under epoch {due} is due")]
    Epoch {
        /// In the entry.
        found: u64,
        /// What the acts before lead to.
        due: u64,
    },
    /// Of a kind that this code does not know.
    #[error("its change is of a kind that this Chancery does not know; use the newer one that wrote it")]
    UnknownChange,
    /// The state before it does not allow it.
    #[error("{0}")]
    Impossible(String),
}

/// The acts' part of a ledger.
#[derive(Debug)]
pub(super) struct Acts {
    signer: ActsSigner,
    /// Locked while an act is made, so that acts follow each other; how far the state is folded.
    fold: Mutex<Fold>,
    state: watch::Sender<Arc<State>>,
}

impl Acts {
    /// Reads the newest recorded state and the acts after it.
    pub(super) async fn open(store: &SharedStore, keys: Arc<dyn KeyManager>, origin: String) -> Result<Self, LedgerError> {
        let may_generate = store.head().await?.epoch == 0;
        let signer = ActsSigner::open(keys, origin, may_generate).await?;
        let mut fold = Fold::newest(store, signer.verifier().clone()).await?;
        fold.catch_up(store).await?;
        let state = watch::Sender::new(Arc::new(fold.state().clone()));
        Ok(Self { signer, fold: Mutex::new(fold), state })
    }

    pub(super) fn state(&self) -> watch::Receiver<Arc<State>> {
        self.state.subscribe()
    }

    pub(super) fn current(&self) -> Arc<State> {
        Arc::clone(&self.state.borrow())
    }

    /// Folds what was recorded meanwhile, by another replica or by a call that did not live to see its answer, up to `epoch` at least.
    pub(super) async fn catch_up(&self, store: &SharedStore, epoch: u64) -> Result<(), LedgerError> {
        let mut fold = self.fold.lock().await;
        if fold.state().epoch < epoch {
            fold.catch_up(store).await?;
            self.publish(&fold);
        }
        Ok(())
    }

    async fn act<E: From<LedgerError>>(
        &self,
        store: &SharedStore,
        queue: &Queue,
        mut act: wire::Act,
        change: Change,
        gate: impl Fn(&State) -> Result<(), E>,
    ) -> Result<u64, E> {
        let mut fold = self.fold.lock().await;
        for _ in 0..MAX_ATTEMPTS {
            gate(fold.state())?;
            fold.check(&change)?;
            act.epoch = fold.state().epoch;
            let signed = self.signer.sign_act(act.clone()).await?;
            let append = Append::encode(Some(act.epoch), vec![Body::Act(signed)])?;
            match queue.append(append).await {
                Ok(indexes) => {
                    fold.read(store, indexes.start).await?;
                    self.publish(&fold);
                    return Ok(indexes.start);
                }
                Err(LedgerError::EpochMoved { .. }) => {
                    fold.catch_up(store).await?;
                    self.publish(&fold);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(LedgerError::Busy.into())
    }

    /// Records the state if none is recorded behind the first `sealed` entries.
    async fn record_state(&self, store: &SharedStore, queue: &Queue, sealed: u64) -> Result<(), LedgerError> {
        let mut fold = self.fold.lock().await;
        if sealed == 0 || fold.recorded().is_some_and(|recorded| recorded >= sealed) {
            return Ok(());
        }
        let mut parts = Vec::new();
        for part in fold.state().to_parts() {
            parts.push(Body::State(self.signer.sign_state(part).await?));
        }
        match queue.append(Append::encode(Some(fold.state().epoch), parts)?).await {
            Ok(indexes) => {
                fold.note_recorded(indexes.start);
                Ok(())
            }
            Err(error) => {
                if let LedgerError::EpochMoved { .. } = error {
                    fold.catch_up(store).await?;
                    self.publish(&fold);
                }
                Err(error)
            }
        }
    }

    fn publish(&self, fold: &Fold) {
        self.state.send_replace(Arc::new(fold.state().clone()));
    }
}

/// The act, but for its epoch and signature.
fn described(actor: &str, change: &Change, why: &str) -> wire::Act {
    wire::Act {
        actor: actor.to_owned(),
        action: change.action().to_owned(),
        target: change.target(),
        why: why.to_owned(),
        outcome: change.outcome().to_owned(),
        change: Some(change.clone().into_wire()),
        ..wire::Act::default()
    }
}

impl Ledger {
    /// Records that `actor` makes `change`, for the reason `why`, and returns the entry's index. When it returns, the state has changed.
    ///
    /// # Errors
    /// [`LedgerError::Impossible`] if the state does not allow it; others as for [`Ledger::append`]. Nothing was recorded then.
    pub async fn act(&self, actor: &str, change: Change, why: &str) -> Result<u64, LedgerError> {
        self.act_when(actor, change, why, |_| Ok(())).await
    }

    /// Like [`Ledger::act`], if `gate` opens for the state that the act changes: should another act come first, it is asked again.
    ///
    /// Goes on to its end when the caller goes away.
    ///
    /// # Errors
    /// What `gate` says, or the ledger. Nothing was recorded then.
    pub async fn act_when<E: From<LedgerError> + Send + 'static>(
        &self,
        actor: &str,
        change: Change,
        why: &str,
        gate: impl Fn(&State) -> Result<(), E> + Send + Sync + 'static,
    ) -> Result<u64, E> {
        let act = described(actor, &change, why);
        let (store, queue, acts) = (Arc::clone(&self.store), Arc::clone(&self.queue), Arc::clone(&self.acts));
        let (now, checked) = (self.clock.now(), change.clone());
        let gate = move |state: &State| {
            loss::check(&checked, state, now)?;
            gate(state)
        };
        // A caller that goes away between recording and folding would leave a state behind that lacks the act.
        let done = tokio::spawn(async move { acts.act(&store, &queue, act, change, gate).await });
        done.await.unwrap_or_else(|_| Err(LedgerError::Closed.into()))
    }

    /// The state that the acts lead to now. What is prepared by it is to be recorded under its epoch.
    pub fn current_state(&self) -> Arc<State> {
        self.acts.current()
    }

    /// The state that the acts lead to, and word of every change.
    pub fn state(&self) -> watch::Receiver<Arc<State>> {
        self.acts.state()
    }
}
