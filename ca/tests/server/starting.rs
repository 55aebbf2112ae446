//! What a start is refused for, and what it leaves as it was.

use chancery_ca::config::{Config, Mode};
use chancery_ca::ledger::PublishError;
use chancery_ca::server::{self, ServeError};
use tokio_util::sync::CancellationToken;

use crate::support::{Ca, NODE, copy, issue};

/// Starts another CA; the reason why it did not.
async fn refused(text: &str, mode: Mode) -> ServeError {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ca.toml");
    std::fs::write(&path, text).unwrap();
    let config = Config::load(Some(&path), &mode).unwrap();
    let shutdown = CancellationToken::new();
    let started = server::start(server::Options::new(config, mode, shutdown.clone())).await;
    shutdown.cancel();
    started.expect_err("it started")
}

const ANY_PORTS: &str = "listen = \"127.0.0.1:0\"\nhttp_listen = \"127.0.0.1:0\"\n";

#[tokio::test]
async fn a_second_process_on_a_data_directory_is_refused() {
    let ca = Ca::start().await;
    let error = refused(ANY_PORTS, Mode::Development { data_dir: Some(ca.data_dir()) }).await;
    assert!(matches!(error, ServeError::Directory(_)) && error.to_string().contains("another chancery-ca"), "{error}");
    assert!(ca.status().await.ready, "the first one is not disturbed");
}

#[tokio::test]
async fn a_port_in_use_is_refused_and_nothing_is_written() {
    let ca = Ca::start().await;
    let elsewhere = tempfile::tempdir().unwrap();
    let data_dir = elsewhere.path().join("data");
    let text = format!("listen = \"{}\"\nhttp_listen = \"127.0.0.1:0\"\n", ca.running.address);
    let error = refused(&text, Mode::Development { data_dir: Some(data_dir.clone()) }).await;
    assert!(matches!(error, ServeError::Bind(_)), "{error}");
    assert!(error.to_string().contains(&ca.running.address.to_string()), "{error}");
    assert!(!data_dir.exists());
}

#[tokio::test]
async fn neither_kind_of_ca_opens_the_others_directory() {
    let directory = Ca::start().await.stop().await;
    let data_dir = directory.path().join("data");
    let socket = directory.path().join("admin.sock");
    let text = format!(
        "{ANY_PORTS}trust_domain = \"dev.chancery\"\ndata_dir = \"{}\"\nadmin_socket = \"{}\"\n",
        data_dir.display(),
        socket.display()
    );
    let error = refused(&text, Mode::Production).await;
    assert!(matches!(error, ServeError::Directory(_)) && error.to_string().contains("development"), "{error}");
}

#[tokio::test]
async fn a_later_start_reuses_root_and_ledger() {
    let ca = Ca::start().await;
    let agent = ca.join(NODE).await;
    let issued = issue(&mut ca.connect(Some(&agent)).await, ca.token(|_| ())).await.unwrap();
    let before = ca.status().await;
    let ca = Ca::try_start(ca.stop().await, "").await.unwrap();
    let after = ca.status().await;
    assert_eq!(before.authorities, after.authorities);
    assert!(after.ledger_entries > before.ledger_entries, "the start itself is an entry");
    // The certificates from before still count.
    assert!(issue(&mut ca.connect(Some(&agent)).await, ca.token(|_| ())).await.is_ok());
    assert_eq!(issued.id().as_str(), "spiffe://dev.chancery/ns/shop/sa/cart");
}

#[tokio::test]
async fn a_data_directory_that_others_may_enter_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let data_dir = directory.path().join("data");
    std::fs::create_dir(&data_dir).unwrap();
    std::fs::set_permissions(&data_dir, std::fs::Permissions::from_mode(0o755)).unwrap();
    let error = refused(ANY_PORTS, Mode::Development { data_dir: Some(data_dir) }).await;
    assert!(error.to_string().contains("chmod 0700"), "{error}");
}

#[tokio::test]
async fn an_old_backup_of_the_ledger_is_refused() {
    let directory = Ca::start().await.stop().await;
    let (ledger, backup) = (directory.path().join("data/ledger"), directory.path().join("backup"));
    copy(&ledger, &backup);
    let ca = Ca::try_start(directory, "").await.unwrap();
    let entries = ca.status().await.ledger_entries;
    let directory = ca.stop().await;
    std::fs::remove_dir_all(&ledger).unwrap();
    copy(&backup, &ledger);
    let data_dir = directory.path().join("data");
    let error = refused(ANY_PORTS, Mode::Development { data_dir: Some(data_dir) }).await;
    assert!(matches!(error, ServeError::Checkpoint(PublishError::EntriesMissing { published, .. }) if published == entries), "{error}");
    assert!(error.to_string().contains("chancery-ca restore"), "{error}");
}

#[tokio::test]
async fn what_is_published_shows_in_the_metrics() {
    let ca = Ca::start().await;
    let entries = ca.status().await.ledger_entries;
    ca.until_async("a checkpoint of all entries", async || {
        ca.get("/metrics").await.contains(&format!("chancery_ledger_checkpoint_entries {entries}.0"))
    })
    .await;
    assert!(ca.get("/metrics").await.contains("chancery_ledger_checkpoint_age_seconds"));
}
