//! One task owns every workload's certificate: issue, renew, keep, drop.
//!
//! [`Svids`] is the handle that the proxies' side holds. Its promises:
//! - a token that does not verify maps to nothing: no cached certificate, no hint that there is one;
//! - what is [`SvidState::Ready`] has a matching key, leads to the bundle that is being served, and was in time when it was published;
//! - the last good certificate stays until it expires, whatever fails meanwhile.

use std::sync::Arc;

use chancery_identity::{TrustState, X509Svid};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::sync::watch;
use uuid::Uuid;

pub use crate::ca_client::{ProxyLag, ProxySummary, Token};

/// The workloads' certificates, for those who deliver them. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Svids {}

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
    Ready(Arc<X509Svid>),
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
    /// The token that the stream was opened with. `None` in sidecar mode, where the agent reads fresh tokens by itself and a stream never
    /// has to be ended for one.
    pub token: Option<TokenInfo>,
    /// What to serve, now and from now on.
    pub svid: watch::Receiver<SvidState>,
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

/// A workload, as `chancery-agent status` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WorkloadStatus {
    /// Which.
    pub workload: WorkloadKey,
    /// The pod's name.
    pub pod: String,
    /// The SPIFFE ID, once there is a certificate.
    pub spiffe_id: Option<String>,
    /// Hexadecimal.
    pub serial: Option<String>,
    /// When the certificate expires.
    #[serde(with = "time::serde::rfc3339::option")]
    pub expires_at: Option<OffsetDateTime>,
    /// When the agent tries next.
    #[serde(with = "time::serde::rfc3339::option")]
    pub next_try_at: Option<OffsetDateTime>,
    /// When the newest token expires.
    #[serde(with = "time::serde::rfc3339::option")]
    pub token_expires_at: Option<OffsetDateTime>,
    /// Attached streams.
    pub streams: usize,
    /// Why the last try failed; empty if it did not.
    pub problem: String,
}

/// The agent, as `chancery-agent status` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AgentStatus {
    /// The agent's version.
    pub version: String,
    /// The configured trust domain.
    pub trust_domain: String,
    /// The configured cluster.
    pub cluster: String,
    /// The agent's own SPIFFE ID, once it has joined.
    pub spiffe_id: Option<String>,
    /// When the agent's own certificate expires.
    #[serde(with = "time::serde::rfc3339::option")]
    pub expires_at: Option<OffsetDateTime>,
    /// Whether the CA can be reached.
    pub ca_reachable: bool,
    /// Why not; empty if it can.
    pub ca_problem: String,
    /// Of the trust state being served; 0 while there is none.
    pub trust_sequence: u64,
    /// By namespace and pod.
    pub workloads: Vec<WorkloadStatus>,
}

impl Svids {
    /// Verifies `token` offline with the cluster's keys and attaches a proxy stream to the pod's workload. The first certificate is
    /// requested at once if there is none. On an agent that has just started, waits some seconds for the cluster's keys.
    ///
    /// # Errors
    /// If the token does not verify or is for another node, if a limit is reached, or if the keys did not come in time.
    #[expect(clippy::unused_async)]
    pub async fn attach(&self, _token: Token) -> Result<Subscription, AttachError> {
        unimplemented!()
    }

    /// Attaches a stream to the agent's own pod: sidecar mode, whose socket is for that pod alone.
    ///
    /// # Errors
    /// As for [`Svids::attach`]; `NotReady` in node mode.
    #[expect(clippy::unused_async)]
    pub async fn attach_own(&self) -> Result<Subscription, AttachError> {
        unimplemented!()
    }

    /// Whether streams carry no token because they are all of the agent's own pod.
    pub fn is_sidecar(&self) -> bool {
        unimplemented!()
    }

    /// What to trust, now and from now on. Its bundles are never empty, its sequence only grows.
    pub fn trust(&self) -> watch::Receiver<Option<Arc<TrustState>>> {
        unimplemented!()
    }

    /// Whether the CA can be reached.
    pub fn ca_reachable(&self) -> watch::Receiver<bool> {
        unimplemented!()
    }

    /// Takes over what the proxies' side knows of its streams, for the next report to the CA. Call it on every change: reports are
    /// gathered.
    pub fn set_proxies(&self, _summary: ProxySummary) {
        unimplemented!()
    }

    /// For `chancery-agent status`.
    ///
    /// # Errors
    /// If the agent stops.
    #[expect(clippy::unused_async)]
    pub async fn status(&self) -> Result<AgentStatus, AttachError> {
        unimplemented!()
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
