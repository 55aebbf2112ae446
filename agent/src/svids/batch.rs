//! One call to the CA for many workloads: fresh keys, requests, answers checked before anybody serves them.

use std::sync::Arc;

use chancery_identity::csr::{self, KeyType};
use chancery_identity::{Clock, PrivateKey, TrustState};
use chancery_proto::chancery::v1 as wire;
use chancery_proto::chancery::v1::workload_result::Outcome;
use uuid::Uuid;

use super::WorkloadKey;
use super::workload::TokenForRequest;
use crate::ca_client::{CaClient, CaError, Held};

/// Why a workload got no certificate.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// The CA's word on this request.
    #[error("the CA refused: {message} ({reason})")]
    Refused { reason: String, message: String, retryable: bool },
    /// The call as a whole, or the token file, or the key.
    #[error("{0}")]
    Call(Arc<CaError>),
    /// A certificate that may not be served.
    #[error("a certificate from the CA was not accepted: {0}")]
    Rejected(CaError),
    /// The call ended without an answer.
    #[error("the call ended without an answer: {0}")]
    Lost(String),
}

/// One workload's part of a call.
#[derive(Debug)]
pub(super) struct Ask {
    pub(super) key: WorkloadKey,
    pub(super) token: TokenForRequest,
    pub(super) reason: wire::IssueReason,
}

/// What came of it.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) key: WorkloadKey,
    pub(super) request_id: String,
    pub(super) outcome: Result<Held, Failure>,
}

/// A request under way, with the key that its answer must fit.
struct Pending {
    key: WorkloadKey,
    request_id: String,
    private: PrivateKey,
}

/// Makes the call.
pub(super) async fn run(ca: CaClient, clock: Arc<dyn Clock>, key_type: KeyType, asks: Vec<Ask>) -> Vec<Answer> {
    let mut answers = Vec::with_capacity(asks.len());
    let (pending, requests) = prepare(&ca, key_type, asks, &mut answers).await;
    if pending.is_empty() {
        return answers;
    }
    match ca.issue(requests).await {
        Ok(results) => {
            let trust = ca.trust().borrow().clone();
            for (pending, result) in pending.into_iter().zip(results) {
                let outcome = check(pending.private, result, trust.as_deref(), clock.as_ref());
                answers.push(Answer { key: pending.key, request_id: pending.request_id, outcome });
            }
        }
        Err(error) => {
            let error = Arc::new(error);
            answers.extend(pending.into_iter().map(|pending| Answer {
                key: pending.key,
                request_id: pending.request_id,
                outcome: Err(Failure::Call(error.clone())),
            }));
        }
    }
    answers
}

/// Keys and requests; what cannot even be asked for is answered right away.
async fn prepare(
    ca: &CaClient,
    key_type: KeyType,
    asks: Vec<Ask>,
    answers: &mut Vec<Answer>,
) -> (Vec<Pending>, Vec<wire::WorkloadRequest>) {
    let mut pending = Vec::with_capacity(asks.len());
    let mut requests = Vec::with_capacity(asks.len());
    for Ask { key, token, reason } in asks {
        let request_id = Uuid::new_v4().to_string();
        let token = match token {
            TokenForRequest::Text(token) => Ok(token),
            TokenForRequest::File => ca.read_token(),
        };
        let made = match token {
            Ok(token) => generate(key_type).await.map(|(csr, private)| (token, csr, private)),
            Err(error) => Err(error),
        };
        match made {
            Ok((token, csr, private)) => {
                tracing::debug!(%request_id, workload = %key, reason = reason.as_str_name(), "asking for a certificate");
                let token = token.secret().to_owned();
                requests.push(wire::WorkloadRequest { request_id: request_id.clone(), csr, token, reason: reason.into() });
                pending.push(Pending { key, request_id, private });
            }
            Err(error) => answers.push(Answer { key, request_id, outcome: Err(Failure::Call(Arc::new(error))) }),
        }
    }
    (pending, requests)
}

async fn generate(key_type: KeyType) -> Result<(Vec<u8>, PrivateKey), CaError> {
    let made = match key_type {
        // Microseconds: cheaper than handing it to another thread.
        KeyType::EcdsaP256 | KeyType::EcdsaP384 | KeyType::Ed25519 => csr::generate(key_type, None),
        _ => {
            tokio::task::spawn_blocking(move || csr::generate(key_type, None)).await.map_err(|e| CaError::Local(format!("no key: {e}")))?
        }
    };
    made.map_err(|e| CaError::Local(format!("no key: {e}")))
}

fn check(private: PrivateKey, result: wire::WorkloadResult, trust: Option<&TrustState>, clock: &dyn Clock) -> Result<Held, Failure> {
    let answer = |problem: &str| Failure::Rejected(CaError::Answer(problem.to_owned()));
    match result.outcome.ok_or_else(|| answer("it holds neither a certificate nor a refusal"))? {
        Outcome::Refusal(refusal) => {
            Err(Failure::Refused { reason: refusal.reason, message: refusal.message, retryable: refusal.retryable })
        }
        Outcome::Svid(issued) => {
            let trust = trust.ok_or_else(|| answer("there is no trust state yet to verify it with"))?;
            let held = Held::accept(&issued, private, trust, clock.now()).map_err(Failure::Rejected)?;
            if held.svid.id().trust_domain() != &trust.trust_domain || held.svid.id().segments().next() == Some("chancery") {
                return Err(answer(&format!("{} is no identity of a workload", held.svid.id())));
            }
            Ok(held)
        }
    }
}
