//! `SELinux`, on the nodes that have it: a container may only use what bears the label of containers' files, whatever the permissions say, and
//! the kubelet gives that to no volume that is read-only.

use std::path::Path;

use rustix::fs::{XattrFlags, getxattr, setxattr};
use rustix::io::Errno;

const ATTRIBUTE: &str = "security.selinux";
/// For every container: without categories.
const LABEL: &[u8] = b"system_u:object_r:container_file_t:s0\0";
const LONGEST: usize = 256;

/// Labels a directory, and with it what will be made in it.
pub(super) fn open_to_containers(directory: &Path) {
    let mut found = [0; LONGEST];
    let labelled = match getxattr(directory, ATTRIBUTE, &mut found) {
        // There is no SELinux here.
        Err(Errno::NODATA | Errno::NOTSUP) => return,
        Err(error) => Err(error),
        Ok(length) if label_type(&found[..length]) == label_type(LABEL) => return,
        Ok(_) => setxattr(directory, ATTRIBUTE, LABEL, XattrFlags::empty()),
    };
    match labelled {
        Ok(()) => tracing::info!(directory = %directory.display(), "SELinux will let containers use it"),
        Err(error) => {
            tracing::warn!(directory = %directory.display(), %error, "cannot change the directory's SELinux label; pods may not reach their sockets");
        }
    }
}

/// `user:role:type:level`.
fn label_type(label: &[u8]) -> Option<&[u8]> {
    label.split(|byte| *byte == b':').nth(2)
}
