//! Noticing that files have changed: a configuration, the keys and bundles that it names, a token.
//!
//! Three sources lead to a check: the system's notifications on the files' directories (which see Kubernetes' `..data` symlink being
//! swapped, where a watch on the file itself sees nothing), SIGHUP, and a look every 30 seconds, for file systems without notifications.
//! A change is announced once it has settled, so that a file that is being written is not read half-way.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;

const POLL: Duration = Duration::from_secs(30);
/// A change must have been followed by this much quiet.
const SETTLE: Duration = Duration::from_millis(100);
/// A file that never comes to rest is announced after this many settling times.
const MAX_SETTLE_ROUNDS: usize = 20;

/// The system offers no way to watch files or signals.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// No notifications: usually a limit of the system.
    #[error("cannot watch files: {0}; raise fs.inotify.max_user_instances")]
    Notify(#[from] notify::Error),
    /// No SIGHUP.
    #[error("cannot listen for SIGHUP: {0}")]
    Signal(#[from] std::io::Error),
}

/// Watches a set of files, each of which may be absent, a symlink, or replaced as a whole.
pub struct FileWatch {
    files: Vec<PathBuf>,
    seen: Vec<Option<Fingerprint>>,
    directories: BTreeSet<PathBuf>,
    watcher: RecommendedWatcher,
    event: Arc<Notify>,
    hangup: Signal,
    poll: Duration,
}

/// What identifies a file's content without reading it; follows symlinks.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Fingerprint {
    device: u64,
    inode: u64,
    length: u64,
    modified: (i64, i64),
}

impl FileWatch {
    /// Starts watching; what the files are now counts as seen. Must be called within a tokio runtime.
    pub fn new(files: impl IntoIterator<Item = PathBuf>) -> Result<Self, WatchError> {
        Self::with_poll(files, POLL)
    }

    fn with_poll(files: impl IntoIterator<Item = PathBuf>, poll: Duration) -> Result<Self, WatchError> {
        let event = Arc::new(Notify::new());
        let wake = event.clone();
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading a file is an event too; reacting to it would keep the watch busy with its own owner.
            if !matches!(event, Ok(notify::Event { kind: EventKind::Access(_), .. })) {
                wake.notify_one();
            }
        })?;
        let hangup = signal(SignalKind::hangup())?;
        let mut watch = Self { files: Vec::new(), seen: Vec::new(), directories: BTreeSet::new(), watcher, event, hangup, poll };
        watch.replace(files);
        Ok(watch)
    }

    /// Watches these files instead. What is seen of those that stay is kept; new ones count as seen as they are now.
    pub fn replace(&mut self, files: impl IntoIterator<Item = PathBuf>) {
        let mut seen = Vec::new();
        let mut new = Vec::new();
        for file in files {
            let known = self.files.iter().position(|known| *known == file);
            seen.push(known.map_or_else(|| fingerprint(&file), |index| self.seen[index]));
            new.push(file);
        }
        (self.files, self.seen) = (new, seen);
        self.watch_directories();
    }

    /// Returns when a file has changed since it was last announced, or after SIGHUP. Safe to cancel: nothing is lost.
    pub async fn changed(&mut self) {
        loop {
            if self.fingerprints() != self.seen {
                self.settle().await;
                return;
            }
            tokio::select! {
                () = self.event.notified() => {}
                () = tokio::time::sleep(self.poll) => {}
                hangup = self.hangup.recv() => if hangup.is_some() {
                    self.settle().await;
                    return;
                },
            }
        }
    }

    async fn settle(&mut self) {
        let mut last = self.fingerprints();
        for _ in 0..MAX_SETTLE_ROUNDS {
            tokio::time::sleep(SETTLE).await;
            let now = self.fingerprints();
            if now == last {
                break;
            }
            last = now;
        }
        self.seen = last;
        // A directory may have appeared, or a symlink may lead elsewhere now.
        self.watch_directories();
    }

    fn fingerprints(&self) -> Vec<Option<Fingerprint>> {
        self.files.iter().map(|file| fingerprint(file)).collect()
    }

    fn watch_directories(&mut self) {
        let wanted: BTreeSet<PathBuf> = self.files.iter().flat_map(|file| directories_of(file)).collect();
        for gone in self.directories.difference(&wanted) {
            // It may have been deleted, and then there is nothing to undo.
            let _ = self.watcher.unwatch(gone);
        }
        let mut watched = BTreeSet::new();
        for directory in wanted {
            if self.directories.contains(&directory) {
                watched.insert(directory);
                continue;
            }
            match self.watcher.watch(&directory, RecursiveMode::NonRecursive) {
                Ok(()) => {
                    watched.insert(directory);
                }
                Err(error) => {
                    tracing::warn!(directory = %directory.display(), %error, "no notifications for this directory; looking every 30 s");
                }
            }
        }
        self.directories = watched;
    }
}

/// Where the path's last component can be replaced: beside it, and beside what it leads to.
fn directories_of(file: &Path) -> Vec<PathBuf> {
    let parent = |path: &Path| match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => PathBuf::from("."),
        Some(parent) => parent.to_owned(),
        None => PathBuf::from("/"),
    };
    let mut directories = vec![parent(file)];
    if let Ok(target) = file.canonicalize() {
        directories.push(parent(&target));
    }
    directories
}

fn fingerprint(file: &Path) -> Option<Fingerprint> {
    let metadata = std::fs::metadata(file).ok()?;
    Some(Fingerprint {
        device: metadata.dev(),
        inode: metadata.ino(),
        length: metadata.len(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use tokio::time::timeout;

    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    async fn announced(watch: &mut FileWatch) -> bool {
        timeout(SOON, watch.changed()).await.is_ok()
    }

    async fn quiet(watch: &mut FileWatch) -> bool {
        timeout(Duration::from_millis(300), watch.changed()).await.is_err()
    }

    #[tokio::test]
    async fn a_rewritten_file_is_announced_once() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("ca.toml");
        fs::write(&file, "a").unwrap();
        let mut watch = FileWatch::new([file.clone()]).unwrap();
        assert!(quiet(&mut watch).await);
        fs::write(&file, "bb").unwrap();
        assert!(announced(&mut watch).await);
        assert!(quiet(&mut watch).await);
    }

    #[tokio::test]
    async fn a_swap_of_the_kubelets_data_symlink_is_announced() {
        let volume = tempfile::tempdir().unwrap();
        let at = |name: &str| volume.path().join(name);
        for (version, token) in [("..1", "old"), ("..2", "new")] {
            fs::create_dir(at(version)).unwrap();
            fs::write(at(version).join("token"), token).unwrap();
        }
        symlink("..1", at("..data")).unwrap();
        symlink("..data/token", at("token")).unwrap();
        let mut watch = FileWatch::new([at("token")]).unwrap();
        symlink("..2", at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        assert!(announced(&mut watch).await);
        assert_eq!(fs::read_to_string(at("token")).unwrap(), "new");
    }

    #[tokio::test]
    async fn a_file_that_appears_and_one_that_goes_are_announced() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("later");
        let mut watch = FileWatch::new([file.clone()]).unwrap();
        fs::write(&file, "now").unwrap();
        assert!(announced(&mut watch).await);
        fs::remove_file(&file).unwrap();
        assert!(announced(&mut watch).await);
    }

    #[tokio::test]
    async fn a_file_in_a_directory_that_appears_later_is_found_by_looking() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("sub/later");
        let mut watch = FileWatch::with_poll([file.clone()], Duration::from_millis(50)).unwrap();
        fs::create_dir(directory.path().join("sub")).unwrap();
        fs::write(&file, "now").unwrap();
        assert!(announced(&mut watch).await);
    }

    #[tokio::test]
    async fn a_change_during_a_cancelled_wait_is_not_lost() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "a").unwrap();
        let mut watch = FileWatch::new([file.clone()]).unwrap();
        fs::write(&file, "bb").unwrap();
        assert!(timeout(Duration::from_millis(20), watch.changed()).await.is_err());
        assert!(announced(&mut watch).await);
    }

    #[tokio::test]
    async fn the_set_of_files_can_be_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let (old, new) = (directory.path().join("old"), directory.path().join("new"));
        let mut watch = FileWatch::new([old.clone()]).unwrap();
        watch.replace([new.clone()]);
        fs::write(&old, "a").unwrap();
        assert!(quiet(&mut watch).await);
        fs::write(&new, "a").unwrap();
        assert!(announced(&mut watch).await);
    }

    #[tokio::test]
    async fn a_hangup_is_announced_though_nothing_changed() {
        let mut watch = FileWatch::new([]).unwrap();
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::HUP).unwrap();
        assert!(announced(&mut watch).await);
    }
}
