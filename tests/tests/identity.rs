//! `chancery identity list|show|watch`, on the real binaries: what an auditor asks, and what comes back.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::process::{Command, Output};
use std::time::Duration;

use chancery_ca::attestation::development::{TokenRequest, pod_uid};
use chancery_ca::ledger::acts::{Change, Subject};
use chancery_proto::chancery::v1::WorkloadRequest;
use chancery_tests::ca::Ca;
use chancery_tests::caller::Caller;
use chancery_tests::lab::Lab;
use chancery_tests::mesh::{NODE, token_request};
use chancery_tests::process::Process;
use chancery_tests::{ledger, tools, wait};
use rustix::process::Signal;
use serde_json::Value;
use time::OffsetDateTime;

const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(20);

/// Issues a certificate to the pod `pod` of `namespace/account`, and returns its entry.
async fn issue(ca: &Ca, caller: &Caller, node: &str, namespace: &str, account: &str, pod: &str) -> u64 {
    let request = TokenRequest { namespace: namespace.into(), pod: pod.into(), node: node.into(), ..token_request(account, HOUR) };
    let token = ca.issuer().unwrap().sign(&request, OffsetDateTime::now_utc()).unwrap().to_string();
    let request = WorkloadRequest { token, ..caller.request().unwrap() };
    caller.issue(request).await.unwrap().unwrap().entry
}

fn entries(rows: &Value) -> Vec<u64> {
    rows.as_array().unwrap().iter().map(|row| row["entry"].as_u64().unwrap()).collect()
}

fn list(ca: &Ca, conditions: &[&str]) -> Vec<u64> {
    entries(&ca.ask(&[&["identity", "list"], conditions].concat()).unwrap())
}

fn chancery(ca: &Ca, arguments: &[&str]) -> Output {
    let mut command = Command::new(tools::chancery("chancery").unwrap());
    command.arg("--socket").arg(ca.admin_socket()).args(arguments).output().unwrap()
}

#[tokio::test]
async fn each_condition_finds_what_it_says_alone_and_with_others() {
    let lab = Lab::new().unwrap();
    let ca = Ca::start(&lab, HOUR).await.unwrap();
    let (here, there) = (Caller::join(&lab, &ca, NODE).await.unwrap(), Caller::join(&lab, &ca, "node-2").await.unwrap());
    let cart = issue(&ca, &here, NODE, "shop", "cart", "cart-0").await;
    let till = issue(&ca, &there, "node-2", "shop", "till", "till-0").await;
    let other = issue(&ca, &there, "node-2", "bank", "cart", "cart-0").await;
    let again = issue(&ca, &here, NODE, "shop", "cart", "cart-0").await;

    let shown = ca.ask(&["identity", "show", "--entry", &cart.to_string()]).unwrap();
    let text = |field: &str| shown[field].as_str().unwrap().to_owned();
    let uid = pod_uid("shop", "cart-0").to_string();
    let (issuer, root) = (&shown["issued_by"]["fingerprint"], &shown["trust_root"]["fingerprint"]);
    let (issuer, root) = (issuer.as_str().unwrap(), root.as_str().unwrap());
    let workloads = [again, other, till, cart];
    for (conditions, expected) in [
        (&["--id", &text("spiffe_id")][..], &[again, cart][..]),
        (&["--prefix", "spiffe://mesh.test/ns/shop/"], &[again, till, cart]),
        (&["--serial", &text("serial")], &[cart]),
        (&["--pod", "cart-0"], &[again, other, cart]),
        (&["--pod", "shop/cart-0"], &[again, cart]),
        (&["--pod", &uid], &[again, cart]),
        (&["--namespace", "bank"], &[other]),
        (&["--service-account", "cart"], &[again, other, cart]),
        (&["--service-account", "shop/cart"], &[again, cart]),
        (&["--prefix", "spiffe://mesh.test/ns/", "--agent", &there.spiffe_id().unwrap()], &[other, till]),
        (&["--token-id", &text("token_id")], &[cart]),
        (&["--prefix", "spiffe://mesh.test/ns/", "--issuing-certificate", issuer], &workloads),
        (&["--prefix", "spiffe://mesh.test/ns/", "--root", &root[..8]], &workloads),
        (&["--prefix", "spiffe://mesh.test/ns/", "--since", "1h", "--unexpired"], &workloads),
        (&["--prefix", "spiffe://mesh.test/ns/", "--until", "1h"], &[]),
        (&["--node", "node-2", "--service-account", "cart", "--unexpired"], &[other]),
        (&["--pod", "shop/cart-0", "--limit", "1"], &[again]),
        (&["--pod", "shop/cart-0", "--all"], &[again, cart]),
        (&["--namespace", "shop", "--node", "node-2", "--root", root], &[till]),
        (&["--namespace", "nowhere"], &[]),
    ] {
        assert_eq!(list(&ca, conditions), expected, "{conditions:?}");
    }
    // With the agents' own.
    assert_eq!(list(&ca, &["--node", "node-2"]).len(), 3);
    let csv = ca.chancery(&["identity", "list", "--pod", "shop/cart-0", "-o", "csv"]).unwrap();
    assert_eq!((csv.lines().count(), csv.starts_with("entry,time,spiffe_id,serial,")), (3, true), "{csv}");
    let table = chancery(&ca, &["identity", "list", "--pod", "shop/cart-0", "--limit", "1"]);
    let remark = String::from_utf8(table.stderr).unwrap();
    assert!(table.status.success() && remark.contains("more follow"), "{remark}");
}

#[tokio::test]
async fn what_an_operator_revoked_is_listed_alone_and_with_other_conditions() {
    let lab = Lab::new().unwrap();
    let mut ca = Ca::start(&lab, HOUR).await.unwrap();
    let (here, there) = (Caller::join(&lab, &ca, NODE).await.unwrap(), Caller::join(&lab, &ca, "node-2").await.unwrap());
    let cart = issue(&ca, &there, "node-2", "shop", "cart", "cart-0").await;
    let safe = issue(&ca, &there, "node-2", "bank", "safe", "safe-0").await;
    let till = issue(&ca, &here, NODE, "shop", "till", "till-0").await;
    issue(&ca, &here, NODE, "shop", "desk", "desk-0").await;
    assert_eq!(list(&ca, &["--revoked"]), [0; 0]);

    let agent = there.spiffe_id().unwrap();
    let own = *list(&ca, &["--agent", &agent]).last().unwrap();
    let show = |ca: &Ca, entry: u64| ca.ask(&["identity", "show", "--entry", &entry.to_string()]).unwrap();
    let serial = show(&ca, till)["serial"].as_str().unwrap().parse().unwrap();
    ca.stop().await.unwrap();
    let until = OffsetDateTime::now_utc() + 24 * HOUR;
    let by_agent = ledger::act(ca.data(), Change::Revoke { subject: Subject::Agent(agent.parse().unwrap()), until }).await.unwrap();
    let by_serial = ledger::act(ca.data(), Change::Revoke { subject: Subject::Serial(serial), until }).await.unwrap();
    ca.run(&lab).await.unwrap();
    // What is issued from now on is not what was revoked.
    let here = Caller::join(&lab, &ca, NODE).await.unwrap();
    issue(&ca, &here, NODE, "shop", "till", "till-0").await;

    let workloads = ["--revoked", "--prefix", "spiffe://mesh.test/ns/"];
    assert_eq!(list(&ca, &["--revoked"]), [till, safe, cart, own]);
    assert_eq!(list(&ca, &workloads), [till, safe, cart]);
    assert_eq!(list(&ca, &[&workloads[..], &["--namespace", "shop", "--unexpired"]].concat()), [till, cart]);
    assert_eq!(list(&ca, &["--revoked", "--pod", "desk-0"]), [0; 0]);
    let csv = ca.chancery(&["identity", "list", "--revoked", "--namespace", "bank", "-o", "csv"]).unwrap();
    assert_eq!((csv.lines().count(), csv.contains("safe-0")), (2, true), "{csv}");
    for (identity, act) in [(cart, by_agent), (till, by_serial)] {
        let shown = show(&ca, identity);
        assert_eq!(shown["revoked_by"], act);
        assert!(shown["state"].as_str().unwrap().contains(&format!("revoked by entry {act}")), "{shown}");
    }
}

#[tokio::test]
async fn an_identity_is_shown_with_its_context() {
    let lab = Lab::new().unwrap();
    let ca = Ca::start(&lab, HOUR).await.unwrap();
    let caller = Caller::join(&lab, &ca, NODE).await.unwrap();
    let first = issue(&ca, &caller, NODE, "shop", "cart", "cart-0").await;
    let second = issue(&ca, &caller, NODE, "shop", "cart", "cart-0").await;
    let show = |entry: u64| ca.ask(&["identity", "show", "--entry", &entry.to_string()]).unwrap();

    let shown = show(first);
    assert_eq!((&shown["superseded_by"], &shown["expired"]), (&second.into(), &false.into()));
    assert_eq!(shown["state"], format!("superseded by entry {second}"));
    assert_eq!((&show(second)["state"], &show(second)["superseded_by"]), (&"valid".into(), &Value::Null));
    let status = ca.ask(&["status"]).unwrap();
    for (own, kind) in [("issued_by", "issuing"), ("trust_root", "root")] {
        let authorities = status["authorities"].as_array().unwrap();
        let expected = authorities.iter().find(|authority| authority["kind"] == kind).unwrap();
        assert_eq!(shown[own]["fingerprint"], expected["fingerprint"]);
        assert!(!shown[own]["name"].as_str().unwrap().is_empty() && shown[own]["not_after"].is_string(), "{shown}");
    }
    let proof = &shown["proof"];
    assert_eq!((&proof["entry"], &proof["serial"]), (&first.into(), &shown["serial"]), "{proof}");
    assert!(proof["entries"].as_u64().unwrap() > second && !proof["hashes"].as_array().unwrap().is_empty(), "{proof}");
    assert!(shown["certificate_pem"].as_str().unwrap().starts_with("-----BEGIN CERTIFICATE-----\n"));
    let table = ca.chancery(&["identity", "show", shown["serial"].as_str().unwrap()]).unwrap();
    for word in [
        "superseded by entry",
        "request id",
        "token id",
        "trust sequence",
        "trust root name",
        "alternative names",
        "in the ledger: verified",
    ] {
        assert!(table.contains(word), "{word} is missing in\n{table}");
    }
}

#[tokio::test]
async fn what_cannot_be_meant_is_wrong_usage_and_what_is_not_there_is_refused() {
    let lab = Lab::new().unwrap();
    let ca = Ca::start(&lab, HOUR).await.unwrap();
    let missing = "00000000000000000000000000000000";
    for (arguments, status, says) in [
        (&["list", "--serial", "12"][..], 2, "32 hexadecimal digits"),
        (&["list", "--root", "abc"], 2, "8 to 64 hexadecimal digits"),
        (&["list", "--since", "yesterday"], 2, "2026-11-01T12:00:00Z"),
        (&["list", "--all", "--limit", "3"], 2, "--limit"),
        (&["watch", "--since", "1h", "--from-entry", "3"], 2, "--from-entry"),
        (&["watch", "--until", "1h"], 2, "--until"),
        (&["watch", "--from-entry", "1000000"], 1, "there is no entry 1000000"),
        (&["show"], 2, "--entry"),
        (&["show", "12"], 2, "32 hexadecimal digits"),
        (&["show", missing], 1, missing),
    ] {
        let output = chancery(&ca, &[&["identity"], arguments].concat());
        let complaint = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {complaint}");
        assert!(complaint.contains(says), "{arguments:?}: {complaint}");
    }
    for command in ["list", "show", "watch", "refusals"] {
        let help = ca.chancery(&["identity", command, "--help"]).unwrap();
        assert!(help.contains("Examples:\n  chancery identity "), "{help}");
    }
}

/// A watch under way, and what it has told so far.
struct Watching(Process);

impl Watching {
    fn start(lab: &Lab, ca: &Ca, name: &str, arguments: &[&str]) -> Self {
        let mut command = lab.command(&tools::chancery("chancery").unwrap());
        command.arg("--socket").arg(ca.admin_socket()).args(["identity", "watch", "-o", "json"]).args(arguments);
        Self(Process::start(name, &mut command, &lab.log(name)).unwrap())
    }

    fn entries(&self) -> Vec<u64> {
        let log = self.0.log().unwrap();
        let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.map(|row| row["entry"].as_u64().unwrap()).collect()
    }

    async fn has_told(&self, count: usize) {
        let told = async || if self.entries().len() >= count { Ok(()) } else { Err(format!("{:?}", self.entries())) };
        wait::until("the watch tells them", SOON, told).await.unwrap();
    }
}

#[tokio::test]
async fn a_watch_tells_what_is_issued_and_says_where_to_go_on_when_the_ca_ends() {
    let lab = Lab::new().unwrap();
    let mut ca = Ca::start(&lab, HOUR).await.unwrap();
    let caller = Caller::join(&lab, &ca, NODE).await.unwrap();
    let mut issued = vec![issue(&ca, &caller, NODE, "shop", "cart", "cart-0").await];
    issue(&ca, &caller, NODE, "bank", "cart", "cart-0").await;
    let since = Watching::start(&lab, &ca, "since", &["--namespace", "shop", "--since", "1h"]);
    since.has_told(1).await;
    for number in 1..20 {
        issued.push(issue(&ca, &caller, NODE, "shop", "cart", &format!("cart-{number}")).await);
    }
    let from = Watching::start(&lab, &ca, "from", &["--namespace", "shop", "--from-entry", &issued[5].to_string()]);
    since.has_told(issued.len()).await;
    from.has_told(issued.len() - 5).await;
    assert_eq!(since.entries(), issued);
    assert_eq!(from.entries(), issued[5..]);

    since.0.signal(Signal::INT).unwrap();
    let Watching(mut since) = since;
    wait::until("Ctrl-C ends it", SOON, async || if since.check().is_err() { Ok(()) } else { Err("still there") }).await.unwrap();
    assert!(since.check().unwrap_err().to_string().contains("exit status: 0"));

    ca.stop().await.unwrap();
    let next = issued.last().unwrap() + 1;
    let resume = format!("go on with `--from-entry {next}` beside the same conditions");
    let told = async || if from.0.log().unwrap().contains(&resume) { Ok(()) } else { Err(from.0.log_end()) };
    wait::until("it says where to go on", SOON, told).await.unwrap();
    ca.run(&lab).await.unwrap();
    let caller = Caller::join(&lab, &ca, "node-2").await.unwrap();
    let resumed = Watching::start(&lab, &ca, "resumed", &["--namespace", "shop", "--from-entry", &next.to_string()]);
    let one = issue(&ca, &caller, "node-2", "shop", "cart", "cart-0").await;
    resumed.has_told(1).await;
    assert_eq!(resumed.entries(), [one]);
}
