//! What nobody gets a certificate for, asked of the running CA over mutual TLS, and of the running agent's socket. Each time: the reason's word
//! and a sentence that says what is wrong, the list of issued identities as it was, the refusal in the list of refusals, and a CA that
//! goes on issuing.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::time::Duration;

use aws_lc_rs::hmac;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chancery_ca::attestation::development::{DevelopmentIssuer, ISSUER, node_uid, pod_uid};
use chancery_identity::csr::{self, KeyType};
use chancery_proto::chancery::v1::WorkloadRequest;
use chancery_tests::agent::Agent;
use chancery_tests::ca::Ca;
use chancery_tests::caller::Caller;
use chancery_tests::lab::Lab;
use chancery_tests::mesh::{NODE, token_request};
use chancery_tests::{secrets, tools};
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, IsCa, KeyPair, SanType};
use rustls_pki_types::CertificateSigningRequestDer;
use rustls_pki_types::pem::PemObject;
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use uuid::Uuid;

const HOUR: Duration = Duration::from_secs(3600);
const CALLER_NODE: &str = "node-a";
const MEGABYTE: usize = 1 << 20;

/// A running CA, and somebody who joined it.
struct Place {
    caller: Caller,
    ca: Ca,
    lab: Lab,
}

impl Place {
    async fn new() -> Self {
        let lab = Lab::new().unwrap();
        let ca = Ca::start(&lab, HOUR).await.unwrap();
        let caller = Caller::join(&lab, &ca, CALLER_NODE).await.unwrap();
        Self { caller, ca, lab }
    }

    fn identities(&self) -> Vec<Value> {
        self.ca.ask(&["identity", "list", "--limit", "100000"]).unwrap().as_array().unwrap().clone()
    }

    fn last_refusal(&self) -> Value {
        self.ca.ask(&["identity", "refusals", "--limit", "1"]).unwrap()[0].clone()
    }

    /// `says` is what the message must contain.
    async fn refuses(&self, case: &str, request: WorkloadRequest, reason: &str, says: &str) {
        let before = self.identities();
        let (request_id, token) = (request.request_id.clone(), request.token.clone());
        let outcome = self.caller.issue(request).await.unwrap_or_else(|error| panic!("{case}: {error}"));
        let refusal = outcome.expect_err(case);
        assert_eq!(refusal.reason, reason, "{case}: {}", refusal.message);
        assert!(refusal.message.contains(says) && refusal.message.len() < 1000, "{case}: {}", refusal.message);
        assert!(token.len() < 40 || !refusal.message.contains(&token), "{case}: the token is quoted");
        assert_eq!(self.identities(), before, "{case}: nothing is recorded as issued");
        let listed = self.last_refusal();
        assert_eq!(listed["request_id"], request_id, "{case}");
        assert_eq!((&listed["reason"], &listed["message"]), (&json!(reason), &json!(refusal.message)), "{case}");
        assert_eq!(listed["agent"], self.caller.spiffe_id().unwrap(), "{case}");
    }

    /// The CA is alive and issues what is in order.
    async fn issues(&self) {
        let before = self.identities().len();
        self.caller.issue(self.caller.request().unwrap()).await.unwrap().unwrap();
        assert_eq!(self.identities().len(), before + 1);
    }

    fn with_token(&self, token: &str) -> WorkloadRequest {
        WorkloadRequest { token: token.to_owned(), ..self.caller.request().unwrap() }
    }

    fn with_csr(&self, csr: Vec<u8>) -> WorkloadRequest {
        WorkloadRequest { csr, ..self.caller.request().unwrap() }
    }
}

/// What a good token of `shop/cart` says.
fn claims_of(pod: &str, node: &str) -> Value {
    let now = OffsetDateTime::now_utc().unix_timestamp();
    json!({
        "iss": ISSUER, "sub": "system:serviceaccount:shop:cart", "aud": ["chancery"],
        "iat": now, "nbf": now, "exp": now + 600, "jti": Uuid::new_v4(),
        "kubernetes.io": {
            "namespace": "shop",
            "serviceaccount": { "name": "cart", "uid": Uuid::new_v4() },
            "pod": { "name": pod, "uid": pod_uid("shop", pod) },
            "node": { "name": node, "uid": node_uid(node) },
        },
    })
}

/// A token of these claims with a header and a signature of one's own.
fn forged(algorithm: &str, kid: &Value, claims: &Value, sign: impl FnOnce(&[u8]) -> Vec<u8>) -> String {
    let encode = |part: Value| URL_SAFE_NO_PAD.encode(part.to_string());
    let message = format!("{}.{}", encode(json!({ "alg": algorithm, "kid": kid })), encode(claims.clone()));
    let signature = URL_SAFE_NO_PAD.encode(sign(message.as_bytes()));
    format!("{message}.{signature}")
}

fn hs256(secret: &[u8], message: &[u8]) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), message).as_ref().to_vec()
}

/// The issuer's public key: its name and its modulus.
fn public_key(issuer: &DevelopmentIssuer) -> (Value, Vec<u8>) {
    let jwks: Value = serde_json::from_str(&issuer.jwks().unwrap()).unwrap();
    let key = &jwks["keys"][0];
    (key["kid"].clone(), URL_SAFE_NO_PAD.decode(key["n"].as_str().unwrap()).unwrap())
}

#[tokio::test]
async fn bad_tokens_are_refused_by_the_ca() {
    let place = Place::new().await;
    let issuer = place.ca.issuer().unwrap();
    let changed = |change: &dyn Fn(&mut Value)| {
        let mut claims = claims_of("cart-0", CALLER_NODE);
        change(&mut claims);
        issuer.sign_claims(&claims).unwrap().to_string()
    };
    let without = |claim: &str| changed(&|claims| drop(claims["kubernetes.io"].as_object_mut().unwrap().remove(claim)));
    let stranger = DevelopmentIssuer::open_or_create(&place.lab.at("stranger")).unwrap();
    let (kid, modulus) = public_key(&issuer);
    let claims = claims_of("cart-0", CALLER_NODE);
    let now = OffsetDateTime::now_utc().unix_timestamp();
    let other_node = issuer.sign_claims(&claims_of("cart-0", "node-b")).unwrap().to_string();

    let cases = [
        ("expired", changed(&|claims| claims["exp"] = json!(now - 60)), "token_expired", "expired at"),
        ("not yet valid", changed(&|claims| claims["nbf"] = json!(now + 300)), "token_not_yet_valid", "not valid before"),
        ("wrong audience", changed(&|claims| claims["aud"] = json!(["vault"])), "token_audience", "vault"),
        ("the audience for joining", changed(&|claims| claims["aud"] = json!(["chancery-agent"])), "token_audience", "chancery-agent"),
        ("wrong issuer", changed(&|claims| claims["iss"] = json!("https://elsewhere")), "token_issuer", "https://elsewhere"),
        ("unknown key", stranger.sign_claims(&claims).unwrap().to_string(), "token_unknown_key", "no key"),
        ("alg none", forged("none", &kid, &claims, |_| Vec::new()), "token_algorithm", "none"),
        ("HS256 with the public key", forged("HS256", &kid, &claims, |text| hs256(&modulus, text)), "token_algorithm", "HS256"),
        ("a signature of somebody else", forged("RS256", &kid, &claims, |_| vec![0x5a; 256]), "token_signature", "does not verify"),
        ("without pod", without("pod"), "token_not_bound", "kubernetes.io.pod"),
        ("without node", without("node"), "token_missing_claim", "kubernetes.io.node"),
        ("for another node", other_node, "token_other_node", "node-b"),
        ("1 MB of garbage", "A".repeat(MEGABYTE), "token_too_large", "1048576 bytes"),
        ("garbage of a token's size", "A".repeat(1000), "token_malformed", "three parts"),
    ];
    for (case, token, reason, says) in cases {
        place.refuses(case, place.with_token(&token), reason, says).await;
        place.issues().await;
    }
}

/// As rcgen makes it, after `change`.
fn csr_of(change: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    change(&mut params);
    params.serialize_request(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
}

fn csr_with_name(name: SanType) -> Vec<u8> {
    csr_of(|params| params.subject_alt_names = vec![name])
}

/// One that OpenSSL made, since rcgen makes no such keys.
fn csr_by_openssl(name: &str) -> Vec<u8> {
    let path = tools::source().join(format!("proto/identity/tests/data/{name}.csr.pem"));
    CertificateSigningRequestDer::from_pem_file(path).unwrap().to_vec()
}

#[tokio::test]
async fn bad_csrs_are_refused_by_the_ca() {
    let place = Place::new().await;
    let good = csr::generate(KeyType::EcdsaP256, None).unwrap().0;
    let mut broken = good.clone();
    *broken.last_mut().unwrap() ^= 1;
    let other_id = csr_with_name(SanType::URI("spiffe://mesh.test/ns/shop/sa/checkout".try_into().unwrap()));
    let dns_name = csr_with_name(SanType::DnsName("bank.example.org".try_into().unwrap()));
    let cases = [
        ("broken signature", broken, "csr_signature", "does not verify"),
        ("RSA-1024", csr_by_openssl("rsa_1024"), "csr_key", "it has 1024"),
        ("RSA-8192", csr_by_openssl("rsa_8192"), "csr_key", "it has 8192"),
        ("a P-384 key with a SHA-256 signature", csr_by_openssl("p384_with_sha256"), "csr_key", "ecdsa-p384"),
        ("trailing bytes", [&good[..], &[0]].concat(), "csr_malformed", "1 bytes after its end"),
        ("CA:TRUE", csr_of(|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)), "csr_extra", "CA:TRUE"),
        ("another SPIFFE ID", other_id, "csr_other_id", "spiffe://mesh.test/ns/shop/sa/checkout"),
        ("a DNS name that is not allowed", dns_name, "dns_name_not_allowed", "bank.example.org"),
        ("1 MB of garbage", vec![0x30; MEGABYTE], "csr_too_large", "1048576 bytes"),
        ("garbage of a CSR's size", vec![0x30; 400], "csr_malformed", "cannot be read"),
    ];
    for (case, csr, reason, says) in cases {
        place.refuses(case, place.with_csr(csr), reason, says).await;
        let listed = place.last_refusal();
        assert_eq!((&listed["namespace"], &listed["pod"]), (&json!("shop"), &json!("cart-0")), "{case}: the token was verified");
        place.issues().await;
    }
}

#[tokio::test]
async fn ten_thousand_requests_in_one_call_are_refused_whole() {
    let place = Place::new().await;
    let before = place.identities();
    let good = place.caller.request().unwrap();
    let small = WorkloadRequest { csr: vec![0x30], token: "none".into(), ..good.clone() };
    let error = place.caller.call(vec![small; 10_000]).await.unwrap_err().to_string();
    assert!(error.contains("10000 requests in one call; at most 512"), "{error}");
    let listed = place.last_refusal();
    assert_eq!(listed["reason"], "too_many_requests");
    assert!(listed["message"].as_str().unwrap().contains("10000"), "{listed}");
    // With a token and a CSR in each, the call is larger than any that is read.
    let error = place.caller.call(vec![good; 10_000]).await.unwrap_err().to_string();
    assert!(error.contains("too large"), "{error}");
    assert_eq!(place.identities(), before);
    place.issues().await;
}

#[tokio::test]
async fn one_megabyte_of_garbage_on_the_tls_port_disturbs_nobody() {
    let place = Place::new().await;
    let before = place.identities();
    for byte in [0x16, b'A'] {
        let mut stream = tokio::net::TcpStream::connect(place.ca.address).await.unwrap();
        // The CA may hang up at any time.
        let _ = stream.write_all(&vec![byte; MEGABYTE]).await;
        let mut answer = Vec::new();
        let _ = tokio::time::timeout(Duration::from_secs(15), stream.read_to_end(&mut answer)).await.expect("hangs up");
        assert!(answer.len() < 100, "an alert at most, but {} bytes came", answer.len());
    }
    assert_eq!(place.identities(), before);
    place.issues().await;
}

#[tokio::test]
async fn a_token_forged_with_the_claims_of_a_pod_whose_certificate_the_agent_has_gets_nothing() {
    let lab = Lab::new().unwrap();
    let ca = Ca::start(&lab, HOUR).await.unwrap();
    let agent = Agent::start(&lab, &ca, NODE).await.unwrap();
    let caller = Caller::join(&lab, &ca, CALLER_NODE).await.unwrap();
    let place = Place { caller, ca, lab };
    let issuer = place.ca.issuer().unwrap();
    let good = issuer.sign(&token_request("cart", HOUR), OffsetDateTime::now_utc()).unwrap();
    let serial = served_serial(&agent, &good).await;
    let before = place.identities();

    let (kid, modulus) = public_key(&issuer);
    let claims = claims_of("cart-0", NODE);
    let (unsigned, _) = good.rsplit_once('.').unwrap();
    let stranger = DevelopmentIssuer::open_or_create(&place.lab.at("stranger")).unwrap();
    let cases = [
        (
            "the pod's own token with another signature",
            format!("{unsigned}.{}", URL_SAFE_NO_PAD.encode([0x5a; 256])),
            "token_signature",
            "signature does not verify",
        ),
        ("the pod's own token without a signature", format!("{unsigned}."), "token_signature", "signature does not verify"),
        ("alg none", forged("none", &kid, &claims, |_| Vec::new()), "token_algorithm", "none"),
        ("HS256 with the public key", forged("HS256", &kid, &claims, |text| hs256(&modulus, text)), "token_algorithm", "HS256"),
        ("signed by another cluster", stranger.sign_claims(&claims).unwrap().to_string(), "token_unknown_key", "no key"),
    ];
    for (case, token, reason, says) in cases {
        let error = refused_by_agent(&agent, &token).await;
        assert!(error.contains(says), "{case}: {error}");
        assert!(!error.contains(&token), "{case}: the token is quoted");
        place.refuses(case, place.with_token(&token), reason, says).await;
    }
    assert_eq!(place.identities(), before);
    assert_eq!(served_serial(&agent, &good).await, serial, "the pod itself is still served what it had");
    place.issues().await;
}

#[tokio::test]
async fn one_megabyte_of_garbage_on_the_agents_socket_disturbs_nobody() {
    let lab = Lab::new().unwrap();
    let ca = Ca::start(&lab, HOUR).await.unwrap();
    let agent = Agent::start(&lab, &ca, NODE).await.unwrap();
    let good = ca.issuer().unwrap().sign(&token_request("cart", HOUR), OffsetDateTime::now_utc()).unwrap();
    let serial = served_serial(&agent, &good).await;
    refused_by_agent(&agent, &"A".repeat(1000)).await;
    // Larger than any header that is read.
    refused_by_agent(&agent, &"A".repeat(MEGABYTE)).await;
    let mut stream = tokio::net::UnixStream::connect(&agent.sds_socket).await.unwrap();
    let _ = stream.write_all(&vec![b'A'; MEGABYTE]).await;
    let _ = tokio::time::timeout(Duration::from_secs(15), stream.read_to_end(&mut Vec::new())).await.expect("hangs up");
    assert_eq!(served_serial(&agent, &good).await, serial);
    assert_eq!(ca.ask(&["identity", "list", "--pod", "shop/cart-0"]).unwrap().as_array().unwrap().len(), 1);
}

/// The serial number that the agent serves to the bearer of this token.
async fn served_serial(agent: &Agent, token: &str) -> String {
    let secrets = secrets::fetch(&agent.sds_socket, Some(token), Duration::from_secs(10)).await.unwrap();
    secrets.svid.serial().to_string()
}

async fn refused_by_agent(agent: &Agent, token: &str) -> String {
    match secrets::fetch(&agent.sds_socket, Some(token), Duration::from_secs(5)).await {
        Ok(secrets) => panic!("served {}", secrets.svid.id()),
        Err(error) => error.to_string(),
    }
}
