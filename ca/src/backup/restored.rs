//! A restored data directory says that it is one, until the CA that is started with it has recorded that.
//!
//! The ledger may lack what was recorded after the backup's newest checkpoint, which nobody can tell. So the restoration is an act:
//! agents tell what they hold, and roots stay where they are until the last certificate has expired that may be missing.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use chancery_process::files;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::BackupError;
use crate::ledger::acts::{Change, Restored, State};
use crate::ledger::{Body, Entry, Leaf};
use crate::store::embedded::audit::Audit;

/// In a data directory.
const NAME: &str = "restored";
/// Room in the sequence of trust states for entries that were lost behind the newest checkpoint that anybody knows: days at full speed.
const UNKNOWN_ENTRIES: u64 = 1_000_000_000;
/// What is missing may have been issued for so long, whatever the ledger has: agents' own certificates are.
pub(super) const LEAST_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

/// A restoration that is not recorded yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Restoration {
    /// Who restored it, as acts name people.
    pub actor: String,
    #[serde(with = "time::serde::rfc3339")]
    pub(super) restored_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    pub(super) made_at: OffsetDateTime,
    pub(super) entries: u64,
    pub(super) longest_lifetime_s: u64,
}

impl Restoration {
    /// That of `data_dir`, if it was restored and that is not recorded yet.
    ///
    /// # Errors
    /// If that cannot be read.
    pub fn pending(data_dir: &Path) -> Result<Option<Self>, BackupError> {
        let path = data_dir.join(NAME);
        match fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            note => {
                let note = note.map_err(BackupError::io("read", &path))?;
                serde_json::from_slice(&note).map(Some).map_err(|error| BackupError::io("read", &path)(error.into()))
            }
        }
    }

    /// What is to be recorded, and why, in a log whose acts have led to `state`; nothing if that says it already, since the CA was killed before
    /// it noted so.
    pub fn act(&self, state: &State) -> Option<(Change, String)> {
        let until = self.restored_at + Duration::from_secs(self.longest_lifetime_s);
        // As it is recorded, in milliseconds.
        let roots_kept_until = until.replace_nanosecond(until.nanosecond() / 1_000_000 * 1_000_000).unwrap_or(until);
        let is_this = |known: Restored| (known.entries, known.roots_kept_until) == (self.entries, roots_kept_until);
        if state.restored.is_some_and(is_this) {
            return None;
        }
        let why = format!("restored at {} from the backup made at {}", self.restored_at, self.made_at);
        let (trust_floor, epoch) = (trust_floor(state, 0, self.restored_at), state.epoch);
        Some((Change::Restored { entries: self.entries, roots_kept_until, trust_floor, epoch }, why))
    }

    /// It is recorded.
    ///
    /// # Errors
    /// If that cannot be noted.
    pub fn done(data_dir: &Path) -> Result<(), BackupError> {
        let path = data_dir.join(NAME);
        fs::remove_file(&path).map_err(BackupError::io("remove", &path))?;
        Ok(files::sync_directory(data_dir)?)
    }

    pub(super) fn note(&self, data_dir: &Path) -> Result<(), BackupError> {
        let text = serde_json::to_string(self).unwrap_or_default();
        Ok(files::write_private(&data_dir.join(NAME), format!("{text}\n").as_bytes())?)
    }
}

/// What is added from now on to the sequence of each trust state, so that none is smaller than one that agents were given before entries were lost:
/// behind `state`, maybe up to the entry `end`, and maybe by a log that was restored from the same backup before. That one grew by less than an
/// entry a microsecond.
pub(super) fn trust_floor(state: &State, end: u64, now: OffsetDateTime) -> u64 {
    let grown = state.trust_floor().saturating_add(end).saturating_add(UNKNOWN_ENTRIES);
    grown.max(u64::try_from(now.unix_timestamp_nanos() / 1000).unwrap_or_default())
}

/// The longest lifetime of a certificate in the log in `ledger`, and of those that it may lack. What cannot be read there the CA finds at its
/// start.
pub(super) fn longest_lifetime(ledger: &Path) -> Result<Duration, BackupError> {
    let mut longest = LEAST_LIFETIME;
    Audit::of(ledger)?.read(
        |_, bytes| {
            if let Ok(Entry { body: Body::Issuance(issuance), .. }) = Entry::decode(Bytes::copy_from_slice(bytes)) {
                longest = longest.max(issuance.leaf().map_or(Duration::ZERO, |leaf| lifetime(&leaf)));
            }
            Ok::<_, BackupError>(())
        },
        |_| (),
    )?;
    Ok(longest)
}

pub(super) fn lifetime(leaf: &Leaf) -> Duration {
    (leaf.not_after - leaf.not_before).try_into().unwrap_or_default()
}
