//! The gRPC service: finds out who calls, and gives each stream its [`Driver`].

use std::convert::Infallible;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{self, Poll};

use chancery_proto::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
};
use futures_util::future::BoxFuture;
use futures_util::stream::{self, Stream};
use http::header::AUTHORIZATION;
use tonic::body::Body;
use tonic::codec::Streaming;
use tonic::metadata::MetadataMap;
use tonic::server::{Grpc, StreamingService};
use tonic::{Request, Response, Status};
use tower::Service;
use zeroize::Zeroizing;

use super::Context;
use super::connection::Connection;
use super::driver::{Driver, NO_LONGER_ITS_SOCKET, Protocol, SHUTTING_DOWN};
use super::frames::{Lean, Requests, Unread};
use super::secret::SECRET_TYPE_URL;
use super::stream::{Answer, ProtocolError, Push, StreamState, Variant};
use super::tokens::EndPlan;
use crate::accepted::Info;
use crate::svids::{AttachError, Token};
use crate::telemetry::Reason;

const STREAM_SECRETS: &str = "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets";
const DELTA_SECRETS: &str = "/envoy.service.secret.v3.SecretDiscoveryService/DeltaSecrets";
const FETCH_SECRETS: &str = "/envoy.service.secret.v3.SecretDiscoveryService/FetchSecrets";

/// `envoy.service.secret.v3.SecretDiscoveryService`.
///
/// Written by hand because the generated one reads requests through tonic's buffers, see [`super::frames`].
#[derive(Clone)]
pub(super) struct SecretDiscovery(pub(super) Arc<Context>);

impl Service<http::Request<Body>> for SecretDiscovery {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut task::Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let context = self.0.clone();
        match request.uri().path() {
            STREAM_SECRETS => Box::pin(serve::<World>(context, request)),
            DELTA_SECRETS => Box::pin(serve::<Delta>(context, request)),
            FETCH_SECRETS => refuse(Status::unimplemented(
                "FetchSecrets cannot push a renewed certificate; use StreamSecrets or DeltaSecrets (api_type: GRPC or DELTA_GRPC)",
            )),
            path => refuse(Status::unimplemented(format!("this socket serves Envoy's SecretDiscoveryService, not {path}"))),
        }
    }
}

fn refuse(status: Status) -> BoxFuture<'static, Result<http::Response<Body>, Infallible>> {
    Box::pin(async move { Ok(status.into_http()) })
}

async fn serve<P: Protocol>(context: Arc<Context>, mut request: http::Request<Body>) -> Result<http::Response<Body>, Infallible> {
    let body = std::mem::take(request.body_mut());
    let opening = Opening::<P> { context, body: Some(body), protocol: PhantomData };
    Ok(Grpc::new(Lean::<P::Response>::new()).streaming(opening, request).await)
}

/// One call, until its stream is open.
struct Opening<P> {
    context: Arc<Context>,
    body: Option<Body>,
    protocol: PhantomData<fn() -> P>,
}

impl<P: Protocol> StreamingService<Unread> for Opening<P> {
    type Response = P::Response;
    type ResponseStream = Pin<Box<dyn Stream<Item = Result<P::Response, Status>> + Send>>;
    type Future = BoxFuture<'static, Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<Unread>>) -> Self::Future {
        let (context, body) = (self.context.clone(), self.body.take().unwrap_or_default());
        Box::pin(async move {
            let driver = open::<P>(context, &request, body).await?;
            let responses = stream::unfold(driver, |mut driver| async move { driver.next().await.map(|response| (response, driver)) });
            Ok(Response::new(Box::pin(responses) as Self::ResponseStream))
        })
    }
}

async fn open<P: Protocol>(context: Arc<Context>, request: &Request<Streaming<Unread>>, body: Body) -> Result<Driver<P>, Status> {
    let connection = request.extensions().get::<Info>().and_then(Info::get::<Connection>).cloned();
    let connection = connection.ok_or_else(|| Status::internal("the connection is unknown"))?;
    if let Some(limit) = connection.over_limit() {
        return Err(refused(
            &context,
            "too_many_connections",
            Status::resource_exhausted(format!("this socket has {limit} connections already, as many as it takes")),
        ));
    }
    if connection.has_ended() {
        return Err(refused(&context, "volume_gone", Status::unavailable(NO_LONGER_ITS_SOCKET)));
    }
    let attached = match connection.tenant() {
        Some(tenant) => tenant.attach().await,
        None if context.source.needs_token() => context.source.attach(Some(bearer(&context, request.metadata())?)).await,
        None => context.source.attach(None).await,
    };
    let subscription = attached.map_err(|error| {
        log_refusal(&context, error.reason(), &error.to_string());
        status_of(&error)
    })?;
    let stale = subscription.token.as_ref().is_some_and(|token| context.ended.comes_back(token));
    let plan = subscription.token.as_ref().filter(|_| !stale).map(|token| EndPlan::new(token, rand::random()));
    let entry = context.registry.open(&connection, P::VARIANT, &subscription, stale, context.clock.clone());
    let entry = entry.map_err(|full| refused(&context, "too_many_streams", Status::resource_exhausted(full.to_string())))?;
    connection.came_back();
    if stale {
        tracing::warn!(
            namespace = subscription.workload.namespace,
            pod = subscription.pod_name,
            "the proxy came back with the same token after its stream was ended for a fresh one: is its token file refreshed, and re-read by the proxy?"
        );
    }
    Ok(Driver::new(context, connection, entry, subscription, Requests::new(body), plan))
}

/// The token of `authorization: Bearer …`. No error quotes it.
fn bearer(context: &Context, metadata: &MetadataMap) -> Result<Token, Status> {
    let missing = |message: &str| refused(context, "token_missing", Status::unauthenticated(message));
    let value = metadata
        .get(AUTHORIZATION.as_str())
        .ok_or_else(|| missing("no token: send the workload's service-account token as `authorization: Bearer <token>` with the stream"))?;
    let credentials = value.to_str().ok().and_then(|value| value.split_once(' '));
    match credentials {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") && !token.trim().is_empty() => {
            Ok(Token::new(Zeroizing::new(token.to_owned())))
        }
        _ => Err(missing("the `authorization` metadata is not `Bearer <token>`")),
    }
}

/// A refusal before the source was asked, which counts its own.
fn refused(context: &Context, reason: &str, status: Status) -> Status {
    context.registry.metrics().attach_refused.get_or_create(&Reason { reason: reason.to_owned() }).inc();
    log_refusal(context, reason, status.message());
    status
}

fn log_refusal(context: &Context, reason: &str, message: &str) {
    if context.refusals_logged.allow() {
        tracing::warn!(reason, message, "a stream was refused");
    }
}

fn status_of(error: &AttachError) -> Status {
    match error {
        AttachError::Unauthenticated { .. } => Status::unauthenticated(error.to_string()),
        AttachError::WrongPlace(_) => Status::permission_denied(error.to_string()),
        AttachError::Busy(_) => Status::resource_exhausted(error.to_string()),
        AttachError::NotReady(_) => Status::unavailable(error.to_string()),
        AttachError::Stopping => Status::unavailable(SHUTTING_DOWN),
    }
}

struct World;
struct Delta;

impl Protocol for World {
    type Request = DiscoveryRequest;
    type Response = DiscoveryResponse;
    const VARIANT: Variant = Variant::World;

    fn take(state: &mut StreamState, request: DiscoveryRequest) -> Result<Answer, ProtocolError> {
        state.on_world(request)
    }

    fn response(push: Push) -> DiscoveryResponse {
        DiscoveryResponse {
            version_info: push.version.to_string(),
            resources: push.resources.into_iter().map(|(name, secret)| secret.resource(&name)).collect(),
            type_url: SECRET_TYPE_URL.to_owned(),
            nonce: push.nonce.to_string(),
            ..DiscoveryResponse::default()
        }
    }
}

impl Protocol for Delta {
    type Request = DeltaDiscoveryRequest;
    type Response = DeltaDiscoveryResponse;
    const VARIANT: Variant = Variant::Delta;

    fn take(state: &mut StreamState, request: DeltaDiscoveryRequest) -> Result<Answer, ProtocolError> {
        state.on_delta(request)
    }

    fn response(push: Push) -> DeltaDiscoveryResponse {
        let resources = push.resources.into_iter().map(|(name, secret)| Resource {
            version: secret.version().to_string(),
            resource: Some(secret.resource(&name)),
            name,
            ..Resource::default()
        });
        DeltaDiscoveryResponse {
            system_version_info: push.version.to_string(),
            resources: resources.collect(),
            type_url: SECRET_TYPE_URL.to_owned(),
            nonce: push.nonce.to_string(),
            ..DeltaDiscoveryResponse::default()
        }
    }
}
