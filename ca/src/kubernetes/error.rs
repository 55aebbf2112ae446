//! Why an API server cannot be asked, or did not answer.

use http::StatusCode;
use kube::client::AuthError;
use serde::Deserialize;

use super::KubernetesSettings;

/// What the CA's service account must be allowed in a cluster.
pub const CLUSTER_ROLE: &str = "bind its account to a ClusterRole with the rules {apiGroups: [\"\"], resources: [pods, serviceaccounts], \
     verbs: [get, list, watch]}, {apiGroups: [authentication.k8s.io], resources: [tokenreviews], verbs: [create]} and \
     {nonResourceURLs: [/openid/v1/jwks], verbs: [get]}; for `operators` also {apiGroups: [authorization.k8s.io], \
     resources: [subjectaccessreviews], verbs: [create]}";
/// How much of an API server's words is repeated.
const MAX_MESSAGE: usize = 300;

/// The settings lead to no API server.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no connection can be made as {settings} says: {problem}")]
pub struct ConnectError {
    /// Where the connection is described.
    pub settings: KubernetesSettings,
    /// What is wrong, and what to do.
    pub problem: String,
}

/// An API server did not answer what it was asked. The same question may be answered later.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ApiError {
    /// No connection, no answer in time, or the server says that it cannot answer now.
    #[error("{0}")]
    Away(String),
    /// It is not known where to ask.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It does not know the CA's credentials.
    #[error("the API server does not accept the CA's credentials ({0}): see that its token or client certificate is valid")]
    Unauthorized(String),
    /// It knows the CA, and denies it this.
    #[error("the API server denies it to the CA ({0}): {CLUSTER_ROLE}")]
    Forbidden(String),
    /// It does not answer such a question at all.
    #[error("the API server answered {0}")]
    Refused(String),
    /// The answer cannot be read.
    #[error("the API server's answer cannot be read: {0}")]
    Unreadable(String),
}

/// As far as it is read: `metav1.Status`.
#[derive(Deserialize)]
struct Status {
    #[serde(default)]
    message: String,
}

impl ApiError {
    /// By the answer's status, with the words of its body.
    pub(super) fn from_answer(status: StatusCode, body: &[u8]) -> Self {
        let words = serde_json::from_slice(body).map_or_else(|_| String::new(), |status: Status| status.message);
        Self::from_words(status, &words)
    }

    pub(super) fn from_words(status: StatusCode, words: &str) -> Self {
        let words = if words.is_empty() { status.to_string() } else { format!("{}: {}", status.as_u16(), shortened(words)) };
        match status {
            StatusCode::UNAUTHORIZED => Self::Unauthorized(words),
            StatusCode::FORBIDDEN => Self::Forbidden(words),
            StatusCode::TOO_MANY_REQUESTS => Self::Away(format!("the API server answered {words}")),
            status if status.is_server_error() => Self::Away(format!("the API server answered {words}")),
            _ => Self::Refused(words),
        }
    }
}

impl From<kube::Error> for ApiError {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => {
                let code = StatusCode::from_u16(status.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
                Self::from_words(code, &status.message)
            }
            kube::Error::SerdeError(error) => Self::Unreadable(error.to_string()),
            kube::Error::Service(error) => match error.downcast::<Self>() {
                Ok(error) => *error,
                Err(error) => Self::Away(with_causes(&*error)),
            },
            error @ kube::Error::Auth(_) => Self::Unauthorized(words_of(&error)),
            error => Self::Away(with_causes(&error)),
        }
    }
}

/// What a program that was to bring a token has printed beside its complaint may hold one.
pub(super) fn words_of(error: &kube::Error) -> String {
    match error {
        kube::Error::Auth(AuthError::AuthExecRun { out, .. }) => {
            shortened(&format!("it ended with {}: {}", out.status, String::from_utf8_lossy(&out.stderr).trim()))
        }
        error => with_causes(error),
    }
}

/// Libraries say only "client error (Connect)"; what to mend stands in the causes.
pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let words = inner.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = inner.source();
    }
    shortened(&text)
}

pub(super) fn shortened(text: &str) -> String {
    text.chars().take(MAX_MESSAGE).collect()
}
