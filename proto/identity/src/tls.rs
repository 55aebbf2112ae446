//! TLS between agents and the CA: TLS 1.3, no resumption, peers verified as SPIFFE IDs against the trust domain's own bundle.
//!
//! Session resumption is off on both ends: a resumed session calls no verifier, so it would outlive a root's removal.

use std::fmt::Debug;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::CertificateDer;

use crate::{Clock, Fingerprint, SpiffeId, SvidError, TrustDomain, TrustState, X509Svid};

/// The trust that a connection is verified with at the moment it is made; swapped while running.
pub type SharedTrust = Arc<ArcSwap<TrustState>>;

/// What an agent trusts the CA by.
#[derive(Clone, Debug)]
pub enum ServerTrust {
    /// A bundle, current at each handshake.
    Bundle(SharedTrust),
    /// A root's fingerprint, for the first contact: the CA sends its root in the handshake.
    Fingerprint {
        /// Of the root.
        root: Fingerprint,
        /// That the CA must belong to.
        trust_domain: TrustDomain,
    },
}

/// The CA's side: shows `certificate` (resolved anew for each connection) and asks for a client certificate, which may be absent (joining)
/// but if present must verify against the bundle of its trust domain. ALPN `h2`.
pub fn server_config(
    _certificate: Arc<ArcSwap<CertifiedKey>>,
    _trust: SharedTrust,
    _clock: Arc<dyn Clock>,
) -> Result<ServerConfig, rustls::Error> {
    unimplemented!()
}

/// The agent's side: the peer must be `server_id` under `trust`; shows `svid`, if there is one. ALPN `h2`.
pub fn client_config(
    _trust: ServerTrust,
    _server_id: SpiffeId,
    _svid: Option<&X509Svid>,
    _clock: Arc<dyn Clock>,
) -> Result<ClientConfig, rustls::Error> {
    unimplemented!()
}

/// The SVID as rustls wants it. `extra` is sent after the chain: the CA appends its root there, for agents that hold a fingerprint.
pub fn certified_key(_svid: &X509Svid, _extra: &[CertificateDer<'static>]) -> Result<CertifiedKey, rustls::Error> {
    unimplemented!()
}

/// The SPIFFE ID of a peer's leaf, whose chain TLS has verified.
///
/// # Errors
/// If the certificate is no X509-SVID.
pub fn peer_id(_leaf: &CertificateDer<'_>) -> Result<SpiffeId, SvidError> {
    unimplemented!()
}
