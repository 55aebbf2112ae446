//! Opening the parts of a CA, in the order in which they need each other.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;
use chancery_identity::Clock;
use chancery_process::files::bind_socket;
use chancery_process::http;
use chancery_proto::chancery::v1::Start;
use tokio::net::{TcpListener, UnixListener};

use crate::api::{CallMetrics, People};
use crate::attestation::Clusters;
use crate::attestation::development::DevelopmentIssuer;
use crate::authority::{Authority, DataDirectory, Kind};
use crate::backup::Restoration;
use crate::config::Config;
use crate::fleet::Fleet;
use crate::issuance::Issuance;
use crate::issuance::policy::Policy;
use crate::keys::{FileKeyManager, KeyManager};
use crate::ledger::{Body, Checkpoints, DICTIONARY_DIMENSIONS, EntryTerms, Ledger, LedgerOptions, Refusals};
use crate::publication::Publication;
use crate::rotation::Rotation;
use crate::server::ServeError;
use crate::server::growth::Growth;
use crate::server::parts::Parts;
use crate::server::scrub::Scrubs;
use crate::store::SharedStore;
use crate::store::embedded::files::LogFiles;
use crate::store::embedded::{EmbeddedStore, Options as StoreOptions};

/// Only the owner may ask as an operator.
const ADMIN_SOCKET_MODE: u32 = 0o600;

/// What can be taken by somebody else: opened first, and nothing is written before.
pub(super) struct Doors {
    pub(super) tls: TcpListener,
    pub(super) address: SocketAddr,
    pub(super) http: TcpListener,
    pub(super) http_address: SocketAddr,
    pub(super) admin: UnixListener,
    pub(super) directory: DataDirectory,
}

impl Doors {
    pub(super) async fn open(config: &Config) -> Result<Self, ServeError> {
        let tls = http::bind(config.listen).await?;
        let http = http::bind(config.http_listen).await?;
        let kind = if config.development { Kind::Development } else { Kind::Production };
        let directory = DataDirectory::open(&config.data_dir, kind)?;
        if config.development {
            // Writes the keys that the development cluster reads.
            DevelopmentIssuer::open_or_create(&directory.development())?;
        }
        // After the directory, since a development CA's socket lies in it.
        let admin = bind_socket(&config.admin_socket, ADMIN_SOCKET_MODE)?;
        let (address, http_address) = (address_of(&tls, config.listen), address_of(&http, config.http_listen));
        Ok(Self { tls, address, http, http_address, admin, directory })
    }
}

/// The port that the system chose where 0 was configured.
fn address_of(listener: &TcpListener, configured: SocketAddr) -> SocketAddr {
    listener.local_addr().unwrap_or(configured)
}

pub(super) async fn open(
    config: Config,
    clock: Arc<dyn Clock>,
    directory: DataDirectory,
    calls: Arc<CallMetrics>,
    log_files: Arc<dyn LogFiles>,
) -> Result<Parts, ServeError> {
    let kept_keys = directory.cluster_keys();
    let clusters = Clusters::keeping_keys(config.trust_domain.clone(), config.clusters.clone(), Arc::clone(&clock), Some(&kept_keys))?;
    let policy = Policy::new(config.trust_domain.clone(), config.policy.clone(), &config.clusters)?;
    let keys = Arc::new(match config.keys.secret()? {
        Some(secret) => FileKeyManager::open_sealed(directory.keys(), &secret)?,
        None => FileKeyManager::open(directory.keys())?,
    });
    let (ledger, checkpoints, repairs) = open_ledger(&config, &clock, &directory, log_files).await?;
    let start = Start {
        version: env!("CARGO_PKG_VERSION").into(),
        configuration: config.digest.to_vec(),
        development: config.development,
        repairs,
    };
    ledger.append(Body::Start(start)).await?;
    record_restoration(&config, &ledger).await?;
    checkpoints.record_keys().await?;
    let authority =
        Authority::open(config.trust_domain.clone(), config.authority.clone(), &directory, keys, ledger.clone(), Arc::clone(&clock))
            .await?;
    let refusals = Arc::new(Refusals::new());
    let people = People::new(config.roles.clone(), Arc::clone(&clusters), ledger.clone(), Arc::clone(&calls), Arc::clone(&clock));
    let issuance = Issuance::new(
        Arc::clone(&authority),
        Arc::clone(&clusters),
        policy,
        ledger.clone(),
        Arc::clone(&refusals),
        calls,
        Arc::clone(&clock),
    );
    let fleet = Fleet::with_clusters(Arc::clone(&clock), Arc::clone(&clusters));
    let rotation = Rotation::new(ledger.clone(), Arc::clone(&authority), Arc::clone(&fleet), config.rotation.clone(), Arc::clone(&clock));
    let publication = Publication::new(authority.trust(), Arc::clone(&clusters), Arc::clone(&clock));
    Ok(Parts {
        publication: Arc::new(publication),
        started_at: clock.now(),
        fleet,
        rotation: Arc::new(rotation),
        people: Arc::new(people),
        clock,
        config: ArcSwap::from_pointee(config),
        ledger,
        checkpoints: Arc::new(checkpoints),
        refusals,
        authority,
        clusters,
        issuance: Arc::new(issuance),
        scrubs: Scrubs::default(),
        growth: Growth::default(),
        configuration_error: Mutex::default(),
        directory,
    })
}

/// The data directory may be one that was restored from a backup.
async fn record_restoration(config: &Config, ledger: &Ledger) -> Result<(), ServeError> {
    let Some(restoration) = Restoration::pending(&config.data_dir)? else { return Ok(()) };
    if let Some((change, why)) = restoration.act(&ledger.current_state()) {
        ledger.act(&restoration.actor, change, &why).await?;
    }
    Ok(Restoration::done(&config.data_dir)?)
}

async fn open_ledger(
    config: &Config,
    clock: &Arc<dyn Clock>,
    directory: &DataDirectory,
    log_files: Arc<dyn LogFiles>,
) -> Result<(Ledger, Checkpoints, Vec<String>), ServeError> {
    let mut options = StoreOptions::new(Arc::new(EntryTerms), Arc::clone(clock));
    options.dictionary_dimensions = DICTIONARY_DIMENSIONS.to_vec();
    options.files = Arc::clone(&log_files);
    let opened = EmbeddedStore::open(&directory.ledger(), options).await?;
    let store: SharedStore = Arc::new(opened.store);
    let keys: Arc<dyn KeyManager> = Arc::new(FileKeyManager::open(directory.ledger_keys())?);
    let options =
        LedgerOptions { longest_lifetime: config.longest_lifetime(), ..LedgerOptions::new(config.trust_domain.clone(), Arc::clone(&keys)) };
    let ledger = Ledger::open(store, Arc::clone(clock), options).await?;
    match Checkpoints::open(ledger.clone(), keys, log_files, directory.checkpoint(), Arc::clone(clock)).await {
        Ok(checkpoints) => {
            ledger.record_states();
            Ok((ledger, checkpoints, opened.repairs))
        }
        Err(refused) => {
            // What it would be closed for is less than what it is refused for.
            ledger.close().await.ok();
            Err(refused.into())
        }
    }
}
