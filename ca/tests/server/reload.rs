//! The configuration changes while the CA runs: whole or not at all, recorded, and visible when it was refused.

use std::path::Path;

use chancery_ca::attestation::development::DevelopmentIssuer;
use chancery_ca::config::development_issuer_dir;
use chancery_proto::chancery::v1::{TestPolicyRequest, TestPolicyResponse};

use crate::support::{Ca, NODE, issue};

async fn policy(ca: &Ca) -> TestPolicyResponse {
    let request = TestPolicyRequest { namespace: "shop".into(), service_account: "cart".into(), ..TestPolicyRequest::default() };
    ca.operator().await.test_policy(request).await.unwrap().into_inner()
}

const HALF_AN_HOUR: &str = "[policy.lifetimes]\ndefault = \"30m\"\n";

#[tokio::test]
async fn a_new_lifetime_applies_without_a_restart_and_is_recorded() {
    let ca = Ca::start().await;
    let before = ca.status().await.ledger_entries;
    assert_eq!(policy(&ca).await.lifetime_seconds, 3600);
    Ca::write_config(&ca.directory, HALF_AN_HOUR);
    ca.until("the change in the ledger", |status| status.ledger_entries == before + 1).await;
    ca.until_async("the new lifetime", async || policy(&ca).await.lifetime_seconds == 1800).await;
    let agent = ca.join(NODE).await;
    let issued = issue(&mut ca.connect(Some(&agent)).await, ca.token(|_| ())).await.unwrap();
    assert!(issued.not_after() - issued.not_before() < time::Duration::minutes(31));
}

#[tokio::test]
async fn a_new_cluster_applies_without_a_restart() {
    let ca = Ca::start().await;
    let keys = ca.directory.path().join("east");
    DevelopmentIssuer::open_or_create(&keys).unwrap();
    let cluster = format!(
        "[[cluster]]\nname = \"east\"\nissuer = \"https://k\"\nservice_accounts = [\"*\"]\nshared_identities = true\njwks = {{ file = \"{}\" }}\n",
        keys.join("jwks.json").display()
    );
    Ca::write_config(&ca.directory, &cluster);
    let status = ca.until("the cluster", |status| status.clusters.len() == 2).await;
    assert_eq!(status.clusters[1].keys, 1);
}

#[tokio::test]
async fn a_bad_file_changes_nothing_and_shows() {
    let ca = Ca::start().await;
    let before = ca.status().await.ledger_entries;
    Ca::write_config(&ca.directory, &format!("colour = \"blue\"\n{HALF_AN_HOUR}"));
    let status = ca.until("the refusal", |status| !status.configuration_error.is_empty()).await;
    assert!(status.configuration_error.contains("ca.toml:3:") && status.configuration_error.contains("colour"), "{status:?}");
    assert_eq!((policy(&ca).await.lifetime_seconds, status.ledger_entries), (3600, before));
    assert!(ca.get("/metrics").await.contains("chancery_config_last_reload_successful 0\n"));
    let ready = ca.get("/readyz").await;
    assert!(ready.starts_with("HTTP/1.1 200") && ready.contains("degraded"), "{ready}");

    Ca::write_config(&ca.directory, HALF_AN_HOUR);
    ca.until("the mended file", |status| status.configuration_error.is_empty()).await;
    assert_eq!(policy(&ca).await.lifetime_seconds, 1800);
    assert!(ca.get("/metrics").await.contains("chancery_config_last_reload_successful 1\n"));
}

#[tokio::test]
async fn a_change_that_needs_a_restart_is_refused_whole() {
    let ca = Ca::start().await;
    Ca::write_config(&ca.directory, &format!("trust_domain = \"other.example\"\n{HALF_AN_HOUR}"));
    let status = ca.until("the refusal", |status| !status.configuration_error.is_empty()).await;
    assert!(status.configuration_error.contains("after a restart: trust_domain"), "{}", status.configuration_error);
    assert_eq!(policy(&ca).await.lifetime_seconds, 3600);
}

#[tokio::test]
async fn a_cluster_whose_keys_cannot_be_read_is_refused_whole() {
    let ca = Ca::start().await;
    let keys = ca.directory.path().join("jwks.json");
    std::fs::write(&keys, "no JWKS").unwrap();
    let cluster = format!(
        "{HALF_AN_HOUR}[[cluster]]\nname = \"east\"\nissuer = \"https://k\"\nservice_accounts = [\"*\"]\nshared_identities = true\njwks = {{ file = \"{}\" }}\n",
        keys.display()
    );
    Ca::write_config(&ca.directory, &cluster);
    let status = ca.until("the refusal", |status| !status.configuration_error.is_empty()).await;
    assert!(status.configuration_error.contains("east"), "{}", status.configuration_error);
    assert_eq!((status.clusters.len(), policy(&ca).await.lifetime_seconds), (1, 3600));
}

fn replace_keys(ca: &Ca, new: &Path) {
    let issuer = development_issuer_dir(&ca.data_dir());
    for file in ["issuer.pem", "jwks.json"] {
        std::fs::rename(new.join(file), issuer.join(file)).unwrap();
    }
}

#[tokio::test]
async fn replaced_keys_of_a_cluster_are_loaded() {
    let ca = Ca::start().await;
    let agent = ca.join(NODE).await;
    let mut client = ca.connect(Some(&agent)).await;
    let old = ca.token(|_| ());
    let new = ca.directory.path().join("new");
    DevelopmentIssuer::open_or_create(&new).unwrap();
    replace_keys(&ca, &new);
    ca.until_async("the new keys", async || issue(&mut client.clone(), ca.token(|_| ())).await.is_ok()).await;
    let refusal = issue(&mut client, old).await.unwrap_err();
    assert_eq!(refusal.reason, "token_unknown_key");
}
