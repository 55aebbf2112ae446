//! Who may ask, and who may act: people are told by the local socket that they came through, by the SPIFFE ID that TLS verified, or by a
//! bearer token of a service account, of a cluster whose RBAC then says what they may do ([`crate::attestation::Clusters::operator`]).
//!
//! An `auditor` reads everything and changes nothing, an `admin` acts as well. Whoever can open the local admin socket (mode 0600) is an
//! admin, recorded with the uid. Both lists come from the configuration and count from the next call on; whoever follows a stream is
//! looked at again and again. A refused act of somebody who may read is an entry in the ledger ([`RefusedActs`]); strangers are logged
//! alone, since they must not fill it.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use chancery_identity::{Clock, SpiffeId, TrustDomain};
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use futures_util::{FutureExt, StreamExt};
use serde::Deserialize;
use tokio::sync::OwnedSemaphorePermit;
use tonic::metadata::MetadataMap;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Response, Status};
use tracing::warn;

use crate::api::error::ApiError;
use crate::api::rights::right_for;
use crate::api::{CallMetrics, Peer};
use crate::attestation::{Clusters, OPERATORS_CLUSTER_KEY, Operator, RESERVED_SEGMENT, Right, Verb};
use crate::ledger::Ledger;
use crate::ledger::acts::{RefusedAct, RefusedActs};

/// How often it is looked whether somebody may still follow a stream …
const LOOK_AGAIN: Duration = Duration::from_secs(20);
/// … and for how long that need not be known.
const UNKNOWN_FOR: Duration = Duration::from_secs(60);
/// The longest reason, in bytes. It is a sentence, and an entry must hold it.
const MAX_REASON_BYTES: usize = 1024;

/// The `[roles]` of the configuration: SPIFFE IDs of people.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RoleSettings {
    /// May act, and read.
    pub admin: Vec<SpiffeId>,
    /// May read.
    pub auditor: Vec<SpiffeId>,
}

impl RoleSettings {
    /// The key that has a wrong value, and why.
    pub(crate) fn problem(&self, trust_domain: &TrustDomain) -> Option<(&'static str, String)> {
        let roles = [("admin", &self.admin), ("auditor", &self.auditor)];
        roles.into_iter().flat_map(|(key, ids)| ids.iter().map(move |id| (key, id))).find_map(|(key, id)| {
            let problem = if id.trust_domain() != trust_domain {
                format!("{id} is of another trust domain than this CA's, {trust_domain}; nobody from there operates it")
            } else if id.segments().next() == Some(RESERVED_SEGMENT) {
                format!("{id} is an agent's, a sidecar's or the CA's own; give people IDs outside of /{RESERVED_SEGMENT}")
            } else if key == "auditor" && self.admin.contains(id) {
                format!("{id} is an admin already, who may read as well; name it once")
            } else {
                return None;
            };
            Some((key, problem))
        })
    }
}

/// Somebody who asks, as the ledger names them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Person {
    /// On this machine, through the admin socket.
    Local {
        /// The system's number of the user.
        uid: u32,
    },
    /// Through the TLS port.
    Svid(SpiffeId),
    /// Likewise, as a service account.
    Kubernetes {
        /// Of this cluster.
        cluster: String,
        /// As its API server names it: `system:serviceaccount:<namespace>:<name>`.
        username: String,
    },
}

/// A person who is let in, until it is dropped.
#[derive(Debug)]
pub(super) struct Admitted {
    pub(super) person: Person,
    may_act: bool,
    _permit: Option<OwnedSemaphorePermit>,
}

/// Decides who may ask and act.
#[derive(Debug)]
pub struct People {
    settings: ArcSwap<RoleSettings>,
    clusters: Arc<Clusters>,
    refused: Arc<RefusedActs>,
    calls: Arc<CallMetrics>,
    clock: Arc<dyn Clock>,
}

impl People {
    /// With these roles, and those that `clusters` give; refused acts go to `ledger`, and `calls` counts what is asked.
    pub fn new(settings: RoleSettings, clusters: Arc<Clusters>, ledger: Ledger, calls: Arc<CallMetrics>, clock: Arc<dyn Clock>) -> Self {
        let refused = Arc::new(RefusedActs::new(ledger, Arc::clone(&clock)));
        Self { settings: ArcSwap::from_pointee(settings), clusters, refused, calls, clock }
    }

    /// These count from the next call on.
    pub fn replace(&self, settings: RoleSettings) {
        self.settings.store(Arc::new(settings));
    }

    /// Where refused acts are counted.
    pub fn refused_acts(&self) -> &Arc<RefusedActs> {
        &self.refused
    }

    /// Lets in somebody who may call `method`, or who may only read what it acts on.
    ///
    /// # Errors
    /// If nobody, or somebody without a role, is at the other end; or if there are too many calls of that peer.
    pub(super) async fn admit<Q>(&self, method: &'static str, request: &Request<Q>) -> Result<Admitted, ApiError> {
        if let Some(local) = request.extensions().get::<UdsConnectInfo>() {
            let uid = local.peer_cred.map(|peer| peer.uid()).ok_or(ApiError::NobodyKnown)?;
            return Ok(Admitted { person: Person::Local { uid }, may_act: true, _permit: None });
        }
        let peer = request.extensions().get::<Peer>().ok_or(ApiError::NobodyKnown)?;
        match bearer_token(request.metadata()) {
            Some(token) => self.admit_by_token(method, token, request.metadata(), peer).await,
            None => self.admit_by_svid(peer),
        }
    }

    fn admit_by_svid(&self, peer: &Peer) -> Result<Admitted, ApiError> {
        let svid = peer.svid.as_ref().ok_or(ApiError::NobodyKnown)?;
        if self.clock.now() >= svid.not_after {
            return Err(ApiError::SvidExpired { id: svid.id.clone(), at: svid.not_after });
        }
        let settings = self.settings.load();
        let may_act = settings.admin.contains(&svid.id);
        if !may_act && !settings.auditor.contains(&svid.id) {
            warn!(peer = %svid.id, address = %peer.address, "a stranger asked as an operator, and was refused");
            return Err(ApiError::Stranger(svid.id.clone()));
        }
        Ok(Admitted { person: Person::Svid(svid.id.clone()), may_act, _permit: Some(peer.admit(0)?) })
    }

    async fn admit_by_token(&self, method: &'static str, token: &str, metadata: &MetadataMap, peer: &Peer) -> Result<Admitted, ApiError> {
        let permit = peer.admit(0)?;
        let right = right_for(method)?;
        let cluster = metadata.get(OPERATORS_CLUSTER_KEY).and_then(|name| name.to_str().ok());
        // Anybody can send a token, and each that is not known yet is a question to the API server.
        let may_ask = || peer.admit(1).is_ok();
        let operator = self.clusters.operator(cluster, token, right, may_ask).await?;
        let (may_act, may_read) = match right.verb {
            Verb::Get => (false, operator.allowed),
            Verb::Update if operator.allowed => (true, true),
            Verb::Update => {
                let reading = Right { verb: Verb::Get, ..right };
                (false, self.clusters.operator(cluster, token, reading, may_ask).await?.allowed)
            }
        };
        let Operator { cluster, username, uid, .. } = operator;
        let person = Person::Kubernetes { cluster, username };
        if !may_read {
            warn!(%person, uid, address = %peer.address, "a stranger asked as an operator, and was refused");
            return Err(ApiError::NotBound { person, right });
        }
        Ok(Admitted { person, may_act, _permit: Some(permit) })
    }

    /// Answers a call of somebody who may read with what `work` makes of it; the call is counted.
    pub(super) async fn answer<Q, A>(
        &self,
        method: &'static str,
        request: Request<Q>,
        work: impl AsyncFnOnce(&Admitted, Q) -> Result<A, ApiError>,
    ) -> Result<Response<A>, Status> {
        let started = Instant::now();
        let answer = async {
            let admitted = self.admit(method, &request).await?;
            tracing::debug!(method, person = %admitted.person, "somebody asks");
            work(&admitted, request.into_inner()).await
        };
        let answer = answer.await;
        self.calls.answered(method, answer.is_ok(), started.elapsed());
        Ok(Response::new(answer?))
    }

    /// Likewise, where the answer is a stream: it ends when whoever asked may ask no longer.
    pub(super) async fn answer_for_long<Q, A: Send + 'static>(
        self: &Arc<Self>,
        method: &'static str,
        request: Request<Q>,
        work: impl AsyncFnOnce(Q) -> Result<BoxStream<'static, Result<A, Status>>, ApiError>,
    ) -> Result<Response<BoxStream<'static, Result<A, Status>>>, Status> {
        let asker = Request::from_parts(request.metadata().clone(), request.extensions().clone(), ());
        let people = Arc::clone(self);
        let dismissed = async move { people.dismissed(method, &asker).await.into() }.boxed();
        self.answer(method, request, async |_, request| Ok(until(dismissed, work(request).await?))).await
    }

    /// Waits until somebody who was let in may call `method` no longer, and tells why.
    async fn dismissed(&self, method: &'static str, request: &Request<()>) -> ApiError {
        let mut known = tokio::time::Instant::now();
        loop {
            tokio::time::sleep(LOOK_AGAIN).await;
            match self.admit(method, request).await {
                Ok(_) => known = tokio::time::Instant::now(),
                Err(error) if error.is_passing() && known.elapsed() < UNKNOWN_FOR => {}
                Err(error) => return error,
            }
        }
    }

    /// Has `work` record an act, given who acts and why. `target` is what was asked for: whether there is such a thing is for `work` to find
    /// out, so that nobody who may not act is told, and their act is refused like any other.
    ///
    /// # Errors
    /// If the person may not act, gives no reason, or the state does not allow the act: then that is recorded. Or what else `work` says.
    pub(super) async fn act_by<T>(
        &self,
        who: &Admitted,
        action: &str,
        target: String,
        reason: &str,
        work: impl AsyncFnOnce(&str, &str) -> Result<T, ApiError>,
    ) -> Result<T, ApiError> {
        let actor = who.person.to_string();
        let done = match who.reason_to_act(reason) {
            Ok(why) => work(&actor, why).await,
            Err(error) => Err(error),
        };
        if let Err(error) = &done
            && let Some(word) = error.refused_act()
        {
            let message = error.to_string();
            warn!(person = %who.person, action, target, reason = word, "an act was refused");
            let refused = RefusedAct { action: action.to_owned(), target, reason: word.to_owned(), message, count: 1 };
            self.refused.note(&actor, refused, reason).await;
        }
        done
    }
}

impl Admitted {
    /// The reason, if the person may act for it.
    fn reason_to_act<'a>(&self, reason: &'a str) -> Result<&'a str, ApiError> {
        if !self.may_act {
            return Err(ApiError::MayNotAct(self.person.clone()));
        }
        match reason.trim() {
            "" => Err(ApiError::ReasonMissing),
            reason if reason.len() > MAX_REASON_BYTES => {
                Err(ApiError::Invalid(format!("the reason is longer than {MAX_REASON_BYTES} bytes")))
            }
            reason => Ok(reason),
        }
    }
}

/// What comes until `end` does, and then that.
fn until<A: Send + 'static>(
    end: BoxFuture<'static, Status>,
    answers: BoxStream<'static, Result<A, Status>>,
) -> BoxStream<'static, Result<A, Status>> {
    let running = Some((answers, end));
    let following = stream::unfold(running, async |running| {
        let (mut answers, mut end) = running?;
        tokio::select! {
            answer = answers.next() => Some((answer?, Some((answers, end)))),
            status = &mut end => Some((Err(status), None)),
        }
    });
    following.boxed()
}

/// Of the header `authorization` (RFC 6750, section 2.1).
fn bearer_token(metadata: &MetadataMap) -> Option<&str> {
    let (scheme, token) = metadata.get("authorization")?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

impl fmt::Display for Person {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local { uid } => write!(f, "local:uid={uid}"),
            Self::Svid(id) => write!(f, "{id}"),
            Self::Kubernetes { cluster, username } => write!(f, "kubernetes:{cluster}/{username}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_stream_ends_with_its_answers_or_with_what_ends_it() {
        let never = std::future::pending().boxed();
        let short: Vec<_> = until(never, stream::iter([Ok(1), Ok(2)]).boxed()).collect().await;
        assert!(matches!(short[..], [Ok(1), Ok(2)]));

        let later = tokio::time::sleep(LOOK_AGAIN).map(|()| Status::permission_denied("no longer"));
        let endless = stream::iter([Ok(1)]).chain(stream::pending());
        let told: Vec<_> = until(later.boxed(), endless.boxed()).collect().await;
        let [Ok(1), Err(status)] = &told[..] else { panic!("{told:?}") };
        assert_eq!(status.message(), "no longer");
    }
}
