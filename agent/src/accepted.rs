//! Connections on Unix sockets, from their being accepted to tonic's serving them.

use std::any::Any;
use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tonic::transport::server::Connected;

use crate::occasionally::Occasionally;

/// After an accept failed, commonly for want of file descriptors.
const PAUSE: Duration = Duration::from_millis(50);

/// A listening socket that outlives a want of file descriptors.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    failures_logged: Occasionally,
}

impl Listener {
    /// On this socket.
    pub fn new(socket: UnixListener) -> Self {
        Self { socket, failures_logged: Occasionally::default() }
    }

    /// The next connection, however long it takes.
    pub async fn accept(&self) -> UnixStream {
        loop {
            match self.socket.accept().await {
                Ok((stream, _)) => return stream,
                Err(error) => {
                    if self.failures_logged.allow() {
                        tracing::error!(%error, "cannot accept a connection; is the limit of open files too low?");
                    }
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

/// What is read and written on a connection.
trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Duplex for S {}

/// An accepted connection. The same type for every service, so that the code that serves one is in the program, and in memory, once.
pub struct Accepted {
    stream: Box<dyn Duplex>,
    info: Info,
}

/// What is known of a connection. It lives as long as the connection or a request on it does; requests have it among their extensions.
#[derive(Clone)]
pub struct Info(Arc<dyn Any + Send + Sync>);

impl Accepted {
    /// With what is known of it.
    pub fn new(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, info: impl Any + Send + Sync) -> Self {
        Self { stream: Box::new(stream), info: Info(Arc::new(info)) }
    }
}

impl Info {
    /// As the one who accepted the connection has put it in.
    pub fn get<T: Any>(&self) -> Option<&T> {
        self.0.downcast_ref()
    }
}

impl Connected for Accepted {
    type ConnectInfo = Info;

    fn connect_info(&self) -> Info {
        self.info.clone()
    }
}

impl fmt::Debug for Accepted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Accepted").finish_non_exhaustive()
    }
}

impl AsyncRead for Accepted {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, context: &mut Context<'_>, parts: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
