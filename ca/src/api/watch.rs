//! Hands on what a watch of the ledger finds, at its reader's pace.
//!
//! Few answers wait for a reader. One that takes none of them for [`PATIENCE`] is told where to go on, and ended: whoever looks at a
//! terminal that has been standing still should know. Watches are counted, and end with the CA.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use chancery_proto::chancery::v1::{WatchIdentitiesRequest, WatchIdentitiesResponse};
use futures_util::{Stream, StreamExt, stream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::api::error::ApiError;
use crate::ledger::{Identity, IdentityFilter, Ledger, LedgerError, Watch};

/// Watches at once.
const MAX_WATCHES: usize = 64;
/// Answers that wait for a reader.
const QUEUE: usize = 2;
/// How long a reader may take none.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a watch answers.
pub(super) type Watched = Pin<Box<dyn Stream<Item = Result<WatchIdentitiesResponse, Status>> + Send>>;

/// The watches under way.
#[derive(Clone, Debug)]
pub struct Watches {
    room: Arc<Semaphore>,
    shutdown: CancellationToken,
}

impl Watches {
    /// None yet; all of them end when `shutdown` is cancelled.
    pub fn new(shutdown: CancellationToken) -> Self {
        Self { room: Arc::new(Semaphore::new(MAX_WATCHES)), shutdown }
    }

    /// Begins a watch.
    pub(super) async fn begin(&self, ledger: &Ledger, request: WatchIdentitiesRequest) -> Result<Watched, ApiError> {
        let room = Arc::clone(&self.room).try_acquire_owned().map_err(|_| ApiError::TooManyWatches(MAX_WATCHES))?;
        let filter = IdentityFilter::try_from(&request.filter.unwrap_or_default())?;
        if filter.until.is_some() {
            return Err(ApiError::Invalid("a watch goes on until it is ended: leave `until` out, or list instead".into()));
        }
        if filter.revoked {
            return Err(ApiError::Invalid("what is revoked was issued before: leave `revoked` out, or list instead".into()));
        }
        let watch = ledger.watch(filter, request.from_entry).await?;
        Ok(answers(watch, room, self.shutdown.clone()))
    }
}

/// What `watch` finds, and last why it ended.
fn answers(watch: Watch, room: OwnedSemaphorePermit, shutdown: CancellationToken) -> Watched {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let (ended, end) = oneshot::channel();
    tokio::spawn(async move {
        if let Err(error) = hand_on(watch, sender, &shutdown).await {
            // Nobody is left to be told if the reader has gone.
            let _gone = ended.send(error);
        }
        drop(room);
    });
    let last = stream::once(end).filter_map(async |end| Some(Err(end.ok()?.into())));
    Box::pin(ReceiverStream::new(receiver).map(Ok).chain(last))
}

/// Until the reader has gone.
async fn hand_on(mut watch: Watch, reader: mpsc::Sender<WatchIdentitiesResponse>, shutdown: &CancellationToken) -> Result<(), ApiError> {
    let mut found = Vec::new();
    let mut next = watch.next_entry();
    loop {
        let answer = answer(found, watch.next_entry());
        let sent = tokio::select! {
            sent = timeout(PATIENCE, reader.send(answer)) => sent,
            () = shutdown.cancelled() => return Err(ApiError::Ending { next }),
        };
        match sent {
            Ok(Ok(())) => next = watch.next_entry(),
            Ok(Err(_)) => return Ok(()),
            Err(_) => return Err(ApiError::SlowReader { waited: PATIENCE, next }),
        }
        found = tokio::select! {
            found = watch.next() => match found {
                Err(LedgerError::Closed) => return Err(ApiError::Ending { next }),
                found => found?,
            },
            () = reader.closed() => return Ok(()),
            () = shutdown.cancelled() => return Err(ApiError::Ending { next }),
        };
    }
}

fn answer(found: Vec<Identity>, next_entry: u64) -> WatchIdentitiesResponse {
    WatchIdentitiesResponse { identities: found.into_iter().map(Into::into).collect(), next_entry }
}

#[cfg(test)]
mod tests {
    use chancery_identity::csr::{self, KeyType};
    use chancery_proto::chancery::v1::{self as wire, IssueReason, Role};
    use tonic::Code;
    use uuid::Uuid;

    use super::*;
    use crate::authority::LeafRequest;
    use crate::authority::testing::{Run, TestCa};
    use crate::ledger::{Body, Issuance, Provenance};

    /// A watch tells at most this many at once.
    const BLOCK: usize = 1000;

    /// A CA whose ledger ends with `count` issuances.
    async fn recorded(ca: &TestCa, count: usize) -> Run {
        let run = ca.start().await;
        let (id, (csr, _)) = ("spiffe://example.org/ns/shop/sa/cart".parse().unwrap(), csr::generate(KeyType::EcdsaP256, None).unwrap());
        let public_key = csr::VerifiedCsr::from_der(&csr).unwrap().public_key;
        let lifetime = Duration::from_secs(3600);
        let leaf = LeafRequest { id: &id, dns_names: &[], public_key: &public_key, key_type: KeyType::EcdsaP256, lifetime };
        let issuer = run.authority.issuer();
        let leaf = issuer.issue(&leaf, chancery_identity::Clock::now(&*ca.clock)).await.unwrap();
        let entry = Issuance {
            certificate: leaf.certificate.to_vec().into(),
            issuing_certificate: issuer.certificate_id(),
            root: issuer.root_id(),
            role: Role::Agent,
            reason: IssueReason::First,
            cluster: "east".into(),
            node: "node-a".into(),
            node_uid: None,
            namespace: "shop".into(),
            service_account: "cart".into(),
            service_account_uid: None,
            pod: "cart-0".into(),
            pod_uid: None,
            token_id: String::new(),
            request_id: Uuid::new_v4(),
            trust_sequence: 1,
            sidecar_pod_uid: None,
            provenance: Provenance::Issued,
        };
        for _ in 0..count.div_ceil(BLOCK) {
            run.ledger.append_all(vec![Body::from(entry.clone()); BLOCK.min(count)]).await.unwrap();
        }
        run
    }

    fn from(entry: u64) -> WatchIdentitiesRequest {
        WatchIdentitiesRequest { filter: None, from_entry: Some(entry) }
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_takes_nothing_is_ended_and_told_where_to_go_on() {
        let ca = TestCa::new();
        let ledger = recorded(&ca, 5 * BLOCK).await.ledger;
        let watches = Watches::new(CancellationToken::new());
        let slow = watches.begin(&ledger, from(0)).await.unwrap();
        tokio::time::sleep(PATIENCE + Duration::from_secs(1)).await;
        let answers: Vec<_> = slow.collect().await;
        let (last, answers) = answers.split_last().unwrap();
        assert_eq!(answers.len(), QUEUE);
        let answers: Vec<_> = answers.iter().map(|answer| answer.as_ref().unwrap()).collect();
        let next = answers[QUEUE - 1].next_entry;
        let status = last.as_ref().unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(status.message().ends_with(&format!("go on from entry {next}")), "{}", status.message());
        assert_eq!(watches.room.available_permits(), MAX_WATCHES);

        let mut told: Vec<_> = answers.iter().flat_map(|answer| &answer.identities).map(|identity| identity.entry).collect();
        let mut quick = watches.begin(&ledger, from(next)).await.unwrap();
        while told.len() < 5 * BLOCK {
            told.extend(quick.next().await.unwrap().unwrap().identities.iter().map(|identity| identity.entry));
        }
        assert!(told.windows(2).all(|two| two[0] < two[1]));
    }

    #[tokio::test]
    async fn a_watch_ends_with_the_ca_or_its_reader_and_more_than_are_served_are_refused() {
        let ca = TestCa::new();
        let ledger = recorded(&ca, 1).await.ledger;
        let shutdown = CancellationToken::new();
        let watches = Watches::new(shutdown.clone());
        let mut begun = Vec::new();
        for _ in 0..MAX_WATCHES {
            let mut watch = watches.begin(&ledger, WatchIdentitiesRequest::default()).await.unwrap();
            assert_eq!(watch.next().await.unwrap().unwrap().next_entry, ledger.entries());
            begun.push(watch);
        }
        assert!(matches!(watches.begin(&ledger, from(0)).await.err(), Some(ApiError::TooManyWatches(MAX_WATCHES))));
        begun.pop();
        while watches.room.available_permits() == 0 {
            tokio::task::yield_now().await;
        }
        shutdown.cancel();
        let mut watch = begun.pop().unwrap();
        assert_eq!(watch.next().await.unwrap().unwrap_err().code(), Code::Unavailable);
        assert!(watch.next().await.is_none());
    }

    #[tokio::test]
    async fn a_watch_of_the_past_alone_is_refused() {
        let ledger = TestCa::new().ledger().await;
        let filter = wire::IdentityFilter::default;
        for filter in [wire::IdentityFilter { until_ms: 1, ..filter() }, wire::IdentityFilter { revoked: true, ..filter() }] {
            let request = WatchIdentitiesRequest { filter: Some(filter), from_entry: None };
            let refused = Watches::new(CancellationToken::new()).begin(&ledger, request).await.err();
            assert!(matches!(refused, Some(ApiError::Invalid(_))), "{refused:?}");
        }
    }
}
