//! The way to a running CA: its admin socket.

use std::path::{Path, PathBuf};

use chancery_process::output::OutputError;
use chancery_proto::chancery::v1::operator_service_client::OperatorServiceClient;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

/// Where a CA that was installed has its socket.
const INSTALLED: &str = "/run/chancery/ca-admin.sock";
/// Where a development CA that was started in this directory has it.
const DEVELOPMENT: &str = "chancery-dev/admin.sock";
/// A page of identities with their certificates may be this large.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// A CA to ask.
pub(crate) type Operator = OperatorServiceClient<Channel>;

/// Why a command did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// No CA behind the socket.
    #[error("no CA answers on {}: {reason}; is it running? Name its socket with --socket or CHANCERY_ADMIN_SOCKET", socket.display())]
    Unreachable { socket: PathBuf, reason: String },
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
    /// Anything else, with its next step.
    #[error("{0}")]
    Failed(String),
}

impl From<Status> for CliError {
    fn from(status: Status) -> Self {
        Self::Refused(Box::new(status))
    }
}

/// Connects to the CA on `socket`, or on the first usual place where there is one.
pub(crate) async fn connect(socket: Option<PathBuf>) -> Result<Operator, CliError> {
    let socket = socket.unwrap_or_else(usual_socket);
    let unreachable = |reason: String| CliError::Unreachable { socket: socket.clone(), reason };
    let path = socket.clone();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The address is only a form to fill in: the connector knows the way.
    let endpoint = Endpoint::from_static("http://localhost");
    let channel = endpoint.connect_with_connector(connector).await.map_err(|error| unreachable(root_cause(&error)))?;
    Ok(OperatorServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES))
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
