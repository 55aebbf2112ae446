//! Pods that are known by what was issued to them, for when their cluster cannot be asked.

use chancery_identity::token::VerifiedToken;
use chancery_proto::chancery::v1::IssueReason;

use super::Issuance;
use crate::ledger::{IdentityFilter, Issuance as Entry, PodFilter, Provenance};

/// So many of a pod's newest certificates are looked at; it has one or two that are good.
const NEWEST: usize = 16;

impl Issuance {
    /// Whether a token's pod has a certificate that this CA issued to it under the same names and UIDs, and that has neither expired nor been
    /// revoked.
    pub(super) async fn has_certificate(&self, token: &VerifiedToken) -> bool {
        let filter = IdentityFilter { pod: Some(PodFilter::Uid(token.pod.uid)), unexpired: true, ..IdentityFilter::default() };
        match self.ledger.list(&filter, NEWEST, None).await {
            Ok(page) => page
                .identities
                .iter()
                .any(|identity| was_issued_to(token, &identity.issuance) && self.ledger.revocation(identity).is_none()),
            Err(error) => {
                tracing::warn!(pod = %token.pod.uid, %error, "it cannot be told whether a pod has a certificate");
                false
            }
        }
    }
}

/// Not what it joined with, as the sidecar or agent that it is; and not what an agent says it holds.
fn was_issued_to(token: &VerifiedToken, entry: &Entry) -> bool {
    let to = (&entry.cluster, &entry.namespace, &entry.pod, &entry.service_account, &entry.node);
    let uids = (entry.pod_uid, entry.service_account_uid, entry.node_uid);
    to == (&token.cluster, &token.namespace, &token.pod.name, &token.service_account.name, &token.node.name)
        && uids == (Some(token.pod.uid), Some(token.service_account.uid), Some(token.node.uid))
        && !matches!(entry.reason, IssueReason::Join | IssueReason::AgentRenewal)
        && entry.provenance != Provenance::Recovered
}
