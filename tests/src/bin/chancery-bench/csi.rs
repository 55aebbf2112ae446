//! A node that comes up: 250 pods with a CSI volume each, published at once.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use chancery_tests::Result;
use chancery_tests::agent::Agent;
use chancery_tests::ca::Ca;
use chancery_tests::kubelet::{Kubelet, Pod};
use chancery_tests::lab::Lab;
use chancery_tests::mesh::NODE;
use chancery_tests::node::Node;

use crate::report::{Limit, Report, remark};

const PODS: usize = 250;
/// What a start needs for a moment has been given back by then.
const SETTLED: Duration = Duration::from_secs(5);

/// `csi_first_svids_250`: from a volume being published, when its pod's containers can start, to the pod's first certificate, of the slowest pod.
/// Beside it the same from the kubelet's call on, and the agent's memory for each pod.
pub(crate) async fn measure(directory: &Path, report: &mut Report) -> Result<()> {
    let lab = Lab::new()?;
    let data = tempfile::tempdir_in(directory)?;
    let ca = Ca::start_in(&lab, &data.path().join("ca"), Duration::from_secs(3600), "").await?;
    let Some(node) = Node::boot(&lab).await? else {
        return remark("csi_first_svids_250 is not measured: it needs root, to mount");
    };
    let kubelet = Arc::new(Kubelet::new(&lab, ca.issuer()?)?);
    let mut agent = Agent::configure(&lab, &ca, NODE)?;
    agent.append(&kubelet.section(&lab))?;
    agent.run(&lab).await?;
    kubelet.register().await?;
    tokio::time::sleep(SETTLED).await;
    let idle = agent.resident_kib()?;
    let pods: Vec<_> = (0..PODS).map(|number| Pod::new("cart", number)).collect();
    let started = kubelet.start_pods(&node, &pods).await?;
    let milliseconds = |waited: Duration| waited.as_secs_f64() * 1000.0;
    report.latency("csi_first_svids_250", milliseconds(started.since_published), "ms", Limit::AtMost(1000.0))?;
    let called = milliseconds(started.since_called);
    remark(&format!("{called:.0} ms from the kubelet's call, made for all {PODS} pods at once, to the slowest pod's first certificate"))?;
    tokio::time::sleep(SETTLED).await;
    let each = agent.resident_kib()?.saturating_sub(idle) / PODS;
    remark(&format!("{each} KiB of the agent's memory for each pod: its volume, its certificate and a stream"))
}
