//! `chancery agent`: the node agents and how far each has come.

use std::io::Write;

use chancery_process::output::{Format, fields, rows};
use chancery_proto::chancery::v1::{AgentRecord, BanRequest, ListAgentsRequest, UnbanRequest};
use clap::{Args, Subcommand};
use serde::Serialize;

use crate::client::{CliError, Operator};
use crate::output::moment;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Every agent that was seen since the CA started.
    List,
    /// One agent, by its SPIFFE ID or its node's name, with every proxy there that is behind, and why.
    Show {
        /// Its SPIFFE ID, or its node's name.
        agent: String,
    },
    /// Issue nothing more to an agent or sidecar, nor on its behalf, until `unban`. What it has stays good until it expires.
    Ban(BanArgs),
    /// Take a ban back.
    Unban(BanArgs),
}

#[derive(Debug, Args)]
pub(crate) struct BanArgs {
    /// Its SPIFFE ID, as `agent list` prints it.
    agent: String,
    /// Why: recorded with the act.
    #[arg(long)]
    reason: String,
}

#[derive(Debug, Serialize)]
struct AgentRow {
    spiffe_id: String,
    cluster: String,
    node: String,
    connected: bool,
    last_seen: String,
    version: String,
    trust_sequence: u64,
    workloads: u32,
    streams: u32,
    lagging: u32,
    clock_offset_ms: i64,
    svid_not_after: String,
    ledger_size: u64,
    ledger_alarm: String,
    holders: u32,
    proven_sequence: u64,
    behind: Vec<String>,
}

/// The answer to an act.
#[derive(Debug, Serialize)]
struct Done {
    /// The act's entry in the ledger.
    entry: u64,
}

pub(crate) async fn run(mut ca: Operator, command: Command, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let done = match command {
        Command::List => return list(ca, out, format).await,
        Command::Show { agent } => return show(ca, agent, out, format).await,
        Command::Ban(BanArgs { agent, reason }) => ca.ban(BanRequest { agent, reason }).await?,
        Command::Unban(BanArgs { agent, reason }) => ca.unban(UnbanRequest { agent, reason }).await?,
    };
    Ok(fields(out, format, &Done { entry: done.into_inner().entry })?)
}

async fn list(mut ca: Operator, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let found: Vec<AgentRow> =
        ca.list_agents(ListAgentsRequest::default()).await?.into_inner().agents.into_iter().map(AgentRow::of).collect();
    let all = [
        "cluster",
        "node",
        "connected",
        "last_seen",
        "workloads",
        "streams",
        "lagging",
        "trust_sequence",
        "proven_sequence",
        "clock_offset_ms",
        "ledger_size",
        "ledger_alarm",
        "version",
        "svid_not_after",
        "spiffe_id",
        "behind",
    ];
    let columns = if format == Format::Table { &all[..13] } else { &all[..] };
    Ok(rows(out, format, columns, &found)?)
}

async fn show(mut ca: Operator, agent: String, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let found = ca.list_agents(ListAgentsRequest { agent: agent.clone() }).await?.into_inner().agents;
    if found.is_empty() {
        return Err(CliError::Failed(format!(
            "no agent {agent} was seen since the CA started; `chancery agent list` names those that were"
        )));
    }
    for record in found {
        fields(out, format, &AgentRow::of(record))?;
    }
    Ok(())
}

impl AgentRow {
    fn of(record: AgentRecord) -> Self {
        Self {
            spiffe_id: record.spiffe_id,
            cluster: record.cluster,
            node: record.node,
            connected: record.connected,
            last_seen: moment(record.last_seen_ms),
            version: record.version,
            trust_sequence: record.trust_sequence,
            workloads: record.workloads,
            streams: record.streams,
            lagging: record.lagging,
            clock_offset_ms: record.clock_offset_ms,
            svid_not_after: moment(record.svid_not_after_ms),
            ledger_size: record.ledger_size,
            ledger_alarm: record.ledger_alarm,
            holders: record.holders,
            proven_sequence: record.proven_sequence,
            behind: record.behind,
        }
    }
}
