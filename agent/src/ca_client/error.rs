//! What can go wrong between the agent and the CA.

use std::path::PathBuf;

use chancery_identity::{BundleError, CrlError, SvidError};

/// Why the agent has no connection, no identity, or no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaError {
    /// No TCP connection.
    #[error("cannot connect to the CA at {address}: {problem}")]
    Connect {
        /// As configured.
        address: String,
        /// What the system said.
        problem: String,
    },
    /// The handshake failed, usually because the CA could not be verified.
    #[error(
        "no TLS session with the CA at {address}: {problem}; if its root has changed, give the agent the new bundle or fingerprint, or run `chancery-agent reset`"
    )]
    Tls {
        /// As configured.
        address: String,
        /// What the verifier said.
        problem: String,
    },
    /// A file that the configuration names.
    #[error("cannot read {}: {problem}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The CA answered with an error.
    #[error("the CA refused {method}: {message} ({code:?})")]
    Refused {
        /// The method called.
        method: &'static str,
        /// The gRPC code.
        code: tonic::Code,
        /// The CA's words.
        message: String,
    },
    /// The connection broke.
    #[error("no connection to the CA: {0}")]
    Unavailable(String),
    /// There is no session, for the reason that was told when the last one ended or could not be opened.
    #[error("{0}")]
    NoSession(String),
    /// The CA's answer breaks a rule, so nothing of it was taken over.
    #[error("the CA's answer is not acceptable: {0}")]
    Answer(String),
    /// The certificate that the CA issued cannot be served.
    #[error("the certificate that the CA issued is not acceptable: {0}")]
    Svid(#[from] SvidError),
    /// A bundle that is none.
    #[error("the trust that the CA offers is not acceptable: {0}")]
    Bundle(#[from] BundleError),
    /// The file that trust starts from.
    #[error("trust.bundle_file: {}: {problem}", path.display())]
    BundleFile {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// CRLs that proxies would refuse everybody by.
    #[error("the CRLs that the CA offers are not acceptable: {0}")]
    Crl(#[from] CrlError),
    /// No key, no request, no TLS configuration.
    #[error("{0}")]
    Local(String),
}

impl CaError {
    /// Why there is no session, for people: only a broken connection sends them to the network.
    pub(super) fn no_session(&self) -> String {
        match self {
            Self::Connect { .. } | Self::Unavailable(_) => format!("the CA cannot be reached: {self}"),
            _ => format!("no session with the CA: {self}"),
        }
    }

    /// An error status of `method`.
    pub(super) fn from_status(method: &'static str, status: &tonic::Status) -> Self {
        match status.code() {
            tonic::Code::Unavailable | tonic::Code::Cancelled | tonic::Code::Unknown | tonic::Code::DeadlineExceeded => {
                Self::Unavailable(format!("{method}: {}", status.message()))
            }
            code => Self::Refused { method, code, message: status.message().to_owned() },
        }
    }
}
