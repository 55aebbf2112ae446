//! The TLS port: accepts connections, does their handshakes in time, and hands over only those that TLS let in.
//!
//! A peer that TLS refuses learns little about why, so the reason is logged here. Connections are bounded: what is over the limit is
//! closed at once, and counted.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use chancery_identity::{Serial, TrustState, tls};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use crate::api::{Peer, PeerSvid, Peers};
use crate::telemetry::Metrics;

/// How long after an error of `accept` (no file descriptors, usually) the next try waits.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Handshakes that are done and wait to be served.
const READY: usize = 64;

/// What the TLS port keeps to.
#[derive(Clone, Copy, Debug)]
pub(super) struct PortLimits {
    pub(super) max_connections: usize,
    pub(super) handshake_timeout: Duration,
    pub(super) max_connection_age: Duration,
    /// How long after that a connection may still last, for the calls under way.
    pub(super) grace: Duration,
}

/// Accepts until `shutdown`; the stream ends then.
pub(super) fn accept(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    peers: Arc<Peers>,
    trust: watch::Receiver<Arc<TrustState>>,
    limits: PortLimits,
    metrics: Arc<Metrics>,
    shutdown: CancellationToken,
) -> ReceiverStream<io::Result<Connection>> {
    let (ready, connections) = mpsc::channel(READY);
    let port = Port { acceptor: TlsAcceptor::from(tls), peers, trust, limits, metrics, ready };
    tokio::spawn(async move {
        tokio::select! {
            () = port.run(listener) => {}
            () = shutdown.cancelled() => {}
        }
    });
    ReceiverStream::new(connections)
}

#[derive(Clone)]
struct Port {
    acceptor: TlsAcceptor,
    peers: Arc<Peers>,
    /// What is revoked.
    trust: watch::Receiver<Arc<TrustState>>,
    limits: PortLimits,
    metrics: Arc<Metrics>,
    ready: mpsc::Sender<io::Result<Connection>>,
}

impl Port {
    async fn run(self, listener: TcpListener) {
        let room = Arc::new(Semaphore::new(self.limits.max_connections));
        loop {
            let (stream, address) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    warn!(%error, "cannot accept connections");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(permit) = Arc::clone(&room).try_acquire_owned() else {
                warn!(%address, limit = self.limits.max_connections, "connection refused: too many connections");
                self.metrics.connection_refused("limit");
                continue;
            };
            tokio::spawn(self.clone().handshake(stream, address, permit));
        }
    }

    async fn handshake(self, stream: TcpStream, address: SocketAddr, permit: OwnedSemaphorePermit) {
        // Answers are small; waiting to fill a packet would only delay them.
        if let Err(error) = stream.set_nodelay(true) {
            debug!(%address, %error, "cannot set TCP_NODELAY");
        }
        let refusal = match timeout(self.limits.handshake_timeout, self.acceptor.accept(stream)).await {
            Ok(Ok(stream)) => match self.peer(&stream, address) {
                Ok(peer) => {
                    let end = Box::pin(self.clone().end(peer.svid.as_ref().map(|svid| svid.serial), address));
                    // Nobody serves it any more if the CA is ending.
                    let _ending = self.ready.send(Ok(Connection { stream, peer, end, _permit: permit })).await;
                    return;
                }
                Err(error) => error,
            },
            // A port scan or a health check that only connects.
            Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                debug!(%address, "the peer left during the TLS handshake");
                return;
            }
            Ok(Err(error)) => tls::peer_error_of_io(&error).map_or_else(|| error.to_string(), ToString::to_string),
            Err(_) => format!("the TLS handshake took longer than {:?}", self.limits.handshake_timeout),
        };
        warn!(%address, reason = refusal, "connection refused");
        self.metrics.connection_refused("tls");
    }

    /// Waits until a connection must end, and says why.
    async fn end(mut self, serial: Option<Serial>, address: SocketAddr) -> &'static str {
        let age = sleep(self.limits.max_connection_age + self.limits.grace);
        // The handshake may have gone by before the revocation.
        self.trust.mark_changed();
        tokio::pin!(age);
        loop {
            tokio::select! {
                () = &mut age => return "the connection has reached its age",
                Ok(()) = self.trust.changed() => {
                    let crl = self.trust.borrow_and_update().crl.clone();
                    if let (Some(crl), Some(serial)) = (crl, serial)
                        && crl.revokes(serial)
                    {
                        warn!(%address, %serial, "connection ended: the peer's certificate was revoked");
                        self.metrics.connection_refused("revoked");
                        return "the peer's certificate was revoked";
                    }
                }
            }
        }
    }

    fn peer(&self, stream: &TlsStream<TcpStream>, address: SocketAddr) -> Result<Peer, String> {
        let leaf = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let svid = leaf.map(PeerSvid::of).transpose().map_err(|error| error.to_string())?;
        Ok(self.peers.connected(address, svid, self.limits.max_connection_age))
    }
}

/// A connection that TLS let in.
pub(super) struct Connection {
    stream: TlsStream<TcpStream>,
    peer: Peer,
    /// tonic asks the peer to leave when the connection reaches its age, but does not make it. Also when its certificate is revoked.
    end: Pin<Box<dyn Future<Output = &'static str> + Send>>,
    _permit: OwnedSemaphorePermit,
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Poll::Ready(why) = self.end.as_mut().poll(cx) {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, why)));
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
