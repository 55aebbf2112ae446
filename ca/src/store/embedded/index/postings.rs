//! How a term and the entries that have it become keys and values of the tree.
//!
//! Key: the term's hash, then the inverted index of the oldest entry, so that a scan over a term's keys finds the newest first. Value: the
//! distances to the entries after the oldest, as varints; empty if there is but one. Postings of a term never overlap.

use aws_lc_rs::digest;

use crate::store::Term;

/// At most this many entries share a posting, so that skipping in one stays cheap.
pub(super) const MAX_ENTRIES: usize = 1024;

/// First bytes of the SHA-256 of dimension and value. Two terms may share it: look-ups compare once more with the entry.
pub(super) type TermHash = [u8; 8];

/// Six bytes number 281 trillion entries.
const INDEX_BYTES: usize = 6;
const MAX_INDEX: u64 = (1 << (8 * INDEX_BYTES)) - 1;

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

/// The key of the posting whose oldest entry is `oldest`; `tag` keeps postings apart from the rest of the tree.
pub(super) fn key(tag: u8, hash: TermHash, oldest: u64) -> [u8; 1 + 8 + INDEX_BYTES] {
    let mut key = [tag; 1 + 8 + INDEX_BYTES];
    key[1..9].copy_from_slice(&hash);
    let inverted = (MAX_INDEX - oldest.min(MAX_INDEX)).to_be_bytes();
    key[9..].copy_from_slice(&inverted[8 - INDEX_BYTES..]);
    key
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
    let inverted = key.last_chunk::<INDEX_BYTES>()?;
    let mut bytes = [0; 8];
    bytes[8 - INDEX_BYTES..].copy_from_slice(inverted);
    let mut index = MAX_INDEX - u64::from_be_bytes(bytes);
    let mut indexes = vec![index];
    while !value.is_empty() {
        index = index.checked_add(prost::encoding::decode_varint(&mut value).ok()?)?;
        indexes.push(index);
    }
    Some(indexes)
}
