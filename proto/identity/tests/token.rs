//! Offline verification of service-account tokens: what is accepted, and each way to be refused.

#![allow(clippy::unwrap_used, reason = "a test may fail wherever it likes")]

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P521_SHA512_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chancery_identity::token::claims::{Claims, Kubernetes, Object};
use chancery_identity::token::{LEEWAY, MAX_TOKEN_BYTES, TokenError, TokenKeys, VerifiedToken};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use proptest::prelude::*;
use rcgen::{KeyPair, PublicKeyData};
use serde_json::{Value, json};
use time::{Duration, OffsetDateTime};

const CLUSTER: &str = "east";
const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
const AUDIENCE: &str = "chancery";
const UID: &str = "0f3a1c52-5f6b-4f0a-9d5e-2b7f6f0c9a11";

fn now() -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap()
}

/// A cluster's signing key.
struct Signer {
    algorithm: Algorithm,
    private: EncodingKey,
    jwk: Value,
}

fn encode(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// The JWK of an uncompressed point.
fn ec_jwk(kid: &str, curve: &str, point: &[u8]) -> Value {
    let (x, y) = point[1..].split_at((point.len() - 1) / 2);
    json!({"kty": "EC", "crv": curve, "kid": kid, "use": "sig", "x": encode(x), "y": encode(y)})
}

impl Signer {
    fn es256(kid: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let jwk = ec_jwk(kid, "P-256", key.der_bytes());
        Self { algorithm: Algorithm::ES256, private: EncodingKey::from_ec_der(key.serialized_der()), jwk }
    }

    fn es384(kid: &str) -> Self {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        let jwk = ec_jwk(kid, "P-384", key.der_bytes());
        Self { algorithm: Algorithm::ES384, private: EncodingKey::from_ec_der(key.serialized_der()), jwk }
    }

    fn rs256(kid: &str) -> Self {
        let key = KeyPair::generate_for(&rcgen::PKCS_RSA_SHA256).unwrap();
        // jsonwebtoken wants PKCS#1, which begins behind the 26 bytes that PKCS#8 puts before a key of 2048 bits.
        let private = EncodingKey::from_rsa_der(&key.serialized_der()[26..]);
        let mut jwk = serde_json::to_value(jsonwebtoken::jwk::Jwk::from_encoding_key(&private, Algorithm::RS256).unwrap()).unwrap();
        jwk["kid"] = kid.into();
        Self { algorithm: Algorithm::RS256, private, jwk }
    }

    fn keys(&self) -> TokenKeys {
        keys(&[&self.jwk])
    }

    fn header(&self) -> Header {
        let mut header = Header::new(self.algorithm);
        header.kid = self.jwk["kid"].as_str().map(str::to_owned);
        header
    }

    fn sign(&self, claims: &impl serde::Serialize) -> String {
        jsonwebtoken::encode(&self.header(), claims, &self.private).unwrap()
    }
}

fn keys(jwks: &[&Value]) -> TokenKeys {
    TokenKeys::from_jwks(CLUSTER, ISSUER, &json!({"keys": jwks}).to_string()).unwrap()
}

fn object(name: &str) -> Object {
    Object { name: Some(name.into()), uid: Some(UID.into()) }
}

fn claims() -> Claims {
    Claims {
        iss: Some(ISSUER.into()),
        sub: Some("system:serviceaccount:shop:cart".into()),
        aud: vec!["other".into(), AUDIENCE.into()],
        exp: Some(now().unix_timestamp() + 600),
        nbf: Some(now().unix_timestamp()),
        iat: Some(now().unix_timestamp()),
        jti: Some("9e0c0b57-6f8e-4f52-8f5e-6f1f6a1f0b5a".into()),
        kubernetes: Some(Kubernetes {
            namespace: Some("shop".into()),
            serviceaccount: Some(object("cart")),
            pod: Some(object("cart-5d9c7b-x2x9q")),
            node: Some(object("node-1.example")),
        }),
    }
}

fn audiences() -> Vec<String> {
    vec![AUDIENCE.into()]
}

fn verify(keys: &TokenKeys, token: &str) -> Result<VerifiedToken, TokenError> {
    keys.verify(token, &audiences(), now())
}

/// Signs the claims after `change` and verifies them.
fn after(change: impl FnOnce(&mut Claims)) -> Result<VerifiedToken, TokenError> {
    let signer = Signer::es256("k");
    let mut claims = claims();
    change(&mut claims);
    verify(&signer.keys(), &signer.sign(&claims))
}

fn after_kubernetes(change: impl FnOnce(&mut Kubernetes)) -> Result<VerifiedToken, TokenError> {
    after(|claims| change(claims.kubernetes.as_mut().unwrap()))
}

#[track_caller]
fn assert_claim(result: Result<VerifiedToken, TokenError>, expected: &str) {
    match result {
        Err(TokenError::Claim { claim, .. }) => assert_eq!(claim, expected),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_token_of_each_allowed_algorithm_tells_what_it_is_bound_to() {
    for signer in [Signer::rs256("k"), Signer::es256("k"), Signer::es384("k")] {
        let token = verify(&signer.keys(), &signer.sign(&claims())).unwrap_or_else(|error| panic!("{:?}: {error}", signer.algorithm));
        assert_eq!(token.cluster, CLUSTER);
        assert_eq!((token.namespace.as_str(), token.service_account.name.as_str()), ("shop", "cart"));
        assert_eq!((token.pod.name.as_str(), token.node.name.as_str()), ("cart-5d9c7b-x2x9q", "node-1.example"));
        assert_eq!(token.node.uid.to_string(), UID);
        assert_eq!(token.token_id, "9e0c0b57-6f8e-4f52-8f5e-6f1f6a1f0b5a");
        assert_eq!((token.issued_at, token.expires_at), (now(), now() + Duration::seconds(600)));
    }
}

#[test]
fn a_token_signed_with_es512_is_accepted() {
    let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P521_SHA512_FIXED_SIGNING, &SystemRandom::new()).unwrap();
    let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P521_SHA512_FIXED_SIGNING, document.as_ref()).unwrap();
    let message = format!("{}.{}", encode(br#"{"alg":"ES512","kid":"k"}"#), encode(&serde_json::to_vec(&claims()).unwrap()));
    let signature = key.sign(&SystemRandom::new(), message.as_bytes()).unwrap();
    let keys = keys(&[&ec_jwk("k", "P-521", key.public_key().as_ref())]);
    assert!(verify(&keys, &format!("{message}.{}", encode(signature.as_ref()))).is_ok());
}

#[test]
fn claims_as_the_api_server_writes_them_are_read() {
    let signer = Signer::es256("k");
    let claims = json!({
        "aud": AUDIENCE, "exp": now().unix_timestamp() + 600, "iat": now().unix_timestamp(), "nbf": now().unix_timestamp(),
        "iss": ISSUER, "jti": UID, "sub": "system:serviceaccount:shop:cart",
        "kubernetes.io": {
            "namespace": "shop", "warnafter": now().unix_timestamp() + 500,
            "node": {"name": "node-1", "uid": UID}, "pod": {"name": "cart-0", "uid": UID}, "serviceaccount": {"name": "cart", "uid": UID},
        },
    });
    assert!(verify(&signer.keys(), &signer.sign(&claims)).is_ok());
}

#[test]
fn an_expired_token_is_refused() {
    let exp = now().unix_timestamp();
    assert_eq!(after(|claims| claims.exp = Some(exp)).unwrap_err(), TokenError::Expired(now()));
    assert!(after(|claims| claims.exp = Some(exp + 1)).is_ok());
}

#[test]
fn a_token_not_yet_valid_is_refused() {
    let latest = now() + LEEWAY;
    let beyond = latest + Duration::seconds(1);
    assert!(after(|claims| claims.nbf = Some(latest.unix_timestamp())).is_ok(), "the issuer's clock may be a little ahead");
    assert_eq!(after(|claims| claims.nbf = Some(beyond.unix_timestamp())).unwrap_err(), TokenError::NotYetValid(beyond));
    assert_eq!(after(|claims| claims.iat = Some(beyond.unix_timestamp())).unwrap_err(), TokenError::NotYetValid(beyond));
    assert!(after(|claims| claims.nbf = None).is_ok(), "nbf is optional");
}

#[test]
fn a_token_with_an_impossible_time_is_refused() {
    assert_claim(after(|claims| claims.exp = Some(i64::MAX)), "exp");
}

#[test]
fn a_token_for_another_audience_is_refused() {
    let error = after(|claims| claims.aud = vec!["chancery-agent".into()]).unwrap_err();
    assert_eq!(error, TokenError::Audience { found: vec!["chancery-agent".into()], expected: audiences() });
    assert!(matches!(after(|claims| claims.aud.clear()), Err(TokenError::Audience { .. })));
}

#[test]
fn a_token_of_another_issuer_is_refused() {
    let error = after(|claims| claims.iss = Some("https://elsewhere".into())).unwrap_err();
    assert_eq!(error, TokenError::Issuer { found: "https://elsewhere".into(), expected: ISSUER.into() });
}

#[test]
fn a_token_of_an_unknown_key_is_refused() {
    let error = verify(&Signer::es256("k").keys(), &Signer::es256("new").sign(&claims())).unwrap_err();
    assert_eq!(error, TokenError::UnknownKey { cluster: CLUSTER.into(), kid: "new".into() });
}

#[test]
fn a_token_of_another_cluster_with_the_same_issuer_and_key_name_is_refused() {
    let error = verify(&Signer::rs256("k").keys(), &Signer::rs256("k").sign(&claims())).unwrap_err();
    assert_eq!(error, TokenError::Signature(CLUSTER.into()));
}

#[test]
fn a_token_forged_with_the_claims_of_another_pod_is_refused() {
    let signer = Signer::es256("k");
    let token = signer.sign(&claims());
    let mut forged = claims();
    forged.kubernetes.as_mut().unwrap().pod = Some(object("checkout-0"));
    let mut parts: Vec<&str> = token.split('.').collect();
    let payload = encode(&serde_json::to_vec(&forged).unwrap());
    parts[1] = &payload;
    assert_eq!(verify(&signer.keys(), &parts.join(".")).unwrap_err(), TokenError::Signature(CLUSTER.into()));
}

#[test]
fn a_token_with_alg_none_is_refused() {
    let payload = encode(&serde_json::to_vec(&claims()).unwrap());
    for name in ["none", "None", "NONE"] {
        let header = encode(json!({"alg": name, "kid": "k"}).to_string().as_bytes());
        let error = verify(&Signer::es256("k").keys(), &format!("{header}.{payload}.")).unwrap_err();
        assert_eq!(error, TokenError::Algorithm(name.into()));
    }
}

#[test]
fn a_token_signed_with_hs256_and_the_public_key_is_refused() {
    let signer = Signer::rs256("k");
    let mut header = Header::new(Algorithm::HS256);
    header.kid = Some("k".into());
    let modulus = URL_SAFE_NO_PAD.decode(signer.jwk["n"].as_str().unwrap()).unwrap();
    let token = jsonwebtoken::encode(&header, &claims(), &EncodingKey::from_secret(&modulus)).unwrap();
    assert_eq!(verify(&signer.keys(), &token).unwrap_err(), TokenError::Algorithm("HS256".into()));
}

#[test]
fn a_token_that_names_another_algorithm_than_its_key_has_is_refused() {
    let signer = Signer::es256("k");
    let other = Signer::rs256("k");
    assert_eq!(verify(&signer.keys(), &other.sign(&claims())).unwrap_err(), TokenError::Algorithm("RS256".into()));
}

#[test]
fn a_token_whose_header_demands_extensions_is_refused() {
    let signer = Signer::es256("k");
    let token = signer.sign(&claims());
    let header = encode(br#"{"alg":"ES256","kid":"k","crit":["b64"],"b64":false}"#);
    let rest = token.split_once('.').unwrap().1;
    assert!(matches!(verify(&signer.keys(), &format!("{header}.{rest}")), Err(TokenError::Malformed(_))));
}

#[test]
fn without_a_key_name_exactly_one_key_must_fit() {
    let (one, other, rsa) = (Signer::es256("one"), Signer::es256("other"), Signer::rs256("rsa"));
    let mut header = one.header();
    header.kid = None;
    let token = jsonwebtoken::encode(&header, &claims(), &one.private).unwrap();
    assert!(verify(&keys(&[&one.jwk, &rsa.jwk]), &token).is_ok());
    let error = verify(&keys(&[&one.jwk, &other.jwk]), &token).unwrap_err();
    assert_eq!(error, TokenError::UnknownKey { cluster: CLUSTER.into(), kid: String::new() });
}

#[test]
fn a_token_without_pod_or_node_claim_is_refused() {
    assert_eq!(after_kubernetes(|bound| bound.pod = None).unwrap_err(), TokenError::MissingClaim("kubernetes.io.pod"));
    assert_eq!(after_kubernetes(|bound| bound.node = None).unwrap_err(), TokenError::MissingClaim("kubernetes.io.node"));
}

#[test]
fn a_token_whose_node_has_no_uid_is_refused() {
    let error = after_kubernetes(|bound| bound.node.as_mut().unwrap().uid = None).unwrap_err();
    assert_eq!(error, TokenError::MissingClaim("kubernetes.io.node.uid"));
}

#[test]
fn a_token_that_lacks_any_other_claim_is_refused_by_its_name() {
    let missing = |result: Result<VerifiedToken, TokenError>| match result {
        Err(TokenError::MissingClaim(claim)) => claim,
        other => panic!("{other:?}"),
    };
    assert_eq!(missing(after(|claims| claims.iss = None)), "iss");
    assert_eq!(missing(after(|claims| claims.sub = None)), "sub");
    assert_eq!(missing(after(|claims| claims.exp = None)), "exp");
    assert_eq!(missing(after(|claims| claims.iat = None)), "iat");
    assert_eq!(missing(after(|claims| claims.jti = None)), "jti");
    assert_eq!(missing(after(|claims| claims.jti = Some(String::new()))), "jti");
    assert_eq!(missing(after(|claims| claims.kubernetes = None)), "kubernetes.io");
    assert_eq!(missing(after_kubernetes(|bound| bound.namespace = None)), "kubernetes.io.namespace");
    assert_eq!(missing(after_kubernetes(|bound| bound.serviceaccount = None)), "kubernetes.io.serviceaccount");
}

#[test]
fn a_token_whose_subject_contradicts_its_binding_is_refused() {
    assert_claim(after(|claims| claims.sub = Some("system:serviceaccount:shop:checkout".into())), "sub");
}

#[test]
fn names_that_could_leave_their_segment_of_an_id_are_refused() {
    for name in ["a/b", "..", ".", "", "a..b", "-a", "a-", "A", "a_b", "ä", "a%2fb", &"a".repeat(254)] {
        let subject = |namespace: &str, account: &str| Some(format!("system:serviceaccount:{namespace}:{account}"));
        let namespace = after(|claims| {
            claims.sub = subject(name, "cart");
            claims.kubernetes.as_mut().unwrap().namespace = Some(name.into());
        });
        assert_claim(namespace, "kubernetes.io.namespace");
        let account = after(|claims| {
            claims.sub = subject("shop", name);
            claims.kubernetes.as_mut().unwrap().serviceaccount = Some(object(name));
        });
        assert_claim(account, "kubernetes.io.serviceaccount.name");
        assert_claim(after_kubernetes(|bound| bound.pod = Some(object(name))), "kubernetes.io.pod.name");
        assert_claim(after_kubernetes(|bound| bound.node = Some(object(name))), "kubernetes.io.node.name");
    }
    assert_claim(after_kubernetes(|bound| bound.namespace = Some("a.b".into())), "kubernetes.io.namespace");
}

#[test]
fn a_uid_that_is_no_uuid_is_refused() {
    assert_claim(after_kubernetes(|bound| bound.pod.as_mut().unwrap().uid = Some("../x".into())), "kubernetes.io.pod.uid");
}

#[test]
fn a_token_id_that_is_too_long_or_unprintable_is_refused() {
    assert_claim(after(|claims| claims.jti = Some("a".repeat(129))), "jti");
    assert_claim(after(|claims| claims.jti = Some("a\nb".into())), "jti");
}

#[test]
fn one_megabyte_of_garbage_is_refused_by_its_size() {
    let keys = Signer::es256("k").keys();
    assert_eq!(verify(&keys, &"A".repeat(1 << 20)).unwrap_err(), TokenError::TooLarge(1 << 20));
    assert!(matches!(verify(&keys, &"A".repeat(MAX_TOKEN_BYTES)), Err(TokenError::Malformed(_))));
    assert!(matches!(verify(&keys, &".".repeat(MAX_TOKEN_BYTES)), Err(TokenError::Malformed(_))));
}

#[test]
fn keys_of_other_kinds_and_uses_are_passed_over() {
    let usable = Signer::es256("k");
    let mut encryption = Signer::es256("enc").jwk;
    encryption["use"] = "enc".into();
    let mut pss = Signer::rs256("pss").jwk;
    pss["alg"] = "PS256".into();
    let others = [
        json!({"kty": "oct", "kid": "hmac", "k": "c2VjcmV0"}),
        json!({"kty": "future", "kid": "f"}),
        json!({"kty": "RSA", "kid": "small", "n": encode(&[0xff; 128]), "e": "AQAB"}),
        json!({"kty": "EC", "crv": "P-256", "kid": "off-curve", "x": encode(&[1; 32]), "y": encode(&[1; 32])}),
        json!("no object"),
        encryption,
        pss,
    ];
    let mut all: Vec<&Value> = others.iter().collect();
    all.push(&usable.jwk);
    let keys = keys(&all);
    assert_eq!(keys.len(), 1);
    assert!(verify(&keys, &usable.sign(&claims())).is_ok());
}

#[test]
fn a_set_without_a_usable_key_is_refused() {
    for jwks in [r#"{"keys": []}"#, r#"{"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}"#, "{}", "", &" ".repeat(1 << 20)] {
        assert!(TokenKeys::from_jwks(CLUSTER, ISSUER, jwks).is_err(), "{jwks}");
    }
}

#[test]
fn no_error_quotes_the_token() {
    let signer = Signer::es256("k");
    let secret = "x".repeat(400);
    let token = signer.sign(&json!({"exp": secret, "iss": [secret]}));
    let error = verify(&signer.keys(), &token).unwrap_err();
    assert!(!format!("{error} {error:?}").contains("xxx"), "{error}");
}

proptest! {
    #[test]
    fn no_text_makes_the_verifier_panic(text in ".{0,300}") {
        thread_local!(static KEYS: TokenKeys = Signer::es256("k").keys());
        prop_assert!(KEYS.with(|keys| verify(keys, &text)).is_err());
    }

    #[test]
    fn a_token_with_any_one_character_changed_is_refused(at in any::<prop::sample::Index>(), with in "[A-Za-z0-9_-]") {
        thread_local!(static SIGNED: (TokenKeys, String) = {
            let signer = Signer::es256("k");
            (signer.keys(), signer.sign(&claims()))
        });
        let (accepted, unchanged) = SIGNED.with(|(keys, token)| {
            let at = at.index(token.len());
            let mut changed = token.clone();
            changed.replace_range(at..=at, &with);
            (verify(keys, &changed).is_ok(), changed == *token)
        });
        prop_assert_eq!(accepted, unchanged);
    }
}
