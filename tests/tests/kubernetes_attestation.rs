//! The CA beside the real API server: whose pod a token speaks of, whether it is still there, and what asking costs.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use chancery_tests::agent::Agent;
use chancery_tests::ca::TRUST_DOMAIN;
use chancery_tests::caller::Caller;
use chancery_tests::kubernetes::place::{Place, ask, granted, refused};
use chancery_tests::kubernetes::{ApiServer, Pod, shared};
use chancery_tests::tokens::TokenVolume;
use chancery_tests::{http, secrets, wait};
use serde_json::json;
use tokio::task::JoinSet;

const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(30);
/// How long the CA keeps to what the API server said.
const REMEMBERED: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_pod_gets_its_certificate_over_sds_by_its_own_token() {
    let Some(server) = shared().await.unwrap() else { return };
    let place = Place::new(&server, HOUR).await.unwrap();
    let agent = place.agent("").await.unwrap();
    let pod = place.of.pod("cart-0").await.unwrap();
    let secrets = secrets::fetch(&agent.sds_socket, Some(&place.of.token(&pod).await.unwrap()), SOON).await.unwrap();
    assert_eq!(secrets.svid.id().to_string(), format!("spiffe://{TRUST_DOMAIN}/ns/{}/sa/cart", place.of.shop));
    let listed = place.ca.ask(&["identity", "list", "--pod", &pod.uid.to_string()]).unwrap();
    let listed = &listed.as_array().unwrap()[..];
    assert_eq!(listed.len(), 1, "{listed:?}");
    assert_eq!((&listed[0]["pod"], &listed[0]["node"]), (&json!("cart-0"), &json!(place.of.node.name)), "{listed:?}");
}

#[tokio::test]
async fn a_sidecar_joins_and_gets_its_pods_certificate_by_the_pods_own_token() {
    let Some(server) = shared().await.unwrap() else { return };
    let place = Place::new(&server, HOUR).await.unwrap();
    let pod = place.of.pod("till-0").await.unwrap();
    let volume = TokenVolume::create(&place.lab.at("token")).unwrap();
    volume.replace(&place.of.token(&pod).await.unwrap()).unwrap();
    let sidecar = Agent::sidecar(&place.lab, &place.ca, &volume).await.unwrap();
    let secrets = secrets::fetch(&sidecar.sds_socket, None, SOON).await.unwrap();
    assert_eq!(secrets.svid.id().to_string(), format!("spiffe://{TRUST_DOMAIN}/ns/{}/sa/cart", place.of.shop));
    drop(sidecar);

    place.of.admin.delete_pod(&pod).await.unwrap();
    let again = Caller::join_sidecar(&place.ca, volume.token());
    let refused = wait::until("refused", SOON, async || {
        let refusals = place.ca.ask(&["identity", "refusals", "--reason", "pod_gone"]).unwrap();
        if refusals.as_array().unwrap().is_empty() { Err(refusals.to_string()) } else { Ok(()) }
    });
    tokio::select! {
        joined = again => panic!("joined: {:?}", joined.is_ok()),
        refused = refused => refused.unwrap(),
    }
}

#[tokio::test]
async fn a_token_whose_pod_or_account_is_not_what_it_was_is_refused_each_with_its_own_reason() {
    let Some(server) = shared().await.unwrap() else { return };
    let place = Place::new(&server, HOUR).await.unwrap();
    let (admin, shop) = (&place.of.admin, &place.of.shop);
    let caller = place.caller(&place.of.node).await.unwrap();
    let mut reasons = BTreeSet::new();
    let mut refused = async |case: &str, token: &str, reason: &str, says: &str| {
        refused(&caller, token, reason, SOON).await.unwrap();
        let listed = place.ca.ask(&["identity", "refusals", "--limit", "1"]).unwrap()[0].clone();
        assert_eq!(listed["reason"], reason, "{case}: {listed}");
        assert!(listed["message"].as_str().unwrap().contains(says), "{case}: {listed}");
        assert!(reasons.insert(reason.to_owned()), "{case}: {reason} has another cause already");
    };

    let ending = place.of.pod("ending").await.unwrap();
    let ending_token = place.of.token(&ending).await.unwrap();
    admin.terminate_pod(&ending, SOON).await.unwrap();

    let pod = place.of.pod("deleted").await.unwrap();
    let token = place.of.token(&pod).await.unwrap();
    granted(&caller, &token).await.unwrap();
    admin.delete_pod(&pod).await.unwrap();
    // One of the same name is another pod.
    place.of.pod("deleted").await.unwrap();
    refused("deleted", &token, "pod_gone", "deleted").await;

    let pod = place.of.pod("finished").await.unwrap();
    let token = place.of.token(&pod).await.unwrap();
    granted(&caller, &token).await.unwrap();
    admin.set_phase(&pod, "Succeeded").await.unwrap();
    refused("finished", &token, "pod_finished", "finished").await;

    let elsewhere = admin.node("node").await.unwrap();
    let pod = admin.pod(shop, "elsewhere", "cart", &elsewhere.name).await.unwrap();
    refused("on another node", &place.of.token(&pod).await.unwrap(), "token_other_node", &elsewhere.name).await;

    admin.account(shop, "passing").await.unwrap();
    let pod = admin.pod(shop, "passing", "passing", &place.of.node.name).await.unwrap();
    let token = place.of.token(&pod).await.unwrap();
    granted(&caller, &token).await.unwrap();
    admin.delete_account(shop, "passing").await.unwrap();
    refused("of an account that was deleted", &token, "account_gone", "passing").await;
    admin.account(shop, "passing").await.unwrap();
    refused("of an account that was created again", &token, "account_recreated", "passing").await;

    let unbound = admin.unbound_token(shop, "cart", "chancery", HOUR).await.unwrap();
    refused("bound to no pod", &unbound, "token_not_bound", "kubernetes.io.pod").await;

    // The CA has been told of it before it was told of all these.
    ask(&caller, &ending_token).await.unwrap().expect("a pod that is ending still runs");
    let pod = place.of.pod("cart-0").await.unwrap();
    granted(&caller, &place.of.token(&pod).await.unwrap()).await.unwrap();
}

#[tokio::test]
async fn an_agent_joins_by_a_review_of_its_own_token() {
    let Some(server) = shared().await.unwrap() else { return };
    let place = Place::new(&server, HOUR).await.unwrap();
    let agent = place.of.agent_pod(&place.of.node).await.unwrap();
    let token = place.of.join_token(&agent).await.unwrap();
    let before = reviews(&place, &server);
    let joining = Caller::join_with_token(&place.lab, &place.ca, &place.of.node.name, &token);
    joining.await.unwrap();
    assert!(reviews(&place, &server) > before, "although its pod was known");

    place.of.admin.delete_pod(&agent).await.unwrap();
    let again = Caller::join_with_token(&place.lab, &place.ca, &place.of.node.name, &token);
    let refused = wait::until("refused", SOON, async || {
        let refusals = place.ca.ask(&["identity", "refusals", "--limit", "1"]).unwrap();
        if refusals[0]["reason"] == "pod_gone" { Ok(()) } else { Err(refusals.to_string()) }
    });
    tokio::select! {
        joined = again => panic!("joined: {:?}", joined.is_ok()),
        refused = refused => refused.unwrap(),
    }
}

#[tokio::test]
async fn a_pod_that_the_watch_does_not_know_is_asked_about_and_the_answer_counts_for_ten_seconds() {
    let Some(server) = shared().await.unwrap() else { return };
    let place = Place::new(&server, HOUR).await.unwrap();
    let caller = place.caller(&place.of.node).await.unwrap();
    // It may not watch any more, and so hears of nothing new.
    place.of.admin.forbid(&place.of.system, "ca").await.unwrap();
    place.of.allow_ca(&["get"]).await.unwrap();
    place.renew_kubeconfig(&server).await.unwrap();
    place.says("has not been heard").await.unwrap();

    let (pod, finished) = (place.of.pod("new").await.unwrap(), place.of.pod("finished").await.unwrap());
    let token = place.of.token(&pod).await.unwrap();
    granted(&caller, &token).await.unwrap();
    let (known_since, before) = (Instant::now(), reviews(&place, &server));
    place.of.admin.delete_pod(&pod).await.unwrap();
    for _ in 0..5 {
        ask(&caller, &token).await.unwrap().unwrap();
    }
    assert_eq!((reviews(&place, &server), known_since.elapsed() < REMEMBERED), (before, true));
    refused(&caller, &token, "pod_gone", SOON).await.unwrap();
    assert!(known_since.elapsed() < REMEMBERED + Duration::from_secs(3), "{:?}", known_since.elapsed());

    // The API server's own judgement of the token says nothing about that.
    place.of.admin.set_phase(&finished, "Succeeded").await.unwrap();
    refused(&caller, &place.of.token(&finished).await.unwrap(), "pod_finished", SOON).await.unwrap();
}

#[tokio::test]
async fn the_agent_of_a_node_that_was_deleted_gets_nothing_for_pods_of_the_next_one_of_its_name() {
    let Some(server) = shared().await.unwrap() else { return };
    let place = Place::new(&server, HOUR).await.unwrap();
    let (of, node) = (&place.of, &place.of.node);
    let caller = place.caller(node).await.unwrap();
    let pod = of.pod("before").await.unwrap();
    let token = of.token(&pod).await.unwrap();
    granted(&caller, &token).await.unwrap();
    // The cluster deletes the pods of a node that is gone.
    of.admin.delete_node(node).await.unwrap();
    of.admin.delete_pod(&pod).await.unwrap();
    refused(&caller, &token, "pod_gone", SOON).await.unwrap();

    let next = of.admin.node_named(&node.name).await.unwrap();
    assert_ne!(next.uid, node.uid);
    let token = of.token(&of.pod("after").await.unwrap()).await.unwrap();
    refused(&caller, &token, "token_other_node", SOON).await.unwrap();
    let agent = of.admin.pod(&of.system, "agent-next", "agent", &next.name).await.unwrap();
    let join_token = of.join_token(&agent).await.unwrap();
    let next = Caller::join_with_token(&place.lab, &place.ca, "next", &join_token).await.unwrap();
    granted(&next, &token).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_in_another_pod_joins_by_that_ones_token_and_one_whose_pod_is_gone_renews_no_more() {
    let lifetime = Duration::from_secs(12);
    let Some(server) = shared().await.unwrap() else { return };
    let place = Place::for_agents(&server, lifetime).await.unwrap();
    let (of, node) = (&place.of, &place.of.node);
    let volume = TokenVolume::create(&place.lab.at("agent-token")).unwrap();
    let joins = |pod: &Pod| place.ca.ask(&["identity", "list", "--pod", &pod.uid.to_string()]).unwrap().as_array().unwrap().len();
    let first = of.agent_pod(node).await.unwrap();
    volume.replace(&of.join_token(&first).await.unwrap()).unwrap();
    let mut agent = Agent::configure_with_token(&place.lab, &place.ca, &volume).unwrap();
    agent.run(&place.lab).await.unwrap();
    assert_eq!(joins(&first), 1);

    // As a DaemonSet replaces its pods. The new one finds the certificate on the node.
    agent.kill().unwrap();
    of.admin.delete_pod(&first).await.unwrap();
    let second = of.admin.pod(&of.system, "agent-second", "agent", &node.name).await.unwrap();
    volume.replace(&of.join_token(&second).await.unwrap()).unwrap();
    agent.run(&place.lab).await.unwrap();
    wait::until("joined anew", 2 * lifetime, async || if joins(&second) == 1 { Ok(()) } else { Err("not yet") }).await.unwrap();
    let log = agent.log().unwrap();
    assert!(log.contains("joining anew by its token") && !log.contains("could not be renewed"), "{log}");
    let pod = of.pod("cart-0").await.unwrap();
    secrets::fetch(&agent.sds_socket, Some(&of.token(&pod).await.unwrap()), SOON).await.unwrap();

    // The node goes, and the cluster deletes its pods.
    of.admin.delete_node(node).await.unwrap();
    of.admin.delete_pod(&second).await.unwrap();
    wait::until("refused", 2 * lifetime, async || {
        let refusals = place.ca.ask(&["identity", "refusals", "--reason", "pod_gone", "--limit", "50"]).unwrap();
        let mut messages = refusals.as_array().unwrap().iter().map(|refusal| refusal["message"].as_str().unwrap());
        let uid = second.uid.to_string();
        if messages.any(|message| message.contains(&uid) && message.contains("the agent's pod")) {
            Ok(())
        } else {
            Err(refusals.to_string())
        }
    })
    .await
    .unwrap();
    wait::until("without a certificate", 2 * lifetime, async || match http::get(agent.http, "/readyz").await.unwrap() {
        (503, reasons) if reasons.contains("expired") => Ok(()),
        answer => Err(answer.1),
    })
    .await
    .unwrap();
    assert_eq!(joins(&second), 1);
}

/// How often the CA has asked about a token.
fn reviews(place: &Place, server: &ApiServer) -> usize {
    place.calls(server).unwrap().iter().filter(|call| call.resource == "tokenreviews").count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_requests_of_a_thousand_pods_make_fewer_than_twenty_calls_of_the_api_server() {
    const PODS: usize = 1000;
    const AT_ONCE: usize = 50;
    let Some(server) = shared().await.unwrap() else { return };
    let place = Place::new(&server, HOUR).await.unwrap();
    let agent = place.agent("\n[limits]\nworkloads = 2000\n").await.unwrap();
    for start in (0..PODS).step_by(AT_ONCE) {
        let mut starting = JoinSet::new();
        for number in start..PODS.min(start + AT_ONCE) {
            let (admin, namespace, node) = (place.of.admin.clone(), place.of.shop.clone(), place.of.node.name.clone());
            let socket = agent.sds_socket.clone();
            // As soon as there is a token, as with the kubelet.
            starting.spawn(async move {
                let pod = admin.pod(&namespace, &format!("cart-{number}"), "cart", &node).await.unwrap();
                let token = admin.token(&pod, "chancery", HOUR).await.unwrap();
                secrets::fetch(&socket, Some(&token), SOON).await.map(drop).map_err(|error| error.to_string())
            });
        }
        for outcome in starting.join_all().await {
            outcome.unwrap();
        }
    }
    let issued = place.ca.ask(&["identity", "list", "--namespace", &place.of.shop, "--limit", "10000"]).unwrap();
    assert_eq!(issued.as_array().unwrap().len(), PODS);
    let calls = place.calls(&server).unwrap();
    assert!(!calls.is_empty() && calls.len() < 20, "{} calls: {calls:#?}", calls.len());
}
