//! For agents and sidecars, on the TLS port. Joining works without a client certificate; everything else needs the caller's own SVID.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use chancery_identity::{Clock, SpiffeId};
use chancery_proto::chancery::v1::agent_service_server::AgentService;
use chancery_proto::chancery::v1::{
    AgentMessage, CaMessage, HeldCertificate as WireHeld, Hello, IssueReason, IssueRequest, IssueResponse, IssuedSvid, JoinRequest,
    JoinResponse, RecoverRequest, RecoverResponse, Refusal as WireRefusal, RenewRequest, RenewResponse, Role, StandingActs,
    WorkloadRequest, WorkloadResult, agent_message, workload_result::Outcome,
};
use futures_util::{Stream, StreamExt, stream};
use rustls_pki_types::CertificateDer;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tracing::{Instrument, info, info_span};
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::api::error::ApiError;
use crate::api::{CallMetrics, Peer};
use crate::attestation::{Caller, Clusters};
use crate::authority::Authority;
use crate::fleet::{CAPABILITIES, Fleet, LedgerSource, Member, SessionEnd, Sources, trust_message};
use crate::issuance::{self, HeldCertificate, Issuance, Issued, MAX_RECOVERED, MAX_REQUESTS, Refusal};
use crate::ledger::{IdentityFilter, Ledger, LedgerError};

/// How long the first message of a session may take.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Messages that wait for one agent.
const DOWN_QUEUE: usize = 8;
/// Agents keep the acts of the present log and of the one before.
const MAX_LOGS: usize = 2;
/// How far back an agent's node is looked for in the ledger, after a restart of the CA.
const NODE_SEARCH: usize = 100;

/// Answers agents and sidecars.
#[derive(Clone)]
pub struct AgentApi {
    /// Issues.
    pub issuance: Arc<Issuance>,
    /// Whose trust state is handed down.
    pub authority: Arc<Authority>,
    /// Whose tokens count.
    pub clusters: Arc<Clusters>,
    /// Holds the sessions.
    pub fleet: Arc<Fleet>,
    /// What was issued before.
    pub ledger: Ledger,
    /// What agents are shown of it.
    pub checkpoints: LedgerSource,
    /// Tells when certificates have expired.
    pub clock: Arc<dyn Clock>,
    /// Counts the calls.
    pub metrics: Arc<CallMetrics>,
    /// Ends the sessions.
    pub shutdown: CancellationToken,
}

type Down = Pin<Box<dyn Stream<Item = Result<CaMessage, Status>> + Send>>;

#[tonic::async_trait]
impl AgentService for AgentApi {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let started = Instant::now();
        let answer = self.do_join(request).await;
        self.answered("Join", started, answer)
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<RenewResponse>, Status> {
        let started = Instant::now();
        let answer = self.do_renew(request).await;
        self.answered("Renew", started, answer)
    }

    async fn issue(&self, request: Request<IssueRequest>) -> Result<Response<IssueResponse>, Status> {
        let started = Instant::now();
        let answer = self.do_issue(request).await;
        self.answered("Issue", started, answer)
    }

    async fn recover(&self, request: Request<RecoverRequest>) -> Result<Response<RecoverResponse>, Status> {
        let started = Instant::now();
        let answer = self.do_recover(request).await;
        self.answered("Recover", started, answer)
    }

    type SessionStream = Down;

    async fn session(&self, request: Request<Streaming<AgentMessage>>) -> Result<Response<Down>, Status> {
        let started = Instant::now();
        let answer = self.do_session(request).await;
        self.answered("Session", started, answer)
    }
}

impl AgentApi {
    fn answered<A>(&self, method: &'static str, started: Instant, answer: Result<A, ApiError>) -> Result<Response<A>, Status> {
        self.metrics.answered(method, answer.is_ok(), started.elapsed());
        match answer {
            Ok(answer) => Ok(Response::new(answer)),
            Err(error) => {
                info!(method, %error, "a call was refused");
                Err(error.into())
            }
        }
    }

    async fn do_join(&self, request: Request<JoinRequest>) -> Result<JoinResponse, ApiError> {
        let _permit = peer(&request)?.admit(1)?;
        let JoinRequest { role, cluster, token, csr, version, request_id, .. } = request.into_inner();
        let token = Zeroizing::new(token);
        let role = Role::try_from(role).unwrap_or(Role::Unspecified);
        let id = parse_request_id(&request_id)?;
        let attested = self.clusters.attest_agent(&cluster, role, &token).await;
        let attested = attested.map_err(|error| self.issuance.refused_to_join(error, &request_id))?;
        let issued = self.issuance.issue_agent(&attested, &csr, id).await?;
        log_issued(&issued, id);
        let caller = attested.caller();
        let node = attested.token().node.name.clone();
        info!(agent = %caller.id(), node, version, "an agent joined");
        self.fleet.joined(member(caller, node, &issued))?;
        let trust = self.authority.trust().borrow().clone();
        Ok(JoinResponse {
            svid: Some(wire_svid(&issued)),
            trust: Some(trust_message(&trust)),
            cluster_keys: self.clusters.cluster_keys(caller.cluster()),
            capabilities: CAPABILITIES.map(String::from).to_vec(),
        })
    }

    async fn do_renew(&self, request: Request<RenewRequest>) -> Result<RenewResponse, ApiError> {
        let (caller, _permit) = self.admit(&request, 1)?;
        let RenewRequest { csr, request_id } = request.into_inner();
        let id = parse_request_id(&request_id)?;
        let issued = self.issuance.renew_agent(&caller, &csr, id).await?;
        log_issued(&issued, id);
        Ok(RenewResponse { svid: Some(wire_svid(&issued)) })
    }

    async fn do_issue(&self, request: Request<IssueRequest>) -> Result<IssueResponse, ApiError> {
        let count = request.get_ref().requests.len();
        // However many there are, they cost the caller no more than a call may hold.
        let (caller, _permit) = self.admit(&request, u32::try_from(count.min(MAX_REQUESTS)).unwrap_or(u32::MAX))?;
        self.issuance.check_count(&caller, count).map_err(|refusal| ApiError::Invalid(refusal.message))?;
        let requests = request.into_inner().requests.into_iter().map(read_request).collect::<Result<Vec<_>, _>>()?;
        let ids: Vec<Uuid> = requests.iter().map(|request| request.request_id).collect();
        let outcomes = self.issuance.issue_batch(&caller, self.fleet.given_to(caller.id()), requests).await;
        let results = ids.into_iter().zip(outcomes).map(|(id, outcome)| result(id, outcome)).collect();
        Ok(IssueResponse { results })
    }

    async fn do_recover(&self, request: Request<RecoverRequest>) -> Result<RecoverResponse, ApiError> {
        let count = request.get_ref().certificates.len();
        if count > MAX_RECOVERED {
            return Err(ApiError::Invalid(format!("{count} certificates in one call; at most {MAX_RECOVERED} are read")));
        }
        let (caller, _permit) = self.admit(&request, u32::try_from(count).unwrap_or(u32::MAX))?;
        let RecoverRequest { certificates, acts } = request.into_inner();
        // First: whom they keep from certificates has those revoked that are recovered.
        for StandingActs { origin, entries, .. } in acts.into_iter().take(MAX_LOGS) {
            let entries: Vec<_> = entries.into_iter().map(Bytes::from).collect();
            self.ledger.recover_acts(&origin, &entries, caller.id().as_str()).await?;
        }
        let held = certificates.into_iter().map(read_held).collect();
        // Goes on to its end when the caller goes away: what it has taken on stays taken until it is recorded.
        let issuance = Arc::clone(&self.issuance);
        let recovering = tokio::spawn(async move { issuance.recover(&caller, held).await });
        let recorded = recovering.await.unwrap_or(Err(LedgerError::Closed))?;
        Ok(RecoverResponse { recorded: u32::try_from(recorded).unwrap_or(u32::MAX) })
    }

    async fn do_session(&self, request: Request<Streaming<AgentMessage>>) -> Result<Down, ApiError> {
        let (caller, _permit) = self.admit(&request, 0)?;
        let peer = peer(&request)?.clone();
        let mut inbound = request.into_inner();
        let hello = hello(&mut inbound).await?;
        let svid_not_after = peer.svid.as_ref().map_or(self.clock.now(), |svid| svid.not_after);
        let node = self.node_of(caller.id()).await?;
        let member = Member { id: caller.id().clone(), cluster: caller.cluster().to_owned(), node, svid_not_after };
        let session = self.fleet.attach(member, &hello)?;
        let sources = Sources {
            trust: self.authority.trust(),
            clusters: Arc::clone(&self.clusters),
            ledger: self.checkpoints.clone(),
            drain_at: peer.drain_at,
            shutdown: self.shutdown.clone(),
        };
        let (outbound, down) = mpsc::channel(DOWN_QUEUE);
        let (ended, end) = oneshot::channel();
        let span = info_span!("session", agent = %caller.id(), address = %peer.address);
        let serve = async move {
            info!(version = hello.version, "an agent connected");
            let end = session.run(sources, inbound, outbound).await;
            info!(reason = %end, "an agent's session ended");
            // Nobody is left to be told if the agent went first.
            let _gone = ended.send(end);
        };
        tokio::spawn(serve.instrument(span));
        let last = stream::once(end).filter_map(async |end| last_word(end.ok()?));
        Ok(Box::pin(ReceiverStream::new(down).map(Ok).chain(last)))
    }

    /// Who calls, and the permit to.
    fn admit<Q>(&self, request: &Request<Q>, certificates: u32) -> Result<(Caller, OwnedSemaphorePermit), ApiError> {
        let peer = peer(request)?;
        let svid = peer.svid.as_ref().ok_or(ApiError::NoCertificate)?;
        if self.clock.now() >= svid.not_after {
            return Err(ApiError::SvidExpired { id: svid.id.clone(), at: svid.not_after });
        }
        let caller = Caller::from_peer(&svid.id, self.authority.trust_domain())?;
        if !self.clusters.contains(caller.cluster()) {
            return Err(ApiError::Session(SessionEnd::ClusterRemoved));
        }
        Ok((caller, peer.admit(certificates)?))
    }

    /// The name of an agent's node: told by the token that it joined with, and after a restart of the CA by what it had issued.
    async fn node_of(&self, id: &SpiffeId) -> Result<String, ApiError> {
        if let Some(node) = self.fleet.node_of(id) {
            return Ok(node);
        }
        let filter = IdentityFilter { agent: Some(id.clone()), ..IdentityFilter::default() };
        let page = self.ledger.list(&filter, NODE_SEARCH, None).await?;
        Ok(page.identities.into_iter().map(|identity| identity.issuance.node).find(|node| !node.is_empty()).unwrap_or_default())
    }
}

/// Who is at the other end.
fn peer<Q>(request: &Request<Q>) -> Result<&Peer, ApiError> {
    request.extensions().get::<Peer>().ok_or(ApiError::NoCertificate)
}

async fn hello(inbound: &mut Streaming<AgentMessage>) -> Result<Hello, ApiError> {
    let first = timeout(HELLO_TIMEOUT, inbound.next()).await;
    match first.ok().flatten().and_then(Result::ok).and_then(|message| message.message) {
        Some(agent_message::Message::Hello(hello)) => Ok(hello),
        _ => Err(ApiError::Invalid(format!("a session begins with a hello, within {} s", HELLO_TIMEOUT.as_secs()))),
    }
}

/// What ends the stream: an orderly end where the agent just connects again, otherwise the reason.
fn last_word(end: SessionEnd) -> Option<Result<CaMessage, Status>> {
    match end {
        SessionEnd::Aged | SessionEnd::ShuttingDown | SessionEnd::Left => None,
        end => Some(Err(ApiError::Session(end).into())),
    }
}

fn member(caller: &Caller, node: String, issued: &Issued) -> Member {
    Member { id: caller.id().clone(), cluster: caller.cluster().to_owned(), node, svid_not_after: issued.facts.not_after }
}

fn parse_request_id(text: &str) -> Result<Uuid, ApiError> {
    Uuid::try_parse(text)
        .map_err(|_| ApiError::Invalid("request_id is no UUID; every request carries one, so that it is found again".into()))
}

fn read_request(request: WorkloadRequest) -> Result<issuance::Request, ApiError> {
    let WorkloadRequest { request_id, csr, token, reason } = request;
    let token = Zeroizing::new(token);
    let reason = IssueReason::try_from(reason).unwrap_or_default();
    Ok(issuance::Request { request_id: parse_request_id(&request_id)?, csr: csr.into(), token, reason })
}

fn read_held(held: WireHeld) -> HeldCertificate {
    let WireHeld { chain, namespace, service_account, pod, pod_uid } = held;
    let chain = chain.into_iter().map(CertificateDer::from).collect();
    HeldCertificate { chain, namespace, service_account, pod, pod_uid: Uuid::from_slice(&pod_uid).ok() }
}

fn result(id: Uuid, outcome: Result<Issued, Refusal>) -> WorkloadResult {
    let outcome = match outcome {
        Ok(issued) => {
            log_issued(&issued, id);
            Outcome::Svid(wire_svid(&issued))
        }
        Err(Refusal { reason, message, retryable, .. }) => Outcome::Refusal(WireRefusal { reason: reason.into(), message, retryable }),
    };
    WorkloadResult { request_id: id.to_string(), outcome: Some(outcome) }
}

/// One line for each certificate: with the request's ID it is found in the agent's log, here, and in the ledger.
fn log_issued(issued: &Issued, request_id: Uuid) {
    info!(spiffe_id = %issued.spiffe_id, serial = %issued.facts.serial, entry = issued.entry, %request_id, "issued");
}

fn wire_svid(issued: &Issued) -> IssuedSvid {
    IssuedSvid {
        spiffe_id: issued.spiffe_id.to_string(),
        chain: issued.chain.iter().map(|certificate| Bytes::copy_from_slice(certificate)).collect(),
        entry: issued.entry,
    }
}
