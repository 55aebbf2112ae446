//! The ledger of a CA that does not run: acts in it, and entries by the million.
//!
//! [`Filler`] fills it by the CA's own code, for what shows only in a ledger of millions of entries. All is as when the CA issues, but that
//! nobody asks and signatures are made up: certificates are built and checked, entries recorded in groups and synced, the index follows.
//!
//! The issuances are a mesh's: pods by the ten thousand at a time, each renewing many times while the others do, then replaced by the next.

use std::ops::AddAssign;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use chancery_ca::authority::{Authority, DataDirectory, Kind, LeafRequest, Settings};
use chancery_ca::keys::{FileKeyManager, KeyError, KeyManager, PublicKey};
use chancery_ca::ledger::acts::Change;
use chancery_ca::ledger::{Body, DICTIONARY_DIMENSIONS, EntryTerms, IdentityFilter, Issuance, Ledger, LedgerOptions, Provenance};
use chancery_ca::store::embedded::{EmbeddedStore, Options};
use chancery_identity::csr::{self, KeyType, VerifiedCsr};
use chancery_identity::{Serial, SpiffeId, SystemClock};
use chancery_proto::chancery::v1::{IssueReason, Role};
use time::OffsetDateTime;
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::Result;
use crate::ca::{CLUSTER, TRUST_DOMAIN};

/// Pods that live at the same time …
pub const PODS: u64 = 20_000;
/// … and how many certificates each has until it is replaced.
const RENEWALS: u64 = 20;
const NODES: u64 = 500;
const NAMESPACES: u64 = 100;
const ACCOUNTS: u64 = 10;
const LIFETIME: Duration = Duration::from_secs(3600);
/// As many as an agent asks for at most in one call.
const BATCH: u64 = 512;
/// Calls under way at once. What they wait with fits into the ledger's queue.
const CALLERS: u64 = 8;

/// Opens the ledger of a CA that does not run.
async fn open(directory: &DataDirectory) -> Result<Ledger> {
    let clock = Arc::new(SystemClock);
    let options = Options { dictionary_dimensions: DICTIONARY_DIMENSIONS.to_vec(), ..Options::new(Arc::new(EntryTerms), clock.clone()) };
    let store = EmbeddedStore::open(&directory.ledger(), options).await?.store;
    let (domain, ledger_keys) = (TRUST_DOMAIN.parse()?, FileKeyManager::open(directory.ledger_keys())?);
    let ledger = Ledger::open(Arc::new(store), clock, LedgerOptions::new(domain, Arc::new(ledger_keys))).await?;
    ledger.record_states();
    Ok(ledger)
}

/// Records an act in the data directory of a development CA that does not run, and returns its entry.
pub async fn act(data: &Path, change: Change) -> Result<u64> {
    let ledger = open(&DataDirectory::open(data, Kind::Development)?).await?;
    let entry = ledger.act("local:uid=0", change, "a test wants it").await?;
    ledger.close().await?;
    Ok(entry)
}

/// How long entries took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Took {
    /// Until they were durable.
    pub durable: Duration,
    /// Until they could be found, too.
    pub found: Duration,
}

impl AddAssign for Took {
    fn add_assign(&mut self, more: Self) {
        self.durable += more.durable;
        self.found += more.found;
    }
}

/// A ledger that is being filled.
pub struct Filler {
    mesh: Arc<Mesh>,
    ledger: Ledger,
    _directory: DataDirectory,
}

/// What the entries are made of.
struct Mesh {
    authority: Arc<Authority>,
    public_key: Vec<u8>,
    /// The number of the next issuance.
    next: AtomicU64,
    certificate_bytes: AtomicU64,
}

/// A pod of the mesh.
#[derive(Clone, Debug)]
pub struct Pod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its service account.
    pub account: String,
    /// Its UID.
    pub uid: Uuid,
    node: u64,
}

impl Pod {
    /// The one that the issuance of this number is for.
    pub fn of(issuance: u64) -> Self {
        let pod = issuance / (PODS * RENEWALS) * PODS + issuance % PODS;
        let account = format!("service-{}", pod / NAMESPACES % ACCOUNTS);
        let uid = uid(1, pod);
        let name = format!("{account}-{:010x}-{:05x}", pod / PODS, pod % PODS);
        Self { namespace: format!("namespace-{}", pod % NAMESPACES), name, account, uid, node: pod % NODES }
    }

    /// Its SPIFFE ID.
    pub fn spiffe_id(&self) -> Result<SpiffeId> {
        Ok(format!("spiffe://{TRUST_DOMAIN}/ns/{}/sa/{}", self.namespace, self.account).parse()?)
    }
}

/// As random as UUIDs look.
fn uid(kind: u64, number: u64) -> Uuid {
    let mixed = u128::from(kind << 48 | number).wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835);
    Uuid::from_u128(mixed)
}

/// A key manager that signs until its flag is set, and from then on repeats itself.
#[derive(Debug)]
struct MadeUp {
    keys: FileKeyManager,
    last: Mutex<Vec<u8>>,
    repeats: AtomicBool,
}

#[async_trait]
impl KeyManager for MadeUp {
    async fn generate(&self, name: &str, key_type: KeyType) -> Result<PublicKey, KeyError> {
        self.keys.generate(name, key_type).await
    }

    async fn public_key(&self, name: &str) -> Result<PublicKey, KeyError> {
        self.keys.public_key(name).await
    }

    async fn sign(&self, name: &str, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        if !self.repeats.load(Ordering::Relaxed) {
            let signature = self.keys.sign(name, message).await?;
            *self.last.lock().unwrap_or_else(PoisonError::into_inner) = signature;
        }
        Ok(self.last.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    async fn destroy(&self, name: &str) -> Result<(), KeyError> {
        self.keys.destroy(name).await
    }

    async fn list(&self) -> Result<Vec<String>, KeyError> {
        self.keys.list().await
    }
}

impl Filler {
    /// Opens the data directory of a development CA that was started once and does not run.
    pub async fn open(data: &Path) -> Result<Self> {
        let directory = DataDirectory::open(data, Kind::Development)?;
        let clock = Arc::new(SystemClock);
        let ledger = open(&directory).await?;
        let keys = FileKeyManager::open(directory.keys())?;
        let keys = Arc::new(MadeUp { keys, last: Mutex::default(), repeats: AtomicBool::new(false) });
        let authority =
            Authority::open(TRUST_DOMAIN.parse()?, Settings::default(), &directory, keys.clone(), ledger.clone(), clock).await?;
        let (request, _) = csr::generate(KeyType::EcdsaP256, None)?;
        let public_key = VerifiedCsr::from_der(&request)?.public_key;
        let mesh = Mesh { authority, public_key, next: AtomicU64::new(0), certificate_bytes: AtomicU64::new(0) };
        // The last signature that is real.
        mesh.issuance(0).await?;
        keys.repeats.store(true, Ordering::Relaxed);
        mesh.certificate_bytes.store(0, Ordering::Relaxed);
        Ok(Self { mesh: Arc::new(mesh), ledger, _directory: directory })
    }

    /// Records `count` issuances more.
    pub async fn fill(&self, count: u64) -> Result<()> {
        let end = self.mesh.next.load(Ordering::Relaxed) + count;
        let mut callers = JoinSet::new();
        for _ in 0..CALLERS {
            let (mesh, ledger) = (self.mesh.clone(), self.ledger.clone());
            callers.spawn(async move {
                loop {
                    let bodies = mesh.bodies(BATCH, end).await?;
                    if bodies.is_empty() {
                        return Result::Ok(());
                    }
                    ledger.append_all(bodies).await?;
                }
            });
        }
        callers.join_all().await.into_iter().collect()
    }

    /// Records `count` issuances more, and tells how long that took, without building them: until they were durable, and until they could be found.
    pub async fn time(&self, count: u64) -> Result<Took> {
        let end = self.mesh.next.load(Ordering::Relaxed) + count;
        let mut batches = Vec::new();
        loop {
            let bodies = self.mesh.bodies(BATCH, end).await?;
            if bodies.is_empty() {
                break;
            }
            batches.push(bodies);
        }
        self.settle().await?;
        let started = Instant::now();
        let mut callers: JoinSet<Result<_>> = JoinSet::new();
        for batch in batches {
            while callers.len() as u64 >= CALLERS {
                callers.join_next().await.ok_or("nobody is left")???;
            }
            let ledger = self.ledger.clone();
            callers.spawn(async move { Ok(ledger.append_all(batch).await?) });
        }
        callers.join_all().await.into_iter().collect::<Result<Vec<_>>>()?;
        let durable = started.elapsed();
        self.settle().await?;
        Ok(Took { durable, found: started.elapsed() })
    }

    /// Waits until the index has caught up.
    async fn settle(&self) -> Result<()> {
        let filter = IdentityFilter { token_id: Some("none".into()), ..IdentityFilter::default() };
        self.ledger.list(&filter, 1, None).await?;
        Ok(())
    }

    /// The bytes of all certificates that were recorded.
    pub fn certificate_bytes(&self) -> u64 {
        self.mesh.certificate_bytes.load(Ordering::Relaxed)
    }

    /// The serial of the certificate in the entry `entry`; none if it is no issuance.
    pub async fn serial(&self, entry: u64) -> Result<Option<Serial>> {
        Ok(self.ledger.show_entry(entry).await?.map(|identity| identity.leaf.serial))
    }

    /// Closes the ledger as a CA does that ends in order.
    pub async fn close(self) -> Result<()> {
        Ok(self.ledger.close().await?)
    }
}

impl Mesh {
    /// The next issuances, at most `count`, numbered below `end`.
    async fn bodies(&self, count: u64, end: u64) -> Result<Vec<Body>> {
        let taken = |next: u64| Some((next + count).min(end));
        let first = self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken).unwrap_or(end);
        let mut bodies = Vec::new();
        for number in first..(first + count).min(end) {
            bodies.push(self.issuance(number).await?.into());
        }
        Ok(bodies)
    }

    async fn issuance(&self, number: u64) -> Result<Issuance> {
        let pod = Pod::of(number);
        let id = pod.spiffe_id()?;
        let leaf = LeafRequest { id: &id, dns_names: &[], public_key: &self.public_key, key_type: KeyType::EcdsaP256, lifetime: LIFETIME };
        let issuer = self.authority.issuer();
        let certificate = Bytes::copy_from_slice(&issuer.issue(&leaf, OffsetDateTime::now_utc()).await?.certificate);
        self.certificate_bytes.fetch_add(certificate.len() as u64, Ordering::Relaxed);
        let is_first = number % (PODS * RENEWALS) < PODS;
        Ok(Issuance {
            certificate,
            issuing_certificate: issuer.certificate_id(),
            root: issuer.root_id(),
            role: Role::Agent,
            reason: if is_first { IssueReason::First } else { IssueReason::Renewal },
            cluster: CLUSTER.into(),
            node: format!("node-{}", pod.node),
            node_uid: Some(uid(2, pod.node)),
            service_account_uid: Some(uid(3, number % (NAMESPACES * ACCOUNTS))),
            namespace: pod.namespace,
            service_account: pod.account,
            pod: pod.name,
            pod_uid: Some(pod.uid),
            token_id: Uuid::new_v4().to_string(),
            request_id: Uuid::new_v4(),
            trust_sequence: 1,
            sidecar_pod_uid: None,
            provenance: Provenance::Issued,
        })
    }
}
