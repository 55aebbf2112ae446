//! Sockets of ours, that somebody else may have removed meanwhile.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

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

/// How often a door is looked at.
const LOOKED_AT: Duration = Duration::from_secs(1);

/// Where the kubelet finds the plugin: a socket that is made again when somebody has removed it.
#[derive(Debug)]
pub(super) struct Door {
    path: PathBuf,
    mode: u32,
    state: Mutex<DoorState>,
}

#[derive(Debug, Default)]
struct DoorState {
    /// None before it is opened for the first time.
    socket: Option<OpenSocket>,
    /// Why it could not be made again.
    problem: Option<String>,
}

impl Door {
    /// One that is closed yet.
    pub(super) fn new(path: PathBuf, mode: u32) -> Self {
        Self { path, mode, state: Mutex::default() }
    }

    /// Listens, as [`OpenSocket::bind`].
    pub(super) fn open(&self) -> Result<UnixListener, FileError> {
        let (socket, listener) = OpenSocket::bind(self.path.clone(), self.mode)?;
        *self.state() = DoorState { socket: Some(socket), problem: None };
        Ok(listener)
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What is wrong with it, once it has been opened; a sentence.
    pub(super) fn problem(&self) -> Option<String> {
        let state = self.state();
        let path = self.path.display();
        let DoorState { socket, problem } = &*state;
        let lost = socket.as_ref().is_some_and(|socket| !socket.is_there());
        let why = problem.as_ref().map_or_else(|| "it is made again".to_owned(), |problem| format!("it cannot be made again: {problem}"));
        lost.then(|| format!("{path}: the CSI plugin's socket was removed or replaced; {why}"))
    }

    /// Waits until the socket is not there any more, and listens on another one in its place, as soon as that can be.
    pub(super) async fn open_again(&self) -> UnixListener {
        loop {
            tokio::time::sleep(LOOKED_AT).await;
            if self.problem().is_none() {
                continue;
            }
            match self.open() {
                Ok(listener) => {
                    tracing::warn!(path = %self.path.display(), "the CSI plugin's socket was removed by somebody; it is made again");
                    return listener;
                }
                Err(error) => self.state().problem = Some(error.to_string()),
            }
        }
    }

    /// As [`OpenSocket::remove`].
    pub(super) fn close(&self) {
        self.state().socket.iter().for_each(OpenSocket::remove);
    }

    fn state(&self) -> MutexGuard<'_, DoorState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|found| (found.dev(), found.ino()))
}
