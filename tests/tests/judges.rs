//! Certificates judged by others: OpenSSL, pkilint, the `spiffe` crate.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use chancery_tests::envoy::Protocol;
use chancery_tests::lab::Lab;
use chancery_tests::mesh::{Mesh, Settings};
use chancery_tests::secrets::{self, Secrets};
use chancery_tests::tools;
use rustls_pki_types::CertificateDer;
use serde_json::Value;

const HOUR: Duration = Duration::from_secs(3600);

/// What the agent hands to a proxy.
async fn issued() -> (Mesh, Secrets) {
    let settings = Settings { envoy: PathBuf::new(), lifetime: HOUR, token_lifetime: HOUR, protocol: Protocol::Stream };
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
    if Command::new("openssl").arg("version").output().is_err() {
        tools::skip("openssl is not installed");
        return;
    }
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
        let mut verify = Command::new("openssl");
        verify.args(["verify", "-x509_strict", "-purpose", purpose, "-CAfile"]).arg(&roots).arg("-untrusted").arg(&issuing).arg(&leaf);
        let (verified, words) = output(&mut verify);
        assert!(verified && words.trim().ends_with(": OK"), "{words}");
    }
    let (verified, words) = output(Command::new("openssl").args(["verify", "-x509_strict", "-CAfile"]).arg(&roots).arg(&leaf));
    assert!(!verified, "without the issuing certificate the chain is broken: {words}");
}

#[tokio::test]
async fn pkilint_finds_no_error_in_root_issuing_certificate_and_leaf() {
    let Some(pkilint) = tools::pkilint() else { return };
    let (mesh, secrets) = issued().await;
    let certificates = secrets.svid.chain().iter().chain(secrets.bundle.x509_authorities());
    for (number, certificate) in certificates.enumerate() {
        let errors = lint(&pkilint, &mesh.lab, number, certificate);
        assert!(errors.is_empty(), "certificate {number} of leaf, issuing certificate, root: {errors:?}");
    }
}

/// What pkilint finds wrong with a certificate.
fn lint(pkilint: &Path, lab: &Lab, number: usize, certificate: &CertificateDer<'_>) -> Vec<String> {
    let path = lab.at(&format!("{number}.der"));
    std::fs::write(&path, certificate).unwrap();
    let report = Command::new(pkilint).args(["lint", "--severity", "ERROR", "--format", "JSON"]).arg(path).output().unwrap();
    let report: Value = serde_json::from_slice(&report.stdout).unwrap();
    let findings = report["results"].as_array().unwrap().iter().flat_map(|result| result["finding_descriptions"].as_array().unwrap());
    // Its list of URI schemes is closed and does not have SPIFFE's, so every SPIFFE ID is "invalid URI syntax" to it.
    let known = |finding: &Value| {
        finding["code"] == "pkix.invalid_uri_syntax"
            && finding["message"].as_str().unwrap().starts_with("Invalid URI syntax: \"spiffe://mesh.test")
    };
    findings.filter(|finding| !known(finding)).map(Value::to_string).collect()
}

#[tokio::test]
async fn pkilint_would_find_an_error() {
    let Some(pkilint) = tools::pkilint() else { return };
    let mut params = rcgen::CertificateParams::default();
    // RFC 5280 §4.1.2.5: not after the end.
    (params.not_before, params.not_after) = (params.not_after, params.not_before);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap();
    assert!(!lint(&pkilint, &Lab::new().unwrap(), 0, certificate.der()).is_empty());
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
