//! The file in the agent's state directory that the ledger's checkpoint and the alarm are kept in: JSON, 0600, replaced as a whole. It holds
//! no secret, but whoever may change it may silence an alarm.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use chancery_process::files::{self, FileError};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::{AlarmReason, ContinuedLog, KnownCheckpoint, LedgerAlarm, LedgerMemory, StandingActs};

/// The encoding that this version writes.
const VERSION: u32 = 1;
const FILE_NAME: &str = "ledger";

/// Where what was seen of the ledger is kept.
#[derive(Clone, Debug)]
pub struct LedgerFile {
    path: PathBuf,
}

/// What is in it.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Content {
    version: u32,
    /// Empty while no checkpoint is known.
    verifier_key: String,
    checkpoint: String,
    alarm: Option<LedgerAlarm>,
    #[serde(default)]
    continued: Option<ContinuedLog>,
    #[serde(default)]
    acts: Vec<StandingActs>,
}

impl LedgerFile {
    /// The one in `directory`, which must be there when it is written.
    pub fn in_directory(directory: &Path) -> Self {
        Self { path: directory.join(FILE_NAME) }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it says. An absent one says nothing; one that cannot be used is an alarm, since what the agent had seen is lost with it.
    pub(super) fn load(&self, now: OffsetDateTime) -> LedgerMemory {
        if !self.path.exists() {
            return LedgerMemory::default();
        }
        self.read().unwrap_or_else(|problem| {
            let message = format!("what the agent had seen of the ledger cannot be read: {}: {problem}", self.path.display());
            let (reason, remembered, offered) = (AlarmReason::Unreadable, String::new(), String::new());
            let alarm = LedgerAlarm { reason, message, remembered, offered, raised_at: now };
            LedgerMemory { alarm: Some(Arc::new(alarm)), ..LedgerMemory::default() }
        })
    }

    fn read(&self) -> Result<LedgerMemory, String> {
        let bytes = files::read_private(&self.path).map_err(|error| error.to_string())?;
        let content: Content = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
        if content.version > VERSION {
            return Err(format!("it has version {}, this agent reads up to {VERSION}", content.version));
        }
        let known = if content.checkpoint.is_empty() {
            None
        } else {
            let key = content.verifier_key.parse().map_err(|error| format!("{error}"))?;
            Some(Arc::new(KnownCheckpoint::new(content.checkpoint, key).map_err(|error| error.to_string())?))
        };
        let acts = content.acts.into_iter().map(Arc::new).collect();
        Ok(LedgerMemory { known, alarm: content.alarm.map(Arc::new), continued: content.continued.map(Arc::new), acts })
    }

    /// Replaces it.
    pub(super) fn write(&self, memory: &LedgerMemory) -> Result<(), FileError> {
        let content = Content {
            version: VERSION,
            verifier_key: memory.known.as_ref().map(|known| known.key.to_string()).unwrap_or_default(),
            checkpoint: memory.known.as_ref().map(|known| known.note.clone()).unwrap_or_default(),
            alarm: memory.alarm.as_deref().cloned(),
            continued: memory.continued.as_deref().cloned(),
            acts: memory.acts.iter().map(|acts| StandingActs::clone(acts)).collect(),
        };
        let bytes = serde_json::to_vec_pretty(&content);
        let bytes = bytes.map_err(|error| FileError::Io { path: self.path.clone(), action: "encode", error: error.into() })?;
        files::write_private(&self.path, &bytes)
    }
}
