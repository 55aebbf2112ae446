//! The decisions: does what an API server says of a pod and its account bear out what the pod's token says? Pure functions of records,
//! token and time.

use chancery_identity::token::VerifiedToken;
use time::{Duration, OffsetDateTime};

use super::records::{Account, Pod, account_name};
use crate::attestation::answers::{check_authenticated, is_for};
use crate::kubernetes::TokenReviewStatus;

/// How long after its deletion a pod or account still counts, as for the API server itself (`jwt.DefaultLeeway` of its token authenticator).
const DELETION_LEEWAY: Duration = Duration::seconds(60);
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

/// The cluster does not bear out what a token says. Each has a stable word, [`Mismatch::reason`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Mismatch {
    /// No such pod (any more).
    #[error("the pod was deleted, or another has its name now; a pod gets identities while it exists")]
    PodGone,
    /// All its containers have ended for good.
    #[error("the pod has ended (Succeeded or Failed), so that nothing in it can ask")]
    PodFinished,
    /// The pod is elsewhere.
    #[error("the cluster has the pod on node {found:?}")]
    PodOtherNode {
        /// By the API server.
        found: String,
    },
    /// The pod runs under another account.
    #[error("the cluster has the pod under service account {found}")]
    PodOtherAccount {
        /// `namespace/name`, by the API server.
        found: String,
    },
    /// No such service account (any more).
    #[error("its service account was deleted; create it, and the pod anew")]
    AccountGone,
    /// The service account is another one of the same name.
    #[error("its service account was deleted and another was created under the same name; create the pod anew, so that it runs under that")]
    AccountRecreated,
    /// The API server refuses the token for a reason of its own.
    #[error("the API server does not accept it: {0}")]
    NotAccepted(String),
}

impl Mismatch {
    /// A stable word for metrics and refusals.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::PodGone => "pod_gone",
            Self::PodFinished => "pod_finished",
            Self::PodOtherNode { .. } => "pod_other_node",
            Self::PodOtherAccount { .. } => "pod_other_account",
            Self::AccountGone => "account_gone",
            Self::AccountRecreated => "account_recreated",
            Self::NotAccepted(_) => "token_not_accepted",
        }
    }
}

/// Whether the pod of the token's UID, as the cluster has it, is what the token says.
pub(super) fn judge_pod(pod: &Pod, token: &VerifiedToken, now: OffsetDateTime) -> Result<(), Mismatch> {
    if *pod.account != *account_name(&token.namespace, &token.service_account.name) {
        return Err(Mismatch::PodOtherAccount { found: pod.account.to_string() });
    }
    let node = pod.node.as_deref().unwrap_or_default();
    if node != token.node.name {
        return Err(Mismatch::PodOtherNode { found: node.to_owned() });
    }
    if is_over(pod.deleted_at, now) {
        return Err(Mismatch::PodGone);
    }
    if pod.finished { Err(Mismatch::PodFinished) } else { Ok(()) }
}

/// Whether the account of the token's name is still the one that the token was issued to.
pub(super) fn judge_account(account: Option<&Account>, token: &VerifiedToken, now: OffsetDateTime) -> Result<(), Mismatch> {
    match account {
        Some(account) if account.uid != token.service_account.uid => Err(Mismatch::AccountRecreated),
        Some(account) if !is_over(account.deleted_at, now) => Ok(()),
        Some(_) | None => Err(Mismatch::AccountGone),
    }
}

/// What speaks against a token in the API server's own judgement of it: it must be authenticated, for one of our audiences, and bound to the pod that
/// it was verified to be bound to.
pub(super) fn judge_review(review: &TokenReviewStatus, token: &VerifiedToken, audiences: &[String]) -> Result<(), String> {
    check_authenticated(review)?;
    if !is_for(review, audiences) {
        return Err(format!("it is authenticated for none of the audiences {audiences:?}"));
    }
    let extra = review.user.as_ref().and_then(|user| user.extra.as_ref()?.get(POD_UID)?.first());
    if extra.is_none_or(|uid| *uid != token.pod.uid.to_string()) {
        return Err(format!("it is authenticated for the pod with UID {:?}", extra.map_or("", String::as_str)));
    }
    Ok(())
}

fn is_over(deleted_at: Option<OffsetDateTime>, now: OffsetDateTime) -> bool {
    deleted_at.is_some_and(|deleted_at| deleted_at + DELETION_LEEWAY < now)
}
