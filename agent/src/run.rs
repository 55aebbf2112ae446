//! Wires the agent together and ends it in order.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use chancery_agent::ca_client::{CaClient, LedgerFile};
use chancery_agent::config::Config;
use chancery_agent::csi::{self, Places, Plugin, PluginError};
use chancery_agent::reload::Reloader;
use chancery_agent::sds::{self, Registry as Streams};
use chancery_agent::svids::{StateFile, Svids, Tenant};
use chancery_agent::telemetry::Metrics;
use chancery_agent::{admin, readiness};
use chancery_identity::{Clock, SystemClock};
use chancery_process::logging::{self, LogHandle};
use chancery_process::{files, hardening, http, shutdown};
use prometheus_client::registry::Registry;
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;

/// Two, so that a busy one does not hold up what is urgent; more would only cost memory.
const WORKERS: usize = 2;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Runs until a signal.
pub(crate) fn run(path: &Path) -> Result<(), Failure> {
    hardening::harden()?;
    let config = Config::load(path)?;
    let log = logging::init(&config.log)?;
    rustls::crypto::aws_lc_rs::default_provider().install_default().map_err(|_| "another TLS provider is installed already")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build()?;
    runtime.block_on(serve(path.to_owned(), config, log))
}

async fn serve(path: PathBuf, config: Config, log: LogHandle) -> Result<(), Failure> {
    let stop = shutdown::on_signal()?;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let mut registry = Registry::with_prefix("chancery_agent");
    let metrics = Metrics::new(&mut registry);

    // Everything that can be refused is opened before the agent joins: a start that fails leaves no trace at the CA.
    let cluster = config.cluster.0.clone();
    // First, since it leaves its directory open to proxies, and whoever else makes that leaves it to the agent alone.
    let sds = sds::Server::bind(config.sds())?;
    let state_file = StateFile::open(&config.state_dir, config.allow_disk_state, config.trust_domain.clone(), cluster)?;
    let state = state_file.load(clock.now())?;
    let places = config.csi().map(Places::take).transpose()?;
    let admin_listener = files::bind_socket(&config.admin_socket, admin::SOCKET_MODE)?;
    let http_listener = http::bind(config.http_listen).await?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        trust_domain = %config.trust_domain,
        cluster = config.cluster.0,
        socket = %config.sds.socket.display(),
        kept_workloads = state.workloads.len(),
        "chancery-agent starts"
    );

    // The proxies' streams end first, then the state is written, then the connection to the CA is given up.
    let (stop_svids, stop_ca) = (CancellationToken::new(), CancellationToken::new());
    let ledger = LedgerFile::in_directory(&config.state_dir);
    let (ca, ca_task) = CaClient::start(config.ca_client(), state.remembered, ledger, clock.clone(), metrics.clone(), stop_ca.clone());
    let svids_settings = config.svids(state_file);
    let (svids, svids_task) = Svids::start(svids_settings, state.workloads, ca.clone(), clock.clone(), metrics.clone(), stop_svids.clone());
    let streams = Streams::new(config.max_streams(), metrics.clone());

    let plugin = places.map(|places| places.plugin(svids.clone(), Arc::new(OnSds(sds.pods())), metrics.clone()));
    let (plugin, plugin_task) =
        plugin.map(|(plugin, listener)| (plugin.clone(), tokio::spawn(serve_kubelet(plugin, listener, stop.clone())))).unzip();

    let ready = {
        let (ca, plugin, clock) = (ca.clone(), plugin.clone(), clock.clone());
        move || readiness::readiness(&ca, plugin.as_ref(), clock.as_ref())
    };
    tokio::spawn(http::serve_tcp(http_listener, http::health_routes(Arc::new(registry), ready), stop.clone()));
    let reloader = Reloader::new(path, config.clone(), log, metrics)?;
    let routes = admin::routes(svids.clone(), streams.clone(), plugin, reloader.refused());
    tokio::spawn(http::serve_unix(admin_listener, routes, stop.clone()));
    tokio::spawn(reloader.run());

    let served = sds.run(Arc::new(svids.clone()), streams, clock, stop.clone()).await;
    stop.cancel();
    let kubelet_served = match plugin_task {
        Some(task) => task.await?,
        None => Ok(()),
    };
    stop_svids.cancel();
    svids_task.await?;
    stop_ca.cancel();
    ca_task.await?;
    remove_sockets(&config);
    tracing::info!("chancery-agent has ended");
    served?;
    Ok(kubelet_served?)
}

/// The agent ends with its plugin: pods would wait for nothing.
async fn serve_kubelet(plugin: Plugin, listener: UnixListener, stop: CancellationToken) -> Result<(), PluginError> {
    let _stops_all = stop.clone().drop_guard();
    plugin.run(listener, stop).await.inspect_err(|error| tracing::error!(%error, "the agent stops"))
}

/// The pods' sockets are served as the shared one is.
struct OnSds(sds::PodSockets);

impl csi::Sockets for OnSds {
    fn serve(&self, listener: UnixListener, tenant: Tenant, stop: CancellationToken) {
        self.0.serve(listener, tenant, stop);
    }
}

/// A client that connects to a dead socket is told less than one that finds none.
fn remove_sockets(config: &Config) {
    for path in [&config.sds.socket, &config.admin_socket] {
        if let Err(error) = std::fs::remove_file(path) {
            tracing::debug!(path = %path.display(), %error, "the socket was not removed");
        }
    }
}
