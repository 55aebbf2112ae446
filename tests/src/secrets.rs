//! A proxy without a proxy: asks the agent's socket for secrets, as Envoy does, and hands them out.

use std::path::Path;
use std::time::Duration;

use chancery_identity::{PrivateKey, TrustBundle, TrustDomain, X509Svid};
use chancery_proto::envoy::config::core::v3::{DataSource, Node, data_source};
use chancery_proto::envoy::extensions::transport_sockets::tls::v3::{Secret, secret};
use chancery_proto::envoy::service::discovery::v3::{DiscoveryRequest, DiscoveryResponse};
use chancery_proto::envoy::service::secret::v3::secret_discovery_service_client::SecretDiscoveryServiceClient;
use chancery_proto::google::rpc::Status;
use hyper_util::rt::TokioIo;
use prost::Message;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Streaming};
use zeroize::Zeroizing;

use crate::Result;

/// What a proxy needs.
const BOTH: [&str; 2] = ["default", "ROOTCA"];
pub(crate) const TYPE_URL: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";

/// What a proxy needs to talk mutual TLS.
pub struct Secrets {
    /// Chain and key.
    pub svid: X509Svid,
    /// The trust roots.
    pub bundle: TrustBundle,
}

/// Opens a stream with this token and waits for `default` and `ROOTCA`.
pub async fn fetch(socket: &Path, token: Option<&str>, within: Duration) -> Result<Secrets> {
    fetch_over(connect(socket).await?, token, within).await
}

/// The same over a connection that is there already.
pub async fn fetch_over(channel: Channel, token: Option<&str>, within: Duration) -> Result<Secrets> {
    tokio::time::timeout(within, first_secrets(channel, token)).await.map_err(|_| format!("no secrets within {within:?}"))?
}

/// A connection to the agent's socket.
pub async fn connect(socket: &Path) -> Result<Channel> {
    let socket = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    // The connector knows the way; the address only fills in `:authority`.
    Ok(Endpoint::from_static("http://localhost").connect_with_connector(connector).await?)
}

async fn first_secrets(channel: Channel, token: Option<&str>) -> Result<Secrets> {
    let mut stream = Stream::open(channel, token, ask(&BOTH)).await?;
    stream.answer_all(None).await
}

/// Opens a stream, accepts the first `default` and `ROOTCA` or refuses them with these words, and holds it open.
pub async fn hold(socket: &Path, token: Option<&str>, refuse: Option<&str>, within: Duration) -> Result<Stream> {
    let held = async {
        let mut stream = open(socket, token, ask(&BOTH)).await?;
        stream.answer_all(refuse).await?;
        Ok(stream)
    };
    tokio::time::timeout(within, held).await.map_err(|_| format!("no secrets within {within:?}"))?
}

/// What a proxy asks with that has none of these secrets yet.
pub fn ask(names: &[&str]) -> DiscoveryRequest {
    DiscoveryRequest {
        node: Some(Node { id: "test-proxy".into(), ..Node::default() }),
        resource_names: names.iter().map(ToString::to_string).collect(),
        type_url: TYPE_URL.into(),
        ..DiscoveryRequest::default()
    }
}

/// Opens a stream over a connection of its own, and answers nothing yet.
pub async fn open(socket: &Path, token: Option<&str>, ask: DiscoveryRequest) -> Result<Stream> {
    Stream::open(connect(socket).await?, token, ask).await
}

/// An open stream; dropped, it ends.
pub struct Stream {
    ask: DiscoveryRequest,
    requests: mpsc::Sender<DiscoveryRequest>,
    responses: Streaming<DiscoveryResponse>,
}

impl Stream {
    async fn open(channel: Channel, token: Option<&str>, ask: DiscoveryRequest) -> Result<Self> {
        let (requests, receiver) = mpsc::channel(4);
        requests.send(ask.clone()).await?;
        let mut request = Request::new(ReceiverStream::new(receiver));
        if let Some(token) = token {
            request.metadata_mut().insert("authorization", format!("Bearer {token}").parse()?);
        }
        let responses = SecretDiscoveryServiceClient::new(channel).stream_secrets(request).await?.into_inner();
        Ok(Self { ask, requests, responses })
    }

    /// Accepts the next thing that comes, or refuses it with these words.
    pub async fn answer(&mut self, refuse: Option<&str>, within: Duration) -> Result<()> {
        let response = tokio::time::timeout(within, self.responses.message()).await.map_err(|_| format!("nothing within {within:?}"))??;
        self.answer_to(&response.ok_or("the agent ended the stream")?, refuse).await
    }

    /// Ends the stream; what its proxy asks with when it comes back, which names the version that it accepted last.
    pub fn end(self) -> DiscoveryRequest {
        self.ask
    }

    async fn answer_to(&mut self, response: &DiscoveryResponse, refuse: Option<&str>) -> Result<()> {
        let error_detail = refuse.map(|words| Status { code: tonic::Code::InvalidArgument.into(), message: words.to_owned() });
        if error_detail.is_none() {
            self.ask.version_info.clone_from(&response.version_info);
        }
        let answer = DiscoveryRequest { response_nonce: response.nonce.clone(), node: None, error_detail, ..self.ask.clone() };
        Ok(self.requests.send(answer).await?)
    }

    /// Answers until both secrets have come: accepts, or refuses with these words.
    pub async fn answer_all(&mut self, refuse: Option<&str>) -> Result<Secrets> {
        let (mut svid, mut bundle) = (None, None);
        loop {
            let response = self.responses.message().await?.ok_or("the agent ended the stream")?;
            for secret in decode(&response)? {
                match secret {
                    secret::Type::TlsCertificate(certificate) => {
                        svid = Some(read_svid(certificate.certificate_chain.as_ref(), certificate.private_key.as_ref())?);
                    }
                    secret::Type::ValidationContext(context) => bundle = Some(bytes(context.trusted_ca.as_ref())?.to_vec()),
                }
            }
            self.answer_to(&response, refuse).await?;
            if let (Some(svid), Some(bundle)) = (&svid, &bundle) {
                let svid: &X509Svid = svid;
                let trust_domain: TrustDomain = svid.id().trust_domain().clone();
                return Ok(Secrets { svid: svid.clone(), bundle: TrustBundle::from_pem(trust_domain, bundle)? });
            }
        }
    }
}

fn decode(response: &DiscoveryResponse) -> Result<Vec<secret::Type>> {
    let secrets = response.resources.iter().map(|any| Secret::decode(any.value.as_ref()));
    let secrets = secrets.collect::<Result<Vec<_>, _>>()?;
    Ok(secrets.into_iter().filter_map(|secret| secret.r#type).collect())
}

fn read_svid(chain: Option<&DataSource>, key: Option<&DataSource>) -> Result<X509Svid> {
    let chain = CertificateDer::pem_slice_iter(bytes(chain)?).collect::<Result<Vec<_>, _>>()?;
    let key = PrivatePkcs8KeyDer::from_pem_slice(bytes(key)?)?;
    Ok(X509Svid::new(chain, PrivateKey::from_pkcs8(Zeroizing::new(key.secret_pkcs8_der().to_vec())))?)
}

fn bytes(source: Option<&DataSource>) -> Result<&[u8]> {
    match source.and_then(|source| source.specifier.as_ref()) {
        Some(data_source::Specifier::InlineBytes(bytes)) => Ok(bytes),
        Some(data_source::Specifier::InlineString(text)) => Ok(text.as_bytes()),
        _ => Err("the secret has no inline content".into()),
    }
}
