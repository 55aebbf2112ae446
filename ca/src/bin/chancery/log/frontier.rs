//! The root of a tree that grows by one entry at a time, in memory that grows with the logarithm of its size.

use chancery_identity::checkpoint::{Hash, empty_root, leaf_hash, node_hash};

/// A tree over the entries so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Frontier {
    size: u64,
    /// The roots of the complete subtrees that make up the tree, from left to right.
    subtrees: Vec<Hash>,
}

impl Frontier {
    /// How many entries.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Adds an entry; tells its hash. `complete` is told the height, the number and the root of each subtree that is complete now.
    pub(super) fn push(&mut self, entry: &[u8], mut complete: impl FnMut(u32, u64, &Hash)) -> Hash {
        let leaf = leaf_hash(entry);
        let mut root = leaf;
        complete(0, self.size, &leaf);
        // Each complete subtree at the end has one of its size to its right now.
        for height in 1..=self.size.trailing_ones() {
            if let Some(left) = self.subtrees.pop() {
                root = node_hash(&left, &root);
                complete(height, self.size >> height, &root);
            }
        }
        self.subtrees.push(root);
        self.size += 1;
        leaf
    }

    /// The tree's root.
    pub(super) fn root(&self) -> Hash {
        let right_to_left = self.subtrees.iter().copied().rev();
        right_to_left.reduce(|right, left| node_hash(&left, &right)).unwrap_or_else(empty_root)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 6962 section 2.1, to the letter.
    fn naive(entries: &[[u8; 2]]) -> Hash {
        match entries {
            [] => empty_root(),
            [entry] => leaf_hash(entry),
            _ => {
                let split = entries.len().next_power_of_two() / 2;
                node_hash(&naive(&entries[..split]), &naive(&entries[split..]))
            }
        }
    }

    #[test]
    fn the_root_is_that_of_the_definition_at_every_size() {
        let entries: Vec<[u8; 2]> = (0..300u16).map(u16::to_be_bytes).collect();
        let mut frontier = Frontier::default();
        for size in 0..entries.len() {
            assert_eq!((frontier.size(), frontier.root()), (size as u64, naive(&entries[..size])), "{size} entries");
            frontier.push(&entries[size], |_, _, _| ());
        }
    }
}
