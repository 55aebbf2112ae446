//! How a term and the entries that have it become keys and values of the tree.
//!
//! Key: the partition, the term's hash, then the oldest entry. Partition and entry are inverted, so that the newest come first. Value: the
//! distances to the entries after the oldest, as varints; empty if there is but one. Postings of a term never overlap.
//!
//! A partition has the entries of a range, and its keys are beside each other: what is merged is the newest one alone, so that an entry costs
//! the same however many there were before. A look-up goes through the partitions one by one until it has found enough.

use std::ops::{Range, RangeInclusive};

use aws_lc_rs::digest;

use crate::store::Term;

/// At most this many entries share a posting, so that skipping in one stays cheap.
pub(super) const MAX_ENTRIES: usize = 1024;

/// First bytes of the SHA-256 of dimension and value. Two terms may share it: look-ups compare once more with the entry.
pub(super) type TermHash = [u8; 8];

/// A million entries make a partition: larger ones cost an append more, and smaller ones a look-up.
const PARTITION_BITS: u32 = if cfg!(test) { 6 } else { 20 };
const PARTITION: u64 = 1 << PARTITION_BITS;
/// Three bytes are enough for an entry within a partition.
const OFFSET_BYTES: usize = 3;
/// Of what is in one posting.
pub(super) type Key = [u8; 1 + 4 + 8 + OFFSET_BYTES];

/// The hash of `term`.
pub(super) fn hash(term: &Term) -> TermHash {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(&[term.dimension]);
    context.update(&term.value);
    let mut hash = TermHash::default();
    for (to, from) in hash.iter_mut().zip(context.finish().as_ref()) {
        *to = *from;
    }
    hash
}

/// Hashes the terms of entries that follow each other: neighbours share most of theirs, so each dimension's last one is remembered.
#[derive(Debug, Default)]
pub(super) struct Hasher {
    last: Vec<(Term, TermHash)>,
}

impl Hasher {
    /// See [`hash`].
    pub(super) fn hash(&mut self, term: &Term) -> TermHash {
        let known = self.last.iter_mut().find(|(last, _)| last.dimension == term.dimension);
        if let Some((_, known)) = known.as_ref().filter(|(last, _)| last.value == term.value) {
            return *known;
        }
        let new = (term.clone(), hash(term));
        let hash = new.1;
        match known {
            Some(last) => *last = new,
            None => self.last.push(new),
        }
        hash
    }
}

/// The parts of `entries` that are in one partition each, newest first.
pub(super) fn partitions(entries: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let partitions = entries.start / PARTITION..entries.end.div_ceil(PARTITION);
    partitions.rev().map(move |partition| {
        let (first, end) = (partition * PARTITION, (partition + 1) * PARTITION);
        first.max(entries.start)..end.min(entries.end)
    })
}

/// The key of the posting whose oldest entry is `oldest`; `tag` keeps postings apart from the rest of the tree.
pub(super) fn key(tag: u8, hash: TermHash, oldest: u64) -> Key {
    let mut key = [tag; size_of::<Key>()];
    // 2^52 entries and more share the last partition; none will.
    let partition = u32::try_from(oldest / PARTITION).unwrap_or(u32::MAX);
    key[1..5].copy_from_slice(&(!partition).to_be_bytes());
    key[5..13].copy_from_slice(&hash);
    let inverted = (PARTITION - 1 - oldest % PARTITION).to_be_bytes();
    key[13..].copy_from_slice(&inverted[8 - OFFSET_BYTES..]);
    key
}

/// The keys of a term's postings with `entries`, which are of one partition.
pub(super) fn keys(tag: u8, hash: TermHash, entries: &Range<u64>) -> RangeInclusive<Key> {
    key(tag, hash, entries.end.saturating_sub(1))..=key(tag, hash, entries.start)
}

/// The value of a posting; `indexes` ascend, the first one being in the key.
pub(super) fn value(indexes: impl Iterator<Item = u64>) -> Vec<u8> {
    let mut value = Vec::new();
    let mut last = None;
    for index in indexes {
        if let Some(last) = last {
            prost::encoding::encode_varint(index - last, &mut value);
        }
        last = Some(index);
    }
    value
}

/// The indexes of a posting, ascending; none if key or value is not as [`key`] and [`value`] make them.
pub(super) fn read(key: &[u8], mut value: &[u8]) -> Option<Vec<u64>> {
    let key: &Key = key.try_into().ok()?;
    let partition = !u32::from_be_bytes(key[1..5].try_into().ok()?);
    let mut offset = [0; 8];
    offset[8 - OFFSET_BYTES..].copy_from_slice(&key[13..]);
    let newer = (PARTITION - 1).checked_sub(u64::from_be_bytes(offset))?;
    let mut index = u64::from(partition) * PARTITION + newer;
    let mut indexes = vec![index];
    while !value.is_empty() {
        index = index.checked_add(prost::encoding::decode_varint(&mut value).ok()?)?;
        indexes.push(index);
    }
    Some(indexes)
}
