//! One workload's certificate through its life: asked for, held, renewed, let go.

use std::sync::Arc;
use std::time::Duration;

use chancery_proto::chancery::v1::IssueReason;
use time::OffsetDateTime;
use tokio::sync::watch;

use super::batch::Failure;
use super::{Hold, Subscription, SvidState, TokenInfo, WorkloadKey, WorkloadStatus};
use crate::ca_client::{Backoff, Held, Token};
use chancery_process::moment::{moment, to_the_second};

/// After a failure with nothing to serve, the next try comes soon: a pod is waiting.
const FIRST_DELAY: Duration = Duration::from_millis(200);
const MOST_DELAY_WAITING: Duration = Duration::from_secs(10);
const MOST_DELAY_SERVING: Duration = Duration::from_secs(60);
/// A refusal that only people can mend is asked about this rarely.
const REFUSED_DELAY: Duration = Duration::from_secs(15);

/// What happens next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// A try, at this time of the wall clock.
    Try(OffsetDateTime),
    /// It waits to be sent.
    Queued,
    /// The CA is being asked. `again`: what it answers is outdated already.
    Asked {
        /// Ask once more at once.
        again: bool,
    },
    /// Nothing, until a proxy brings a token that is alive.
    NeedsToken,
}

/// Where the token for the next request comes from.
#[derive(Debug)]
pub(super) enum TokenSource {
    /// The newest that a proxy brought.
    Brought(Token, TokenInfo),
    /// The agent's own file, read for each use: sidecar mode.
    File,
    /// None has come since the agent started.
    Missing,
}

/// A workload that the agent keeps a certificate for.
#[derive(Debug)]
pub(super) struct Workload {
    key: WorkloadKey,
    pod_name: String,
    token: TokenSource,
    svid: watch::Sender<SvidState>,
    held: Option<Held>,
    /// Each subscription has a clone.
    streams: Arc<()>,
    /// Each tenant has one: what keeps the workload while it has no stream.
    holds: Hold,
    idle_since: Option<OffsetDateTime>,
    /// Its pod is known to be gone: nobody will come back for it.
    gone: bool,
    next: Next,
    reason: IssueReason,
    backoff: Backoff,
    problem: String,
}

impl Workload {
    /// A new one, to be queued at once.
    pub(super) fn new(key: WorkloadKey, pod_name: String, now: OffsetDateTime) -> Self {
        Self {
            key,
            pod_name,
            token: TokenSource::Missing,
            svid: watch::Sender::new(SvidState::Pending),
            held: None,
            streams: Arc::new(()),
            holds: Hold::default(),
            idle_since: Some(now),
            gone: false,
            next: Next::Try(now),
            reason: IssueReason::First,
            backoff: Backoff::new(FIRST_DELAY),
            problem: String::new(),
        }
    }

    /// One from before a restart: it is served again to whoever proves to be the same pod, and renewed once a token has come.
    pub(super) fn restored(key: WorkloadKey, pod_name: String, held: Held, now: OffsetDateTime, renew_from: f64) -> Self {
        let next = Next::Try(held.renewal(renew_from));
        let svid = watch::Sender::new(SvidState::Ready(held.clone()));
        Self { held: Some(held), svid, next, reason: IssueReason::Renewal, ..Self::new(key, pod_name, now) }
    }

    /// Takes a stream on. A newer token replaces the one before.
    pub(super) fn attach(&mut self, token: TokenSource, now: OffsetDateTime) -> Subscription {
        let info = match &token {
            TokenSource::Brought(_, info) => Some(info.clone()),
            TokenSource::File | TokenSource::Missing => None,
        };
        self.take_token(token, now);
        Subscription::new(self.key.clone(), self.pod_name.clone(), info, self.svid.subscribe(), self.streams.clone())
    }

    /// Keeps the workload, with or without a stream, until what this returns is dropped. A newer token replaces the one before.
    pub(super) fn hold(&mut self, token: TokenSource, now: OffsetDateTime) -> Hold {
        self.take_token(token, now);
        self.holds.clone()
    }

    fn take_token(&mut self, token: TokenSource, now: OffsetDateTime) {
        let newer = match (&self.token, &token) {
            (TokenSource::Brought(_, known), TokenSource::Brought(_, new)) => known.expires_at < new.expires_at,
            (_, TokenSource::Missing) => false,
            _ => true,
        };
        if newer {
            self.token = token;
            // What failed with the old token, or for want of one, may succeed with this.
            if self.next == Next::NeedsToken || (self.held.is_none() && matches!(self.next, Next::Try(_))) {
                self.next = Next::Try(now);
            }
        }
        self.idle_since = None;
        self.gone = false;
    }

    /// Its pod is gone: it is dropped as soon as nothing holds it.
    pub(super) fn leave(&mut self) {
        self.gone = true;
    }

    /// Attached streams.
    pub(super) fn streams(&self) -> usize {
        Arc::strong_count(&self.streams) - 1
    }

    /// Whether it is time to queue it; if so, it counts as queued.
    pub(super) fn queue_when_due(&mut self, now: OffsetDateTime) -> bool {
        match self.next {
            Next::Try(at) if at <= now => {
                self.next = Next::Queued;
                true
            }
            _ => false,
        }
    }

    /// A queued one is about to be asked for: the token to ask with. Without a live one it leaves the queue and waits for one.
    pub(super) fn ask(&mut self, now: OffsetDateTime) -> Option<(TokenForRequest, IssueReason)> {
        let token = match &self.token {
            TokenSource::Brought(token, info) if now < info.expires_at => TokenForRequest::Text(token.clone()),
            TokenSource::File => TokenForRequest::File,
            TokenSource::Brought(_, info) => return self.needs_token(format!("its token expired at {}", moment(info.expires_at))),
            TokenSource::Missing => return self.needs_token("no token has come since the agent started".to_owned()),
        };
        self.next = Next::Asked { again: false };
        Some((token, self.reason))
    }

    fn needs_token<T>(&mut self, problem: String) -> Option<T> {
        tracing::warn!(workload = %self.key, problem, "not renewed until a fresh token comes");
        self.problem = problem;
        self.next = Next::NeedsToken;
        None
    }

    /// A certificate came and was found good. It is handed out with [`Workload::publish`].
    pub(super) fn succeeded(&mut self, held: Held, now: OffsetDateTime, renew_from: f64) {
        self.next = if self.next == (Next::Asked { again: true }) {
            Next::Try(now)
        } else {
            self.reason = IssueReason::Renewal;
            Next::Try(held.renewal(renew_from))
        };
        self.held = Some(held);
        self.backoff.reset();
        self.problem.clear();
    }

    /// Hands out the certificate that it holds. If that has expired meanwhile, there is nothing to hand out.
    pub(super) fn publish(&self) {
        if let Some(held) = &self.held {
            self.svid.send_replace(SvidState::Ready(held.clone()));
        }
    }

    /// No certificate came, or none that may be served: the last good one stays.
    pub(super) fn failed(&mut self, failure: &Failure, now: OffsetDateTime) {
        let most = match &self.held {
            Some(held) => ((held.svid.not_after() - now).unsigned_abs() / 8).clamp(FIRST_DELAY, MOST_DELAY_SERVING),
            None => MOST_DELAY_WAITING,
        };
        let mut delay = self.backoff.next(most);
        if let Failure::Refused { reason, retryable, .. } = failure {
            if !retryable {
                delay = delay.max(REFUSED_DELAY.min(most.max(FIRST_DELAY)));
            }
            if self.held.is_none() {
                let state = SvidState::Refused { reason: reason.clone(), message: failure.to_string(), retryable: *retryable };
                self.svid.send_replace(state);
            }
        }
        self.problem = failure.to_string();
        self.next = Next::Try(now + delay);
    }

    /// Lets an expired certificate go; tells whether it did.
    pub(super) fn expire(&mut self, now: OffsetDateTime) -> bool {
        if !self.held.as_ref().is_some_and(|held| held.is_expired(now)) {
            return false;
        }
        self.held = None;
        self.reason = IssueReason::First;
        self.svid.send_replace(SvidState::Pending);
        true
    }

    /// To be issued anew at `at`, whatever is held.
    pub(super) fn reissue(&mut self, at: OffsetDateTime) {
        self.reason = IssueReason::Ordered;
        self.next = match self.next {
            Next::Asked { .. } => Next::Asked { again: true },
            Next::Queued => Next::Queued,
            Next::Try(_) | Next::NeedsToken => Next::Try(at),
        };
    }

    /// The CA is back: what failed is tried at once.
    pub(super) fn retry(&mut self, now: OffsetDateTime) {
        if self.backoff.failures() > 0 && matches!(self.next, Next::Try(_)) {
            self.next = Next::Try(now);
        }
    }

    /// Whether its last stream has been gone for `grace`, or has gone together with its pod. Call it at each tick: it also notices that the
    /// last one has gone.
    pub(super) fn is_abandoned(&mut self, now: OffsetDateTime, grace: Duration) -> bool {
        if self.streams() > 0 || self.holds.count() > 1 {
            self.idle_since = None;
            return false;
        }
        let idle_since = *self.idle_since.get_or_insert(now);
        (self.gone || idle_since + grace <= now) && !matches!(self.next, Next::Asked { .. })
    }

    /// When the clock must be looked at again for this one.
    pub(super) fn deadline(&self, grace: Duration) -> Option<OffsetDateTime> {
        let next = match self.next {
            Next::Try(at) => Some(at),
            _ => None,
        };
        let expiry = self.held.as_ref().map(|held| held.svid.not_after());
        let drop = self.idle_since.map(|since| since + grace);
        [next, expiry, drop].into_iter().flatten().min()
    }

    /// The certificate being served.
    pub(super) fn held(&self) -> Option<&Held> {
        self.held.as_ref()
    }

    /// Which workload.
    pub(super) fn key(&self) -> &WorkloadKey {
        &self.key
    }

    /// The pod's name.
    pub(super) fn pod_name(&self) -> &str {
        &self.pod_name
    }

    /// For people. `away`: why there is no session with the CA, if there is none.
    pub(super) fn status(&self, away: &str) -> WorkloadStatus {
        let svid = self.held.as_ref().map(|held| &held.svid);
        WorkloadStatus {
            workload: self.key.clone(),
            pod: self.pod_name.clone(),
            spiffe_id: svid.map(|svid| svid.id().to_string()),
            serial: svid.map(|svid| svid.serial().to_string()),
            expires_at: svid.map(|svid| svid.not_after()),
            next_try_at: match self.next {
                Next::Try(at) => Some(to_the_second(at)),
                _ => None,
            },
            token_expires_at: match &self.token {
                TokenSource::Brought(_, info) => Some(info.expires_at),
                TokenSource::File | TokenSource::Missing => None,
            },
            streams: self.streams(),
            problem: if self.next == Next::Queued && !away.is_empty() { format!("waits for the CA: {away}") } else { self.problem.clone() },
        }
    }
}

/// The token that a request is made with.
#[derive(Clone, Debug)]
pub(super) enum TokenForRequest {
    /// This one.
    Text(Token),
    /// What the agent's file holds at that moment.
    File,
}
