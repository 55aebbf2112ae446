//! Backups of a CA: one file that holds everything that cannot be made anew, and its way back.
//!
//! A backup is made while the CA runs: the newest published checkpoint is taken first, then the log up to what it covers, which never changes
//! again. It is read back before it gets its name: every group of entries is whole, the root of their tree is the checkpoint's, and every
//! member has the digest that the last one, `SHA256SUMS`, says. It is a tar file whose members lie as they do in a data directory:
//!
//! ```text
//! backup.json                       what it is of, and when it was made
//! kind, version, checkpoint, ledger/version, ledger/checkpoint, ledger/log/
//! previous/                         the logs that this one continues, if losses were accepted
//! keys.age                          if it was asked for: `keys/`, `ledger-keys/`, `development/`, encrypted (age) to a recipient
//! SHA256SUMS                        as `sha256sum -c` reads it
//! ```
//!
//! No key is in it that is not encrypted. What is left out is made anew at the next start: index, tree, catalogue, and the copies of
//! certificates, which can be newer than the checkpoint (early backups have them, and they are not restored). Restoring writes into an
//! empty place alone, and refuses a backup that ends before a newer checkpoint that is known. Such a log is never continued: [`loss`] begins a
//! new one instead, which says so. One that is continued may lack entries all the same, and the CA records that ([`restored`]).

mod archive;
mod contents;
mod create;
mod keys;
mod last;
mod loss;
mod restore;
mod restored;
#[cfg(test)]
mod tests;
mod verify;

use std::path::{Path, PathBuf};

use chancery_process::files::FileError;
use serde::{Deserialize, Serialize};

pub use self::create::{Backup, Written, create};
pub use self::last::{LastBackup, last_backup};
pub use self::loss::{AcceptLoss, NewLog};
pub use self::restore::{Restore, Restored, restore};
pub use self::restored::Restoration;
pub use self::verify::{Verified, verify};
use crate::keys::KeyError;
use crate::ledger::{LedgerError, PublishError};
use crate::store::StoreError;

/// The format of backups that this program writes, and the newest that it reads.
pub const FORMAT: u32 = 2;

const INFO: &str = "backup.json";
const SUMS: &str = "SHA256SUMS";
const KEYS: &str = "keys.age";
const CHECKPOINT: &str = "checkpoint";
const KIND: &str = "kind";
const FLOOR: &str = "ledger/checkpoint";
const LOG: &str = "ledger/log/";
/// Copies of certificates, which early backups have.
const OLD_CERTIFICATES: &str = "authority/";
const OLD_BUNDLE: &str = "bundle.pem";
const PREVIOUS: &str = "previous/";
const LEDGER_KEYS: &str = "ledger-keys";
/// Of a data directory. The first two must be there.
const SMALL_FILES: [&str; 3] = [KIND, "version", "ledger/version"];

/// What a backup says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// Of the backup.
    pub format: u32,
    /// The version that made it.
    pub chancery: String,
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    pub made_at: time::OffsetDateTime,
    /// `production` or `development`.
    pub kind: String,
    /// Of the ledger.
    pub origin: String,
    /// How many the ledger has.
    pub entries: u64,
    /// How many files the log has.
    pub segments: usize,
    /// Whether the keys are in it, encrypted.
    pub keys: bool,
}

/// Why there is no backup, or nothing was restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackupError {
    /// The system refuses.
    #[error("cannot {action} {}: {error}", path.display())]
    Io {
        /// What was to be done.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// A private file is open to others, or cannot be written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The log is damaged, in the data directory or in the backup.
    #[error("{0}")]
    Log(#[from] StoreError),
    /// It is not where a CA keeps its data.
    #[error("{} is no data directory of a CA that was started: {problem}", path.display())]
    NotData {
        /// What was named.
        path: PathBuf,
        /// What is missing.
        problem: String,
    },
    /// A name that is taken.
    #[error("{} is there already; name another file, or move it away", .0.display())]
    Exists(PathBuf),
    /// Not who the keys can be encrypted to. Not shown: it may be the other half, by mistake.
    #[error("the recipient is no public key of age (age1…); `age-keygen` makes one, and prints it")]
    Recipient,
    /// The keys cannot be encrypted or decrypted.
    #[error("the keys in the backup: {0}")]
    Keys(String),
    /// It is no backup, or not as it was made.
    #[error("the backup {} is not intact: {problem}. Use another one", path.display())]
    Damaged {
        /// The backup.
        path: PathBuf,
        /// What is wrong, and where.
        problem: String,
    },
    /// Its entries fit themselves, and are not those that its checkpoint was signed for.
    #[error(
        "the backup {} is not intact: its entries do not lead to its checkpoint: at least one of the entries 0 to {} is not what was signed. \
         Use another one",
        path.display(),
        entries.saturating_sub(1)
    )]
    OtherEntries {
        /// The backup.
        path: PathBuf,
        /// How many it has.
        entries: u64,
        /// The checkpoint, signed.
        note: String,
    },
    /// A newer program made it.
    #[error("the backup {} has format {found}, and this program reads up to {FORMAT}; use the newer one that made it", path.display())]
    Newer {
        /// The backup.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// Something is there already.
    #[error("{} is not empty; restore into a new or an empty directory, and keep what is there until all is well", .0.display())]
    NotEmpty(PathBuf),
    /// A checkpoint that was given cannot be used.
    #[error("the checkpoint {}: {problem}", path.display())]
    Checkpoint {
        /// Its file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The backup ends before a checkpoint that is known.
    #[error(
        "the backup has {entries} entries, and the checkpoint {} has {known}: the entries {entries} to {} would be lost, and agents and auditors \
         would notice. Restore a newer backup; if there is none, `--accept-loss --reason …` begins a new ledger, which says what is missing",
        path.display(),
        known - 1
    )]
    EntriesMissing {
        /// In the backup.
        entries: u64,
        /// In the checkpoint.
        known: u64,
        /// Of the checkpoint.
        path: PathBuf,
    },
    /// What a new log is signed with is not there.
    #[error("a new ledger cannot be begun without the keys of the old one's acts and checkpoints: {0}")]
    LedgerKeys(String),
    /// The old log cannot be read, or the new one not be written.
    #[error("no new ledger was begun: {0}")]
    NewLog(String),
}

impl From<LedgerError> for BackupError {
    fn from(error: LedgerError) -> Self {
        Self::NewLog(error.to_string())
    }
}

impl From<PublishError> for BackupError {
    fn from(error: PublishError) -> Self {
        Self::NewLog(error.to_string())
    }
}

impl From<KeyError> for BackupError {
    fn from(error: KeyError) -> Self {
        Self::LedgerKeys(error.to_string())
    }
}

impl BackupError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |error| Self::Io { action, path, error }
    }
}
