//! The real program: signals, reloads, crashes, and forgetting.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail wherever it likes")]

mod sds_support;
mod support;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use sds_support::proxy::{Proxy, certificate, secret};
use support::{FakeCa, Place, TokenPlan, eventually};
use uuid::Uuid;

fn text(output: &std::process::Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

async fn proxy(ca: &FakeCa, place: &Place) -> Proxy {
    let token = ca.token(&TokenPlan::pod(10, "shop", "cart"));
    Proxy::connect(&place.sds_socket()).await.with_authorization(Some(&format!("Bearer {}", token.secret())))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_sigterm_ends_in_order() {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let agent = place.run(&ca);
    agent.ready().await;
    agent.signal(Signal::TERM);
    assert_eq!(agent.ended().await.code(), Some(0));
    assert!(!place.sds_socket().exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_sigterm_ends_at_once() {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let agent = place.run(&ca);
    agent.ready().await;
    // A proxy that answers nothing, not even HTTP/2's pings, is waited for; it begins with a preface and empty settings.
    let mut hanging = UnixStream::connect(place.sds_socket()).unwrap();
    hanging.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00").unwrap();
    tokio::time::sleep(sds_support::QUIET).await;
    agent.signal(Signal::TERM);
    eventually("the first signal is heard", || agent.log().contains("a second signal ends at once")).await;
    let second = Instant::now();
    agent.signal(Signal::TERM);
    assert_eq!(agent.ended().await.code(), Some(130));
    assert!(second.elapsed().as_millis() < 1000, "it took {:?}", second.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_a_proxy_received_survives_a_sigkill_right_after() {
    let mut ca = FakeCa::start();
    let place = Place::new(&ca);
    let agent = place.run(&ca);
    agent.ready().await;
    let mut stream = proxy(&ca, &place).await.world(&["default"]).await;
    let received = certificate(&secret(&stream.next().await.resources));
    agent.signal(Signal::KILL);
    agent.ended().await;
    ca.kill();

    let agent = place.run(&ca);
    eventually("the agent listens", || UnixStream::connect(place.sds_socket()).is_ok()).await;
    let mut stream = proxy(&ca, &place).await.world(&["default"]).await;
    assert_eq!(certificate(&secret(&stream.next().await.resources)), received);
    agent.signal(Signal::TERM);
    agent.ended().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reset_forgets_the_state_of_a_stopped_agent_and_of_no_running_one() {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let agent = place.run(&ca);
    agent.ready().await;
    let refused = place.ask(&["reset"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused).contains("stop it first"), "{}", text(&refused));
    assert!(place.state_file().exists());

    agent.signal(Signal::TERM);
    agent.ended().await;
    let forgotten = place.ask(&["reset"]);
    assert!(forgotten.status.success() && text(&forgotten).contains("forgotten"), "{}", text(&forgotten));
    assert!(!place.state_file().exists());
    let again = place.ask(&["reset"]);
    assert!(again.status.success() && text(&again).contains("there is none"), "{}", text(&again));

    let agent = place.run(&ca);
    agent.ready().await;
    assert_eq!(ca.behaviour.joins.load(Ordering::SeqCst), 2, "it starts over by its token");
    agent.signal(Signal::TERM);
    agent.ended().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_agent_takes_over_the_log_level_and_refuses_everything_else_by_name() {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let agent = place.run(&ca);
    agent.ready().await;
    assert_eq!(agent.metric("config_last_reload_successful"), "1");
    place.write_config(&ca, agent.http, "log.level = \"debug\"\nlimits.batch = 7\nrenewal.from = 0.3");
    eventually("it is refused", || agent.metric("config_last_reload_successful") == "0").await;
    assert_eq!(agent.metric("config_refused_total"), "1");
    let named = "these keys take effect only after a restart: renewal, limits; nothing was changed";
    assert!(agent.log().contains(named), "{}", agent.log());
    let status = place.ask(&["status"]);
    assert!(text(&status).contains(named), "{}", text(&status));
    let check = place.ask(&["check"]);
    assert!(check.status.success(), "{}", text(&check));
    assert!(text(&check).contains("the running agent has not taken it over") && text(&check).contains(named), "{}", text(&check));
    assert!(!agent.log().contains("DEBUG"), "not even the log level was taken over");

    agent.signal(Signal::HUP);
    eventually("it is read again on SIGHUP", || agent.metric("config_refused_total") == "2").await;

    place.write_config(&ca, agent.http, "");
    eventually("it is put back", || agent.log().contains("the configuration on disk is the one in force again")).await;

    place.write_config(&ca, agent.http, "log.level = \"debug\"");
    eventually("it is in force", || agent.log().contains("the changed configuration is in force")).await;
    assert!(!text(&place.ask(&["status"])).contains("not in force"));
    let _stream = proxy(&ca, &place).await.world(&["default"]).await.next().await;
    eventually("the level is the new one", || agent.log().contains("DEBUG")).await;
    agent.signal(Signal::TERM);
    agent.ended().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_whose_configuration_was_broken_answers_at_its_socket() {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let agent = place.run(&ca);
    agent.ready().await;
    place.write_config(&ca, agent.http, "batches = 7");
    let socket = place.directory.path().join("admin.sock");
    let status = place.ask(&["status", "-o", "json", "--socket", socket.to_str().unwrap()]);
    assert!(status.status.success() && text(&status).contains("\"trust_sequence\""), "{}", text(&status));
    if !chancery_agent::config::default_admin_socket().exists() {
        let streams = place.ask(&["streams"]);
        assert!(!streams.status.success() && text(&streams).contains("(--socket PATH asks"), "{}", text(&streams));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_stream_is_logged_with_its_pod_if_its_token_verifies() {
    let ca = FakeCa::start();
    let place = Place::new(&ca);
    let agent = place.run(&ca);
    agent.ready().await;
    let plan = |pod| TokenPlan::pod(10, "shop", pod);
    let verified = [
        TokenPlan { node: Uuid::from_u128(8), ..plan("elsewhere") },
        TokenPlan { life: Duration::ZERO, ..plan("expired") },
        TokenPlan { audience: "other", ..plan("other-audience") },
    ];
    let forged = plan("forged");
    let mut tokens = verified.each_ref().map(|plan| ca.token(plan).secret().to_owned()).to_vec();
    let other = FakeCa::start();
    tokens.push(other.token(&forged).secret().to_owned());
    for token in &tokens {
        let mut proxy = Proxy::connect(&place.sds_socket()).await.with_authorization(Some(&format!("Bearer {token}")));
        assert!(proxy.open_world().await.is_err());
    }
    let log = agent.log();
    for plan in &verified {
        let named = format!("namespace=\"shop\" pod=\"{0}-0\" service_account=\"{0}\"", plan.service_account);
        assert!(log.contains(&named), "{named}: {log}");
    }
    assert!(log.contains("signature does not verify"), "{log}");
    assert!(!log.contains("forged") && !tokens.iter().any(|token| log.contains(token)), "{log}");
}
