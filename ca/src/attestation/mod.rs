//! Token to caller: who is asking, by which cluster's keys.
//!
//! An agent proves itself once by its own service-account token ([`Clusters::attest_agent`]) and from then on by its SVID ([`Caller`]);
//! each workload by the token of its pod, presented by the agent of the pod's own node or by the sidecar in the pod itself
//! ([`Clusters::attest_workload`]). The keys are always those of the caller's cluster, never chosen by anything in the token: clusters
//! commonly share an issuer. [`AttestedAgent`] and [`AttestedWorkload`] can only come from here, so that a signature over one is proof
//! that a token was verified.

mod accounts;
mod caller;
pub mod development;
mod keys;
mod settings;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use arc_swap::ArcSwap;
use chancery_identity::token::{TokenError, VerifiedToken};
use chancery_identity::{Clock, SpiffeId, SpiffeIdError, TrustDomain};
use chancery_proto::chancery::v1::{ClusterKeys, Role};
use futures_util::future::join_all;
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use accounts::{AccountPattern, PatternError};
pub use caller::{Caller, Holder, NotACaller, RESERVED_SEGMENT};
pub use keys::{ClusterStatus, check_keys};
pub use settings::{ClusterSettings, ClusterSettingsError, JwksSource, check as check_clusters};

use keys::Cluster;

/// Why a caller or a workload was not believed. Each has a stable word, [`AttestationError::reason`].
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttestationError {
    /// No such cluster in the configuration.
    #[error("there is no cluster {0:?} in the CA's configuration")]
    UnknownCluster(String),
    /// The cluster's keys could not be loaded yet.
    #[error("the public keys of cluster {cluster} are not loaded: {problem}")]
    NoKeys {
        /// Whose.
        cluster: String,
        /// Why.
        problem: String,
    },
    /// The token itself.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The pod runs on another node than the agent.
    #[error("the token's pod {} runs on node {} ({}), not on the agent's node {expected}", .token.pod.name, .token.node.name, .token.node.uid)]
    OtherNode {
        /// The agent's node UID.
        expected: String,
        /// Verified.
        token: Box<VerifiedToken>,
    },
    /// A sidecar asked for another pod.
    #[error("the token belongs to pod {} ({}), not to the sidecar's pod {expected}", .token.pod.name, .token.pod.uid)]
    OtherPod {
        /// The sidecar's pod UID.
        expected: String,
        /// Verified.
        token: Box<VerifiedToken>,
    },
    /// The cluster may not speak for this account.
    #[error("cluster {} may not speak for {}/{}; see its `service_accounts`", .token.cluster, .token.namespace, .token.service_account.name)]
    NotAllowed {
        /// Verified.
        token: Box<VerifiedToken>,
    },
    /// An account that no agent runs under.
    #[error("{}/{} of cluster {} is no agent's account; see its `agent_accounts`", .token.namespace, .token.service_account.name, .token.cluster)]
    NotAnAgent {
        /// Verified.
        token: Box<VerifiedToken>,
    },
    /// Neither agent nor sidecar.
    #[error("a caller joins either as an agent or as a sidecar")]
    Role,
    /// The names cannot stand in a SPIFFE ID.
    #[error("no SPIFFE ID can be made of the caller's names: {0}")]
    Id(#[from] SpiffeIdError),
}

/// An agent or sidecar whose own token was verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttestedAgent {
    caller: Caller,
    token: VerifiedToken,
}

/// A workload whose token was verified and which the caller may speak for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttestedWorkload {
    caller: Caller,
    token: VerifiedToken,
}

/// The clusters of the configuration, with their keys.
#[derive(Debug)]
pub struct Clusters {
    trust_domain: TrustDomain,
    clock: Arc<dyn Clock>,
    by_name: ArcSwap<BTreeMap<String, Arc<Cluster>>>,
    changes: watch::Sender<u64>,
}

impl Clusters {
    /// Checks the settings and reads the keys that are in files. Keys at a URL come with [`Clusters::run`] or when first needed.
    ///
    /// # Errors
    /// If a setting breaks a rule, or a file has no usable keys.
    pub fn new(
        trust_domain: TrustDomain,
        settings: Vec<ClusterSettings>,
        clock: Arc<dyn Clock>,
    ) -> Result<Arc<Self>, ClusterSettingsError> {
        let clusters = Self { trust_domain, clock, by_name: ArcSwap::default(), changes: watch::Sender::new(0) };
        clusters.replace(settings)?;
        Ok(Arc::new(clusters))
    }

    /// Puts other settings into force, whole or not at all. Clusters whose issuer and source stay keep the keys they have.
    ///
    /// # Errors
    /// As [`Clusters::new`]; then nothing has changed.
    pub fn replace(&self, settings: Vec<ClusterSettings>) -> Result<(), ClusterSettingsError> {
        settings::check(&settings)?;
        let before = self.by_name.load_full();
        let mut clusters = BTreeMap::new();
        for one in settings {
            let cluster = Cluster::new(one);
            let name = cluster.settings.name.clone();
            if let Some(before) = before.get(&name) {
                cluster.inherit(before);
            }
            cluster.load_file(self.clock.now()).map_err(|problem| ClusterSettingsError { cluster: name.clone(), problem })?;
            clusters.insert(name, Arc::new(cluster));
        }
        self.by_name.store(Arc::new(clusters));
        self.changed();
        Ok(())
    }

    /// Believes a joining agent or sidecar by its own token, verified with the keys of `cluster`. An agent's token is for the agents'
    /// audience and of an agent's account; a sidecar's is its pod's own, as for any workload.
    ///
    /// # Errors
    /// If the token is not good, or not for that.
    pub async fn attest_agent(&self, cluster: &str, role: Role, token: &str) -> Result<AttestedAgent, AttestationError> {
        let cluster = self.get(cluster)?;
        let settings = &cluster.settings;
        let (token, holder) = match role {
            Role::Agent => {
                let token = self.verify(&cluster, token, std::slice::from_ref(&settings.agent_audience)).await?;
                if !speaks_for(&settings.agent_accounts, &token) {
                    return Err(AttestationError::NotAnAgent { token: token.into() });
                }
                let holder = Holder::Agent { node: token.node.uid };
                (token, holder)
            }
            Role::Sidecar => {
                let token = self.verify(&cluster, token, &settings.audiences).await?;
                if !speaks_for(&settings.service_accounts, &token) {
                    return Err(AttestationError::NotAllowed { token: token.into() });
                }
                let holder = Holder::Sidecar { pod: token.pod.uid };
                (token, holder)
            }
            Role::Unspecified => return Err(AttestationError::Role),
        };
        Ok(AttestedAgent { caller: Caller::new(&self.trust_domain, &settings.name, holder)?, token })
    }

    /// Believes a workload by its pod's token, verified with the keys of the caller's cluster.
    ///
    /// # Errors
    /// If the token is not good, the pod is not on the agent's node or not the sidecar's own, or the cluster may not speak for it.
    pub async fn attest_workload(&self, caller: &Caller, token: &str) -> Result<AttestedWorkload, AttestationError> {
        let cluster = self.get(caller.cluster())?;
        let token = self.verify(&cluster, token, &cluster.settings.audiences).await?;
        match caller.holder() {
            Holder::Agent { node } if node != token.node.uid => {
                return Err(AttestationError::OtherNode { expected: node.to_string(), token: token.into() });
            }
            Holder::Sidecar { pod } if pod != token.pod.uid => {
                return Err(AttestationError::OtherPod { expected: pod.to_string(), token: token.into() });
            }
            _ => {}
        }
        if !speaks_for(&cluster.settings.service_accounts, &token) {
            return Err(AttestationError::NotAllowed { token: token.into() });
        }
        Ok(AttestedWorkload { caller: caller.clone(), token })
    }

    /// Whether the configuration (still) has this cluster.
    pub fn contains(&self, cluster: &str) -> bool {
        self.by_name.load().contains_key(cluster)
    }

    /// The settings in force, by name.
    pub fn settings(&self) -> Vec<ClusterSettings> {
        self.by_name.load().values().map(|cluster| cluster.settings.clone()).collect()
    }

    /// What an agent of this cluster needs to verify its workloads' tokens itself; nothing while no keys are loaded.
    pub fn cluster_keys(&self, cluster: &str) -> Option<ClusterKeys> {
        let cluster = self.get(cluster).ok()?;
        let keys = cluster.keys()?;
        let ClusterSettings { name, issuer, audiences, .. } = &cluster.settings;
        Some(ClusterKeys { cluster: name.clone(), issuer: issuer.clone(), audiences: audiences.clone(), jwks: keys.jwks().to_owned() })
    }

    /// Changes whenever [`Clusters::cluster_keys`] may answer otherwise.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// How each cluster's keys stand.
    pub fn status(&self) -> Vec<ClusterStatus> {
        self.by_name.load().values().map(|cluster| cluster.status()).collect()
    }

    /// The files that hold keys, to be watched, each with its cluster.
    pub fn key_files(&self) -> Vec<(String, PathBuf)> {
        let clusters = self.by_name.load();
        let file = |cluster: &Arc<Cluster>| match &cluster.settings.jwks {
            JwksSource::File(path) => Some((cluster.settings.name.clone(), path.clone())),
            JwksSource::Url { .. } => None,
        };
        clusters.values().filter_map(file).collect()
    }

    /// Loads a cluster's keys again. On failure the last good ones stay.
    ///
    /// # Errors
    /// If there is no such cluster, or the keys could not be loaded.
    pub async fn reload_keys(&self, cluster: &str) -> Result<(), AttestationError> {
        let cluster = self.get(cluster)?;
        if cluster.load(self.clock.now()).await {
            self.changed();
        }
        match cluster.last_error() {
            Some(problem) => Err(AttestationError::NoKeys { cluster: cluster.settings.name.clone(), problem }),
            None => Ok(()),
        }
    }

    /// Fetches the keys that are at a URL, now and every few minutes, until `shutdown`.
    pub async fn run(&self, shutdown: CancellationToken) {
        let mut ticks = tokio::time::interval(keys::RETRY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let refresh = async {
            loop {
                ticks.tick().await;
                let due: Vec<_> = self.by_name.load().values().filter(|cluster| cluster.is_due()).cloned().collect();
                let now = self.clock.now();
                if join_all(due.iter().map(|cluster| cluster.load(now))).await.contains(&true) {
                    self.changed();
                }
            }
        };
        shutdown.run_until_cancelled(refresh).await;
    }

    async fn verify(&self, cluster: &Cluster, token: &str, audiences: &[String]) -> Result<VerifiedToken, AttestationError> {
        let now = self.clock.now();
        match verify_now(cluster, token, audiences, now) {
            // The cluster may have new keys since they were loaded.
            Err(AttestationError::NoKeys { .. } | AttestationError::Token(TokenError::UnknownKey { .. })) => {
                if cluster.load_on_demand(now).await {
                    self.changed();
                }
                verify_now(cluster, token, audiences, now)
            }
            verdict => verdict,
        }
    }

    fn get(&self, cluster: &str) -> Result<Arc<Cluster>, AttestationError> {
        self.by_name.load().get(cluster).cloned().ok_or_else(|| AttestationError::UnknownCluster(cluster.to_owned()))
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }
}

fn verify_now(cluster: &Cluster, token: &str, audiences: &[String], now: OffsetDateTime) -> Result<VerifiedToken, AttestationError> {
    let Some(keys) = cluster.keys() else {
        let problem = cluster.last_error().unwrap_or_else(|| "they have not been fetched yet".into());
        return Err(AttestationError::NoKeys { cluster: cluster.settings.name.clone(), problem });
    };
    Ok(keys.verify(token, audiences, now)?)
}

fn speaks_for(accounts: &[AccountPattern], token: &VerifiedToken) -> bool {
    accounts.iter().any(|account| account.matches(&token.namespace, &token.service_account.name))
}

impl AttestedAgent {
    /// What it is from now on.
    pub fn caller(&self) -> &Caller {
        &self.caller
    }

    /// The ID of its SVID.
    pub fn id(&self) -> &SpiffeId {
        self.caller.id()
    }

    /// What its token said: cluster, node, pod, service account.
    pub fn token(&self) -> &VerifiedToken {
        &self.token
    }
}

impl AttestedWorkload {
    /// Who asked.
    pub fn caller(&self) -> &Caller {
        &self.caller
    }

    /// What its token said: cluster, node, pod, service account.
    pub fn token(&self) -> &VerifiedToken {
        &self.token
    }
}

impl AttestationError {
    /// A stable word for metrics and refusals.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::UnknownCluster(_) => "cluster_unknown",
            Self::NoKeys { .. } => "cluster_keys_missing",
            Self::Token(error) => error.reason(),
            Self::OtherNode { .. } => "token_other_node",
            Self::OtherPod { .. } => "token_other_pod",
            Self::NotAllowed { .. } => "account_not_allowed",
            Self::NotAnAgent { .. } => "account_not_agent",
            Self::Role => "role_unspecified",
            Self::Id(_) => "id_impossible",
        }
    }

    /// Whether the same token may be believed later without anybody's doing.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::NoKeys { .. } | Self::Token(TokenError::UnknownKey { .. } | TokenError::NotYetValid(_)))
    }

    /// What the token said, where it was verified.
    pub fn token(&self) -> Option<&VerifiedToken> {
        match self {
            Self::OtherNode { token, .. } | Self::OtherPod { token, .. } | Self::NotAllowed { token } | Self::NotAnAgent { token } => {
                Some(token)
            }
            _ => None,
        }
    }
}
