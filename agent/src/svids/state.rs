//! What survives a restart of the agent, in one file on a memory-backed file system: trust, the cluster's keys, the agent's own certificate,
//! the workloads' certificates with their keys and whose they are. Never a token.
//!
//! The file is private (0600 in a 0700 directory), replaced as a whole, and its buffers are zeroized. A state of another trust domain
//! or cluster, of a newer version, or that cannot be read is refused rather than forgotten: with it the agent would forget which roots
//! were distrusted.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use chancery_identity::{PrivateKey, TrustDomain, TrustState, X509Svid};
use chancery_process::files::{self, FileError};
use chancery_proto::chancery::v1 as wire;
use prost::Message;
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use uuid::Uuid;
use zeroize::{Zeroize, Zeroizing};

use super::WorkloadKey;
use super::accounts::Taken;
use crate::ca_client::{ClusterKeys, Held, Remembered, trust};

/// The encoding that this version writes.
const VERSION: u32 = 1;
const FILE_NAME: &str = "state";

/// Why there is no state to use.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The directory lies on a disk.
    #[error("{} is not on a memory-backed file system, and private keys would reach a disk; use one under /run or /dev/shm that is a tmpfs, or set allow_disk_state = true", .0.display())]
    OnDisk(PathBuf),
    /// The file or its directory.
    #[error(transparent)]
    File(#[from] FileError),
    /// Written by a newer version.
    #[error("{}: the state has version {found}, this agent reads up to {VERSION}; start the newer version, or forget the state with `chancery-agent reset`", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// It makes no sense.
    #[error("{}: {problem}; forget the state with `chancery-agent reset`", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Why not.
        problem: String,
    },
}

/// A workload from before the restart.
#[derive(Clone, Debug)]
pub struct RestoredWorkload {
    /// Whose.
    pub key: WorkloadKey,
    /// The pod's name.
    pub pod_name: String,
    /// Its certificate.
    pub held: Held,
    /// The proxies that took something of it, by node ID.
    pub proxies: Vec<(String, Taken)>,
}

/// Where the state is kept.
#[derive(Clone, Debug)]
pub struct StateFile {
    path: PathBuf,
    trust_domain: TrustDomain,
    cluster: String,
}

/// All that is kept.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// For the connection to the CA.
    pub remembered: Remembered,
    /// For the proxies.
    pub workloads: Vec<RestoredWorkload>,
}

impl StateFile {
    /// Prepares `directory`, which must be memory-backed unless `allow_disk`.
    ///
    /// # Errors
    /// If it is not, or is open to others.
    pub fn open(directory: &Path, allow_disk: bool, trust_domain: TrustDomain, cluster: String) -> Result<Self, StateError> {
        Self::check_directory(directory, allow_disk)?;
        files::create_private_dir(directory)?;
        Ok(Self { path: directory.join(FILE_NAME), trust_domain, cluster })
    }

    /// Whether the state may lie in `directory`, which is not created for it.
    ///
    /// # Errors
    /// If it is on a disk, or open to others.
    pub fn check_directory(directory: &Path, allow_disk: bool) -> Result<(), StateError> {
        if !allow_disk && !files::is_memory_backed(directory)? {
            return Err(StateError::OnDisk(directory.to_owned()));
        }
        if directory.exists() {
            files::check_private_dir(directory)?;
        }
        Ok(())
    }

    /// The file in `directory`, to be removed by `reset`.
    pub fn path_in(directory: &Path) -> PathBuf {
        directory.join(FILE_NAME)
    }

    /// Reads the state; an absent file is an empty one. Certificates that are no longer good at `now` are left out.
    ///
    /// # Errors
    /// If there is a file that cannot be used.
    pub fn load(&self, now: OffsetDateTime) -> Result<State, StateError> {
        if !self.path.exists() {
            return Ok(State::default());
        }
        let bytes = files::read_private(&self.path)?;
        let mut content = Content::decode(bytes.as_slice()).map_err(|e| self.unusable(format!("it cannot be decoded: {e}")))?;
        let state = self.read(&content, now);
        content.wipe();
        state
    }

    fn read(&self, content: &Content, now: OffsetDateTime) -> Result<State, StateError> {
        if content.version > VERSION {
            return Err(StateError::Newer { path: self.path.clone(), found: content.version });
        }
        if content.trust_domain != self.trust_domain.as_str() || content.cluster != self.cluster {
            let problem = format!("it is of the trust domain {} and the cluster {:?}", content.trust_domain, content.cluster);
            return Err(self.unusable(problem));
        }
        let unusable = |e: crate::ca_client::CaError| self.unusable(e.to_string());
        let trust = content.trust.clone().map(trust::from_wire).transpose().map_err(unusable)?.map(Arc::new);
        let certificate = |kept: &Certificate| kept.held(trust.as_deref()?, now);
        let own = content.own.as_ref().and_then(certificate);
        let workloads = content.workloads.iter().filter_map(|kept| kept.restored(certificate(kept.certificate.as_ref()?)?)).collect();
        let remembered = Remembered {
            trust: trust.clone(),
            cluster_keys: match &content.cluster_keys {
                Some(keys) => Some(Arc::new(ClusterKeys::from_wire(keys, &self.cluster).map_err(unusable)?)),
                None => None,
            },
            own,
        };
        Ok(State { remembered, workloads })
    }

    /// Encodes `state` for [`StateFile::write`].
    pub fn encode(&self, state: &State) -> Zeroizing<Vec<u8>> {
        let remembered = &state.remembered;
        let mut content = Content {
            version: VERSION,
            trust_domain: self.trust_domain.to_string(),
            cluster: self.cluster.clone(),
            trust: remembered.trust.as_deref().map(trust::to_wire),
            cluster_keys: remembered.cluster_keys.as_deref().map(ClusterKeys::to_wire),
            own: remembered.own.as_ref().map(Certificate::of),
            workloads: state.workloads.iter().map(KeptWorkload::of).collect(),
        };
        // Allocated with its final size, so it never moves and leaves no copy behind.
        let bytes = Zeroizing::new(content.encode_to_vec());
        content.wipe();
        bytes
    }

    /// Replaces the file.
    ///
    /// # Errors
    /// What the system says.
    pub fn write(&self, bytes: &[u8]) -> Result<(), StateError> {
        Ok(files::write_private(&self.path, bytes)?)
    }

    fn unusable(&self, problem: String) -> StateError {
        StateError::Unusable { path: self.path.clone(), problem }
    }
}

/// The file's content. Fields are never renumbered or reused.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
struct Content {
    #[prost(uint32, tag = "1")]
    version: u32,
    #[prost(string, tag = "2")]
    trust_domain: String,
    #[prost(string, tag = "3")]
    cluster: String,
    #[prost(message, optional, tag = "4")]
    trust: Option<wire::TrustState>,
    #[prost(message, optional, tag = "5")]
    cluster_keys: Option<wire::ClusterKeys>,
    #[prost(message, optional, tag = "6")]
    own: Option<Certificate>,
    #[prost(message, repeated, tag = "7")]
    workloads: Vec<KeptWorkload>,
}

#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
struct Certificate {
    #[prost(bytes = "vec", repeated, tag = "1")]
    chain: Vec<Vec<u8>>,
    #[prost(bytes = "vec", tag = "2")]
    key: Vec<u8>,
    /// Unix seconds.
    #[prost(int64, tag = "3")]
    received_at: i64,
    /// Of the ledger.
    #[prost(uint64, tag = "4")]
    entry: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
struct KeptWorkload {
    #[prost(string, tag = "1")]
    pod_uid: String,
    #[prost(string, tag = "2")]
    namespace: String,
    #[prost(string, tag = "3")]
    service_account: String,
    #[prost(string, tag = "4")]
    pod_name: String,
    #[prost(message, optional, tag = "5")]
    certificate: Option<Certificate>,
    #[prost(message, repeated, tag = "6")]
    proxies: Vec<KeptProxy>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct KeptProxy {
    #[prost(string, tag = "1")]
    proxy: String,
    #[prost(bool, tag = "2")]
    bundle: bool,
    #[prost(bool, tag = "3")]
    certificate: bool,
}

impl Content {
    fn wipe(&mut self) {
        let workloads = self.workloads.iter_mut().filter_map(|workload| workload.certificate.as_mut());
        for certificate in workloads.chain(self.own.as_mut()) {
            certificate.key.zeroize();
        }
    }
}

impl Certificate {
    fn of(held: &Held) -> Self {
        Self {
            chain: held.svid.chain().iter().map(|der| der.to_vec()).collect(),
            key: held.svid.key().secret_pkcs8().to_vec(),
            received_at: held.received_at.unix_timestamp(),
            entry: held.entry,
        }
    }

    /// One that has expired or is no longer good is named and left out, since a new one can be had.
    fn held(&self, trust: &TrustState, now: OffsetDateTime) -> Option<Held> {
        let chain = self.chain.iter().cloned().map(CertificateDer::from).collect();
        let key = PrivateKey::from_pkcs8(Zeroizing::new(self.key.clone()));
        let svid = X509Svid::new(chain, key).and_then(|svid| svid.verify(trust, now).map(|()| svid));
        let svid = svid.inspect_err(|error| tracing::warn!(%error, "a kept certificate is left out")).ok()?;
        let received_at = OffsetDateTime::from_unix_timestamp(self.received_at).ok()?;
        Some(Held { svid: Arc::new(svid), received_at, entry: self.entry })
    }
}

impl KeptWorkload {
    fn of(workload: &RestoredWorkload) -> Self {
        Self {
            pod_uid: workload.key.pod_uid.to_string(),
            namespace: workload.key.namespace.clone(),
            service_account: workload.key.service_account.clone(),
            pod_name: workload.pod_name.clone(),
            certificate: Some(Certificate::of(&workload.held)),
            proxies: workload.proxies.iter().map(KeptProxy::of).collect(),
        }
    }

    fn restored(&self, held: Held) -> Option<RestoredWorkload> {
        let pod_uid: Uuid = self.pod_uid.parse().ok()?;
        let key = WorkloadKey { pod_uid, namespace: self.namespace.clone(), service_account: self.service_account.clone() };
        let proxies = self.proxies.iter().map(KeptProxy::restored).collect();
        Some(RestoredWorkload { key, pod_name: self.pod_name.clone(), held, proxies })
    }
}

impl KeptProxy {
    fn of((proxy, taken): &(String, Taken)) -> Self {
        Self { proxy: proxy.clone(), bundle: taken.bundle, certificate: taken.certificate }
    }

    fn restored(&self) -> (String, Taken) {
        (self.proxy.clone(), Taken { bundle: self.bundle, certificate: self.certificate })
    }
}
