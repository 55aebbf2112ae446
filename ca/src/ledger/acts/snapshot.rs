//! The state as entries: in parts that fit, each signed, and back.

use chancery_identity::Fingerprint;
use chancery_proto::chancery::v1 as wire;
use prost::Message;

use super::ActError;
use super::change::{Crls, RootState, Subject, array, digest, spiffe_id};
use super::state::{AcceptedLoss, Ban, CheckpointKey, CrlRecord, Deadline, Restored, Revocation, Root, State};
use crate::ledger::entry::{from_millis, to_millis};

/// What the lists of one part take at most; with epoch, numbers, signature and the entry's own fields it is well below an entry's limit.
const PART_BYTES: usize = 60_000;
/// What an item costs beside its own bytes: field key and length.
const ITEM_OVERHEAD_BYTES: usize = 6;

/// An item of one of the lists.
enum Item {
    Root(wire::state::Root),
    Revocation(wire::state::Revocation),
    Ban(wire::state::Ban),
    CheckpointKey(wire::state::CheckpointKeyState),
    /// At most one.
    Loss(wire::state::Loss),
    /// At most one.
    Crl(wire::state::Crl),
    /// At most one.
    RequestedRoot(Vec<u8>),
    /// At most one.
    Restored(wire::state::Restoration),
}

impl State {
    /// Its parts, not signed yet; at least one.
    pub(super) fn to_parts(&self) -> Vec<wire::State> {
        let mut parts = vec![wire::State::default()];
        let mut bytes = 0;
        for item in self.items() {
            let size = item.size();
            if bytes + size > PART_BYTES {
                parts.push(wire::State::default());
                bytes = 0;
            }
            bytes += size;
            if let Some(part) = parts.last_mut() {
                item.add_to(part);
            }
        }
        let count = u32::try_from(parts.len()).unwrap_or(u32::MAX);
        for (number, part) in (0..).zip(&mut parts) {
            (part.epoch, part.part, part.parts) = (self.epoch, number, count);
        }
        parts
    }

    /// Upper bound of the bytes that its parts take together.
    pub(super) fn recorded_bytes(&self) -> usize {
        self.items().map(|item| item.size()).sum()
    }

    /// Puts parts together.
    ///
    /// # Errors
    /// If they are not all the parts of one state, in their order.
    pub(super) fn from_parts(parts: Vec<wire::State>) -> Result<Self, ActError> {
        let (count, epoch) = (parts.len(), parts.first().map_or(0, |part| part.epoch));
        let mut state = Self { epoch, ..Self::default() };
        for (number, part) in parts.into_iter().enumerate() {
            let fits = part.epoch == epoch && usize::try_from(part.part) == Ok(number) && usize::try_from(part.parts) == Ok(count);
            if !fits {
                let problem = format!("is {} of {}, and part {number} of {count} of epoch {epoch} is due", part.part, part.parts);
                return Err(ActError::Field { field: "part", problem });
            }
            state.add(part)?;
        }
        Ok(state)
    }

    fn items(&self) -> impl Iterator<Item = Item> {
        let roots = self.roots.iter().map(|(fingerprint, root)| {
            Item::Root(wire::state::Root {
                fingerprint: fingerprint.0.to_vec(),
                state: wire::RootState::from(root.state).into(),
                since_ms: to_millis(root.since),
                entry: root.entry,
                leave_by_ms: root.leave_by.map(|deadline| to_millis(deadline.at)),
                leave_ordered_ms: root.leave_by.map(|deadline| to_millis(deadline.since)),
            })
        });
        let revocations = self.revocations.iter().map(|(subject, revocation)| {
            Item::Revocation(wire::state::Revocation {
                subject: Some(subject.clone().into()),
                since_ms: to_millis(revocation.since),
                entry: revocation.entry,
                until_ms: to_millis(revocation.until),
                allowed_ms: revocation.allowed.map_or(0, to_millis),
            })
        });
        let bans = self
            .bans
            .iter()
            .map(|(agent, ban)| Item::Ban(wire::state::Ban { agent: agent.to_string(), since_ms: to_millis(ban.since), entry: ban.entry }));
        let keys = self.checkpoint_keys.iter().map(|key| {
            Item::CheckpointKey(wire::state::CheckpointKeyState {
                public_key: key.key.to_vec(),
                since_ms: to_millis(key.since),
                entry: key.entry,
            })
        });
        let loss = self.accepted_loss.iter().map(|loss| {
            Item::Loss(wire::state::Loss {
                origin: loss.origin.clone(),
                first: loss.missing.start,
                end: loss.missing.end,
                trust_floor: loss.trust_floor,
                roots_kept_until_ms: to_millis(loss.roots_kept_until),
                epoch: loss.epoch,
                since_ms: to_millis(loss.since),
            })
        });
        let crl = self.crl.iter().map(|record| {
            Item::Crl(wire::state::Crl {
                number: record.crls.number,
                sha256: record.crls.sha256.map(Vec::from).unwrap_or_default(),
                certificates: record.crls.certificates,
                since_ms: to_millis(record.since),
                entry: record.entry,
            })
        });
        let requested = self.requested_root.iter().cloned().map(Item::RequestedRoot);
        let restored = self.restored.iter().map(|restored| {
            Item::Restored(wire::state::Restoration {
                entries: restored.entries,
                roots_kept_until_ms: to_millis(restored.roots_kept_until),
                since_ms: to_millis(restored.since),
                trust_floor: restored.trust_floor,
                epoch: restored.epoch,
            })
        });
        loss.chain(restored).chain(crl).chain(requested).chain(roots).chain(revocations).chain(bans).chain(keys)
    }

    fn add(&mut self, part: wire::State) -> Result<(), ActError> {
        if let Some(loss) = part.loss {
            self.accepted_loss = Some(AcceptedLoss {
                origin: loss.origin,
                missing: loss.first..loss.end,
                since: from_millis(loss.since_ms),
                trust_floor: loss.trust_floor,
                roots_kept_until: from_millis(loss.roots_kept_until_ms),
                epoch: loss.epoch,
            });
        }
        if let Some(restored) = part.restored {
            self.restored = Some(Restored {
                entries: restored.entries,
                roots_kept_until: from_millis(restored.roots_kept_until_ms),
                since: from_millis(restored.since_ms),
                trust_floor: restored.trust_floor,
                epoch: restored.epoch,
            });
        }
        if let Some(crl) = part.crl {
            let crls = Crls { number: crl.number, sha256: digest("crl.sha256", &crl.sha256)?, certificates: crl.certificates };
            self.crl = Some(CrlRecord { crls, since: from_millis(crl.since_ms), entry: crl.entry });
        }
        if !part.requested_root.is_empty() {
            self.requested_root = Some(part.requested_root);
        }
        for root in part.roots {
            let state = wire::RootState::try_from(root.state).map_err(|_| ActError::UnknownChange)?;
            let state = RootState::try_from(state)?;
            let leave_by = root.leave_by_ms.zip(root.leave_ordered_ms);
            let leave_by = leave_by.map(|(at, since)| Deadline { at: from_millis(at), since: from_millis(since) });
            let root_state = Root { state, since: from_millis(root.since_ms), entry: root.entry, leave_by };
            self.roots.insert(Fingerprint(array("roots.fingerprint", &root.fingerprint)?), root_state);
        }
        for revocation in part.revocations {
            let recorded = Revocation {
                since: from_millis(revocation.since_ms),
                entry: revocation.entry,
                until: from_millis(revocation.until_ms),
                allowed: (revocation.allowed_ms != 0).then(|| from_millis(revocation.allowed_ms)),
            };
            self.revocations.insert(Subject::from_wire(revocation.subject)?, recorded);
        }
        for ban in part.bans {
            let agent = spiffe_id("bans.agent", &ban.agent)?;
            self.bans.insert(agent, Ban { since: from_millis(ban.since_ms), entry: ban.entry });
        }
        for key in part.checkpoint_keys {
            let array = array("checkpoint_keys.public_key", &key.public_key)?;
            self.checkpoint_keys.push(CheckpointKey { key: array, since: from_millis(key.since_ms), entry: key.entry });
        }
        Ok(())
    }
}

impl Item {
    fn size(&self) -> usize {
        let bytes = match self {
            Self::Root(item) => item.encoded_len(),
            Self::Revocation(item) => item.encoded_len(),
            Self::Ban(item) => item.encoded_len(),
            Self::CheckpointKey(item) => item.encoded_len(),
            Self::Loss(item) => item.encoded_len(),
            Self::Crl(item) => item.encoded_len(),
            Self::RequestedRoot(csr) => csr.len(),
            Self::Restored(item) => item.encoded_len(),
        };
        bytes + ITEM_OVERHEAD_BYTES
    }

    fn add_to(self, part: &mut wire::State) {
        match self {
            Self::Root(item) => part.roots.push(item),
            Self::Revocation(item) => part.revocations.push(item),
            Self::Ban(item) => part.bans.push(item),
            Self::CheckpointKey(item) => part.checkpoint_keys.push(item),
            Self::Loss(item) => part.loss = Some(item),
            Self::Crl(item) => part.crl = Some(item),
            Self::RequestedRoot(csr) => part.requested_root = csr,
            Self::Restored(item) => part.restored = Some(item),
        }
    }
}
