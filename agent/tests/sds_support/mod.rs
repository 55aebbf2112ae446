//! What the SDS tests share: a source of certificates that the test turns by hand, the real service on a real socket, and a proxy.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail wherever it likes")]
#![allow(unreachable_pub, reason = "shared by the test files, each a crate of its own")]
#![allow(dead_code, reason = "each test file uses a part of it")]

#[path = "../../../proto/identity/tests/support/mod.rs"]
pub mod pki;
pub mod proxy;

use std::collections::HashMap;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use chancery_agent::sds::{Registry, Server, Settings, Source};
use chancery_agent::svids::accounts::Accounts;
use chancery_agent::svids::{AttachError, Held, ProxySummary, Subscription, SvidState, Token, TokenInfo, WorkloadKey};
use chancery_agent::telemetry::Metrics;
use chancery_identity::{Clock, TrustState, X509Svid};
use pki::{Pki, SetClock};
use proxy::{Proxy, WorldStream};
use tempfile::TempDir;
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Everything that has to happen happens within this time, or the test fails.
pub const DEADLINE: Duration = Duration::from_secs(10);
/// Long enough to see that nothing comes.
pub const QUIET: Duration = Duration::from_millis(150);
pub const DOMAIN: &str = "example.org";
pub const CART: &str = "spiffe://example.org/ns/shop/sa/cart";
const TICK: Duration = Duration::from_millis(10);

/// A source of certificates that does what the test says.
pub struct Stub {
    workloads: Mutex<HashMap<String, (WorkloadKey, TokenInfo)>>,
    svids: Mutex<HashMap<WorkloadKey, watch::Sender<SvidState>>>,
    pub trust: watch::Sender<Option<Arc<TrustState>>>,
    pub ca_reachable: watch::Sender<bool>,
    pub summary: watch::Sender<ProxySummary>,
    accounts: Accounts,
    pub needs_token: bool,
    hold: Arc<()>,
}

impl Stub {
    /// Open streams that hold on to a workload.
    pub fn attached(&self) -> usize {
        Arc::strong_count(&self.hold) - 1
    }

    /// From now on `token` is one of the shop's service account `name`, valid from `issued_at` on for 1,000 s.
    pub fn accept(&self, token: &str, name: &str, issued_at: OffsetDateTime) {
        let info = TokenInfo { id: format!("jti-{token}"), issued_at, expires_at: issued_at + time::Duration::seconds(1000) };
        self.workloads.lock().unwrap().insert(token.to_owned(), (workload(name), info));
    }

    /// Publishes what there is to serve to a workload.
    pub fn publish(&self, name: &str, state: SvidState) {
        self.sender(&workload(name)).send_replace(state);
    }

    /// Publishes a certificate.
    pub fn ready(&self, name: &str, svid: X509Svid) {
        let held = Held { svid: Arc::new(svid), received_at: pki::now(), entry: 1 };
        self.accounts.issued(&workload(name), "cart-0", &held);
        self.publish(name, SvidState::Ready(held));
    }

    fn sender(&self, workload: &WorkloadKey) -> watch::Sender<SvidState> {
        self.svids.lock().unwrap().entry(workload.clone()).or_insert_with(|| watch::Sender::new(SvidState::Pending)).clone()
    }
}

#[async_trait]
impl Source for Stub {
    fn needs_token(&self) -> bool {
        self.needs_token
    }

    async fn attach(&self, token: Option<Token>) -> Result<Subscription, AttachError> {
        let text = token.as_ref().map_or("own", Token::secret);
        let known = self.workloads.lock().unwrap().get(text).cloned();
        let refused = || AttachError::Unauthenticated { reason: "token_signature", message: "its signature does not verify".to_owned() };
        let (workload, info) = known.ok_or_else(refused)?;
        let svid = self.sender(&workload).subscribe();
        Ok(Subscription::new(workload, "cart-0".to_owned(), token.map(|_| info), svid, self.hold.clone()))
    }

    fn trust(&self) -> watch::Receiver<Option<Arc<TrustState>>> {
        self.trust.subscribe()
    }

    fn ca_reachable(&self) -> watch::Receiver<bool> {
        self.ca_reachable.subscribe()
    }

    fn accounts(&self) -> Accounts {
        self.accounts.clone()
    }

    fn set_proxies(&self, summary: ProxySummary) {
        self.summary.send_replace(summary);
    }
}

pub fn workload(name: &str) -> WorkloadKey {
    WorkloadKey { pod_uid: Uuid::from_u128(name.len() as u128), namespace: "shop".to_owned(), service_account: name.to_owned() }
}

/// The service on a socket of its own. Ends with the test.
pub struct Serving {
    pub stub: Arc<Stub>,
    pub registry: Registry,
    pub metrics: Metrics,
    pub clock: Arc<SetClock>,
    pub pki: Pki,
    pub directory: TempDir,
    pub shutdown: CancellationToken,
}

impl Serving {
    pub fn start() -> Self {
        Self::with(true, 100, 100)
    }

    pub fn with(needs_token: bool, max_connections: usize, max_streams: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let metrics = Metrics::new(&mut prometheus_client::registry::Registry::default());
        let stub = Arc::new(Stub {
            workloads: Mutex::default(),
            svids: Mutex::default(),
            trust: watch::Sender::new(None),
            ca_reachable: watch::Sender::new(true),
            summary: watch::Sender::default(),
            accounts: Accounts::default(),
            needs_token,
            hold: Arc::default(),
        });
        stub.accept("token", "cart", pki::now());
        stub.accept("own", "cart", pki::now());
        let serving = Self {
            stub,
            registry: Registry::new(max_streams, metrics.clone()),
            metrics,
            clock: SetClock::at(pki::now()),
            pki: Pki::new("root"),
            directory,
            shutdown: CancellationToken::new(),
        };
        let settings = Settings { socket: serving.socket(), socket_mode: 0o666, max_connections, tick: TICK };
        let server = Server::bind(settings).unwrap();
        let run = server.run(serving.stub.clone(), serving.registry.clone(), serving.clock.clone(), serving.shutdown.clone());
        tokio::spawn(async move { run.await.unwrap() });
        serving
    }

    /// The same with a bundle, and a certificate for the shop's cart.
    pub fn ready() -> Self {
        let serving = Self::start();
        serving.trust(1, &[&serving.pki]);
        serving.stub.ready("cart", serving.pki.svid(CART));
        serving
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("run/sds.sock")
    }

    /// Publishes trust in these roots.
    pub fn trust(&self, sequence: u64, roots: &[&Pki]) {
        self.stub.trust.send_replace(Some(Arc::new(trust(sequence, roots))));
    }

    /// What the CA would be told now.
    pub fn summary(&self) -> ProxySummary {
        self.registry.summary(&self.stub.accounts, self.clock.now())
    }

    /// A proxy that has connected.
    pub async fn proxy(&self) -> Proxy {
        Proxy::connect(&self.socket()).await
    }

    /// The service with a bundle and a certificate, and a proxy.
    pub async fn with_a_proxy() -> (Self, Proxy) {
        let serving = Self::ready();
        let proxy = serving.proxy().await;
        (serving, proxy)
    }

    /// The same with a stream that has accepted the certificate, and the version that it holds.
    pub async fn with_a_certificate() -> (Self, Proxy, WorldStream, String) {
        let (serving, mut proxy) = Self::with_a_proxy().await;
        let mut stream = proxy.world(&["default"]).await;
        let held = stream.accept(&["default"]).await.version_info;
        serving.acknowledged(1).await;
        (serving, proxy, stream, held)
    }

    /// The same with a stream for the bundle and one for the certificate, both accepted.
    pub async fn with_a_bundle_and_a_certificate() -> (Self, Proxy, WorldStream, WorldStream) {
        let (serving, mut proxy) = Self::with_a_proxy().await;
        let (mut bundle, mut leaf) = (proxy.world(&["ROOTCA"]).await, proxy.world(&["default"]).await);
        bundle.accept(&["ROOTCA"]).await;
        leaf.accept(&["default"]).await;
        // Only an acknowledged bundle opens the way for what depends on it.
        serving.acknowledged(2).await;
        (serving, proxy, bundle, leaf)
    }

    /// Waits until so many answers of proxies have been taken in.
    pub async fn acknowledged(&self, acks: u64) {
        eventually("the proxies' answers", || self.metrics.acks.get() == acks).await;
    }

    /// Sets the clock to this part of the test tokens' lives.
    pub fn at_part_of_the_tokens_life(&self, part: f64) {
        self.clock.set(moment(part));
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// This part of the test tokens' lives.
pub fn moment(part: f64) -> OffsetDateTime {
    pki::now() + time::Duration::seconds_f64(1000.0 * part)
}

pub fn trust(sequence: u64, roots: &[&Pki]) -> TrustState {
    let roots = roots.iter().map(|pki| pki.root.certificate.clone()).collect();
    let bundle = chancery_identity::TrustBundle::new(pki::domain(DOMAIN), roots).unwrap();
    TrustState::new(sequence, pki::domain(DOMAIN), [bundle]).unwrap()
}

/// Waits until `condition` holds.
pub async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(DEADLINE, waiting).await.unwrap_or_else(|_| panic!("not in time: {what}"));
}
