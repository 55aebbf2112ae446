use chancery_identity::csr::KeyType;
use chancery_identity::{Fingerprint, Serial};
use chancery_proto::chancery::v1 as wire;
use proptest::prelude::*;
use prost::Message;

use super::*;
use crate::keys::PublicKey;
use crate::ledger::acts::{ACTS_KEY, ActFilter, ActsVerifier, Fold, Overrides, RecordedAct, RefusedActs, RootState, State, Subject};
use crate::ledger::entry::encode_prefix;
use crate::store::Group;

fn agent(number: u8) -> chancery_identity::SpiffeId {
    format!("spiffe://example.org/chancery/agent/east/{}", uuid(number.into())).parse().unwrap()
}

fn ban(number: u8) -> Change {
    Change::Ban { agent: agent(number), until: START }
}

/// Commits bytes as whoever can write the store would: past the ledger, as an act.
async fn smuggle(place: &Place, entry: Vec<u8>) {
    let store = place.store().await;
    store.commit(store.head().await.unwrap(), Group { entries: vec![entry.into()], raises_epoch: true }).await.unwrap();
    store.close().await.unwrap();
}

async fn opening_fails(place: &Place) -> LedgerError {
    Ledger::open(place.store().await, place.clock.clone(), place.options()).await.unwrap_err()
}

fn encode(body: Body) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_prefix(START.unix_timestamp() * 1000, &mut bytes);
    body.encode_body(&mut bytes);
    bytes
}

/// The bytes of an act as `place`'s own ledger made it, in a copy of the log that is thrown away.
async fn banned(place: &Place, number: u8) -> Vec<u8> {
    let ledger = place.ledger().await;
    let index = ledger.act("local:uid=0", ban(number), "a test wants it").await.unwrap();
    let bytes = ledger.entry(index).await.unwrap().unwrap().bytes().to_vec();
    ledger.close().await.unwrap();
    bytes
}

pub(super) async fn verifier(place: &Place, ledger: &Ledger) -> ActsVerifier {
    let key = place.options().keys.public_key(ACTS_KEY).await.unwrap();
    ActsVerifier::new(ledger.origin().to_owned(), &key).unwrap()
}

/// The state that all acts of the log lead to, without any that is recorded.
async fn refolded(place: &Place, ledger: &Ledger) -> State {
    let mut fold = Fold::genesis(verifier(place, ledger).await);
    for index in 0..ledger.entries() {
        let entry = ledger.entry(index).await.unwrap().unwrap();
        if matches!(entry.body, Body::Act(_)) {
            fold.act(index, entry.bytes()).unwrap();
        }
    }
    fold.state().clone()
}

#[tokio::test]
async fn an_act_changes_the_state_before_it_is_answered() {
    let place = Place::new();
    let ledger = place.ledger().await;
    let mut changes = ledger.state();
    let entry = ledger.act("local:uid=0", ban(1), "it was stolen").await.unwrap();
    assert!(changes.has_changed().unwrap());
    let state = changes.borrow_and_update().clone();
    assert!(state.is_banned(&agent(1)) && !state.is_banned(&agent(2)));
    assert_eq!((state.epoch, state.bans[&agent(1)].entry, state.bans[&agent(1)].since), (1, entry, START));
    let Body::Act(act) = ledger.entry(entry).await.unwrap().unwrap().body else { panic!("it is no act") };
    assert_eq!((act.actor.as_str(), act.action.as_str(), act.why.as_str()), ("local:uid=0", "agent.ban", "it was stolen"));
    assert_eq!((act.target, act.outcome.as_str(), act.epoch), (agent(1).to_string(), "done", 0));
}

#[tokio::test]
async fn the_state_is_there_again_after_a_restart() {
    let place = Place::new();
    banned(&place, 1).await;
    banned(&place, 2).await;
    let ledger = place.ledger().await;
    assert!(ledger.current_state().is_banned(&agent(1)) && ledger.current_state().is_banned(&agent(2)));
    ledger.act("local:uid=0", Change::Unban(agent(1)), "it was found").await.unwrap();
    assert!(!ledger.current_state().is_banned(&agent(1)));
}

#[tokio::test]
async fn an_act_that_the_state_does_not_allow_is_not_recorded() {
    let place = Place::new();
    let ledger = place.ledger().await;
    let refused = ledger.act("local:uid=0", Change::Unban(agent(1)), "why not").await.unwrap_err();
    assert!(matches!(&refused, LedgerError::Impossible(problem) if problem.contains("is not banned")), "{refused}");
    assert_eq!((ledger.entries(), ledger.epoch()), (0, 0));
    // Two at the same time: the second one finds the state that the first one left.
    let ban = async || ledger.act("local:uid=0", ban(1), "why not").await;
    let results = tokio::join!(ban(), ban());
    assert!(matches!(results, (Ok(0), Err(LedgerError::Impossible(_)))), "{results:?}");
}

#[tokio::test]
async fn acts_and_states_are_not_recorded_unsigned() {
    let place = Place::new();
    let ledger = place.ledger().await;
    for body in [Body::Act(wire::Act::default()), Body::State(wire::State::default())] {
        assert!(matches!(ledger.append(body).await, Err(LedgerError::Unsigned)));
    }
    assert_eq!(ledger.entries(), 0);
}

#[tokio::test]
async fn a_gate_that_does_not_open_leaves_no_entry() {
    let place = Place::new();
    let ledger = place.ledger().await;
    let gate = |_: &State| Err(LedgerError::Impossible("three proxies are missing".into()));
    let refused = ledger.act_when("local:uid=0", ban(1), "", gate).await.unwrap_err();
    assert_eq!(refused.to_string(), "three proxies are missing");
    assert_eq!(ledger.entries(), 0);
}

/// What the gate saw is what the act changes: with another replica's act in between, it is asked once more.
#[tokio::test]
async fn a_gate_is_asked_again_when_another_act_came_first() {
    let place = Place::new();
    let store = place.store().await;
    let east = Ledger::open(store.clone(), place.clock.clone(), place.options()).await.unwrap();
    let west = Ledger::open(store.clone(), place.clock.clone(), place.options()).await.unwrap();
    east.act("local:uid=0", ban(1), "").await.unwrap();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let seen = asked.clone();
    let gate = move |state: &State| {
        seen.lock().unwrap().push((state.epoch, state.is_banned(&agent(1))));
        Ok::<(), LedgerError>(())
    };
    west.act_when("local:uid=0", ban(2), "", gate).await.unwrap();
    assert_eq!(*asked.lock().unwrap(), [(0, false), (1, true)]);
    assert_eq!(*west.current_state(), refolded(&place, &west).await);
}

#[tokio::test]
async fn an_act_with_a_bad_or_foreign_signature_keeps_the_ca_from_starting() {
    let foreign = banned(&Place::new(), 1).await;
    let unsigned = |own: &[u8]| {
        let Some(wire::entry::Body::Act(mut act)) = wire::Entry::decode(own).unwrap().body else { panic!("it is no act") };
        act.signature.clear();
        encode(Body::Act(act))
    };
    let changed = |own: &[u8]| {
        let mut changed = own.to_vec();
        let at = changed.windows(4).position(|window| window == b"test").unwrap();
        changed[at] ^= 1;
        changed
    };
    for problem in ["is not signed", "its signature does not verify", "is signed by the key"] {
        let place = Place::new();
        let own = banned(&place, 2).await;
        let forged = match problem {
            "is not signed" => unsigned(&own),
            "is signed by the key" => foreign.clone(),
            _ => changed(&own),
        };
        smuggle(&place, forged).await;
        let error = opening_fails(&place).await;
        assert!(matches!(&error, LedgerError::Act { index: 1, .. }) && error.to_string().contains(problem), "{error}");
        assert!(error.to_string().contains("entry 1") && error.to_string().contains("restore the newest backup"), "{error}");
    }
}

#[tokio::test]
async fn an_act_of_another_log_by_the_same_key_is_refused() {
    let place = Place::new();
    let elsewhere = Place::new();
    banned(&place, 1).await;
    let copied = elsewhere.keys.path().join("ledger-keys");
    FileKeyManager::open(&copied).unwrap();
    std::fs::copy(place.keys.path().join("ledger-keys/acts.pem"), copied.join("acts.pem")).unwrap();
    banned(&elsewhere, 2).await;
    let ledger = elsewhere.ledger().await;
    ledger.act("local:uid=0", Change::Unban(agent(2)), "a test wants it").await.unwrap();
    let foreign = ledger.entry(1).await.unwrap().unwrap().bytes().to_vec();
    ledger.close().await.unwrap();
    smuggle(&place, foreign).await;
    let error = opening_fails(&place).await;
    assert!(error.to_string().contains("its signature does not verify"), "{error}");
}

#[tokio::test]
async fn an_act_that_is_repeated_or_comes_late_is_refused() {
    let place = Place::new();
    let first = banned(&place, 1).await;
    banned(&place, 2).await;
    smuggle(&place, first).await;
    let error = opening_fails(&place).await;
    assert!(matches!(&error, LedgerError::Act { index: 2, problem: acts::ActError::Epoch { found: 0, due: 2 } }), "{error}");
}

#[tokio::test]
async fn an_act_that_is_missing_is_noticed() {
    let place = Place::new();
    banned(&place, 1).await;
    smuggle(&place, encode(start("no act"))).await;
    let error = opening_fails(&place).await;
    assert!(matches!(error, LedgerError::ActsMissing { found: 1, recorded: 2 }), "{error}");
}

/// Protobuf merges a field that comes twice: what is read would not be what was signed.
#[tokio::test]
async fn what_is_added_to_a_signed_act_makes_it_none() {
    let bodies = [wire::entry::Body::Act(wire::Act::default()), wire::entry::Body::Authority(wire::AuthorityCertificate::default())];
    for extra in bodies {
        let place = Place::new();
        let mut twice = banned(&place, 1).await;
        twice.extend(wire::Entry { body: Some(extra), ..wire::Entry::default() }.encode_to_vec());
        smuggle(&place, twice).await;
        let error = opening_fails(&place).await;
        assert!(
            matches!(&error, LedgerError::Act { problem: acts::ActError::Malformed(_), .. } | LedgerError::ActsMissing { .. }),
            "{error}"
        );
    }
}

#[tokio::test]
async fn without_the_key_that_signed_its_acts_the_ca_does_not_start() {
    let place = Place::new();
    banned(&place, 1).await;
    std::fs::remove_file(place.keys.path().join("ledger-keys/acts.pem")).unwrap();
    let error = opening_fails(&place).await;
    assert!(matches!(&error, LedgerError::ActsKey(problem) if problem.contains("restore")), "{error}");
}

/// Entries of about a kilobyte, until a segment is sealed behind what there is, and the state recorded.
async fn fill_segment(ledger: &Ledger) {
    let until_recorded = async {
        let sealed = ledger.store().sealed();
        while ledger.store().sealed() == sealed {
            ledger.append(start(&"x".repeat(1000))).await.unwrap();
        }
        let before = ledger.store().sealed();
        while ledger.store().look_up(&terms::kind("state"), u64::MAX, 1).await.unwrap().first().is_none_or(|index| *index < before) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), until_recorded).await.unwrap();
}

#[tokio::test]
async fn when_a_segment_is_sealed_the_state_follows_and_opening_reads_no_act_before_it() {
    let place = Place { segment_bytes: 32 << 10, ..Place::new() };
    let ledger = place.ledger().await;
    ledger.record_states();
    ledger.act("local:uid=0", ban(1), "").await.unwrap();
    fill_segment(&ledger).await;
    let before = ledger.current_state();
    ledger.act("local:uid=0", ban(2), "").await.unwrap();
    let newest = Fold::newest(ledger.store(), verifier(&place, &ledger).await).await.unwrap();
    assert_eq!(newest.state(), &*before);
    ledger.close().await.unwrap();
    drop(ledger);
    let ledger = place.ledger().await;
    assert_eq!(*ledger.current_state(), refolded(&place, &ledger).await);
    assert_eq!(ledger.epoch(), 2);
}

#[tokio::test]
async fn a_state_that_was_forged_keeps_the_ca_from_starting() {
    let place = Place::new();
    banned(&place, 1).await;
    let store = place.store().await;
    let innocent = encode(Body::State(wire::State { epoch: 1, parts: 1, ..wire::State::default() }));
    store.commit(store.head().await.unwrap(), Group { entries: vec![innocent.into()], raises_epoch: false }).await.unwrap();
    store.close().await.unwrap();
    drop(store);
    let error = opening_fails(&place).await;
    assert!(matches!(&error, LedgerError::Act { index: 1, problem: acts::ActError::Unsigned }), "{error}");
}

fn refused(target: &str) -> RefusedAct {
    RefusedAct { action: "agent.ban".into(), target: target.into(), reason: "role".into(), message: "no".into(), count: 1 }
}

#[tokio::test]
async fn refused_acts_of_more_persons_than_are_remembered_are_no_entries() {
    let place = Place::new();
    let ledger = place.ledger().await;
    let acts = RefusedActs::new(ledger.clone(), place.clock.clone());
    for number in 0..1030 {
        acts.note(&format!("person {number}"), refused(""), "").await;
    }
    assert_eq!(ledger.entries(), 1024);
    place.clock.advance(Duration::from_secs(60));
    acts.note("somebody else", refused(""), "").await;
    assert_eq!(ledger.entries(), 1025);
}

/// Alice, who was refused the same ten times at once.
async fn refused_ten_times(place: &Place, ledger: &Ledger) -> RefusedActs {
    let acts = RefusedActs::new(ledger.clone(), place.clock.clone());
    for _ in 0..10 {
        acts.note("alice", refused("x"), "").await;
    }
    acts
}

/// How many times each entry stands for, the newest first.
async fn recorded_counts(ledger: &Ledger) -> Vec<u64> {
    let page = ledger.list_acts(&ActFilter::default(), 10, None).await.unwrap();
    let count = |recorded: &RecordedAct| match &recorded.act.change {
        Some(wire::act::Change::Refused(refused)) => refused.count,
        other => panic!("{other:?}"),
    };
    page.acts.iter().map(count).collect()
}

#[tokio::test]
async fn what_was_only_counted_is_recorded_once_the_minute_is_over() {
    let place = Place::new();
    let ledger = place.ledger().await;
    let acts = refused_ten_times(&place, &ledger).await;
    place.clock.advance(Duration::from_secs(59));
    acts.sweep().await;
    assert_eq!(ledger.entries(), 1);
    place.clock.advance(Duration::from_secs(1));
    acts.sweep().await;
    acts.sweep().await;
    assert_eq!(recorded_counts(&ledger).await, [9, 1]);
}

#[tokio::test]
async fn what_was_only_counted_is_recorded_when_the_ca_ends() {
    let place = Place::new();
    let ledger = place.ledger().await;
    let acts = refused_ten_times(&place, &ledger).await;
    acts.flush().await;
    acts.flush().await;
    assert_eq!(recorded_counts(&ledger).await, [9, 1]);
}

#[tokio::test]
async fn what_a_refused_person_says_is_cut_at_a_characters_edge() {
    let place = Place::new();
    let ledger = place.ledger().await;
    let acts = RefusedActs::new(ledger.clone(), place.clock.clone());
    acts.note("alice", refused(&"é".repeat(40_000)), &"x".repeat(100_000)).await;
    let page = ledger.list_acts(&ActFilter::default(), 1, None).await.unwrap();
    let act = &page.acts[0].act;
    assert!(act.target.len() < 530 && act.target.ends_with('é') && act.why.len() == 512, "{} {}", act.target.len(), act.why.len());
}

/// The bytes stand in `docs/ledger.md`, with what verifies them.
#[test]
fn the_act_in_the_documentation_verifies() {
    let documentation = include_str!("../../../../docs/ledger.md");
    let text = documentation.split("### An act, verified").nth(1).unwrap();
    let between = |before: &str, after: &str| text.split(before).nth(1).unwrap().split(after).next().unwrap();
    let bytes = hex::decode(between("```hex\n", "```").split_whitespace().collect::<String>()).unwrap();
    let key = PublicKey { key_type: KeyType::Ed25519, spki: hex::decode(between("echo ", " |")).unwrap() };
    let origin = between("the origin\n`", "`");
    let mut fold = Fold::genesis(ActsVerifier::new(origin.to_owned(), &key).unwrap());
    fold.act(0, &bytes).unwrap();
    assert!(fold.state().is_banned(&agent(7)));
}

fn any_subject() -> impl Strategy<Value = Subject> {
    prop_oneof![
        (1..3u8).prop_map(|number| Subject::Serial(Serial([number; 16]))),
        (1..3u8).prop_map(|number| Subject::SpiffeId(format!("spiffe://example.org/ns/shop/sa/s{number}").parse().unwrap())),
        (1..3u64).prop_map(|number| Subject::Pod(uuid(number))),
        (1..3u8).prop_map(|number| Subject::Node { cluster: "east".into(), node: format!("node-{number}") }),
        (1..3u8).prop_map(|number| Subject::Agent(agent(number))),
    ]
}

fn any_change() -> impl Strategy<Value = Change> {
    use RootState::{Active, Distrusted, Draining, Prepared, Published, Retired};
    let root_state = prop::sample::select(vec![Prepared, Published, Active, Draining, Retired, Distrusted]);
    prop_oneof![
        3 => (1..4u8, root_state, any::<bool>()).prop_map(|(number, to, force)| {
            let overrides = Overrides { except: vec![format!("proxy-{number}")], force, accept_unproven: !force, confirm_clock: force };
            Change::Root { root: Fingerprint([number; 32]), to, overrides }
        }),
        1 => (1..4u8, 0..72_000u64).prop_map(|(number, seconds)| {
            Change::BeginDistrust { root: Fingerprint([number; 32]), leave_by: START + Duration::from_secs(seconds) }
        }),
        4 => (any_subject(), 0..72_000u64).prop_map(|(subject, seconds)| Change::Revoke { subject, until: START + Duration::from_secs(seconds) }),
        4 => any_subject().prop_map(Change::Allow),
        2 => (1..4u8).prop_map(ban),
        2 => (1..4u8).prop_map(|number| Change::Unban(agent(number))),
        1 => any::<u8>().prop_map(|number| Change::CheckpointKey([number; 32])),
        1 => Just(refused_act("agent.ban")),
        1 => (any::<u64>(), any::<u64>()).prop_map(|(first, end)| {
            let (origin, checkpoint) = ("old".into(), "note".into());
            Change::AcceptedLoss { origin, checkpoint, missing: first..end, trust_floor: end, roots_kept_until: START, epoch: 0 }
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Every state that is recorded is what the acts before it lead to from the beginning, and so is the one that a restart finds.
    #[test]
    fn a_recorded_state_equals_refolding_from_the_beginning(changes in prop::collection::vec((any_change(), 0..1200u64), 1..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let place = Place { segment_bytes: 6 << 10, ..Place::new() };
            let ledger = place.ledger().await;
            for (change, seconds) in changes {
                place.clock.advance(Duration::from_secs(seconds));
                let (epoch, why) = (ledger.epoch(), "x".repeat(200));
                match ledger.act("local:uid=0", change, &why).await {
                    Ok(_) => assert_eq!(ledger.epoch(), epoch + 1),
                    Err(error) => assert!(matches!(error, LedgerError::Impossible(_)), "{error}"),
                }
            }
            let state = ledger.current_state();
            assert_eq!(*state, refolded(&place, &ledger).await);
            ledger.close().await.unwrap();
            drop(ledger);

            let ledger = place.ledger().await;
            assert_eq!(*ledger.current_state(), *state);
            let mut fold = Fold::genesis(verifier(&place, &ledger).await);
            for index in 0..ledger.entries() {
                let entry = ledger.entry(index).await.unwrap().unwrap();
                match entry.body {
                    Body::Act(_) => fold.act(index, entry.bytes()).unwrap(),
                    Body::State(_) => fold.check_state(index, entry.bytes()).unwrap(),
                    _ => {}
                }
            }
        });
    }
}
