//! What the agent remembers of the CA's ledger, so that a CA that shows its fleet two histories, or an older one, is caught by it.
//!
//! The newest checkpoint that the CA has shown is remembered across restarts, and each newer one must be proved to continue it. What does not
//! continue it raises an alarm: both notes are kept as evidence, and the alarm stays, also over restarts, until an operator has looked at
//! it (`chancery-agent reset --ledger`). Nothing else changes: certificates are served and renewed as before.
//!
//! One thing else is taken over: a new log that is proven to continue the known one, whose end was lost. That is no alarm, but the operator is
//! told, in the agent's log and as long as it is remembered in `chancery-agent status`.

mod continued;
mod file;
mod judge;
mod standing;

use std::fmt;
use std::sync::Arc;

use chancery_identity::Clock;
use chancery_identity::checkpoint::MAX_NOTE_BYTES;
use chancery_process::text::cut;
use chancery_proto::chancery::v1 as wire;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::telemetry::Metrics;
use chancery_process::moment::moment;
use judge::{Complaint, Verdict, judge};

pub use continued::ContinuedLog;
pub use file::LedgerFile;
pub use judge::KnownCheckpoint;
pub use standing::StandingActs;

/// Offers on their way to the task; the CA sends one every few seconds.
const OFFERS_QUEUED: usize = 8;
/// So many offers in a row whose proof does not begin with what the agent reported are no coincidence.
const MOST_UNPROVEN: u32 = 3;

/// Why there is an alarm. [`fmt::Display`] is a stable word, as on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AlarmReason {
    /// Fewer entries than were shown before: entries are gone.
    Smaller,
    /// As many entries, but others.
    Forked,
    /// More entries, but not behind those that were there.
    Inconsistent,
    /// No proof from what the agent remembers, again and again.
    Unproven,
    /// Not signed by the key that the agent knows.
    OtherKey,
    /// Another log.
    OtherOrigin,
    /// No signed checkpoint at all, or the agent's own memory of it is damaged.
    Unreadable,
}

/// Evidence that the ledger is not what it was, for people to look at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerAlarm {
    /// Why.
    pub reason: AlarmReason,
    /// In a sentence.
    pub message: String,
    /// The signed note that the agent remembered.
    pub remembered: String,
    /// The note that does not fit.
    pub offered: String,
    /// When, by the agent's clock.
    #[serde(with = "time::serde::rfc3339")]
    pub raised_at: OffsetDateTime,
}

/// What the agent knows of the ledger.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LedgerMemory {
    /// The newest checkpoint taken over.
    pub known: Option<Arc<KnownCheckpoint>>,
    /// The first alarm since an operator looked.
    pub alarm: Option<Arc<LedgerAlarm>>,
    /// The log before, if its end was lost and the agent went over to the one that continues it.
    pub continued: Option<Arc<ContinuedLog>>,
    /// What this log and the one before say of who is kept from certificates; the CA asks for it should entries be lost.
    pub acts: Vec<Arc<StandingActs>>,
}

/// What the CA shows of its ledger.
pub(super) enum Shown {
    Checkpoint(wire::LedgerCheckpoint),
    Acts(wire::StandingActs),
}

/// The way to the task that remembers.
#[derive(Clone, Debug)]
pub(super) struct LedgerHandle {
    offers: mpsc::Sender<Shown>,
    memory: watch::Receiver<LedgerMemory>,
}

/// The task that remembers.
pub(super) struct LedgerTask {
    file: LedgerFile,
    clock: Arc<dyn Clock>,
    metrics: Metrics,
    offers: mpsc::Receiver<Shown>,
    memory: watch::Sender<LedgerMemory>,
    unproven: u32,
}

impl LedgerHandle {
    /// What is known now, and from now on.
    pub(super) fn memory(&self) -> watch::Receiver<LedgerMemory> {
        self.memory.clone()
    }

    /// Passes on what the CA showed.
    pub(super) fn offer(&self, shown: Shown) {
        if self.offers.try_send(shown).is_err() {
            tracing::warn!("what the CA shows of its ledger is passed over: what came before is still being written");
        }
    }
}

impl LedgerTask {
    pub(super) fn new(file: LedgerFile, clock: Arc<dyn Clock>, metrics: Metrics) -> (Self, LedgerHandle) {
        let memory = file.load(clock.now());
        metrics.ledger(memory.size(), memory.alarm.is_some());
        if let Some(alarm) = &memory.alarm {
            tracing::error!(reason = %alarm.reason, message = alarm.message, raised_at = %moment(alarm.raised_at), "the alarm about the ledger stays until `chancery-agent reset --ledger`");
        }
        let (offers, receiver) = mpsc::channel(OFFERS_QUEUED);
        let (memory, known) = watch::channel(memory);
        (Self { file, clock, metrics, offers: receiver, memory, unproven: 0 }, LedgerHandle { offers, memory: known })
    }

    /// Judges and remembers what the CA shows, until `shutdown`.
    pub(super) async fn run(mut self, shutdown: CancellationToken) {
        while let Some(Some(offer)) = shutdown.run_until_cancelled(self.offers.recv()).await {
            let before = self.memory.borrow().clone();
            let changed = match offer {
                Shown::Checkpoint(checkpoint) => self.take(&before, checkpoint),
                Shown::Acts(acts) => standing::take(before, acts),
            };
            if let Some(memory) = changed {
                self.remember(memory).await;
            }
        }
    }

    /// What is to be remembered instead of `before`, if anything.
    fn take(&mut self, before: &LedgerMemory, offer: wire::LedgerCheckpoint) -> Option<LedgerMemory> {
        let mut memory = before.clone();
        match self.judge(before.known.as_deref(), &offer) {
            Ok(Taken::Nothing) => return None,
            Ok(Taken::Newer(newer)) => {
                tracing::debug!(size = newer.checkpoint.size, "the ledger has grown, and continues what it was");
                memory.known = Some(Arc::new(newer));
            }
            Ok(Taken::Continued(newer, log)) => {
                tracing::warn!(origin = newer.checkpoint.origin, known = before.size(), "{log}");
                (memory.known, memory.continued) = (Some(Arc::new(newer)), Some(Arc::new(log)));
            }
            // The first one is the evidence; the CA will go on showing what does not fit.
            Err(_) if before.alarm.is_some() => return None,
            Err(complaint) => memory.alarm = Some(Arc::new(self.raise(complaint, before.known.as_deref(), offer.note))),
        }
        Some(memory)
    }

    async fn remember(&self, memory: LedgerMemory) {
        let (file, bytes) = (self.file.clone(), memory.clone());
        let written = tokio::task::spawn_blocking(move || file.write(&bytes)).await;
        let problem = match written {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(error) => Some(error.to_string()),
        };
        if let Some(problem) = problem {
            tracing::error!(problem, "what was seen of the ledger was not written; a restarted agent would not know it");
            self.metrics.state_failed.inc();
        }
        self.metrics.ledger(memory.size(), memory.alarm.is_some());
        self.memory.send_replace(memory);
    }

    fn judge(&mut self, known: Option<&KnownCheckpoint>, offer: &wire::LedgerCheckpoint) -> Result<Taken, Complaint> {
        let verdict = judge(known, offer)?;
        if verdict != Verdict::ProofFromElsewhere {
            self.unproven = 0;
        }
        match verdict {
            Verdict::ProofFromElsewhere => {
                self.unproven += 1;
                // The CA learns from a report where its proof has to begin.
                self.memory.send_modify(|_| ());
                if self.unproven < MOST_UNPROVEN {
                    return Ok(Taken::Nothing);
                }
                let message = format!("{MOST_UNPROVEN} in a row came without a proof that begins with the one that the agent reports");
                Err(Complaint { reason: AlarmReason::Unproven, message })
            }
            Verdict::Same => Ok(Taken::Nothing),
            Verdict::Newer(newer) => Ok(Taken::Newer(newer)),
            Verdict::Continued(newer, log) => Ok(Taken::Continued(newer, log)),
        }
    }

    fn raise(&self, complaint: Complaint, known: Option<&KnownCheckpoint>, offered: String) -> LedgerAlarm {
        let Complaint { reason, message } = complaint;
        tracing::error!(
            %reason,
            message,
            file = %self.file.path().display(),
            "the CA shows a ledger that does not continue the one it showed before; both checkpoints are kept in the file"
        );
        let remembered = known.map(|known| known.note.clone()).unwrap_or_default();
        LedgerAlarm { reason, message, remembered, offered: bounded(offered), raised_at: self.clock.now() }
    }
}

/// What is to be remembered instead.
enum Taken {
    Nothing,
    Newer(KnownCheckpoint),
    Continued(KnownCheckpoint, ContinuedLog),
}

impl LedgerMemory {
    /// Entries of the checkpoint that is known; 0 while there is none.
    pub fn size(&self) -> u64 {
        self.known.as_ref().map_or(0, |known| known.checkpoint.size)
    }

    /// For the CA.
    pub(super) fn report(&self) -> wire::LedgerView {
        wire::LedgerView {
            checkpoint: self.known.as_ref().map(|known| known.note.clone()).unwrap_or_default(),
            alarm: self.alarm.as_ref().map(|alarm| wire::LedgerAlarm {
                reason: alarm.reason.to_string(),
                message: alarm.message.clone(),
                remembered: alarm.remembered.clone(),
                offered: alarm.offered.clone(),
                raised_at_ms: super::milliseconds(alarm.raised_at),
            }),
        }
    }
}

impl fmt::Display for LedgerAlarm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the CA shows a ledger that does not continue the one it showed before ({}): {}", self.reason, self.message)
    }
}

impl fmt::Display for ContinuedLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { origin, missing_from, missing_until, actor, why, .. } = self;
        let missing = if missing_from < missing_until {
            format!("its entries {missing_from} to {} are lost", missing_until - 1)
        } else {
            format!("what it had from entry {missing_from} on is lost")
        };
        write!(f, "a new ledger continues {origin}: {missing}, which {actor} accepted ({why})")
    }
}

impl fmt::Display for AlarmReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Smaller => "smaller",
            Self::Forked => "forked",
            Self::Inconsistent => "inconsistent",
            Self::Unproven => "unproven",
            Self::OtherKey => "other_key",
            Self::OtherOrigin => "other_origin",
            Self::Unreadable => "unreadable",
        })
    }
}

/// No note is longer; what is longer is kept as far as a note could go.
fn bounded(mut note: String) -> String {
    cut(&mut note, MAX_NOTE_BYTES);
    note
}
