//! TLS between agents and the CA: TLS 1.3, no resumption, peers verified as SPIFFE IDs against the trust domain's own bundle.
//!
//! Session resumption is off on both ends: a resumed session calls no verifier, so it would outlive a root's removal.

use std::io;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{CertificateError, ClientConfig, ServerConfig};
use rustls_pki_types::CertificateDer;

use crate::profile::check_leaf;
use crate::tls::verifier::{ClientVerifier, ServerVerifier};
use crate::{Clock, Fingerprint, SpiffeId, SvidError, TrustDomain, TrustState, X509Svid};

mod verifier;

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

/// Why a peer's certificate was refused. [`peer_error`] finds it in the error that rustls returns.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PeerError {
    /// Its certificate is none that can be trusted.
    #[error("the peer's certificate was refused: {0}")]
    Svid(#[from] SvidError),
    /// Somebody else answered.
    #[error("the server is {found}; {expected} was expected")]
    OtherServer {
        /// In its certificate.
        found: SpiffeId,
        /// In the configuration.
        expected: SpiffeId,
    },
    /// Its chain has no certificate of the trusted fingerprint.
    #[error(
        "the server did not send the root {0}, which the configuration trusts: is the fingerprint that of another CA, or of a root since replaced?"
    )]
    RootMissing(Fingerprint),
}

/// Trust to share with connections, from a first state.
pub fn trust_from(state: TrustState) -> SharedTrust {
    Arc::new(ArcSwap::from_pointee(state))
}

/// The CA's side: shows `certificate` (resolved anew for each connection) and asks for a client certificate, which may be absent (joining)
/// but if present must verify against the bundle of its trust domain. ALPN `h2`.
pub fn server_config(
    certificate: Arc<ArcSwap<CertifiedKey>>,
    trust: SharedTrust,
    clock: Arc<dyn Clock>,
) -> Result<ServerConfig, rustls::Error> {
    let provider = Arc::new(default_provider());
    let verifier = ClientVerifier::new(trust, clock, algorithms(&provider));
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(Current(certificate)));
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// The agent's side: the peer must be `server_id` under `trust`; shows `svid`, if there is one. ALPN `h2`.
pub fn client_config(
    trust: ServerTrust,
    server_id: SpiffeId,
    svid: Option<&X509Svid>,
    clock: Arc<dyn Clock>,
) -> Result<ClientConfig, rustls::Error> {
    let provider = Arc::new(default_provider());
    let verifier = ServerVerifier::new(trust, server_id, clock, algorithms(&provider));
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match svid {
        Some(svid) => builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certified_key(svid, &[])?))),
        None => builder.with_no_client_auth(),
    };
    config.resumption = Resumption::disabled();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// The SVID as rustls wants it. `extra` is sent after the chain: the CA appends its root there, for agents that hold a fingerprint.
pub fn certified_key(svid: &X509Svid, extra: &[CertificateDer<'static>]) -> Result<CertifiedKey, rustls::Error> {
    let key = svid.key().signing_key().ok_or_else(|| rustls::Error::General(SvidError::Key(svid.id().clone()).to_string()))?;
    Ok(CertifiedKey::new([svid.chain(), extra].concat(), key))
}

/// The SPIFFE ID of a peer's leaf, whose chain TLS has verified.
///
/// # Errors
/// If the certificate is no X509-SVID.
pub fn peer_id(leaf: &CertificateDer<'_>) -> Result<SpiffeId, SvidError> {
    check_leaf(leaf).map(|facts| facts.id)
}

/// Why this end refused its peer's certificate, if that is what `error` says.
pub fn peer_error(error: &rustls::Error) -> Option<&PeerError> {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::Other(other)) => other.0.downcast_ref(),
        _ => None,
    }
}

/// [`peer_error`] of what tokio-rustls returns.
pub fn peer_error_of_io(error: &io::Error) -> Option<&PeerError> {
    error.get_ref()?.downcast_ref().and_then(peer_error)
}

/// The server's certificate of the moment.
#[derive(Debug)]
struct Current(Arc<ArcSwap<CertifiedKey>>);

impl ResolvesServerCert for Current {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }
}

fn algorithms(provider: &CryptoProvider) -> rustls::crypto::WebPkiSupportedAlgorithms {
    provider.signature_verification_algorithms
}
