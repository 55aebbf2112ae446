//! One TLS, one provider of cryptography: what the tree of dependencies may not hold.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;
use std::process::Command;

/// Name and versions of every package that any target of the workspace builds, tests and build scripts included.
fn packages() -> BTreeMap<String, Vec<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--workspace", "--locked", "--target", "all", "--edges", "normal,build,dev", "--prefix", "none", "--format", "{p}"])
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut packages = BTreeMap::<String, Vec<String>>::new();
    for line in String::from_utf8(output.stdout).unwrap().lines() {
        let mut words = line.split_whitespace();
        let (Some(name), Some(version)) = (words.next(), words.next()) else { continue };
        let versions = packages.entry(name.to_owned()).or_default();
        if !versions.iter().any(|known| known == version) {
            versions.push(version.to_owned());
        }
    }
    packages
}

#[test]
fn neither_ring_nor_openssl_enters_the_tree() {
    let packages = packages();
    for unwanted in ["ring", "openssl", "openssl-sys", "native-tls", "boring", "rustls-openssl"] {
        assert!(!packages.contains_key(unwanted), "{unwanted} is in the tree: `cargo tree -i {unwanted} --target all` says who brings it");
    }
}

#[test]
fn there_is_one_rustls_and_one_provider() {
    let packages = packages();
    for wanted in ["rustls", "rustls-webpki", "aws-lc-rs"] {
        assert_eq!(packages[wanted].len(), 1, "{wanted}: {:?}", packages[wanted]);
    }
}
