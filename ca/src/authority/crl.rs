//! The CRLs: which of what was issued is revoked, for each issuing certificate, signed with its key.
//!
//! A proxy that holds CRLs refuses everybody under an issuing certificate that they do not speak for, and everybody under one whose CRL has
//! expired or is not yet valid by its clock. So there is a CRL for every issuing certificate under a root in the bundles that has not expired;
//! it outlives its issuing certificate, and begins with it, and an hour ago at the latest; and a new issuing certificate signs nothing before
//! everybody who counts holds its CRL ([`Crls::choose`]).
//!
//! What is revoked follows from the ledger's state. Signing the same again gives other bytes, so each time is an act, whose entry raises the
//! trust state's sequence, with a digest of the bytes. Those lie beside the ledger; should they be lost, others are signed and recorded.
//! There are none before something is revoked, and none once all of it has expired.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, digest};
use chancery_identity::{Crl, Fingerprint, Serial};
use time::{Duration, OffsetDateTime};

use super::copies::Copies;
use super::held::Held;
use super::make::Maker;
use super::revoke::REMEMBERED;
use super::{AuthorityError, Issuer};
use crate::ledger::acts::{CA_ACTOR, Change, CrlRecord, Crls as CrlsAct, RootState, State};
use crate::ledger::{IdentityFilter, Ledger, LedgerError, Revocable};

/// How many certificates may be revoked at once and not expired. Each takes some 50 bytes in every proxy.
pub const MAX_REVOKED: usize = 10_000;
/// What has expired stays on the CRLs for so long, since clocks differ.
const KEPT: Duration = Duration::minutes(5);

/// The time by the CA's clock, and whether anything may be held to have expired by it: what leaves the CRLs while the clock is ahead would be
/// trusted again.
#[derive(Clone, Copy, Debug)]
pub(super) struct Time {
    pub(super) now: OffsetDateTime,
    pub(super) believed: bool,
}

/// A certificate to be listed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Listed {
    pub(super) issuing_certificate: [u8; 16],
    pub(super) since: OffsetDateTime,
    pub(super) not_after: OffsetDateTime,
}

/// What is revoked, and the CRLs that say so.
#[derive(Debug, Default)]
pub(super) struct Crls {
    /// What was revoked by the acts before the entry `next`, and has not expired.
    revoked: BTreeMap<Serial, Listed>,
    next: u64,
    /// The latest moment that it was brought up to date at.
    latest: Option<OffsetDateTime>,
    /// The CRLs of the act in this entry.
    current: Option<(u64, Crl)>,
    /// Issuing certificates that have signed.
    used: BTreeSet<[u8; 16]>,
    /// The trust state from which on each issuing certificate has its CRL in it, or no CRLs are in it.
    covered: BTreeMap<[u8; 16], u64>,
    /// Everybody who counts holds this trust state, or a newer one.
    proven: u64,
}

impl Crls {
    /// Reads them from where they were left. What was lost is made anew by [`Crls::follow`].
    pub(super) async fn open(ledger: &Ledger, copies: &Copies, held: &Held) -> Result<Self, AuthorityError> {
        let mut crls = Self::default();
        let Some(record) = ledger.current_state().crl else { return Ok(crls) };
        if let Some(sha256) = record.crls.sha256 {
            match copies.read_crl(sha256) {
                Ok(crl) => crls.current = Some((record.entry, crl)),
                Err(problem) => tracing::warn!(problem, "the CRLs are not there any more; others are signed"),
            }
        }
        for issuer in &held.issuers {
            let filter = IdentityFilter { issuing_certificate: Some(issuer.certificate_id().into()), ..IdentityFilter::default() };
            if !ledger.list(&filter, 1, None).await?.identities.is_empty() {
                crls.used.insert(issuer.certificate_id());
            }
        }
        Ok(crls)
    }

    /// Signs and records other CRLs if those in force do not say what they should, or forgets them if nothing is left to say; tells whether
    /// there was anything to do.
    pub(super) async fn follow(&mut self, maker: &Maker, copies: &Copies, held: &Held, time: Time) -> Result<bool, AuthorityError> {
        let state = maker.ledger.current_state();
        self.catch_up(&maker.ledger, &state, time).await?;
        let issuers = speaking(held, &state, time);
        let changed = match self.due(&state, &issuers, time.believed) {
            Some(why) => {
                self.issue(maker, copies, &issuers, &why, time).await?;
                true
            }
            None => false,
        };
        let state = maker.ledger.current_state();
        if let Some(record) = state.crl {
            let sequence = state.trust_floor().saturating_add(record.entry + 1);
            for issuer in issuers {
                self.covered.entry(issuer.certificate_id()).or_insert(sequence);
            }
        }
        Ok(changed)
    }

    /// The CRLs of the trust state that `state` leads to.
    ///
    /// # Errors
    /// If they are not there: nothing else may stand in the trust state of that sequence.
    pub(super) fn in_force(&self, state: &State) -> Result<Option<Crl>, AuthorityError> {
        match (state.crls(), &self.current) {
            (None, _) => Ok(None),
            (Some(record), Some((entry, crl))) if *entry == record.entry => Ok(Some(crl.clone())),
            (Some(record), _) => Err(AuthorityError::CrlMissing { entry: record.entry }),
        }
    }

    /// The issuing certificate to sign with under `root`: the newest one whose CRL is with everybody who counts. A newer one is used all the
    /// same when there is no other, or the last of the others nears its end.
    pub(super) fn choose<'h>(&self, held: &'h Held, state: &State, root: Fingerprint, now: OffsetDateTime) -> Option<&'h Arc<Issuer>> {
        let newest = held.issuer_of(root)?;
        if self.may_sign(state, newest) {
            return Some(newest);
        }
        let mut older = held.issuers.iter().rev().filter(|issuer| issuer.root_fingerprint() == root);
        let good = |issuer: &&Arc<Issuer>| self.may_sign(state, issuer) && issuer.not_before() <= now && now < near_end(issuer);
        Some(older.find(good).unwrap_or(newest))
    }

    /// Notes that `issuer` signs from now on, and tells whether it should have waited.
    pub(super) fn use_issuer(&mut self, state: &State, issuer: &Issuer) -> bool {
        let early = !self.may_sign(state, issuer);
        self.used.insert(issuer.certificate_id());
        early
    }

    /// The trust state that everybody who counts must hold before the newest issuing certificate under `root` may sign; none if it may, and
    /// [`AuthorityError::CrlMissing`] if it has no CRL yet.
    pub(super) fn awaited(&self, held: &Held, state: &State, root: Fingerprint) -> Result<Option<u64>, AuthorityError> {
        let Some(newest) = held.issuer_of(root).filter(|newest| !self.may_sign(state, newest)) else { return Ok(None) };
        let covered = self.covered.get(&newest.certificate_id()).copied();
        covered.map(Some).ok_or(AuthorityError::CrlMissing { entry: state.crl.map_or(0, |record| record.entry) })
    }

    /// Everybody who counts holds the trust state with this sequence.
    pub(super) fn proven(&mut self, sequence: u64) {
        self.proven = self.proven.max(sequence);
    }

    /// How many are revoked and have not expired.
    pub(super) fn revoked(&self) -> usize {
        self.revoked.len()
    }

    /// How many would be, with these.
    pub(super) fn revoked_with(&self, more: &[Revocable]) -> usize {
        self.revoked.len() + more.iter().filter(|one| !self.revoked.contains_key(&one.serial)).count()
    }

    /// As if so many were revoked.
    #[cfg(test)]
    pub(super) fn fill(&mut self, count: usize) {
        let now = OffsetDateTime::now_utc();
        let listed = Listed { issuing_certificate: [0; 16], since: now, not_after: now };
        self.revoked.extend((0..count as u128).map(|number| (Serial(number.to_be_bytes()), listed)));
    }

    fn may_sign(&self, state: &State, issuer: &Issuer) -> bool {
        let id = issuer.certificate_id();
        state.crl.is_none() || self.used.contains(&id) || self.covered.get(&id).is_some_and(|sequence| *sequence <= self.proven)
    }

    /// Takes in what was revoked since the last time, and lets go of what has expired.
    async fn catch_up(&mut self, ledger: &Ledger, state: &State, Time { now, believed }: Time) -> Result<(), LedgerError> {
        if self.latest.is_some_and(|latest| now < latest - KEPT) {
            // The clock was ahead: what seemed to have expired may not have.
            (self.next, self.latest) = (0, None);
        }
        let alive_at = if believed { now } else { now - REMEMBERED };
        let new: Vec<_> = state.revocations.iter().filter(|(_, revocation)| revocation.entry >= self.next).collect();
        for (subject, revocation) in &new {
            for Revocable { serial, issuing_certificate, not_after, .. } in
                ledger.revocable(subject, revocation.entry, alive_at, usize::MAX).await?
            {
                let listed = Listed { issuing_certificate, since: revocation.since, not_after };
                self.revoked.entry(serial).or_insert(listed);
            }
        }
        self.next = new.iter().map(|(_, revocation)| revocation.entry + 1).max().unwrap_or(self.next);
        self.latest = self.latest.max(Some(now));
        self.revoked.retain(|_, listed| !believed || now <= listed.not_after + KEPT);
        Ok(())
    }

    /// Why other CRLs are due; none if they are not.
    fn due(&self, state: &State, issuers: &[&Arc<Issuer>], believed: bool) -> Option<String> {
        let mut listed = self.listed(issuers).peekable();
        if state.crls().is_none() {
            return listed.peek().is_some().then(|| format!("{} certificates are revoked", listed.count()));
        }
        if listed.peek().is_none() && believed {
            return Some("all that was revoked has expired".to_owned());
        }
        let Ok(Some(crl)) = self.in_force(state) else { return Some("the CRLs before were lost".to_owned()) };
        if let Some(issuer) = issuers.iter().find(|issuer| !crl.speaks_for(issuer.certificate())) {
            return Some(format!("the issuing certificate {} has none", Fingerprint::of(issuer.certificate())));
        }
        let (mut count, mut new) = (0, 0);
        for (serial, _) in listed {
            count += 1;
            new += usize::from(!crl.revokes(*serial));
        }
        if new > 0 {
            return Some(format!("{new} more certificates are revoked"));
        }
        // Not with each one: every time is a push to the whole fleet.
        (believed && crl.revoked() >= 2 * count).then(|| format!("{} of what was revoked has expired", crl.revoked() - count))
    }

    /// What is revoked under `issuers`. What others signed is trusted by nobody, or nobody could sign a CRL for.
    fn listed<'s>(&'s self, issuers: &'s [&Arc<Issuer>]) -> impl Iterator<Item = (&'s Serial, &'s Listed)> {
        let known: BTreeSet<_> = issuers.iter().map(|issuer| issuer.certificate_id()).collect();
        self.revoked.iter().filter(move |(_, listed)| known.contains(&listed.issuing_certificate))
    }

    /// Signs, keeps and records CRLs for `issuers`, or records that there are none any more.
    async fn issue(
        &mut self,
        maker: &Maker,
        copies: &Copies,
        issuers: &[&Arc<Issuer>],
        why: &str,
        Time { now, believed }: Time,
    ) -> Result<(), AuthorityError> {
        let before = maker.ledger.current_state().crl;
        let number = next_number(before, now);
        let certificates = self.listed(issuers).count();
        // While the clock is not believed they stay, also if they revoke nothing: whoever has them has to know every issuing certificate.
        let crl = if certificates == 0 && believed { None } else { Some(self.sign(issuers, number, now).await?) };
        // Before they are recorded. Without the copy a restart signs others: a disk that is full must not keep a revocation from the proxies.
        if let Err(error) = copies.write_crl(crl.as_ref()) {
            tracing::error!(%error, "the CRLs could not be kept; a restart of the CA will sign others");
        }
        let sha256 = crl.as_ref().map(|crl| sha256(crl.pem()));
        let change = Change::Crl(CrlsAct { number, sha256, certificates: u32::try_from(certificates).unwrap_or(u32::MAX) });
        let entry = maker.ledger.act(CA_ACTOR, change, why).await?;
        tracing::info!(number, certificates, issuers = issuers.len(), entry, why, "other CRLs are in force");
        self.current = crl.map(|crl| (entry, crl));
        Ok(())
    }

    async fn sign(&self, issuers: &[&Arc<Issuer>], number: u64, now: OffsetDateTime) -> Result<Crl, AuthorityError> {
        let mut lists = Vec::with_capacity(issuers.len());
        for issuer in issuers {
            let own = self.revoked.iter().filter(|(_, listed)| listed.issuing_certificate == issuer.certificate_id());
            lists.push(issuer.sign_crl(number, own, now).await?);
        }
        Ok(Crl::from_der(lists.iter().map(Vec::as_slice))?)
    }
}

/// The issuing certificates that need a CRL while there are any.
fn speaking<'h>(held: &'h Held, state: &State, Time { now, believed }: Time) -> Vec<&'h Arc<Issuer>> {
    let is_trusted = |root: Fingerprint| {
        let root = state.roots.get(&root);
        root.is_some_and(|root| matches!(root.state, RootState::Published | RootState::Active | RootState::Draining))
    };
    let is_needed = |issuer: &&Arc<Issuer>| (!believed || issuer.not_after() + KEPT >= now) && is_trusted(issuer.root_fingerprint());
    held.issuers.iter().filter(is_needed).collect()
}

/// Larger than the one before, also if the acts of a while were lost.
fn next_number(before: Option<CrlRecord>, now: OffsetDateTime) -> u64 {
    let after = before.map_or(1, |before| before.crls.number.saturating_add(1));
    after.max(u64::try_from(now.unix_timestamp()).unwrap_or(0))
}

/// From then on waiting for proof would cost more than a few proxies: leaves do not outlive their issuing certificate.
fn near_end(issuer: &Issuer) -> OffsetDateTime {
    issuer.not_after() - (issuer.not_after() - issuer.not_before()) / 8
}

pub(super) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut sha256 = [0; 32];
    sha256.copy_from_slice(digest(&SHA256, bytes).as_ref());
    sha256
}
