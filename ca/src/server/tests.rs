//! A ledger that cannot be made durable, on a disk that fails when the test says so.

use std::path::Path;
use std::time::Duration;

use chancery_process::http::Readiness;
use chancery_proto::chancery::v1::Start;

use super::*;
use crate::ledger::Body;
use crate::store::embedded::faulty::FaultyFiles;
use crate::telemetry::Values;

const SOON: Duration = Duration::from_secs(20);

fn config(directory: &Path) -> (Config, Mode) {
    let path = directory.join("ca.toml");
    std::fs::write(&path, "listen = \"127.0.0.1:0\"\nhttp_listen = \"127.0.0.1:0\"\n").unwrap();
    let mode = Mode::Development { data_dir: Some(directory.join("data")) };
    (Config::load(Some(&path), &mode).unwrap(), mode)
}

async fn opened(directory: &Path, disk: &FaultyFiles) -> Parts {
    try_opened(directory, Arc::new(disk.clone())).await.unwrap()
}

pub(super) async fn try_opened(directory: &Path, files: Arc<dyn LogFiles>) -> Result<Parts, ServeError> {
    let (config, _) = config(directory);
    let doors = Doors::open(&config).await?;
    let calls = Arc::new(CallMetrics::register(&mut Registry::default()));
    open::open(config, Arc::new(SystemClock), doors.directory, calls, files).await
}

/// What the gauge of this name says, or the one of its labels that is called `label`.
fn reading(parts: &Parts, name: &str, label: &str) -> f64 {
    let found = parts.readings().into_iter().find(|reading| reading.name == name).unwrap();
    match found.values {
        Values::One(value) => value,
        Values::Each(_, values) => values.into_iter().find(|(name, _)| name == label).unwrap().1,
    }
}

/// The one word that the metrics have for how the ledger stands.
fn recording(parts: &Parts) -> &'static str {
    let is_so = |state: &&str| reading(parts, "chancery_ledger_recording", state) > 0.5;
    let states: Vec<_> = LedgerHealth::NAMES.into_iter().filter(is_so).collect();
    assert_eq!(states.len(), 1, "{states:?}");
    states[0]
}

fn start_entry() -> Body {
    Body::Start(Start::default())
}

#[tokio::test]
async fn a_ca_whose_last_sync_failed_is_not_ready() {
    let (directory, disk) = (tempfile::tempdir().unwrap(), FaultyFiles::new(1));
    let parts = opened(directory.path(), &disk).await;
    assert_eq!((parts.readiness(), recording(&parts)), (Readiness::Ready, "ok"));
    disk.fail_every_sync();
    parts.ledger.append(start_entry()).await.unwrap_err();
    assert_eq!((recording(&parts), reading(&parts, "chancery_ready", "")), ("failed", 0.0));
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
    assert_eq!((recording(&parts), reading(&parts, "chancery_ready", "")), ("full", 0.0));
    disk.set_capacity(None);
    let recover = async { while parts.ledger.append(large()).await.is_err() {} };
    tokio::time::timeout(SOON, recover).await.unwrap();
    assert_eq!((parts.readiness(), recording(&parts)), (Readiness::Ready, "ok"));
}

#[tokio::test]
async fn on_a_disk_that_became_read_only_nothing_is_recorded_and_nothing_that_was_is_lost() {
    let (directory, disk) = (tempfile::tempdir().unwrap(), FaultyFiles::new(4));
    let parts = opened(directory.path(), &disk).await;
    parts.ledger.append(start_entry()).await.unwrap();
    let before = parts.ledger.entries();
    disk.make_read_only();
    let error = parts.ledger.append(start_entry()).await.unwrap_err();
    assert!(error.to_string().contains("Read-only file system"), "{error}");
    let Readiness::NotReady(reasons) = parts.readiness() else { panic!("it says that it can issue") };
    assert!(reasons[0].contains("Read-only file system"), "{reasons:?}");
    assert_eq!((recording(&parts), reading(&parts, "chancery_ready", "")), ("failed", 0.0));
    parts.ledger.close().await.ok();
    drop(parts);

    disk.no_more_faults();
    // The tasks of the first one end in their own time.
    let reopened = async {
        loop {
            match try_opened(directory.path(), Arc::new(disk.clone())).await {
                Ok(parts) => return parts,
                Err(error) => assert!(error.to_string().contains("in use"), "{error}"),
            }
        }
    };
    let parts = tokio::time::timeout(SOON, reopened).await.unwrap();
    assert!(parts.ledger.entries() >= before, "{} entries of {before}", parts.ledger.entries());
}

#[tokio::test]
async fn a_ca_whose_disk_is_slow_to_sync_goes_on_and_says_so_already_while_it_waits() {
    let (directory, disk) = (tempfile::tempdir().unwrap(), FaultyFiles::new(5));
    let parts = opened(directory.path(), &disk).await;
    let latency = || reading(&parts, "chancery_ledger_commit_latency_seconds", "");
    assert!(latency() < 1.0, "{}", latency());
    disk.delay_syncs(Duration::from_millis(1500));
    let is_slow = async {
        while latency() < 1.0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        parts.readiness()
    };
    let recorded = parts.ledger.append(start_entry());
    tokio::pin!(recorded);
    let while_it_waits = tokio::select! {
        while_it_waits = is_slow => while_it_waits,
        _ = &mut recorded => panic!("the sync was not slow"),
    };
    let Readiness::Degraded(reasons) = while_it_waits else { panic!("{while_it_waits:?}") };
    assert!(reasons[0].contains("issuance is slow, because the ledger's disk is"), "{reasons:?}");
    recorded.await.unwrap();
    assert!(latency() >= 1.5, "{}", latency());
    assert!(parts.diagnose().iter().any(|finding| finding.text.contains("issuance is slow")), "{:?}", parts.diagnose());

    disk.delay_syncs(Duration::ZERO);
    parts.ledger.append(start_entry()).await.unwrap();
    assert_eq!((parts.readiness(), recording(&parts)), (Readiness::Ready, "ok"));
}

#[tokio::test]
async fn how_long_the_ledgers_disk_lasts_is_a_metric_and_the_doctor_warns_in_time() {
    let directory = tempfile::tempdir().unwrap();
    let parts = try_opened(directory.path(), Arc::new(SystemFiles)).await.unwrap();
    let days = || reading(&parts, "chancery_ledger_disk_days_left", "");
    growth::look(&parts).await;
    assert!(days().is_infinite(), "of one look nothing can be told: {}", days());
    // The clock is behind what was noted: that begins anew, a day ago.
    let (used, free) = (1 << 40, 13 << 40);
    parts.growth.note(parts.clock.now() - time::Duration::DAY, 0, free);
    parts.growth.note(parts.clock.now(), used, free);
    assert!((days() - 13.0).abs() < 0.1, "{}", days());
    assert!(parts.diagnose().iter().any(|finding| finding.text.contains("full in 13.0 days")), "{:?}", parts.diagnose());
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
    let parts = try_opened(directory.path(), Arc::new(SystemFiles)).await.unwrap();
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
