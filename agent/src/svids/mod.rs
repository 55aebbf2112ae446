//! One task owns every workload's certificate: issue, renew, keep, drop.
//!
//! [`Svids`] is the handle that the proxies' side holds. Its promises:
//! - a token that does not verify maps to nothing: no cached certificate, no hint that there is one;
//! - what is [`SvidState::Ready`] has a matching key, leads to the bundle that is being served, and was in time when it was published;
//! - the last good certificate stays until it expires, whatever fails meanwhile.

pub mod accounts;
mod batch;
mod keep;
mod owner;
mod state;
mod status;
mod tenant;
mod workload;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use chancery_identity::csr::KeyType;
use chancery_identity::token::{TokenError, VerifiedToken};
use chancery_identity::{Clock, TrustState};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub use crate::ca_client::{Held, ProxyLag, ProxySummary, Token};
pub use state::{RestoredWorkload, State, StateError, StateFile};
pub use status::{AgentStatus, LedgerStatus, WorkloadStatus};
pub use tenant::{Applicant, Tenant};

use crate::ca_client::{Bearer, CaClient, Role};
use crate::telemetry::{Metrics, Reason};
use accounts::Accounts;
use owner::{Command, Owner};
use tenant::Hold;
use workload::TokenSource;

/// Commands on their way to the task; more wait at the caller.
const COMMANDS_QUEUED: usize = 256;
/// How long a stream waits on an agent that has not joined yet.
const JOIN_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a stream waits for newer keys, when its token names one that is not known.
const NEW_KEYS_TIMEOUT: Duration = Duration::from_secs(2);

/// The workloads' certificates, for those who deliver them. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Svids {
    commands: mpsc::Sender<Command>,
    accounts: Accounts,
    ca: CaClient,
    clock: Arc<dyn Clock>,
    metrics: Metrics,
}

/// Which workload: one service account in one pod.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct WorkloadKey {
    /// Kubernetes UID of the pod.
    pub pod_uid: Uuid,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's service account.
    pub service_account: String,
}

/// What is known of the token that a stream was opened with; never its text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenInfo {
    /// `jti`.
    pub id: String,
    /// `iat`.
    pub issued_at: OffsetDateTime,
    /// `exp`.
    pub expires_at: OffsetDateTime,
}

/// What there is to serve to a workload.
#[derive(Clone, Debug)]
pub enum SvidState {
    /// Nothing yet, or no longer: the first certificate is on its way, or the last one has expired.
    Pending,
    /// Serve this. It stays while renewals fail, until it expires.
    Ready(Held),
    /// The CA refused, and there is no certificate from before.
    Refused {
        /// A stable word in `snake_case`.
        reason: String,
        /// What failed, on what, and what to do.
        message: String,
        /// It may succeed later without anybody's doing; the agent tries again by itself in any case.
        retryable: bool,
    },
}

/// A proxy stream's hold on its workload. Dropping it detaches the stream.
#[derive(Debug)]
pub struct Subscription {
    /// Whose.
    pub workload: WorkloadKey,
    /// The pod's name, for people.
    pub pod_name: String,
    /// The token that the stream was opened with. `None` where fresh tokens reach the agent by themselves, and a stream never has to be ended
    /// for one: in sidecar mode, and on a [`Tenant`]'s own socket.
    pub token: Option<TokenInfo>,
    /// What to serve, now and from now on.
    pub svid: watch::Receiver<SvidState>,
    _hold: Arc<()>,
}

impl WorkloadKey {
    fn of(token: &VerifiedToken) -> Self {
        Self { pod_uid: token.pod.uid, namespace: token.namespace.clone(), service_account: token.service_account.name.clone() }
    }
}

impl TokenInfo {
    fn of(token: &VerifiedToken) -> Self {
        Self { id: token.token_id.clone(), issued_at: token.issued_at, expires_at: token.expires_at }
    }
}

impl Subscription {
    /// The stream counts as attached as long as its clone of `hold` lives.
    pub fn new(workload: WorkloadKey, pod_name: String, token: Option<TokenInfo>, svid: watch::Receiver<SvidState>, hold: Arc<()>) -> Self {
        Self { workload, pod_name, token, svid, _hold: hold }
    }
}

/// Why a stream was not attached. Each has a stable word, [`AttachError::reason`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The token does not verify.
    #[error("not authenticated: {message}")]
    Unauthenticated {
        /// A stable word.
        reason: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// The token is good, but not for this agent.
    #[error("{0}")]
    WrongPlace(String),
    /// The cluster's keys have not come from the CA yet.
    #[error("the agent is not ready: {0}")]
    NotReady(String),
    /// A limit is reached.
    #[error("{0}")]
    Busy(String),
    /// The agent stops.
    #[error("the agent is shutting down")]
    Stopping,
}

/// A refusal, and whom it is about: known only where the token's signature was verified.
struct Refused {
    error: AttachError,
    bearer: Option<Box<Bearer>>,
}

/// How certificates are kept.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Of workloads' keys.
    pub key_type: KeyType,
    /// From which part of its lifetime on a certificate is renewed.
    pub renew_from: f64,
    /// How long a workload is kept after its last stream has gone.
    pub grace: Duration,
    /// More are refused.
    pub max_workloads: usize,
    /// More of one workload are refused.
    pub max_streams: usize,
    /// Requests in one call to the CA.
    pub max_batch: usize,
    /// How often deadlines are compared with the clock; more often where one is near.
    pub tick: Duration,
    /// Where the state is kept, if it is.
    pub state: Option<StateFile>,
}

impl Svids {
    /// Starts the task that owns the workloads; it ends with `shutdown`, after having written the state. Must be called within a tokio
    /// runtime.
    pub fn start(
        settings: Settings,
        restored: Vec<RestoredWorkload>,
        ca: CaClient,
        clock: Arc<dyn Clock>,
        metrics: Metrics,
        shutdown: CancellationToken,
    ) -> (Self, tokio::task::JoinHandle<()>) {
        let (commands, receiver) = mpsc::channel(COMMANDS_QUEUED);
        let accounts = Accounts::default();
        let owner = Owner::new(settings, restored, accounts.clone(), ca.clone(), clock.clone(), metrics.clone());
        let task = tokio::spawn(owner.run(receiver, shutdown));
        (Self { commands, accounts, ca, clock, metrics }, task)
    }

    /// Verifies `token` offline with the cluster's keys and attaches a proxy stream to the pod's workload. The first certificate is
    /// requested at once if there is none. On an agent that has just started, waits some seconds for the cluster's keys.
    ///
    /// # Errors
    /// If the token does not verify or is for another node, if a limit is reached, or if the keys did not come in time.
    pub async fn attach(&self, token: Token) -> Result<Subscription, AttachError> {
        let attached = async {
            if self.is_sidecar() {
                return Err(AttachError::WrongPlace("this socket serves one pod and takes no token".to_owned()).into());
            }
            let verified = self.verify_of_this_node(&token).await?;
            let info = TokenInfo::of(&verified);
            self.attach_verified(verified, TokenSource::Brought(token, info)).await
        };
        attached.await.map_err(|refused| self.count(refused))
    }

    /// Attaches a stream to the agent's own pod: sidecar mode, whose socket is for that pod alone.
    ///
    /// # Errors
    /// As for [`Svids::attach`]; also if the token file cannot be read.
    pub async fn attach_own(&self) -> Result<Subscription, AttachError> {
        let attached = async {
            if !self.is_sidecar() {
                return Err(AttachError::WrongPlace("this agent serves many pods; a stream needs its pod's token".to_owned()).into());
            }
            let token = self.ca.read_token().map_err(|error| AttachError::NotReady(error.to_string()))?;
            let verified = self.verify(&token).await?;
            let pod = self.own_uid().await?;
            if verified.pod.uid != pod {
                let found = verified.pod.uid;
                let error = AttachError::WrongPlace(format!("the token file is of the pod {found}; this sidecar joined as {pod}"));
                return Err(Refused::of(&verified, error));
            }
            self.attach_verified(verified, TokenSource::File).await
        };
        attached.await.map_err(|refused| self.count(refused))
    }

    /// Whether streams carry no token because they are all of the agent's own pod.
    pub fn is_sidecar(&self) -> bool {
        self.ca.settings().role == Role::Sidecar
    }

    /// What to trust, now and from now on. Its bundles are never empty, its sequence only grows.
    pub fn trust(&self) -> watch::Receiver<Option<Arc<TrustState>>> {
        self.ca.trust()
    }

    /// Whether the CA can be reached.
    pub fn ca_reachable(&self) -> watch::Receiver<bool> {
        self.ca.reachable()
    }

    /// The pods that this agent answers for.
    pub fn accounts(&self) -> Accounts {
        self.accounts.clone()
    }

    /// Takes over what the proxies' side knows of its streams, for the next report to the CA. Call it on every change: reports are
    /// gathered.
    pub fn set_proxies(&self, summary: ProxySummary) {
        self.ca.set_proxies(summary);
    }

    /// What was taken over last.
    pub fn proxies(&self) -> ProxySummary {
        self.ca.proxies()
    }

    /// For `chancery-agent status`.
    ///
    /// # Errors
    /// If the agent stops.
    pub async fn status(&self) -> Result<AgentStatus, AttachError> {
        let workloads = self.ask(|reply| Command::Status { reply }).await?;
        let own = self.ca.own().borrow().clone();
        Ok(AgentStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            trust_domain: self.ca.settings().trust_domain.to_string(),
            cluster: self.ca.settings().cluster.clone(),
            spiffe_id: own.as_ref().map(|own| own.svid.id().to_string()),
            expires_at: own.as_ref().map(|own| own.svid.not_after()),
            ca_reachable: *self.ca.reachable().borrow(),
            ca_problem: self.ca.problem(),
            trust_sequence: self.ca.trust().borrow().as_ref().map_or(0, |trust| trust.sequence),
            ledger: LedgerStatus::from(&*self.ca.ledger().borrow()),
            workloads,
        })
    }

    /// Verifies a token, waiting for the cluster's keys if they have not come yet.
    async fn verify(&self, token: &Token) -> Result<VerifiedToken, Refused> {
        let mut keys = self.joined(self.ca.cluster_keys(), "no keys of the cluster").await?;
        let mut verified = keys.verify(token, self.clock.now());
        if let Err(TokenError::UnknownKey { .. }) = verified {
            let mut newer = self.ca.cluster_keys();
            self.ca.ask_for_keys(token).await;
            let found = newer.wait_for(|found| found.as_ref().is_some_and(|found| !Arc::ptr_eq(found, &keys)));
            if let Ok(Ok(found)) = tokio::time::timeout(NEW_KEYS_TIMEOUT, found).await
                && let Some(newer) = &*found
            {
                keys = newer.clone();
                verified = keys.verify(token, self.clock.now());
            }
        }
        verified.map_err(|error| {
            let bearer = keys.bearer(token, &error, self.clock.now()).map(Box::new);
            Refused { error: AttachError::Unauthenticated { reason: error.reason(), message: error.to_string() }, bearer }
        })
    }

    /// Verifies the token of a pod that must run on the agent's own node.
    async fn verify_of_this_node(&self, token: &Token) -> Result<VerifiedToken, Refused> {
        let verified = self.verify(token).await?;
        let node = self.own_uid().await?;
        if verified.node.uid != node {
            let found = verified.node.uid;
            let error = AttachError::WrongPlace(format!("the token's pod runs on the node {found}; this agent's node is {node}"));
            return Err(Refused::of(&verified, error));
        }
        Ok(verified)
    }

    /// The UID of the agent's own node, or as a sidecar of its own pod.
    async fn own_uid(&self) -> Result<Uuid, AttachError> {
        let own = self.joined(self.ca.own(), "no identity of its own").await?;
        own.agent_uid().ok_or_else(|| AttachError::NotReady(format!("its identity {} names no node or pod", own.svid.id())))
    }

    /// What comes with joining, waiting for it if the agent has just started.
    async fn joined<T: Clone>(&self, mut source: watch::Receiver<Option<T>>, missing: &str) -> Result<T, AttachError> {
        match tokio::time::timeout(JOIN_TIMEOUT, source.wait_for(Option::is_some)).await {
            Ok(Ok(value)) => value.clone(),
            Ok(Err(_)) => return Err(AttachError::Stopping),
            Err(_) => None,
        }
        .ok_or_else(|| AttachError::NotReady(format!("it has {missing} yet: {}", self.ca.problem())))
    }

    async fn attach_verified(&self, verified: VerifiedToken, token: TokenSource) -> Result<Subscription, Refused> {
        let (key, pod_name) = (WorkloadKey::of(&verified), verified.pod.name.clone());
        let attached = self.ask(|reply| Command::Attach { key, pod_name, token, reply }).await;
        attached.flatten().map_err(|error| Refused::of(&verified, error))
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, AttachError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| AttachError::Stopping)?;
        answer.await.map_err(|_| AttachError::Stopping)
    }

    fn count(&self, Refused { error, bearer }: Refused) -> AttachError {
        tracing::warn!(
            %error,
            namespace = bearer.as_ref().map(|bearer| &*bearer.namespace),
            pod = bearer.as_ref().map(|bearer| &*bearer.pod),
            service_account = bearer.as_ref().map(|bearer| &*bearer.service_account),
            "a stream was not accepted"
        );
        self.metrics.attach_refused.get_or_create(&Reason { reason: error.reason().to_owned() }).inc();
        error
    }
}

impl Refused {
    fn of(token: &VerifiedToken, error: AttachError) -> Self {
        Self { error, bearer: Some(Box::new(token.into())) }
    }
}

impl From<AttachError> for Refused {
    fn from(error: AttachError) -> Self {
        Self { error, bearer: None }
    }
}

impl fmt::Display for WorkloadKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} (pod {})", self.namespace, self.service_account, self.pod_uid)
    }
}

impl AttachError {
    /// A stable word for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Unauthenticated { reason, .. } => reason,
            Self::WrongPlace(_) => "wrong_place",
            Self::NotReady(_) => "not_ready",
            Self::Busy(_) => "busy",
            Self::Stopping => "stopping",
        }
    }
}
