//! What was indexed last and is not in the tree yet: in memory, in the order in which the tree will have it.
//!
//! Gathering many entries before they become a batch makes one key out of what they have in common, and keeps the batches few. A crash loses
//! it; the log fills it in again.

use std::collections::BTreeSet;
use std::ops::Range;

use bytes::Bytes;

use super::postings::TermHash;

/// From this many postings on, 16 MiB, it is to become a batch.
const MAX_POSTINGS: usize = 1 << 20;
/// Likewise, entries without many terms: what a start after a crash indexes again takes about a second.
const MAX_ENTRIES: u64 = 1 << 17;
/// Fewer are indexed again at the next start, which takes less than a tenth of a second, rather than made a batch of their own.
const MIN_ENTRIES: u64 = if cfg!(test) { 1 } else { 1 << 12 };

/// Postings and dictionary values of the entries in a range.
#[derive(Debug)]
pub(super) struct Staged {
    entries: Range<u64>,
    /// Each sorted, each at least twice as long as the next, and all its indexes smaller: adding costs a few merges of what is short, less
    /// than half of what a tree of single postings costs.
    runs: Vec<Vec<(TermHash, u64)>>,
    values: BTreeSet<(u8, Bytes)>,
}

impl Staged {
    /// Nothing, from the entry `next` on.
    pub(super) fn from(next: u64) -> Self {
        Self { entries: next..next, runs: Vec::new(), values: BTreeSet::new() }
    }

    /// Which entries.
    pub(super) fn entries(&self) -> Range<u64> {
        self.entries.clone()
    }

    /// Adds the entries that follow, up to `end`.
    pub(super) fn add(&mut self, mut postings: Vec<(TermHash, u64)>, values: impl Iterator<Item = (u8, Bytes)>, end: u64) {
        postings.sort_unstable();
        postings.dedup();
        while let Some(mut before) = self.runs.pop_if(|before| before.len() < 2 * postings.len()) {
            before.append(&mut postings);
            merge(&mut before);
            postings = before;
        }
        self.runs.push(postings);
        self.values.extend(values);
        self.entries.end = end;
    }

    /// Whether it is to become a batch now.
    pub(super) fn is_full(&self) -> bool {
        self.runs.iter().map(Vec::len).sum::<usize>() >= MAX_POSTINGS || self.entries.end - self.entries.start >= MAX_ENTRIES
    }

    /// Whether it is worth to become a batch before the index is closed.
    pub(super) fn is_worth_a_batch(&self) -> bool {
        self.entries.end - self.entries.start >= MIN_ENTRIES
    }

    /// By hash, then ascending.
    pub(super) fn postings(&self) -> Vec<(TermHash, u64)> {
        let mut postings = self.runs.concat();
        merge(&mut postings);
        postings
    }

    /// By dimension, then ascending.
    pub(super) fn values(&self) -> impl Iterator<Item = &(u8, Bytes)> {
        self.values.iter()
    }

    /// Indexes under `hash` that are smaller than `before`, newest first.
    pub(super) fn look_up(&self, hash: TermHash, before: u64) -> impl Iterator<Item = u64> {
        self.runs.iter().rev().flat_map(move |run| {
            let start = run.partition_point(|posting| *posting < (hash, 0));
            let end = run.partition_point(|posting| *posting < (hash, before));
            run[start..end].iter().rev().map(|(_, index)| *index)
        })
    }

    /// Values of `dimension` that begin with `prefix`, in order, after `after`.
    pub(super) fn values_of(&self, dimension: u8, prefix: &[u8], after: Option<&[u8]>) -> impl Iterator<Item = Bytes> {
        let start = (dimension, Bytes::copy_from_slice(after.filter(|after| *after > prefix).unwrap_or(prefix)));
        let of_prefix = self.values.range(start..).take_while(move |(of, value)| *of == dimension && value.starts_with(prefix));
        of_prefix.map(|(_, value)| value.clone()).filter(move |value| after.is_none_or(|after| value.as_ref() > after))
    }
}

/// Sorts what is made of a few sorted runs.
#[allow(clippy::stable_sort_primitive, reason = "the stable sort finds the runs and merges them; the other one sorts anew")]
fn merge(postings: &mut [(TermHash, u64)]) {
    postings.sort();
}
