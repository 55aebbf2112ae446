//! The ledgers that `make bench` fills are such as a CA leaves behind.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::time::Duration;

use chancery_tests::ca::Ca;
use chancery_tests::lab::Lab;
use chancery_tests::ledger::{Filler, PODS, Pod};

/// As `QUICK=1 make bench` has it. Each pod of the first has been issued to many times.
const ENTRIES: u64 = 300_000;

#[tokio::test(flavor = "multi_thread")]
async fn a_filled_ledger_is_opened_and_each_issuance_found() {
    let lab = Lab::new().unwrap();
    // Too much for the memory that a lab may be in.
    let disk = tempfile::tempdir().unwrap();
    let mut ca = Ca::start_in(&lab, &disk.path().join("ca"), Duration::from_secs(3600), "").await.unwrap();
    ca.stop().await.unwrap();
    let filler = Filler::open(ca.data()).await.unwrap();
    filler.fill(ENTRIES - 1000).await.unwrap();
    filler.time(1000).await.unwrap();
    let serial = filler.serial(200_000).await.unwrap().unwrap().to_string();
    filler.close().await.unwrap();

    ca.run(&lab).await.unwrap();
    for number in [0, 123_456, ENTRIES - 1] {
        let Pod { namespace, name, uid, .. } = Pod::of(number);
        for pod in [format!("{namespace}/{name}"), uid.to_string()] {
            let found = ca.ask(&["identity", "list", "--pod", &pod, "--unexpired"]).unwrap();
            assert_eq!(found.as_array().unwrap().len() as u64, ENTRIES / PODS, "{pod}: {found}");
        }
    }
    assert_eq!(ca.ask(&["identity", "show", &serial]).unwrap()["serial"], serial);
    assert_eq!(ca.ask(&["log", "prove", &serial]).unwrap()["entry"], 200_000);
    assert!(ca.ask(&["status"]).unwrap()["ledger_entries"].as_u64().unwrap() > ENTRIES);
    ca.stop().await.unwrap();
    let verified = ca.ask(&["log", "verify", "--data-dir", ca.data().to_str().unwrap()]).unwrap();
    assert!(verified["verdict"] == "intact" && verified["entries"].as_u64().unwrap() > ENTRIES, "{verified}");
}
