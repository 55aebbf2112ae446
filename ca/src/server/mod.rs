//! A running CA: opens its parts in order, serves its three doors (the TLS port, the admin socket, the plain HTTP port), and ends in order.
//!
//! Ports are opened before anything is written, so that a start that cannot succeed leaves no trace. On the way down nothing new is
//! accepted, what was accepted is answered, and the ledger is closed last. A ledger that could not be made durable ends the process: the
//! next start recovers.

mod clusters;
mod doctor;
mod error;
mod growth;
mod listener;
mod open;
mod parts;
#[cfg(test)]
mod power_cuts;
mod problem;
mod reload;
mod scrub;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use chancery_identity::{Clock, SystemClock};
use chancery_process::http::{health_routes, serve_tcp};
use chancery_process::logging::LogHandle;
use chancery_process::watch::FileWatch;
use chancery_proto::chancery::v1::agent_service_server::AgentServiceServer;
use chancery_proto::chancery::v1::log_service_server::LogServiceServer;
use chancery_proto::chancery::v1::operator_service_server::OperatorServiceServer;
use chancery_proto::chancery::v1::revocation_service_server::RevocationServiceServer;
use chancery_proto::chancery::v1::root_service_server::RootServiceServer;
use prometheus_client::registry::Registry;
use tokio::task::JoinSet;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Server;
use tracing::{error, info, warn};

pub use error::ServeError;

use crate::api::{
    AgentApi, CallMetrics, Exports, LogApi, NoteUnread, OperatorApi, Peers, RevocationApi, RootApi, Watches, auditors_ledger_routes,
};
use crate::config::{Config, Mode};
use crate::fleet::{LedgerSource, tell_standing_acts};
use crate::ledger::LedgerHealth;
use crate::store::embedded::files::{LogFiles, SystemFiles};
use crate::telemetry::{Metrics, Readings};
use listener::PortLimits;
use open::Doors;
use parts::Parts;
use reload::Reloader;

/// The largest message that is read: 512 requests with a token and a CSR of ordinary size each, several times over.
const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// How much of a call, and of a connection, may be on its way unread: a call for many certificates arrives in one go.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 512 << 10;
/// Calls of one connection that are worked on at the same time.
const MAX_STREAMS: u32 = 256;
/// A peer that does not answer a ping is gone.
const PING_EVERY: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a drained connection, and a shutdown, wait for the calls under way.
const DRAIN: Duration = Duration::from_secs(10);

/// What a CA is started with.
pub struct Options {
    config: Config,
    mode: Mode,
    shutdown: CancellationToken,
    clock: Arc<dyn Clock>,
    log: Option<LogHandle>,
    log_files: Arc<dyn LogFiles>,
}

impl Options {
    /// Runs until `shutdown` is cancelled.
    pub fn new(config: Config, mode: Mode, shutdown: CancellationToken) -> Self {
        Self { config, mode, shutdown, clock: Arc::new(SystemClock), log: None, log_files: Arc::new(SystemFiles) }
    }

    /// The log's level follows the configuration.
    #[must_use]
    pub fn with_log(mut self, log: LogHandle) -> Self {
        self.log = Some(log);
        self
    }

    /// The time comes from here.
    #[must_use]
    pub fn with_clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// The ledger's log lies on these files.
    #[must_use]
    pub fn with_log_files(mut self, files: Arc<dyn LogFiles>) -> Self {
        self.log_files = files;
        self
    }
}

/// A CA that accepts connections.
#[derive(Debug)]
pub struct Running {
    /// The TLS port, as it was opened.
    pub address: SocketAddr,
    /// The plain HTTP port, as it was opened.
    pub http_address: SocketAddr,
    /// The operators' socket.
    pub admin_socket: PathBuf,
    supervisor: tokio::task::JoinHandle<Result<(), ServeError>>,
}

impl Running {
    /// Waits until the CA has ended.
    ///
    /// # Errors
    /// If it ended for another reason than that it was asked to.
    pub async fn finished(self) -> Result<(), ServeError> {
        self.supervisor.await.map_err(|error| ServeError::Task(error.to_string()))?
    }
}

/// What people are answered by, on either door.
#[derive(Clone)]
struct Services {
    operators: OperatorServiceServer<OperatorApi>,
    log: LogApi,
    roots: RootServiceServer<RootApi>,
    revocation: RevocationServiceServer<RevocationApi>,
}

/// Starts a CA; it accepts connections when this returns.
///
/// # Errors
/// If a part cannot be opened; then nothing is left running.
pub async fn start(options: Options) -> Result<Running, ServeError> {
    let Options { config, mode, shutdown, clock, log, log_files } = options;
    let doors = Doors::open(&config).await?;
    let watch = FileWatch::new(config.files())?;
    let (address, http_address) = (doors.address, doors.http_address);
    let admin_socket = config.admin_socket.clone();

    let mut registry = Registry::default();
    let metrics = Arc::new(Metrics::register(&mut registry));
    let calls = Arc::new(CallMetrics::register(&mut registry));
    let parts = Arc::new(open::open(config, clock, doors.directory, Arc::clone(&calls), log_files).await?);
    let read = Arc::clone(&parts);
    registry.register_collector(Box::new(Readings(move || read.readings())));
    metrics.configuration_applied(parts.clock.now().unix_timestamp());

    // Ends everything, whether it was asked for or a part failed.
    let stop = CancellationToken::new();
    let mut tasks = JoinSet::new();
    let operators = operators(&parts, stop.clone());
    let log_api = log_api(&parts, stop.clone());
    let (roots, revocation) = (root_api(&parts), revocation_api(&parts));
    let services = Services { operators, log: log_api, roots, revocation };
    tasks.spawn(serve_tls(&parts, doors.tls, services.clone(), Arc::clone(&metrics), calls, stop.clone())?);
    tasks.spawn(serve_admin(doors.admin, services, stop.clone()));
    tasks.spawn(serve_http(Arc::clone(&parts), doors.http, registry, stop.clone()));
    let reloader = Reloader { parts: Arc::clone(&parts), mode, log, metrics, watch };
    tasks.spawn(reloader.run(stop.clone()));
    let (clusters, authority) = (Arc::clone(&parts.clusters), Arc::clone(&parts.authority));
    let (stop_clusters, stop_authority) = (stop.clone(), stop.clone());
    tasks.spawn(async move { clusters.run(stop_clusters).await });
    let (refused_acts, stop_refused) = (Arc::clone(parts.people.refused_acts()), stop.clone());
    tasks.spawn(async move { refused_acts.run(stop_refused).await });
    tasks.spawn(async move { authority.run(stop_authority).await });
    let (publication, stop_publication) = (Arc::clone(&parts.publication), stop.clone());
    tasks.spawn(async move { publication.run(stop_publication).await });
    let (rotation, stop_rotation) = (Arc::clone(&parts.rotation), stop.clone());
    tasks.spawn(async move { rotation.run(stop_rotation).await });
    let (checkpoints, stop_checkpoints) = (Arc::clone(&parts.checkpoints), stop.clone());
    tasks.spawn(async move { checkpoints.run(stop_checkpoints).await });
    tasks.spawn(scrub::run(Arc::clone(&parts), stop.clone()));
    tasks.spawn(growth::run(Arc::clone(&parts), stop.clone()));

    announce(&parts, address, http_address);
    let supervisor = tokio::spawn(supervise(parts, tasks, shutdown, stop));
    Ok(Running { address, http_address, admin_socket, supervisor })
}

fn announce(parts: &Parts, address: SocketAddr, http_address: SocketAddr) {
    let config = parts.config.load();
    if config.development {
        warn!("this is a development CA: whoever reads its data directory can have any identity");
    }
    info!(
        %address,
        %http_address,
        admin_socket = %config.admin_socket.display(),
        trust_domain = %config.trust_domain,
        root = %parts.authority.root_fingerprint(),
        ledger_entries = parts.ledger.entries(),
        "serving"
    );
}

/// Waits for the end and brings it about in order.
async fn supervise(
    parts: Arc<Parts>,
    mut tasks: JoinSet<()>,
    shutdown: CancellationToken,
    stop: CancellationToken,
) -> Result<(), ServeError> {
    let failure = tokio::select! {
        () = shutdown.cancelled() => None,
        failure = ledger_failed(&parts) => Some(failure),
    };
    if let Some(failure) = &failure {
        error!(error = %failure, "the ledger failed: nothing more can be issued, ending");
    }
    stop.cancel();
    let drained = async { while tasks.join_next().await.is_some() {} };
    if tokio::time::timeout(DRAIN, drained).await.is_err() {
        warn!("calls were still under way after {} s and are cut off", DRAIN.as_secs());
        tasks.shutdown().await;
    }
    // Nobody is answered any more, so nothing is counted after this.
    if failure.is_none() && tokio::time::timeout(DRAIN, parts.people.refused_acts().flush()).await.is_err() {
        warn!("not every refused act that was only counted could be recorded within {} s", DRAIN.as_secs());
    }
    let closed = parts.ledger.close().await;
    match failure {
        Some(failure) => Err(failure),
        None => Ok(closed?),
    }
}

/// Returns when nothing more can be recorded.
async fn ledger_failed(parts: &Parts) -> ServeError {
    let mut health = parts.ledger.health();
    loop {
        if let LedgerHealth::Failed(error) = &*health.borrow_and_update() {
            return ServeError::LedgerFailed(error.clone());
        }
        if health.changed().await.is_err() {
            // The ledger was closed under us, which only ending does.
            std::future::pending::<()>().await;
        }
    }
}

fn serve_tls(
    parts: &Arc<Parts>,
    listener: tokio::net::TcpListener,
    services: Services,
    metrics: Arc<Metrics>,
    calls: Arc<CallMetrics>,
    stop: CancellationToken,
) -> Result<impl Future<Output = ()> + Send + use<>, ServeError> {
    let limits = parts.config.load().limits.clone();
    let tls = chancery_identity::tls::server_config(
        parts.authority.server_certificate(),
        parts.authority.shared_trust(),
        Arc::clone(&parts.clock),
    )?;
    let port = PortLimits {
        max_connections: usize::try_from(limits.max_connections.get()).unwrap_or(usize::MAX),
        handshake_timeout: limits.handshake_timeout,
        max_connection_age: limits.max_connection_age,
        grace: DRAIN.min(limits.max_connection_age),
    };
    let peers = Arc::new(Peers::new(limits.per_peer()));
    let incoming = listener::accept(listener, Arc::new(tls), peers, parts.authority.trust(), port, metrics, stop.clone());
    let standing = tokio::sync::watch::Sender::default();
    let checkpoints = LedgerSource { ledger: parts.ledger.clone(), newest: parts.checkpoints.watch(), standing: standing.subscribe() };
    let telling = tell_standing_acts(parts.ledger.clone(), standing, stop.clone());
    let api = AgentApi {
        issuance: Arc::clone(&parts.issuance),
        authority: Arc::clone(&parts.authority),
        clusters: Arc::clone(&parts.clusters),
        fleet: Arc::clone(&parts.fleet),
        ledger: parts.ledger.clone(),
        checkpoints,
        clock: Arc::clone(&parts.clock),
        metrics: calls,
        shutdown: stop.clone(),
    };
    let service = AgentServiceServer::new(api).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let Services { operators, log, roots, revocation } = services;
    let routes = Routes::new(service).add_service(operators).add_service(LogServiceServer::new(log.clone()));
    let routes = routes.add_service(roots).add_service(revocation);
    let routes = Routes::from(routes.into_axum_router().merge(auditors_ledger_routes(log)));
    let server = Server::builder()
        .layer(NoteUnread(Arc::clone(&parts.issuance)))
        .max_connection_age(limits.max_connection_age)
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keepalive_interval(Some(PING_EVERY))
        .http2_keepalive_timeout(Some(PING_TIMEOUT))
        .add_routes(routes)
        .serve_with_incoming_shutdown(incoming, stop.cancelled_owned());
    Ok(async move {
        let (served, ()) = tokio::join!(server, telling);
        if let Err(error) = served {
            error!(%error, "the TLS port ended");
        }
    })
}

/// What answers people, on either door.
fn operators(parts: &Arc<Parts>, stop: CancellationToken) -> OperatorServiceServer<OperatorApi> {
    let (status, doctor) = (Arc::clone(parts), Arc::clone(parts));
    OperatorServiceServer::new(OperatorApi {
        ledger: parts.ledger.clone(),
        refusals: Arc::clone(&parts.refusals),
        fleet: Arc::clone(&parts.fleet),
        clusters: Arc::clone(&parts.clusters),
        issuance: Arc::clone(&parts.issuance),
        standing: Arc::new(move || status.status()),
        diagnosis: Arc::new(move || doctor.diagnose()),
        watches: Watches::new(stop),
        authority: Arc::clone(&parts.authority),
        people: Arc::clone(&parts.people),
    })
}

/// What answers those who verify the ledger, on either door.
fn log_api(parts: &Arc<Parts>, stop: CancellationToken) -> LogApi {
    LogApi {
        ledger: parts.ledger.clone(),
        checkpoints: Arc::clone(&parts.checkpoints),
        people: Arc::clone(&parts.people),
        exports: Exports::new(stop),
    }
}

/// What answers those who walk trust roots through their lives, on either door.
fn root_api(parts: &Arc<Parts>) -> RootServiceServer<RootApi> {
    RootServiceServer::new(RootApi {
        rotation: Arc::clone(&parts.rotation),
        authority: Arc::clone(&parts.authority),
        people: Arc::clone(&parts.people),
    })
}

/// What answers those who revoke, on either door.
fn revocation_api(parts: &Arc<Parts>) -> RevocationServiceServer<RevocationApi> {
    RevocationServiceServer::new(RevocationApi {
        ledger: parts.ledger.clone(),
        authority: Arc::clone(&parts.authority),
        fleet: Arc::clone(&parts.fleet),
        clusters: Arc::clone(&parts.clusters),
        people: Arc::clone(&parts.people),
    })
}

fn serve_admin(listener: tokio::net::UnixListener, services: Services, stop: CancellationToken) -> impl Future<Output = ()> + Send {
    let Services { operators, log, roots, revocation } = services;
    let server = Server::builder()
        .concurrency_limit_per_connection(16)
        .add_service(operators)
        .add_service(LogServiceServer::new(log))
        .add_service(roots)
        .add_service(revocation)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop.cancelled_owned());
    async move {
        if let Err(error) = server.await {
            error!(%error, "the admin socket ended");
        }
    }
}

async fn serve_http(parts: Arc<Parts>, listener: tokio::net::TcpListener, registry: Registry, stop: CancellationToken) {
    let routes = health_routes(Arc::new(registry), move || parts.readiness());
    serve_tcp(listener, routes, stop).await;
}
