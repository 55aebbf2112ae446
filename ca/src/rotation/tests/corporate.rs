//! Under a corporate CA: what goes on by itself, and what waits for an operator.

use super::world::{WHY, World};
use crate::authority::testing::Corporate;
use crate::rotation::*;

/// Brings a root that the corporate CA signed.
async fn bring(world: &World, corporate: &Corporate) -> Fingerprint {
    let (csr, _) = world.rotation.request("local:uid=0", WHY).await.unwrap();
    let signed = corporate.sign(&csr, world.ca.clock.now(), |_| ());
    world.rotation.answer(vec![signed], "local:uid=0", WHY).await.unwrap().root
}

#[tokio::test(start_paused = true)]
async fn what_an_operator_brings_is_kept_published_in_the_place_of_what_the_ca_made_and_nothing_else_is_made_after_it() {
    let (world, corporate) = (World::new(0).await, Corporate::new());
    world.rotation.configure(Settings { keep_replacement: Some(true), ..Settings::default() });
    world.rotation.walk_on().await.unwrap();
    let own = world.rotation.find(None, &[RootState::Published]).unwrap();
    let first = bring(&world, &corporate).await;
    world.rotation.walk_on().await.unwrap();
    assert_eq!((world.state_of(first), world.state_of(own)), (RootState::Published, RootState::Retired));

    let overrides = Overrides { force: true, ..Overrides::default() };
    let order = Order { actor: "local:uid=0", why: WHY, overrides: &overrides };
    let old = world.run.authority.root_fingerprint();
    world.rotation.activate(None, order).await.unwrap();
    world.rotation.retire(None, order).await.unwrap();
    assert_eq!((world.state_of(first), world.state_of(old)), (RootState::Active, RootState::Retired));
    let entries = world.run.ledger.entries();
    world.rotation.walk_on().await.unwrap();
    assert_eq!(world.run.ledger.entries(), entries, "the CA makes no root by itself any more");
    let refused = world.rotation.distrust(&first.to_string(), Duration::ZERO, order).await.unwrap_err();
    assert!(matches!(refused, RotationError::Authority(AuthorityError::Corporate { .. })), "{refused}");
    assert_eq!(
        (world.state_of(first), world.run.ledger.entries()),
        (RootState::Active, entries),
        "nothing is begun that cannot be finished"
    );

    let second = bring(&world, &corporate).await;
    world.rotation.walk_on().await.unwrap();
    assert_eq!(world.state_of(second), RootState::Published);
    world.rotation.distrust(&first.to_string(), Duration::ZERO, order).await.unwrap();
    assert_eq!((world.state_of(first), world.state_of(second)), (RootState::Distrusted, RootState::Active));
}
