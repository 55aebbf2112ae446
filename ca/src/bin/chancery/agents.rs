//! `chancery agent`: the node agents and how far each has come.

use std::io::Write;

use chancery_process::output::{Format, fields, rows};
use chancery_proto::chancery::v1::{AgentRecord, BanRequest, ListAgentsRequest, UnbanRequest};
use clap::{Args, Subcommand};
use serde::Serialize;

use crate::client::{self, CliError, Operator, Way};
use crate::output::moment;
use crate::revocation::{self, Recorded, WaitArgs};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Every agent that was seen since the CA started or has a certificate that is good, and whether it has the newest trust state.
    List,
    /// One agent, by its SPIFFE ID or its node's name, with every proxy there that is behind, and why; and with both checkpoints of an alarm
    /// about the ledger.
    Show {
        /// Its SPIFFE ID, or its node's name, also `CLUSTER/NODE`.
        agent: String,
    },
    /// Issue nothing more to an agent or sidecar, nor on its behalf, until `unban`, and revoke its own certificates: the CA ends its connections
    /// and takes no other. What its workloads have stays good until it expires; `chancery identity revoke --agent` revokes that as well.
    Ban(BanArgs),
    /// Take a ban back. The agent joins again by itself, with its token.
    Unban(UnbanArgs),
}

#[derive(Debug, Args)]
pub(crate) struct BanArgs {
    /// Its SPIFFE ID, or its node's name, also `CLUSTER/NODE`.
    agent: String,
    /// Why: recorded with the act.
    #[arg(long)]
    reason: String,
    #[command(flatten)]
    wait: WaitArgs,
}

#[derive(Debug, Args)]
pub(crate) struct UnbanArgs {
    /// Its SPIFFE ID, or its node's name, also `CLUSTER/NODE`.
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
    trust: String,
    /// The entry of its ban.
    #[serde(skip_serializing_if = "Option::is_none")]
    banned_by: Option<u64>,
    workloads: u32,
    streams: u32,
    lagging: u32,
    clock_offset_ms: i64,
    svid_not_after: String,
    ledger_size: u64,
    ledger_alarm: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    ledger_evidence: Option<LedgerEvidence>,
    holders: u32,
    proven_sequence: u64,
    behind: Vec<String>,
}

/// Why the agent and the CA's ledger contradict each other.
#[derive(Debug, Serialize)]
struct LedgerEvidence {
    raised_at: String,
    /// The signed checkpoint that the agent remembers.
    remembered: String,
    /// The one that it was shown.
    offered: String,
}

/// The answer to an act.
#[derive(Debug, Serialize)]
struct Done {
    /// The act's entry in the ledger.
    entry: u64,
}

pub(crate) async fn run(way: &Way, command: Command, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let mut ca = client::connect(way).await?;
    match command {
        Command::List => list(ca, out, format).await,
        Command::Show { agent } => show(ca, agent, out, format).await,
        Command::Ban(args) => ban(way, ca, args, out, format).await,
        Command::Unban(UnbanArgs { agent, reason }) => {
            let agent = spiffe_id(&mut ca, agent).await?;
            let done = ca.unban(UnbanRequest { agent, reason }).await?.into_inner();
            Ok(fields(out, format, &Done { entry: done.entry })?)
        }
    }
}

async fn ban(way: &Way, mut ca: Operator, args: BanArgs, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let BanArgs { agent, reason, wait } = args;
    let agent = spiffe_id(&mut ca, agent).await?;
    let done = ca.ban(BanRequest { agent: agent.clone(), reason }).await?.into_inner();
    let recorded = Recorded {
        subject: agent.clone(),
        entry: done.entry,
        certificates: done.certificates,
        trust_sequence: done.trust_sequence,
        issuance: "refused until `chancery agent unban`",
        cut_off: vec![agent],
        problem: done.problem,
    };
    revocation::finish(&mut revocation::connect(way).await?, recorded, &wait, out, format).await
}

/// An act names an agent by its SPIFFE ID, whether or not it was ever seen.
async fn spiffe_id(ca: &mut Operator, agent: String) -> Result<String, CliError> {
    if agent.starts_with("spiffe://") {
        return Ok(agent);
    }
    let found = ca.list_agents(ListAgentsRequest { agent: agent.clone() }).await?.into_inner().agents;
    match &found[..] {
        [one] => Ok(one.spiffe_id.clone()),
        [] => Err(unknown(&agent)),
        several => {
            let ids = several.iter().map(|one| one.spiffe_id.as_str()).collect::<Vec<_>>().join(", ");
            Err(CliError::Usage(format!("{agent} is the node of several agents: name one by its SPIFFE ID: {ids}")))
        }
    }
}

fn unknown(agent: &str) -> CliError {
    CliError::Failed(format!("no agent {agent} was seen since the CA started; `chancery agent list` names those that were"))
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
        "trust",
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
    let columns = if format == Format::Table { &all[..14] } else { &all[..] };
    Ok(rows(out, format, columns, &found)?)
}

async fn show(mut ca: Operator, agent: String, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let found = ca.list_agents(ListAgentsRequest { agent: agent.clone() }).await?.into_inner().agents;
    if found.is_empty() {
        return Err(unknown(&agent));
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
            trust: if record.banned_by == 0 { record.trust } else { "banned".to_owned() },
            banned_by: Some(record.banned_by).filter(|entry| *entry != 0),
            workloads: record.workloads,
            streams: record.streams,
            lagging: record.lagging,
            clock_offset_ms: record.clock_offset_ms,
            svid_not_after: moment(record.svid_not_after_ms),
            ledger_size: record.ledger_size,
            ledger_alarm: record.ledger_alarm,
            ledger_evidence: record.ledger_evidence.map(|alarm| LedgerEvidence {
                raised_at: moment(alarm.raised_at_ms),
                remembered: alarm.remembered,
                offered: alarm.offered,
            }),
            holders: record.holders,
            proven_sequence: record.proven_sequence,
            behind: record.behind,
        }
    }
}
