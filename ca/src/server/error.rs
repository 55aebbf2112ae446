//! Why a CA does not start, or ended.

use chancery_process::files::FileError;
use chancery_process::http::BindError;
use chancery_process::watch::WatchError;

use crate::attestation::ClusterSettingsError;
use crate::attestation::development::DevelopmentError;
use crate::authority::{AuthorityError, DirectoryError};
use crate::backup::BackupError;
use crate::issuance::policy::PolicyError;
use crate::keys::KeyError;
use crate::ledger::{LedgerError, PublishError};
use crate::server::problem::KEEP_AND_RESTORE;
use crate::store::StoreError;

/// Why a CA does not start, or ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// A port is taken.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The admin socket.
    #[error("admin socket: {0}")]
    Socket(#[from] FileError),
    /// The data directory.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The development issuer.
    #[error("the development issuer: {0}")]
    Development(#[from] DevelopmentError),
    /// The CA's keys.
    #[error("the CA's keys: {0}")]
    Key(#[from] KeyError),
    /// The store.
    #[error("{0}{next}", next = next_step(.0))]
    Store(#[from] StoreError),
    /// The ledger.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The ledger's checkpoints, or a ledger that does not continue them.
    #[error(transparent)]
    Checkpoint(#[from] PublishError),
    /// That the data directory was restored.
    #[error(transparent)]
    Restoration(#[from] BackupError),
    /// The CA's own certificates.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// A cluster.
    #[error(transparent)]
    Cluster(#[from] ClusterSettingsError),
    /// The policy.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// Files cannot be watched.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// The TLS configuration.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// Nothing more can be recorded.
    #[error("the ledger failed, so that nothing more could be issued: {0}")]
    LedgerFailed(StoreError),
    /// A task ended by a panic.
    #[error("a part of the CA ended unexpectedly: {0}; please report this")]
    Task(String),
}

/// For whoever reads it where nothing else runs.
fn next_step(error: &StoreError) -> String {
    match error {
        StoreError::Damaged { .. } => format!("; {KEEP_AND_RESTORE}"),
        _ => String::new(),
    }
}
