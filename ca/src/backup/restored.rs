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
use crate::ledger::acts::Change;
use crate::ledger::{Body, Entry, Leaf};
use crate::store::embedded::audit::Audit;

/// In a data directory.
const NAME: &str = "restored";
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

    /// What is to be recorded, and why.
    pub fn act(&self) -> (Change, String) {
        let roots_kept_until = self.restored_at + Duration::from_secs(self.longest_lifetime_s);
        let why = format!("restored at {} from the backup made at {}", self.restored_at, self.made_at);
        (Change::Restored { entries: self.entries, roots_kept_until }, why)
    }

    /// It is recorded. A CA that is killed before this records it twice, which changes nothing.
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
