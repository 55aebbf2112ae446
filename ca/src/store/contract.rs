//! What every [`Store`](super::Store) promises, as tests that each implementation passes.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use chancery_identity::checkpoint::{Hash, leaf_hash, root_of};

use super::{Group, Head, MAX_CELL_BYTES, MAX_ENTRY_BYTES, MAX_GROUP_ENTRIES, SharedStore, StoreError, Term, Terms};

/// The dimension of [`Words`] with a dictionary: the words of an entry. Dimension 2 is the same without one.
pub const WORDS: u8 = 1;

/// Entries are text, and each word is a term.
#[derive(Clone, Copy, Debug)]
pub struct Words;

impl Terms for Words {
    fn terms(&self, entry: &Bytes) -> Vec<Term> {
        let words = entry.split(|byte| *byte == b' ').filter(|word| !word.is_empty());
        words.flat_map(|word| [WORDS, 2].map(|dimension| Term { dimension, value: Bytes::copy_from_slice(word) })).collect()
    }
}

/// Makes stores of one implementation, with [`Words`] as terms and a dictionary of [`WORDS`].
#[async_trait]
pub trait Harness: Sync {
    /// An empty store.
    async fn fresh(&self) -> SharedStore;

    /// The same store, closed and opened again.
    async fn reopen(&self, store: SharedStore) -> SharedStore;

    /// Lets the clock that decides about leases go on.
    fn advance(&self, by: Duration);
}

/// Passes if the stores of `harness` keep every promise.
pub async fn passes(harness: &impl Harness) {
    groups_are_read_as_they_were_committed(harness).await;
    a_stale_head_is_refused(harness).await;
    of_two_commits_at_one_head_one_wins(harness).await;
    an_invalid_group_changes_nothing(harness).await;
    reading_is_bounded(harness).await;
    each_of_many_is_read_in_the_order_asked_for(harness).await;
    look_ups_are_newest_first_and_paged(harness).await;
    values_are_in_order_and_paged(harness).await;
    hashes_are_those_of_the_tree_over_the_entries(harness).await;
    cells_change_by_compare_and_swap(harness).await;
    a_lease_has_one_holder(harness).await;
    a_published_checkpoint_must_be_of_this_log(harness).await;
    everything_is_there_after_reopening(harness).await;
    a_closed_store_refuses(harness).await;
}

fn group(entries: &[&str]) -> Group {
    Group { entries: entries.iter().map(|entry| Bytes::copy_from_slice(entry.as_bytes())).collect(), raises_epoch: false }
}

async fn add(store: &SharedStore, entries: &[&str]) -> Head {
    store.commit(store.head().await.unwrap(), group(entries)).await.unwrap()
}

async fn all(store: &SharedStore) -> Vec<String> {
    let entries = store.read(0..store.head().await.unwrap().entries, usize::MAX).await.unwrap();
    entries.iter().map(|entry| String::from_utf8(entry.to_vec()).unwrap()).collect()
}

fn word(word: &'static str) -> Term {
    Term { dimension: 2, value: Bytes::from_static(word.as_bytes()) }
}

async fn groups_are_read_as_they_were_committed(harness: &impl Harness) {
    let store = harness.fresh().await;
    let empty = store.head().await.unwrap();
    assert_eq!(empty, Head { entries: 0, epoch: 0, frame: [0; 32] });
    let first = store.commit(empty, group(&["a", "b"])).await.unwrap();
    assert_eq!((first.entries, first.epoch), (2, 0));
    let second = store.commit(first, Group { raises_epoch: true, ..group(&["c"]) }).await.unwrap();
    assert_eq!((second.entries, second.epoch), (3, 1));
    assert_ne!(first.frame, second.frame);
    assert_eq!(store.head().await.unwrap(), second);
    assert_eq!(all(&store).await, ["a", "b", "c"]);
}

async fn a_stale_head_is_refused(harness: &impl Harness) {
    let store = harness.fresh().await;
    let empty = store.head().await.unwrap();
    let head = add(&store, &["a"]).await;
    let refused = store.commit(empty, group(&["b"])).await;
    assert!(matches!(refused, Err(StoreError::HeadMoved(now)) if now == head), "{refused:?}");
    let wrong_epoch = store.commit(Head { epoch: 1, ..head }, group(&["b"])).await;
    assert!(matches!(wrong_epoch, Err(StoreError::HeadMoved(_))), "{wrong_epoch:?}");
    assert_eq!(all(&store).await, ["a"]);
}

async fn of_two_commits_at_one_head_one_wins(harness: &impl Harness) {
    let store = harness.fresh().await;
    let head = store.head().await.unwrap();
    let mut commits = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let store = store.clone();
        commits.spawn(async move { store.commit(head, group(&["a"])).await });
    }
    let results = commits.join_all().await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1, "{results:?}");
    assert_eq!(all(&store).await, ["a"]);
}

async fn an_invalid_group_changes_nothing(harness: &impl Harness) {
    let store = harness.fresh().await;
    let head = add(&store, &["a"]).await;
    let zeros = |bytes: usize| Bytes::from(vec![0; bytes]);
    let invalid = [vec![], vec![zeros(1), zeros(0)], vec![zeros(MAX_ENTRY_BYTES + 1)], vec![zeros(1); MAX_GROUP_ENTRIES + 1]];
    for entries in invalid {
        let refused = store.commit(head, Group { entries, raises_epoch: true }).await;
        assert!(matches!(refused, Err(StoreError::Invalid(_))), "{refused:?}");
    }
    assert_eq!(store.head().await.unwrap(), head);
    let longest = Group { entries: vec![zeros(MAX_ENTRY_BYTES)], raises_epoch: false };
    assert_eq!(store.commit(head, longest.clone()).await.unwrap().entries, 2);
    assert_eq!(store.read(1..2, usize::MAX).await.unwrap(), longest.entries);
}

async fn reading_is_bounded(harness: &impl Harness) {
    let store = harness.fresh().await;
    add(&store, &["aa", "bb"]).await;
    add(&store, &["cc", "dd", "ee"]).await;
    let read = async |range, max_bytes| store.read(range, max_bytes).await.unwrap();
    assert_eq!(read(0..5, 6).await, ["aa", "bb", "cc"]);
    assert_eq!(read(1..5, 5).await, ["bb", "cc"]);
    assert_eq!(read(3..5, 0).await, ["dd"], "at least one");
    assert_eq!(read(4..5, 100).await, ["ee"]);
    assert_eq!(read(2..2, 100).await, Vec::<Bytes>::new());
    for beyond in [4..6, 5..6, 9..12] {
        let refused = store.read(beyond, 100).await;
        assert!(matches!(refused, Err(StoreError::Invalid(_))), "{refused:?}");
    }
}

async fn each_of_many_is_read_in_the_order_asked_for(harness: &impl Harness) {
    let store = harness.fresh().await;
    add(&store, &["a", "b"]).await;
    add(&store, &["c"]).await;
    assert_eq!(store.read_each(vec![2, 0, 2]).await.unwrap(), ["c", "a", "c"]);
    assert_eq!(store.read_each(Vec::new()).await.unwrap(), Vec::<Bytes>::new());
    assert!(matches!(store.read_each(vec![0, 3]).await, Err(StoreError::Invalid(_))));
}

async fn look_ups_are_newest_first_and_paged(harness: &impl Harness) {
    let store = harness.fresh().await;
    add(&store, &["cart v1", "shop"]).await;
    add(&store, &["cart v2", "cart v3"]).await;
    let look_up = async |term, before, limit| store.look_up(&term, before, limit).await.unwrap();
    assert_eq!(look_up(word("cart"), u64::MAX, 10).await, [3, 2, 0]);
    assert_eq!(look_up(word("cart"), u64::MAX, 2).await, [3, 2]);
    assert_eq!(look_up(word("cart"), 2, 2).await, [0]);
    assert_eq!(look_up(word("shop"), 1, 2).await, Vec::<u64>::new());
    assert_eq!(look_up(word("nothing"), u64::MAX, 2).await, Vec::<u64>::new());
    for index in 4..50 {
        add(&store, &["late"]).await;
        assert_eq!(look_up(word("late"), u64::MAX, 1).await, [index], "a look-up sees what was committed before it");
    }
}

async fn hashes_are_those_of_the_tree_over_the_entries(harness: &impl Harness) {
    let store = harness.fresh().await;
    let entries: Vec<Bytes> = (0..600).map(|number| Bytes::from(format!("entry {number}"))).collect();
    let leaves: Vec<Hash> = entries.iter().map(|entry| leaf_hash(entry)).collect();
    for entries in entries.chunks(70) {
        let group = Group { entries: entries.to_vec(), raises_epoch: false };
        let head = store.commit(store.head().await.unwrap(), group).await.unwrap().entries;
        assert_eq!(store.hashes(0, head - 1..head).await.unwrap(), [leaf_hash(&entries[entries.len() - 1])], "it is waited for");
    }
    let store = harness.reopen(store).await;
    assert_eq!(store.hashes(0, 0..600).await.unwrap(), leaves);
    assert_eq!(store.hashes(0, 250..260).await.unwrap(), leaves[250..260]);
    assert_eq!(store.hashes(1, 0..2).await.unwrap(), [root_of(&leaves[..256]), root_of(&leaves[256..512])]);
    assert_eq!(store.hashes(1, 1..1).await.unwrap(), Vec::<Hash>::new());
    for (level, beyond) in [(0, 599..601), (1, 1..3), (2, 0..1), (8, 0..1), (255, 0..1)] {
        let refused = store.hashes(level, beyond).await;
        assert!(matches!(refused, Err(StoreError::Invalid(_))), "{refused:?}");
    }
}

async fn values_are_in_order_and_paged(harness: &impl Harness) {
    let store = harness.fresh().await;
    add(&store, &["b/2 a/1", "b/1 b/3 b/1", "c/1"]).await;
    let values = async |prefix: &str, after: Option<&str>, limit| {
        store.values(WORDS, prefix.as_bytes(), after.map(str::as_bytes), limit).await.unwrap()
    };
    assert_eq!(values("", None, 10).await, ["a/1", "b/1", "b/2", "b/3", "c/1"]);
    assert_eq!(values("b/", None, 2).await, ["b/1", "b/2"]);
    assert_eq!(values("b/", Some("b/2"), 2).await, ["b/3"]);
    assert_eq!(values("d", None, 2).await, Vec::<Bytes>::new());
    let refused = store.values(2, b"", None, 1).await;
    assert!(matches!(refused, Err(StoreError::Invalid(_))), "{refused:?}");
}

async fn cells_change_by_compare_and_swap(harness: &impl Harness) {
    let store = harness.fresh().await;
    let swap = async |expected: Option<&'static [u8]>, new: Option<&'static [u8]>| {
        store.compare_and_swap("cell", expected, new.map(Bytes::from_static)).await.unwrap()
    };
    assert_eq!(store.cell("cell").await.unwrap(), None);
    assert!(!swap(Some(b"0"), Some(b"1")).await);
    assert!(swap(None, Some(b"1")).await);
    assert!(!swap(None, Some(b"2")).await);
    assert!(swap(Some(b"1"), Some(b"2")).await);
    assert_eq!(store.cell("cell").await.unwrap().unwrap(), "2");
    assert_eq!(store.cell("another").await.unwrap(), None);
    assert!(swap(Some(b"2"), None).await);
    assert_eq!(store.cell("cell").await.unwrap(), None);
    let refused = store.compare_and_swap("cell", None, Some(Bytes::from(vec![0; MAX_CELL_BYTES + 1]))).await;
    assert!(matches!(refused, Err(StoreError::Invalid(_))), "{refused:?}");
}

async fn a_lease_has_one_holder(harness: &impl Harness) {
    let store = harness.fresh().await;
    let minute = Duration::from_secs(60);
    let take = async |holder| store.lease("duty", holder, minute).await.unwrap();
    let first = take("a").await.unwrap();
    assert_eq!(first.name, "duty");
    assert_eq!(take("b").await, None);
    harness.advance(minute * 3 / 4);
    assert_eq!(take("a").await.unwrap(), first, "prolonged, in the same epoch");
    harness.advance(minute * 3 / 4);
    assert_eq!(take("b").await, None);
    assert_eq!(store.lease("another", "b", minute).await.unwrap().unwrap().name, "another");
    harness.advance(minute);
    let second = take("b").await.unwrap();
    assert!(second.epoch > first.epoch, "{second:?} after {first:?}");
    assert_eq!(take("a").await, None);
}

async fn a_published_checkpoint_must_be_of_this_log(harness: &impl Harness) {
    let store = harness.fresh().await;
    let head = add(&store, &["a"]).await;
    for wrong in [Head { entries: 2, ..head }, Head { frame: [1; 32], ..head }] {
        let refused = store.publish_checkpoint(wrong).await;
        assert!(matches!(refused, Err(StoreError::Invalid(_))), "{refused:?}");
    }
    store.publish_checkpoint(head).await.unwrap();
    add(&store, &["b"]).await;
    let store = harness.reopen(store).await;
    store.publish_checkpoint(head).await.unwrap();
    assert_eq!(all(&store).await, ["a", "b"]);
}

async fn everything_is_there_after_reopening(harness: &impl Harness) {
    let store = harness.fresh().await;
    add(&store, &["cart", "shop"]).await;
    let head = add(&store, &["cart"]).await;
    assert!(store.compare_and_swap("cell", None, Some(Bytes::from_static(b"1"))).await.unwrap());
    let store = harness.reopen(store).await;
    assert_eq!(store.head().await.unwrap(), head);
    assert_eq!(all(&store).await, ["cart", "shop", "cart"]);
    assert_eq!(store.look_up(&word("cart"), u64::MAX, 10).await.unwrap(), [2, 0]);
    assert_eq!(store.cell("cell").await.unwrap().unwrap(), "1");
    add(&store, &["more"]).await;
    assert_eq!(store.look_up(&word("more"), u64::MAX, 10).await.unwrap(), [3]);
}

async fn a_closed_store_refuses(harness: &impl Harness) {
    let store = harness.fresh().await;
    let head = add(&store, &["a"]).await;
    store.close().await.unwrap();
    assert!(matches!(store.commit(head, group(&["b"])).await, Err(StoreError::Closed)));
    assert!(matches!(store.head().await, Err(StoreError::Closed)));
    assert!(matches!(store.read(0..1, 1).await, Err(StoreError::Closed)));
    store.close().await.unwrap();
}
