//! Bind mounts: a directory shown, read-only, at a place of the kubelet's.
//!
//! `/proc/self/mountinfo` says what is mounted where. A place that shows the directory already is left alone, so that a kubelet that asks again
//! and again piles nothing up.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount_bind, mount_remount, unmount};

use super::error::VolumeError;

const MOUNTINFO: &str = "/proc/self/mountinfo";
/// Nothing of ours is ever mounted over itself so often.
const MOST_LAYERS: usize = 1024;

/// What is mounted in this process's namespace.
#[derive(Debug)]
pub(super) struct Mounts(Vec<Mount>);

#[derive(Debug)]
struct Mount {
    at: PathBuf,
    read_only: bool,
}

impl Mounts {
    /// As it is now.
    pub(super) fn read() -> Result<Self, VolumeError> {
        let text = std::fs::read(MOUNTINFO).map_err(VolumeError::io(Path::new(MOUNTINFO), "read"))?;
        Ok(Self::parse(&text))
    }

    /// `proc_pid_mountinfo(5)`: the fifth field of a line is the mount point, the sixth its options.
    fn parse(text: &[u8]) -> Self {
        let mount = |line: &[u8]| {
            let mut fields = line.split(|byte| *byte == b' ').skip(4);
            let at = unescape(fields.next()?);
            let read_only = fields.next()?.split(|byte| *byte == b',').any(|option| option == b"ro");
            Some(Mount { at: PathBuf::from(at), read_only })
        };
        Self(text.split(|byte| *byte == b'\n').filter_map(mount).collect())
    }

    /// Whether something is mounted there.
    pub(super) fn has(&self, target: &Path) -> bool {
        self.layers(target) > 0
    }

    fn layers(&self, target: &Path) -> usize {
        self.0.iter().filter(|mount| mount.at == target).count()
    }

    /// Whether what is seen there cannot be written to.
    fn is_read_only(&self, target: &Path) -> bool {
        self.0.iter().rfind(|mount| mount.at == target).is_some_and(|mount| mount.read_only)
    }
}

/// Shows `directory` at `target`, which is created if need be. Blocks.
pub(super) fn show(directory: &Path, target: &Path) -> Result<(), VolumeError> {
    match std::fs::create_dir(target) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(VolumeError::io(target, "create")(error)),
        _ => {}
    }
    let mounts = Mounts::read()?;
    if mounts.layers(target) == 1 && same(directory, target)? {
        return if mounts.is_read_only(target) { Ok(()) } else { make_read_only(target) };
    }
    detach(target)?;
    mount_bind(directory, target).map_err(|error| VolumeError::io(target, "mount a pod's directory at")(error.into()))?;
    make_read_only(target).inspect_err(|_| {
        // The next call finds it missing, and not writable.
        let _ = detach(target);
    })
}

/// Takes away whatever is mounted at `target`, and `target` itself. That there is nothing is as good. Blocks.
pub(super) fn hide(target: &Path) -> Result<(), VolumeError> {
    detach(target)?;
    match std::fs::remove_dir(target) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(VolumeError::io(target, "remove")(error)),
        _ => Ok(()),
    }
}

fn detach(target: &Path) -> Result<(), VolumeError> {
    let layers = Mounts::read()?.layers(target).min(MOST_LAYERS);
    for _ in 0..layers {
        // Detached even where it is in use: its pod is gone, or is about to get the right one.
        unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).map_err(|error| VolumeError::io(target, "unmount")(error.into()))?;
    }
    Ok(())
}

fn make_read_only(target: &Path) -> Result<(), VolumeError> {
    let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount_remount(target, flags, "").map_err(|error| VolumeError::io(target, "make read-only")(error.into()))
}

/// Whether both lead to the same directory.
fn same(directory: &Path, target: &Path) -> Result<bool, VolumeError> {
    let inode = |path: &Path| -> Result<_, VolumeError> {
        let found = std::fs::metadata(path).map_err(VolumeError::io(path, "look at"))?;
        Ok((found.dev(), found.ino()))
    };
    Ok(inode(directory)? == inode(target)?)
}

/// Blank, tab, newline and backslash are written as a backslash and three octal digits.
fn unescape(field: &[u8]) -> OsString {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| *first == b'\\').and_then(|digits| {
            let text = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(text, 8).ok()
        });
        plain.push(octal.unwrap_or(*first));
        rest = if octal.is_some() { &after[3..] } else { after };
    }
    OsString::from_vec(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "22 1 0:21 / / rw,relatime - ext4 /dev/vda rw\n\
        63 60 0:27 /csi/a /var/lib/kubelet/pods/a\\040b/mount rw,nosuid - tmpfs tmpfs rw\n\
        64 63 0:27 /csi/a /var/lib/kubelet/pods/a\\040b/mount ro,relatime shared:7 - tmpfs tmpfs rw,size=1k\n";

    #[test]
    fn mount_points_are_found_with_their_blanks_and_the_topmost_decides() {
        let mounts = Mounts::parse(TABLE.as_bytes());
        let target = Path::new("/var/lib/kubelet/pods/a b/mount");
        assert_eq!((mounts.layers(target), mounts.is_read_only(target)), (2, true));
        assert!(mounts.has(Path::new("/")) && !mounts.is_read_only(Path::new("/")));
        assert!(!mounts.has(Path::new("/var/lib/kubelet/pods/a")));
    }

    #[test]
    fn only_octal_escapes_are_undone() {
        for (field, plain) in [("a\\040b", "a b"), ("a\\134", "a\\"), ("a\\9", "a\\9"), ("\\", "\\"), ("a\\0401", "a 1")] {
            assert_eq!(unescape(field.as_bytes()), OsString::from(plain), "{field}");
        }
    }
}
