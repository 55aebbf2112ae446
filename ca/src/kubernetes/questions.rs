//! What an API server is asked: is this token good, may its owner do this, what is this pod, what are your keys, and what changes among your
//! pods and accounts?

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewStatus, UserInfo};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec, SubjectAccessReviewStatus};
use kube::client::Body;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::connection::{ANSWER_TIMEOUT, WATCH};
use super::error::with_causes;
use super::{ApiError, ApiServer, ServiceAccountObject, WorkloadPod};

/// A larger answer is not read: no pod, no review and no JWKS comes near.
const MAX_ANSWER_BYTES: usize = 4 << 20;
/// How many objects of a list are fetched at once.
const PAGE: u32 = 500;
const JWKS: &str = "/openid/v1/jwks";
/// Of a question about a token, with the longest that is read, or about what somebody may do.
const MAX_REVIEW_BYTES: usize = 32 << 10;

/// What is sent to have something reviewed.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Review<'a, T> {
    api_version: &'a str,
    kind: &'a str,
    spec: &'a T,
}

/// `TokenReviewSpec`, with a token that is not copied.
#[derive(Serialize)]
struct TokenSpec<'a> {
    audiences: &'a [String],
    token: &'a str,
}

/// What is read of a review that comes back.
#[derive(Deserialize)]
struct Answer<S> {
    status: Option<S>,
}

impl ApiServer {
    /// Whether the API server believes `token`, for one of `audiences`. Whoever asks looks at all of the answer: that the token is authenticated, and
    /// that one of the audiences is among the answer's.
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn review(&self, token: &str, audiences: &[String]) -> Result<TokenReviewStatus, ApiError> {
        Ok(self.create::<TokenReview, TokenReviewStatus>(&TokenSpec { audiences, token }).await?.unwrap_or_default())
    }

    /// Whether the cluster lets somebody, as a [`TokenReviewStatus`] has them, do this to objects of an API group, in every namespace.
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn may(&self, user: UserInfo, verb: &str, group: &str, resource: &str) -> Result<bool, ApiError> {
        let attributes = ResourceAttributes {
            group: Some(group.to_owned()),
            resource: Some(resource.to_owned()),
            verb: Some(verb.to_owned()),
            ..ResourceAttributes::default()
        };
        let UserInfo { extra, groups, uid, username } = user;
        let spec =
            SubjectAccessReviewSpec { extra, groups, uid, user: username, resource_attributes: Some(attributes), ..Default::default() };
        let status = self.create::<SubjectAccessReview, SubjectAccessReviewStatus>(&spec).await?;
        Ok(status.is_some_and(|status| status.allowed && status.denied != Some(true)))
    }

    /// The pod that has this name now.
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn pod(&self, namespace: &str, name: &str) -> Result<Option<WorkloadPod>, ApiError> {
        self.get(namespace, name).await
    }

    /// The service account that has this name now.
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn service_account(&self, namespace: &str, name: &str) -> Result<Option<ServiceAccountObject>, ApiError> {
        self.get(namespace, name).await
    }

    /// The public keys that it signs service accounts' tokens with (RFC 7517).
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn jwks(&self) -> Result<String, ApiError> {
        let answer = self.ask(Request::get(JWKS).body(Vec::new())).await?;
        let answer = answer.ok_or_else(|| ApiError::Refused(format!("404 for {JWKS}")))?;
        String::from_utf8(answer).map_err(|_| ApiError::Unreadable("it is not UTF-8".into()))
    }

    /// All pods, and from then on what changes, without end. After an error it goes on where it was, or begins anew; whoever polls waits a little
    /// before that. `heard` is called whenever the API server grants a list or a watch.
    pub fn watch_pods<F>(&self, heard: F) -> impl Stream<Item = Result<Event<WorkloadPod>, ApiError>> + Send + use<F>
    where
        F: Fn() + Clone + Send + 'static,
    {
        watch(self.client(heard))
    }

    /// Likewise all service accounts.
    pub fn watch_service_accounts<F>(&self, heard: F) -> impl Stream<Item = Result<Event<ServiceAccountObject>, ApiError>> + Send + use<F>
    where
        F: Fn() + Clone + Send + 'static,
    {
        watch(self.client(heard))
    }

    async fn get<K: Resource<DynamicType = ()> + DeserializeOwned>(&self, namespace: &str, name: &str) -> Result<Option<K>, ApiError> {
        let path = format!("{}/{name}", K::url_path(&(), Some(namespace)));
        let Some(answer) = self.ask(Request::get(path).body(Vec::new())).await? else { return Ok(None) };
        serde_json::from_slice(&answer).map(Some).map_err(|error| ApiError::Unreadable(error.to_string()))
    }

    /// Reviews are created, and nothing of them is kept: question and answer may hold a token, so they do not stay in memory, either.
    async fn create<K: Resource<DynamicType = ()>, S: DeserializeOwned>(&self, spec: &impl Serialize) -> Result<Option<S>, ApiError> {
        let review = Review { api_version: &K::api_version(&()), kind: &K::kind(&()), spec };
        // Large enough from the start, or copies would be left behind as it grows.
        let mut body = Zeroizing::new(Vec::with_capacity(MAX_REVIEW_BYTES));
        serde_json::to_writer(&mut *body, &review).map_err(|error| ApiError::Unreadable(error.to_string()))?;
        let path = K::url_path(&(), None);
        let request = Request::post(&path).header(header::CONTENT_TYPE, "application/json").body(Bytes::from_owner(body));
        let answer = Zeroizing::new(self.ask(request).await?.ok_or_else(|| ApiError::Refused(format!("404 for {path}")))?);
        // Only this much is said of an answer that cannot be read: it may repeat a token.
        let answer: Answer<S> = serde_json::from_slice(&answer).map_err(|_| ApiError::Unreadable(format!("it is no {}", K::kind(&()))))?;
        Ok(answer.status)
    }

    /// The answer to a question; nothing if what it asks about does not exist.
    pub(super) async fn ask<B: Into<Body>>(&self, request: http::Result<Request<B>>) -> Result<Option<Vec<u8>>, ApiError> {
        let request = request.map_err(|error| ApiError::Refused(error.to_string()))?.map(B::into);
        let answer = async {
            let response = self.send(request, ANSWER_TIMEOUT).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await;
            let body = body.map_err(|error| ApiError::Away(with_causes(&*error)))?.to_bytes();
            match status {
                StatusCode::NOT_FOUND => Ok(None),
                status if status.is_success() => Ok(Some(body.into())),
                status => Err(ApiError::from_answer(status, &body)),
            }
        };
        tokio::time::timeout(ANSWER_TIMEOUT, answer).await.unwrap_or_else(|_| Err(self.too_slow(ANSWER_TIMEOUT)))
    }
}

fn watch<K>(client: Client) -> impl Stream<Item = Result<Event<K>, ApiError>> + Send + use<K>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    let seconds = u32::try_from(WATCH.as_secs()).unwrap_or(u32::MAX);
    let config = watcher::Config::default().page_size(PAGE).timeout(seconds);
    watcher(Api::<K>::all(client), config).map(|event| event.map_err(ApiError::from))
}

impl From<watcher::Error> for ApiError {
    fn from(error: watcher::Error) -> Self {
        match error {
            watcher::Error::InitialListFailed(error) | watcher::Error::WatchStartFailed(error) | watcher::Error::WatchFailed(error) => {
                error.into()
            }
            watcher::Error::WatchError(status) => {
                let code = StatusCode::from_u16(status.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
                Self::from_words(code, &status.message)
            }
            error @ watcher::Error::NoResourceVersion => Self::Unreadable(error.to_string()),
        }
    }
}
