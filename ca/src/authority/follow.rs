//! Follows the ledger's state: what the acts on roots call for is made, used and published.
//!
//! Everything is derived from the state and from what is recorded, and doing it again changes nothing: so it may be interrupted anywhere,
//! and is done again at each tick. The trust state's content depends on the acts before its sequence alone, so that the same sequence always
//! has the same content.

use std::sync::Arc;

use chancery_identity::{Fingerprint, TrustBundle, TrustDomain, TrustState};
use time::OffsetDateTime;

use super::crl::{Crls, Time};
use super::held::Held;
use super::issuer::common_name_of;
use super::{Authority, AuthorityError, Issuer, RootStatus};
use crate::ledger::LedgerError;
use crate::ledger::acts::{RootState, State};

/// How long the keys of a root outlive its end, so that no batch under way finds its key gone.
const KEYS_STAY: time::Duration = time::Duration::minutes(1);
/// How often it is begun anew because an act came between.
const MAX_ATTEMPTS: usize = 4;

impl Authority {
    /// Brings everything in line with the ledger's state, now. Doing it again changes nothing.
    ///
    /// # Errors
    /// If something could not be made or recorded. What could be done is done; the next tick tries the rest again.
    pub async fn apply(&self) -> Result<(), AuthorityError> {
        self.follow(&mut *self.held.lock().await, self.clock.now()).await
    }

    /// What signs leaves in `state`, which is the ledger's or was until a moment ago: what is signed is to be recorded under its epoch.
    ///
    /// # Errors
    /// If the issuing certificate that an act calls for could not be taken into use.
    pub async fn issuer_in(&self, state: &State) -> Result<Arc<Issuer>, AuthorityError> {
        let is_due = |issuer: &Issuer| state.active_root() == Some(issuer.root_fingerprint());
        let issuer = self.issuer();
        if is_due(&issuer) {
            return Ok(issuer);
        }
        let applied = self.apply().await;
        let issuer = self.issuer();
        // With neither, `state` is an older one, under whose epoch nothing can be recorded any more.
        if is_due(&issuer) { Ok(issuer) } else { applied.map(|()| issuer) }
    }

    pub(super) async fn follow(&self, held: &mut Held, now: OffsetDateTime) -> Result<(), AuthorityError> {
        let mut attempt = 1;
        loop {
            let state = self.maker.ledger.current_state();
            match self.follow_to(held, &state, now).await {
                Err(AuthorityError::Ledger(LedgerError::EpochMoved { .. })) if attempt < MAX_ATTEMPTS => attempt += 1,
                done => return done,
            }
        }
    }

    async fn follow_to(&self, held: &mut Held, state: &State, now: OffsetDateTime) -> Result<(), AuthorityError> {
        if state.roots.keys().any(|root| held.root(*root).is_none()) {
            *held = Held::read(&self.maker.ledger, &self.maker.keys).await?;
        }
        // Each independent of the others' failures; the first failure is told.
        let mut crls = self.crls.lock().await;
        let published = self.publish(held, &crls, state);
        let made = self.make_issuers(held, state, now).await;
        let revoked = self.follow_crls(held, &mut crls, now).await;
        let used = self.use_issuer(held, &mut crls, state, now);
        let issuer = self.issuer();
        let served = if self.server.is_due(now) || self.server.root() != issuer.root_fingerprint() {
            self.server.renew(&issuer, &self.maker.ledger, state.epoch, &self.server_id, &self.settings.load(), now).await
        } else {
            Ok(())
        };
        let told = self.tell(held, &crls, state);
        published.and(made).and(revoked).and(used).and(served).and(told)
    }

    /// Updates what is told of the roots, and their copies.
    fn tell(&self, held: &Held, crls: &Crls, state: &State) -> Result<(), AuthorityError> {
        let told = roots_as_told(held, crls, state);
        if *self.roots() != told {
            self.copies.write_roots(&told)?;
            self.roots.store(Arc::new(told));
        }
        Ok(())
    }

    /// Destroys the keys that are of no more use.
    pub(super) async fn destroy_dead_keys(&self, held: &mut Held, now: OffsetDateTime) -> Result<(), AuthorityError> {
        let state = self.maker.ledger.current_state();
        let is_gone = |root: Fingerprint| {
            let root = state.roots.get(&root);
            root.is_some_and(|root| matches!(root.state, RootState::Retired | RootState::Distrusted) && root.since + KEYS_STAY <= now)
        };
        held.destroy_dead(&*self.maker.keys, now, is_gone).await
    }

    /// Signs other CRLs if those are due, and publishes them.
    async fn follow_crls(&self, held: &Held, crls: &mut Crls, now: OffsetDateTime) -> Result<(), AuthorityError> {
        let time = Time { now, believed: self.believes_clock(now) };
        let followed = crls.follow(&self.maker, &self.copies, held, time).await;
        let state = self.maker.ledger.current_state();
        self.note_crls(crls, &state);
        if followed? { self.publish(held, crls, &state) } else { Ok(()) }
    }

    fn publish(&self, held: &Held, crls: &Crls, state: &State) -> Result<(), AuthorityError> {
        let trust = trust_state(&self.maker.trust_domain, held, crls, state)?;
        if **self.shared_trust.load() == trust {
            return Ok(());
        }
        self.copies.write_bundle(&trust)?;
        tracing::info!(sequence = trust.sequence, roots = trust.own().x509_authorities().len(), "another trust state is published");
        let trust = Arc::new(trust);
        self.shared_trust.store(Arc::clone(&trust));
        self.trust.send_replace(trust);
        Ok(())
    }

    /// A root that is published has its issuing certificate already, so that activating it takes effect at once.
    async fn make_issuers(&self, held: &mut Held, state: &State, now: OffsetDateTime) -> Result<(), AuthorityError> {
        let mut made = Ok(());
        let signing = state.roots.iter().filter(|(_, root)| matches!(root.state, RootState::Published | RootState::Active));
        for (fingerprint, _) in signing {
            let Some(root) = held.root(*fingerprint).filter(|root| held.is_issuer_due(root, now)) else { continue };
            match self.maker.issuing(root, &self.settings.load(), now).await {
                Ok(issuer) => held.issuers.push(Arc::new(issuer)),
                Err(error) => made = made.and(Err(error)),
            }
        }
        made
    }

    fn use_issuer(&self, held: &Held, crls: &mut Crls, state: &State, now: OffsetDateTime) -> Result<(), AuthorityError> {
        let active = state.active_root().ok_or(AuthorityError::NoActiveRoot)?;
        let due = crls.choose(held, state, active, now).ok_or(AuthorityError::RootKeyMissing { fingerprint: active })?;
        if crls.use_issuer(state, due) {
            tracing::warn!(root = %active, "an issuing certificate is used before everybody has its CRL: some proxies may refuse what it signs");
        }
        if !Arc::ptr_eq(due, &self.issuer.load()) {
            self.copies.write_issuer(due)?;
            self.issuer.store(Arc::clone(due));
            tracing::info!(root = %active, not_after = %due.not_after(), "another issuing certificate is in use");
        }
        Ok(())
    }
}

/// What everybody is to trust: the roots that are published, active or draining, in the order in which they were made.
pub(super) fn trust_state(trust_domain: &TrustDomain, held: &Held, crls: &Crls, state: &State) -> Result<TrustState, AuthorityError> {
    let is_trusted = |root: &Fingerprint| {
        state.roots.get(root).is_some_and(|root| matches!(root.state, RootState::Published | RootState::Active | RootState::Draining))
    };
    if let Some((fingerprint, _)) = state.roots.iter().find(|(root, _)| is_trusted(root) && held.root(**root).is_none()) {
        return Err(AuthorityError::Unrecorded { fingerprint: *fingerprint });
    }
    let trusted = held.roots.iter().filter(|root| is_trusted(&root.fingerprint)).map(|root| root.certificate.clone());
    let bundle = TrustBundle::new(trust_domain.clone(), trusted.collect())?;
    // Who prepares a root changes nothing for anybody.
    let changes = state.roots.values().filter(|root| root.state != RootState::Prepared).map(|root| root.entry + 1);
    let changes = changes.chain(state.crl.map(|record| record.entry + 1));
    let sequence = state.trust_floor().saturating_add(changes.max().unwrap_or_default());
    let trust = TrustState::new(sequence, trust_domain.clone(), [bundle])?;
    Ok(trust.with_distrusted(state.distrusted().collect()).with_crl(crls.in_force(state)?))
}

/// Every root that an act has named, in the order in which they were made.
pub(super) fn roots_as_told(held: &Held, crls: &Crls, state: &State) -> Vec<RootStatus> {
    let told = held.roots.iter().filter_map(|root| {
        let fold = state.roots.get(&root.fingerprint)?;
        let awaited = crls.awaited(held, state, root.fingerprint);
        // Without a CRL while there are some, it cannot sign.
        let issuer = held.issuer_of(root.fingerprint).filter(|_| awaited.is_ok());
        Some(RootStatus {
            fingerprint: root.fingerprint,
            certificate: root.certificate.clone(),
            subject: common_name_of(&root.certificate),
            signed_by: root.signed_by.clone(),
            not_before: root.not_before,
            not_after: root.not_after,
            state: fold.state,
            since: fold.since,
            entry: fold.entry,
            leave_by: fold.leave_by,
            has_key: root.key.is_some(),
            issuing_until: issuer.map(|issuer| issuer.not_after()),
            awaited: awaited.ok().flatten(),
        })
    });
    told.collect()
}
