//! Which identities are revoked, by the state that operators' acts lead to.
//!
//! A revocation is about the certificates that were recorded before it. Once the last of them has expired it may be forgotten: then they
//! are just expired.

use super::acts::{Revocation, State, Subject};
use super::query::Identity;
use super::terms::{Dimension, term};
use crate::store::Term;

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
