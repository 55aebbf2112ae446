//! One pod's directory on the node, with its socket in it, which lives as long as this does.
//!
//! `<root>/<pod UID>/<name>/<socket>`: the root and the pod's directory are for the agent alone, so that nobody on the node reaches a pod's
//! socket; what is mounted into the pod is the inner directory, whose socket every user of that pod may connect to.

use std::fs::Permissions;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use aws_lc_rs::digest::{SHA256, digest};
use tokio_util::sync::CancellationToken;
use tokio_util::sync::DropGuard;
use uuid::Uuid;

use super::Sockets;
use super::error::VolumeError;
use super::socket::OpenSocket;
use crate::svids::Tenant;

const PRIVATE: u32 = 0o700;
/// What is mounted into the pod: its users may enter it, and connect.
const ENTERED_BY_THE_POD: u32 = 0o755;
const CONNECTED_TO_BY_THE_POD: u32 = 0o666;
/// `sun_path` of `unix(7)`, without the byte that ends it.
const MAX_SOCKET_PATH: usize = 107;
/// Of a hash, so that names of directories stay short: a socket's whole path has to.
const NAME_BYTES: usize = 10;

/// A volume's name in the file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Name(String);

impl Name {
    /// Of the volume that the kubelet calls so.
    pub(super) fn of(volume_id: &str) -> Self {
        let hash = digest(&SHA256, volume_id.as_bytes());
        Self(hex::encode(&hash.as_ref()[..NAME_BYTES]))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

/// The directories under one root.
#[derive(Debug)]
pub(super) struct Directories {
    root: PathBuf,
}

impl Directories {
    pub(super) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// Makes a volume's directory. One that is there stays: the pod has it mounted.
    pub(super) fn create(&self, pod_uid: Uuid, volume_id: &str) -> Result<PathBuf, VolumeError> {
        let pod = self.root.join(pod_uid.to_string());
        let directory = pod.join(Name::of(volume_id).as_str());
        for (path, mode) in [(&pod, PRIVATE), (&directory, ENTERED_BY_THE_POD)] {
            match std::fs::create_dir(path) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(VolumeError::io(path, "create")(error)),
                _ => {}
            }
            // Whatever the umask is.
            std::fs::set_permissions(path, Permissions::from_mode(mode)).map_err(VolumeError::io(path, "set the permissions of"))?;
        }
        Ok(directory)
    }

    /// Removes a volume's directory, of whichever pod it is. That there is none is as good.
    pub(super) fn remove(&self, volume_id: &str) -> Result<(), VolumeError> {
        let name = Name::of(volume_id);
        let pods = std::fs::read_dir(&self.root).map_err(VolumeError::io(&self.root, "list"))?;
        for pod in pods {
            let pod = pod.map_err(VolumeError::io(&self.root, "list"))?.path();
            let directory = pod.join(name.as_str());
            match std::fs::remove_dir_all(&directory) {
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                removed => removed.map_err(VolumeError::io(&directory, "remove"))?,
            }
            match std::fs::remove_dir(&pod) {
                // The pod has another volume of ours.
                Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => {}
                removed => removed.map_err(VolumeError::io(&pod, "remove"))?,
            }
        }
        Ok(())
    }
}

/// A pod's own socket, being served until this is dropped.
#[derive(Debug)]
pub(super) struct Served {
    socket: OpenSocket,
    _stop: DropGuard,
}

impl Served {
    /// Serves `tenant` on a new socket in its directory. A dead process's socket there is replaced.
    pub(super) fn start(directory: &Path, name: &str, tenant: Tenant, sockets: &dyn Sockets) -> Result<Self, VolumeError> {
        let path = directory.join(name);
        let length = path.as_os_str().len();
        if length > MAX_SOCKET_PATH {
            let problem = format!(
                "{}: has {length} bytes, and a socket's path at most {MAX_SOCKET_PATH}; choose a shorter csi.socket_root",
                path.display()
            );
            return Err(VolumeError::Internal(problem));
        }
        let (socket, listener) = OpenSocket::bind(path, CONNECTED_TO_BY_THE_POD)?;
        let stop = CancellationToken::new();
        sockets.serve(listener, tenant, stop.clone());
        Ok(Self { socket, _stop: stop.drop_guard() })
    }

    /// Whether proxies can find it.
    pub(super) fn is_there(&self) -> bool {
        self.socket.is_there()
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        self.socket.path()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_directory_goes_with_the_last_of_its_volumes() {
        let root = tempfile::tempdir().unwrap();
        let directories = Directories::new(root.path().to_owned());
        let pod = Uuid::from_u128(1);
        let (one, other) = (directories.create(pod, "csi-1").unwrap(), directories.create(pod, "csi-2").unwrap());
        std::fs::write(one.join("sds.sock"), "").unwrap();
        assert_eq!(directories.create(pod, "csi-1").unwrap(), one);
        assert!(one.join("sds.sock").exists(), "one that is there stays");
        directories.remove("csi-1").unwrap();
        directories.remove("csi-1").unwrap();
        assert!(!one.exists() && other.exists());
        directories.remove("csi-2").unwrap();
        assert!(!root.path().join(pod.to_string()).exists());
    }
}
