//! How soon everybody has a new bundle and new certificates, and what holding on to so many costs in memory.

use std::path::Path;
use std::time::{Duration, SystemTime};

use chancery_proto::chancery::v1::operator_service_client::OperatorServiceClient;
use chancery_proto::chancery::v1::root_service_client::RootServiceClient;
use chancery_proto::chancery::v1::{
    AgentRecord, DistrustRootRequest, ListAgentsRequest, ListRootsRequest, MoveRootRequest, Overrides, PrepareRootRequest, RootRecord,
    RootState,
};
use chancery_tests::agent::Agent;
use chancery_tests::ca::Ca;
use chancery_tests::lab::Lab;
use chancery_tests::mesh::{NODE, token_request};
use chancery_tests::proxies::{Proxies, Secret};
use chancery_tests::{Result, secrets, wait};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tonic::transport::Channel;

use crate::issue::LIMITS;
use crate::memory::resident_mib;
use crate::report::{Limit, Report};

const HOUR: Duration = Duration::from_secs(3600);
const WITHIN: Duration = Duration::from_secs(60);
/// The budget speaks of a connection and two streams each.
const PROXIES: usize = 500;
const WORKLOADS: usize = 1000;
/// What starting so many needs for a moment has been given back by then.
const SETTLED: Duration = Duration::from_secs(5);
const REASON: &str = "make bench";
const KIB: f64 = 1024.0;
/// When a root that is being distrusted leaves the bundles, whoever still needs it.
pub(crate) const DISTRUST_DEADLINE_MS: f64 = 30_000.0;

pub(crate) async fn measure(directory: &Path, report: &mut Report) -> Result<()> {
    streams(directory, report).await?;
    reissue(directory, report).await?;
    distrust(directory, report).await
}

/// The way to the CA's operators' socket.
pub(crate) struct Operator {
    roots: RootServiceClient<Channel>,
    operator: OperatorServiceClient<Channel>,
}

impl Operator {
    pub(crate) async fn of(ca: &Ca) -> Result<Self> {
        let channel = secrets::connect(&ca.admin_socket()).await?;
        Ok(Self { roots: RootServiceClient::new(channel.clone()), operator: OperatorServiceClient::new(channel) })
    }

    /// A root that waits to be published.
    pub(crate) async fn prepare(&mut self) -> Result<()> {
        self.roots.prepare_root(PrepareRootRequest { reason: REASON.into(), self_signed: false }).await?;
        Ok(())
    }

    pub(crate) async fn move_root(&mut self, to: RootState) -> Result<()> {
        let overrides = Some(Overrides { accept_unproven: true, ..Overrides::default() });
        self.roots.move_root(MoveRootRequest { to: to.into(), reason: REASON.into(), overrides, ..MoveRootRequest::default() }).await?;
        Ok(())
    }

    /// Distrusts the active root, and waits until it is out of the bundles; the sequence of the first trust state without it.
    pub(crate) async fn distrust(&mut self) -> Result<u64> {
        let mut root = self.root(|root| root.state() == RootState::Active).await?;
        let request = DistrustRootRequest { root: root.fingerprint.clone(), reason: REASON.into(), deadline_ms: None };
        self.roots.distrust_root(request).await?;
        while root.state() != RootState::Distrusted {
            tokio::time::sleep(Duration::from_millis(2)).await;
            root = self.root(|one| one.fingerprint == root.fingerprint).await?;
        }
        Ok(root.entry + 1)
    }

    async fn root(&mut self, is_it: impl Fn(&RootRecord) -> bool) -> Result<RootRecord> {
        let roots = self.roots.list_roots(ListRootsRequest {}).await?.into_inner().roots;
        Ok(roots.into_iter().find(is_it).ok_or("there is no such root")?)
    }

    pub(crate) async fn agents(&mut self) -> Result<Vec<AgentRecord>> {
        Ok(self.operator.list_agents(ListAgentsRequest::default()).await?.into_inner().agents)
    }
}

/// `bundle_streams_1000`, and the agent's memory for each stream and workload.
async fn streams(directory: &Path, report: &mut Report) -> Result<()> {
    let lab = Lab::new()?;
    let data = tempfile::tempdir_in(directory)?;
    let ca = Ca::start_in(&lab, &data.path().join("ca"), HOUR, LIMITS).await?;
    let agent = Agent::start(&lab, &ca, NODE).await?;
    let tokens = tokens(&ca, PROXIES)?;
    tokio::time::sleep(SETTLED).await;
    let idle = resident_mib(agent.id()?)?;
    let mut proxies = Proxies::of(&agent.sds_socket);
    for token in &tokens {
        proxies.add(token).await?;
    }
    proxies.served(WITHIN).await?;

    let mut operator = Operator::of(&ca).await?;
    let reached = |agents: &[AgentRecord], least: u64, holders: usize| {
        agents.iter().all(|agent| agent.proven_sequence >= least && agent.holders as usize >= holders)
    };
    let before = settled(&mut operator, |agents| reached(agents, 1, PROXIES)).await?;
    let known = before.iter().map(|agent| agent.proven_sequence).max().unwrap_or_default();
    operator.prepare().await?;
    let start = SystemTime::now();
    operator.move_root(RootState::Published).await?;
    settled(&mut operator, |agents| reached(agents, known + 1, PROXIES)).await?;
    let took = start.elapsed()?.as_secs_f64() * 1000.0;
    report.latency("bundle_streams_1000", took, "ms", Limit::AtMost(250.0))?;

    tokio::time::sleep(SETTLED).await;
    let one_each = resident_mib(agent.id()?)?;
    for token in &tokens {
        proxies.add(token).await?;
    }
    proxies.served(WITHIN).await?;
    tokio::time::sleep(SETTLED).await;
    let two_each = resident_mib(agent.id()?)?;
    #[allow(clippy::cast_precision_loss, reason = "a few hundred")]
    let count = PROXIES as f64;
    let per_stream = (two_each - one_each) * KIB / (2.0 * count);
    let per_workload = (one_each - idle) * KIB / count - 2.0 * per_stream;
    report.line("agent_rss_per_stream", per_stream, "KiB", Limit::AtMost(24.0))?;
    report.line("agent_rss_per_workload", per_workload, "KiB", Limit::AtMost(16.0))
}

/// `reissue_1000`: from the order's arrival at the agent to the last proxy's acknowledgement.
async fn reissue(directory: &Path, report: &mut Report) -> Result<()> {
    let lab = Lab::new()?;
    let data = tempfile::tempdir_in(directory)?;
    let ca = Ca::start_in(&lab, &data.path().join("ca"), HOUR, LIMITS).await?;
    let agent = Agent::start(&lab, &ca, NODE).await?;
    let mut proxies = Proxies::of(&agent.sds_socket);
    for token in tokens(&ca, WORKLOADS)? {
        proxies.add(&token).await?;
    }
    proxies.served(WITHIN).await?;
    let mut operator = Operator::of(&ca).await?;
    operator.prepare().await?;
    operator.move_root(RootState::Published).await?;
    let before = proxies.mark();
    wait::until("everybody has proven the new bundle", WITHIN, async || {
        let mut operator = Operator::of(&ca).await.map_err(|error| error.to_string())?;
        operator.move_root(RootState::Active).await.map_err(|error| error.to_string())
    })
    .await?;
    let last = proxies.accepted(Secret::Certificate, &before, WITHIN).await?;
    let took = (OffsetDateTime::from(last) - ordered_at(&agent.log()?)?).as_seconds_f64();
    report.latency("reissue_1000", took * 1000.0, "ms", Limit::AtMost(1000.0))
}

/// `distrust_1000_streams`: from the command to the last proxy without the old root and with a new certificate. The CA waits no longer for
/// anybody than the deadline, which is the limit.
async fn distrust(directory: &Path, report: &mut Report) -> Result<()> {
    let lab = Lab::new()?;
    let data = tempfile::tempdir_in(directory)?;
    let ca = Ca::start_in(&lab, &data.path().join("ca"), HOUR, LIMITS).await?;
    let agent = Agent::start(&lab, &ca, NODE).await?;
    let mut proxies = Proxies::of(&agent.sds_socket);
    for token in tokens(&ca, PROXIES)? {
        proxies.add(&token).await?;
    }
    proxies.served(WITHIN).await?;
    let mut operator = Operator::of(&ca).await?;
    operator.prepare().await?;
    operator.move_root(RootState::Published).await?;
    let replacement = operator.root(|root| root.state() == RootState::Published).await?.entry + 1;
    let have = |agents: &[AgentRecord], sequence| {
        agents.iter().all(|agent| agent.proven_sequence >= sequence && agent.holders as usize >= PROXIES)
    };
    settled(&mut operator, |agents| have(agents, replacement)).await?;
    let before = proxies.mark();
    let start = SystemTime::now();
    let without = operator.distrust().await?;
    settled(&mut operator, |agents| have(agents, without)).await?;
    let last_bundle = SystemTime::now();
    let last_certificate = proxies.accepted(Secret::Certificate, &before, WITHIN).await?;
    let took = last_bundle.max(last_certificate).duration_since(start)?.as_secs_f64() * 1000.0;
    report.latency("distrust_1000_streams", took, "ms", Limit::AtMost(DISTRUST_DEADLINE_MS))
}

/// When the agent was ordered to issue anew, by its log.
fn ordered_at(log: &str) -> Result<OffsetDateTime> {
    let line = log.lines().find(|line| line.contains("the CA orders every certificate to be issued anew"));
    let time = line.and_then(|line| line.split_whitespace().next()).ok_or("the agent was given no order")?;
    Ok(OffsetDateTime::parse(time, &Rfc3339)?)
}

fn tokens(ca: &Ca, count: usize) -> Result<Vec<String>> {
    let issuer = ca.issuer()?;
    let token = |number| {
        let mut request = token_request("cart", HOUR);
        request.pod = format!("cart-{number}");
        Ok(issuer.sign(&request, OffsetDateTime::now_utc())?.to_string())
    };
    (0..count).map(token).collect()
}

/// Waits until the CA knows this of its agents.
pub(crate) async fn settled(operator: &mut Operator, condition: impl Fn(&[AgentRecord]) -> bool) -> Result<Vec<AgentRecord>> {
    let deadline = tokio::time::Instant::now() + WITHIN;
    loop {
        let agents = operator.agents().await?;
        if !agents.is_empty() && condition(&agents) {
            return Ok(agents);
        }
        if tokio::time::Instant::now() >= deadline {
            let first = agents.first().map(|agent| format!("{} holders at {}: {:?}", agent.holders, agent.proven_sequence, agent.behind));
            return Err(format!("not within {WITHIN:?}; the first agent: {first:?}").into());
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
