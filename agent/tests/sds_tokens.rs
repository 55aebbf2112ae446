//! How a stream of the shared socket is ended once, so that its proxy comes back with a fresh token.

#![allow(clippy::unwrap_used, reason = "a test may fail wherever it likes")]

mod sds_support;

use sds_support::{CART, Serving, eventually, moment};

#[tokio::test]
async fn a_stream_is_ended_near_nine_tenths_of_its_tokens_life_and_not_twice() {
    let (serving, mut proxy, mut stream, held) = Serving::with_a_certificate().await;
    serving.at_part_of_the_tokens_life(0.87);
    stream.quiet().await;
    serving.at_part_of_the_tokens_life(0.93);
    stream.end().await.unwrap();

    let mut again = proxy.world_with(&["default"], &held).await;
    again.quiet().await;
    serving.at_part_of_the_tokens_life(1.5);
    again.quiet().await;
    assert!(serving.registry.list()[0].stale_token);
    assert!(serving.registry.problems().iter().any(|problem| problem.contains("same token")));
    serving.stub.ready("cart", serving.pki.svid(CART));
    again.accept(&["default"]).await;
    again.quiet().await;
}

#[tokio::test]
async fn a_proxy_that_comes_back_with_a_fresh_token_is_in_order() {
    let (serving, proxy, mut stream, held) = Serving::with_a_certificate().await;
    serving.at_part_of_the_tokens_life(0.93);
    stream.end().await.unwrap();
    serving.stub.accept("fresh", "cart", moment(0.8));
    let mut proxy = proxy.with_authorization(Some("Bearer fresh"));
    let mut again = proxy.world_with(&["default"], &held).await;
    again.quiet().await;
    assert!(!serving.registry.list()[0].stale_token);
    serving.at_part_of_the_tokens_life(1.75);
    again.end().await.unwrap();
}

#[tokio::test]
async fn a_stream_is_ended_after_a_push_if_one_comes_in_time() {
    let (serving, _proxy, mut stream, _held) = Serving::with_a_certificate().await;
    serving.at_part_of_the_tokens_life(0.86);
    stream.quiet().await;
    serving.stub.ready("cart", serving.pki.svid(CART));
    stream.accept(&["default"]).await;
    stream.end().await.unwrap();
}

#[tokio::test]
async fn no_stream_is_ended_while_the_ca_is_away() {
    let serving = Serving::ready();
    serving.stub.ca_reachable.send_replace(false);
    let mut proxy = serving.proxy().await;
    let mut stream = proxy.delta(&["default"], &[]).await;
    stream.accept().await;
    serving.acknowledged(1).await;
    serving.at_part_of_the_tokens_life(0.95);
    stream.quiet().await;
    serving.stub.ca_reachable.send_replace(true);
    // It comes back for many streams at once, so their ends are spread: within the next 4 % of the token's life.
    let mut part = 0.95;
    while serving.registry.len() == 1 {
        part += 0.001;
        serving.at_part_of_the_tokens_life(part);
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        assert!(part < 1.1, "the stream was not ended after the CA had come back");
    }
    stream.end().await.unwrap();
}

#[tokio::test]
async fn two_streams_of_one_proxy_are_never_away_at_once() {
    let (serving, proxy, mut bundle, mut leaf) = Serving::with_a_bundle_and_a_certificate().await;
    serving.at_part_of_the_tokens_life(0.93);
    eventually("one is ended", || serving.registry.len() == 1).await;
    tokio::time::sleep(sds_support::QUIET).await;
    assert_eq!(serving.registry.len(), 1);

    let name = if serving.registry.list()[0].names[0].name == "default" { "ROOTCA" } else { "default" };
    serving.stub.accept("fresh", "cart", moment(0.8));
    let mut fresh = proxy.with_authorization(Some("Bearer fresh"));
    let _back = fresh.open_world().await.unwrap();
    let ended = if name == "default" { bundle.end().await } else { leaf.end().await };
    ended.unwrap();
}

#[tokio::test]
async fn when_one_stream_came_back_with_the_same_token_the_others_are_left_alone() {
    let (serving, mut proxy, _bundle, _leaf) = Serving::with_a_bundle_and_a_certificate().await;
    serving.at_part_of_the_tokens_life(0.93);
    eventually("one is ended", || serving.registry.len() == 1).await;
    let _back = proxy.open_world().await.unwrap();
    eventually("both are named", || serving.registry.list().iter().filter(|stream| stream.stale_token).count() == 2).await;
    assert_eq!(serving.registry.len(), 2);
}
