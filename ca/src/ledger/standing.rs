//! How a recorded identity stands: what signed it, and whether it still counts.

use chancery_identity::Fingerprint;
use chancery_proto::chancery::v1 as wire;
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use super::acts::Revocation;
use super::entry::{EntryError, IssueReason, Role, to_millis};
use super::filter::{IdentityFilter, PodFilter};
use super::query::Identity;
use super::{Ledger, LedgerError};

/// What is known about an identity beyond its own entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityStanding {
    /// What signed it; none if the ledger does not hold that certificate.
    pub issuing_certificate: Option<OwnCertificate>,
    /// The trust root above that; likewise.
    pub root: Option<OwnCertificate>,
    /// Whether its validity has begun.
    pub begun: bool,
    /// Whether its validity has ended.
    pub expired: bool,
    /// The entry of the newest certificate of the same ID for the same pod, agent or sidecar, if this is not it.
    pub superseded_by: Option<u64>,
    /// The revocation in force that is about it.
    pub revoked: Option<Revocation>,
    /// The entry of the act that it is by; none if that is in a log which this one continues.
    pub revoked_by: Option<u64>,
}

/// A certificate of the CA's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnCertificate {
    /// Of the whole certificate.
    pub fingerprint: Fingerprint,
    /// Its subject's common name.
    pub subject: String,
    /// Its validity begins.
    pub not_before: OffsetDateTime,
    /// Its validity ends.
    pub not_after: OffsetDateTime,
}

impl Ledger {
    /// How `identity` stands now.
    ///
    /// # Errors
    /// On the store's account, or if an entry cannot be read.
    pub async fn standing(&self, identity: &Identity) -> Result<IdentityStanding, LedgerError> {
        let now = self.clock.now();
        let newest = match holder(identity) {
            Some(filter) => self.list(&filter, 1, None).await?.identities.pop(),
            None => None,
        };
        let own = self.authority_certificates().await?;
        let revoked = self.revocation(identity);
        Ok(IdentityStanding {
            issuing_certificate: own_certificate(&own, identity.issuance.issuing_certificate)?,
            root: own_certificate(&own, identity.issuance.root)?,
            begun: identity.leaf.not_before <= now,
            expired: identity.leaf.not_after < now,
            revoked,
            revoked_by: revoked.and_then(|revocation| self.act_of(&revocation)),
            superseded_by: newest.map(|newest| newest.index).filter(|newest| *newest > identity.index),
        })
    }
}

/// Whatever is issued to whom `identity` was issued to; none if that cannot be told.
fn holder(identity: &Identity) -> Option<IdentityFilter> {
    let Identity { issuance, leaf, .. } = identity;
    // An ID of the CA's, an agent's or a sidecar's own stands for one holder, and one that renews without a token names no pod.
    let own = issuance.role == Role::Unspecified || matches!(issuance.reason, IssueReason::Join | IssueReason::AgentRenewal);
    let pod = if own { None } else { Some(PodFilter::Uid(issuance.pod_uid?)) };
    Some(IdentityFilter { spiffe_id: Some(leaf.spiffe_id.clone()), pod, ..IdentityFilter::default() })
}

/// The one of `own` whose fingerprint has this first half.
fn own_certificate(own: &[(u64, wire::AuthorityCertificate)], half: [u8; 16]) -> Result<Option<OwnCertificate>, LedgerError> {
    for (index, wire::AuthorityCertificate { certificate, .. }) in own {
        let fingerprint = Fingerprint::of(&CertificateDer::from(&certificate[..]));
        if fingerprint.0.starts_with(&half) {
            let read = read_own(fingerprint, certificate);
            return read.map(Some).map_err(|problem| LedgerError::Unreadable { index: *index, problem });
        }
    }
    Ok(None)
}

fn read_own(fingerprint: Fingerprint, der: &[u8]) -> Result<OwnCertificate, EntryError> {
    let (_, certificate) = X509Certificate::from_der(der)
        .map_err(|error| EntryError::Field { field: "certificate", problem: format!("cannot be read: {error}") })?;
    let name = certificate.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
    let validity = certificate.validity();
    Ok(OwnCertificate {
        fingerprint,
        subject: name.unwrap_or_default().to_owned(),
        not_before: validity.not_before.to_datetime(),
        not_after: validity.not_after.to_datetime(),
    })
}

impl From<IdentityStanding> for wire::IdentityStanding {
    fn from(standing: IdentityStanding) -> Self {
        Self {
            issuing_certificate: standing.issuing_certificate.map(|own| own.into_wire(false)),
            root: standing.root.map(|own| own.into_wire(true)),
            not_yet_valid: !standing.begun,
            expired: standing.expired,
            superseded_by: standing.superseded_by,
            revoked_by: standing.revoked_by,
            revoked_at_ms: standing.revoked.map_or(0, |revocation| to_millis(revocation.since)),
        }
    }
}

impl OwnCertificate {
    fn into_wire(self, root: bool) -> wire::AuthorityStatus {
        wire::AuthorityStatus {
            root,
            fingerprint: self.fingerprint.to_string(),
            subject: self.subject,
            not_before_ms: to_millis(self.not_before),
            not_after_ms: to_millis(self.not_after),
            state: String::new(),
        }
    }
}
