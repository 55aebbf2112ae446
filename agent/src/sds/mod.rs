//! Envoy's secret discovery service: `StreamSecrets` and `DeltaSecrets` on a Unix socket.
//!
//! A proxy asks for secrets by name: `default` or its own SPIFFE ID (certificate and key), `ROOTCA` or its trust domain's SPIFFE ID
//! (validation context). It is answered when the secret exists, and again whenever the secret changes. Promises:
//! - a proxy gets its own workload's secrets alone; any other name is held back and reported, without breaking the rest of the stream;
//! - never an empty validation context, never a SAN matcher (Envoy would OR it with the proxy's own);
//! - nothing is sent that the proxy already has, not even after a reconnect;
//! - a changed bundle is with the proxy before a changed certificate is.
//!
//! On the shared socket a stream's token says whose it is; a socket of [`PodSockets`] is one pod's alone.
//!
//! [`stream`] is the protocol without I/O; [`connection`] what the streams of one proxy agree about; [`tokens`] when a stream is ended for a
//! fresh token; [`registry`] who is told what the proxies hold, and [`holders`] what that comes to. Which certificate there is to serve is `svids`' business.

pub mod connection;
mod driver;
mod frames;
mod holders;
pub mod registry;
pub mod secret;
mod service;
mod socket;
pub mod stream;
pub mod tokens;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use chancery_identity::{Clock, TrustState};
use chancery_process::files::{FileError, bind_socket};
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

pub use registry::{Registry, StreamStatus};
pub use socket::PodSockets;

use crate::accepted::Accepted;
use crate::occasionally::Occasionally;
use crate::svids::accounts::Accounts;
use crate::svids::{AttachError, ProxySummary, Subscription, Svids, Token};
use secret::Secrets;
use service::SecretDiscovery;
use tokens::EndedTokens;

/// A proxy needs a stream for each secret.
const MAX_STREAMS_PER_CONNECTION: u32 = 64;
/// Holds the longest token and what else a proxy sends along.
const MAX_HEADER_BYTES: u32 = 24 * 1024;
/// A connection keeps a buffer as large as the largest frame it ever read, and no frame is larger than this. An Envoy's first request of
/// 60 KB so takes some more round trips on a local socket; every later request is small.
const STREAM_WINDOW_BYTES: u32 = 8 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 64 * 1024;
/// Between two summaries for the CA.
const SUMMARY_PAUSE: Duration = Duration::from_millis(25);
const ENTERED_BY_PROXIES: u32 = 0o755;
/// Proxies get this long to close their connections.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);

/// Where streams find what they serve.
#[async_trait]
pub trait Source: Send + Sync + 'static {
    /// Whether a stream must bring its workload's token.
    fn needs_token(&self) -> bool;

    /// Attaches a stream to its workload. `token` is there if [`Source::needs_token`].
    async fn attach(&self, token: Option<Token>) -> Result<Subscription, AttachError>;

    /// What to trust. A state is published before any certificate that depends on it.
    fn trust(&self) -> watch::Receiver<Option<Arc<TrustState>>>;

    /// Whether the CA can be reached.
    fn ca_reachable(&self) -> watch::Receiver<bool>;

    /// The pods that certificates were issued to.
    fn accounts(&self) -> Accounts;

    /// Takes the sum of what the proxies hold, whenever it changes.
    fn set_proxies(&self, summary: ProxySummary);
}

#[async_trait]
impl Source for Svids {
    fn needs_token(&self) -> bool {
        !self.is_sidecar()
    }

    async fn attach(&self, token: Option<Token>) -> Result<Subscription, AttachError> {
        match token {
            Some(token) => Self::attach(self, token).await,
            None => self.attach_own().await,
        }
    }

    fn trust(&self) -> watch::Receiver<Option<Arc<TrustState>>> {
        Self::trust(self)
    }

    fn ca_reachable(&self) -> watch::Receiver<bool> {
        Self::ca_reachable(self)
    }

    fn accounts(&self) -> Accounts {
        Self::accounts(self)
    }

    fn set_proxies(&self, summary: ProxySummary) {
        Self::set_proxies(self, summary);
    }
}

/// How to serve.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The socket's path. Directories above it are created.
    pub socket: PathBuf,
    /// Its permissions: whoever may write may connect, and is then asked for a token.
    pub socket_mode: u32,
    /// At most so many connections; one for each proxy.
    pub max_connections: usize,
    /// How often a stream compares the wall clock with its token's life, at least.
    pub tick: Duration,
}

/// The service, listening.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    settings: Settings,
    numbers: socket::Numbers,
    pods: PodSockets,
    of_pods: ReceiverStream<Accepted>,
}

/// The service ended by itself.
#[derive(Debug, thiserror::Error)]
#[error("the SDS service has failed: {0}")]
pub struct ServeError(#[from] tonic::transport::Error);

/// What all streams share.
struct Context {
    source: Arc<dyn Source>,
    secrets: Secrets,
    ended: EndedTokens,
    registry: Registry,
    clock: Arc<dyn Clock>,
    tick: Duration,
    refusals_logged: Occasionally,
    shutdown: CancellationToken,
}

impl Server {
    /// Listens. A socket that a dead process left behind is replaced, a living one's is refused. Must be called within a tokio runtime.
    pub fn bind(settings: Settings) -> Result<Self, FileError> {
        if let Some(directory) = settings.socket.parent().filter(|directory| !directory.exists()) {
            let created = std::fs::create_dir_all(directory).and_then(|()| {
                // Whatever the umask is, proxies must be able to enter. One that is there already is its owner's business.
                std::fs::set_permissions(directory, Permissions::from_mode(ENTERED_BY_PROXIES))
            });
            let action = "create the directory of the socket";
            created.map_err(|error| FileError::Io { path: directory.to_owned(), action, error })?;
        }
        let listener = bind_socket(&settings.socket, settings.socket_mode)?;
        let numbers = socket::Numbers::default();
        let (pods, of_pods) = socket::pod_sockets(&numbers);
        Ok(Self { listener, settings, numbers, pods, of_pods })
    }

    /// Sockets that are one pod's each, served by this service beside its shared one.
    pub fn pods(&self) -> PodSockets {
        self.pods.clone()
    }

    /// Serves until `shutdown`, and then ends every stream with a sentence.
    ///
    /// # Errors
    /// If the transport fails.
    pub async fn run(
        self,
        source: Arc<dyn Source>,
        registry: Registry,
        clock: Arc<dyn Clock>,
        shutdown: CancellationToken,
    ) -> Result<(), ServeError> {
        let context = Arc::new(Context {
            source,
            secrets: Secrets::default(),
            ended: EndedTokens::default(),
            registry,
            clock,
            tick: self.settings.tick,
            refusals_logged: Occasionally::default(),
            shutdown: shutdown.clone(),
        });
        let serving = tonic::transport::Server::builder()
            .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_max_header_list_size(MAX_HEADER_BYTES)
            .serve_with_incoming_shutdown(
                SecretDiscovery(context.clone()),
                socket::incoming(self.listener, self.settings.max_connections, self.numbers, self.of_pods),
                shutdown.clone().cancelled_owned(),
            );
        let grace = async {
            shutdown.cancelled().await;
            tokio::time::sleep(SHUTDOWN_GRACE).await;
        };
        tokio::select! {
            served = serving => Ok(served?),
            () = context.report() => Ok(()),
            () = grace => Ok(()),
        }
    }
}

impl Context {
    /// Keeps the registry and the report to the CA up to date for ever.
    async fn report(&self) {
        let (mut trust, accounts) = (self.source.trust(), self.source.accounts());
        loop {
            if let Some(state) = &*trust.borrow_and_update() {
                self.registry.note_bundle(self.secrets.bundle(state).version(), state.sequence);
            }
            self.source.set_proxies(self.registry.summary(&accounts, self.clock.now()));
            tokio::time::sleep(SUMMARY_PAUSE).await;
            tokio::select! {
                () = self.registry.changed() => {}
                Ok(()) = trust.changed() => {}
                // Certificates expire, and with the last one of a pod nobody there counts any longer.
                () = tokio::time::sleep(self.tick) => {}
            }
        }
    }
}

/// Nothing that is done under these locks can panic halfway.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
