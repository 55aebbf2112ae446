//! Preparing the root that is to follow the active one: made here, or signed by a corporate CA.
//!
//! A corporate CA is asked with a request whose key never leaves the key manager. The request is an act, so it outlives a restart, and asking
//! again gives the same one until it is answered. Under a corporate CA no root is made by itself: that is for an operator to decide.

use chancery_identity::Fingerprint;
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::asn1_rs::FromDer;
use x509_parser::certification_request::X509CertificationRequest;

use super::corporate::Rules;
use super::held::{Held, KeysByPublicKey, Root, keys_by_public_key};
use super::issuer::public_key_of;
use super::{Authority, AuthorityError, is_past_half};
use crate::keys::PublicKey;
use crate::ledger::acts::{Change, Overrides, RootState, State};

/// A request that has no answer yet.
struct Open {
    csr: Vec<u8>,
    /// The name of its key.
    key: String,
    public: PublicKey,
}

impl Authority {
    /// The trust root that is to follow the active one: prepared, if none is on its way that has half of its life before it. Nobody sees it
    /// before it is published.
    ///
    /// # Errors
    /// [`AuthorityError::Corporate`] if the active one is a corporate CA's. If it cannot be made or recorded; what was recorded of it is used by the next call.
    pub async fn prepare_root(&self, actor: &str, why: &str) -> Result<Fingerprint, AuthorityError> {
        self.prepare(actor, why, false).await
    }

    /// Likewise, one that the CA makes even if the active one is a corporate CA's.
    ///
    /// # Errors
    /// If it cannot be made or recorded.
    pub async fn prepare_own_root(&self, actor: &str, why: &str) -> Result<Fingerprint, AuthorityError> {
        self.prepare(actor, why, true).await
    }

    /// Whether a root is there that can follow the active one, or can be made.
    ///
    /// # Errors
    /// [`AuthorityError::Corporate`] if not.
    pub async fn check_replaceable(&self) -> Result<(), AuthorityError> {
        let held = self.held.lock().await;
        let state = self.maker.ledger.current_state();
        let there = replacement(&state, &held, self.clock.now(), false).is_some();
        if there { Ok(()) } else { refuse_under_corporate(&state, &held) }
    }

    async fn prepare(&self, actor: &str, why: &str, own: bool) -> Result<Fingerprint, AuthorityError> {
        let mut held = self.held.lock().await;
        let state = self.maker.ledger.current_state();
        let now = self.clock.now();
        if let Some(on_its_way) = replacement(&state, &held, now, own) {
            return Ok(on_its_way);
        }
        *held = Held::read(&self.maker.ledger, &self.maker.keys).await?;
        // One that is recorded and in no act is from a call that was interrupted here.
        let unused = held.roots.iter().find(|root| {
            let is_valid = (root.not_before..root.not_after).contains(&now);
            let is_unused = !state.roots.contains_key(&root.fingerprint) && root.key.is_some() && is_valid;
            is_unused && !(own && root.signed_by.is_some())
        });
        let root = if let Some(root) = unused {
            root.clone()
        } else {
            if !own {
                refuse_under_corporate(&state, &held)?;
            }
            let root = self.maker.root(&self.settings.load(), now).await?;
            held.roots.push(root.clone());
            root
        };
        self.record_prepared(&mut held, root.fingerprint, actor, why, now).await
    }

    /// The request (PKCS #10, DER) that a corporate CA is to sign the next root for, and whether it is a new one: while one has no answer, it
    /// is that one again.
    ///
    /// # Errors
    /// If its key cannot be made, or it cannot be recorded.
    pub async fn request_root(&self, actor: &str, why: &str) -> Result<(Vec<u8>, bool), AuthorityError> {
        let held = self.held.lock().await;
        let state = self.maker.ledger.current_state();
        if let Some(open) = self.open_request(&state, &held).await? {
            return Ok((open.csr, false));
        }
        let csr = self.maker.request(self.clock.now()).await?;
        self.maker.ledger.act(actor, Change::RequestRoot { csr: csr.clone() }, why).await?;
        Ok((csr, true))
    }

    /// Prepares the root that a corporate CA answered with: of `certificates` (DER) the one with the request's key. What is above it is left
    /// out.
    ///
    /// # Errors
    /// [`AuthorityError::NotRequested`] if none has that key, [`AuthorityError::Answer`] if it breaks a rule. If it cannot be recorded.
    pub async fn answer_root(
        &self,
        certificates: Vec<CertificateDer<'static>>,
        actor: &str,
        why: &str,
    ) -> Result<Fingerprint, AuthorityError> {
        let mut held = self.held.lock().await;
        let state = self.maker.ledger.current_state();
        let known = |certificate| Some(Fingerprint::of(certificate)).filter(|root| state.roots.contains_key(root));
        if let Some(there) = certificates.iter().find_map(known) {
            return Ok(there);
        }
        let now = self.clock.now();
        *held = Held::read(&self.maker.ledger, &self.maker.keys).await?;
        // Recorded by a call that was interrupted before the act.
        let recorded = certificates.iter().map(Fingerprint::of).find(|one| held.root(*one).is_some_and(|root| root.key.is_some()));
        let root = if let Some(recorded) = recorded {
            recorded
        } else {
            let root = self.answered(&state, &held, certificates, now).await?;
            self.maker.record(&root.certificate, true).await?;
            held.roots.push(root.clone());
            root.fingerprint
        };
        self.record_prepared(&mut held, root, actor, why, now).await
    }

    /// The answer to the open request, held against the rules.
    async fn answered(
        &self,
        state: &State,
        held: &Held,
        certificates: Vec<CertificateDer<'static>>,
        now: OffsetDateTime,
    ) -> Result<Root, AuthorityError> {
        let open = self.open_request(state, held).await?.ok_or(AuthorityError::NotRequested)?;
        let is_answer = |certificate: &CertificateDer<'_>| public_key_of(certificate).is_ok_and(|key| key == open.public.spki);
        let certificate = certificates.into_iter().find(is_answer).ok_or(AuthorityError::NotRequested)?;
        let issuing_lifetime = self.settings.load().issuing_lifetime;
        let rules = Rules { trust_domain: &self.maker.trust_domain, key: &open.public, issuing_lifetime, now };
        rules.check(&certificate).map_err(AuthorityError::Answer)?;
        Root::new(certificate, Some(open.key))
    }

    /// The newest request, unless a root has its key already, or the key is lost.
    async fn open_request(&self, state: &State, held: &Held) -> Result<Option<Open>, AuthorityError> {
        let Some(csr) = &state.requested_root else { return Ok(None) };
        let Some(requested) = requested_key(csr) else { return Ok(None) };
        if held.roots.iter().any(|root| public_key_of(&root.certificate).is_ok_and(|key| key == requested)) {
            return Ok(None);
        }
        let mut keys: KeysByPublicKey = keys_by_public_key(&*self.maker.keys).await?;
        Ok(keys.remove(&requested).map(|(key, public)| Open { csr: csr.clone(), key, public }))
    }

    async fn record_prepared(
        &self,
        held: &mut Held,
        root: Fingerprint,
        actor: &str,
        why: &str,
        now: OffsetDateTime,
    ) -> Result<Fingerprint, AuthorityError> {
        let change = Change::Root { root, to: RootState::Prepared, overrides: Overrides::default() };
        self.maker.ledger.act(actor, change, why).await?;
        self.follow(held, now).await?;
        Ok(root)
    }
}

/// The public key (DER) that a request (PKCS #10, DER) is for.
fn requested_key(csr: &[u8]) -> Option<Vec<u8>> {
    let (_, csr) = X509CertificationRequest::from_der(csr).ok()?;
    Some(csr.certification_request_info.subject_pki.raw.to_vec())
}

/// The root that is to follow the active one: the newest of those that are furthest on their way. What a corporate CA signed comes before what
/// the CA made by itself, which has to have half of its life before it. One that was made while the clock was ahead, and is not valid yet, is of
/// no use. With `own`, only what the CA made by itself.
fn replacement(state: &State, held: &Held, now: OffsetDateTime, own: bool) -> Option<Fingerprint> {
    let newest = |to: RootState, corporate: bool| {
        let there = state.roots.iter().filter(|(_, root)| root.state == to);
        let there = there.filter(|(root, _)| held.root(**root).is_some_and(|root| root.signed_by.is_some() == corporate));
        let root = held.root(*there.max_by_key(|(_, root)| root.entry)?.0)?;
        let lasts = if corporate { now < root.not_after } else { !is_past_half(now, root.not_before, root.not_after) };
        (root.key.is_some() && now >= root.not_before && lasts).then_some(root.fingerprint)
    };
    let either = |corporate| newest(RootState::Published, corporate).or_else(|| newest(RootState::Prepared, corporate));
    let corporate = if own { None } else { either(true) };
    corporate.or_else(|| either(false))
}

/// Nobody left a corporate CA without meaning to.
fn refuse_under_corporate(state: &State, held: &Held) -> Result<(), AuthorityError> {
    let active = state.active_root().and_then(|active| held.root(active));
    match active.and_then(|active| active.signed_by.clone()) {
        Some(signed_by) => Err(AuthorityError::Corporate { signed_by }),
        None => Ok(()),
    }
}
