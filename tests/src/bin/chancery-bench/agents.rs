//! A thousand agents at one CA: how soon all of them have acknowledged a new bundle, and what each costs in memory.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chancery_agent::ca_client::{Anchor, CaClient, LedgerFile, ProxySummary, Remembered, Role, Settings};
use chancery_agent::telemetry::Metrics;
use chancery_ca::attestation::development::DevelopmentIssuer;
use chancery_identity::csr::KeyType;
use chancery_identity::{Serial, SystemClock};
use chancery_proto::chancery::v1::RootState;
use chancery_tests::agent::join_token;
use chancery_tests::ca::{CLUSTER, Ca, TRUST_DOMAIN};
use chancery_tests::lab::Lab;
use chancery_tests::{Result, wait};
use prometheus_client::registry::Registry;
use time::OffsetDateTime;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::fleet::{DISTRUST_DEADLINE_MS, Operator, settled};
use crate::memory::resident_mib;
use crate::report::{Limit, Report};

const AGENTS: usize = 1000;
/// As many are enough to see how long a distrust takes.
const DISTRUSTING: usize = 100;
const HOUR: Duration = Duration::from_secs(3600);
const WITHIN: Duration = Duration::from_secs(120);
const SETTLED: Duration = Duration::from_secs(5);
/// All of them join from one address.
const LIMITS: &str = "\n[limits]\njoins_per_second = 100000\n";
const KIB: f64 = 1024.0;

pub(crate) async fn measure(directory: &Path, report: &mut Report) -> Result<()> {
    let lab = Lab::new()?;
    let data = tempfile::tempdir_in(directory)?;
    let ca = Ca::start_in(&lab, &data.path().join("ca"), HOUR, LIMITS).await?;
    tokio::time::sleep(SETTLED).await;
    let alone = resident_mib(ca.id()?)?;
    let _agents = Agents::join(&lab, &ca, AGENTS).await?;

    let mut operator = Operator::of(&ca).await?;
    let known = all_proven(&mut operator, AGENTS, 1).await?;
    tokio::time::sleep(SETTLED).await;
    #[allow(clippy::cast_precision_loss, reason = "a thousand")]
    let each = (resident_mib(ca.id()?)? - alone) * KIB / AGENTS as f64;
    report.line("ca_rss_per_agent", each, "KiB", Limit::AtMost(64.0))?;

    operator.prepare().await?;
    let start = Instant::now();
    operator.move_root(RootState::Published).await?;
    all_proven(&mut operator, AGENTS, known + 1).await?;
    report.latency("bundle_agents_1000", start.elapsed().as_secs_f64() * 1000.0, "ms", Limit::AtMost(1000.0))?;
    distrust(directory, report).await
}

/// `distrust_100_agents`: from the command to the last agent without the old root, each with a new certificate of its own.
async fn distrust(directory: &Path, report: &mut Report) -> Result<()> {
    let lab = Lab::new()?;
    let data = tempfile::tempdir_in(directory)?;
    let ca = Ca::start_in(&lab, &data.path().join("ca"), HOUR, LIMITS).await?;
    let agents = Agents::join(&lab, &ca, DISTRUSTING).await?;
    let mut operator = Operator::of(&ca).await?;
    let known = all_proven(&mut operator, DISTRUSTING, 1).await?;
    operator.prepare().await?;
    operator.move_root(RootState::Published).await?;
    all_proven(&mut operator, DISTRUSTING, known + 1).await?;
    let before = agents.serials();
    let start = Instant::now();
    let without = operator.distrust().await?;
    all_proven(&mut operator, DISTRUSTING, without).await?;
    agents.have_others_than(&before).await?;
    report.latency("distrust_100_agents", start.elapsed().as_secs_f64() * 1000.0, "ms", Limit::AtMost(DISTRUST_DEADLINE_MS))
}

/// Agents' connections, and what stands for their proxies.
struct Agents {
    clients: Vec<CaClient>,
    _proxies: JoinSet<()>,
}

impl Agents {
    /// So many join.
    async fn join(lab: &Lab, ca: &Ca, count: usize) -> Result<Self> {
        let issuer = ca.issuer()?;
        let mut clients = Vec::with_capacity(count);
        for number in 0..count {
            clients.push(join(lab, ca, &issuer, number)?);
        }
        let mut proxies = JoinSet::new();
        for client in &clients {
            let reachable = client.reachable();
            let joined = async || if *reachable.borrow() { Ok(()) } else { Err(client.problem()) };
            wait::until("every agent has joined", WITHIN, joined).await?;
            proxies.spawn(acknowledge(client.clone()));
        }
        Ok(Self { clients, _proxies: proxies })
    }

    /// Of the certificate that each has.
    fn serials(&self) -> Vec<Option<Serial>> {
        self.clients.iter().map(|client| client.own().borrow().as_ref().map(|own| own.svid.serial())).collect()
    }

    /// Waits until each has another certificate.
    async fn have_others_than(&self, before: &[Option<Serial>]) -> Result<()> {
        wait::until("every agent has a new certificate", WITHIN, async || {
            let old = self.serials().iter().zip(before).filter(|(now, before)| now.is_none() || now == before).count();
            if old == 0 { Ok(()) } else { Err(format!("{old} have not")) }
        })
        .await
    }
}

/// Waits until so many have proven to have this trust state, or a newer one; the newest that one has.
async fn all_proven(operator: &mut Operator, count: usize, least: u64) -> Result<u64> {
    let agents = settled(operator, |agents| agents.len() == count && agents.iter().all(|agent| agent.proven_sequence >= least)).await?;
    Ok(agents.iter().map(|agent| agent.proven_sequence).max().unwrap_or_default())
}

/// An agent's connection to the CA, of a node of its own.
fn join(lab: &Lab, ca: &Ca, issuer: &DevelopmentIssuer, number: usize) -> Result<CaClient> {
    let node = format!("node-{number}");
    let directory = lab.at(&node);
    std::fs::create_dir_all(&directory)?;
    let token_file = directory.join("token");
    std::fs::write(&token_file, issuer.sign(&join_token(&node), OffsetDateTime::now_utc())?.as_bytes())?;
    let settings = Settings {
        trust_domain: TRUST_DOMAIN.parse()?,
        cluster: CLUSTER.into(),
        address: ca.address.to_string(),
        role: Role::Agent,
        token_file,
        anchor: Anchor::BundleFile(ca.bundle()),
        key_type: KeyType::EcdsaP256,
        call_timeout: Duration::from_secs(30),
        renew_from: 0.5,
        tick: Duration::from_secs(1),
    };
    let metrics = Metrics::new(&mut Registry::default());
    let ledger = LedgerFile::in_directory(&directory);
    let (client, _) = CaClient::start(settings, Remembered::default(), ledger, Arc::new(SystemClock), metrics, CancellationToken::new());
    Ok(client)
}

/// Stands for an agent's proxies, which acknowledge every bundle at once.
async fn acknowledge(client: CaClient) {
    let mut trust = client.trust();
    loop {
        let trust_sequence = trust.borrow_and_update().as_ref().map_or(0, |trust| trust.sequence);
        client.set_proxies(ProxySummary { trust_sequence, certificate_entry: u64::MAX, pods_version: 1, ..ProxySummary::default() });
        if trust.changed().await.is_err() {
            return;
        }
    }
}
