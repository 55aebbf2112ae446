//! A CA for the agent's tests: real TLS, real gRPC, real certificates; no ledger and no policy. It runs on a runtime of its own, so that it
//! can be killed as a process is.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail wherever it likes")]
#![allow(unreachable_pub, reason = "shared by the test files, each a crate of its own")]
#![allow(dead_code, reason = "each test file uses a part of it")]

mod binary;
pub mod log;
mod pki;
mod service;
mod tokens;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use chancery_agent::ca_client::{self, Anchor, CaClient, LedgerFile, Role};
use chancery_agent::svids::{self, StateFile, Subscription, SvidState, Svids, Token};
use chancery_agent::telemetry::Metrics;
use chancery_identity::csr::KeyType;
use chancery_identity::{Clock, TrustDomain, X509Svid};
use chancery_proto::chancery::v1 as wire;
use prometheus_client::registry::Registry;
use tempfile::TempDir;
use time::OffsetDateTime;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use zeroize::Zeroizing;

pub use pki::Pki;
pub use tokens::{Signer, TokenPlan};

pub const CLUSTER: &str = "east";
/// Where what a test starts listens: an address that no outgoing connection has for its own, so that a port can be given up and taken again.
const LISTENS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
pub const TICK: Duration = Duration::from_millis(20);
pub const GRACE: Duration = Duration::from_secs(300);

pub fn trust_domain() -> TrustDomain {
    "example.org".parse().unwrap()
}

pub fn node_uid() -> Uuid {
    Uuid::from_u128(7)
}

/// A clock that stands until it is set.
#[derive(Debug)]
pub struct SetClock(AtomicI64);

impl SetClock {
    pub fn advance(&self, by: time::Duration) {
        self.0.fetch_add(by.whole_seconds(), Ordering::SeqCst);
    }
}

impl Clock for SetClock {
    fn now(&self) -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(self.0.load(Ordering::SeqCst)).unwrap()
    }
}

/// What the CA was asked and how it shall answer.
#[derive(Debug)]
pub struct Behaviour {
    /// Sizes of the calls.
    pub calls: Mutex<Vec<usize>>,
    /// What was issued so far.
    pub entries: AtomicU64,
    pub joins: AtomicUsize,
    pub renewals: AtomicUsize,
    /// Handshakes that came to nothing.
    pub refused_handshakes: AtomicUsize,
    /// Of the trust state that joining brings.
    pub trust_sequence: AtomicU64,
    /// The tokens that requests came with, in order.
    pub tokens: Mutex<Vec<String>>,
    /// Answer every request with this.
    pub refuse: Mutex<Option<wire::Refusal>>,
    /// Added to the validity of workloads' certificates, in seconds: a clock that is wrong.
    pub skew: AtomicI64,
    /// Of workloads' certificates, in seconds.
    pub lifetime: AtomicI64,
    /// Calls wait while this is locked.
    pub gate: tokio::sync::Mutex<()>,
    /// Sessions are not answered while this is locked.
    pub opening: tokio::sync::Mutex<()>,
    /// Found, and sent down, when a token names a key that is not known.
    pub new_keys: Mutex<Option<wire::ClusterKeys>>,
    pub reports: Mutex<Vec<wire::Report>>,
    /// Calls that told certificates.
    pub told: Mutex<Vec<wire::RecoverRequest>>,
    /// Of the last hello.
    pub capabilities: Mutex<Vec<String>>,
    pub sessions: Mutex<Vec<mpsc::Sender<Result<wire::CaMessage, tonic::Status>>>>,
}

impl Behaviour {
    /// The ledger's entry of the next certificate, from 1 on.
    pub fn next_entry(&self) -> u64 {
        self.entries.fetch_add(1, Ordering::SeqCst) + 1
    }
}

/// The CA.
pub struct FakeCa {
    pub address: SocketAddr,
    pub pki: Arc<Pki>,
    pub signer: Arc<Signer>,
    pub behaviour: Arc<Behaviour>,
    pub clock: Arc<SetClock>,
    running: Option<Runtime>,
}

impl FakeCa {
    pub fn start() -> Self {
        let now = OffsetDateTime::now_utc().unix_timestamp();
        let mut ca = Self {
            address: (LISTENS, 0).into(),
            pki: Arc::new(Pki::new("root")),
            signer: Arc::new(Signer::new("k1")),
            behaviour: Arc::new(Behaviour {
                calls: Mutex::default(),
                entries: AtomicU64::new(0),
                joins: AtomicUsize::new(0),
                renewals: AtomicUsize::new(0),
                refused_handshakes: AtomicUsize::new(0),
                trust_sequence: AtomicU64::new(1),
                tokens: Mutex::default(),
                refuse: Mutex::default(),
                skew: AtomicI64::new(0),
                lifetime: AtomicI64::new(3600),
                gate: tokio::sync::Mutex::default(),
                opening: tokio::sync::Mutex::default(),
                new_keys: Mutex::default(),
                reports: Mutex::default(),
                told: Mutex::default(),
                capabilities: Mutex::default(),
                sessions: Mutex::default(),
            }),
            clock: Arc::new(SetClock(AtomicI64::new(now))),
            running: None,
        };
        ca.resume();
        ca
    }

    /// Starts again on the same port.
    pub fn resume(&mut self) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = std::net::TcpListener::bind(self.address).unwrap();
        self.address = listener.local_addr().unwrap();
        listener.set_nonblocking(true).unwrap();
        let service = service::Service::new(self.pki.clone(), self.signer.clone(), self.behaviour.clone(), self.clock.clone());
        runtime.spawn(service::serve(service, listener));
        self.running = Some(runtime);
    }

    /// Ends as a killed process does.
    pub fn kill(&mut self) {
        self.running.take().unwrap().shutdown_background();
        self.behaviour.sessions.lock().unwrap().clear();
        // The port is free once the runtime has let go of it.
        let deadline = Instant::now() + Duration::from_secs(5);
        while std::net::TcpListener::bind(self.address).is_err() {
            assert!(Instant::now() < deadline, "the killed CA keeps its port");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// A message to every agent.
    pub async fn send(&self, message: wire::ca_message::Message) {
        let sessions = self.behaviour.sessions.lock().unwrap().clone();
        for session in sessions {
            let _ = session.send(Ok(wire::CaMessage { message: Some(message.clone()) })).await;
        }
    }

    pub fn token(&self, plan: &TokenPlan) -> Token {
        Token::new(Zeroizing::new(self.signer.token(plan, self.clock.now())))
    }

    /// Waits until an agent has tried to connect and was not satisfied with what this CA is, from now on.
    pub async fn refused_by_an_agent(&self) {
        let refused = || self.behaviour.refused_handshakes.load(Ordering::SeqCst);
        // One may be under way.
        let before = refused();
        eventually("an agent refuses this CA", || refused() >= before + 2).await;
    }

    pub fn calls(&self) -> Vec<usize> {
        self.behaviour.calls.lock().unwrap().clone()
    }
}

impl Drop for FakeCa {
    fn drop(&mut self) {
        if let Some(runtime) = self.running.take() {
            runtime.shutdown_background();
        }
    }
}

/// What an agent needs around it.
pub struct Place {
    /// In memory, as the state must be.
    pub directory: Arc<TempDir>,
    /// For what a real agent says.
    pub logs: TempDir,
    pub role: Role,
    pub anchor: Anchor,
    pub max_workloads: usize,
}

impl Place {
    pub fn new(ca: &FakeCa) -> Self {
        let directory = Arc::new(tempfile::tempdir_in("/dev/shm").unwrap());
        let bundle = directory.path().join("bundle.pem");
        std::fs::write(&bundle, ca.pki.trust(1).own().to_pem()).unwrap();
        let logs = tempfile::tempdir().unwrap();
        let place = Self { directory, logs, role: Role::Agent, anchor: Anchor::BundleFile(bundle), max_workloads: 1000 };
        place.write_token(&ca.signer.token(&TokenPlan::agent(), ca.clock.now()));
        place
    }

    pub fn token_file(&self) -> PathBuf {
        self.directory.path().join("token")
    }

    pub fn write_token(&self, token: &str) {
        std::fs::write(self.token_file(), format!("{token}\n")).unwrap();
    }

    pub fn state_dir(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    pub fn state_file(&self) -> PathBuf {
        StateFile::path_in(&self.state_dir())
    }

    pub fn start(&self, ca: &FakeCa) -> Agent {
        let clock: Arc<dyn Clock> = ca.clock.clone();
        let metrics = Metrics::new(&mut Registry::default());
        let state_file = StateFile::open(&self.state_dir(), false, trust_domain(), CLUSTER.to_owned()).unwrap();
        let state = state_file.load(clock.now()).unwrap();
        let settings = ca_client::Settings {
            trust_domain: trust_domain(),
            cluster: CLUSTER.to_owned(),
            address: ca.address.to_string(),
            role: self.role,
            token_file: self.token_file(),
            anchor: self.anchor.clone(),
            key_type: KeyType::EcdsaP256,
            call_timeout: Duration::from_secs(5),
            renew_from: 0.5,
            tick: TICK,
        };
        let (stop_ca, stop_svids) = (CancellationToken::new(), CancellationToken::new());
        let (client, ca_task) = CaClient::start(
            settings,
            state.remembered,
            LedgerFile::in_directory(&self.state_dir()),
            clock.clone(),
            metrics.clone(),
            stop_ca.clone(),
        );
        let settings = svids::Settings {
            key_type: KeyType::EcdsaP256,
            renew_from: 0.5,
            grace: GRACE,
            max_workloads: self.max_workloads,
            max_streams: 4,
            max_batch: 64,
            tick: TICK,
            state: Some(state_file),
        };
        let (svids, svids_task) = Svids::start(settings, state.workloads, client.clone(), clock, metrics.clone(), stop_svids.clone());
        Agent { client, svids, metrics, _directory: self.directory.clone(), tasks: (svids_task, ca_task), stops: (stop_svids, stop_ca) }
    }
}

/// A running agent, without its socket.
pub struct Agent {
    pub client: CaClient,
    pub svids: Svids,
    pub metrics: Metrics,
    _directory: Arc<TempDir>,
    tasks: (JoinHandle<()>, JoinHandle<()>),
    stops: (CancellationToken, CancellationToken),
}

impl Agent {
    pub async fn stop(self) {
        self.stops.0.cancel();
        self.tasks.0.await.unwrap();
        self.stops.1.cancel();
        self.tasks.1.await.unwrap();
    }

    pub async fn connected(&self) {
        tokio::time::timeout(SOON, self.client.reachable().wait_for(|reachable| *reachable)).await.expect("the agent connects").unwrap();
    }
}

pub const SOON: Duration = Duration::from_secs(10);

/// Waits until `condition` holds.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {SOON:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Long enough for several ticks and a call.
pub async fn a_while() {
    tokio::time::sleep(Duration::from_millis(200)).await;
}

/// The first certificate, or the one there is.
pub async fn ready(subscription: &mut Subscription) -> Arc<X509Svid> {
    let state = subscription.svid.wait_for(|state| matches!(state, SvidState::Ready(_)));
    match &*tokio::time::timeout(SOON, state).await.expect("a certificate").unwrap() {
        SvidState::Ready(held) => held.svid.clone(),
        other => panic!("{other:?}"),
    }
}

/// A certificate other than `last`.
pub async fn renewed(subscription: &mut Subscription, last: &X509Svid) -> Arc<X509Svid> {
    let state = subscription.svid.wait_for(|state| matches!(state, SvidState::Ready(held) if held.svid.serial() != last.serial()));
    match &*tokio::time::timeout(SOON, state).await.expect("a new certificate").unwrap() {
        SvidState::Ready(held) => held.svid.clone(),
        other => panic!("{other:?}"),
    }
}

/// Whether `svid` is what is being served.
pub fn serves(subscription: &Subscription, svid: &X509Svid) -> bool {
    matches!(&*subscription.svid.borrow(), SvidState::Ready(served) if served.svid.serial() == svid.serial())
}

pub fn contains(file: &Path, needle: &[u8]) -> bool {
    std::fs::read(file).unwrap().windows(needle.len()).any(|window| window == needle)
}
