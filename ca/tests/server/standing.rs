//! Ready or not: each condition of `/readyz` turned false.

use crate::support::Ca;

#[tokio::test]
async fn a_ca_that_can_issue_is_ready() {
    let ca = Ca::start().await;
    let ready = ca.get("/readyz").await;
    assert!(ready.starts_with("HTTP/1.1 200") && ready.ends_with("ready\n"), "{ready}");
    assert!(ca.get("/livez").await.starts_with("HTTP/1.1 200"));
    assert!(ca.status().await.ready);
}

#[tokio::test]
async fn a_ca_whose_issuing_certificate_has_expired_is_not_ready() {
    let ca = Ca::start().await;
    // Longer than the root lives, so that no renewal comes to its help.
    ca.clock.advance(time::Duration::days(400));
    let ready = ca.get("/readyz").await;
    assert!(ready.starts_with("HTTP/1.1 503") && ready.contains("issuing certificate"), "{ready}");
}

#[tokio::test]
async fn a_ca_whose_clock_is_before_its_certificates_is_not_ready() {
    let ca = Ca::start().await;
    ca.clock.advance(-time::Duration::days(1));
    assert!(ca.get("/readyz").await.contains("issuing certificate"));
}

#[tokio::test]
async fn a_ca_without_the_keys_of_a_cluster_is_not_ready_and_names_it() {
    // Nobody listens on port 1.
    let cluster = "[[cluster]]\nname = \"east\"\nissuer = \"https://k\"\nservice_accounts = [\"*\"]\nshared_identities = true\n\
                   jwks = { url = \"https://127.0.0.1:1/jwks\" }\n";
    let ca = Ca::start_with(cluster).await;
    let ready = ca.get("/readyz").await;
    assert!(ready.starts_with("HTTP/1.1 503") && ready.contains("cluster east"), "{ready}");
    let status = ca.status().await;
    assert!(!status.ready && status.problems[0].contains("cluster east"), "{status:?}");
}
