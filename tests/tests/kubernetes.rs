//! Tokens of the real API server, as the CA reads them.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::time::Duration;

use chancery_identity::token::TokenKeys;
use chancery_tests::kubernetes::{ISSUER, shared};
use time::OffsetDateTime;

const CLUSTER: &str = "real";
const AUDIENCE: &str = "chancery";
const TEN_MINUTES: Duration = Duration::from_secs(600);

#[tokio::test]
async fn a_pods_token_is_verified_offline_with_the_published_keys_and_accepted_by_a_token_review() {
    let Some(server) = shared().await.unwrap() else { return };
    let admin = server.admin().await.unwrap();
    let node = admin.node("node").await.unwrap();
    let namespace = admin.namespace("shop").await.unwrap();
    let account = admin.account(&namespace, "cart").await.unwrap();
    let pod = admin.pod(&namespace, "cart-0", "cart", &node.name).await.unwrap();
    let token = admin.token(&pod, AUDIENCE, TEN_MINUTES).await.unwrap();

    let jwks = admin.jwks().await.unwrap();
    let keys = TokenKeys::from_jwks(CLUSTER, ISSUER, &jwks).unwrap();
    let now = OffsetDateTime::now_utc();
    let verified = keys.verify(&token, &[AUDIENCE.to_owned()], now).unwrap();
    assert_eq!((verified.namespace.as_str(), verified.service_account.name.as_str()), (namespace.as_str(), "cart"));
    assert_eq!((verified.service_account.uid, verified.pod.uid, verified.node.uid), (account, pod.uid, node.uid));
    assert_eq!((verified.pod.name, verified.node.name), ("cart-0".to_owned(), node.name.clone()));
    assert_eq!(verified.expires_at - verified.issued_at, TEN_MINUTES);

    let status = admin.review(&token, AUDIENCE).await.unwrap();
    assert_eq!((status.authenticated, status.audiences), (Some(true), Some(vec![AUDIENCE.to_owned()])), "{:?}", status.error);
    let user = status.user.unwrap();
    assert_eq!(user.username, Some(format!("system:serviceaccount:{namespace}:cart")));
    let extra = user.extra.unwrap();
    let said = |name: &str| extra[&format!("authentication.kubernetes.io/{name}")].join(" ");
    assert_eq!((said("pod-uid"), said("node-uid")), (pod.uid.to_string(), node.uid.to_string()));
    assert_eq!(said("credential-id"), format!("JTI={}", verified.token_id));
    let other = admin.review(&token, "vault").await.unwrap();
    assert_ne!(other.authenticated, Some(true), "for another audience it is no token");
}
