//! Bans and revocations that agents keep for the CA: signed acts, which come back from them should the ledger lose its end.
//!
//! An act proves itself: its signature is over the log's origin and its epoch. So whoever brings it back is not believed but for bringing it. What
//! took it back may be lost as well, and is not asked for: somebody who is kept from certificates in error is seen, and let go on by an
//! operator; the other way round nobody would notice.

use bytes::Bytes;

use super::CA_ACTOR;
use super::change::{Change, Subject};
use super::signature::ActsVerifier;
use super::state::State;
use crate::ledger::{Ledger, LedgerError};

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

    /// Records again what acts of the log before say that were lost: `entries` of the log `origin`, brought by `teller`. Tells how many were
    /// recorded. What is no such act is passed over.
    ///
    /// # Errors
    /// If the ledger cannot be written.
    pub async fn recover_acts(&self, origin: &str, entries: &[Bytes], teller: &str) -> Result<usize, LedgerError> {
        let Some(loss) = self.current_state().accepted_loss.clone().filter(|loss| loss.origin == origin) else { return Ok(0) };
        let verifier = self.acts.signer.verifier().of_log(origin);
        let mut lost: Vec<_> = entries.iter().take(MAX_STANDING).filter_map(|entry| lost_act(&verifier, entry, loss.epoch)).collect();
        lost.sort_by_key(|(epoch, ..)| *epoch);
        let mut recorded = 0;
        for (epoch, actor, change) in lost {
            if self.current_state().has(&change) {
                continue;
            }
            let why = format!("recovered: act {epoch} of {origin}, by {actor}, brought by {teller} after it was lost");
            match self.act(CA_ACTOR, change, &why).await {
                Ok(_) => recorded += 1,
                // Somebody else brought it meanwhile.
                Err(LedgerError::Impossible(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(recorded)
    }
}

/// Epoch, actor and change of an act that was made under `lost_from` or later, and keeps somebody from certificates.
fn lost_act(verifier: &ActsVerifier, entry: &[u8], lost_from: u64) -> Option<(u64, String, Change)> {
    let act = verifier.act(entry).ok().filter(|act| act.epoch >= lost_from)?;
    let change = Change::from_wire(act.change).ok()?;
    matches!(change, Change::Ban { .. } | Change::Revoke { .. }).then_some((act.epoch, act.actor, change))
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
