//! `chancery doctor`: everything that somebody should look at, worst first, each with the next step.

use std::io::Write;

use chancery_process::output::{Format, OutputError, rows};
use chancery_proto::chancery::v1::DiagnoseRequest;
use serde::Serialize;

use crate::client::{CliError, Operator};
use crate::output::coloured;

#[derive(Debug, Serialize)]
struct Finding {
    level: String,
    text: String,
    next_step: String,
}

pub(crate) async fn run(mut ca: Operator, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let found = ca.diagnose(DiagnoseRequest {}).await?.into_inner().findings;
    let findings: Vec<_> =
        found.into_iter().map(|finding| Finding { level: finding.level, text: finding.text, next_step: finding.next_step }).collect();
    if format == Format::Table {
        print(out, &findings).map_err(OutputError::Write)?;
    } else {
        rows(out, format, &["level", "text", "next_step"], &findings)?;
    }
    match findings.iter().filter(|finding| finding.level == "bad").count() {
        0 => Ok(()),
        bad => Err(CliError::Unwell(bad)),
    }
}

fn print(out: &mut impl Write, findings: &[Finding]) -> std::io::Result<()> {
    if findings.is_empty() {
        return writeln!(out, "{}    nothing to look at", coloured("ok", "ok"));
    }
    for Finding { level, text, next_step } in findings {
        writeln!(out, "{:4}  {text}", coloured(level, level))?;
        if !next_step.is_empty() {
            writeln!(out, "      next step: {next_step}")?;
        }
    }
    Ok(())
}
