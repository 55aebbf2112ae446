//! A socket of ours, that somebody else may have removed meanwhile.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use chancery_process::files::{FileError, bind_socket};
use tokio::net::UnixListener;

/// A socket's file, as it was when it was made.
#[derive(Clone, Debug)]
pub(super) struct OpenSocket {
    path: PathBuf,
    inode: Option<(u64, u64)>,
}

impl OpenSocket {
    /// Listens. A socket that a dead process left behind is replaced, a living one's is refused.
    pub(super) fn bind(path: PathBuf, mode: u32) -> Result<(Self, UnixListener), FileError> {
        let listener = bind_socket(&path, mode)?;
        Ok((Self { inode: inode(&path), path }, listener))
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the file is still the one that was made.
    pub(super) fn is_there(&self) -> bool {
        self.inode.is_some() && inode(&self.path) == self.inode
    }

    /// Removes it, unless it is another's by now. A client that finds no socket is told more than one that finds a dead one.
    pub(super) fn remove(&self) {
        if self.is_there()
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::debug!(path = %self.path.display(), %error, "the socket was not removed");
        }
    }
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|found| (found.dev(), found.ino()))
}
