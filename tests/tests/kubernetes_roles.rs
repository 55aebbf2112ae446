//! Who operates the CA by Kubernetes: `chancery --kube` with a person's own kubeconfig, the real API server's tokens, reviews and RBAC.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use chancery_proto::chancery::v1::operator_service_client::OperatorServiceClient;
use chancery_proto::chancery::v1::{StatusRequest, WatchIdentitiesRequest};
use chancery_tests::ca::{CLUSTER, Ca, TRUST_DOMAIN};
use chancery_tests::kubernetes::place::{self, Territory};
use chancery_tests::kubernetes::{Admin, ApiServer, ISSUER, shared};
use chancery_tests::lab::Lab;
use chancery_tests::{tools, wait};
use serde_json::{Value, json};
use tonic::{Code, Request, Status};

const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(30);
const MINUTE: Duration = Duration::from_secs(60);
/// How long it takes until the CA has looked whether somebody may still follow.
const LOOKED_AT: Duration = Duration::from_secs(22);
/// How long the CA keeps to what the API server said.
const REMEMBERED: Duration = Duration::from_secs(10);
const OPERATORS: &str = "chancery-admin";
const AGENT: &str = "spiffe://mesh.test/chancery/agent/dev/cb3e2c0e-4d2f-4b5c-9c0e-6a5b8f3d2a11";

/// A cluster with a CA that it may have operators of, and a person, who may create tokens for service accounts and do nothing else.
struct Place {
    admin: Admin,
    system: String,
    person: PathBuf,
    ca: Ca,
    lab: Lab,
}

impl Place {
    async fn new(server: &ApiServer) -> Self {
        Self::with(server, "operators = true\n").await
    }

    async fn with(server: &ApiServer, more: &str) -> Self {
        let of = Territory::new(server).await.unwrap();
        for account in ["person", "operator"] {
            of.admin.account(&of.system, account).await.unwrap();
        }
        let rights = json!([{"apiGroups": ["authorization.k8s.io"], "resources": ["subjectaccessreviews"], "verbs": ["create"]}]);
        of.admin.allow(&of.system, "ca", &rights).await.unwrap();
        let tokens = json!([{"apiGroups": [""], "resources": ["serviceaccounts/token"], "verbs": ["create"]}]);
        of.admin.allow(&of.system, "person", &tokens).await.unwrap();
        let own = of.admin.unbound_token(&of.system, "person", ISSUER, HOUR).await.unwrap();
        let person = server.kubeconfig_for_token(&own).unwrap();
        let place::Place { of, ca, lab, .. } = place::Place::with(server, of, HOUR, more).await.unwrap();
        Self { admin: of.admin, system: of.system, person, ca, lab }
    }

    /// Lets the operators' service account do this, as a `ClusterRoleBinding` does.
    async fn bind(&self, resources: &[&str], verbs: &[&str]) {
        let rules = json!([{"apiGroups": ["chancery.dev"], "resources": resources, "verbs": verbs}]);
        self.admin.allow(&self.system, "operator", &rules).await.unwrap();
    }

    /// What the cluster roles `chancery-auditor` and `chancery-admin` have.
    async fn bind_all(&self, verbs: &[&str]) {
        self.bind(&["trustroots", "identities", "agents", "log"], verbs).await;
    }

    /// Runs `chancery --kube` as the person; what it printed, or what it complained about.
    fn chancery(&self, arguments: &[&str]) -> Result<String, String> {
        self.chancery_by(&self.person, arguments)
    }

    /// The same by this kubeconfig.
    fn chancery_by(&self, kubeconfig: &Path, arguments: &[&str]) -> Result<String, String> {
        let mut command = Command::new(tools::chancery("chancery").unwrap());
        command.env("KUBECONFIG", kubeconfig).arg("--kube").args(["--trust-domain", TRUST_DOMAIN]);
        command.args(["--server", &self.ca.address.to_string(), "--ca-bundle"]).arg(self.ca.bundle());
        let account = format!("{}/operator", self.system);
        let output = command.args(["--kube-service-account", &account]).args(arguments).output().unwrap();
        let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(said(&output.stdout)) } else { Err(said(&output.stderr)) }
    }

    /// The person's kubeconfig, whose token comes from a script, as that of AKS, EKS and GKE comes from a program.
    fn kubeconfig_with_script(&self, script: &str) -> PathBuf {
        let (program, path) = (self.lab.at("login"), self.lab.at("kubeconfig-with-script"));
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
        let mut kubeconfig: Value = serde_json::from_slice(&std::fs::read(&self.person).unwrap()).unwrap();
        let exec = json!({"apiVersion": "client.authentication.k8s.io/v1", "command": program, "interactiveMode": "Never"});
        kubeconfig["users"][0]["user"] = json!({"exec": exec});
        std::fs::write(&path, kubeconfig.to_string()).unwrap();
        path
    }

    /// Waits until the API server knows of a binding, since RBAC follows its own objects.
    async fn may(&self, arguments: &[&str]) {
        wait::until("the binding counts", SOON, async || self.chancery(arguments)).await.unwrap();
    }

    /// As the ledger names it.
    fn actor(&self) -> String {
        format!("kubernetes:{CLUSTER}/system:serviceaccount:{}:operator", self.system)
    }

    /// What the ledger has of the service account, newest first.
    fn acts(&self) -> Vec<Value> {
        self.ca.ask(&["log", "acts", "--actor", &self.actor()]).unwrap().as_array().unwrap().clone()
    }

    /// Calls the CA over TLS with this token.
    async fn status(&self, token: &str) -> Result<(), Status> {
        OperatorServiceClient::new(self.ca.connect().await.unwrap()).status(with_token(StatusRequest {}, token)).await.map(drop)
    }

    /// How often the CA has asked about a token or a right.
    fn reviews(&self, server: &ApiServer) -> usize {
        let own = format!("system:serviceaccount:{}:ca", self.system);
        let calls = server.calls().unwrap();
        calls.iter().filter(|call| call.user == own && call.resource.ends_with("reviews")).count()
    }
}

fn with_token<Q>(question: Q, token: &str) -> Request<Q> {
    let mut request = Request::new(question);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

#[tokio::test]
async fn without_a_binding_nothing_works_and_nothing_is_recorded() {
    let Some(server) = shared().await.unwrap() else { return };
    let place = Place::new(&server).await;
    for command in [&["status"][..], &["identity", "list"], &["agent", "ban", AGENT, "--reason", "I like to"]] {
        let complaint = place.chancery(command).unwrap_err();
        assert!(complaint.contains(&place.actor()) && complaint.contains("clusterrolebinding"), "{command:?}: {complaint}");
    }
    assert_eq!(place.acts(), Vec::<Value>::new(), "a stranger fills no ledger");
}

#[tokio::test]
async fn a_person_who_may_make_no_token_of_the_service_account_is_told_so() {
    let Some(server) = shared().await.unwrap() else { return };
    let place = Place::new(&server).await;
    place.bind_all(&["get", "update"]).await;
    place.admin.forbid(&place.system, "person").await.unwrap();
    wait::until("refused", SOON, async || match place.chancery(&["status"]) {
        Err(complaint) if complaint.contains("must be allowed to create serviceaccounts/token") => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await
    .unwrap();
    assert!(place.chancery(&["status"]).unwrap_err().contains(&format!("{}/operator", place.system)));
}

#[tokio::test]
async fn a_kubeconfig_whose_token_comes_from_a_program_is_as_good_and_a_program_that_fails_is_named() {
    let Some(server) = shared().await.unwrap() else { return };
    let place = Place::new(&server).await;
    place.bind_all(&["get"]).await;
    let own = place.admin.unbound_token(&place.system, "person", ISSUER, HOUR).await.unwrap();
    let credential = json!({"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": own}});
    let prints = place.kubeconfig_with_script(&format!("echo '{credential}'"));
    wait::until("the binding counts", SOON, async || place.chancery_by(&prints, &["status"])).await.unwrap();

    let fails = place.kubeconfig_with_script("echo 'you are not logged in' >&2; exit 3");
    let complaint = place.chancery_by(&fails, &["status"]).unwrap_err();
    assert!(["kubeconfig", "login", "you are not logged in"].iter().all(|words| complaint.contains(words)), "{complaint}");
    let missing = place.kubeconfig_with_script("");
    std::fs::remove_file(place.lab.at("login")).unwrap();
    let complaint = place.chancery_by(&missing, &["status"]).unwrap_err();
    assert!(["kubeconfig", "login"].iter().all(|words| complaint.contains(words)), "{complaint}");
}

#[tokio::test]
async fn a_cluster_that_is_not_said_to_have_operators_has_none() {
    let Some(server) = shared().await.unwrap() else { return };
    let place = Place::with(&server, "").await;
    place.bind_all(&["get", "update"]).await;
    assert!(place.chancery(&["status"]).unwrap_err().contains("operators = true"));
    assert_eq!(place.reviews(&server), 0);
}

#[tokio::test]
async fn a_binding_makes_an_auditor_who_reads_and_whose_act_is_refused_and_recorded() {
    let Some(server) = shared().await.unwrap() else { return };
    let place = Place::new(&server).await;
    place.bind_all(&["get", "list", "watch"]).await;
    place.may(&["status"]).await;
    for command in [&["doctor"][..], &["identity", "list"], &["agent", "list"], &["root", "list"], &["log", "acts"], &["log", "checkpoint"]]
    {
        wait::until("read", SOON, async || match place.chancery(command) {
            // It judges the CA as well.
            Err(complaint) if command == ["doctor"] && complaint.contains("keep certificates") => Ok(()),
            other => other.map(drop),
        })
        .await
        .unwrap();
    }
    let complaint = place.chancery(&["agent", "ban", AGENT, "--reason", "I like to"]).unwrap_err();
    assert!(complaint.contains("is an auditor") && complaint.contains(&place.actor()), "{complaint}");
    place.chancery(&["log", "rotate-key", "--reason", "I like to"]).unwrap_err();
    let acts = place.acts();
    assert_eq!(acts.len(), 1, "{acts:?}");
    let recorded = ["action", "target", "why"].map(|key| acts[0][key].as_str().unwrap());
    assert_eq!(recorded, ["act.refused", &format!("agent.ban {AGENT}"), "I like to"]);
    assert!(acts[0]["outcome"].as_str().unwrap().contains("is an auditor"), "{acts:?}");
}

#[tokio::test]
async fn an_admin_acts_and_is_recorded_and_each_resource_is_a_right_of_its_own() {
    let Some(server) = shared().await.unwrap() else { return };
    let place = Place::new(&server).await;
    place.bind(&["log"], &["get", "update"]).await;
    place.may(&["log", "acts"]).await;
    place.may(&["log", "rotate-key", "--reason", "the yearly change"]).await;
    let acts = place.acts();
    assert_eq!((&acts[0]["outcome"], &acts[0]["why"]), (&json!("done"), &json!("the yearly change")), "{acts:?}");
    let complaint = place.chancery(&["identity", "list"]).unwrap_err();
    assert!(complaint.contains("get identities.chancery.dev"), "{complaint}");
}

#[tokio::test]
async fn a_token_that_is_good_for_anything_else_is_refused_and_sent_nowhere() {
    let Some(server) = shared().await.unwrap() else { return };
    let place = Place::new(&server).await;
    place.bind_all(&["get", "update"]).await;
    let token = async |audience: &str| place.admin.unbound_token(&place.system, "operator", audience, HOUR).await.unwrap();
    let before = place.reviews(&server);
    for audience in [ISSUER, "chancery", "chancery-agent"] {
        let error = place.status(&token(audience).await).await.unwrap_err();
        assert_eq!((error.code(), error.message().contains(OPERATORS)), (Code::Unauthenticated, true), "{audience}: {error}");
    }
    place.status("not.a.token").await.unwrap_err();
    assert_eq!(place.reviews(&server), before);

    // So that it is seen that the rest of this would have worked.
    let good = token(OPERATORS).await;
    wait::until("let in", SOON, async || place.status(&good).await).await.unwrap();
    assert!(place.reviews(&server) > before);
}

#[tokio::test]
async fn a_forged_token_is_refused_unasked() {
    let Some(server) = shared().await.unwrap() else { return };
    let place = Place::new(&server).await;
    place.bind_all(&["get"]).await;
    let good = place.admin.unbound_token(&place.system, "operator", OPERATORS, HOUR).await.unwrap();
    wait::until("let in", SOON, async || place.status(&good).await).await.unwrap();
    let before = place.reviews(&server);
    let (rest, _) = good.rsplit_once('.').unwrap();
    let unknown_key = rest.split_once('.').map(|(_, claims)| format!("eyJhbGciOiJSUzI1NiIsImtpZCI6Im5vYm9keSJ9.{claims}")).unwrap();
    for forged in [rest, &unknown_key] {
        let error = place.status(&format!("{forged}.{}", "A".repeat(342))).await.unwrap_err();
        assert_eq!((error.code(), error.message().contains("refused unasked")), (Code::Unauthenticated, true), "{error}");
    }
    assert_eq!(place.reviews(&server), before);
}

#[tokio::test]
async fn a_binding_that_is_removed_counts_no_more_within_seconds_and_few_calls_are_made_until_then() {
    let Some(server) = shared().await.unwrap() else { return };
    let place = Place::new(&server).await;
    place.bind_all(&["get"]).await;
    let token = place.admin.unbound_token(&place.system, "operator", OPERATORS, HOUR).await.unwrap();
    wait::until("let in", SOON, async || place.status(&token).await).await.unwrap();
    let (before, since) = (place.reviews(&server), Instant::now());
    for _ in 0..20 {
        place.status(&token).await.unwrap();
    }
    // The answer may have been remembered for nearly as long as it is.
    let made = place.reviews(&server) - before;
    assert!(made <= 2, "{made} reviews for 20 calls within {:?}", since.elapsed());

    place.admin.forbid(&place.system, "operator").await.unwrap();
    let removed = Instant::now();
    wait::until("refused", SOON, async || match place.status(&token).await {
        Err(error) if error.code() == Code::PermissionDenied => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await
    .unwrap();
    assert!(removed.elapsed() < REMEMBERED + Duration::from_secs(3), "{:?}", removed.elapsed());
}

#[tokio::test]
async fn what_somebody_follows_ends_within_a_minute_of_the_binding() {
    let Some(server) = shared().await.unwrap() else { return };
    let place = Place::new(&server).await;
    place.bind_all(&["get"]).await;
    let token = place.admin.unbound_token(&place.system, "operator", OPERATORS, HOUR).await.unwrap();
    wait::until("let in", SOON, async || place.status(&token).await).await.unwrap();
    let watch = with_token(WatchIdentitiesRequest::default(), &token);
    let mut watch = OperatorServiceClient::new(place.ca.connect().await.unwrap()).watch_identities(watch).await.unwrap().into_inner();
    let mut end = async || loop {
        if let Err(error) = watch.message().await {
            return error;
        }
    };
    tokio::time::timeout(LOOKED_AT, end()).await.expect_err("it goes on while the binding is there");
    place.admin.forbid(&place.system, "operator").await.unwrap();
    let error = tokio::time::timeout(MINUTE, end()).await.expect("it ends");
    assert_eq!((error.code(), error.message().contains("clusterrolebinding")), (Code::PermissionDenied, true), "{error}");
}

#[tokio::test]
async fn while_the_api_server_is_away_nobody_is_let_in_by_it_and_it_is_said_what_to_do() {
    let Some(mut server) = ApiServer::start().await.unwrap() else { return };
    let place = Place::new(&server).await;
    place.bind_all(&["get"]).await;
    let tokens = [
        place.admin.unbound_token(&place.system, "operator", OPERATORS, HOUR).await.unwrap(),
        place.admin.unbound_token(&place.system, "operator", OPERATORS, 2 * HOUR).await.unwrap(),
    ];
    wait::until("let in", SOON, async || place.status(&tokens[0]).await).await.unwrap();
    server.kill().unwrap();
    let error = place.status(&tokens[1]).await.unwrap_err();
    assert_eq!((error.code(), error.message().contains("admin socket")), (Code::Unavailable, true), "{error}");
    place.ca.chancery(&["status"]).unwrap();
    server.run().await.unwrap();
    wait::until("let in again", SOON, async || place.status(&tokens[1]).await).await.unwrap();
}
