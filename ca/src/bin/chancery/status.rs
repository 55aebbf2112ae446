//! `chancery status`: one screen about the CA itself.

use std::io::Write;

use chancery_process::output::{Format, OutputError, fields, rows};
use chancery_proto::chancery::v1::{StatusRequest, StatusResponse};
use serde::Serialize;

use crate::client::{CliError, Operator};
use crate::output::{coloured, moment};

#[derive(Debug, Serialize)]
struct Summary {
    ready: bool,
    problems: Vec<String>,
    version: String,
    trust_domain: String,
    development: bool,
    started_at: String,
    data_directory: String,
    agents: u32,
    ledger_entries: u64,
    trust_sequence: u64,
    configuration_error: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    authorities: Vec<Authority>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    clusters: Vec<Cluster>,
}

#[derive(Debug, Serialize)]
struct Authority {
    kind: &'static str,
    state: String,
    subject: String,
    not_before: String,
    not_after: String,
    fingerprint: String,
}

#[derive(Debug, Serialize)]
struct Cluster {
    name: String,
    keys: u32,
    loaded_at: String,
    error: String,
}

pub(crate) async fn run(mut ca: Operator, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let mut status = Summary::of(ca.status(StatusRequest {}).await?.into_inner());
    if format != Format::Table {
        return Ok(fields(out, format, &status)?);
    }
    let authorities = std::mem::take(&mut status.authorities);
    let clusters = std::mem::take(&mut status.clusters);
    let (level, word) = if status.ready { ("ok", "ready") } else { ("bad", "not ready") };
    writeln!(out, "{}\n", coloured(level, word)).map_err(OutputError::Write)?;
    fields(out, format, &status)?;
    writeln!(out).map_err(OutputError::Write)?;
    rows(out, format, &["kind", "state", "subject", "not_after", "fingerprint"], &authorities)?;
    writeln!(out).map_err(OutputError::Write)?;
    Ok(rows(out, format, &["name", "keys", "loaded_at", "error"], &clusters)?)
}

impl Summary {
    fn of(status: StatusResponse) -> Self {
        let authorities = status.authorities.into_iter().map(|authority| Authority {
            kind: if authority.root { "root" } else { "issuing" },
            state: authority.state,
            subject: authority.subject,
            not_before: moment(authority.not_before_ms),
            not_after: moment(authority.not_after_ms),
            fingerprint: authority.fingerprint,
        });
        let clusters = status.clusters.into_iter().map(|cluster| Cluster {
            name: cluster.name,
            keys: cluster.keys,
            loaded_at: moment(cluster.loaded_at_ms),
            error: cluster.error,
        });
        Self {
            ready: status.ready,
            problems: status.problems,
            version: status.version,
            trust_domain: status.trust_domain,
            development: status.development,
            started_at: moment(status.started_at_ms),
            data_directory: status.data_directory,
            agents: status.agents,
            ledger_entries: status.ledger_entries,
            trust_sequence: status.trust_sequence,
            configuration_error: status.configuration_error,
            authorities: authorities.collect(),
            clusters: clusters.collect(),
        }
    }
}
