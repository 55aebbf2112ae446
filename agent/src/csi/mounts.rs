//! Bind mounts: a directory shown, read-only, at a place of the kubelet's.
//!
//! `/proc/self/mountinfo` says what is mounted where. A place that shows the directory already is left alone, so that a kubelet that asks again
//! and again piles nothing up.

use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::mount::{MountFlags, UnmountFlags, mount_bind, mount_remount, unmount};

use super::error::VolumeError;

const MOUNTINFO: &str = "/proc/self/mountinfo";

/// What is mounted in this process's namespace.
#[derive(Debug)]
pub(super) struct Mounts(Vec<u8>);

impl Mounts {
    /// As it is now.
    pub(super) fn read() -> Result<Self, VolumeError> {
        std::fs::read(MOUNTINFO).map(Self).map_err(VolumeError::io(Path::new(MOUNTINFO), "read"))
    }

    /// Whether something is mounted there.
    pub(super) fn has(&self, target: &Path) -> bool {
        self.options(target).next().is_some()
    }

    fn layers(&self, target: &Path) -> usize {
        self.options(target).count()
    }

    /// Whether what is seen there cannot be written to.
    fn is_read_only(&self, target: &Path) -> bool {
        self.options(target).last().is_some_and(|options| options.split(|byte| *byte == b',').any(|option| option == b"ro"))
    }

    /// Of each mount at `target`, the topmost last. `proc_pid_mountinfo(5)`: the fifth field of a line is the mount point, the sixth its
    /// options.
    fn options(&self, target: &Path) -> impl Iterator<Item = &[u8]> {
        let target = target.as_os_str().as_bytes();
        let lines = self.0.split(|byte| *byte == b'\n');
        lines.filter_map(move |line| {
            let mut fields = line.split(|byte| *byte == b' ').skip(4);
            let at = fields.next()?;
            let is_there = if at.contains(&b'\\') { unescaped(at) == target } else { at == target };
            fields.next().filter(|_| is_there)
        })
    }
}

/// Shows `directory` at `target`, which is created if need be. Blocks.
pub(super) fn show(directory: &Path, target: &Path) -> Result<(), VolumeError> {
    match std::fs::create_dir(target) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(VolumeError::io(target, "create")(error)),
        _ => {}
    }
    let mounts = Mounts::read()?;
    let layers = mounts.layers(target);
    if layers == 1 && same(directory, target)? {
        return if mounts.is_read_only(target) { Ok(()) } else { make_read_only(target) };
    }
    detach(target, layers)?;
    mount_bind(directory, target).map_err(|error| VolumeError::io(target, "mount a pod's directory at")(error.into()))?;
    make_read_only(target).inspect_err(|_| {
        // The next call finds it missing, and not writable.
        let _ = detach(target, 1);
    })
}

/// Takes away whatever is mounted at `target`, and `target` itself. That there is nothing is as good. Blocks.
pub(super) fn hide(target: &Path) -> Result<(), VolumeError> {
    detach(target, Mounts::read()?.layers(target))?;
    match std::fs::remove_dir(target) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(VolumeError::io(target, "remove")(error)),
        _ => Ok(()),
    }
}

fn detach(target: &Path, layers: usize) -> Result<(), VolumeError> {
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
fn unescaped(field: &[u8]) -> Vec<u8> {
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
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "22 1 0:21 / / rw,relatime - ext4 /dev/vda rw\n\
        63 60 0:27 /csi/a /var/lib/kubelet/pods/a\\040b/mount rw,nosuid - tmpfs tmpfs rw\n\
        64 63 0:27 /csi/a /var/lib/kubelet/pods/a\\040b/mount ro,relatime shared:7 - tmpfs tmpfs rw,size=1k\n";

    #[test]
    fn mount_points_are_found_with_their_blanks_and_the_topmost_decides() {
        let mounts = Mounts(TABLE.into());
        let target = Path::new("/var/lib/kubelet/pods/a b/mount");
        assert_eq!((mounts.layers(target), mounts.is_read_only(target)), (2, true));
        assert!(mounts.has(Path::new("/")) && !mounts.is_read_only(Path::new("/")));
        assert!(!mounts.has(Path::new("/var/lib/kubelet/pods/a")));
    }

    #[test]
    fn only_octal_escapes_are_undone() {
        for (field, plain) in [("a\\040b", "a b"), ("a\\134", "a\\"), ("a\\9", "a\\9"), ("\\", "\\"), ("a\\0401", "a 1")] {
            assert_eq!(unescaped(field.as_bytes()), plain.as_bytes(), "{field}");
        }
    }
}
