//! Whether a new log continues the one that the agent remembers, of which the end was lost.
//!
//! It does if its first entry is an accepted loss that names the old log, and the key that the agent remembers has signed the checkpoint in
//! which that entry is proven to be. So nobody but who held the old log's key can lead an agent over, and not without leaving a record of it
//! where every auditor looks first.

use chancery_identity::checkpoint::{self, Checkpoint, CheckpointVerifier, Hash};
use chancery_proto::chancery::v1 as wire;
use prost::Message;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use wire::act::Change;
use wire::entry::Body;

use super::judge::{KnownCheckpoint, MAX_PROOF};

/// No entry is longer.
const MAX_ENTRY_BYTES: usize = 65_535;

/// A log whose end was lost, and that the agent has left for the one that continues it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContinuedLog {
    /// Of the log that was lost in part.
    pub origin: String,
    /// The newest checkpoint of it that the agent was shown.
    pub remembered: String,
    /// The entries that are missing: from here
    pub missing_from: u64,
    /// until before here; both are equal where it was not known whether there were any.
    pub missing_until: u64,
    /// Who accepted it.
    pub actor: String,
    /// Why, in that person's words.
    pub why: String,
    /// When, by the CA's clock.
    #[serde(with = "time::serde::rfc3339")]
    pub accepted_at: OffsetDateTime,
}

/// Verifies that the log of `offer` continues that of `known`; tells what to remember from now on, or why it does not.
pub(super) fn verify(
    known: &KnownCheckpoint,
    offer: &wire::LedgerCheckpoint,
    first: &wire::FirstEntry,
) -> Result<(KnownCheckpoint, ContinuedLog), String> {
    let key: CheckpointVerifier = offer.verifier_key.parse().map_err(|error| format!("{error}"))?;
    let origin = key.origin();
    if parent(origin) != parent(&known.checkpoint.origin) {
        return Err(format!("{origin} is of another trust domain"));
    }
    // The same key under the new log's name.
    let remembered = CheckpointVerifier::new(origin, *known.key.public_key()).map_err(|error| error.to_string())?;
    let checkpoint = remembered.verify(&offer.note).map_err(|error| error.to_string())?;
    let key = if key.verify(&offer.note).is_ok() { key } else { remembered };
    let (act, loss, accepted_at) = accepted_loss(&checkpoint, first)?;
    let old = &known.checkpoint;
    if loss.origin != old.origin {
        return Err(format!("its first entry names {}", loss.origin));
    }
    let theirs = known.key.verify(&loss.checkpoint).ok();
    if theirs.is_some_and(|theirs| theirs.size == old.size && theirs.root != old.root) {
        return Err(format!("the old log's checkpoint that it names differs from another one with as many entries, {}", old.size));
    }
    let continued = ContinuedLog {
        origin: loss.origin,
        remembered: known.note.clone(),
        missing_from: loss.first,
        missing_until: loss.end,
        actor: act.actor,
        why: act.why,
        accepted_at,
    };
    Ok((KnownCheckpoint { note: offer.note.clone(), key, checkpoint }, continued))
}

/// The act in the first entry of the log of `checkpoint`.
fn accepted_loss(checkpoint: &Checkpoint, first: &wire::FirstEntry) -> Result<(wire::Act, wire::AcceptedLoss, OffsetDateTime), String> {
    if first.entry.len() > MAX_ENTRY_BYTES || first.proof.len() > MAX_PROOF {
        return Err("its first entry is longer than one may be".to_owned());
    }
    let proof: Result<Vec<Hash>, _> = first.proof.iter().map(|hash| Hash::try_from(hash.as_ref())).collect();
    let proof = proof.map_err(|_| "a hash of its proof has not 32 bytes".to_owned())?;
    checkpoint::verify_inclusion(&first.entry, 0, checkpoint, &proof).map_err(|error| error.to_string())?;
    let entry = wire::Entry::decode(first.entry.as_ref()).map_err(|error| format!("its first entry: {error}"))?;
    let time = OffsetDateTime::from_unix_timestamp_nanos(i128::from(entry.time_ms) * 1_000_000);
    match entry.body {
        Some(Body::Act(act)) => match act.change.clone() {
            Some(Change::Loss(loss)) => Ok((act, loss, time.unwrap_or(OffsetDateTime::UNIX_EPOCH))),
            _ => Err("its first entry is another act".to_owned()),
        },
        _ => Err("its first entry is no act".to_owned()),
    }
}

/// An origin without the log's ID.
fn parent(origin: &str) -> &str {
    origin.rsplit_once('/').map_or(origin, |(parent, _)| parent)
}
