//! Several roots: what each act makes of the authority, and that a kill between any two steps loses nothing.

use time::Duration as Span;

use super::{Duration, KeyType, leaf};
use crate::authority::testing::{Commits, Run, TestCa};
use crate::authority::*;
use crate::keys::{FileKeyManager, KeyManager};
use crate::ledger::acts::{Change, Overrides, RootState};

pub(super) async fn act(run: &Run, root: Fingerprint, to: RootState) {
    let change = Change::Root { root, to, overrides: Overrides::default() };
    run.ledger.act("local:uid=0", change, "a test").await.unwrap();
}

pub(super) async fn move_to(run: &Run, root: Fingerprint, to: RootState) {
    act(run, root, to).await;
    run.authority.apply().await.unwrap();
}

pub(super) fn bundle(run: &Run) -> Vec<Fingerprint> {
    run.authority.trust().borrow().own().x509_authorities().iter().map(Fingerprint::of).collect()
}

async fn prepare(run: &Run) -> Fingerprint {
    run.authority.prepare_root("local:uid=0", "a test").await.unwrap()
}

#[tokio::test]
async fn a_root_goes_through_its_life_and_each_act_has_its_effect_at_once() {
    let ca = TestCa::new();
    let run = ca.start().await;
    let old = run.authority.root_fingerprint();
    let sequence = || run.authority.trust().borrow().sequence;
    let first = sequence();
    let new = prepare(&run).await;
    assert_eq!((bundle(&run), sequence()), (vec![old], first), "nobody sees a prepared root");
    assert_eq!(prepare(&run).await, new, "there is one on its way already");

    move_to(&run, new, RootState::Published).await;
    assert_eq!((bundle(&run), run.authority.root_fingerprint()), (vec![old, new], old), "published, and nothing chains to it");
    let published = sequence();
    assert!(published > first);
    assert_eq!(prepare(&run).await, new);
    let ready = run.authority.roots().iter().find(|root| root.fingerprint == new).unwrap().issuing_until;
    assert!(ready.is_some(), "its issuing certificate is there before it is activated");
    let under_old = leaf(&run, ca.clock.now(), KeyType::EcdsaP256, Duration::from_secs(60)).await.unwrap();

    let entries = ca.store.len();
    move_to(&run, new, RootState::Active).await;
    assert_eq!(run.authority.root_fingerprint(), new);
    assert_eq!(bundle(&run), [old, new], "what the old one signed stays good");
    assert_eq!(ca.store.len(), entries + 2, "the act, and a server certificate under the new root at once");
    assert_eq!(Fingerprint::of(run.authority.server_certificate().load().cert.last().unwrap()), new);
    let under_new = leaf(&run, ca.clock.now(), KeyType::EcdsaP256, Duration::from_secs(60)).await.unwrap();
    for svid in [&under_old, &under_new] {
        svid.verify(&run.authority.trust().borrow(), ca.clock.now()).unwrap();
    }

    move_to(&run, old, RootState::Retired).await;
    assert_eq!(bundle(&run), [new]);
    assert!(under_old.verify(&run.authority.trust().borrow(), ca.clock.now()).is_err());
    under_new.verify(&run.authority.trust().borrow(), ca.clock.now()).unwrap();
    assert!(sequence() > published);
}

#[tokio::test]
async fn a_restart_in_any_state_goes_on_with_the_very_same_trust() {
    let ca = TestCa::new();
    let mut run = ca.start().await;
    let old = run.authority.root_fingerprint();
    let new = prepare(&run).await;
    for (root, to) in [(new, RootState::Published), (new, RootState::Active), (old, RootState::Distrusted)] {
        // The act is recorded, and the process killed before anything followed.
        act(&run, root, to).await;
        drop(run);
        run = ca.start().await;
        let (trust, signing) = (run.authority.trust().borrow().clone(), run.authority.root_fingerprint());
        assert_eq!(signing, if to == RootState::Published { old } else { new });
        let own = run.authority.issuer();
        leaf(&run, ca.clock.now(), KeyType::EcdsaP256, Duration::from_secs(60)).await.unwrap();
        run.authority.apply().await.unwrap();
        assert!(Arc::ptr_eq(&own, &run.authority.issuer()), "applying again changes nothing");
        drop(run);
        run = ca.start().await;
        assert_eq!(*run.authority.trust().borrow(), trust, "the same sequence has the same content");
    }
    assert_eq!(run.authority.trust().borrow().distrusted, [old]);
    assert_eq!(bundle(&run), [new]);
}

#[tokio::test]
async fn preparing_a_root_that_was_killed_halfway_goes_on_with_the_same_root() {
    let ca = TestCa::new();
    let run = ca.start().await;
    // Recorded, and the act did not follow.
    let made = run.authority.maker.root(&ca.settings, ca.clock.now()).await.unwrap();
    drop(run);
    let run = ca.start().await;
    assert_ne!(run.authority.root_fingerprint(), made.fingerprint);
    assert_eq!(prepare(&run).await, made.fingerprint);
}

#[tokio::test]
async fn a_first_start_that_was_killed_before_the_activation_goes_on_with_the_same_root() {
    let ca = TestCa::new();
    let run = ca.start().await;
    let root = run.authority.root_fingerprint();
    drop(run);
    // Up to the root's own entry, as in a ledger from before there were acts on roots.
    ca.store.cut(1);
    let run = ca.start().await;
    assert_eq!(run.authority.root_fingerprint(), root);
    assert_eq!(run.ledger.current_state().active_root(), Some(root));
}

#[tokio::test]
async fn leaves_are_signed_under_the_root_that_the_state_names_even_before_it_was_applied() {
    let ca = TestCa::new();
    let run = ca.start().await;
    let new = prepare(&run).await;
    move_to(&run, new, RootState::Published).await;
    act(&run, new, RootState::Active).await;
    let state = run.ledger.current_state();
    assert_eq!(run.authority.issuer_in(&state).await.unwrap().root_fingerprint(), new);
}

#[tokio::test]
async fn an_activation_that_cannot_be_followed_signs_nothing_under_the_old_root() {
    let ca = TestCa::new();
    let run = ca.start().await;
    let new = prepare(&run).await;
    let old = run.authority.issuer();
    // Published with no room for its issuing certificate, which then is not there at the activation.
    act(&run, new, RootState::Published).await;
    act(&run, new, RootState::Active).await;
    ca.store.set_commits(Commits::Full);
    let state = run.ledger.current_state();
    assert!(run.authority.issuer_in(&state).await.is_err());
    ca.store.set_commits(Commits::Work);
    let issuer = run.authority.issuer_in(&state).await.unwrap();
    assert_eq!((issuer.root_fingerprint(), issuer.root_fingerprint() == old.root_fingerprint()), (new, false));
}

#[tokio::test]
async fn keys_stay_while_something_they_signed_may_live_and_go_with_their_root() {
    let ca = TestCa::new();
    let run = ca.start().await;
    let old = run.authority.root_fingerprint();
    let new = prepare(&run).await;
    move_to(&run, new, RootState::Published).await;
    move_to(&run, new, RootState::Active).await;
    let keys = || async { FileKeyManager::open(run.directory.keys()).unwrap().list().await.unwrap().len() };
    run.authority.tick(ca.clock.now()).await.unwrap();
    assert_eq!(keys().await, 4, "two roots, each with an issuing key");
    move_to(&run, old, RootState::Retired).await;
    run.authority.tick(ca.clock.now()).await.unwrap();
    assert_eq!(keys().await, 4, "a batch under way may still sign");
    ca.clock.advance(Span::minutes(2));
    run.authority.tick(ca.clock.now()).await.unwrap();
    assert_eq!(keys().await, 2);
    drop(run);
    let run = ca.start().await;
    assert_eq!(run.authority.root_fingerprint(), new, "a retired root's key is not missed");
}

#[tokio::test]
async fn a_published_root_keeps_an_issuing_certificate_that_can_sign() {
    let ca = TestCa::new();
    let run = ca.start().await;
    let new = prepare(&run).await;
    move_to(&run, new, RootState::Published).await;
    ca.clock.advance(Span::days(30));
    run.authority.tick(ca.clock.now()).await.unwrap();
    move_to(&run, new, RootState::Active).await;
    leaf(&run, ca.clock.now(), KeyType::EcdsaP256, Duration::from_secs(60)).await.unwrap();
}
