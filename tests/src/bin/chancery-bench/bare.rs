//! What the machine needs for the bare work, measured in the same run: the yardstick for everything else.

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chancery_ca::attestation::development::{DevelopmentIssuer, ISSUER};
use chancery_identity::csr::{self, KeyType, VerifiedCsr};
use chancery_identity::token::TokenKeys;
use chancery_tests::lab::Lab;
use chancery_tests::mesh::token_request;
use chancery_tests::{Error, Result};
use rcgen::{BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};
use time::OffsetDateTime;

/// What the design's budgets assume: a P-256 signature, and a TLS 1.3 handshake with both ends counted.
const ASSUMED_SIGN: Duration = Duration::from_micros(17);
const ASSUMED_HANDSHAKE: Duration = Duration::from_micros(400);
const FOR: Duration = Duration::from_millis(1500);

/// Each for one operation.
pub(crate) struct Costs {
    /// A P-256 signature.
    sign: Duration,
    /// A TLS 1.3 handshake, both ends, without a client certificate.
    handshake: Duration,
    /// Four kilobytes appended and synced.
    sync: Duration,
    /// A CSR and a token verified, and a certificate signed.
    pub(crate) issue: Duration,
}

impl Costs {
    pub(crate) fn measure(directory: &Path) -> Result<Self> {
        let signer = KeyPair::generate()?;
        let sign = per_operation(|| rcgen::SigningKey::sign(&signer, b"to be signed").map(drop).map_err(Into::into))?;
        Ok(Self { sign, handshake: handshake()?, sync: sync(directory)?, issue: issue()? })
    }

    pub(crate) fn noisy(&self) -> bool {
        self.sign > 2 * ASSUMED_SIGN || self.handshake > 2 * ASSUMED_HANDSHAKE
    }
}

impl fmt::Display for Costs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "fdatasync {:.0?}, handshake {:.0?}, P-256 signature {:.1?}", self.sync, self.handshake, self.sign)
    }
}

/// The time one call takes, as the median of short runs.
fn per_operation(mut operation: impl FnMut() -> Result<()>) -> Result<Duration> {
    let mut runs = Vec::new();
    let start = Instant::now();
    while start.elapsed() < FOR {
        let run = Instant::now();
        for _ in 0..16 {
            operation()?;
        }
        runs.push(run.elapsed() / 16);
    }
    runs.sort_unstable();
    runs.get(runs.len() / 2).copied().ok_or_else(|| "nothing was measured".into())
}

fn sync(directory: &Path) -> Result<Duration> {
    let path = directory.join("sync");
    let mut file = File::create(&path)?;
    let cost = per_operation(|| {
        file.write_all(&[7; 4096])?;
        Ok(file.sync_data()?)
    });
    std::fs::remove_file(path)?;
    cost
}

fn issue() -> Result<Duration> {
    let lab = Lab::new()?;
    let issuer = DevelopmentIssuer::open_or_create(&lab.at("issuer"))?;
    let now = OffsetDateTime::now_utc();
    let token = issuer.sign(&token_request("cart", Duration::from_secs(3600)), now)?;
    let keys = TokenKeys::from_jwks("dev", ISSUER, &issuer.jwks()?)?;
    let audiences = ["chancery".to_owned()];
    let (request, _) = csr::generate(KeyType::EcdsaP256, None)?;
    let ca = authority()?;
    per_operation(|| {
        keys.verify(&token, &audiences, now)?;
        VerifiedCsr::from_der(&request)?;
        let key = CertificateSigningRequestParams::from_der(&request.as_slice().into())?.public_key;
        CertificateParams::default().signed_by(&key, &ca)?;
        Ok(())
    })
}

fn authority() -> Result<CertifiedIssuer<'static, KeyPair>> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    Ok(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?)
}

fn handshake() -> Result<Duration> {
    let ca = authority()?;
    let key = KeyPair::generate()?;
    let leaf: CertificateDer<'static> = CertificateParams::new(vec!["bench".to_owned()])?.signed_by(&key, &ca)?.der().clone();
    let mut roots = RootCertStore::empty();
    roots.add(ca.der().clone())?;
    let mut server =
        ServerConfig::builder().with_no_client_auth().with_single_cert(vec![leaf], PrivatePkcs8KeyDer::from(key.serialize_der()).into())?;
    server.send_tls13_tickets = 0;
    let server = Arc::new(server);
    let mut client = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    client.resumption = rustls::client::Resumption::disabled();
    let client = Arc::new(client);
    per_operation(|| {
        let mut client = ClientConnection::new(client.clone(), ServerName::try_from("bench")?)?;
        let mut server = ServerConnection::new(server.clone())?;
        while client.is_handshaking() || server.is_handshaking() {
            let mut wire = Vec::new();
            client.write_tls(&mut wire)?;
            server.read_tls(&mut wire.as_slice())?;
            server.process_new_packets()?;
            wire.clear();
            server.write_tls(&mut wire)?;
            client.read_tls(&mut wire.as_slice())?;
            client.process_new_packets()?;
        }
        Ok::<(), Error>(())
    })
}
