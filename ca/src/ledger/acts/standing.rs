//! Bans and revocations that agents keep for the CA: signed acts, which come back from them should the ledger lose its end.
//!
//! An act proves itself: its signature is over the log's origin and its epoch. So whoever brings it back is not believed but for bringing it. What
//! took it back may be lost as well, and is not asked for: somebody who is kept from certificates in error is seen, and let go on by an
//! operator; the other way round nobody would notice.

use std::collections::BTreeSet;

use bytes::Bytes;
use chancery_identity::SpiffeId;
use time::OffsetDateTime;

use super::change::{Change, Subject};
use super::signature::ActsVerifier;
use super::state::State;
use super::{ActFilter, CA_ACTOR};
use crate::ledger::{Body, Entry, Ledger, LedgerError, MAX_PAGE_SIZE};

/// The most acts that agents are told; the newest, if there are more.
pub const MAX_STANDING: usize = 256;

impl State {
    /// The entries of the acts that keep somebody from certificates, or revoke one by its serial.
    fn standing(&self) -> Vec<u64> {
        let stands = |(subject, revocation): (&Subject, &super::Revocation)| {
            (revocation.allowed.is_none() || matches!(subject, Subject::Serial(_))).then_some(revocation.entry)
        };
        let mut entries: Vec<_> = self.bans.values().map(|ban| ban.entry).chain(self.revocations.iter().filter_map(stands)).collect();
        entries.sort_unstable();
        entries.dedup();
        entries.split_off(entries.len().saturating_sub(MAX_STANDING))
    }
}

impl Ledger {
    /// The acts that keep somebody from certificates now, or revoke one by its serial, as they are stored. Those that a log had before it was lost are
    /// not among them: here they are part of a state.
    ///
    /// # Errors
    /// If the ledger cannot be read.
    pub async fn standing_acts(&self) -> Result<Vec<Bytes>, LedgerError> {
        let mut acts = Vec::new();
        for index in self.current_state().standing() {
            let bytes = self.stored(index).await?.unwrap_or_default();
            acts.extend(self.acts.signer.verifier().act(&bytes).is_ok().then_some(bytes));
        }
        Ok(acts)
    }

    /// Records again what acts say that were lost: `entries` of the log `origin`, which is the one before, or this one if it was restored from a
    /// backup; brought by `teller`. Tells how many were recorded. What is no such act is passed over, and what this log has decided otherwise
    /// since.
    ///
    /// # Errors
    /// If the ledger cannot be read or written.
    pub async fn recover_acts(&self, origin: &str, entries: &[Bytes], teller: &str) -> Result<usize, LedgerError> {
        let state = self.current_state();
        let in_force = state.roots_kept_until().is_some_and(|until| self.clock.now() < until);
        let Some((lost_from, since)) = self.lost(&state, origin).filter(|_| in_force) else { return Ok(0) };
        let verifier = self.acts.signer.verifier().of_log(origin);
        // Their signatures are looked at last: each agent brings what is known.
        let is_news = |entry: &&Bytes| standing_change((*entry).clone()).is_some_and(|change| !state.has(&change));
        let brought = entries.iter().take(MAX_STANDING).filter(is_news);
        let mut lost: Vec<_> = brought.filter_map(|entry| lost_act(&verifier, entry, lost_from)).collect();
        if lost.is_empty() {
            return Ok(0);
        }
        let decided = self.decided(since).await?;
        lost.retain(|(.., change)| Whom::of(change).is_some_and(|whom| !decided.contains(&whom)));
        lost.sort_by_key(|(epoch, ..)| *epoch);
        let mut recorded = 0;
        for (epoch, actor, change) in lost {
            let why = format!("recovered: act {epoch} of {origin}, by {actor}, brought by {teller} after it was lost");
            let wanted = change.clone();
            let gate = move |state: &State| {
                // Somebody else may have brought it meanwhile.
                if state.has(&wanted) { Err(LedgerError::Impossible("it is so already".into())) } else { Ok(()) }
            };
            match self.act_when(CA_ACTOR, change, &why, gate).await {
                Ok(_) => recorded += 1,
                Err(LedgerError::Impossible(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(recorded)
    }

    /// The epoch from which on acts of the log `origin` may be lost, and since when this log goes on without them.
    fn lost(&self, state: &State, origin: &str) -> Option<(u64, OffsetDateTime)> {
        if origin == self.origin() {
            return state.restored.map(|restored| (restored.epoch, restored.since));
        }
        state.accepted_loss.as_ref().filter(|loss| loss.origin == origin).map(|loss| (loss.epoch, loss.since))
    }

    /// About whom this log has acts since then. These count, and not what was lost before: who was let go on by an operator stays so, whoever
    /// brings the lost act once more.
    async fn decided(&self, since: OffsetDateTime) -> Result<BTreeSet<Whom>, LedgerError> {
        let filter = ActFilter { since: Some(since), ..ActFilter::default() };
        let (mut decided, mut next) = (BTreeSet::new(), None);
        loop {
            let page = self.list_acts(&filter, MAX_PAGE_SIZE, next.as_deref()).await?;
            let changes = page.acts.into_iter().filter_map(|recorded| Change::from_wire(recorded.act.change).ok());
            decided.extend(changes.filter_map(|change| Whom::of(&change)));
            next = page.next;
            if next.is_none() {
                return Ok(decided);
            }
        }
    }
}

/// Who is kept from certificates by an act, or let go on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Whom {
    Agent(SpiffeId),
    Subject(Subject),
}

impl Whom {
    fn of(change: &Change) -> Option<Self> {
        match change {
            Change::Ban { agent, .. } | Change::Unban(agent) => Some(Self::Agent(agent.clone())),
            Change::Revoke { subject, .. } | Change::Allow(subject) => Some(Self::Subject(subject.clone())),
            _ => None,
        }
    }
}

/// What an entry says, if it keeps somebody from certificates; it may be anybody's.
fn standing_change(entry: Bytes) -> Option<Change> {
    let Body::Act(act) = Entry::decode(entry).ok()?.body else { return None };
    let change = Change::from_wire(act.change).ok()?;
    matches!(change, Change::Ban { .. } | Change::Revoke { .. }).then_some(change)
}

/// Epoch, actor and change of an act that was made under `lost_from` or later, and keeps somebody from certificates.
fn lost_act(verifier: &ActsVerifier, entry: &Bytes, lost_from: u64) -> Option<(u64, String, Change)> {
    let act = verifier.act(entry).ok().filter(|act| act.epoch >= lost_from)?;
    Some((act.epoch, act.actor, standing_change(entry.clone())?))
}

impl State {
    /// Whether what `change` keeps somebody from is so already.
    fn has(&self, change: &Change) -> bool {
        match change {
            Change::Ban { agent, .. } => self.is_banned(agent),
            Change::Revoke { subject, .. } => self.revocations.contains_key(subject),
            _ => false,
        }
    }
}
