//! What the command line needs of an API server: a short-lived token of a service account, asked for with a person's own kubeconfig.

use std::time::Duration;

use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::Api;
use kube::api::PostParams;
use kube::config::Kubeconfig;
use zeroize::Zeroizing;

use super::connection::{ANSWER_TIMEOUT, client, described, trustworthy};
use super::error::with_causes;

const USER_AGENT: &str = concat!("chancery/", env!("CARGO_PKG_VERSION"));
/// How long such a token is good for: the shortest that API servers grant.
pub const OPERATOR_TOKEN_LIFETIME: Duration = Duration::from_secs(600);

/// A service account's token.
pub type OperatorToken = Zeroizing<String>;

/// There is no token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OperatorTokenError {
    /// No API server is known.
    #[error("the kubeconfig leads to no API server: {0}")]
    Kubeconfig(String),
    /// The person may not ask for it, or the service account does not exist.
    #[error(
        "no token of service account {account}: {problem}; it must exist, and you must be allowed to create serviceaccounts/token for it"
    )]
    Refused {
        /// `namespace/name`
        account: String,
        /// What the API server says.
        problem: String,
    },
}

/// A token of a service account for `audience` and [`OPERATOR_TOKEN_LIFETIME`], from the API server of the person's kubeconfig (`KUBECONFIG`, or
/// `~/.kube/config`), of its current context unless another is named. It is kept nowhere.
///
/// # Errors
/// If there is no API server, or it does not grant it.
pub async fn request_operator_token(
    context: Option<String>,
    namespace: &str,
    account: &str,
    audience: &str,
) -> Result<OperatorToken, OperatorTokenError> {
    let read = async {
        let config = described(Kubeconfig::read().map_err(|error| with_causes(&error))?, context).await?;
        client(trustworthy(config)?, USER_AGENT)
    };
    let client = read.await.map_err(OperatorTokenError::Kubeconfig)?;
    let refused = |problem: String| OperatorTokenError::Refused { account: format!("{namespace}/{account}"), problem };
    let expiration_seconds = i64::try_from(OPERATOR_TOKEN_LIFETIME.as_secs()).ok();
    let spec = TokenRequestSpec { audiences: Some(vec![audience.to_owned()]), expiration_seconds, ..TokenRequestSpec::default() };
    let request = TokenRequest { spec: Some(spec), ..TokenRequest::default() };
    let accounts: Api<ServiceAccount> = Api::namespaced(client, namespace);
    let params = PostParams::default();
    let answer = tokio::time::timeout(ANSWER_TIMEOUT, accounts.create_token_request(account, &params, &request)).await;
    let answer = answer.map_err(|_| refused(format!("no answer within {} s", ANSWER_TIMEOUT.as_secs())))?;
    let answer = answer.map_err(|error| match error {
        kube::Error::Api(status) => refused(status.message.clone()),
        error => refused(with_causes(&error)),
    })?;
    answer.status.and_then(|status| status.token).map(Zeroizing::new).ok_or_else(|| refused("the answer has none".into()))
}
