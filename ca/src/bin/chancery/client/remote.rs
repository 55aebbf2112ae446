//! The way over the CA's TLS port, which shows its X509-SVID; this end shows one as well, or the token of a service account.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chancery_identity::tls::{ServerTrust, client_config, trust_from};
use chancery_identity::{PrivateKey, SystemClock, TrustBundle, TrustDomain, TrustState, X509Svid};
use chancery_process::files::read_private;
use hyper_util::rt::TokioIo;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint, Uri};
use zeroize::{Zeroize, Zeroizing};

use super::kubernetes::Bearer;
use super::{CliError, Way, root_cause};

/// How long connecting may take.
const TIMEOUT: Duration = Duration::from_secs(10);

pub(super) async fn channel(address: &str, way: &Way) -> Result<Channel, CliError> {
    let svid = svid(given(way.cert.as_deref(), "--cert")?, given(way.key.as_deref(), "--key")?)?;
    // Nobody else operates the CA of a trust domain.
    let trust = trust(svid.id().trust_domain(), given(way.ca_bundle.as_deref(), "--ca-bundle")?)?;
    connected(address, Some(&svid), trust).await
}

/// Without a certificate; a token is only asked for once the CA has proved to be the one.
pub(super) async fn channel_by_token(address: &str, way: &Way) -> Result<(Channel, Bearer), CliError> {
    way.kube.account()?;
    let trust = trust(way.kube.trust_domain()?, given(way.ca_bundle.as_deref(), "--ca-bundle")?)?;
    let channel = connected(address, None, trust).await?;
    Ok((channel, Bearer::ask(&way.kube).await?))
}

async fn connected(address: &str, svid: Option<&X509Svid>, trust: TrustState) -> Result<Channel, CliError> {
    let failed = |reason: String| CliError::Remote { address: address.to_owned(), reason };
    let stream = tokio::time::timeout(TIMEOUT, handshake(address, svid, trust)).await;
    let stream = stream.map_err(|_| failed(format!("no answer within {} s", TIMEOUT.as_secs())))?.map_err(failed)?;
    let once = Mutex::new(Some(TokioIo::new(stream)));
    let connector = tower::service_fn(move |_: Uri| {
        let stream = once.lock().unwrap_or_else(PoisonError::into_inner).take();
        async move { stream.ok_or_else(|| io::Error::new(io::ErrorKind::NotConnected, "the connection has ended")) }
    });
    // The address is only a form to fill in: the connection is made.
    let connected = Endpoint::from_static("http://localhost").connect_with_connector(connector).await;
    connected.map_err(|error| failed(root_cause(&error)))
}

fn given<'a>(path: Option<&'a Path>, option: &str) -> Result<&'a Path, CliError> {
    path.ok_or_else(|| CliError::Usage(format!("--server needs {option} as well: both ends show who they are (or --kube)")))
}

fn svid(cert: &Path, key: &Path) -> Result<X509Svid, CliError> {
    let wrong = |path: &Path, problem: &dyn std::fmt::Display| CliError::Failed(format!("{}: {problem}", path.display()));
    let chain =
        CertificateDer::pem_file_iter(cert).and_then(Iterator::collect::<Result<Vec<_>, _>>).map_err(|error| wrong(cert, &error))?;
    let pem = read_private(key).map_err(|error| CliError::Failed(error.to_string()))?;
    let mut pkcs8 = PrivatePkcs8KeyDer::from_pem_slice(&pem).map_err(|_| wrong(key, &"it is no PKCS#8 private key in PEM"))?;
    let private = PrivateKey::from_pkcs8(Zeroizing::new(pkcs8.secret_pkcs8_der().to_vec()));
    pkcs8.zeroize();
    X509Svid::new(chain, private).map_err(|error| wrong(cert, &error))
}

fn trust(trust_domain: &TrustDomain, bundle: &Path) -> Result<TrustState, CliError> {
    let wrong = |problem: String| CliError::Failed(format!("{}: {problem}", bundle.display()));
    let pem = std::fs::read(bundle).map_err(|error| wrong(error.to_string()))?;
    let bundle = TrustBundle::from_pem(trust_domain.clone(), &pem).map_err(|error| wrong(error.to_string()))?;
    TrustState::new(0, trust_domain.clone(), [bundle]).map_err(|error| wrong(error.to_string()))
}

async fn handshake(address: &str, svid: Option<&X509Svid>, trust: TrustState) -> Result<TlsStream<TcpStream>, String> {
    let server_id = trust.trust_domain.member(["chancery", "ca"]).map_err(|error| error.to_string())?;
    let trust = ServerTrust::Bundle(trust_from(trust));
    let tls = client_config(trust, server_id, svid, Arc::new(SystemClock)).map_err(|error| error.to_string())?;
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host).trim_start_matches('[').trim_end_matches(']');
    let name = ServerName::try_from(host.to_owned()).map_err(|_| format!("{host:?} is no host name"))?;
    let tcp = TcpStream::connect(address).await.map_err(|error| format!("{error}; is it running, and is the address host:port?"))?;
    TlsConnector::from(Arc::new(tls)).connect(name, tcp).await.map_err(|error| error.to_string())
}
