//! What a restarted plugin must know of the volumes that pods have mounted: a small private file for each, beside the agent's state. It says
//! whose a volume is, as a verified token once did, and holds no token.

use std::path::{Path, PathBuf};

use chancery_process::files::{self, FileError};
use serde::{Deserialize, Serialize};

use super::error::VolumeError;
use super::volume::Name;
use crate::svids::WorkloadKey;

/// The form that this version writes.
const VERSION: u32 = 1;
const DIRECTORY: &str = "volumes";

/// A published volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Facts {
    version: u32,
    /// The kubelet's name for it.
    pub(super) volume_id: String,
    /// Where the kubelet has it mounted.
    pub(super) target: PathBuf,
    /// Whose it is.
    pub(super) workload: WorkloadKey,
    /// The pod's name.
    pub(super) pod: String,
    /// The socket's file name.
    pub(super) socket: String,
}

impl Facts {
    /// Of a volume that is being published.
    pub(super) fn new(volume_id: String, target: PathBuf, workload: WorkloadKey, pod: String, socket: String) -> Self {
        Self { version: VERSION, volume_id, target, workload, pod, socket }
    }
}

/// The files.
#[derive(Debug)]
pub(super) struct Kept {
    directory: PathBuf,
}

impl Kept {
    /// In the agent's private directory.
    pub(super) fn open(state_dir: &Path) -> Result<Self, FileError> {
        let directory = state_dir.join(DIRECTORY);
        files::create_private_dir(&directory)?;
        Ok(Self { directory })
    }

    /// Keeps a volume.
    pub(super) fn write(&self, facts: &Facts) -> Result<(), VolumeError> {
        let bytes = serde_json::to_vec(facts).map_err(|error| VolumeError::Internal(format!("the volume cannot be kept: {error}")))?;
        Ok(files::write_private(&self.path(&Name::of(&facts.volume_id)), &bytes)?)
    }

    /// Whether it is kept.
    pub(super) fn has(&self, volume_id: &str) -> bool {
        self.path(&Name::of(volume_id)).exists()
    }

    /// Forgets one. That there is none is as good.
    pub(super) fn forget(&self, volume_id: &str) -> Result<(), VolumeError> {
        let path = self.path(&Name::of(volume_id));
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(VolumeError::io(&path, "remove")(error)),
            _ => Ok(()),
        }
    }

    /// All of them. One that cannot be read is left out: the kubelet will tell of it again within minutes.
    pub(super) fn load(&self) -> Vec<Facts> {
        let entries = match std::fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(error) => {
                tracing::error!(path = %self.directory.display(), %error, "the kept volumes cannot be listed");
                return Vec::new();
            }
        };
        // What a crash left half written begins with a dot.
        let whole = |path: &PathBuf| path.file_name().is_some_and(|name| !name.as_encoded_bytes().starts_with(b"."));
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(whole);
        let facts = |path: PathBuf| {
            read(&path).inspect_err(|problem| tracing::warn!(path = %path.display(), problem, "a kept volume is left out")).ok()
        };
        paths.filter_map(facts).collect()
    }

    fn path(&self, name: &Name) -> PathBuf {
        self.directory.join(name.as_str())
    }
}

fn read(path: &Path) -> Result<Facts, String> {
    let bytes = files::read_private(path).map_err(|error| error.to_string())?;
    let facts: Facts = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
    if facts.version > VERSION {
        return Err(format!("it has version {}; this agent reads up to {VERSION}", facts.version));
    }
    Ok(facts)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn facts(volume_id: &str) -> Facts {
        let workload = WorkloadKey { pod_uid: Uuid::from_u128(1), namespace: "shop".into(), service_account: "cart".into() };
        Facts::new(volume_id.into(), "/target".into(), workload, "cart-0".into(), "sds.sock".into())
    }

    #[test]
    fn what_is_kept_comes_back_until_it_is_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let kept = Kept::open(directory.path()).unwrap();
        kept.write(&facts("csi-a")).unwrap();
        kept.write(&facts("csi-b")).unwrap();
        kept.forget("csi-a").unwrap();
        kept.forget("csi-a").unwrap();
        assert_eq!(kept.load(), [facts("csi-b")]);
    }

    #[test]
    fn a_file_that_is_broken_newer_or_open_to_others_is_left_out() {
        let directory = tempfile::tempdir().unwrap();
        let kept = Kept::open(directory.path()).unwrap();
        kept.write(&facts("csi-a")).unwrap();
        files::write_private(&kept.directory.join("broken"), b"{").unwrap();
        let newer = Facts { version: VERSION + 1, ..facts("csi-b") };
        kept.write(&newer).unwrap();
        std::fs::write(kept.directory.join(".half.new"), "{").unwrap();
        assert_eq!(kept.load(), [facts("csi-a")]);
        let path = kept.path(&Name::of("csi-a"));
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
        assert_eq!(kept.load(), []);
    }
}
