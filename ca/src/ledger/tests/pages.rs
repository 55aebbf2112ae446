//! Pages and watches of made-up ledgers, against a scan of everything that was recorded.

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
