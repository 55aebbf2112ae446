//! The ledger's checkpoints as one agent is shown them, and what the agent's own say about this CA's ledger.
//!
//! An agent names the newest checkpoint that it knows. That one is compared with the ledger: if it is not the beginning of what the ledger
//! is now, entries were lost or changed, or a backup was restored, whatever the CA itself believes; and if this CA has signed it, that is proven,
//! and the ledger records nothing more ([`Ledger::contradicted`]). Then the agent is shown the newest
//! checkpoint with a proof from its own, and judges for itself; the next one follows when it has reported and [`EVERY`] has passed. An agent
//! that knows the lost log which this one continues is shown this one's first entry, which says so.

use std::sync::Arc;
use std::time::Duration;

use chancery_identity::SpiffeId;
use chancery_identity::checkpoint::{Checkpoint, MAX_NOTE_BYTES, unverified, verify};
use chancery_proto::chancery::v1::{FirstEntry, LedgerAlarm, LedgerCheckpoint, LedgerView, StandingActs};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::fleet::shortened_to;
use crate::ledger::{Contradiction, Ledger, LedgerError, Published};
use crate::store::MAX_ENTRY_BYTES;

/// Between two checkpoints for one agent. Each costs a proof; what a fork costs its author does not depend on how soon it is found.
pub(super) const EVERY: Duration = Duration::from_secs(30);
/// After a failure to read the ledger.
const RETRY: Duration = Duration::from_secs(10);

/// Where agents' checkpoints come from.
#[derive(Clone, Debug)]
pub struct LedgerSource {
    /// For proofs.
    pub ledger: Ledger,
    /// The newest one that was published.
    pub newest: watch::Receiver<Arc<Published>>,
    /// The acts that agents keep for the CA.
    pub standing: watch::Receiver<Arc<StandingActs>>,
}

/// What came of comparing an agent's checkpoint with the ledger.
#[derive(Debug)]
pub(super) struct Looked {
    /// Why the agent's checkpoint is not the beginning of this ledger; `None` if it is.
    pub(super) alarm: Option<LedgerAlarm>,
    /// What to show it.
    pub(super) offer: Option<LedgerCheckpoint>,
}

/// One agent's side of it.
#[derive(Debug)]
pub(super) struct Showing {
    source: LedgerSource,
    agent: SpiffeId,
    /// The agent goes over to a log that continues a lost one.
    goes_over: bool,
    /// The note that the agent reported; `None` before its first report.
    reported: Option<String>,
    /// The one that was compared last.
    compared: Option<String>,
    /// A report has come since the last offer, so that a proof can begin where the agent is.
    answered: bool,
    not_before: Instant,
    work: Option<JoinHandle<Result<Looked, LedgerError>>>,
}

impl Showing {
    pub(super) fn new(source: LedgerSource, agent: SpiffeId, goes_over: bool) -> Self {
        Self { source, agent, goes_over, reported: None, compared: None, answered: false, not_before: Instant::now(), work: None }
    }

    /// Takes the agent's report in.
    pub(super) fn heard(&mut self, view: &LedgerView) {
        // What is longer is no note, and remains none.
        self.reported = Some(shortened_to(&view.checkpoint, MAX_NOTE_BYTES));
        self.answered = true;
    }

    /// Waits until the agent's checkpoint was compared. Safe to cancel.
    pub(super) async fn next(&mut self) -> Looked {
        loop {
            if let Some(work) = &mut self.work {
                let looked = work.await;
                self.work = None;
                match looked {
                    Ok(Ok(looked)) => {
                        if looked.offer.is_some() {
                            self.answered = false;
                            self.not_before = Instant::now() + EVERY;
                        }
                        return looked;
                    }
                    Ok(Err(error)) => tracing::warn!(%error, "the ledger could not be read to compare the agent's checkpoint with it"),
                    Err(error) => tracing::error!(%error, "the agent's checkpoint could not be compared with the ledger"),
                }
                self.not_before = Instant::now() + RETRY;
            }
            self.wait().await;
            self.begin();
        }
    }

    /// Until there is something to compare or to show.
    async fn wait(&mut self) {
        if !self.answered {
            // Nothing changes that before `heard` is called, and then this future is made anew.
            std::future::pending::<()>().await;
        }
        tokio::time::sleep_until(self.not_before).await;
        let reported = self.reported.as_deref();
        let compared = self.compared.as_deref() == reported;
        let news = |newest: &Arc<Published>| !compared || Some(newest.note.as_str()) != reported;
        if self.source.newest.wait_for(news).await.is_err() {
            // No more will be published: the CA is shutting down.
            std::future::pending::<()>().await;
        }
    }

    fn begin(&mut self) {
        let newest = self.source.newest.borrow_and_update().clone();
        let Some(reported) = self.reported.clone() else { return };
        self.compared = Some(reported.clone());
        self.work = Some(tokio::spawn(look(self.source.ledger.clone(), newest, self.agent.clone(), reported, self.goes_over)));
    }
}

impl Drop for Showing {
    fn drop(&mut self) {
        if let Some(work) = &self.work {
            work.abort();
        }
    }
}

async fn look(ledger: Ledger, newest: Arc<Published>, agent: SpiffeId, reported: String, goes_over: bool) -> Result<Looked, LedgerError> {
    if reported == newest.note {
        return Ok(Looked { alarm: None, offer: None });
    }
    let theirs = read(&reported);
    let alarm = match (&theirs, reported.is_empty()) {
        (None, true) => None,
        (None, false) => Some(Problem::alleged("unreadable", "what the agent reports as its checkpoint is none".to_owned())),
        (Some(theirs), _) => compare(&ledger, &newest, theirs, &reported).await?,
    };
    if let (Some(Problem { proven: true, entries, .. }), Some(theirs)) = (&alarm, &theirs) {
        let (shown_by, note) = (agent.to_string(), reported.clone());
        ledger.contradicted(Contradiction { shown_by, note, size: theirs.size, entries: *entries });
    }
    let ours = &newest.checkpoint;
    let from = theirs.as_ref().filter(|theirs| theirs.origin == ours.origin && theirs.size <= ours.size).map_or(0, |theirs| theirs.size);
    let proof = if from == 0 { Vec::new() } else { ledger.consistency_proof(from, ours.size).await? };
    let is_lost = |theirs: &Checkpoint| is_continued(&ledger, theirs);
    let first = if goes_over && theirs.as_ref().is_some_and(is_lost) { Some(first_entry(&ledger, ours.size).await?) } else { None };
    let offer = LedgerCheckpoint {
        note: newest.note.clone(),
        verifier_key: newest.verifier.to_string(),
        proof_from: from,
        proof: proof.into_iter().map(|hash| hash.to_vec()).collect(),
        first,
    };
    let alarm = alarm.map(|Problem { reason, message, .. }| LedgerAlarm {
        reason: reason.to_owned(),
        message,
        remembered: reported,
        offered: newest.note.clone(),
        raised_at_ms: 0,
    });
    Ok(Looked { alarm, offer: Some(offer) })
}

/// Whether the ledger continues the lost log of this checkpoint.
fn is_continued(ledger: &Ledger, theirs: &Checkpoint) -> bool {
    ledger.current_state().accepted_loss.as_ref().is_some_and(|loss| loss.origin == theirs.origin)
}

async fn first_entry(ledger: &Ledger, size: u64) -> Result<FirstEntry, LedgerError> {
    let entry = ledger.stored_entries(0..1, MAX_ENTRY_BYTES).await?.pop().unwrap_or_default();
    let proof = ledger.inclusion_proof(0, size).await?;
    Ok(FirstEntry { entry: entry.to_vec(), proof: proof.into_iter().map(|hash| hash.to_vec()).collect() })
}

/// What an agent's note says, whoever signed it: if it fits the ledger, it does not matter, and after a change of keys an agent may have one
/// of a key that is gone.
pub(super) fn read(note: &str) -> Option<Checkpoint> {
    unverified(note).ok()
}

/// Why an agent's checkpoint is not the beginning of the ledger.
struct Problem {
    reason: &'static str,
    message: String,
    /// This CA has signed it, so that it is not the agent's word alone.
    proven: bool,
    /// How many the ledger has.
    entries: u64,
}

impl Problem {
    fn alleged(reason: &'static str, message: String) -> Self {
        Self { reason, message, proven: false, entries: 0 }
    }
}

/// Why `theirs` is not the beginning of the ledger.
async fn compare(ledger: &Ledger, newest: &Published, theirs: &Checkpoint, note: &str) -> Result<Option<Problem>, LedgerError> {
    let size = theirs.size;
    if theirs.origin != newest.checkpoint.origin && is_continued(ledger, theirs) {
        return Ok(None);
    }
    if theirs.origin != newest.checkpoint.origin {
        let (found, ours) = (&theirs.origin, &newest.checkpoint.origin);
        let message = format!("the agent knows the log {found}, with {size} entries; this CA's is {ours}");
        return Ok(Some(Problem::alleged("other_origin", message)));
    }
    // What is durable, not what is published: an agent may have been shown a checkpoint that was published a moment ago.
    let entries = ledger.store().head().await?.entries;
    let (reason, message) = if size > entries {
        let lost = format!(
            "the agent was shown a ledger of {size} entries, and this one has {entries}: a backup was restored, or entries are lost"
        );
        ("rolled_back", lost)
    } else if ledger.tree_root(size).await? != theirs.root {
        ("forked", format!("the agent was shown other entries: the first {size} of this ledger are not those of its checkpoint"))
    } else {
        return Ok(None);
    };
    if let Err(error) = verify(note, &newest.signed_by) {
        let message = format!("{message} (but the agent's checkpoint is not proven to be this CA's: {error})");
        return Ok(Some(Problem::alleged("other_key", message)));
    }
    // Nothing is stopped for hashes that are damaged where they are kept.
    if size <= entries && ledger.tree_root_of_entries(size).await? == theirs.root {
        tracing::error!(size, "the ledger's tree does not fit its entries: stop the CA and remove the ledger's `tree`, which is made anew");
        return Ok(None);
    }
    Ok(Some(Problem { reason, message, proven: true, entries }))
}
