//! What the real agent hands to a proxy, judged by others. `judged_by_others` judges every kind of certificate, at any time and by any policy.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use chancery_tests::lab::Lab;
use chancery_tests::mesh::{Mesh, Settings};
use chancery_tests::secrets::{self, Secrets};
use chancery_tests::tools;

/// What the agent hands to a proxy.
async fn issued() -> (Mesh, Secrets) {
    let settings = Settings::lasting(PathBuf::new());
    let mesh = Mesh::start(Lab::new().unwrap(), settings).await.unwrap();
    let token = std::fs::read_to_string(mesh.volume("cart").unwrap().token()).unwrap();
    let secrets = secrets::fetch(&mesh.agent.sds_socket, Some(&token), Duration::from_secs(10)).await.unwrap();
    (mesh, secrets)
}

fn output(command: &mut Command) -> (bool, String) {
    let output = command.output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output.status.success(), text)
}

#[tokio::test]
async fn openssl_verifies_the_chain() {
    let Some(openssl) = tools::openssl() else { return };
    let (mesh, secrets) = issued().await;
    let pem = secrets.svid.chain_pem();
    let (leaf, issuing) = pem.split_at(pem.find("-----END CERTIFICATE-----\n").unwrap() + 26);
    let [roots, leaf, issuing] =
        [("roots", secrets.bundle.to_pem()), ("leaf", leaf.to_owned()), ("issuing", issuing.to_owned())].map(|(name, pem)| {
            let path = mesh.lab.at(&format!("{name}.pem"));
            std::fs::write(&path, pem).unwrap();
            path
        });
    for purpose in ["sslserver", "sslclient"] {
        let mut verify = Command::new(&openssl);
        verify.args(["verify", "-x509_strict", "-purpose", purpose, "-CAfile"]).arg(&roots).arg("-untrusted").arg(&issuing).arg(&leaf);
        let (verified, words) = output(&mut verify);
        assert!(verified && words.trim().ends_with(": OK"), "{words}");
    }
    let (verified, words) = output(Command::new(&openssl).args(["verify", "-x509_strict", "-CAfile"]).arg(&roots).arg(&leaf));
    assert!(!verified, "without the issuing certificate the chain is broken: {words}");
}

#[tokio::test]
async fn the_spiffe_crate_accepts_svid_and_bundle() {
    let (_mesh, secrets) = issued().await;
    let chain: Vec<u8> = secrets.svid.chain().iter().flat_map(|certificate| certificate.to_vec()).collect();
    let svid = spiffe::X509Svid::parse_from_der(&chain, secrets.svid.key().secret_pkcs8()).unwrap();
    assert_eq!(svid.spiffe_id().to_string(), "spiffe://mesh.test/ns/shop/sa/cart");
    let roots: Vec<u8> = secrets.bundle.x509_authorities().iter().flat_map(|root| root.to_vec()).collect();
    let bundle = spiffe::X509Bundle::parse_from_der("mesh.test".try_into().unwrap(), &roots).unwrap();
    assert_eq!(bundle.authorities().len(), secrets.bundle.x509_authorities().len());
}
