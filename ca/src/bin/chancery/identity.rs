//! `chancery identity`: what the ledger holds, newest first, and what was refused.

use std::io::Write;
use std::time::Duration;

use chancery_process::output::{Format, fields, rows};
use chancery_proto::chancery::v1::{
    Identity, IdentityFilter, IssueReason, ListIdentitiesRequest, ListRefusalsRequest, RefusalRecord, ShowIdentityRequest,
    show_identity_request::By,
};
use clap::{Args, Subcommand};
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::client::{CliError, Operator};
use crate::output::{moment, uuid};

/// The most that one answer of the CA holds.
const PAGE: u32 = 1000;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Issued identities, newest first. Every condition given must hold.
    List(Box<ListArgs>),
    /// One identity with its whole certificate.
    Show(ShowArgs),
    /// The last refused requests, newest first.
    Refusals(RefusalArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Exactly this SPIFFE ID.
    #[arg(long, value_name = "SPIFFE_ID", conflicts_with = "prefix")]
    id: Option<String>,
    /// SPIFFE IDs that begin so.
    #[arg(long, value_name = "SPIFFE_ID_PREFIX")]
    prefix: Option<String>,
    /// Serial number, hexadecimal.
    #[arg(long)]
    serial: Option<String>,
    /// Pod: name, namespace/name, or UID.
    #[arg(long)]
    pod: Option<String>,
    /// Node's name.
    #[arg(long)]
    node: Option<String>,
    /// Namespace.
    #[arg(long)]
    namespace: Option<String>,
    /// Service account: name, or namespace/name.
    #[arg(long)]
    service_account: Option<String>,
    /// SPIFFE ID of the agent that asked.
    #[arg(long)]
    agent: Option<String>,
    /// The token's ID (`jti`).
    #[arg(long, value_name = "JTI")]
    token_id: Option<String>,
    /// Issued at or after this time, or within this long (`2026-11-01T12:00:00Z`, `1h`).
    #[arg(long, value_parser = moment_or_ago, value_name = "TIME")]
    since: Option<i64>,
    /// Issued before this time, or longer ago than this.
    #[arg(long, value_parser = moment_or_ago, value_name = "TIME")]
    until: Option<i64>,
    /// Signed by this issuing certificate: its SHA-256 fingerprint, or 8 digits of it and more.
    #[arg(long, value_name = "FINGERPRINT")]
    issuing_certificate: Option<String>,
    /// Under this trust root: its SHA-256 fingerprint, or 8 digits of it and more.
    #[arg(long, value_name = "FINGERPRINT")]
    root: Option<String>,
    /// Only those that have not expired.
    #[arg(long)]
    unexpired: bool,
    /// How many at most.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    limit: u64,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct ShowArgs {
    /// Serial number, hexadecimal.
    serial: Option<String>,
    /// The number of its entry in the ledger.
    #[arg(long)]
    entry: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct RefusalArgs {
    /// SPIFFE ID of the agent that asked.
    #[arg(long)]
    agent: Option<String>,
    /// The reason's word, such as `token_expired`.
    #[arg(long)]
    reason: Option<String>,
    /// Pod: namespace/name.
    #[arg(long)]
    pod: Option<String>,
    /// How many at most.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    limit: u32,
}

pub(crate) async fn run(ca: Operator, command: Command, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    match command {
        Command::List(args) => list(ca, *args, out, format).await,
        Command::Show(args) => show(ca, args, out, format).await,
        Command::Refusals(args) => refusals(ca, args, out, format).await,
    }
}

async fn list(mut ca: Operator, args: ListArgs, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let limit = usize::try_from(args.limit).unwrap_or(usize::MAX);
    let filter = Some(args.filter());
    let mut found: Vec<IdentityRow> = Vec::new();
    let mut page_token = String::new();
    loop {
        let left = u32::try_from(limit - found.len()).unwrap_or(PAGE).min(PAGE);
        let request = ListIdentitiesRequest { filter: filter.clone(), page_size: left, page_token };
        let page = ca.list_identities(request).await?.into_inner();
        found.extend(page.identities.iter().map(IdentityRow::of));
        page_token = page.next_page_token;
        if page_token.is_empty() || found.len() >= limit {
            break;
        }
    }
    found.truncate(limit);
    let table = ["time", "spiffe_id", "serial", "namespace", "pod", "node", "not_after"];
    let columns = if format == Format::Table { &table[..] } else { &IDENTITY_COLUMNS };
    Ok(rows(out, format, columns, &found)?)
}

async fn show(mut ca: Operator, args: ShowArgs, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let by = args.entry.map(By::Entry).or(args.serial.map(By::Serial));
    let shown = ca.show_identity(ShowIdentityRequest { by }).await?.into_inner();
    let identity = shown.identity.unwrap_or_default();
    let mut row = IdentityRow::of(&identity);
    if format != Format::Table {
        row.certificate_pem = Some(pem(identity.issuance.as_ref().map_or(&[], |issuance| &*issuance.certificate)));
    }
    fields(out, format, &row)?;
    if format == Format::Table {
        write!(out, "\n{}", shown.text).map_err(chancery_process::output::OutputError::Write)?;
    }
    Ok(())
}

async fn refusals(mut ca: Operator, args: RefusalArgs, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let request = ListRefusalsRequest {
        agent: args.agent.unwrap_or_default(),
        reason: args.reason.unwrap_or_default(),
        pod: args.pod.unwrap_or_default(),
        limit: args.limit,
    };
    let found = ca.list_refusals(request).await?.into_inner().refusals;
    let found: Vec<RefusalRow> = found.into_iter().map(RefusalRow::of).collect();
    let columns = ["time", "reason", "namespace", "service_account", "pod", "agent", "message", "request_id"];
    let columns = if format == Format::Table { &columns[..7] } else { &columns[..] };
    Ok(rows(out, format, columns, &found)?)
}

impl ListArgs {
    fn filter(self) -> IdentityFilter {
        IdentityFilter {
            spiffe_id: self.id.unwrap_or_default(),
            spiffe_id_prefix: self.prefix.unwrap_or_default(),
            serial: self.serial.unwrap_or_default(),
            pod: self.pod.unwrap_or_default(),
            node: self.node.unwrap_or_default(),
            namespace: self.namespace.unwrap_or_default(),
            service_account: self.service_account.unwrap_or_default(),
            agent: self.agent.unwrap_or_default(),
            token_id: self.token_id.unwrap_or_default(),
            since_ms: self.since.unwrap_or_default(),
            until_ms: self.until.unwrap_or_default(),
            unexpired: self.unexpired,
            issuing_certificate: self.issuing_certificate.unwrap_or_default(),
            root: self.root.unwrap_or_default(),
        }
    }
}

const IDENTITY_COLUMNS: [&str; 18] = [
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
    #[serde(skip_serializing_if = "Option::is_none")]
    certificate_pem: Option<String>,
}

impl IdentityRow {
    pub(crate) fn of(identity: &Identity) -> Self {
        let issuance = identity.issuance.clone().unwrap_or_default();
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
            certificate_pem: None,
        }
    }
}

/// A refused request, as it is printed.
#[derive(Debug, Serialize)]
pub(crate) struct RefusalRow {
    pub(crate) time: String,
    pub(crate) reason: String,
    namespace: String,
    service_account: String,
    pod: String,
    agent: String,
    pub(crate) message: String,
    request_id: String,
}

impl RefusalRow {
    pub(crate) fn of(record: RefusalRecord) -> Self {
        Self {
            time: moment(record.time_ms),
            reason: record.reason,
            namespace: record.namespace,
            service_account: record.service_account,
            pod: record.pod,
            agent: record.agent,
            message: record.message,
            request_id: record.request_id,
        }
    }
}

/// RFC 7468.
fn pem(der: &[u8]) -> String {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.push_str(&String::from_utf8_lossy(line));
        pem.push('\n');
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

/// Unix milliseconds of a time in RFC 3339, or of as long ago as a duration says.
fn moment_or_ago(text: &str) -> Result<i64, String> {
    let time = match text.parse::<humantime::Duration>() {
        Ok(ago) => OffsetDateTime::now_utc() - Duration::from(ago),
        Err(_) => OffsetDateTime::parse(text, &Rfc3339)
            .map_err(|_| "expected a time such as 2026-11-01T12:00:00Z, or how long ago, such as 1h".to_owned())?,
    };
    i64::try_from(time.unix_timestamp_nanos() / 1_000_000).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_absolute_or_ago() {
        assert_eq!(moment_or_ago("2023-11-14T22:13:20Z"), Ok(1_700_000_000_000));
        assert!(moment_or_ago("1h").unwrap() < moment_or_ago("1m").unwrap());
        assert!(moment_or_ago("yesterday").is_err());
    }

    #[test]
    fn every_column_of_the_csv_is_a_field() {
        let row = serde_json::to_value(IdentityRow::default()).unwrap();
        for column in IDENTITY_COLUMNS {
            assert!(row.get(column).is_some(), "{column}");
        }
    }
}
