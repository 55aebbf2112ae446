//! The CA's own server certificate: a leaf as any other, recorded before it is shown, with a fresh key that never leaves memory.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use bytes::Bytes;
use chancery_identity::csr::{self, KeyType, VerifiedCsr};
use chancery_identity::{Fingerprint, SpiffeId, X509Svid, tls};
use chancery_proto::chancery::v1::{IssueReason, Role};
use rustls::sign::CertifiedKey;
use time::OffsetDateTime;
use uuid::Uuid;

use super::issuer::{Issuer, IssuerError, LeafRequest};
use super::{AuthorityError, Settings, is_past_half};
use crate::ledger::{Issuance, Ledger, Provenance};

/// The server's certificate in use.
#[derive(Debug)]
pub(super) struct ServerCertificate {
    current: Arc<ArcSwap<CertifiedKey>>,
    about: Mutex<About>,
    expired: AtomicBool,
}

/// What it says.
#[derive(Clone, Copy, Debug)]
struct About {
    not_before: OffsetDateTime,
    not_after: OffsetDateTime,
    root: Fingerprint,
}

struct Made {
    key: CertifiedKey,
    about: About,
}

impl ServerCertificate {
    pub(super) async fn issue(
        issuer: &Issuer,
        ledger: &Ledger,
        id: &SpiffeId,
        settings: &Settings,
        now: OffsetDateTime,
    ) -> Result<Self, AuthorityError> {
        let made = make(issuer, ledger, ledger.epoch(), id, settings, now).await?;
        let current = Arc::new(ArcSwap::from_pointee(made.key));
        Ok(Self { current, about: Mutex::new(made.about), expired: AtomicBool::new(false) })
    }

    /// Another one, recorded under the epoch at which `issuer` is the one to use.
    pub(super) async fn renew(
        &self,
        issuer: &Issuer,
        ledger: &Ledger,
        epoch: u64,
        id: &SpiffeId,
        settings: &Settings,
        now: OffsetDateTime,
    ) -> Result<(), AuthorityError> {
        // Before making it: whoever changes the names meanwhile gets another renewal.
        let was_expired = self.expired.swap(false, Ordering::AcqRel);
        match make(issuer, ledger, epoch, id, settings, now).await {
            Ok(made) => {
                *self.about.lock().unwrap_or_else(PoisonError::into_inner) = made.about;
                self.current.store(Arc::new(made.key));
                Ok(())
            }
            Err(error) => {
                self.expired.fetch_or(was_expired, Ordering::AcqRel);
                Err(error)
            }
        }
    }

    pub(super) fn current(&self) -> Arc<ArcSwap<CertifiedKey>> {
        Arc::clone(&self.current)
    }

    /// Has it replaced at the next tick, whatever its age.
    pub(super) fn expire(&self) {
        self.expired.store(true, Ordering::Release);
    }

    /// Also if it is from the future, made while the clock was ahead: nobody could connect until then.
    pub(super) fn is_due(&self, now: OffsetDateTime) -> bool {
        let About { not_before, not_after, .. } = self.about();
        self.expired.load(Ordering::Acquire) || now < not_before || is_past_half(now, not_before, not_after)
    }

    /// The trust root that it chains to.
    pub(super) fn root(&self) -> Fingerprint {
        self.about().root
    }

    fn about(&self) -> About {
        *self.about.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn make(
    issuer: &Issuer,
    ledger: &Ledger,
    epoch: u64,
    id: &SpiffeId,
    settings: &Settings,
    now: OffsetDateTime,
) -> Result<Made, AuthorityError> {
    let encoding = |error: csr::CsrError| IssuerError::Encoding(error.to_string());
    let (request, private) = csr::generate(KeyType::EcdsaP256, None).map_err(encoding)?;
    let request = VerifiedCsr::from_der(&request).map_err(encoding)?;
    let leaf = LeafRequest {
        id,
        dns_names: &settings.dns_names,
        public_key: &request.public_key,
        key_type: request.key_type,
        lifetime: settings.server_lifetime,
    };
    let leaf = issuer.issue(&leaf, now).await?;
    ledger.append_all_at(epoch, vec![entry(issuer, &leaf.certificate).into()]).await?;
    let about = About { not_before: leaf.facts.not_before, not_after: leaf.facts.not_after, root: issuer.root_fingerprint() };
    let svid = X509Svid::new(vec![leaf.certificate, issuer.certificate().clone()], private)?;
    Ok(Made { key: tls::certified_key(&svid, &[issuer.root().clone()])?, about })
}

fn entry(issuer: &Issuer, certificate: &[u8]) -> Issuance {
    Issuance {
        certificate: Bytes::copy_from_slice(certificate),
        issuing_certificate: issuer.certificate_id(),
        root: issuer.root_id(),
        // The CA itself asked, and nobody's token.
        role: Role::Unspecified,
        reason: IssueReason::Unspecified,
        cluster: String::new(),
        node: String::new(),
        node_uid: None,
        namespace: String::new(),
        service_account: String::new(),
        service_account_uid: None,
        pod: String::new(),
        pod_uid: None,
        token_id: String::new(),
        request_id: Uuid::new_v4(),
        trust_sequence: 0,
        sidecar_pod_uid: None,
        provenance: Provenance::Issued,
    }
}
