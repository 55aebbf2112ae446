//! An issued identity, as it is printed.

use chancery_process::output::Format;
use chancery_proto::chancery::v1::{Identity, IssueReason};
use serde::Serialize;

use crate::output::{moment, uuid};

/// What people look for first.
const TABLE: [&str; 7] = ["time", "spiffe_id", "serial", "namespace", "pod", "node", "not_after"];

/// The columns of a list.
pub(crate) fn columns(format: Format) -> &'static [&'static str] {
    if format == Format::Table { &TABLE } else { &IDENTITY_COLUMNS }
}

const IDENTITY_COLUMNS: [&str; 22] = [
    "entry",
    "time",
    "spiffe_id",
    "serial",
    "not_before",
    "not_after",
    "dns_names",
    "reason",
    "cluster",
    "namespace",
    "service_account",
    "pod",
    "pod_uid",
    "node",
    "node_uid",
    "agent",
    "token_id",
    "request_id",
    "trust_sequence",
    "issuing_certificate",
    "root",
    "provenance",
];

/// An issued identity, as it is printed.
#[derive(Debug, Default, Serialize)]
pub(crate) struct IdentityRow {
    entry: u64,
    time: String,
    pub(crate) spiffe_id: String,
    pub(crate) serial: String,
    not_before: String,
    pub(crate) not_after: String,
    dns_names: Vec<String>,
    reason: String,
    cluster: String,
    namespace: String,
    service_account: String,
    service_account_uid: String,
    pod: String,
    pod_uid: String,
    node: String,
    node_uid: String,
    agent: String,
    token_id: String,
    request_id: String,
    trust_sequence: u64,
    issuing_certificate: String,
    root: String,
    /// `issued`, or how it came into a log that continues a lost one.
    provenance: String,
}

impl IdentityRow {
    pub(crate) fn of(identity: &Identity) -> Self {
        let issuance = identity.issuance.clone().unwrap_or_default();
        let provenance = match issuance.carried_over {
            Some(entry) => format!("carried over from entry {entry} of the log before"),
            None if issuance.recovered => "recovered: an agent told it after a loss".to_owned(),
            None => "issued".to_owned(),
        };
        let reason = IssueReason::try_from(issuance.reason).unwrap_or_default().as_str_name();
        Self {
            entry: identity.entry,
            time: moment(identity.time_ms),
            spiffe_id: identity.spiffe_id.clone(),
            serial: identity.serial.clone(),
            not_before: moment(identity.not_before_ms),
            not_after: moment(identity.not_after_ms),
            dns_names: identity.dns_names.clone(),
            reason: reason.trim_start_matches("ISSUE_REASON_").to_lowercase(),
            cluster: issuance.cluster,
            namespace: issuance.namespace,
            service_account: issuance.service_account,
            service_account_uid: uuid(&issuance.service_account_uid),
            pod: issuance.pod,
            pod_uid: uuid(&issuance.pod_uid),
            node: issuance.node,
            node_uid: uuid(&issuance.node_uid),
            agent: identity.agent.clone(),
            token_id: uuid(&issuance.token_id),
            request_id: uuid(&issuance.request_id),
            trust_sequence: issuance.trust_sequence,
            issuing_certificate: hex::encode(&issuance.issuing_certificate),
            root: hex::encode(&issuance.root),
            provenance,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_column_is_a_field() {
        let row = serde_json::to_value(IdentityRow::default()).unwrap();
        for column in columns(Format::Csv).iter().chain(columns(Format::Table)) {
            assert!(row.get(column).is_some(), "{column}");
        }
    }
}
