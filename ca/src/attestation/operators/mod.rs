//! Operators by their cluster's RBAC: whose token is this, and does the cluster let them do that?
//!
//! A token is believed if it is for [`OPERATORS_AUDIENCE`] and nothing else, is signed by the cluster, and its API server believes it, too (`TokenReview`); what its
//! owner may do the API server says too (`SubjectAccessReview`). A token that is good for anything else is not sent anywhere: whoever could
//! read it on its way could use it there. Answers are remembered for a few seconds ([`Verdicts`]), failures never.

mod verdicts;

use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chancery_identity::token::TokenError;
use serde::Deserialize;

pub(super) use verdicts::Verdicts;

use super::Clusters;
use super::answers::{check_authenticated, is_for};
use super::keys::Cluster;
use super::live::Live;
use crate::kubernetes::{ApiError, ApiServer, TokenReviewStatus, UserInfo};

/// What people's tokens are for.
pub const OPERATORS_AUDIENCE: &str = "chancery-admin";
/// The metadata that names a token's cluster, where several have operators.
pub const OPERATORS_CLUSTER_KEY: &str = "chancery-cluster";
/// The API group of the resources that RBAC names. Nothing is stored there.
const GROUP: &str = "chancery.dev";
/// How the API server names service accounts.
const SERVICE_ACCOUNT: &str = "system:serviceaccount:";
/// No token of a service account comes near.
const MAX_TOKEN_BYTES: usize = 16 << 10;

/// What somebody wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Right {
    /// Reading or acting.
    pub verb: Verb,
    /// On what.
    pub resource: Resource,
}

/// As RBAC rules name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// `get`: every way of reading.
    Get,
    /// `update`: every act.
    Update,
}

/// Of [`GROUP`], as RBAC rules name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// `trustroots`: the roots, and how the CA stands.
    TrustRoots,
    /// `identities`: what was issued, refused and revoked.
    Identities,
    /// `agents`
    Agents,
    /// `log`: the ledger.
    Log,
}

/// A service account that the API server believes in, and what it says about a [`Right`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operator {
    /// Whose service account.
    pub cluster: String,
    /// `system:serviceaccount:<namespace>:<name>`
    pub username: String,
    /// Of the service account.
    pub uid: String,
    /// Whether it has the right.
    pub allowed: bool,
}

/// Why it is not known who comes with a token, or what they may do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OperatorError {
    /// The token may be good for somebody else.
    #[error("the token is not for {OPERATORS_AUDIENCE} alone, so it was not looked at; ask for one that is (chancery --kube does)")]
    OtherAudience,
    /// Not configured.
    #[error("no such cluster of this CA has `operators = true`, so that nobody operates it by Kubernetes tokens")]
    NoCluster,
    /// Several are configured.
    #[error("this CA has operators of several clusters: name yours with --kube-cluster ({})", .names.join(", "))]
    WhichCluster {
        /// One of these.
        names: Vec<String>,
    },
    /// Nobody in the cluster has made it.
    #[error("the token was refused unasked: {0}")]
    NotSigned(TokenError),
    /// The API server does not believe in it.
    #[error("the API server of cluster {cluster} does not accept the token: {problem}")]
    NotAccepted {
        /// Which.
        cluster: String,
        /// Its words.
        problem: String,
    },
    /// Nobody can say.
    #[error(
        "the API server of cluster {cluster} does not say who may do this ({problem}): try again, or come with an SVID or through the \
         CA's admin socket"
    )]
    Away {
        /// Which.
        cluster: String,
        /// Why.
        problem: String,
    },
    /// Too many are asked about.
    #[error("too many tokens are being asked about: try again in a second")]
    Busy,
}

impl Clusters {
    /// Who owns a token, and whether they have a right in their cluster. `cluster` may be left out where only one has operators; `may_ask`
    /// tells whether the API server may be troubled for this caller.
    ///
    /// # Errors
    /// If the token is not good, or nobody can say.
    pub async fn operator(
        &self,
        cluster: Option<&str>,
        token: &str,
        right: Right,
        may_ask: impl Fn() -> bool + Send,
    ) -> Result<Operator, OperatorError> {
        if !is_for_operators(token) {
            return Err(OperatorError::OtherAudience);
        }
        let (of, live) = self.with_operators(cluster)?;
        let cluster = of.settings.name.clone();
        let key = verdicts::key(token, right);
        let asked_at = self.clock.now();
        if let Some(operator) = live.operators.recall(&key, asked_at) {
            return Ok(operator);
        }
        self.check_signature(&of, token).await.map_err(OperatorError::NotSigned)?;
        if !may_ask() {
            return Err(OperatorError::Busy);
        }
        let _turn = live.operators.turn().await.ok_or(OperatorError::Busy)?;
        let away = |error: ApiError| OperatorError::Away { cluster: cluster.clone(), problem: error.to_string() };
        let server = live.server().await.map_err(away)?;
        let user = match believed(&review(&server, token).await.map_err(away)?) {
            Ok(user) => user,
            Err(problem) => return Err(OperatorError::NotAccepted { cluster, problem }),
        };
        let (username, uid) = (user.username.clone().unwrap_or_default(), user.uid.clone().unwrap_or_default());
        let allowed = server.may(user, right.verb.name(), GROUP, right.resource.name()).await.map_err(away)?;
        let operator = Operator { cluster, username, uid, allowed };
        live.operators.remember(key, operator.clone(), asked_at);
        Ok(operator)
    }

    /// The keys of tokens are never chosen by anything in a token, and neither is whom they are sent to.
    fn with_operators(&self, named: Option<&str>) -> Result<(Arc<Cluster>, Arc<Live>), OperatorError> {
        let clusters = self.by_name.load();
        let with = clusters.values().filter(|cluster| cluster.settings.operators && named.is_none_or(|name| name == cluster.settings.name));
        let with: Vec<_> = with.filter_map(|cluster| Some((Arc::clone(cluster), cluster.live.clone()?))).collect();
        match &with[..] {
            [] => Err(OperatorError::NoCluster),
            [one] => Ok(one.clone()),
            several => Err(OperatorError::WhichCluster { names: several.iter().map(|(of, _)| of.settings.name.clone()).collect() }),
        }
    }
}

async fn review(server: &ApiServer, token: &str) -> Result<TokenReviewStatus, ApiError> {
    server.review(token, &[OPERATORS_AUDIENCE.to_owned()]).await
}

/// The service account that a review is about, if it speaks for it.
fn believed(review: &TokenReviewStatus) -> Result<UserInfo, String> {
    check_authenticated(review)?;
    if !is_for(review, &[OPERATORS_AUDIENCE]) {
        return Err(format!("it is not authenticated for {OPERATORS_AUDIENCE}"));
    }
    let user = review.user.clone().unwrap_or_default();
    if user.username.as_ref().is_some_and(|name| name.starts_with(SERVICE_ACCOUNT)) {
        Ok(user)
    } else {
        Err("it is no service account's".to_owned())
    }
}

/// Whether a token's own words, which nobody has verified, say that it is for operators and nobody else.
fn is_for_operators(token: &str) -> bool {
    #[derive(Deserialize)]
    struct Claims {
        aud: Audience,
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Audience {
        One(String),
        Many(Vec<String>),
    }
    let parts: Vec<_> = token.split('.').take(4).collect();
    let [_, claims, _] = parts[..] else { return false };
    if token.len() > MAX_TOKEN_BYTES {
        return false;
    }
    let claims = URL_SAFE_NO_PAD.decode(claims).ok().and_then(|json| serde_json::from_slice::<Claims>(&json).ok());
    match claims.map(|claims| claims.aud) {
        Some(Audience::One(audience)) => audience == OPERATORS_AUDIENCE,
        Some(Audience::Many(audiences)) => audiences == [OPERATORS_AUDIENCE],
        None => false,
    }
}

impl Verb {
    fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Update => "update",
        }
    }
}

impl Resource {
    fn name(self) -> &'static str {
        match self {
            Self::TrustRoots => "trustroots",
            Self::Identities => "identities",
            Self::Agents => "agents",
            Self::Log => "log",
        }
    }
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}.{GROUP}", self.verb.name(), self.resource.name())
    }
}

#[cfg(test)]
mod tests {
    use chancery_identity::SystemClock;

    use super::*;
    use crate::attestation::ClusterSettings;

    fn token(claims: &str) -> String {
        format!("{}.{}.c2ln", URL_SAFE_NO_PAD.encode("{}"), URL_SAFE_NO_PAD.encode(claims))
    }

    #[test]
    fn only_a_token_for_operators_alone_is_looked_at() {
        for claims in [r#"{"aud": "chancery-admin"}"#, r#"{"iss": "https://k", "aud": ["chancery-admin"]}"#] {
            assert!(is_for_operators(&token(claims)), "{claims}");
        }
        for claims in [
            "{}",
            r#"{"aud": []}"#,
            r#"{"aud": "https://kubernetes.default.svc"}"#,
            r#"{"aud": ["chancery-admin", "https://kubernetes.default.svc"]}"#,
            r#"{"aud": ["chancery-admin", "chancery-admin"]}"#,
            r#"{"aud": "chancery-admin", "aud": "https://kubernetes.default.svc"}"#,
            "no JSON",
        ] {
            assert!(!is_for_operators(&token(claims)), "{claims}");
        }
        let good = token(r#"{"aud": "chancery-admin"}"#);
        for text in ["", "a-static-token", &format!("{good}.more"), &format!("{good}{}", "A".repeat(MAX_TOKEN_BYTES))] {
            assert!(!is_for_operators(text));
        }
    }

    #[tokio::test]
    async fn whose_api_server_is_asked_is_never_chosen_by_the_token() {
        let cluster = |name: &str, operators: bool| -> ClusterSettings {
            let text = format!(
                "name = \"{name}\"\nissuer = \"https://k\"\nservice_accounts = [\"*\"]\noperators = {operators}\n\
                 kubernetes = {{ kubeconfig = \"/nonexistent/{name}\" }}"
            );
            toml::from_str(&text).unwrap()
        };
        let settings = vec![cluster("east", true), cluster("north", false), cluster("west", true)];
        let clusters = Clusters::new("example.org".parse().unwrap(), settings.clone(), Arc::new(SystemClock)).unwrap();
        let right = Right { verb: Verb::Get, resource: Resource::Log };
        let token = token(r#"{"iss": "https://k", "aud": ["chancery-admin"]}"#);
        let ask = async |cluster: Option<&str>| clusters.operator(cluster, &token, right, || true).await.unwrap_err();
        assert_eq!(ask(None).await, OperatorError::WhichCluster { names: vec!["east".into(), "west".into()] });
        assert_eq!([ask(Some("north")).await, ask(Some("south")).await], [OperatorError::NoCluster, OperatorError::NoCluster]);
        let away = ask(Some("west")).await;
        assert!(
            matches!(&away, OperatorError::Away { cluster, problem } if cluster == "west" && problem.contains("/nonexistent/west")),
            "{away}"
        );
        clusters.replace(settings[..2].to_vec()).unwrap();
        assert!(matches!(ask(None).await, OperatorError::Away { cluster, .. } if cluster == "east"), "the only one");
    }

    #[test]
    fn a_review_counts_for_a_service_account_of_this_audience_alone() {
        let good = TokenReviewStatus {
            authenticated: Some(true),
            audiences: Some(vec![OPERATORS_AUDIENCE.into()]),
            user: Some(UserInfo { username: Some("system:serviceaccount:ops:audit".into()), ..UserInfo::default() }),
            error: None,
        };
        assert!(believed(&good).is_ok());
        let refused = |change: fn(&mut TokenReviewStatus)| {
            let mut review = good.clone();
            change(&mut review);
            assert!(believed(&review).is_err(), "{review:?}");
        };
        refused(|review| review.authenticated = None);
        refused(|review| review.audiences = None);
        refused(|review| review.audiences = Some(vec!["https://kubernetes.default.svc".into()]));
        refused(|review| review.user = None);
        refused(|review| review.user = Some(UserInfo { username: Some("alice".into()), ..UserInfo::default() }));
    }
}
