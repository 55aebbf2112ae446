//! What a restarted agent still knows, and what never reaches its state file.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail wherever it likes")]

mod support;

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use chancery_agent::svids::{AttachError, StateError, StateFile, SvidState, Token};
use chancery_identity::Clock;
use support::{CLUSTER, FakeCa, Place, Signer, TokenPlan, a_while, contains, eventually, ready, renewed, serves, trust_domain};
use uuid::Uuid;

fn cart() -> TokenPlan {
    TokenPlan::pod(10, "shop", "cart")
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_ca_a_restarted_agent_serves_a_pods_certificate_to_that_pod_alone() {
    let mut ca = FakeCa::start();
    let place = Place::new(&ca);
    let agent = place.start(&ca);
    let mut stream = agent.svids.attach(ca.token(&cart())).await.unwrap();
    let first = ready(&mut stream).await;
    ca.kill();
    agent.stop().await;

    let agent = place.start(&ca);
    let forged = Token::new(Signer::new("k1").token(&cart(), ca.clock.now()).into());
    let refused = agent.svids.attach(forged).await.unwrap_err();
    assert!(matches!(refused, AttachError::Unauthenticated { reason: "token_signature", .. }), "{refused:?}");
    let namesake = TokenPlan { pod: Uuid::from_u128(11), ..cart() };
    let other = agent.svids.attach(ca.token(&namesake)).await.unwrap();
    assert!(matches!(&*other.svid.borrow(), SvidState::Pending), "another pod of the same service account gets nothing");
    let mut same = agent.svids.attach(ca.token(&cart())).await.unwrap();
    assert!(serves(&same, &first), "at once");
    assert!(agent.svids.trust().borrow().is_some());

    ca.clock.advance(time::Duration::seconds(2400));
    ca.resume();
    renewed(&mut same, &first).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_certificate_is_not_served_after_a_restart() {
    let mut ca = FakeCa::start();
    let place = Place::new(&ca);
    let agent = place.start(&ca);
    let mut stream = agent.svids.attach(ca.token(&cart())).await.unwrap();
    ready(&mut stream).await;
    agent.stop().await;
    ca.kill();
    ca.clock.advance(time::Duration::seconds(3700));
    let agent = place.start(&ca);
    let stream = agent.svids.attach(ca.token(&cart())).await.unwrap();
    assert!(matches!(&*stream.svid.borrow(), SvidState::Pending));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_ends_in_order_has_written_its_newest_state() {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let agent = place.start(&ca);
    let mut stream = agent.svids.attach(ca.token(&cart())).await.unwrap();
    let first = ready(&mut stream).await;
    agent.stop().await;
    assert!(contains(&place.state_file(), &first.chain()[0]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_in_the_state_file_before_a_proxy_can_receive_it() {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let agent = place.start(&ca);
    agent.connected().await;
    let mut checks = tokio::task::JoinSet::new();
    for number in 10..60 {
        let mut stream = agent.svids.attach(ca.token(&TokenPlan::pod(number, "shop", "cart"))).await.unwrap();
        let file = place.state_file();
        checks.spawn(async move {
            let svid = ready(&mut stream).await;
            assert!(contains(&file, &svid.chain()[0]), "{number}: handed out, but a crash would forget it");
            stream
        });
    }
    let mut streams = checks.join_all().await;
    let before: Vec<_> = streams.iter().map(|stream| stream.svid.borrow().clone()).collect();
    ca.clock.advance(time::Duration::seconds(2400));
    for (stream, before) in streams.iter_mut().zip(before) {
        let SvidState::Ready(before) = before else { panic!("{before:?}") };
        let svid = renewed(stream, &before.svid).await;
        assert!(contains(&place.state_file(), &svid.chain()[0]), "a renewed one as well");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_that_cannot_be_written_keeps_no_certificate_from_a_proxy() {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let agent = place.start(&ca);
    agent.connected().await;
    std::fs::remove_dir_all(place.state_dir()).unwrap();
    let mut stream = agent.svids.attach(ca.token(&cart())).await.unwrap();
    ready(&mut stream).await;
    assert!(agent.metrics.state_failed.get() > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_state_file_is_private_and_holds_no_token() {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let agent = place.start(&ca);
    let token = ca.token(&cart());
    let mut stream = agent.svids.attach(token.clone()).await.unwrap();
    let first = ready(&mut stream).await;
    let file = place.state_file();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o7777;
    assert_eq!((mode(&file), mode(&place.state_dir())), (0o600, 0o700));
    assert!(contains(&file, first.key().secret_pkcs8()), "the search finds what is there");
    let own = std::fs::read_to_string(place.token_file()).unwrap();
    for secret in [token.secret(), own.trim()] {
        for part in secret.split('.') {
            assert!(!contains(&file, part.as_bytes()), "a part of a token is in the state file");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_agent_goes_on_with_its_own_certificate() {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let agent = place.start(&ca);
    agent.connected().await;
    agent.stop().await;
    std::fs::remove_file(place.token_file()).unwrap();
    let agent = place.start(&ca);
    agent.connected().await;
    assert_eq!(ca.behaviour.joins.load(std::sync::atomic::Ordering::SeqCst), 1);
}

#[test]
fn a_state_directory_on_a_disk_is_refused_unless_allowed() {
    let disk = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let directory = disk.path().join("state");
    let refused = StateFile::open(&directory, false, trust_domain(), CLUSTER.into()).unwrap_err();
    assert!(matches!(refused, StateError::OnDisk(_)), "{refused}");
    assert!(refused.to_string().contains("allow_disk_state"));
    assert!(!directory.exists());
    StateFile::open(&directory, true, trust_domain(), CLUSTER.into()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_of_another_cluster_or_that_others_may_read_or_that_is_garbage_is_refused() {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let agent = place.start(&ca);
    agent.connected().await;
    eventually("a state", || place.state_file().exists()).await;
    agent.stop().await;
    let load = |cluster: &str| {
        let file = StateFile::open(&place.state_dir(), false, trust_domain(), cluster.to_owned()).unwrap();
        file.load(ca.clock.now()).map(|_| ()).map_err(|error| error.to_string())
    };
    load(CLUSTER).unwrap();
    assert!(load("west").unwrap_err().contains("chancery-agent reset"));
    std::fs::set_permissions(place.state_file(), std::os::unix::fs::PermissionsExt::from_mode(0o640)).unwrap();
    assert!(load(CLUSTER).unwrap_err().contains("chmod"));
    std::fs::set_permissions(place.state_file(), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    // Field 1, the version, as a larger one.
    std::fs::write(place.state_file(), [8, 2]).unwrap();
    assert!(load(CLUSTER).unwrap_err().contains("has version 2"));
    std::fs::write(place.state_file(), [0xff; 64]).unwrap();
    assert!(load(CLUSTER).unwrap_err().contains("cannot be decoded"));
    a_while().await;
}
