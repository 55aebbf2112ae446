//! A log that continues one which was lost in part: how it begins, and what it keeps from happening for a while.

use bytes::Bytes;
use chancery_proto::chancery::v1 as wire;
use time::OffsetDateTime;

use super::change::{Change, RootState};
use super::state::State;
use super::{Acts, described};
use crate::ledger::committer::{Append, Queue};
use crate::ledger::entry::Body;
use crate::ledger::{Ledger, LedgerError, MAX_ENTRY_BYTES, SharedStore};

/// More parts make larger numbers, and these hardly ever more parts.
const MOST_PLACINGS: usize = 8;

impl Ledger {
    /// Begins this log, which is empty, as the one that continues a lost one: records `loss` ([`Change::AcceptedLoss`]) as an act of `actor`'s,
    /// and behind it the state that the old log's acts led to. `carried` makes it, with the entry numbers that it is to have in this log, where
    /// the entry given to it is the first behind the state.
    ///
    /// # Errors
    /// If this log is not empty, or something cannot be signed or recorded.
    pub async fn accept_loss(&self, actor: &str, loss: Change, why: &str, carried: impl Fn(u64) -> State) -> Result<(), LedgerError> {
        self.acts.accept_loss(&self.store, &self.queue, described(actor, &loss, why), carried).await
    }
}

impl Acts {
    async fn accept_loss(
        &self,
        store: &SharedStore,
        queue: &Queue,
        act: wire::Act,
        carried: impl Fn(u64) -> State,
    ) -> Result<(), LedgerError> {
        let mut fold = self.fold.lock().await;
        if queue.head().entries > 0 {
            return Err(LedgerError::Impossible("a loss is accepted by the first entry of a new log".into()));
        }
        let signed = self.signer.sign_act(act).await?;
        let recorded = queue.append(Append::encode(Some(0), vec![Body::Act(signed)])?).await?;
        fold.read(store, recorded.start).await?;
        let mut parts = Vec::new();
        for part in placed(fold.state(), carried)? {
            parts.push(Body::State(self.signer.sign_state(part).await?));
        }
        let recorded = queue.append(Append::encode(Some(fold.state().epoch), parts)?).await?;
        for index in recorded {
            let bytes: Bytes = store.read(index..index + 1, MAX_ENTRY_BYTES).await?.pop().unwrap_or_default();
            fold.check_state(index, &bytes).map_err(|problem| LedgerError::Act { index, problem })?;
        }
        self.publish(&fold);
        Ok(())
    }
}

/// The parts of the state that `carried` makes, behind the loss that led to `after`. How many they are depends on the numbers in them.
fn placed(after: &State, carried: impl Fn(u64) -> State) -> Result<Vec<wire::State>, LedgerError> {
    let mut count = 1;
    for _ in 0..MOST_PLACINGS {
        let state = State { epoch: after.epoch, accepted_loss: after.accepted_loss.clone(), ..carried(1 + count) };
        let parts = state.to_parts();
        if parts.len() as u64 == count {
            return Ok(parts);
        }
        count = parts.len() as u64;
    }
    Err(LedgerError::Impossible("the state that is carried over cannot be laid out".into()))
}

/// What cannot be while certificates may be valid that this log lacks, and what is no act of a running CA's.
pub(super) fn check(change: &Change, state: &State, now: OffsetDateTime) -> Result<(), LedgerError> {
    match change {
        Change::AcceptedLoss { .. } => {
            Err(LedgerError::Impossible("a loss is accepted by `chancery-ca restore --accept-loss`, which begins a new log".into()))
        }
        Change::Root { to: RootState::Retired, .. } => match state.roots_kept_until().filter(|until| now < *until) {
            Some(until) => Err(LedgerError::Impossible(format!(
                "no root is retired before {until}: the ledger was restored from a backup, and until then certificates may be valid that it lacks"
            ))),
            None => Ok(()),
        },
        _ => Ok(()),
    }
}
