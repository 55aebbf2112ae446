//! `chancery explain NAMESPACE/POD` says why a pod has no certificate, and what to do.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::process::Command;
use std::time::Duration;

use chancery_ca::attestation::development::TokenRequest;
use chancery_proto::chancery::v1::WorkloadRequest;
use chancery_tests::agent::Agent;
use chancery_tests::ca::Ca;
use chancery_tests::caller::Caller;
use chancery_tests::lab::Lab;
use chancery_tests::mesh::{NODE, token_request};
use chancery_tests::{secrets, tools, wait};
use serde_json::Value;
use time::OffsetDateTime;

const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(10);
const CART: &str = "shop/cart-0";

/// Which ends with 1 where something is bad.
fn doctor(ca: &Ca) -> String {
    let mut doctor = Command::new(tools::chancery("chancery").unwrap());
    let output = doctor.arg("--socket").arg(ca.admin_socket()).arg("doctor").output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn explain(ca: &Ca, pod: &str) -> Value {
    ca.ask(&["explain", pod]).unwrap()
}

async fn fetch(agent: &Agent, ca: &Ca, request: &TokenRequest) -> chancery_tests::Result<secrets::Secrets> {
    let token = ca.issuer().unwrap().sign(request, OffsetDateTime::now_utc()).unwrap().to_string();
    secrets::fetch(&agent.sds_socket, Some(&token), Duration::from_secs(3)).await
}

#[tokio::test]
async fn a_pod_with_a_certificate_one_that_never_asked_and_one_whose_agent_is_away() {
    let lab = Lab::new().unwrap();
    let ca = Ca::start(&lab, HOUR).await.unwrap();
    let mut agent = Agent::start(&lab, &ca, NODE).await.unwrap();

    let never = explain(&ca, CART);
    assert_eq!(never["verdict"], "never asked");
    assert!(never["next_step"].as_str().unwrap().contains("chancery agent list"), "{never}");

    let cart = fetch(&agent, &ca, &token_request("cart", HOUR)).await.unwrap();
    let has = explain(&ca, CART);
    assert!(has["verdict"].as_str().unwrap().starts_with("certificate valid until "), "{has}");
    assert_eq!((&has["next_step"], &has["latest"]["serial"]), (&"".into(), &cart.svid.serial().to_string().into()));
    assert!(has["findings"].as_array().unwrap().iter().all(|finding| finding["level"] == "ok"), "{has}");
    let screen = ca.chancery(&["explain", CART]).unwrap();
    assert!(screen.lines().count() <= 24, "more than one screen:\n{screen}");
    assert_eq!(explain(&ca, "shop/cart-1")["verdict"], "never asked");

    agent.kill().unwrap();
    let away = async || {
        let explained = explain(&ca, CART);
        let step = explained["next_step"].as_str().unwrap_or_default();
        if step.contains("the agent of node node-1 is not connected") { Ok(explained) } else { Err(explained.to_string()) }
    };
    let away = wait::until("it is noticed that the agent is away", SOON, away).await.unwrap();
    assert!(away["verdict"].as_str().unwrap().starts_with("certificate valid until "), "{away}");
    assert!(away["findings"].as_array().unwrap().iter().any(|finding| finding["level"] == "bad"), "{away}");

    // By its node, as everywhere.
    let banned = ca.ask(&["agent", "ban", &format!("dev/{NODE}"), "--wait", "0s", "--reason", "its disk was stolen"]);
    let listed = ca.ask(&["agent", "list"]).unwrap();
    assert_eq!(listed[0]["trust"], "banned", "{listed}, {banned:?}");
    let step = explain(&ca, CART)["next_step"].to_string();
    assert!(step.contains("was banned by ledger entry") && step.contains("chancery agent unban"), "{step}");
    assert!(doctor(&ca).contains("1 agent banned by an operator"), "{}", doctor(&ca));

    let revoked = ca.ask(&["identity", "revoke", "--pod", CART, "--wait", "0s", "--reason", "a shell was opened in it"]);
    let explained = explain(&ca, CART);
    let verdict = explained["verdict"].as_str().unwrap();
    assert!(
        verdict.starts_with("revoked by ledger entry ") && verdict.ends_with("proxies refuse the certificate"),
        "{verdict}, {revoked:?}"
    );
}

#[tokio::test]
async fn a_pod_whose_account_the_cluster_may_not_speak_for() {
    let lab = Lab::new().unwrap();
    let ca = Ca::start_for(&lab, "bank/*").await.unwrap();
    let agent = Agent::start(&lab, &ca, NODE).await.unwrap();
    assert!(fetch(&agent, &ca, &token_request("cart", HOUR)).await.is_err());
    let refused = explain(&ca, CART);
    assert_eq!(refused["verdict"], "refused: account_not_allowed");
    let step = refused["next_step"].as_str().unwrap();
    assert!(step.contains("cluster dev may not speak for shop/cart; see its `service_accounts`"), "{step}");
    assert_eq!((&refused["latest"], &refused["refusals"][0]["reason"]), (&Value::Null, &"account_not_allowed".into()));
}

#[tokio::test]
async fn a_pod_on_another_node_than_the_agent_that_asked() {
    let lab = Lab::new().unwrap();
    let ca = Ca::start(&lab, HOUR).await.unwrap();
    let caller = Caller::join(&lab, &ca, NODE).await.unwrap();
    let elsewhere = TokenRequest { node: "node-2".into(), ..token_request("cart", HOUR) };
    let token = ca.issuer().unwrap().sign(&elsewhere, OffsetDateTime::now_utc()).unwrap().to_string();
    let request = WorkloadRequest { token, ..caller.request().unwrap() };
    assert!(caller.issue(request).await.unwrap().is_err());
    let refused = explain(&ca, CART);
    assert_eq!(refused["verdict"], "refused: token_other_node");
    assert!(refused["next_step"].as_str().unwrap().contains("cart-0 runs on node node-2"), "{refused}");
}
