//! Which nodes of the tree a root or a proof is made of (RFC 6962 section 2.1; `ct_merkle` knows), and how it is made of the hashes that are
//! kept.
//!
//! Pure: a [`Plan`] says what it needs, and is told the hashes. Every node that a plan names is the root of a complete subtree, so its hash
//! never changes once it is known.

use std::collections::BTreeMap;
use std::ops::Range;

use chancery_identity::checkpoint::{Hash, empty_root, node_hash, root_of};

/// A level of the store's hashes is this many levels of the tree.
const TILE_HEIGHT: u32 = 8;
/// How many hashes a tile has.
pub(super) const TILE_WIDTH: u64 = 1 << TILE_HEIGHT;

/// The root of a complete subtree of 2^`height` entries, the `index`th of its height.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Node {
    height: u32,
    index: u64,
}

/// Hashes to be made, each of some complete subtrees next to each other, from left to right.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    hashes: Vec<Vec<Node>>,
}

/// A tile of the store's hashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Tile {
    pub(super) level: u8,
    pub(super) index: u64,
}

/// Some neighbouring hashes of a tile, with the place of the first one in its level.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) first: u64,
    pub(super) hashes: Vec<Hash>,
}

impl Plan {
    /// The root of the first `size` entries.
    pub(super) fn root(size: u64) -> Self {
        Self { hashes: vec![subtrees(0..size)] }
    }

    /// That the entry `index` is among the first `size`; it is.
    pub(super) fn inclusion(index: u64, size: u64) -> Self {
        Self::of(&ct_merkle::indices_for_inclusion_proof(size, index), size)
    }

    /// That the first `new` entries begin with the first `old`; `old` is not larger.
    pub(super) fn consistency(old: u64, new: u64) -> Self {
        // That every tree begins with the empty one needs no proof.
        let nodes = if old == 0 { Vec::new() } else { ct_merkle::indices_for_consistency_proof(old, new - old) };
        Self::of(&nodes, new)
    }

    /// The hashes of `nodes` of the tree over the first `size` entries, numbered as RFC 9420 appendix C does.
    fn of(nodes: &[u64], size: u64) -> Self {
        let entries = |node: &u64| {
            let height = node.trailing_ones();
            let first = node >> (height + 1) << height;
            first..size.min(first + (1 << height))
        };
        Self { hashes: nodes.iter().map(|node| subtrees(entries(node))).collect() }
    }

    /// Which hashes of which tiles are needed.
    pub(super) fn tiles(&self) -> BTreeMap<Tile, Range<u64>> {
        let mut tiles = BTreeMap::<Tile, Range<u64>>::new();
        for node in self.hashes.iter().flatten() {
            let (tile, needed) = node.in_tile();
            tiles.entry(tile).and_modify(|range| *range = range.start.min(needed.start)..range.end.max(needed.end)).or_insert(needed);
        }
        tiles
    }

    /// The hashes, made of what [`Self::tiles`] named; nothing if a part is missing.
    pub(super) fn make(&self, parts: &BTreeMap<Tile, Part>) -> Option<Vec<Hash>> {
        let hash = |nodes: &Vec<Node>| -> Option<Hash> {
            let hashes = nodes.iter().map(|node| node.hash(parts)).collect::<Option<Vec<_>>>()?;
            let right_to_left = hashes.into_iter().rev();
            Some(right_to_left.reduce(|right, left| node_hash(&left, &right)).unwrap_or_else(empty_root))
        };
        self.hashes.iter().map(hash).collect()
    }
}

impl Node {
    /// The tile that it is made of, and which hashes of that level.
    fn in_tile(self) -> (Tile, Range<u64>) {
        let (level, above) = (self.height / TILE_HEIGHT, self.height % TILE_HEIGHT);
        let first = self.index << above;
        let tile = Tile { level: u8::try_from(level).unwrap_or(u8::MAX), index: first / TILE_WIDTH };
        (tile, first..first + (1 << above))
    }

    fn hash(self, parts: &BTreeMap<Tile, Part>) -> Option<Hash> {
        let (tile, needed) = self.in_tile();
        let part = parts.get(&tile)?;
        let place = |index: u64| usize::try_from(index.checked_sub(part.first)?).ok();
        part.hashes.get(place(needed.start)?..place(needed.end)?).map(root_of)
    }
}

/// The largest complete subtrees that make up `entries`, which begin where one of that size can.
fn subtrees(mut entries: Range<u64>) -> Vec<Node> {
    let mut nodes = Vec::new();
    while !entries.is_empty() {
        let height = (entries.end - entries.start).ilog2();
        nodes.push(Node { height, index: entries.start >> height });
        entries.start += 1 << height;
    }
    nodes
}
