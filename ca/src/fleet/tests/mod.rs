//! Sessions over channels, with a clock that stands where the test puts it.

mod convergence;
mod ledger;

use std::convert::Infallible;
use std::path::Path;
use std::sync::Mutex as StdMutex;
use std::time::Duration;

use chancery_identity::{SystemClock, TrustState};
use chancery_proto::chancery::v1::{AgentMessage, CaMessage, ReissueAll, agent_message, ca_message, order};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::ReceiverStream;

use super::*;
use crate::attestation::development::{DevelopmentIssuer, JWKS_FILE};
use crate::attestation::{ClusterSettings, Clusters, JwksSource};

#[derive(Debug)]
struct SetClock(StdMutex<OffsetDateTime>);

impl Clock for SetClock {
    fn now(&self) -> OffsetDateTime {
        *self.0.lock().unwrap()
    }
}

const NOW: OffsetDateTime = time::macros::datetime!(2026-11-01 12:00 UTC);
const SOON: Duration = Duration::from_secs(5);

fn fleet() -> (Arc<Fleet>, Arc<SetClock>) {
    let clock = Arc::new(SetClock(StdMutex::new(NOW)));
    (Fleet::new(clock.clone()), clock)
}

fn member(number: usize) -> Member {
    let id = format!("spiffe://example.org/chancery/agent/east/node-{number}").parse().unwrap();
    Member { id, cluster: "east".into(), node: format!("node-{number}"), svid_not_after: NOW + time::Duration::HOUR }
}

fn trust(sequence: u64) -> Arc<TrustState> {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
    params.subject_alt_names = vec![rcgen::SanType::URI("spiffe://example.org".try_into().unwrap())];
    let domain: chancery_identity::TrustDomain = "example.org".parse().unwrap();
    let bundle = chancery_identity::TrustBundle::new(domain.clone(), vec![params.self_signed(&key).unwrap().der().clone()]).unwrap();
    Arc::new(TrustState::new(sequence, domain, [bundle]).unwrap())
}

/// One end of a session's stream: the agent's.
struct Agent {
    up: mpsc::Sender<Result<AgentMessage, Infallible>>,
    down: mpsc::Receiver<CaMessage>,
    end: tokio::task::JoinHandle<SessionEnd>,
}

struct Ca {
    trust: watch::Sender<Arc<TrustState>>,
    clusters: Arc<Clusters>,
    shutdown: CancellationToken,
    max_age: Duration,
    log: ledger::Log,
    _directory: tempfile::TempDir,
}

/// The settings of the cluster `east`, with keys in a file below `directory`.
fn east(directory: &Path) -> ClusterSettings {
    let text = "name = \"east\"\nissuer = \"https://k\"\nservice_accounts = [\"*\"]\njwks = { file = \"jwks\" }";
    let mut settings: ClusterSettings = toml::from_str(text).unwrap();
    settings.jwks = JwksSource::File(directory.join(JWKS_FILE));
    settings
}

impl Ca {
    async fn new() -> Self {
        Self::with(ledger::Log::new(ledger::ORIGIN, 1).await)
    }

    fn with(log: ledger::Log) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let keys = directory.path().join("keys");
        DevelopmentIssuer::open_or_create(&keys).unwrap();
        let clusters = Clusters::new("example.org".parse().unwrap(), vec![east(&keys)], Arc::new(SystemClock)).unwrap();
        let (shutdown, max_age) = (CancellationToken::new(), Duration::from_secs(3600));
        Self { trust: watch::Sender::new(trust(1)), clusters, shutdown, max_age, log, _directory: directory }
    }

    fn attach(&self, fleet: &Arc<Fleet>, member: Member) -> Agent {
        self.attach_with(fleet, member, &Hello { version: "0.1.0".into(), ..Hello::default() })
    }

    fn attach_with(&self, fleet: &Arc<Fleet>, member: Member, hello: &Hello) -> Agent {
        let session = fleet.attach(member, hello).unwrap();
        let sources = Sources {
            trust: self.trust.subscribe(),
            clusters: Arc::clone(&self.clusters),
            ledger: self.log.source(),
            drain_at: Instant::now() + self.max_age,
            shutdown: self.shutdown.clone(),
        };
        let (up, inbound) = mpsc::channel(4);
        let (outbound, down) = mpsc::channel(4);
        Agent { up, down, end: tokio::spawn(session.run(sources, ReceiverStream::new(inbound), outbound)) }
    }
}

impl Agent {
    async fn hears(&mut self) -> ca_message::Message {
        timeout(SOON, self.down.recv()).await.unwrap().unwrap().message.unwrap()
    }

    async fn hears_the_beginning(&mut self) {
        assert!(matches!(self.hears().await, ca_message::Message::Welcome(_)));
        self.hears().await;
        self.hears().await;
    }

    async fn says(&self, message: agent_message::Message) {
        self.up.send(Ok(AgentMessage { message: Some(message) })).await.unwrap();
    }

    async fn ends(self) -> SessionEnd {
        timeout(SOON, self.end).await.unwrap().unwrap()
    }
}

#[tokio::test]
async fn an_agent_is_told_the_trust_and_its_keys_and_every_change() {
    let (fleet, _) = fleet();
    let ca = Ca::new().await;
    let mut agent = ca.attach(&fleet, member(1));
    agent.hears_the_beginning().await;
    ca.trust.send_replace(trust(2));
    let ca_message::Message::Trust(state) = agent.hears().await else { panic!("expected the trust state") };
    assert_eq!(state.sequence, 2);
    assert_eq!(state.bundles[0].x509_authorities.len(), 1);
    assert_eq!(fleet.given_to(&member(1).id), 2);
    let mut settings = ca.clusters.settings();
    settings[0].audiences = vec!["mesh".into()];
    ca.clusters.replace(settings).unwrap();
    assert!(matches!(agent.hears().await, ca_message::Message::ClusterKeys(keys) if keys.audiences == ["mesh"]));
}

#[tokio::test]
async fn a_session_ends_when_its_cluster_is_removed() {
    let (fleet, _) = fleet();
    let ca = Ca::new().await;
    let mut agent = ca.attach(&fleet, member(1));
    agent.hears_the_beginning().await;
    ca.clusters.replace(Vec::new()).unwrap();
    assert_eq!(agent.ends().await, SessionEnd::ClusterRemoved);
}

#[tokio::test]
async fn a_report_is_remembered_with_the_clocks_difference() {
    let (fleet, _) = fleet();
    let mut agent = Ca::new().await.attach(&fleet, member(1));
    agent.hears_the_beginning().await;
    let clock_ms = wire::millis(NOW) + 1500;
    agent.says(agent_message::Message::Report(Report { clock_ms, trust_sequence: 1, workloads: 7, ..Report::default() })).await;
    timeout(SOON, async {
        while fleet.totals(2).workloads == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    let record = &fleet.agents()[0];
    assert_eq!((record.clock_offset_ms, record.connected, record.node.as_str()), (1500, true, "node-1"));
    assert_eq!(fleet.totals(2), Totals { connected: 1, workloads: 7, behind: 1, silent: 1, ..Totals::default() });
}

#[tokio::test]
async fn an_agent_that_left_is_remembered_as_not_connected() {
    let (fleet, _) = fleet();
    let Agent { up, down: _down, end } = Ca::new().await.attach(&fleet, member(1));
    drop(up);
    assert_eq!(timeout(SOON, end).await.unwrap().unwrap(), SessionEnd::Left);
    assert!(!fleet.on_node("east", "node-1").unwrap().connected);
    assert_eq!(fleet.totals(1), Totals { silent: 1, ..Totals::default() });
}

#[tokio::test]
async fn the_newest_session_of_an_agent_counts() {
    let (fleet, _) = fleet();
    let ca = Ca::new().await;
    let older = ca.attach(&fleet, member(1));
    let _newer = ca.attach(&fleet, member(1));
    assert_eq!(older.ends().await, SessionEnd::Replaced);
    assert!(fleet.agents()[0].connected);
}

#[tokio::test]
async fn orders_reach_a_connected_agent_and_nobody_else() {
    let (fleet, _) = fleet();
    let order = Order { order: Some(order::Order::ReissueAll(ReissueAll {})) };
    assert_eq!(fleet.order(&member(1).id, order), Err(FleetError::NotConnected(member(1).id)));
    let mut agent = Ca::new().await.attach(&fleet, member(1));
    agent.hears_the_beginning().await;
    assert!(fleet.order_all(order).is_empty());
    assert!(matches!(agent.hears().await, ca_message::Message::Order(_)));
}

#[tokio::test]
async fn more_orders_than_an_agent_takes_are_refused() {
    let (fleet, _) = fleet();
    let hello = Hello::default();
    let _session = fleet.attach(member(1), &hello).unwrap();
    let order = Order { order: Some(order::Order::ReissueAll(ReissueAll {})) };
    for _ in 0..MAX_ORDERS {
        fleet.order(&member(1).id, order).unwrap();
    }
    assert_eq!(fleet.order(&member(1).id, order), Err(FleetError::Busy(member(1).id)));
}

#[tokio::test]
async fn a_second_hello_ends_the_session() {
    let (fleet, _) = fleet();
    let agent = Ca::new().await.attach(&fleet, member(1));
    agent.says(agent_message::Message::Hello(Hello::default())).await;
    assert!(matches!(agent.ends().await, SessionEnd::Protocol(_)));
}

#[tokio::test]
async fn an_unknown_kind_of_message_is_passed_over() {
    let (fleet, _) = fleet();
    let agent = Ca::new().await.attach(&fleet, member(1));
    agent.up.send(Ok(AgentMessage { message: None })).await.unwrap();
    agent.says(agent_message::Message::Report(Report { workloads: 3, ..Report::default() })).await;
    timeout(SOON, async {
        while fleet.totals(1).workloads == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_session_ends_with_the_age_of_its_connection() {
    let (fleet, _) = fleet();
    let mut ca = Ca::new().await;
    ca.max_age = Duration::from_secs(20);
    let agent = ca.attach(&fleet, member(1));
    assert_eq!(agent.end.await.unwrap(), SessionEnd::Aged);
}

#[tokio::test(start_paused = true)]
async fn a_session_ends_when_the_certificate_it_was_made_with_expires() {
    let (fleet, clock) = fleet();
    let agent = Ca::new().await.attach(&fleet, member(1));
    *clock.0.lock().unwrap() = NOW + time::Duration::HOUR;
    assert_eq!(agent.end.await.unwrap(), SessionEnd::SvidExpired);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_says_nothing_is_let_go() {
    let (fleet, _) = fleet();
    let agent = Ca::new().await.attach(&fleet, member(1));
    assert_eq!(agent.end.await.unwrap(), SessionEnd::Silent);
}

#[tokio::test]
async fn sessions_end_when_the_ca_shuts_down() {
    let (fleet, _) = fleet();
    let ca = Ca::new().await;
    let agent = ca.attach(&fleet, member(1));
    ca.shutdown.cancel();
    assert_eq!(agent.ends().await, SessionEnd::ShuttingDown);
}

#[test]
fn the_agent_that_was_away_longest_makes_room() {
    let (fleet, clock) = fleet();
    for number in 0..MAX_AGENTS {
        *clock.0.lock().unwrap() = NOW + time::Duration::seconds(i64::try_from(number).unwrap());
        drop(fleet.attach(member(number), &Hello::default()).unwrap());
    }
    let _new = fleet.attach(member(MAX_AGENTS), &Hello::default()).unwrap();
    assert_eq!(fleet.agents().len(), MAX_AGENTS);
    assert!(fleet.node_of(&member(0).id).is_none() && fleet.node_of(&member(1).id).is_some());
}

#[test]
fn what_an_agent_says_of_itself_is_kept_short() {
    let (fleet, _) = fleet();
    let lag = chancery_proto::chancery::v1::ProxyLag { nack: "ö".repeat(1000), ..Default::default() };
    let report = Report { lagging: vec![lag; 1000], ..Report::default() };
    let _session = fleet.attach(member(1), &Hello { version: "v".repeat(10_000), report: Some(report), ..Hello::default() }).unwrap();
    let agents = fleet.lock();
    let record = agents.by_id.values().next().unwrap();
    assert_eq!((record.version.len(), record.report.lagging.len(), record.report.lagging[0].nack.len()), (MAX_TEXT, MAX_LAGGING, MAX_TEXT));
}
