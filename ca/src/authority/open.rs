//! Opening an authority: from the ledger's entries, its state and the key manager, or anew. Whatever was interrupted goes on from there.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64};

use arc_swap::ArcSwap;
use chancery_identity::{Clock, TrustDomain, profile};
use time::OffsetDateTime;
use tokio::sync::watch;

use super::copies::Copies;
use super::crl::{Crls, Time};
use super::directory::{DataDirectory, Kind};
use super::follow::{roots_as_told, trust_state};
use super::held::{Held, Root};
use super::make::Maker;
use super::server::ServerCertificate;
use super::{Authority, AuthorityError, Settings};
use crate::keys::KeyManager;
use crate::ledger::Ledger;
use crate::ledger::acts::{CA_ACTOR, Change, Overrides, RootState};

/// The first path segments of the CA's own ID.
const SERVER_PATH: [&str; 2] = ["chancery", "ca"];

impl Authority {
    /// Opens the authority, and makes trust root and issuing certificate if there are none, or if the issuing one is past half of its life.
    ///
    /// # Errors
    /// If ledger, keys and files do not belong together, the root has expired, or something cannot be made or recorded.
    pub async fn open(
        trust_domain: TrustDomain,
        settings: Settings,
        directory: &DataDirectory,
        keys: Arc<dyn KeyManager>,
        ledger: Ledger,
        clock: Arc<dyn Clock>,
    ) -> Result<Arc<Self>, AuthorityError> {
        let now = clock.now();
        let server_id = trust_domain.member(SERVER_PATH)?;
        let mut held = Held::read(&ledger, &keys).await?;
        let copies = Copies::open(directory, trust_domain.clone(), &held.roots)?;
        held.destroy_strays(&*keys).await?;
        let development = directory.kind() == Kind::Development;
        let maker = Maker { trust_domain, development, keys, ledger: ledger.clone() };
        let root = active_root(&maker, &mut held, &settings, now).await?;
        check_root(&root, &maker.trust_domain, now)?;
        if held.is_issuer_due(&root, now) {
            held.issuers.push(Arc::new(maker.issuing(&root, &settings, now).await?));
        }
        let mut crls = Crls::open(&ledger, &copies, &held).await?;
        if let Err(error) = crls.follow(&maker, &copies, &held, Time { now, believed: false }).await {
            // With those that are in force nobody is worse off, and it is tried again.
            tracing::error!(%error, "other CRLs are due and could not be signed; trying again");
        }
        let fold = ledger.current_state();
        let trust = Arc::new(trust_state(&maker.trust_domain, &held, &crls, &fold)?);
        let issuer = crls.choose(&held, &fold, root.fingerprint, now).cloned().ok_or(AuthorityError::NoActiveRoot)?;
        crls.use_issuer(&fold, &issuer);
        let roots = roots_as_told(&held, &crls, &fold);
        copies.write_roots(&roots)?;
        copies.write_issuer(&issuer)?;
        copies.write_bundle(&trust)?;
        let server = ServerCertificate::issue(&issuer, &ledger, &server_id, &settings, now).await?;
        let authority = Self {
            server_id,
            settings: ArcSwap::from_pointee(settings),
            maker,
            copies,
            clock,
            roots: ArcSwap::from_pointee(roots),
            issuer: ArcSwap::new(issuer),
            server,
            trust: watch::Sender::new(Arc::clone(&trust)),
            shared_trust: Arc::new(ArcSwap::new(trust)),
            held: tokio::sync::Mutex::new(held),
            crls: tokio::sync::Mutex::new(crls),
            crl_standing: ArcSwap::default(),
            clock_believed_until: AtomicI64::new(i64::MIN),
            failed_renewals: AtomicU64::new(0),
        };
        // What a kill left undone for the other roots. Nothing of it keeps this CA from issuing, and it is tried again with every tick.
        if let Err(error) = authority.apply().await {
            tracing::error!(%error, "not everything that the ledger's state calls for could be made; trying again");
        }
        Ok(Arc::new(authority))
    }
}

/// The active root; the first one is made and recorded as such.
async fn active_root(maker: &Maker, held: &mut Held, settings: &Settings, now: OffsetDateTime) -> Result<Root, AuthorityError> {
    let state = maker.ledger.current_state();
    if let Some(active) = state.active_root() {
        let root = held.root(active).ok_or(AuthorityError::Unrecorded { fingerprint: active })?;
        return if root.key.is_some() { Ok(root.clone()) } else { Err(AuthorityError::RootKeyMissing { fingerprint: active }) };
    }
    if !state.roots.is_empty() {
        return Err(AuthorityError::NoActiveRoot);
    }
    // One that is recorded and in no act is from a start that was interrupted here, or from a time before acts.
    let root = match held.roots.last() {
        Some(root) if root.key.is_none() => return Err(AuthorityError::RootKeyMissing { fingerprint: root.fingerprint }),
        Some(root) => root.clone(),
        None => maker.root(settings, now).await?,
    };
    check_root(&root, &maker.trust_domain, now)?;
    let change = Change::Root { root: root.fingerprint, to: RootState::Active, overrides: Overrides::default() };
    maker.ledger.act(CA_ACTOR, change, "the first trust root of this CA").await?;
    if held.root(root.fingerprint).is_none() {
        held.roots.push(root.clone());
    }
    Ok(root)
}

fn check_root(root: &Root, trust_domain: &TrustDomain, now: OffsetDateTime) -> Result<(), AuthorityError> {
    let id = profile::check_authority(&root.certificate)?.id;
    // A corporate CA may leave it out.
    if id.as_ref() != Some(&trust_domain.id()) && !(id.is_none() && root.signed_by.is_some()) {
        let found = id.map_or_else(|| "(none)".to_owned(), |id| id.trust_domain().to_string());
        return Err(AuthorityError::OtherTrustDomain { found, wanted: trust_domain.clone() });
    }
    if now >= root.not_after {
        return Err(AuthorityError::RootExpired { fingerprint: root.fingerprint, not_after: root.not_after });
    }
    Ok(())
}
