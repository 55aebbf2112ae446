//! Playing the kubelet: a projected volume with a service-account token that is replaced in time.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;
use time::OffsetDateTime;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::Result;

/// The kubelet replaces a token after this share of its life.
const REFRESHED_AT: f64 = 0.8;

/// A directory as the kubelet writes it: `token` leads through `..data` to the newest of several versions.
#[derive(Clone)]
pub struct TokenVolume {
    directory: PathBuf,
}

impl TokenVolume {
    /// An empty volume.
    pub fn create(directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory)?;
        Ok(Self { directory: directory.to_owned() })
    }

    /// The volume's directory, which Envoy watches.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The token's path.
    pub fn token(&self) -> PathBuf {
        self.directory.join("token")
    }

    /// Replaces the token as the kubelet does: a new directory, then `..data` is swapped in one step.
    pub fn replace(&self, token: &str) -> Result<()> {
        let data = self.directory.join("..data");
        let old = fs::read_link(&data).ok();
        let version = format!("..{}", uuid::Uuid::new_v4());
        fs::create_dir(self.directory.join(&version))?;
        fs::write(self.directory.join(&version).join("token"), token)?;
        let swap = self.directory.join("..data_tmp");
        symlink(&version, &swap)?;
        fs::rename(&swap, &data)?;
        match old {
            Some(old) => fs::remove_dir_all(self.directory.join(old))?,
            None => symlink("..data/token", self.token())?,
        }
        Ok(())
    }

    /// The file that tells Envoy where its token is; see `credential_injector` in the README.
    pub fn write_envoy_secret(&self, path: &Path) -> Result<()> {
        let secret = json!({"resources": [{
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
            "name": "sds_token",
            "generic_secret": {"secret": {"filename": self.token()}},
        }]});
        Ok(fs::write(path, secret.to_string())?)
    }
}

/// Keeps a volume's token fresh until dropped.
pub struct TokenKeeper(#[allow(dead_code, reason = "held for its drop")] AbortOnDropHandle<()>);

impl TokenKeeper {
    /// Writes the first token before it returns; each lives for `lifetime`. A failure to mint is tried again every second, as by the kubelet.
    pub async fn start<M, F>(volume: TokenVolume, lifetime: Duration, mint: M) -> Result<Self>
    where
        M: Fn() -> F + Send + 'static,
        F: Future<Output = Result<String>> + Send,
    {
        let mut due = refresh_due(lifetime);
        volume.replace(&mint().await?)?;
        let task = async move {
            loop {
                tokio::time::sleep_until(due).await;
                due = refresh_due(lifetime);
                while mint().await.and_then(|token| volume.replace(&token)).is_err() {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        };
        Ok(Self(AbortOnDropHandle::new(tokio::spawn(task))))
    }
}

/// Of a token that is minted now: like the kubelet, counted from its `iat`, which is in whole seconds.
fn refresh_due(lifetime: Duration) -> Instant {
    let since_iat = Duration::from_nanos(OffsetDateTime::now_utc().nanosecond().into());
    Instant::now() + lifetime.mul_f64(REFRESHED_AT).saturating_sub(since_iat)
}
