//! Bind mounts: a pod's directory shown, read-only, at a place of the kubelet's.
//!
//! `/proc/self/mountinfo` says what is mounted where. A place that shows the directory already is left alone, so that a kubelet that asks again
//! and again piles nothing up.

use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use chancery_process::files;
use rustix::fs::{StatVfsMountFlags, statvfs};
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
        self.layers(target) > 0
    }

    /// How many mounts lie over each other there. `proc_pid_mountinfo(5)`: the fifth field of a line is the mount point, without symbolic
    /// links.
    fn layers(&self, target: &Path) -> usize {
        let target = resolved(target);
        let target = target.as_os_str().as_bytes();
        let points = self.0.split(|byte| *byte == b'\n').filter_map(|line| line.split(|byte| *byte == b' ').nth(4));
        points.filter(|at| if at.contains(&b'\\') { unescaped(at) == target } else { *at == target }).count()
    }
}

/// All the pods' directories once more, read-only: what is shown to the pods is mounted from here.
///
/// A mount begins with the flags of the one that it is made of, and has them in every namespace that it is propagated to. Those that are set
/// later are set in this process's namespace alone, and the pods, whose mounts come from the node's, would not have them.
#[derive(Debug)]
pub(super) struct View {
    root: PathBuf,
    at: PathBuf,
    making: Mutex<()>,
}

impl View {
    /// Of what is below `root`; mounted at `at`, which is for the agent alone, when it is first needed.
    pub(super) fn new(root: PathBuf, at: PathBuf) -> Self {
        Self { root, at, making: Mutex::default() }
    }

    /// Shows `directory`, which is below the root, at `target`, which is created if need be. Blocks.
    pub(super) fn show(&self, directory: &Path, target: &Path) -> Result<(), VolumeError> {
        match std::fs::create_dir(target) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(VolumeError::io(target, "create")(error)),
            _ => {}
        }
        let layers = Mounts::read()?.layers(target);
        if layers == 1 && is_shown(directory, target)? {
            return Ok(());
        }
        let outside = |_| VolumeError::Internal(format!("{} is not below {}", directory.display(), self.root.display()));
        let shown = self.at.join(directory.strip_prefix(&self.root).map_err(outside)?);
        // Only when nothing is missing any more for the new one, the old one goes.
        self.make()?;
        std::fs::metadata(&shown).map_err(VolumeError::io(&shown, "look at"))?;
        detach(target, layers)?;
        mount_bind(shown, target).map_err(|error| VolumeError::io(target, "mount a pod's directory at")(error.into()))
    }

    fn make(&self) -> Result<(), VolumeError> {
        let _alone = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        let at = &*self.at;
        files::create_private_dir(at)?;
        if is_shown(&self.root, at)? {
            return Ok(());
        }
        detach(at, Mounts::read()?.layers(at))?;
        mount_bind(&self.root, at).map_err(|error| VolumeError::io(at, "mount the pods' directories at")(error.into()))?;
        let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        mount_remount(at, flags, "").map_err(|error| VolumeError::io(at, "make read-only")(error.into()))
    }
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

/// Whether `directory` is what is seen at `target`, where it cannot be written to.
fn is_shown(directory: &Path, target: &Path) -> Result<bool, VolumeError> {
    let inode = |path: &Path| -> Result<_, VolumeError> {
        let found = std::fs::metadata(path).map_err(VolumeError::io(path, "look at"))?;
        Ok((found.dev(), found.ino()))
    };
    let file_system = statvfs(target).map_err(|error| VolumeError::io(target, "look at")(error.into()))?;
    Ok(inode(directory)? == inode(target)? && file_system.f_flag.contains(StatVfsMountFlags::RDONLY))
}

/// As the kernel names it: the last part may be a mount point, and no link.
fn resolved(target: &Path) -> PathBuf {
    let above = target.parent().and_then(|above| above.canonicalize().ok());
    above.zip(target.file_name()).map_or_else(|| target.to_owned(), |(above, name)| above.join(name))
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
    fn mount_points_are_found_with_their_blanks_as_often_as_they_are_there() {
        let mounts = Mounts(TABLE.into());
        assert_eq!(mounts.layers(Path::new("/var/lib/kubelet/pods/a b/mount")), 2);
        assert!(mounts.has(Path::new("/")));
        assert!(!mounts.has(Path::new("/var/lib/kubelet/pods/a")));
    }

    #[test]
    fn a_mount_point_is_found_through_links_on_the_way_to_it() {
        let directory = tempfile::tempdir().unwrap();
        let real = directory.path().canonicalize().unwrap().join("real");
        std::fs::create_dir(&real).unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let mounts = Mounts(format!("63 60 0:27 /a {} rw - tmpfs tmpfs rw\n", real.join("mount").display()).into());
        assert!(mounts.has(&link.join("mount")) && !mounts.has(&link.join("other")));
    }

    #[test]
    fn only_octal_escapes_are_undone() {
        for (field, plain) in [("a\\040b", "a b"), ("a\\134", "a\\"), ("a\\9", "a\\9"), ("\\", "\\"), ("a\\0401", "a 1")] {
            assert_eq!(unescaped(field.as_bytes()), plain.as_bytes(), "{field}");
        }
    }
}
