//! What is decided by what is remembered, for every reason; and what is remembered of reviews.

use std::sync::LazyLock;

use chancery_identity::token::TokenKeys;
use futures_util::stream;
use serde_json::json;

use super::records::{Table, account_name};
use super::*;
use crate::attestation::development::{DevelopmentIssuer, ISSUER, TokenRequest, node_uid, pod_uid};
use crate::kubernetes::{ConnectError, Event, ServiceAccountObject, TokenReviewStatus, WorkloadPod};

const NOW: OffsetDateTime = time::macros::datetime!(2027-01-15 08:00 UTC);
const ACCOUNT_UID: Uuid = Uuid::from_u128(7);

#[derive(Debug)]
struct TestClock(std::sync::Mutex<OffsetDateTime>);

impl Clock for TestClock {
    fn now(&self) -> OffsetDateTime {
        *self.0.lock().unwrap()
    }
}

impl TestClock {
    fn new() -> Arc<Self> {
        Arc::new(Self(std::sync::Mutex::new(NOW)))
    }

    fn advance(&self, by: time::Duration) {
        *self.0.lock().unwrap() += by;
    }
}

/// The verified token of pod `cart-1` of account `shop/cart` on node `node-a`.
fn token() -> VerifiedToken {
    static TOKEN: LazyLock<VerifiedToken> = LazyLock::new(|| {
        let directory = tempfile::tempdir().unwrap();
        let issuer = DevelopmentIssuer::open_or_create(&directory.path().join("issuer")).unwrap();
        let request = TokenRequest {
            namespace: "shop".into(),
            service_account: "cart".into(),
            pod: "cart-1".into(),
            node: "node-a".into(),
            audience: "chancery".into(),
            lifetime: Duration::from_secs(600),
            pod_uid: None,
            node_uid: Some(node_uid("node-a")),
        };
        let text = issuer.sign(&request, NOW).unwrap();
        let keys = TokenKeys::from_jwks("east", ISSUER, &issuer.jwks().unwrap()).unwrap();
        keys.verify(&text, &audiences(), NOW).unwrap()
    });
    let mut token = TOKEN.clone();
    token.service_account.uid = ACCOUNT_UID;
    token
}

fn audiences() -> Vec<String> {
    vec!["chancery".into()]
}

/// The pod as it should be, but for `changes` to its metadata, spec and status.
fn pod_with(metadata: serde_json::Value, spec: serde_json::Value, status: serde_json::Value) -> WorkloadPod {
    let mut pod = json!({
        "metadata": { "namespace": "shop", "name": "cart-1", "uid": pod_uid("shop", "cart-1"), "resourceVersion": "1" },
        "spec": { "serviceAccountName": "cart", "nodeName": "node-a" },
        "status": { "phase": "Running" },
    });
    for (part, changes) in [("metadata", metadata), ("spec", spec), ("status", status)] {
        for (key, value) in changes.as_object().unwrap() {
            pod[part][key] = value.clone();
        }
    }
    serde_json::from_value(pod).unwrap()
}

fn pod() -> WorkloadPod {
    pod_with(json!({}), json!({}), json!({}))
}

fn account(uid: Uuid) -> ServiceAccountObject {
    serde_json::from_value(json!({ "metadata": { "namespace": "shop", "name": "cart", "uid": uid, "resourceVersion": "1" } })).unwrap()
}

fn judged(pod: &WorkloadPod, now: OffsetDateTime) -> Result<(), &'static str> {
    judge_pod(&Pod::of(pod), &token(), now).map_err(|mismatch| mismatch.reason())
}

#[test]
fn a_pod_that_is_what_its_token_says_is_believed() {
    assert_eq!(judged(&pod(), NOW), Ok(()));
    assert_eq!(judged(&pod_with(json!({}), json!({}), json!({ "phase": "Pending" })), NOW), Ok(()), "before its containers run");
}

#[test]
fn a_pod_that_has_ended_is_refused() {
    for phase in ["Succeeded", "Failed"] {
        assert_eq!(judged(&pod_with(json!({}), json!({}), json!({ "phase": phase })), NOW), Err("pod_finished"), "{phase}");
    }
}

#[test]
fn a_pod_on_another_node_or_under_another_account_is_refused() {
    assert_eq!(judged(&pod_with(json!({}), json!({ "nodeName": "node-b" }), json!({})), NOW), Err("pod_other_node"));
    assert_eq!(judged(&pod_with(json!({}), json!({ "serviceAccountName": "checkout" }), json!({})), NOW), Err("pod_other_account"));
    assert_eq!(judged(&pod_with(json!({ "namespace": "bank" }), json!({}), json!({})), NOW), Err("pod_other_account"));
}

#[test]
fn a_pod_that_is_being_deleted_counts_until_a_minute_after_its_deletion() {
    let deleted = pod_with(json!({ "deletionTimestamp": "2027-01-15T08:00:00Z" }), json!({}), json!({}));
    assert_eq!(judged(&deleted, NOW - time::Duration::seconds(30)), Ok(()));
    assert_eq!(judged(&deleted, NOW + time::Duration::seconds(60)), Ok(()));
    assert_eq!(judged(&deleted, NOW + time::Duration::seconds(61)), Err("pod_gone"));
}

#[test]
fn an_account_that_is_gone_or_was_created_anew_is_told_apart() {
    let judged = |object: Option<ServiceAccountObject>| {
        let account = object.as_ref().and_then(Account::of);
        judge_account(account.as_ref(), &token(), NOW).map_err(|mismatch| mismatch.reason())
    };
    assert_eq!(judged(Some(account(ACCOUNT_UID))), Ok(()));
    assert_eq!(judged(Some(account(Uuid::from_u128(8)))), Err("account_recreated"));
    assert_eq!(judged(None), Err("account_gone"));
}

#[test]
fn a_review_counts_for_our_audience_and_the_tokens_own_pod_alone() {
    let review = |authenticated: bool, audience: &str, uid: &str| -> TokenReviewStatus {
        serde_json::from_value(json!({
            "authenticated": authenticated, "audiences": [audience], "error": if authenticated { "" } else { "invalid bearer token" },
            "user": { "username": "u", "extra": { "authentication.kubernetes.io/pod-uid": [uid] } },
        }))
        .unwrap()
    };
    let judged = |review: &TokenReviewStatus| judge_review(review, &token(), &audiences());
    let uid = pod_uid("shop", "cart-1").to_string();
    assert_eq!(judged(&review(true, "chancery", &uid)), Ok(()));
    assert_eq!(judged(&review(false, "chancery", &uid)), Err("invalid bearer token".into()));
    assert!(judged(&review(true, "https://kubernetes.default.svc", &uid)).unwrap_err().contains("audiences"));
    assert!(judged(&review(true, "chancery", &Uuid::from_u128(9).to_string())).unwrap_err().contains("UID"));
    let old = TokenReviewStatus { audiences: None, ..review(true, "chancery", &uid) };
    assert!(judged(&old).is_err(), "an API server that knows no audiences has not looked at them");
}

#[test]
fn what_is_remembered_answers_contradicts_or_cannot_tell() {
    let mut pods = Pods::default();
    assert_eq!(pods.look(&token(), NOW), Known::Unknown);
    pods.apply(&pod_with(json!({}), json!({ "nodeName": "" }), json!({})));
    assert_eq!(pods.look(&token(), NOW), Known::Unknown, "what is remembered is older than the token");
    pods.apply(&pod());
    assert_eq!(pods.look(&token(), NOW), Known::Fits);
    pods.remove(&pod());
    assert_eq!(pods.look(&token(), NOW), Known::Contradicts(Mismatch::PodGone));

    let mut accounts = Accounts::default();
    assert_eq!(accounts.look(&token(), NOW), Known::Unknown);
    accounts.apply(&account(Uuid::from_u128(8)));
    assert_eq!(accounts.look(&token(), NOW), Known::Unknown, "it may be the one before");
    accounts.apply(&account(ACCOUNT_UID));
    assert_eq!(accounts.look(&token(), NOW), Known::Fits);
    accounts.remove(&account(ACCOUNT_UID));
    assert_eq!(accounts.look(&token(), NOW), Known::Unknown);
}

#[test]
fn a_pod_that_a_new_list_lacks_is_gone() {
    let mut before = Pods::default();
    before.apply(&pod());
    let mut after = Pods::default();
    after.succeed(before);
    assert_eq!(after.look(&token(), NOW), Known::Contradicts(Mismatch::PodGone));
}

#[test]
fn a_name_that_many_have_is_kept_once() {
    let mut pods = Pods::default();
    for number in 0..3 {
        pods.apply(&pod_with(json!({ "uid": Uuid::from_u128(number) }), json!({}), json!({})));
    }
    let [one, other] = [0, 1].map(|number| pods.get(Uuid::from_u128(number)).unwrap());
    assert!(Arc::ptr_eq(&one.account, &other.account) && *one.account == *account_name("shop", "cart"));
    assert!(size_of::<Pod>() <= 56, "a hundred thousand of them are 10 MB: {}", size_of::<Pod>());
}

#[test]
fn an_accepted_token_is_remembered_for_ten_seconds_and_for_its_audience_alone() {
    let (reviews, key) = (Reviews::new(), reviews::key("token", &audiences()));
    assert!(!reviews.remembers(&key, NOW));
    reviews.remember(key, NOW);
    assert!(reviews.remembers(&key, NOW) && reviews.remembers(&key, NOW + time::Duration::milliseconds(9_999)));
    assert!(!reviews.remembers(&key, NOW + time::Duration::seconds(10)));
    assert!(!reviews.remembers(&key, NOW - time::Duration::SECOND), "the clock went back");
    for (token, audiences) in [("token", vec!["other".to_owned()]), ("other", audiences()), ("token", vec![])] {
        assert!(!reviews.remembers(&reviews::key(token, &audiences), NOW));
    }
}

#[tokio::test(start_paused = true)]
async fn an_api_server_that_has_just_failed_is_left_alone_for_a_second() {
    let reviews = Reviews::new();
    assert_eq!(reviews.failed("refused".into(), NOW).since, NOW);
    assert_eq!(reviews.obstacle().unwrap().since, NOW);
    tokio::time::advance(Duration::from_millis(1001)).await;
    assert_eq!(reviews.obstacle(), None);
    let later = reviews.failed("refused".into(), NOW + time::Duration::MINUTE);
    assert_eq!(later.since, NOW, "it has been away all the while");
    reviews.answered(Outcome::Accepted);
    assert_eq!((reviews.obstacle(), reviews.counts()), (None, ReviewCounts { accepted: 1, refused: 0, failed: 2 }));
}

#[tokio::test(start_paused = true)]
async fn only_so_many_are_asked_about_at_once_and_nobody_waits_long() {
    let reviews = Reviews::new();
    let turns = futures_util::future::join_all((0..AT_ONCE).map(|_| reviews.turn())).await;
    assert!(turns.iter().all(Option::is_some) && reviews.turn().await.is_none());
    drop(turns);
    assert!(reviews.turn().await.is_some());
}

fn live(clock: &Arc<TestClock>) -> Arc<Live> {
    // Nobody is there.
    let settings = KubernetesSettings::Kubeconfig { path: "/nonexistent/kubeconfig".into(), context: None };
    Live::new("east", settings, Arc::clone(clock) as Arc<dyn Clock>)
}

/// Lets the informers hear of the pod and its account.
async fn hear(live: &Live) {
    live.pods.follow(stream::iter([Event::Init, Event::InitApply(pod()), Event::InitDone].map(Ok))).await;
    live.accounts.follow(stream::iter([Event::Init, Event::InitApply(account(ACCOUNT_UID)), Event::InitDone].map(Ok))).await;
}

fn reason(answer: Result<(), Doubt>) -> Result<(), &'static str> {
    answer.map_err(|doubt| match doubt {
        Doubt::Mismatch(mismatch) => mismatch.reason(),
        Doubt::Obstacle(obstacle) => obstacle.reason(),
    })
}

#[tokio::test]
async fn nobody_new_is_believed_or_refused_before_the_pods_are_known() {
    let clock = TestClock::new();
    let live = live(&clock);
    assert_eq!(reason(live.confirm("text", &token(), &audiences()).await), Err("cluster_syncing"));
    live.pods.failed(&ApiError::Forbidden("denied".into()));
    let Err(Doubt::Obstacle(obstacle)) = live.confirm("text", &token(), &audiences()).await else { panic!("nobody is there") };
    assert!(obstacle.to_string().contains("denied"), "{obstacle}");
    hear(&live).await;
    live.pods.heard();
    assert_eq!(reason(live.confirm("text", &token(), &audiences()).await), Ok(()));
}

#[test]
fn an_api_server_that_knows_the_ca_no_more_or_cannot_be_found_tells_as_little_as_one_that_is_away() {
    let settings = KubernetesSettings::InCluster;
    let missing = ConnectError { settings, problem: "no such file".into() };
    let tells_nothing = [ApiError::Away("refused".into()), ApiError::Unauthorized("401".into()), ApiError::Connect(missing)];
    for error in tells_nothing {
        let live = live(&TestClock::new());
        live.pods.failed(&error);
        assert!(matches!(live.pods.standing(), Standing::Unheard(_)), "{error:?}");
    }
    let live = live(&TestClock::new());
    live.pods.failed(&ApiError::Forbidden("denied".into()));
    assert_eq!(live.pods.standing(), Standing::Syncing { problem: Some(ApiError::Forbidden("denied".into()).to_string()) });
}

#[test]
fn of_two_watches_the_one_counts_that_less_can_be_relied_upon() {
    let away = |minutes| Away { since: NOW + time::Duration::minutes(minutes), problem: "refused".into() };
    let in_order = [
        Standing::Synced,
        Standing::Stale(away(2)),
        Standing::Stale(away(1)),
        Standing::Unheard(away(2)),
        Standing::Unheard(away(1)),
        Standing::Syncing { problem: None },
        Standing::Syncing { problem: Some("denied".into()) },
    ];
    for (number, better) in in_order.iter().enumerate() {
        for worse in &in_order[number..] {
            assert_eq!([better.clone().or_worse(worse.clone()), worse.clone().or_worse(better.clone())], [worse.clone(), worse.clone()]);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn while_the_api_server_is_away_known_pods_are_believed_and_new_ones_wait() {
    let clock = TestClock::new();
    let live = live(&clock);
    hear(&live).await;
    clock.advance(time::Duration::MINUTE);
    live.pods.failed(&ApiError::Away("connection refused".into()));
    let Standing::Stale(away) = live.status().standing else { panic!("it is away") };
    assert_eq!(away.since, NOW + time::Duration::MINUTE);
    assert_eq!(reason(live.confirm("text", &token(), &audiences()).await), Ok(()));
    let mut new = token();
    new.pod.uid = Uuid::from_u128(1);
    assert_eq!(reason(live.confirm("text", &new, &audiences()).await), Err("api_server_away"));
    assert_eq!(live.status().reviews.failed, 1);
    live.pods.heard();
    assert_eq!(live.status().standing, Standing::Synced);
}

#[tokio::test(start_paused = true)]
async fn a_pod_whose_token_comes_a_moment_before_the_watch_tells_of_it_is_not_asked_about() {
    let clock = TestClock::new();
    let live = live(&clock);
    live.pods.follow(stream::iter([Event::Init, Event::InitDone].map(Ok))).await;
    live.accounts.follow(stream::iter([Event::Init, Event::InitApply(account(ACCOUNT_UID)), Event::InitDone].map(Ok))).await;
    let (token, audiences) = (token(), audiences());
    let told = async {
        tokio::time::sleep(LAG / 2).await;
        live.pods.follow(stream::iter([Ok(Event::Apply(pod()))])).await;
    };
    let (confirmed, ()) = tokio::join!(live.confirm("text", &token, &audiences), told);
    assert_eq!((reason(confirmed), live.status().reviews), (Ok(()), ReviewCounts::default()));
}

#[tokio::test]
async fn a_pod_is_known_to_be_gone_when_it_was_seen_to_go_or_is_missing_for_long() {
    let clock = TestClock::new();
    let live = live(&clock);
    let [there, other] = [pod_uid("shop", "cart-1"), Uuid::from_u128(1)];
    assert!(!live.is_gone(other, NOW - time::Duration::HOUR), "nothing is known yet");
    hear(&live).await;
    assert!(!live.is_gone(there, NOW - time::Duration::HOUR));
    assert!(live.is_gone(other, NOW - time::Duration::HOUR));
    assert!(!live.is_gone(other, NOW - time::Duration::MINUTE), "it may be newer than what is known");
    live.pods.failed(&ApiError::Away("connection refused".into()));
    assert!(!live.is_gone(other, NOW - time::Duration::HOUR), "it may have been created since");
    live.pods.follow(stream::iter([Ok(Event::Delete(pod()))])).await;
    assert!(live.is_gone(there, NOW));
    assert_eq!(reason(live.confirm("text", &token(), &audiences()).await), Err("pod_gone"));
}

#[tokio::test]
async fn a_list_that_is_not_complete_replaces_nothing() {
    let clock = TestClock::new();
    let live = live(&clock);
    hear(&live).await;
    live.pods.follow(stream::iter([Ok(Event::Init)])).await;
    assert_eq!(reason(live.confirm("text", &token(), &audiences()).await), Ok(()));
    assert!(!live.is_gone(Uuid::from_u128(1), NOW - time::Duration::HOUR), "the list is not complete");
}
