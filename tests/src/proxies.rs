//! Proxies by the hundred, without an Envoy: each has a connection of its own, one stream for its certificate and one for its bundle, as an
//! Envoy has, and accepts whatever comes.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use chancery_proto::envoy::config::core::v3::Node;
use chancery_proto::envoy::service::discovery::v3::DiscoveryRequest;
use chancery_proto::envoy::service::secret::v3::secret_discovery_service_client::SecretDiscoveryServiceClient;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Request;
use tonic::transport::Channel;

use crate::secrets::{self, TYPE_URL};
use crate::{Result, wait};

/// What a stream is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Secret {
    /// `default`.
    Certificate,
    /// `ROOTCA`.
    Bundle,
}

/// Proxies that hold their streams open until this is dropped.
pub struct Proxies {
    socket: PathBuf,
    streams: Vec<Arc<Accepted>>,
    tasks: JoinSet<()>,
}

/// What one stream has accepted.
struct Accepted {
    secret: Secret,
    count: AtomicUsize,
    last: Mutex<SystemTime>,
}

/// How many secrets each stream had accepted at a moment.
pub struct Mark(Vec<usize>);

impl Proxies {
    /// None yet, of the agent that listens there.
    pub fn of(socket: &Path) -> Self {
        Self { socket: socket.to_owned(), streams: Vec::new(), tasks: JoinSet::new() }
    }

    /// Starts one more of the pod whose token this is.
    pub async fn add(&mut self, token: &str) -> Result<()> {
        let node = format!("proxy-{}", self.streams.len() / 2);
        let channel = secrets::connect(&self.socket).await?;
        for secret in [Secret::Bundle, Secret::Certificate] {
            let accepted = Arc::new(Accepted { secret, count: AtomicUsize::new(0), last: Mutex::new(SystemTime::UNIX_EPOCH) });
            self.streams.push(accepted.clone());
            self.tasks.spawn(accept_all(channel.clone(), token.to_owned(), node.clone(), accepted));
        }
        Ok(())
    }

    /// How far each stream has come by now.
    pub fn mark(&self) -> Mark {
        Mark(self.streams.iter().map(|stream| stream.count.load(Ordering::SeqCst)).collect())
    }

    /// Waits until every proxy has accepted its first certificate and bundle.
    pub async fn served(&self, within: Duration) -> Result<()> {
        let before = Mark(vec![0; self.streams.len()]);
        self.accepted(Secret::Bundle, &before, within).await?;
        self.accepted(Secret::Certificate, &before, within).await.map(drop)
    }

    /// Waits until every proxy has accepted one of these since `before`; tells when the last did.
    pub async fn accepted(&self, secret: Secret, before: &Mark, within: Duration) -> Result<SystemTime> {
        let of_kind = || self.streams.iter().zip(&before.0).filter(|(stream, _)| stream.secret == secret);
        wait::until(&format!("every proxy accepts a {secret:?}"), within, async || {
            let waiting = of_kind().filter(|(stream, before)| stream.count.load(Ordering::SeqCst) <= **before).count();
            if waiting == 0 { Ok(()) } else { Err(format!("{waiting} have not")) }
        })
        .await?;
        let last = of_kind().map(|(stream, _)| *stream.last.lock().unwrap_or_else(PoisonError::into_inner)).max();
        last.ok_or_else(|| "there are no proxies".into())
    }
}

/// Until the agent ends the stream.
async fn accept_all(channel: Channel, token: String, node: String, accepted: Arc<Accepted>) {
    // Whoever waits for this stream says how many have accepted nothing.
    let _ended = serve(channel, &token, node, &accepted).await;
}

async fn serve(channel: Channel, token: &str, node: String, accepted: &Accepted) -> Result<()> {
    let name = match accepted.secret {
        Secret::Certificate => "default",
        Secret::Bundle => "ROOTCA",
    };
    let ask = DiscoveryRequest { resource_names: vec![name.to_owned()], type_url: TYPE_URL.to_owned(), ..DiscoveryRequest::default() };
    let (requests, receiver) = mpsc::channel(4);
    requests.send(DiscoveryRequest { node: Some(Node { id: node, ..Node::default() }), ..ask.clone() }).await?;
    let mut request = Request::new(ReceiverStream::new(receiver));
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse()?);
    let mut responses = SecretDiscoveryServiceClient::new(channel).stream_secrets(request).await?.into_inner();
    while let Some(response) = responses.message().await? {
        let answer = DiscoveryRequest { version_info: response.version_info, response_nonce: response.nonce, ..ask.clone() };
        requests.send(answer).await?;
        *accepted.last.lock().unwrap_or_else(PoisonError::into_inner) = SystemTime::now();
        accepted.count.fetch_add(1, Ordering::SeqCst);
    }
    Ok(())
}
