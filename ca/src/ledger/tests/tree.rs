//! Roots, proofs and tiles, against the tree as RFC 6962 section 2.1 defines it.

use chancery_identity::checkpoint::{Checkpoint, Hash, empty_root, leaf_hash, node_hash, verify_consistency, verify_inclusion};
use proptest::prelude::*;

use super::super::proof::{Part, Plan};
use super::*;

const SIZES: u64 = 1000;

fn entries(count: u64) -> Vec<Vec<u8>> {
    (0..count).map(|number| format!("entry {number}").into_bytes()).collect()
}

fn root(leaves: &[Hash]) -> Hash {
    match leaves {
        [] => empty_root(),
        [leaf] => *leaf,
        _ => {
            let (left, right) = leaves.split_at(leaves.len().next_power_of_two() / 2);
            node_hash(&root(left), &root(right))
        }
    }
}

/// RFC 6962 section 2.1.1.
fn inclusion(index: usize, leaves: &[Hash]) -> Vec<Hash> {
    if leaves.len() == 1 {
        return Vec::new();
    }
    let (left, right) = leaves.split_at(leaves.len().next_power_of_two() / 2);
    let (mut proof, sibling) = match index.checked_sub(left.len()) {
        None => (inclusion(index, left), right),
        Some(index) => (inclusion(index, right), left),
    };
    proof.push(root(sibling));
    proof
}

/// RFC 6962 section 2.1.2.
fn consistency(old: usize, leaves: &[Hash], is_known: bool) -> Vec<Hash> {
    if old == leaves.len() {
        return if is_known { Vec::new() } else { vec![root(leaves)] };
    }
    let (left, right) = leaves.split_at(leaves.len().next_power_of_two() / 2);
    let (mut proof, sibling) =
        if old <= left.len() { (consistency(old, left, is_known), right) } else { (consistency(old - left.len(), right, false), left) };
    proof.push(root(sibling));
    proof
}

/// What a plan makes of the hashes that a store gives.
fn make(plan: &Plan, leaves: &[Hash]) -> Vec<Hash> {
    let part = |level: u8, range: std::ops::Range<u64>| {
        let width = 256_usize.pow(level.into());
        let subtrees = leaves.chunks_exact(width).map(root).skip(usize::try_from(range.start).unwrap());
        Part { first: range.start, hashes: subtrees.take(usize::try_from(range.end - range.start).unwrap()).collect() }
    };
    let tiles = plan.tiles();
    assert!(tiles.len() <= 4, "{tiles:?}");
    let parts = tiles.into_iter().map(|(tile, range)| (tile, part(tile.level, range))).collect();
    plan.make(&parts).unwrap()
}

fn checkpoint(leaves: &[Hash]) -> Checkpoint {
    Checkpoint { origin: "example.org/chancery/00".into(), size: leaves.len() as u64, root: root(leaves), extensions: Vec::new() }
}

#[test]
fn the_root_of_every_size_is_that_of_the_definition() {
    let leaves: Vec<Hash> = entries(SIZES).iter().map(|entry| leaf_hash(entry)).collect();
    for size in 0..=leaves.len() {
        assert_eq!(make(&Plan::root(size as u64), &leaves), [root(&leaves[..size])], "{size}");
    }
}

/// Checks both proofs of a tree of all `entries`: of the one at `index`, and that it begins with the first `old`.
fn check_proofs(entries: &[Vec<u8>], leaves: &[Hash], index: usize, old: usize) {
    let (size, newer) = (leaves.len(), checkpoint(leaves));
    let proof = make(&Plan::inclusion(index as u64, size as u64), leaves);
    assert_eq!(proof, inclusion(index, leaves), "entry {index} of {size}");
    verify_inclusion(&entries[index], index as u64, &newer, &proof).unwrap();
    let proof = make(&Plan::consistency(old as u64, size as u64), leaves);
    assert_eq!(proof, if old == 0 { Vec::new() } else { consistency(old, leaves, true) }, "from {old} to {size}");
    verify_consistency(&checkpoint(&leaves[..old]), &newer, &proof).unwrap();
}

/// Of each size both proofs, about a place that is another one each time; and, where trees are small, about every place.
#[test]
fn the_proofs_of_every_size_are_those_of_the_definition_and_verify() {
    let entries = entries(SIZES);
    let leaves: Vec<Hash> = entries.iter().map(|entry| leaf_hash(entry)).collect();
    for size in 1..=leaves.len() {
        // The remainders of a prime are spread over trees of all sizes.
        let places = if size <= 40 { (0..size).collect() } else { vec![0, size / 2, size - 1, 7919 % size] };
        for place in places {
            check_proofs(&entries, &leaves[..size], place, size - place);
        }
    }
}

/// A size up to 1,000, an entry in it, and an older size.
fn trees() -> impl Strategy<Value = (usize, usize, usize)> {
    (1..=usize::try_from(SIZES).unwrap()).prop_flat_map(|size| (Just(size), 0..size, 0..=size))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_proof_is_that_of_the_definition_and_verifies((size, index, old) in trees()) {
        let entries = entries(size as u64);
        let leaves: Vec<Hash> = entries.iter().map(|entry| leaf_hash(entry)).collect();
        check_proofs(&entries, &leaves, index, old);
    }
}

/// A ledger with `count` entries, and these entries.
async fn ledger(count: usize) -> (Place, Ledger, Vec<Bytes>) {
    let place = Place::new();
    let ledger = place.ledger().await;
    ledger.append_all((0..count).map(|number| start(&format!("version {number}"))).collect()).await.unwrap();
    let entries = ledger.store().read(0..count as u64, usize::MAX).await.unwrap();
    (place, ledger, entries)
}

#[tokio::test]
async fn the_ledgers_proofs_verify() {
    let (_place, ledger, entries) = ledger(700).await;
    let leaves: Vec<Hash> = entries.iter().map(|entry| leaf_hash(entry)).collect();
    for size in [1, 2, 255, 256, 257, 511, 512, 513, 700] {
        let newer = checkpoint(&leaves[..size]);
        assert_eq!(ledger.tree_root(size as u64).await.unwrap(), newer.root);
        for index in [0, size / 2, size - 1] {
            let proof = ledger.inclusion_proof(index as u64, size as u64).await.unwrap();
            verify_inclusion(&entries[index], index as u64, &newer, &proof).unwrap();
            let proof = ledger.consistency_proof(index as u64, size as u64).await.unwrap();
            verify_consistency(&checkpoint(&leaves[..index]), &newer, &proof).unwrap();
        }
    }
    assert_eq!(ledger.tree_root(0).await.unwrap(), empty_root());
}

#[tokio::test]
async fn what_is_not_in_the_tree_is_refused_by_name() {
    let (_place, ledger, _) = ledger(10).await;
    let refused = [
        ledger.tree_root(11).await.unwrap_err(),
        ledger.inclusion_proof(0, 11).await.unwrap_err(),
        ledger.inclusion_proof(5, 5).await.unwrap_err(),
        ledger.consistency_proof(6, 5).await.unwrap_err(),
        ledger.tile(0, 0, 11).await.unwrap_err(),
        ledger.tile(0, 0, 0).await.unwrap_err(),
        ledger.tile(0, u64::MAX, 1).await.unwrap_err(),
        ledger.tile(1, 0, 1).await.unwrap_err(),
        ledger.tile(255, 0, 1).await.unwrap_err(),
        ledger.entry_bundle(0, 11).await.unwrap_err(),
        ledger.entry_bundle(0, 257).await.unwrap_err(),
    ];
    for error in refused {
        assert!(matches!(error, LedgerError::NotInTree { .. }) && error.to_string().contains("is not in the ledger's tree"), "{error}");
    }
}

#[tokio::test]
async fn tiles_are_as_c2sp_tlog_tiles_has_them() {
    let (_place, ledger, entries) = ledger(600).await;
    let leaves: Vec<Hash> = entries.iter().map(|entry| leaf_hash(entry)).collect();
    assert_eq!(ledger.tile(0, 1, 256).await.unwrap(), leaves[256..512].concat());
    assert_eq!(ledger.tile(0, 2, 88).await.unwrap(), leaves[512..].concat());
    assert_eq!(ledger.tile(1, 0, 2).await.unwrap(), [root(&leaves[..256]), root(&leaves[256..512])].concat());
    let bundle = ledger.entry_bundle(2, 88).await.unwrap();
    let mut rest = bundle.as_slice();
    for entry in &entries[512..] {
        let (length, after) = rest.split_first_chunk::<2>().unwrap();
        let (bytes, after) = after.split_at(u16::from_be_bytes(*length).into());
        assert_eq!(bytes, entry);
        rest = after;
    }
    assert!(rest.is_empty());
}
