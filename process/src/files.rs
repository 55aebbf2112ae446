//! Files and sockets that only their owner may touch: written whole and durably, refused when they are open to others.

use std::fs::{DirBuilder, File, Metadata, OpenOptions, Permissions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use tokio::net::UnixListener;
use zeroize::Zeroizing;

/// Private files are keys, tokens and small states; larger ones are refused unread.
const MAX_PRIVATE_BYTES: u64 = 64 << 20;

/// `f_type` of file systems that live in memory: `statfs(2)`.
const TMPFS_MAGIC: u64 = 0x0102_1994;
const RAMFS_MAGIC: u64 = 0x8584_58f6;

/// A private file, directory or socket that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The system refused.
    #[error("{}: cannot {action}: {error}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// What the system said.
        error: std::io::Error,
    },
    /// Group or others have access.
    #[error("{}: mode {mode:04o} lets others in; run `chmod {wanted:04o} {}`", path.display(), path.display())]
    TooWide {
        /// The file or directory.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
        /// The widest permissions that are accepted.
        wanted: u32,
    },
    /// Somebody else owns it, and could widen it again.
    #[error("{}: belongs to user {owner}, this process runs as user {user}; run `chown {user} {}`", path.display(), path.display())]
    Owner {
        /// The file or directory.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Who this process runs as.
        user: u32,
    },
    /// Not a file, or not a directory.
    #[error("{}: is not a {expected}", path.display())]
    Kind {
        /// What was found there.
        path: PathBuf,
        /// What should be there.
        expected: &'static str,
    },
    /// Larger than anything this project writes.
    #[error("{}: larger than {MAX_PRIVATE_BYTES} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// A process accepts connections on this socket.
    #[error("{}: another process is listening on this socket; stop it or configure another path", path.display())]
    SocketInUse {
        /// The socket.
        path: PathBuf,
    },
}

impl FileError {
    fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |error| Self::Io { path, action, error }
    }
}

/// Replaces the file at `path` with `bytes`, mode 0600. After a crash the old content is there or the new, whole; once this has returned,
/// the new. One writer at a time per path.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let directory = parent_of(path);
    // A fixed name, so that what a crash left behind is replaced instead of piling up.
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".new");
    let temporary = directory.join(name);
    match std::fs::remove_file(&temporary) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(FileError::io(&temporary, "remove")(error)),
        _ => {}
    }
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary).map_err(FileError::io(&temporary, "create"))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(FileError::io(&temporary, "write"))?;
    std::fs::rename(&temporary, path).map_err(FileError::io(path, "replace"))?;
    sync_directory(directory)
}

/// Makes the creation, renaming or removal of files in `directory` durable.
pub fn sync_directory(directory: &Path) -> Result<(), FileError> {
    File::open(directory).and_then(|handle| handle.sync_all()).map_err(FileError::io(directory, "sync"))
}

/// Reads a private file, refused if others have access. The buffer is zeroized when dropped.
pub fn read_private(path: &Path) -> Result<Zeroizing<Vec<u8>>, FileError> {
    read_checked(path, |metadata| check(path, metadata, "file"))
}

/// Like [`read_private`], for a secret that the system hands to this process: root's own, and readable by a group as well, is how systemd
/// hands over credentials and Kubernetes secrets.
pub fn read_handed_over(path: &Path) -> Result<Zeroizing<Vec<u8>>, FileError> {
    let is_handed_over = |metadata: &Metadata| metadata.is_file() && metadata.mode() & 0o7777 == 0o440 && metadata.uid() == 0;
    read_checked(path, |metadata| if is_handed_over(metadata) { Ok(()) } else { check(path, metadata, "file") })
}

fn read_checked(path: &Path, check: impl FnOnce(&Metadata) -> Result<(), FileError>) -> Result<Zeroizing<Vec<u8>>, FileError> {
    // Without O_NONBLOCK a named pipe in the file's place would hang the process.
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(FileError::io(path, "open"))?;
    let metadata = file.metadata().map_err(FileError::io(path, "read"))?;
    check(&metadata)?;
    if metadata.len() > MAX_PRIVATE_BYTES {
        return Err(FileError::TooLarge { path: path.to_owned() });
    }
    // Room for all of it, so that the buffer never moves and leaves a copy behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(metadata.len()).unwrap_or_default() + 1));
    file.take(MAX_PRIVATE_BYTES).read_to_end(&mut bytes).map_err(FileError::io(path, "read"))?;
    Ok(bytes)
}

/// Refuses a file that anybody but this process's user may read or write.
pub fn check_private_file(path: &Path) -> Result<(), FileError> {
    check(path, &std::fs::metadata(path).map_err(FileError::io(path, "read"))?, "file")
}

/// Refuses a directory that anybody but this process's user may enter.
pub fn check_private_dir(path: &Path) -> Result<(), FileError> {
    check(path, &std::fs::metadata(path).map_err(FileError::io(path, "read"))?, "directory")
}

/// Creates a directory (and those above it) with mode 0700, or checks the one that exists.
pub fn create_private_dir(path: &Path) -> Result<(), FileError> {
    if path.exists() {
        return check_private_dir(path);
    }
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(FileError::io(path, "create"))?;
    sync_directory(parent_of(path))
}

/// Does what is written at `path` (or, while that does not exist, in the directory above it) stay in memory?
pub fn is_memory_backed(path: &Path) -> Result<bool, FileError> {
    let existing = path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("."));
    let statistics = rustix::fs::statfs(existing).map_err(|error| FileError::io(existing, "ask statfs about")(error.into()))?;
    let magic = u64::try_from(statistics.f_type).unwrap_or_default();
    Ok(magic == TMPFS_MAGIC || magic == RAMFS_MAGIC)
}

/// Listens on a Unix socket with these permissions. A socket that a dead process left behind is replaced; a living one's is refused.
/// Must be called within a tokio runtime.
pub fn bind_socket(path: &Path, mode: u32) -> Result<UnixListener, FileError> {
    // Connecting to a plain file is refused just as connecting to a dead socket is; only a socket may be removed.
    if std::fs::symlink_metadata(path).is_ok_and(|found| !found.file_type().is_socket()) {
        return Err(FileError::Kind { path: path.to_owned(), expected: "socket" });
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => return Err(FileError::SocketInUse { path: path.to_owned() }),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(FileError::io(path, "remove the stale socket"))?;
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(FileError::io(path, "use as a socket")(error)),
    }
    let listener = UnixListener::bind(path).map_err(FileError::io(path, "listen on"))?;
    std::fs::set_permissions(path, Permissions::from_mode(mode)).map_err(FileError::io(path, "set the permissions of"))?;
    Ok(listener)
}

fn check(path: &Path, metadata: &Metadata, expected: &'static str) -> Result<(), FileError> {
    let (fits, wanted) = if expected == "directory" { (metadata.is_dir(), 0o700) } else { (metadata.is_file(), 0o600) };
    if !fits {
        return Err(FileError::Kind { path: path.to_owned(), expected });
    }
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(FileError::TooWide { path: path.to_owned(), mode, wanted });
    }
    let (owner, user) = (metadata.uid(), rustix::process::geteuid().as_raw());
    if owner != user && owner != 0 {
        return Err(FileError::Owner { path: path.to_owned(), owner, user });
    }
    Ok(())
}

fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn a_private_file_is_replaced_whole_and_is_for_its_owner() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key.pem");
        std::fs::write(directory.path().join(".key.pem.new"), "left by a crash").unwrap();
        write_private(&path, b"first").unwrap();
        write_private(&path, b"second").unwrap();
        assert_eq!(mode(&path), 0o600);
        assert_eq!(read_private(&path).unwrap().as_slice(), b"second");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_others_may_read_is_refused_with_the_remedy() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key.pem");
        write_private(&path, b"key").unwrap();
        for wide in [0o640, 0o604, 0o620, 0o666] {
            std::fs::set_permissions(&path, Permissions::from_mode(wide)).unwrap();
            assert!(check_private_file(&path).is_err());
            let error = read_private(&path).unwrap_err().to_string();
            assert!(error.contains(&format!("mode {wide:04o}")) && error.contains("chmod 0600"), "{error}");
        }
        std::fs::set_permissions(&path, Permissions::from_mode(0o400)).unwrap();
        check_private_file(&path).unwrap();
    }

    #[test]
    fn a_secret_that_root_hands_to_a_group_is_read_and_any_wider_one_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("passphrase");
        write_private(&path, b"secret").unwrap();
        let is_root = std::fs::metadata(&path).unwrap().uid() == 0;
        for (mode, fits) in [(0o400, true), (0o600, true), (0o440, is_root), (0o640, false), (0o444, false), (0o460, false)] {
            std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            assert_eq!(read_handed_over(&path).is_ok(), fits, "{mode:o}");
        }
    }

    #[test]
    fn a_directory_is_created_private_and_a_wide_one_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b");
        create_private_dir(&path).unwrap();
        create_private_dir(&path).unwrap();
        assert_eq!(mode(&path), 0o700);
        std::fs::set_permissions(&path, Permissions::from_mode(0o750)).unwrap();
        let error = create_private_dir(&path).unwrap_err().to_string();
        assert!(error.contains("chmod 0700"), "{error}");
    }

    #[test]
    fn a_pipe_or_a_directory_in_a_files_place_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        assert!(matches!(read_private(directory.path()), Err(FileError::Kind { expected: "file", .. })));
        let pipe = directory.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
        assert!(matches!(read_private(&pipe), Err(FileError::Kind { expected: "file", .. })));
    }

    #[test]
    fn memory_is_told_from_disk() {
        assert!(is_memory_backed(Path::new("/dev/shm/not/there/yet")).unwrap());
        assert!(!is_memory_backed(Path::new("/proc/self/stat")).unwrap());
    }

    #[tokio::test]
    async fn a_dead_processes_socket_is_replaced_and_a_living_ones_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sds.sock");
        let listener = bind_socket(&path, 0o660).unwrap();
        assert_eq!(mode(&path), 0o660);
        assert!(matches!(bind_socket(&path, 0o600), Err(FileError::SocketInUse { .. })));
        drop(listener);
        bind_socket(&path, 0o600).unwrap();
        assert_eq!(mode(&path), 0o600);
    }

    #[tokio::test]
    async fn a_file_in_a_sockets_place_is_not_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sds.sock");
        std::fs::write(&path, "precious").unwrap();
        assert!(bind_socket(&path, 0o600).is_err());
        assert!(path.exists());
    }
}
