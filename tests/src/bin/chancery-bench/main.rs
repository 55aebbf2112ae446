//! `make bench`: the design's budgets, measured on the real binaries in one run.
//!
//! Prints `name value unit limit ok|short|noisy` for each line, and writes `target/bench/report.json`. Costs are ratios to what the same
//! machine needs for the bare cryptography in the same run. Exit status 1 if a line is short. `QUICK=1` ends within five minutes. Arguments
//! name the parts to measure; without any, it is all of them.

mod agents;
mod bare;
mod csi;
mod fleet;
mod issue;
mod ledger;
mod memory;
mod report;
mod svid;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use chancery_tests::{Result, tools};

use report::Report;

/// How much is done.
#[derive(Clone, Copy)]
struct Size {
    first_svids: usize,
    batched: usize,
    unary: usize,
    ledger_entries: u64,
}

const FULL: Size = Size { first_svids: 1000, batched: 1_000_000, unary: 50_000, ledger_entries: 10_000_000 };
const QUICK: Size = Size { first_svids: 300, batched: 60_000, unary: 10_000, ledger_entries: 300_000 };

const PARTS: [&str; 7] = ["memory", "svid", "csi", "fleet", "agents", "issue", "ledger"];

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    match runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(measure())) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let _ = writeln!(io::stderr(), "bench: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn measure() -> Result<bool> {
    let asked: Vec<String> = std::env::args().skip(1).collect();
    if let Some(unknown) = asked.iter().find(|part| !PARTS.contains(&part.as_str())) {
        return Err(format!("there is no part {unknown}; the parts are {}", PARTS.join(", ")).into());
    }
    let wanted = |part: &str| asked.is_empty() || asked.iter().any(|asked| asked == part);
    let size = if std::env::var_os("QUICK").is_some_and(|quick| quick == "1") { QUICK } else { FULL };
    let directory = directory()?;
    let bare = bare::Bare::new()?;
    let mut report = Report::new(&bare::Costs::measure(&bare, &directory)?);
    if wanted("memory") {
        memory::measure(&directory, &mut report).await?;
    }
    if wanted("svid") {
        svid::measure(&directory, size.first_svids, &mut report).await?;
    }
    if wanted("csi") {
        csi::measure(&directory, &mut report).await?;
    }
    if wanted("fleet") {
        fleet::measure(&directory, &mut report).await?;
    }
    if wanted("agents") {
        agents::measure(&directory, &mut report).await?;
    }
    if wanted("issue") {
        issue::measure(&directory, size, &bare, &mut report).await?;
    }
    if wanted("ledger") {
        ledger::measure(&directory, size.ledger_entries, &mut report).await?;
    }
    report.write(&directory.join("report.json"))?;
    Ok(report.good())
}

/// On a disk, so that what must be durable costs what it costs.
fn directory() -> Result<PathBuf> {
    let directory = tools::source().join("target/bench");
    std::fs::create_dir_all(&directory)?;
    Ok(directory.canonicalize()?)
}
