//! Which identities are revoked, by the state that operators' acts lead to.
//!
//! A revocation is about the certificates that were recorded before it. Once the last of them has expired it may be forgotten: then they
//! are just expired.

use std::collections::BTreeMap;

use chancery_identity::{Serial, SpiffeId};
use time::OffsetDateTime;

use super::acts::{Revocation, State, Subject};
use super::query::{Identity, identity};
use super::terms::{Dimension, term};
use super::{Ledger, LedgerError};
use crate::store::Term;

/// Indexes looked up at once.
const LOOK_UP: usize = 512;

/// A certificate that can be revoked: recorded, and not expired.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revocable {
    /// Whose.
    pub spiffe_id: SpiffeId,
    /// Its serial number.
    pub serial: Serial,
    /// What signed it, as entries name that.
    pub issuing_certificate: [u8; 16],
    /// Its validity ends.
    pub not_after: OffsetDateTime,
}

impl Ledger {
    /// The certificates that a revocation of `subject` by the act in the entry `act` is about, and that had not expired at `alive_at`. Once there
    /// are more than `most`, no more are looked for. Costs what was issued to the subject within the longest lifetime.
    ///
    /// # Errors
    /// If the store cannot be read, or an entry.
    pub async fn revocable(
        &self,
        subject: &Subject,
        act: u64,
        alive_at: OffsetDateTime,
        most: usize,
    ) -> Result<Vec<Revocable>, LedgerError> {
        let floor = self.first_alive_at(alive_at).await?;
        let mut found = BTreeMap::new();
        for term in terms(subject) {
            let mut before = act;
            while before > floor && found.len() <= most {
                let mut indexes = self.store.look_up(&term, before, LOOK_UP).await?;
                before = if indexes.len() < LOOK_UP { floor } else { indexes.last().copied().unwrap_or(floor) };
                indexes.retain(|index| *index >= floor);
                let entries = self.store.read_each(indexes.clone()).await?;
                for (index, entry) in indexes.into_iter().zip(entries) {
                    let of_subject =
                        identity(index, entry)?.filter(|one| one.leaf.not_after >= alive_at && subjects(one).any(|of| of == *subject));
                    if let Some(Identity { leaf, issuance, .. }) = of_subject {
                        let issuing_certificate = issuance.issuing_certificate;
                        let (spiffe_id, not_after) = (leaf.spiffe_id, leaf.not_after);
                        found.insert(index, Revocable { spiffe_id, serial: leaf.serial, issuing_certificate, not_after });
                    }
                }
                // Decoding is work: let others have their turn.
                tokio::task::yield_now().await;
            }
        }
        Ok(found.into_values().collect())
    }
}

impl Ledger {
    /// The revocation in force that `identity` falls under; the first, if there are several.
    pub fn revocation(&self, identity: &Identity) -> Option<Revocation> {
        revocation(&self.acts.current(), identity)
    }

    /// The entry of the act that it is by; none if that is in a log which this one continues.
    pub fn act_of(&self, revocation: &Revocation) -> Option<u64> {
        let state = self.acts.current();
        let is_here = state.accepted_loss.as_ref().is_none_or(|loss| loss.since <= revocation.since);
        is_here.then_some(revocation.entry)
    }
}

/// The revocation that `identity` falls under; the first, if there are several.
pub(super) fn revocation(state: &State, identity: &Identity) -> Option<Revocation> {
    if state.revocations.is_empty() {
        return None;
    }
    let of = |subject| state.revocations.get(&subject).filter(|revocation| identity.index < revocation.entry);
    subjects(identity).filter_map(of).min_by_key(|revocation| revocation.entry).copied()
}

/// What a revocation that `identity` falls under may be about.
fn subjects(Identity { leaf, asker, issuance, .. }: &Identity) -> impl Iterator<Item = Subject> {
    let node = || Subject::Node { cluster: issuance.cluster.clone(), node: issuance.node.clone() };
    let always = [Subject::Serial(leaf.serial), Subject::SpiffeId(leaf.spiffe_id.clone()), Subject::Agent(leaf.spiffe_id.clone())];
    always
        .into_iter()
        .chain(issuance.pod_uid.map(Subject::Pod))
        .chain(asker.clone().map(Subject::Agent))
        .chain((!issuance.node.is_empty()).then(node))
}

/// Terms of which an entry has one that a revocation of `subject` is about.
pub(super) fn terms(subject: &Subject) -> Vec<Term> {
    match subject {
        Subject::Serial(serial) => vec![term(Dimension::Serial, serial.0)],
        Subject::SpiffeId(id) => vec![term(Dimension::SpiffeId, id.as_str())],
        Subject::Pod(uid) => vec![term(Dimension::PodUid, uid.as_bytes())],
        Subject::Node { node, .. } => vec![term(Dimension::Node, node)],
        Subject::Agent(id) => vec![term(Dimension::Asker, id.as_str()), term(Dimension::SpiffeId, id.as_str())],
    }
}
