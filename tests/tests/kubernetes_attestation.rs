//! The CA beside the real API server: whose pod a token speaks of, whether it is still there, and what happens when nobody can say.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeSet;
use std::time::Duration;

use chancery_proto::chancery::v1::{Refusal, WorkloadRequest};
use chancery_tests::agent::Agent;
use chancery_tests::ca::{CLUSTER, Ca, TRUST_DOMAIN};
use chancery_tests::caller::Caller;
use chancery_tests::kubernetes::{Admin, ApiServer, Call, ISSUER, Node, Pod, shared};
use chancery_tests::lab::{Lab, free_address};
use chancery_tests::tokens::TokenVolume;
use chancery_tests::{secrets, wait};
use serde_json::{Value, json};
use tokio::task::JoinSet;

const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(30);
const LONG: Duration = Duration::from_secs(120);
const WORKLOADS: &str = "chancery";
const AGENTS: &str = "chancery-agent";

/// A cluster with one node, and a CA that watches it with the rights of a service account.
struct Place {
    admin: Admin,
    system: String,
    shop: String,
    node: Node,
    ca: Ca,
    lab: Lab,
}

impl Place {
    async fn new(server: &ApiServer, lifetime: Duration) -> Self {
        let admin = server.admin().await.unwrap();
        let (system, shop) = (admin.namespace("system").await.unwrap(), admin.namespace("shop").await.unwrap());
        let node = admin.node("node").await.unwrap();
        for (namespace, account) in [(&system, "ca"), (&system, "agent"), (&shop, "cart")] {
            admin.account(namespace, account).await.unwrap();
        }
        let rules = json!([
            {"apiGroups": [""], "resources": ["pods", "serviceaccounts"], "verbs": ["get", "list", "watch"]},
            {"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"], "verbs": ["create"]},
        ]);
        admin.allow(&system, "ca", &rules).await.unwrap();
        let token = admin.unbound_token(&system, "ca", ISSUER, HOUR).await.unwrap();
        let kubeconfig = server.kubeconfig_for_token(&token).unwrap();
        let cluster = format!(
            "\n[[cluster]]\nname = \"{CLUSTER}\"\nissuer = \"{ISSUER}\"\nagent_accounts = [\"{system}/agent\"]\nservice_accounts = [\"*\"]\n\
             kubernetes = {{ kubeconfig = \"{}\" }}\n",
            kubeconfig.display()
        );
        let lab = Lab::new().unwrap();
        let ca = Ca::start_in(&lab, &lab.at("ca"), lifetime, &cluster).await.unwrap();
        Self { admin, system, shop, node, ca, lab }
    }

    /// A pod of the account `cart` on this node.
    async fn pod(&self, name: &str) -> Pod {
        self.admin.pod(&self.shop, name, "cart", &self.node.name).await.unwrap()
    }

    /// A token as the kubelet gets it.
    async fn token(&self, pod: &Pod) -> String {
        self.admin.token(pod, WORKLOADS, HOUR).await.unwrap()
    }

    /// What the agent of a node joins with.
    async fn join_token(&self, admin: &Admin, node: &Node) -> String {
        let pod = admin.pod(&self.system, &format!("agent-{}", node.name), "agent", &node.name).await.unwrap();
        admin.token(&pod, AGENTS, HOUR).await.unwrap()
    }

    /// The node's agent, running, with these lines in its configuration.
    async fn agent(&self, more: &str) -> Agent {
        let volume = TokenVolume::create(&self.lab.at("agent-token")).unwrap();
        volume.replace(&self.join_token(&self.admin, &self.node).await).unwrap();
        let mut agent = Agent::configure_with_token(&self.lab, &self.ca, &volume).unwrap();
        agent.append(more).unwrap();
        agent.run(&self.lab).await.unwrap();
        agent
    }

    /// Somebody who has the identity of a node's agent and sends what a test makes up.
    async fn caller(&self, node: &Node) -> Caller {
        let token = self.join_token(&self.admin, node).await;
        Caller::join_with_token(&self.lab, &self.ca, &node.name, &token).await.unwrap()
    }

    /// Waits until the CA refuses this token for this reason, and tells what it says about it to people.
    async fn refused(&self, caller: &Caller, token: &str, reason: &str) -> Value {
        wait::until(&format!("refused as {reason}"), SOON, async || match ask(caller, token).await {
            Err(refusal) if refusal.reason == reason && !refusal.retryable => Ok(()),
            Err(refusal) => Err(format!("refused: {refusal:?}")),
            Ok(_) => Err("granted".to_owned()),
        })
        .await
        .unwrap();
        let listed = self.ca.ask(&["identity", "refusals", "--limit", "1"]).unwrap()[0].clone();
        assert_eq!(listed["reason"], reason, "{listed}");
        listed
    }

    /// How often the ledger has certificates for this pod.
    fn issued(&self, pod: &Pod) -> Result<usize, String> {
        let name = format!("{}/{}", pod.namespace, pod.name);
        let identities = self.ca.ask(&["identity", "list", "--pod", &name]).map_err(|error| error.to_string())?;
        Ok(identities.as_array().map_or(0, Vec::len))
    }

    /// The CA's calls of the API server.
    fn calls(&self, server: &ApiServer) -> Vec<Call> {
        let own = format!("system:serviceaccount:{}:ca", self.system);
        server.calls().unwrap().into_iter().filter(|call| call.user == own).collect()
    }
}

/// Where the ledger has the new certificate, or why there is none.
async fn ask(caller: &Caller, token: &str) -> Result<u64, Refusal> {
    let request = WorkloadRequest { token: token.to_owned(), ..caller.request().unwrap() };
    caller.issue(request).await.unwrap().map(|issued| issued.entry)
}

async fn granted(caller: &Caller, token: &str) {
    wait::until("granted", SOON, async || ask(caller, token).await.map_err(|refusal| refusal.message)).await.unwrap();
}

#[tokio::test]
async fn a_pod_gets_its_certificate_over_sds_by_its_own_token() {
    let Some(server) = shared().await.unwrap() else { return };
    let place = Place::new(&server, HOUR).await;
    let agent = place.agent("").await;
    let pod = place.pod("cart-0").await;
    let secrets = secrets::fetch(&agent.sds_socket, Some(&place.token(&pod).await), SOON).await.unwrap();
    assert_eq!(secrets.svid.id().to_string(), format!("spiffe://{TRUST_DOMAIN}/ns/{}/sa/cart", place.shop));
    let listed = place.ca.ask(&["identity", "list", "--pod", &pod.uid.to_string()]).unwrap();
    let listed = &listed.as_array().unwrap()[..];
    assert_eq!(listed.len(), 1, "{listed:?}");
    assert_eq!((&listed[0]["pod"], &listed[0]["node"]), (&json!("cart-0"), &json!(place.node.name)), "{listed:?}");
}

#[tokio::test]
async fn a_token_whose_pod_or_account_is_not_what_it_was_is_refused_each_with_its_own_reason() {
    let Some(server) = shared().await.unwrap() else { return };
    let place = Place::new(&server, HOUR).await;
    let (admin, shop) = (&place.admin, &place.shop);
    let caller = place.caller(&place.node).await;
    let mut reasons = BTreeSet::new();
    let mut refused = async |case: &str, token: &str, reason: &str, says: &str| {
        let listed = place.refused(&caller, token, reason).await;
        assert!(listed["message"].as_str().unwrap().contains(says), "{case}: {listed}");
        assert!(reasons.insert(reason.to_owned()), "{case}: {reason} has another cause already");
    };

    let ending = place.pod("ending").await;
    let ending_token = place.token(&ending).await;
    admin.terminate_pod(&ending, SOON).await.unwrap();

    let pod = place.pod("deleted").await;
    let token = place.token(&pod).await;
    granted(&caller, &token).await;
    admin.delete_pod(&pod).await.unwrap();
    // One of the same name is another pod.
    place.pod("deleted").await;
    refused("deleted", &token, "pod_gone", "deleted").await;

    let pod = place.pod("finished").await;
    let token = place.token(&pod).await;
    granted(&caller, &token).await;
    admin.set_phase(&pod, "Succeeded").await.unwrap();
    refused("finished", &token, "pod_finished", "finished").await;

    let elsewhere = admin.node("node").await.unwrap();
    let pod = admin.pod(shop, "elsewhere", "cart", &elsewhere.name).await.unwrap();
    refused("on another node", &place.token(&pod).await, "token_other_node", &elsewhere.name).await;

    admin.account(shop, "passing").await.unwrap();
    let pod = admin.pod(shop, "passing", "passing", &place.node.name).await.unwrap();
    let token = place.token(&pod).await;
    granted(&caller, &token).await;
    admin.delete_account(shop, "passing").await.unwrap();
    refused("of an account that was deleted", &token, "account_gone", "passing").await;
    admin.account(shop, "passing").await.unwrap();
    refused("of an account that was created again", &token, "account_recreated", "passing").await;

    let unbound = admin.unbound_token(shop, "cart", WORKLOADS, HOUR).await.unwrap();
    refused("bound to no pod", &unbound, "token_not_bound", "kubernetes.io.pod").await;

    // The CA has been told of it before it was told of all these.
    ask(&caller, &ending_token).await.expect("a pod that is ending still runs");
    let pod = place.pod("cart-0").await;
    granted(&caller, &place.token(&pod).await).await;
}

#[tokio::test]
async fn without_the_api_server_known_pods_renew_and_who_is_new_waits_until_it_is_back() {
    let lifetime = Duration::from_secs(20);
    let Some(mut server) = ApiServer::start().await.unwrap() else { return };
    let place = Place::new(&server, lifetime).await;
    let agent = place.agent("").await;
    let (second, third) = (place.admin.node("node").await.unwrap(), place.admin.node("node").await.unwrap());
    let caller = place.caller(&second).await;
    let known = place.pod("known").await;
    let mut proxy = secrets::hold(&agent.sds_socket, Some(&place.token(&known).await), None, SOON).await.unwrap();
    let home = server.address();

    // Where the CA does not look, so that it learns nothing of who is new.
    server.kill().unwrap();
    server.run_at(free_address().unwrap()).await.unwrap();
    let admin = server.admin().await.unwrap();
    let (mut new, mut tokens) = (Vec::new(), Vec::new());
    for (name, node) in [("new-0", &place.node), ("new-1", &second)] {
        let pod = admin.pod(&place.shop, name, "cart", &node.name).await.unwrap();
        tokens.push(admin.token(&pod, WORKLOADS, HOUR).await.unwrap());
        new.push(pod);
    }
    let join_token = place.join_token(&admin, &third).await;
    server.kill().unwrap();
    let issued = place.issued(&known).unwrap();

    let (socket, token) = (agent.sds_socket.clone(), tokens[0].clone());
    let waiting = tokio::spawn(async move { secrets::fetch(&socket, Some(&token), LONG).await.map_err(|error| error.to_string()) });
    proxy.answer(None, lifetime).await.unwrap();
    assert!(place.issued(&known).unwrap() > issued, "renewed without the API server");
    let refusal = ask(&caller, &tokens[1]).await.unwrap_err();
    assert_eq!((refusal.reason.as_str(), refusal.retryable), ("api_server_away", true), "{}", refusal.message);
    assert!(!waiting.is_finished(), "the agent goes on asking");

    let joining = Caller::join_with_token(&place.lab, &place.ca, &third.name, &join_token);
    let (joined, back) = tokio::join!(joining, server.run_at(home));
    back.unwrap();
    joined.unwrap();
    granted(&caller, &tokens[1]).await;
    let secrets = waiting.await.unwrap().unwrap();
    assert_eq!(secrets.svid.id().to_string(), format!("spiffe://{TRUST_DOMAIN}/ns/{}/sa/cart", place.shop));
    assert_eq!([place.issued(&new[0]).unwrap(), place.issued(&new[1]).unwrap()], [1, 1]);
    proxy.answer(None, lifetime).await.unwrap();
}

#[tokio::test]
async fn tokens_of_the_old_and_of_the_new_key_are_good_while_both_are_published() {
    let Some(mut server) = ApiServer::start().await.unwrap() else { return };
    let place = Place::new(&server, HOUR).await;
    let agent = place.agent("").await;
    let (first, second, third) = (place.pod("first").await, place.pod("second").await, place.pod("third").await);
    let (before, unused) = (place.token(&first).await, place.token(&second).await);
    secrets::fetch(&agent.sds_socket, Some(&before), SOON).await.unwrap();

    server.rotate_signer().await.unwrap();
    let published: Value = serde_json::from_str(&place.admin.jwks().await.unwrap()).unwrap();
    assert_eq!(published["keys"].as_array().unwrap().len(), 2, "{published}");
    let after = place.token(&third).await;
    assert_ne!(header(&before), header(&after), "signed with another key");
    secrets::fetch(&agent.sds_socket, Some(&after), SOON).await.unwrap();
    secrets::fetch(&agent.sds_socket, Some(&unused), SOON).await.unwrap();
    for pod in [&first, &second, &third] {
        assert_eq!(place.issued(pod).unwrap(), 1, "{}", pod.name);
    }
}

/// Algorithm and key, as they stand in the token.
fn header(token: &str) -> &str {
    token.split('.').next().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_requests_of_a_thousand_pods_make_fewer_than_twenty_calls_of_the_api_server() {
    const PODS: usize = 1000;
    const AT_ONCE: usize = 50;
    let Some(server) = shared().await.unwrap() else { return };
    let place = Place::new(&server, HOUR).await;
    let agent = place.agent("\n[limits]\nworkloads = 2000\n").await;
    let mut tokens = Vec::with_capacity(PODS);
    for start in (0..PODS).step_by(AT_ONCE) {
        let mut creating = JoinSet::new();
        for number in start..PODS.min(start + AT_ONCE) {
            let (admin, namespace, node) = (place.admin.clone(), place.shop.clone(), place.node.name.clone());
            creating.spawn(async move {
                let pod = admin.pod(&namespace, &format!("cart-{number}"), "cart", &node).await.unwrap();
                admin.token(&pod, WORKLOADS, HOUR).await.unwrap()
            });
        }
        tokens.extend(creating.join_all().await);
    }
    while !tokens.is_empty() {
        let mut fetching = JoinSet::new();
        for token in tokens.drain(..AT_ONCE.min(tokens.len())) {
            let socket = agent.sds_socket.clone();
            fetching.spawn(async move { secrets::fetch(&socket, Some(&token), SOON).await.map(drop).map_err(|error| error.to_string()) });
        }
        for outcome in fetching.join_all().await {
            outcome.unwrap();
        }
    }
    let issued = place.ca.ask(&["identity", "list", "--namespace", &place.shop, "--limit", "10000"]).unwrap();
    assert_eq!(issued.as_array().unwrap().len(), PODS);
    let calls = place.calls(&server);
    assert!(!calls.is_empty() && calls.len() < 20, "{} calls: {calls:#?}", calls.len());
}
