//! Calls that the transport refuses before they are read, because they are larger than any that is: noted like other refusals.
//!
//! tonic reads a message's length, answers `OUT_OF_RANGE`, which no service here does, and never calls the service.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::{Request, Response};
use tonic::{Code, Status};
use tower::{Layer, Service};

use crate::api::Peer;
use crate::issuance::Issuance;

/// Notes the calls that were refused unread.
#[derive(Clone)]
pub struct NoteUnread(pub Arc<Issuance>);

/// A service whose calls are watched by [`NoteUnread`].
#[derive(Clone)]
pub struct Noted<S> {
    inner: S,
    issuance: Arc<Issuance>,
}

impl<S> Layer<S> for NoteUnread {
    type Service = Noted<S>;

    fn layer(&self, inner: S) -> Noted<S> {
        Noted { inner, issuance: Arc::clone(&self.0) }
    }
}

impl<S, Q, A> Service<Request<Q>> for Noted<S>
where
    S: Service<Request<Q>, Response = Response<A>>,
    S::Future: Send + 'static,
    S::Error: 'static,
    A: 'static,
{
    type Response = Response<A>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<A>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Q>) -> Self::Future {
        let peer = request.extensions().get::<Peer>().cloned();
        let issuance = Arc::clone(&self.issuance);
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            if let Some(status) = Status::from_header_map(answer.headers()).filter(|status| status.code() == Code::OutOfRange) {
                let asker = peer.as_ref().and_then(|peer| peer.svid.as_ref()).map(|svid| svid.id.as_str()).unwrap_or_default();
                let address = peer.as_ref().map(|peer| format!("from {}: ", peer.address)).unwrap_or_default();
                issuance.refused_unread(asker, &format!("{address}{}", status.message()));
            }
            Ok(answer)
        })
    }
}
