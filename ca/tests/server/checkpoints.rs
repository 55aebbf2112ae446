//! The ledger's checkpoints between the running CA and its agents.

use chancery_identity::X509Svid;
use chancery_identity::checkpoint::{Checkpoint, CheckpointVerifier, Hash, verify_consistency};
use chancery_proto::chancery::v1::{
    AgentMessage, AgentRecord, BanRequest, CaMessage, DiagnoseRequest, Hello, LedgerAlarm, LedgerCheckpoint, LedgerView, ListAgentsRequest,
    Report, agent_message, ca_message,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};

use crate::support::{Ca, NODE, SOON, TRUST_DOMAIN, copy, issue};

/// An agent's side of a session.
struct Follower {
    up: mpsc::Sender<AgentMessage>,
    down: Streaming<CaMessage>,
}

impl Follower {
    /// Begins a session as an agent that knows the checkpoint `note`.
    async fn new(ca: &Ca, agent: &X509Svid, note: &str) -> Self {
        let (up, reports) = mpsc::channel(4);
        let capabilities = vec!["ledger-checkpoints".to_owned()];
        let hello = Hello { capabilities, report: Some(report(note, None)), ..Hello::default() };
        up.send(AgentMessage { message: Some(agent_message::Message::Hello(hello)) }).await.unwrap();
        let down = ca.connect(Some(agent)).await.session(ReceiverStream::new(reports)).await.unwrap().into_inner();
        Self { up, down }
    }

    /// The next checkpoint that it is shown, and what the note says.
    async fn is_shown(&mut self) -> (LedgerCheckpoint, Checkpoint) {
        let shown = async {
            loop {
                if let Some(ca_message::Message::LedgerCheckpoint(shown)) = self.down.message().await.unwrap().unwrap().message {
                    return shown;
                }
            }
        };
        let shown = tokio::time::timeout(SOON, shown).await.expect("a checkpoint");
        let key: CheckpointVerifier = shown.verifier_key.parse().unwrap();
        let checkpoint = key.verify(&shown.note).unwrap();
        (shown, checkpoint)
    }

    async fn reports(&self, report: Report) {
        self.up.send(AgentMessage { message: Some(agent_message::Message::Report(report)) }).await.unwrap();
    }
}

fn report(note: &str, alarm: Option<LedgerAlarm>) -> Report {
    Report { ledger: Some(LedgerView { checkpoint: note.to_owned(), alarm }), ..Report::default() }
}

/// With the evidence.
async fn named(ca: &Ca) -> AgentRecord {
    ca.operator().await.list_agents(ListAgentsRequest { agent: NODE.into() }).await.unwrap().into_inner().agents.remove(0)
}

async fn listed(ca: &Ca) -> AgentRecord {
    ca.operator().await.list_agents(ListAgentsRequest::default()).await.unwrap().into_inner().agents.remove(0)
}

/// Lets the ledger grow.
async fn issue_some(ca: &Ca, agent: &X509Svid) {
    let mut client = ca.connect(Some(agent)).await;
    for _ in 0..10 {
        issue(&mut client, ca.token(|_| ())).await.unwrap();
    }
}

/// The CA that published 10 more entries than the backup of its data directory has, after that was put in its place; the agent that was shown
/// them, and the note of its checkpoint.
async fn restored() -> (Ca, X509Svid, String) {
    let ca = Ca::start().await;
    let agent = ca.join(NODE).await;
    let directory = ca.stop().await;
    let (data, backup) = (directory.path().join("data"), directory.path().join("backup"));
    copy(&data, &backup);
    let ca = Ca::try_start(directory, "").await.unwrap();
    issue_some(&ca, &agent).await;
    ca.until_async("all of it is published", async || {
        let entries = ca.status().await.ledger_entries;
        Follower::new(&ca, &agent, "").await.is_shown().await.1.size == entries
    })
    .await;
    let (shown, _) = Follower::new(&ca, &agent, "").await.is_shown().await;
    let directory = ca.stop().await;
    std::fs::remove_dir_all(&data).unwrap();
    std::fs::rename(backup, data).unwrap();
    (Ca::try_start(directory, "").await.unwrap(), agent, shown.note)
}

#[tokio::test]
async fn an_agent_is_shown_checkpoints_each_of_which_is_proved_to_continue_the_one_before() {
    let ca = Ca::start().await;
    let agent = ca.join(NODE).await;
    let (first, known) = Follower::new(&ca, &agent, "").await.is_shown().await;
    assert!(known.origin.starts_with(&format!("{TRUST_DOMAIN}/chancery/")), "{}", known.origin);
    issue_some(&ca, &agent).await;
    let (second, newer) = Follower::new(&ca, &agent, &first.note).await.is_shown().await;
    assert!(newer.size > known.size);
    assert_eq!(second.proof_from, known.size);
    let proof: Vec<Hash> = second.proof.iter().map(|hash| hash.as_slice().try_into().unwrap()).collect();
    verify_consistency(&known, &newer, &proof).unwrap();

    let directory = ca.stop().await;
    let ca = Ca::try_start(directory, "").await.unwrap();
    let (third, newest) = Follower::new(&ca, &agent, &second.note).await.is_shown().await;
    let proof: Vec<Hash> = third.proof.iter().map(|hash| hash.as_slice().try_into().unwrap()).collect();
    verify_consistency(&newer, &newest, &proof).unwrap();
    assert_eq!(third.verifier_key, first.verifier_key);
    assert!(ca.status().await.problems.is_empty());
}

/// Nothing is recorded, everybody is told why, and it does not start again.
async fn is_ended(ca: Ca, agent: &X509Svid, note: &str, says: &str) {
    let entries = ca.status().await.ledger_entries;
    let refusal = issue(&mut ca.connect(Some(agent)).await, ca.token(|_| ())).await.unwrap_err();
    assert!(refusal.retryable && refusal.reason == "ledger_contradicted", "the agent keeps what it has, and tries again: {refusal:?}");
    let ban = BanRequest { agent: agent.id().to_string(), reason: "why not".into() };
    let refused = ca.operator().await.ban(ban).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    for (told, what) in [
        (refused.message().to_owned(), "an act"),
        (refusal.message, "an issuance"),
        (ca.get("/readyz").await, "readyz"),
        (format!("{:?}", ca.operator().await.diagnose(DiagnoseRequest {}).await.unwrap().into_inner().findings), "doctor"),
    ] {
        for part in [says, agent.id().as_str(), "restore FILE --accept-loss"] {
            assert!(told.contains(part), "{what}: {part}: {told}");
        }
    }
    assert!(ca.get("/readyz").await.starts_with("HTTP/1.1 503"));
    let metrics = ca.get("/metrics").await;
    for line in ["chancery_ready 0", "chancery_ledger_agent_alarms 1", "chancery_ledger_recording{state=\"contradicted\"} 1"] {
        assert!(metrics.contains(line), "{line}");
    }
    let data = ca.data_dir();
    let (checkpoint, conflict) = (data.join("checkpoint"), data.join("checkpoint.conflict"));
    ca.until_async("it is kept", async || std::fs::read_to_string(&conflict).is_ok_and(|kept| kept == note)).await;
    let published = std::fs::read_to_string(&checkpoint).unwrap();
    assert_eq!(ca.status().await.ledger_entries, entries);
    let directory = ca.stop().await;
    assert_eq!(std::fs::read_to_string(checkpoint).unwrap(), published, "and nothing more is published");
    let refused = Ca::try_start(directory, "").await.err().expect("it does not start").to_string();
    assert!(refused.contains("checkpoint.conflict") && refused.contains("--accept-loss"), "{refused}");
}

#[tokio::test]
async fn a_restored_old_backup_is_given_away_by_an_agent_that_knows_more_and_ends() {
    let (ca, agent, note) = restored().await;
    assert!(ca.status().await.problems.is_empty(), "by itself the CA cannot know");
    let mut follower = Follower::new(&ca, &agent, &note).await;
    let status = ca.until("the alarm", |status| !status.problems.is_empty()).await;
    assert!(status.problems[0].contains("a backup was restored") && !status.ready, "{:?}", status.problems);
    let (shown, older) = follower.is_shown().await;
    assert_eq!(shown.proof_from, 0);
    ca.until_async("the alarm", async || listed(&ca).await.ledger_alarm.starts_with("rolled_back: ")).await;
    let record = named(&ca).await;
    assert!(record.ledger_size > older.size, "{record:?}");
    let evidence = record.ledger_evidence.unwrap();
    assert_eq!((&evidence.remembered, &evidence.offered), (&note, &shown.note));
    let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_chancery"))
        .arg("--socket")
        .arg(&ca.running.admin_socket)
        .args(["--output", "json", "agent", "show", NODE])
        .output();
    let printed: serde_json::Value = serde_json::from_slice(&output.await.unwrap().stdout).unwrap();
    assert_eq!((&printed["ledger_evidence"]["remembered"], &printed["ledger_evidence"]["offered"]), (&note.into(), &shown.note.into()));
    drop(follower);
    is_ended(ca, &agent, &evidence.remembered, "a backup was restored").await;
}

#[tokio::test]
async fn a_ledger_that_has_outgrown_what_an_agent_knows_with_other_entries_is_given_away_too_and_ends() {
    let (ca, agent, note) = restored().await;
    issue_some(&ca, &agent).await;
    issue_some(&ca, &agent).await;
    let _follower = Follower::new(&ca, &agent, &note).await;
    ca.until_async("the fork", async || listed(&ca).await.ledger_alarm.starts_with("forked: ")).await;
    is_ended(ca, &agent, &note, "there are two histories").await;
}

#[tokio::test]
async fn an_alarm_of_an_agent_is_shown_to_operators_until_it_ends() {
    let ca = Ca::start().await;
    let agent = ca.join(NODE).await;
    let mut follower = Follower::new(&ca, &agent, "").await;
    let (shown, _) = follower.is_shown().await;
    let alarm = LedgerAlarm {
        reason: "inconsistent".into(),
        message: "it is not shown to begin with the one with 3 entries".into(),
        remembered: shown.note.clone(),
        offered: shown.note.clone(),
        raised_at_ms: 1,
    };
    follower.reports(report(&shown.note, Some(alarm))).await;
    let status = ca.until("the alarm", |status| !status.problems.is_empty()).await;
    assert!(status.problems[0].contains("it is not shown to begin with"), "{:?}", status.problems);
    follower.reports(report(&shown.note, None)).await;
    ca.until("its end", |status| status.problems.is_empty()).await;
    assert!(ca.get("/metrics").await.contains("chancery_ledger_agent_alarms 0"));
}
