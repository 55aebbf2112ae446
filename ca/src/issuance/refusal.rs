//! A refused request, as the caller, the metrics and the list of refusals see it.

use chancery_identity::csr::CsrError;
use chancery_identity::token::VerifiedToken;
use time::OffsetDateTime;
use uuid::Uuid;

use super::MAX_REQUESTS;
use super::policy::PolicyRefusal;
use crate::attestation::AttestationError;
use crate::authority::{AuthorityError, IssuerError};
use crate::ledger::{self, LedgerError};

/// Why a request was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// A stable word in snake case, as in metrics: `token_expired`, `csr_signature`, …
    pub reason: &'static str,
    /// What failed, on what, and what to do.
    pub message: String,
    /// The same request may succeed later without anybody's doing.
    pub retryable: bool,
    workload: Option<Box<RefusedWorkload>>,
}

/// Whose certificate was refused, as far as a verified token says so.
#[derive(Clone, Debug, PartialEq, Eq)]
struct RefusedWorkload {
    namespace: String,
    service_account: String,
    pod: String,
    pod_uid: Uuid,
}

impl Refusal {
    fn new(reason: &'static str, message: String, retryable: bool) -> Self {
        Self { reason, message, retryable, workload: None }
    }

    pub(super) fn too_many(found: usize) -> Self {
        Self::new("too_many_requests", format!("{found} requests in one call; at most {MAX_REQUESTS} are read: send several calls"), false)
    }

    pub(super) fn unread(problem: &str) -> Self {
        Self::new("call_too_large", format!("a call was refused unread: {problem}; send several smaller ones"), false)
    }

    pub(super) fn unknown_cluster(cluster: &str) -> Self {
        AttestationError::UnknownCluster(cluster.to_owned()).into()
    }

    /// A sidecar whose pod its cluster has no more.
    pub(super) fn gone(pod: Uuid) -> Self {
        Self::new("pod_gone", format!("the sidecar's pod {pod} is gone; a pod has a sidecar while it exists"), false)
    }

    /// An agent whose pod its cluster has no more.
    pub(super) fn agents_pod_gone(pod: Uuid) -> Self {
        Self::new(
            "pod_gone",
            format!("the agent's pod {pod}, with whose token it joined, is gone; it joins anew by the token of its pod"),
            false,
        )
    }

    /// Whom an operator banned, or revoked without allowing more.
    pub(super) fn forbidden(obstacle: String) -> Self {
        Self::new("forbidden", obstacle, false)
    }

    /// Says whose certificate it was.
    pub(super) fn about(mut self, token: &VerifiedToken) -> Self {
        self.workload = Some(Box::new(RefusedWorkload {
            namespace: token.namespace.clone(),
            service_account: token.service_account.name.clone(),
            pod: token.pod.name.clone(),
            pod_uid: token.pod.uid,
        }));
        self
    }

    /// As the list of refusals keeps it.
    pub(super) fn record(&self, time: OffsetDateTime, agent: &str, request_id: &str) -> ledger::Refusal {
        let workload = self.workload.as_deref();
        let text = |of: fn(&RefusedWorkload) -> &str| workload.map(of).unwrap_or_default().to_owned();
        ledger::Refusal {
            time,
            agent: agent.to_owned(),
            reason: self.reason.to_owned(),
            message: self.message.clone(),
            namespace: text(|workload| &workload.namespace),
            service_account: text(|workload| &workload.service_account),
            pod: text(|workload| &workload.pod),
            pod_uid: workload.map(|workload| workload.pod_uid),
            request_id: request_id.to_owned(),
        }
    }
}

impl From<AttestationError> for Refusal {
    fn from(error: AttestationError) -> Self {
        let refusal = Self::new(error.reason(), error.to_string(), error.is_retryable());
        match error.token() {
            Some(token) => refusal.about(token),
            None => refusal,
        }
    }
}

impl From<CsrError> for Refusal {
    fn from(error: CsrError) -> Self {
        Self::new(error.reason(), error.to_string(), false)
    }
}

impl From<PolicyRefusal> for Refusal {
    fn from(refusal: PolicyRefusal) -> Self {
        Self::new(refusal.reason, refusal.to_string(), false)
    }
}

impl From<IssuerError> for Refusal {
    fn from(error: IssuerError) -> Self {
        let (reason, retryable) = match &error {
            IssuerError::Key(_) => ("issuing_key", true),
            IssuerError::Clock { .. } => ("ca_clock", true),
            IssuerError::Random(_) => ("ca_random", true),
            IssuerError::Encoding(_) => ("certificate_encoding", false),
            IssuerError::Check { .. } => ("certificate_check", false),
        };
        Self::new(reason, error.to_string(), retryable)
    }
}

impl From<AuthorityError> for Refusal {
    fn from(error: AuthorityError) -> Self {
        match error {
            AuthorityError::Issuer(error) => error.into(),
            AuthorityError::Ledger(error) => error.into(),
            error => Self::new("issuing_certificate", error.to_string(), true),
        }
    }
}

impl From<LedgerError> for Refusal {
    fn from(error: LedgerError) -> Self {
        let reason = match &error {
            LedgerError::Busy => "ledger_busy",
            LedgerError::EpochMoved { .. } => "ledger_epoch",
            LedgerError::Full(_) => "ledger_full",
            LedgerError::Contradicted(_) => "ledger_contradicted",
            _ => "ledger_failed",
        };
        Self::new(reason, format!("the issuance could not be recorded: {error}"), error.is_retryable())
    }
}
