//! What an issuance costs the CA: processor time, durable, over mutual TLS, indexing included.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use chancery_agent::ca_client::{CaClient, LedgerFile, Remembered};
use chancery_agent::config::Config;
use chancery_agent::telemetry::Metrics;
use chancery_ca::attestation::development::DevelopmentIssuer;
use chancery_identity::SystemClock;
use chancery_identity::csr::{self, KeyType};
use chancery_proto::chancery::v1::{IssueReason, WorkloadRequest, workload_result::Outcome};
use chancery_tests::agent::Agent;
use chancery_tests::ca::Ca;
use chancery_tests::lab::Lab;
use chancery_tests::mesh::{NODE, token_request};
use chancery_tests::{Result, wait};
use prometheus_client::registry::Registry;
use time::OffsetDateTime;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::Size;
use crate::bare::Bare;
use crate::report::{Limit, Report};

const LIFETIME: Duration = Duration::from_secs(3600);
/// Longer than the longest run.
const TOKEN_LIFETIME: Duration = Duration::from_secs(6 * 3600);
pub(crate) const BATCH: usize = 64;
/// Calls under way at once, each of a batch or of one request.
const BATCH_CALLERS: usize = 16;
const UNARY_CALLERS: usize = 64;
/// Different tokens and CSRs, so that nothing can be remembered from one request to the next but one.
const DISTINCT: usize = 2000;
/// `USER_HZ`, which Linux fixes for `/proc`.
const TICKS_PER_SECOND: f64 = 100.0;
/// One agent plays a thousand.
pub(crate) const LIMITS: &str = "\n[limits]\nrequests_per_second = 1000000\nrequest_burst = 1000000\n";

pub(crate) async fn measure(directory: &Path, size: Size, bare: &Bare, report: &mut Report) -> Result<()> {
    let lab = Lab::new()?;
    let data = tempfile::tempdir_in(directory)?;
    let ca = Ca::start_in(&lab, &data.path().join("ca"), LIFETIME, LIMITS).await?;
    let (client, requests) = client(&lab, &ca).await?;
    drive(&client, &requests, BATCH * BATCH_CALLERS * 4, BATCH).await?;

    let before = bare.issue()?.as_secs_f64();
    let unary = cost(&ca, &client, &requests, size.unary, 1).await?;
    let between = bare.issue()?.as_secs_f64();
    let batched = cost(&ca, &client, &requests, size.batched, BATCH).await?;
    let after = bare.issue()?.as_secs_f64();
    // The machine's speed drifts: each is held against what was bare just before and just after it.
    report.line("issue_cpu_unary", unary * 2.0 / (before + between), "ratio", Limit::AtMost(1.8))?;
    report.line("issue_cpu_batched", batched * 2.0 / (between + after), "ratio", Limit::AtMost(1.3))?;
    report.line("issue_rate", 1.0 / batched, "/s", Limit::AtLeast(9000.0))
}

/// An agent's client and what it asks for.
pub(crate) async fn client(lab: &Lab, ca: &Ca) -> Result<(CaClient, Arc<Vec<WorkloadRequest>>)> {
    Ok((joined(lab, ca).await?, Arc::new(requests(&ca.issuer()?)?)))
}

/// The agent's own client, joined to the CA.
async fn joined(lab: &Lab, ca: &Ca) -> Result<CaClient> {
    let agent = Agent::configure(lab, ca, NODE)?;
    let metrics = Metrics::new(&mut Registry::default());
    let settings = Config::load(agent.config())?.ca_client();
    let ledger = LedgerFile::in_directory(lab.path());
    let (client, _) = CaClient::start(settings, Remembered::default(), ledger, Arc::new(SystemClock), metrics, CancellationToken::new());
    let reachable = client.reachable();
    let joined = async || if *reachable.borrow() { Ok(()) } else { Err(client.problem()) };
    wait::until("the client has joined", Duration::from_secs(20), joined).await?;
    Ok(client)
}

fn requests(issuer: &DevelopmentIssuer) -> Result<Vec<WorkloadRequest>> {
    let now = OffsetDateTime::now_utc();
    let request = |number| {
        let mut pod = token_request("cart", TOKEN_LIFETIME);
        pod.pod = format!("cart-{number}");
        let token = issuer.sign(&pod, now)?.to_string();
        let (csr, _) = csr::generate(KeyType::EcdsaP256, None)?;
        Ok(WorkloadRequest { request_id: String::new(), csr, token, reason: IssueReason::First.into() })
    };
    (0..DISTINCT).map(request).collect()
}

/// Seconds of the CA's processor time for one certificate.
async fn cost(ca: &Ca, client: &CaClient, requests: &Arc<Vec<WorkloadRequest>>, count: usize, batch: usize) -> Result<f64> {
    let before = processor_seconds(ca.id()?)?;
    let issued = drive(client, requests, count, batch).await?;
    // A query waits until the index has caught up: what indexing costs is in the figure.
    ca.ask(&["identity", "list", "--limit", "1", "--node", NODE])?;
    let spent = processor_seconds(ca.id()?)? - before;
    #[allow(clippy::cast_precision_loss, reason = "counts of certificates are far below 2^52")]
    Ok(spent / issued as f64)
}

pub(crate) async fn drive(client: &CaClient, requests: &Arc<Vec<WorkloadRequest>>, count: usize, batch: usize) -> Result<usize> {
    let next = Arc::new(AtomicUsize::new(0));
    let mut callers: JoinSet<Result<()>> = JoinSet::new();
    let concurrent = if batch == 1 { UNARY_CALLERS } else { BATCH_CALLERS };
    for _ in 0..concurrent {
        let (client, requests, next) = (client.clone(), requests.clone(), next.clone());
        callers.spawn(async move {
            loop {
                let first = next.fetch_add(batch, Ordering::Relaxed);
                if first >= count {
                    return Ok(());
                }
                let named = |number: usize| WorkloadRequest {
                    request_id: uuid::Uuid::new_v4().to_string(),
                    ..requests[number % requests.len()].clone()
                };
                for result in client.issue((first..first + batch).map(named).collect()).await? {
                    if let Some(Outcome::Refusal(refusal)) = result.outcome {
                        return Err(refusal.message.into());
                    }
                }
            }
        });
    }
    for outcome in callers.join_all().await {
        outcome?;
    }
    Ok(count.next_multiple_of(batch))
}

/// User and system time so far; fields 14 and 15 of `/proc/PID/stat` (proc(5)).
fn processor_seconds(id: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat"))?;
    // The second field is a name that may contain anything but ends with the last parenthesis.
    let (_, rest) = stat.rsplit_once(") ").ok_or("not in the form of proc(5)")?;
    let ticks = rest.split(' ').skip(11).take(2).map(str::parse::<f64>).sum::<Result<f64, _>>()?;
    Ok(ticks / TICKS_PER_SECOND)
}
