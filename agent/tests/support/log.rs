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

impl Log {
    pub fn new(origin: &str, entries: usize) -> Self {
        Self { origin: origin.to_owned(), leaves: Vec::new() }.grown(entries, "entry")
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
        }
    }
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
