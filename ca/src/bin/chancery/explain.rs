//! `chancery explain NAMESPACE/POD`: on one screen, why a pod has no certificate, or which one it has.

use std::io::Write;

use chancery_process::output::{Format, OutputError, fields};
use chancery_proto::chancery::v1::{ExplainRequest, ExplainResponse};
use serde::Serialize;

use crate::client::{CliError, Operator};
use crate::identity::{IdentityRow, RefusalRow};
use crate::output::coloured;

/// A pod's namespace and name.
#[derive(Clone, Debug)]
pub(crate) struct PodName {
    namespace: String,
    pod: String,
}

/// For clap.
pub(crate) fn pod_name(text: &str) -> Result<PodName, String> {
    match text.split_once('/') {
        Some((namespace, pod)) if !namespace.is_empty() && !pod.is_empty() && !pod.contains('/') => {
            Ok(PodName { namespace: namespace.to_owned(), pod: pod.to_owned() })
        }
        _ => Err("expected namespace/pod, such as shop/cart-0".to_owned()),
    }
}

#[derive(Debug, Serialize)]
struct Explanation {
    verdict: String,
    next_step: String,
    findings: Vec<Finding>,
    latest: Option<IdentityRow>,
    refusals: Vec<RefusalRow>,
}

#[derive(Debug, Serialize)]
struct Finding {
    level: String,
    text: String,
}

pub(crate) async fn run(mut ca: Operator, pod: PodName, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let request = ExplainRequest { namespace: pod.namespace, pod: pod.pod };
    let explanation = Explanation::of(ca.explain(request).await?.into_inner());
    if format == Format::Table {
        return Ok(explanation.print(out).map_err(OutputError::Write)?);
    }
    Ok(fields(out, format, &explanation)?)
}

impl Explanation {
    fn of(explained: ExplainResponse) -> Self {
        Self {
            verdict: explained.verdict,
            next_step: explained.next_step,
            findings: explained.findings.into_iter().map(|finding| Finding { level: finding.level, text: finding.text }).collect(),
            latest: explained.latest.as_ref().map(IdentityRow::of),
            refusals: explained.refusals.into_iter().map(RefusalRow::of).collect(),
        }
    }

    fn print(&self, out: &mut impl Write) -> std::io::Result<()> {
        writeln!(out, "{}", self.verdict)?;
        if !self.next_step.is_empty() {
            writeln!(out, "next step: {}", self.next_step)?;
        }
        writeln!(out)?;
        for finding in &self.findings {
            writeln!(out, "{:4}  {}", coloured(&finding.level, &finding.level), finding.text)?;
        }
        if let Some(latest) = &self.latest {
            writeln!(out, "\nlatest certificate: serial {} of {}, valid until {}", latest.serial, latest.spiffe_id, latest.not_after)?;
        }
        if !self.refusals.is_empty() {
            writeln!(out, "\nrefused:")?;
        }
        for refusal in &self.refusals {
            writeln!(out, "{}  {}: {}", refusal.time, refusal.reason, refusal.message)?;
        }
        Ok(())
    }
}
