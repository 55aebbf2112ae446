//! Hands on entries as they are stored, at their reader's pace.
//!
//! Little waits for a reader. One that takes nothing for [`PATIENCE`] is told where to go on, and ended. Exports are counted, and end with
//! the CA.

use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use chancery_proto::chancery::v1::{ReadEntriesResponse, StoredEntry};
use futures_util::{Stream, StreamExt, stream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::api::error::ApiError;
use crate::ledger::{IdentityFilter, Ledger};

/// Exports at once.
const MAX_EXPORTS: usize = 16;
/// Entries are sent in messages of about this many bytes.
const MESSAGE_BYTES: usize = 1 << 20;
/// Messages that wait for a reader.
const QUEUE: usize = 2;
/// How long a reader may take none.
const PATIENCE: Duration = Duration::from_secs(60);

/// What an export answers.
pub(super) type Entries = Pin<Box<dyn Stream<Item = Result<ReadEntriesResponse, Status>> + Send>>;

/// The exports under way.
#[derive(Clone, Debug)]
pub struct Exports {
    room: Arc<Semaphore>,
    shutdown: CancellationToken,
}

impl Exports {
    /// None yet; all of them end when `shutdown` is cancelled.
    pub fn new(shutdown: CancellationToken) -> Self {
        Self { room: Arc::new(Semaphore::new(MAX_EXPORTS)), shutdown }
    }

    /// Begins to hand on the entries of `range`, which are there; those that `filter` is about, if there is one.
    pub(super) fn begin(&self, ledger: Ledger, range: Range<u64>, filter: Option<IdentityFilter>) -> Result<Entries, ApiError> {
        let room = Arc::clone(&self.room).try_acquire_owned().map_err(|_| ApiError::TooManyExports(MAX_EXPORTS))?;
        let (reader, messages) = mpsc::channel(QUEUE);
        let (ended, end) = oneshot::channel();
        let shutdown = self.shutdown.clone();
        tokio::spawn(async move {
            if let Err(error) = hand_on(&ledger, range, filter.as_ref(), reader, &shutdown).await {
                // Nobody is left to be told if the reader has gone.
                let _gone = ended.send(error);
            }
            drop(room);
        });
        let last = stream::once(end).filter_map(async |end| Some(Err(Status::from(end.ok()?))));
        Ok(Box::pin(ReceiverStream::new(messages).map(Ok).chain(last)))
    }
}

/// Until all is sent, or the reader has gone.
async fn hand_on(
    ledger: &Ledger,
    range: Range<u64>,
    filter: Option<&IdentityFilter>,
    reader: mpsc::Sender<ReadEntriesResponse>,
    shutdown: &CancellationToken,
) -> Result<(), ApiError> {
    let mut next = range.start;
    while next < range.end {
        let message = read(ledger, next..range.end, filter).await?;
        let after = message.next;
        let sent = tokio::select! {
            biased;
            () = shutdown.cancelled() => return Err(ApiError::Ending { next }),
            sent = timeout(PATIENCE, reader.send(message)) => sent,
        };
        match sent {
            Ok(Ok(())) => next = after,
            Ok(Err(_)) => return Ok(()),
            Err(_) => return Err(ApiError::SlowReader { waited: PATIENCE, next }),
        }
    }
    Ok(())
}

async fn read(ledger: &Ledger, range: Range<u64>, filter: Option<&IdentityFilter>) -> Result<ReadEntriesResponse, ApiError> {
    let read = ledger.stored_entries(range.clone(), MESSAGE_BYTES).await?;
    let next = range.start + read.len() as u64;
    let mut entries = Vec::new();
    for (index, bytes) in (range.start..).zip(read) {
        if filter.map_or(Ok(true), |filter| ledger.selects(filter, index, &bytes))? {
            entries.push(StoredEntry { index, bytes });
        }
    }
    Ok(ReadEntriesResponse { entries, next })
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;
    use crate::authority::testing::TestCa;

    #[tokio::test]
    async fn an_export_ends_with_the_ca_and_more_than_are_served_are_refused() {
        let ca = TestCa::new();
        let ledger = ca.start().await.ledger;
        let entries = ledger.entries();
        let shutdown = CancellationToken::new();
        let exports = Exports::new(shutdown.clone());
        let all: Vec<_> = exports.begin(ledger.clone(), 0..entries, None).unwrap().collect().await;
        assert_eq!(all.last().unwrap().as_ref().unwrap().next, entries);

        let others = Arc::clone(&exports.room).try_acquire_many_owned(u32::try_from(MAX_EXPORTS).unwrap()).unwrap();
        let refused = exports.begin(ledger.clone(), 0..entries, None).err().unwrap();
        assert_eq!(Status::from(refused).code(), Code::ResourceExhausted);
        drop(others);
        shutdown.cancel();
        let ended: Vec<_> = exports.begin(ledger, 0..entries, None).unwrap().collect().await;
        assert!(ended[0].as_ref().unwrap_err().message().contains("entry 0"), "{ended:?}");
    }
}
