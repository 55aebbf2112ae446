//! The issuance cycle: an attested identity and a key from a CSR become a recorded certificate.
//!
//! For each request, in this order; the first step that fails refuses it:
//!
//! 1. **Attest.** The token is verified with the keys of the caller's cluster, and its pod must be on the caller's node (or be the
//!    sidecar's own). This comes first: about a request whose token is not good, nothing else is told. Where a cluster's API server has to be
//!    asked, it is asked about all tokens of a call at once.
//! 2. **Read the CSR.** Well-formed, signed by its own key, of a known type, asking for nothing but names.
//! 3. **Decide.** The policy derives the SPIFFE ID from the token, and holds what the CSR asks for against what it grants. Nobody whom an
//!    operator banned or revoked gets any.
//! 4. **Sign** a certificate made of the decision and the CSR's public key; nothing else of the CSR is in it.
//! 5. **Check** the finished certificate against the profile and the decision.
//!
//! and for all requests of a call together:
//!
//! 6. **Record** them in the ledger, in one durable write, at the epoch of the state that was read before step 1. If an act was recorded meanwhile, what
//!    was decided may rest on what it changed: nothing was recorded, and the cycle begins again.
//! 7. **Answer.** A certificate that was not recorded never leaves this module: [`Issued`] is made from the ledger's index alone.
//!
//! A refusal is no entry in the ledger; it goes to the bounded list of refusals and to the observer.

pub mod policy;
mod recover;
mod refusal;
mod renewal;
#[cfg(test)]
mod tests;

use std::fmt;
use std::future::{poll_fn, ready};
use std::sync::Arc;
use std::task::Poll;

use arc_swap::ArcSwap;
use bytes::Bytes;
use chancery_identity::csr::VerifiedCsr;
use chancery_identity::profile::LeafFacts;
use chancery_identity::token::VerifiedToken;
use chancery_identity::{Clock, SpiffeId};
use chancery_proto::chancery::v1::IssueReason;
use futures_util::future::{Either, join_all};
use rustls_pki_types::CertificateDer;
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::attestation::{AttestedAgent, AttestedWorkload, Caller, Clusters, Holder};
use crate::authority::{Authority, Issuer, LeafRequest, UnrecordedLeaf};
use crate::ledger::acts::{Applicant, State};
use crate::ledger::{Body, Identity, IdentityFilter, Issuance as Entry, Ledger, LedgerError, Provenance, Refusals};

use policy::{Asked, Decision, Workload};
pub use policy::{Policy, PolicySettings};
use recover::Recovering;
pub use recover::{HeldCertificate, MAX_RECOVERED};
pub use refusal::Refusal;

/// The most requests in one call.
pub const MAX_REQUESTS: usize = 512;
/// How many requests are worked on before other tasks get their turn: about a millisecond.
const CHUNK: usize = 10;
/// How often a batch is checked and signed again because an act came between, before it is refused.
const MAX_ATTEMPTS: usize = 3;

/// A request for a workload's certificate.
pub struct Request {
    /// Found again in the logs of agent and CA, and in the ledger.
    pub request_id: Uuid,
    /// PKCS#10, DER.
    pub csr: Bytes,
    /// The workload's service-account token.
    pub token: Zeroizing<String>,
    /// Why it is asked for.
    pub reason: IssueReason,
}

/// A certificate that the ledger holds durably, and so may leave the CA.
#[derive(Clone, Debug)]
pub struct Issued {
    /// Whose.
    pub spiffe_id: SpiffeId,
    /// Leaf first, without the root.
    pub chain: Vec<CertificateDer<'static>>,
    /// What the leaf says.
    pub facts: LeafFacts,
    /// Its entry in the ledger.
    pub entry: u64,
}

/// Hears of every outcome, for metrics. Called on the path of an issuance: counts, and nothing slow.
pub trait IssuanceObserver: fmt::Debug + Send + Sync {
    /// A certificate was issued and recorded.
    fn issued(&self, reason: IssueReason);
    /// A request was refused; `reason` is a stable word.
    fn refused(&self, reason: &'static str);
}

/// Issues certificates.
#[derive(Debug)]
pub struct Issuance {
    authority: Arc<Authority>,
    clusters: Arc<Clusters>,
    policy: ArcSwap<Policy>,
    ledger: Ledger,
    refusals: Arc<Refusals>,
    observer: Arc<dyn IssuanceObserver>,
    clock: Arc<dyn Clock>,
    recovering: Recovering,
}

/// On whose behalf a leaf is issued, and what of it the ledger holds.
struct Subject<'a> {
    caller: &'a Caller,
    /// None for one that renews on the strength of its SVID.
    token: Option<&'a VerifiedToken>,
    /// The name of the holder's node, where no token tells it.
    known_node: String,
    request_id: Uuid,
    reason: IssueReason,
    trust_sequence: u64,
}

/// A leaf with its ledger entry, on its way to the ledger.
struct Signed {
    leaf: UnrecordedLeaf,
    issuer: Arc<Issuer>,
    entry: Body,
}

impl Issuance {
    /// Puts the parts together. `policy` was checked against the clusters.
    pub fn new(
        authority: Arc<Authority>,
        clusters: Arc<Clusters>,
        policy: Policy,
        ledger: Ledger,
        refusals: Arc<Refusals>,
        observer: Arc<dyn IssuanceObserver>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let (policy, recovering) = (ArcSwap::from_pointee(policy), Recovering::default());
        Self { authority, clusters, policy, ledger, refusals, observer, clock, recovering }
    }

    /// The policy in force.
    pub fn policy(&self) -> Arc<Policy> {
        self.policy.load_full()
    }

    /// Puts another policy into force, for calls from now on.
    pub fn set_policy(&self, policy: Policy) {
        self.policy.store(Arc::new(policy));
    }

    /// Refuses a call with more than [`MAX_REQUESTS`], once for all of them.
    ///
    /// # Errors
    /// If there are more.
    pub fn check_count(&self, caller: &Caller, requests: usize) -> Result<(), Refusal> {
        if requests <= MAX_REQUESTS {
            return Ok(());
        }
        let refusal = Refusal::too_many(requests);
        self.note(caller.id().as_str(), "", &refusal);
        Err(refusal)
    }

    /// Notes that the transport refused a call of `asker` (empty if it has no certificate) before it was read.
    pub fn refused_unread(&self, asker: &str, problem: &str) {
        self.note(asker, "", &Refusal::unread(problem));
    }

    /// Goes through the cycle with each request: an answer for each, in their order. `trust_sequence` is the trust state that the caller was
    /// given last.
    ///
    /// More than [`MAX_REQUESTS`] are refused whole, unread.
    pub async fn issue_batch(&self, caller: &Caller, trust_sequence: u64, requests: Vec<Request>) -> Vec<Result<Issued, Refusal>> {
        if let Err(refusal) = self.check_count(caller, requests.len()) {
            return requests.iter().map(|_| Err(refusal.clone())).collect();
        }
        let mut attempt = 1;
        loop {
            let state = self.ledger.current_state();
            let mut outcomes = Vec::with_capacity(requests.len());
            for (number, request) in requests.iter().enumerate() {
                if number % CHUNK == CHUNK - 1 {
                    tokio::task::yield_now().await;
                }
                let mut signing = Box::pin(self.sign_workload(&state, caller, trust_sequence, request));
                // Most need nobody's answer, and are done at once.
                let polled = poll_fn(|context| Poll::Ready(signing.as_mut().poll(context))).await;
                outcomes.push(match polled {
                    Poll::Ready(outcome) => Either::Left(ready(outcome)),
                    Poll::Pending => Either::Right(signing),
                });
            }
            match self.record(state.epoch, join_all(outcomes).await).await {
                Recorded::EpochMoved if attempt < MAX_ATTEMPTS => attempt += 1,
                Recorded::EpochMoved => {
                    let refusal = Refusal::from(LedgerError::EpochMoved { current: self.ledger.epoch() });
                    return self.noted(caller, &requests, requests.iter().map(|_| Err(refusal.clone())).collect());
                }
                Recorded::Outcomes(outcomes) => return self.noted(caller, &requests, outcomes),
            }
        }
    }

    /// The first SVID of an agent or sidecar that proved itself by its token.
    pub async fn issue_agent(&self, attested: &AttestedAgent, csr: &[u8], request_id: Uuid) -> Result<Issued, Refusal> {
        self.issue_own(attested.caller(), Some(attested.token()), String::new(), csr, request_id).await
    }

    /// A new SVID for an agent or sidecar, on the strength of the one it has.
    pub async fn renew_agent(&self, caller: &Caller, csr: &[u8], request_id: Uuid) -> Result<Issued, Refusal> {
        let before = self.issued_before(caller).await;
        let obstacle = match (caller.holder(), &before) {
            _ if !self.clusters.contains(caller.cluster()) => Some(Refusal::unknown_cluster(caller.cluster())),
            (Holder::Sidecar { pod }, Some(before)) if self.clusters.is_gone(caller.cluster(), pod, before.time) => {
                Some(Refusal::gone(pod))
            }
            (Holder::Agent { .. }, _) => self.pod_left(caller).await.map(Refusal::agents_pod_gone),
            _ => None,
        };
        if let Some(refusal) = obstacle {
            self.note(caller.id().as_str(), &request_id.to_string(), &refusal);
            return Err(refusal);
        }
        // The SVID names the node by UID alone, which an auditor would have to look up.
        let known_node = before.map(|before| before.issuance.node).unwrap_or_default();
        self.issue_own(caller, None, known_node, csr, request_id).await
    }

    /// Remembers a refusal that came before the cycle: a joining caller whose token was not believed.
    pub fn refused_to_join(&self, error: crate::attestation::AttestationError, request_id: &str) -> Refusal {
        let refusal = Refusal::from(error);
        self.note("", request_id, &refusal);
        refusal
    }

    async fn issue_own(
        &self,
        caller: &Caller,
        token: Option<&VerifiedToken>,
        known_node: String,
        csr: &[u8],
        request_id: Uuid,
    ) -> Result<Issued, Refusal> {
        let reason = if token.is_some() { IssueReason::Join } else { IssueReason::AgentRenewal };
        let trust_sequence = self.authority.trust().borrow().sequence;
        let subject = Subject { caller, token, known_node, request_id, reason, trust_sequence };
        let mut attempt = 1;
        let outcome = loop {
            let state = self.ledger.current_state();
            let signed = self.sign_own(&state, &subject, csr).await;
            match self.record(state.epoch, vec![signed]).await {
                Recorded::EpochMoved if attempt < MAX_ATTEMPTS => attempt += 1,
                Recorded::EpochMoved => break Err(LedgerError::EpochMoved { current: self.ledger.epoch() }.into()),
                Recorded::Outcomes(mut outcomes) => break outcomes.pop().unwrap_or_else(|| Err(LedgerError::Closed.into())),
            }
        };
        match &outcome {
            Ok(_) => self.observer.issued(reason),
            Err(refusal) => self.note(caller.id().as_str(), &request_id.to_string(), refusal),
        }
        outcome
    }

    /// The newest SVID of an agent or sidecar, as far as the ledger can be asked: that it cannot is no reason to refuse.
    async fn issued_before(&self, caller: &Caller) -> Option<Identity> {
        let filter = IdentityFilter { spiffe_id: Some(caller.id().clone()), ..IdentityFilter::default() };
        self.ledger.list(&filter, 1, None).await.ok()?.identities.pop()
    }

    /// Steps 1 to 5 for a workload.
    async fn sign_workload(&self, state: &State, caller: &Caller, trust_sequence: u64, request: &Request) -> Result<Signed, Refusal> {
        let has_certificate = async |token: &VerifiedToken| self.has_certificate(token).await;
        let workload = self.clusters.attest_workload(caller, &request.token, has_certificate).await?;
        let refused = |refusal: Refusal| refusal.about(workload.token());
        let csr = VerifiedCsr::from_der(&request.csr).map_err(|error| refused(error.into()))?;
        let decision = self.decide(&workload, &csr).map_err(|error| refused(error.into()))?;
        let subject = Subject {
            caller,
            token: Some(workload.token()),
            known_node: String::new(),
            request_id: request.request_id,
            reason: workload_reason(request.reason),
            trust_sequence,
        };
        self.sign(state, &subject, &csr, &decision).await.map_err(refused)
    }

    /// Steps 2 to 5 for an agent's or a sidecar's own SVID.
    async fn sign_own(&self, state: &State, subject: &Subject<'_>, csr: &[u8]) -> Result<Signed, Refusal> {
        let refused = |refusal: Refusal| match subject.token {
            Some(token) => refusal.about(token),
            None => refusal,
        };
        let csr = VerifiedCsr::from_der(csr).map_err(|error| refused(error.into()))?;
        let asked = Asked { key_type: csr.key_type, spiffe_id: csr.spiffe_id.as_ref(), dns_names: &csr.dns_names, lifetime: None };
        let decision = self.policy.load().evaluate_agent(subject.caller.id(), &asked).map_err(|error| refused(error.into()))?;
        self.sign(state, subject, &csr, &decision).await.map_err(refused)
    }

    fn decide(&self, workload: &AttestedWorkload, csr: &VerifiedCsr) -> Result<Decision, policy::PolicyRefusal> {
        let token = workload.token();
        let facts = Workload { cluster: &token.cluster, namespace: &token.namespace, service_account: &token.service_account.name };
        let asked = Asked { key_type: csr.key_type, spiffe_id: csr.spiffe_id.as_ref(), dns_names: &csr.dns_names, lifetime: None };
        self.policy.load().evaluate(facts, &asked)
    }

    /// Steps 4 and 5.
    async fn sign(&self, state: &State, subject: &Subject<'_>, csr: &VerifiedCsr, decision: &Decision) -> Result<Signed, Refusal> {
        if let Some(obstacle) = state.obstacle(&subject.applicant(&decision.spiffe_id)) {
            return Err(Refusal::forbidden(obstacle));
        }
        let issuer = self.authority.issuer_in(state).await?;
        let leaf = LeafRequest {
            id: &decision.spiffe_id,
            dns_names: &decision.dns_names,
            public_key: &csr.public_key,
            key_type: csr.key_type,
            lifetime: decision.lifetime,
        };
        let leaf = issuer.issue(&leaf, self.clock.now()).await?;
        let entry = Body::from(subject.entry(&issuer, &leaf));
        Ok(Signed { leaf, issuer, entry })
    }

    /// Steps 6 and 7: what was signed becomes [`Issued`] by being recorded, all of it in one durable write.
    async fn record(&self, epoch: u64, outcomes: Vec<Result<Signed, Refusal>>) -> Recorded {
        let mut entries = Vec::with_capacity(outcomes.len());
        let mut waiting = Vec::with_capacity(outcomes.len());
        for outcome in outcomes {
            waiting.push(outcome.map(|Signed { leaf, issuer, entry }| {
                entries.push(entry);
                (leaf, issuer)
            }));
        }
        let mut indexes = match self.ledger.append_all_at(epoch, entries).await {
            Ok(indexes) => indexes.into_iter(),
            Err(LedgerError::EpochMoved { .. }) => return Recorded::EpochMoved,
            Err(error) => {
                let refusal = Refusal::from(error);
                return Recorded::Outcomes(waiting.into_iter().map(|outcome| outcome.and(Err(refusal.clone()))).collect());
            }
        };
        let issued = waiting.into_iter().map(|outcome| {
            let (leaf, issuer) = outcome?;
            // The ledger gives one index per entry; without one, nothing is released.
            let entry = indexes.next().ok_or_else(|| Refusal::from(LedgerError::Closed))?;
            let UnrecordedLeaf { certificate, facts } = leaf;
            Ok(Issued { spiffe_id: facts.id.clone(), chain: vec![certificate, issuer.certificate().clone()], facts, entry })
        });
        Recorded::Outcomes(issued.collect())
    }

    fn noted(&self, caller: &Caller, requests: &[Request], outcomes: Vec<Result<Issued, Refusal>>) -> Vec<Result<Issued, Refusal>> {
        for (request, outcome) in requests.iter().zip(&outcomes) {
            match outcome {
                Ok(_) => self.observer.issued(workload_reason(request.reason)),
                Err(refusal) => self.note(caller.id().as_str(), &request.request_id.to_string(), refusal),
            }
        }
        outcomes
    }

    fn note(&self, agent: &str, request_id: &str, refusal: &Refusal) {
        tracing::info!(agent, request_id, reason = refusal.reason, message = refusal.message, "a certificate was refused");
        self.observer.refused(refusal.reason);
        self.refusals.add(refusal.record(self.clock.now(), agent, request_id));
    }
}

/// What became of a batch at the ledger.
enum Recorded {
    Outcomes(Vec<Result<Issued, Refusal>>),
    EpochMoved,
}

/// A caller cannot have a workload's certificate recorded as its own.
fn workload_reason(reason: IssueReason) -> IssueReason {
    match reason {
        IssueReason::Join | IssueReason::AgentRenewal => IssueReason::Unspecified,
        reason => reason,
    }
}

impl Subject<'_> {
    /// As operators' bans and revocations tell it apart, with the ID that it would get.
    fn applicant<'a>(&'a self, spiffe_id: &'a SpiffeId) -> Applicant<'a> {
        Applicant {
            spiffe_id,
            pod_uid: self.token.map(|token| token.pod.uid),
            cluster: self.caller.cluster(),
            node: self.token.map_or(&self.known_node, |token| &token.node.name),
            agent: self.caller.id(),
        }
    }

    fn entry(&self, issuer: &Issuer, leaf: &UnrecordedLeaf) -> Entry {
        let Self { caller, token, ref known_node, request_id, reason, trust_sequence } = *self;
        let (node_of_agent, pod_of_sidecar) = match caller.holder() {
            Holder::Agent { node } => (Some(node), None),
            Holder::Sidecar { pod } => (None, Some(pod)),
        };
        let text = |of: fn(&VerifiedToken) -> &str| token.map(of).unwrap_or_default().to_owned();
        Entry {
            certificate: Bytes::copy_from_slice(&leaf.certificate),
            issuing_certificate: issuer.certificate_id(),
            root: issuer.root_id(),
            role: caller.role(),
            reason,
            cluster: caller.cluster().to_owned(),
            node: token.map_or_else(|| known_node.clone(), |token| token.node.name.clone()),
            node_uid: token.map(|token| token.node.uid).or(node_of_agent),
            namespace: text(|token| &token.namespace),
            service_account: text(|token| &token.service_account.name),
            service_account_uid: token.map(|token| token.service_account.uid),
            pod: text(|token| &token.pod.name),
            pod_uid: token.map(|token| token.pod.uid),
            token_id: text(|token| &token.token_id),
            request_id,
            trust_sequence,
            sidecar_pod_uid: pod_of_sidecar,
            provenance: Provenance::Issued,
        }
    }
}

impl IssuanceObserver for () {
    fn issued(&self, _: IssueReason) {}
    fn refused(&self, _: &'static str) {}
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request").field("request_id", &self.request_id).field("reason", &self.reason).finish_non_exhaustive()
    }
}
