//! The CA's data directory: one process at a time, closed to others, marked with what it is and which version wrote it.
//!
//! ```text
//! kind         development or production; neither kind opens the other's directory
//! version      of this layout; a newer one is refused
//! lock         held while a CA has the directory open
//! keys/        the CA's keys, sealed if the configuration says with what
//! ledger-keys/ the keys that sign the ledger's acts and checkpoints, apart from the CA's
//! authority/   roots and issuing certificates as PEM, for people
//! bundle.pem   the trust bundle as PEM, for agents
//! crl.pem      the CRLs in force as PEM, while there are any
//! ledger/      the store's
//! cluster-keys/ the clusters' public keys as they were fetched last
//! checkpoint   the ledger's newest published checkpoint, apart from the ledger
//! previous/    the logs that the ledger continues, if losses were accepted; read by auditors alone
//! ```

use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use chancery_process::files::{self, FileError};

/// The version of the layout that this program writes.
pub const LAYOUT_VERSION: u32 = 1;

/// What a CA is run for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Real identities.
    Production,
    /// Started with `--dev`: its tokens are signed by a key that lies beside it.
    Development,
}

/// Why a data directory is not used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirectoryError {
    /// Open to others, or the system refuses.
    #[error("data directory: {0}")]
    File(#[from] FileError),
    /// Cannot be read or written.
    #[error("data directory {}: {error}; check that this process may read and write it", path.display())]
    Io {
        /// The directory or a file in it.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// Another process has it.
    #[error("data directory {}: another chancery-ca is using it", .0.display())]
    InUse(PathBuf),
    /// Of the other kind.
    #[error("data directory {} belongs to a {found} CA, and this one is run for {wanted}; give each its own directory", path.display())]
    OtherKind {
        /// The directory.
        path: PathBuf,
        /// What it says.
        found: String,
        /// What was asked for.
        wanted: Kind,
    },
    /// Written by a newer program.
    #[error(
        "data directory {} has layout version {found}, and this program reads up to {LAYOUT_VERSION}; use the newer one that wrote it",
        path.display()
    )]
    Newer {
        /// The directory.
        path: PathBuf,
        /// What it says.
        found: String,
    },
    /// Holds something else.
    #[error("data directory {} is not empty and was not made by chancery-ca; name an empty or a new directory", .0.display())]
    Foreign(PathBuf),
}

/// A data directory that this process has to itself until it is dropped.
#[derive(Debug)]
pub struct DataDirectory {
    path: PathBuf,
    kind: Kind,
    _lock: File,
}

impl DataDirectory {
    /// Opens the directory, or makes and marks a new one.
    ///
    /// # Errors
    /// If it is another's, of the other kind or of a newer version, open to others, in use, or cannot be read or written.
    pub fn open(path: &Path, kind: Kind) -> Result<Self, DirectoryError> {
        files::create_private_dir(path)?;
        let io = |error| DirectoryError::Io { path: path.to_owned(), error };
        let is_new = !path.join("kind").exists();
        if is_new {
            for entry in std::fs::read_dir(path).map_err(io)? {
                // What a start that was interrupted right here left behind is ours.
                let name = entry.map_err(io)?.file_name();
                if name != "lock" && name != "version" && !name.to_string_lossy().starts_with('.') {
                    return Err(DirectoryError::Foreign(path.to_owned()));
                }
            }
        }
        let lock = lock(path)?;
        if is_new {
            files::write_private(&path.join("version"), format!("{LAYOUT_VERSION}\n").as_bytes())?;
            // Last: a directory that has it is complete.
            files::write_private(&path.join("kind"), format!("{kind}\n").as_bytes())?;
        } else {
            check_marks(path, kind)?;
        }
        Ok(Self { path: path.to_owned(), kind, _lock: lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it is for.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where the file key manager keeps its keys.
    pub fn keys(&self) -> PathBuf {
        Self::keys_of(&self.path)
    }

    /// Where the file key manager keeps its keys in the data directory at `path`, for those who need not have it to themselves.
    pub fn keys_of(path: &Path) -> PathBuf {
        path.join("keys")
    }

    /// Where the keys that sign the ledger's acts and checkpoints are kept: apart from the CA's, and not where the ledger lies.
    pub fn ledger_keys(&self) -> PathBuf {
        self.path.join("ledger-keys")
    }

    /// The ledger's newest published checkpoint: not where the ledger lies, so that an old backup of that is recognised.
    pub fn checkpoint(&self) -> PathBuf {
        self.path.join("checkpoint")
    }

    /// Where the clusters' public keys are kept that were fetched.
    pub fn cluster_keys(&self) -> PathBuf {
        self.path.join("cluster-keys")
    }

    /// Where the embedded store lies.
    pub fn ledger(&self) -> PathBuf {
        self.path.join("ledger")
    }

    /// Where the development issuer lies.
    pub fn development(&self) -> PathBuf {
        self.path.join("development")
    }

    /// The trust bundle as PEM, readable by everybody who may enter the directory.
    pub fn bundle(&self) -> PathBuf {
        self.path.join("bundle.pem")
    }

    /// The CRLs as PEM, readable likewise.
    pub fn crl(&self) -> PathBuf {
        self.path.join("crl.pem")
    }

    /// Where roots and issuing certificates lie as PEM.
    pub fn certificates(&self) -> PathBuf {
        self.path.join("authority")
    }
}

fn check_marks(path: &Path, wanted: Kind) -> Result<(), DirectoryError> {
    let read = |name: &str| {
        let path = path.join(name);
        std::fs::read_to_string(&path).map_err(|error| DirectoryError::Io { path, error })
    };
    let found = read("version")?.trim().to_owned();
    if !found.parse::<u32>().is_ok_and(|version| version <= LAYOUT_VERSION) {
        return Err(DirectoryError::Newer { path: path.to_owned(), found });
    }
    let found = read("kind")?.trim().to_owned();
    if found != wanted.to_string() {
        return Err(DirectoryError::OtherKind { path: path.to_owned(), found, wanted });
    }
    Ok(())
}

/// The system releases the lock with the process, however it ends.
fn lock(path: &Path) -> Result<File, DirectoryError> {
    let file = path.join("lock");
    let handle = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&file);
    let io = |error| DirectoryError::Io { path: file.clone(), error };
    let handle = handle.map_err(io)?;
    match handle.try_lock() {
        Ok(()) => Ok(handle),
        Err(TryLockError::WouldBlock) => Err(DirectoryError::InUse(path.to_owned())),
        Err(TryLockError::Error(error)) => Err(io(error)),
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Production => "production",
            Self::Development => "development",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_directory_is_reopened_by_the_same_kind_alone() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("data");
        DataDirectory::open(&path, Kind::Development).unwrap();
        DataDirectory::open(&path, Kind::Development).unwrap();
        let error = DataDirectory::open(&path, Kind::Production).unwrap_err().to_string();
        assert!(error.contains("belongs to a development CA"), "{error}");
    }

    #[test]
    fn a_second_process_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("data");
        let _first = DataDirectory::open(&path, Kind::Production).unwrap();
        assert!(matches!(DataDirectory::open(&path, Kind::Production), Err(DirectoryError::InUse(_))));
    }

    #[test]
    fn a_newer_layout_is_refused_and_named() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("data");
        drop(DataDirectory::open(&path, Kind::Production).unwrap());
        std::fs::write(path.join("version"), "7\n").unwrap();
        let error = DataDirectory::open(&path, Kind::Production).unwrap_err().to_string();
        assert!(error.contains("version 7"), "{error}");
    }

    #[test]
    fn a_directory_with_other_things_in_it_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        std::fs::set_permissions(parent.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        std::fs::write(parent.path().join("thesis.txt"), "precious").unwrap();
        assert!(matches!(DataDirectory::open(parent.path(), Kind::Production), Err(DirectoryError::Foreign(_))));
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_directory_open_to_others_is_refused_with_the_remedy() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("data");
        drop(DataDirectory::open(&path, Kind::Production).unwrap());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o750)).unwrap();
        let error = DataDirectory::open(&path, Kind::Production).unwrap_err().to_string();
        assert!(error.contains("chmod 0700"), "{error}");
    }

    #[test]
    fn a_place_that_cannot_be_written_is_a_clear_error() {
        let parent = tempfile::tempdir().unwrap();
        let file = parent.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = DataDirectory::open(&file.join("data"), Kind::Production).unwrap_err().to_string();
        assert!(error.contains("data directory") && error.contains("file/data"), "{error}");
    }
}
