//! The TLS port: who may do what, how much of it, and for how long.

use std::sync::Arc;

use crate::support::{Ca, NODE, SOON, issue, svid, workload};
use chancery_ca::api::REASON_KEY;
use chancery_identity::csr::{self, KeyType};
use chancery_proto::chancery::v1::{
    AgentMessage, ExplainRequest, Hello, IdentityFilter, IssueRequest, ListAgentsRequest, ListIdentitiesRequest, ListRefusalsRequest,
    RenewRequest, ShowIdentityRequest, WorkloadRequest, agent_message, ca_message, show_identity_request::By,
};
use rustls::HandshakeKind;
use rustls::client::Resumption;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::Code;
use uuid::Uuid;

#[tokio::test]
async fn an_agent_joins_and_what_it_is_issued_is_listed() {
    let ca = Ca::start().await;
    let agent = ca.join(NODE).await;
    assert!(agent.id().as_str().starts_with("spiffe://dev.chancery/chancery/agent/dev/"), "{}", agent.id());
    let mut client = ca.connect(Some(&agent)).await;
    let issued = issue(&mut client, ca.token(|_| ())).await.unwrap();
    assert_eq!(issued.id().as_str(), "spiffe://dev.chancery/ns/shop/sa/cart");

    let mut operator = ca.operator().await;
    let filter = IdentityFilter { pod: "shop/cart-0".into(), unexpired: true, ..IdentityFilter::default() };
    let request = ListIdentitiesRequest { filter: Some(filter), ..ListIdentitiesRequest::default() };
    let listed = operator.list_identities(request).await.unwrap().into_inner().identities;
    assert_eq!(listed.len(), 1);
    assert_eq!((&listed[0].serial, listed[0].agent.as_str()), (&issued.serial().to_string(), agent.id().as_str()));
    assert_eq!(listed[0].issuance.as_ref().unwrap().node, NODE);

    let by = Some(By::Serial(issued.serial().to_string()));
    let shown = operator.show_identity(ShowIdentityRequest { by }).await.unwrap().into_inner();
    assert!(shown.text.contains("URI:spiffe://dev.chancery/ns/shop/sa/cart (critical)"), "{}", shown.text);
}

#[tokio::test]
async fn an_agent_renews_itself_with_a_new_key() {
    let ca = Ca::start().await;
    let agent = ca.join(NODE).await;
    let (csr, key) = csr::generate(KeyType::EcdsaP256, None).unwrap();
    let request = RenewRequest { csr, request_id: Uuid::new_v4().to_string() };
    let renewed = ca.connect(Some(&agent)).await.renew(request).await.unwrap().into_inner();
    let renewed = svid(&renewed.svid.unwrap(), key);
    assert_eq!(renewed.id(), agent.id());
    assert_ne!(renewed.serial(), agent.serial());
}

#[tokio::test]
async fn only_joining_works_without_a_certificate() {
    let ca = Ca::start().await;
    let mut stranger = ca.connect(None).await;
    let error = stranger.issue(IssueRequest { requests: vec![workload(ca.token(|_| ())).0] }).await.unwrap_err();
    assert_eq!((error.code(), error.message().contains("join first")), (Code::Unauthenticated, true), "{error}");
    let error = stranger.renew(RenewRequest::default()).await.unwrap_err();
    assert_eq!(error.code(), Code::Unauthenticated);
}

#[tokio::test]
async fn a_workloads_certificate_makes_no_agent() {
    let ca = Ca::start().await;
    let agent = ca.join(NODE).await;
    let cart = issue(&mut ca.connect(Some(&agent)).await, ca.token(|_| ())).await.unwrap();
    let error = ca.connect(Some(&cart)).await.issue(IssueRequest { requests: vec![workload(ca.token(|_| ())).0] }).await.unwrap_err();
    assert_eq!(error.code(), Code::PermissionDenied);
    assert!(error.message().contains("neither an agent nor a sidecar"), "{error}");
}

#[tokio::test]
async fn a_certificate_of_another_ca_is_refused() {
    let (ca, other) = (Ca::start().await, Ca::start().await);
    let foreign = other.join(NODE).await;
    let answer = match ca.try_connect(Some(&foreign)).await {
        Ok(mut client) => client.issue(IssueRequest::default()).await.map(|_| ()).map_err(|error| error.code()),
        Err(_) => Err(Code::Unavailable),
    };
    assert!(answer.is_err());
    let seen = async {
        while !ca.get("/metrics").await.contains("chancery_connections_refused_total{reason=\"tls\"} 1") {
            tokio::task::yield_now().await;
        }
    };
    timeout(SOON, seen).await.unwrap();
}

#[tokio::test]
async fn a_workloads_token_does_not_join() {
    let ca = Ca::start().await;
    let (csr, _) = csr::generate(KeyType::EcdsaP256, None).unwrap();
    let error = ca.connect(None).await.join(Ca::join_request(ca.token(|_| ()), csr)).await.unwrap_err();
    assert_eq!(error.code(), Code::PermissionDenied);
    assert_eq!(error.metadata().get(REASON_KEY).unwrap(), "token_audience");
}

#[tokio::test]
async fn ten_thousand_requests_in_one_call_are_refused() {
    let ca = Ca::start().await;
    let agent = ca.join(NODE).await;
    let mut client = ca.connect(Some(&agent)).await;
    let before = ca.status().await.ledger_entries;
    let error = client.issue(IssueRequest { requests: vec![WorkloadRequest::default(); 10_000] }).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("at most 512"), "{error}");
    let real = vec![workload(ca.token(|_| ())).0; 10_000];
    let error = client.issue(IssueRequest { requests: real }).await.unwrap_err();
    assert!(error.message().contains("message length too large"), "{error}");
    assert_eq!(ca.status().await.ledger_entries, before);
    let request = ListRefusalsRequest { agent: agent.id().to_string(), ..ListRefusalsRequest::default() };
    let refusals = ca.operator().await.list_refusals(request).await.unwrap().into_inner().refusals;
    assert_eq!(refusals[0].reason, "call_too_large");
    assert!(
        refusals[0].message.contains("found ") && refusals[0].message.contains("the limit is: 4194304 bytes"),
        "{}",
        refusals[0].message
    );
    assert!(ca.get("/metrics").await.contains("chancery_refused_total{reason=\"call_too_large\"} 1\n"));
    assert!(issue(&mut client, ca.token(|_| ())).await.is_ok(), "the connection still serves");
}

#[tokio::test]
async fn a_refused_request_is_explained() {
    let ca = Ca::start().await;
    let agent = ca.join(NODE).await;
    let token = ca.token(|request| request.node = "node-2".into());
    let refusal = issue(&mut ca.connect(Some(&agent)).await, token).await.unwrap_err();
    assert_eq!((refusal.reason.as_str(), refusal.retryable), ("token_other_node", false));

    let mut operator = ca.operator().await;
    let request = ListRefusalsRequest { pod: "shop/cart-0".into(), ..ListRefusalsRequest::default() };
    let refusals = operator.list_refusals(request).await.unwrap().into_inner().refusals;
    assert_eq!((refusals.len(), refusals[0].agent.as_str()), (1, agent.id().as_str()));
    let request = ExplainRequest { namespace: "shop".into(), pod: "cart-0".into() };
    let explained = operator.explain(request).await.unwrap().into_inner();
    assert_eq!(explained.verdict, "refused: token_other_node");
    assert!(explained.next_step.contains("node-2"), "{}", explained.next_step);
    assert!(ca.get("/metrics").await.contains("chancery_refused_total{reason=\"token_other_node\"} 1"));
}

#[tokio::test]
async fn the_explanation_of_a_pod_says_where_it_stands() {
    let ca = Ca::start().await;
    let mut operator = ca.operator().await;
    let mut explain = async || {
        let request = ExplainRequest { namespace: "shop".into(), pod: "cart-0".into() };
        operator.explain(request).await.unwrap().into_inner()
    };
    assert_eq!(explain().await.verdict, "never asked");
    let agent = ca.join(NODE).await;
    issue(&mut ca.connect(Some(&agent)).await, ca.token(|_| ())).await.unwrap();
    let explained = explain().await;
    assert!(explained.verdict.starts_with("certificate valid until "), "{}", explained.verdict);
    assert!(explained.next_step.contains("is not connected"), "{}", explained.next_step);
    ca.clock.advance(time::Duration::hours(2));
    assert!(explain().await.verdict.starts_with("expired at "), "{}", explain().await.verdict);
}

#[tokio::test]
async fn a_certificate_that_expires_during_the_connection_is_refused() {
    let ca = Ca::start().await;
    let agent = ca.join(NODE).await;
    let mut client = ca.connect(Some(&agent)).await;
    assert!(issue(&mut client, ca.token(|_| ())).await.is_ok());
    ca.clock.advance(time::Duration::hours(25));
    let error = client.issue(IssueRequest { requests: vec![workload(ca.token(|_| ())).0] }).await.unwrap_err();
    assert_eq!(error.code(), Code::Unauthenticated);
    assert!(error.message().contains("expired at"), "{error}");
}

#[tokio::test]
async fn an_agent_that_asks_for_more_than_its_rate_is_refused() {
    let ca = Ca::start_with("[limits]\nrequests_per_second = 1\nrequest_burst = 2\n").await;
    let agent = ca.join(NODE).await;
    let mut client = ca.connect(Some(&agent)).await;
    let error = client.issue(IssueRequest { requests: vec![workload(ca.token(|_| ())).0; 3] }).await.unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted);
    assert!(error.message().contains("limits.requests_per_second"), "{error}");
    // The limit is the agent's, whatever connection it uses.
    let mut another = ca.connect(Some(&agent)).await;
    for _ in 0..2 {
        assert!(issue(&mut another, ca.token(|_| ())).await.is_ok());
    }
    let error = client.issue(IssueRequest { requests: vec![workload(ca.token(|_| ())).0] }).await.unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted);
}

#[tokio::test]
async fn a_connection_over_the_limit_is_closed_and_counted() {
    let ca = Ca::start_with("[limits]\nmax_connections = 1\n").await;
    let _first = ca.connect(None).await;
    assert!(ca.try_connect(None).await.is_err());
    assert!(ca.get("/metrics").await.contains("chancery_connections_refused_total{reason=\"limit\"} 1"));
}

#[tokio::test]
async fn sessions_are_not_resumed() {
    let ca = Ca::start().await;
    let mut tls = ca.tls(None);
    // A client that would, with everything that it takes.
    tls.resumption = Resumption::in_memory_sessions(8);
    let connector = tokio_rustls::TlsConnector::from(Arc::new(tls));
    for _ in 0..2 {
        let tcp = TcpStream::connect(ca.running.address).await.unwrap();
        let mut stream = connector.connect(ServerName::from(ca.running.address.ip()), tcp).await.unwrap();
        // Tickets come after the handshake, so something must be read.
        tokio::io::AsyncReadExt::read_u8(&mut stream).await.unwrap();
        assert_eq!(stream.get_ref().1.handshake_kind(), Some(HandshakeKind::Full));
    }
}

/// A session of `agent`, with its first three messages read.
pub(crate) async fn session(
    ca: &Ca,
    agent: &chancery_identity::X509Svid,
) -> (tokio::sync::mpsc::Sender<AgentMessage>, tonic::Streaming<chancery_proto::chancery::v1::CaMessage>) {
    let mut client = ca.connect(Some(agent)).await;
    let (up, reports) = tokio::sync::mpsc::channel(4);
    let hello = agent_message::Message::Hello(Hello { version: "0.1.0".into(), ..Hello::default() });
    up.send(AgentMessage { message: Some(hello) }).await.unwrap();
    let mut down = client.session(tokio_stream::wrappers::ReceiverStream::new(reports)).await.unwrap().into_inner();
    let mut kinds = Vec::new();
    for _ in 0..3 {
        kinds.push(match down.message().await.unwrap().unwrap().message.unwrap() {
            ca_message::Message::Welcome(_) => "welcome",
            ca_message::Message::Trust(trust) => {
                assert_eq!(trust.bundles.len(), 1);
                "trust"
            }
            ca_message::Message::ClusterKeys(keys) => {
                assert_eq!(keys.audiences, ["chancery"]);
                "keys"
            }
            ca_message::Message::Order(_) => "order",
            ca_message::Message::LedgerCheckpoint(_) => "checkpoint",
            ca_message::Message::StandingActs(_) => "acts",
        });
    }
    kinds[1..].sort_unstable();
    assert_eq!(kinds, ["welcome", "keys", "trust"]);
    (up, down)
}

#[tokio::test]
async fn a_connected_agent_is_listed_with_its_node() {
    let ca = Ca::start().await;
    let agent = ca.join(NODE).await;
    let (_up, _down) = session(&ca, &agent).await;
    let agents = ca.operator().await.list_agents(ListAgentsRequest::default()).await.unwrap().into_inner().agents;
    assert_eq!((agents.len(), agents[0].connected, agents[0].node.as_str()), (1, true, NODE));
}

#[tokio::test]
async fn an_agents_node_is_known_after_a_restart() {
    let ca = Ca::start().await;
    let agent = ca.join(NODE).await;
    let directory = ca.stop().await;
    let ca = Ca::try_start(directory, "").await.unwrap();
    let (_up, _down) = session(&ca, &agent).await;
    let agents = ca.operator().await.list_agents(ListAgentsRequest::default()).await.unwrap().into_inner().agents;
    assert_eq!(agents[0].node, NODE);
}

#[tokio::test]
async fn a_session_ends_in_order_before_its_connection_reaches_its_age() {
    let ca = Ca::start_with("[limits]\nmax_connection_age = \"2s\"\n").await;
    let agent = ca.join(NODE).await;
    let (_up, mut down) = session(&ca, &agent).await;
    let end = timeout(SOON, down.message()).await.unwrap().unwrap();
    assert!(end.is_none(), "an orderly end, after which the agent connects again");
}

#[tokio::test]
async fn a_connection_is_closed_at_its_age() {
    let ca = Ca::start_with("[limits]\nmax_connection_age = \"1s\"\n").await;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(ca.tls(None)));
    let tcp = TcpStream::connect(ca.running.address).await.unwrap();
    let mut stream = connector.connect(ServerName::from(ca.running.address.ip()), tcp).await.unwrap();
    // The preface and an empty SETTINGS frame, so that it counts as HTTP/2; then nothing is asked.
    tokio::io::AsyncWriteExt::write_all(&mut stream, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut rest = Vec::new();
    let closed = timeout(SOON, tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut rest)).await;
    assert!(closed.is_ok(), "still open");
    assert!(rest.windows(9).any(|frame| frame[3] == 0x07), "no GOAWAY before the end: {rest:x?}");
}

#[tokio::test]
async fn a_session_that_does_not_begin_with_a_hello_is_refused() {
    let ca = Ca::start().await;
    let agent = ca.join(NODE).await;
    let report = agent_message::Message::Report(chancery_proto::chancery::v1::Report::default());
    let messages = tokio_stream::iter([AgentMessage { message: Some(report) }]);
    let error = ca.connect(Some(&agent)).await.session(messages).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
}
