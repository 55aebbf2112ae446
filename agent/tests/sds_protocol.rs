//! The protocol without I/O: whatever happens in whatever order, a proxy is sent what it may have and lacks, and nothing else.

#![allow(clippy::unwrap_used, reason = "a test may fail wherever it likes")]

mod sds_support;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, LazyLock};

use chancery_agent::sds::secret::{Secret, Version};
use chancery_agent::sds::stream::{Answer, Offer, ProtocolError, Push, Standing, StreamState, Variant};
use chancery_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};
use chancery_proto::google::rpc;
use proptest::prelude::*;
use sds_support::pki::Pki;
use sds_support::{CART, trust};

const NAMES: [&str; 6] =
    ["default", "ROOTCA", CART, "spiffe://example.org", "spiffe://example.org/ns/shop/sa/other", "spiffe://elsewhere.org"];
/// The first so many of them are the workload's own.
const OWN: usize = 4;

struct Secrets {
    certificates: Vec<Arc<Secret>>,
    bundles: Vec<Arc<Secret>>,
}

static SECRETS: LazyLock<Secrets> = LazyLock::new(|| {
    let pkis: Vec<_> = (0..3).map(|number| Pki::new(&format!("root {number}"))).collect();
    Secrets {
        certificates: pkis.iter().map(|pki| Arc::new(Secret::certificate(Arc::new(pki.svid(CART))))).collect(),
        bundles: pkis.iter().map(|pki| Arc::new(Secret::bundle(Arc::new(trust(1, &[pki]))))).collect(),
    }
});

#[derive(Clone, Debug)]
enum Act {
    Certificate(Option<usize>),
    Bundle(Option<usize>),
    Gate(bool),
    Subscribe(usize),
    Unsubscribe(usize),
    Accept,
    Refuse,
    AnswerAgain,
    Reconnect,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => proptest::option::weighted(0.9, 0..3_usize).prop_map(Act::Certificate),
        3 => proptest::option::weighted(0.9, 0..3_usize).prop_map(Act::Bundle),
        1 => any::<bool>().prop_map(Act::Gate),
        2 => (0..NAMES.len()).prop_map(Act::Subscribe),
        1 => (0..NAMES.len()).prop_map(Act::Unsubscribe),
        5 => Just(Act::Accept),
        2 => Just(Act::Refuse),
        1 => Just(Act::AnswerAgain),
        1 => Just(Act::Reconnect),
    ]
}

/// A proxy that obeys the protocol, the secrets that exist, and the state under test.
struct Model {
    variant: Variant,
    state: StreamState,
    certificate: Option<usize>,
    bundle: Option<usize>,
    gate: bool,
    /// Asked for on this stream.
    names: BTreeSet<usize>,
    /// Of these, the ones that no response has carried since the proxy asked for them anew.
    wanted: BTreeSet<usize>,
    /// What the proxy has under each name, and the `version_info` of what it accepted last.
    holds: BTreeMap<usize, Version>,
    accepted: Option<Version>,
    accepted_names: BTreeSet<usize>,
    /// What of that the proxy has said in an answer that counts: one to the newest response.
    told: BTreeMap<usize, Version>,
    told_accepted: Option<Version>,
    unanswered: VecDeque<Push>,
    answered: Option<u64>,
    started: bool,
    /// Sent last on this stream, whatever became of it: as a whole, and under each name.
    offered: Option<Version>,
    sent: BTreeMap<usize, Version>,
    refused: BTreeSet<Version>,
}

impl Model {
    fn new(variant: Variant) -> Self {
        Self {
            variant,
            state: StreamState::new(variant),
            certificate: None,
            bundle: None,
            gate: true,
            names: BTreeSet::new(),
            wanted: BTreeSet::new(),
            holds: BTreeMap::new(),
            accepted: None,
            accepted_names: BTreeSet::new(),
            told: BTreeMap::new(),
            told_accepted: None,
            unanswered: VecDeque::new(),
            answered: None,
            started: false,
            offered: None,
            sent: BTreeMap::new(),
            refused: BTreeSet::new(),
        }
    }

    fn act(&mut self, act: &Act) {
        match act {
            Act::Certificate(index) => self.certificate = *index,
            Act::Bundle(index) => self.bundle = *index,
            Act::Gate(open) => self.gate = *open,
            Act::Subscribe(name) => self.subscribe(*name),
            Act::Unsubscribe(name) => self.unsubscribe(*name),
            Act::Accept => self.answer(false),
            Act::Refuse => self.answer(true),
            Act::AnswerAgain => self.answer_again(),
            Act::Reconnect => self.reconnect(),
        }
    }

    fn subscribe(&mut self, name: usize) {
        if self.variant == Variant::World && self.names.contains(&name) {
            return;
        }
        self.settle();
        self.names.insert(name);
        self.wanted.insert(name);
        self.holds.remove(&name);
        self.told.remove(&name);
        self.say(DeltaDiscoveryRequest { resource_names_subscribe: vec![NAMES[name].into()], ..Default::default() });
    }

    fn unsubscribe(&mut self, name: usize) {
        if !self.names.contains(&name) {
            return;
        }
        self.settle();
        self.names.remove(&name);
        self.wanted.remove(&name);
        self.holds.remove(&name);
        self.told.remove(&name);
        self.sent.remove(&name);
        // What a proxy said of several names together is not held against it when it has dropped one.
        self.told_accepted = None;
        self.say(DeltaDiscoveryRequest { resource_names_unsubscribe: vec![NAMES[name].into()], ..Default::default() });
    }

    /// With one version for all, a proxy answers what it was sent before it changes its names.
    fn settle(&mut self) {
        while self.variant == Variant::World && !self.unanswered.is_empty() {
            self.answer(false);
        }
    }

    /// Says the same in the protocol of the stream; no answer is in it.
    fn say(&mut self, delta: DeltaDiscoveryRequest) {
        let nonce = self.answered.map(|nonce| nonce.to_string()).unwrap_or_default();
        let answer = match self.variant {
            Variant::World => self.state.on_world(self.world_request(nonce, None)),
            Variant::Delta => self.state.on_delta(delta),
        };
        self.started = true;
        assert_eq!(answer.unwrap(), Answer::None);
    }

    fn world_request(&self, response_nonce: String, error_detail: Option<rpc::Status>) -> DiscoveryRequest {
        DiscoveryRequest {
            version_info: self.accepted.map(|version| version.to_string()).unwrap_or_default(),
            resource_names: self.names.iter().map(|name| NAMES[*name].to_owned()).collect(),
            response_nonce,
            error_detail,
            ..DiscoveryRequest::default()
        }
    }

    fn answer(&mut self, refuse: bool) {
        let Some(push) = self.unanswered.pop_front() else { return };
        self.answered = Some(push.nonce);
        let error_detail = refuse.then(|| rpc::Status { code: 13, message: "no".to_owned() });
        for (name, secret) in &push.resources {
            if refuse {
                self.refused.extend([push.version, secret.version()]);
            } else {
                self.holds.insert(index_of(name), secret.version());
                let newest = !self.unanswered.iter().any(|push| push.resources.iter().any(|(newer, _)| newer == name));
                if newest && !self.wanted.contains(&index_of(name)) {
                    self.told.insert(index_of(name), secret.version())
                } else {
                    self.told.remove(&index_of(name))
                };
            }
        }
        if !refuse {
            self.accepted = Some(push.version);
            self.accepted_names = self.names.clone();
            self.told_accepted = self.accepted.filter(|_| self.unanswered.is_empty());
        }
        let response_nonce = push.nonce.to_string();
        let answer = match self.variant {
            Variant::World => self.state.on_world(self.world_request(response_nonce, error_detail)),
            Variant::Delta => self.state.on_delta(DeltaDiscoveryRequest { response_nonce, error_detail, ..Default::default() }),
        };
        let counts = self.variant == Variant::World && self.unanswered.is_empty();
        match answer.unwrap() {
            Answer::None => assert!(!counts, "the answer to the newest response was ignored"),
            Answer::Ack => assert!(!refuse),
            Answer::Nack(words) => assert!(refuse && words == "no"),
        }
    }

    /// An answer that was given before changes nothing, even if it is another one now.
    fn answer_again(&mut self) {
        let Some(nonce) = self.answered else { return };
        let before: Vec<_> = self.state.names().map(|name| (name.name.to_owned(), name.held)).collect();
        let error_detail = Some(rpc::Status::default());
        let answer = match self.variant {
            Variant::World => self.state.on_world(self.world_request(nonce.to_string(), error_detail)),
            Variant::Delta => {
                self.state.on_delta(DeltaDiscoveryRequest { response_nonce: nonce.to_string(), error_detail, ..Default::default() })
            }
        };
        assert_eq!(answer.unwrap(), Answer::None);
        assert_eq!(self.state.names().map(|name| (name.name.to_owned(), name.held)).collect::<Vec<_>>(), before);
    }

    fn reconnect(&mut self) {
        self.state = StreamState::new(self.variant);
        self.unanswered.clear();
        self.answered = None;
        self.offered = None;
        self.sent.clear();
        self.wanted = self.names.iter().copied().filter(|name| !self.holds.contains_key(name)).collect();
        if self.accepted_names != self.names || self.wanted.iter().any(|name| *name < OWN) {
            // One version stands for all names. A proxy that asks for others now, or has lost one, has none for these.
            self.accepted = None;
        }
        (self.told, self.told_accepted) = (self.holds.clone(), self.accepted);
        let versions = self.names.iter().filter_map(|name| Some((NAMES[*name].to_owned(), self.holds.get(name)?.to_string())));
        self.say(DeltaDiscoveryRequest {
            resource_names_subscribe: self.names.iter().map(|name| NAMES[*name].to_owned()).collect(),
            initial_resource_versions: versions.collect(),
            ..Default::default()
        });
    }

    /// Looks for a response, twice: the second look must find nothing new.
    fn poll(&mut self) -> bool {
        let Some(push) = self.look() else { return false };
        self.check(&push);
        for (name, secret) in &push.resources {
            // Of two responses under way only the answer to the newer one is heard.
            if self.unanswered.iter().any(|push| push.resources.iter().any(|(older, _)| older == name)) {
                self.told.remove(&index_of(name));
                self.told_accepted = None;
            }
            self.wanted.remove(&index_of(name));
            self.sent.insert(index_of(name), secret.version());
        }
        self.offered = Some(push.version);
        self.unanswered.push_back(push);
        assert!(self.look().is_none(), "sent twice");
        true
    }

    fn look(&mut self) -> Option<Push> {
        let offer = Offer {
            certificate: self.certificate.map(|index| &SECRETS.certificates[index]),
            bundle: self.bundle.map(|index| &SECRETS.bundles[index]),
            certificate_may_change: self.gate,
        };
        self.state.poll(&offer).push
    }

    fn check(&self, push: &Push) {
        assert!(!push.resources.is_empty(), "an empty response");
        let asked_anew = push.resources.iter().any(|(name, _)| self.wanted.contains(&index_of(name)));
        if self.variant == Variant::World && !asked_anew {
            assert_ne!(self.offered, Some(push.version), "offered again");
            let lacks_some = push.resources.iter().any(|(name, _)| !self.holds.contains_key(&index_of(name)));
            let unknown = lacks_some || !self.unanswered.is_empty();
            assert!(unknown || self.told_accepted != Some(push.version), "the proxy has this version");
        }
        for (name, secret) in &push.resources {
            let index = index_of(name);
            assert!(index < OWN && self.names.contains(&index) && secret.is_named(name), "{name} was not asked for, or is not its own");
            let sent = self.sent.get(&index);
            if secret.is_certificate() && !self.gate && !self.wanted.contains(&index) {
                let kept = self.told.get(&index) == Some(&secret.version());
                assert!(kept || sent.is_none_or(|sent| *sent == secret.version()), "changed before the bundle");
            }
            if self.variant == Variant::Delta && !self.wanted.contains(&index) {
                assert_ne!(sent, Some(&secret.version()), "offered again");
                let awaited = self.unanswered.iter().any(|push| push.resources.iter().any(|(awaited, _)| awaited == name));
                assert!(awaited || self.told.get(&index) != Some(&secret.version()), "the proxy has this version");
            }
        }
    }

    /// A proxy that accepts everything ends with what there is, unless it has refused just that before.
    fn converge(&mut self) {
        self.gate = true;
        for _ in 0..100 {
            while self.poll() {}
            self.answer(false);
        }
        assert!(self.unanswered.is_empty());
        for name in self.names.iter().filter(|name| **name < OWN) {
            let certificate = self.certificate.map(|index| &SECRETS.certificates[index]);
            let bundle = self.bundle.map(|index| &SECRETS.bundles[index]);
            let Some(secret) = [certificate, bundle].into_iter().flatten().find(|secret| secret.is_named(NAMES[*name])) else { continue };
            let refused = match self.variant {
                Variant::World => self.offered.is_some_and(|offered| self.refused.contains(&offered)),
                Variant::Delta => self.refused.contains(&secret.version()),
            };
            assert!(refused || self.holds.get(name) == Some(&secret.version()), "{} was never delivered", NAMES[*name]);
        }
    }
}

fn index_of(name: &str) -> usize {
    NAMES.iter().position(|known| *known == name).unwrap()
}

fn play(variant: Variant, acts: &[Act]) {
    let mut model = Model::new(variant);
    for act in acts {
        model.act(act);
        model.poll();
    }
    model.converge();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4 * ProptestConfig::default().cases, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn state_of_the_world_delivers_what_is_lacking_and_nothing_else(acts in proptest::collection::vec(act(), 1..60)) {
        play(Variant::World, &acts);
    }

    #[test]
    fn delta_delivers_what_is_lacking_and_nothing_else(acts in proptest::collection::vec(act(), 1..60)) {
        play(Variant::Delta, &acts);
    }
}

fn offer<'s>(certificate: Option<&'s Arc<Secret>>, bundle: Option<&'s Arc<Secret>>) -> Offer<'s> {
    Offer { certificate, bundle, certificate_may_change: true }
}

fn asking(names: &[&str]) -> StreamState {
    let mut state = StreamState::new(Variant::World);
    let resource_names = names.iter().map(|name| (*name).to_owned()).collect();
    state.on_world(DiscoveryRequest { resource_names, ..DiscoveryRequest::default() }).unwrap();
    state
}

#[test]
fn a_name_whose_owner_is_not_known_yet_waits_and_is_then_served_or_withheld() {
    let mut state = asking(&[CART, "spiffe://example.org/ns/shop/sa/other"]);
    let step = state.poll(&offer(None, None));
    assert!(step.push.is_none() && step.withheld.is_empty());
    let step = state.poll(&offer(Some(&SECRETS.certificates[0]), None));
    assert_eq!(step.push.unwrap().resources.len(), 1);
    assert_eq!(step.withheld, ["spiffe://example.org/ns/shop/sa/other"]);
    assert!(state.poll(&offer(Some(&SECRETS.certificates[1]), None)).withheld.is_empty(), "told twice");
    let standings: Vec<_> = state.names().map(|name| name.standing).collect();
    assert_eq!(standings, [Standing::Served, Standing::Withheld]);
}

#[test]
fn equal_content_has_an_equal_version_and_any_other_content_another() {
    let pki = Pki::new("root");
    let svid = pki.svid(CART);
    let version = |svid| Secret::certificate(Arc::new(svid)).version();
    assert_eq!(version(svid.clone()), version(svid.clone()));
    assert_ne!(version(svid), version(pki.svid(CART)));
    let plain = trust(1, &[&pki]);
    let later = trust(2, &[&pki]);
    let mut with_crl = trust(1, &[&pki]);
    with_crl.crl = Some(pki.crl(&[]));
    let version = |state| Secret::bundle(Arc::new(state)).version();
    assert_eq!(version(plain.clone()), version(later), "a sequence is not content");
    assert_ne!(version(plain), version(with_crl));
    assert_eq!(version(trust(1, &[&pki])).to_string().len(), 32);
}

#[test]
fn a_request_for_other_resources_or_for_too_much_is_refused() {
    let other = DiscoveryRequest { type_url: "type.googleapis.com/x".to_owned(), ..DiscoveryRequest::default() };
    assert!(matches!(StreamState::new(Variant::World).on_world(other), Err(ProtocolError::TypeUrl(_))));
    let long = DeltaDiscoveryRequest { resource_names_subscribe: vec!["x".repeat(3000)], ..Default::default() };
    assert_eq!(StreamState::new(Variant::Delta).on_delta(long), Err(ProtocolError::NameTooLong(3000)));
    let many = DeltaDiscoveryRequest { resource_names_subscribe: (0..33).map(|name| name.to_string()).collect(), ..Default::default() };
    assert_eq!(StreamState::new(Variant::Delta).on_delta(many), Err(ProtocolError::TooManyNames));
}

#[test]
fn keys_do_not_show_in_debug_output() {
    let secret = &SECRETS.certificates[0];
    let resource = secret.resource("default");
    let shown = format!("{secret:?} {resource:?}");
    assert!(shown.len() < 250, "{shown}");
}
