//! Public keys as they were fetched last, in a file: a CA that starts while nobody hands them out goes on with them.

use std::path::{Path, PathBuf};

use chancery_process::files::{FileError, create_private_dir, read_private, write_private};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{ClusterSettings, JwksSource};

/// Where the keys of one cluster, from one source, are kept.
#[derive(Debug)]
pub(super) struct KeptKeys {
    directory: PathBuf,
    file: String,
    source: Source,
}

/// Keys from anywhere else are no keys of this cluster.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Source {
    issuer: String,
    address: String,
}

#[derive(Deserialize)]
struct Kept {
    source: Source,
    jwks: String,
}

impl KeptKeys {
    /// Below `directory`; none where the keys are in a file anyway.
    pub(super) fn of(settings: &ClusterSettings, directory: &Path) -> Option<Self> {
        let address = match (&settings.jwks, &settings.kubernetes) {
            (JwksSource::File(_), _) => return None,
            (JwksSource::ApiServer, Some(kubernetes)) => kubernetes.to_string(),
            (jwks, _) => jwks.to_string(),
        };
        let source = Source { issuer: settings.issuer.clone(), address };
        Some(Self { directory: directory.to_owned(), file: format!("{}.json", settings.name), source })
    }

    /// The JWKS, if it is there and from the same source.
    pub(super) fn read(&self) -> Option<String> {
        let kept: Kept = serde_json::from_slice(&read_private(&self.directory.join(&self.file)).ok()?).ok()?;
        (kept.source == self.source).then_some(kept.jwks)
    }

    /// Replaces what is there.
    pub(super) fn write(&self, jwks: &str) -> Result<(), FileError> {
        let kept = json!({ "source": self.source, "jwks": jwks });
        create_private_dir(&self.directory)?;
        write_private(&self.directory.join(&self.file), kept.to_string().as_bytes())
    }
}
