//! Writes the state file: some time after a change, so that many changes cost one write, and off the owner's task.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::state::{State, StateError, StateFile};
use crate::telemetry::Metrics;

/// Changes are gathered for so long.
const GATHER: Duration = Duration::from_millis(300);
/// After a failed write.
const RETRY: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct Keep {
    file: Option<Arc<StateFile>>,
    metrics: Metrics,
    due: Option<Instant>,
    writing: Option<JoinHandle<Result<(), StateError>>>,
}

impl Keep {
    pub(super) fn new(file: Option<StateFile>, metrics: Metrics) -> Self {
        Self { file: file.map(Arc::new), metrics, due: None, writing: None }
    }

    /// Something to keep has changed.
    pub(super) fn changed(&mut self) {
        if self.file.is_some() {
            self.due.get_or_insert_with(|| Instant::now() + GATHER);
        }
    }

    /// When to write; not while a write is under way.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due.filter(|_| self.writing.is_none())
    }

    pub(super) fn is_due(&self) -> bool {
        self.due().is_some_and(|due| due <= Instant::now())
    }

    /// Starts writing `state`.
    pub(super) fn write(&mut self, state: &State) {
        let Some(file) = self.file.clone() else { return };
        self.due = None;
        let bytes = file.encode(state);
        self.writing = Some(tokio::task::spawn_blocking(move || file.write(&bytes)));
    }

    /// Waits until the write under way has ended; for ever if there is none. Safe to cancel.
    pub(super) async fn written(&mut self) {
        let Some(writing) = &mut self.writing else { return std::future::pending().await };
        let outcome = writing.await;
        self.writing = None;
        let problem = match outcome {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        tracing::error!(problem, "the state was not written; a restarted agent would not know the newest certificates");
        self.metrics.state_failed.inc();
        self.due = Some(Instant::now() + RETRY);
    }

    /// Writes what has changed, before the process ends.
    pub(super) async fn finish(&mut self, state: &State) {
        if self.writing.is_some() {
            self.written().await;
        }
        if self.due.is_some() {
            self.write(state);
            self.written().await;
        }
    }
}
