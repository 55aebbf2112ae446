//! What an idle CA and an idle agent hold in memory.

use std::path::Path;
use std::time::Duration;

use chancery_tests::Result;
use chancery_tests::agent::Agent;
use chancery_tests::ca::Ca;
use chancery_tests::lab::Lab;
use chancery_tests::mesh::NODE;

use crate::report::{Limit, Report};

/// What a start needs for a moment has been given back by then.
const SETTLED: Duration = Duration::from_secs(5);

pub(crate) async fn measure(directory: &Path, report: &mut Report) -> Result<()> {
    let lab = Lab::new()?;
    let data = tempfile::tempdir_in(directory)?;
    let ca = Ca::start_in(&lab, &data.path().join("ca"), Duration::from_secs(3600), "").await?;
    let agent = Agent::start(&lab, &ca, NODE).await?;
    tokio::time::sleep(SETTLED).await;
    report.line("agent_rss_idle", resident_mib(agent.id()?)?, "MiB", Limit::AtMost(12.0))?;
    report.line("ca_rss_idle", resident_mib(ca.id()?)?, "MiB", Limit::AtMost(40.0))
}

pub(crate) fn resident_mib(id: u32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{id}/status"))?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    Ok(kib.ok_or("the kernel does not say how much memory is resident")? / 1024.0)
}
