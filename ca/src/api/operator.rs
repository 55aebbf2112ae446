//! For operators and auditors: on the local admin socket, and on the TLS port for those whom the configuration names ([`People`]).

use std::sync::Arc;

use chancery_identity::SpiffeId;
use chancery_proto::chancery::v1::operator_service_server::OperatorService;
use chancery_proto::chancery::v1::{
    ActResponse, BanRequest, DiagnoseRequest, DiagnoseResponse, ExplainRequest, ExplainResponse, Finding, IdentityFilter as WireFilter,
    ListAgentsRequest, ListAgentsResponse, ListIdentitiesRequest, ListIdentitiesResponse, ListRefusalsRequest, ListRefusalsResponse,
    ShowIdentityRequest, ShowIdentityResponse, StatusRequest, StatusResponse, TestPolicyRequest, TestPolicyResponse, UnbanRequest,
    WatchIdentitiesRequest, show_identity_request::By,
};
use tonic::{Request, Response, Status};

use crate::api::certificate_text::certificate_text;
use crate::api::error::ApiError;
use crate::api::people::People;
use crate::api::revocation::to_its_end;
use crate::api::test_policy;
use crate::api::watch::{Watched, Watches};
use crate::attestation::{Caller, Clusters};
use crate::authority::{Authority, Revoked};
use crate::fleet::{Explanation, Fleet};
use crate::issuance::Issuance;
use crate::ledger::acts::Change;
use crate::ledger::{Identity, IdentityFilter, Ledger, MAX_PAGE_SIZE, RefusalFilter, Refusals};

const DEFAULT_PAGE: usize = 100;

/// How the whole CA stands; put together where all its parts are known.
pub type Standing = Arc<dyn Fn() -> StatusResponse + Send + Sync>;
/// What somebody should look at; likewise.
pub type Diagnosis = Arc<dyn Fn() -> Vec<Finding> + Send + Sync>;

/// Answers operators.
#[derive(Clone)]
pub struct OperatorApi {
    /// What was issued.
    pub ledger: Ledger,
    /// What was refused.
    pub refusals: Arc<Refusals>,
    /// Who is connected.
    pub fleet: Arc<Fleet>,
    /// Whose tokens count.
    pub clusters: Arc<Clusters>,
    /// The policy in force.
    pub issuance: Arc<Issuance>,
    /// How the whole stands.
    pub standing: Standing,
    /// What is wrong.
    pub diagnosis: Diagnosis,
    /// Who follows what is issued.
    pub watches: Watches,
    /// Bans.
    pub authority: Arc<Authority>,
    /// Who may ask, and who may act.
    pub people: Arc<People>,
}

#[tonic::async_trait]
impl OperatorService for OperatorApi {
    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        self.people.answer("Status", request, async |_, _| Ok((self.standing)())).await
    }

    async fn diagnose(&self, request: Request<DiagnoseRequest>) -> Result<Response<DiagnoseResponse>, Status> {
        self.people.answer("Diagnose", request, async |_, _| Ok(DiagnoseResponse { findings: (self.diagnosis)() })).await
    }

    async fn list_identities(&self, request: Request<ListIdentitiesRequest>) -> Result<Response<ListIdentitiesResponse>, Status> {
        self.people
            .answer("ListIdentities", request, async |_, request| {
                let filter = IdentityFilter::try_from(&request.filter.unwrap_or_default())?;
                let size = page_size(request.page_size)?;
                let token = (!request.page_token.is_empty()).then_some(request.page_token.as_str());
                let page = self.ledger.list(&filter, size, token).await?;
                let identities = page.identities.into_iter().map(Into::into).collect();
                Ok(ListIdentitiesResponse { identities, next_page_token: page.next.unwrap_or_default() })
            })
            .await
    }

    type WatchIdentitiesStream = Watched;

    async fn watch_identities(&self, request: Request<WatchIdentitiesRequest>) -> Result<Response<Watched>, Status> {
        let begin = async |request| self.watches.begin(&self.ledger, request).await;
        self.people.answer_for_long("WatchIdentities", request, begin).await
    }

    async fn show_identity(&self, request: Request<ShowIdentityRequest>) -> Result<Response<ShowIdentityResponse>, Status> {
        self.people
            .answer("ShowIdentity", request, async |_, request| {
                let identity = self.find(request.by).await?;
                let text = certificate_text(&identity.issuance.certificate)?;
                let standing = self.ledger.standing(&identity).await?;
                Ok(ShowIdentityResponse { identity: Some(identity.into()), text, standing: Some(standing.into()) })
            })
            .await
    }

    async fn list_refusals(&self, request: Request<ListRefusalsRequest>) -> Result<Response<ListRefusalsResponse>, Status> {
        self.people
            .answer("ListRefusals", request, async |_, request| {
                let limit = page_size(request.limit)?;
                let given = |text: String| (!text.is_empty()).then_some(text);
                let pod = IdentityFilter::try_from(&WireFilter { pod: request.pod, ..WireFilter::default() })?.pod;
                let filter = RefusalFilter { agent: given(request.agent), reason: given(request.reason), pod };
                let refusals = self.refusals.list_newest(&filter, limit).into_iter().map(Into::into).collect();
                Ok(ListRefusalsResponse { refusals })
            })
            .await
    }

    async fn list_agents(&self, request: Request<ListAgentsRequest>) -> Result<Response<ListAgentsResponse>, Status> {
        self.people
            .answer("ListAgents", request, async |_, request| {
                let sequence = self.authority.trust().borrow().sequence;
                Ok(ListAgentsResponse { agents: self.fleet.list(&self.ledger, sequence, &request.agent).await? })
            })
            .await
    }

    async fn explain(&self, request: Request<ExplainRequest>) -> Result<Response<ExplainResponse>, Status> {
        self.people
            .answer("Explain", request, async |_, request| {
                let explanation = self.fleet.explain(&self.ledger, &self.refusals, &request.namespace, &request.pod).await?;
                Ok(explanation.into())
            })
            .await
    }

    async fn test_policy(&self, request: Request<TestPolicyRequest>) -> Result<Response<TestPolicyResponse>, Status> {
        self.people
            .answer("TestPolicy", request, async |_, request| test_policy(&self.issuance.policy(), &self.clusters.settings(), &request))
            .await
    }

    async fn ban(&self, request: Request<BanRequest>) -> Result<Response<ActResponse>, Status> {
        self.people
            .answer("Ban", request, async |who, BanRequest { agent, reason }| {
                let work = async |actor: &str, why: &str| {
                    let (authority, actor, why) = (Arc::clone(&self.authority), actor.to_owned(), why.to_owned());
                    let agent = self.agent(&agent)?;
                    to_its_end(async move { authority.ban(&actor, agent, &why).await }).await
                };
                let done = self.people.act_by(who, "agent.ban", agent.clone(), &reason, work).await?;
                let Revoked { entry, certificates, sequence, problem, .. } = done;
                Ok(ActResponse { entry, certificates: certificates as u64, trust_sequence: sequence, problem: problem.unwrap_or_default() })
            })
            .await
    }

    async fn unban(&self, request: Request<UnbanRequest>) -> Result<Response<ActResponse>, Status> {
        self.people
            .answer("Unban", request, async |who, UnbanRequest { agent, reason }| {
                let work = async |actor: &str, why: &str| Ok(self.ledger.act(actor, Change::Unban(self.agent(&agent)?), why).await?);
                let entry = self.people.act_by(who, "agent.unban", agent.clone(), &reason, work).await?;
                Ok(ActResponse { entry, ..ActResponse::default() })
            })
            .await
    }
}

impl OperatorApi {
    /// The ID of an agent or sidecar, whether or not it was ever seen: one may be banned before it comes.
    fn agent(&self, text: &str) -> Result<SpiffeId, ApiError> {
        let id: SpiffeId = text.parse().map_err(|error| ApiError::Invalid(format!("{text:?} is no SPIFFE ID: {error}")))?;
        Caller::from_peer(&id, self.authority.trust_domain())?;
        Ok(id)
    }

    async fn find(&self, by: Option<By>) -> Result<Identity, ApiError> {
        match by {
            Some(By::Entry(index)) => {
                let found = self.ledger.show_entry(index).await?;
                found.ok_or_else(|| ApiError::NotFound(format!("entry {index} does not exist, or is no issued identity")))
            }
            Some(By::Serial(serial)) => {
                let filter = IdentityFilter::try_from(&WireFilter { serial: serial.clone(), ..WireFilter::default() })?;
                let wanted = filter.serial.ok_or_else(|| ApiError::Invalid("the serial number is empty".into()))?;
                let found = self.ledger.show(wanted).await?;
                found.ok_or_else(|| ApiError::NotFound(format!("no certificate with the serial number {serial} was issued")))
            }
            None => Err(ApiError::Invalid("name a serial number or an entry".into())),
        }
    }
}

/// 0 stands for the default.
pub(super) fn page_size(asked: u32) -> Result<usize, ApiError> {
    match usize::try_from(asked) {
        Ok(0) => Ok(DEFAULT_PAGE),
        Ok(size) if size <= MAX_PAGE_SIZE => Ok(size),
        _ => Err(ApiError::Invalid(format!("a page has at most {MAX_PAGE_SIZE} lines, not {asked}"))),
    }
}

impl From<Explanation> for ExplainResponse {
    fn from(explanation: Explanation) -> Self {
        let finding = |(level, text): (crate::fleet::Level, String)| Finding { level: level.to_string(), text, next_step: String::new() };
        Self {
            verdict: explanation.verdict,
            next_step: explanation.next_step,
            findings: explanation.findings.into_iter().map(finding).collect(),
            latest: explanation.latest.map(Into::into),
            refusals: explanation.refusals.into_iter().map(Into::into).collect(),
        }
    }
}
