//! Revoking: the act, and what follows from it at once.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use chancery_identity::{Serial, SpiffeId, profile};
use time::{Duration, OffsetDateTime};

use super::crl::{Crls, MAX_REVOKED};
use super::{Authority, AuthorityError};
use crate::ledger::IdentityFilter;
use crate::ledger::acts::{Change, State, Subject};

/// For so long after the last of its certificates has expired a revocation is not forgotten: a clock may be ahead when the next act is made.
pub(super) const REMEMBERED: Duration = Duration::days(2);

/// What a revocation did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revoked {
    /// The act's entry.
    pub entry: u64,
    /// How many unexpired certificates it put on the CRLs; those that were there before are among them.
    pub certificates: usize,
    /// Whose these are.
    pub ids: BTreeSet<SpiffeId>,
    /// The trust state that has these CRLs.
    pub sequence: u64,
    /// Why the CRLs could not be signed yet; the CA tries again by itself.
    pub problem: Option<String>,
}

/// How the CRLs stand, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CrlStanding {
    /// Unexpired certificates that are revoked.
    pub revoked: usize,
    /// The CRLs' number; 0 while there are none.
    pub number: u64,
    /// When they were signed; none while there are none.
    pub since: Option<OffsetDateTime>,
}

impl Authority {
    /// Revokes the certificates that were issued until now to `subject`. By anything but the serial, nothing more is issued to it either,
    /// until [`Change::Allow`].
    ///
    /// # Errors
    /// If it may not be revoked, or too many would be, or it cannot be recorded. Once it is recorded it is done: what could not be signed yet
    /// stands in the answer.
    pub async fn revoke(&self, actor: &str, subject: Subject, why: &str) -> Result<Revoked, AuthorityError> {
        let until = self.check_revocable(&subject).await? + REMEMBERED;
        let change = Change::Revoke { subject: subject.clone(), until };
        self.revoke_by(actor, change, &subject, why).await
    }

    /// Issues nothing more to an agent or sidecar, nor on its behalf, and revokes its own certificates.
    ///
    /// # Errors
    /// As [`Authority::revoke`].
    pub async fn ban(&self, actor: &str, agent: SpiffeId, why: &str) -> Result<Revoked, AuthorityError> {
        let subject = Subject::SpiffeId(agent.clone());
        let until = self.maker.ledger.all_expired_by() + REMEMBERED;
        self.revoke_by(actor, Change::Ban { agent, until }, &subject, why).await
    }

    /// Everybody who counts holds the trust state with this sequence: issuing certificates whose CRLs are in there may sign.
    ///
    /// # Errors
    /// If what follows from that could not be done; the next tick tries again.
    pub async fn proven(&self, sequence: u64) -> Result<(), AuthorityError> {
        self.crls.lock().await.proven(sequence);
        self.apply().await
    }

    /// Until `moment`, by the CA's clock, that clock is right: what has expired by it may leave the CRLs.
    pub fn believe_clock(&self, moment: OffsetDateTime) {
        self.clock_believed_until.store(moment.unix_timestamp(), Ordering::Relaxed);
    }

    pub(super) fn believes_clock(&self, now: OffsetDateTime) -> bool {
        now.unix_timestamp() <= self.clock_believed_until.load(Ordering::Relaxed)
    }

    /// How the CRLs stand.
    pub fn crl_standing(&self) -> CrlStanding {
        **self.crl_standing.load()
    }

    pub(super) fn note_crls(&self, crls: &Crls, state: &State) {
        let record = state.crls();
        let (number, since) = (record.map_or(0, |record| record.crls.number), record.map(|record| record.since));
        self.crl_standing.store(CrlStanding { revoked: crls.revoked(), number, since }.into());
    }

    /// Until when the certificates of `subject` that are issued by now live.
    async fn check_revocable(&self, subject: &Subject) -> Result<OffsetDateTime, AuthorityError> {
        let refused = |problem: String| Err(AuthorityError::NotRevocable(problem));
        match subject {
            Subject::Serial(serial) => {
                let filter = IdentityFilter { serial: Some(*serial), ..IdentityFilter::default() };
                let Some(found) = self.maker.ledger.list(&filter, 1, None).await?.identities.pop() else {
                    return refused(format!("no certificate with the serial number {serial} was issued"));
                };
                let (now, until) = (self.clock.now(), found.leaf.not_after);
                if until < now {
                    return refused(format!("the certificate {serial} of {} has expired at {until}", found.leaf.spiffe_id));
                }
                if self.server_serial() == Some(*serial) {
                    return refused(format!(
                        "{serial} is the CA's own server certificate, without which no agent would find it: restart the CA, which makes another, \
                         and revoke this one then"
                    ));
                }
                Ok(until)
            }
            Subject::SpiffeId(id) if *id == self.server_id => {
                refused(format!("{id} is the CA itself; if its keys were stolen, distrust its root (`chancery root distrust`)"))
            }
            Subject::SpiffeId(id) | Subject::Agent(id) if id.trust_domain() != self.trust_domain() => {
                refused(format!("{id} is of another trust domain than this CA's, {}: its own CA revokes it", self.trust_domain()))
            }
            _ => Ok(self.maker.ledger.all_expired_by()),
        }
    }

    async fn revoke_by(&self, actor: &str, change: Change, subject: &Subject, why: &str) -> Result<Revoked, AuthorityError> {
        let ledger = &self.maker.ledger;
        let found = ledger.revocable(subject, ledger.entries(), self.clock.now(), MAX_REVOKED).await?;
        let together = self.crls.lock().await.revoked_with(&found);
        if together > MAX_REVOKED {
            return Err(AuthorityError::TooManyRevoked { found: together });
        }
        let entry = ledger.act(actor, change, why).await?;
        let applied = self.apply().await;
        // What was issued between the count and the act is revoked as well.
        let found = ledger.revocable(subject, entry, self.clock.now(), MAX_REVOKED).await.unwrap_or(found);
        let problem = applied.err().map(|error| error.to_string());
        let sequence = self.trust.borrow().sequence;
        Ok(Revoked { entry, certificates: found.len(), ids: found.into_iter().map(|one| one.spiffe_id).collect(), sequence, problem })
    }

    /// Of the server's certificate in use.
    fn server_serial(&self) -> Option<Serial> {
        let key = self.server.current().load_full();
        profile::check_leaf(key.cert.first()?).ok().map(|facts| facts.serial)
    }
}
