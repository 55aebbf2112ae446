//! A CA that is lost with its machine: it goes on from its backup, and proxies notice nothing; or, where there is none, it is set up anew, and
//! agents take the new one when they are told to.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use age::secrecy::ExposeSecret;
use chancery_tests::agent::Agent;
use chancery_tests::ca::Ca;
use chancery_tests::caller::Caller;
use chancery_tests::lab::{Lab, copy_directory};
use chancery_tests::load::Steady;
use chancery_tests::mesh::{Mesh, NODE, Settings, Workload};
use chancery_tests::{http, tools, wait};
use serde_json::Value;

const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(30);

/// Without holding up the load, which runs on the same threads.
fn run(program: &str, arguments: &[&str]) -> String {
    let output = tokio::task::block_in_place(|| Command::new(tools::chancery(program).unwrap()).args(arguments).output()).unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn write_private(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

async fn connects(cart: &Workload) -> Result<(), String> {
    match http::get(cart.envoy.at.outbound, "/").await {
        Ok((200, _)) => Ok(()),
        other => Err(format!("{other:?}")),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ca_that_is_lost_with_its_machine_goes_on_from_its_backup_and_no_connection_fails() {
    let Some(settings) = tools::envoy().map(Settings::lasting) else { return };
    let lab = Lab::new().unwrap();
    let (passphrase, identity, backup) = (lab.at("passphrase"), lab.at("identity"), lab.at("ca.tar"));
    write_private(&passphrase, "open sesame\n");
    let key = age::x25519::Identity::generate();
    write_private(&identity, key.to_string().expose_secret());
    let sealed = format!("\n[keys]\npassphrase_file = \"{}\"\n", passphrase.display());
    let ca = Ca::start_in(&lab, &lab.at("ca"), HOUR, &sealed).await.unwrap();
    let agent = Agent::start(&lab, &ca, NODE).await.unwrap();
    let mut mesh = Mesh::around(ca, agent, lab, settings).unwrap();
    let (cart, checkout) = mesh.pair().await.unwrap();
    wait::until("a connection", SOON, async || connects(&cart).await).await.unwrap();
    let load = Steady::begin(&cart.envoy).await.unwrap();

    let (data, recipient) = (mesh.ca.data().to_owned(), key.to_public().to_string());
    // A backup goes up to the newest checkpoint, which whoever asks for it makes the newest entry's: the entries of this test are in it.
    run("chancery", &["--socket", text(&mesh.ca.admin_socket()), "log", "checkpoint"]);
    run("chancery-ca", &["backup", "--data-dir", text(&data), "--to", text(&backup), "--with-keys", "--recipient", &recipient]);
    let last_checkpoint = mesh.lab.at("checkpoint");
    std::fs::copy(data.join("checkpoint"), &last_checkpoint).unwrap();
    mesh.ca.kill().unwrap();
    std::fs::remove_dir_all(&data).unwrap();

    let restore = ["restore", text(&backup), "--data-dir", text(&data), "--checkpoint", text(&last_checkpoint)];
    run("chancery-ca", &[&restore[..], &["--identity", text(&identity)]].concat());
    mesh.ca.run(&mesh.lab).await.unwrap();
    // Everything goes on, with the keys that came out of the backup. A rotation waits for what the backup may lack; the emergency does not.
    let socket = mesh.ca.admin_socket();
    let chancery = |arguments: &[&str]| run("chancery", &[&["--socket", text(&socket), "-o", "json"], arguments].concat());
    let listed = |what: &str| serde_json::from_str::<Value>(&chancery(&[what, "list"])).unwrap();
    for step in ["prepare", "publish"] {
        chancery(&["root", step, "--reason", "the machine was lost"]);
    }
    let gate = async || {
        let arguments = ["--socket", text(&socket), "-o", "json", "root", "activate", "--dry-run"];
        let asked = tokio::task::block_in_place(|| Command::new(tools::chancery("chancery").unwrap()).args(arguments).output()).unwrap();
        let gate: Value = serde_json::from_slice(&asked.stdout).unwrap();
        match &gate["obstacles"].as_array().unwrap()[..] {
            [one] if one.to_string().contains("the ledger was restored from a backup") => Ok(()),
            _ => Err(gate.to_string()),
        }
    };
    wait::until("everybody has the next root, and the restoration alone is in the way", SOON, gate).await.unwrap();
    let old = listed("root")[0]["fingerprint"].as_str().unwrap().to_owned();
    // Somebody may need it whom the ledger lacks, so it stays until the deadline.
    chancery(&["root", "distrust", &old, "--reason", "the machine was lost", "--deadline", "6s"]);
    assert_eq!((&listed("root")[0]["state"], &listed("root")[1]["state"]), (&"distrusted".into(), &"active".into()));
    load.end(&cart.envoy, &checkout.envoy).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ca_that_is_lost_with_everything_is_set_up_anew_and_agents_take_it_after_a_reset() {
    let Some(settings) = tools::envoy().map(Settings::lasting) else { return };
    let mut mesh = Mesh::start(Lab::new().unwrap(), settings).await.unwrap();
    let (cart, _checkout) = mesh.pair().await.unwrap();
    wait::until("a connection", SOON, async || connects(&cart).await).await.unwrap();
    let before = cart.envoy.certificate().await.unwrap();
    mesh.ca.kill().unwrap();
    let (data, lost) = (mesh.ca.data().to_owned(), mesh.lab.at("lost"));
    std::fs::rename(&data, &lost).unwrap();

    mesh.ca.run(&mesh.lab).await.unwrap();
    mesh.ca.stop().await.unwrap();
    // The API server, whose part this is here, was not lost.
    std::fs::remove_dir_all(data.join("development")).unwrap();
    copy_directory(&lost.join("development"), &data.join("development")).unwrap();
    mesh.ca.run(&mesh.lab).await.unwrap();
    let refused = async || {
        let problems = mesh.agent.ask(&["status"]).map_err(|error| error.to_string())?["problems"].to_string();
        if problems.contains("no TLS session") { Ok(()) } else { Err(problems) }
    };
    wait::until("the agent refuses a CA that it does not know", SOON, refused).await.unwrap();
    connects(&cart).await.unwrap();

    let config = mesh.agent.config().to_owned();
    mesh.agent.kill().unwrap();
    for what in [&[][..], &["--ledger"]] {
        run("chancery-agent", &[&["reset", "--config", text(&config)], what].concat());
    }
    mesh.agent.run(&mesh.lab).await.unwrap();
    let after = cart.envoy.next_certificate(&before, SOON).await.unwrap();
    assert!(mesh.ca.chancery(&["identity", "show", &after.serial]).is_ok(), "the new ledger has it");
    wait::until("a connection under the new root", SOON, async || connects(&cart).await).await.unwrap();
    let status = mesh.agent.ask(&["status"]).unwrap();
    assert_eq!(status["problems"], serde_json::json!([]), "{status}");
}

/// Nothing that was recorded behind the backup was in a checkpoint that somebody was shown, so nobody can tell that it was there but by what agents
/// keep of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ban_and_a_change_of_trust_behind_the_end_of_a_restored_backup_stay_in_force() {
    let lab = Lab::new().unwrap();
    let mut ca = Ca::start(&lab, HOUR).await.unwrap();
    let stolen = Caller::join(&lab, &ca, "node-d").await.unwrap().spiffe_id().unwrap();
    let caller = Caller::join(&lab, &ca, "node-b").await.unwrap();
    let agent = Agent::start(&lab, &ca, NODE).await.unwrap();
    let (data, kept, backup) = (ca.data().to_owned(), lab.at("kept"), lab.at("ca.tar"));
    ca.chancery(&["log", "checkpoint"]).unwrap();
    run("chancery-ca", &["backup", "--data-dir", text(&data), "--to", text(&backup)]);
    // All this within the half minute until agents are shown another checkpoint.
    for _ in 0..20 {
        caller.issue(caller.request().unwrap()).await.unwrap().unwrap();
    }
    // It does not wait for the agents of this test that are none.
    let _not_acknowledged = ca.ask(&["agent", "ban", &stolen, "--wait", "0s", "--reason", "its disk was stolen"]);
    for step in ["prepare", "publish"] {
        ca.chancery(&["root", step, "--reason", "once a year"]).unwrap();
    }
    let sequence = |ca: &Ca| ca.ask(&["status"]).unwrap()["trust_sequence"].as_u64().unwrap();
    let has = |sequence: u64| {
        let status = agent.ask(&["status"]).map_err(|error| error.to_string())?;
        if status["trust_sequence"] == sequence { Ok(()) } else { Err(status.to_string()) }
    };
    let before = sequence(&ca);
    wait::until("the agent has the newest trust state", SOON, async || has(before)).await.unwrap();
    let memory = lab.at("agent-state").join("ledger");
    let keeps = async || {
        let known: Value =
            serde_json::from_slice(&std::fs::read(&memory).map_err(|error| error.to_string())?).map_err(|error| error.to_string())?;
        if known["acts"][0]["entries"].as_array().is_some_and(|acts| acts.len() == 1) { Ok(()) } else { Err(known.to_string()) }
    };
    wait::until("the agent keeps the ban", SOON, keeps).await.unwrap();
    ca.kill().unwrap();
    std::fs::rename(&data, &kept).unwrap();

    run("chancery-ca", &["restore", text(&backup), "--data-dir", text(&data)]);
    for directory in ["keys", "ledger-keys", "development"] {
        copy_directory(&kept.join(directory), &data.join(directory)).unwrap();
    }
    ca.run(&lab).await.unwrap();
    let banned = async || {
        let acts = ca.ask(&["log", "acts", "--action", "agent.ban"]).map_err(|error| error.to_string())?;
        let is_so = acts[0]["target"] == stolen.as_str() && acts[0]["actor"] == "ca";
        if is_so { Ok(()) } else { Err(acts.to_string()) }
    };
    wait::until("the ban is recorded again", SOON, banned).await.unwrap();
    let refused = Caller::join(&lab, &ca, "node-d").await.err().expect("it is banned").to_string();
    assert!(refused.contains("was banned by an operator"), "{refused}");

    // The lost root is not there any more; another one reaches the agent, with a larger sequence than any that it was given.
    for step in ["prepare", "publish"] {
        ca.chancery(&["root", step, "--reason", "once a year"]).unwrap();
    }
    let after = sequence(&ca);
    assert!(after > before, "{after} {before}");
    wait::until("the agent takes the newer trust state over", SOON, async || has(after)).await.unwrap();
    let issued = wait::until("the CA answers", SOON, async || caller.issue(caller.request().unwrap()).await);
    issued.await.unwrap().unwrap();
    let status = ca.ask(&["status"]).unwrap();
    assert!(status["ready"] == true && !status["problems"].to_string().contains("contradict"), "{status}");
}
