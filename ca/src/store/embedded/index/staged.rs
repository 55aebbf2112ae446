//! What was indexed last and is not in the tree yet: in memory, in the order in which the tree will have it.
//!
//! Gathering many entries before they become a table makes one key out of what they have in common, and is what keeps an entry cheap. A
//! crash loses it; the log fills it in again.

use std::collections::BTreeSet;
use std::ops::Range;

use bytes::Bytes;

use super::postings::TermHash;

/// From this many postings on, 4 MiB, it is to become a table.
const MAX_POSTINGS: usize = 1 << 18;
/// Likewise, entries without many terms.
const MAX_ENTRIES: u64 = 1 << 16;

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

    /// Whether it is large enough to become a table.
    pub(super) fn is_full(&self) -> bool {
        self.runs.iter().map(Vec::len).sum::<usize>() >= MAX_POSTINGS || self.entries.end - self.entries.start >= MAX_ENTRIES
    }

    /// Those of `entries`, by hash, then ascending.
    pub(super) fn postings(&self, entries: &Range<u64>) -> impl Iterator<Item = (TermHash, u64)> + use<> {
        let of_entries = self.runs.iter().flatten().filter(|(_, index)| entries.contains(index));
        let mut postings: Vec<_> = of_entries.copied().collect();
        merge(&mut postings);
        postings.into_iter()
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
