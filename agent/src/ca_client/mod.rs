//! The agent's own identity and its one connection to the CA.
//!
//! One task ([`keeper`]) joins, connects, keeps the session and renews the agent's own certificate; everybody else holds a [`CaClient`], which
//! asks for workloads' certificates and watches what the task publishes. The connection is made anew, with a jittered back-off that begins
//! short, whenever it ends; it is also made anew with each new certificate of the agent, the new one before the old one is given up.

mod backoff;
mod channel;
mod cluster_keys;
mod error;
mod held;
mod identity;
mod keeper;
mod ledger;
mod session;
mod token;
pub mod trust;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use chancery_identity::csr::KeyType;
use chancery_identity::{Clock, SpiffeId, TrustDomain, TrustState};
use chancery_proto::chancery::v1 as wire;
use chancery_proto::chancery::v1::agent_service_client::AgentServiceClient;
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use uuid::Uuid;

pub use backoff::Backoff;
pub use cluster_keys::{Bearer, ClusterKeys};
pub use error::CaError;
pub use held::Held;
pub use ledger::{AlarmReason, ContinuedLog, KnownCheckpoint, LedgerAlarm, LedgerFile, LedgerMemory, StandingActs};
pub use token::Token;
pub use trust::Anchor;

use crate::telemetry::Metrics;
use ledger::{LedgerHandle, LedgerTask};

/// Between two requests for newer keys of the cluster.
const KEYS_PAUSE: Duration = Duration::from_secs(10);
/// How many certificates go into one call that tells them; the CA takes no more.
const RECOVERED_AT_ONCE: usize = 128;

/// What this process is to the CA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Serves every pod on its node.
    Agent,
    /// Serves the one pod that it runs in.
    Sidecar,
}

/// What the connection needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Whose CA.
    pub trust_domain: TrustDomain,
    /// Whose keys verify the tokens.
    pub cluster: String,
    /// `host:port`.
    pub address: String,
    /// What this process is.
    pub role: Role,
    /// The token to join with; read anew for every use.
    pub token_file: PathBuf,
    /// What trust starts from.
    pub anchor: Anchor,
    /// Of the agent's own key.
    pub key_type: KeyType,
    /// For each call.
    pub call_timeout: Duration,
    /// From which part of its lifetime on the agent's own certificate is renewed.
    pub renew_from: f64,
    /// How often deadlines are compared with the clock.
    pub tick: Duration,
}

/// What a restarted agent still knows.
#[derive(Clone, Debug, Default)]
pub struct Remembered {
    /// The newest trust state taken over.
    pub trust: Option<Arc<TrustState>>,
    /// The cluster's keys.
    pub cluster_keys: Option<Arc<ClusterKeys>>,
    /// The agent's own certificate.
    pub own: Option<Held>,
}

/// A proxy whose validation context is older than the agent's trust state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyLag {
    /// The proxy's node ID, as it named itself.
    pub proxy: String,
    /// Its pod's name.
    pub pod: String,
    /// Its pod's UID.
    pub pod_uid: Uuid,
    /// What it acknowledged last; 0 if nothing.
    pub trust_sequence: u64,
    /// Its words when it refused the newer one; empty if it has just not answered.
    pub nack: String,
    /// The oldest ledger entry of a certificate that it may use: 0 if that is not known, the largest number if it has none.
    pub certificate_entry: u64,
    /// Since when none of its streams that held something is open.
    pub away_since: Option<OffsetDateTime>,
    /// It was there before the agent restarted, and has not come back for all that it took.
    pub not_back: bool,
}

/// What the proxies on this agent's socket hold and said, summed up for the CA.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProxySummary {
    /// Open streams.
    pub streams: u32,
    /// Acknowledgements since the agent's start.
    pub acks: u64,
    /// Refusals since the agent's start.
    pub nacks: u64,
    /// Proxies that hold an older validation context, and those that may use an older certificate; the first 100.
    pub lagging: Vec<ProxyLag>,
    /// How many hold an older validation context.
    pub lagging_total: u32,
    /// How many may use an older certificate.
    pub outdated_total: u32,
    /// Proxies that hold something, connected or not.
    pub holders: u32,
    /// The oldest trust state that any of them holds; the largest number if nobody holds one, and 0 before anything is known.
    pub trust_sequence: u64,
    /// The oldest ledger entry of a certificate that any of them may use; likewise.
    pub certificate_entry: u64,
    /// Proxies that took a certificate and no validation context; the first 100.
    pub unproven: Vec<ProxyLag>,
    /// How many they are in all.
    pub unproven_total: u32,
    /// The pods that the agent answers for.
    pub pods: Arc<[Uuid]>,
    /// Grows with every change of `pods`; 0 before anything is known.
    pub pods_version: u64,
}

/// What the agent holds, summed up for the CA.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holdings {
    /// Workloads that it keeps certificates for.
    pub workloads: u32,
    /// When the first of their certificates expires.
    pub first_expiry: Option<OffsetDateTime>,
}

/// The way to the CA. Cheap to clone.
#[derive(Clone, Debug)]
pub struct CaClient {
    settings: Arc<Settings>,
    clock: Arc<dyn Clock>,
    metrics: Metrics,
    published: Arc<Published>,
}

/// What the task and the handles tell each other.
#[derive(Debug)]
struct Published {
    channel: watch::Sender<Option<Channel>>,
    trust: watch::Sender<Option<Arc<TrustState>>>,
    cluster_keys: watch::Sender<Option<Arc<ClusterKeys>>>,
    own: watch::Sender<Option<Held>>,
    reachable: watch::Sender<bool>,
    problem: watch::Sender<String>,
    reissue: watch::Sender<u64>,
    tell: watch::Sender<u64>,
    holdings: watch::Sender<Holdings>,
    proxies: watch::Sender<ProxySummary>,
    ledger: LedgerHandle,
    /// When the CA was asked for newer keys last.
    keys_asked: Mutex<Option<Instant>>,
}

impl CaClient {
    /// Starts the tasks that connect, and that watch over the ledger; they end with `shutdown`. Must be called within a tokio runtime.
    pub fn start(
        settings: Settings,
        remembered: Remembered,
        ledger: LedgerFile,
        clock: Arc<dyn Clock>,
        metrics: Metrics,
        shutdown: CancellationToken,
    ) -> (Self, tokio::task::JoinHandle<()>) {
        metrics.trust_sequence(remembered.trust.as_ref().map_or(0, |trust| trust.sequence));
        let (ledger_task, ledger) = LedgerTask::new(ledger, clock.clone(), metrics.clone());
        let published = Published {
            channel: watch::Sender::new(None),
            trust: watch::Sender::new(remembered.trust),
            cluster_keys: watch::Sender::new(remembered.cluster_keys),
            own: watch::Sender::new(remembered.own),
            reachable: watch::Sender::new(false),
            problem: watch::Sender::new("no session with the CA: the agent has just started".to_owned()),
            reissue: watch::Sender::new(0),
            tell: watch::Sender::new(0),
            holdings: watch::Sender::new(Holdings::default()),
            proxies: watch::Sender::new(ProxySummary::default()),
            ledger,
            keys_asked: Mutex::default(),
        };
        let client = Self { settings: Arc::new(settings), clock, metrics, published: Arc::new(published) };
        let keeper = keeper::Keeper::new(client.clone(), shutdown.clone());
        let task = tokio::spawn(async move {
            tokio::join!(keeper.run(), ledger_task.run(shutdown));
        });
        (client, task)
    }

    /// Asks for certificates: a result or a refusal for each request, in their order.
    ///
    /// # Errors
    /// If there is no connection, the call failed as a whole, or the answer does not fit the requests.
    pub async fn issue(&self, requests: Vec<wire::WorkloadRequest>) -> Result<Vec<wire::WorkloadResult>, CaError> {
        let channel = self.published.channel.borrow().clone();
        let mut client = AgentServiceClient::new(channel.ok_or_else(|| CaError::NoSession(self.problem()))?);
        let ids: Vec<String> = requests.iter().map(|request| request.request_id.clone()).collect();
        let results = self.timed("Issue", client.issue(wire::IssueRequest { requests })).await?.results;
        if results.iter().map(|result| &result.request_id).ne(ids.iter()) {
            return Err(CaError::Answer("its results do not fit the requests".into()));
        }
        Ok(results)
    }

    /// Tells the CA these certificates and the agent's own. What fails is told again when the CA asks again, with the next session.
    pub async fn tell_certificates(&self, mut held: Vec<wire::HeldCertificate>) {
        let own = self.published.own.borrow().as_ref().map(Held::chain);
        held.extend(own.map(|chain| wire::HeldCertificate { chain, ..wire::HeldCertificate::default() }));
        let mut acts: Vec<_> = self.ledger().borrow().acts.iter().map(|acts| acts.to_wire()).collect();
        for certificates in held.chunks(RECOVERED_AT_ONCE).map(<[_]>::to_vec) {
            let Some(channel) = self.published.channel.borrow().clone() else { return };
            let count = certificates.len();
            let request = wire::RecoverRequest { certificates, acts: std::mem::take(&mut acts) };
            match self.timed("Recover", AgentServiceClient::new(channel).recover(request)).await {
                Ok(answer) => tracing::info!(count, recorded = answer.recorded, "the CA was told certificates"),
                Err(error) => return tracing::warn!(%error, "the CA could not be told which certificates there are"),
            }
        }
    }

    /// Makes the CA look for newer keys of the cluster, because `token` names one that is not among those here; at most once in
    /// [`KEYS_PAUSE`]. What it finds comes over the session.
    pub async fn ask_for_keys(&self, token: &Token) {
        {
            let mut asked = self.published.keys_asked.lock().unwrap_or_else(PoisonError::into_inner);
            if asked.is_some_and(|last| last.elapsed() < KEYS_PAUSE) {
                return;
            }
            *asked = Some(Instant::now());
        }
        let request_id = Uuid::new_v4().to_string();
        tracing::info!(%request_id, "a token names a key that is not known here; the CA is asked for newer ones");
        // The CA looks at the token first, and so for its key; then it refuses, since there is no CSR.
        let request = wire::WorkloadRequest { request_id, csr: Vec::new(), token: token.secret().to_owned(), reason: 0 };
        if let Err(error) = self.issue(vec![request]).await {
            tracing::warn!(%error, "the CA could not be asked for newer keys");
        }
    }

    /// The newest trust state; its sequence only grows.
    pub fn trust(&self) -> watch::Receiver<Option<Arc<TrustState>>> {
        self.published.trust.subscribe()
    }

    /// The cluster's newest keys.
    pub fn cluster_keys(&self) -> watch::Receiver<Option<Arc<ClusterKeys>>> {
        self.published.cluster_keys.subscribe()
    }

    /// The agent's own certificate.
    pub fn own(&self) -> watch::Receiver<Option<Held>> {
        self.published.own.subscribe()
    }

    /// Whether there is a session with the CA.
    pub fn reachable(&self) -> watch::Receiver<bool> {
        self.published.reachable.subscribe()
    }

    /// That there is none, and why; empty if there is.
    pub fn problem(&self) -> String {
        self.published.problem.borrow().clone()
    }

    /// Counts the CA's orders to issue everything anew.
    pub fn reissue_orders(&self) -> watch::Receiver<u64> {
        self.published.reissue.subscribe()
    }

    /// Counts the CA's orders to tell it every certificate, with [`Self::tell_certificates`].
    pub fn tell_orders(&self) -> watch::Receiver<u64> {
        self.published.tell.subscribe()
    }

    /// Takes over what the agent holds, for the next report.
    pub fn set_holdings(&self, holdings: Holdings) {
        self.published.holdings.send_if_modified(|known| std::mem::replace(known, holdings) != holdings);
    }

    /// Takes over what the proxies said, for the next report.
    pub fn set_proxies(&self, proxies: ProxySummary) {
        self.published.proxies.send_if_modified(|known| {
            let changed = *known != proxies;
            *known = proxies;
            changed
        });
    }

    /// What was taken over last of what the proxies said.
    pub fn proxies(&self) -> ProxySummary {
        self.published.proxies.borrow().clone()
    }

    /// What the agent knows of the CA's ledger.
    pub fn ledger(&self) -> watch::Receiver<LedgerMemory> {
        self.published.ledger.memory()
    }

    /// What a restarted agent should still know.
    pub fn remembered(&self) -> Remembered {
        Remembered {
            trust: self.published.trust.borrow().clone(),
            cluster_keys: self.published.cluster_keys.borrow().clone(),
            own: self.published.own.borrow().clone(),
        }
    }

    /// What was configured.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The CA's SPIFFE ID.
    fn server_id(&self) -> Result<SpiffeId, CaError> {
        self.settings.trust_domain.member(["chancery", "ca"]).map_err(|e| CaError::Local(format!("the CA's SPIFFE ID: {e}")))
    }

    /// Waits for `call`, at most as long as configured, and records how long it took.
    async fn timed<T>(
        &self,
        method: &'static str,
        call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    ) -> Result<T, CaError> {
        let started = Instant::now();
        let outcome = tokio::time::timeout(self.settings.call_timeout, call)
            .await
            .unwrap_or_else(|_| Err(tonic::Status::deadline_exceeded(format!("no answer within {:?}", self.settings.call_timeout))));
        let code = outcome.as_ref().map_or_else(tonic::Status::code, |_| tonic::Code::Ok);
        self.metrics.rpc(method, code, started.elapsed());
        outcome.map(tonic::Response::into_inner).map_err(|status| CaError::from_status(method, &status))
    }
}

/// Unix milliseconds.
fn milliseconds(moment: OffsetDateTime) -> i64 {
    i64::try_from(moment.unix_timestamp_nanos() / 1_000_000).unwrap_or(i64::MAX)
}
