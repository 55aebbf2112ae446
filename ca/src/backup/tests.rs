//! Backups of logs with many segments.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use chancery_identity::SystemClock;
use chancery_identity::checkpoint::{Checkpoint, GrowingTree, leaf_hash, origin};
use time::OffsetDateTime;

use super::*;
use crate::ledger::EntryTerms;
use crate::store::embedded::{EmbeddedStore, Options};
use crate::store::{Group, Store};

const NOW: OffsetDateTime = time::macros::datetime!(2026-03-01 12:00 UTC);

async fn open(dir: &Path) -> EmbeddedStore {
    let options = Options { segment_bytes: 4096, act_reserve_bytes: 0, ..Options::new(Arc::new(EntryTerms), Arc::new(SystemClock)) };
    let opened = EmbeddedStore::open(&dir.join("ledger"), options).await.unwrap();
    assert_eq!(opened.repairs, Vec::<String>::new());
    opened.store
}

fn entry(number: u64) -> Bytes {
    Bytes::from(number.to_be_bytes().repeat(30))
}

/// Adds two entries at a time, up to `end`.
async fn fill(store: &EmbeddedStore, end: u64) {
    while store.head().await.unwrap().entries < end {
        let head = store.head().await.unwrap();
        let entries = (head.entries..head.entries + 2).map(entry).collect();
        store.commit(head, Group { entries, raises_epoch: false }).await.unwrap();
    }
}

/// What lies in a data directory besides the ledger, with a checkpoint of the first `size` entries.
fn furnish(data: &Path, store: &EmbeddedStore, size: u64) {
    let mut tree = GrowingTree::default();
    (0..size).for_each(|number| tree.push(leaf_hash(&entry(number))));
    let origin = origin(&"example.org".parse().unwrap(), store.log_id());
    let checkpoint = Checkpoint { origin, size, root: tree.root(), extensions: Vec::new() };
    fs::write(data.join(CHECKPOINT), format!("{checkpoint}\n— somebody c2ln\n")).unwrap();
    fs::write(data.join(KIND), "production\n").unwrap();
    fs::write(data.join("version"), "1\n").unwrap();
}

fn to_restore<'a>(backup: &'a Path, data_dir: &'a Path, checkpoints: &'a [PathBuf]) -> Restore<'a> {
    let (actor, clock) = ("local:uid=0".to_owned(), Arc::new(SystemClock));
    Restore { backup, data_dir, identity: None, checkpoints, loss: None, actor, clock }
}

#[tokio::test]
async fn whatever_a_checkpoint_covers_is_in_the_backup_and_nothing_else() {
    let place = tempfile::tempdir().unwrap();
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let data = place.path().join("data");
    let store = open(&data).await;
    fill(&store, 120).await;
    assert!(fs::read_dir(data.join("ledger/log")).unwrap().count() > 8);
    for size in (0..=120).step_by(2) {
        furnish(&data, &store, size);
        let (to, restored) = (place.path().join(format!("{size}.tar")), place.path().join(size.to_string()));
        let written = create(&Backup { data_dir: &data, to: &to, recipient: None, now: NOW }, |_, _| ()).unwrap();
        assert_eq!((written.info.entries, last_backup(&data).unwrap().entries), (size, size));
        restore(&to_restore(&to, &restored, &[]), |_, _| ()).unwrap();
        let copy = open(&restored).await;
        assert_eq!((copy.log_id(), copy.head().await.unwrap().entries), (store.log_id(), size));
        fill(&copy, 130).await;
        assert_eq!(copy.read(0..130, usize::MAX).await.unwrap(), (0..130).map(entry).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn a_checkpoint_that_the_log_does_not_lead_to_makes_no_backup() {
    let place = tempfile::tempdir().unwrap();
    let (data, to) = (place.path().join("data"), place.path().join("to.tar"));
    let store = open(&data).await;
    fill(&store, 20).await;
    let refused = |size: u64, change: &dyn Fn(String) -> String| {
        furnish(&data, &store, size);
        let note = fs::read_to_string(data.join(CHECKPOINT)).unwrap();
        fs::write(data.join(CHECKPOINT), change(note)).unwrap();
        let error = create(&Backup { data_dir: &data, to: &to, recipient: None, now: NOW }, |_, _| ()).unwrap_err();
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 1, "something was left");
        error.to_string()
    };
    let error = refused(10, &|note| note.replace("\n10\n", "\n12\n"));
    assert!(error.contains("do not lead to its checkpoint"), "{error}");
    let error = refused(22, &|note| note);
    assert!(error.contains("no intact frame with entry 20"), "{error}");
    let error = refused(9, &|note| note);
    assert!(error.contains("none behind entry 9"), "{error}");
}

#[tokio::test]
async fn a_known_checkpoint_of_another_history_is_refused() {
    let place = tempfile::tempdir().unwrap();
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let (data, to) = (place.path().join("data"), place.path().join("to.tar"));
    let store = open(&data).await;
    fill(&store, 20).await;
    furnish(&data, &store, 20);
    create(&Backup { data_dir: &data, to: &to, recipient: None, now: NOW }, |_, _| ()).unwrap();
    let note = fs::read_to_string(data.join(CHECKPOINT)).unwrap();
    let root = note.lines().nth(2).unwrap();
    let other = place.path().join("other");
    fs::write(&other, note.replace("\n20\n", "\n9\n").replace(root, "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=")).unwrap();
    let restored = place.path().join("restored");
    let error = restore(&to_restore(&to, &restored, &[other]), |_, _| ());
    let error = error.unwrap_err().to_string();
    assert!(error.contains("the backup's first 9 entries are not those") && !restored.exists(), "{error}");
}

#[tokio::test]
async fn copies_of_certificates_which_can_be_newer_than_the_checkpoint_are_not_restored() {
    let place = tempfile::tempdir().unwrap();
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let (data, to, early) = (place.path().join("data"), place.path().join("to.tar"), place.path().join("early.tar"));
    let store = open(&data).await;
    fill(&store, 20).await;
    furnish(&data, &store, 20);
    create(&Backup { data_dir: &data, to: &to, recipient: None, now: NOW }, |_, _| ()).unwrap();
    let mut writer = archive::Writer::new(fs::File::create(&early).unwrap(), &early, NOW);
    let copy = |name: &str, bytes: Vec<u8>| {
        writer.add(name, &bytes)?;
        if name == INFO {
            writer.add("bundle.pem", b"a bundle")?;
            writer.add("authority/root-00.pem", b"a root")?;
        }
        Ok(())
    };
    archive::read(&to, copy).unwrap();
    writer.finish().unwrap();
    let restored = place.path().join("restored");
    restore(&to_restore(&early, &restored, &[]), |_, _| ()).unwrap();
    assert!(restored.join(KIND).exists() && !restored.join("bundle.pem").exists() && !restored.join("authority").exists());
}
