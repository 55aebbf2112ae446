use chancery_proto::chancery::v1 as wire;
use proptest::collection::vec;
use proptest::option::weighted;
use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;

use super::*;

/// What is recorded, in small numbers, so that filters meet it often.
#[derive(Clone, Debug)]
struct Spec {
    is_act: bool,
    namespace: u8,
    account: u8,
    pod: u8,
    node: u8,
    sidecar: bool,
    token: u8,
    lifetime_minutes: u8,
    issuer: u8,
}

/// What is asked for: the same small numbers, and moments in minutes since the start.
#[derive(Clone, Debug)]
struct Question {
    spiffe_id: Option<(u8, u8)>,
    /// A namespace, and whether the prefix ends at the segment's edge.
    prefix: Option<(u8, bool)>,
    serial: Option<u8>,
    /// A pod, and how it is named: 0 name, 1 namespace/name, 2 UID.
    pod: Option<(u8, u8, u8)>,
    node: Option<u8>,
    namespace: Option<u8>,
    account: Option<(Option<u8>, u8)>,
    agent: Option<u8>,
    token: Option<u8>,
    since: Option<u8>,
    until: Option<u8>,
    unexpired: bool,
    /// An issuing certificate, and how many bytes of its fingerprint are given.
    issuer: Option<(u8, usize)>,
    /// Likewise.
    root: Option<(u8, usize)>,
    revoked: bool,
}

/// Who is revoked, in the same small numbers.
#[derive(Clone, Debug)]
enum Revoked {
    Serial(u8),
    Account(u8, u8),
    Pod(u8, u8),
    Node(u8),
    Agent(u8),
}

struct Recorded {
    index: u64,
    minute: u64,
    spec: Spec,
}

fn spec() -> impl Strategy<Value = Spec> {
    let names = (0..3_u8, 0..3_u8, 0..6_u8, 0..3_u8);
    (prop::bool::weighted(0.1), names, any::<bool>(), 0..8_u8, 1..40_u8, 0..4_u8).prop_map(
        |(is_act, (namespace, account, pod, node), sidecar, token, lifetime_minutes, issuer)| Spec {
            is_act,
            namespace,
            account,
            pod,
            node,
            sidecar,
            token,
            lifetime_minutes,
            issuer,
        },
    )
}

fn question() -> impl Strategy<Value = Question> {
    let names = (
        weighted(0.2, (0..3_u8, 0..3_u8)),
        weighted(0.2, (0..3_u8, any::<bool>())),
        weighted(0.05, 0..20_u8),
        weighted(0.2, (0..3_u8, 0..6_u8, 0..3_u8)),
    );
    let places = (
        weighted(0.2, 0..3_u8),
        weighted(0.2, 0..3_u8),
        weighted(0.2, (weighted(0.5, 0..3_u8), 0..3_u8)),
        weighted(0.2, 0..3_u8),
        weighted(0.1, 0..8_u8),
    );
    let times = (weighted(0.2, 0..60_u8), weighted(0.2, 0..60_u8), prop::bool::weighted(0.3));
    let authorities = (weighted(0.2, (0..5_u8, 4..33_usize)), weighted(0.2, (0..3_u8, 4..33_usize)), prop::bool::weighted(0.3));
    (names, places, times, authorities).prop_map(
        |(
            (spiffe_id, prefix, serial, pod),
            (node, namespace, account, agent, token),
            (since, until, unexpired),
            (issuer, root, revoked),
        )| {
            Question {
                spiffe_id,
                prefix,
                serial,
                pod,
                node,
                namespace,
                account,
                agent,
                token,
                since,
                until,
                unexpired,
                issuer,
                root,
                revoked,
            }
        },
    )
}

fn revoked() -> impl Strategy<Value = Revoked> {
    prop_oneof![
        (0..20_u8).prop_map(Revoked::Serial),
        (0..3_u8, 0..3_u8).prop_map(|(namespace, account)| Revoked::Account(namespace, account)),
        (0..3_u8, 0..6_u8).prop_map(|(namespace, pod)| Revoked::Pod(namespace, pod)),
        (0..3_u8).prop_map(Revoked::Node),
        (0..3_u8).prop_map(Revoked::Agent),
    ]
}

impl Revoked {
    fn subject(&self) -> Subject {
        match *self {
            Self::Serial(index) => Subject::Serial(chancery_identity::Serial(serial(index.into()).to_be_bytes())),
            Self::Account(namespace, account) => Subject::SpiffeId(spiffe_id(namespace, account).parse().unwrap()),
            Self::Pod(namespace, pod) => Subject::Pod(pod_uid(namespace, pod)),
            Self::Node(node) => Subject::Node { cluster: "east".into(), node: format!("node-{node}") },
            Self::Agent(node) => Subject::Agent(agent(node).parse().unwrap()),
        }
    }

    fn is_about(&self, Recorded { index, spec, .. }: &Recorded) -> bool {
        match *self {
            Self::Serial(serial) => u64::from(serial) == *index,
            Self::Account(namespace, account) => (namespace, account) == (spec.namespace, spec.account),
            Self::Pod(namespace, pod) => (namespace, pod) == (spec.namespace, spec.pod),
            Self::Node(node) => node == spec.node,
            Self::Agent(node) => !spec.sidecar && node == spec.node,
        }
    }
}

fn agent(node: u8) -> String {
    format!("spiffe://example.org/chancery/agent/east/{}", uuid(node.into()))
}

fn spiffe_id(namespace: u8, account: u8) -> String {
    format!("spiffe://example.org/ns/ns{namespace}/sa/sa{account}")
}

fn pod_uid(namespace: u8, pod: u8) -> Uuid {
    uuid(1000 + 10 * u64::from(namespace) + u64::from(pod))
}

/// A fingerprint, of which an entry holds the first half.
fn fingerprint(kind: u8, number: u8) -> [u8; 32] {
    std::array::from_fn(|at| if at == 0 { 16 * kind + number } else { 7 })
}

fn first_half(whole: [u8; 32]) -> [u8; 16] {
    std::array::from_fn(|at| whole[at])
}

impl Spec {
    fn root(&self) -> u8 {
        self.issuer / 2
    }

    fn body(&self, index: u64, now: OffsetDateTime) -> Body {
        if self.is_act {
            return start("an act");
        }
        let lifetime = Duration::from_secs(60 * u64::from(self.lifetime_minutes));
        let pod_uid = pod_uid(self.namespace, self.pod);
        let issuance = Issuance {
            certificate: certificate(&spiffe_id(self.namespace, self.account), serial(index), now, lifetime),
            role: if self.sidecar { Role::Sidecar } else { Role::Agent },
            node: format!("node-{}", self.node),
            node_uid: Some(uuid(u64::from(self.node))),
            namespace: format!("ns{}", self.namespace),
            service_account: format!("sa{}", self.account),
            pod: format!("pod-{}", self.pod),
            pod_uid: Some(pod_uid),
            sidecar_pod_uid: self.sidecar.then_some(pod_uid),
            token_id: format!("token-{}", self.token),
            issuing_certificate: first_half(fingerprint(1, self.issuer)),
            root: first_half(fingerprint(2, self.root())),
            ..issuance(index)
        };
        issuance.into()
    }
}

impl Question {
    fn filter(&self) -> IdentityFilter {
        let minute = |minute: u8| entry::to_millis(START + Duration::from_secs(60 * u64::from(minute)));
        let text = |text: Option<String>| text.unwrap_or_default();
        let filter = wire::IdentityFilter {
            spiffe_id: text(self.spiffe_id.map(|(namespace, account)| spiffe_id(namespace, account))),
            spiffe_id_prefix: text(
                self.prefix.map(|(namespace, edge)| format!("spiffe://example.org/ns/ns{namespace}{}", if edge { "/" } else { "" })),
            ),
            serial: text(self.serial.map(|index| format!("{:032x}", serial(index.into())))),
            pod: text(self.pod.map(|(namespace, pod, form)| match form {
                0 => format!("pod-{pod}"),
                1 => format!("ns{namespace}/pod-{pod}"),
                _ => pod_uid(namespace, pod).to_string(),
            })),
            node: text(self.node.map(|node| format!("node-{node}"))),
            namespace: text(self.namespace.map(|namespace| format!("ns{namespace}"))),
            service_account: text(self.account.map(|(namespace, account)| match namespace {
                Some(namespace) => format!("ns{namespace}/sa{account}"),
                None => format!("sa{account}"),
            })),
            agent: text(self.agent.map(agent)),
            token_id: text(self.token.map(|token| format!("token-{token}"))),
            since_ms: self.since.map_or(0, minute),
            until_ms: self.until.map_or(0, minute),
            unexpired: self.unexpired,
            revoked: self.revoked,
            issuing_certificate: text(self.issuer.map(|(issuer, given)| hex::encode(&fingerprint(1, issuer)[..given]))),
            root: text(self.root.map(|(root, given)| hex::encode(&fingerprint(2, root)[..given]))),
        };
        IdentityFilter::try_from(&filter).unwrap()
    }

    /// Says the same as the filter, of what was recorded.
    fn is_about(&self, Recorded { index, minute, spec }: &Recorded, now_minute: u64) -> bool {
        !spec.is_act
            && self.spiffe_id.is_none_or(|names| names == (spec.namespace, spec.account))
            && self.prefix.is_none_or(|(namespace, _)| namespace == spec.namespace)
            && self.serial.is_none_or(|serial| u64::from(serial) == *index)
            && self.pod.is_none_or(|(namespace, pod, form)| pod == spec.pod && (form == 0 || namespace == spec.namespace))
            && self.node.is_none_or(|node| node == spec.node)
            && self.namespace.is_none_or(|namespace| namespace == spec.namespace)
            && self
                .account
                .is_none_or(|(namespace, account)| account == spec.account && namespace.is_none_or(|namespace| namespace == spec.namespace))
            && self.agent.is_none_or(|node| !spec.sidecar && node == spec.node)
            && self.token.is_none_or(|token| token == spec.token)
            && self.since.is_none_or(|since| *minute >= u64::from(since))
            && self.until.is_none_or(|until| *minute < u64::from(until))
            && self.issuer.is_none_or(|(issuer, _)| issuer == spec.issuer)
            && self.root.is_none_or(|(root, _)| root == spec.root())
            && (!self.unexpired || minute + u64::from(spec.lifetime_minutes) >= now_minute)
    }
}

/// A ledger, and what is in it.
struct Record {
    place: Place,
    ledger: Ledger,
    recorded: Vec<Recorded>,
    /// Each with its act's entry.
    revocations: Vec<(Revoked, u64)>,
    minute: u64,
}

impl Record {
    async fn new() -> Self {
        let place = Place::new();
        let options = LedgerOptions { longest_lifetime: Duration::from_secs(40 * 60), ..place.options() };
        let ledger = Ledger::open(place.store().await, place.clock.clone(), options).await.unwrap();
        Self { place, ledger, recorded: Vec::new(), revocations: Vec::new(), minute: 0 }
    }

    async fn add(&mut self, specs: &[Spec]) {
        let now = self.place.clock.now();
        let bodies = (self.recorded.len() as u64..).zip(specs).map(|(index, spec)| spec.body(index, now)).collect();
        for (index, spec) in self.ledger.append_all(bodies).await.unwrap().into_iter().zip(specs) {
            self.recorded.push(Recorded { index, minute: self.minute, spec: spec.clone() });
        }
    }

    async fn revoke(&mut self, revoked: &Revoked) {
        let change = Change::Revoke { subject: revoked.subject(), until: START + Duration::from_secs(24 * 3600) };
        let index = self.ledger.act("local:uid=0", change, "a test wants it").await.unwrap();
        self.revocations.push((revoked.clone(), index));
        let spec =
            Spec { is_act: true, namespace: 0, account: 0, pod: 0, node: 0, sidecar: false, token: 0, lifetime_minutes: 0, issuer: 0 };
        self.recorded.push(Recorded { index, minute: self.minute, spec });
    }

    fn is_about(&self, question: &Question, recorded: &Recorded) -> bool {
        let is_revoked = || self.revocations.iter().any(|(revoked, entry)| recorded.index < *entry && revoked.is_about(recorded));
        question.is_about(recorded, self.minute) && (!question.revoked || is_revoked())
    }

    fn pass(&mut self, minutes: u8) {
        self.minute += u64::from(minutes);
        self.place.clock.advance(Duration::from_secs(60 * u64::from(minutes)));
    }

    /// Pages through an answer, while `arriving` arrives between the first page and the second.
    async fn check(&mut self, question: &Question, page_size: usize, arriving: &[Spec]) -> TestCaseResult {
        let about = self.recorded.iter().rev().filter(|recorded| self.is_about(question, recorded));
        let expected: Vec<_> = about.map(|recorded| recorded.index).collect();
        let filter = question.filter();
        let mut found = Vec::new();
        let mut token = None;
        loop {
            let page = self.ledger.list(&filter, page_size, token.as_deref()).await.unwrap();
            prop_assert!(page.identities.len() <= page_size);
            prop_assert!(page.next.is_none() || page.identities.len() == page_size, "a short page that is not the last");
            found.extend(page.identities.iter().map(|identity| identity.index));
            if token.is_none() {
                self.add(arriving).await;
            }
            match page.next {
                Some(next) => token = Some(next),
                None => break,
            }
        }
        prop_assert_eq!(&found, &expected);
        self.check_watch(filter, page_size as u64, expected).await
    }

    /// What a watch tells from the entry `from` on, of which `expected` had been recorded before, newest first.
    async fn check_watch(&self, filter: IdentityFilter, from: u64, expected: Vec<u64>) -> TestCaseResult {
        let expected: Vec<_> = expected.into_iter().rev().filter(|index| *index >= from).collect();
        let from = from.min(self.ledger.entries());
        let mut watch = self.ledger.watch(filter, Some(from)).await.unwrap();
        let mut found = Vec::new();
        while found.len() < expected.len() {
            found.extend(watch.next().await.unwrap().into_iter().map(|identity| identity.index));
        }
        prop_assert_eq!(&found[..expected.len()], expected);
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases / 20))]

    #[test]
    fn pages_hold_what_a_scan_of_all_entries_finds(
        batches in vec((0..20_u8, vec(spec(), 1..30), vec(revoked(), 0..2)), 1..6),
        questions in vec((question(), 1..12_usize, vec(spec(), 0..3)), 40),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut record = Record::new().await;
            for (minutes, specs, revoked) in &batches {
                record.pass(*minutes);
                record.add(specs).await;
                for revoked in revoked {
                    record.revoke(revoked).await;
                }
            }
            for (question, page_size, arriving) in &questions {
                record.check(question, *page_size, arriving).await?;
            }
            TestCaseResult::Ok(())
        })?;
    }
}

#[tokio::test]
async fn an_identity_is_shown_by_serial_and_by_entry() {
    let place = Place::new();
    let ledger = place.ledger().await;
    ledger.append_all(vec![start("1"), issuance(7).into()]).await.unwrap();
    let identity = ledger.show(chancery_identity::Serial(serial(7).to_be_bytes())).await.unwrap().unwrap();
    assert_eq!(ledger.show_entry(1).await.unwrap().as_ref(), Some(&identity));
    assert_eq!(ledger.latest_for_pod("shop", "cart-7").await.unwrap().as_ref(), Some(&identity));
    assert_eq!(ledger.latest_for_pod("other", "cart-7").await.unwrap(), None);
    assert_eq!(ledger.show_entry(0).await.unwrap(), None);
    assert_eq!(ledger.show_entry(2).await.unwrap(), None);

    let wire = wire::Identity::from(identity);
    assert_eq!((wire.entry, wire.spiffe_id.as_str()), (1, "spiffe://example.org/ns/shop/sa/cart"));
    assert_eq!(wire.serial, format!("{:032x}", serial(7)));
    assert_eq!((wire.not_before_ms, wire.not_after_ms), (entry::to_millis(START), entry::to_millis(START) + 3_600_000));
    assert_eq!(wire.dns_names, ["cart.shop.svc"]);
    assert_eq!(wire.agent, format!("spiffe://example.org/chancery/agent/east/{}", uuid(100)));
}

#[tokio::test]
async fn a_page_token_of_another_filter_is_refused() {
    let place = Place::new();
    let ledger = place.ledger().await;
    ledger.append_all((0..3).map(|number| issuance(number).into()).collect()).await.unwrap();
    let filter = IdentityFilter { namespace: Some("shop".into()), ..IdentityFilter::default() };
    let token = ledger.list(&filter, 1, None).await.unwrap().next.unwrap();
    assert_eq!(ledger.list(&filter, 1, Some(&token)).await.unwrap().identities[0].index, 1);
    for (filter, token) in [(&IdentityFilter::default(), token.as_str()), (&filter, "garbage"), (&filter, ""), (&filter, "AAAA")] {
        assert!(matches!(ledger.list(filter, 1, Some(token)).await, Err(LedgerError::PageToken(_))), "{token}");
    }
    for size in [0, MAX_PAGE_SIZE + 1] {
        assert!(matches!(ledger.list(&filter, size, None).await, Err(LedgerError::PageSize(_))));
    }
}

/// Every entry has the node's term, and only the oldest the root's: without its help the first page would give up on the way.
#[tokio::test]
async fn a_root_that_few_entries_have_is_found_beside_a_term_that_many_have() {
    let place = Place { segment_bytes: 16 << 20, ..Place::new() };
    let ledger = place.ledger().await;
    ledger.append(Issuance { root: [3; 16], ..issuance(1) }.into()).await.unwrap();
    for _ in 0..51 {
        ledger.append_all(vec![issuance(2).into(); 1000]).await.unwrap();
    }
    let of_node = wire::IdentityFilter { node: "node-1".into(), ..wire::IdentityFilter::default() };
    let filter = IdentityFilter::try_from(&wire::IdentityFilter { root: hex::encode([3; 16]), ..of_node }).unwrap();
    let page = ledger.list(&filter, 10, None).await.unwrap();
    assert_eq!(page.identities.iter().map(|identity| identity.index).collect::<Vec<_>>(), [0]);
    assert_eq!(page.next, None);
}

#[tokio::test]
async fn a_fingerprint_that_fits_more_than_one_certificate_is_refused() {
    let place = Place::new();
    let ledger = place.ledger().await;
    let under = |last: u8| Issuance { root: [2, 2, 2, 2, last, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], ..issuance(last.into()) };
    ledger.append_all(vec![under(1).into(), under(2).into()]).await.unwrap();
    let filter =
        |root: &str| IdentityFilter::try_from(&wire::IdentityFilter { root: root.into(), ..wire::IdentityFilter::default() }).unwrap();
    let error = ledger.list(&filter("02020202"), 10, None).await.unwrap_err();
    assert!(matches!(&error, LedgerError::Ambiguous { field: "root", found, .. } if found.len() == 2), "{error}");
    let found = ledger.list(&filter("02:02:02:02:02"), 10, None).await.unwrap().identities;
    assert_eq!(found.iter().map(|identity| identity.index).collect::<Vec<_>>(), [1]);
    assert_eq!(ledger.list(&filter("03030303"), 10, None).await.unwrap(), Page::default());
}

/// Every entry has the node's term, and only the oldest has the trust state's namespace: the first page gives up on the way.
#[tokio::test]
async fn a_rare_match_is_found_on_a_later_page() {
    let place = Place { segment_bytes: 16 << 20, ..Place::new() };
    let ledger = place.ledger().await;
    let rare = certificate("spiffe://example.org/ns/rare/sa/cart", serial(1), START, Duration::from_secs(3600));
    ledger.append(Issuance { certificate: rare, ..issuance(1) }.into()).await.unwrap();
    for _ in 0..51 {
        ledger.append_all(vec![issuance(2).into(); 1000]).await.unwrap();
    }
    let prefix = Some("spiffe://example.org/ns/rare".into());
    let filter = IdentityFilter { node: Some("node-1".into()), spiffe_id_prefix: prefix, ..IdentityFilter::default() };
    let first = ledger.list(&filter, 10, None).await.unwrap();
    assert!(first.identities.is_empty() && first.next.is_some());
    let second = ledger.list(&filter, 10, first.next.as_deref()).await.unwrap();
    assert_eq!(second.identities.iter().map(|identity| identity.index).collect::<Vec<_>>(), [0]);
    assert_eq!(second.next, None);
}

#[tokio::test]
async fn a_lifetime_that_was_allowed_once_counts_after_it_was_shortened_and_restarted() {
    let place = Place::new();
    let ledger = place.ledger().await;
    ledger.allow_lifetime(Duration::from_secs(30 * 24 * 3600)).await.unwrap();
    let long = certificate("spiffe://example.org/ns/shop/sa/cart", serial(1), START, Duration::from_secs(30 * 24 * 3600));
    ledger.append(Issuance { certificate: long, ..issuance(1) }.into()).await.unwrap();
    ledger.close().await.unwrap();
    drop(ledger);
    place.clock.advance(Duration::from_secs(29 * 24 * 3600));
    let ledger = place.ledger().await;
    let unexpired = IdentityFilter { unexpired: true, ..IdentityFilter::default() };
    assert_eq!(ledger.list(&unexpired, 1, None).await.unwrap().identities.len(), 1);
    place.clock.advance(Duration::from_secs(2 * 24 * 3600));
    assert_eq!(ledger.list(&unexpired, 1, None).await.unwrap(), Page::default());
}

#[test]
fn a_filter_that_cannot_be_read_says_which_field() {
    let field = |filter: wire::IdentityFilter| IdentityFilter::try_from(&filter).unwrap_err().field;
    let filter = wire::IdentityFilter::default;
    assert_eq!(field(wire::IdentityFilter { spiffe_id: "https://example.org".into(), ..filter() }), "spiffe_id");
    assert_eq!(field(wire::IdentityFilter { spiffe_id_prefix: "example.org".into(), ..filter() }), "spiffe_id_prefix");
    assert_eq!(field(wire::IdentityFilter { serial: "12".into(), ..filter() }), "serial");
    assert_eq!(field(wire::IdentityFilter { pod: "a/b/c".into(), ..filter() }), "pod");
    assert_eq!(field(wire::IdentityFilter { service_account: "/a".into(), ..filter() }), "service_account");
    assert_eq!(field(wire::IdentityFilter { agent: "node-1".into(), ..filter() }), "agent");
    assert_eq!(field(wire::IdentityFilter { issuing_certificate: "010203".into(), ..filter() }), "issuing_certificate");
    assert_eq!(field(wire::IdentityFilter { root: "01020304g".into(), ..filter() }), "root");
    let colons = "01:00:00:00:00:00:00:00:00:00:00:00:00:00:00:07";
    let parsed = IdentityFilter::try_from(&wire::IdentityFilter { serial: colons.into(), ..filter() }).unwrap();
    assert_eq!(parsed.serial, Some(chancery_identity::Serial(serial(7).to_be_bytes())));
}

#[tokio::test]
async fn an_identity_stands_by_its_dates_its_successor_and_what_signed_it() {
    let place = Place::new();
    let ledger = place.ledger().await;
    let own = |name: &str| {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    };
    let (root, issuer) = (own("the root"), own("an issuer"));
    let half = |der: &[u8]| first_half(chancery_identity::Fingerprint::of(&rustls_pki_types::CertificateDer::from(der)).0);
    let under = |number| Issuance { root: half(&root), issuing_certificate: half(&issuer), ..issuance(number) };
    let another_pod = Issuance { pod_uid: Some(uuid(9)), ..under(2) };
    let own_svid = |number| Issuance { reason: entry::IssueReason::AgentRenewal, pod_uid: None, ..under(number) };
    let authority = |der: &[u8], root| Body::Authority(wire::AuthorityCertificate { certificate: der.to_vec(), root });
    let bodies = [authority(&root, true), authority(&issuer, false)].into_iter();
    let issuances = [under(1), another_pod, Issuance { pod_uid: Some(uuid(1)), ..under(3) }, issuance(4), own_svid(5), own_svid(6)];
    ledger.append_all(bodies.chain(issuances.map(Body::from)).collect()).await.unwrap();
    let standing = async |index| ledger.standing(&ledger.show_entry(index).await.unwrap().unwrap()).await.unwrap();

    let first = standing(2).await;
    assert_eq!(first.root.as_ref().map(|root| root.subject.as_str()), Some("the root"));
    assert_eq!(first.issuing_certificate.as_ref().map(|issuer| issuer.subject.as_str()), Some("an issuer"));
    assert_eq!((first.begun, first.expired, first.superseded_by), (true, false, Some(4)));
    assert_eq!((standing(3).await.superseded_by, standing(4).await.superseded_by), (None, None));
    assert_eq!((standing(5).await.root, standing(5).await.issuing_certificate), (None, None));
    assert_eq!((standing(6).await.superseded_by, standing(7).await.superseded_by), (Some(7), None));
    place.clock.set(START - Duration::from_secs(1));
    assert!(!standing(2).await.begun);
    let change = Change::Revoke { subject: Subject::Pod(uuid(1)), until: START + Duration::from_secs(3600) };
    let act = ledger.act("local:uid=0", change, "a test wants it").await.unwrap();
    assert_eq!(standing(2).await.revoked.map(|revocation| revocation.entry), Some(act));
    assert_eq!(standing(3).await.revoked, None);
    place.clock.set(START + Duration::from_secs(3601));
    assert!(standing(2).await.expired);
}
