//! What agents are shown of the ledger, and what theirs says about this CA's.

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use chancery_identity::checkpoint::{self, Checkpoint, CheckpointVerifier, Hash, Signature};
use chancery_proto::chancery::v1::{LedgerAlarm, LedgerCheckpoint, LedgerView, StandingActs, Start};

use super::*;
use crate::authority::testing::TestCa;
use crate::fleet::session::{LEDGER_CHECKPOINTS, LEDGER_CONTINUED, STANDING_ACTS};
use crate::ledger::acts::{Change, Root, RootState, State};
use crate::ledger::{Body, Ledger, LedgerError, Published};

pub(super) const ORIGIN: &str = "example.org/chancery/00000000000000000000000000000001";
/// Longer than between two checkpoints.
const LATER: Duration = Duration::from_secs(31);

/// A ledger in memory, and the key that its checkpoints are signed with.
#[derive(Clone)]
pub(super) struct Log {
    _place: Arc<TestCa>,
    ledger: Ledger,
    key: Arc<Ed25519KeyPair>,
    origin: &'static str,
    newest: watch::Sender<Arc<Published>>,
    standing: watch::Sender<Arc<StandingActs>>,
}

async fn record(ledger: &Ledger, entries: usize, what: &str) {
    let body = Body::Start(Start { version: what.to_owned(), ..Start::default() });
    ledger.append_all(vec![body; entries]).await.unwrap();
}

async fn publish(ledger: &Ledger, key: &Ed25519KeyPair, origin: &str) -> Arc<Published> {
    let size = ledger.entries();
    let checkpoint = Checkpoint { origin: origin.into(), size, root: ledger.tree_root(size).await.unwrap(), extensions: Vec::new() };
    let verifier = CheckpointVerifier::new(origin, key.public_key().as_ref().try_into().unwrap()).unwrap();
    let bytes = key.sign(checkpoint.to_string().as_bytes()).as_ref().to_vec();
    let note = checkpoint::assemble(&checkpoint, &[Signature { key: verifier.clone(), bytes }]).unwrap();
    Arc::new(Published { checkpoint, note, signed_by: vec![verifier.clone()], verifier, time: NOW })
}

impl Log {
    pub(super) async fn new(origin: &'static str, entries: usize) -> Self {
        let key = Arc::new(Ed25519KeyPair::generate().unwrap());
        Self::signed_by(key, origin, entries, "one").await
    }

    /// With entries that `what` makes different from others.
    async fn signed_by(key: Arc<Ed25519KeyPair>, origin: &'static str, entries: usize, what: &str) -> Self {
        let place = Arc::new(TestCa::new());
        let ledger = place.ledger().await;
        record(&ledger, entries, what).await;
        let newest = watch::Sender::new(publish(&ledger, &key, origin).await);
        Self { _place: place, ledger, key, origin, newest, standing: watch::Sender::default() }
    }

    /// One that continues the log of this origin, which was lost in part.
    async fn continuing(lost: &str, origin: &'static str, carried: State) -> Self {
        let (place, key) = (Arc::new(TestCa::new()), Arc::new(Ed25519KeyPair::generate().unwrap()));
        let ledger = place.ledger().await;
        let (missing, roots_kept_until) = (5..10, NOW + Duration::from_secs(3600));
        let change =
            Change::AcceptedLoss { origin: lost.into(), checkpoint: String::new(), missing, trust_floor: 10, roots_kept_until, epoch: 0 };
        ledger.accept_loss("local:uid=0", change, "the disk is gone", |_| carried.clone()).await.unwrap();
        let newest = watch::Sender::new(publish(&ledger, &key, origin).await);
        Self { _place: place, ledger, key, origin, newest, standing: watch::Sender::default() }
    }

    async fn grow(&self, entries: usize, what: &str) {
        record(&self.ledger, entries, what).await;
        self.newest.send_replace(publish(&self.ledger, &self.key, self.origin).await);
    }

    pub(super) fn source(&self) -> LedgerSource {
        LedgerSource { ledger: self.ledger.clone(), newest: self.newest.subscribe(), standing: self.standing.subscribe() }
    }

    fn published(&self) -> Published {
        Published::clone(&self.newest.borrow())
    }

    /// A CA with this ledger, and the agent of `node-1`, which knows the checkpoint `note`.
    fn met_by(&self, fleet: &Arc<Fleet>, note: &str) -> (Ca, Agent) {
        self.met_by_one_with(&[LEDGER_CHECKPOINTS], fleet, note)
    }

    fn met_by_one_with(&self, capabilities: &[&str], fleet: &Arc<Fleet>, note: &str) -> (Ca, Agent) {
        let ca = Ca::with(self.clone());
        let capabilities = capabilities.iter().map(|name| (*name).to_owned()).collect();
        let hello = Hello { capabilities, report: Some(report(note, None)), ..Hello::default() };
        let agent = ca.attach_with(fleet, member(1), &hello);
        (ca, agent)
    }
}

fn report(note: &str, alarm: Option<LedgerAlarm>) -> Report {
    Report { ledger: Some(LedgerView { checkpoint: note.to_owned(), alarm }), ..Report::default() }
}

impl Agent {
    /// The next checkpoint that it is shown, whatever else it hears.
    async fn is_shown(&mut self) -> LedgerCheckpoint {
        let shown = async {
            loop {
                if let Some(ca_message::Message::LedgerCheckpoint(shown)) = self.down.recv().await.unwrap().message {
                    return shown;
                }
            }
        };
        // By a clock that is paused: it passes at once when nothing else happens.
        timeout(Duration::from_secs(60), shown).await.expect("a checkpoint")
    }

    /// Whether it is shown one within [`LATER`].
    async fn hears_of_another(&mut self) -> bool {
        timeout(LATER, self.is_shown()).await.is_ok()
    }
}

fn alarm_of(fleet: &Fleet) -> String {
    fleet.agents()[0].ledger_alarm.clone()
}

async fn until(what: &str, is_so: impl Fn() -> bool) {
    timeout(Duration::from_secs(300), async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("not seen: {what}"));
}

#[tokio::test(start_paused = true)]
async fn an_agent_is_shown_the_newest_checkpoint_and_later_ones_with_a_proof_from_its_own() {
    let (fleet, _) = fleet();
    let log = Log::new(ORIGIN, 5).await;
    let (_ca, mut agent) = log.met_by(&fleet, "");
    let first = agent.is_shown().await;
    let known = log.published();
    assert_eq!((&first.note, &first.verifier_key), (&known.note, &known.verifier.to_string()));
    assert_eq!((first.proof_from, first.proof.len()), (0, 0));

    agent.says(agent_message::Message::Report(report(&first.note, None))).await;
    log.grow(300, "more").await;
    let second = agent.is_shown().await;
    assert_eq!(second.proof_from, 5);
    let proof: Vec<Hash> = second.proof.iter().map(|hash| hash.as_slice().try_into().unwrap()).collect();
    checkpoint::verify_consistency(&known.checkpoint, &log.published().verifier.verify(&second.note).unwrap(), &proof).unwrap();
    assert_eq!((alarm_of(&fleet), fleet.totals(1).ledger_alarms), (String::new(), 0));
    assert_eq!(fleet.agents()[0].ledger_size, 5, "as it reported");
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_has_not_answered_is_shown_no_other_checkpoint() {
    let (fleet, _) = fleet();
    let log = Log::new(ORIGIN, 5).await;
    let (_ca, mut agent) = log.met_by(&fleet, "");
    agent.is_shown().await;
    log.grow(1, "more").await;
    assert!(!agent.hears_of_another().await);
}

#[tokio::test(start_paused = true)]
async fn an_agent_with_the_newest_checkpoint_is_shown_none_until_there_is_a_newer_one() {
    let (fleet, _) = fleet();
    let log = Log::new(ORIGIN, 5).await;
    let (_ca, mut agent) = log.met_by(&fleet, &log.published().note);
    assert!(!agent.hears_of_another().await);
    log.grow(1, "more").await;
    assert_eq!(agent.is_shown().await.proof_from, 5);
}

#[tokio::test(start_paused = true)]
async fn an_older_agent_is_shown_none() {
    let (fleet, _) = fleet();
    let ca = Ca::with(Log::new(ORIGIN, 5).await);
    let mut agent = ca.attach(&fleet, member(1));
    assert!(!agent.hears_of_another().await);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_knows_more_than_this_ledger_has_gives_a_restored_backup_away() {
    let (fleet, _) = fleet();
    let before = Log::new(ORIGIN, 120).await;
    let restored = Log::signed_by(before.key.clone(), ORIGIN, 100, "one").await;
    let (_ca, mut agent) = restored.met_by(&fleet, &before.published().note);
    let shown = agent.is_shown().await;
    assert_eq!((shown.note, shown.proof_from), (restored.published().note, 0), "the agent is to see it, too");
    until("the alarm", || alarm_of(&fleet).starts_with("rolled_back: ")).await;
    assert!(alarm_of(&fleet).contains("120 entries, and this one has 100"), "{}", alarm_of(&fleet));
    assert_eq!(fleet.totals(1).ledger_alarms, 1);
    let problems = fleet.ledger_problems();
    assert!(problems[0].contains("chancery/agent/east/node-1, which knows 120 entries"), "{problems:?}");

    let proof = restored.ledger.contradiction().expect("it is proven");
    assert_eq!((&proof.note, proof.size, proof.entries, proof.is_fork()), (&before.published().note, 120, 100, false));
    assert!(proof.shown_by.ends_with("chancery/agent/east/node-1"), "{}", proof.shown_by);
    let refused = restored.ledger.append(Body::Start(Start::default())).await.unwrap_err();
    assert!(matches!(refused, LedgerError::Contradicted(_)), "{refused}");
    let shown = fleet.agents_called("node-1").remove(0).ledger_evidence.expect("both checkpoints");
    assert_eq!((shown.remembered, shown.offered), (before.published().note, restored.published().note));
    assert_eq!(fleet.agents()[0].ledger_evidence, None, "which are not in a list of all");
}

#[tokio::test(start_paused = true)]
async fn a_checkpoint_that_was_published_a_moment_ago_and_one_of_this_ledgers_beginning_prove_nothing() {
    let (fleet, _) = fleet();
    let log = Log::new(ORIGIN, 5).await;
    let older = log.published();
    record(&log.ledger, 20, "more").await;
    // Published, and shown, before the session here hears of it.
    let newer = publish(&log.ledger, &log.key, ORIGIN).await;
    for note in [&older.note, &newer.note] {
        let (_ca, mut agent) = log.met_by(&fleet, note);
        if *note == newer.note {
            agent.is_shown().await;
        } else {
            agent.hears_of_another().await;
        }
        assert_eq!((alarm_of(&fleet), log.ledger.contradiction()), (String::new(), None));
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_knows_other_entries_gives_a_fork_away_until_it_knows_these() {
    let (fleet, _) = fleet();
    let log = Log::new(ORIGIN, 10).await;
    let fork = Log::signed_by(log.key.clone(), ORIGIN, 7, "another").await;
    let (_ca, mut agent) = log.met_by(&fleet, &fork.published().note);
    agent.is_shown().await;
    until("the alarm", || alarm_of(&fleet).starts_with("forked: ")).await;
    let proof = log.ledger.contradiction().expect("it is proven");
    assert_eq!((&proof.note, proof.size, proof.is_fork()), (&fork.published().note, 7, true));
    agent.says(agent_message::Message::Report(report(&log.published().note, None))).await;
    until("it knows these", || alarm_of(&fleet).is_empty()).await;
    assert!(log.ledger.contradiction().is_some(), "there are two histories all the same");
}

#[tokio::test(start_paused = true)]
async fn what_fits_the_ledger_is_no_alarm_whichever_key_signed_it_and_what_does_not_says_so() {
    let (fleet, _) = fleet();
    let log = Log::new(ORIGIN, 10).await;
    let of_an_older_key = Log::new(ORIGIN, 10).await;
    log.grow(3, "more").await;
    let (_ca, mut agent) = log.met_by(&fleet, &of_an_older_key.published().note);
    assert_eq!(agent.is_shown().await.proof_from, 10);
    assert_eq!(alarm_of(&fleet), "");

    let claimed = Log::new(ORIGIN, 1000).await.published().note;
    agent.says(agent_message::Message::Report(report(&claimed, None))).await;
    until("the alarm", || alarm_of(&fleet).starts_with("other_key: ")).await;
    assert!(alarm_of(&fleet).contains("not proven to be this CA's"), "{}", alarm_of(&fleet));
    assert_eq!(log.ledger.contradiction(), None, "it is that agent's word");
}

#[tokio::test(start_paused = true)]
async fn a_checkpoint_of_another_log_and_what_is_none_are_alarms() {
    let (fleet, _) = fleet();
    let log = Log::new(ORIGIN, 10).await;
    let other = Log::new("example.org/chancery/00000000000000000000000000000002", 4).await;
    let (_ca, mut agent) = log.met_by(&fleet, &other.published().note);
    assert_eq!(agent.is_shown().await.proof_from, 0);
    until("the alarm", || alarm_of(&fleet).starts_with("other_origin: ")).await;
    agent.says(agent_message::Message::Report(report(&"x".repeat(1 << 20), None))).await;
    until("the alarm", || alarm_of(&fleet).starts_with("unreadable: ")).await;
    assert_eq!(log.ledger.contradiction(), None);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_knows_the_lost_log_is_shown_how_this_one_begins_and_no_other_is() {
    const NEW: &str = "example.org/chancery/00000000000000000000000000000002";
    const OTHER: &str = "example.org/chancery/00000000000000000000000000000003";
    let (lost, other) = (Log::new(ORIGIN, 10).await.published().note, Log::new(OTHER, 10).await.published().note);
    let log = Log::continuing(ORIGIN, NEW, State::default()).await;
    let both = [LEDGER_CHECKPOINTS, LEDGER_CONTINUED];

    let (fleet_of, _) = fleet();
    let (_ca, mut agent) = log.met_by_one_with(&both, &fleet_of, &lost);
    let shown = agent.is_shown().await;
    let first = shown.first.expect("the first entry");
    let proof: Vec<Hash> = first.proof.iter().map(|hash| hash.as_slice().try_into().unwrap()).collect();
    checkpoint::verify_inclusion(&first.entry, 0, &log.published().checkpoint, &proof).unwrap();
    assert_eq!(first.entry, log.ledger.stored_entries(0..1, 1).await.unwrap()[0]);
    assert_eq!((shown.proof_from, alarm_of(&fleet_of)), (0, String::new()));

    for (capabilities, note, alarm) in [(&both[..1], &lost, ""), (&both, &other, "other_origin: ")] {
        let (fleet, _) = fleet();
        let (_ca, mut agent) = log.met_by_one_with(capabilities, &fleet, note);
        assert_eq!(agent.is_shown().await.first, None);
        until("what is said of it", || alarm_of(&fleet).starts_with(alarm)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn after_a_loss_a_root_that_an_agent_knows_as_distrusted_is_so_again_unless_it_is_in_use() {
    let root = |number| chancery_identity::Fingerprint([number; 32]);
    let mut carried = State::default();
    carried.roots.insert(root(1), Root { state: RootState::Active, since: NOW, entry: 0, leave_by: None });
    carried.roots.insert(root(2), Root { state: RootState::Published, since: NOW, entry: 0, leave_by: None });
    let named: Vec<_> = (1..4).map(|number| root(number).0.to_vec()).chain([vec![1]]).collect();
    let hello = Hello { distrusted: named, ..Hello::default() };

    let log = Log::continuing(ORIGIN, "example.org/chancery/00000000000000000000000000000002", carried.clone()).await;
    let ((fleet_of, clock), ca) = (fleet(), Ca::with(log.clone()));
    let _agents = [1, 2].map(|number| ca.attach_with(&fleet_of, member(number), &hello));
    until("they are recorded", || log.ledger.current_state().distrusted().eq([root(2), root(3)])).await;
    assert_eq!(log.ledger.current_state().active_root(), Some(root(1)));
    assert_eq!(log.ledger.current_state().epoch, 3, "each once");

    let (late, whole) =
        (Log::continuing(ORIGIN, "example.org/chancery/00000000000000000000000000000003", carried).await, Log::new(ORIGIN, 1).await);
    *clock.0.lock().unwrap() = NOW + Duration::from_secs(3601);
    let member = Member { svid_not_after: NOW + time::Duration::DAY, ..member(3) };
    for log in [late, whole] {
        Ca::with(log.clone()).attach_with(&fleet_of, member.clone(), &hello).hears_the_beginning().await;
        assert_eq!(log.ledger.current_state().distrusted().count(), 0, "it is too late, or nothing was lost");
    }
}

#[tokio::test(start_paused = true)]
async fn agents_that_keep_acts_are_told_them_at_once_and_when_they_change() {
    let acts = |entry: &[u8]| StandingActs { origin: ORIGIN.into(), entries: vec![entry.to_vec()], ..StandingActs::default() };
    let log = Log::new(ORIGIN, 10).await;
    log.standing.send_replace(Arc::new(acts(b"one")));
    let (fleet, _) = fleet();
    let (_ca, mut agent) = log.met_by_one_with(&[STANDING_ACTS], &fleet, "");
    for (entry, next) in [(b"one", b"two"), (b"two", b"end")] {
        let told = async {
            loop {
                if let Some(ca_message::Message::StandingActs(told)) = agent.down.recv().await.unwrap().message {
                    return told;
                }
            }
        };
        assert_eq!(timeout(LATER, told).await.unwrap(), acts(entry));
        log.standing.send_replace(Arc::new(acts(next)));
    }
}

#[tokio::test(start_paused = true)]
async fn an_alarm_that_an_agent_reports_is_shown_until_it_reports_none() {
    let (fleet, _) = fleet();
    let log = Log::new(ORIGIN, 10).await;
    let note = log.published().note;
    let (_ca, agent) = log.met_by(&fleet, &note);
    let alarm = LedgerAlarm { reason: "forked".into(), message: "ö".repeat(10_000), remembered: note.clone(), ..LedgerAlarm::default() };
    agent.says(agent_message::Message::Report(report(&note, Some(alarm)))).await;
    until("the alarm", || alarm_of(&fleet).starts_with("forked: öö")).await;
    assert!(alarm_of(&fleet).len() < 1000, "what an agent says is kept short");
    assert_eq!(fleet.totals(1).ledger_alarms, 1);
    agent.says(agent_message::Message::Report(report(&note, None))).await;
    until("it has ended", || alarm_of(&fleet).is_empty() && fleet.ledger_problems().is_empty()).await;
}

#[test]
fn many_agents_with_an_alarm_are_counted_rather_than_named() {
    let (fleet, _) = fleet();
    for number in 0..8 {
        let alarm = LedgerAlarm { reason: "forked".into(), message: "it differs".into(), ..LedgerAlarm::default() };
        let hello = Hello { report: Some(report("", Some(alarm))), ..Hello::default() };
        drop(fleet.attach(member(number), &hello).unwrap());
    }
    let problems = fleet.ledger_problems();
    assert_eq!((problems.len(), fleet.totals(1).ledger_alarms), (6, 8));
    assert!(problems[5].contains("3 more agents"), "{}", problems[5]);
}
