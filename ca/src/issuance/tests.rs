//! The whole cycle on real keys, tokens and CSRs: what is issued, what is refused, and that nothing unrecorded gets out.

mod recover;
mod refusals;
mod renewals;

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use chancery_identity::csr::{self, KeyType};
use chancery_identity::{PrivateKey, X509Svid};
use chancery_proto::chancery::v1::Role;

use super::policy::Lifetimes;
use super::*;
use crate::attestation::development::{DevelopmentIssuer, ISSUER, JWKS_FILE, TokenRequest, node_uid, pod_uid};
use crate::attestation::{ClusterSettings, JwksSource};
use crate::authority::testing::{Commits, TestCa};
use crate::keys::{KeyError, KeyManager, PublicKey};
use crate::ledger::acts::{Change, RefusedAct};
use crate::ledger::{IdentityFilter, RefusalFilter};

#[derive(Debug, Default)]
struct Counts {
    issued: Mutex<Vec<IssueReason>>,
    refused: Mutex<Vec<&'static str>>,
}

impl IssuanceObserver for Counts {
    fn issued(&self, reason: IssueReason) {
        self.issued.lock().unwrap().push(reason);
    }

    fn refused(&self, reason: &'static str) {
        self.refused.lock().unwrap().push(reason);
    }
}

/// A CA with the cluster `east` that speaks for `shop`.
struct Fixture {
    ca: TestCa,
    issuer: DevelopmentIssuer,
    issuance: Arc<Issuance>,
    ledger: Ledger,
    refusals: Arc<Refusals>,
    counts: Arc<Counts>,
    caller: Caller,
    authority: Arc<Authority>,
    clusters: Arc<Clusters>,
}

async fn fixture() -> Fixture {
    fixture_with(TestCa::new(), |keys, _| keys).await
}

async fn fixture_with(ca: TestCa, decorate: impl FnOnce(Arc<dyn KeyManager>, Ledger) -> Arc<dyn KeyManager>) -> Fixture {
    let development = ca.parent.path().join("development");
    let issuer = DevelopmentIssuer::open_or_create(&development).unwrap();
    let east = ClusterSettings {
        name: "east".into(),
        issuer: ISSUER.into(),
        audiences: vec!["chancery".into()],
        agent_audience: "chancery-agent".into(),
        agent_accounts: vec!["kube-system/chancery-agent".parse().unwrap()],
        service_accounts: vec!["shop/*".parse().unwrap()],
        kubernetes: None,
        operators: false,
        publish: None,
        jwks: JwksSource::File(development.join(JWKS_FILE)),
        shared_identities: false,
    };
    let ledger = ca.ledger().await;
    let run = ca.try_start(|keys| decorate(keys, ledger.clone())).await.unwrap();
    let ledger = run.ledger.clone();
    let domain = run.authority.trust_domain().clone();
    let policy = Policy::new(domain.clone(), PolicySettings::default(), std::slice::from_ref(&east)).unwrap();
    let clusters = Clusters::new(domain.clone(), vec![east], ca.clock.clone()).unwrap();
    let (refusals, counts) = (Arc::new(Refusals::new()), Arc::new(Counts::default()));
    let issuance =
        Issuance::new(run.authority.clone(), clusters.clone(), policy, ledger.clone(), refusals.clone(), counts.clone(), ca.clock.clone());
    let caller = agent_on("node-a");
    Fixture { ca, issuer, issuance: Arc::new(issuance), ledger, refusals, counts, caller, authority: run.authority, clusters }
}

fn agent_on(node: &str) -> Caller {
    let id = format!("spiffe://example.org/chancery/agent/east/{}", node_uid(node));
    Caller::from_peer(&id.parse().unwrap(), &"example.org".parse().unwrap()).unwrap()
}

fn token_request(pod: &str) -> TokenRequest {
    TokenRequest {
        namespace: "shop".into(),
        service_account: "cart".into(),
        pod: pod.into(),
        node: "node-a".into(),
        audience: "chancery".into(),
        lifetime: Duration::from_secs(600),
        pod_uid: None,
        node_uid: None,
    }
}

impl Fixture {
    fn token(&self, pod: &str) -> Zeroizing<String> {
        self.issuer.sign(&token_request(pod), self.ca.clock.now()).unwrap()
    }

    fn request(&self, pod: &str) -> (Request, PrivateKey) {
        let (csr, key) = csr::generate(KeyType::EcdsaP256, None).unwrap();
        let request = Request { request_id: Uuid::new_v4(), csr: csr.into(), token: self.token(pod), reason: IssueReason::First };
        (request, key)
    }

    fn requests(&self, count: usize) -> Vec<Request> {
        (0..count).map(|number| self.request(&format!("cart-{number}")).0).collect()
    }

    async fn issue(&self, request: Request) -> Result<Issued, Refusal> {
        self.issuance.issue_batch(&self.caller, 1, vec![request]).await.pop().unwrap()
    }
}

#[tokio::test]
async fn the_identity_comes_from_the_token_and_the_ledger_has_every_fact() {
    let f = fixture().await;
    let (request, key) = f.request("cart-1");
    let request_id = request.request_id;
    let issued = f.issuance.issue_batch(&f.caller, 42, vec![request]).await.pop().unwrap().unwrap();
    assert_eq!(issued.spiffe_id.as_str(), "spiffe://example.org/ns/shop/sa/cart");
    let svid = X509Svid::new(issued.chain.clone(), key).unwrap();
    svid.verify(&f.authority.trust().borrow(), f.ca.clock.now()).unwrap();

    let recorded = f.ledger.show(svid.serial()).await.unwrap().unwrap();
    assert_eq!(recorded.index, issued.entry);
    assert_eq!(recorded.asker.as_ref(), Some(f.caller.id()));
    let entry = recorded.issuance;
    assert_eq!(entry.certificate, issued.chain[0].to_vec());
    assert_eq!(entry.issuing_certificate, f.authority.issuer().certificate_id());
    assert_eq!((entry.role, entry.reason), (Role::Agent, IssueReason::First));
    assert_eq!((entry.cluster.as_str(), entry.node.as_str(), entry.node_uid), ("east", "node-a", Some(node_uid("node-a"))));
    assert_eq!((entry.namespace.as_str(), entry.service_account.as_str()), ("shop", "cart"));
    assert_eq!((entry.pod.as_str(), entry.pod_uid), ("cart-1", Some(pod_uid("shop", "cart-1"))));
    assert_eq!((entry.request_id, entry.trust_sequence, entry.sidecar_pod_uid), (request_id, 42, None));
    assert!(Uuid::parse_str(&entry.token_id).is_ok());
    assert_eq!(*f.counts.issued.lock().unwrap(), [IssueReason::First]);
}

#[tokio::test]
async fn a_full_batch_gets_an_answer_each_in_order_and_no_serial_twice() {
    let f = fixture().await;
    let before = f.ca.store.len();
    let mut requests = f.requests(MAX_REQUESTS);
    requests[7].token = Zeroizing::new("garbage".into());
    let outcomes = f.issuance.issue_batch(&f.caller, 1, requests).await;
    assert_eq!(outcomes.len(), MAX_REQUESTS);
    assert_eq!(outcomes[7].as_ref().unwrap_err().reason, "token_malformed");
    let serials: BTreeSet<_> = outcomes.iter().filter_map(|outcome| Some(outcome.as_ref().ok()?.facts.serial)).collect();
    assert_eq!(serials.len(), MAX_REQUESTS - 1);
    assert_eq!(f.ca.store.len() - before, MAX_REQUESTS - 1, "recorded are those that were issued, and no others");
    let entries: Vec<_> = outcomes.iter().filter_map(|outcome| Some(outcome.as_ref().ok()?.entry)).collect();
    assert!(entries.is_sorted(), "in one write, in order");
}

#[tokio::test]
async fn ten_thousand_requests_in_one_call_are_refused_whole_and_unread() {
    let f = fixture().await;
    let before = f.ca.store.len();
    let (csr, _) = csr::generate(KeyType::EcdsaP256, None).unwrap();
    let (csr, token) = (Bytes::from(csr), f.token("cart-1"));
    let one = || Request { request_id: Uuid::new_v4(), csr: csr.clone(), token: token.clone(), reason: IssueReason::First };
    let outcomes = f.issuance.issue_batch(&f.caller, 1, (0..10_000).map(|_| one()).collect()).await;
    assert_eq!(outcomes.len(), 10_000);
    for outcome in outcomes {
        let refusal = outcome.unwrap_err();
        assert!(refusal.reason == "too_many_requests" && refusal.message.contains("10000") && refusal.message.contains("512"));
    }
    assert_eq!(f.ca.store.len(), before);
    assert_eq!(f.counts.refused.lock().unwrap().len(), 1, "one call, one refusal in the list");
}

#[tokio::test]
async fn an_agent_joins_by_its_token_and_renews_by_its_svid() {
    let f = fixture().await;
    let mut own = token_request("agent-1");
    (own.namespace, own.service_account, own.audience) = ("kube-system".into(), "chancery-agent".into(), "chancery-agent".into());
    let token = f.issuer.sign(&own, f.ca.clock.now()).unwrap();
    let attested = f.clusters.attest_agent("east", Role::Agent, &token).await.unwrap();
    let (csr, _) = csr::generate(KeyType::EcdsaP256, None).unwrap();
    let joined = f.issuance.issue_agent(&attested, &csr, Uuid::new_v4()).await.unwrap();
    assert_eq!(&joined.spiffe_id, f.caller.id());
    assert_eq!(joined.facts.not_after, f.ca.clock.now() + Duration::from_secs(24 * 3600));

    let (csr, _) = csr::generate(KeyType::EcdsaP256, None).unwrap();
    let renewed = f.issuance.renew_agent(&f.caller, &csr, Uuid::new_v4()).await.unwrap();
    assert_eq!(renewed.spiffe_id, joined.spiffe_id);
    let filter = IdentityFilter { agent: Some(f.caller.id().clone()), ..IdentityFilter::default() };
    let of_agent = f.ledger.list(&filter, 10, None).await.unwrap().identities;
    let reasons: Vec<_> = of_agent.iter().map(|identity| identity.issuance.reason).collect();
    assert_eq!(reasons, [IssueReason::AgentRenewal, IssueReason::Join]);
    assert_eq!(of_agent[0].issuance.node, "node-a", "taken over from the entry before");

    f.clusters.replace(Vec::new()).unwrap();
    let (csr, _) = csr::generate(KeyType::EcdsaP256, None).unwrap();
    let refusal = f.issuance.renew_agent(&f.caller, &csr, Uuid::new_v4()).await.unwrap_err();
    assert_eq!(refusal.reason, "cluster_unknown");
}

#[tokio::test]
async fn a_sidecar_is_recorded_with_its_own_pod() {
    let f = fixture().await;
    let attested = f.clusters.attest_agent("east", Role::Sidecar, &f.token("cart-1")).await.unwrap();
    let (request, _) = f.request("cart-1");
    let issued = f.issuance.issue_batch(attested.caller(), 1, vec![request]).await.pop().unwrap().unwrap();
    let entry = f.ledger.show(issued.facts.serial).await.unwrap().unwrap();
    assert_eq!(entry.issuance.sidecar_pod_uid, Some(pod_uid("shop", "cart-1")));
    assert_eq!(entry.asker.as_ref(), Some(attested.id()));
}

#[tokio::test]
async fn a_caller_cannot_pass_a_workload_off_as_a_join() {
    let f = fixture().await;
    let (mut request, _) = f.request("cart-1");
    request.reason = IssueReason::Join;
    let issued = f.issue(request).await.unwrap();
    let entry = f.ledger.show(issued.facts.serial).await.unwrap().unwrap();
    assert_eq!(entry.issuance.reason, IssueReason::Unspecified);
}

#[tokio::test]
async fn a_ca_that_dies_between_signing_and_recording_has_released_nothing() {
    let f = fixture().await;
    let before = f.ca.store.len();
    f.ca.store.set_commits(Commits::Hang);
    let (issuance, caller, requests) = (f.issuance.clone(), f.caller.clone(), f.requests(3));
    let call = tokio::spawn(async move { issuance.issue_batch(&caller, 1, requests).await });
    assert!(tokio::time::timeout(Duration::from_millis(300), call).await.is_err(), "no answer while nothing is durable");
    assert_eq!(f.ca.store.len(), before);
    // The next run finds the ledger as it was, and issues.
    f.ca.store.set_commits(Commits::Work);
    let Fixture { ca, .. } = f;
    let again = fixture_with(ca, |keys, _| keys).await;
    let (request, _) = again.request("cart-1");
    again.issue(request).await.unwrap();
}

#[tokio::test]
async fn a_full_disk_stops_issuance_with_a_clear_error_until_there_is_room() {
    let f = fixture().await;
    let before = f.ca.store.len();
    f.ca.store.set_commits(Commits::Full);
    for outcome in f.issuance.issue_batch(&f.caller, 1, f.requests(3)).await {
        let refusal = outcome.unwrap_err();
        assert_eq!((refusal.reason, refusal.retryable), ("ledger_full", true));
        assert!(refusal.message.contains("no space"), "{refusal}");
    }
    assert_eq!(f.ca.store.len(), before);
    f.ca.store.set_commits(Commits::Work);
    assert!(f.issuance.issue_batch(&f.caller, 1, f.requests(3)).await.iter().all(Result::is_ok));
}

/// Records an act when it is asked to sign, as an operator might at that very moment.
#[derive(Debug)]
struct Interfering {
    inner: Arc<dyn KeyManager>,
    ledger: Ledger,
    armed: Arc<AtomicBool>,
    always: bool,
}

#[async_trait]
impl KeyManager for Interfering {
    async fn generate(&self, name: &str, key_type: KeyType) -> Result<PublicKey, KeyError> {
        self.inner.generate(name, key_type).await
    }
    async fn public_key(&self, name: &str) -> Result<PublicKey, KeyError> {
        self.inner.public_key(name).await
    }
    async fn sign(&self, name: &str, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        if self.armed.fetch_and(self.always, Ordering::SeqCst) {
            let refused =
                RefusedAct { action: "agent.ban".into(), target: String::new(), reason: "role".into(), message: String::new(), count: 1 };
            self.ledger.act("local:uid=0", Change::Refused(refused), "a test wants it").await.unwrap();
        }
        self.inner.sign(name, message).await
    }
    async fn destroy(&self, name: &str) -> Result<(), KeyError> {
        self.inner.destroy(name).await
    }
    async fn list(&self) -> Result<Vec<String>, KeyError> {
        self.inner.list().await
    }
}

/// Signs for as many as were asked for, once all of them are there.
#[derive(Debug)]
struct Together {
    inner: Arc<dyn KeyManager>,
    all: tokio::sync::Barrier,
    armed: Arc<AtomicBool>,
}

#[async_trait]
impl KeyManager for Together {
    async fn generate(&self, name: &str, key_type: KeyType) -> Result<PublicKey, KeyError> {
        self.inner.generate(name, key_type).await
    }
    async fn public_key(&self, name: &str) -> Result<PublicKey, KeyError> {
        self.inner.public_key(name).await
    }
    async fn sign(&self, name: &str, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        if self.armed.load(Ordering::SeqCst) {
            self.all.wait().await;
        }
        self.inner.sign(name, message).await
    }
    async fn destroy(&self, name: &str) -> Result<(), KeyError> {
        self.inner.destroy(name).await
    }
    async fn list(&self) -> Result<Vec<String>, KeyError> {
        self.inner.list().await
    }
}

#[tokio::test]
async fn requests_of_a_call_that_wait_for_somebody_wait_together_and_are_answered_in_their_order() {
    let armed = Arc::new(AtomicBool::new(false));
    let flag = armed.clone();
    let f = fixture_with(TestCa::new(), |inner, _| Arc::new(Together { inner, all: tokio::sync::Barrier::new(3), armed: flag })).await;
    armed.store(true, Ordering::SeqCst);
    let mut requests = f.requests(4);
    requests[1].token = Zeroizing::new("garbage".into());
    let ids: Vec<_> = requests.iter().map(|request| request.request_id).collect();
    let outcomes = tokio::time::timeout(Duration::from_secs(10), f.issuance.issue_batch(&f.caller, 1, requests)).await;
    for (id, outcome) in ids.into_iter().zip(outcomes.expect("none holds the others up")) {
        match outcome {
            Ok(issued) => assert_eq!(f.ledger.show_entry(issued.entry).await.unwrap().unwrap().issuance.request_id, id),
            Err(refusal) => assert_eq!(refusal.reason, "token_malformed"),
        }
    }
}

/// A CA whose ledger and whose interfering operator are the same process's.
async fn interfered(always: bool) -> (Fixture, Arc<AtomicBool>) {
    let armed = Arc::new(AtomicBool::new(false));
    let flag = armed.clone();
    let f = fixture_with(TestCa::new(), |inner, ledger| Arc::new(Interfering { inner, ledger, armed: flag, always })).await;
    (f, armed)
}

#[tokio::test]
async fn what_was_signed_before_an_act_is_checked_and_signed_again_after_it() {
    let (f, armed) = interfered(false).await;
    let before = f.ca.store.len();
    armed.store(true, Ordering::SeqCst);
    let (request, _) = f.request("cart-1");
    let issued = f.issue(request).await.unwrap();
    assert_eq!(f.ca.store.len(), before + 2, "the act, and one certificate after it");
    assert_eq!(issued.entry, u64::try_from(before + 1).unwrap());
}

#[tokio::test]
async fn acts_that_never_end_refuse_the_batch_instead_of_keeping_it() {
    let (f, armed) = interfered(true).await;
    armed.store(true, Ordering::SeqCst);
    let (request, _) = f.request("cart-1");
    let refusal = f.issue(request).await.unwrap_err();
    assert_eq!((refusal.reason, refusal.retryable), ("ledger_epoch", true));
    let filter = IdentityFilter { agent: Some(f.caller.id().clone()), ..IdentityFilter::default() };
    assert!(f.ledger.list(&filter, 10, None).await.unwrap().identities.is_empty());
}

#[tokio::test]
async fn another_policy_counts_from_the_next_call_on() {
    let f = fixture().await;
    let settings = PolicySettings {
        id_template: "/{cluster}/{namespace}/{service_account}".into(),
        lifetimes: Lifetimes { min: Duration::from_secs(6), default: Duration::from_secs(20), ..Lifetimes::default() },
        ..PolicySettings::default()
    };
    f.issuance.set_policy(Policy::new("example.org".parse().unwrap(), settings, &f.clusters.settings()).unwrap());
    let (request, _) = f.request("cart-1");
    let issued = f.issue(request).await.unwrap();
    assert_eq!(issued.spiffe_id.as_str(), "spiffe://example.org/east/shop/cart");
    assert_eq!(issued.facts.not_after, f.ca.clock.now() + Duration::from_secs(20));
}
