//! The ledger's checkpoints between the real CA and a real agent: what one side shows, the other remembers, over restarts of both.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use chancery_tests::agent::Agent;
use chancery_tests::ca::Ca;
use chancery_tests::caller::Caller;
use chancery_tests::lab::{Lab, copy_directory};
use chancery_tests::mesh::NODE;
use chancery_tests::{http, tools, wait};
use serde_json::Value;

const HOUR: Duration = Duration::from_secs(3600);
const SEEN_WITHIN: Duration = Duration::from_secs(20);

async fn issue(caller: &Caller, count: usize) {
    caller.connected().await.unwrap();
    for _ in 0..count {
        // After a restart of the CA the caller may not know yet that its connection has ended.
        let answer = wait::until("the CA answers", Duration::from_secs(20), async || caller.issue(caller.request().unwrap()).await);
        answer.await.unwrap().unwrap();
    }
}

/// What the agent knows of the ledger, once it fits.
async fn known(agent: &Agent, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
    let ledger = || agent.ask(&["status"]).map(|mut status| status["ledger"].take());
    let wait = wait::until(what, SEEN_WITHIN, async || match ledger() {
        Ok(ledger) if fits(&ledger) => Ok(ledger),
        Ok(ledger) => Err(ledger.to_string()),
        Err(error) => Err(error.to_string()),
    });
    wait.await.unwrap()
}

fn run(arguments: &[&str]) -> Output {
    Command::new(tools::chancery("chancery-ca").unwrap()).args(arguments).output().unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn size(ledger: &Value) -> u64 {
    ledger["size"].as_u64().unwrap()
}

#[tokio::test]
async fn a_restored_old_backup_is_an_alarm_of_ca_and_agent_and_ends_until_the_loss_is_accepted() {
    let lab = Lab::new().unwrap();
    let mut ca = Ca::start(&lab, HOUR).await.unwrap();
    let mut agent = Agent::start(&lab, &ca, NODE).await.unwrap();
    let caller = Caller::join(&lab, &ca, "node-b").await.unwrap();
    let first = known(&agent, "the agent knows a checkpoint", |ledger| size(ledger) > 0).await;
    let (data, archive, backup) = (ca.data().to_owned(), lab.at("ca.tar"), lab.at("backup"));
    let made = run(&["backup", "--data-dir", text(&data), "--to", text(&archive)]);
    assert!(made.status.success(), "{made:?}");
    ca.stop().await.unwrap();
    copy_directory(&data, &backup).unwrap();

    // Each new session begins with the newest checkpoint, and a proof from the agent's.
    ca.run(&lab).await.unwrap();
    issue(&caller, 20).await;
    ca.stop().await.unwrap();
    ca.run(&lab).await.unwrap();
    let newer = known(&agent, "a newer one", |ledger| size(ledger) >= size(&first) + 20).await;
    assert_eq!(newer["alarm"], Value::Null);

    // By itself it starts: nobody who knows more is there.
    drop(caller);
    agent.kill().unwrap();
    ca.stop().await.unwrap();
    std::fs::remove_dir_all(&data).unwrap();
    copy_directory(&backup, &data).unwrap();
    ca.run(&lab).await.unwrap();
    agent.run(&lab).await.unwrap();
    let alarmed = known(&agent, "the agent's alarm", |ledger| !ledger["alarm"].is_null()).await;
    assert_eq!(alarmed["alarm"]["reason"], "smaller", "{alarmed}");
    assert_eq!((&alarmed["checkpoint"], &alarmed["alarm"]["remembered"]), (&newer["checkpoint"], &newer["checkpoint"]));
    let (status, ready) = http::get(agent.http, "/readyz").await.unwrap();
    assert!(status == 200 && ready.contains("smaller"), "{status} {ready}");
    let status = ca.ask(&["status"]).unwrap();
    assert!(status["ready"] == false && status["problems"].to_string().contains("a backup was restored"), "{status}");
    let shown = ca.ask(&["agent", "show", NODE]).unwrap();
    assert!(shown["ledger_alarm"].as_str().unwrap().starts_with("rolled_back: "), "{shown}");
    assert_eq!(shown["ledger_evidence"]["remembered"], newer["checkpoint"]);
    let refused = ca.chancery(&["log", "rotate-key", "--reason", "why not"]).unwrap_err().to_string();
    assert!(refused.contains("restore FILE --accept-loss"), "{refused}");
    assert!(ca.log().unwrap().contains("an agent's checkpoint is not the beginning of this CA's ledger"));
    let (status, ready) = http::get(ca.http, "/readyz").await.unwrap();
    assert!(status == 503 && ready.contains("a backup was restored"), "{status} {ready}");
    // It is written when the CA ends, if it was not before.
    ca.stop().await.unwrap();
    let refused = ca.refused(&lab).await.unwrap();
    assert!(refused.contains("checkpoint.conflict") && refused.contains("entries are missing"), "{refused}");

    let kept = lab.at("kept");
    std::fs::rename(&data, &kept).unwrap();
    let (conflict, keys) = (kept.join("checkpoint.conflict"), kept.join("ledger-keys"));
    let restore = ["restore", text(&archive), "--data-dir", text(&data), "--checkpoint", text(&conflict)];
    assert!(!run(&restore).status.success(), "that a backup lacks entries is known now");
    let accept = ["--ledger-keys", text(&keys), "--accept-loss", "--reason", "the newer entries are gone"];
    let restored = run(&[&restore[..], &accept].concat());
    assert!(restored.status.success(), "{restored:?}");
    for directory in ["keys", "development"] {
        copy_directory(&kept.join(directory), &data.join(directory)).unwrap();
    }
    ca.run(&lab).await.unwrap();
    issue(&Caller::join(&lab, &ca, "node-c").await.unwrap(), 1).await;
    known(&agent, "the agent goes over", |ledger| ledger["continued"]["remembered"] == newer["checkpoint"]).await;
    let status = ca.ask(&["status"]).unwrap();
    assert_eq!(status["ready"], true, "{status}");
}
