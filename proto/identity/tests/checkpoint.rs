//! Checkpoints, their notes and proofs: vectors of others, and that every change of one is noticed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use chancery_identity::checkpoint::{
    Checkpoint, CheckpointError, CheckpointVerifier, Hash, ProofError, Signature, assemble, empty_root, leaf_hash, node_hash, origin,
    root_of, unverified, verify, verify_consistency, verify_inclusion,
};

const ORIGIN: &str = "example.org/chancery/000102030405060708090a0b0c0d0e0f";

/// The entries and roots of the reference implementation's tests (google/certificate-transparency, `merkle_tree_test.cc`).
const ENTRIES: [&str; 8] = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"];
const ROOTS: [&str; 8] = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
];

fn hash(text: &str) -> Hash {
    hex::decode(text).unwrap().try_into().unwrap()
}

fn entries() -> Vec<Vec<u8>> {
    ENTRIES.iter().map(|entry| hex::decode(entry).unwrap()).collect()
}

fn checkpoint(size: u64, root: Hash) -> Checkpoint {
    Checkpoint { origin: ORIGIN.into(), size, root, extensions: Vec::new() }
}

/// Of `entries`, as RFC 6962 section 2.1 defines it.
fn root(entries: &[Vec<u8>]) -> Hash {
    match entries {
        [] => empty_root(),
        [entry] => leaf_hash(entry),
        _ => {
            let (left, right) = entries.split_at(entries.len().next_power_of_two() / 2);
            node_hash(&root(left), &root(right))
        }
    }
}

/// RFC 6962 section 2.1.1.
fn inclusion(index: usize, entries: &[Vec<u8>]) -> Vec<Hash> {
    if entries.len() == 1 {
        return Vec::new();
    }
    let split = entries.len().next_power_of_two() / 2;
    let (left, right) = entries.split_at(split);
    let (mut proof, sibling) =
        if index < split { (inclusion(index, left), root(right)) } else { (inclusion(index - split, right), root(left)) };
    proof.push(sibling);
    proof
}

/// RFC 6962 section 2.1.2.
fn consistency(old: usize, entries: &[Vec<u8>], known: bool) -> Vec<Hash> {
    if old == entries.len() {
        return if known { Vec::new() } else { vec![root(entries)] };
    }
    let split = entries.len().next_power_of_two() / 2;
    let (left, right) = entries.split_at(split);
    let (mut proof, sibling) =
        if old <= split { (consistency(old, left, known), root(right)) } else { (consistency(old - split, right, false), root(left)) };
    proof.push(sibling);
    proof
}

fn key(seed: u8) -> (Ed25519KeyPair, CheckpointVerifier) {
    let pair = Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap();
    let verifier = CheckpointVerifier::new(ORIGIN, pair.public_key().as_ref().try_into().unwrap()).unwrap();
    (pair, verifier)
}

fn signed(checkpoint: &Checkpoint, seeds: &[u8]) -> String {
    let text = checkpoint.to_string();
    let sign = |seed: &u8| {
        let (pair, key) = key(*seed);
        Signature { key, bytes: pair.sign(text.as_bytes()).as_ref().to_vec() }
    };
    assemble(checkpoint, &seeds.iter().map(sign).collect::<Vec<_>>()).unwrap()
}

#[test]
fn the_reference_implementations_roots_and_proofs_verify() {
    assert_eq!(empty_root(), hash("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"));
    let entries = entries();
    for (size, due) in (1..).zip(ROOTS) {
        assert_eq!(root(&entries[..size]), hash(due), "{size} entries");
        let leaves: Vec<Hash> = entries[..size].iter().map(|entry| leaf_hash(entry)).collect();
        assert_eq!(root_of(&leaves), hash(due), "{size} entries, one by one");
    }
    let at = |size: usize| checkpoint(size as u64, hash(ROOTS[size - 1]));
    let inclusions: [(usize, usize, &[&str]); 4] = [
        (
            0,
            8,
            &[
                "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
                "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
                "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
            ],
        ),
        (
            5,
            8,
            &[
                "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
                "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
                "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
            ],
        ),
        (2, 3, &["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"]),
        (
            1,
            5,
            &[
                "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
                "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
                "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
            ],
        ),
    ];
    for (index, size, proof) in inclusions {
        let proof: Vec<Hash> = proof.iter().map(|text| hash(text)).collect();
        verify_inclusion(&entries[index], index as u64, &at(size), &proof).unwrap();
    }
    let consistencies: [(usize, usize, &[&str]); 3] = [
        (
            1,
            8,
            &[
                "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
                "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
                "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
            ],
        ),
        (
            6,
            8,
            &[
                "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
                "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
                "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
            ],
        ),
        (
            2,
            5,
            &[
                "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
                "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
            ],
        ),
    ];
    for (old, new, proof) in consistencies {
        let proof: Vec<Hash> = proof.iter().map(|text| hash(text)).collect();
        verify_consistency(&at(old), &at(new), &proof).unwrap();
    }
}

/// Every proof that differs from `proof` in one bit, hash or place.
fn changed(proof: &[Hash]) -> Vec<Vec<Hash>> {
    let mut all = Vec::new();
    for at in 0..proof.len() {
        let mut flipped = proof.to_vec();
        flipped[at][at % 32] ^= 1;
        let mut without = proof.to_vec();
        without.remove(at);
        let mut twice = proof.to_vec();
        twice.insert(at, proof[at]);
        all.extend([flipped, without, twice]);
        if at > 0 {
            let mut swapped = proof.to_vec();
            swapped.swap(at - 1, at);
            all.push(swapped);
        }
    }
    all.push([proof, &[[0; 32]]].concat());
    all
}

#[test]
fn every_change_of_an_inclusion_proof_is_noticed() {
    let entries: Vec<Vec<u8>> = (0..40_u8).map(|number| vec![number]).collect();
    for size in 1..=entries.len() {
        let checkpoint = checkpoint(size as u64, root(&entries[..size]));
        for index in 0..size {
            let proof = inclusion(index, &entries[..size]);
            let check = |entry: &[u8], index: usize, proof: &[Hash]| verify_inclusion(entry, index as u64, &checkpoint, proof);
            check(&entries[index], index, &proof).unwrap();
            for wrong in changed(&proof) {
                assert!(matches!(check(&entries[index], index, &wrong), Err(ProofError::NotIncluded { .. })), "{index} of {size}");
            }
            check(b"another", index, &proof).unwrap_err();
            for another in (0..=size).filter(|another| *another != index) {
                check(&entries[index], another, &proof).unwrap_err();
            }
            let other_root = Checkpoint { root: [1; 32], ..checkpoint.clone() };
            verify_inclusion(&entries[index], index as u64, &other_root, &proof).unwrap_err();
        }
    }
    let empty = checkpoint(0, empty_root());
    assert_eq!(verify_inclusion(b"", 0, &empty, &[]), Err(ProofError::BeyondCheckpoint { index: 0, size: 0 }));
}

#[test]
fn every_change_of_a_consistency_proof_or_of_a_root_is_noticed() {
    let entries: Vec<Vec<u8>> = (0..40_u8).map(|number| vec![number]).collect();
    let at = |size: usize| checkpoint(size as u64, root(&entries[..size]));
    for new in 0..=entries.len() {
        for old in 0..=new {
            let proof = if old == 0 { Vec::new() } else { consistency(old, &entries[..new], true) };
            verify_consistency(&at(old), &at(new), &proof).unwrap();
            for wrong in changed(&proof) {
                verify_consistency(&at(old), &at(new), &wrong).unwrap_err();
            }
            let other = |of: usize| Checkpoint { root: [1; 32], ..at(of) };
            verify_consistency(&other(old), &at(new), &proof).unwrap_err();
            if old > 0 {
                verify_consistency(&at(old), &other(new), &proof).unwrap_err();
            }
            if old < new {
                verify_consistency(&at(new), &at(old), &proof).unwrap_err();
            }
        }
    }
    let elsewhere = Checkpoint { origin: "example.com/chancery/00".into(), ..at(3) };
    assert!(matches!(verify_consistency(&elsewhere, &at(3), &[]), Err(ProofError::OtherOrigin { .. })));
}

#[test]
fn the_verifier_key_of_gos_example_is_read_printed_and_used() {
    // From the documentation of golang.org/x/mod/sumdb/note.
    let text = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW";
    let key: CheckpointVerifier = text.parse().unwrap();
    assert_eq!((key.to_string().as_str(), key.origin()), (text, "PeterNeumann"));
    let message = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n";
    let signature = "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=";
    let note = format!("{message}\n\u{2014} PeterNeumann {signature}\n");
    let malformed = key.verify(&note).unwrap_err();
    assert!(
        matches!(malformed, CheckpointError::Malformed(problem) if problem.contains("number of entries")),
        "the signature fits: {malformed}"
    );
    let changed = note.replace("answer", "Answer");
    assert_eq!(key.verify(&changed), Err(CheckpointError::Signature("PeterNeumann+c74f20a3".into())));
}

#[test]
fn a_verifier_key_in_any_other_form_is_refused() {
    let text = key(1).1.to_string();
    assert_eq!(text.parse::<CheckpointVerifier>().unwrap(), key(1).1);
    for at in 0..text.len() {
        let mut flipped = text.clone().into_bytes();
        flipped[at] ^= 1;
        assert!(String::from_utf8(flipped).unwrap().parse::<CheckpointVerifier>().is_err(), "byte {at}");
        assert!(text[..at].parse::<CheckpointVerifier>().is_err(), "{at} bytes");
    }
    for name in ["", "a b", "a+b", "a\nb", "a\u{a0}b"] {
        assert!(CheckpointVerifier::new(name, [0; 32]).is_err(), "{name:?}");
    }
}

#[test]
fn a_note_is_verified_and_printed_as_c2sp_says() {
    let checkpoint = checkpoint(12, [7; 32]);
    let note = signed(&checkpoint, &[1]);
    let lines: Vec<&str> = note.lines().collect();
    assert_eq!(lines[..4], [ORIGIN, "12", "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=", ""]);
    assert!(lines[4].starts_with(&format!("\u{2014} {ORIGIN} ")) && lines.len() == 5, "{note}");
    assert_eq!(key(1).1.verify(&note).unwrap(), checkpoint);
    assert_eq!(origin(&"example.org".parse().unwrap(), std::array::from_fn(|at| u8::try_from(at).unwrap())), ORIGIN);
}

#[test]
fn any_known_signature_is_enough_and_unknown_ones_are_ignored() {
    let checkpoint = checkpoint(12, [7; 32]);
    let note = signed(&checkpoint, &[1, 2]);
    for seed in [1, 2] {
        assert_eq!(key(seed).1.verify(&note).unwrap(), checkpoint);
    }
    assert_eq!(verify(&note, &[key(3).1, key(2).1]).unwrap(), checkpoint);
    assert!(matches!(key(3).1.verify(&note), Err(CheckpointError::NotSigned(_))));
    let witnessed = format!("{note}\u{2014} witness.example/w1 AAAAAAAA\n");
    assert_eq!(key(1).1.verify(&witnessed).unwrap(), checkpoint);
}

#[test]
fn every_flipped_bit_and_every_missing_byte_of_a_note_is_noticed() {
    let note = signed(&Checkpoint { extensions: vec!["more".into()], ..checkpoint(12, [7; 32]) }, &[1]);
    let key = key(1).1;
    for at in 0..note.len() {
        for bit in 0..8 {
            let mut flipped = note.clone().into_bytes();
            flipped[at] ^= 1 << bit;
            if let Ok(flipped) = String::from_utf8(flipped) {
                assert!(key.verify(&flipped).is_err(), "bit {bit} of byte {at}: {flipped}");
            }
        }
        if note.is_char_boundary(at) {
            assert!(key.verify(&note[..at]).is_err(), "{at} bytes");
        }
    }
}

#[test]
fn a_wrong_signature_of_a_known_key_is_refused_even_beside_a_good_one() {
    let checkpoint = checkpoint(12, [7; 32]);
    let good = signed(&checkpoint, &[1]);
    let other = signed(&Checkpoint { size: 13, ..checkpoint }, &[2]);
    let mixed = format!("{good}{}\n", other.lines().last().unwrap());
    assert_eq!(key(1).1.verify(&mixed).unwrap().size, 12);
    assert!(matches!(verify(&mixed, &[key(1).1, key(2).1]), Err(CheckpointError::Signature(_))));
}

#[test]
fn what_a_note_says_can_be_read_whoever_signed_it() {
    let checkpoint = checkpoint(7, [9; 32]);
    let note = signed(&checkpoint, &[1]);
    assert_eq!(unverified(&note.replace("\u{2014} ", "\u{2014} x")).unwrap(), checkpoint);
    assert!(matches!(unverified(&checkpoint.to_string()), Err(CheckpointError::Malformed(_))));
    assert!(matches!(unverified(&note[1 + ORIGIN.len()..]), Err(CheckpointError::Malformed(_))));
}

#[test]
fn a_checkpoint_of_another_ledger_is_refused() {
    let other = Checkpoint { origin: "example.org/chancery/ff".into(), ..checkpoint(1, [7; 32]) };
    let (pair, verifier) = key(1);
    let bytes = pair.sign(other.to_string().as_bytes()).as_ref().to_vec();
    assert!(matches!(assemble(&other, &[Signature { key: verifier, bytes }]), Err(CheckpointError::OtherOrigin { .. })));
}

#[test]
fn nothing_is_assembled_of_a_signature_that_does_not_fit() {
    let (_, key) = key(1);
    let refused = assemble(&checkpoint(1, [7; 32]), &[Signature { key, bytes: vec![0; 64] }]);
    assert!(matches!(refused, Err(CheckpointError::Signature(_))), "{refused:?}");
    assert!(assemble(&checkpoint(1, [7; 32]), &[]).is_err());
}

#[test]
fn a_text_in_another_form_is_no_checkpoint() {
    let root = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=";
    let good = format!("{ORIGIN}\n12\n{root}\nfirst extension\nsecond\n");
    let parsed: Checkpoint = good.parse().unwrap();
    assert_eq!((parsed.to_string(), parsed.extensions), (good.clone(), vec!["first extension".to_owned(), "second".to_owned()]));
    let wrong = [
        format!("{ORIGIN}\n12\n{root}"),
        format!("\n12\n{root}\n"),
        format!("{ORIGIN}\n012\n{root}\n"),
        format!("{ORIGIN}\n+12\n{root}\n"),
        format!("{ORIGIN}\n-1\n{root}\n"),
        format!("{ORIGIN}\n18446744073709551616\n{root}\n"),
        format!("{ORIGIN}\n12\nBwcH\n"),
        format!("{ORIGIN}\n12\n{root}\n\nmore\n"),
        format!("{ORIGIN}\n12\n"),
        String::new(),
    ];
    for text in wrong {
        assert!(text.parse::<Checkpoint>().is_err(), "{text:?}");
    }
}
