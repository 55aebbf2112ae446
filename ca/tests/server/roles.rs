//! Who may ask as an operator, and who may act: over real TLS, and on the admin socket.

use std::os::unix::fs::PermissionsExt;
use std::process::Output;

use chancery_identity::X509Svid;
use chancery_process::files::write_private;
use chancery_proto::chancery::v1::act::Change;
use chancery_proto::chancery::v1::log_service_client::LogServiceClient;
use chancery_proto::chancery::v1::operator_service_client::OperatorServiceClient;
use chancery_proto::chancery::v1::revocation_service_client::RevocationServiceClient;
use chancery_proto::chancery::v1::revocation_subject::Of;
use chancery_proto::chancery::v1::root_service_client::RootServiceClient;
use chancery_proto::chancery::v1::{
    Act, ActFilter, ActRecord, AllowRequest, AnswerRootRequest, BanRequest, IssueRequest, ListActsRequest, ListAgentsRequest,
    ListIdentitiesRequest, MoveRootRequest, Overrides, RevocationSubject, RevokeRequest, RootState, StatusRequest, UnbanRequest,
};
use tonic::Code;
use tonic::transport::Channel;

use crate::support::{Ca, NODE, issue, workload};

pub(crate) const ROLES: &str =
    "[roles]\nadmin = [\"spiffe://dev.chancery/ns/ops/sa/alice\"]\nauditor = [\"spiffe://dev.chancery/ns/ops/sa/bob\"]\n";

/// The SVID of a service account in the namespace `ops`.
pub(crate) async fn svid_of(ca: &Ca, agent: &X509Svid, account: &str) -> X509Svid {
    let token = ca.token(|request| {
        request.namespace = "ops".into();
        request.service_account = account.into();
        request.pod = account.into();
    });
    issue(&mut ca.connect(Some(agent)).await, token).await.unwrap()
}

async fn remote(ca: &Ca, svid: &X509Svid) -> OperatorServiceClient<Channel> {
    OperatorServiceClient::new(ca.channel(Some(svid)).await.unwrap())
}

async fn remote_log(ca: &Ca, svid: &X509Svid) -> LogServiceClient<Channel> {
    LogServiceClient::new(ca.channel(Some(svid)).await.unwrap())
}

fn ban(agent: &X509Svid, reason: &str) -> BanRequest {
    BanRequest { agent: agent.id().to_string(), reason: reason.into() }
}

/// Whether the CA answers somebody with this certificate.
pub(crate) async fn is_let_in(ca: &Ca, svid: &X509Svid) -> bool {
    match ca.try_connect(Some(svid)).await {
        Ok(mut client) => client.issue(IssueRequest { requests: vec![workload(ca.token(|_| ())).0] }).await.is_ok(),
        Err(_) => false,
    }
}

async fn acts(ca: &Ca, filter: ActFilter) -> Vec<ActRecord> {
    let request = ListActsRequest { filter: Some(filter), ..ListActsRequest::default() };
    ca.log().await.list_acts(request).await.unwrap().into_inner().acts
}

/// Count and reason of the refused acts, newest first.
pub(crate) async fn refused(ca: &Ca) -> Vec<(u64, String)> {
    let found = acts(ca, ActFilter { action: "act.refused".into(), ..ActFilter::default() }).await;
    let refused = found.into_iter().map(|record| match record.act.unwrap().change {
        Some(Change::Refused(refused)) => (refused.count, refused.reason),
        other => panic!("{other:?}"),
    });
    refused.collect()
}

#[tokio::test]
async fn an_auditor_reads_everything_and_changes_nothing() {
    let ca = Ca::start_with(ROLES).await;
    let agent = ca.join(NODE).await;
    let mut bob = remote(&ca, &svid_of(&ca, &agent, "bob").await).await;
    assert!(bob.status(StatusRequest {}).await.unwrap().into_inner().ready);
    let identities = bob.list_identities(ListIdentitiesRequest::default()).await.unwrap().into_inner().identities;
    assert!(identities.iter().any(|identity| identity.spiffe_id == "spiffe://dev.chancery/ns/ops/sa/bob"));
    remote_log(&ca, &svid_of(&ca, &agent, "bob").await).await.list_acts(ListActsRequest::default()).await.unwrap();
    bob.list_agents(ListAgentsRequest::default()).await.unwrap();

    let error = bob.ban(ban(&agent, "I think so")).await.unwrap_err();
    assert_eq!(error.code(), Code::PermissionDenied);
    assert!(error.message().contains("is an auditor") && error.message().contains("ask an admin"), "{error}");
    assert!(bob.unban(UnbanRequest { agent: agent.id().to_string(), reason: "or not".into() }).await.is_err());
    assert!(issue(&mut ca.connect(Some(&agent)).await, ca.token(|_| ())).await.is_ok(), "the agent is banned");

    let recorded = acts(&ca, ActFilter { action: "agent.ban".into(), ..ActFilter::default() }).await;
    assert_eq!(recorded.len(), 1);
    let act = recorded[0].act.clone().unwrap();
    assert_eq!((act.actor.as_str(), act.action.as_str()), ("spiffe://dev.chancery/ns/ops/sa/bob", "act.refused"));
    assert_eq!((act.why.as_str(), act.outcome.as_str()), ("I think so", "refused"));
}

#[tokio::test]
async fn a_stranger_reads_nothing_and_leaves_no_entry() {
    let ca = Ca::start_with(ROLES).await;
    let agent = ca.join(NODE).await;
    let cart = issue(&mut ca.connect(Some(&agent)).await, ca.token(|_| ())).await.unwrap();
    let before = ca.status().await.ledger_entries;
    for stranger in [&cart, &agent] {
        let mut stranger_client = remote(&ca, stranger).await;
        let errors = [
            stranger_client.status(StatusRequest {}).await.map(|_| ()).unwrap_err(),
            stranger_client.list_identities(ListIdentitiesRequest::default()).await.map(|_| ()).unwrap_err(),
            remote_log(&ca, stranger).await.list_acts(ListActsRequest::default()).await.map(|_| ()).unwrap_err(),
            stranger_client.ban(ban(&agent, "because")).await.map(|_| ()).unwrap_err(),
        ];
        for error in errors {
            assert_eq!(error.code(), Code::PermissionDenied);
            assert!(error.message().contains(stranger.id().as_str()) && error.message().contains("[roles]"), "{error}");
        }
    }
    let mut nobody = OperatorServiceClient::new(ca.channel(None).await.unwrap());
    let error = nobody.status(StatusRequest {}).await.unwrap_err();
    assert_eq!((error.code(), error.message().contains("operators and auditors")), (Code::PermissionDenied, true), "{error}");
    assert_eq!(ca.status().await.ledger_entries, before);
}

#[tokio::test]
async fn an_admin_bans_an_agent_that_gets_nothing_more_until_the_ban_is_taken_back() {
    let ca = Ca::start_with(ROLES).await;
    let agent = ca.join(NODE).await;
    let mut alice = remote(&ca, &svid_of(&ca, &agent, "alice").await).await;
    let banned = alice.ban(ban(&agent, "it was stolen")).await.unwrap().into_inner();
    assert_eq!((banned.certificates, banned.problem.as_str()), (1, ""));

    assert!(!is_let_in(&ca, &agent).await, "its certificate is revoked");
    let (csr, _) = chancery_identity::csr::generate(chancery_identity::csr::KeyType::EcdsaP256, None).unwrap();
    let error = ca.connect(None).await.join(Ca::join_request(ca.agent_token(NODE), csr)).await.unwrap_err();
    assert_eq!(error.code(), Code::PermissionDenied, "joining again is no way around: {error}");
    assert!(error.message().contains(&format!("ledger entry {}", banned.entry)), "{error}");

    let twice = alice.ban(ban(&agent, "again")).await.unwrap_err();
    assert_eq!((twice.code(), twice.message().contains("banned already")), (Code::FailedPrecondition, true), "{twice}");
    alice.unban(UnbanRequest { agent: agent.id().to_string(), reason: "it was found".into() }).await.unwrap();
    assert!(is_let_in(&ca, &ca.join(NODE).await).await && !is_let_in(&ca, &agent).await, "with another certificate");
    let recorded = acts(&ca, ActFilter { actor: "spiffe://dev.chancery/ns/ops/sa/alice".into(), ..ActFilter::default() }).await;
    let recorded: Vec<_> = recorded.into_iter().map(|record| record.act.unwrap()).map(|act| (act.action, act.why)).collect();
    let expected = [("agent.unban", "it was found"), ("act.refused", "again"), ("agent.ban", "it was stolen")];
    assert_eq!(recorded, expected.map(|(action, why)| (action.to_owned(), why.to_owned())));
}

#[tokio::test]
async fn a_ban_outlives_the_ca() {
    let ca = Ca::start_with(ROLES).await;
    let agent = ca.join(NODE).await;
    ca.operator().await.ban(ban(&agent, "it was stolen")).await.unwrap();
    let ca = Ca::try_start(ca.stop().await, ROLES).await.unwrap();
    assert!(!is_let_in(&ca, &agent).await);
    let (csr, _) = chancery_identity::csr::generate(chancery_identity::csr::KeyType::EcdsaP256, None).unwrap();
    let refused = ca.connect(None).await.join(Ca::join_request(ca.agent_token(NODE), csr)).await.unwrap_err();
    assert!(refused.message().contains("was banned by an operator"), "{refused}");
}

#[tokio::test]
async fn whoever_may_not_act_is_refused_and_recorded_whether_or_not_there_is_what_they_name() {
    let ca = Ca::start_with(ROLES).await;
    let agent = ca.join(NODE).await;
    let svid = svid_of(&ca, &agent, "bob").await;
    let mut bob = remote(&ca, &svid).await;
    let mut revocation = RevocationServiceClient::new(ca.channel(Some(&svid)).await.unwrap());
    let mut root = RootServiceClient::new(ca.channel(Some(&svid)).await.unwrap());
    let why = || "I think so".to_owned();
    let pod = || Some(RevocationSubject { of: Some(Of::Pod("shop/unknown".into())) });
    let large = vec![vec![0; 1 << 14]];
    let overrides = Overrides { except: vec!["x".repeat(1000)], ..Overrides::default() };
    let publish = |overrides| MoveRootRequest { to: RootState::Published.into(), root: "the old one".into(), reason: why(), overrides };
    let nowhere = MoveRootRequest { to: RootState::Distrusted.into(), root: "the old one".into(), reason: why(), overrides: None };
    let refused = [
        (revocation.revoke(RevokeRequest { subject: pod(), reason: why() }).await.map(drop), "identity.revoke pod shop/unknown"),
        (revocation.allow(AllowRequest { subject: pod(), reason: why() }).await.map(drop), "identity.allow pod shop/unknown"),
        (revocation.revoke(RevokeRequest { subject: None, reason: why() }).await.map(drop), "identity.revoke"),
        (bob.ban(BanRequest { agent: "node-1".into(), reason: why() }).await.map(drop), "agent.ban node-1"),
        (bob.unban(UnbanRequest { agent: "node-1".into(), reason: why() }).await.map(drop), "agent.unban node-1"),
        (root.move_root(publish(Some(overrides))).await.map(drop), "root.publish the old one"),
        (root.move_root(nowhere).await.map(drop), "root.move the old one"),
        (root.answer_root(AnswerRootRequest { reason: why(), certificates: large }).await.map(drop), "root.prepare"),
    ];
    let count = refused.len() as u64;
    for (answer, target) in refused {
        let error = answer.unwrap_err();
        assert_eq!((error.code(), error.message().contains("is an auditor")), (Code::PermissionDenied, true), "{target}: {error}");
    }
    // The first one is an entry, and within the minute the last one has the count of the others.
    ca.clock.advance(time::Duration::minutes(1));
    let recorded = async || acts(&ca, ActFilter { action: "act.refused".into(), ..ActFilter::default() }).await;
    ca.until_async("what was counted", async || recorded().await.len() == 2).await;
    let recorded: Vec<_> = recorded().await.into_iter().map(|record| record.act.unwrap()).collect();
    let count_of = |act: &Act| match &act.change {
        Some(Change::Refused(refused)) => refused.count,
        other => panic!("{other:?}"),
    };
    let counts: Vec<_> = recorded.iter().map(count_of).collect();
    let targets: Vec<_> = recorded.iter().map(|act| act.target.as_str()).collect();
    assert_eq!((counts, targets), (vec![count - 1, 1], vec!["root.prepare", "identity.revoke pod shop/unknown"]));
}

#[tokio::test]
async fn on_the_admin_socket_an_act_is_recorded_with_the_uid_and_needs_a_reason() {
    let ca = Ca::start().await;
    let agent = ca.join(NODE).await;
    let mut local = ca.operator().await;
    let error = local.ban(ban(&agent, " ")).await.unwrap_err();
    assert_eq!((error.code(), error.message().contains("--reason")), (Code::InvalidArgument, true), "{error}");
    local.ban(ban(&agent, "it was stolen")).await.unwrap();
    let uid = rustix::process::getuid().as_raw();
    let recorded = acts(&ca, ActFilter { actor: format!("local:uid={uid}"), ..ActFilter::default() }).await;
    let recorded: Vec<_> = recorded.into_iter().map(|record| record.act.unwrap().action).collect();
    assert_eq!(recorded, ["agent.ban", "act.refused"]);
}

#[tokio::test]
async fn of_many_refused_acts_one_a_minute_is_an_entry_with_the_count() {
    let ca = Ca::start_with(ROLES).await;
    let agent = ca.join(NODE).await;
    let mut bob = remote(&ca, &svid_of(&ca, &agent, "bob").await).await;
    for _ in 0..50 {
        bob.ban(ban(&agent, "I think so")).await.unwrap_err();
    }
    assert_eq!(refused(&ca).await, [(1, "role".to_owned())]);
    // Another reason of another person is another entry.
    ca.operator().await.ban(ban(&agent, "")).await.unwrap_err();
    assert_eq!(refused(&ca).await, [(1, "reason_missing".to_owned()), (1, "role".to_owned())]);
    ca.clock.advance(time::Duration::minutes(1));
    ca.until_async("what was counted", async || refused(&ca).await.first() == Some(&(49, "role".to_owned()))).await;
    assert_eq!(refused(&ca).await.len(), 3);
}

#[tokio::test]
async fn refused_acts_that_were_only_counted_are_entries_once_the_ca_has_ended() {
    let ca = Ca::start_with(ROLES).await;
    let agent = ca.join(NODE).await;
    let mut bob = remote(&ca, &svid_of(&ca, &agent, "bob").await).await;
    for _ in 0..5 {
        bob.ban(ban(&agent, "I think so")).await.unwrap_err();
    }
    drop(bob);
    let ca = Ca::try_start(ca.stop().await, ROLES).await.unwrap();
    assert_eq!(refused(&ca).await, [(4, "role".to_owned()), (1, "role".to_owned())]);
}

/// `chancery` as bob types it, somewhere else.
async fn as_bob(ca: &Ca, bob: &X509Svid, arguments: &[&str]) -> Output {
    std::fs::write(ca.directory.path().join("bob.pem"), bob.chain_pem()).unwrap();
    write_private(&ca.directory.path().join("bob.key"), bob.key().secret_pem().as_bytes()).unwrap();
    as_bob_again(ca, arguments).await
}

/// With the files of the last time.
async fn as_bob_again(ca: &Ca, arguments: &[&str]) -> Output {
    let path = |name: &str| ca.directory.path().join(name);
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_chancery"));
    command.env_clear().env("CHANCERY_CERT", path("bob.pem")).args(["--server", &ca.running.address.to_string(), "--key"]);
    command.arg(path("bob.key")).arg("--ca-bundle").arg(ca.data_dir().join("bundle.pem")).args(arguments);
    command.output().await.unwrap()
}

#[tokio::test]
async fn the_command_line_asks_over_the_tls_port() {
    let ca = Ca::start_with(ROLES).await;
    let agent = ca.join(NODE).await;
    let bob = svid_of(&ca, &agent, "bob").await;
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let status = as_bob(&ca, &bob, &["status"]).await;
    assert!(status.status.success() && text(status.stdout).contains("dev.chancery"), "{}", text(status.stderr));
    let refused = as_bob(&ca, &bob, &["agent", "ban", agent.id().as_str(), "--reason", "I think so"]).await;
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(refused.stderr).contains("is an auditor"));
    let listed = as_bob(&ca, &bob, &["log", "acts", "--action", "act.refused", "-o", "csv"]).await;
    let listed = text(listed.stdout);
    let mut lines = listed.lines();
    assert_eq!(lines.next(), Some("time,actor,action,target,outcome,why,overrides,count,entry,epoch"));
    assert!(lines.next().unwrap().contains("spiffe://dev.chancery/ns/ops/sa/bob,act.refused,agent.ban"), "{listed}");
    assert_eq!(lines.next(), None);

    // Its key in others' hands, or another CA's bundle: refused before anything is asked.
    std::fs::set_permissions(ca.directory.path().join("bob.key"), std::fs::Permissions::from_mode(0o644)).unwrap();
    let exposed = as_bob_again(&ca, &["status"]).await;
    assert!(exposed.status.code() == Some(1) && text(exposed.stderr.clone()).contains("chmod 0600"), "{}", text(exposed.stderr));
    let other = Ca::start().await;
    std::fs::copy(other.data_dir().join("bundle.pem"), ca.data_dir().join("bundle.pem")).unwrap();
    let untrusted = as_bob(&ca, &bob, &["status"]).await;
    assert!(untrusted.status.code() == Some(1) && text(untrusted.stderr).contains("no connection with the CA"));
}

#[tokio::test]
async fn a_role_counts_from_the_next_call_on() {
    let ca = Ca::start().await;
    let agent = ca.join(NODE).await;
    let mut bob = remote(&ca, &svid_of(&ca, &agent, "bob").await).await;
    assert!(bob.status(StatusRequest {}).await.is_err());
    Ca::write_config(&ca.directory, ROLES);
    ca.until_async("the role", async || bob.clone().status(StatusRequest {}).await.is_ok()).await;
    Ca::write_config(&ca.directory, "");
    ca.until_async("the end of the role", async || bob.clone().status(StatusRequest {}).await.is_err()).await;
}

#[tokio::test]
async fn a_person_whose_certificate_expires_during_the_connection_is_refused() {
    let ca = Ca::start_with(ROLES).await;
    let agent = ca.join(NODE).await;
    let mut bob = remote(&ca, &svid_of(&ca, &agent, "bob").await).await;
    bob.status(StatusRequest {}).await.unwrap();
    ca.clock.advance(time::Duration::hours(2));
    let error = bob.status(StatusRequest {}).await.unwrap_err();
    assert_eq!(error.code(), Code::Unauthenticated);
}

#[tokio::test]
async fn acts_are_listed_in_pages_and_by_time() {
    let ca = Ca::start().await;
    let agent = ca.join(NODE).await;
    let mut local = ca.operator().await;
    for number in 0..5 {
        local.ban(ban(&agent, &format!("ban {number}"))).await.unwrap();
        local.unban(UnbanRequest { agent: agent.id().to_string(), reason: format!("unban {number}") }).await.unwrap();
    }
    let filter = Some(ActFilter { action: "agent.ban".into(), ..ActFilter::default() });
    let mut log = ca.log().await;
    let mut request = ListActsRequest { filter, page_size: 2, page_token: String::new() };
    let mut reasons = Vec::new();
    loop {
        let page = log.list_acts(request.clone()).await.unwrap().into_inner();
        assert!(page.acts.len() <= 2);
        reasons.extend(page.acts.into_iter().map(|record| record.act.unwrap().why));
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    assert_eq!(reasons, ["ban 4", "ban 3", "ban 2", "ban 1", "ban 0"]);
    let future = acts(&ca, ActFilter { since_ms: i64::MAX / 2, ..ActFilter::default() }).await;
    assert!(future.is_empty());
    let all = acts(&ca, ActFilter { action: "agent".into(), until_ms: i64::MAX / 2, ..ActFilter::default() }).await;
    assert_eq!(all.len(), 10);
    assert!(acts(&ca, ActFilter { action: "age".into(), ..ActFilter::default() }).await.is_empty());
}
