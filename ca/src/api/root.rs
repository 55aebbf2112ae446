//! The trust roots' lives: for admins who walk them through it, and auditors who read where they are.

use std::sync::Arc;
use std::time::Duration;

use chancery_proto::chancery::v1 as wire;
use chancery_proto::chancery::v1::root_service_server::RootService;
use chancery_proto::chancery::v1::{
    AnswerRootRequest, CheckGateRequest, CheckGateResponse, DistrustRootRequest, ListRootsRequest, ListRootsResponse, MissingRecord,
    MoveRootRequest, MoveRootResponse, PrepareRootRequest, RequestRootRequest, RequestRootResponse, RootRecord,
};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use tonic::{Request, Response, Status};

use crate::api::People;
use crate::api::error::ApiError;
use crate::authority::{Authority, RENEWAL, RootStatus, is_renewal_due};
use crate::fleet::{MissingKind, MissingOne};
use crate::ledger::acts::{Overrides, RootState};
use crate::rotation::{Done, Gate, Order, Rotation, RotationError};

/// How many may be taken out of the count by name: an entry must hold them.
const MAX_EXCEPTIONS: usize = 100;
/// The longest of these names, in bytes.
const MAX_NAME_BYTES: usize = 256;
/// What a corporate CA hands back: its answer, and the chain above it.
const MAX_CERTIFICATES: usize = 16;
/// So large that its entry, and every bundle with it, stays small.
const MAX_CERTIFICATE_BYTES: usize = 8192;
/// About a root whose distrust began by a clock that was ahead.
const CLOCK_SET_BACK: &str = "its distrust began at a later time than it is now: the CA's clock was set back, and it leaves when as much time has passed as was ordered";

/// Answers about trust roots.
#[derive(Clone)]
pub struct RootApi {
    /// Walks them.
    pub rotation: Arc<Rotation>,
    /// Knows their certificates.
    pub authority: Arc<Authority>,
    /// Decides who may ask and act.
    pub people: Arc<People>,
}

#[tonic::async_trait]
impl RootService for RootApi {
    async fn list_roots(&self, request: Request<ListRootsRequest>) -> Result<Response<ListRootsResponse>, Status> {
        self.people.answer("ListRoots", request, async |_, _| Ok(self.listed())).await
    }

    async fn check_gate(&self, request: Request<CheckGateRequest>) -> Result<Response<CheckGateResponse>, Status> {
        self.people
            .answer("CheckGate", request, async |_, request| {
                let to = transition(request.to)?;
                let overrides = overrides(request.overrides)?;
                Ok(gate(self.rotation.gate(named(&request.root), to, &overrides).await?))
            })
            .await
    }

    async fn prepare_root(&self, request: Request<PrepareRootRequest>) -> Result<Response<MoveRootResponse>, Status> {
        self.people
            .answer("PrepareRoot", request, async |who, request| {
                let work = async |actor: &str, why: &str| {
                    let (rotation, actor, why) = (Arc::clone(&self.rotation), actor.to_owned(), why.to_owned());
                    to_its_end(async move {
                        if request.self_signed { rotation.prepare_own(&actor, &why).await } else { rotation.prepare(&actor, &why).await }
                    })
                    .await
                };
                let done = self.people.act_by(who, "root.prepare", String::new(), &request.reason, work).await?;
                Ok(self.moved(done))
            })
            .await
    }

    async fn request_root(&self, request: Request<RequestRootRequest>) -> Result<Response<RequestRootResponse>, Status> {
        self.people
            .answer("RequestRoot", request, async |who, request| {
                let work = async |actor: &str, why: &str| {
                    let (rotation, actor, why) = (Arc::clone(&self.rotation), actor.to_owned(), why.to_owned());
                    to_its_end(async move { rotation.request(&actor, &why).await }).await
                };
                let (csr, changed) = self.people.act_by(who, "root.request", String::new(), &request.reason, work).await?;
                Ok(RequestRootResponse { csr, changed })
            })
            .await
    }

    async fn answer_root(&self, request: Request<AnswerRootRequest>) -> Result<Response<MoveRootResponse>, Status> {
        self.people
            .answer("AnswerRoot", request, async |who, AnswerRootRequest { reason, certificates }| {
                let work = async |actor: &str, why: &str| {
                    if certificates.len() > MAX_CERTIFICATES || certificates.iter().any(|one| one.len() > MAX_CERTIFICATE_BYTES) {
                        let most = format!("at most {MAX_CERTIFICATES} certificates of up to {MAX_CERTIFICATE_BYTES} bytes can be brought");
                        return Err(ApiError::Invalid(most));
                    }
                    let certificates: Vec<_> = certificates.into_iter().map(CertificateDer::from).collect();
                    let (rotation, actor, why) = (Arc::clone(&self.rotation), actor.to_owned(), why.to_owned());
                    to_its_end(async move { rotation.answer(certificates, &actor, &why).await }).await
                };
                let done = self.people.act_by(who, "root.prepare", String::new(), &reason, work).await?;
                Ok(self.moved(done))
            })
            .await
    }

    async fn move_root(&self, request: Request<MoveRootRequest>) -> Result<Response<MoveRootResponse>, Status> {
        self.people
            .answer("MoveRoot", request, async |who, request| {
                let to = transition(request.to);
                let action = match to {
                    Ok(RootState::Published) => "root.publish",
                    Ok(RootState::Active) => "root.activate",
                    Ok(_) => "root.retire",
                    Err(_) => "root.move",
                };
                let work = async |actor: &str, why: &str| {
                    let (to, overrides) = (to?, overrides(request.overrides)?);
                    let (rotation, actor, why) = (Arc::clone(&self.rotation), actor.to_owned(), why.to_owned());
                    let root = request.root.clone();
                    to_its_end(async move {
                        let order = Order { actor: &actor, why: &why, overrides: &overrides };
                        match to {
                            RootState::Published => rotation.publish(named(&root), order).await,
                            RootState::Active => rotation.activate(named(&root), order).await,
                            _ => rotation.retire(named(&root), order).await,
                        }
                    })
                    .await
                };
                let done = self.people.act_by(who, action, request.root.clone(), &request.reason, work).await?;
                Ok(self.moved(done))
            })
            .await
    }

    async fn distrust_root(&self, request: Request<DistrustRootRequest>) -> Result<Response<MoveRootResponse>, Status> {
        self.people
            .answer("DistrustRoot", request, async |who, request| {
                let configured = self.rotation.settings().distrust_deadline;
                let deadline = request.deadline_ms.map_or(configured, |millis| Duration::from_millis(millis.into()));
                let work = async |actor: &str, why: &str| {
                    let (rotation, actor, why) = (Arc::clone(&self.rotation), actor.to_owned(), why.to_owned());
                    let root = request.root.clone();
                    to_its_end(async move {
                        let order = Order { actor: &actor, why: &why, overrides: &Overrides::default() };
                        rotation.distrust(&root, deadline, order).await
                    })
                    .await
                };
                let done = self.people.act_by(who, "root.distrust", request.root.clone(), &request.reason, work).await?;
                Ok(self.moved(done))
            })
            .await
    }
}

impl RootApi {
    fn listed(&self) -> ListRootsResponse {
        let (roots, now) = (self.authority.roots(), self.authority.now());
        let listed = roots.iter().map(|root| {
            let advice = match root.leave_by {
                Some(deadline) if deadline.since > now => CLOCK_SET_BACK,
                _ if is_renewal_due(root, &roots, now) => RENEWAL,
                _ => "",
            };
            RootRecord { advice: advice.to_owned(), ..self.record(root) }
        });
        // Read after the roots: it is theirs, or newer.
        let roots = listed.collect();
        ListRootsResponse { roots, trust_sequence: self.authority.trust().borrow().sequence }
    }

    fn moved(&self, done: Done) -> MoveRootResponse {
        let roots = self.authority.roots();
        let root = roots.iter().find(|root| root.fingerprint == done.root).map(|root| {
            // Where the transition brought it, whatever came after.
            let Done { now, .. } = done;
            self.record(&RootStatus { state: now.state, since: now.since, entry: now.entry, leave_by: now.leave_by, ..root.clone() })
        });
        MoveRootResponse { root, changed: done.changed }
    }

    fn record(&self, root: &RootStatus) -> RootRecord {
        let stays = root.leave_by.map(|deadline| self.rotation.stays(root.fingerprint, deadline)).unwrap_or_default();
        RootRecord {
            fingerprint: root.fingerprint.to_string(),
            subject: root.subject.clone(),
            not_before_ms: millis(root.not_before),
            not_after_ms: millis(root.not_after),
            state: wire::RootState::from(root.state).into(),
            since_ms: millis(root.since),
            entry: root.entry,
            leave_by_ms: root.leave_by.map_or(0, |deadline| millis(deadline.at)),
            has_key: root.has_key,
            issuing_until_ms: root.issuing_until.map_or(0, millis),
            certificate: root.certificate.to_vec(),
            signed_by: root.signed_by.clone().unwrap_or_default(),
            advice: String::new(),
            stays_ms: u64::try_from(stays.as_millis()).unwrap_or(u64::MAX),
        }
    }
}

/// A person who goes away halfway must not leave a root halfway.
async fn to_its_end<T: Send + 'static>(work: impl Future<Output = Result<T, RotationError>> + Send + 'static) -> Result<T, ApiError> {
    let done = tokio::spawn(work).await;
    Ok(done.unwrap_or(Err(RotationError::Ledger(crate::ledger::LedgerError::Closed)))?)
}

fn named(root: &str) -> Option<&str> {
    Some(root).filter(|root| !root.is_empty())
}

fn transition(to: i32) -> Result<RootState, ApiError> {
    let to = wire::RootState::try_from(to).ok().and_then(|to| RootState::try_from(to).ok());
    to.filter(|to| matches!(to, RootState::Published | RootState::Active | RootState::Retired))
        .ok_or_else(|| ApiError::Invalid("a root can be published, activated or retired".into()))
}

fn overrides(sent: Option<wire::Overrides>) -> Result<Overrides, ApiError> {
    let wire::Overrides { except, force, accept_unproven, confirm_clock } = sent.unwrap_or_default();
    if except.len() > MAX_EXCEPTIONS || except.iter().any(|name| name.len() > MAX_NAME_BYTES) {
        let most = format!("at most {MAX_EXCEPTIONS} can be taken out of the count, with names of up to {MAX_NAME_BYTES} bytes");
        return Err(ApiError::Invalid(most));
    }
    Ok(Overrides { except, force, accept_unproven, confirm_clock })
}

fn gate(gate: Gate) -> CheckGateResponse {
    CheckGateResponse {
        fingerprint: gate.root.to_string(),
        obstacles: gate.obstacles.iter().map(ToString::to_string).collect(),
        missing_total: gate.missing.total(),
        counted: gate.missing.counted,
        unproven_total: gate.missing.unproven_total(),
        unproven: gate.missing.unproven.into_iter().map(|one| format!("{} {}", one.name, one.proxy)).collect(),
        missing: gate.missing.who.into_iter().map(missing_record).collect(),
    }
}

pub(super) fn missing_record(one: MissingOne) -> MissingRecord {
    let MissingOne { name, kind, cluster, node, agent, reason, nack } = one;
    let kind = match kind {
        MissingKind::Ca => "ca",
        MissingKind::Agent => "agent",
        MissingKind::Proxy => "proxy",
        MissingKind::Pod => "pod",
    };
    MissingRecord { name, kind: kind.to_owned(), node, agent, reason, nack, cluster }
}

fn millis(time: OffsetDateTime) -> i64 {
    i64::try_from(time.unix_timestamp_nanos() / 1_000_000).unwrap_or(i64::MAX)
}
