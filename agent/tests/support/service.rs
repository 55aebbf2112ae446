//! `AgentService`, as the agent needs it.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use arc_swap::ArcSwap;
use chancery_agent::ca_client::trust;
use chancery_identity::csr::VerifiedCsr;
use chancery_identity::tls;
use chancery_identity::token::TokenKeys;
use chancery_identity::{Clock, SpiffeId};
use chancery_proto::chancery::v1 as wire;
use chancery_proto::chancery::v1::agent_service_server::{AgentService, AgentServiceServer};
use rustls_pki_types::CertificateDer;
use time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use super::tokens::{AUDIENCE, ISSUER, JOIN_AUDIENCE};
use super::{Behaviour, CLUSTER, Pki, SetClock, Signer, trust_domain};

const OWN_LIFETIME: Duration = Duration::hours(24);

pub struct Service {
    pki: Arc<Pki>,
    signer: Arc<Signer>,
    behaviour: Arc<Behaviour>,
    clock: Arc<SetClock>,
}

/// Serves until the runtime ends.
pub async fn serve(service: Service, listener: std::net::TcpListener) {
    let listener = TcpListener::from_std(listener).unwrap();
    let certificate = tls::certified_key(&service.pki.server(), std::slice::from_ref(&service.pki.root)).unwrap();
    let shared = Arc::new(ArcSwap::from_pointee(service.pki.trust(1)));
    let config = tls::server_config(Arc::new(ArcSwap::from_pointee(certificate)), shared, service.clock.clone()).unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let behaviour = service.behaviour.clone();
    let (sender, accepted) = mpsc::channel::<std::io::Result<TlsStream<TcpStream>>>(16);
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (acceptor, sender, behaviour) = (acceptor.clone(), sender.clone(), behaviour.clone());
            tokio::spawn(async move {
                match acceptor.accept(stream).await {
                    Ok(stream) => drop(sender.send(Ok(stream)).await),
                    Err(_) => drop(behaviour.refused_handshakes.fetch_add(1, Ordering::SeqCst)),
                }
            });
        }
    });
    let server = tonic::transport::Server::builder().add_service(AgentServiceServer::new(service));
    server.serve_with_incoming(ReceiverStream::new(accepted)).await.unwrap();
}

impl Service {
    pub fn new(pki: Arc<Pki>, signer: Arc<Signer>, behaviour: Arc<Behaviour>, clock: Arc<SetClock>) -> Self {
        Self { pki, signer, behaviour, clock }
    }

    fn keys(&self) -> TokenKeys {
        let keys = self.signer.keys();
        TokenKeys::from_jwks(CLUSTER, ISSUER, &keys.jwks).unwrap()
    }

    fn caller(request: &Request<impl Sized>) -> Result<SpiffeId, Status> {
        let certificates = request
            .extensions()
            .get::<tonic::transport::server::TlsConnectInfo<tonic::transport::server::TcpConnectInfo>>()
            .and_then(tonic::transport::server::TlsConnectInfo::peer_certs);
        let leaf: CertificateDer<'_> =
            certificates.and_then(|all| all.first().cloned()).ok_or_else(|| Status::unauthenticated("no client certificate"))?;
        tls::peer_id(&leaf).map_err(|error| Status::unauthenticated(error.to_string()))
    }

    fn own(&self, id: &str, csr: &[u8]) -> Result<wire::IssuedSvid, Status> {
        let csr = VerifiedCsr::from_der(csr).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let now = self.clock.now();
        let leaf = self.pki.sign(id, &csr.public_key, now - Duration::seconds(30), now + OWN_LIFETIME);
        Ok(wire::IssuedSvid { spiffe_id: id.to_owned(), chain: vec![leaf.to_vec().into()], entry: self.behaviour.next_entry() })
    }

    fn issue_one(&self, request: wire::WorkloadRequest) -> wire::WorkloadResult {
        self.behaviour.tokens.lock().unwrap().push(request.token.clone());
        let refusal = self.behaviour.refuse.lock().unwrap().clone();
        let outcome = match refusal {
            Some(refusal) => wire::workload_result::Outcome::Refusal(refusal),
            None => self.certificate(&request),
        };
        wire::WorkloadResult { request_id: request.request_id, outcome: Some(outcome) }
    }

    fn find_new_keys(&self) {
        if let Some(keys) = self.behaviour.new_keys.lock().unwrap().take() {
            let message = wire::CaMessage { message: Some(wire::ca_message::Message::ClusterKeys(keys)) };
            for session in &*self.behaviour.sessions.lock().unwrap() {
                let _ = session.try_send(Ok(message.clone()));
            }
        }
    }

    fn certificate(&self, request: &wire::WorkloadRequest) -> wire::workload_result::Outcome {
        let now = self.clock.now();
        let token = match self.keys().verify(&request.token, &[AUDIENCE.to_owned()], now) {
            Ok(token) => token,
            Err(error) => {
                self.find_new_keys();
                return wire::workload_result::Outcome::Refusal(wire::Refusal {
                    reason: error.reason().to_owned(),
                    message: error.to_string(),
                    retryable: false,
                });
            }
        };
        let csr = VerifiedCsr::from_der(&request.csr).expect("a token that verifies comes with a good CSR");
        let id = format!("spiffe://{}/ns/{}/sa/{}", trust_domain(), token.namespace, token.service_account.name);
        let skew = Duration::seconds(self.behaviour.skew.load(Ordering::SeqCst));
        let lifetime = Duration::seconds(self.behaviour.lifetime.load(Ordering::SeqCst));
        let leaf = self.pki.sign(&id, &csr.public_key, now + skew - Duration::seconds(30), now + skew + lifetime);
        wire::workload_result::Outcome::Svid(wire::IssuedSvid {
            spiffe_id: id,
            chain: vec![leaf.to_vec().into()],
            entry: self.behaviour.next_entry(),
        })
    }
}

#[tonic::async_trait]
impl AgentService for Service {
    async fn join(&self, request: Request<wire::JoinRequest>) -> Result<Response<wire::JoinResponse>, Status> {
        self.behaviour.joins.fetch_add(1, Ordering::SeqCst);
        let request = request.into_inner();
        let sidecar = request.role() == wire::Role::Sidecar;
        let audience = if sidecar { AUDIENCE } else { JOIN_AUDIENCE };
        let token = self
            .keys()
            .verify(&request.token, &[audience.to_owned()], self.clock.now())
            .map_err(|error| Status::unauthenticated(error.to_string()))?;
        let (kind, uid) = if sidecar { ("sidecar", token.pod.uid) } else { ("agent", token.node.uid) };
        let id = format!("spiffe://{}/chancery/{kind}/{CLUSTER}/{uid}", trust_domain());
        Ok(Response::new(wire::JoinResponse {
            svid: Some(self.own(&id, &request.csr)?),
            trust: Some(trust::to_wire(&self.pki.trust(self.behaviour.trust_sequence.load(Ordering::SeqCst)))),
            cluster_keys: Some(self.signer.keys()),
            capabilities: Vec::new(),
        }))
    }

    async fn renew(&self, request: Request<wire::RenewRequest>) -> Result<Response<wire::RenewResponse>, Status> {
        let id = Self::caller(&request)?;
        self.behaviour.renewals.fetch_add(1, Ordering::SeqCst);
        let svid = Some(self.own(id.as_str(), &request.into_inner().csr)?);
        Ok(Response::new(wire::RenewResponse { svid }))
    }

    async fn issue(&self, request: Request<wire::IssueRequest>) -> Result<Response<wire::IssueResponse>, Status> {
        Self::caller(&request)?;
        let requests = request.into_inner().requests;
        self.behaviour.calls.lock().unwrap().push(requests.len());
        let _open = self.behaviour.gate.lock().await;
        Ok(Response::new(wire::IssueResponse { results: requests.into_iter().map(|request| self.issue_one(request)).collect() }))
    }

    async fn recover(&self, request: Request<wire::RecoverRequest>) -> Result<Response<wire::RecoverResponse>, Status> {
        Self::caller(&request)?;
        self.behaviour.told.lock().unwrap().push(request.into_inner());
        Ok(Response::new(wire::RecoverResponse::default()))
    }

    type SessionStream = Pin<Box<dyn Stream<Item = Result<wire::CaMessage, Status>> + Send>>;

    async fn session(&self, request: Request<Streaming<wire::AgentMessage>>) -> Result<Response<Self::SessionStream>, Status> {
        Self::caller(&request)?;
        let mut up = request.into_inner();
        let (down, messages) = mpsc::channel(16);
        let clock_ms = self.clock.now().unix_timestamp() * 1000;
        let welcome = wire::Welcome { version: "test".into(), capabilities: Vec::new(), clock_ms };
        let message = Some(wire::ca_message::Message::Welcome(welcome));
        down.send(Ok(wire::CaMessage { message })).await.unwrap();
        self.behaviour.sessions.lock().unwrap().push(down);
        let behaviour = self.behaviour.clone();
        tokio::spawn(async move {
            while let Some(Ok(wire::AgentMessage { message: Some(message) })) = up.next().await {
                let report = match message {
                    wire::agent_message::Message::Hello(hello) => {
                        *behaviour.capabilities.lock().unwrap() = hello.capabilities;
                        hello.report.unwrap()
                    }
                    wire::agent_message::Message::Report(report) => report,
                };
                behaviour.reports.lock().unwrap().push(report);
            }
        });
        let _open = self.behaviour.opening.lock().await;
        Ok(Response::new(Box::pin(ReceiverStream::new(messages))))
    }
}
