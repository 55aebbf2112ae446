//! Writes the state file, off the owner's task, and holds a new certificate back until the file has it: what a proxy has received, a
//! restarted agent knows.
//!
//! A change is written at once while no write is under way; what changes during a write is gathered for the next one. So a single change
//! waits for nothing, and many cost few writes. A write that fails or takes longer than [`PATIENCE`] holds nothing back any longer: a proxy
//! without a certificate is worse off than an agent that would not know one after a crash.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::WorkloadKey;
use super::state::{State, StateError, StateFile};
use crate::telemetry::Metrics;

/// A write may hold certificates back for so long.
const PATIENCE: Duration = Duration::from_secs(1);
/// Which proxies there are is written after so long.
const SOON: Duration = Duration::from_millis(100);
/// After a failed write.
const RETRY: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct Keep {
    file: Option<Arc<StateFile>>,
    metrics: Metrics,
    due: Option<Instant>,
    /// Whose certificates the next write is for.
    waiting: Vec<WorkloadKey>,
    writing: Option<Write>,
}

/// A write under way.
#[derive(Debug)]
struct Write {
    task: JoinHandle<Result<(), StateError>>,
    /// Whose certificates it is for; none once [`PATIENCE`] is over.
    held_back: Vec<WorkloadKey>,
    patient_until: Option<Instant>,
}

impl Keep {
    pub(super) fn new(file: Option<StateFile>, metrics: Metrics) -> Self {
        Self { file: file.map(Arc::new), metrics, due: None, waiting: Vec::new(), writing: None }
    }

    /// Something to keep has changed.
    pub(super) fn changed(&mut self) {
        if self.file.is_some() {
            self.due = Some(Instant::now());
        }
    }

    /// Something to keep has changed that nobody waits for: it may go with what is written next.
    pub(super) fn changed_soon(&mut self) {
        if self.file.is_some() {
            self.due.get_or_insert_with(|| Instant::now() + SOON);
        }
    }

    /// A certificate came. Tells whether it may be handed out now; otherwise [`Keep::written`] names it once it may.
    pub(super) fn issued(&mut self, workload: &WorkloadKey) -> bool {
        self.changed();
        let overdue = self.writing.as_ref().is_some_and(|write| write.patient_until.is_none());
        let may_go = self.file.is_none() || overdue;
        if !may_go {
            self.waiting.push(workload.clone());
        }
        may_go
    }

    /// When to write; not while a write is under way.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due.filter(|_| self.writing.is_none())
    }

    pub(super) fn is_due(&self) -> bool {
        self.due().is_some_and(|due| due <= Instant::now())
    }

    /// Starts writing `state`.
    pub(super) fn write(&mut self, state: State) {
        let Some(file) = self.file.clone() else { return };
        self.due = None;
        let task = tokio::task::spawn_blocking(move || file.write(&file.encode(&state)));
        let held_back = std::mem::take(&mut self.waiting);
        self.writing = Some(Write { task, held_back, patient_until: Some(Instant::now() + PATIENCE) });
    }

    /// Waits for the write under way; for ever if there is none. Tells whose certificates may be handed out now. Safe to cancel.
    pub(super) async fn written(&mut self) -> Vec<WorkloadKey> {
        let Some(write) = &mut self.writing else { return std::future::pending().await };
        let outcome = tokio::select! {
            outcome = &mut write.task => outcome,
            () = tokio::time::sleep_until(write.patient_until.unwrap_or_else(Instant::now)), if write.patient_until.is_some() => {
                tracing::error!("the state is not written yet; its certificates are handed out all the same");
                write.patient_until = None;
                let mut released = std::mem::take(&mut write.held_back);
                released.append(&mut self.waiting);
                return released;
            }
        };
        let released = std::mem::take(&mut write.held_back);
        self.writing = None;
        let problem = match outcome {
            Ok(Ok(())) => return released,
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        tracing::error!(problem, "the state was not written; a restarted agent would not know the newest certificates");
        self.metrics.state_failed.inc();
        self.due.get_or_insert_with(|| Instant::now() + RETRY);
        released
    }

    /// Writes what has changed, before the process ends.
    pub(super) async fn finish(&mut self, state: State) {
        while self.writing.is_some() {
            self.written().await;
        }
        if self.due.is_some() {
            self.write(state);
            while self.writing.is_some() {
                self.written().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;
    use uuid::Uuid;

    use super::*;

    fn workload(number: u128) -> WorkloadKey {
        WorkloadKey { pod_uid: Uuid::from_u128(number), namespace: "shop".into(), service_account: "cart".into() }
    }

    /// With the state in `directory`, which must not exist yet or be private.
    fn keep(directory: &std::path::Path) -> Keep {
        let file = StateFile::open(directory, true, "example.org".parse().unwrap(), "east".into()).unwrap();
        Keep::new(Some(file), Metrics::new(&mut Registry::default()))
    }

    #[tokio::test]
    async fn what_comes_during_a_write_waits_for_the_next_one_together() {
        let directory = tempfile::tempdir().unwrap();
        let mut keep = keep(&directory.path().join("state"));
        assert!(!keep.issued(&workload(1)));
        assert!(keep.is_due(), "nothing is waited for while no write is under way");
        keep.write(State::default());
        assert!(!keep.issued(&workload(2)) && !keep.issued(&workload(3)));
        assert!(!keep.is_due(), "one write at a time");
        assert_eq!(keep.written().await, [workload(1)]);
        assert!(keep.is_due());
        keep.write(State::default());
        assert_eq!(keep.written().await, [workload(2), workload(3)]);
        assert!(!keep.is_due());
    }

    #[tokio::test]
    async fn a_failed_write_holds_nothing_back_and_is_tried_again() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        let mut keep = keep(&state);
        std::fs::remove_dir(&state).unwrap();
        assert!(!keep.issued(&workload(1)));
        keep.write(State::default());
        assert_eq!(keep.written().await, [workload(1)]);
        assert_eq!(keep.metrics.state_failed.get(), 1);
        assert!(keep.due().is_some() && !keep.is_due());
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_that_hangs_holds_nothing_back_for_long() {
        let directory = tempfile::tempdir().unwrap();
        let mut keep = keep(&directory.path().join("state"));
        assert!(!keep.issued(&workload(1)));
        let task = tokio::spawn(std::future::pending());
        keep.waiting.clear();
        keep.writing = Some(Write { task, held_back: vec![workload(1)], patient_until: Some(Instant::now() + PATIENCE) });
        assert!(!keep.issued(&workload(2)));
        assert_eq!(keep.written().await, [workload(1), workload(2)]);
        assert!(keep.issued(&workload(3)), "nor what comes while it hangs on");
    }
}
