//! Revoking what was issued, and letting issuance go on: for admins. How far it has come: for auditors as well.

use std::collections::BTreeSet;
use std::sync::Arc;

use chancery_identity::SpiffeId;
use chancery_proto::chancery::v1::revocation_service_server::RevocationService;
use chancery_proto::chancery::v1::revocation_subject::Of;
use chancery_proto::chancery::v1::{
    AllowRequest, AllowResponse, CheckReachRequest, CheckReachResponse, IdentityFilter as WireFilter, RevocationSubject, RevokeRequest,
    RevokeResponse,
};
use tonic::{Request, Response, Status};
use uuid::Uuid;

use crate::api::People;
use crate::api::error::ApiError;
use crate::api::root::missing_record;
use crate::attestation::{Caller, Clusters};
use crate::authority::{Authority, AuthorityError, Revoked};
use crate::fleet::{Fleet, Goal, missing};
use crate::ledger::acts::{Change, Subject};
use crate::ledger::{IdentityFilter, Ledger, LedgerError, MAX_PAGE_SIZE, PodFilter};

/// How many may be left out of a question by name.
const MAX_EXCEPTIONS: usize = 1000;

/// Revokes, and tells how far it has come.
#[derive(Clone)]
pub struct RevocationApi {
    /// Records acts, and knows what was issued.
    pub ledger: Ledger,
    /// Signs the CRLs.
    pub authority: Arc<Authority>,
    /// Knows who has them.
    pub fleet: Arc<Fleet>,
    /// Whose nodes may be named.
    pub clusters: Arc<Clusters>,
    /// Decides who may ask and act.
    pub people: Arc<People>,
}

#[tonic::async_trait]
impl RevocationService for RevocationApi {
    async fn revoke(&self, request: Request<RevokeRequest>) -> Result<Response<RevokeResponse>, Status> {
        self.people
            .answer("Revoke", request, async |who, request| {
                let asked = asked(request.subject.as_ref());
                let work = async |actor: &str, why: &str| {
                    let subject = self.subject(request.subject, For::Revocation).await?;
                    let (authority, actor, why, revoked) = (Arc::clone(&self.authority), actor.to_owned(), why.to_owned(), subject.clone());
                    Ok((subject, to_its_end(async move { authority.revoke(&actor, revoked, &why).await }).await?))
                };
                let (subject, done) = self.people.act_by(who, "identity.revoke", asked, &request.reason, work).await?;
                let (Revoked { entry, certificates, ids, sequence, problem }, trust_domain) = (done, self.authority.trust_domain());
                Ok(RevokeResponse {
                    entry,
                    subject: subject.to_string(),
                    certificates: certificates as u64,
                    trust_sequence: sequence,
                    issuance_refused: !matches!(subject, Subject::Serial(_)),
                    agents: ids.iter().filter(|id| Caller::from_peer(id, trust_domain).is_ok()).map(ToString::to_string).collect(),
                    problem: problem.unwrap_or_default(),
                })
            })
            .await
    }

    async fn allow(&self, request: Request<AllowRequest>) -> Result<Response<AllowResponse>, Status> {
        self.people
            .answer("Allow", request, async |who, request| {
                let asked = asked(request.subject.as_ref());
                let work = async |actor: &str, why: &str| {
                    let subject = self.subject(request.subject, For::Allowance).await?;
                    let entry = self.ledger.act(actor, Change::Allow(subject.clone()), why).await?;
                    Ok(AllowResponse { entry, subject: subject.to_string() })
                };
                self.people.act_by(who, "identity.allow", asked, &request.reason, work).await
            })
            .await
    }

    async fn check_reach(&self, request: Request<CheckReachRequest>) -> Result<Response<CheckReachResponse>, Status> {
        self.people
            .answer("CheckReach", request, async |_, CheckReachRequest { trust_sequence, except, certificate_entry }| {
                if except.len() > MAX_EXCEPTIONS {
                    return Err(ApiError::Invalid(format!("at most {MAX_EXCEPTIONS} can be left out")));
                }
                let goal = match certificate_entry {
                    Some(after_entry) => Goal::Certificates { after_entry },
                    None => Goal::Trust(trust_sequence),
                };
                let missing = missing(&self.ledger, &self.fleet, goal).await?.without(&except);
                let missing = missing.map_err(|error| ApiError::Invalid(error.to_string()))?;
                Ok(CheckReachResponse {
                    counted: missing.counted,
                    missing_total: missing.total(),
                    unproven_total: missing.unproven_total(),
                    missing: missing.who.into_iter().map(missing_record).collect(),
                    unproven: missing.unproven.into_iter().map(|one| format!("{} {}", one.name, one.proxy)).collect(),
                })
            })
            .await
    }
}

/// What a subject is read for.
#[derive(Clone, Copy)]
enum For {
    Revocation,
    Allowance,
}

impl RevocationApi {
    async fn subject(&self, subject: Option<RevocationSubject>, purpose: For) -> Result<Subject, ApiError> {
        let named = subject.and_then(|subject| subject.of).ok_or_else(|| ApiError::Invalid("name whose certificates".into()))?;
        Ok(match named {
            Of::Serial(serial) => {
                let filter = IdentityFilter::try_from(&WireFilter { serial, ..WireFilter::default() })?;
                Subject::Serial(filter.serial.ok_or_else(|| ApiError::Invalid("the serial number is empty".into()))?)
            }
            Of::SpiffeId(id) => Subject::SpiffeId(spiffe_id(&id)?),
            Of::Agent(id) => {
                let id = spiffe_id(&id)?;
                Caller::from_peer(&id, self.authority.trust_domain())?;
                Subject::Agent(id)
            }
            Of::Node(node) => self.node(&node)?,
            Of::Pod(pod) => match Uuid::parse_str(&pod) {
                Ok(uid) => Subject::Pod(uid),
                Err(_) => Subject::Pod(self.pod(&pod, purpose).await?),
            },
        })
    }

    /// Node names are unique in their cluster alone.
    fn node(&self, text: &str) -> Result<Subject, ApiError> {
        let known: Vec<String> = self.clusters.status().into_iter().map(|cluster| cluster.name).collect();
        let (cluster, node) = match (text.split_once('/'), &known[..]) {
            (Some((cluster, node)), _) => (cluster.to_owned(), node),
            (None, [only]) => (only.clone(), text),
            (None, _) => {
                return Err(ApiError::Invalid(format!("say which cluster's node: `CLUSTER/{text}`, of {}", known.join(", "))));
            }
        };
        if !known.contains(&cluster) || node.is_empty() || node.contains('/') {
            return Err(ApiError::Invalid(format!("{text:?} is no node of {}: give `CLUSTER/NODE`", known.join(", "))));
        }
        Ok(Subject::Node { cluster, node: node.to_owned() })
    }

    /// The UID of a pod by its name, if that says which one.
    async fn pod(&self, text: &str, purpose: For) -> Result<Uuid, ApiError> {
        let (namespace, name) =
            text.split_once('/').ok_or_else(|| ApiError::Invalid(format!("{text:?} is neither a UID nor `NAMESPACE/POD`")))?;
        let pod = PodFilter::Name { namespace: Some(namespace.to_owned()), name: name.to_owned() };
        let unexpired = matches!(purpose, For::Revocation);
        let filter = IdentityFilter { pod: Some(pod), unexpired, ..IdentityFilter::default() };
        let (mut uids, mut token) = (BTreeSet::new(), None);
        loop {
            let page = self.ledger.list(&filter, MAX_PAGE_SIZE, token.as_deref()).await?;
            uids.extend(page.identities.into_iter().filter_map(|identity| identity.issuance.pod_uid));
            token = page.next;
            if token.is_none() {
                break;
            }
        }
        if let For::Allowance = purpose {
            let state = self.ledger.current_state();
            uids.retain(|uid| state.revocations.get(&Subject::Pod(*uid)).is_some_and(|revocation| revocation.allowed.is_none()));
        }
        match (uids.pop_first(), uids.len(), purpose) {
            (Some(uid), 0, _) => Ok(uid),
            (Some(first), _, _) => {
                let all: Vec<_> = std::iter::once(first).chain(uids).map(|uid| uid.to_string()).collect();
                Err(ApiError::Invalid(format!(
                    "{text} is the name of several pods, one after the other: give a UID, of {}",
                    all.join(", ")
                )))
            }
            (None, _, For::Revocation) => Err(ApiError::NotFound(format!("no pod {text} has a certificate that has not expired"))),
            (None, _, For::Allowance) => Err(ApiError::NotFound(format!("no pod {text} is kept from certificates"))),
        }
    }
}

/// A person who goes away halfway must not leave a revocation without its CRLs.
pub(super) async fn to_its_end(work: impl Future<Output = Result<Revoked, AuthorityError>> + Send + 'static) -> Result<Revoked, ApiError> {
    let done = tokio::spawn(work).await;
    Ok(done.unwrap_or(Err(AuthorityError::Ledger(LedgerError::Closed)))?)
}

/// What somebody named, in the words of [`Subject`].
fn asked(subject: Option<&RevocationSubject>) -> String {
    match subject.and_then(|subject| subject.of.as_ref()) {
        Some(Of::Serial(serial)) => format!("serial {serial}"),
        Some(Of::SpiffeId(id)) => id.clone(),
        Some(Of::Pod(pod)) => format!("pod {pod}"),
        Some(Of::Node(node)) => format!("node {node}"),
        Some(Of::Agent(id)) => format!("agent {id}"),
        None => String::new(),
    }
}

fn spiffe_id(text: &str) -> Result<SpiffeId, ApiError> {
    text.parse().map_err(|error| ApiError::Invalid(format!("{text:?} is no SPIFFE ID: {error}")))
}
