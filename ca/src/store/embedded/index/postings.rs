//! How a term and the entries that have it become keys and values of the tree.
//!
//! A *batch* is what is written at once: entries that follow each other, none of which is in another batch. Its keys are beside each other, so
//! that no two tables ever have to be merged: an entry costs the same however many there were before. A look-up goes through the batches, the
//! newest first, until it has found enough; of a batch that has nothing for it a filter tells so.
//!
//! ```text
//! batch                           format, end of the batch
//! batch, hash                     the newest entries that have the term, at most MAX_ENTRIES
//! batch, hash, oldest entry       the ones before, so many at a time
//! ```
//!
//! A batch is named by its first entry. It and the oldest entry are inverted, so that the newest come first. Entries are written as the
//! oldest one's distance to the batch's first, and then the distances from one to the next, as varints.

use std::ops::{Range, RangeInclusive};

use aws_lc_rs::digest;

use crate::store::Term;

/// At most this many entries share a posting, so that skipping in one stays cheap.
pub(super) const MAX_ENTRIES: usize = 1024;

/// First bytes of the SHA-256 of dimension and value. Two terms may share it: look-ups compare once more with the entry.
pub(super) type TermHash = [u8; 8];

/// Raised when keys, values or the meaning of terms change; a tree of another format is built anew.
const FORMAT: u8 = 4;
const BATCH_BYTES: usize = 8;
const NEWEST_BYTES: usize = BATCH_BYTES + size_of::<TermHash>();
const OLDER_BYTES: usize = NEWEST_BYTES + 8;

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

/// Where the tree says that it has the batch that begins with the entry `first`.
pub(super) fn batch_key(first: u64) -> [u8; BATCH_BYTES] {
    (!first).to_be_bytes()
}

/// The value at [`batch_key`].
pub(super) fn batch_value(batch: &Range<u64>) -> Vec<u8> {
    [&[FORMAT], &batch.end.to_be_bytes()[..]].concat()
}

/// The batch that is said to be there; none if key or value is not as [`batch_key`] and [`batch_value`] make them.
pub(super) fn read_batch(key: &[u8], value: &[u8]) -> Option<Range<u64>> {
    let first = !u64::from_be_bytes(key.try_into().ok()?);
    let end = u64::from_be_bytes(value.strip_prefix(&[FORMAT])?.try_into().ok()?);
    (first < end).then_some(first..end)
}

/// Where a batch has the newest entries with a term.
pub(super) fn newest_key(batch: &Range<u64>, hash: TermHash) -> [u8; NEWEST_BYTES] {
    let mut key = [0; NEWEST_BYTES];
    key[..BATCH_BYTES].copy_from_slice(&batch_key(batch.start));
    key[BATCH_BYTES..].copy_from_slice(&hash);
    key
}

/// Where a batch has older entries with a term, whose oldest one is `oldest`.
pub(super) fn older_key(batch: &Range<u64>, hash: TermHash, oldest: u64) -> [u8; OLDER_BYTES] {
    let mut key = [0; OLDER_BYTES];
    key[..NEWEST_BYTES].copy_from_slice(&newest_key(batch, hash));
    key[NEWEST_BYTES..].copy_from_slice(&(!oldest).to_be_bytes());
    key
}

/// The keys of older entries of a batch, as far as they begin before `before`.
pub(super) fn older_keys(batch: &Range<u64>, hash: TermHash, before: u64) -> RangeInclusive<[u8; OLDER_BYTES]> {
    older_key(batch, hash, before.saturating_sub(1))..=older_key(batch, hash, batch.start)
}

/// What stands for `indexes`, which ascend, at [`newest_key`] and [`older_key`].
pub(super) fn value(batch: &Range<u64>, indexes: &[u64]) -> Vec<u8> {
    let mut value = Vec::new();
    let mut last = batch.start;
    for index in indexes {
        prost::encoding::encode_varint(index - last, &mut value);
        last = *index;
    }
    value
}

/// The indexes that `value` stands for, ascending; none if it is not as [`value`] makes it.
pub(super) fn read(batch: &Range<u64>, mut value: &[u8]) -> Option<Vec<u64>> {
    let mut indexes = Vec::new();
    let mut index = batch.start;
    while !value.is_empty() {
        index = index.checked_add(prost::encoding::decode_varint(&mut value).ok()?)?;
        indexes.push(index);
    }
    (!indexes.is_empty() && batch.contains(&index)).then_some(indexes)
}
