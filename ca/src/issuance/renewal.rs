//! What the ledger knows of pods: those that have a certificate, for when their cluster cannot be asked, and those that agents joined with.

use chancery_identity::token::VerifiedToken;
use chancery_proto::chancery::v1::IssueReason;

use time::OffsetDateTime;
use uuid::Uuid;

use super::Issuance;
use crate::attestation::Caller;
use crate::ledger::{IdentityFilter, Issuance as Entry, PodFilter, Provenance, ServiceAccountFilter};

/// So many of a pod's newest certificates are looked at; it has one or two that are good.
const NEWEST: usize = 16;

impl Issuance {
    /// The pod that an agent joined with last, if its cluster, which can be asked now, has it no more. An agent that was restarted in another pod
    /// joins by that one's token; one that has none has lost its node.
    pub(super) async fn pod_left(&self, caller: &Caller) -> Option<Uuid> {
        let mut newest: Option<(OffsetDateTime, Uuid)> = None;
        for account in self.clusters.agent_accounts(caller.cluster()) {
            // Of an agent's own certificates only those that it joined for name an account.
            let filter = IdentityFilter {
                spiffe_id: Some(caller.id().clone()),
                service_account: Some(ServiceAccountFilter { namespace: Some(account.namespace), name: account.name }),
                ..IdentityFilter::default()
            };
            let joined = self.ledger.list(&filter, 1, None).await.ok().and_then(|mut page| page.identities.pop());
            newest = newest.max(joined.and_then(|joined| Some((joined.time, joined.issuance.pod_uid?))));
        }
        newest.filter(|(joined, pod)| self.clusters.has_left(caller.cluster(), *pod, *joined)).map(|(_, pod)| pod)
    }

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
