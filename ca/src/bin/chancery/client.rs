//! The way to a running CA: its admin socket, or its TLS port.

mod kubernetes;
mod remote;

use std::path::{Path, PathBuf};

use chancery_process::output::OutputError;
use chancery_proto::chancery::v1::log_service_client::LogServiceClient;
use chancery_proto::chancery::v1::operator_service_client::OperatorServiceClient;
use clap::Args;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::Status;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{self, Endpoint};

/// Where a CA that was installed has its socket.
const INSTALLED: &str = "/run/chancery/ca-admin.sock";
/// Where a development CA that was started in this directory has it.
const DEVELOPMENT: &str = "chancery-dev/admin.sock";
/// A page of identities with their certificates may be this large.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// Where the CA is, and who asks. Without any of it: the first usual place of a socket where there is one.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Connection")]
pub(crate) struct Way {
    /// The CA's admin socket. Without it: `/run/chancery/ca-admin.sock`, or the one of a development CA in `./chancery-dev`.
    #[arg(long, global = true, env = "CHANCERY_ADMIN_SOCKET", value_name = "PATH")]
    socket: Option<PathBuf>,
    /// The CA's TLS port, in place of its socket, for those whom its configuration names under `[roles]`. Needs the three options below, or
    /// `--kube`.
    #[arg(long, global = true, env = "CHANCERY_SERVER", value_name = "HOST:PORT")]
    server: Option<String>,
    /// The trust bundle that the CA is verified by, PEM.
    #[arg(long, global = true, env = "CHANCERY_CA_BUNDLE", value_name = "FILE")]
    ca_bundle: Option<PathBuf>,
    /// Your X509-SVID with its chain, PEM.
    #[arg(long, global = true, env = "CHANCERY_CERT", value_name = "FILE")]
    cert: Option<PathBuf>,
    /// The SVID's private key, PEM, PKCS#8; readable by you alone.
    #[arg(long, global = true, env = "CHANCERY_KEY", value_name = "FILE")]
    key: Option<PathBuf>,
    #[command(flatten)]
    kube: kubernetes::Options,
}

/// A connection, with what every call on it shows.
pub(crate) type Channel = InterceptedService<transport::Channel, kubernetes::Bearer>;

/// A CA to ask.
pub(crate) type Operator = OperatorServiceClient<Channel>;

/// A CA whose ledger is asked for.
pub(crate) type Log = LogServiceClient<Channel>;

/// Why a command did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// No CA behind the socket.
    #[error("no CA answers on {}: {reason}; is it running? Name its socket with --socket or CHANCERY_ADMIN_SOCKET", socket.display())]
    Unreachable { socket: PathBuf, reason: String },
    /// No CA behind the address, or one that is not trusted.
    #[error("no connection with the CA at {address}: {reason}")]
    Remote { address: String, reason: String },
    /// The CA refused or failed.
    #[error("{}", .0.message())]
    Refused(#[from] Box<Status>),
    /// The doctor found something bad, and has printed it.
    #[error("{0} of these keep certificates from being issued or renewed, or will soon")]
    Unwell(usize),
    /// The answer could not be printed.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// What was typed cannot be meant.
    #[error("{0}")]
    Usage(String),
    /// Two checkpoints of the CA's contradict each other.
    #[error("the ledger was rolled back or rewritten: {problem}")]
    Inconsistent { problem: String, note: String },
    /// Anything else, with its next step.
    #[error("{0}")]
    Failed(String),
}

impl From<Status> for CliError {
    fn from(status: Status) -> Self {
        Self::Refused(Box::new(status))
    }
}

/// Connects to the CA.
pub(crate) async fn connect(way: &Way) -> Result<Operator, CliError> {
    Ok(OperatorServiceClient::new(channel(way).await?).max_decoding_message_size(MAX_ANSWER_BYTES))
}

/// The same, with the service that its ledger is asked by.
pub(crate) async fn connect_both(way: &Way) -> Result<(Operator, Log), CliError> {
    let channel = channel(way).await?;
    let operator = OperatorServiceClient::new(channel.clone()).max_decoding_message_size(MAX_ANSWER_BYTES);
    Ok((operator, LogServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES)))
}

/// A connection to the CA, for any of its services.
pub(crate) async fn channel(way: &Way) -> Result<Channel, CliError> {
    let (channel, bearer) = match &way.server {
        Some(address) if way.kube.is_wanted() => remote::channel_by_token(address, way).await?,
        Some(address) => (remote::channel(address, way).await?, kubernetes::Bearer::none()),
        None if way.kube.is_wanted() => return Err(CliError::Usage("--kube goes over the CA's TLS port: name it with --server".into())),
        None => (local(way.socket.clone().unwrap_or_else(usual_socket)).await?, kubernetes::Bearer::none()),
    };
    Ok(InterceptedService::new(channel, bearer))
}

async fn local(socket: PathBuf) -> Result<transport::Channel, CliError> {
    let path = socket.clone();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The address is only a form to fill in: the connector knows the way.
    let connected = Endpoint::from_static("http://localhost").connect_with_connector(connector).await;
    connected.map_err(|error| CliError::Unreachable { socket, reason: root_cause(&error) })
}

fn usual_socket() -> PathBuf {
    let installed = Path::new(INSTALLED);
    let development = Path::new(DEVELOPMENT);
    if !installed.exists() && development.exists() { development.into() } else { installed.into() }
}

fn root_cause(mut error: &dyn std::error::Error) -> String {
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}
