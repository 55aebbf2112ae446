//! What a transition would meet, as it is printed.

use std::io::Write;

use chancery_process::output::{Format, OutputError, fields, rows};
use chancery_proto::chancery::v1::{CheckGateRequest, CheckGateResponse, MissingRecord, RootState};
use serde::Serialize;
use tonic::Status;

use super::list::word;
use super::{OverrideArgs, Roots};
use crate::client::CliError;

#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct GateReport {
    pub(super) root: String,
    pub(super) to: &'static str,
    pub(super) open: bool,
    pub(super) obstacles: Vec<String>,
    pub(super) counted: u64,
    pub(super) missing_total: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) missing: Vec<MissingRow>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) unproven: Vec<String>,
    pub(super) unproven_total: u64,
}

#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct MissingRow {
    pub(super) kind: String,
    pub(super) cluster: String,
    pub(super) name: String,
    pub(super) node: String,
    pub(super) agent: String,
    pub(super) reason: String,
    pub(super) nack: String,
}

/// Asks what `root` meets on its way; an empty name: the one whose turn it is.
pub(super) async fn check(ca: &mut Roots, root: &str, to: RootState, overrides: &OverrideArgs) -> Result<GateReport, CliError> {
    let request = CheckGateRequest { root: root.to_owned(), to: to.into(), overrides: Some(overrides.to_wire()) };
    let CheckGateResponse { fingerprint, obstacles, missing, missing_total, counted, unproven, unproven_total } =
        ca.check_gate(request).await?.into_inner();
    Ok(GateReport {
        root: fingerprint,
        to: word(to),
        open: obstacles.is_empty(),
        obstacles,
        counted,
        missing_total,
        missing: missing.into_iter().map(MissingRow::from).collect(),
        unproven,
        unproven_total,
    })
}

impl GateReport {
    /// Closed after all, as the CA said.
    pub(super) fn refused(self, status: &Status) -> Self {
        Self { open: false, obstacles: vec![status.message().to_owned()], ..self }
    }

    pub(super) fn print(mut self, out: &mut impl Write, format: Format) -> Result<(), CliError> {
        if format != Format::Table {
            return Ok(fields(out, format, &self)?);
        }
        let missing = std::mem::take(&mut self.missing);
        fields(out, format, &self)?;
        if !missing.is_empty() {
            writeln!(out).map_err(OutputError::Write)?;
            rows(out, format, &["kind", "cluster", "name", "node", "reason", "nack"], &missing)?;
        }
        Ok(())
    }
}

impl MissingRow {
    /// Who, where and why, in a sentence.
    pub(super) fn told(&self) -> String {
        let Self { name, node, reason, .. } = self;
        if node.is_empty() { format!("{name} {reason}") } else { format!("{name} (node {node}) {reason}") }
    }
}

impl From<MissingRecord> for MissingRow {
    fn from(MissingRecord { name, kind, node, agent, reason, nack, cluster }: MissingRecord) -> Self {
        Self { kind, cluster, name, node, agent, reason, nack }
    }
}
