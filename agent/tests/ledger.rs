//! What the agent makes of the ledger's checkpoints that the CA shows it: over the real session, with a CA that says what the test wants.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail wherever it likes")]

mod support;

use std::os::unix::fs::MetadataExt;

use chancery_agent::ca_client::{AlarmReason, LedgerAlarm, LedgerFile};
use chancery_agent::readiness::readiness;
use chancery_process::http::Readiness;
use chancery_proto::chancery::v1 as wire;
use prost::Message;
use rustix::process::Signal;
use support::log::{Log, LogKey, ORIGIN};
use support::{Agent, FakeCa, Place, TokenPlan, a_while, eventually, ready, renewed};

impl Agent {
    fn ledger_size(&self) -> u64 {
        self.client.ledger().borrow().size()
    }

    fn ledger_alarm(&self) -> Option<LedgerAlarm> {
        self.client.ledger().borrow().alarm.as_deref().cloned()
    }

    async fn has_taken(&self, size: u64) {
        eventually("the checkpoint is taken over", || self.ledger_size() == size).await;
    }

    async fn raises(&self, reason: AlarmReason) -> LedgerAlarm {
        eventually("an alarm", || self.ledger_alarm().is_some()).await;
        let alarm = self.ledger_alarm().unwrap();
        assert_eq!(alarm.reason, reason, "{}", alarm.message);
        alarm
    }
}

async fn show(ca: &FakeCa, offer: wire::LedgerCheckpoint) {
    ca.send(wire::ca_message::Message::LedgerCheckpoint(offer)).await;
}

/// What the agent reported last.
fn reported(ca: &FakeCa) -> wire::LedgerView {
    ca.behaviour.reports.lock().unwrap().last().unwrap().ledger.clone().unwrap()
}

/// A CA, an agent that was shown a ledger of ten entries, that ledger, and its key.
async fn shown() -> (FakeCa, Place, Agent, Log, LogKey) {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let agent = place.start(&ca);
    agent.connected().await;
    let (log, key) = (Log::new(ORIGIN, 10), LogKey::new(ORIGIN));
    show(&ca, log.offer(&[&key], 0)).await;
    agent.has_taken(10).await;
    (ca, place, agent, log, key)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_that_continues_the_known_one_is_taken_over_and_reported() {
    let (ca, place, agent, mut log, key) = shown().await;
    assert_eq!(*ca.behaviour.capabilities.lock().unwrap(), ["ledger-checkpoints", "convergence", "ledger-continued", "standing-acts"]);
    for (from, size) in [(10, 11), (11, 64), (64, 65), (65, 1000)] {
        log = log.grown(size, "entry");
        show(&ca, log.offer(&[&key], from)).await;
        agent.has_taken(size as u64).await;
    }
    show(&ca, log.offer(&[&key], 1000)).await;
    eventually("it is reported", || reported(&ca).checkpoint == log.note(&[&key])).await;
    assert_eq!((agent.ledger_alarm(), reported(&ca).alarm), (None, None));
    assert_eq!((agent.metrics.ledger_size.get(), agent.metrics.ledger_alarm.get()), (1000, 0));
    let file = LedgerFile::in_directory(&place.state_dir());
    assert_eq!(std::fs::metadata(file.path()).unwrap().mode() & 0o7777, 0o600);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forked_ledger_is_an_alarm_on_both_sides_with_both_notes_kept() {
    let (ca, _place, agent, log, key) = shown().await;
    let fork = Log::new(ORIGIN, 9).grown(10, "another entry");
    show(&ca, fork.offer(&[&key], 10)).await;
    let alarm = agent.raises(AlarmReason::Forked).await;
    assert_eq!((&alarm.remembered, &alarm.offered), (&log.note(&[&key]), &fork.note(&[&key])));
    eventually("the CA is told", || reported(&ca).alarm.is_some()).await;
    let told = reported(&ca);
    assert_eq!(told.checkpoint, alarm.remembered, "what does not fit is not taken over");
    let told = told.alarm.unwrap();
    assert_eq!((&*told.reason, told.remembered, told.offered), ("forked", alarm.remembered, alarm.offered));
    assert_eq!(agent.metrics.ledger_alarm.get(), 1);
    match readiness(&agent.client, None, ca.clock.as_ref()) {
        Readiness::Degraded(reasons) => assert!(reasons[0].contains("forked"), "{reasons:?}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(agent.svids.status().await.unwrap().ledger.alarm.unwrap().reason, AlarmReason::Forked);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_that_grew_on_another_history_is_an_alarm() {
    let (ca, _place, agent, _, key) = shown().await;
    let other = Log::new(ORIGIN, 9).grown(20, "another entry");
    show(&ca, other.offer(&[&key], 10)).await;
    agent.raises(AlarmReason::Inconsistent).await;
    assert_eq!(agent.ledger_size(), 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proof_that_was_tampered_with_is_an_alarm() {
    let (ca, _place, agent, log, key) = shown().await;
    let mut offer = log.grown(20, "entry").offer(&[&key], 10);
    offer.proof[0] = vec![7; 32];
    show(&ca, offer).await;
    agent.raises(AlarmReason::Inconsistent).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_that_lost_entries_is_an_alarm() {
    let (ca, _place, agent, _, key) = shown().await;
    show(&ca, Log::new(ORIGIN, 9).offer(&[&key], 0)).await;
    let alarm = agent.raises(AlarmReason::Smaller).await;
    assert!(alarm.message.contains("9 entries") && alarm.message.contains("10"), "{}", alarm.message);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_of_another_key_is_an_alarm_whatever_key_the_ca_names() {
    let (ca, _place, agent, log, _) = shown().await;
    show(&ca, log.grown(20, "entry").offer(&[&LogKey::new(ORIGIN)], 10)).await;
    agent.raises(AlarmReason::OtherKey).await;
    assert_eq!(agent.ledger_size(), 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_of_another_log_is_an_alarm_with_its_own_words() {
    let (ca, _place, agent, ..) = shown().await;
    let origin = "example.org/chancery/00000000000000000000000000000002";
    show(&ca, Log::new(origin, 30).offer(&[&LogKey::new(origin)], 10)).await;
    let alarm = agent.raises(AlarmReason::OtherOrigin).await;
    assert!(alarm.message.contains(origin) && alarm.message.contains(ORIGIN), "{}", alarm.message);
}

const NEW_ORIGIN: &str = "example.org/chancery/00000000000000000000000000000002";

/// The first entry of a log that continues the one with this origin.
fn accepted_loss(origin: &str, checkpoint: String) -> Vec<u8> {
    let loss = wire::AcceptedLoss { origin: origin.into(), checkpoint, first: 7, end: 10, ..wire::AcceptedLoss::default() };
    let (actor, why, change) = ("local:uid=0".into(), "the disk is gone".into(), Some(wire::act::Change::Loss(loss)));
    let act = wire::Act { actor, why, change, ..wire::Act::default() };
    let entry = wire::Entry { version: 1, time_ms: 1_800_000_000_000, body: Some(wire::entry::Body::Act(act)) };
    entry.encode_to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_is_proven_to_continue_the_known_one_is_taken_over_and_the_operator_sees_it() {
    let (ca, place, agent, log, key) = shown().await;
    let remembered = log.note(&[&key]);
    let first = accepted_loss(ORIGIN, remembered.clone());
    let (new, key) = (Log::beginning_with(&first, NEW_ORIGIN, 5), key.renamed(NEW_ORIGIN));
    show(&ca, new.offer_with_first(&[&key], &first)).await;
    agent.has_taken(5).await;
    let shown = agent.svids.status().await.unwrap().ledger;
    let continued = shown.continued.unwrap();
    assert_eq!((&*continued.origin, &continued.remembered, shown.alarm), (ORIGIN, &remembered, None));
    let said = continued.to_string();
    assert!(said.contains("entries 7 to 9 are lost") && said.contains("local:uid=0") && said.contains("the disk is gone"), "{said}");
    show(&ca, new.grown(9, "entry").offer(&[&key], 5)).await;
    agent.has_taken(9).await;
    agent.stop().await;
    let agent = place.start(&ca);
    assert_eq!((agent.ledger_size(), agent.ledger_alarm()), (9, None));
    assert!(agent.client.ledger().borrow().continued.is_some(), "a restarted agent still says so");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_does_not_show_that_it_continues_the_known_one_is_an_alarm() {
    /// The first entry, the one that is shown, the log's origin, whether its key is the known one, and what the alarm says.
    type Case<'a> = (&'a [u8], &'a [u8], &'a str, bool, &'a str);
    let named = accepted_loss(ORIGIN, String::new());
    let stranger = accepted_loss("example.org/chancery/00000000000000000000000000000003", String::new());
    let other_act = wire::Entry { body: Some(wire::entry::Body::Act(wire::Act::default())), ..wire::Entry::default() }.encode_to_vec();
    let elsewhere = "example.com/chancery/00000000000000000000000000000002";
    let cases: [Case<'_>; 5] = [
        (&named, &named, NEW_ORIGIN, false, "signed by none of the known keys"),
        (&named, &stranger, NEW_ORIGIN, true, "does not show that these bytes are entry 0"),
        (&stranger, &stranger, NEW_ORIGIN, true, "0000000000000003"),
        (&other_act, &other_act, NEW_ORIGIN, true, "another act"),
        (&named, &named, elsewhere, true, "another trust domain"),
    ];
    for (first, claimed, origin, same_key, problem) in cases {
        let (ca, _place, agent, _, key) = shown().await;
        let key = if same_key { key.renamed(origin) } else { LogKey::new(origin) };
        show(&ca, Log::beginning_with(first, origin, 5).offer_with_first(&[&key], claimed)).await;
        let alarm = agent.raises(AlarmReason::OtherOrigin).await;
        assert!(alarm.message.contains(problem), "{problem}: {}", alarm.message);
        assert_eq!(agent.ledger_size(), 10);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_checkpoint_is_an_alarm_and_kept_no_longer_than_one_may_be() {
    let (ca, _place, agent, ..) = shown().await;
    show(&ca, wire::LedgerCheckpoint { note: "é".repeat(1 << 20), ..Default::default() }).await;
    let alarm = agent.raises(AlarmReason::Unreadable).await;
    assert_eq!(alarm.offered.len(), 16 << 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proof_that_begins_elsewhere_is_asked_for_again_and_at_last_an_alarm() {
    let (ca, _place, agent, log, key) = shown().await;
    let newer = log.grown(20, "entry");
    for _ in 0..2 {
        let reports = ca.behaviour.reports.lock().unwrap().len();
        show(&ca, newer.offer(&[&key], 5)).await;
        eventually("the CA is told where to begin", || ca.behaviour.reports.lock().unwrap().len() > reports).await;
    }
    assert_eq!((agent.ledger_size(), agent.ledger_alarm()), (10, None));
    show(&ca, newer.offer(&[&key], 5)).await;
    agent.raises(AlarmReason::Unproven).await;
    show(&ca, newer.offer(&[&key], 10)).await;
    agent.has_taken(20).await;
    assert!(agent.ledger_alarm().is_some(), "it stays until somebody has looked");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_note_of_both_keys_hands_over_from_the_old_key_to_the_new_one() {
    let (ca, _place, agent, log, old) = shown().await;
    let new = LogKey::new(ORIGIN);
    let of_both = log.offer(&[&old, &new], 10);
    show(&ca, of_both.clone()).await;
    eventually("the note is reported as it is signed now", || reported(&ca).checkpoint == of_both.note).await;
    eventually("the new key counts", || agent.client.ledger().borrow().known.as_ref().unwrap().key == new.verifier).await;
    let grown = log.grown(20, "entry");
    show(&ca, grown.offer(&[&new], 10)).await;
    agent.has_taken(20).await;
    assert_eq!(agent.ledger_alarm(), None);
    show(&ca, grown.grown(30, "entry").offer(&[&old], 20)).await;
    agent.raises(AlarmReason::OtherKey).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_key_that_the_old_one_did_not_hand_over_to_is_not_taken() {
    let (ca, _place, agent, log, old) = shown().await;
    let mut offer = log.grown(20, "entry").offer(&[&old], 10);
    offer.verifier_key = LogKey::new(ORIGIN).verifier.to_string();
    show(&ca, offer).await;
    agent.has_taken(20).await;
    assert_eq!(agent.client.ledger().borrow().known.as_ref().unwrap().key, old.verifier);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_checkpoint_and_the_alarm_survive_a_restart_and_a_damaged_memory_is_an_alarm() {
    let (ca, place, agent, log, key) = shown().await;
    agent.stop().await;
    let agent = place.start(&ca);
    agent.connected().await;
    eventually("it names what it knows at once", || reported(&ca).checkpoint == log.note(&[&key])).await;
    show(&ca, Log::new(ORIGIN, 9).offer(&[&key], 0)).await;
    let alarm = agent.raises(AlarmReason::Smaller).await;
    eventually("it is written", || agent.metrics.ledger_alarm.get() == 1).await;
    agent.stop().await;

    let agent = place.start(&ca);
    assert_eq!((agent.ledger_size(), agent.ledger_alarm()), (10, Some(alarm)));
    agent.stop().await;
    let file = LedgerFile::in_directory(&place.state_dir());
    let text = std::fs::read_to_string(file.path()).unwrap();
    std::fs::write(file.path(), text.replace("\\n10\\n", "\\n11\\n")).unwrap();
    let agent = place.start(&ca);
    agent.raises(AlarmReason::Unreadable).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alarm_takes_nothing_from_the_workloads() {
    let (ca, _place, agent, _, key) = shown().await;
    let mut stream = agent.svids.attach(ca.token(&TokenPlan::pod(10, "shop", "cart"))).await.unwrap();
    let first = ready(&mut stream).await;
    show(&ca, Log::new(ORIGIN, 9).offer(&[&key], 0)).await;
    agent.raises(AlarmReason::Smaller).await;
    ca.clock.advance(time::Duration::seconds(2400));
    renewed(&mut stream, &first).await;
    let mut other = agent.svids.attach(ca.token(&TokenPlan::pod(11, "shop", "till"))).await.unwrap();
    ready(&mut other).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_sees_the_alarm_and_ends_it() {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let agent = place.run(&ca);
    agent.ready().await;
    let (log, key) = (Log::new(ORIGIN, 10), LogKey::new(ORIGIN));
    show(&ca, log.offer(&[&key], 0)).await;
    eventually("a checkpoint is known", || agent.metric("ledger_size") == "10").await;
    show(&ca, Log::new(ORIGIN, 9).offer(&[&key], 0)).await;
    eventually("an alarm", || agent.metric("ledger_alarm") == "1").await;
    assert!(agent.log().contains("does not continue the one it showed before"), "{}", agent.log());
    let (table, json) = (place.ask(&["status"]), place.ask(&["status", "--output", "json"]));
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(table.contains("(smaller)") && table.contains("reset --ledger"), "{table}");
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["ledger"]["alarm"]["remembered"], log.note(&[&key]));
    assert!(agent.get("/readyz").contains("degraded"), "{}", agent.get("/readyz"));
    agent.signal(Signal::TERM);
    agent.ended().await;

    assert!(place.ask(&["reset", "--ledger"]).status.success());
    assert!(place.state_file().exists(), "what else the agent knows stays");
    let agent = place.run(&ca);
    agent.ready().await;
    assert_eq!((agent.metric("ledger_alarm"), agent.metric("ledger_size")), ("0".to_owned(), "0".to_owned()));
    show(&ca, Log::new(ORIGIN, 9).offer(&[&key], 0)).await;
    eventually("the next one is the first", || agent.metric("ledger_size") == "9").await;
    a_while().await;
    assert_eq!(agent.metric("ledger_alarm"), "0");
    agent.signal(Signal::TERM);
    agent.ended().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn acts_are_kept_over_a_restart_and_told_with_those_of_the_log_before() {
    let (ca, place, agent, ..) = shown().await;
    let acts = |origin: &str, entry: &[u8]| wire::StandingActs {
        origin: origin.into(),
        entries: vec![entry.to_vec()],
        ..wire::StandingActs::default()
    };
    let (first, second, third) = (acts("one", b"\0\xff"), acts("two", b"b"), acts("three", b"c"));
    for told in [&first, &second, &acts("two", b"b, but older"), &second, &third] {
        ca.send(wire::ca_message::Message::StandingActs(told.clone())).await;
    }
    let too_many = wire::StandingActs { origin: "four".into(), entries: vec![Vec::new(); 257], ..wire::StandingActs::default() };
    ca.send(wire::ca_message::Message::StandingActs(too_many)).await;
    eventually("they are kept", || agent.client.ledger().borrow().acts.last().is_some_and(|acts| acts.origin == "three")).await;
    agent.stop().await;
    let agent = place.start(&ca);
    agent.connected().await;
    let order = wire::Order { order: Some(wire::order::Order::TellCertificates(wire::TellCertificates {})) };
    ca.send(wire::ca_message::Message::Order(order)).await;
    eventually("the CA is told", || !ca.behaviour.told.lock().unwrap().is_empty()).await;
    assert_eq!(ca.behaviour.told.lock().unwrap()[0].acts, [second, third]);
}

#[tokio::test(flavor = "multi_thread")]
async fn acts_that_a_log_lacks_since_it_was_restored_or_went_back_stay_until_an_act_takes_them_away() {
    let (ca, _place, agent, ..) = shown().await;
    let told = |epoch, restored_ms, entries: &[&[u8]]| wire::StandingActs {
        origin: "one".into(),
        entries: entries.iter().map(|entry| entry.to_vec()).collect(),
        epoch,
        restored_ms,
    };
    let (before, after) = (told(5, 0, &[b"a", b"b"]), told(7, 1000, &[b"c"]));
    for told in [&told(4, 0, &[b"a"]), &before, &told(3, 0, &[]), &told(5, 1000, &[]), &after, &told(6, 1000, &[])] {
        ca.send(wire::ca_message::Message::StandingActs(told.clone())).await;
    }
    let tell = || wire::Order { order: Some(wire::order::Order::TellCertificates(wire::TellCertificates {})) };
    let known = || agent.client.ledger().borrow().acts.iter().map(|acts| (acts.restored_ms, acts.entries.len())).collect::<Vec<_>>();
    eventually("both are kept", || known() == [(0, 2), (1000, 1)]).await;
    ca.send(wire::ca_message::Message::Order(tell())).await;
    eventually("the CA is told", || !ca.behaviour.told.lock().unwrap().is_empty()).await;
    assert_eq!(ca.behaviour.told.lock().unwrap()[0].acts, [before, after]);

    ca.send(wire::ca_message::Message::StandingActs(told(8, 1000, &[]))).await;
    eventually("an act took them away", || known() == [(0, 2), (1000, 0)]).await;
    agent.stop().await;
}
