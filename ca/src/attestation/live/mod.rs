//! What a cluster's own API server says of a token that was verified offline: does the pod exist, is it what the token says, is its service
//! account still the same?
//!
//! All pods and service accounts are watched, so that nearly every token is answered for out of memory ([`records`], [`informer`]). About
//! one that the watch does not tell of within a moment the API server is asked ([`reviews`]). Whether it can be asked never decides against
//! anybody: while it is away, or its pods have not been listed, the answer is an [`Obstacle`], after which the same request is made again.
//! Whether a pod that nothing is known about may renew while nobody has answered since the start of the CA ([`Obstacle::Unheard`]) is
//! decided by whoever knows what was issued.

mod informer;
mod records;
mod reviews;
#[cfg(test)]
mod tests;
mod verdict;

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use aws_lc_rs::digest::{SHA256, digest};
use chancery_identity::Clock;
use chancery_identity::token::VerifiedToken;
use time::OffsetDateTime;
use tokio::sync::{Mutex, Notify};
use tokio::time::Instant;
use uuid::Uuid;

pub use informer::{Away, Standing};
pub use reviews::ReviewCounts;
pub use verdict::Mismatch;

use super::operators::Verdicts;
use crate::kubernetes::{ApiError, ApiServer, KubernetesSettings};
use informer::Informer;
use records::{Account, Accounts, Known, Pod, Pods};
use reviews::{AT_ONCE, Outcome, Reviews};
use verdict::{judge_account, judge_pod, judge_review};

/// How long the watch may be behind until somebody who came first is asked about.
const LAG: Duration = Duration::from_millis(100);
/// How long a token may wait for its turn and the answer together, however many questions there are. The other tokens of its call wait as long,
/// so it is less than the shortest time that an agent may give a call (`renewal.call_timeout`).
const REVIEW: Duration = Duration::from_secs(4);
/// Before settings that lead to no API server are tried again.
const RECONNECT: Duration = Duration::from_secs(5);
/// How old what a watch tells can be without anybody noticing: a watch that died in silence is found when it should have ended.
const UNNOTICED: time::Duration = time::Duration::minutes(6);

/// Why a token could not be held against the cluster. Each passes by itself, and has a stable word, [`Obstacle::reason`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Obstacle {
    /// The pods are being listed.
    #[error("the pods of cluster {cluster} are not known to the CA yet{}; it is asked again by itself", .problem.as_ref().map(|problem| format!(": {problem}")).unwrap_or_default())]
    Syncing {
        /// Whose.
        cluster: String,
        /// What keeps it, if it does not get on.
        problem: Option<String>,
    },
    /// The API server has told nothing since the CA was started.
    #[error("the API server of cluster {cluster} has told nothing since the CA was started ({}), so that only pods that have a certificate get another; it is asked again by itself ({})", .away.since, .away.problem)]
    Unheard {
        /// Whose.
        cluster: String,
        /// Since when and why.
        away: Away,
    },
    /// The API server does not answer.
    #[error("the API server of cluster {cluster} has not answered since {}, so that the CA cannot tell of a pod that it does not know yet; it is asked again by itself ({})", .away.since, .away.problem)]
    Away {
        /// Whose.
        cluster: String,
        /// Since when and why.
        away: Away,
    },
    /// Too many are asked about.
    #[error("the API server of cluster {cluster} is being asked about {AT_ONCE} tokens, and others wait; it is asked again by itself")]
    Busy {
        /// Whose.
        cluster: String,
    },
}

/// Why a token is not confirmed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Doubt {
    Mismatch(Mismatch),
    Obstacle(Obstacle),
}

/// How the watch of a cluster stands, and what it costs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LiveStatus {
    /// How far it can be relied upon.
    pub standing: Standing,
    /// Pods that are known.
    pub pods: usize,
    /// Service accounts that are known.
    pub service_accounts: usize,
    /// What the API server was asked about single tokens.
    pub reviews: ReviewCounts,
    /// Calls to the API server since the start of the CA.
    pub calls: u64,
}

/// One cluster's API server, and what is known by it.
#[derive(Debug)]
pub(super) struct Live {
    cluster: String,
    settings: KubernetesSettings,
    clock: Arc<dyn Clock>,
    server: ArcSwapOption<Connected>,
    /// Held while connecting.
    connecting: Mutex<()>,
    reconnect: Notify,
    /// Woken whenever the watches tell of something.
    told: Arc<Notify>,
    pods: Arc<Informer<Pods>>,
    accounts: Arc<Informer<Accounts>>,
    reviews: Reviews,
    pub(super) operators: Verdicts,
    calls: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Connected {
    server: ApiServer,
    /// Of what the settings name, to see whether it has changed.
    fingerprint: Vec<u8>,
}

impl Live {
    pub(super) fn new(cluster: &str, settings: KubernetesSettings, clock: Arc<dyn Clock>) -> Arc<Self> {
        let told: Arc<Notify> = Arc::default();
        Arc::new(Self {
            cluster: cluster.to_owned(),
            settings,
            server: ArcSwapOption::empty(),
            connecting: Mutex::default(),
            reconnect: Notify::new(),
            pods: Informer::new(cluster, "pods", Arc::clone(&clock), Arc::clone(&told)),
            accounts: Informer::new(cluster, "service accounts", Arc::clone(&clock), Arc::clone(&told)),
            told,
            clock,
            reviews: Reviews::new(),
            operators: Verdicts::new(),
            calls: Arc::default(),
        })
    }

    pub(super) fn settings(&self) -> &KubernetesSettings {
        &self.settings
    }

    /// Watches pods and accounts, without end.
    pub(super) async fn run(self: Arc<Self>) {
        loop {
            let server = match self.server().await {
                Ok(server) => server,
                Err(error) => {
                    self.pods.failed(&error);
                    self.accounts.failed(&error);
                    tokio::time::sleep(RECONNECT).await;
                    continue;
                }
            };
            let (pods, accounts) = (Arc::clone(&self.pods), Arc::clone(&self.accounts));
            tokio::select! {
                () = self.reconnect.notified() => continue,
                () = self.pods.follow(server.watch_pods(move || pods.heard())) => {}
                () = self.accounts.follow(server.watch_service_accounts(move || accounts.heard())) => {}
            }
            // The credentials are read anew.
            self.server.store(None);
            tokio::time::sleep(RECONNECT).await;
        }
    }

    /// As if nobody answered.
    #[cfg(test)]
    pub(super) fn lose(&self) {
        let error = ApiError::Away("connection refused".into());
        self.pods.failed(&error);
        self.accounts.failed(&error);
    }

    /// As if a watch told this of the pods.
    #[cfg(test)]
    pub(super) async fn hear_pods(
        &self,
        events: impl futures_util::Stream<Item = Result<crate::kubernetes::Event<crate::kubernetes::WorkloadPod>, ApiError>>,
    ) {
        self.pods.follow(events).await;
    }

    /// Holds a workload's token against the cluster.
    pub(super) async fn confirm(&self, text: &str, token: &VerifiedToken, audiences: &[String]) -> Result<(), Doubt> {
        let mut unknowing = self.look(token).map_err(Doubt::Mismatch)?;
        if unknowing.contains(&Standing::Synced) {
            unknowing = self.look_for_a_while(token).await.map_err(Doubt::Mismatch)?;
        }
        if unknowing.is_empty() {
            return Ok(());
        }
        if let Some(obstacle) = self.obstacle(unknowing) {
            return Err(Doubt::Obstacle(obstacle));
        }
        let key = reviews::key(text, audiences);
        let asked_at = self.clock.now();
        if self.reviews.remembers(&key, asked_at) {
            return Ok(());
        }
        self.review(text, token, audiences).await?;
        self.reviews.remember(key, asked_at);
        Ok(())
    }

    /// Asks the API server about a token, whatever is known.
    pub(super) async fn review(&self, text: &str, token: &VerifiedToken, audiences: &[String]) -> Result<(), Doubt> {
        let away = |away| Doubt::Obstacle(Obstacle::Away { cluster: self.cluster.clone(), away });
        if let Some(failed) = self.reviews.obstacle() {
            return Err(away(failed));
        }
        let deadline = Instant::now() + REVIEW;
        let Some(_turn) = self.reviews.turn().await else {
            return Err(Doubt::Obstacle(Obstacle::Busy { cluster: self.cluster.clone() }));
        };
        let begun = Instant::now();
        let answer = tokio::time::timeout_at(deadline, self.ask(text, token, audiences)).await;
        let answer = answer.unwrap_or_else(|_| Err(ApiError::Away(format!("no answer within {:.1} s", begun.elapsed().as_secs_f64()))));
        match answer {
            Ok(verdict) => {
                self.reviews.answered(if verdict.is_ok() { Outcome::Accepted } else { Outcome::Refused });
                verdict.map_err(Doubt::Mismatch)
            }
            Err(error) => Err(away(self.reviews.failed(error.to_string(), self.clock.now()))),
        }
    }

    /// Its public keys.
    pub(super) async fn jwks(&self) -> Result<String, String> {
        let server = self.server().await.map_err(|error| error.to_string())?;
        server.jwks().await.map_err(|error| error.to_string())
    }

    /// Whether this pod, which existed at `seen`, is known to exist no more.
    pub(super) fn is_gone(&self, pod: Uuid, seen: OffsetDateTime) -> bool {
        let pods = self.pods.table();
        let is_listed = pods.get(pod).is_some();
        let was_seen_go = pods.is_gone(pod);
        drop(pods);
        was_seen_go || (!is_listed && seen + UNNOTICED < self.clock.now() && self.pods.is_complete())
    }

    /// Whether the pods are known as they are now, and so the API server can be asked, too.
    pub(super) fn is_heard(&self) -> bool {
        self.pods.standing() == Standing::Synced
    }

    pub(super) fn status(&self) -> LiveStatus {
        LiveStatus {
            standing: self.standing(),
            pods: records::Table::len(&*self.pods.table()),
            service_accounts: records::Table::len(&*self.accounts.table()),
            reviews: self.reviews.counts(),
            calls: self.calls.load(Ordering::Relaxed),
        }
    }

    /// Connects anew if the file that says how has changed.
    pub(super) fn reread(&self) {
        if self.server.load().as_ref().is_some_and(|connected| connected.fingerprint != fingerprint(&self.settings)) {
            tracing::info!(cluster = self.cluster, settings = %self.settings, "connecting anew, since this has changed");
            self.server.store(None);
            self.reconnect.notify_one();
        }
    }

    /// How those tables stand that cannot tell of the token's pod or its account; none if both bear it out.
    fn look(&self, token: &VerifiedToken) -> Result<Vec<Standing>, Mismatch> {
        let now = self.clock.now();
        let pod = self.pods.table().look(token, now);
        let account = self.accounts.table().look(token, now);
        let pods = || self.pods.standing();
        let accounts = || self.accounts.standing();
        match (pod, account) {
            (Known::Contradicts(mismatch), _) | (_, Known::Contradicts(mismatch)) => Err(mismatch),
            (Known::Fits, Known::Fits) => Ok(Vec::new()),
            (Known::Unknown, Known::Fits) => Ok(vec![pods()]),
            (Known::Fits, Known::Unknown) => Ok(vec![accounts()]),
            (Known::Unknown, Known::Unknown) => Ok(vec![pods(), accounts()]),
        }
    }

    /// The token of a new pod may be here a moment before the watch tells of the pod, which costs less than asking.
    async fn look_for_a_while(&self, token: &VerifiedToken) -> Result<Vec<Standing>, Mismatch> {
        let known = async {
            loop {
                let told = self.told.notified();
                let mut told = pin!(told);
                // From here on nothing is missed.
                told.as_mut().enable();
                let unknowing = self.look(token)?;
                if unknowing.is_empty() {
                    return Ok(unknowing);
                }
                told.await;
            }
        };
        tokio::time::timeout(LAG, known).await.unwrap_or_else(|_| self.look(token))
    }

    /// Why the API server is not asked although these tables cannot tell. A table that has been listed once has had its say: what it does not
    /// know is new, or gone.
    fn obstacle(&self, unknowing: Vec<Standing>) -> Option<Obstacle> {
        let cluster = self.cluster.clone();
        let are_unheard = unknowing.iter().all(|standing| matches!(standing, Standing::Unheard(_)));
        match unknowing.into_iter().reduce(Standing::or_worse)? {
            Standing::Syncing { problem } => Some(Obstacle::Syncing { cluster, problem }),
            Standing::Unheard(away) if are_unheard => Some(Obstacle::Unheard { cluster, away }),
            Standing::Unheard(_) | Standing::Stale(_) | Standing::Synced => None,
        }
    }

    fn standing(&self) -> Standing {
        self.pods.standing().or_worse(self.accounts.standing())
    }

    /// The review, and what explains it: the API server says that a token is not good, and not why.
    async fn ask(&self, text: &str, token: &VerifiedToken, audiences: &[String]) -> Result<Result<(), Mismatch>, ApiError> {
        let server = self.server().await?;
        let reviewed = judge_review(&server.review(text, audiences).await?, token, audiences);
        let now = self.clock.now();
        let known = self.pods.table().look(token, now);
        if known != Known::Fits {
            let pod = server.pod(&token.namespace, &token.pod.name).await?.filter(|pod| pod.uid() == Some(token.pod.uid));
            let verdict = pod.map_or(Err(Mismatch::PodGone), |pod| judge_pod(&Pod::of(&pod), token, now));
            if verdict.is_err() {
                return Ok(verdict);
            }
        }
        if reviewed.is_err() || self.accounts.table().look(token, now) != Known::Fits {
            let account = server.service_account(&token.namespace, &token.service_account.name).await?;
            let verdict = judge_account(account.as_ref().and_then(Account::of).as_ref(), token, now);
            if verdict.is_err() {
                return Ok(verdict);
            }
        }
        Ok(reviewed.map_err(Mismatch::NotAccepted))
    }

    pub(super) async fn server(&self) -> Result<ApiServer, ApiError> {
        if let Some(connected) = self.server.load_full() {
            return Ok(connected.server.clone());
        }
        let _one_at_a_time = self.connecting.lock().await;
        if let Some(connected) = self.server.load_full() {
            return Ok(connected.server.clone());
        }
        let fingerprint = fingerprint(&self.settings);
        let server = ApiServer::connect(&self.settings, Arc::clone(&self.calls)).await?;
        self.server.store(Some(Arc::new(Connected { server: server.clone(), fingerprint })));
        Ok(server)
    }
}

impl Obstacle {
    /// A stable word for metrics and refusals.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Syncing { .. } => "cluster_syncing",
            Self::Unheard { .. } | Self::Away { .. } => "api_server_away",
            Self::Busy { .. } => "api_server_busy",
        }
    }
}

/// Of the kubeconfig; what a pod finds in its cluster is read anew by itself.
fn fingerprint(settings: &KubernetesSettings) -> Vec<u8> {
    match settings {
        KubernetesSettings::InCluster => Vec::new(),
        KubernetesSettings::Kubeconfig { path, .. } => {
            std::fs::read(path).map(|text| digest(&SHA256, &text).as_ref().to_vec()).unwrap_or_default()
        }
    }
}
