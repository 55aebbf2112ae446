//! The CA while the real API server is away, is killed and comes back, or signs with other keys.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use chancery_proto::chancery::v1::agent_service_client::AgentServiceClient;
use chancery_proto::chancery::v1::workload_result::Outcome;
use chancery_proto::chancery::v1::{JoinRequest, Role, WorkloadRequest};
use chancery_tests::ca::{CLUSTER, Ca, TRUST_DOMAIN};
use chancery_tests::caller::Caller;
use chancery_tests::kubernetes::place::{Place, ask, granted, refused};
use chancery_tests::kubernetes::{ApiServer, shared};
use chancery_tests::lab::free_address;
use chancery_tests::{http, secrets};
use kube::api::DeleteParams;
use serde_json::Value;
use tonic::Code;
use uuid::Uuid;

const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(30);
const LONG: Duration = Duration::from_secs(120);

#[tokio::test]
async fn without_the_api_server_known_pods_renew_and_who_is_new_waits_until_it_is_back() {
    let lifetime = Duration::from_secs(20);
    let Some(mut server) = ApiServer::start().await.unwrap() else { return };
    let place = Place::new(&server, lifetime).await.unwrap();
    let agent = place.agent("").await.unwrap();
    let (second, third) = (place.of.admin.node("node").await.unwrap(), place.of.admin.node("node").await.unwrap());
    let caller = place.caller(&second).await.unwrap();
    let known = place.of.pod("known").await.unwrap();
    let mut proxy = secrets::hold(&agent.sds_socket, Some(&place.of.token(&known).await.unwrap()), None, SOON).await.unwrap();
    let home = server.address();

    // Where the CA does not look, so that it learns nothing of who is new.
    server.kill().unwrap();
    server.run_at(free_address().unwrap()).await.unwrap();
    let admin = server.admin().await.unwrap();
    let (mut new, mut tokens) = (Vec::new(), Vec::new());
    for (name, node) in [("new-0", &place.of.node), ("new-1", &second)] {
        let pod = admin.pod(&place.of.shop, name, "cart", &node.name).await.unwrap();
        tokens.push(admin.token(&pod, "chancery", HOUR).await.unwrap());
        new.push(pod);
    }
    let agent_pod = admin.pod(&place.of.system, "agent-third", "agent", &third.name).await.unwrap();
    let join_token = admin.token(&agent_pod, "chancery-agent", HOUR).await.unwrap();
    server.kill().unwrap();
    let issued = place.issued(&known).unwrap();

    let (socket, token) = (agent.sds_socket.clone(), tokens[0].clone());
    let waiting = tokio::spawn(async move { secrets::fetch(&socket, Some(&token), LONG).await.map_err(|error| error.to_string()) });
    proxy.answer(None, lifetime).await.unwrap();
    assert!(place.issued(&known).unwrap() > issued, "renewed without the API server");
    let refusal = ask(&caller, &tokens[1]).await.unwrap().unwrap_err();
    assert_eq!((refusal.reason.as_str(), refusal.retryable), ("api_server_away", true), "{}", refusal.message);
    assert!(!waiting.is_finished(), "the agent goes on asking");
    let (cluster, token) = (CLUSTER.to_owned(), join_token.clone());
    let request_id = Uuid::new_v4().to_string();
    let join = JoinRequest { role: Role::Agent.into(), cluster, token, request_id, ..JoinRequest::default() };
    let status = AgentServiceClient::new(place.ca.connect().await.unwrap()).join(join).await.unwrap_err();
    assert_eq!((status.code(), status.message().contains("has not answered since")), (Code::Unavailable, true), "{status}");

    let joining = Caller::join_with_token(&place.lab, &place.ca, &third.name, &join_token);
    let (joined, back) = tokio::join!(joining, server.run_at(home));
    back.unwrap();
    joined.unwrap();
    granted(&caller, &tokens[1]).await.unwrap();
    let secrets = waiting.await.unwrap().unwrap();
    assert_eq!(secrets.svid.id().to_string(), format!("spiffe://{TRUST_DOMAIN}/ns/{}/sa/cart", place.of.shop));
    assert_eq!([place.issued(&new[0]).unwrap(), place.issued(&new[1]).unwrap()], [1, 1]);
    proxy.answer(None, lifetime).await.unwrap();
}

#[tokio::test]
async fn an_api_server_that_says_nothing_is_asked_little_and_holds_up_a_call_for_no_longer_than_any_agent_waits() {
    /// The shortest `renewal.call_timeout`.
    const ANY_AGENT: Duration = Duration::from_secs(5);
    const NEW: usize = 20;
    /// Questions at the same time.
    const AT_ONCE: usize = 8;
    let Some(server) = ApiServer::start().await.unwrap() else { return };
    let place = Place::new(&server, HOUR).await.unwrap();
    let caller = place.caller(&place.of.node).await.unwrap();
    let known = place.of.token(&place.of.pod("known").await.unwrap()).await.unwrap();
    granted(&caller, &known).await.unwrap();
    // The CA may not watch any more, and so does not know who is new.
    place.of.admin.forbid(&place.of.system, "ca").await.unwrap();
    place.of.allow_ca(&["get"]).await.unwrap();
    place.renew_kubeconfig(&server).await.unwrap();
    place.says("has not been heard").await.unwrap();
    let mut tokens = vec![known];
    for number in 0..NEW {
        tokens.push(place.of.token(&place.of.pod(&format!("new-{number}")).await.unwrap()).await.unwrap());
    }

    let failed = async || reading(&place.ca, "chancery_cluster_reviews_failed").await;
    let before = failed().await;
    server.freeze().unwrap();
    let begun = Instant::now();
    ask(&caller, &tokens[0]).await.unwrap().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    let requests = tokens.iter().map(|token| WorkloadRequest { token: token.clone(), ..caller.request().unwrap() }).collect();
    let begun = Instant::now();
    let mut outcomes = caller.call(requests).await.unwrap().into_iter().map(|result| result.outcome.unwrap());
    assert!(begun.elapsed() < ANY_AGENT, "{:?}", begun.elapsed());
    assert!(matches!(outcomes.next().unwrap(), Outcome::Svid(_)));
    let mut reasons = BTreeMap::<_, usize>::new();
    for outcome in outcomes {
        let Outcome::Refusal(refusal) = outcome else { panic!("nobody could tell") };
        assert!(refusal.retryable, "{}", refusal.message);
        *reasons.entry(refusal.reason).or_default() += 1;
    }
    assert_eq!(
        reasons,
        [("api_server_away", AT_ONCE), ("api_server_busy", NEW - AT_ONCE)].map(|(word, count)| (word.into(), count)).into()
    );
    #[allow(clippy::cast_precision_loss, reason = "a handful")]
    let asked = AT_ONCE as f64;
    assert!((failed().await - before - asked).abs() < 0.5, "nobody else was asked about");
    server.thaw().unwrap();
    for token in &tokens {
        granted(&caller, token).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ca_that_starts_without_the_api_server_renews_for_pods_that_have_a_good_certificate_and_for_nobody_else() {
    let Some(mut server) = ApiServer::start().await.unwrap() else { return };
    let mut place = Place::new(&server, HOUR).await.unwrap();
    let caller = place.caller(&place.of.node).await.unwrap();
    let mut tokens = Vec::new();
    let names = ["known", "deleted", "revoked"];
    for name in names {
        tokens.push(place.of.token(&place.of.pod(name).await.unwrap()).await.unwrap());
        granted(&caller, tokens.last().unwrap()).await.unwrap();
    }
    let [known, deleted, revoked] = &tokens[..] else { unreachable!() };
    for identity in place.ca.ask(&["identity", "list", "--pod", &format!("{}/revoked", place.of.shop)]).unwrap().as_array().unwrap() {
        let serial = identity["serial"].as_str().unwrap();
        // It would wait for the agent to take the CRL, which this one never does.
        place.ca.chancery(&["identity", "revoke", "--serial", serial, "--reason", "a test", "--wait", "0s"]).ok();
    }
    let home = server.address();

    // Where the CA does not look.
    server.kill().unwrap();
    server.run_at(free_address().unwrap()).await.unwrap();
    let admin = server.admin().await.unwrap();
    let new = admin.pod(&place.of.shop, "new", "cart", &place.of.node.name).await.unwrap();
    let new = admin.token(&new, "chancery", HOUR).await.unwrap();
    let pods = kube::Api::<k8s_openapi::api::core::v1::Pod>::namespaced(admin.client().clone(), &place.of.shop);
    pods.delete("deleted", &DeleteParams::default().grace_period(0)).await.unwrap();
    server.kill().unwrap();

    place.ca.kill().unwrap();
    place.ca.run(&place.lab).await.expect("it is ready for those whom it can serve");
    place.says("pods that have a certificate keep getting certificates").await.unwrap();
    caller.connected().await.unwrap();
    granted(&caller, known).await.unwrap();
    granted(&caller, known).await.expect("by the certificate before");
    granted(&caller, deleted).await.expect("nobody can tell");
    for token in [&new, revoked] {
        let refusal = ask(&caller, token).await.unwrap().unwrap_err();
        assert_eq!((refusal.reason.as_str(), refusal.retryable), ("api_server_away", true), "{}", refusal.message);
    }

    server.run_at(home).await.unwrap();
    refused(&caller, deleted, "pod_gone", SOON).await.unwrap();
    for token in [&new, known, revoked] {
        granted(&caller, token).await.unwrap();
    }
    // Once it has been heard, what was issued counts no more.
    server.kill().unwrap();
    refused(&caller, deleted, "api_server_away", SOON).await.unwrap();
    granted(&caller, known).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ca_that_starts_with_a_kubeconfig_that_is_good_no_more_serves_pods_with_a_certificate_until_it_gets_another() {
    let Some(server) = shared().await.unwrap() else { return };
    let mut place = Place::new(&server, HOUR).await.unwrap();
    let caller = place.caller(&place.of.node).await.unwrap();
    let known = place.of.token(&place.of.pod("known").await.unwrap()).await.unwrap();
    granted(&caller, &known).await.unwrap();
    let new = place.of.token(&place.of.pod("new").await.unwrap()).await.unwrap();
    let kubeconfig = place.kubeconfig.clone();
    let mut expired: Value = serde_json::from_str(&std::fs::read_to_string(&kubeconfig).unwrap()).unwrap();
    expired["users"][0]["user"]["token"] = "expired".into();
    std::fs::write(&kubeconfig, expired.to_string()).unwrap();
    place.ca.kill().unwrap();
    place.ca.run(&place.lab).await.expect("it is ready for those whom it can serve");
    for problem in ["does not accept the CA's credentials", "no connection can be made"] {
        place.says(problem).await.unwrap();
        caller.connected().await.unwrap();
        granted(&caller, &known).await.expect("by the certificate before");
        let refusal = ask(&caller, &new).await.unwrap().unwrap_err();
        assert_eq!((refusal.reason.as_str(), refusal.retryable), ("api_server_away", true), "{problem}: {}", refusal.message);
        // Then it is gone.
        std::fs::remove_file(&kubeconfig).ok();
    }
    place.renew_kubeconfig(&server).await.unwrap();
    for token in [&new, &known] {
        granted(&caller, token).await.unwrap();
    }
}

#[tokio::test]
async fn tokens_of_the_old_and_of_the_new_key_are_good_while_both_are_published() {
    let Some(mut server) = ApiServer::start().await.unwrap() else { return };
    let place = Place::new(&server, HOUR).await.unwrap();
    let agent = place.agent("").await.unwrap();
    let (first, second, third) =
        (place.of.pod("first").await.unwrap(), place.of.pod("second").await.unwrap(), place.of.pod("third").await.unwrap());
    let (before, unused) = (place.of.token(&first).await.unwrap(), place.of.token(&second).await.unwrap());
    secrets::fetch(&agent.sds_socket, Some(&before), SOON).await.unwrap();

    server.rotate_signer().await.unwrap();
    let published: Value = serde_json::from_str(&place.of.admin.jwks().await.unwrap()).unwrap();
    assert_eq!(published["keys"].as_array().unwrap().len(), 2, "{published}");
    let after = place.of.token(&third).await.unwrap();
    assert_ne!(header(&before), header(&after), "signed with another key");
    secrets::fetch(&agent.sds_socket, Some(&after), SOON).await.unwrap();
    secrets::fetch(&agent.sds_socket, Some(&unused), SOON).await.unwrap();
    for pod in [&first, &second, &third] {
        assert_eq!(place.issued(pod).unwrap(), 1, "{}", pod.name);
    }
}

#[tokio::test]
async fn a_token_of_a_key_that_is_no_longer_published_is_refused_within_a_minute() {
    let Some(mut server) = ApiServer::start().await.unwrap() else { return };
    let place = Place::new(&server, HOUR).await.unwrap();
    let caller = place.caller(&place.of.node).await.unwrap();
    let pod = place.of.pod("cart-0").await.unwrap();
    let before = place.of.token(&pod).await.unwrap();
    server.rotate_signer().await.unwrap();
    place.renew_kubeconfig(&server).await.unwrap();
    let after = place.of.token(&pod).await.unwrap();
    for token in [&after, &before] {
        granted(&caller, token).await.unwrap();
    }
    server.retire_signers().await.unwrap();
    let retired = Instant::now();
    refused(&caller, &before, "token_unknown_key", LONG).await.unwrap();
    assert!(retired.elapsed() < Duration::from_secs(75), "{:?}", retired.elapsed());
    granted(&caller, &after).await.unwrap();
}

/// What the CA's metrics say of the one cluster.
async fn reading(ca: &Ca, name: &str) -> f64 {
    let (_, metrics) = http::get(ca.http, "/metrics").await.unwrap();
    let line = metrics.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name}: {metrics}"));
    line.rsplit_once(' ').unwrap().1.parse().unwrap()
}

/// Algorithm and key, as they stand in the token.
fn header(token: &str) -> &str {
    token.split('.').next().unwrap()
}
