//! One stream at work: waits for requests, new secrets and the clock, and yields the responses.
//!
//! It is polled as the response's body, so a stream needs no task beside the one that HTTP/2 has for it, and a proxy that does not read
//! is not written for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use chancery_identity::TrustState;
use prost::Message;
use tokio::sync::watch;
use tonic::Status;

use super::Context;
use super::connection::{Connection, Passage};
use super::frames::Requests;
use super::lock;
use super::registry::Entry;
use super::stream::{Answer, Offer, ProtocolError, Push, StreamState, Variant};
use super::tokens::EndPlan;
use crate::svids::{Subscription, SvidState};

pub(super) const SHUTTING_DOWN: &str = "the agent is shutting down; connect again";
pub(super) const NO_LONGER_ITS_SOCKET: &str = "the pod no longer has the volume that this socket is in";

/// One of the two protocols: its messages, and how they meet the shared state.
pub(super) trait Protocol: Send + 'static {
    type Request: Message + Default;
    type Response: Message + 'static;
    const VARIANT: Variant;
    fn take(state: &mut StreamState, request: Self::Request) -> Result<Answer, ProtocolError>;
    fn response(push: Push) -> Self::Response;
}

/// A stream at work.
pub(super) struct Driver<P: Protocol> {
    context: Arc<Context>,
    connection: Connection,
    entry: Entry,
    subscription: Subscription,
    requests: Requests<P::Request>,
    trust: watch::Receiver<Option<Arc<TrustState>>>,
    connection_changes: watch::Receiver<()>,
    ca_reachable: watch::Receiver<bool>,
    /// `None` where a fresh token needs no new stream.
    plan: Option<EndPlan>,
    /// The proxy has accepted a push, and nothing happened on the stream since.
    just_accepted: bool,
    ended: bool,
}

enum Look {
    Push(Push),
    /// Nothing to send; a changed certificate may wait for the bundle until then.
    Nothing(Option<Instant>),
}

impl<P: Protocol> Driver<P> {
    pub(super) fn new(
        context: Arc<Context>,
        connection: Connection,
        entry: Entry,
        subscription: Subscription,
        requests: Requests<P::Request>,
        plan: Option<EndPlan>,
    ) -> Self {
        Self {
            trust: context.source.trust(),
            connection_changes: connection.changes(),
            ca_reachable: context.source.ca_reachable(),
            context,
            connection,
            entry,
            subscription,
            requests,
            plan,
            just_accepted: false,
            ended: false,
        }
    }

    /// The next response, or the stream's end.
    pub(super) async fn next(&mut self) -> Option<Result<P::Response, Status>> {
        while !self.ended {
            let gate = match self.look() {
                Look::Push(push) => return Some(Ok(P::response(push))),
                Look::Nothing(gate) => gate,
            };
            if self.ends_for_a_fresh_token() {
                self.ended = true;
                break;
            }
            match self.wait(gate).await {
                Ok(goes_on) => self.ended = !goes_on,
                Err(status) => {
                    self.ended = true;
                    return Some(Err(status));
                }
            }
        }
        None
    }

    fn look(&mut self) -> Look {
        // The certificate first: the agent publishes a bundle before what depends on it, so a certificate is never seen without its bundle.
        let certificate = match &*self.subscription.svid.borrow_and_update() {
            SvidState::Ready(held) => {
                let secret = self.context.secrets.certificate(&self.subscription.workload, &held.svid);
                self.entry.note_certificate(secret.version(), held.entry, &self.context.source.accounts());
                Some(secret)
            }
            SvidState::Pending | SvidState::Refused { .. } => None,
        };
        let bundle = self.trust.borrow_and_update().as_ref().map(|trust| self.context.secrets.bundle(trust));
        self.connection_changes.mark_unchanged();
        let passage = self.connection.passage(bundle.as_ref().map(|bundle| bundle.version()), Instant::now());
        let offer = Offer { certificate: certificate.as_ref(), bundle: bundle.as_ref(), certificate_may_change: passage == Passage::Open };
        let (step, bundle_held) = {
            let mut live = lock(&self.entry.record.live);
            (live.protocol.poll(&offer), live.protocol.bundle_held())
        };
        if let Some(held) = bundle_held {
            self.connection.note_bundle(self.entry.id, held);
        }
        self.entry.note_withheld(&step.withheld);
        match (step.push, passage) {
            (Some(push), _) => Look::Push(push),
            (None, Passage::Until(deadline)) if step.waits_for_bundle => Look::Nothing(Some(deadline)),
            (None, _) => Look::Nothing(None),
        }
    }

    /// Goes on when something has happened that [`Driver::look`] should know; `false` at the stream's end.
    async fn wait(&mut self, gate: Option<Instant>) -> Result<bool, Status> {
        let timer = self.timer(gate);
        tokio::select! {
            biased;
            () = self.context.shutdown.cancelled() => Err(Status::unavailable(SHUTTING_DOWN)),
            () = self.connection.ended() => Err(Status::unavailable(NO_LONGER_ITS_SOCKET)),
            request = self.requests.next() => match request? {
                Some(request) => self.take(request),
                None => Ok(false),
            },
            changed = self.subscription.svid.changed() => source_lives(changed),
            changed = self.trust.changed() => source_lives(changed),
            changed = self.connection_changes.changed() => source_lives(changed),
            changed = self.ca_reachable.changed(), if self.plan.is_some() => {
                if let Some(plan) = &mut self.plan {
                    plan.spread_from(self.context.clock.now());
                }
                source_lives(changed)
            }
            () = tokio::time::sleep(timer.unwrap_or_default()), if timer.is_some() => Ok(true),
        }
    }

    fn take(&mut self, request: P::Request) -> Result<bool, Status> {
        let answer = P::take(&mut lock(&self.entry.record.live).protocol, request).map_err(|error| match error {
            ProtocolError::TypeUrl(_) => Status::invalid_argument(error.to_string()),
            ProtocolError::TooManyNames | ProtocolError::NameTooLong(_) => Status::resource_exhausted(error.to_string()),
        })?;
        self.entry.note_names(&self.context.source.accounts());
        self.entry.note_answer(&answer);
        self.just_accepted = answer == Answer::Ack;
        Ok(true)
    }

    /// How long to wait at most. The wall clock is looked at in short steps, because a machine may sleep meanwhile.
    fn timer(&self, gate: Option<Instant>) -> Option<Duration> {
        let gate = gate.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let tick = self.plan.as_ref().map(|plan| plan.wait(self.context.clock.now()).unwrap_or(self.context.tick).min(self.context.tick));
        gate.into_iter().chain(tick).min()
    }

    fn ends_for_a_fresh_token(&mut self) -> bool {
        let pushed = std::mem::take(&mut self.just_accepted);
        let (Some(plan), Some(token)) = (&self.plan, &self.subscription.token) else { return false };
        let now = self.context.clock.now();
        if !plan.is_due(now, pushed) || !*self.ca_reachable.borrow_and_update() {
            return false;
        }
        let mut live = lock(&self.entry.record.live);
        if self.context.ended.came_back(token) {
            live.stale_token = true;
            self.plan = None;
            return false;
        }
        if live.protocol.awaits_answer() || !self.connection.try_end(Instant::now()) {
            return false;
        }
        if !self.context.ended.end(token, now) {
            tracing::warn!(stream = self.entry.id, "too many tokens to remember: the stream is not ended for a fresh one");
            self.plan = None;
            return false;
        }
        tracing::debug!(stream = self.entry.id, token = token.id, "the stream is ended so that its proxy comes back with a fresh token");
        true
    }
}

impl<P: Protocol> Drop for Driver<P> {
    fn drop(&mut self) {
        self.connection.forget(self.entry.id);
    }
}

fn source_lives(changed: Result<(), watch::error::RecvError>) -> Result<bool, Status> {
    changed.map(|()| true).map_err(|_| Status::unavailable(SHUTTING_DOWN))
}
