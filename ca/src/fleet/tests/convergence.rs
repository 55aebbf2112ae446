//! Who is missing: agents that say what their proxies hold, over sessions, against a ledger that says who holds a certificate.

use chancery_process::moment::moment;
use chancery_proto::chancery::v1::{Convergence, IssueReason, Role};
use rcgen::{CertificateParams, KeyPair, SanType, SerialNumber};

use super::*;
use crate::attestation::testing::watched;
use crate::authority::testing::TestCa;
use crate::ledger::{Issuance, Ledger, Provenance};

const NOTHING: u64 = u64::MAX;
const LEAF: time::Duration = time::Duration::hours(1);
const OWN: time::Duration = time::Duration::hours(24);

/// A ledger, and a CA whose fleet is asked.
struct World {
    place: TestCa,
    ledger: Ledger,
    fleet: Arc<Fleet>,
    ca: Ca,
}

fn uid(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

fn agent_id(number: u128) -> SpiffeId {
    format!("spiffe://example.org/chancery/agent/east/{}", uid(number)).parse().unwrap()
}

fn converged(sequence: u64, pods: &[u128]) -> Convergence {
    Convergence {
        trust_sequence: sequence,
        certificate_entry: NOTHING,
        holders: u32::try_from(pods.len()).unwrap(),
        pods: pods.iter().map(|pod| uid(*pod).as_bytes().to_vec()).collect(),
        pods_version: 1,
        svid_entry: NOTHING,
        ..Convergence::default()
    }
}

fn report(sequence: u64, convergence: Convergence) -> Report {
    Report { trust_sequence: sequence, convergence: Some(convergence), ..Report::default() }
}

fn lag(pod: &str, trust_sequence: u64) -> ProxyLag {
    ProxyLag { proxy: "envoy".into(), pod: pod.into(), trust_sequence, certificate_entry: NOTHING, ..ProxyLag::default() }
}

impl World {
    async fn new() -> Self {
        let place = TestCa::new();
        let (ledger, fleet) = (place.ledger().await, Fleet::new(place.clock.clone()));
        Self { place, ledger, fleet, ca: Ca::new().await }
    }

    fn now(&self) -> OffsetDateTime {
        self.place.clock.now()
    }

    /// The agent of this node gets a certificate of its own.
    async fn joins(&self, agent: u128) -> u64 {
        let certificate = certificate(agent_id(agent).as_str(), self.now(), OWN);
        self.ledger.append(issuance(agent, certificate, IssueReason::Join).into()).await.unwrap()
    }

    /// A pod on this node gets a certificate.
    async fn issues(&self, agent: u128, pod: u128) -> u64 {
        let certificate = certificate("spiffe://example.org/ns/shop/sa/cart", self.now(), LEAF);
        let issuance = issuance(agent, certificate, IssueReason::First);
        let issuance = Issuance { namespace: "shop".into(), pod: format!("cart-{pod}"), pod_uid: Some(uid(pod)), ..issuance };
        self.ledger.append(issuance.into()).await.unwrap()
    }

    /// The agent of this node connects and says how it is.
    fn connects(&self, agent: u128, report: Report) -> Agent {
        let member =
            Member { id: agent_id(agent), cluster: "east".into(), node: format!("node-{agent}"), svid_not_after: self.now() + OWN };
        let hello = Hello { version: "0.1.0".into(), report: Some(report), ..Hello::default() };
        self.ca.attach_with(&self.fleet, member, &hello)
    }

    /// A CA that has just started.
    fn restarts(&mut self) {
        self.fleet = Fleet::new(self.place.clock.clone());
    }

    async fn missing(&self, goal: Goal) -> Missing {
        missing(&self.ledger, &self.fleet, goal).await.unwrap()
    }

    /// Waits for who is missing to be this, each with its name and a part of its sentence.
    async fn misses(&self, goal: Goal, expected: &[(&str, &str)]) {
        let deadline = Instant::now() + SOON;
        loop {
            let missing = self.missing(goal).await;
            let found: Vec<_> = missing.who.iter().map(|one| (one.name.clone(), one.to_string())).collect();
            let is_found = |(name, part): &(&str, &str)| found.iter().any(|(found, text)| found == name && text.contains(part));
            if missing.total() == expected.len() as u64 && expected.iter().all(is_found) {
                return;
            }
            assert!(Instant::now() < deadline, "expected {expected:?}, found {found:#?}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

fn issuance(agent: u128, certificate: Vec<u8>, reason: IssueReason) -> Issuance {
    Issuance {
        certificate: certificate.into(),
        issuing_certificate: [1; 16],
        root: [2; 16],
        role: Role::Agent,
        reason,
        cluster: "east".into(),
        node: format!("node-{agent}"),
        node_uid: Some(uid(agent)),
        namespace: String::new(),
        service_account: String::new(),
        service_account_uid: None,
        pod: String::new(),
        pod_uid: None,
        token_id: String::new(),
        request_id: Uuid::new_v4(),
        trust_sequence: 1,
        sidecar_pod_uid: None,
        provenance: Provenance::Issued,
    }
}

fn certificate(id: &str, from: OffsetDateTime, lifetime: time::Duration) -> Vec<u8> {
    let mut params = CertificateParams::default();
    params.serial_number = Some(SerialNumber::from_slice(&chancery_identity::Serial::generate().unwrap().0));
    (params.not_before, params.not_after) = (from, from + lifetime);
    params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
    params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
}

#[tokio::test]
async fn nobody_counts_before_anything_was_issued() {
    let world = World::new().await;
    assert!(world.missing(Goal::Trust(7)).await.is_empty());
    assert!(world.missing(Goal::Certificates { after_entry: 7 }).await.is_empty());
}

#[tokio::test]
async fn after_a_restart_of_the_ca_whoever_has_not_reported_is_missing() {
    let mut world = World::new().await;
    for node in [1, 2] {
        world.joins(node).await;
        world.issues(node, 10 + node).await;
    }
    let agents = [world.connects(1, report(7, converged(7, &[11]))), world.connects(2, report(7, converged(7, &[12])))];
    assert!(world.missing(Goal::Trust(7)).await.is_empty());
    drop(agents);
    world.restarts();
    let _one = world.connects(1, report(7, converged(7, &[11])));
    let id = agent_id(2).to_string();
    world.misses(Goal::Trust(7), &[(&id, "on node node-2 has not reported since the CA started, and speaks for 1 pods")]).await;
    let _two = world.connects(2, report(7, converged(7, &[12])));
    world.misses(Goal::Trust(7), &[]).await;
}

#[tokio::test]
async fn one_proxy_of_one_agent_that_has_not_acknowledged_is_named_with_its_words() {
    let world = World::new().await;
    world.joins(1).await;
    world.issues(1, 11).await;
    world.issues(1, 12).await;
    let behind = ProxyLag { nack: "no such curve".into(), ..lag("shop/cart-12", 3) };
    let lagging = Report { lagging: vec![behind], lagging_total: 1, ..report(7, converged(3, &[11, 12])) };
    let agent = world.connects(1, lagging);
    let words = "pod shop/cart-12 on node node-1: its proxy envoy has not acknowledged the bundle with sequence 7, but the one with 3; it \
                 refused what it was sent: no such curve";
    world.misses(Goal::Trust(7), &[("shop/cart-12", words)]).await;
    world.misses(Goal::Trust(3), &[]).await;
    let Missing { who, .. } = world.missing(Goal::Trust(7)).await;
    assert_eq!((who[0].kind, &*who[0].nack, &*who[0].node), (MissingKind::Proxy, "no such curve", "node-1"));
    agent.says(agent_message::Message::Report(report(7, converged(7, &[])))).await;
    // The pods are those of before: their version has not changed.
    world.misses(Goal::Trust(7), &[]).await;
}

#[tokio::test]
async fn an_agent_that_left_counts_with_what_it_said_last() {
    let world = World::new().await;
    world.joins(1).await;
    world.issues(1, 11).await;
    let away = ProxyLag { away_since_ms: 1_800_000_000_000, ..lag("shop/cart-11", 3) };
    let agent = world.connects(1, Report { lagging: vec![away], lagging_total: 1, ..report(7, converged(3, &[11])) });
    drop(agent.up);
    timeout(SOON, agent.end).await.unwrap().unwrap();
    world.misses(Goal::Trust(7), &[("shop/cart-11", "away since 2027-01-15T08:00:00Z")]).await;
    world.misses(Goal::Trust(7), &[("shop/cart-11", "(its agent is not connected since ")]).await;
}

#[tokio::test]
async fn an_agent_that_has_not_taken_over_the_bundle_is_missing_itself() {
    let world = World::new().await;
    world.joins(1).await;
    let _agent = world.connects(1, report(6, converged(6, &[])));
    let id = agent_id(1).to_string();
    world.misses(Goal::Trust(7), &[(&id, "has taken over the bundle with sequence 6 and not yet the one with sequence 7")]).await;
}

#[tokio::test]
async fn a_pod_that_its_agent_does_not_speak_for_is_missing_until_its_certificate_has_expired() {
    let world = World::new().await;
    world.joins(1).await;
    world.issues(1, 11).await;
    world.issues(1, 12).await;
    let _agent = world.connects(1, report(7, converged(7, &[12])));
    let words = format!("its agent does not know who has its certificate, which is good until {}", moment(world.now() + LEAF));
    world.misses(Goal::Trust(7), &[("shop/cart-11", &words)]).await;
    world.place.clock.advance(LEAF + time::Duration::SECOND);
    assert!(world.missing(Goal::Trust(7)).await.is_empty());
}

#[tokio::test]
async fn a_pod_that_is_known_to_be_gone_no_longer_counts_nor_do_its_proxies() {
    let mut world = World::new().await;
    let own = world.joins(1).await;
    for pod in [11, 12] {
        world.issues(1, pod).await;
    }
    let behind = |pod: u128| ProxyLag { pod_uid: uid(pod).as_bytes().to_vec(), ..lag(&format!("shop/cart-{pod}"), 3) };
    let lagging = Report { lagging: vec![behind(11), behind(12)], lagging_total: 2, ..report(7, converged(3, &[11, 12])) };
    let goals = [Goal::Trust(7), Goal::Certificates { after_entry: own + 1 }];
    let both = world.connects(1, lagging.clone());
    world.misses(goals[0], &[("shop/cart-11", "not acknowledged"), ("shop/cart-12", "not acknowledged")]).await;
    drop(both);

    let clusters = watched(&[uid(11), uid(12)], &[uid(12)], world.place.clock.clone()).await;
    world.fleet = Fleet::with_clusters(world.place.clock.clone(), clusters);
    let _one = world.connects(1, lagging);
    world.misses(goals[0], &[("shop/cart-12", "not acknowledged")]).await;
    // Of the two certificates, that of the pod that is gone is the old one.
    world.misses(goals[1], &[]).await;
    assert_eq!(world.missing(goals[0]).await.counted, 2, "the agent and one pod");
}

#[tokio::test]
async fn a_lost_node_counts_until_all_that_was_issued_to_it_has_expired() {
    let world = World::new().await;
    world.joins(1).await;
    let id = agent_id(1).to_string();
    world.misses(Goal::Trust(7), &[(&id, "has not reported since the CA started")]).await;
    world.place.clock.advance(OWN + time::Duration::SECOND);
    assert!(world.missing(Goal::Trust(7)).await.is_empty());
}

#[tokio::test]
async fn a_clock_that_was_ahead_and_came_back_has_made_nobody_forgotten() {
    let world = World::new().await;
    world.joins(1).await;
    let id = agent_id(1).to_string();
    world.misses(Goal::Trust(7), &[(&id, "has not reported since the CA started")]).await;
    world.place.clock.advance(2 * OWN);
    assert!(world.missing(Goal::Trust(7)).await.is_empty());
    world.place.clock.advance(-2 * OWN);
    world.misses(Goal::Trust(7), &[(&id, "has not reported since the CA started")]).await;
}

#[tokio::test]
async fn old_certificates_are_missing_by_pod_by_proxy_and_by_agent() {
    let world = World::new().await;
    let own = world.joins(1).await;
    world.issues(1, 11).await;
    let after_entry = world.issues(1, 12).await;
    let goal = Goal::Certificates { after_entry };
    let id = agent_id(1).to_string();
    let old = Convergence { svid_entry: own, ..converged(7, &[11, 12]) };
    let agent = world.connects(1, report(7, old));
    let expected = [("shop/cart-11", "ledger entry 1"), ("shop/cart-12", "ledger entry 2"), (&*id, "ledger entry 0")];
    world.misses(goal, &expected).await;

    let new = [world.joins(1).await, world.issues(1, 11).await, world.issues(1, 12).await];
    let behind = ProxyLag { certificate_entry: 2, ..lag("shop/cart-12", 7) };
    let convergence = Convergence { certificate_entry: 2, svid_entry: new[0], outdated_total: 1, ..converged(7, &[11, 12]) };
    agent.says(agent_message::Message::Report(Report { lagging: vec![behind], ..report(7, convergence) })).await;
    world.misses(goal, &[("shop/cart-12", "has not acknowledged the new certificate, but that of ledger entry 2")]).await;

    let convergence = Convergence { certificate_entry: new[1], svid_entry: own, ..converged(7, &[11, 12]) };
    agent.says(agent_message::Message::Report(report(7, convergence))).await;
    world.misses(goal, &[(&id, "has not yet taken over its own new certificate")]).await;
    let convergence = Convergence { certificate_entry: new[1], svid_entry: new[0], ..converged(7, &[11, 12]) };
    agent.says(agent_message::Message::Report(report(7, convergence))).await;
    world.misses(goal, &[]).await;
}

#[tokio::test]
async fn after_a_restart_of_the_agent_pods_whose_proxies_have_not_come_back_are_missing() {
    let world = World::new().await;
    world.joins(1).await;
    world.issues(1, 11).await;
    drop(world.connects(1, report(7, converged(7, &[11]))));
    let not_back = ProxyLag { not_back: true, certificate_entry: 0, ..lag("shop/cart-11", 0) };
    let convergence = Convergence { certificate_entry: 0, outdated_total: 1, ..converged(0, &[11]) };
    let _agent = world.connects(1, Report { lagging: vec![not_back], lagging_total: 1, ..report(7, convergence) });
    let words = "its proxy envoy has not come back since its agent restarted";
    world.misses(Goal::Trust(7), &[("shop/cart-11", words)]).await;
}

#[tokio::test]
async fn more_than_are_named_still_count_and_names_take_out_of_the_count() {
    let world = World::new().await;
    world.joins(1).await;
    world.issues(1, 11).await;
    let lagging = Report { lagging: vec![lag("shop/cart-11", 3)], lagging_total: 5, ..report(7, converged(3, &[11])) };
    let _agent = world.connects(1, lagging);
    let missing = world.missing(Goal::Trust(7)).await;
    assert_eq!((missing.who.len(), missing.total()), (1, 5));
    let without = |name: &str| missing.clone().without(&[name.to_owned()]).unwrap().total();
    assert_eq!(without("shop/cart-11"), 4);
    assert_eq!((without("node-1"), without(agent_id(1).as_str()), without("node-2")), (0, 0, 5));
    assert_eq!((without("east/shop/cart-11"), without("east/node-1"), without("west/node-1"), without("")), (4, 0, 5, 5));
}

#[tokio::test]
async fn a_name_takes_nobody_out_of_the_count_in_another_cluster() {
    let world = World::new().await;
    world.joins(1).await;
    // A node and a pod of the same names in another cluster.
    let west = "spiffe://example.org/chancery/agent/west/00000000-0000-0000-0000-000000000007";
    let own = Issuance { cluster: "west".into(), ..issuance(1, certificate(west, world.now(), OWN), IssueReason::Join) };
    world.ledger.append(own.into()).await.unwrap();
    let missing = world.missing(Goal::Trust(7)).await;
    let without = |name: &str| missing.clone().without(&[name.to_owned()]);
    for (name, left) in [("east/node-1", west.to_owned()), ("west/node-1", agent_id(1).to_string()), (west, agent_id(1).to_string())] {
        let names: Vec<_> = without(name).unwrap().who.into_iter().map(|one| one.name).collect();
        assert_eq!(names, [left], "without {name}");
    }
    let error = without("node-1").unwrap_err().to_string();
    assert!(error.contains("give east/node-1 or west/node-1"), "{error}");
    assert!(without("shop/cart-11").is_err());
    assert_eq!(without("east/node-2").unwrap().total(), 2);
}

#[tokio::test]
async fn an_agent_too_old_to_report_is_missing_with_all_that_it_serves() {
    let world = World::new().await;
    world.joins(1).await;
    world.issues(1, 11).await;
    let _agent = world.connects(1, Report { trust_sequence: 7, ..Report::default() });
    world.misses(Goal::Trust(7), &[(agent_id(1).as_str(), "is too old to report what its proxies hold (version 0.1.0)")]).await;
}

#[tokio::test]
async fn what_cannot_acknowledge_is_listed_and_not_missing() {
    let world = World::new().await;
    world.joins(1).await;
    world.issues(1, 11).await;
    let unproven = Convergence { unproven: vec![lag("shop/cart-11", 0)], unproven_total: 3, ..converged(7, &[11]) };
    let _agent = world.connects(1, report(7, unproven));
    let missing = world.missing(Goal::Trust(7)).await;
    assert!(missing.is_empty());
    assert_eq!((missing.unproven_total(), &*missing.unproven[0].name), (3, "shop/cart-11"));
    for (except, left) in [("shop/cart-11", 2), ("node-1", 0), (agent_id(1).as_str(), 0), ("node-2", 3)] {
        assert_eq!(missing.clone().without(&[except.to_owned()]).unwrap().unproven_total(), left, "without {except}");
    }
}

#[tokio::test]
async fn the_median_of_the_agents_clocks_is_that_of_the_connected_ones() {
    let world = World::new().await;
    assert_eq!(world.fleet.median_clock_offset(), None);
    let clock = |offset: i64| Report { clock_ms: wire::millis(world.now()) + offset, ..Report::default() };
    let left = world.connects(9, clock(1_000_000));
    drop(left.up);
    timeout(SOON, left.end).await.unwrap().unwrap();
    let _agents = [(1, -86_400_000), (2, -86_400_100), (3, 5)].map(|(node, offset)| world.connects(node, clock(offset)));
    let days = || world.fleet.median_clock_offset().unwrap().as_seconds_f64() / 86_400.0;
    assert!((days() + 1.0).abs() < 0.001, "{}", days());
    world.place.clock.advance(-time::Duration::DAY);
    assert!(days().abs() < 0.001, "{}, with what the clock says now", days());
}
