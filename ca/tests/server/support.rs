//! A real CA on loopback ports of the system's choosing, with its development issuer, and clients that speak to it as agents do.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use chancery_ca::attestation::development::{DevelopmentIssuer, TokenRequest};
use chancery_ca::config::{Config, Mode, development_issuer_dir};
use chancery_ca::server::{self, Running, ServeError};
use chancery_identity::csr::{self, KeyType};
use chancery_identity::tls::{ServerTrust, client_config};
use chancery_identity::{Clock, Fingerprint, PrivateKey, SpiffeId, SystemClock, TrustDomain, X509Svid};
use chancery_proto::chancery::v1::agent_service_client::AgentServiceClient;
use chancery_proto::chancery::v1::log_service_client::LogServiceClient;
use chancery_proto::chancery::v1::operator_service_client::OperatorServiceClient;
use chancery_proto::chancery::v1::workload_result::Outcome;
use chancery_proto::chancery::v1::{
    IssueReason, IssueRequest, IssuedSvid, JoinRequest, Refusal, Role, StatusRequest, StatusResponse, WorkloadRequest,
};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use time::OffsetDateTime;
use tokio::net::{TcpStream, UnixStream};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::{Channel, Endpoint};
use uuid::Uuid;

pub(crate) const TRUST_DOMAIN: &str = "dev.chancery";
pub(crate) const NODE: &str = "node-1";
/// For what is waited for; nothing is waited for by time alone.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// A clock that can be put ahead.
#[derive(Debug, Default)]
pub(crate) struct ShiftedClock(Mutex<time::Duration>);

impl ShiftedClock {
    pub(crate) fn advance(&self, by: time::Duration) {
        *self.0.lock().unwrap() += by;
    }
}

impl Clock for ShiftedClock {
    fn now(&self) -> OffsetDateTime {
        SystemClock.now() + *self.0.lock().unwrap()
    }
}

/// A CA; ended when dropped.
pub(crate) struct Ca {
    pub(crate) running: Running,
    pub(crate) directory: tempfile::TempDir,
    pub(crate) clock: Arc<ShiftedClock>,
    shutdown: DropGuard,
    root: Fingerprint,
}

impl Ca {
    /// With development's defaults.
    pub(crate) async fn start() -> Self {
        Self::start_with("").await
    }

    /// With more configuration.
    pub(crate) async fn start_with(more: &str) -> Self {
        Self::try_start(tempfile::tempdir().unwrap(), more).await.unwrap()
    }

    /// In a directory that may have been used before.
    pub(crate) async fn try_start(directory: tempfile::TempDir, more: &str) -> Result<Self, ServeError> {
        Self::write_config(&directory, more);
        let path = directory.path().join("ca.toml");
        let mode = Mode::Development { data_dir: Some(directory.path().join("data")) };
        let config = Config::load(Some(&path), &mode).unwrap();
        let (shutdown, clock) = (CancellationToken::new(), Arc::new(ShiftedClock::default()));
        let running = server::start(server::Options::new(config, mode, shutdown.clone()).with_clock(clock.clone())).await?;
        let root = operator(&running).await.status(StatusRequest {}).await.unwrap().into_inner();
        let root = root.authorities.iter().find(|authority| authority.root).unwrap().fingerprint.parse().unwrap();
        Ok(Self { running, directory, clock, shutdown: shutdown.drop_guard(), root })
    }

    /// Replaces the configuration of a CA that may be running.
    pub(crate) fn write_config(directory: &tempfile::TempDir, more: &str) {
        let ports = "listen = \"127.0.0.1:0\"\nhttp_listen = \"127.0.0.1:0\"\n";
        let new = directory.path().join("ca.toml.new");
        std::fs::write(&new, format!("{ports}{more}")).unwrap();
        std::fs::rename(new, directory.path().join("ca.toml")).unwrap();
    }

    /// Ends it in order.
    pub(crate) async fn stop(self) -> tempfile::TempDir {
        self.shutdown.disarm().cancel();
        tokio::time::timeout(SOON, self.running.finished()).await.unwrap().unwrap();
        self.directory
    }

    pub(crate) fn data_dir(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    pub(crate) fn issuer(&self) -> DevelopmentIssuer {
        DevelopmentIssuer::open_or_create(&development_issuer_dir(&self.data_dir())).unwrap()
    }

    /// A token as the development issuer signs it.
    pub(crate) fn token(&self, change: impl FnOnce(&mut TokenRequest)) -> String {
        let mut request = TokenRequest {
            namespace: "shop".into(),
            service_account: "cart".into(),
            pod: "cart-0".into(),
            node: NODE.into(),
            audience: "chancery".into(),
            lifetime: Duration::from_secs(3600),
            pod_uid: None,
            node_uid: None,
        };
        change(&mut request);
        self.issuer().sign(&request, self.clock.now()).unwrap().to_string()
    }

    pub(crate) fn agent_token(&self, node: &str) -> String {
        self.token(|request| {
            request.namespace = "chancery".into();
            request.service_account = "agent".into();
            request.pod = format!("agent-{node}");
            request.node = node.into();
            request.audience = "chancery-agent".into();
        })
    }

    /// The TLS configuration of a client that pins the CA's root.
    pub(crate) fn tls(&self, svid: Option<&X509Svid>) -> rustls::ClientConfig {
        let trust_domain: TrustDomain = TRUST_DOMAIN.parse().unwrap();
        let server: SpiffeId = trust_domain.member(["chancery", "ca"]).unwrap();
        let trust = ServerTrust::Fingerprint { root: self.root, trust_domain };
        client_config(trust, server, svid, self.clock.clone()).unwrap()
    }

    pub(crate) async fn connect(&self, svid: Option<&X509Svid>) -> AgentServiceClient<Channel> {
        self.try_connect(svid).await.unwrap()
    }

    pub(crate) async fn try_connect(&self, svid: Option<&X509Svid>) -> Result<AgentServiceClient<Channel>, tonic::transport::Error> {
        Ok(AgentServiceClient::new(self.channel(svid).await?))
    }

    /// A connection to the TLS port.
    pub(crate) async fn channel(&self, svid: Option<&X509Svid>) -> Result<Channel, tonic::transport::Error> {
        let connector = tokio_rustls::TlsConnector::from(Arc::new(self.tls(svid)));
        let address = self.running.address;
        let dial = tower::service_fn(move |_| {
            let connector = connector.clone();
            async move {
                let stream = TcpStream::connect(address).await?;
                connector.connect(ServerName::from(address.ip()), stream).await.map(TokioIo::new)
            }
        });
        Endpoint::from_static("http://ca").connect_with_connector(dial).await
    }

    /// Joins as the agent of `node`.
    pub(crate) async fn join(&self, node: &str) -> X509Svid {
        let (csr, key) = csr::generate(KeyType::EcdsaP256, None).unwrap();
        let request = Self::join_request(self.agent_token(node), csr);
        let joined = self.connect(None).await.join(request).await.unwrap().into_inner();
        svid(&joined.svid.unwrap(), key)
    }

    pub(crate) fn join_request(token: String, csr: Vec<u8>) -> JoinRequest {
        let request_id = Uuid::new_v4().to_string();
        JoinRequest { role: Role::Agent.into(), cluster: "dev".into(), token, csr, request_id, ..JoinRequest::default() }
    }

    pub(crate) async fn operator(&self) -> OperatorServiceClient<Channel> {
        operator(&self.running).await
    }

    /// A connection to the admin socket.
    pub(crate) async fn admin(&self) -> Channel {
        admin(&self.running).await
    }

    /// What answers auditors, on the admin socket.
    pub(crate) async fn log(&self) -> LogServiceClient<Channel> {
        LogServiceClient::new(admin(&self.running).await)
    }

    pub(crate) async fn status(&self) -> StatusResponse {
        self.operator().await.status(StatusRequest {}).await.unwrap().into_inner()
    }

    /// Waits until the CA's own account of itself fits.
    pub(crate) async fn until(&self, what: &str, fits: impl Fn(&StatusResponse) -> bool) -> StatusResponse {
        self.until_async(what, async || fits(&self.status().await)).await;
        self.status().await
    }

    /// Waits until something is so.
    pub(crate) async fn until_async(&self, what: &str, is_so: impl AsyncFn() -> bool) {
        let wait = async {
            while !is_so().await {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(SOON, wait).await.unwrap_or_else(|_| panic!("not seen in time: {what}"));
    }

    /// The answer of the plain HTTP port.
    pub(crate) async fn get(&self, path: &str) -> String {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = TcpStream::connect(self.running.http_address).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: ca\r\nconnection: close\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }
}

async fn operator(running: &Running) -> OperatorServiceClient<Channel> {
    OperatorServiceClient::new(admin(running).await)
}

/// A connection to the admin socket.
async fn admin(running: &Running) -> Channel {
    let path = running.admin_socket.clone();
    let dial = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://ca").connect_with_connector(dial).await.unwrap()
}

/// A request for a workload's certificate, and its key.
pub(crate) fn workload(token: String) -> (WorkloadRequest, PrivateKey) {
    let (csr, key) = csr::generate(KeyType::EcdsaP256, None).unwrap();
    let request_id = Uuid::new_v4().to_string();
    (WorkloadRequest { request_id, csr, token, reason: IssueReason::First.into() }, key)
}

pub(crate) fn svid(issued: &IssuedSvid, key: PrivateKey) -> X509Svid {
    X509Svid::new(issued.chain.iter().map(|der| der.to_vec().into()).collect(), key).unwrap()
}

/// Asks for one certificate.
pub(crate) async fn issue(client: &mut AgentServiceClient<Channel>, token: String) -> Result<X509Svid, Refusal> {
    let (request, key) = workload(token);
    let response = client.issue(IssueRequest { requests: vec![request] }).await.unwrap().into_inner();
    match response.results.into_iter().next().unwrap().outcome.unwrap() {
        Outcome::Svid(issued) => Ok(svid(&issued, key)),
        Outcome::Refusal(refusal) => Err(refusal),
    }
}

/// Copies a directory to a new one, as it is; sockets stay behind.
pub(crate) fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    std::fs::set_permissions(to, std::fs::metadata(from).unwrap().permissions()).unwrap();
    for found in std::fs::read_dir(from).unwrap() {
        let found = found.unwrap();
        let (kind, target) = (found.file_type().unwrap(), to.join(found.file_name()));
        if kind.is_dir() {
            copy(&found.path(), &target);
        } else if kind.is_file() {
            std::fs::copy(found.path(), target).unwrap();
        }
    }
}
