//! Every refused request: a clear error, an entry in the list of refusals, nothing in the ledger, and the CA goes on.

use aws_lc_rs::hmac;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rcgen::{BasicConstraints, CertificateParams, CustomExtension, IsCa, KeyPair, KeyUsagePurpose, SanType};
use serde_json::{Value, json};

use super::*;

fn claims(f: &Fixture) -> Value {
    let now = f.ca.clock.now().unix_timestamp();
    json!({
        "iss": ISSUER, "sub": "system:serviceaccount:shop:cart", "aud": ["chancery"],
        "iat": now, "nbf": now, "exp": now + 600, "jti": Uuid::new_v4(),
        "kubernetes.io": {
            "namespace": "shop",
            "serviceaccount": { "name": "cart", "uid": Uuid::new_v4() },
            "pod": { "name": "cart-1", "uid": pod_uid("shop", "cart-1") },
            "node": { "name": "node-a", "uid": node_uid("node-a") },
        },
    })
}

/// A token with the claims of [`claims`] after `change`.
fn changed(f: &Fixture, change: impl FnOnce(&mut Value)) -> Zeroizing<String> {
    let mut claims = claims(f);
    change(&mut claims);
    f.issuer.sign_claims(&claims).unwrap()
}

fn forged(f: &Fixture, header: &Value, sign: impl FnOnce(&str) -> Vec<u8>) -> Zeroizing<String> {
    let encode = |part: &Value| URL_SAFE_NO_PAD.encode(part.to_string());
    let signed = format!("{}.{}", encode(header), encode(&claims(f)));
    let signature = URL_SAFE_NO_PAD.encode(sign(&signed));
    Zeroizing::new(format!("{signed}.{signature}"))
}

async fn refused(f: &Fixture, case: &str, request: Request, reasons: &[&str]) {
    let before = f.ca.store.len();
    let request_id = request.request_id.to_string();
    let token = request.token.clone();
    let refusal = f.issue(request).await.expect_err(case);
    assert!(reasons.contains(&refusal.reason), "{case}: {refusal:?}");
    assert!(refusal.message.len() < 600 && (token.len() < 20 || !refusal.message.contains(token.as_str())), "{case}: {refusal:?}");
    assert_eq!(f.ca.store.len(), before, "{case}: nothing is recorded as issued");
    let listed = f.refusals.list_newest(&RefusalFilter::default(), 1).pop().unwrap();
    assert_eq!((listed.request_id, listed.reason.as_str(), listed.agent.as_str()), (request_id, refusal.reason, f.caller.id().as_str()));
    assert_eq!(f.counts.refused.lock().unwrap().last(), Some(&refusal.reason));
}

async fn still_issues(f: &Fixture) {
    let (request, _) = f.request("cart-1");
    f.issue(request).await.unwrap();
}

#[tokio::test]
async fn bad_tokens_are_refused() {
    let f = fixture().await;
    let stranger = DevelopmentIssuer::open_or_create(&f.ca.parent.path().join("stranger")).unwrap();
    let kid: Value = serde_json::from_str(&f.issuer.jwks().unwrap()).unwrap();
    let key = kid["keys"][0].clone();
    let public = URL_SAFE_NO_PAD.decode(key["n"].as_str().unwrap()).unwrap();
    let mut other_node = token_request("cart-1");
    other_node.node = "node-b".into();
    let mut other_namespace = token_request("teller-1");
    other_namespace.namespace = "bank".into();
    let now = f.ca.clock.now();
    let kubernetes = |claims: &mut Value, claim: &str| drop(claims["kubernetes.io"].as_object_mut().unwrap().remove(claim));

    let cases: Vec<(&str, Zeroizing<String>, &[&str])> = vec![
        ("expired", changed(&f, |c| c["exp"] = json!(now.unix_timestamp() - 60)), &["token_expired"]),
        ("not yet valid", changed(&f, |c| c["nbf"] = json!(now.unix_timestamp() + 300)), &["token_not_yet_valid"]),
        ("wrong audience", changed(&f, |c| c["aud"] = json!(["vault"])), &["token_audience"]),
        ("the agents' audience", changed(&f, |c| c["aud"] = json!(["chancery-agent"])), &["token_audience"]),
        ("wrong issuer", changed(&f, |c| c["iss"] = json!("https://other")), &["token_issuer"]),
        ("unknown key", stranger.sign_claims(&claims(&f)).unwrap(), &["token_unknown_key"]),
        ("alg none", forged(&f, &json!({"alg": "none", "kid": key["kid"]}), |_| Vec::new()), &["token_algorithm"]),
        (
            "HS256 with the public key",
            forged(&f, &json!({"alg": "HS256", "kid": key["kid"]}), |signed| {
                hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &public), signed.as_bytes()).as_ref().to_vec()
            }),
            &["token_algorithm"],
        ),
        (
            "forged with the claims of a known pod",
            forged(&f, &json!({"alg": "RS256", "kid": key["kid"]}), |_| vec![0x5a; 256]),
            &["token_signature"],
        ),
        ("without pod", changed(&f, |c| kubernetes(c, "pod")), &["token_not_bound"]),
        ("without node", changed(&f, |c| kubernetes(c, "node")), &["token_missing_claim"]),
        ("for another node", f.issuer.sign(&other_node, now).unwrap(), &["token_other_node"]),
        ("for another's namespace", f.issuer.sign(&other_namespace, now).unwrap(), &["account_not_allowed"]),
        ("1 MB of garbage", Zeroizing::new("A".repeat(1 << 20)), &["token_too_large"]),
        ("empty", Zeroizing::default(), &["token_malformed"]),
    ];
    for (case, token, reasons) in cases {
        let (mut request, _) = f.request("cart-1");
        request.token = token;
        refused(&f, case, request, reasons).await;
    }
    still_issues(&f).await;
}

fn csr_of(change: impl FnOnce(&mut CertificateParams)) -> Bytes {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    change(&mut params);
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    Bytes::copy_from_slice(params.serialize_request(&key).unwrap().der())
}

#[tokio::test]
async fn bad_csrs_are_refused() {
    let f = fixture().await;
    let names = |name: SanType| csr_of(|params| params.subject_alt_names = vec![name]);
    let uri = |id: &str| names(SanType::URI(id.try_into().unwrap()));
    let good = csr_of(|_| {}).to_vec();
    let mut broken = good.clone();
    *broken.last_mut().unwrap() ^= 1;
    let cases: Vec<(&str, Bytes, &[&str])> = vec![
        ("broken signature", broken.into(), &["csr_signature", "csr_malformed"]),
        ("trailing bytes", [&good[..], &[0]].concat().into(), &["csr_malformed"]),
        ("CA:TRUE", csr_of(|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)), &["csr_extra"]),
        ("keyCertSign", csr_of(|params| params.key_usages = vec![KeyUsagePurpose::KeyCertSign]), &["csr_extra"]),
        (
            "an unknown extension",
            csr_of(|params| params.custom_extensions = vec![CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 1], vec![5, 0])]),
            &["csr_extra"],
        ),
        ("another SPIFFE ID", uri("spiffe://example.org/ns/shop/sa/checkout"), &["csr_other_id"]),
        ("the CA's own ID", uri("spiffe://example.org/chancery/ca"), &["csr_other_id"]),
        ("a URI that is no SPIFFE ID", uri("https://example.org"), &["csr_extra", "csr_malformed"]),
        ("a DNS name", names(SanType::DnsName("bank.example.org".try_into().unwrap())), &["dns_name_not_allowed"]),
        ("an IP address", names(SanType::IpAddress([10, 0, 0, 1].into())), &["csr_extra"]),
        ("1 MB of garbage", vec![0x30; 1 << 20].into(), &["csr_too_large"]),
        ("empty", Bytes::new(), &["csr_malformed"]),
    ];
    for (case, csr, reasons) in cases {
        let (mut request, _) = f.request("cart-1");
        request.csr = csr;
        refused(&f, case, request, reasons).await;
        let listed = f.refusals.list_newest(&RefusalFilter::default(), 1).pop().unwrap();
        assert_eq!((listed.namespace.as_str(), listed.pod.as_str()), ("shop", "cart-1"), "{case}: the token was verified");
    }
    let (mut request, _) = f.request("cart-1");
    request.csr = uri("spiffe://example.org/ns/shop/sa/cart");
    f.issue(request).await.unwrap();
}

#[tokio::test]
async fn a_key_type_that_the_policy_does_not_list_is_refused() {
    let f = fixture().await;
    let (mut request, _) = f.request("cart-1");
    request.csr = csr::generate(KeyType::Ed25519, None).unwrap().0.into();
    refused(&f, "ed25519", request, &["key_type_not_allowed"]).await;
    still_issues(&f).await;
}

#[tokio::test]
async fn a_clock_before_the_issuing_certificate_refuses_for_now() {
    let f = fixture().await;
    f.ca.clock.advance(time::Duration::hours(-1));
    let (request, _) = f.request("cart-1");
    refused(&f, "clock set back", request, &["ca_clock"]).await;
    f.ca.clock.advance(time::Duration::hours(1));
    still_issues(&f).await;
}
