//! Trust roots as operators meet them: who may move them, and what the CA does by itself.

use chancery_proto::chancery::v1::root_service_client::RootServiceClient;
use chancery_proto::chancery::v1::{
    AnswerRootRequest, CheckGateRequest, DistrustRootRequest, ListRootsRequest, MoveRootRequest, PrepareRootRequest, RequestRootRequest,
    RootRecord, RootState,
};
use tonic::Code;
use tonic::transport::Channel;

use crate::roles::{ROLES, refused, svid_of};
use crate::support::{Ca, NODE};

async fn as_somebody(ca: &Ca, account: &str) -> RootServiceClient<Channel> {
    let agent = ca.join(NODE).await;
    let svid = svid_of(ca, &agent, account).await;
    RootServiceClient::new(ca.channel(Some(&svid)).await.unwrap())
}

async fn roots(client: &mut RootServiceClient<Channel>) -> Vec<RootRecord> {
    client.list_roots(ListRootsRequest {}).await.unwrap().into_inner().roots
}

fn to(state: RootState, reason: &str) -> MoveRootRequest {
    MoveRootRequest { to: state.into(), reason: reason.into(), ..MoveRootRequest::default() }
}

#[tokio::test]
async fn an_auditor_sees_the_roots_and_what_holds_them_and_moves_none() {
    let ca = Ca::start_with(ROLES).await;
    let mut bob = as_somebody(&ca, "bob").await;
    let found = roots(&mut bob).await;
    assert_eq!((found.len(), found[0].state()), (1, RootState::Active));
    let root = found[0].fingerprint.clone();
    let gate = CheckGateRequest { root: root.clone(), to: RootState::Retired.into(), overrides: None };
    bob.check_gate(gate).await.unwrap();
    let reason = || "I think so".to_owned();
    let errors = [
        bob.prepare_root(PrepareRootRequest { reason: reason(), ..PrepareRootRequest::default() }).await.unwrap_err(),
        bob.request_root(RequestRootRequest { reason: reason() }).await.unwrap_err(),
        bob.answer_root(AnswerRootRequest { reason: reason(), certificates: Vec::new() }).await.unwrap_err(),
        bob.move_root(to(RootState::Published, "I think so")).await.unwrap_err(),
        bob.distrust_root(DistrustRootRequest { root, reason: reason(), deadline_ms: None }).await.unwrap_err(),
    ];
    assert!(errors.iter().all(|error| error.code() == Code::PermissionDenied), "{errors:?}");
    assert_eq!(roots(&mut bob).await, found);
    assert_eq!(refused(&ca).await.last().unwrap().1, "role");
}

#[tokio::test]
async fn a_transition_that_is_held_is_refused_with_who_holds_it_and_the_refusal_is_recorded() {
    let ca = Ca::start_with(ROLES).await;
    let mut alice = as_somebody(&ca, "alice").await;
    assert_eq!(
        alice.prepare_root(PrepareRootRequest { reason: " ".into(), ..PrepareRootRequest::default() }).await.unwrap_err().code(),
        Code::InvalidArgument
    );
    let prepared =
        alice.prepare_root(PrepareRootRequest { reason: "yearly".into(), ..PrepareRootRequest::default() }).await.unwrap().into_inner();
    assert!(prepared.changed && prepared.root.unwrap().state() == RootState::Prepared);
    assert!(alice.move_root(to(RootState::Published, "yearly")).await.unwrap().into_inner().changed);
    // The agent that joined has opened no session.
    let error = alice.move_root(to(RootState::Active, "yearly")).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    assert!(error.message().contains("has not reported since the CA started"), "{error}");
    assert_eq!(refused(&ca).await[0].1, "gate");
    let error = alice.move_root(to(RootState::Draining, "yearly")).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
}

#[tokio::test]
async fn what_no_corporate_ca_signed_for_this_one_is_refused_and_too_much_of_it_unread() {
    let ca = Ca::start_with(ROLES).await;
    let mut alice = as_somebody(&ca, "alice").await;
    let request = || RequestRootRequest { reason: "under the corporate CA".into() };
    let asked = alice.request_root(request()).await.unwrap().into_inner();
    assert!(asked.changed && !asked.csr.is_empty());
    let again = alice.request_root(request()).await.unwrap().into_inner();
    assert_eq!((again.csr, again.changed), (asked.csr, false));
    let found = roots(&mut alice).await;
    let answer = |certificates| AnswerRootRequest { reason: "signed".into(), certificates };
    for (certificates, code) in [
        (Vec::new(), Code::FailedPrecondition),
        (vec![b"no certificate".to_vec()], Code::FailedPrecondition),
        (vec![vec![0; 9000]], Code::InvalidArgument),
        (vec![vec![0]; 17], Code::InvalidArgument),
    ] {
        let error = alice.answer_root(answer(certificates)).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
    }
    // A certificate of its own that is known already is no answer either: it changes nothing.
    let known = alice.answer_root(answer(vec![found[0].certificate.clone()])).await.unwrap().into_inner();
    assert!(!known.changed);
    assert_eq!(roots(&mut alice).await, found);
    assert_eq!(refused(&ca).await.last().unwrap().1, "not_requested");
}

#[tokio::test]
async fn a_ca_that_is_to_keep_a_replacement_publishes_one_by_itself() {
    let ca = Ca::start_with(&format!("[rotation]\nkeep_replacement = true\n{ROLES}")).await;
    let has_both = |status: &chancery_proto::chancery::v1::StatusResponse| {
        let mut states: Vec<_> = status.authorities.iter().filter(|one| one.root).map(|one| one.state.as_str()).collect();
        states.sort_unstable();
        states == ["active", "published"]
    };
    ca.until("a replacement", has_both).await;
    let mut alice = as_somebody(&ca, "alice").await;
    let active = roots(&mut alice).await.into_iter().find(|root| root.state() == RootState::Active).unwrap().fingerprint;
    let request = DistrustRootRequest { root: active.clone(), reason: "stolen".into(), deadline_ms: Some(0) };
    let gone = alice.distrust_root(request).await.unwrap().into_inner().root.unwrap();
    assert_eq!((gone.state(), gone.fingerprint), (RootState::Distrusted, active));
    ca.until("another replacement", has_both).await;
}
