//! Whom a real Envoy lets in, with certificates and trust from Chancery alone.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use chancery_tests::lab::Lab;
use chancery_tests::mesh::{Mesh, Settings, Workload};
use chancery_tests::{Result, secrets, tools};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

const CART: &str = "spiffe://mesh.test/ns/shop/sa/cart";

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// A mesh with one Envoy, and what it takes to be `cart`.
async fn mesh() -> Option<(Mesh, Workload, Identity)> {
    let settings = Settings::lasting(tools::envoy()?);
    let mesh = Mesh::start(Lab::new().unwrap(), settings).await.unwrap();
    let checkout = mesh.workload("checkout", None).await.unwrap();
    let token = std::fs::read_to_string(mesh.volume("cart").unwrap().token()).unwrap();
    let secrets = secrets::fetch(&mesh.agent.sds_socket, Some(&token), Duration::from_secs(10)).await.unwrap();
    let key = PrivatePkcs8KeyDer::from(secrets.svid.key().secret_pkcs8().to_vec());
    Some((mesh, checkout, (secrets.svid.chain().to_vec(), key.into())))
}

/// A certificate with this SPIFFE ID from a CA that Chancery knows nothing of.
fn foreign(spiffe_id: &str) -> Identity {
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.distinguished_name.push(DnType::CommonName, "another CA");
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap();
    let mut leaf = CertificateParams::default();
    leaf.subject_alt_names = vec![SanType::URI(spiffe_id.try_into().unwrap())];
    let key = KeyPair::generate().unwrap();
    let leaf = leaf.signed_by(&key, &ca).unwrap();
    (vec![leaf.der().clone()], PrivatePkcs8KeyDer::from(key.serialize_der()).into())
}

/// One request on a new connection; whom the server claims to be is not what these tests are about.
async fn request(address: SocketAddr, identity: Option<Identity>) -> Result<String> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer(provider)));
    let config = match identity {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key)?,
        None => builder.with_no_client_auth(),
    };
    let stream = TcpStream::connect(address).await?;
    let mut stream = TlsConnector::from(Arc::new(config)).connect(ServerName::try_from("checkout")?, stream).await?;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: checkout\r\nconnection: close\r\n\r\n").await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

/// With TLS 1.3 a client learns only after its handshake whether it was let in.
async fn refused(checkout: &Workload, identity: Option<Identity>, counted_as: &str) {
    let statistic = format!("listener.inbound.ssl.{counted_as}");
    let before = checkout.envoy.stat(&statistic).await.unwrap();
    let answer = request(checkout.envoy.at.inbound, identity).await;
    assert!(answer.is_err(), "let in: {answer:?}");
    assert_eq!(checkout.envoy.stat(&statistic).await.unwrap(), before + 1, "{statistic}");
}

#[tokio::test]
async fn envoy_lets_in_chancerys_workloads_and_nobody_else() {
    let Some((_mesh, checkout, cart)) = mesh().await else { return };
    let answer = request(checkout.envoy.at.inbound, Some(cart)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    refused(&checkout, None, "fail_verify_no_cert").await;
    refused(&checkout, Some(foreign(CART)), "fail_verify_error").await;
    refused(&checkout, Some(foreign("spiffe://other.test/ns/shop/sa/cart")), "fail_verify_error").await;
}

#[derive(Debug)]
struct AnyServer(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
