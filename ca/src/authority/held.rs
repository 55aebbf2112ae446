//! The CA's own certificates as the ledger holds them, each with its key if that is still there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use chancery_identity::{Fingerprint, profile};
use chancery_proto::chancery::v1::AuthorityCertificate;
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::asn1_rs::FromDer;
use x509_parser::certificate::X509Certificate;

use super::issuer::{Issuer, Signer, public_key_of};
use super::{AuthorityError, is_past_half};
use crate::keys::{KeyManager, PublicKey};
use crate::ledger::Ledger;

/// How the names of issuing keys begin.
pub(super) const ISSUING_KEY: &str = "issuing";
/// How the names of roots' keys begin.
pub(super) const ROOT_KEY: &str = "root";

/// A trust root.
#[derive(Clone, Debug)]
pub(super) struct Root {
    pub(super) fingerprint: Fingerprint,
    pub(super) certificate: CertificateDer<'static>,
    /// None where it was lost, or destroyed after the root's life.
    pub(super) key: Option<String>,
    pub(super) not_before: OffsetDateTime,
    pub(super) not_after: OffsetDateTime,
    /// The corporate CA that signed it; none for one that was made here, and signed itself.
    pub(super) signed_by: Option<String>,
}

/// Every root, and every issuing certificate whose key is there, oldest first.
#[derive(Debug, Default)]
pub(super) struct Held {
    pub(super) roots: Vec<Root>,
    pub(super) issuers: Vec<Arc<Issuer>>,
}

pub(super) type KeysByPublicKey = BTreeMap<Vec<u8>, (String, PublicKey)>;

impl Root {
    /// # Errors
    /// If the certificate is no authority's.
    pub(super) fn new(certificate: CertificateDer<'static>, key: Option<String>) -> Result<Self, AuthorityError> {
        let facts = profile::check_authority(&certificate)?;
        let fingerprint = Fingerprint::of(&certificate);
        let signed_by = other_issuer(&certificate);
        Ok(Self { fingerprint, certificate, key, not_before: facts.not_before, not_after: facts.not_after, signed_by })
    }
}

impl Held {
    /// Reads them from the ledger, and finds each one's key by its public key.
    pub(super) async fn read(ledger: &Ledger, keys: &Arc<dyn KeyManager>) -> Result<Self, AuthorityError> {
        let by_public_key = keys_by_public_key(&**keys).await?;
        let mut recorded = ledger.authority_certificates().await?;
        recorded.reverse();
        let mut held = Self::default();
        // Roots first: an issuing certificate is found to be under one of them.
        for (entry, AuthorityCertificate { certificate, .. }) in recorded.iter().filter(|(_, one)| one.root) {
            let certificate = CertificateDer::from(certificate.clone());
            let unreadable = |problem| AuthorityError::Unreadable { place: format!("ledger entry {entry}"), problem };
            let public = public_key_of(&certificate).map_err(unreadable)?;
            let key = by_public_key.get(&public).map(|(name, _)| name.clone());
            held.roots.push(Root::new(certificate, key)?);
        }
        for (_, AuthorityCertificate { certificate, .. }) in recorded.into_iter().filter(|(_, one)| !one.root) {
            let certificate = CertificateDer::from(certificate);
            let Ok(public) = public_key_of(&certificate) else { continue };
            let Some((key, public)) = by_public_key.get(&public) else { continue };
            if let Some(root) = held.roots.iter().find(|root| is_signed_by(&certificate, &root.certificate)) {
                let signer = Signer::of(&certificate, Arc::clone(keys), key, public)?;
                held.issuers.push(Arc::new(Issuer::new(certificate, root.certificate.clone(), signer)?));
            }
        }
        Ok(held)
    }

    pub(super) fn root(&self, fingerprint: Fingerprint) -> Option<&Root> {
        self.roots.iter().find(|root| root.fingerprint == fingerprint)
    }

    /// The newest issuing certificate under a root.
    pub(super) fn issuer_of(&self, root: Fingerprint) -> Option<&Arc<Issuer>> {
        self.issuers.iter().rev().find(|issuer| issuer.root_fingerprint() == root)
    }

    /// Whether `root` needs another issuing certificate.
    pub(super) fn is_issuer_due(&self, root: &Root, now: OffsetDateTime) -> bool {
        let Some(issuer) = self.issuer_of(root.fingerprint) else { return true };
        // One that already ends with its root cannot gain anything.
        let aged = is_past_half(now, issuer.not_before(), issuer.not_after()) && issuer.not_after() < root.not_after;
        // Made while the clock was ahead: it would keep the CA from issuing until that time comes.
        let from_the_future = (root.not_before..issuer.not_before()).contains(&now);
        aged || from_the_future
    }

    /// Destroys issuing keys without a certificate: what a start or a renewal that was interrupted left behind.
    pub(super) async fn destroy_strays(&self, keys: &dyn KeyManager) -> Result<(), AuthorityError> {
        let known: BTreeSet<_> = self.issuers.iter().map(|issuer| issuer.key_name()).collect();
        for name in keys.list().await? {
            if name.starts_with(ISSUING_KEY) && !known.contains(&*name) {
                keys.destroy(&name).await?;
            }
        }
        Ok(())
    }

    /// Destroys the keys of issuing certificates that have expired, and so have all that they signed, and every key of roots that are `gone`.
    pub(super) async fn destroy_dead(
        &mut self,
        keys: &dyn KeyManager,
        now: OffsetDateTime,
        gone: impl Fn(Fingerprint) -> bool,
    ) -> Result<(), AuthorityError> {
        let is_newest =
            |held: &Self, issuer: &Arc<Issuer>| held.issuer_of(issuer.root_fingerprint()).is_some_and(|newest| Arc::ptr_eq(newest, issuer));
        let is_dead =
            |held: &Self, issuer: &Arc<Issuer>| gone(issuer.root_fingerprint()) || (issuer.not_after() <= now && !is_newest(held, issuer));
        while let Some(place) = self.issuers.iter().position(|issuer| is_dead(self, issuer)) {
            keys.destroy(self.issuers[place].key_name()).await?;
            self.issuers.remove(place);
        }
        for root in self.roots.iter_mut().filter(|root| gone(root.fingerprint)) {
            if let Some(key) = &root.key {
                keys.destroy(key).await?;
                tracing::info!(root = %root.fingerprint, "the key of a root that is out of use was destroyed");
                root.key = None;
            }
        }
        Ok(())
    }
}

/// Public keys (DER) and the names of their private halves.
pub(super) async fn keys_by_public_key(keys: &dyn KeyManager) -> Result<KeysByPublicKey, AuthorityError> {
    let mut found = BTreeMap::new();
    for name in keys.list().await? {
        let public = keys.public_key(&name).await?;
        found.insert(public.spki.clone(), (name, public));
    }
    Ok(found)
}

/// The name of its issuer, if that is another than itself.
fn other_issuer(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    (parsed.issuer() != parsed.subject()).then(|| parsed.issuer().to_string())
}

fn is_signed_by(certificate: &CertificateDer<'_>, issuer: &CertificateDer<'_>) -> bool {
    let (Ok((_, certificate)), Ok((_, issuer))) = (X509Certificate::from_der(certificate), X509Certificate::from_der(issuer)) else {
        return false;
    };
    certificate.verify_signature(Some(issuer.public_key())).is_ok()
}
