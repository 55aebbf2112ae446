//! The whole store on the machine's own disk, and on a faulty one.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use chancery_identity::{Clock, SystemClock};
use tempfile::TempDir;
use time::OffsetDateTime;

use super::faulty::FaultyFiles;
use super::follower::Derived;
use super::{EmbeddedStore, Opened, Options};
use crate::store::contract::{self, Harness, WORDS, Words};
use crate::store::{Group, Head, SharedStore, Store, StoreError, Term};

#[derive(Debug, Default)]
struct TestClock(std::sync::Mutex<Duration>);

impl Clock for TestClock {
    fn now(&self) -> OffsetDateTime {
        OffsetDateTime::UNIX_EPOCH + *self.0.lock().unwrap()
    }
}

fn options() -> Options {
    Options { dictionary_dimensions: vec![WORDS], segment_bytes: 1 << 20, ..Options::new(Arc::new(Words), Arc::new(SystemClock)) }
}

async fn open(dir: &Path) -> EmbeddedStore {
    let Opened { store, repairs } = EmbeddedStore::open(dir, options()).await.unwrap();
    assert_eq!(repairs, Vec::<String>::new());
    store
}

async fn add(store: &EmbeddedStore, entries: &[&'static str]) -> Head {
    let entries = entries.iter().map(|entry| Bytes::from_static(entry.as_bytes())).collect();
    store.commit(store.head().await.unwrap(), Group { entries, raises_epoch: false }).await.unwrap()
}

fn word(word: &'static str) -> Term {
    Term { dimension: WORDS, value: Bytes::from_static(word.as_bytes()) }
}

struct Directories {
    dirs: std::sync::Mutex<Vec<TempDir>>,
    clock: Arc<TestClock>,
}

impl Directories {
    async fn open(&self, dir: &Path) -> SharedStore {
        let options = Options { clock: self.clock.clone(), ..options() };
        Arc::new(EmbeddedStore::open(dir, options).await.unwrap().store)
    }
}

#[async_trait]
impl Harness for Directories {
    async fn fresh(&self) -> SharedStore {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        self.dirs.lock().unwrap().push(dir);
        self.open(&path).await
    }

    async fn reopen(&self, store: SharedStore) -> SharedStore {
        store.close().await.unwrap();
        drop(store);
        let path = self.dirs.lock().unwrap().last().unwrap().path().to_owned();
        self.open(&path).await
    }

    fn advance(&self, by: Duration) {
        *self.clock.0.lock().unwrap() += by;
    }
}

#[tokio::test]
async fn the_embedded_store_passes_the_contract() {
    contract::passes(&Directories { dirs: std::sync::Mutex::default(), clock: Arc::default() }).await;
}

#[tokio::test]
async fn a_second_store_on_the_same_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(dir.path()).await;
    let refused = EmbeddedStore::open(dir.path(), options()).await.unwrap_err();
    assert!(matches!(&refused, StoreError::InUse(_)) && refused.to_string().contains(&*dir.path().to_string_lossy()), "{refused}");
    drop(first);
    open(dir.path()).await;
}

#[tokio::test]
async fn a_dropped_store_has_everything_when_it_is_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..5 {
        let store = open(dir.path()).await;
        assert_eq!(store.head().await.unwrap().entries, round * 2);
        add(&store, &["one", "two"]).await;
    }
}

#[tokio::test]
async fn a_deleted_index_is_built_anew() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    add(&store, &["one", "two", "one"]).await;
    store.close().await.unwrap();
    drop(store);
    let _ = std::fs::remove_dir_all(dir.path().join("index"));
    assert_eq!(open(dir.path()).await.look_up(&word("one"), u64::MAX, 9).await.unwrap(), [2, 0]);
}

#[tokio::test]
async fn an_index_of_entries_that_the_log_does_not_have_is_built_anew() {
    let (long, short) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for (dir, entries) in [(&long, ["one", "one", "one", "one"].as_slice()), (&short, &["two", "one"])] {
        let store = open(dir.path()).await;
        add(&store, entries).await;
        store.look_up(&word("one"), u64::MAX, 9).await.unwrap();
        store.close().await.unwrap();
    }
    let _ = std::fs::remove_dir_all(short.path().join("index"));
    let _ = std::fs::rename(long.path().join("index"), short.path().join("index"));
    assert_eq!(open(short.path()).await.look_up(&word("one"), u64::MAX, 9).await.unwrap(), [1]);
}

#[tokio::test]
async fn an_index_that_is_lost_while_the_store_is_open_never_answers_with_less() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    add(&store, &["one", "two", "one"]).await;
    for _ in 0..4 {
        store.look_up(&word("one"), u64::MAX, 9).await.unwrap();
        store.index.derived().clear().unwrap();
        assert_eq!(store.look_up(&word("one"), u64::MAX, 9).await.unwrap(), [2, 0]);
    }
}

#[tokio::test]
async fn the_index_catches_up_with_far_more_than_waits_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let entry = Bytes::from(format!("{:<10000}", "one"));
    for _ in 0..20 {
        let group = Group { entries: vec![entry.clone(); 50], raises_epoch: false };
        store.commit(store.head().await.unwrap(), group).await.unwrap();
    }
    assert_eq!(store.look_up(&word("one"), u64::MAX, 5000).await.unwrap().len(), 1000);
    assert_eq!(store.scrub(u64::MAX).await.unwrap() / 10_000_000, 1);
}

#[tokio::test]
async fn a_failed_sync_is_told_to_whoever_waits_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FaultyFiles::new(1);
    let opened = EmbeddedStore::open(dir.path(), Options { files: Arc::new(disk.clone()), ..options() }).await.unwrap();
    let store = Arc::new(opened.store);
    let head = add(&store, &["one"]).await;
    let waiting = tokio::spawn({
        let store = store.clone();
        async move { store.failed().await }
    });
    disk.fail_every_sync();
    let group = Group { entries: vec![Bytes::from_static(b"two")], raises_epoch: false };
    assert!(matches!(store.commit(head, group.clone()).await, Err(StoreError::NotDurable { .. })));
    assert!(matches!(waiting.await.unwrap(), StoreError::NotDurable { .. }));
    assert!(matches!(store.commit(head, group).await, Err(StoreError::NotDurable { .. })));
    assert_eq!(store.head().await.unwrap(), head);
}

#[tokio::test]
async fn a_commit_is_not_answered_before_its_sync_has_ended() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FaultyFiles::new(1);
    let store = EmbeddedStore::open(dir.path(), Options { files: Arc::new(disk.clone()), ..options() }).await.unwrap().store;
    disk.delay_syncs(Duration::from_millis(50));
    let begin = std::time::Instant::now();
    add(&store, &["one"]).await;
    assert!(begin.elapsed() >= Duration::from_millis(50));
    assert_eq!(store.syncs(), 1);
}

#[tokio::test]
async fn a_store_on_a_full_disk_goes_on_once_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FaultyFiles::new(1);
    let small = Options { files: Arc::new(disk.clone()), segment_bytes: 8192, act_reserve_bytes: 1024, ..options() };
    let store = EmbeddedStore::open(dir.path(), small).await.unwrap().store;
    disk.set_capacity(Some(disk.used()));
    let commit = async || {
        let group = Group { entries: vec![Bytes::from(vec![b'x'; 1000])], raises_epoch: false };
        store.commit(store.head().await.unwrap(), group).await
    };
    let mut refused = None;
    while refused.is_none() {
        refused = commit().await.err();
    }
    assert!(matches!(refused, Some(StoreError::Full { .. })), "{refused:?}");
    disk.set_capacity(None);
    commit().await.unwrap();
}

#[tokio::test]
async fn files_and_directories_are_private() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("ledger");
    let store = open(&root).await;
    add(&store, &["one"]).await;
    store.close().await.unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&root), mode(&root.join("log"))), (0o700, 0o700));
    for file in ["lock", "version", "checkpoint", "closed", "log/00000000000000000000.segment", "log/spare"] {
        assert_eq!(mode(&root.join(file)), 0o600, "{file}");
    }
}
