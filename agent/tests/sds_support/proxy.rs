//! A proxy: speaks SDS through tonic's generated client, and says nothing that it was not told to.

use std::path::{Path, PathBuf};

use chancery_proto::any::Any;
use chancery_proto::envoy::config::core::v3::data_source::Specifier;
use chancery_proto::envoy::config::core::v3::{DataSource, Node};
use chancery_proto::envoy::extensions::transport_sockets::tls::v3::Secret;
use chancery_proto::envoy::extensions::transport_sockets::tls::v3::secret::Type;
use chancery_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse};
use chancery_proto::envoy::service::secret::v3::secret_discovery_service_client::SecretDiscoveryServiceClient;
use chancery_proto::google::rpc;
use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};

use super::{DEADLINE, QUIET};

pub const TYPE_URL: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";

/// One HTTP/2 connection.
#[derive(Clone)]
pub struct Proxy {
    client: SecretDiscoveryServiceClient<Channel>,
    authorization: Option<String>,
}

/// One open stream.
pub struct Stream<Q, R> {
    requests: mpsc::Sender<Q>,
    responses: Streaming<R>,
}

pub type WorldStream = Stream<DiscoveryRequest, DiscoveryResponse>;
pub type DeltaStream = Stream<DeltaDiscoveryRequest, DeltaDiscoveryResponse>;

impl Proxy {
    pub async fn connect(socket: &Path) -> Self {
        let socket: PathBuf = socket.to_owned();
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://sds").connect_with_connector(connector).await.unwrap();
        Self { client: SecretDiscoveryServiceClient::new(channel), authorization: Some("Bearer token".to_owned()) }
    }

    pub fn with_authorization(&self, authorization: Option<&str>) -> Self {
        Self { authorization: authorization.map(str::to_owned), ..self.clone() }
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(authorization) = &self.authorization {
            request.metadata_mut().insert("authorization", authorization.parse().unwrap());
        }
        request
    }

    pub async fn open_world(&mut self) -> Result<WorldStream, Status> {
        let (requests, receiver) = mpsc::channel(16);
        let request = self.request(ReceiverStream::new(receiver));
        let responses = self.client.stream_secrets(request).await?.into_inner();
        Ok(Stream { requests, responses })
    }

    pub async fn open_delta(&mut self) -> Result<DeltaStream, Status> {
        let (requests, receiver) = mpsc::channel(16);
        let request = self.request(ReceiverStream::new(receiver));
        let responses = self.client.delta_secrets(request).await?.into_inner();
        Ok(Stream { requests, responses })
    }

    /// Opens a stream and asks for these names.
    pub async fn world(&mut self, names: &[&str]) -> WorldStream {
        self.world_with(names, "").await
    }

    /// The same by a proxy that has a version already.
    pub async fn world_with(&mut self, names: &[&str], version: &str) -> WorldStream {
        let mut stream = self.open_world().await.unwrap();
        stream.ask(names, version).await;
        stream
    }

    /// The same by a proxy with this node ID.
    pub async fn world_of(&mut self, node: &str, names: &[&str]) -> WorldStream {
        let mut stream = self.open_world().await.unwrap();
        let node = Node { id: node.to_owned(), ..Node::default() };
        let request = DiscoveryRequest {
            node: Some(node),
            resource_names: owned(names),
            type_url: TYPE_URL.to_owned(),
            ..DiscoveryRequest::default()
        };
        stream.send(request).await;
        stream
    }

    /// Opens a delta stream and subscribes to these names, with what the proxy has of each.
    pub async fn delta(&mut self, names: &[&str], has: &[(&str, &str)]) -> DeltaStream {
        let mut stream = self.open_delta().await.unwrap();
        stream
            .send(DeltaDiscoveryRequest {
                node: Some(node()),
                type_url: TYPE_URL.to_owned(),
                resource_names_subscribe: owned(names),
                initial_resource_versions: has.iter().map(|(name, version)| ((*name).to_owned(), (*version).to_owned())).collect(),
                ..DeltaDiscoveryRequest::default()
            })
            .await;
        stream
    }

    pub async fn fetch(&mut self) -> Status {
        let request = self.request(DiscoveryRequest::default());
        self.client.fetch_secrets(request).await.unwrap_err()
    }
}

impl<Q, R> Stream<Q, R> {
    pub async fn send(&mut self, request: Q) {
        self.requests.send(request).await.unwrap();
    }

    /// The next response, which must come.
    pub async fn next(&mut self) -> R {
        tokio::time::timeout(DEADLINE, self.responses.message()).await.expect("no response").unwrap().expect("the stream ended")
    }

    /// Nothing comes.
    pub async fn quiet(&mut self) {
        if let Ok(found) = tokio::time::timeout(QUIET, self.responses.message()).await {
            panic!("expected silence, got {:?}", found.map(|message| message.is_some()));
        }
    }

    /// The server ends the stream.
    pub async fn end(&mut self) -> Result<(), Status> {
        let end = tokio::time::timeout(DEADLINE, self.responses.message()).await.expect("the stream goes on");
        end.map(|message| assert!(message.is_none(), "expected the end, got a response"))
    }
}

impl WorldStream {
    pub async fn ask(&mut self, names: &[&str], version: &str) {
        let request = DiscoveryRequest {
            version_info: version.to_owned(),
            node: Some(node()),
            resource_names: owned(names),
            type_url: TYPE_URL.to_owned(),
            ..DiscoveryRequest::default()
        };
        self.send(request).await;
    }

    /// Accepts a response to a stream of these names.
    pub async fn ack(&mut self, names: &[&str], response: &DiscoveryResponse) {
        let request = DiscoveryRequest {
            version_info: response.version_info.clone(),
            resource_names: owned(names),
            type_url: TYPE_URL.to_owned(),
            response_nonce: response.nonce.clone(),
            ..DiscoveryRequest::default()
        };
        self.send(request).await;
    }

    /// Refuses a response; `version` is what the proxy keeps.
    pub async fn nack(&mut self, names: &[&str], response: &DiscoveryResponse, version: &str, words: &str) {
        let request = DiscoveryRequest {
            version_info: version.to_owned(),
            resource_names: owned(names),
            type_url: TYPE_URL.to_owned(),
            response_nonce: response.nonce.clone(),
            error_detail: Some(refusal(words)),
            ..DiscoveryRequest::default()
        };
        self.send(request).await;
    }

    /// The next response, accepted.
    pub async fn accept(&mut self, names: &[&str]) -> DiscoveryResponse {
        let response = self.next().await;
        self.ack(names, &response).await;
        response
    }
}

impl DeltaStream {
    pub async fn answer(&mut self, response: &DeltaDiscoveryResponse, error: Option<&str>) {
        let request = DeltaDiscoveryRequest {
            type_url: TYPE_URL.to_owned(),
            response_nonce: response.nonce.clone(),
            error_detail: error.map(refusal),
            ..DeltaDiscoveryRequest::default()
        };
        self.send(request).await;
    }

    /// The next response, accepted.
    pub async fn accept(&mut self) -> DeltaDiscoveryResponse {
        let response = self.next().await;
        self.answer(&response, None).await;
        response
    }
}

/// The one secret in there.
pub fn secret(resources: &[Any]) -> Secret {
    let [resource] = resources else { panic!("{} resources instead of one", resources.len()) };
    assert_eq!(resource.type_url, TYPE_URL);
    Secret::decode(resource.value.clone()).unwrap()
}

/// Chain and key of a certificate, as PEM.
pub fn certificate(secret: &Secret) -> (String, String) {
    let Some(Type::TlsCertificate(certificate)) = &secret.r#type else { panic!("{} is no certificate", secret.name) };
    (inline(certificate.certificate_chain.as_ref()), inline(certificate.private_key.as_ref()))
}

/// The authorities of a validation context, as PEM, and its CRL.
pub fn authorities(secret: &Secret) -> (String, Option<String>) {
    let Some(Type::ValidationContext(context)) = &secret.r#type else { panic!("{} is no validation context", secret.name) };
    assert_eq!(context.only_verify_leaf_cert_crl, context.crl.is_some());
    (inline(context.trusted_ca.as_ref()), context.crl.as_ref().map(|crl| inline(Some(crl))))
}

fn inline(source: Option<&DataSource>) -> String {
    match source.and_then(|source| source.specifier.as_ref()) {
        Some(Specifier::InlineBytes(bytes)) => String::from_utf8(bytes.to_vec()).unwrap(),
        _ => panic!("no inline bytes"),
    }
}

pub fn node() -> Node {
    Node { id: "cart-envoy".to_owned(), ..Node::default() }
}

fn refusal(words: &str) -> rpc::Status {
    rpc::Status { code: 13, message: words.to_owned() }
}

pub fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}
