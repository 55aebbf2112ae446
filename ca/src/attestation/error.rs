//! Why somebody is not believed, each reason with a word that stays the same.

use chancery_identity::SpiffeIdError;
use chancery_identity::token::{TokenError, VerifiedToken};

use super::live::Doubt;
use super::{Mismatch, Obstacle};

/// The claim that binds a token to a pod, and what is in it.
const POD_CLAIM: &str = "kubernetes.io.pod";

/// Why a caller or a workload was not believed. Each has a stable word, [`AttestationError::reason`].
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttestationError {
    /// No such cluster in the configuration.
    #[error("there is no cluster {0:?} in the CA's configuration")]
    UnknownCluster(String),
    /// The cluster's keys could not be loaded yet.
    #[error("the public keys of cluster {cluster} are not loaded: {problem}")]
    NoKeys {
        /// Whose.
        cluster: String,
        /// Why.
        problem: String,
    },
    /// The token itself.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The pod runs on another node than the agent.
    #[error("the token's pod {} runs on node {} ({}), not on the agent's node {expected}", .token.pod.name, .token.node.name, .token.node.uid)]
    OtherNode {
        /// The agent's node UID.
        expected: String,
        /// Verified.
        token: Box<VerifiedToken>,
    },
    /// A sidecar asked for another pod.
    #[error("the token belongs to pod {} ({}), not to the sidecar's pod {expected}", .token.pod.name, .token.pod.uid)]
    OtherPod {
        /// The sidecar's pod UID.
        expected: String,
        /// Verified.
        token: Box<VerifiedToken>,
    },
    /// The cluster may not speak for this account.
    #[error("cluster {} may not speak for {}/{}; see its `service_accounts`", .token.cluster, .token.namespace, .token.service_account.name)]
    NotAllowed {
        /// Verified.
        token: Box<VerifiedToken>,
    },
    /// An account that no agent runs under.
    #[error("{}/{} of cluster {} is no agent's account; see its `agent_accounts`", .token.namespace, .token.service_account.name, .token.cluster)]
    NotAnAgent {
        /// Verified.
        token: Box<VerifiedToken>,
    },
    /// The cluster does not bear out what the token says.
    #[error("the token of pod {}/{} ({}) is not believed: {mismatch}", .token.namespace, .token.pod.name, .token.pod.uid)]
    Mismatch {
        /// What does not fit.
        mismatch: Mismatch,
        /// Verified.
        token: Box<VerifiedToken>,
    },
    /// The token could not be held against the cluster.
    #[error("{obstacle}")]
    Unconfirmed {
        /// Why not.
        obstacle: Obstacle,
        /// Verified.
        token: Box<VerifiedToken>,
    },
    /// Neither agent nor sidecar.
    #[error("a caller joins either as an agent or as a sidecar")]
    Role,
    /// The names cannot stand in a SPIFFE ID.
    #[error("no SPIFFE ID can be made of the caller's names: {0}")]
    Id(#[from] SpiffeIdError),
}

impl AttestationError {
    pub(super) fn doubted(doubt: Doubt, token: &VerifiedToken) -> Self {
        let token = Box::new(token.clone());
        match doubt {
            Doubt::Mismatch(mismatch) => Self::Mismatch { mismatch, token },
            Doubt::Obstacle(obstacle) => Self::Unconfirmed { obstacle, token },
        }
    }

    /// A stable word for metrics and refusals.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::UnknownCluster(_) => "cluster_unknown",
            Self::NoKeys { .. } => "cluster_keys_missing",
            Self::Token(TokenError::MissingClaim(claim)) if claim.starts_with(POD_CLAIM) => "token_not_bound",
            Self::Token(error) => error.reason(),
            Self::OtherNode { .. } => "token_other_node",
            Self::OtherPod { .. } => "token_other_pod",
            Self::NotAllowed { .. } => "account_not_allowed",
            Self::NotAnAgent { .. } => "account_not_agent",
            Self::Mismatch { mismatch, .. } => mismatch.reason(),
            Self::Unconfirmed { obstacle, .. } => obstacle.reason(),
            Self::Role => "role_unspecified",
            Self::Id(_) => "id_impossible",
        }
    }

    /// Whether the same token may be believed later without anybody's doing.
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            Self::NoKeys { .. } | Self::Unconfirmed { .. } | Self::Token(TokenError::UnknownKey { .. } | TokenError::NotYetValid(_))
        )
    }

    /// What the token said, where it was verified.
    pub fn token(&self) -> Option<&VerifiedToken> {
        match self {
            Self::OtherNode { token, .. }
            | Self::OtherPod { token, .. }
            | Self::NotAllowed { token }
            | Self::NotAnAgent { token }
            | Self::Mismatch { token, .. }
            | Self::Unconfirmed { token, .. } => Some(token),
            _ => None,
        }
    }
}
