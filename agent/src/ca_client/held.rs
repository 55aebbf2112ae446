//! A certificate that the agent holds, and when to ask for the next one.

use std::sync::Arc;

use chancery_identity::{PrivateKey, TrustState, X509Svid};
use chancery_proto::chancery::v1 as wire;
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use uuid::Uuid;

use super::CaError;

/// Renewals are spread over this part of the lifetime, so that what was issued together is not renewed together.
const SPREAD: f64 = 0.1;

/// A certificate with the moment it was received.
///
/// Lifetimes are reckoned from there, not from `notBefore`: that lies back, and with lifetimes of seconds half of the validity may already
/// be over when the certificate arrives.
#[derive(Clone, Debug)]
pub struct Held {
    /// The certificate and its key.
    pub svid: Arc<X509Svid>,
    /// By the agent's clock.
    pub received_at: OffsetDateTime,
    /// Where the ledger recorded it; 0 if that is not known.
    pub entry: u64,
}

impl Held {
    /// Takes an issued certificate over if it may be served: its key matches, its chain leads to `trust`, it is in time by this machine's
    /// clock.
    ///
    /// # Errors
    /// If it may not.
    pub fn accept(issued: &wire::IssuedSvid, key: PrivateKey, trust: &TrustState, now: OffsetDateTime) -> Result<Self, CaError> {
        let chain = issued.chain.iter().map(|der| CertificateDer::from(der.to_vec())).collect();
        let svid = X509Svid::new(chain, key)?;
        svid.verify(trust, now)?;
        if svid.id().as_str() != issued.spiffe_id {
            return Err(CaError::Answer(format!("it calls the certificate of {} one of {}", svid.id(), issued.spiffe_id)));
        }
        Ok(Self { svid: Arc::new(svid), received_at: now, entry: issued.entry })
    }

    /// The UID that an agent's SPIFFE ID ends in: its node's, or as a sidecar its pod's.
    pub fn agent_uid(&self) -> Option<Uuid> {
        self.svid.id().segments().last()?.parse().ok()
    }

    /// As on the wire: DER, leaf first.
    pub fn chain(&self) -> Vec<Vec<u8>> {
        self.svid.chain().iter().map(|certificate| certificate.to_vec()).collect()
    }

    /// When to renew: `from` (0 to 1) of the lifetime, plus a random part of the spread.
    pub fn renewal(&self, from: f64) -> OffsetDateTime {
        let lifetime = self.svid.not_after() - self.received_at;
        self.received_at + lifetime * (from + rand::random::<f64>() * SPREAD)
    }

    /// Whether it has expired at `now`.
    pub fn is_expired(&self, now: OffsetDateTime) -> bool {
        self.svid.not_after() <= now
    }
}
