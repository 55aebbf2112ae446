//! Opening an authority: from the ledger's entries and the key manager, or anew.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use arc_swap::ArcSwap;
use chancery_identity::csr::KeyType;
use chancery_identity::{Clock, Fingerprint, Serial, TrustBundle, TrustDomain, TrustState, profile};
use chancery_process::files;
use chancery_proto::chancery::v1::AuthorityCertificate;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use time::OffsetDateTime;
use tokio::sync::watch;
use x509_parser::asn1_rs::FromDer;
use x509_parser::certificate::X509Certificate;

use super::directory::{DataDirectory, Kind};
use super::issuer::{Issuer, IssuerError, Signer, SubjectKey, public_key_of, validity};
use super::server::ServerCertificate;
use super::{Authority, AuthorityError, Root, Settings, is_past_half, profiles};
use crate::keys::{KeyManager, PublicKey};
use crate::ledger::{Body, Ledger};

/// What the CA's own certificates are signed with.
const KEY_TYPE: KeyType = KeyType::EcdsaP256;
/// The first path segments of the CA's own ID.
const SERVER_PATH: [&str; 2] = ["chancery", "ca"];

/// A certificate of the authority's own, from the ledger.
struct Recorded {
    entry: u64,
    root: bool,
    certificate: CertificateDer<'static>,
}

impl Authority {
    /// Opens the authority, and makes trust root and issuing certificate if there are none, or if the issuing one is past half of its life.
    ///
    /// # Errors
    /// If ledger, keys and files do not belong together, the root has expired, or something cannot be made or recorded.
    pub async fn open(
        trust_domain: TrustDomain,
        settings: Settings,
        directory: &DataDirectory,
        keys: Arc<dyn KeyManager>,
        ledger: Ledger,
        clock: Arc<dyn Clock>,
    ) -> Result<Arc<Self>, AuthorityError> {
        let now = clock.now();
        let development = directory.kind() == Kind::Development;
        let recorded = read_ledger(&ledger).await?;
        check_copies(&directory.certificates(), &recorded)?;
        let by_public_key = keys_by_public_key(&*keys).await?;

        let root = match recorded.iter().find(|one| one.root) {
            Some(newest) => known_root(newest, &by_public_key)?,
            None => new_root(&trust_domain, development, &settings, &keys, &ledger, now).await?,
        };
        check_root(&root, &trust_domain, now)?;
        let issuer = current_issuer(&recorded, &root, &by_public_key, &keys)?;
        let server_id = trust_domain.member(SERVER_PATH)?;
        let state = trust_state(&trust_domain, &root)?;
        let fresh = |issuer: &Issuer| now >= issuer.not_before() && !is_past_half(now, issuer.not_before(), issuer.not_after());
        let issuer = match issuer.filter(fresh) {
            Some(issuer) => issuer,
            None => make_issuer(&trust_domain, &settings, &root, &keys, &ledger, now).await?,
        };
        destroy_superseded(&*keys, issuer.key_name()).await?;
        write_copies(directory, &root, &issuer, &state)?;
        let server = ServerCertificate::issue(&issuer, &ledger, &server_id, &settings, now).await?;
        let state = Arc::new(state);
        Ok(Arc::new(Self {
            trust_domain,
            development,
            server_id,
            settings: ArcSwap::from_pointee(settings),
            directory: directory.certificates(),
            keys,
            ledger,
            clock,
            root,
            issuer: ArcSwap::from_pointee(issuer),
            server,
            trust: watch::Sender::new(Arc::clone(&state)),
            shared_trust: Arc::new(ArcSwap::new(state)),
            renewing: tokio::sync::Mutex::default(),
            failed_renewals: AtomicU64::new(0),
        }))
    }

    /// An issuing certificate that is recorded and not yet in use.
    pub(super) async fn new_issuer(&self, now: OffsetDateTime) -> Result<Issuer, AuthorityError> {
        let issuer = make_issuer(&self.trust_domain, &self.settings.load(), &self.root, &self.keys, &self.ledger, now).await?;
        write_copy(&self.directory, "issuing", &self.trust_domain, issuer.certificate())?;
        tracing::info!(not_after = %issuer.not_after(), "a new issuing certificate is in use");
        Ok(issuer)
    }

    pub(super) async fn renew_server(&self, now: OffsetDateTime) -> Result<(), AuthorityError> {
        self.server.renew(&self.issuer(), &self.ledger, &self.server_id, &self.settings.load(), now).await
    }
}

/// Newest first.
async fn read_ledger(ledger: &Ledger) -> Result<Vec<Recorded>, AuthorityError> {
    let entries = ledger.authority_certificates().await?;
    let recorded = entries.into_iter().map(|(entry, AuthorityCertificate { certificate, root })| Recorded {
        entry,
        root,
        certificate: CertificateDer::from(certificate),
    });
    Ok(recorded.collect())
}

/// Public keys (DER) and the names of their private halves.
async fn keys_by_public_key(keys: &dyn KeyManager) -> Result<BTreeMap<Vec<u8>, (String, PublicKey)>, AuthorityError> {
    let mut found = BTreeMap::new();
    for name in keys.list().await? {
        let public = keys.public_key(&name).await?;
        found.insert(public.spki.clone(), (name, public));
    }
    Ok(found)
}

type KeysByPublicKey = BTreeMap<Vec<u8>, (String, PublicKey)>;

fn known_root(recorded: &Recorded, keys: &KeysByPublicKey) -> Result<Root, AuthorityError> {
    let unreadable = |problem| AuthorityError::Unreadable { place: format!("ledger entry {}", recorded.entry), problem };
    let public = public_key_of(&recorded.certificate).map_err(unreadable)?;
    let fingerprint = Fingerprint::of(&recorded.certificate);
    let (key, _) = keys.get(&public).ok_or(AuthorityError::RootKeyMissing { fingerprint })?;
    root_of(recorded.certificate.clone(), key.clone(), recorded.entry)
}

async fn new_root(
    trust_domain: &TrustDomain,
    development: bool,
    settings: &Settings,
    keys: &Arc<dyn KeyManager>,
    ledger: &Ledger,
    now: OffsetDateTime,
) -> Result<Root, AuthorityError> {
    let (key, public) = generate(&**keys, "root").await?;
    let validity = validity(now, settings.root_lifetime, (OffsetDateTime::UNIX_EPOCH, now + settings.root_lifetime));
    let params = profiles::root(trust_domain, development, Serial::generate()?, validity)?;
    let signer = Signer::of_self(&params, Arc::clone(keys), &key, &public)?;
    let certificate = signer.sign(&params, &SubjectKey::read(&public.spki, public.key_type)?).await?;
    let entry = record(ledger, &certificate, true).await?;
    tracing::info!(fingerprint = %Fingerprint::of(&certificate), "a new trust root was made");
    root_of(certificate, key, entry)
}

fn root_of(certificate: CertificateDer<'static>, key: String, entry: u64) -> Result<Root, AuthorityError> {
    let facts = profile::check_authority(&certificate)?;
    Ok(Root { certificate, key, not_before: facts.not_before, not_after: facts.not_after, entry })
}

fn check_root(root: &Root, trust_domain: &TrustDomain, now: OffsetDateTime) -> Result<(), AuthorityError> {
    let id = profile::check_authority(&root.certificate)?.id;
    if id.as_ref() != Some(&trust_domain.id()) {
        let found = id.map_or_else(|| "(none)".to_owned(), |id| id.trust_domain().to_string());
        return Err(AuthorityError::OtherTrustDomain { found, wanted: trust_domain.clone() });
    }
    if now >= root.not_after {
        return Err(AuthorityError::RootExpired { fingerprint: Fingerprint::of(&root.certificate), not_after: root.not_after });
    }
    Ok(())
}

/// The newest issuing certificate under `root` whose key is there; without one, a new one is made: that only costs a signature.
fn current_issuer(
    recorded: &[Recorded],
    root: &Root,
    by_public_key: &KeysByPublicKey,
    keys: &Arc<dyn KeyManager>,
) -> Result<Option<Issuer>, AuthorityError> {
    for one in recorded.iter().filter(|one| !one.root) {
        let Ok(public) = public_key_of(&one.certificate) else { continue };
        let Some((key, public)) = by_public_key.get(&public) else { continue };
        if is_signed_by(&one.certificate, &root.certificate) {
            let signer = Signer::of(&one.certificate, Arc::clone(keys), key, public)?;
            return Ok(Some(Issuer::new(one.certificate.clone(), root.certificate.clone(), signer)?));
        }
    }
    Ok(None)
}

fn is_signed_by(certificate: &CertificateDer<'_>, issuer: &CertificateDer<'_>) -> bool {
    let (Ok((_, certificate)), Ok((_, issuer))) = (X509Certificate::from_der(certificate), X509Certificate::from_der(issuer)) else {
        return false;
    };
    certificate.verify_signature(Some(issuer.public_key())).is_ok()
}

async fn make_issuer(
    trust_domain: &TrustDomain,
    settings: &Settings,
    root: &Root,
    keys: &Arc<dyn KeyManager>,
    ledger: &Ledger,
    now: OffsetDateTime,
) -> Result<Issuer, AuthorityError> {
    if !(root.not_before..root.not_after).contains(&now) {
        return Err(IssuerError::Clock { not_before: root.not_before, not_after: root.not_after, now }.into());
    }
    let root_public = keys.public_key(&root.key).await?;
    let root_signer = Signer::of(&root.certificate, Arc::clone(keys), &root.key, &root_public)?;
    let (key, public) = generate(&**keys, "issuing").await?;
    let validity = validity(now, settings.issuing_lifetime, (root.not_before, root.not_after));
    let params = profiles::issuing(trust_domain, Serial::generate()?, validity)?;
    let certificate = root_signer.sign(&params, &SubjectKey::read(&public.spki, public.key_type)?).await?;
    let signer = Signer::of(&certificate, Arc::clone(keys), &key, &public)?;
    let issuer = Issuer::new(certificate, root.certificate.clone(), signer)?;
    record(ledger, issuer.certificate(), false).await?;
    Ok(issuer)
}

/// A key with a name of its own.
async fn generate(keys: &dyn KeyManager, purpose: &str) -> Result<(String, PublicKey), AuthorityError> {
    let Serial(random) = Serial::generate()?;
    let name = format!("{purpose}-{}", hex::encode(&random[..8]));
    let public = keys.generate(&name, KEY_TYPE).await?;
    Ok((name, public))
}

async fn record(ledger: &Ledger, certificate: &CertificateDer<'_>, root: bool) -> Result<u64, AuthorityError> {
    let certificate = certificate.to_vec();
    Ok(ledger.append(Body::Authority(AuthorityCertificate { certificate, root })).await?)
}

/// Issuing keys that no certificate in use has: of those before, and what an interrupted start left behind.
async fn destroy_superseded(keys: &dyn KeyManager, current: &str) -> Result<(), AuthorityError> {
    for name in keys.list().await? {
        if name.starts_with("issuing-") && name != current {
            keys.destroy(&name).await?;
        }
    }
    Ok(())
}

fn trust_state(trust_domain: &TrustDomain, root: &Root) -> Result<TrustState, AuthorityError> {
    let bundle = TrustBundle::new(trust_domain.clone(), vec![root.certificate.clone()])?;
    Ok(TrustState::new(root.entry + 1, trust_domain.clone(), [bundle])?)
}

/// A root among the files that the ledger does not know: the ledger was lost or exchanged.
fn check_copies(directory: &Path, recorded: &[Recorded]) -> Result<(), AuthorityError> {
    files::create_private_dir(directory)?;
    let unreadable = |path: &Path, problem: String| AuthorityError::Unreadable { place: path.display().to_string(), problem };
    for entry in std::fs::read_dir(directory).map_err(|error| unreadable(directory, error.to_string()))? {
        let path = entry.map_err(|error| unreadable(directory, error.to_string()))?.path();
        let name = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".pem"));
        if !name.is_some_and(|name| name.starts_with("root-")) {
            continue;
        }
        let certificate = CertificateDer::from_pem_file(&path).map_err(|error| unreadable(&path, error.to_string()))?;
        if !recorded.iter().any(|one| one.root && one.certificate == certificate) {
            let fingerprint = Fingerprint::of(&certificate);
            return Err(AuthorityError::UnknownRoot { path: path.display().to_string(), fingerprint });
        }
    }
    Ok(())
}

fn write_copies(directory: &DataDirectory, root: &Root, issuer: &Issuer, state: &TrustState) -> Result<(), AuthorityError> {
    let Fingerprint(fingerprint) = Fingerprint::of(&root.certificate);
    let trust_domain = &state.trust_domain;
    write_copy(&directory.certificates(), &format!("root-{}", hex::encode(&fingerprint[..8])), trust_domain, &root.certificate)?;
    write_copy(&directory.certificates(), "issuing", trust_domain, issuer.certificate())?;
    let bundle = directory.bundle();
    files::write_private(&bundle, state.own().to_pem().as_bytes())?;
    std::fs::set_permissions(&bundle, std::fs::Permissions::from_mode(0o644))
        .map_err(|error| AuthorityError::Unreadable { place: bundle.display().to_string(), problem: error.to_string() })
}

fn write_copy(
    directory: &Path,
    name: &str,
    trust_domain: &TrustDomain,
    certificate: &CertificateDer<'static>,
) -> Result<(), AuthorityError> {
    let alone = TrustBundle::new(trust_domain.clone(), vec![certificate.clone()])?;
    Ok(files::write_private(&directory.join(format!("{name}.pem")), alone.to_pem().as_bytes())?)
}
