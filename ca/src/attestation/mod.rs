//! Token to caller: who is asking, by which cluster's keys.
//!
//! An agent proves itself once by its own service-account token ([`Clusters::attest_agent`]) and from then on by its SVID ([`Caller`]);
//! each workload by the token of its pod, presented by the agent of the pod's own node or by the sidecar in the pod itself
//! ([`Clusters::attest_workload`]). The keys are always those of the caller's cluster, never chosen by anything in the token: clusters
//! commonly share an issuer. Where a cluster's API server is known, a token must also be borne out by what the cluster has now ([`live`]).
//! [`AttestedAgent`] and [`AttestedWorkload`] can only come from here, so that a signature over one is proof
//! that a token was verified.

mod accounts;
mod answers;
mod caller;
pub mod development;
mod error;
mod kept;
mod keys;
mod live;
mod operators;
mod settings;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use chancery_identity::token::{TokenError, VerifiedToken};
use chancery_identity::{Clock, SpiffeId, TrustDomain};
use chancery_proto::chancery::v1::{ClusterKeys, Role};
use futures_util::future::join_all;
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

pub use accounts::{AccountName, AccountPattern, PatternError};
pub use caller::{Caller, Holder, NotACaller, RESERVED_SEGMENT};
pub use error::AttestationError;
pub use keys::{ClusterStatus, check_keys};
pub use live::{Away, LiveStatus, Mismatch, Obstacle, ReviewCounts, Standing};
pub use operators::{OPERATORS_AUDIENCE, OPERATORS_CLUSTER_KEY, Operator, OperatorError, Resource, Right, Verb};
pub use settings::{ClusterSettings, ClusterSettingsError, JwksSource, check as check_clusters};

use crate::kubernetes::{ApiError, ApiServer, PublishSettings, TrustCopy};
use keys::Cluster;
use live::Live;

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
    /// Where keys that were fetched are kept.
    directory: Option<PathBuf>,
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
        Self::keeping_keys(trust_domain, settings, clock, None)
    }

    /// Likewise; keys that are fetched are kept in `directory`, and serve from there after a start for as long as nobody hands them out.
    ///
    /// # Errors
    /// As [`Clusters::new`].
    pub fn keeping_keys(
        trust_domain: TrustDomain,
        settings: Vec<ClusterSettings>,
        clock: Arc<dyn Clock>,
        directory: Option<&Path>,
    ) -> Result<Arc<Self>, ClusterSettingsError> {
        let (by_name, changes) = (ArcSwap::default(), watch::Sender::new(0));
        let clusters = Self { trust_domain, clock, by_name, changes, directory: directory.map(Path::to_owned) };
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
            let same = before.get(&one.name).map(AsRef::as_ref);
            let cluster = Cluster::new(one, same, &self.clock, self.directory.as_deref());
            let name = cluster.settings.name.clone();
            cluster.load_file(self.clock.now()).map_err(|problem| ClusterSettingsError { cluster: name.clone(), problem })?;
            clusters.insert(name, Arc::new(cluster));
        }
        self.by_name.store(Arc::new(clusters));
        self.changed();
        Ok(())
    }

    /// Believes a joining agent or sidecar by its own token, verified with the keys of `cluster`. An agent's token is for the agents'
    /// audience and of an agent's account, and the cluster's API server, where it is known, is always asked about it: agents join seldom, and
    /// have much to say. A sidecar's is its pod's own, as for any workload.
    ///
    /// # Errors
    /// If the token is not good, or not for that.
    pub async fn attest_agent(&self, cluster: &str, role: Role, text: &str) -> Result<AttestedAgent, AttestationError> {
        let cluster = self.get(cluster)?;
        let settings = &cluster.settings;
        let (token, holder) = match role {
            Role::Agent => {
                let audience = std::slice::from_ref(&settings.agent_audience);
                let token = self.verify(&cluster, text, audience).await?;
                if !speaks_for(&settings.agent_accounts, &token) {
                    return Err(AttestationError::NotAnAgent { token: token.into() });
                }
                if let Some(live) = &cluster.live {
                    live.review(text, &token, audience).await.map_err(|doubt| AttestationError::doubted(doubt, &token))?;
                }
                let holder = Holder::Agent { node: token.node.uid };
                (token, holder)
            }
            Role::Sidecar => {
                let token = self.verify(&cluster, text, &settings.audiences).await?;
                if !speaks_for(&settings.service_accounts, &token) {
                    return Err(AttestationError::NotAllowed { token: token.into() });
                }
                confirm(&cluster, text, &token).await?;
                let holder = Holder::Sidecar { pod: token.pod.uid };
                (token, holder)
            }
            Role::Unspecified => return Err(AttestationError::Role),
        };
        Ok(AttestedAgent { caller: Caller::new(&self.trust_domain, &settings.name, holder)?, token })
    }

    /// Believes a workload by its pod's token, verified with the keys of the caller's cluster. `has_certificate` tells whether this CA issued
    /// the token's pod a certificate that is still good, and so once held the pod against its cluster: that is asked, and then counts, only
    /// while the cluster's API server has not been reached since the start of the CA.
    ///
    /// # Errors
    /// If the token is not good, the pod is not on the agent's node or not the sidecar's own, the cluster may not speak for it, or does not
    /// bear it out.
    pub async fn attest_workload(
        &self,
        caller: &Caller,
        text: &str,
        has_certificate: impl AsyncFnOnce(&VerifiedToken) -> bool,
    ) -> Result<AttestedWorkload, AttestationError> {
        let cluster = self.get(caller.cluster())?;
        let token = self.verify(&cluster, text, &cluster.settings.audiences).await?;
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
        let confirmed = confirm(&cluster, text, &token).await;
        let is_unheard = matches!(confirmed, Err(AttestationError::Unconfirmed { obstacle: Obstacle::Unheard { .. }, .. }));
        if !is_unheard || !has_certificate(&token).await {
            confirmed?;
        }
        Ok(AttestedWorkload { caller: caller.clone(), token })
    }

    /// Whether the configuration (still) has this cluster.
    pub fn contains(&self, cluster: &str) -> bool {
        self.by_name.load().contains_key(cluster)
    }

    /// Every copy of the trust bundle that the settings want, by cluster.
    pub fn copies(&self) -> Vec<(String, TrustCopy)> {
        let clusters = self.by_name.load();
        let of = |cluster: &ClusterSettings| {
            let copies = cluster.publish.as_ref().map(PublishSettings::copies).unwrap_or_default();
            copies.into_iter().map(|copy| (cluster.name.clone(), copy)).collect::<Vec<_>>()
        };
        clusters.values().flat_map(|cluster| of(&cluster.settings)).collect()
    }

    /// A cluster's API server.
    ///
    /// # Errors
    /// If the settings do not say how it is reached, or lead nowhere.
    pub async fn api_server(&self, cluster: &str) -> Result<ApiServer, ApiError> {
        let live = self.by_name.load().get(cluster).and_then(|cluster| cluster.live.clone());
        let live = live.ok_or_else(|| ApiError::Away(format!("`kubernetes` does not say how cluster {cluster} is reached")))?;
        live.server().await
    }

    /// Whether the cluster is known to have a pod no more that existed at `seen`. Always false where its API server is not watched.
    pub fn is_gone(&self, cluster: &str, pod: Uuid, seen: OffsetDateTime) -> bool {
        let clusters = self.by_name.load();
        clusters.get(cluster).and_then(|cluster| cluster.live.as_ref()).is_some_and(|live| live.is_gone(pod, seen))
    }

    /// The same, while the cluster can be asked: whoever is told so may join anew by a token that it has to bear out.
    pub fn has_left(&self, cluster: &str, pod: Uuid, seen: OffsetDateTime) -> bool {
        let clusters = self.by_name.load();
        let live = clusters.get(cluster).and_then(|cluster| cluster.live.as_ref());
        live.is_some_and(|live| live.is_heard() && live.is_gone(pod, seen))
    }

    /// The service accounts that a cluster's agents run under.
    pub fn agent_accounts(&self, cluster: &str) -> Vec<AccountName> {
        let clusters = self.by_name.load();
        let accounts = clusters.get(cluster).map_or(&[][..], |cluster| &cluster.settings.agent_accounts);
        accounts.iter().filter_map(AccountPattern::exact).collect()
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

    /// What they are called.
    pub fn names(&self) -> Vec<String> {
        self.by_name.load().keys().cloned().collect()
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
            JwksSource::Url { .. } | JwksSource::ApiServer => None,
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

    /// Reads the files anew that say how API servers are reached; connects anew where they have changed.
    pub fn reread_connections(&self) {
        self.by_name.load().values().filter_map(|cluster| cluster.live.as_ref()).for_each(|live| live.reread());
    }

    /// Fetches the keys that are at a URL, now and every minute, and watches the clusters whose API servers are known, until `shutdown`.
    pub async fn run(&self, shutdown: CancellationToken) {
        shutdown.run_until_cancelled(async { tokio::join!(self.refresh_keys(), self.watch_clusters()) }).await;
    }

    async fn refresh_keys(&self) {
        let mut ticks = tokio::time::interval(keys::RETRY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let due: Vec<_> = self.by_name.load().values().filter(|cluster| cluster.is_due()).cloned().collect();
            let now = self.clock.now();
            if join_all(due.iter().map(|cluster| cluster.load(now))).await.contains(&true) {
                self.changed();
            }
        }
    }

    /// One task for each cluster that is to be watched, and none for others.
    async fn watch_clusters(&self) {
        let mut changes = self.changes.subscribe();
        let mut watched: Vec<(Arc<Live>, AbortOnDropHandle<()>)> = Vec::new();
        loop {
            let wanted: Vec<_> = self.by_name.load().values().filter_map(|cluster| cluster.live.clone()).collect();
            watched.retain(|(live, _)| wanted.iter().any(|wanted| Arc::ptr_eq(wanted, live)));
            for live in wanted {
                if !watched.iter().any(|(watched, _)| Arc::ptr_eq(watched, &live)) {
                    let watch = tokio::spawn(Arc::clone(&live).run());
                    watched.push((live, AbortOnDropHandle::new(watch)));
                }
            }
            if changes.changed().await.is_err() {
                return;
            }
        }
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

    /// Whether a token was signed by its cluster, as far as the cluster's keys are known.
    async fn check_signature(&self, cluster: &Cluster, token: &str) -> Result<(), TokenError> {
        let check = || cluster.keys().map_or(Ok(()), |keys| keys.check_signature(token));
        match check() {
            Err(TokenError::UnknownKey { .. }) => {
                if cluster.load_on_demand(self.clock.now()).await {
                    self.changed();
                }
                check()
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

/// Holds a workload's token against what its cluster has now, where its API server is known.
async fn confirm(cluster: &Cluster, text: &str, token: &VerifiedToken) -> Result<(), AttestationError> {
    match &cluster.live {
        Some(live) => live.confirm(text, token, &cluster.settings.audiences).await.map_err(|doubt| AttestationError::doubted(doubt, token)),
        None => Ok(()),
    }
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
