//! The ledger on the TLS port: for auditors and admins, by gRPC and as files that other tools read.

use chancery_identity::X509Svid;
use chancery_identity::checkpoint::{CheckpointVerifier, verify_inclusion};
use chancery_proto::chancery::v1::log_service_client::LogServiceClient;
use chancery_proto::chancery::v1::prove_inclusion_request::Of;
use chancery_proto::chancery::v1::{GetCheckpointRequest, IdentityFilter, ProveInclusionRequest, ReadEntriesRequest};
use http_body_util::BodyExt;
use tonic::Code;
use tonic::body::Body;
use tower::ServiceExt;

use crate::support::{Ca, NODE, issue};

const ROLES: &str = "[roles]\nauditor = [\"spiffe://dev.chancery/ns/shop/sa/cart\"]\n";

/// GET over the TLS port: status and body.
async fn get(ca: &Ca, svid: Option<&X509Svid>, path: &str) -> (u16, Vec<u8>) {
    let request = http::Request::get(format!("http://ca{path}")).body(Body::empty()).unwrap();
    let answer = ca.channel(svid).await.unwrap().oneshot(request).await.unwrap();
    let status = answer.status().as_u16();
    (status, answer.into_body().collect().await.unwrap().to_bytes().to_vec())
}

#[tokio::test]
async fn an_auditor_verifies_an_entry_over_the_tls_port() {
    let ca = Ca::start_with(ROLES).await;
    let agent = ca.join(NODE).await;
    let auditor = issue(&mut ca.connect(Some(&agent)).await, ca.token(|_| ())).await.unwrap();
    let mut log = LogServiceClient::new(ca.channel(Some(&auditor)).await.unwrap());
    let of = Some(Of::Certificate(auditor.chain()[0].to_vec()));
    let proof = log.prove_inclusion(ProveInclusionRequest { of }).await.unwrap().into_inner();
    let key: CheckpointVerifier = proof.verifier_keys[0].parse().unwrap();
    let checkpoint = key.verify(&proof.note).unwrap();
    let hashes: Vec<[u8; 32]> = proof.hashes.iter().map(|hash| hash.as_slice().try_into().unwrap()).collect();
    verify_inclusion(&proof.bytes, proof.entry, &checkpoint, &hashes).unwrap();

    let (status, note) = get(&ca, Some(&auditor), "/ledger/checkpoint").await;
    assert_eq!(status, 200);
    let checkpoint = key.verify(&String::from_utf8(note).unwrap()).unwrap();
    let (status, tile) = get(&ca, Some(&auditor), &format!("/ledger/tile/0/000.p/{}", checkpoint.size)).await;
    assert_eq!((status, tile.len() as u64), (200, checkpoint.size * 32));
    assert_eq!(get(&ca, Some(&auditor), "/ledger/tile/0/000").await.0, 404);
}

#[tokio::test]
async fn strangers_learn_nothing_of_the_ledger() {
    let ca = Ca::start_with(ROLES).await;
    let agent = ca.join(NODE).await;
    for stranger in [Some(&agent), None] {
        for path in ["/ledger/checkpoint", "/ledger/tile/entries/000.p/1"] {
            let (answered, body) = get(&ca, stranger, path).await;
            assert_eq!(answered, 403, "{path}: {}", String::from_utf8_lossy(&body));
        }
        let mut log = LogServiceClient::new(ca.channel(stranger).await.unwrap());
        assert_eq!(log.get_checkpoint(GetCheckpointRequest {}).await.unwrap_err().code(), Code::PermissionDenied);
    }
}

#[tokio::test]
async fn entries_are_read_in_order_up_to_the_newest_checkpoint() {
    let ca = Ca::start_with(ROLES).await;
    let agent = ca.join(NODE).await;
    let auditor = issue(&mut ca.connect(Some(&agent)).await, ca.token(|_| ())).await.unwrap();
    let mut log = LogServiceClient::new(ca.channel(Some(&auditor)).await.unwrap());
    let everything = ReadEntriesRequest::default;
    let beyond = ReadEntriesRequest { end: 1000, ..everything() };
    assert_eq!(log.read_entries(beyond).await.unwrap_err().code(), Code::InvalidArgument);
    let mut export = log.read_entries(everything()).await.unwrap().into_inner();
    let read = export.message().await.unwrap().unwrap();
    assert_eq!((read.entries[0].index, read.entries.len() as u64), (0, read.next));
    assert!(export.message().await.unwrap().is_none());
    let filter = Some(IdentityFilter { pod: "shop/cart-0".into(), ..IdentityFilter::default() });
    let mut export = log.read_entries(ReadEntriesRequest { filter, ..everything() }).await.unwrap().into_inner();
    assert_eq!(export.message().await.unwrap().unwrap().entries.len(), 1);
}
