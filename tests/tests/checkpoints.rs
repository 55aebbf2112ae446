//! The ledger's checkpoints between the real CA and a real agent: what one side shows, the other remembers, over restarts of both.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::time::Duration;

use chancery_tests::agent::Agent;
use chancery_tests::ca::Ca;
use chancery_tests::caller::Caller;
use chancery_tests::lab::{Lab, copy_directory};
use chancery_tests::mesh::NODE;
use chancery_tests::{http, wait};
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

fn size(ledger: &Value) -> u64 {
    ledger["size"].as_u64().unwrap()
}

#[tokio::test]
async fn a_restored_old_backup_is_an_alarm_of_ca_and_agent_and_both_go_on() {
    let lab = Lab::new().unwrap();
    let mut ca = Ca::start(&lab, HOUR).await.unwrap();
    let mut agent = Agent::start(&lab, &ca, NODE).await.unwrap();
    let caller = Caller::join(&lab, &ca, "node-b").await.unwrap();
    let first = known(&agent, "the agent knows a checkpoint", |ledger| size(ledger) > 0).await;
    ca.stop().await.unwrap();
    let (data, backup) = (ca.data().to_owned(), lab.at("backup"));
    copy_directory(&data, &backup).unwrap();

    // Each new session begins with the newest checkpoint, and a proof from the agent's.
    ca.run(&lab).await.unwrap();
    issue(&caller, 20).await;
    ca.stop().await.unwrap();
    ca.run(&lab).await.unwrap();
    let newer = known(&agent, "a newer one", |ledger| size(ledger) >= size(&first) + 20).await;
    assert_eq!(newer["alarm"], Value::Null);

    ca.stop().await.unwrap();
    std::fs::remove_dir_all(&data).unwrap();
    copy_directory(&backup, &data).unwrap();
    ca.run(&lab).await.unwrap();
    let alarmed = known(&agent, "the agent's alarm", |ledger| !ledger["alarm"].is_null()).await;
    assert_eq!(alarmed["alarm"]["reason"], "smaller", "{alarmed}");
    assert_eq!((&alarmed["checkpoint"], &alarmed["alarm"]["remembered"]), (&newer["checkpoint"], &newer["checkpoint"]));
    let problems = ca.ask(&["status"]).unwrap()["problems"].to_string();
    assert!(problems.contains("a backup was restored"), "{problems}");
    let listed = ca.ask(&["agent", "list"]).unwrap();
    assert!(listed.to_string().contains("rolled_back: "), "{listed}");
    assert!(ca.log().unwrap().contains("an agent's checkpoint is not the beginning of this CA's ledger"));

    issue(&caller, 1).await;
    let (status, ready) = http::get(agent.http, "/readyz").await.unwrap();
    assert!(status == 200 && ready.contains("smaller"), "{status} {ready}");
    agent.kill().unwrap();
    agent.run(&lab).await.unwrap();
    known(&agent, "the alarm after a restart", |ledger| ledger["alarm"]["reason"] == "smaller").await;
}
