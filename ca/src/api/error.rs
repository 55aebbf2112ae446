//! What a call can fail with, and the gRPC code of each. The one place where codes are chosen.

use std::time::Duration;

use chancery_identity::SpiffeId;
use time::OffsetDateTime;
use tonic::metadata::MetadataValue;
use tonic::{Code, Status};

use crate::api::Person;
use crate::attestation::{NotACaller, OperatorError, Right};
use crate::authority::AuthorityError;
use crate::fleet::{FleetError, SessionEnd};
use crate::issuance::Refusal;
use crate::ledger::{FilterError, LedgerError};
use crate::rotation::RotationError;

/// The metadata key that carries a refusal's stable word.
pub const REASON_KEY: &str = "chancery-reason";

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApiError {
    /// The peer's certificate cannot be read, although TLS let it in.
    #[error("the client certificate is not accepted: {0}")]
    Certificate(String),
    /// No client certificate where one is needed.
    #[error("this call needs the certificate of an agent or sidecar: join first")]
    NoCertificate,
    /// Nobody is known at the other end of an operator's call.
    #[error(
        "this call is for operators and auditors: come through the CA's admin socket, with an SVID that the configuration names, or with `chancery --kube`"
    )]
    NobodyKnown,
    /// Somebody without a role.
    #[error("{0} is neither an admin nor an auditor of this CA; whoever configures it can name it under [roles]")]
    Stranger(SpiffeId),
    /// Somebody whose cluster does not let them do this.
    #[error(
        "the cluster of {person} does not let it {right}: bind it to the ClusterRole chancery-auditor or chancery-admin (kubectl create clusterrolebinding)"
    )]
    NotBound {
        /// Who.
        person: Person,
        /// What.
        right: Right,
    },
    /// Nobody is known by a bearer token.
    #[error(transparent)]
    Operator(#[from] OperatorError),
    /// An auditor who wants to act.
    #[error("{0} is an auditor, who may read everything and change nothing; ask an admin")]
    MayNotAct(Person),
    /// An act without a reason.
    #[error("an act needs a reason, which is recorded with it: give one with --reason")]
    ReasonMissing,
    /// A certificate of somebody else's.
    #[error(transparent)]
    NotACaller(#[from] NotACaller),
    /// The certificate expired after the connection was made.
    #[error("the certificate of {id} expired at {at}: connect with a newer one, or join again")]
    SvidExpired {
        /// Whose.
        id: SpiffeId,
        /// When.
        at: OffsetDateTime,
    },
    /// Too many calls at once.
    #[error("too many calls of this peer are being worked on: wait for one of them (limits.concurrent_calls)")]
    TooManyCalls,
    /// Too many certificates a second.
    #[error("this peer asks for more than its rate allows: try again in a second (limits.requests_per_second, limits.request_burst)")]
    RateLimited,
    /// What was sent cannot be meant.
    #[error("{0}")]
    Invalid(String),
    /// A filter that cannot be meant.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// What was asked for does not exist.
    #[error("{0}")]
    NotFound(String),
    /// A certificate was refused.
    #[error(transparent)]
    Refused(Box<Refusal>),
    /// The ledger failed.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// A trust root stays where it is.
    #[error(transparent)]
    Rotation(#[from] RotationError),
    /// Something is not revoked.
    #[error(transparent)]
    Authority(AuthorityError),
    /// The fleet refused.
    #[error(transparent)]
    Fleet(#[from] FleetError),
    /// More watches at once than are served.
    #[error("{0} watches are under way, which is the most: end one of them")]
    TooManyWatches(usize),
    /// More exports at once than are served.
    #[error("{0} exports are under way, which is the most: wait for one of them to end")]
    TooManyExports(usize),
    /// A reader of a watch or an export that took nothing for too long.
    #[error("the reader took nothing for {} s, and is ended; go on from entry {next}", waited.as_secs())]
    SlowReader {
        /// So long.
        waited: Duration,
        /// What follows what was sent.
        next: u64,
    },
    /// A watch ends with the CA.
    #[error("the CA is ending, and the watch with it; once it runs again, go on from entry {next}")]
    Ending {
        /// What follows what was sent.
        next: u64,
    },
    /// A session ended.
    #[error(transparent)]
    Session(#[from] SessionEnd),
}

impl ApiError {
    /// The stable word for a refused act in the ledger; none for what is no refusal.
    pub(super) fn refused_act(&self) -> Option<&'static str> {
        match self {
            Self::MayNotAct(_) => Some("role"),
            Self::ReasonMissing => Some("reason_missing"),
            Self::Ledger(LedgerError::Impossible(_)) | Self::Rotation(RotationError::Ledger(LedgerError::Impossible(_))) => {
                Some("impossible")
            }
            Self::Rotation(RotationError::Gate(_)) => Some("gate"),
            Self::Rotation(RotationError::NotDue(_)) => Some("not_due"),
            Self::Rotation(RotationError::Unknown(_)) => Some("unknown_root"),
            Self::Rotation(RotationError::Except(_)) => Some("ambiguous_name"),
            Self::Authority(AuthorityError::NotRevocable(_)) => Some("not_revocable"),
            Self::Authority(AuthorityError::TooManyRevoked { .. }) => Some("too_many_revoked"),
            Self::Rotation(RotationError::Authority(AuthorityError::Corporate { .. })) => Some("corporate"),
            Self::Rotation(RotationError::Authority(AuthorityError::NotRequested)) => Some("not_requested"),
            Self::Rotation(RotationError::Authority(AuthorityError::Answer(_))) => Some("answer"),
            _ => None,
        }
    }

    /// Whether it says nothing about who asks: the same call may be answered later without anybody's doing.
    pub(super) fn is_passing(&self) -> bool {
        matches!(self, Self::TooManyCalls | Self::RateLimited | Self::Operator(OperatorError::Busy | OperatorError::Away { .. }))
    }

    fn code(&self) -> Code {
        match self {
            Self::Certificate(_)
            | Self::NoCertificate
            | Self::SvidExpired { .. }
            | Self::Session(SessionEnd::SvidExpired)
            | Self::Operator(OperatorError::OtherAudience | OperatorError::NotSigned(_) | OperatorError::NotAccepted { .. }) => {
                Code::Unauthenticated
            }
            Self::TooManyCalls
            | Self::RateLimited
            | Self::TooManyWatches(_)
            | Self::TooManyExports(_)
            | Self::SlowReader { .. }
            | Self::Fleet(_)
            | Self::Ledger(LedgerError::Full(_)) => Code::ResourceExhausted,
            Self::Invalid(_)
            | Self::Operator(OperatorError::WhichCluster { .. })
            | Self::ReasonMissing
            | Self::Filter(_)
            | Self::Session(SessionEnd::Protocol(_))
            | Self::Ledger(LedgerError::PageSize(_) | LedgerError::PageToken(_) | LedgerError::Ambiguous { .. }) => Code::InvalidArgument,
            Self::Ledger(LedgerError::NotThere { .. }) => Code::OutOfRange,
            Self::NotFound(_) | Self::Ledger(LedgerError::NotInTree { .. }) => Code::NotFound,
            Self::Refused(refusal) if refusal.retryable => Code::Unavailable,
            Self::Refused(_)
            | Self::NotACaller(_)
            | Self::NobodyKnown
            | Self::Stranger(_)
            | Self::NotBound { .. }
            | Self::Operator(OperatorError::NoCluster)
            | Self::MayNotAct(_)
            | Self::Session(SessionEnd::ClusterRemoved) => Code::PermissionDenied,
            Self::Ledger(LedgerError::Impossible(_))
            | Self::Authority(AuthorityError::NotRevocable(_) | AuthorityError::TooManyRevoked { .. }) => Code::FailedPrecondition,
            Self::Rotation(error) => of_rotation(error),
            Self::Ledger(error) if error.is_retryable() => Code::Unavailable,
            Self::Ledger(_) => Code::Internal,
            Self::Session(SessionEnd::Replaced) => Code::Aborted,
            Self::Session(_) | Self::Ending { .. } | Self::Authority(_) | Self::Operator(_) => Code::Unavailable,
        }
    }
}

fn of_rotation(error: &RotationError) -> Code {
    match error {
        RotationError::Gate(_)
        | RotationError::NotDue(_)
        | RotationError::Ledger(LedgerError::Impossible(_))
        | RotationError::Authority(AuthorityError::Corporate { .. } | AuthorityError::NotRequested | AuthorityError::Answer(_)) => {
            Code::FailedPrecondition
        }
        RotationError::Unknown(_) => Code::NotFound,
        RotationError::Except(_) => Code::InvalidArgument,
        RotationError::Ledger(error) if !error.is_retryable() => Code::Internal,
        // It can be tried again, and what is recorded is followed by itself.
        _ => Code::Unavailable,
    }
}

impl From<AuthorityError> for ApiError {
    fn from(error: AuthorityError) -> Self {
        match error {
            AuthorityError::Ledger(error) => Self::Ledger(error),
            error => Self::Authority(error),
        }
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(Box::new(refusal))
    }
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Self {
        let mut status = Self::new(error.code(), error.to_string());
        let reason = if let ApiError::Refused(refusal) = &error { Some(refusal.reason) } else { error.refused_act() };
        if let Some(reason) = reason {
            status.metadata_mut().insert(REASON_KEY, MetadataValue::from_static(reason));
        }
        status
    }
}
