//! What the streams of one proxy have to agree about: they share an HTTP/2 connection, and so a [`Connection`].
//!
//! - A changed certificate waits until the proxy's validation contexts hold the bundle being served, or for [`BUNDLE_WAIT`]: a proxy that
//!   shows the new certificate should already trust what its peers will show in return.
//! - Streams are ended for a fresh token one after the other, never two at once.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio_util::sync::CancellationToken;

use super::lock;
use super::secret::Version;
use crate::svids::Tenant;

/// A certificate waits this long for the bundle's acknowledgement.
pub const BUNDLE_WAIT: Duration = Duration::from_secs(1);
/// A proxy that has not opened an ended stream again after this time is not waited for: Envoy backs off for 30 s at most.
const RETURN_WAIT: Duration = Duration::from_secs(30);

/// Names a stream among all of the process.
pub type StreamId = u64;

/// One proxy's connection. Clones are the same connection.
#[derive(Clone, Debug)]
pub struct Connection(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    id: u64,
    origin: Origin,
    /// As many connections as its socket takes, if this is one more.
    over_limit: Option<usize>,
    gate: Mutex<Gate>,
    changed: watch::Sender<()>,
    /// Held while the connection lives.
    _slot: OwnedSemaphorePermit,
}

/// By which socket a connection came, and so who is behind it.
#[derive(Clone, Debug)]
pub(super) enum Origin {
    /// The agent's own. Who it is, a stream's token says; or it is a sidecar's, which has one pod only.
    Shared,
    /// One pod's alone.
    Pod {
        tenant: Arc<Tenant>,
        /// The pod no longer has the socket.
        stop: CancellationToken,
    },
}

/// May a changed certificate go out?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passage {
    /// Now.
    Open,
    /// When the bundle is acknowledged, at the latest then.
    Until(Instant),
}

#[derive(Debug, Default)]
struct Gate {
    /// The streams with a validation context, and the bundle that each holds.
    holders: Vec<(StreamId, Option<Version>)>,
    /// The bundle being served, and since when this connection knows.
    target: Option<(Version, Instant)>,
    /// A stream was ended, and its proxy has not come back for it yet.
    away_since: Option<Instant>,
}

impl Connection {
    pub(super) fn new(id: u64, origin: Origin, over_limit: Option<usize>, slot: OwnedSemaphorePermit) -> Self {
        Self(Arc::new(Shared { id, origin, over_limit, gate: Mutex::default(), changed: watch::Sender::new(()), _slot: slot }))
    }

    /// Names the connection among all of the process.
    pub fn id(&self) -> u64 {
        self.0.id
    }

    /// It was accepted only to be told that there are as many as this already.
    pub fn over_limit(&self) -> Option<usize> {
        self.0.over_limit
    }

    /// The pod whose own socket it came by.
    pub fn tenant(&self) -> Option<&Tenant> {
        match &self.0.origin {
            Origin::Shared => None,
            Origin::Pod { tenant, .. } => Some(tenant),
        }
    }

    /// Whether the pod no longer has the socket.
    pub fn has_ended(&self) -> bool {
        matches!(&self.0.origin, Origin::Pod { stop, .. } if stop.is_cancelled())
    }

    /// Comes back when the pod no longer has the socket; never for the shared one.
    pub async fn ended(&self) {
        match &self.0.origin {
            Origin::Shared => std::future::pending().await,
            Origin::Pod { stop, .. } => stop.cancelled().await,
        }
    }

    /// Wakes whoever waits for another stream of this connection.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.0.changed.subscribe()
    }

    /// Notes which bundle a stream's proxy holds.
    pub fn note_bundle(&self, stream: StreamId, held: Option<Version>) {
        let changed = lock(&self.0.gate).note_bundle(stream, held);
        if changed {
            self.0.changed.send_replace(());
        }
    }

    /// Whether a changed certificate may go out while `bundle` is being served.
    pub fn passage(&self, bundle: Option<Version>, now: Instant) -> Passage {
        lock(&self.0.gate).passage(bundle, now)
    }

    /// Asks to end a stream of this connection for a fresh token; `false` while another is away.
    pub fn try_end(&self, now: Instant) -> bool {
        lock(&self.0.gate).try_end(now)
    }

    /// The proxy has opened a stream.
    pub fn came_back(&self) {
        lock(&self.0.gate).away_since = None;
        self.0.changed.send_replace(());
    }

    /// A stream is gone.
    pub fn forget(&self, stream: StreamId) {
        lock(&self.0.gate).holders.retain(|(holder, _)| *holder != stream);
        self.0.changed.send_replace(());
    }
}

impl Gate {
    fn note_bundle(&mut self, stream: StreamId, held: Option<Version>) -> bool {
        if let Some((_, known)) = self.holders.iter_mut().find(|(holder, _)| *holder == stream) {
            let changed = *known != held;
            *known = held;
            return changed;
        }
        self.holders.push((stream, held));
        true
    }

    fn passage(&mut self, bundle: Option<Version>, now: Instant) -> Passage {
        let Some(bundle) = bundle else { return Passage::Open };
        let since = match self.target {
            Some((target, since)) if target == bundle => since,
            _ => {
                self.target = Some((bundle, now));
                now
            }
        };
        let deadline = since + BUNDLE_WAIT;
        if now >= deadline || self.holders.iter().all(|(_, held)| *held == Some(bundle)) {
            return Passage::Open;
        }
        Passage::Until(deadline)
    }

    fn try_end(&mut self, now: Instant) -> bool {
        if self.away_since.is_some_and(|since| now < since + RETURN_WAIT) {
            return false;
        }
        self.away_since = Some(now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(of: &'static str) -> Version {
        Version::of(of, [])
    }

    #[test]
    fn a_certificate_waits_for_every_validation_context_of_its_connection() {
        let (mut gate, start) = (Gate::default(), Instant::now());
        gate.note_bundle(1, Some(version("old")));
        gate.note_bundle(2, Some(version("old")));
        assert_eq!(gate.passage(Some(version("old")), start), Passage::Open);
        let deadline = start + BUNDLE_WAIT;
        assert_eq!(gate.passage(Some(version("new")), start), Passage::Until(deadline));
        gate.note_bundle(1, Some(version("new")));
        assert_eq!(gate.passage(Some(version("new")), start), Passage::Until(deadline));
        gate.note_bundle(2, Some(version("new")));
        assert_eq!(gate.passage(Some(version("new")), start), Passage::Open);
    }

    #[test]
    fn a_certificate_does_not_wait_longer_than_the_limit() {
        let (mut gate, start) = (Gate::default(), Instant::now());
        gate.note_bundle(1, None);
        assert!(matches!(gate.passage(Some(version("new")), start), Passage::Until(_)));
        assert_eq!(gate.passage(Some(version("new")), start + BUNDLE_WAIT), Passage::Open);
    }

    #[test]
    fn without_a_validation_context_nothing_waits() {
        let mut gate = Gate::default();
        assert_eq!(gate.passage(Some(version("new")), Instant::now()), Passage::Open);
    }

    #[test]
    fn a_second_stream_of_a_proxy_is_ended_only_when_the_first_is_back() {
        let (mut gate, start) = (Gate::default(), Instant::now());
        assert!(gate.try_end(start));
        assert!(!gate.try_end(start + Duration::from_secs(29)));
        gate.away_since = None;
        assert!(gate.try_end(start + Duration::from_secs(29)));
        assert!(gate.try_end(start + Duration::from_secs(60)), "a proxy that does not come back must not hold the others for ever");
    }
}
