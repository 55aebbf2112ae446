//! What became of a revocation: watches its CRLs reach everybody who counts, and says whom they cannot reach.

use std::io::Write;
use std::time::{Duration, Instant};

use chancery_process::output::{Format, fields};
use chancery_proto::chancery::v1::revocation_service_client::RevocationServiceClient;
use chancery_proto::chancery::v1::{CheckReachRequest, CheckReachResponse};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::client::{self, CliError, Way};
use crate::output::remark;

/// How often is looked how far it has come.
const LOOK: Duration = Duration::from_millis(50);
/// How many who are missing are named.
const NAMED: usize = 20;

/// A CA that is to revoke something.
pub(crate) type Revocations = RevocationServiceClient<client::Channel>;

#[derive(Debug, Args)]
pub(crate) struct WaitArgs {
    /// How long to wait until everybody has acknowledged the CRLs; exit status 1 if somebody has not by then. `0s` does not wait.
    #[arg(long, default_value = "10s", value_name = "DURATION")]
    wait: humantime::Duration,
}

/// A revocation that is recorded.
#[derive(Debug, Default)]
pub(crate) struct Recorded {
    pub(crate) subject: String,
    pub(crate) entry: u64,
    pub(crate) certificates: u64,
    pub(crate) trust_sequence: u64,
    pub(crate) issuance: &'static str,
    /// Agents that cannot come back, and so get no CRLs.
    pub(crate) cut_off: Vec<String>,
    pub(crate) problem: String,
}

/// As it is printed.
#[derive(Debug, Serialize)]
struct Outcome {
    subject: String,
    entry: u64,
    /// Unexpired certificates on the CRLs by this.
    revoked: u64,
    issuance: &'static str,
    trust_sequence: u64,
    /// Whether everybody who counts has acknowledged the CRLs.
    acknowledged: bool,
    waited_ms: u128,
    counted: u64,
    missing_total: u64,
    missing: Vec<String>,
    unproven_total: u64,
    unproven: Vec<String>,
    not_reached: Vec<String>,
}

pub(crate) async fn connect(way: &Way) -> Result<Revocations, CliError> {
    Ok(RevocationServiceClient::new(client::channel(way).await?))
}

/// Waits until everybody has the CRLs, and prints what was done and what was not.
pub(crate) async fn finish(
    ca: &mut Revocations,
    done: Recorded,
    args: &WaitArgs,
    out: &mut impl Write,
    format: Format,
) -> Result<(), CliError> {
    if !done.problem.is_empty() {
        let (entry, problem) = (done.entry, done.problem);
        return Err(CliError::Failed(format!(
            "it is recorded (ledger entry {entry}), and the CRLs could not be signed yet, which the CA tries again by itself: {problem}"
        )));
    }
    let (begun, wait) = (Instant::now(), *args.wait);
    let request = CheckReachRequest { trust_sequence: done.trust_sequence, except: done.cut_off.clone(), certificate_entry: None };
    let bar = progress();
    let reach = loop {
        let reach = ca.check_reach(request.clone()).await?.into_inner();
        bar.set_length(reach.counted);
        bar.set_position(reach.counted.saturating_sub(reach.missing_total));
        if reach.missing_total == 0 || begun.elapsed() >= wait {
            break reach;
        }
        tokio::time::sleep(LOOK).await;
    };
    bar.finish_and_clear();
    let outcome = outcome(done, reach, begun.elapsed());
    fields(out, format, &outcome)?;
    if outcome.acknowledged || wait.is_zero() {
        return Ok(());
    }
    for one in outcome.missing.iter().take(NAMED) {
        remark(format!("missing: {one}"));
    }
    Err(CliError::Failed(format!(
        "it is recorded, and {} have not acknowledged the CRLs within {}: until they do, they accept what was revoked",
        outcome.missing_total, args.wait
    )))
}

fn outcome(done: Recorded, reach: CheckReachResponse, waited: Duration) -> Outcome {
    let mut not_reached = vec![
        "connections that are open: proxies look at a certificate in the handshake alone; restart the workloads to end these".to_owned(),
    ];
    if reach.unproven_total > 0 {
        not_reached.push(format!("{} proxies that have no validation context from the CA, and so no CRLs", reach.unproven_total));
    }
    let cut_off = done.cut_off.iter();
    not_reached.extend(cut_off.map(|agent| format!("the proxies of {agent}: it is cut off, and they keep the CRLs that they have")));
    Outcome {
        subject: done.subject,
        entry: done.entry,
        revoked: done.certificates,
        issuance: done.issuance,
        trust_sequence: done.trust_sequence,
        acknowledged: reach.missing_total == 0,
        waited_ms: waited.as_millis(),
        counted: reach.counted,
        missing_total: reach.missing_total,
        missing: reach.missing.into_iter().take(NAMED).map(|one| format!("{} {} {}", one.kind, one.name, one.reason)).collect(),
        unproven_total: reach.unproven_total,
        unproven: reach.unproven.into_iter().take(NAMED).collect(),
        not_reached,
    }
}

/// On standard error, if somebody watches.
fn progress() -> ProgressBar {
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} have the CRLs") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(LOOK);
    bar
}
