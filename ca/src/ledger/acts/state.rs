//! The state that acts lead to: which roots are where, who is banned, what is revoked, which keys sign checkpoints.
//!
//! Nothing but acts changes it ([`State::apply`]), and it depends on nothing but them and their times: folding the same acts again gives the
//! same state. It is bounded: what has expired is forgotten with the next act, and an act that would make it larger than
//! [`MAX_STATE_BYTES`] is refused before it is recorded.

use std::collections::BTreeMap;
use std::ops::Range;

use chancery_identity::{Fingerprint, Serial, SpiffeId};
use time::OffsetDateTime;
use uuid::Uuid;

use super::ActError;
use super::change::{Change, Crls, RootState, Subject};

/// The most bytes that the state may take when it is recorded: it fits into one durable write.
pub const MAX_STATE_BYTES: usize = 3 << 20;

/// What the acts recorded so far lead to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// The epoch that it belongs to, which is the number of acts.
    pub epoch: u64,
    /// The roots that acts have named.
    pub roots: BTreeMap<Fingerprint, Root>,
    /// What is revoked, and who is not issued to.
    pub revocations: BTreeMap<Subject, Revocation>,
    /// Agents that nothing is issued to, nor on their behalf.
    pub bans: BTreeMap<SpiffeId, Ban>,
    /// The keys that have signed checkpoints, oldest first; the last one does now.
    pub checkpoint_keys: Vec<CheckpointKey>,
    /// The newest CRLs, also if those were withdrawn; none while there never were any.
    pub crl: Option<CrlRecord>,
    /// The newest request to a corporate CA for a root (PKCS #10, DER), answered or not.
    pub requested_root: Option<Vec<u8>>,
    /// The log that this one continues, if that one was lost in part.
    pub accepted_loss: Option<AcceptedLoss>,
    /// How it was restored from a backup last.
    pub restored: Option<Restored>,
}

/// A log was lost in part, and this one continues it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcceptedLoss {
    /// Of the old log.
    pub origin: String,
    /// The old log's entries that are not known; an empty range where nobody knows whether there were any.
    pub missing: Range<u64>,
    /// When it was accepted.
    pub since: OffsetDateTime,
    /// Added to the sequence of each trust state, so that none is smaller than one that agents were given before.
    pub trust_floor: u64,
    /// Until then a certificate that is in no log may be valid, and no root is retired.
    pub roots_kept_until: OffsetDateTime,
    /// The old log's, behind the last act that is not lost.
    pub epoch: u64,
}

/// The log goes on from a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restored {
    /// How many the backup had.
    pub entries: u64,
    /// Until then a certificate that is not in the log may be valid, and no root is activated or retired.
    pub roots_kept_until: OffsetDateTime,
    /// When the CA was started with it first.
    pub since: OffsetDateTime,
    /// As of [`AcceptedLoss`].
    pub trust_floor: u64,
    /// Behind the last act that the backup had: acts of this epoch and later ones may be lost.
    pub epoch: u64,
}

/// A trust root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Root {
    /// Where it is.
    pub state: RootState,
    /// Since when.
    pub since: OffsetDateTime,
    /// The act's entry.
    pub entry: u64,
    /// It is being distrusted, and leaves the bundles by then.
    pub leave_by: Option<Deadline>,
}

/// When a root that is being distrusted leaves the bundles at the latest, by the clocks of the CA that was told so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline {
    /// Then.
    pub at: OffsetDateTime,
    /// When that was ordered.
    pub since: OffsetDateTime,
}

/// Certificates issued until `since` are revoked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Revocation {
    /// When they were revoked.
    pub since: OffsetDateTime,
    /// The act's entry.
    pub entry: u64,
    /// The last of them has expired then.
    pub until: OffsetDateTime,
    /// Issuance goes on since then; it does not if none.
    pub allowed: Option<OffsetDateTime>,
}

/// An agent's ban.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ban {
    /// Since when.
    pub since: OffsetDateTime,
    /// The act's entry.
    pub entry: u64,
}

/// The CRLs that the trust state has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CrlRecord {
    /// Which.
    pub crls: Crls,
    /// Since when.
    pub since: OffsetDateTime,
    /// The act's entry.
    pub entry: u64,
}

/// A key that signs checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckpointKey {
    /// Ed25519.
    pub key: [u8; 32],
    /// Since when.
    pub since: OffsetDateTime,
    /// The act's entry.
    pub entry: u64,
}

/// Who asks for a certificate, as far as revocations tell them apart.
#[derive(Clone, Copy, Debug)]
pub struct Applicant<'a> {
    /// The ID that the certificate would have.
    pub spiffe_id: &'a SpiffeId,
    /// The pod that it would be for.
    pub pod_uid: Option<Uuid>,
    /// The agent's or sidecar's cluster.
    pub cluster: &'a str,
    /// The node's name; may be empty.
    pub node: &'a str,
    /// The agent or sidecar that asks.
    pub agent: &'a SpiffeId,
}

impl State {
    /// What the act in `entry`, recorded at `time`, makes of it. Also raises the epoch.
    ///
    /// # Errors
    /// If the change is not one that this state can go through; the state is then unchanged.
    pub(super) fn apply(&mut self, change: &Change, time: OffsetDateTime, entry: u64) -> Result<(), ActError> {
        match change {
            Change::Root { root, to, .. } => self.move_root(*root, *to, time, entry)?,
            Change::BeginDistrust { root, leave_by } => self.begin_distrust(*root, Deadline { at: *leave_by, since: time })?,
            Change::Revoke { subject, until } => self.revoke(subject.clone(), *until, time, entry),
            Change::Allow(subject) => self.allow(subject, time)?,
            Change::Ban { agent, until } => self.ban(agent, *until, time, entry)?,
            Change::Unban(agent) => {
                self.bans.remove(agent).ok_or_else(|| ActError::Impossible(format!("{agent} is not banned")))?;
            }
            Change::Crl(crls) => {
                if let Some(before) = self.crl.filter(|before| before.crls.number >= crls.number) {
                    let (before, number) = (before.crls.number, crls.number);
                    return Err(ActError::Impossible(format!(
                        "CRLs with the number {before} were issued before, and {number} is no larger"
                    )));
                }
                self.crl = Some(CrlRecord { crls: *crls, since: time, entry });
            }
            Change::CheckpointKey(key) => {
                if self.checkpoint_keys.iter().any(|known| known.key == *key) {
                    return Err(ActError::Impossible(format!("the key {} has signed checkpoints before", hex::encode(key))));
                }
                self.checkpoint_keys.push(CheckpointKey { key: *key, since: time, entry });
            }
            Change::RequestRoot { csr } => self.requested_root = Some(csr.clone()),
            Change::Refused(_) => {}
            Change::AcceptedLoss { origin, missing, trust_floor, roots_kept_until, epoch, .. } => {
                if entry != 0 {
                    return Err(ActError::Impossible(
                        "a loss is accepted by the first entry of a new log alone (`chancery-ca restore`)".into(),
                    ));
                }
                let (origin, missing, trust_floor) = (origin.clone(), missing.clone(), *trust_floor);
                self.accepted_loss =
                    Some(AcceptedLoss { origin, missing, since: time, trust_floor, roots_kept_until: *roots_kept_until, epoch: *epoch });
            }
            Change::Restored { entries, roots_kept_until, trust_floor, epoch } => {
                let (entries, roots_kept_until, trust_floor, epoch) = (*entries, *roots_kept_until, *trust_floor, *epoch);
                self.restored = Some(Restored { entries, roots_kept_until, since: time, trust_floor, epoch });
            }
        }
        self.revocations.retain(|subject, revocation| !revocation.is_over(subject, time));
        self.epoch += 1;
        Ok(())
    }

    fn revoke(&mut self, subject: Subject, until: OffsetDateTime, since: OffsetDateTime, entry: u64) {
        let until = self.revocations.get(&subject).map_or(until, |before| before.until.max(until));
        self.revocations.insert(subject, Revocation { since, entry, until, allowed: None });
    }

    /// What revokes the agent's own certificates stays when the ban is taken back. It keeps nobody from another, which the ban does.
    fn ban(&mut self, agent: &SpiffeId, until: OffsetDateTime, since: OffsetDateTime, entry: u64) -> Result<(), ActError> {
        if self.is_banned(agent) {
            return Err(ActError::Impossible(format!("{agent} is banned already")));
        }
        self.bans.insert(agent.clone(), Ban { since, entry });
        let subject = Subject::SpiffeId(agent.clone());
        let kept_back = self.revocations.get(&subject).is_some_and(|before| before.allowed.is_none());
        self.revoke(subject.clone(), until, since, entry);
        if let Some(revocation) = self.revocations.get_mut(&subject).filter(|_| !kept_back) {
            revocation.allowed = Some(since);
        }
        Ok(())
    }

    /// Why a root cannot go on to `to` from where it is; nothing if it can.
    pub fn impossible(&self, root: Fingerprint, to: RootState) -> Option<String> {
        use RootState::{Active, Distrusted, Draining, Prepared, Published, Retired};
        let there = self.roots.get(&root);
        let from = there.map(|root| root.state);
        if let (Some(Root { leave_by: Some(Deadline { at, .. }), .. }), Retired) = (there, to) {
            return Some(format!("the root {root} is being distrusted, and leaves by itself by {at}: it cannot become {to}"));
        }
        let possible = match to {
            // A CA's first root is active from the beginning.
            Active => from == Some(Published) || (from.is_none() && self.active_root().is_none()),
            Prepared => from.is_none(),
            Published => from == Some(Prepared),
            // Follows from the activation of the next.
            Draining => false,
            // One that never became active is given up.
            Retired => matches!(from, Some(Prepared | Published | Draining)),
            Distrusted => from != Some(Distrusted),
        };
        let from = from.map_or_else(|| "not known".to_owned(), |from| from.to_string());
        (!possible).then(|| format!("the root {root} is {from} and cannot become {to}"))
    }

    fn move_root(&mut self, root: Fingerprint, to: RootState, since: OffsetDateTime, entry: u64) -> Result<(), ActError> {
        if let Some(why) = self.impossible(root, to) {
            return Err(ActError::Impossible(why));
        }
        if to == RootState::Active
            && let Some(before) = self.active_root()
        {
            let leave_by = self.roots.get(&before).and_then(|before| before.leave_by);
            self.roots.insert(before, Root { state: RootState::Draining, since, entry, leave_by });
        }
        self.roots.insert(root, Root { state: to, since, entry, leave_by: None });
        Ok(())
    }

    /// Where the root is does not change yet, nor what anybody trusts.
    fn begin_distrust(&mut self, root: Fingerprint, leave_by: Deadline) -> Result<(), ActError> {
        let impossible = |why: String| Err(ActError::Impossible(format!("the root {root} is {why}")));
        match self.roots.get_mut(&root) {
            Some(Root { leave_by: Some(before), .. }) if before.at <= leave_by.at => {
                impossible(format!("being distrusted already, and leaves by {}", before.at))
            }
            Some(there) if matches!(there.state, RootState::Active | RootState::Draining) => {
                there.leave_by = Some(leave_by);
                Ok(())
            }
            Some(there) => impossible(format!("{}, and nothing alive chains to it: distrust it at once", there.state)),
            None => impossible("not known".to_owned()),
        }
    }

    fn allow(&mut self, subject: &Subject, time: OffsetDateTime) -> Result<(), ActError> {
        if let Subject::Serial(_) = subject {
            return Err(ActError::Impossible(format!("{subject} is one certificate, and its revocation keeps nobody from another")));
        }
        match self.revocations.get_mut(subject) {
            Some(revocation) if revocation.allowed.is_none() => {
                revocation.allowed = Some(time);
                Ok(())
            }
            _ => Err(ActError::Impossible(format!("{subject} is not kept from certificates"))),
        }
    }

    /// The root that issuing certificates are signed with; none before an act has named one.
    pub fn active_root(&self) -> Option<Fingerprint> {
        self.roots.iter().find(|(_, root)| root.state == RootState::Active).map(|(fingerprint, _)| *fingerprint)
    }

    /// The roots that are trusted never again.
    pub fn distrusted(&self) -> impl Iterator<Item = Fingerprint> + '_ {
        self.roots.iter().filter(|(_, root)| root.state == RootState::Distrusted).map(|(fingerprint, _)| *fingerprint)
    }

    /// What is added to the sequence of each trust state: 0 but for a log that was restored from a backup, or continues a lost one.
    pub fn trust_floor(&self) -> u64 {
        let restored = self.restored.map_or(0, |restored| restored.trust_floor);
        self.accepted_loss.as_ref().map_or(0, |loss| loss.trust_floor).max(restored)
    }

    /// When what everybody trusts changed last: a root (whoever prepares one changes nothing for anybody) or the CRLs.
    pub fn trust_changed_at(&self) -> Option<OffsetDateTime> {
        let roots = self.roots.values().filter(|root| root.state != RootState::Prepared).map(|root| root.since);
        roots.chain(self.crl.map(|crl| crl.since)).max()
    }

    /// Until when roots stay where they are, since certificates that the log lacks may be valid: none but for a log that was restored from a
    /// backup, or continues a lost one. [`Ledger::act`](crate::ledger::Ledger::act) refuses to retire one until then.
    pub fn roots_kept_until(&self) -> Option<OffsetDateTime> {
        let lost = self.accepted_loss.as_ref().map(|loss| loss.roots_kept_until);
        lost.max(self.restored.map(|restored| restored.roots_kept_until))
    }

    /// Whether nothing is issued to this agent, nor on its behalf.
    pub fn is_banned(&self, agent: &SpiffeId) -> bool {
        self.bans.contains_key(agent)
    }

    /// What the newest act on CRLs left in force: none if there are no CRLs.
    pub fn crls(&self) -> Option<CrlRecord> {
        self.crl.filter(|record| record.crls.sha256.is_some())
    }

    /// The key that signs checkpoints now; none before an act has named one.
    pub fn checkpoint_key(&self) -> Option<&CheckpointKey> {
        self.checkpoint_keys.last()
    }

    /// Why nothing may be issued to `applicant`; nothing if it may.
    pub fn obstacle(&self, applicant: &Applicant<'_>) -> Option<String> {
        let Applicant { spiffe_id, pod_uid, cluster, node, agent } = *applicant;
        if let Some(ban) = self.bans.get(agent) {
            return Some(format!("{agent} was banned by an operator (ledger entry {}); `chancery agent unban` takes it back", ban.entry));
        }
        if self.revocations.is_empty() {
            return None;
        }
        let node = (!node.is_empty()).then(|| Subject::Node { cluster: cluster.to_owned(), node: node.to_owned() });
        let subjects = [Subject::SpiffeId(spiffe_id.clone()), Subject::Agent(agent.clone())];
        subjects.into_iter().chain(pod_uid.map(Subject::Pod)).chain(node).find_map(|subject| {
            let revocation = self.revocations.get(&subject).filter(|revocation| revocation.allowed.is_none())?;
            let entry = revocation.entry;
            Some(format!("{subject} was revoked by an operator (ledger entry {entry}); `chancery identity allow` lets it go on"))
        })
    }

    /// Whether the certificate with this serial is revoked by it; other revocations are by what the ledger holds about the certificate.
    pub fn is_revoked(&self, serial: Serial) -> bool {
        self.revocations.contains_key(&Subject::Serial(serial))
    }
}

impl Revocation {
    /// Whether nothing that it revoked is alive, nor anybody kept from certificates by it.
    fn is_over(&self, subject: &Subject, now: OffsetDateTime) -> bool {
        self.until <= now && (self.allowed.is_some() || matches!(subject, Subject::Serial(_)))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::ledger::acts::Overrides;

    const NOW: OffsetDateTime = time::macros::datetime!(2026-03-01 12:00 UTC);
    const HOUR: Duration = Duration::from_secs(3600);

    fn id(text: &str) -> SpiffeId {
        format!("spiffe://example.org/{text}").parse().unwrap()
    }

    fn root(number: u8, to: RootState) -> Change {
        Change::Root { root: Fingerprint([number; 32]), to, overrides: Overrides::default() }
    }

    /// What it revokes has expired.
    fn ban(agent: SpiffeId) -> Change {
        Change::Ban { agent, until: NOW }
    }

    /// The state after changes of which each is possible.
    fn after(changes: impl IntoIterator<Item = Change>) -> State {
        let mut state = State::default();
        for change in changes {
            state.apply(&change, NOW, state.epoch).unwrap();
        }
        state
    }

    #[test]
    fn a_root_goes_from_prepared_to_retired_and_draws_the_one_before_along() {
        use RootState::{Active, Draining, Prepared, Published, Retired};
        let state = after([root(1, Active), root(2, Prepared), root(2, Published), root(2, Active)]);
        assert_eq!(state.active_root(), Some(Fingerprint([2; 32])));
        assert_eq!(state.roots[&Fingerprint([1; 32])].state, Draining);
        let state = after([root(1, Active), root(2, Prepared), root(2, Published), root(2, Active), root(1, Retired)]);
        assert_eq!(state.roots[&Fingerprint([1; 32])].state, Retired);
    }

    #[test]
    fn a_root_takes_no_short_cut_and_no_way_back() {
        use RootState::{Active, Distrusted, Draining, Prepared, Published, Retired};
        let state = after([root(1, Active), root(2, Prepared), root(3, Prepared), root(3, Distrusted)]);
        let impossible =
            [(1, Prepared), (1, Retired), (1, Draining), (1, Active), (2, Active), (2, Prepared), (3, Active), (3, Distrusted)];
        for (number, to) in impossible.into_iter().chain([(4, Active), (4, Published), (4, Retired)]) {
            let mut same = state.clone();
            let error = same.apply(&root(number, to), NOW, 9).unwrap_err();
            assert!(matches!(error, ActError::Impossible(_)) && same == state, "{number} {to}: {error}");
        }
        assert_eq!(state.distrusted().collect::<Vec<_>>(), [Fingerprint([3; 32])]);
    }

    #[test]
    fn a_distrust_that_has_begun_stays_with_its_root_until_it_has_left() {
        use RootState::{Active, Distrusted, Draining, Prepared, Published};
        let begin = |number: u8, leave_by| Change::BeginDistrust { root: Fingerprint([number; 32]), leave_by };
        let mut state = after([root(1, Active), root(2, Prepared), root(2, Published), begin(1, NOW + HOUR), root(2, Active)]);
        let old = state.roots[&Fingerprint([1; 32])];
        assert_eq!((old.state, old.leave_by), (Draining, Some(Deadline { at: NOW + HOUR, since: NOW })));
        assert_eq!(State::from_parts(state.to_parts()).unwrap(), state);
        for impossible in [begin(1, NOW + HOUR), begin(3, NOW), begin(1, NOW + HOUR * 2), root(1, RootState::Retired)] {
            assert!(state.clone().apply(&impossible, NOW, 9).is_err());
        }
        state.apply(&begin(1, NOW), NOW, 9).unwrap();
        state.apply(&root(1, Distrusted), NOW, 10).unwrap();
        assert_eq!(state.roots[&Fingerprint([1; 32])].leave_by, None);
        assert!(state.apply(&begin(1, NOW), NOW, 11).is_err());
    }

    #[test]
    fn who_is_revoked_gets_nothing_until_it_is_allowed_but_one_serial_keeps_nobody_back() {
        let (cart, agent, pod) = (id("ns/shop/sa/cart"), id("chancery/agent/east/7"), Uuid::from_u128(7));
        let applicant = Applicant { spiffe_id: &cart, pod_uid: Some(pod), cluster: "east", node: "node-1", agent: &agent };
        let node = Subject::Node { cluster: "east".into(), node: "node-1".into() };
        for subject in [Subject::SpiffeId(cart.clone()), Subject::Pod(pod), node, Subject::Agent(agent.clone())] {
            let revoke = Change::Revoke { subject: subject.clone(), until: NOW + HOUR };
            let obstacle = after([revoke.clone()]).obstacle(&applicant).unwrap();
            assert!(obstacle.contains("chancery identity allow"), "{obstacle}");
            let allowed = after([revoke, Change::Allow(subject.clone())]);
            assert_eq!((allowed.obstacle(&applicant), allowed.revocations[&subject].allowed), (None, Some(NOW)));
        }
        let serial = Subject::Serial(Serial([7; 16]));
        let state = after([Change::Revoke { subject: serial.clone(), until: NOW + HOUR }]);
        assert!(state.obstacle(&applicant).is_none() && state.is_revoked(Serial([7; 16])));
        assert!(state.clone().apply(&Change::Allow(serial), NOW, 1).is_err());
        let banned = after([ban(agent.clone())]).obstacle(&applicant).unwrap();
        assert!(banned.contains("chancery agent unban"), "{banned}");
        let elsewhere = Applicant { cluster: "west", ..applicant };
        let node = Subject::Node { cluster: "east".into(), node: "node-1".into() };
        assert!(after([Change::Revoke { subject: node, until: NOW + HOUR }]).obstacle(&elsewhere).is_none());
    }

    #[test]
    fn a_ban_revokes_the_agents_own_certificates_which_stay_so_when_it_is_taken_back() {
        let agent = id("chancery/agent/east/7");
        let (ban, own) = (Change::Ban { agent: agent.clone(), until: NOW + HOUR }, Subject::SpiffeId(agent.clone()));
        let state = after([ban.clone(), Change::Unban(agent.clone())]);
        assert!(state.revocations.contains_key(&own) && !state.is_banned(&agent));
        let applicant = Applicant { spiffe_id: &agent, pod_uid: None, cluster: "east", node: "", agent: &agent };
        assert_eq!(state.obstacle(&applicant), None, "it may join again");
        // What was revoked for another reason keeps it from certificates as before.
        let revoke = Change::Revoke { subject: own.clone(), until: NOW + HOUR };
        let state = after([revoke, ban, Change::Unban(agent.clone())]);
        assert!(state.obstacle(&applicant).is_some());
    }

    #[test]
    fn crls_come_in_the_order_of_their_numbers_and_that_there_were_some_stays_known() {
        let crls = |number, sha256| Change::Crl(Crls { number, sha256, certificates: 1 });
        let state = after([crls(7, Some([1; 32]))]);
        assert_eq!(state.crls().map(|record| record.crls.number), Some(7));
        assert!(state.clone().apply(&crls(7, Some([2; 32])), NOW, 9).is_err());
        let state = after([crls(7, Some([1; 32])), crls(8, None)]);
        assert!(state.crls().is_none() && state.crl.is_some());
        assert_eq!(State::from_parts(state.to_parts()).unwrap(), state);
    }

    #[test]
    fn what_has_expired_is_forgotten_with_the_next_act_unless_it_keeps_somebody_back() {
        let (serial, pod) = (Subject::Serial(Serial([7; 16])), Subject::Pod(Uuid::from_u128(7)));
        let revoke = |subject: &Subject| Change::Revoke { subject: subject.clone(), until: NOW + HOUR };
        let mut state = after([revoke(&serial), revoke(&pod)]);
        state.apply(&ban(id("chancery/agent/east/7")), NOW + HOUR, 2).unwrap();
        assert_eq!(state.revocations.keys().collect::<Vec<_>>(), [&pod]);
        state.apply(&Change::Allow(pod), NOW + HOUR, 3).unwrap();
        assert!(state.revocations.is_empty());
    }

    #[test]
    fn trust_states_go_on_above_what_agents_were_given_before_a_restoration() {
        let restored = Change::Restored { entries: 7, roots_kept_until: NOW + HOUR, trust_floor: 1000, epoch: 3 };
        let mut state = after([restored]);
        assert_eq!(State::from_parts(state.to_parts()).unwrap(), state);
        let loss = |trust_floor| AcceptedLoss {
            origin: "example.org/chancery/0123".into(),
            missing: 7..9,
            since: NOW,
            trust_floor,
            roots_kept_until: NOW,
            epoch: 1,
        };
        for (floor, sum) in [(0, 1000), (2000, 2000)] {
            state.accepted_loss = Some(loss(floor));
            assert_eq!(state.trust_floor(), sum);
        }
    }

    #[test]
    fn the_newest_request_for_a_root_is_remembered() {
        let request = |number| Change::RequestRoot { csr: vec![number; 300] };
        let state = after([request(1), request(2)]);
        assert_eq!(state.requested_root, Some(vec![2; 300]));
        assert_eq!(State::from_parts(state.to_parts()).unwrap(), state);
    }

    #[test]
    fn a_large_state_is_recorded_in_parts_that_fit_and_is_put_together_again() {
        let state = after((0..3000).map(|number| ban(id(&format!("chancery/agent/east/{number:0100}")))));
        let parts = state.to_parts();
        assert!(parts.len() > 5 && state.recorded_bytes() < MAX_STATE_BYTES);
        assert!(parts.iter().all(|part| prost::Message::encoded_len(part) < 64_000));
        assert_eq!(State::from_parts(parts.clone()).unwrap(), state);
        for wrong in [&parts[1..], &parts[..parts.len() - 1]] {
            assert!(State::from_parts(wrong.to_vec()).is_err());
        }
        let mut swapped = parts;
        swapped.swap(0, 1);
        assert!(State::from_parts(swapped).is_err());
    }
}
