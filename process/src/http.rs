//! The plain HTTP port of a process: `/metrics`, `/livez`, `/readyz`; and other axum routers on local Unix sockets.
//!
//! Connections are bounded in number, and one that does not send its request is closed, so that a slow client cannot take the probes away.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::http::{Request, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tokio_stream::{Stream, StreamExt};
use tokio_util::sync::CancellationToken;

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const MAX_CONNECTIONS: usize = 64;
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// Nobody polls a probe over one connection for longer than this without a pause.
const CONNECTION_AGE: Duration = Duration::from_secs(300);
/// After an accept failed for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The port could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: {error}; is another process using this port? Stop it or configure another address")]
pub struct BindError {
    /// What was asked for.
    pub address: SocketAddr,
    /// What the system said.
    pub error: std::io::Error,
}

/// Can this process do its work?
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// Everything.
    Ready,
    /// It serves, but somebody should look; a sentence per reason. Answered with 200.
    Degraded(Vec<String>),
    /// It must not be sent work; a sentence per reason. Answered with 503.
    NotReady(Vec<String>),
}

impl IntoResponse for Readiness {
    fn into_response(self) -> Response {
        let (status, word, reasons) = match self {
            Self::Ready => (StatusCode::OK, "ready", Vec::new()),
            Self::Degraded(reasons) => (StatusCode::OK, "degraded", reasons),
            Self::NotReady(reasons) => (StatusCode::SERVICE_UNAVAILABLE, "not ready", reasons),
        };
        let mut text = format!("{word}\n");
        for reason in reasons {
            text.push_str("- ");
            text.push_str(&reason);
            text.push('\n');
        }
        (status, text).into_response()
    }
}

/// Opens a TCP port.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).await.map_err(|error| BindError { address, error })
}

/// `/metrics`, `/livez` and `/readyz`. `readiness` is asked at each probe and must answer quickly.
pub fn health_routes<R>(registry: Arc<Registry>, readiness: R) -> Router
where
    R: Fn() -> Readiness + Clone + Send + Sync + 'static,
{
    Router::new()
        .route("/metrics", get(move || async move { metrics(&registry) }))
        .route("/livez", get(|| async { "alive\n" }))
        .route("/readyz", get(move || async move { readiness() }))
}

fn metrics(registry: &Registry) -> Response {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, registry) {
        Ok(()) => ([(CONTENT_TYPE, OPENMETRICS)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("the metrics cannot be encoded: {error}\n")).into_response(),
    }
}

/// Serves `router` on a TCP port until `shutdown`.
pub async fn serve_tcp(listener: TcpListener, router: Router, shutdown: CancellationToken) {
    serve(TcpListenerStream::new(listener), router, shutdown).await;
}

/// Serves `router` on a Unix socket (see [`crate::files::bind_socket`]) until `shutdown`.
pub async fn serve_unix(listener: UnixListener, router: Router, shutdown: CancellationToken) {
    serve(UnixListenerStream::new(listener), router, shutdown).await;
}

async fn serve<S>(mut incoming: impl Stream<Item = std::io::Result<S>> + Unpin, router: Router, shutdown: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    while let Some(Some(accepted)) = shutdown.run_until_cancelled(incoming.next()).await {
        let Ok(stream) = accepted else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        // Over the bound the connection is closed at once: its client sees that, instead of waiting.
        let Ok(slot) = slots.clone().try_acquire_owned() else { continue };
        let connection = serve_connection(Box::new(stream), router.clone(), shutdown.clone());
        tokio::spawn(async move {
            connection.await;
            drop(slot);
        });
    }
}

/// A connection of either kind, so that the code that serves one is in the program, and in memory, once.
trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Duplex for S {}

fn serve_connection(stream: Box<dyn Duplex>, router: Router, shutdown: CancellationToken) -> impl Future<Output = ()> {
    let service = TowerToHyperService::new(tower::service_fn(move |request: Request<Incoming>| {
        let router = router.clone();
        async move { tower::ServiceExt::oneshot(router, request).await }
    }));
    async move {
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = std::pin::pin!(connection);
        tokio::select! {
            // What goes wrong with one client's connection is that client's to notice.
            _ = connection.as_mut() => return,
            () = shutdown.cancelled() => {}
            () = tokio::time::sleep(CONNECTION_AGE) => {}
        }
        connection.as_mut().graceful_shutdown();
        let _ = tokio::time::timeout(HEADER_TIMEOUT, connection).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use prometheus_client::metrics::counter::Counter;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpStream, UnixStream};

    use super::*;

    async fn ask(mut stream: impl AsyncRead + AsyncWrite + Unpin, path: &str) -> String {
        stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    async fn serving(readiness: Readiness) -> (SocketAddr, Arc<Mutex<Readiness>>, CancellationToken) {
        let mut registry = Registry::default();
        let issued = Counter::<u64>::default();
        issued.inc_by(3);
        registry.register("chancery_issued", "Certificates issued", issued);
        let state = Arc::new(Mutex::new(readiness));
        let shared = state.clone();
        let routes = health_routes(Arc::new(registry), move || shared.lock().unwrap().clone());
        let listener = bind(([127, 0, 0, 1], 0).into()).await.unwrap();
        let (address, shutdown) = (listener.local_addr().unwrap(), CancellationToken::new());
        tokio::spawn(serve_tcp(listener, routes, shutdown.clone()));
        (address, state, shutdown)
    }

    #[tokio::test]
    async fn metrics_are_open_metrics() {
        let (address, ..) = serving(Readiness::Ready).await;
        let answer = ask(TcpStream::connect(address).await.unwrap(), "/metrics").await;
        assert!(answer.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n"), "{answer}");
        assert!(answer.contains("chancery_issued_total 3\n") && answer.ends_with("# EOF\n"), "{answer}");
    }

    #[tokio::test]
    async fn readiness_is_asked_at_each_probe_and_names_its_reasons() {
        let (address, state, _) = serving(Readiness::Ready).await;
        let probe = async || ask(TcpStream::connect(address).await.unwrap(), "/readyz").await;
        assert!(probe().await.starts_with("HTTP/1.1 200"));
        *state.lock().unwrap() = Readiness::Degraded(vec!["the CA is away".into()]);
        let degraded = probe().await;
        assert!(degraded.starts_with("HTTP/1.1 200") && degraded.ends_with("degraded\n- the CA is away\n"), "{degraded}");
        *state.lock().unwrap() = Readiness::NotReady(vec!["no keys of cluster east".into()]);
        let unready = probe().await;
        assert!(unready.starts_with("HTTP/1.1 503") && unready.contains("no keys of cluster east"), "{unready}");
        assert!(ask(TcpStream::connect(address).await.unwrap(), "/livez").await.starts_with("HTTP/1.1 200"));
    }

    #[tokio::test]
    async fn a_port_in_use_is_refused_with_a_next_step() {
        let (address, ..) = serving(Readiness::Ready).await;
        let error = bind(address).await.unwrap_err().to_string();
        assert!(error.contains(&address.to_string()) && error.contains("another address"), "{error}");
    }

    #[tokio::test]
    async fn connections_are_bounded_and_come_free_again() {
        let (address, ..) = serving(Readiness::Ready).await;
        let mut idle = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            idle.push(TcpStream::connect(address).await.unwrap());
        }
        let mut over = TcpStream::connect(address).await.unwrap();
        assert_eq!(over.read(&mut [0; 1]).await.unwrap_or(0), 0, "closed without an answer");
        drop(idle);
        let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
        loop {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let _ = stream.write_all(b"GET /livez HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
            let mut answer = Vec::new();
            if stream.read_to_end(&mut answer).await.is_ok() && answer.starts_with(b"HTTP/1.1 200") {
                break;
            }
            assert!(tokio::time::Instant::now() < deadline, "the slots did not come free");
        }
    }

    #[tokio::test]
    async fn shutdown_closes_the_port() {
        let (address, _, shutdown) = serving(Readiness::Ready).await;
        shutdown.cancel();
        let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
        while TcpStream::connect(address).await.is_ok() {
            assert!(tokio::time::Instant::now() < deadline, "still accepting");
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_router_is_served_on_a_unix_socket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("admin.sock");
        let listener = crate::files::bind_socket(&path, 0o600).unwrap();
        let router = Router::new().route("/status", get(|| async { "fine" }));
        tokio::spawn(serve_unix(listener, router, CancellationToken::new()));
        let answer = ask(UnixStream::connect(&path).await.unwrap(), "/status").await;
        assert!(answer.ends_with("fine"), "{answer}");
    }
}
