//! A gRPC channel on one TLS connection that the agent made itself.
//!
//! The handshake is done here rather than by tonic, for errors that say what failed; and a channel never reconnects by itself, since each
//! connection must be made with the identity and the trust of its moment.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};

use super::CaError;

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// How much of an answer may be on its way unread: many certificates arrive in one go.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 512 << 10;
/// Messages on their way into the connection; more wait at the caller.
const CALLS_QUEUED: usize = 16;

/// Connects to `address` (`host:port`).
pub(super) async fn connect(address: &str, tls: ClientConfig) -> Result<Channel, CaError> {
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake(address, tls)).await {
        Ok(channel) => channel,
        Err(_) => Err(CaError::Connect { address: address.to_owned(), problem: format!("no answer within {HANDSHAKE_TIMEOUT:?}") }),
    }
}

async fn handshake(address: &str, tls: ClientConfig) -> Result<Channel, CaError> {
    let tcp = TcpStream::connect(address)
        .await
        .and_then(|tcp| tcp.set_nodelay(true).map(|()| tcp))
        .map_err(|e| CaError::Connect { address: address.to_owned(), problem: e.to_string() })?;
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host).trim_start_matches('[').trim_end_matches(']');
    let name = ServerName::try_from(host.to_owned())
        .map_err(|_| CaError::Connect { address: address.to_owned(), problem: format!("{host:?} is no host name") })?;
    let stream = TlsConnector::from(Arc::new(tls)).connect(name, tcp).await.map_err(|e| refuse(address, &e))?;

    let uri = Uri::try_from(format!("http://{address}")).map_err(|e| CaError::Local(format!("{address:?}: {e}")))?;
    let once = Mutex::new(Some(TokioIo::new(stream)));
    let connector = tower::service_fn(move |_: Uri| {
        let stream = once.lock().unwrap_or_else(PoisonError::into_inner).take();
        async move { stream.ok_or_else(|| io::Error::new(io::ErrorKind::NotConnected, "the connection has ended")) }
    });
    Endpoint::from(uri)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .buffer_size(CALLS_QUEUED)
        .connect_with_connector(connector)
        .await
        .map_err(|e| CaError::Unavailable(describe(&e)))
}

/// A handshake fails because the peer is not trusted, or because the connection broke meanwhile.
fn refuse(address: &str, error: &io::Error) -> CaError {
    let (address, problem) = (address.to_owned(), error.to_string());
    if let Some(cause) = error.get_ref()
        && cause.is::<rustls::Error>()
    {
        CaError::Tls { address, problem }
    } else {
        CaError::Connect { address, problem }
    }
}

/// An error with its causes, which tonic's own text leaves out.
pub(super) fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
