use chancery_proto::chancery::v1 as wire;
use proptest::prelude::*;
use prost::Message;

use super::*;
use crate::ledger::entry::{ENTRY_VERSION, encode_prefix};
use crate::store::Terms;

fn encode(body: Body, time_ms: i64) -> Bytes {
    let mut bytes = Vec::new();
    encode_prefix(time_ms, &mut bytes);
    body.encode_body(&mut bytes);
    bytes.into()
}

fn uid() -> impl Strategy<Value = Option<Uuid>> {
    any::<Option<u128>>().prop_map(|uid| uid.map(Uuid::from_u128))
}

fn token_id() -> impl Strategy<Value = String> {
    prop_oneof![any::<u128>().prop_map(|id| Uuid::from_u128(id).to_string()), "[a-zA-Z0-9-]{0,40}", "[a-z]{16}", "[A-F]{8}-[A-F]{4}"]
}

prop_compose! {
    fn any_issuance()(
        certificate in any::<Vec<u8>>(),
        fingerprints in any::<([u8; 16], [u8; 16])>(),
        names in any::<[String; 5]>(),
        uids in [uid(), uid(), uid(), uid()],
        token_id in token_id(),
        request_id in any::<u128>(),
        trust_sequence in any::<u64>(),
        role in 0..3,
        reason in 0..6,
        provenance in prop_oneof![Just(Provenance::Issued), any::<u64>().prop_map(Provenance::CarriedOver), Just(Provenance::Recovered)],
    ) -> Issuance {
        let [cluster, node, namespace, service_account, pod] = names;
        let [node_uid, service_account_uid, pod_uid, sidecar_pod_uid] = uids;
        Issuance {
            certificate: certificate.into(),
            issuing_certificate: fingerprints.0,
            root: fingerprints.1,
            role: Role::try_from(role).unwrap(),
            reason: IssueReason::try_from(reason).unwrap(),
            cluster, node, node_uid, namespace, service_account, service_account_uid, pod, pod_uid, token_id,
            request_id: Uuid::from_u128(request_id),
            trust_sequence, sidecar_pod_uid, provenance,
        }
    }
}

proptest! {
    #[test]
    fn an_issuance_is_read_as_it_was_written(issuance in any_issuance(), time_ms in 0..i64::MAX) {
        let bytes = encode(issuance.clone().into(), time_ms);
        let entry = Entry::decode(bytes.clone()).unwrap();
        prop_assert_eq!(&entry.body, &Body::Issuance(Box::new(issuance)));
        prop_assert_eq!(entry.time_ms, time_ms);
        prop_assert_eq!(Entry::decode_time(&bytes).unwrap(), time_ms);
        prop_assert_eq!(entry.bytes(), &bytes);
        // Fields in order of their numbers: what any other protobuf library writes.
        prop_assert_eq!(wire::Entry::decode(bytes.clone()).unwrap().encode_to_vec(), bytes);
    }

    #[test]
    fn garbage_is_no_entry_and_harms_nothing(bytes in any::<Vec<u8>>()) {
        EntryTerms.terms(&bytes.clone().into());
        let _ = Entry::decode_time(&bytes);
        if let Ok(entry) = Entry::decode(bytes.clone().into()) {
            prop_assert_eq!(entry.bytes(), &bytes);
        }
    }
}

#[test]
fn every_kind_of_entry_is_read_as_it_was_written() {
    let bodies = [
        issuance(1).into(),
        Body::Act(wire::Act { actor: "local:uid=0".into(), ..wire::Act::default() }),
        Body::State(wire::State { epoch: 3, ..wire::State::default() }),
        start("1.2.3"),
        Body::Configuration(wire::ConfigurationChange { before: vec![1], after: vec![2], changed: vec!["policy".into()] }),
        Body::Authority(wire::AuthorityCertificate { certificate: vec![3], root: true }),
    ];
    for body in bodies {
        assert_eq!(Entry::decode(encode(body.clone(), 5)).unwrap().body, body);
    }
}

#[test]
fn a_newer_version_is_refused() {
    let newer = wire::Entry { version: ENTRY_VERSION + 1, time_ms: 5, body: None }.encode_to_vec();
    assert_eq!(Entry::decode_time(&newer), Err(EntryError::Version(2)));
    assert_eq!(Entry::decode(newer.into()), Err(EntryError::Version(2)));
    assert_eq!(Entry::decode(Bytes::new()), Err(EntryError::Version(0)));
}

#[test]
fn an_entry_without_a_body_or_with_a_broken_field_is_refused() {
    let field = |entry: wire::Entry| match Entry::decode(entry.encode_to_vec().into()) {
        Err(EntryError::Field { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    assert_eq!(field(wire::Entry { version: 1, ..wire::Entry::default() }), "body");
    let broken = |change: fn(&mut wire::Issuance)| {
        let mut issuance = wire::Issuance::from(issuance(1));
        change(&mut issuance);
        field(wire::Entry { version: 1, time_ms: 1, body: Some(wire::entry::Body::Issuance(issuance)) })
    };
    assert_eq!(broken(|issuance| issuance.root = Bytes::from_static(b"short")), "root");
    assert_eq!(broken(|issuance| issuance.pod_uid = Bytes::from_static(b"short")), "pod_uid");
    assert_eq!(broken(|issuance| issuance.request_id = Bytes::new()), "request_id");
}

/// A newer minor version adds fields: they are ignored, and the bytes stay as they are.
#[test]
fn fields_that_are_not_known_are_ignored_and_kept() {
    let body = Body::from(issuance(1));
    let mut bytes = encode(body.clone(), 5).to_vec();
    bytes.extend_from_slice(&[0xfa, 0x3f, 2, b'h', b'i']);
    let entry = Entry::decode(bytes.clone().into()).unwrap();
    assert_eq!(entry.body, body);
    assert_eq!(entry.bytes(), &bytes);
}

#[test]
fn the_asker_is_the_agent_or_the_sidecar() {
    let trust_domain = "example.org".parse().unwrap();
    let asker = |issuance: Issuance| issuance.asker(&trust_domain).map(|id| id.to_string());
    let sidecar = Issuance { role: Role::Sidecar, sidecar_pod_uid: Some(uuid(9)), ..issuance(1) };
    assert_eq!(asker(issuance(1)), Some(format!("spiffe://example.org/chancery/agent/east/{}", uuid(100))));
    assert_eq!(asker(sidecar), Some(format!("spiffe://example.org/chancery/sidecar/east/{}", uuid(9))));
    assert_eq!(asker(Issuance { role: Role::Unspecified, ..issuance(1) }), None);
}

/// The bytes stand in `docs/ledger.md`, for whoever reads the ledger without this code.
#[test]
fn the_example_in_the_documentation_is_what_it_says() {
    let documentation = include_str!("../../../../docs/ledger.md");
    let hex: String = documentation.split("```hex\n").nth(1).unwrap().split("```").next().unwrap().split_whitespace().collect();
    let entry = Entry::decode(hex::decode(hex).unwrap().into()).unwrap();
    let Body::Issuance(issuance) = entry.body.clone() else { panic!("{entry:?}") };
    let leaf = issuance.leaf().unwrap();
    let told = [
        entry.time_ms.to_string(),
        leaf.spiffe_id.to_string(),
        leaf.serial.to_string(),
        issuance.pod.clone(),
        issuance.request_id.to_string(),
    ];
    for text in told {
        assert!(documentation.contains(&text), "{text} is not in the text");
    }
    assert_eq!(encode(entry.body.clone(), entry.time_ms), entry.bytes());
}
