//! Who is believed and who is not, with real keys and tokens.

mod fetched;

use std::path::PathBuf;
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

use chancery_process::files;
use futures_util::stream;

use super::development::{DevelopmentIssuer, ISSUER, JWKS_FILE, TokenRequest, node_uid, pod_uid};
use super::*;
use crate::kubernetes::{Event, KubernetesSettings};

#[derive(Debug)]
struct TestClock(Mutex<OffsetDateTime>);

impl Clock for TestClock {
    fn now(&self) -> OffsetDateTime {
        *self.0.lock().unwrap()
    }
}

struct Fixture {
    directory: tempfile::TempDir,
    clock: Arc<TestClock>,
    east: DevelopmentIssuer,
    west: DevelopmentIssuer,
    clusters: Arc<Clusters>,
}

fn settings(name: &str, jwks: PathBuf, accounts: &str) -> ClusterSettings {
    ClusterSettings {
        name: name.into(),
        issuer: ISSUER.into(),
        audiences: vec!["chancery".into()],
        agent_audience: "chancery-agent".into(),
        agent_accounts: vec!["kube-system/chancery-agent".parse().unwrap()],
        service_accounts: vec![accounts.parse().unwrap()],
        kubernetes: None,
        operators: false,
        publish: None,
        jwks: JwksSource::File(jwks),
        shared_identities: false,
    }
}

/// Two clusters of the same issuer with different keys: `east` speaks for `shop`, `west` for `bank`.
fn fixture() -> Fixture {
    // Making RSA keys is slow, so every test has the same.
    static KEYS: LazyLock<Mutex<BTreeMap<String, Vec<u8>>>> = LazyLock::new(Mutex::default);
    let directory = tempfile::tempdir().unwrap();
    let issuer = |name: &str| {
        let mut keys = KEYS.lock().unwrap();
        let own = directory.path().join(name);
        files::create_private_dir(&own).unwrap();
        if let Some(key) = keys.get(name) {
            files::write_private(&own.join("issuer.pem"), key).unwrap();
        }
        let issuer = DevelopmentIssuer::open_or_create(&own).unwrap();
        keys.entry(name.to_owned()).or_insert_with(|| std::fs::read(own.join("issuer.pem")).unwrap());
        issuer
    };
    let (east, west) = (issuer("east"), issuer("west"));
    let jwks = |name: &str| directory.path().join(name).join(JWKS_FILE);
    let all = vec![settings("east", jwks("east"), "shop/*"), settings("west", jwks("west"), "bank/*")];
    let clock = Arc::new(TestClock(Mutex::new(OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap())));
    let clusters = Clusters::new("example.org".parse().unwrap(), all, Arc::clone(&clock) as Arc<dyn Clock>).unwrap();
    Fixture { directory, clock, east, west, clusters }
}

fn request(namespace: &str, service_account: &str, audience: &str) -> TokenRequest {
    TokenRequest {
        namespace: namespace.into(),
        service_account: service_account.into(),
        pod: format!("{service_account}-1"),
        node: "node-a".into(),
        audience: audience.into(),
        lifetime: Duration::from_secs(600),
        pod_uid: None,
        node_uid: None,
    }
}

impl Fixture {
    fn token(&self, request: &TokenRequest) -> zeroize::Zeroizing<String> {
        self.east.sign(request, self.clock.now()).unwrap()
    }

    fn agent(&self, cluster: &str, node: &str) -> Caller {
        Caller::new(&self.clusters.trust_domain, cluster, Holder::Agent { node: node_uid(node) }).unwrap()
    }

    /// What was issued vouches for nobody.
    async fn attest(&self, caller: &Caller, token: &str) -> Result<AttestedWorkload, AttestationError> {
        self.clusters.attest_workload(caller, token, async |_| false).await
    }

    async fn refusal(&self, caller: &Caller, token: &str) -> AttestationError {
        self.attest(caller, token).await.unwrap_err()
    }
}

#[tokio::test]
async fn a_workload_on_the_agents_own_node_is_believed() {
    let f = fixture();
    let caller = f.agent("east", "node-a");
    let workload = f.attest(&caller, &f.token(&request("shop", "cart", "chancery"))).await.unwrap();
    let token = workload.token();
    assert_eq!((token.cluster.as_str(), token.namespace.as_str(), token.service_account.name.as_str()), ("east", "shop", "cart"));
    assert_eq!((token.pod.uid, token.node.uid), (pod_uid("shop", "cart-1"), node_uid("node-a")));
    assert_eq!(workload.caller(), &caller);
}

#[tokio::test]
async fn a_token_for_another_node_is_refused() {
    let f = fixture();
    let error = f.refusal(&f.agent("east", "node-b"), &f.token(&request("shop", "cart", "chancery"))).await;
    assert_eq!(error.reason(), "token_other_node");
    assert!(error.to_string().contains("cart-1") && error.to_string().contains("node-a"), "{error}");
    assert_eq!(error.token().unwrap().namespace, "shop");
}

#[tokio::test]
async fn a_token_is_verified_with_the_keys_of_the_callers_cluster_although_issuers_are_the_same() {
    let f = fixture();
    let of_west = f.west.sign(&request("shop", "cart", "chancery"), f.clock.now()).unwrap();
    let error = f.refusal(&f.agent("east", "node-a"), &of_west).await;
    assert!(matches!(error.reason(), "token_unknown_key" | "token_signature"), "{error}");
    assert!(error.token().is_none(), "an unverified token tells nothing");
}

#[tokio::test]
async fn a_cluster_that_asks_for_anothers_namespace_is_refused() {
    let f = fixture();
    let error = f.refusal(&f.agent("east", "node-a"), &f.token(&request("bank", "teller", "chancery"))).await;
    assert_eq!(error.reason(), "account_not_allowed");
}

#[tokio::test]
async fn a_sidecar_speaks_for_its_own_pod_alone() {
    let f = fixture();
    let own = f.token(&request("shop", "cart", "chancery"));
    let joined = f.clusters.attest_agent("east", Role::Sidecar, &own).await.unwrap();
    let expected = format!("spiffe://example.org/chancery/sidecar/east/{}", pod_uid("shop", "cart-1"));
    assert_eq!(joined.id().as_str(), expected);
    f.attest(joined.caller(), &own).await.unwrap();
    let error = f.refusal(joined.caller(), &f.token(&request("shop", "checkout", "chancery"))).await;
    assert_eq!(error.reason(), "token_other_pod");
}

#[tokio::test]
async fn an_agent_joins_by_its_own_audience_and_account_alone() {
    let f = fixture();
    let own = request("kube-system", "chancery-agent", "chancery-agent");
    let joined = f.clusters.attest_agent("east", Role::Agent, &f.token(&own)).await.unwrap();
    assert_eq!(joined.id().as_str(), format!("spiffe://example.org/chancery/agent/east/{}", node_uid("node-a")));

    for (case, role, token, reason) in [
        ("a workload's audience", Role::Agent, request("kube-system", "chancery-agent", "chancery"), "token_audience"),
        ("another account", Role::Agent, request("shop", "cart", "chancery-agent"), "account_not_agent"),
        ("an agent's token for a sidecar", Role::Sidecar, own.clone(), "token_audience"),
        ("a sidecar of another's namespace", Role::Sidecar, request("bank", "teller", "chancery"), "account_not_allowed"),
        ("no role", Role::Unspecified, own.clone(), "role_unspecified"),
    ] {
        let error = f.clusters.attest_agent("east", role, &f.token(&token)).await.unwrap_err();
        assert_eq!(error.reason(), reason, "{case}: {error}");
    }
    let error = f.clusters.attest_agent("north", Role::Agent, &f.token(&own)).await.unwrap_err();
    assert_eq!(error.reason(), "cluster_unknown");
}

#[tokio::test]
async fn a_join_token_without_a_nodes_uid_is_refused() {
    let f = fixture();
    let claims = |node: serde_json::Value| {
        let now = f.clock.now().unix_timestamp();
        serde_json::json!({
            "iss": ISSUER, "sub": "system:serviceaccount:kube-system:chancery-agent", "aud": ["chancery-agent"],
            "iat": now, "nbf": now, "exp": now + 600, "jti": uuid::Uuid::new_v4(),
            "kubernetes.io": {
                "namespace": "kube-system",
                "serviceaccount": { "name": "chancery-agent", "uid": uuid::Uuid::new_v4() },
                "pod": { "name": "agent-1", "uid": uuid::Uuid::new_v4() },
                "node": node,
            },
        })
    };
    let with = f.east.sign_claims(&claims(serde_json::json!({ "name": "node-a", "uid": node_uid("node-a") }))).unwrap();
    f.clusters.attest_agent("east", Role::Agent, &with).await.unwrap();
    for node in [serde_json::json!({ "name": "node-a" }), serde_json::Value::Null] {
        let without = f.east.sign_claims(&claims(node)).unwrap();
        let error = f.clusters.attest_agent("east", Role::Agent, &without).await.unwrap_err();
        assert_eq!(error.reason(), "token_missing_claim", "{error}");
    }
}

#[tokio::test]
async fn a_replaced_key_file_is_read_when_a_token_names_an_unknown_key_and_the_last_good_one_survives_a_bad_one() {
    let f = fixture();
    let caller = f.agent("east", "node-a");
    let file = f.directory.path().join("east").join(JWKS_FILE);
    std::fs::write(&file, "{ broken").unwrap();
    assert!(f.clusters.reload_keys("east").await.is_err());
    let status = f.clusters.status();
    assert!(status[0].keys == 1 && status[0].error.as_ref().unwrap().contains("east"), "{status:?}");
    f.attest(&caller, &f.token(&request("shop", "cart", "chancery"))).await.unwrap();

    // The cluster's keys are exchanged: the first token that names the new one makes the CA look.
    let mut changes = f.clusters.changes();
    changes.mark_unchanged();
    std::fs::copy(f.directory.path().join("west").join(JWKS_FILE), &file).unwrap();
    let of_new_key = f.west.sign(&request("shop", "cart", "chancery"), f.clock.now()).unwrap();
    f.attest(&caller, &of_new_key).await.unwrap();
    assert!(changes.has_changed().unwrap(), "agents are told of the new keys");
    assert_eq!(f.clusters.status()[0].error, None);
    // Looking again is rate-limited: the next unknown key is refused at once.
    let error = f.refusal(&caller, &f.token(&request("shop", "cart", "chancery"))).await;
    assert_eq!((error.reason(), error.is_retryable()), ("token_unknown_key", true));
}

#[tokio::test]
async fn other_settings_are_put_into_force_whole_or_not_at_all() {
    let f = fixture();
    let file = f.directory.path().join("east").join(JWKS_FILE);
    let bad = vec![settings("north", file.clone(), "*"), settings("south", "/nonexistent/jwks.json".into(), "*")];
    let error = f.clusters.replace(bad).unwrap_err();
    assert!(error.cluster == "south" && error.problem.contains("/nonexistent/jwks.json"), "{error}");
    assert!(f.clusters.contains("east") && !f.clusters.contains("north"));
    f.clusters.replace(vec![settings("north", file, "*")]).unwrap();
    assert!(f.clusters.contains("north") && !f.clusters.contains("east"));
    assert_eq!(f.clusters.cluster_keys("north").unwrap().audiences, ["chancery"]);
}

#[tokio::test]
async fn a_url_that_does_not_answer_leaves_the_cluster_without_keys_and_says_so() {
    let f = fixture();
    let mut far = settings("far", PathBuf::new(), "*");
    // Nothing listens on port 1.
    far.jwks = JwksSource::Url { url: "https://127.0.0.1:1/jwks".parse().unwrap(), ca_file: None };
    f.clusters.replace(vec![far]).unwrap();
    let caller = f.agent("far", "node-a");
    let error = f.refusal(&caller, &f.token(&request("shop", "cart", "chancery"))).await;
    assert_eq!((error.reason(), error.is_retryable()), ("cluster_keys_missing", true));
    assert!(f.clusters.status()[0].error.as_ref().unwrap().contains("https://127.0.0.1:1/jwks"));
    assert!(f.clusters.cluster_keys("far").is_none());
}

#[tokio::test]
async fn a_cluster_keeps_what_it_knows_of_its_pods_unless_its_api_server_is_another_one() {
    let f = fixture();
    let [before, now] = [1, 2].map(uuid::Uuid::from_u128);
    let clusters = testing::watched(&[before], &[now], Arc::clone(&f.clock) as Arc<dyn Clock>).await;
    let mut settings = clusters.settings();
    assert!(clusters.is_gone("east", before, f.clock.now()) && !clusters.is_gone("east", now, f.clock.now()));
    settings[0].service_accounts = vec!["shop/*".parse().unwrap()];
    clusters.replace(settings.clone()).unwrap();
    assert!(clusters.is_gone("east", before, f.clock.now()), "the watch goes on");
    settings[0].kubernetes = Some(KubernetesSettings::Kubeconfig { path: "elsewhere".into(), context: None });
    clusters.replace(settings).unwrap();
    assert!(!clusters.is_gone("east", before, f.clock.now()), "of another API server's pods nothing is known");
}

#[tokio::test]
async fn what_was_issued_vouches_for_a_pod_only_while_its_api_server_was_never_reached() {
    let f = fixture();
    let mut settings = f.clusters.settings().remove(0);
    settings.kubernetes = Some(KubernetesSettings::Kubeconfig { path: "/nonexistent/kubeconfig".into(), context: None });
    f.clusters.replace(vec![settings]).unwrap();
    let live = f.clusters.get("east").unwrap().live.clone().unwrap();
    let (caller, token) = (f.agent("east", "node-a"), f.token(&request("shop", "cart", "chancery")));
    let attest = async |has_certificate: bool| {
        let attested = f.clusters.attest_workload(&caller, &token, async |_| has_certificate).await;
        attested.map(drop).map_err(|error| (error.reason(), error.is_retryable()))
    };
    assert_eq!(attest(true).await, Err(("cluster_syncing", true)), "it may be reached in a moment");
    live.lose();
    assert_eq!(attest(true).await, Ok(()));
    assert_eq!(attest(false).await, Err(("api_server_away", true)));

    live.hear_pods(stream::iter([Event::Init, Event::InitDone].map(Ok))).await;
    live.lose();
    assert_eq!(attest(true).await, Err(("api_server_away", true)), "a complete list did not have it");
}
