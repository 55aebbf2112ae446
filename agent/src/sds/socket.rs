//! The Unix sockets: accept connections, give each its [`Connection`], and bound how many there are. One is shared by every pod; others are
//! one pod's each, and cost a task that waits, since all their connections are served together with the shared socket's.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::stream::{self, Stream};
use tokio::net::UnixListener;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::connection::{Connection, Origin};
use crate::accepted::{Accepted, Listener};
use crate::svids::Tenant;

/// Connections over the limit that are kept just to be told so; more are closed without a word.
const OVER_LIMIT: usize = 16;
/// A pod's own socket takes so many connections: its proxies need one each, and two while they restart.
const POD_CONNECTIONS: usize = 16;
/// Accepted connections of pods' sockets on their way to the service; more wait in their listeners.
const HANDED_OVER: usize = 64;

struct Acceptor {
    listener: Listener,
    origin: Origin,
    limit: usize,
    slots: Arc<Semaphore>,
    over_limit: Arc<Semaphore>,
    numbers: Numbers,
}

/// Numbers connections, among all of the process.
#[derive(Clone, Debug, Default)]
pub(super) struct Numbers(Arc<AtomicU64>);

/// Sockets that are one pod's each. Clones are the same.
#[derive(Clone, Debug)]
pub struct PodSockets {
    accepted: mpsc::Sender<Accepted>,
    numbers: Numbers,
}

impl PodSockets {
    /// Serves a pod on its own socket, whose streams need no token, until `stop`; then their streams end, too. Must be called within a tokio
    /// runtime.
    pub fn serve(&self, listener: UnixListener, tenant: Tenant, stop: CancellationToken) {
        let origin = Origin::Pod { tenant: Arc::new(tenant), stop: stop.clone() };
        let acceptor = Acceptor::new(listener, origin, POD_CONNECTIONS, self.numbers.clone());
        let accepted = self.accepted.clone();
        let accepting = async move { while accepted.send(acceptor.accept().await).await.is_ok() {} };
        tokio::spawn(stop.run_until_cancelled_owned(accepting));
    }
}

/// The pods' sockets, and what arrives there.
pub(super) fn pod_sockets(numbers: &Numbers) -> (PodSockets, ReceiverStream<Accepted>) {
    let (accepted, arriving) = mpsc::channel(HANDED_OVER);
    (PodSockets { accepted, numbers: numbers.clone() }, ReceiverStream::new(arriving))
}

/// The connections that arrive at the shared `listener`, at most `limit` at a time, and those of the pods' sockets.
pub(super) fn incoming(
    listener: UnixListener,
    limit: usize,
    numbers: Numbers,
    of_pods: ReceiverStream<Accepted>,
) -> impl Stream<Item = io::Result<Accepted>> + Send {
    let acceptor = Acceptor::new(listener, Origin::Shared, limit, numbers);
    let shared = stream::unfold(acceptor, |acceptor| async move { Some((acceptor.accept().await, acceptor)) });
    stream::StreamExt::map(stream::select(shared, of_pods), Ok)
}

impl Acceptor {
    fn new(listener: UnixListener, origin: Origin, limit: usize, numbers: Numbers) -> Self {
        Self {
            listener: Listener::new(listener),
            origin,
            limit,
            slots: Arc::new(Semaphore::new(limit)),
            over_limit: Arc::new(Semaphore::new(OVER_LIMIT)),
            numbers,
        }
    }

    async fn accept(&self) -> Accepted {
        loop {
            let stream = self.listener.accept().await;
            let (slot, over_limit) = match self.slots.clone().try_acquire_owned() {
                Ok(slot) => (slot, None),
                Err(_) => match self.over_limit.clone().try_acquire_owned() {
                    Ok(slot) => (slot, Some(self.limit)),
                    Err(_) => continue,
                },
            };
            let number = self.numbers.0.fetch_add(1, Ordering::Relaxed) + 1;
            return Accepted::new(stream, Connection::new(number, self.origin.clone(), over_limit, slot));
        }
    }
}
