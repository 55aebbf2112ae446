//! A backup a day old, and no newer one: what the real programs make of it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use chancery_identity::{Fingerprint, TrustBundle};
use chancery_tests::agent::Agent;
use chancery_tests::ca::{Ca, TRUST_DOMAIN};
use chancery_tests::caller::Caller;
use chancery_tests::lab::{Lab, copy_directory};
use chancery_tests::mesh::NODE;
use chancery_tests::{tools, wait};
use serde_json::Value;

const HOUR: Duration = Duration::from_secs(3600);
const SEEN_WITHIN: Duration = Duration::from_secs(30);

fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(tools::chancery(program).unwrap()).args(arguments).output().unwrap()
}

fn succeeds(program: &str, arguments: &[&str]) -> Value {
    let output = run(program, arguments);
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

async fn issue(caller: &Caller, count: usize) {
    caller.connected().await.unwrap();
    for _ in 0..count {
        let answer = wait::until("the CA answers", SEEN_WITHIN, async || caller.issue(caller.request().unwrap()).await);
        answer.await.unwrap().unwrap();
    }
}

/// What the agent knows of the ledger, once it fits.
async fn known(agent: &Agent, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
    let wait = wait::until(what, SEEN_WITHIN, async || match agent.ask(&["status"]).map(|mut status| status["ledger"].take()) {
        Ok(ledger) if fits(&ledger) => Ok(ledger),
        Ok(ledger) => Err(ledger.to_string()),
        Err(error) => Err(error.to_string()),
    });
    wait.await.unwrap()
}

fn own_id(agent: &Agent) -> Result<String, String> {
    let status = agent.ask(&["status"]).map_err(|error| error.to_string())?;
    status["spiffe_id"].as_str().map(str::to_owned).ok_or_else(|| status.to_string())
}

fn entries(checkpoint: &str) -> u64 {
    checkpoint.lines().nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn an_old_backup_is_refused_without_accepting_the_loss_and_with_it_agents_go_on_and_auditors_see_the_gap() {
    let lab = Lab::new().unwrap();
    let mut ca = Ca::start(&lab, HOUR).await.unwrap();
    let agent = Agent::start(&lab, &ca, NODE).await.unwrap();
    let caller = Caller::join(&lab, &ca, "node-b").await.unwrap();
    issue(&caller, 3).await;
    for step in ["prepare", "publish"] {
        ca.ask(&["root", step, "--reason", "a replacement"]).unwrap();
    }
    let replacement = ca.ask(&["root", "list"]).unwrap()[1]["fingerprint"].as_str().unwrap().to_owned();
    // A backup goes up to the newest checkpoint, which whoever asks for it makes the newest entry's.
    ca.ask(&["log", "checkpoint"]).unwrap();
    let (data, backup, kept) = (ca.data().to_owned(), lab.at("ca.tar"), lab.at("kept"));
    let made = succeeds("chancery-ca", &["backup", "--data-dir", text(&data), "--to", text(&backup), "--output", "json"]);
    let backed_up = made["entries"].as_u64().unwrap();
    issue(&caller, 20).await;
    let stolen = Caller::join(&lab, &ca, "node-d").await.unwrap().spiffe_id().unwrap();
    ca.ask(&["root", "distrust", &replacement, "--reason", "its key was stolen"]).unwrap();
    // It does not wait for the agents of this test that are none.
    let _not_acknowledged = ca.ask(&["agent", "ban", &stolen, "--wait", "0s", "--reason", "its disk was stolen"]);
    let elsewhere = Lab::new().unwrap();
    let later = Agent::start(&elsewhere, &ca, "node-c").await.unwrap();
    let forgotten = wait::until("the later agent has joined", SEEN_WITHIN, async || own_id(&later)).await.unwrap();
    // A new session begins with the newest checkpoint.
    ca.stop().await.unwrap();
    ca.run(&lab).await.unwrap();
    let old = known(&agent, "the agent knows more", |ledger| ledger["size"].as_u64() >= Some(backed_up + 20)).await;
    ca.stop().await.unwrap();
    std::fs::rename(&data, &kept).unwrap();
    let known_checkpoint = kept.join("checkpoint");

    let restore = ["restore", text(&backup), "--data-dir", text(&data), "--checkpoint", text(&known_checkpoint)];
    let refused = run("chancery-ca", &restore);
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success() && said.contains("would be lost") && said.contains("--accept-loss"), "{said}");
    assert!(!data.exists());
    let ledger_keys = kept.join("ledger-keys");
    let accept = ["--ledger-keys", text(&ledger_keys), "--accept-loss", "--reason", "the disk is gone", "--output", "json"];
    let restored = succeeds("chancery-ca", &[&restore[..], &accept].concat());
    for directory in ["keys", "development"] {
        copy_directory(&kept.join(directory), &data.join(directory)).unwrap();
    }
    ca.run(&lab).await.unwrap();

    issue(&caller, 5).await;
    let new = known(&agent, "the agent goes over", |ledger| !ledger["continued"].is_null()).await;
    assert_eq!((&new["alarm"], &new["continued"]["remembered"]), (&Value::Null, &old["checkpoint"]));
    assert_eq!(new["continued"]["why"], "the disk is gone");
    assert!(agent.log().unwrap().contains("a new ledger continues"));
    let problems = agent.ask(&["status"]).unwrap()["problems"].to_string();
    assert!(problems.contains("a new ledger continues"), "{problems}");
    let listed = ca.ask(&["agent", "list"]).unwrap().to_string();
    assert!(!listed.contains("other_origin"), "{listed}");

    let auditors = lab.at("auditors-checkpoint");
    std::fs::copy(&known_checkpoint, &auditors).unwrap();
    let alarm = ca.ask(&["log", "verify", "--since", text(&auditors), "--save"]).unwrap_err().to_string();
    assert!(alarm.contains("ALARM") && alarm.contains("the disk is gone"), "{alarm}");
    assert!(
        lab.at("auditors-checkpoint.conflict").exists() && std::fs::read(&auditors).unwrap() == std::fs::read(&known_checkpoint).unwrap()
    );

    let recorded = async || {
        let of_the_later = ca.ask(&["identity", "list", "--id", &forgotten]).map_err(|error| error.to_string())?.to_string();
        if of_the_later.contains("recovered: an agent told it") { Ok(()) } else { Err(of_the_later) }
    };
    wait::until("what the later agent holds is recorded again", SEEN_WITHIN, recorded).await.unwrap();

    let distrusted = async || {
        let roots = ca.ask(&["root", "list"]).map_err(|error| error.to_string())?;
        let again = roots.as_array().unwrap().iter().any(|root| root["fingerprint"] == *replacement && root["state"] == "distrusted");
        if again { Ok(()) } else { Err(roots.to_string()) }
    };
    wait::until("the root that agents know as distrusted is so again", SEEN_WITHIN, distrusted).await.unwrap();
    let bundle = TrustBundle::from_pem(TRUST_DOMAIN.parse().unwrap(), &std::fs::read(ca.bundle()).unwrap()).unwrap();
    assert!(bundle.x509_authorities().iter().all(|root| Fingerprint::of(root).to_string() != replacement), "it is in the bundle");

    let acts = ca.ask(&["log", "acts"]).unwrap();
    let again = acts.as_array().unwrap().iter().find(|act| act["action"] == "root.distrust").expect("it is an act of this ledger");
    assert_eq!(again["actor"], "ca", "{again}");
    assert!(again["why"].as_str().unwrap().contains("was told so before entries were lost"), "{again}");
    let banned = acts.as_array().unwrap().iter().find(|act| act["action"] == "agent.ban").expect("what an agent knows stays in force");
    assert_eq!((&banned["target"], &banned["actor"]), (&stolen.as_str().into(), &"ca".into()), "{banned}");
    assert!(banned["why"].as_str().unwrap().contains("brought by spiffe://"), "{banned}");
    let gap = acts.as_array().unwrap().last().unwrap();
    let lost = entries(&std::fs::read_to_string(&known_checkpoint).unwrap());
    assert_eq!((&gap["entry"], &gap["action"], &gap["why"]), (&0.into(), &"log.accept-loss".into(), &"the disk is gone".into()), "{gap}");
    assert!(gap["target"].as_str().unwrap().ends_with(&format!("entries {backed_up} to {}", lost - 1)), "{gap}");
    ca.stop().await.unwrap();
    let verified = |data: &str| succeeds("chancery", &["--output", "json", "log", "verify", "--certificates", "--data-dir", data]);
    assert_eq!(verified(restored["new_ledger"]["previous"].as_str().unwrap())["entries"], backed_up);
    assert_eq!(verified(text(&data))["verdict"], "intact");
}
