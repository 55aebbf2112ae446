//! How long a new workload waits for its first certificate: from opening its SDS stream to the secret.

use std::path::Path;
use std::time::{Duration, Instant};

use chancery_tests::agent::Agent;
use chancery_tests::ca::Ca;
use chancery_tests::lab::Lab;
use chancery_tests::mesh::{NODE, token_request};
use chancery_tests::{Result, secrets};
use time::OffsetDateTime;

use crate::report::{Limit, Report};

const HOUR: Duration = Duration::from_secs(3600);
const WITHIN: Duration = Duration::from_secs(10);
/// The first ones warm caches and connections.
const WARM_UP: usize = 20;

pub(crate) async fn measure(directory: &Path, count: usize, report: &mut Report) -> Result<()> {
    let lab = Lab::new()?;
    let data = tempfile::tempdir_in(directory)?;
    let ca = Ca::start_in(&lab, &data.path().join("ca"), HOUR, "").await?;
    let agent = Agent::start(&lab, &ca, NODE).await?;
    let issuer = ca.issuer()?;
    let mut waits = Vec::with_capacity(count);
    for number in 0..WARM_UP + count {
        let mut request = token_request("cart", HOUR);
        request.pod = format!("cart-{number}");
        let token = issuer.sign(&request, OffsetDateTime::now_utc())?;
        let channel = secrets::connect(&agent.sds_socket).await?;
        let start = Instant::now();
        secrets::fetch_over(channel, Some(&token), WITHIN).await?;
        waits.push(start.elapsed().as_secs_f64() * 1000.0);
    }
    waits.drain(..WARM_UP);
    waits.sort_unstable_by(f64::total_cmp);
    let at = |part: usize| waits.get(waits.len() * part / 100).copied().ok_or("nothing was measured");
    report.latency("first_svid_p50", at(50)?, "ms", Limit::AtMost(3.0))?;
    report.latency("first_svid_p99", at(99)?, "ms", Limit::AtMost(10.0))
}
