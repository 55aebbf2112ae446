//! The file that holds the newest published checkpoint, apart from the log: a signed note, replaced in one step.
//!
//! It is what a restored or forked log is recognised by, so it is written durably before a checkpoint is shown to anybody.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use chancery_identity::checkpoint::MAX_NOTE_BYTES;

use super::PublishError;
use crate::store::embedded::files::{self, LogFiles};

#[derive(Debug)]
pub(super) struct CheckpointFile {
    files: Arc<dyn LogFiles>,
    path: PathBuf,
}

impl CheckpointFile {
    pub(super) fn new(files: Arc<dyn LogFiles>, path: PathBuf) -> Self {
        Self { files, path }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The note in it, if there is one.
    pub(super) async fn read(&self) -> Result<Option<String>, PublishError> {
        let (files, path) = (Arc::clone(&self.files), self.path.clone());
        // One byte more, so that a longer one is not taken for a note that ends there.
        let read = tokio::task::spawn_blocking(move || files::read_text(files.as_ref(), &path, MAX_NOTE_BYTES + 1)).await;
        read.unwrap_or_else(|error| Err(std::io::Error::other(error))).map_err(|error| self.failed(&error))
    }

    /// Replaces what is in it by `note`, durably. After an error either of them may be in it.
    pub(super) async fn write(&self, note: String) -> Result<(), PublishError> {
        let (files, path) = (Arc::clone(&self.files), self.path.clone());
        let written = tokio::task::spawn_blocking(move || files::replace(files.as_ref(), &path, note.as_bytes())).await;
        written.unwrap_or_else(|error| Err(std::io::Error::other(error))).map_err(|error| self.failed(&error))
    }

    /// Removes it, durably.
    pub(super) async fn remove(&self) -> Result<(), PublishError> {
        let (files, path) = (Arc::clone(&self.files), self.path.clone());
        let removed = tokio::task::spawn_blocking(move || {
            files.remove(&path)?;
            files.sync_dir(path.parent().unwrap_or(Path::new(".")))
        });
        removed.await.unwrap_or_else(|error| Err(std::io::Error::other(error))).map_err(|error| self.failed(&error))
    }

    fn failed(&self, error: &std::io::Error) -> PublishError {
        PublishError::File { path: self.path.clone(), problem: error.to_string() }
    }
}
