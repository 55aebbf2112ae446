//! Certificates as they leave a running CA: each came over the wire, as an agent gets it.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use chancery_ca::attestation::development::{DevelopmentIssuer, TokenRequest};
use chancery_ca::config::{Config, DEVELOPMENT_CLUSTER, Mode, development_issuer_dir};
use chancery_ca::server;
use chancery_identity::csr::{self, KeyType};
use chancery_identity::profile::check_leaf;
use chancery_identity::tls::{self, ServerTrust, SharedTrust};
use chancery_identity::{Clock, PrivateKey, TrustBundle, TrustDomain, TrustState, X509Svid};
use chancery_proto::chancery::v1 as wire;
use chancery_proto::chancery::v1::agent_service_client::AgentServiceClient;
use chancery_proto::chancery::v1::revocation_service_client::RevocationServiceClient;
use chancery_proto::chancery::v1::workload_result::Outcome;
use chancery_tests::Result;
use chancery_tests::lab::Lab;
use hyper_util::rt::TokioIo;
use rustls_pki_types::{CertificateDer, ServerName};
use time::OffsetDateTime;
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

const NODE: &str = "node-1";
/// Longer than a test runs; the CA's clock stands still.
const TOKEN_LIFETIME: Duration = Duration::from_secs(600);

/// A clock that stands, so that certificates of a second can be judged at leisure.
#[derive(Clone, Copy, Debug)]
struct Standing(OffsetDateTime);

impl Clock for Standing {
    fn now(&self) -> OffsetDateTime {
        self.0
    }
}

/// What a CA is configured with, when, and for which workload.
#[derive(Clone, Debug)]
pub struct Setup {
    pub at: OffsetDateTime,
    pub trust_domain: String,
    pub id_template: String,
    pub dns_names: Vec<String>,
    /// In seconds, as all lifetimes here.
    pub workload_lifetime: u64,
    pub issuing_lifetime: u64,
    pub root_lifetime: u64,
    pub key_types: Vec<KeyType>,
    pub namespace: String,
    pub service_account: String,
}

/// A certificate with what its owner shows beside it.
pub struct Certified {
    pub owner: String,
    /// Leaf first, then the issuing certificate.
    pub chain: Vec<CertificateDer<'static>>,
    /// Nothing where only its owner has it.
    pub key: Option<PrivateKey>,
}

/// All that one CA issued.
pub struct Issued {
    pub at: OffsetDateTime,
    pub trust_domain: TrustDomain,
    pub root: CertificateDer<'static>,
    pub issuing: CertificateDer<'static>,
    pub leaves: Vec<Certified>,
    /// PEM; empty if nothing was revoked.
    pub crl: Vec<u8>,
}

impl Default for Setup {
    /// Every type of key, and a DNS name.
    fn default() -> Self {
        Self {
            at: OffsetDateTime::now_utc(),
            trust_domain: "mesh.test".into(),
            id_template: "/ns/{namespace}/sa/{service_account}".into(),
            dns_names: vec!["{service_account}.{namespace}.svc.cluster.local".into()],
            workload_lifetime: 3600,
            issuing_lifetime: 7 * 86400,
            root_lifetime: 365 * 86400,
            key_types: KEY_TYPES.to_vec(),
            namespace: "shop".into(),
            service_account: "cart".into(),
        }
    }
}

/// All that there are.
pub const KEY_TYPES: [KeyType; 6] =
    [KeyType::EcdsaP256, KeyType::EcdsaP384, KeyType::Ed25519, KeyType::Rsa2048, KeyType::Rsa3072, KeyType::Rsa4096];

impl Setup {
    fn configuration(&self) -> String {
        let Self { trust_domain, id_template, dns_names, workload_lifetime, issuing_lifetime, root_lifetime, .. } = self;
        let key_types: Vec<&str> = KEY_TYPES.iter().map(|key_type| key_type.as_str()).collect();
        format!(
            "trust_domain = {trust_domain:?}\nlisten = \"127.0.0.1:0\"\nhttp_listen = \"127.0.0.1:0\"\n\
             [policy]\nid_template = {id_template:?}\nkey_types = {key_types:?}\n\
             dns_names = [{{ service_accounts = [\"*\"], names = {dns_names:?} }}]\n\
             [policy.lifetimes]\nmin = \"1s\"\ndefault = \"{workload_lifetime}s\"\nmax = \"{workload_lifetime}s\"\n\
             [authority]\nissuing_lifetime = \"{issuing_lifetime}s\"\nroot_lifetime = \"{root_lifetime}s\"\n\
             dns_names = [\"chancery-ca.chancery.svc\"]\n"
        )
    }

    /// Starts the CA, has it issue to an agent, a sidecar and a workload with each type of key, and ends it.
    pub async fn issue(&self) -> Result<Issued> {
        self.run(false).await
    }

    /// Likewise, and the last leaf is revoked.
    pub async fn issue_and_revoke(&self) -> Result<Issued> {
        self.run(true).await
    }

    async fn run(&self, revoke: bool) -> Result<Issued> {
        let lab = Lab::new()?;
        let (file, data) = (lab.at("ca.toml"), lab.at("ca"));
        std::fs::write(&file, self.configuration())?;
        let mode = Mode::Development { data_dir: Some(data.clone()) };
        let clock: Arc<dyn Clock> = Arc::new(Standing(self.at));
        let shutdown = CancellationToken::new();
        let options = server::Options::new(Config::load(Some(&file), &mode)?, mode, shutdown.clone()).with_clock(clock.clone());
        let ca = server::start(options).await?;

        let trust_domain: TrustDomain = self.trust_domain.parse()?;
        let bundle = TrustBundle::from_pem(trust_domain.clone(), &std::fs::read(data.join("bundle.pem"))?)?;
        let [root] = bundle.x509_authorities() else { return Err("the bundle of a new CA has one root".into()) };
        let root = root.clone();
        let trust = tls::trust_from(TrustState::new(1, trust_domain.clone(), [bundle])?);
        let issuer = DevelopmentIssuer::open_or_create(&development_issuer_dir(&data))?;
        let agent = Client { address: ca.address.to_string(), trust_domain, trust, clock, issuer };
        let (issuing, leaves) = agent.ask(self).await?;
        let crl = if revoke {
            let last = leaves.last().and_then(|leaf| leaf.chain.first()).ok_or("no leaf")?;
            let serial = check_leaf(last)?.serial;
            let subject = wire::RevocationSubject { of: Some(wire::revocation_subject::Of::Serial(serial.to_string())) };
            let request = wire::RevokeRequest { subject: Some(subject), reason: "a test".into() };
            RevocationServiceClient::new(admin(ca.admin_socket.clone()).await?).revoke(request).await?;
            std::fs::read(data.join("crl.pem"))?
        } else {
            Vec::new()
        };
        shutdown.cancel();
        ca.finished().await?;
        Ok(Issued { at: self.at, trust_domain: agent.trust_domain, root, issuing, leaves, crl })
    }

    fn workload(&self) -> TokenRequest {
        TokenRequest {
            namespace: self.namespace.clone(),
            service_account: self.service_account.clone(),
            pod: format!("{}-0", self.service_account),
            node: NODE.into(),
            audience: "chancery".into(),
            lifetime: TOKEN_LIFETIME,
            pod_uid: None,
            node_uid: None,
        }
    }
}

/// What an agent says to the CA.
struct Client {
    address: String,
    trust_domain: TrustDomain,
    trust: SharedTrust,
    clock: Arc<dyn Clock>,
    issuer: DevelopmentIssuer,
}

impl Client {
    async fn ask(&self, setup: &Setup) -> Result<(CertificateDer<'static>, Vec<Certified>)> {
        let own = TokenRequest {
            namespace: "chancery".into(),
            service_account: "agent".into(),
            audience: "chancery-agent".into(),
            ..setup.workload()
        };
        let agent = self.join(wire::Role::Agent, &own).await?;
        let sidecar = self.join(wire::Role::Sidecar, &setup.workload()).await?;
        let (channel, shown) = self.connect(Some(&agent)).await?;
        let [server, issuing, _root] = &shown[..] else { return Err("the CA shows its leaf, the issuing certificate and the root".into()) };
        let server = Certified { owner: "the CA".into(), chain: vec![server.clone(), issuing.clone()], key: None };

        let mut leaves = vec![server, Certified::new("the agent", &agent), Certified::new("the sidecar", &sidecar)];
        for key_type in &setup.key_types {
            let workload = self.workload(channel.clone(), *key_type, &setup.workload()).await?;
            leaves.push(Certified::new(&format!("the workload with a key of type {key_type}"), &workload));
        }
        Ok((issuing.clone(), leaves))
    }

    async fn join(&self, role: wire::Role, token: &TokenRequest) -> Result<X509Svid> {
        let (csr, key) = csr::generate(KeyType::EcdsaP256, None)?;
        let request = wire::JoinRequest {
            role: role.into(),
            cluster: DEVELOPMENT_CLUSTER.into(),
            token: self.token(token)?,
            csr,
            request_id: uuid::Uuid::new_v4().to_string(),
            ..wire::JoinRequest::default()
        };
        let (channel, _) = self.connect(None).await?;
        let answer = AgentServiceClient::new(channel).join(request).await?.into_inner();
        svid(&answer.svid.ok_or("joined without a certificate")?, key)
    }

    async fn workload(&self, channel: Channel, key_type: KeyType, token: &TokenRequest) -> Result<X509Svid> {
        let (csr, key) = csr::generate(key_type, None)?;
        let request_id = uuid::Uuid::new_v4().to_string();
        let request = wire::WorkloadRequest { request_id, csr, token: self.token(token)?, reason: wire::IssueReason::First.into() };
        let answer = AgentServiceClient::new(channel).issue(wire::IssueRequest { requests: vec![request] }).await?.into_inner();
        match answer.results.into_iter().next().and_then(|result| result.outcome) {
            Some(Outcome::Svid(issued)) => svid(&issued, key),
            Some(Outcome::Refusal(refusal)) => Err(format!("{}: {}", refusal.reason, refusal.message).into()),
            None => Err("no result".into()),
        }
    }

    fn token(&self, request: &TokenRequest) -> Result<String> {
        Ok(self.issuer.sign(request, self.clock.now())?.to_string())
    }

    /// A channel, and the certificates that the CA showed.
    async fn connect(&self, own: Option<&X509Svid>) -> Result<(Channel, Vec<CertificateDer<'static>>)> {
        let server_id = self.trust_domain.member(["chancery", "ca"])?;
        let config = tls::client_config(ServerTrust::Bundle(self.trust.clone()), server_id, own, self.clock.clone())?;
        let tcp = TcpStream::connect(&self.address).await?;
        let stream = TlsConnector::from(Arc::new(config)).connect(ServerName::try_from("127.0.0.1")?, tcp).await?;
        let shown = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let shown = shown.iter().map(|certificate| certificate.clone().into_owned()).collect();
        let once = Mutex::new(Some(TokioIo::new(stream)));
        let connector = tower::service_fn(move |_| {
            let stream = once.lock().ok().and_then(|mut stream| stream.take());
            async move { stream.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)) }
        });
        Ok((Endpoint::from_static("http://chancery-ca").connect_with_connector(connector).await?, shown))
    }
}

/// A connection to the admin socket.
async fn admin(socket: PathBuf) -> Result<Channel> {
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    Ok(Endpoint::from_static("http://localhost").connect_with_connector(connector).await?)
}

fn svid(issued: &wire::IssuedSvid, key: PrivateKey) -> Result<X509Svid> {
    Ok(X509Svid::new(issued.chain.iter().map(|der| CertificateDer::from(der.to_vec())).collect(), key)?)
}

impl Certified {
    fn new(owner: &str, svid: &X509Svid) -> Self {
        Self { owner: owner.to_owned(), chain: svid.chain().to_vec(), key: Some(svid.key().clone()) }
    }
}
