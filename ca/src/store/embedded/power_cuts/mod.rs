//! The promise of the whole store, with all that it has beside the log and through the libraries that write it: **after a power cut in the middle
//! of any write, sync or change of a name, every acknowledged entry is there, is found by its terms, and is in the tree.**
//!
//! A process lives with a store on a real disk, while `strace` writes down what it does there. That is done once more to a disk that forgets
//! and tears ([`FaultyFiles`]), whose power is cut in the middle of each call; a store is opened on what is left.

mod replay;
mod trace;

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use bytes::Bytes;
use chancery_identity::SystemClock;
use chancery_identity::checkpoint::leaf_hash;
use tempfile::TempDir;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use self::replay::Replay;
use self::trace::Call;
use super::faulty::FaultyFiles;
use super::{EmbeddedStore, Options};
use crate::store::contract::{WORDS, Words};
use crate::store::{Group, Store, StoreError, Term};

/// Names the directory for the process that is traced.
const DIR: &str = "CHANCERY_POWER_CUT_DIR";
const STORE: &str = "store";
const SELF: &str = "store::embedded::power_cuts::a_process_lives_with_a_store";
const ACKNOWLEDGED: &str = "acknowledged ";
/// How many processes follow each other …
const LIVES: u64 = 12;
/// … and how many groups each commits.
const GROUPS: u64 = 3;
/// How many stores are looked at at a time.
const AT_ONCE: usize = 4;

fn options() -> Options {
    let options = Options::new(Arc::new(Words), Arc::new(SystemClock));
    Options { dictionary_dimensions: vec![WORDS], segment_bytes: 4096, act_reserve_bytes: 512, ..options }
}

/// Where the group that begins with the entry `first` ends.
fn group_end(first: u64) -> u64 {
    first + 1 + first % 4
}

fn entry(index: u64) -> String {
    format!("{:<150} all of-{} is-{index}", "x", index % 7)
}

fn group(first: u64) -> Group {
    Group { entries: (first..group_end(first)).map(|index| entry(index).into()).collect(), raises_epoch: first.is_multiple_of(5) }
}

async fn commit(store: &EmbeddedStore) -> Result<u64, StoreError> {
    let head = store.head().await?;
    Ok(store.commit(head, group(head.entries)).await?.entries)
}

/// Lives with a store, and says what was acknowledged; without the directory, which is named for the traced process, it does nothing.
#[tokio::test]
async fn a_process_lives_with_a_store() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    for life in 0..LIVES {
        let store = EmbeddedStore::open(Path::new(&dir), options()).await.unwrap().store;
        for number in 0..GROUPS {
            let entries = commit(&store).await.unwrap();
            writeln!(std::io::stdout(), "{ACKNOWLEDGED}{entries}").unwrap();
            if number == GROUPS / 2 {
                store.publish_checkpoint(store.head().await.unwrap()).await.unwrap();
                store.compare_and_swap("cell", None, Some(Bytes::from_static(b"there"))).await.unwrap();
            }
        }
        // Index and tree have all of it then, and write it when they are closed.
        is_whole(&store, store.head().await.unwrap().entries).await.unwrap();
        if life % 3 != 1 {
            store.close().await.unwrap();
        }
    }
}

fn trace(dir: &Path) -> Option<Vec<Call>> {
    if let Err(reason) = trace::is_possible() {
        skip(&reason);
        return None;
    }
    let mut process = Command::new(std::env::current_exe().unwrap());
    process.args([SELF, "--exact", "--nocapture", "--test-threads=1"]).env(DIR, dir.join(STORE));
    Some(trace::of(&process, dir))
}

/// Counts the test as skipped, by its name. In CI nothing may be skipped.
fn skip(reason: &str) {
    assert!(std::env::var_os("CI").is_none(), "{reason}; in CI that is a failure");
    if let Some(list) = std::env::var_os("CHANCERY_SKIPPED") {
        let test = std::thread::current().name().unwrap_or_default().to_owned();
        let mut list = OpenOptions::new().append(true).create(true).open(list).unwrap();
        list.write_all(format!("{test}: {reason}\n").as_bytes()).unwrap();
    }
}

fn in_memory() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// Cuts the power in the middle of every call; an error is the first store that is not as it must be.
async fn check_everywhere(disk: FaultyFiles, dir: &Path, calls: &[Call]) -> Result<(), String> {
    let mut replay = Replay::new(dir, disk);
    let (mut acknowledged, mut checks, at_once) = (0, JoinSet::new(), Arc::new(Semaphore::new(AT_ONCE)));
    for (number, call) in calls.iter().enumerate() {
        if let Call::Say(said) = call {
            let mut said = said.lines().filter_map(|line| line.strip_prefix(ACKNOWLEDGED)?.parse().ok());
            acknowledged = said.next_back().unwrap_or(acknowledged);
        }
        for round in (0..rounds()).filter(|_| Replay::is_change(call)) {
            let seed = number as u64 * rounds() + round;
            let turn = at_once.clone().acquire_owned().await.map_err(|error| error.to_string())?;
            let left = in_memory();
            replay.cut_power_in(call, seed, left.path()).map_err(|error| format!("{call:?}: {error}"))?;
            let place = format!("call {number}, seed {seed}, {}", name(call, dir));
            checks.spawn(async move {
                let checked = check(left.path(), acknowledged).await;
                drop(turn);
                checked.map_err(|error| format!("{place}, {acknowledged} entries acknowledged: {error}"))
            });
        }
        replay.apply(call).map_err(|error| format!("{call:?}: {error}"))?;
        while let Some(checked) = checks.try_join_next() {
            checked.map_err(|error| error.to_string())??;
        }
    }
    checks.join_all().await.into_iter().collect()
}

/// How often the power is cut in the middle of each call: what is left is another time something else.
fn rounds() -> u64 {
    if std::env::var_os("SOAK").is_some() { 10 } else { 1 }
}

/// Without content.
fn name(call: &Call, dir: &Path) -> String {
    match call {
        Call::Write(path, place, bytes) => format!("{} bytes written to {} at {place}", bytes.len(), path.display()),
        call => format!("{call:?}"),
    }
    .replace(&*dir.to_string_lossy(), "")
}

/// Opens what a power cut left, and compares everything that can be asked with what was committed.
async fn check(dir: &Path, acknowledged: u64) -> Result<(), String> {
    let store = EmbeddedStore::open(&dir.join(STORE), options()).await.map_err(|error| format!("it does not open: {error}"))?.store;
    let head = store.head().await.map_err(|error| error.to_string())?.entries;
    if head != acknowledged && head != group_end(acknowledged) {
        return Err(format!("lost: it has {head} entries"));
    }
    is_whole(&store, head).await?;
    let head = commit(&store).await.map_err(|error| format!("it takes no group: {error}"))?;
    is_whole(&store, head).await?;
    store.close().await.map_err(|error| error.to_string())
}

async fn is_whole(store: &EmbeddedStore, head: u64) -> Result<(), String> {
    let failed = |error: StoreError| error.to_string();
    let entries: Vec<Bytes> = (0..head).map(|index| entry(index).into()).collect();
    if store.read(0..head, usize::MAX).await.map_err(failed)? != entries {
        return Err("its entries are others".into());
    }
    if store.hashes(0, 0..head).await.map_err(failed)? != entries.iter().map(|entry| leaf_hash(entry)).collect::<Vec<_>>() {
        return Err("its tree is another".into());
    }
    let mut words = BTreeMap::<String, Vec<u64>>::new();
    for index in (0..head).rev() {
        for word in entry(index).split_whitespace() {
            words.entry(word.to_owned()).or_default().push(index);
        }
    }
    let values = store.values(WORDS, b"", None, usize::MAX).await.map_err(failed)?;
    if !values.iter().eq(words.keys()) {
        return Err(format!("it knows {} of {} words", values.len(), words.len()));
    }
    for (word, indexes) in words {
        let term = Term { dimension: 2, value: word.clone().into() };
        let found = store.look_up(&term, u64::MAX, usize::MAX).await.map_err(failed)?;
        if found != indexes {
            return Err(format!("{word} is found in {found:?}, and is in {indexes:?}"));
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_power_cut_in_the_middle_of_any_call_loses_nothing() {
    let dir = in_memory();
    let Some(calls) = trace(dir.path()) else { return };
    check_everywhere(FaultyFiles::new(0), dir.path(), &calls).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_sync_data_the_property_fails() {
    let dir = in_memory();
    let Some(calls) = trace(dir.path()) else { return };
    let disk = FaultyFiles::new(0);
    disk.ignore_sync_data();
    let failure = check_everywhere(disk, dir.path(), &calls).await.unwrap_err();
    assert!(failure.contains("lost: "), "{failure}");
}
