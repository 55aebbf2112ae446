//! Certificates whose entries were lost: what is recorded again, and what is not.

use super::*;
use crate::ledger::acts::{State, Subject};
use crate::ledger::{Identity, Provenance};

/// A CA whose ledger continues a lost one.
async fn after_a_loss() -> Fixture {
    let ca = TestCa::new();
    let loss = Change::AcceptedLoss {
        origin: "example.org/chancery/0123".into(),
        checkpoint: "note".into(),
        missing: 7..9,
        trust_floor: 1000,
        roots_kept_until: ca.clock.now() + time::Duration::hours(2),
        epoch: 1,
    };
    ca.ledger().await.accept_loss("local:uid=0", loss, "the disk is gone", |_| State::default()).await.unwrap();
    fixture_with(ca, |keys, _| keys).await
}

/// A certificate that this CA signed, and its ledger lacks.
async fn lost(f: &Fixture, id: &str) -> HeldCertificate {
    let (request, _) = csr::generate(KeyType::EcdsaP256, None).unwrap();
    let request = VerifiedCsr::from_der(&request).unwrap();
    let id = id.parse().unwrap();
    let lifetime = Duration::from_secs(3600);
    let leaf = LeafRequest { id: &id, dns_names: &[], public_key: &request.public_key, key_type: request.key_type, lifetime };
    let issuer = f.authority.issuer();
    let leaf = issuer.issue(&leaf, f.ca.clock.now()).await.unwrap();
    HeldCertificate {
        chain: vec![leaf.certificate, issuer.certificate().clone()],
        namespace: "shop".into(),
        service_account: "cart".into(),
        pod: "cart-1".into(),
        pod_uid: Some(pod_uid("shop", "cart-1")),
    }
}

async fn recorded(f: &Fixture, held: &HeldCertificate) -> Option<Identity> {
    let facts = chancery_identity::profile::check_leaf(&held.chain[0]).unwrap();
    f.ledger.show(facts.serial).await.unwrap()
}

const CART: &str = "spiffe://example.org/ns/shop/sa/cart";

#[tokio::test]
async fn a_certificate_whose_entry_was_lost_is_recorded_again_once_and_says_whose_word_that_is() {
    let f = after_a_loss().await;
    let own = HeldCertificate { namespace: String::new(), pod: String::new(), pod_uid: None, ..lost(&f, f.caller.id().as_str()).await };
    let held = [lost(&f, CART).await, own];
    assert_eq!(f.issuance.recover(&f.caller, held.to_vec()).await.unwrap(), 2);
    for held in &held {
        let identity = recorded(&f, held).await.unwrap();
        let entry = &identity.issuance;
        assert_eq!((entry.provenance, &entry.pod, entry.pod_uid), (Provenance::Recovered, &held.pod, held.pod_uid));
        assert_eq!((entry.node_uid, &identity.asker), (Some(node_uid("node-a")), &Some(f.caller.id().clone())));
        assert_eq!(entry.issuing_certificate, f.authority.issuer().certificate_id());
        assert_eq!(entry.root, f.authority.issuer().root_id());
    }
    assert_eq!(f.issuance.recover(&f.caller, held.to_vec()).await.unwrap(), 0, "the ledger has them");
    let issued = f.issue(f.request("cart-2").0).await.unwrap();
    let issued = HeldCertificate { chain: issued.chain, ..held[0].clone() };
    assert_eq!(f.issuance.recover(&f.caller, vec![issued]).await.unwrap(), 0, "nor what it was never without");
}

#[tokio::test]
async fn a_certificate_that_is_told_twice_at_once_is_recorded_once() {
    let f = after_a_loss().await;
    let (cart, till) = (lost(&f, CART).await, lost(&f, "spiffe://example.org/ns/shop/sa/till").await);
    let entries = f.ledger.entries();
    let one = f.issuance.recover(&f.caller, vec![cart.clone(), till.clone(), cart.clone()]);
    let (one, other) = tokio::join!(one, f.issuance.recover(&f.caller, vec![till, cart]));
    assert_eq!((one.unwrap() + other.unwrap(), f.ledger.entries() - entries), (2, 2));
}

#[tokio::test]
async fn nothing_is_recorded_that_this_ca_did_not_issue_or_that_is_anothers() {
    let (f, stranger) = (after_a_loss().await, after_a_loss().await);
    let good = lost(&f, CART).await;
    let sidecar = format!("spiffe://example.org/chancery/sidecar/east/{}", pod_uid("shop", "other"));
    let sidecar = Caller::from_peer(&sidecar.parse().unwrap(), f.authority.trust_domain()).unwrap();
    let refused = [
        (&f.caller, lost(&stranger, CART).await),
        (&f.caller, lost(&f, agent_on("node-b").id().as_str()).await),
        (&f.caller, lost(&f, "spiffe://example.org/chancery/ca").await),
        (&f.caller, HeldCertificate { chain: good.chain[..1].to_vec(), ..good.clone() }),
        (&f.caller, HeldCertificate { chain: vec![b"no certificate".to_vec().into(); 2], ..good.clone() }),
        (&f.caller, HeldCertificate { pod: "x".repeat(300), ..good.clone() }),
        (&sidecar, good.clone()),
    ];
    let entries = f.ledger.entries();
    for (caller, held) in refused {
        assert_eq!(f.issuance.recover(caller, vec![held.clone()]).await.unwrap(), 0, "{held:?}");
    }
    assert_eq!(f.ledger.entries(), entries);
    f.ca.clock.advance(time::Duration::minutes(61));
    assert_eq!(f.issuance.recover(&f.caller, vec![good]).await.unwrap(), 0, "it has expired");
    let late = lost(&f, CART).await;
    f.ca.clock.advance(time::Duration::minutes(59));
    assert_eq!(f.issuance.recover(&f.caller, vec![late]).await.unwrap(), 0, "whatever was lost has expired");
    let whole = fixture().await;
    let held = lost(&whole, CART).await;
    assert_eq!(whole.issuance.recover(&whole.caller, vec![held]).await.unwrap(), 0, "nothing was lost");
}

#[tokio::test]
async fn what_is_recovered_of_somebody_who_is_kept_from_certificates_is_revoked() {
    let f = after_a_loss().await;
    let revoke = Change::Revoke { subject: Subject::SpiffeId(CART.parse().unwrap()), until: f.ca.clock.now() };
    f.ledger.act("alice", revoke, "it was stolen").await.unwrap();
    let (cart, till) = (lost(&f, CART).await, lost(&f, "spiffe://example.org/ns/shop/sa/till").await);
    assert_eq!(f.issuance.recover(&f.caller, vec![cart.clone(), till.clone()]).await.unwrap(), 2);
    let state = f.ledger.current_state();
    for (held, revoked) in [(cart, true), (till, false)] {
        assert_eq!(state.is_revoked(chancery_identity::profile::check_leaf(&held.chain[0]).unwrap().serial), revoked);
    }
}
