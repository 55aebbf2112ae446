//! A ledger that cannot be made durable, on a disk that fails when the test says so.

use std::path::Path;
use std::time::Duration;

use chancery_process::http::Readiness;
use chancery_proto::chancery::v1::Start;

use super::*;
use crate::ledger::Body;
use crate::store::embedded::faulty::FaultyFiles;

const SOON: Duration = Duration::from_secs(20);

fn config(directory: &Path) -> (Config, Mode) {
    let path = directory.join("ca.toml");
    std::fs::write(&path, "listen = \"127.0.0.1:0\"\nhttp_listen = \"127.0.0.1:0\"\n").unwrap();
    let mode = Mode::Development { data_dir: Some(directory.join("data")) };
    (Config::load(Some(&path), &mode).unwrap(), mode)
}

async fn opened(directory: &Path, disk: &FaultyFiles) -> Parts {
    let (config, _) = config(directory);
    let doors = Doors::open(&config).await.unwrap();
    let calls = Arc::new(CallMetrics::register(&mut Registry::default()));
    open::open(config, Arc::new(SystemClock), doors.directory, calls, Arc::new(disk.clone())).await.unwrap()
}

fn start_entry() -> Body {
    Body::Start(Start::default())
}

#[tokio::test]
async fn a_ca_whose_last_sync_failed_is_not_ready() {
    let (directory, disk) = (tempfile::tempdir().unwrap(), FaultyFiles::new(1));
    let parts = opened(directory.path(), &disk).await;
    assert_eq!(parts.readiness(), Readiness::Ready);
    disk.fail_every_sync();
    parts.ledger.append(start_entry()).await.unwrap_err();
    let Readiness::NotReady(reasons) = parts.readiness() else { panic!("it says that it can issue") };
    assert!(reasons[0].contains("could not be made durable"), "{reasons:?}");
    assert!(!parts.status().ready);
}

#[tokio::test]
async fn a_ca_whose_disk_is_full_is_not_ready_until_there_is_room() {
    let (directory, disk) = (tempfile::tempdir().unwrap(), FaultyFiles::new(2));
    let parts = opened(directory.path(), &disk).await;
    disk.set_capacity(Some(disk.used()));
    let large = || {
        Body::Configuration(chancery_proto::chancery::v1::ConfigurationChange { changed: vec!["x".repeat(60_000)], ..Default::default() })
    };
    // More than the segments that were allocated in advance.
    let fill = async { while parts.ledger.append(large()).await.is_ok() {} };
    tokio::time::timeout(SOON, fill).await.unwrap();
    assert!(matches!(parts.readiness(), Readiness::NotReady(_)), "{:?}", parts.readiness());
    disk.set_capacity(None);
    let recover = async { while parts.ledger.append(large()).await.is_err() {} };
    tokio::time::timeout(SOON, recover).await.unwrap();
    assert_eq!(parts.readiness(), Readiness::Ready);
}

#[tokio::test]
async fn a_failed_sync_ends_the_process_with_the_reason() {
    let (directory, disk) = (tempfile::tempdir().unwrap(), FaultyFiles::new(3));
    let (config, mode) = config(directory.path());
    let options = Options::new(config, mode.clone(), CancellationToken::new()).with_log_files(Arc::new(disk.clone()));
    let running = start(options).await.unwrap();
    disk.fail_every_sync();
    // The next thing that is recorded meets the failure: a change of the configuration.
    let text = "listen = \"127.0.0.1:0\"\nhttp_listen = \"127.0.0.1:0\"\n[log]\nlevel = \"debug\"\n";
    std::fs::write(directory.path().join("ca.toml"), text).unwrap();
    let error = tokio::time::timeout(SOON, running.finished()).await.unwrap().unwrap_err();
    assert!(matches!(error, ServeError::LedgerFailed(_)), "{error}");
}

#[tokio::test]
async fn damage_that_a_scrub_finds_is_an_alarm_and_stops_no_issuance() {
    use std::os::unix::fs::FileExt;

    let directory = tempfile::tempdir().unwrap();
    let (config, _) = config(directory.path());
    let doors = Doors::open(&config).await.unwrap();
    let calls = Arc::new(CallMetrics::register(&mut Registry::default()));
    let parts = open::open(config, Arc::new(SystemClock), doors.directory, calls, Arc::new(SystemFiles)).await.unwrap();
    scrub::once(&parts, u64::MAX).await;
    let intact = parts.scrubs.standing();
    assert!(intact.finished.is_some() && intact.bytes > 0 && intact.damage.is_none(), "{intact:?}");
    assert_eq!(parts.readiness(), Readiness::Ready);

    let log = directory.path().join("data/ledger/log");
    let segment = std::fs::read_dir(&log).unwrap().map(|file| file.unwrap().path()).find(|path| !path.ends_with("spare")).unwrap();
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&segment).unwrap();
    let (mut byte, place) = ([0], intact.bytes / 2);
    file.read_exact_at(&mut byte, place).unwrap();
    file.write_all_at(&[byte[0] ^ 1], place).unwrap();
    scrub::once(&parts, u64::MAX).await;
    let Readiness::Degraded(reasons) = parts.readiness() else { panic!("nobody is alarmed") };
    assert!(reasons[0].contains("the ledger is damaged at") && reasons[0].contains(&segment.display().to_string()), "{reasons:?}");
    let mut readings = parts.readings().into_iter();
    assert!(readings.any(|reading| reading == crate::telemetry::Reading::one("chancery_ledger_damaged", reading.help, 1.0)));
    parts.ledger.append(start_entry()).await.unwrap();
}
