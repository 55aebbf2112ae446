//! Revocation as operators and agents meet it: who may revoke whom, and whose connections end.

use chancery_identity::X509Svid;
use chancery_proto::chancery::v1::revocation_service_client::RevocationServiceClient;
use chancery_proto::chancery::v1::revocation_subject::Of;
use chancery_proto::chancery::v1::{
    AllowRequest, BanRequest, CheckReachRequest, ListAgentsRequest, RevocationSubject, RevokeRequest, RevokeResponse, UnbanRequest,
};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::roles::{ROLES, is_let_in, refused, svid_of};
use crate::serving::session;
use crate::support::{Ca, NODE, SOON, issue};

async fn as_admin(ca: &Ca, agent: &X509Svid) -> RevocationServiceClient<Channel> {
    RevocationServiceClient::new(ca.channel(Some(&svid_of(ca, agent, "alice").await)).await.unwrap())
}

fn subject(of: Of) -> RevocationSubject {
    RevocationSubject { of: Some(of) }
}

async fn revoke(client: &mut RevocationServiceClient<Channel>, of: Of) -> Result<RevokeResponse, Status> {
    Ok(client.revoke(RevokeRequest { subject: Some(subject(of)), reason: "it leaked".into() }).await?.into_inner())
}

async fn allow(client: &mut RevocationServiceClient<Channel>, of: Of) -> Result<(), Status> {
    client.allow(AllowRequest { subject: Some(subject(of)), reason: "it was mended".into() }).await.map(|_| ())
}

#[tokio::test]
async fn a_banned_agents_connections_end_at_once_and_nobody_elses() {
    let ca = Ca::start().await;
    let (banned, other) = (ca.join(NODE).await, ca.join("node-2").await);
    let (_up, mut down) = session(&ca, &banned).await;
    let (_other_up, _other_down) = session(&ca, &other).await;
    let request = BanRequest { agent: banned.id().to_string(), reason: "it was stolen".into() };
    assert_eq!(ca.operator().await.ban(request).await.unwrap().into_inner().certificates, 1);
    let ended = async { while let Ok(Some(_)) = down.message().await {} };
    tokio::time::timeout(SOON, ended).await.expect("its session ends");
    let connected = async |id: &X509Svid| {
        let agents = ca.operator().await.list_agents(ListAgentsRequest::default()).await.unwrap().into_inner().agents;
        agents.iter().any(|agent| agent.spiffe_id == id.id().as_str() && agent.connected)
    };
    ca.until_async("its session is gone", async || !connected(&banned).await).await;
    assert!(connected(&other).await && is_let_in(&ca, &other).await && !is_let_in(&ca, &banned).await);
    assert!(ca.get("/metrics").await.contains("chancery_revoked_certificates 1"));
    let request = UnbanRequest { agent: banned.id().to_string(), reason: "it was found".into() };
    ca.operator().await.unban(request).await.unwrap();
    assert!(is_let_in(&ca, &ca.join(NODE).await).await, "it comes back by its token");
}

#[tokio::test]
async fn an_auditor_revokes_nothing_and_may_see_how_far_a_revocation_has_come() {
    let ca = Ca::start_with(ROLES).await;
    let agent = ca.join(NODE).await;
    let svid = svid_of(&ca, &agent, "bob").await;
    let mut bob = RevocationServiceClient::new(ca.channel(Some(&svid)).await.unwrap());
    let id = || Of::SpiffeId(agent.id().to_string());
    assert_eq!(revoke(&mut bob, id()).await.unwrap_err().code(), Code::PermissionDenied);
    assert_eq!(allow(&mut bob, id()).await.unwrap_err().code(), Code::PermissionDenied);
    assert_eq!(refused(&ca).await.last().unwrap().1, "role");
    let reach = bob.check_reach(CheckReachRequest { trust_sequence: 1, ..CheckReachRequest::default() }).await.unwrap().into_inner();
    assert_eq!(reach.missing_total, 1, "the agent has opened no session: {reach:?}");
    let except = vec![agent.id().to_string()];
    let reach =
        bob.check_reach(CheckReachRequest { trust_sequence: 1, except, ..CheckReachRequest::default() }).await.unwrap().into_inner();
    assert_eq!(reach.missing_total, 0);
}

#[tokio::test]
async fn by_serial_the_holder_gets_another_and_by_anything_else_nothing_until_it_is_allowed() {
    let ca = Ca::start_with(ROLES).await;
    let agent = ca.join(NODE).await;
    let mut alice = as_admin(&ca, &agent).await;
    let mut client = ca.connect(Some(&agent)).await;
    let cart = issue(&mut client, ca.token(|_| ())).await.unwrap();
    let done = revoke(&mut alice, Of::Serial(cart.serial().to_string())).await.unwrap();
    assert_eq!((done.certificates, done.issuance_refused, done.agents.len()), (1, false, 0));
    let second = issue(&mut client, ca.token(|_| ())).await.unwrap();
    let ways = [
        Of::SpiffeId(cart.id().to_string()),
        Of::Pod("shop/cart-0".into()),
        Of::Node(NODE.into()),
        Of::Node(format!("dev/{NODE}")),
        Of::Agent(agent.id().to_string()),
    ];
    // The agent's own certificate is among those of its node: another one each time.
    for of in ways {
        let agent = ca.join(NODE).await;
        let mut client = ca.connect(Some(&agent)).await;
        let cart = issue(&mut client, ca.token(|_| ())).await.unwrap();
        // On the socket: alice's certificate is of that node, too.
        let mut admin = RevocationServiceClient::new(ca.admin().await);
        let done = revoke(&mut admin, of.clone()).await.unwrap();
        assert!(done.issuance_refused && done.certificates >= 1 && done.problem.is_empty(), "{done:?}");
        let whole_node = matches!(of, Of::Node(_) | Of::Agent(_));
        assert_eq!(done.agents.contains(&agent.id().to_string()), whole_node, "{done:?}");
        if whole_node {
            assert!(!is_let_in(&ca, &agent).await && !is_let_in(&ca, &cart).await);
        } else {
            let refusal = issue(&mut client, ca.token(|_| ())).await.unwrap_err();
            assert!(refusal.message.contains("chancery identity allow"), "{}", refusal.message);
        }
        allow(&mut admin, of.clone()).await.unwrap();
        assert!(is_let_in(&ca, &ca.join(NODE).await).await);
        assert!(allow(&mut admin, of).await.is_err(), "it was allowed already");
    }
    drop(second);
}

#[tokio::test]
async fn who_is_meant_must_be_clear() {
    let ca = Ca::start_with(ROLES).await;
    let agent = ca.join(NODE).await;
    let mut alice = as_admin(&ca, &agent).await;
    let mut client = ca.connect(Some(&agent)).await;
    for uid in [1, 2] {
        let token = ca.token(|request| request.pod_uid = Some(uuid::Uuid::from_u128(uid)));
        issue(&mut client, token).await.unwrap();
    }
    let wrong = [
        (Of::Pod("shop/cart-0".into()), Code::InvalidArgument, "several pods"),
        (Of::Pod("shop/nobody-0".into()), Code::NotFound, "no pod"),
        (Of::Pod("cart-0".into()), Code::InvalidArgument, "NAMESPACE/POD"),
        (Of::Node("west/node-1".into()), Code::InvalidArgument, "CLUSTER/NODE"),
        (Of::SpiffeId("cart".into()), Code::InvalidArgument, "no SPIFFE ID"),
        (Of::SpiffeId("spiffe://elsewhere/ns/shop/sa/cart".into()), Code::FailedPrecondition, "another trust domain"),
        (Of::Agent("spiffe://dev.chancery/ns/shop/sa/cart".into()), Code::PermissionDenied, "neither an agent nor a sidecar"),
        (Of::Serial("7".into()), Code::InvalidArgument, "serial"),
        (Of::Serial("2f7c91d05b3e4a86a1c40e97d2f86b15".into()), Code::FailedPrecondition, "no certificate with the serial number"),
    ];
    for (of, code, words) in wrong {
        let error = revoke(&mut alice, of).await.unwrap_err();
        assert!(error.code() == code && error.message().contains(words), "{error:?}");
    }
    let empty = alice.revoke(RevokeRequest { subject: None, reason: "why not".into() }).await.unwrap_err();
    assert_eq!(empty.code(), Code::InvalidArgument);
    let serial = Of::Serial("2f7c91d05b3e4a86a1c40e97d2f86b15".into());
    assert!(allow(&mut alice, serial).await.unwrap_err().message().contains("keeps nobody from another"));
}
