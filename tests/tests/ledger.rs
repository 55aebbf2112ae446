//! The ledger as auditors see it while the CA runs: proofs, checkpoints kept from day to day, and clients that are not Chancery's.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use chancery_identity::checkpoint::CheckpointVerifier;
use chancery_tests::auditor::{GoClient, Served};
use chancery_tests::ca::{Ca, TRUST_DOMAIN};
use chancery_tests::caller::Caller;
use chancery_tests::lab::{Lab, copy_directory};
use chancery_tests::mesh::NODE;
use chancery_tests::process::Process;
use chancery_tests::{http, tools, wait};
use serde_json::Value;

const HOUR: Duration = Duration::from_secs(3600);

/// Records so many issuances. After a restart of the CA the caller may not know yet that its connection has ended.
async fn issue(caller: &Caller, count: usize) {
    let requests: Vec<_> = (0..count).map(|_| caller.request().unwrap()).collect();
    for some in requests.chunks(64) {
        let results = wait::until("the CA answers", Duration::from_secs(20), async || caller.call(some.to_vec()).await).await.unwrap();
        for result in results {
            assert!(matches!(result.outcome, Some(chancery_proto::chancery::v1::workload_result::Outcome::Svid(_))), "{result:?}");
        }
    }
}

/// Runs `chancery` with the CA's socket: whether it succeeded, and everything that it said.
fn chancery(ca: &Ca, arguments: &[&str]) -> (bool, String) {
    let mut command = Command::new(tools::chancery("chancery").unwrap());
    let output = command.arg("--socket").arg(ca.admin_socket()).args(arguments).output().unwrap();
    (output.status.success(), [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat())
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[tokio::test]
async fn a_client_that_is_not_ours_verifies_checkpoint_inclusion_and_consistency() {
    let lab = Lab::new().unwrap();
    let Some(go) = GoClient::build(&lab).unwrap() else { return };
    let ca = Ca::start(&lab, HOUR).await.unwrap();
    let caller = Caller::join(&lab, &ca, NODE).await.unwrap();
    let served = Served::start(&lab, &ca).unwrap();
    let old = lab.at("old-checkpoint");
    fs::write(&old, ca.chancery(&["log", "checkpoint"]).unwrap()).unwrap();
    // More than one tile.
    issue(&caller, 300).await;
    let proof = lab.at("proof.json");
    fs::write(&proof, ca.chancery(&["--output", "json", "log", "prove", "260"]).unwrap()).unwrap();

    let verified = go.verify(&served, &[("-since", &old), ("-proof", &proof)]).unwrap();
    let said = String::from_utf8_lossy(&verified.stdout).into_owned() + &String::from_utf8_lossy(&verified.stderr);
    assert!(verified.status.success(), "{said}");
    let entries = ca.ask(&["status"]).unwrap()["ledger_entries"].as_u64().unwrap();
    assert!(entries > 300 && said.contains(&format!("inclusion of {entries} entries\n")), "{said}");
    assert!(said.contains(&format!(" entries with {entries}\n")) && said.contains("proof of entry 260\n"), "{said}");

    let forged = fs::read_to_string(&proof).unwrap().replace("\"entry\": 260", "\"entry\": 259");
    fs::write(&proof, forged).unwrap();
    assert!(!go.verify(&served, &[("-proof", &proof)]).unwrap().status.success(), "a proof of another entry was believed");
}

#[tokio::test]
async fn tiles_are_served_under_their_names_alone() {
    let lab = Lab::new().unwrap();
    let ca = Ca::start(&lab, HOUR).await.unwrap();
    let served = Served::start(&lab, &ca).unwrap();
    let address = served.url.strip_prefix("http://").unwrap().strip_suffix("/ledger").unwrap().parse().unwrap();
    let get = async |path: &str| http::get(address, path).await.unwrap();
    let (code, note) = get("/ledger/checkpoint").await;
    assert_eq!(code, 200);
    assert_eq!(note, ca.chancery(&["log", "checkpoint"]).unwrap());
    assert_eq!(get("/ledger/tile/0/000.p/2").await.0, 200);
    assert_eq!(get("/ledger/tile/entries/000.p/1").await.0, 200);
    for missing in [
        "tile/0/000",
        "tile/0/00.p/2",
        "tile/0/000.p/02",
        "tile/00/000.p/2",
        "tile/data/000.p/1",
        "tile/8/0/000.p/2",
        "tile/0/x000/000.p/2",
    ] {
        assert_eq!(get(&format!("/ledger/{missing}")).await.0, 404, "{missing}");
    }
    let (is_served, said) = chancery(&ca, &["log", "serve-local", "--listen", "0.0.0.0:0"]);
    assert!(!is_served && said.contains("no loopback address"), "{said}");
}

#[tokio::test]
async fn whatever_was_issued_can_be_proved_at_once() {
    let lab = Lab::new().unwrap();
    let ca = Ca::start(&lab, HOUR).await.unwrap();
    let caller = Caller::join(&lab, &ca, NODE).await.unwrap();
    let issued = caller.issue(caller.request().unwrap()).await.unwrap().unwrap();
    let certificate = lab.at("cart.der");
    fs::write(&certificate, &issued.chain[0]).unwrap();
    let by_certificate = ca.ask(&["log", "prove", text(&certificate)]).unwrap();
    assert_eq!(by_certificate["entry"], issued.entry);
    let serial = by_certificate["serial"].as_str().unwrap();
    assert_eq!(ca.ask(&["log", "prove", serial]).unwrap()["bytes"], by_certificate["bytes"]);
    let pem = lab.at("cart.pem");
    fs::write(&pem, ca.ask(&["identity", "show", serial]).unwrap()["certificate_pem"].as_str().unwrap()).unwrap();
    assert_eq!(ca.ask(&["log", "prove", text(&pem)]).unwrap()["entry"], issued.entry);

    // As somebody who made it with a stolen key would have it: the same serial number in another certificate.
    let mut forged = issued.chain[0].to_vec();
    *forged.last_mut().unwrap() ^= 1;
    fs::write(&certificate, forged).unwrap();
    let (is_proved, said) = chancery(&ca, &["log", "prove", text(&certificate)]);
    assert!(!is_proved && said.contains("has another certificate with the serial number"), "{said}");
    let (is_proved, said) = chancery(&ca, &["log", "prove", "1000000"]);
    assert!(!is_proved && said.contains("entry 1000000"), "{said}");
    let other_key = CheckpointVerifier::new("mesh.test/other", [9; 32]).unwrap().to_string();
    let (is_proved, said) = chancery(&ca, &["log", "prove", "0", "--verifier-key", &other_key]);
    assert!(!is_proved && said.contains("signed by none of the known keys"), "{said}");
}

#[tokio::test]
async fn a_kept_checkpoint_is_verified_and_replaced_only_by_one_that_continues_it() {
    let lab = Lab::new().unwrap();
    let ca = Ca::start(&lab, HOUR).await.unwrap();
    let caller = Caller::join(&lab, &ca, NODE).await.unwrap();
    let kept = lab.at("kept");
    let since = ["log", "verify", "--since", text(&kept), "--save"];
    let (is_verified, said) = chancery(&ca, &since[..4]);
    assert!(!is_verified && said.contains("No such file"), "{said}");
    ca.chancery(&since).unwrap();
    let first = fs::read_to_string(&kept).unwrap();
    issue(&caller, 3).await;
    ca.chancery(&since[..4]).unwrap();
    assert_eq!(fs::read_to_string(&kept).unwrap(), first, "without --save nothing is written");
    ca.chancery(&since).unwrap();
    assert_ne!(fs::read_to_string(&kept).unwrap(), first);
    assert!(ca.chancery(&["log", "prove", "--consistency", text(&kept)]).unwrap().contains("begin with"));
}

#[tokio::test]
async fn a_ledger_that_was_rolled_back_or_forked_is_an_alarm() {
    let lab = Lab::new().unwrap();
    let mut ca = Ca::start(&lab, HOUR).await.unwrap();
    let caller = Caller::join(&lab, &ca, NODE).await.unwrap();
    ca.stop().await.unwrap();
    let backup = lab.at("backup");
    copy_directory(ca.data(), &backup).unwrap();
    ca.run(&lab).await.unwrap();
    caller.connected().await.unwrap();
    issue(&caller, 5).await;
    let kept = lab.at("kept");
    let since = ["log", "verify", "--since", text(&kept), "--save"];
    ca.chancery(&since).unwrap();
    let before = fs::read_to_string(&kept).unwrap();

    // Everything as it was a while ago, with nothing in it that knows better, and no agent that does.
    drop(caller);
    ca.stop().await.unwrap();
    fs::remove_dir_all(ca.data()).unwrap();
    copy_directory(&backup, ca.data()).unwrap();
    ca.run(&lab).await.unwrap();
    let alarmed = || {
        let (is_verified, said) = chancery(&ca, &since);
        assert!(!is_verified && said.contains("ALARM: the ledger was rolled back or rewritten"), "{said}");
        assert_eq!(fs::read_to_string(&kept).unwrap(), before, "the evidence stays");
        assert!(lab.at("kept.conflict").is_file());
    };
    alarmed();
    // The same number of entries again and more, but others.
    let newcomer = Caller::join(&lab, &ca, "node-2").await.unwrap();
    issue(&newcomer, 20).await;
    alarmed();
}

#[tokio::test]
async fn an_export_that_was_cut_off_is_resumed_where_it_ended() {
    let lab = Lab::new().unwrap();
    let ca = Ca::start(&lab, HOUR).await.unwrap();
    let caller = Caller::join(&lab, &ca, NODE).await.unwrap();
    issue(&caller, 20).await;
    for (format, name) in [("json", "export.jsonl"), ("csv", "export.csv")] {
        let (file, whole) = (lab.at(name), lab.at(&format!("whole-{name}")));
        let export = |file: &PathBuf, more: &[&str]| {
            let arguments = [&["--output", format, "log", "export", "--file", text(file)], more].concat();
            ca.chancery(&arguments).unwrap();
            fs::read_to_string(file).unwrap()
        };
        let first = export(&file, &[]);
        assert!(!chancery(&ca, &["log", "export", "--file", text(&file)]).0, "it was overwritten");
        // In the middle of a line.
        fs::write(&file, &first[..first.len() * 2 / 3]).unwrap();
        issue(&caller, 5).await;
        let resumed = export(&file, &["--resume"]);
        let entries = |text: &str| text.lines().filter(|line| !line.starts_with("{\"checkpoint\"")).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(entries(&resumed), entries(&export(&whole, &[])));
        assert_eq!(export(&file, &["--resume"]), resumed, "nothing new, nothing written");
        if format == "csv" {
            let own = resumed.lines().find(|line| line.contains(",authority,")).unwrap();
            assert!(own.split_once(",authority,").unwrap().1.chars().all(|cell| cell == ','), "{own}");
            let narrower = lab.at("narrower.csv");
            fs::write(&narrower, resumed.replacen(",why,outcome", "", 1)).unwrap();
            let (is_resumed, said) = chancery(&ca, &["-o", "csv", "log", "export", "--resume", "--file", text(&narrower)]);
            assert!(!is_resumed && said.contains("with the columns of this version"), "{said}");
        }
        if format == "json" {
            let key = ca.chancery(&["log", "key"]).unwrap();
            let verified = ca.ask(&["log", "verify", text(&file), "--certificates", "--verifier-key", key.trim()]).unwrap();
            assert_eq!(verified["entries"], entries(&resumed).len());
            assert!(verified["entries_per_second"].as_f64().unwrap() > 0.0, "{verified}");
            assert_eq!((&verified["verdict"], &verified["signatures"]), (&Value::from("intact"), &Value::from("verified")));
        }
    }
    for own in std::fs::read_dir(ca.data().join("authority")).unwrap() {
        let proof = ca.ask(&["log", "prove", text(&own.unwrap().path())]).unwrap();
        assert!(proof["entry"].is_u64(), "{proof}");
    }
    assert_eq!(ca.chancery(&["log", "export", "--revoked"]).unwrap().lines().count(), 1, "the checkpoint alone");
    let filtered = ca.chancery(&["log", "export", "--namespace", "shop"]).unwrap();
    assert_eq!(filtered.lines().filter(|line| line.contains("\"namespace\":\"shop\"")).count(), 30);
    // Of another ledger, this one knows nothing.
    let other_lab = Lab::new().unwrap();
    let other = Ca::start(&other_lab, HOUR).await.unwrap();
    let (is_resumed, said) = chancery(&other, &["log", "export", "--resume", "--file", text(&lab.at("export.jsonl"))]);
    assert!(!is_resumed, "{said}");
}

#[tokio::test]
async fn an_export_that_was_cut_off_before_its_checkpoint_gets_it() {
    let lab = Lab::new().unwrap();
    let ca = Ca::start(&lab, HOUR).await.unwrap();
    let (file, key) = (lab.at("export.jsonl"), ca.chancery(&["log", "key"]).unwrap());
    ca.chancery(&["log", "export", "--file", text(&file)]).unwrap();
    let whole = fs::read_to_string(&file).unwrap();
    let last = whole.trim_end().rfind('\n').unwrap() + 1;
    for end in [last, last + 30] {
        fs::write(&file, &whole[..end]).unwrap();
        ca.chancery(&["log", "export", "--resume", "--file", text(&file)]).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), whole);
        let verified = ca.ask(&["log", "verify", text(&file), "--verifier-key", key.trim()]).unwrap();
        assert_eq!(verified["signatures"], "verified");
    }
}

#[tokio::test]
async fn who_gives_no_key_is_told_that_no_signature_was_checked() {
    let lab = Lab::new().unwrap();
    let ca = Ca::start(&lab, HOUR).await.unwrap();
    let (file, key) = (lab.at("export.jsonl"), ca.chancery(&["log", "key"]).unwrap());
    ca.chancery(&["log", "export", "--file", text(&file)]).unwrap();
    let without = ["log", "verify", text(&file)];
    let with = [&without[..], &["--verifier-key", key.trim()]].concat();
    let unchecked = "intact, but who signed the checkpoints was not checked: give --verifier-key";
    assert!(ca.chancery(&without).unwrap().contains(unchecked));
    assert!(!ca.chancery(&with).unwrap().contains("not checked"));
    assert_eq!(ca.ask(&without).unwrap()["signatures"], "not checked");
    assert_eq!(ca.ask(&with).unwrap()["signatures"], "verified");
    // Without a checkpoint there is nothing that a key could have signed.
    let lines = fs::read_to_string(&file).unwrap();
    fs::write(&file, &lines[..lines.find("{\"checkpoint\"").unwrap()]).unwrap();
    let verified = ca.ask(&with).unwrap();
    assert_eq!(verified["signatures"], "not checked");
    assert!(verified["verdict"].as_str().unwrap().contains("no checkpoint was given"), "{verified}");
}

#[tokio::test]
async fn acts_are_found_by_their_target_followed_and_exported_for_spreadsheets() {
    let lab = Lab::new().unwrap();
    let mut ca = Ca::start(&lab, HOUR).await.unwrap();
    let agent = |node: u32| format!("spiffe://{TRUST_DOMAIN}/chancery/agent/dev/00000000-0000-0007-0000-{node:012}");
    let ban = |node: u32, reason: &str| ca.chancery(&["agent", "ban", &agent(node), "--reason", reason]).unwrap();
    ban(1, "it was stolen");
    let start = |name: &str, arguments: &[&str]| {
        let mut command = lab.command(&tools::chancery("chancery").unwrap());
        command.arg("--socket").arg(ca.admin_socket()).args(["-o", "json", "log", "acts", "--follow"]).args(arguments);
        Process::start(name, &mut command, &lab.log(name)).unwrap()
    };
    let told = |process: &Process| {
        let log = process.log().unwrap();
        let rows = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        rows.map(|row| format!("{} {}", row["action"].as_str().unwrap(), row["why"].as_str().unwrap())).collect::<Vec<_>>()
    };
    let tells = async |process: &Process, expected: &[&str]| {
        let seen = async || if told(process) == expected { Ok(()) } else { Err(process.log_end()) };
        wait::until("the acts are told", Duration::from_secs(20), seen).await.unwrap();
    };
    let (since, of_two) =
        (start("since", &["--since", "1h", "--action", "agent"]), start("two", &["--since", "1h", "--target", &agent(2)]));
    tells(&since, &["agent.ban it was stolen"]).await;
    ban(2, "so was this\nand its disk");
    assert!(!chancery(&ca, &["agent", "ban", &agent(2), "--reason", "again"]).0, "it is banned already");
    ca.chancery(&["agent", "unban", &agent(1), "--reason", "it was found"]).unwrap();
    let all = ["agent.ban it was stolen", "agent.ban so was this\nand its disk", "act.refused again", "agent.unban it was found"];
    tells(&since, &all).await;
    tells(&of_two, &all[1..3]).await;

    let found = |target: &str| ca.ask(&["log", "acts", "--target", target]).unwrap().as_array().unwrap().len();
    assert_eq!((found(&agent(1)), found(&agent(2)), found(&agent(3))), (2, 2, 0));
    let uid = agent(1).rsplit_once('/').unwrap().1.to_owned();
    assert_eq!((found(&uid), found(&format!("agent.ban {}", agent(2)))), (0, 1), "words are not taken apart");

    let exported = ca.chancery(&["--output", "csv", "log", "export"]).unwrap();
    let mut lines = exported.lines();
    assert!(lines.next().unwrap().ends_with(",actor,action,target,why,outcome"), "{exported}");
    let banned: Vec<_> = lines.filter(|line| line.contains(",act,")).filter(|line| line.contains(",agent.ban,")).collect();
    assert_eq!(banned.len(), 2, "{exported}");
    assert!(banned[1].ends_with(&format!(",agent.ban,{},so was this and its disk,done", agent(2))), "{exported}");

    ca.stop().await.unwrap();
    let resume = async || {
        let said = since.log().unwrap();
        if said.contains("go on with `--from-entry ") { Ok(()) } else { Err(said) }
    };
    wait::until("it says where to go on", Duration::from_secs(20), resume).await.unwrap();
}

#[tokio::test]
async fn a_filtered_export_goes_on_from_its_last_checkpoint_however_long_nothing_matched() {
    let lab = Lab::new().unwrap();
    let ca = Ca::start(&lab, HOUR).await.unwrap();
    let caller = Caller::join(&lab, &ca, NODE).await.unwrap();
    issue(&caller, 3).await;
    let file = lab.at("export.jsonl");
    let export = |namespace: &str| {
        let resumed = chancery(&ca, &["log", "export", "--namespace", namespace, "--resume", "--file", text(&file)]);
        assert!(resumed.0, "{}", resumed.1);
        fs::read_to_string(&file).unwrap()
    };
    let entries = |text: &str| text.lines().filter(|line| line.contains("\"namespace\":\"shop\"")).count();
    let first = export("shop");
    assert_eq!(entries(&first), 3);
    // As of a job that ran for weeks.
    let checkpoint = first.lines().last().unwrap();
    fs::write(&file, format!("{first}{}", format!("{checkpoint}\n").repeat(3000))).unwrap();
    issue(&caller, 2).await;
    assert_eq!(entries(&export("shop")), 5);
    // What was exported is not read again: nobody is found who was there before the last checkpoint.
    issue(&caller, 1).await;
    fs::remove_file(&file).unwrap();
    assert_eq!(entries(&export("nobody")), 0);
    assert_eq!(entries(&export("shop")), 0);
    issue(&caller, 1).await;
    assert_eq!(entries(&export("shop")), 1);

    let other_lab = Lab::new().unwrap();
    let other = Ca::start(&other_lab, HOUR).await.unwrap();
    let (is_resumed, said) = chancery(&other, &["log", "export", "--namespace", "shop", "--resume", "--file", text(&file)]);
    assert!(!is_resumed && said.contains("does not continue the checkpoint that"), "{said}");
}

#[tokio::test]
async fn a_rotated_key_loses_nobody_who_trusts_the_older_one() {
    let lab = Lab::new().unwrap();
    let ca = Ca::start(&lab, HOUR).await.unwrap();
    let old = ca.chancery(&["log", "key"]).unwrap();
    let export = lab.at("export.jsonl");
    ca.chancery(&["log", "export", "--file", text(&export)]).unwrap();
    let new = ca.chancery(&["log", "rotate-key", "--reason", "once a year"]).unwrap();
    assert_ne!(old, new);
    let both = ca.chancery(&["log", "key"]).unwrap();
    assert_eq!(both, format!("{old}{new}"));
    let (is_done, said) = chancery(&ca, &["log", "rotate-key", "--reason", "the new one leaked"]);
    assert!(!is_done && said.contains("is under way"), "{said}");
    // The first checkpoint in it is signed by the older key alone.
    ca.chancery(&["log", "export", "--resume", "--file", text(&export)]).unwrap();
    assert!(!chancery(&ca, &["log", "verify", text(&export), "--verifier-key", new.trim()]).0);
    for keys in [&["--verifier-key", both.as_str()][..], &["--verifier-key", new.trim(), "--verifier-key", old.trim()]] {
        let verified = ca.ask(&[&["log", "verify", text(&export)], keys].concat()).unwrap();
        assert_eq!(verified["signatures"], "verified");
    }
    for key in [&old, &new] {
        ca.chancery(&["log", "prove", "1", "--verifier-key", key.trim()]).unwrap();
    }
    let acts = ca.ask(&["log", "acts"]).unwrap();
    let made = acts.as_array().unwrap().iter().find(|act| act["action"] == "log.checkpoint-key").unwrap();
    assert_eq!(made["why"], "once a year");
}
