//! The Unix socket: accepts connections, gives each its [`Connection`], and bounds how many there are.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::stream::{self, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tonic::transport::server::Connected;

use super::connection::Connection;
use super::occasionally::Occasionally;

/// Connections over the limit that are kept just to be told so; more are closed without a word.
const OVER_LIMIT: usize = 16;
/// After an accept failed, commonly for want of file descriptors.
const PAUSE: Duration = Duration::from_millis(50);

/// One accepted connection.
pub(super) struct Accepted {
    stream: UnixStream,
    connection: Connection,
}

struct Acceptor {
    listener: UnixListener,
    slots: Arc<Semaphore>,
    over_limit: Arc<Semaphore>,
    next: u64,
    failures_logged: Occasionally,
}

/// The connections that arrive at `listener`, at most `limit` at a time.
pub(super) fn incoming(listener: UnixListener, limit: usize) -> impl Stream<Item = io::Result<Accepted>> + Send {
    let acceptor = Acceptor {
        listener,
        slots: Arc::new(Semaphore::new(limit)),
        over_limit: Arc::new(Semaphore::new(OVER_LIMIT)),
        next: 1,
        failures_logged: Occasionally::default(),
    };
    stream::unfold(acceptor, |mut acceptor| async move { Some((Ok(acceptor.accept().await), acceptor)) })
}

impl Acceptor {
    async fn accept(&mut self) -> Accepted {
        loop {
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    if self.failures_logged.allow() {
                        tracing::error!(%error, "cannot accept a connection; is the limit of open files too low?");
                    }
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            let (slot, over_limit) = match self.slots.clone().try_acquire_owned() {
                Ok(slot) => (slot, false),
                Err(_) => match self.over_limit.clone().try_acquire_owned() {
                    Ok(slot) => (slot, true),
                    Err(_) => continue,
                },
            };
            let connection = Connection::new(self.next, over_limit, slot);
            self.next += 1;
            return Accepted { stream, connection };
        }
    }
}

impl Connected for Accepted {
    type ConnectInfo = Connection;

    fn connect_info(&self) -> Connection {
        self.connection.clone()
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
