//! A ledger as the CA shows it: entries, a key, signed checkpoints, and proofs made the plain way that RFC 9162 section 2.1.4.1 writes down.

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use chancery_identity::checkpoint::{Checkpoint, CheckpointVerifier, Hash, Signature, assemble, leaf_hash, root_of};
use chancery_proto::chancery::v1 as wire;

pub const ORIGIN: &str = "example.org/chancery/00000000000000000000000000000001";

/// A key that signs checkpoints.
pub struct LogKey {
    pair: Ed25519KeyPair,
    pub verifier: CheckpointVerifier,
}

/// A history.
#[derive(Clone)]
pub struct Log {
    origin: String,
    leaves: Vec<Hash>,
}

impl LogKey {
    pub fn new(origin: &str) -> Self {
        let pair = Ed25519KeyPair::generate().unwrap();
        let verifier = CheckpointVerifier::new(origin, pair.public_key().as_ref().try_into().unwrap()).unwrap();
        Self { pair, verifier }
    }
}

impl LogKey {
    /// The same key for another log.
    pub fn renamed(self, origin: &str) -> Self {
        let verifier = CheckpointVerifier::new(origin, *self.verifier.public_key()).unwrap();
        Self { verifier, ..self }
    }
}

impl Log {
    pub fn new(origin: &str, entries: usize) -> Self {
        Self { origin: origin.to_owned(), leaves: Vec::new() }.grown(entries, "entry")
    }

    /// One whose first entry has the bytes `first`.
    pub fn beginning_with(first: &[u8], origin: &str, entries: usize) -> Self {
        Self { origin: origin.to_owned(), leaves: vec![leaf_hash(first)] }.grown(entries, "entry")
    }

    /// The same with more entries, to `entries` in all, which `what` makes different from others.
    pub fn grown(&self, entries: usize, what: &str) -> Self {
        let new = (self.leaves.len()..entries).map(|index| leaf_hash(format!("{what} {index}").as_bytes()));
        Self { origin: self.origin.clone(), leaves: self.leaves.iter().copied().chain(new).collect() }
    }

    pub fn note(&self, keys: &[&LogKey]) -> String {
        let checkpoint =
            Checkpoint { origin: self.origin.clone(), size: self.leaves.len() as u64, root: root_of(&self.leaves), extensions: Vec::new() };
        let text = checkpoint.to_string();
        let sign = |key: &&LogKey| Signature { key: key.verifier.clone(), bytes: key.pair.sign(text.as_bytes()).as_ref().to_vec() };
        assemble(&checkpoint, &keys.iter().map(sign).collect::<Vec<_>>()).unwrap()
    }

    /// As the CA offers it, signed by `keys`, of which the last one is named; with a proof from `from` entries.
    pub fn offer(&self, keys: &[&LogKey], from: usize) -> wire::LedgerCheckpoint {
        let proof = if from == 0 { Vec::new() } else { consistency(from, &self.leaves, true) };
        wire::LedgerCheckpoint {
            note: self.note(keys),
            verifier_key: keys.last().unwrap().verifier.to_string(),
            proof_from: from as u64,
            proof: proof.iter().map(|hash| hash.to_vec()).collect(),
            first: None,
        }
    }

    /// As [`Self::offer`], with the first entry, whose bytes are `first`.
    pub fn offer_with_first(&self, keys: &[&LogKey], first: &[u8]) -> wire::LedgerCheckpoint {
        let proof = inclusion_of_first(&self.leaves).iter().map(|hash| hash.to_vec()).collect();
        wire::LedgerCheckpoint { first: Some(wire::FirstEntry { entry: first.to_vec(), proof }), ..self.offer(keys, 0) }
    }
}

fn inclusion_of_first(leaves: &[Hash]) -> Vec<Hash> {
    if leaves.len() == 1 {
        return Vec::new();
    }
    let (left, right) = leaves.split_at(leaves.len().next_power_of_two() / 2);
    let mut proof = inclusion_of_first(left);
    proof.push(root_of(right));
    proof
}

/// `SUBPROOF(old, leaves, whole)`.
fn consistency(old: usize, leaves: &[Hash], whole: bool) -> Vec<Hash> {
    if old >= leaves.len() {
        return if whole { Vec::new() } else { vec![root_of(leaves)] };
    }
    let (left, right) = leaves.split_at(leaves.len().next_power_of_two() / 2);
    if old <= left.len() {
        let mut proof = consistency(old, left, whole);
        proof.push(root_of(right));
        proof
    } else {
        let mut proof = consistency(old - left.len(), right, false);
        proof.push(root_of(left));
        proof
    }
}
