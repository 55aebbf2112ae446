//! Whether a checkpoint that the CA shows continues the history that the agent remembers.

use chancery_identity::checkpoint::{self, Checkpoint, CheckpointError, CheckpointVerifier, Hash};
use chancery_proto::chancery::v1 as wire;

use super::AlarmReason;
use super::continued::{self, ContinuedLog};

/// More hashes are no proof: a tree of 2^64 entries has no longer ones.
pub(super) const MAX_PROOF: usize = 64;

/// A checkpoint that the agent has verified, with the key that it goes by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownCheckpoint {
    /// The signed note.
    pub note: String,
    /// What the next one must be signed with.
    pub key: CheckpointVerifier,
    /// What the note says.
    pub checkpoint: Checkpoint,
}

/// What an offer that is in order means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Known already.
    Same,
    /// To be remembered from now on.
    Newer(KnownCheckpoint),
    /// The first of a log that continues the one that the agent remembers, whose end was lost.
    Continued(KnownCheckpoint, ContinuedLog),
    /// Its proof begins elsewhere than with what the agent remembers. That happens when two messages cross, and says nothing.
    ProofFromElsewhere,
}

/// Why an offer does not continue what the agent remembers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Complaint {
    pub(super) reason: AlarmReason,
    pub(super) message: String,
}

impl KnownCheckpoint {
    /// Takes a note over if `key` has signed it.
    ///
    /// # Errors
    /// If it has not, or `note` is none.
    pub fn new(note: String, key: CheckpointVerifier) -> Result<Self, CheckpointError> {
        let checkpoint = key.verify(&note)?;
        Ok(Self { note, key, checkpoint })
    }
}

/// Decides on an offered checkpoint. The first one is taken over together with its key; from then on the key that is known counts, and a
/// new one only on a note that both have signed.
pub(super) fn judge(known: Option<&KnownCheckpoint>, offer: &wire::LedgerCheckpoint) -> Result<Verdict, Complaint> {
    let offered_key = offer.verifier_key.parse::<CheckpointVerifier>();
    let Some(known) = known else {
        let key = offered_key.map_err(|error| unreadable(&error))?;
        let first = KnownCheckpoint::new(offer.note.clone(), key).map_err(|error| unreadable(&error))?;
        return Ok(Verdict::Newer(first));
    };
    let checkpoint = match known.key.verify(&offer.note) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return continues(known, offer).ok_or_else(|| not_ours(known, offer, &error))?,
    };
    let key = offered_key.ok().filter(|key| key.verify(&offer.note).is_ok()).unwrap_or_else(|| known.key.clone());
    let (old, new) = (known.checkpoint.size, checkpoint.size);
    if new < old {
        return Err(complaint(AlarmReason::Smaller, format!("it has {new} entries, and the agent was shown one with {old} before")));
    }
    if new == old {
        if checkpoint.root != known.checkpoint.root {
            return Err(complaint(AlarmReason::Forked, format!("it differs from another one with as many entries, {old}")));
        }
    } else {
        if offer.proof_from != old {
            return Ok(Verdict::ProofFromElsewhere);
        }
        check_proof(&known.checkpoint, &checkpoint, &offer.proof)?;
    }
    if offer.note == known.note && key == known.key {
        return Ok(Verdict::Same);
    }
    Ok(Verdict::Newer(KnownCheckpoint { note: offer.note.clone(), key, checkpoint }))
}

fn check_proof<B: AsRef<[u8]>>(old: &Checkpoint, new: &Checkpoint, proof: &[B]) -> Result<(), Complaint> {
    let hashes: Result<Vec<Hash>, _> = proof.iter().take(MAX_PROOF + 1).map(|hash| Hash::try_from(hash.as_ref())).collect();
    let inconsistent = |message: String| complaint(AlarmReason::Inconsistent, message);
    let hashes = hashes.map_err(|_| inconsistent("a hash of its proof has not 32 bytes".to_owned()))?;
    if hashes.len() > MAX_PROOF {
        return Err(inconsistent(format!("its proof has more than {MAX_PROOF} hashes")));
    }
    checkpoint::verify_consistency(old, new, &hashes).map_err(|error| inconsistent(error.to_string()))
}

/// What comes of a log that is said to continue the known one; nothing if that is not said.
fn continues(known: &KnownCheckpoint, offer: &wire::LedgerCheckpoint) -> Option<Result<Verdict, Complaint>> {
    let verified = continued::verify(known, offer, offer.first.as_ref()?);
    let refused = |problem| {
        let old = &known.checkpoint.origin;
        complaint(
            AlarmReason::OtherOrigin,
            format!("a new log is said to continue {old}, which the agent knows, and is not shown to: {problem}"),
        )
    };
    Some(verified.map(|(newer, log)| Verdict::Continued(newer, log)).map_err(refused))
}

/// The known key did not sign it: whose is it then?
fn not_ours(known: &KnownCheckpoint, offer: &wire::LedgerCheckpoint, error: &CheckpointError) -> Complaint {
    let by_its_own_key = offer.verifier_key.parse::<CheckpointVerifier>().and_then(|key| key.verify(&offer.note));
    match (by_its_own_key, error) {
        (Ok(checkpoint), _) if checkpoint.origin != known.checkpoint.origin => {
            let (found, wanted) = (checkpoint.origin, &known.checkpoint.origin);
            let message = format!("it is of the log {found}; the agent knows {wanted}, with {} entries", known.checkpoint.size);
            complaint(AlarmReason::OtherOrigin, message)
        }
        (_, CheckpointError::Malformed(_)) => unreadable(error),
        _ => complaint(AlarmReason::OtherKey, error.to_string()),
    }
}

fn unreadable(error: &CheckpointError) -> Complaint {
    complaint(AlarmReason::Unreadable, error.to_string())
}

fn complaint(reason: AlarmReason, message: String) -> Complaint {
    Complaint { reason, message }
}
