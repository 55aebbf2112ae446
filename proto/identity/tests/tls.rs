//! Real handshakes, in memory, between the two configurations.

#![allow(clippy::unwrap_used, reason = "a test may fail wherever it likes")]

mod support;

use std::sync::Arc;

use arc_swap::ArcSwap;
use chancery_identity::tls::{self, PeerError, ServerTrust, SharedTrust, client_config, peer_id, server_config, trust_from};
use chancery_identity::{Clock, Crl, Fingerprint, MAX_CRL_BYTES, SvidError, TrustState, X509Svid};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ClientConnection, HandshakeKind, ServerConfig, ServerConnection};
use rustls_pki_types::ServerName;
use time::Duration;

use support::{Pki, SetClock, authority_params, domain, id, leaf_params, now};

const DOMAIN: &str = "example.org";
const CA: &str = "spiffe://example.org/chancery/ca";
const AGENT: &str = "spiffe://example.org/chancery/agent/east/0f3a1c52-5f6b-4f0a-9d5e-2b7f6f0c9a11";

/// A CA and what its agents need.
struct Scene {
    pki: Pki,
    clock: Arc<SetClock>,
    server_trust: SharedTrust,
    server_certificate: Arc<ArcSwap<CertifiedKey>>,
}

impl Scene {
    fn new() -> Self {
        let pki = Pki::new("root one");
        let server_certificate = Arc::new(ArcSwap::from_pointee(shown(&pki)));
        Self { server_trust: trust_from(pki.trust(DOMAIN)), clock: SetClock::at(now()), server_certificate, pki }
    }

    fn clock(&self) -> Arc<dyn Clock> {
        self.clock.clone()
    }

    fn server(&self) -> ServerConfig {
        server_config(self.server_certificate.clone(), self.server_trust.clone(), self.clock()).unwrap()
    }

    fn bundle(&self) -> ServerTrust {
        ServerTrust::Bundle(trust_from(self.pki.trust(DOMAIN)))
    }

    fn client(&self, trust: ServerTrust, svid: Option<&X509Svid>) -> ClientConfig {
        client_config(trust, id(CA), svid, self.clock()).unwrap()
    }
}

/// What a CA of this PKI shows: its chain, then its root.
fn shown(pki: &Pki) -> CertifiedKey {
    tls::certified_key(&pki.svid(CA), std::slice::from_ref(&pki.root.certificate)).unwrap()
}

/// Which end gave up, and why.
#[derive(Debug)]
enum Refused {
    ByClient(rustls::Error),
    ByServer(rustls::Error),
}

impl Refused {
    #[track_caller]
    fn by_client(self) -> PeerError {
        match self {
            Self::ByClient(error) => tls::peer_error(&error).unwrap_or_else(|| panic!("{error}")).clone(),
            Self::ByServer(error) => panic!("refused by the server: {error}"),
        }
    }

    #[track_caller]
    fn by_server(self) -> PeerError {
        match self {
            Self::ByServer(error) => tls::peer_error(&error).unwrap_or_else(|| panic!("{error}")).clone(),
            Self::ByClient(error) => panic!("refused by the client: {error}"),
        }
    }
}

fn connect(client: &Arc<ClientConfig>, server: &Arc<ServerConfig>) -> Result<(ClientConnection, ServerConnection), Refused> {
    let mut client = ClientConnection::new(client.clone(), ServerName::try_from("chancery.example").unwrap()).unwrap();
    let mut server = ServerConnection::new(server.clone()).unwrap();
    while client.wants_write() || server.wants_write() {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        let mut rest = wire.as_slice();
        while !rest.is_empty() {
            server.read_tls(&mut rest).unwrap();
            server.process_new_packets().map_err(Refused::ByServer)?;
        }
        wire.clear();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        let mut rest = wire.as_slice();
        while !rest.is_empty() {
            client.read_tls(&mut rest).unwrap();
            client.process_new_packets().map_err(Refused::ByClient)?;
        }
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
    Ok((client, server))
}

fn connect_once(client: ClientConfig, server: ServerConfig) -> Result<(ClientConnection, ServerConnection), Refused> {
    connect(&Arc::new(client), &Arc::new(server))
}

#[track_caller]
fn problem(error: PeerError) -> String {
    match error {
        PeerError::Svid(SvidError::Chain { problem, .. }) => problem,
        other => panic!("{other:?}"),
    }
}

#[test]
fn both_ends_learn_who_the_other_is() {
    let scene = Scene::new();
    let agent = scene.pki.svid(AGENT);
    let (client, server) = connect_once(scene.client(scene.bundle(), Some(&agent)), scene.server()).unwrap();
    assert_eq!(peer_id(&client.peer_certificates().unwrap()[0]).unwrap(), id(CA));
    assert_eq!(peer_id(&server.peer_certificates().unwrap()[0]).unwrap(), id(AGENT));
    assert_eq!(client.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    assert_eq!((client.alpn_protocol(), server.alpn_protocol()), (Some(&b"h2"[..]), Some(&b"h2"[..])));
}

#[test]
fn a_client_without_a_certificate_is_let_in_to_join() {
    let scene = Scene::new();
    let (_client, server) = connect_once(scene.client(scene.bundle(), None), scene.server()).unwrap();
    assert!(server.peer_certificates().is_none());
}

#[test]
fn no_session_is_resumed() {
    let scene = Scene::new();
    let agent = scene.pki.svid(AGENT);
    let (client, server) = (Arc::new(scene.client(scene.bundle(), Some(&agent))), Arc::new(scene.server()));
    for _ in 0..3 {
        let (client, server) = connect(&client, &server).unwrap();
        assert_eq!(client.handshake_kind(), Some(HandshakeKind::Full));
        assert_eq!(client.tls13_tickets_received(), 0);
        assert_eq!(server.handshake_kind(), Some(HandshakeKind::Full));
    }
}

#[test]
fn a_client_that_wants_to_resume_gets_no_ticket_either() {
    let scene = Scene::new();
    let mut client = scene.client(scene.bundle(), None);
    client.resumption = rustls::client::Resumption::in_memory_sessions(8);
    let (client, server) = (Arc::new(client), Arc::new(scene.server()));
    for _ in 0..2 {
        let (client, _server) = connect(&client, &server).unwrap();
        assert_eq!((client.handshake_kind(), client.tls13_tickets_received()), (Some(HandshakeKind::Full), 0));
    }
}

#[test]
fn a_root_removed_from_the_trust_refuses_the_next_handshake() {
    let scene = Scene::new();
    let agent = scene.pki.svid(AGENT);
    let (client, server) = (Arc::new(scene.client(scene.bundle(), Some(&agent))), Arc::new(scene.server()));
    connect(&client, &server).unwrap();

    scene.server_trust.store(Arc::new(Pki::new("root two").trust(DOMAIN)));
    let refused = connect(&client, &server).unwrap_err().by_server();
    assert_eq!(problem(refused), "none of the bundle's authorities has issued it");
}

#[test]
fn a_distrusted_root_refuses_the_next_handshake_even_if_the_bundle_still_has_it() {
    let scene = Scene::new();
    let trust = trust_from(scene.pki.trust(DOMAIN));
    let (client, server) = (Arc::new(scene.client(ServerTrust::Bundle(trust.clone()), None)), Arc::new(scene.server()));
    connect(&client, &server).unwrap();

    let root = Fingerprint::of(&scene.pki.root.certificate);
    trust.store(Arc::new(scene.pki.trust(DOMAIN).with_distrusted(vec![root])));
    connect(&client, &server).unwrap_err().by_client();
}

#[test]
fn a_new_server_certificate_is_shown_from_the_next_handshake_on() {
    let scene = Scene::new();
    let (client, server) = (Arc::new(scene.client(scene.bundle(), None)), Arc::new(scene.server()));
    let leaf = || connect(&client, &server).unwrap().0.peer_certificates().unwrap()[0].clone();
    let before = leaf();
    scene.server_certificate.store(Arc::new(shown(&scene.pki)));
    assert_ne!(leaf(), before);
}

#[test]
fn a_client_of_another_ca_is_refused() {
    let scene = Scene::new();
    let stranger = Pki::new("root one").svid(AGENT);
    let refused = connect_once(scene.client(scene.bundle(), Some(&stranger)), scene.server()).unwrap_err().by_server();
    // Same names, other keys: webpki finds the issuer, but not its signature.
    assert!(matches!(refused, PeerError::Svid(SvidError::Chain { .. })), "{refused:?}");
}

#[test]
fn a_server_of_another_ca_is_refused() {
    let scene = Scene::new();
    let trust = ServerTrust::Bundle(trust_from(Pki::new("root two").trust(DOMAIN)));
    let refused = connect_once(scene.client(trust, None), scene.server()).unwrap_err().by_client();
    assert_eq!(problem(refused), "none of the bundle's authorities has issued it");
}

#[test]
fn a_client_of_a_trust_domain_without_a_bundle_is_refused() {
    let scene = Scene::new();
    let foreign = "spiffe://elsewhere.org/chancery/agent/east/1";
    let refused = connect_once(scene.client(scene.bundle(), Some(&scene.pki.svid(foreign))), scene.server()).unwrap_err().by_server();
    assert_eq!(refused, PeerError::Svid(SvidError::UnknownTrustDomain(id(foreign))));
}

#[test]
fn an_authority_of_one_trust_domain_does_not_vouch_for_another() {
    let scene = Scene::new();
    let other = Pki::new("other");
    scene
        .server_trust
        .store(Arc::new(TrustState::new(2, domain(DOMAIN), [scene.pki.bundle(DOMAIN), other.bundle("elsewhere.org")]).unwrap()));
    let own = other.svid("spiffe://elsewhere.org/w");
    connect_once(scene.client(scene.bundle(), Some(&own)), scene.server()).unwrap();
    let borrowed = other.svid(AGENT);
    let refused = connect_once(scene.client(scene.bundle(), Some(&borrowed)), scene.server()).unwrap_err().by_server();
    assert_eq!(problem(refused), "none of the bundle's authorities has issued it");
}

#[test]
fn another_identity_of_the_same_ca_cannot_pose_as_the_server() {
    let scene = Scene::new();
    scene.server_certificate.store(Arc::new(tls::certified_key(&scene.pki.svid(AGENT), &[]).unwrap()));
    let refused = connect_once(scene.client(scene.bundle(), None), scene.server()).unwrap_err().by_client();
    assert_eq!(refused, PeerError::OtherServer { found: id(AGENT), expected: id(CA) });
}

#[test]
fn certificates_expire_by_the_injected_clock() {
    let scene = Scene::new();
    let agent = scene.pki.svid(AGENT);
    let (client, server) = (Arc::new(scene.client(scene.bundle(), Some(&agent))), Arc::new(scene.server()));
    scene.clock.set(agent.not_after());
    connect(&client, &server).unwrap();

    scene.clock.set(agent.not_after() + Duration::seconds(1));
    let refused = connect(&client, &server).unwrap_err().by_client();
    assert!(matches!(refused, PeerError::Svid(SvidError::Expired { .. })), "{refused:?}");

    scene.clock.set(agent.not_before() - Duration::seconds(1));
    let refused = connect(&client, &server).unwrap_err().by_client();
    assert!(matches!(refused, PeerError::Svid(SvidError::NotYetValid { .. })), "{refused:?}");
}

#[test]
fn an_expired_client_is_refused_by_the_server() {
    let scene = Scene::new();
    let mut params = leaf_params(AGENT);
    params.not_after = now() - Duration::seconds(1);
    let refused = connect_once(scene.client(scene.bundle(), Some(&scene.pki.svid_of(&params))), scene.server()).unwrap_err().by_server();
    assert!(matches!(refused, PeerError::Svid(SvidError::Expired { .. })), "{refused:?}");
}

#[test]
fn an_expired_issuing_certificate_breaks_the_chain() {
    let scene = Scene::new();
    let mut params = authority_params("old issuing");
    params.not_after = now() - Duration::seconds(1);
    let issuing = scene.pki.root.subordinate(params);
    let (leaf, key) = issuing.leaf(&leaf_params(AGENT));
    let svid = X509Svid::new(vec![leaf, issuing.certificate], key).unwrap();
    let refused = connect_once(scene.client(scene.bundle(), Some(&svid)), scene.server()).unwrap_err().by_server();
    assert_eq!(problem(refused), "a certificate of the chain has expired");
}

#[test]
fn a_fingerprint_trusts_the_root_that_the_server_sends() {
    let scene = Scene::new();
    let trust = |root, trust_domain: &str| ServerTrust::Fingerprint { root, trust_domain: domain(trust_domain) };
    let root = Fingerprint::of(&scene.pki.root.certificate);
    connect_once(scene.client(trust(root, DOMAIN), None), scene.server()).unwrap();

    let refused = connect_once(scene.client(trust(Fingerprint([7; 32]), DOMAIN), None), scene.server()).unwrap_err().by_client();
    assert_eq!(refused, PeerError::RootMissing(Fingerprint([7; 32])));

    let refused = connect_once(scene.client(trust(root, "elsewhere.org"), None), scene.server()).unwrap_err().by_client();
    assert_eq!(refused, PeerError::Svid(SvidError::UnknownTrustDomain(id(CA))));
}

#[test]
fn sending_the_trusted_root_does_not_help_a_server_that_it_has_not_issued() {
    let scene = Scene::new();
    let root = scene.pki.root.certificate.clone();
    let trust = ServerTrust::Fingerprint { root: Fingerprint::of(&root), trust_domain: domain(DOMAIN) };
    let impostor = tls::certified_key(&Pki::new("impostor").svid(CA), &[root]).unwrap();
    scene.server_certificate.store(Arc::new(impostor));
    let refused = connect_once(scene.client(trust, None), scene.server()).unwrap_err().by_client();
    assert_eq!(problem(refused), "none of the bundle's authorities has issued it");
}

#[test]
fn the_reason_of_a_refusal_is_found_in_what_tokio_rustls_returns() {
    let scene = Scene::new();
    let stranger = Pki::new("stranger").svid(AGENT);
    let Err(Refused::ByServer(error)) = connect_once(scene.client(scene.bundle(), Some(&stranger)), scene.server()) else {
        panic!("not refused by the server");
    };
    let error = std::io::Error::new(std::io::ErrorKind::InvalidData, error);
    let reason = tls::peer_error_of_io(&error).unwrap().to_string();
    assert!(reason.contains(AGENT), "{reason}");
}

#[test]
fn a_revoked_peer_is_refused_by_either_end_and_others_are_not() {
    let scene = Scene::new();
    let (agent, other) = (scene.pki.svid(AGENT), scene.pki.svid(AGENT));
    let server_serial = chancery_identity::profile::check_leaf(&scene.server_certificate.load().cert[0]).unwrap().serial;
    scene.server_trust.store(scene.pki.trust(DOMAIN).with_crl(Some(scene.pki.crl(&[agent.serial()]))).into());
    let refused = connect_once(scene.client(scene.bundle(), Some(&agent)), scene.server()).unwrap_err().by_server();
    assert_eq!(problem(refused), "it was revoked");
    connect_once(scene.client(scene.bundle(), Some(&other)), scene.server()).unwrap();
    let bundle = |crl| ServerTrust::Bundle(trust_from(scene.pki.trust(DOMAIN).with_crl(Some(crl))));
    let refused = connect_once(scene.client(bundle(scene.pki.crl(&[server_serial])), None), scene.server()).unwrap_err().by_client();
    assert_eq!(problem(refused), "it was revoked");
    connect_once(scene.client(bundle(scene.pki.crl(&[agent.serial()])), None), scene.server()).unwrap();
}

#[test]
fn crls_of_others_keep_nobody_out() {
    let scene = Scene::new();
    let agent = scene.pki.svid(AGENT);
    let crl = Pki::new("another root").crl(&[agent.serial()]);
    scene.server_trust.store(scene.pki.trust(DOMAIN).with_crl(Some(crl)).into());
    connect_once(scene.client(scene.bundle(), Some(&agent)), scene.server()).unwrap();
}

#[test]
fn crls_are_read_whole_or_not_at_all() {
    let (pki, other) = (Pki::new("root one"), Pki::new("root two"));
    let (serial, unlisted) = (pki.svid(AGENT).serial(), pki.svid(AGENT).serial());
    let both = Crl::from_der([&*pki.issuing.crl(&[serial]), &other.issuing.crl(&[])]).unwrap();
    assert_eq!((both.revoked(), both.revokes(serial), both.revokes(unlisted)), (1, true, false));
    assert!(both.speaks_for(&pki.issuing.certificate) && both.speaks_for(&other.issuing.certificate));
    assert!(!both.speaks_for(&pki.root.certificate));
    let again = Crl::from_pem(both.pem().to_vec()).unwrap();
    assert!(again == both && format!("{again:?}").len() < 60);
    let broken = [both.pem(), b"-----BEGIN X509 CRL-----\nMAA=\n-----END X509 CRL-----\n"].concat();
    for not_one in [Vec::new(), b"no PEM".to_vec(), pki.bundle(DOMAIN).to_pem().into_bytes(), broken, vec![b' '; MAX_CRL_BYTES + 1]] {
        assert!(Crl::from_pem(not_one).is_err());
    }
}
