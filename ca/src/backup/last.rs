//! When the newest backup was made, noted in the data directory, so that the CA can say when it is too long ago.

use std::path::Path;

use chancery_process::files::{self, FileError};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

const NAME: &str = "last-backup";

/// The newest backup of a data directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastBackup {
    /// When it was made.
    #[serde(with = "time::serde::rfc3339")]
    pub made_at: OffsetDateTime,
    /// How many entries are in it.
    pub entries: u64,
}

/// The newest backup of `data_dir`; none if there is none, or the note cannot be read.
pub fn last_backup(data_dir: &Path) -> Option<LastBackup> {
    serde_json::from_slice(&std::fs::read(data_dir.join(NAME)).ok()?).ok()
}

pub(super) fn note(data_dir: &Path, last: LastBackup) -> Result<(), FileError> {
    let text = serde_json::to_string(&last).unwrap_or_default();
    files::write_private(&data_dir.join(NAME), format!("{text}\n").as_bytes())
}
