//! The two verifiers: the peer's leaf must be an X509-SVID in time, whose chain leads to the authorities of its own trust domain, and which is
//! not revoked, as they are at the moment of the handshake.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::chain::{self, Role};
use crate::profile::{LeafFacts, check_authority, check_leaf};
use crate::tls::{PeerError, ServerTrust, SharedTrust};
use crate::{Clock, Crl, Fingerprint, SpiffeId, SvidError, TrustDomain, TrustState};

/// What the CA verifies agents with.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    trust: SharedTrust,
    clock: Arc<dyn Clock>,
    algorithms: WebPkiSupportedAlgorithms,
}

/// What an agent verifies the CA with.
#[derive(Debug)]
pub(super) struct ServerVerifier {
    trust: ServerTrust,
    server_id: SpiffeId,
    clock: Arc<dyn Clock>,
    algorithms: WebPkiSupportedAlgorithms,
}

/// A peer's chain, as it came.
#[derive(Clone, Copy)]
struct Shown<'a> {
    leaf: &'a CertificateDer<'a>,
    intermediates: &'a [CertificateDer<'a>],
}

impl ClientVerifier {
    pub(super) fn new(trust: SharedTrust, clock: Arc<dyn Clock>, algorithms: WebPkiSupportedAlgorithms) -> Self {
        Self { trust, clock, algorithms }
    }
}

impl ServerVerifier {
    pub(super) fn new(trust: ServerTrust, server_id: SpiffeId, clock: Arc<dyn Clock>, algorithms: WebPkiSupportedAlgorithms) -> Self {
        Self { trust, server_id, clock, algorithms }
    }

    fn check(&self, shown: Shown<'_>) -> Result<(), PeerError> {
        let facts = check_leaf(shown.leaf)?;
        if facts.id != self.server_id {
            return Err(PeerError::OtherServer { found: facts.id, expected: self.server_id.clone() });
        }
        match &self.trust {
            ServerTrust::Bundle(trust) => shown.verify(&facts, &trust.load(), self.clock.as_ref(), Role::Server),
            ServerTrust::Fingerprint { root, trust_domain } => shown.verify_with_root(&facts, *root, trust_domain, self.clock.as_ref()),
        }
    }
}

impl Shown<'_> {
    fn verify(self, facts: &LeafFacts, trust: &TrustState, clock: &dyn Clock, role: Role) -> Result<(), PeerError> {
        let bundle = trust.bundle(facts.id.trust_domain()).ok_or_else(|| SvidError::UnknownTrustDomain(facts.id.clone()))?;
        self.verify_chain(facts, trust.anchors(bundle), trust.crl.as_ref(), clock, role)
    }

    /// The root must be among the certificates that the server sent.
    fn verify_with_root(self, facts: &LeafFacts, root: Fingerprint, domain: &TrustDomain, clock: &dyn Clock) -> Result<(), PeerError> {
        if facts.id.trust_domain() != domain {
            return Err(SvidError::UnknownTrustDomain(facts.id.clone()).into());
        }
        // Bounded before anything is hashed.
        let sent = &self.intermediates[..self.intermediates.len().min(chain::MAX_CHAIN)];
        let anchor = sent.iter().find(|certificate| Fingerprint::of(certificate) == root).ok_or(PeerError::RootMissing(root))?;
        let authority = check_authority(anchor)?;
        if let Some(id) = authority.id.filter(|id| id.trust_domain() != domain) {
            let problem = format!("the trusted root belongs to another trust domain, {id}");
            return Err(SvidError::Chain { id: facts.id.clone(), problem }.into());
        }
        self.verify_chain(facts, [anchor], None, clock, Role::Server)
    }

    fn verify_chain<'a, 'b: 'a>(
        self,
        facts: &LeafFacts,
        anchors: impl IntoIterator<Item = &'a CertificateDer<'b>>,
        crl: Option<&Crl>,
        clock: &dyn Clock,
        role: Role,
    ) -> Result<(), PeerError> {
        let now = clock.now();
        chain::check_dates(&facts.id, facts.not_before, facts.not_after, now)?;
        chain::verify(self.leaf, self.intermediates, anchors, crl, now, role)
            .map_err(|problem| SvidError::Chain { id: facts.id.clone(), problem }.into())
    }
}

/// What both verifiers do alike. TLS 1.2 is never negotiated, so its signatures are refused.
macro_rules! signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _certificate: &CertificateDer<'_>,
            _signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Err(rustls::Error::General("TLS 1.2 is not spoken here".into()))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls13_signature(message, certificate, signature, &self.algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.algorithms.supported_schemes()
        }
    };
}

impl ServerCertVerifier for ServerVerifier {
    /// The name that was dialled does not matter, only the SPIFFE ID.
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(Shown { leaf, intermediates }).map_err(refused)?;
        Ok(ServerCertVerified::assertion())
    }

    signatures!();
}

impl ClientCertVerifier for ClientVerifier {
    /// An agent that joins has no certificate yet; what it may call without one is for the API to say.
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = check_leaf(leaf)
            .map_err(PeerError::from)
            .and_then(|facts| Shown { leaf, intermediates }.verify(&facts, &self.trust.load(), self.clock.as_ref(), Role::Client));
        verified.map_err(refused)?;
        Ok(ClientCertVerified::assertion())
    }

    signatures!();
}

fn refused(error: PeerError) -> rustls::Error {
    CertificateError::Other(OtherError(Arc::new(error))).into()
}
