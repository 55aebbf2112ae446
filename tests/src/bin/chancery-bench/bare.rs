//! What the machine costs in this run, without Chancery: the denominators of the ratios, and the judge of how noisy the run is.

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use chancery_ca::attestation::development::{DevelopmentIssuer, ISSUER};
use chancery_identity::csr::{self, KeyType, VerifiedCsr};
use chancery_identity::tls::{self, ServerTrust};
use chancery_identity::token::TokenKeys;
use chancery_identity::{PrivateKey, Serial, SystemClock, TrustBundle, TrustDomain, TrustState, X509Svid};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
    SerialNumber, SigningKey, SubjectPublicKeyInfo,
};
use rustix::time::{ClockId, clock_gettime};
use rustls::{ClientConnection, ServerConnection};
use time::OffsetDateTime;

use chancery_tests::Result;
use chancery_tests::lab::Lab;
use chancery_tests::mesh::token_request;

/// What the budgets assume; a run that costs more than twice that is noisy. A sync is that of 64 waiting writers.
const REFERENCE_SIGN: Duration = Duration::from_micros(17);
const REFERENCE_HANDSHAKE: Duration = Duration::from_micros(200);
const REFERENCE_SYNC: Duration = Duration::from_micros(830);

/// The costs of this run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Costs {
    /// CPU: verify a CSR and a token, sign a certificate.
    issue: Duration,
    /// CPU: one ECDSA P-256 signature.
    sign: Duration,
    /// CPU: the server's half of a TLS 1.3 handshake with client certificate.
    handshake: Duration,
    /// Wall clock, median: append 4 KiB and make them durable.
    sync: Duration,
}

impl Costs {
    /// Measures all of them; `directory` lies on the file system that the ledger is on. Takes about two seconds.
    pub(crate) fn measure(bare: &Bare, directory: &Path) -> Result<Self> {
        Ok(Self { issue: bare.issue()?, sign: signature()?, handshake: handshake(&bare.authority)?, sync: sync(directory)? })
    }

    /// Whether a latency measured in this run means nothing.
    pub(crate) fn noisy(&self) -> bool {
        self.sign > REFERENCE_SIGN * 2 || self.handshake > REFERENCE_HANDSHAKE * 2 || self.sync > REFERENCE_SYNC * 2
    }
}

impl fmt::Display for Costs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { issue, sign, handshake, sync } = self;
        write!(f, "fdatasync {sync:.0?}, handshake {handshake:.0?}, P-256 signature {sign:.1?}, bare issuance {issue:.1?}")
    }
}

/// CPU time that this thread has used.
fn thread_cpu() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or_default(), u32::try_from(now.tv_nsec).unwrap_or_default())
}

/// CPU per call of `work`, after a warm-up of a tenth.
fn cpu_per_call(calls: u32, mut work: impl FnMut() -> Result<()>) -> Result<Duration> {
    for _ in 0..calls / 10 {
        work()?;
    }
    let before = thread_cpu();
    for _ in 0..calls {
        work()?;
    }
    Ok(thread_cpu().saturating_sub(before) / calls)
}

/// Different tokens and CSRs, as an agent sends them: over one and the same, a processor learns every branch.
const DISTINCT: usize = 500;

/// What issuing costs without Chancery: the cryptography, one after the other.
pub(crate) struct Bare {
    authority: Authority,
    keys: TokenKeys,
    requests: Vec<(Vec<u8>, String)>,
    now: OffsetDateTime,
}

impl Bare {
    pub(crate) fn new() -> Result<Self> {
        let lab = Lab::new()?;
        let issuer = DevelopmentIssuer::open_or_create(&lab.at("issuer"))?;
        let now = OffsetDateTime::now_utc();
        let request = |number| {
            let mut pod = token_request("cart", Duration::from_secs(3600));
            pod.pod = format!("cart-{number}");
            let (csr, _) = csr::generate(KeyType::EcdsaP256, None)?;
            Ok((csr, issuer.sign(&pod, now)?.to_string()))
        };
        let keys = TokenKeys::from_jwks("dev", ISSUER, &issuer.jwks()?)?;
        Ok(Self { authority: Authority::new()?, keys, requests: (0..DISTINCT).map(request).collect::<Result<_>>()?, now })
    }

    /// CPU: verify a CSR and a token, sign a certificate. Takes about half a second.
    pub(crate) fn issue(&self) -> Result<Duration> {
        let audiences = ["chancery".to_owned()];
        let mut requests = self.requests.iter().cycle();
        cpu_per_call(5_000, || {
            let Some((csr, token)) = requests.next() else { return Ok(()) };
            self.keys.verify(token, &audiences, self.now)?;
            let csr = VerifiedCsr::from_der(csr)?;
            self.authority.issue("spiffe://bench.example/ns/shop/sa/cart", &csr.public_key).map(drop)
        })
    }
}

fn signature() -> Result<Duration> {
    let key = KeyPair::generate()?;
    cpu_per_call(5_000, || key.sign(b"thirty-two bytes to be signed ...").map(drop).map_err(Into::into))
}

const HANDSHAKES: u32 = 500;

fn handshake(authority: &Authority) -> Result<Duration> {
    let server = authority.svid("spiffe://bench.example/chancery/ca")?;
    let client = authority.svid("spiffe://bench.example/chancery/agent/bench/1")?;
    let trust = Arc::new(ArcSwap::from_pointee(authority.trust()?));
    let clock = Arc::new(SystemClock);
    let shown = Arc::new(ArcSwap::from_pointee(tls::certified_key(&server, &[])?));
    let server_config = Arc::new(tls::server_config(shown, trust.clone(), clock.clone())?);
    let client_config = Arc::new(tls::client_config(ServerTrust::Bundle(trust), server.id().clone(), Some(&client), clock)?);
    let mut used = Duration::ZERO;
    for _ in 0..HANDSHAKES {
        let mut server = ServerConnection::new(server_config.clone())?;
        let mut client = ClientConnection::new(client_config.clone(), "localhost".try_into()?)?;
        let mut wire = Vec::new();
        while server.is_handshaking() || client.is_handshaking() {
            wire.clear();
            client.write_tls(&mut wire)?;
            let before = thread_cpu();
            server.read_tls(&mut wire.as_slice())?;
            server.process_new_packets()?;
            wire.clear();
            while server.wants_write() {
                server.write_tls(&mut wire)?;
            }
            used += thread_cpu().saturating_sub(before);
            client.read_tls(&mut wire.as_slice())?;
            client.process_new_packets()?;
        }
    }
    Ok(used / HANDSHAKES)
}

fn sync(directory: &Path) -> Result<Duration> {
    let path = directory.join("sync-probe");
    let mut file = File::create(&path)?;
    let mut costs = Vec::new();
    for _ in 0..101 {
        let before = Instant::now();
        file.write_all(&[0x5a; 4096])?;
        file.sync_data()?;
        costs.push(before.elapsed());
    }
    std::fs::remove_file(path)?;
    costs.sort_unstable();
    Ok(costs[costs.len() / 2])
}

/// The least that can issue: one root that signs leaves with rcgen, no ledger, no policy.
struct Authority {
    root: rcgen::Certificate,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![SanType::URI("spiffe://bench.example".try_into()?)];
        let root = params.self_signed(&key)?;
        Ok(Self { root, issuer: Issuer::new(params, key) })
    }

    fn issue(&self, id: &str, public_key: &[u8]) -> Result<rcgen::Certificate> {
        let now = OffsetDateTime::now_utc();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.serial_number = Some(SerialNumber::from_slice(&Serial::generate()?.0));
        params.not_before = now - time::Duration::seconds(30);
        params.not_after = now + time::Duration::hours(1);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.subject_alt_names = vec![SanType::URI(id.try_into()?)];
        params.use_authority_key_identifier_extension = true;
        Ok(params.signed_by(&SubjectPublicKeyInfo::from_der(public_key)?, &self.issuer)?)
    }

    fn svid(&self, id: &str) -> Result<X509Svid> {
        let key = KeyPair::generate()?;
        let certificate = self.issue(id, &rcgen::PublicKeyData::subject_public_key_info(&key))?;
        Ok(X509Svid::new(vec![certificate.der().clone()], PrivateKey::from_pkcs8(key.serialize_der().into()))?)
    }

    fn trust(&self) -> Result<TrustState> {
        let domain: TrustDomain = "bench.example".parse()?;
        Ok(TrustState::new(1, domain.clone(), [TrustBundle::new(domain, vec![self.root.der().clone()])?])?)
    }
}
