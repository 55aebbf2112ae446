//! Who is at the other end of a connection, as TLS proved it, and what that peer may do how often.
//!
//! Made once a connection, when its handshake is done, so that no call parses a certificate again.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use chancery_identity::{Serial, SpiffeId, profile};
use governor::{DefaultDirectRateLimiter, Quota};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::api::error::ApiError;

/// How many callers' limits are remembered before those of callers that are gone are swept out.
const SWEEP_AT: usize = 1024;

/// How often and how much at once each peer may ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Certificates a second that one agent may ask for, over time.
    pub requests_per_second: NonZeroU32,
    /// Certificates that one agent may ask for at once.
    pub burst: NonZeroU32,
    /// Calls of one agent that are worked on at the same time.
    pub concurrent_calls: usize,
    /// Joins a second from one address.
    pub joins_per_second: NonZeroU32,
}

/// A peer and its connection.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Where it connects from.
    pub address: SocketAddr,
    /// What its certificate says; none when it showed none, as before joining.
    pub svid: Option<PeerSvid>,
    /// When its session ends, so that it connects again before the connection reaches its age.
    pub drain_at: Instant,
    limits: Arc<PeerLimits>,
}

/// A certificate that TLS has verified.
#[derive(Clone, Debug)]
pub struct PeerSvid {
    /// Whose.
    pub id: SpiffeId,
    /// Which.
    pub serial: Serial,
    /// Until when.
    pub not_after: OffsetDateTime,
}

impl PeerSvid {
    /// Reads a leaf that TLS has verified.
    ///
    /// # Errors
    /// If it is no X509-SVID.
    pub fn of(leaf: &CertificateDer<'_>) -> Result<Self, ApiError> {
        let facts = profile::check_leaf(leaf).map_err(|error| ApiError::Certificate(error.to_string()))?;
        Ok(Self { id: facts.id, serial: facts.serial, not_after: facts.not_after })
    }
}

impl Peer {
    /// Lets one call in, until the permit is dropped, that asks for `certificates`.
    ///
    /// # Errors
    /// If the peer has too many calls going, or asks for more than its rate allows.
    pub fn admit(&self, certificates: u32) -> Result<OwnedSemaphorePermit, ApiError> {
        let permit = Arc::clone(&self.limits.calls).try_acquire_owned().map_err(|_| ApiError::TooManyCalls)?;
        let Some(cells) = NonZeroU32::new(certificates) else { return Ok(permit) };
        match self.limits.rate.check_n(cells) {
            Ok(Ok(())) => Ok(permit),
            _ => Err(ApiError::RateLimited),
        }
    }
}

#[derive(Debug)]
struct PeerLimits {
    rate: DefaultDirectRateLimiter,
    calls: Arc<Semaphore>,
}

/// The limits of all peers: shared by the connections of one agent, and before joining by those from one address.
#[derive(Debug)]
pub struct Peers {
    limits: Limits,
    known: Mutex<HashMap<PeerKey, Weak<PeerLimits>>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum PeerKey {
    Svid(SpiffeId),
    Address(IpAddr),
}

impl Peers {
    /// With these limits for each.
    pub fn new(limits: Limits) -> Self {
        Self { limits, known: Mutex::default() }
    }

    /// The peer at the end of a connection that has just been made.
    pub fn connected(&self, address: SocketAddr, svid: Option<PeerSvid>, max_age: Duration) -> Peer {
        let key = svid.as_ref().map_or(PeerKey::Address(address.ip()), |svid| PeerKey::Svid(svid.id.clone()));
        // Before the connection itself is ended, so that calls under way can end; and not all at once after a restart of the CA.
        let drain_in = max_age.mul_f64(rand::random_range(0.8..0.95));
        Peer { address, svid, drain_at: Instant::now() + drain_in, limits: self.limits_of(key) }
    }

    fn limits_of(&self, key: PeerKey) -> Arc<PeerLimits> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(limits) = known.get(&key).and_then(Weak::upgrade) {
            return limits;
        }
        if known.len() >= SWEEP_AT && known.len().is_power_of_two() {
            known.retain(|_, limits| limits.strong_count() > 0);
        }
        let limits = Arc::new(PeerLimits::new(&key, self.limits));
        known.insert(key, Arc::downgrade(&limits));
        limits
    }
}

impl PeerLimits {
    fn new(key: &PeerKey, limits: Limits) -> Self {
        let quota = match key {
            PeerKey::Svid(_) => Quota::per_second(limits.requests_per_second).allow_burst(limits.burst),
            PeerKey::Address(_) => Quota::per_second(limits.joins_per_second),
        };
        Self { rate: DefaultDirectRateLimiter::direct(quota), calls: Arc::new(Semaphore::new(limits.concurrent_calls)) }
    }
}
