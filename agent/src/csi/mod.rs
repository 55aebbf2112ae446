//! The node plugin of the Container Storage Interface (CSI) that the kubelet calls for each pod with our volume: the pod gets a directory with a
//! socket that is its alone, so that the socket is the identity.
//!
//! [`Places::take`] takes the plugin's places, [`Plugin::run`] registers with the kubelet and serves it. Promises:
//! - who a pod is, only its token decides, verified as everywhere else; what else the kubelet says of the pod is compared with it;
//! - publishing a volume again changes nothing but the token, and repairs what has gone missing; taking one away tolerates that all is gone;
//! - once a pod has its volume, no error that the kubelet takes for final is ever answered for it;
//! - what a restarted plugin needs to serve the pods that are there already is kept with the agent's state, and never a token;
//! - a directory is mounted, never a socket, so that a new socket in it is seen by the pods that have it mounted.
//!
//! What is served on the sockets is the business of whoever implements [`Sockets`].

mod authority;
mod error;
mod kept;
mod label;
mod mounts;
mod request;
mod service;
mod socket;
mod volume;
mod volumes;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use chancery_process::files::{self, FileError};
use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub use error::VolumeError;

use crate::svids::{Svids, Tenant};
use crate::telemetry::Metrics;
use kept::Kept;
use socket::Door;
use volumes::Volumes;

/// For the kubelet, which runs as root.
const SOCKET_MODE: u32 = 0o600;
const ENDPOINT: &str = "csi.sock";
/// Calls under way get this long to end.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);

/// Serves proxies on a socket that is one pod's alone.
pub trait Sockets: Send + Sync + 'static {
    /// Serves `tenant` on `listener` until `stop`; then its streams end.
    fn serve(&self, listener: UnixListener, tenant: Tenant, stop: CancellationToken);
}

/// Where the plugin is, and what it allows.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The CSI driver's name, as pods' volumes name it.
    pub driver: String,
    /// Where its own socket is.
    pub plugin_dir: PathBuf,
    /// Where the kubelet looks for plugins.
    pub registry_dir: PathBuf,
    /// Where the pods' directories are. On the host's own file system, or they would be gone with the agent's pod.
    pub socket_root: PathBuf,
    /// What this node is called to the kubelet.
    pub node_id: String,
    /// Of the tokens that the kubelet hands over for pods.
    pub audience: String,
    /// More volumes at a time are refused.
    pub max_volumes: usize,
    /// The agent's private directory for what survives a restart.
    pub state_dir: PathBuf,
}

/// How far the plugin has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Stage {
    /// The pods that are there already are not all served again yet.
    #[default]
    Restoring,
    /// The kubelet has not said anything yet.
    Announced,
    /// The kubelet knows it.
    Registered,
    /// The kubelet refused it, in these words.
    Refused(String),
}

/// Why the plugin does not run.
#[derive(Debug, thiserror::Error)]
pub enum PluginError {
    /// A directory or a socket.
    #[error(transparent)]
    File(#[from] FileError),
    /// The kubelet does not want it.
    #[error(
        "the kubelet refused to register the CSI driver {driver}: {reason}; is another plugin registered under that name, and does the CSIDriver object exist?"
    )]
    Refused {
        /// The driver.
        driver: String,
        /// The kubelet's words.
        reason: String,
    },
    /// The transport.
    #[error("the CSI service has failed: {0}")]
    Transport(#[from] tonic::transport::Error),
}

/// A published volume, as `chancery-agent status` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub pod: String,
    /// The pod's UID.
    pub pod_uid: Uuid,
    /// The pod's service account.
    pub service_account: String,
    /// The socket, on the node.
    pub socket: PathBuf,
    /// Where the kubelet has the volume mounted.
    pub target: PathBuf,
    /// Why the kubelet's last call for it failed; empty if it did not.
    pub problem: String,
}

/// The plugin's places, taken: its directories and the socket that the kubelet will call.
#[derive(Debug)]
pub struct Places {
    settings: Settings,
    endpoint: Door,
    listener: UnixListener,
    kept: Kept,
}

/// Whether the kubelet can use the plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// It can.
    Good,
    /// It has not registered it yet; a sentence.
    Unregistered(String),
    /// It or the pods do not find their sockets; a sentence.
    Unreachable(String),
}

/// The plugin. Clones are the same.
#[derive(Clone, Debug)]
pub struct Plugin(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    settings: Settings,
    endpoint: Door,
    /// Where the kubelet finds the plugin, once it may.
    announcement: Door,
    volumes: Arc<Volumes>,
    stage: watch::Sender<Stage>,
}

impl Places {
    /// Takes them. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// If one of them cannot be used.
    pub fn take(settings: Settings) -> Result<Self, PluginError> {
        create_dir(&settings.plugin_dir)?;
        create_dir(&settings.registry_dir)?;
        // Nobody else may enter: behind it lie all the pods' sockets.
        files::create_private_dir(&settings.socket_root)?;
        label::open_to_containers(&settings.socket_root);
        let kept = Kept::open(&settings.state_dir)?;
        let endpoint = Door::new(settings.plugin_dir.join(ENDPOINT), SOCKET_MODE);
        let listener = endpoint.open()?;
        Ok(Self { settings, endpoint, listener, kept })
    }

    /// The plugin at these places, for [`Plugin::run`] with the listener.
    pub fn plugin(self, svids: Svids, sockets: Arc<dyn Sockets>, metrics: Metrics) -> (Plugin, UnixListener) {
        let Self { settings, endpoint, listener, kept } = self;
        let volumes = Arc::new(Volumes::new(&settings, kept, svids, sockets, metrics));
        let announcement = Door::new(settings.registry_dir.join(format!("{}-reg.sock", settings.driver)), SOCKET_MODE);
        let shared = Shared { settings, endpoint, announcement, volumes, stage: watch::Sender::default() };
        (Plugin(Arc::new(shared)), listener)
    }
}

impl Plugin {
    /// Serves the pods that are there already again, registers with the kubelet, and serves it until `shutdown`.
    ///
    /// # Errors
    /// If the kubelet refuses the plugin, or the transport fails.
    pub async fn run(self, listener: UnixListener, shutdown: CancellationToken) -> Result<(), PluginError> {
        self.0.volumes.restore().await;
        let announced = self.0.announcement.open()?;
        self.0.stage.send_replace(Stage::Announced);
        let patience = async {
            shutdown.cancelled().await;
            tokio::time::sleep(SHUTDOWN_GRACE).await;
        };
        let ended = tokio::select! {
            ended = self.serve(listener, &shutdown) => ended.map_err(PluginError::from),
            ended = self.announce(announced, &shutdown) => ended.map_err(PluginError::from),
            refused = self.refused() => Err(refused),
            () = patience => Ok(()),
        };
        // In this order: the kubelet forgets the plugin before it finds nobody at its endpoint.
        self.0.announcement.close();
        self.0.endpoint.close();
        ended
    }

    /// Serves the kubelet, on another socket when somebody has removed the one before. Calls that came by that go on to their end.
    async fn serve(&self, mut listener: UnixListener, shutdown: &CancellationToken) -> Result<(), tonic::transport::Error> {
        loop {
            listener = tokio::select! {
                ended = service::serve(self, listener, shutdown) => return ended,
                another = self.0.endpoint.open_again() => another,
            };
        }
    }

    /// Likewise. With the socket the kubelet has forgotten the plugin, and finds it by the next one.
    async fn announce(&self, mut announced: UnixListener, shutdown: &CancellationToken) -> Result<(), tonic::transport::Error> {
        loop {
            announced = tokio::select! {
                ended = service::announce(self, announced, shutdown) => return ended,
                another = self.0.announcement.open_again() => another,
            };
            self.0.stage.send_if_modified(|stage| {
                *stage == Stage::Registered && {
                    *stage = Stage::Announced;
                    true
                }
            });
        }
    }

    /// Whether the kubelet can use the plugin.
    pub fn health(&self) -> Health {
        let Shared { settings, endpoint, announcement, stage, .. } = &*self.0;
        // Without its announcement the kubelet forgets the plugin.
        if let Some(problem) = endpoint.problem().or_else(|| announcement.problem()) {
            return Health::Unreachable(problem);
        }
        match *stage.borrow() {
            Stage::Restoring => Health::Unreachable("the pods from before the restart are not served yet".to_owned()),
            Stage::Announced => Health::Unregistered(format!("the kubelet has not registered the CSI driver {} yet", settings.driver)),
            Stage::Registered | Stage::Refused(_) => Health::Good,
        }
    }

    /// All published volumes, by namespace and pod.
    pub fn list(&self) -> Vec<VolumeStatus> {
        self.0.volumes.list()
    }

    async fn refused(&self) -> PluginError {
        let mut stage = self.0.stage.subscribe();
        loop {
            if let Stage::Refused(reason) = &*stage.borrow_and_update() {
                return PluginError::Refused { driver: self.0.settings.driver.clone(), reason: reason.clone() };
            }
            if stage.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

/// Of the kubelet's directories; those that exist are as the kubelet wants them.
fn create_dir(path: &Path) -> Result<(), FileError> {
    std::fs::create_dir_all(path).map_err(|error| FileError::Io { path: path.to_owned(), action: "create", error })
}
