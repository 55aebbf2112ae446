//! The promise of the whole store, with all that it has beside the log and through the libraries that write it: **after a power cut in the middle
//! of any call, every acknowledged entry is there, is found by its terms, and is in the tree.**

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use chancery_identity::SystemClock;
use chancery_identity::checkpoint::leaf_hash;

use crate::store::contract::{WORDS, Words};
use crate::store::embedded::faulty::FaultyFiles;
use crate::store::embedded::power_cuts::{say, trace, traced_dir};
use crate::store::embedded::{EmbeddedStore, Options};
use crate::store::{Group, Store, StoreError, Term};

const LIFE: &str = "store::embedded::power_cuts::tests::a_process_lives_with_a_store";
const ACKNOWLEDGED: &str = "acknowledged ";
/// How many processes follow each other …
const LIVES: u64 = 12;
/// … and how many groups each commits.
const GROUPS: u64 = 3;

fn store_in(dir: &Path) -> PathBuf {
    dir.join("store")
}

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

/// For the process that is traced; in any other it does nothing.
#[tokio::test]
async fn a_process_lives_with_a_store() {
    let Some(dir) = traced_dir() else { return };
    for life in 0..LIVES {
        let store = EmbeddedStore::open(&store_in(&dir), options()).await.unwrap().store;
        for number in 0..GROUPS {
            let entries = commit(&store).await.unwrap();
            say(&format!("{ACKNOWLEDGED}{entries}"));
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

/// Opens what a power cut left, and compares everything that can be asked with what was committed.
async fn check(dir: PathBuf, said: String) -> Result<(), String> {
    let acknowledged = said.lines().rev().find_map(|line| line.strip_prefix(ACKNOWLEDGED)?.parse().ok()).unwrap_or(0);
    let store = EmbeddedStore::open(&store_in(&dir), options()).await.map_err(|error| format!("it does not open: {error}"))?.store;
    let head = store.head().await.map_err(|error| error.to_string())?.entries;
    if head != acknowledged && head != group_end(acknowledged) {
        return Err(format!("lost: it has {head} entries, and {acknowledged} were acknowledged"));
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
    let Some(traced) = trace(LIFE) else { return };
    traced.cut_everywhere(FaultyFiles::new(0), 1, check).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_sync_data_the_property_fails() {
    let Some(traced) = trace(LIFE) else { return };
    let disk = FaultyFiles::new(0);
    disk.ignore_sync_data();
    let failure = traced.cut_everywhere(disk, 1, check).await.unwrap_err();
    assert!(failure.contains("lost: ") || failure.contains("the log ends here"), "{failure}");
}
