//! `chancery identity refusals`: what was refused last, which is not in the ledger.

use std::io::Write;

use chancery_process::output::{Format, rows};
use chancery_proto::chancery::v1::{ListRefusalsRequest, RefusalRecord};
use clap::Args;
use serde::Serialize;

use crate::client::{CliError, Operator};
use crate::output::moment;

pub(super) const EXAMPLES: &str = "\
Examples:
  chancery identity refusals --pod shop/cart-0
  chancery identity refusals --reason token_expired -o csv";

#[derive(Debug, Args)]
pub(crate) struct RefusalArgs {
    /// SPIFFE ID of the agent that asked.
    #[arg(long)]
    agent: Option<String>,
    /// The reason's word, such as `token_expired`.
    #[arg(long)]
    reason: Option<String>,
    /// Pod: name, namespace/name, or UID.
    #[arg(long)]
    pod: Option<String>,
    /// How many at most.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    limit: u32,
}

pub(super) async fn run(mut ca: Operator, args: RefusalArgs, out: &mut impl Write, format: Format) -> Result<(), CliError> {
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
