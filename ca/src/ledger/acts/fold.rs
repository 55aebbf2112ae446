//! Folds acts into the state, each verified before it counts.

use bytes::Bytes;
use chancery_proto::chancery::v1 as wire;
use time::OffsetDateTime;

use super::ActError;
use super::change::Change;
use super::signature::ActsVerifier;
use super::state::{MAX_STATE_BYTES, State};
use crate::ledger::entry::{Entry, from_millis};
use crate::ledger::{LedgerError, MAX_ENTRY_BYTES, SharedStore, terms};

/// Indexes looked up at once.
const LOOK_UP: usize = 512;

/// A state, and how far into the log it is folded.
#[derive(Clone, Debug)]
pub struct Fold {
    verifier: ActsVerifier,
    state: State,
    /// The acts before this entry are in it.
    next: u64,
    /// The entry with the newest recorded state.
    recorded: Option<u64>,
    /// Behind an accepted loss, until all of it is there: the parts of the state that it carries over.
    carried: Option<Vec<wire::State>>,
}

impl Fold {
    /// From the beginning of the log.
    pub fn genesis(verifier: ActsVerifier) -> Self {
        Self { verifier, state: State::default(), next: 0, recorded: None, carried: None }
    }

    /// From the newest recorded state, or from the beginning if there is none.
    ///
    /// # Errors
    /// [`LedgerError::Act`] if it is not this CA's own.
    pub(in crate::ledger) async fn newest(store: &SharedStore, verifier: ActsVerifier) -> Result<Self, LedgerError> {
        let mut fold = Self::genesis(verifier);
        let Some(&last) = store.look_up(&terms::kind("state"), u64::MAX, 1).await?.first() else { return Ok(fold) };
        let refused = |index: u64| move |problem| LedgerError::Act { index, problem };
        let part = fold.read_state(store, last).await?;
        let first =
            last.checked_sub(u64::from(part.part)).ok_or_else(|| refused(last)(ActError::Malformed("its first part is missing".into())))?;
        let mut parts = Vec::new();
        for index in first..=last {
            parts.push(fold.read_state(store, index).await?);
        }
        fold.state = State::from_parts(parts).map_err(refused(last))?;
        (fold.next, fold.recorded) = (last + 1, Some(first));
        Ok(fold)
    }

    /// The state so far.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The entry with the newest recorded state; its first part, if it has several.
    pub(super) fn recorded(&self) -> Option<u64> {
        self.recorded
    }

    pub(super) fn note_recorded(&mut self, entry: u64) {
        self.recorded = Some(entry);
    }

    /// Folds in the entry `index`, an act, whose bytes are `entry`.
    ///
    /// # Errors
    /// If it is not the next act, or not this CA's own, or cannot be.
    pub fn act(&mut self, index: u64, entry: &[u8]) -> Result<(), ActError> {
        let act = self.verifier.act(entry)?;
        if self.carried.is_some() {
            return Err(ActError::Impossible("the state that the accepted loss before it carries over is missing".into()));
        }
        if act.epoch != self.state.epoch {
            return Err(ActError::Epoch { found: act.epoch, due: self.state.epoch });
        }
        let time_ms = Entry::decode_time(entry).map_err(|error| ActError::Malformed(error.to_string()))?;
        let change = Change::from_wire(act.change)?;
        self.state.apply(&change, from_millis(time_ms), index)?;
        self.next = index + 1;
        if let Change::AcceptedLoss { .. } = change {
            self.carried = Some(Vec::new());
        }
        Ok(())
    }

    /// Whether the recorded state, or part of one, in the entry `index`, whose bytes are `entry`, is the state so far; or, directly behind an
    /// accepted loss, takes it over.
    ///
    /// # Errors
    /// If it is not, or not this CA's own.
    pub fn check_state(&mut self, index: u64, entry: &[u8]) -> Result<(), ActError> {
        let found = self.verifier.state(entry)?;
        if let Some(parts) = self.carried.take() {
            return self.carry(index, parts, found);
        }
        let number = usize::try_from(found.part).unwrap_or(usize::MAX);
        let own = self.state.to_parts().into_iter().nth(number);
        let own = own.map(|part| wire::State { key_id: found.key_id.clone(), signature: found.signature.clone(), ..part });
        if own == Some(found) { Ok(()) } else { Err(ActError::Impossible("it is not what the acts before it lead to".into())) }
    }

    /// Takes the next part of a state over that an accepted loss carries over.
    fn carry(&mut self, index: u64, mut parts: Vec<wire::State>, part: wire::State) -> Result<(), ActError> {
        let number = parts.len() as u64;
        if index != self.next + number || u64::from(part.part) != number {
            return Err(ActError::Impossible("it does not follow the accepted loss directly".into()));
        }
        let count = part.parts;
        parts.push(part);
        if usize::try_from(count).is_ok_and(|count| parts.len() < count) {
            self.carried = Some(parts);
            return Ok(());
        }
        let carried = State::from_parts(parts)?;
        if (carried.epoch, &carried.accepted_loss) != (self.state.epoch, &self.state.accepted_loss) {
            return Err(ActError::Impossible("it is of another loss than the act before it".into()));
        }
        self.recorded = Some(self.next);
        (self.state, self.next) = (carried, index + 1);
        Ok(())
    }

    /// Whether the state allows `change`, and has room for what it leads to.
    pub(super) fn check(&self, change: &Change) -> Result<(), LedgerError> {
        let mut next = self.state.clone();
        // Whether a change is possible depends on no time.
        next.apply(change, OffsetDateTime::UNIX_EPOCH, self.next).map_err(|error| LedgerError::Impossible(error.to_string()))?;
        match next.recorded_bytes() {
            ..=MAX_STATE_BYTES => Ok(()),
            bytes => {
                Err(LedgerError::TooLarge { what: "state", found: format!("{bytes} bytes of bans and revocations"), most: MAX_STATE_BYTES })
            }
        }
    }

    /// Folds in the entry `index` of `store`, the next act.
    pub(super) async fn read(&mut self, store: &SharedStore, index: u64) -> Result<(), LedgerError> {
        let bytes = stored(store, index).await?;
        self.act(index, &bytes).map_err(|problem| LedgerError::Act { index, problem })
    }

    /// Folds in every act that is recorded.
    ///
    /// # Errors
    /// If one is not accepted, or fewer are found than the log's head counts.
    pub(super) async fn catch_up(&mut self, store: &SharedStore) -> Result<(), LedgerError> {
        let head = store.head().await?;
        let mut indexes = Vec::new();
        let mut before = head.entries;
        loop {
            let found = store.look_up(&terms::kind("act"), before, LOOK_UP).await?;
            let new = found.iter().take_while(|index| **index >= self.next).count();
            indexes.extend_from_slice(&found[..new]);
            match found.last() {
                Some(&oldest) if new == found.len() => before = oldest,
                _ => break,
            }
        }
        for index in indexes.into_iter().rev() {
            self.read(store, index).await?;
        }
        if self.carried.is_some() {
            let problem = ActError::Impossible("the state that it carries over is missing".into());
            return Err(LedgerError::Act { index: self.next.saturating_sub(1), problem });
        }
        if self.state.epoch == head.epoch {
            Ok(())
        } else {
            Err(LedgerError::ActsMissing { found: self.state.epoch, recorded: head.epoch })
        }
    }

    async fn read_state(&self, store: &SharedStore, index: u64) -> Result<wire::State, LedgerError> {
        let bytes = stored(store, index).await?;
        self.verifier.state(&bytes).map_err(|problem| LedgerError::Act { index, problem })
    }
}

async fn stored(store: &SharedStore, index: u64) -> Result<Bytes, LedgerError> {
    let missing = || LedgerError::Act { index, problem: ActError::Malformed("the store does not have it".into()) };
    store.read(index..index + 1, MAX_ENTRY_BYTES).await?.pop().ok_or_else(missing)
}
