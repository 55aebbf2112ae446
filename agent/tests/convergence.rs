//! What an agent tells the CA of who holds what: a whole agent with its socket, proxies that connect to it, and the reports that leave it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail wherever it likes")]

#[path = "sds_support/proxy.rs"]
#[allow(dead_code, unreachable_pub, reason = "shared by the test files, each of which uses a part of it")]
mod proxy;
mod support;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use chancery_agent::sds::{Registry, Server, Settings};
use chancery_agent::svids::ProxySummary;
use chancery_proto::chancery::v1 as wire;
use chancery_proto::chancery::v1::ca_message::Message;
use proxy::{Proxy, WorldStream};
use support::{Agent, FakeCa, Pki, Place, SOON, TICK, TokenPlan, eventually};
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = SOON;
const QUIET: Duration = Duration::from_millis(150);
const NOTHING: u64 = u64::MAX;

/// An agent with its socket.
struct Serving {
    agent: Agent,
    socket: PathBuf,
    registry: Registry,
    stop: CancellationToken,
    ended: tokio::task::JoinHandle<()>,
}

impl Serving {
    async fn start(ca: &FakeCa, place: &Place) -> Self {
        let agent = place.start(ca);
        let socket = place.directory.path().join("sds.sock");
        let settings = Settings { socket: socket.clone(), socket_mode: 0o666, max_connections: 100, tick: TICK };
        let (server, registry) = (Server::bind(settings).unwrap(), Registry::new(100, agent.metrics.clone()));
        let stop = CancellationToken::new();
        let run = server.run(Arc::new(agent.svids.clone()), registry.clone(), ca.clock.clone(), stop.clone());
        let ended = tokio::spawn(async move { run.await.unwrap() });
        agent.connected().await;
        Self { agent, socket, registry, stop, ended }
    }

    async fn stop(self) {
        self.stop.cancel();
        self.ended.await.unwrap();
        self.agent.stop().await;
    }

    /// A proxy of this pod.
    async fn proxy(&self, ca: &FakeCa, pod: &TokenPlan) -> Proxy {
        let token = ca.token(pod);
        Proxy::connect(&self.socket).await.with_authorization(Some(&format!("Bearer {}", token.secret())))
    }

    /// A proxy that holds a bundle and a certificate, and the streams that brought them.
    async fn holder(&self, ca: &FakeCa, pod: &TokenPlan) -> Holder {
        let mut proxy = self.proxy(ca, pod).await;
        let (mut bundle, mut leaf) = (proxy.world(&["ROOTCA"]).await, proxy.world(&["default"]).await);
        let bundle_version = bundle.accept(&["ROOTCA"]).await.version_info;
        let leaf_version = leaf.accept(&["default"]).await.version_info;
        Holder { _proxy: proxy, bundle, leaf, bundle_version, leaf_version }
    }
}

struct Holder {
    _proxy: Proxy,
    bundle: WorldStream,
    leaf: WorldStream,
    bundle_version: String,
    leaf_version: String,
}

fn cart() -> TokenPlan {
    TokenPlan::pod(10, "shop", "cart")
}

fn shelf() -> TokenPlan {
    TokenPlan::pod(11, "shop", "shelf")
}

/// The CA publishes a bundle with another root beside its own.
async fn publish(ca: &FakeCa, sequence: u64) {
    let other = Pki::new("other");
    let trust = ca.pki.trust_with(sequence, &[&other]);
    ca.send(Message::Trust(chancery_agent::ca_client::trust::to_wire(&trust))).await;
}

fn last(ca: &FakeCa) -> Option<(wire::Report, wire::Convergence)> {
    let report = ca.behaviour.reports.lock().unwrap().last().cloned()?;
    let convergence = report.convergence.clone()?;
    Some((report, convergence))
}

/// Waits for a report of which `condition` holds.
async fn reported(
    ca: &FakeCa,
    what: &str,
    condition: impl Fn(&wire::Report, &wire::Convergence) -> bool,
) -> (wire::Report, wire::Convergence) {
    let holds = || last(ca).is_some_and(|(report, convergence)| condition(&report, &convergence));
    let deadline = tokio::time::Instant::now() + SOON;
    while !holds() {
        assert!(tokio::time::Instant::now() < deadline, "not reported: {what}; last: {:?}", last(ca));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    last(ca).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trust_state_is_reported_only_when_every_proxy_has_acknowledged_it() {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let serving = Serving::start(&ca, &place).await;
    reported(&ca, "nobody holds anything", |_, c| c.trust_sequence == 1 && c.certificate_entry == NOTHING && c.svid_entry == 1).await;
    let mut one = serving.holder(&ca, &cart()).await;
    let mut two = serving.holder(&ca, &shelf()).await;
    reported(&ca, "two", |_, c| c.holders == 2 && c.trust_sequence == 1 && c.certificate_entry == 2).await;
    publish(&ca, 7).await;
    one.bundle.accept(&["ROOTCA"]).await;
    let (report, _) = reported(&ca, "one of two", |r, c| r.trust_sequence == 7 && r.lagging_total == 1 && c.trust_sequence == 1).await;
    assert_eq!((&*report.lagging[0].pod, report.lagging[0].trust_sequence), ("shop/shelf-0", 1));
    two.bundle.accept(&["ROOTCA"]).await;
    reported(&ca, "both", |r, c| r.lagging_total == 0 && c.trust_sequence == 7).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_reported_in_the_proxys_words_and_leaves_it_behind() {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let serving = Serving::start(&ca, &place).await;
    let mut one = serving.holder(&ca, &cart()).await;
    publish(&ca, 7).await;
    let response = one.bundle.next().await;
    one.bundle.nack(&["ROOTCA"], &response, &one.bundle_version, "no such curve").await;
    let (report, _) =
        reported(&ca, "the refusal", |r, c| r.lagging_total == 1 && r.lagging[0].nack == "no such curve" && c.trust_sequence == 1).await;
    assert_eq!(report.lagging[0].trust_sequence, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_inside_its_back_off_counts_with_what_it_acknowledged_last_until_it_names_the_newest() {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let serving = Serving::start(&ca, &place).await;
    let one = serving.holder(&ca, &cart()).await;
    reported(&ca, "it holds", |_, c| c.holders == 1 && c.trust_sequence == 1).await;
    let Holder { _proxy, bundle, leaf, .. } = one;
    drop(bundle);
    eventually("its stream is gone", || serving.registry.len() == 1).await;
    publish(&ca, 7).await;
    let (report, _) = reported(&ca, "behind", |r, c| r.trust_sequence == 7 && c.trust_sequence == 1 && r.lagging_total == 1).await;
    assert!(report.lagging[0].away_since_ms > 0 && !report.lagging[0].not_back);

    let mut proxy = serving.proxy(&ca, &cart()).await;
    let mut again = proxy.world(&["ROOTCA"]).await;
    let newest = again.accept(&["ROOTCA"]).await.version_info;
    reported(&ca, "back", |r, c| c.trust_sequence == 7 && r.lagging_total == 0 && c.holders == 1).await;
    drop((again, leaf, proxy));
    eventually("all streams are gone", || serving.registry.is_empty()).await;
    reported(&ca, "away with the newest", |_, c| c.trust_sequence == 7 && c.holders == 1).await;
    let mut proxy = serving.proxy(&ca, &cart()).await;
    let mut named = proxy.world_with(&["ROOTCA"], &newest).await;
    named.quiet().await;
    reported(&ca, "what it names is an acknowledgement", |_, c| c.trust_sequence == 7 && c.holders == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_streams_that_a_proxy_lost_one_that_is_back_does_not_speak_for_the_other() {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let serving = Serving::start(&ca, &place).await;
    drop(serving.holder(&ca, &cart()).await);
    eventually("its streams are gone", || serving.registry.is_empty()).await;
    publish(&ca, 7).await;
    let mut proxy = serving.proxy(&ca, &cart()).await;
    let mut leaf = proxy.world(&["default"]).await;
    leaf.accept(&["default"]).await;
    reported(&ca, "its validation context is away", |r, c| r.streams == 1 && c.trust_sequence == 1 && r.lagging_total == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_counts_until_its_last_certificate_has_expired() {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let serving = Serving::start(&ca, &place).await;
    drop(serving.holder(&ca, &cart()).await);
    eventually("its streams are gone", || serving.registry.is_empty()).await;
    publish(&ca, 7).await;
    reported(&ca, "it counts", |_, c| c.trust_sequence == 1 && c.holders == 1).await;
    ca.clock.advance(time::Duration::seconds(3590));
    tokio::time::sleep(QUIET).await;
    reported(&ca, "it still counts", |_, c| c.trust_sequence == 1 && c.holders == 1).await;
    ca.clock.advance(time::Duration::seconds(20));
    let (_, convergence) = reported(&ca, "it is gone", |_, c| c.trust_sequence == 7 && c.holders == 0).await;
    assert!(convergence.pods.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_while_a_session_is_being_opened_is_reported_at_once() {
    let ca = FakeCa::start();
    let opening = ca.behaviour.opening.lock().await;
    let agent = Place::new(&ca).start(&ca);
    eventually("the first report is there", || last(&ca).is_some()).await;
    agent.svids.set_proxies(ProxySummary { streams: 7, ..ProxySummary::default() });
    drop(opening);
    // Otherwise it would go with the next report, which comes in any case after ten seconds.
    tokio::time::timeout(SOON / 4, reported(&ca, "seven streams", |report, _| report.streams == 7)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restart_a_proxy_is_waited_for_until_it_is_back_with_all_that_it_took() {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let serving = Serving::start(&ca, &place).await;
    let held = serving.holder(&ca, &cart()).await;
    reported(&ca, "it holds", |_, c| c.holders == 1 && c.trust_sequence == 1).await;
    serving.stop().await;
    let Holder { bundle_version, leaf_version, .. } = held;

    ca.behaviour.reports.lock().unwrap().clear();
    let serving = Serving::start(&ca, &place).await;
    let waits = |r: &wire::Report, c: &wire::Convergence| {
        c.trust_sequence == 0 && c.certificate_entry == 0 && r.lagging.iter().any(|lag| lag.not_back)
    };
    let (report, _) = reported(&ca, "it has not come back", waits).await;
    assert_eq!((&*report.lagging[0].pod, &*report.lagging[0].proxy), ("shop/cart-0", "cart-envoy"));
    let told = ca.behaviour.reports.lock().unwrap().iter().any(|report| {
        report.convergence.as_ref().is_some_and(|convergence| convergence.pods == [uuid::Uuid::from_u128(10).as_bytes().to_vec()])
    });
    assert!(told, "the pod is named");
    let mut proxy = serving.proxy(&ca, &cart()).await;
    let mut leaf = proxy.world_with(&["default"], &leaf_version).await;
    leaf.quiet().await;
    reported(&ca, "its bundle is not back", |_, c| c.trust_sequence == 0 && c.certificate_entry == 2).await;
    let mut bundle = proxy.world_with(&["ROOTCA"], &bundle_version).await;
    bundle.quiet().await;
    reported(&ca, "it is back", |r, c| c.trust_sequence == 1 && c.certificate_entry == 2 && r.lagging.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_proxy_of_a_pod_is_waited_for_by_itself() {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let serving = Serving::start(&ca, &place).await;
    let _one = serving.holder(&ca, &cart()).await;
    let mut proxy = serving.proxy(&ca, &cart()).await;
    let mut other = proxy.world_of("second-envoy", &["ROOTCA"]).await;
    other.accept(&["ROOTCA"]).await;
    reported(&ca, "two holders", |_, c| c.holders == 2 && c.trust_sequence == 1).await;
    // What is kept of them is written a moment later.
    tokio::time::sleep(QUIET).await;
    drop((other, proxy));
    serving.stop().await;
    let serving = Serving::start(&ca, &place).await;
    let _one = serving.holder(&ca, &cart()).await;
    let behind =
        |r: &wire::Report, c: &wire::Convergence| c.trust_sequence == 0 && r.lagging.len() == 1 && r.lagging[0].proxy == "second-envoy";
    reported(&ca, "the second one is not back", behind).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_counts_as_old_until_the_new_one_is_acknowledged() {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let serving = Serving::start(&ca, &place).await;
    let mut one = serving.holder(&ca, &cart()).await;
    reported(&ca, "the first", |_, c| c.certificate_entry == 2).await;
    let order = wire::Order { order: Some(wire::order::Order::ReissueAll(wire::ReissueAll {})) };
    ca.send(Message::Order(order)).await;
    // Orders are spread a little.
    let mut orders = serving.agent.client.reissue_orders();
    orders.wait_for(|orders| *orders == 1).await.unwrap();
    tokio::time::sleep(QUIET).await;
    ca.clock.advance(time::Duration::seconds(1));
    let response = one.leaf.next().await;
    let (report, _) = reported(&ca, "sent and not acknowledged", |_, c| c.outdated_total == 1 && c.certificate_entry == 2).await;
    assert_eq!(report.lagging_total, 0, "the bundle is another matter");
    one.leaf.ack(&["default"], &response).await;
    reported(&ca, "acknowledged", |_, c| c.outdated_total == 0 && c.certificate_entry == 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_without_a_validation_context_of_ours_is_unproven_and_not_behind() {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let serving = Serving::start(&ca, &place).await;
    let mut proxy = serving.proxy(&ca, &cart()).await;
    let mut leaf = proxy.world(&["default"]).await;
    leaf.accept(&["default"]).await;
    publish(&ca, 7).await;
    let (report, convergence) = reported(&ca, "unproven", |_, c| c.unproven_total == 1 && c.trust_sequence == 7).await;
    assert_eq!((&*convergence.unproven[0].pod, report.lagging_total), ("shop/cart-0", 0));
}
