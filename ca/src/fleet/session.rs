//! One agent's stream, from its hello to its end.
//!
//! The session never waits for a slow agent without a limit: the trust state and the keys are read anew when there is room to send, so only
//! the newest is ever queued, and an agent that takes nothing for [`STUCK`] is let go.

use std::sync::Arc;
use std::time::Duration;

use chancery_identity::TrustState;
use chancery_proto::chancery::v1::{
    AgentMessage, CaMessage, ClusterKeys, Hello, LedgerView, Order, Report, StandingActs, TellCertificates, Welcome, agent_message,
    ca_message, order,
};
use futures_util::{Stream, StreamExt};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::attestation::Clusters;
use crate::fleet::ledger::{Looked, Showing};
use crate::fleet::{CAPABILITIES, Fleet, LedgerSource, Member, distrusted, wire};

/// An agent that takes no message for so long is let go.
pub(super) const STUCK: Duration = Duration::from_secs(30);
/// Agents report at least every 10 s; one that has been silent for so long is let go.
pub(super) const SILENT: Duration = Duration::from_secs(60);
/// The capability of agents that take checkpoints of the ledger, and of a CA that sends them.
pub(super) const LEDGER_CHECKPOINTS: &str = "ledger-checkpoints";
/// The capability of agents that go over to a log that continues a lost one.
pub(super) const LEDGER_CONTINUED: &str = "ledger-continued";
/// The capability of agents that keep acts for the CA.
pub(super) const STANDING_ACTS: &str = "standing-acts";
/// How often wall-clock deadlines are looked at.
const TICK: Duration = Duration::from_secs(5);

/// Where a session gets what it hands down.
#[derive(Clone, Debug)]
pub struct Sources {
    /// The trust state in force.
    pub trust: watch::Receiver<Arc<TrustState>>,
    /// The clusters, whose keys the agent is told.
    pub clusters: Arc<Clusters>,
    /// The ledger's checkpoints.
    pub ledger: LedgerSource,
    /// When the connection is old enough to be drained.
    pub drain_at: Instant,
    /// Cancelled when the CA shuts down.
    pub shutdown: CancellationToken,
}

/// Why a session ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SessionEnd {
    /// The agent closed its stream, or its connection broke.
    #[error("the agent closed the stream")]
    Left,
    /// The agent opened a newer stream.
    #[error("the agent opened a newer session")]
    Replaced,
    /// The connection has reached its age.
    #[error("the connection has reached its age; connect again")]
    Aged,
    /// The agent's certificate expired during the session.
    #[error("the certificate that the connection was made with has expired; renew it and connect again")]
    SvidExpired,
    /// The configuration no longer has the agent's cluster.
    #[error("the CA's configuration no longer has the agent's cluster")]
    ClusterRemoved,
    /// The CA stops.
    #[error("the CA is shutting down; connect again")]
    ShuttingDown,
    /// Nothing was heard for [`SILENT`].
    #[error("the agent reported nothing for {} s", SILENT.as_secs())]
    Silent,
    /// Nothing was taken for [`STUCK`].
    #[error("the agent took no message for {} s", STUCK.as_secs())]
    Stuck,
    /// The agent said what may not be said there.
    #[error("{0}")]
    Protocol(&'static str),
}

/// A session's end of the way to the agent.
#[derive(Debug)]
pub(super) struct LineEnd {
    pub(super) orders: mpsc::Receiver<Order>,
    pub(super) replaced: CancellationToken,
}

/// A session that has begun; dropping it ends it.
#[derive(Debug)]
pub struct Session {
    fleet: Arc<Fleet>,
    member: Member,
    number: u64,
    orders: mpsc::Receiver<Order>,
    replaced: CancellationToken,
    /// What the agent said of the ledger in its hello; `None` if it takes no checkpoints.
    ledger: Option<LedgerView>,
    /// It goes over to a log that continues a lost one.
    goes_over: bool,
    /// Roots that it was told are distrusted.
    distrusted: Vec<Vec<u8>>,
    /// It keeps acts for the CA.
    keeps_acts: bool,
}

impl Session {
    pub(super) fn new(fleet: Arc<Fleet>, member: Member, number: u64, line: LineEnd, hello: &Hello) -> Self {
        let has = |name: &str| hello.capabilities.iter().any(|capability| capability == name);
        let view = hello.report.as_ref().and_then(|report| report.ledger.clone());
        let ledger = has(LEDGER_CHECKPOINTS).then(|| view.unwrap_or_default());
        let goes_over = has(LEDGER_CONTINUED);
        Self {
            fleet,
            member,
            number,
            orders: line.orders,
            replaced: line.replaced,
            ledger,
            goes_over,
            distrusted: hello.distrusted.clone(),
            keeps_acts: has(STANDING_ACTS),
        }
    }

    /// Serves the stream until it ends; tells why it did.
    pub async fn run<S, E>(mut self, mut sources: Sources, mut inbound: S, outbound: mpsc::Sender<CaMessage>) -> SessionEnd
    where
        S: Stream<Item = Result<AgentMessage, E>> + Unpin + Send,
    {
        let welcome = Welcome {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            capabilities: CAPABILITIES.map(String::from).to_vec(),
            clock_ms: wire::millis(self.fleet.clock.now()),
        };
        match self.serve(welcome, &mut sources, &mut inbound, &outbound).await {
            Ok(never) => match never {},
            Err(end) => end,
        }
    }

    async fn serve<S, E>(
        &mut self,
        welcome: Welcome,
        sources: &mut Sources,
        inbound: &mut S,
        outbound: &mpsc::Sender<CaMessage>,
    ) -> Result<std::convert::Infallible, SessionEnd>
    where
        S: Stream<Item = Result<AgentMessage, E>> + Unpin + Send,
    {
        send(outbound, ca_message::Message::Welcome(welcome)).await?;
        distrusted::keep(&sources.ledger.ledger, self.fleet.clock.now(), &self.member.id, &std::mem::take(&mut self.distrusted)).await;
        if sources.ledger.ledger.current_state().roots_kept_until().is_some_and(|until| self.fleet.clock.now() < until) {
            let tell = Order { order: Some(order::Order::TellCertificates(TellCertificates {})) };
            send(outbound, ca_message::Message::Order(tell)).await?;
        }
        sources.trust.mark_changed();
        sources.ledger.standing.mark_changed();
        let mut key_changes = sources.clusters.changes();
        key_changes.mark_changed();
        let mut told = None;
        let mut showing = self.ledger.take().map(|view| {
            let mut showing = Showing::new(sources.ledger.clone(), self.member.id.clone(), self.goes_over);
            showing.heard(&view);
            showing
        });
        let mut tick = tokio::time::interval(TICK);
        let mut heard = Instant::now();
        loop {
            tokio::select! {
                message = inbound.next() => {
                    heard = Instant::now();
                    if let Some(report) = report_of(message)? {
                        if let (Some(showing), Some(view)) = (&mut showing, &report.ledger) {
                            showing.heard(view);
                        }
                        self.fleet.report(&self.member.id, self.number, report);
                    }
                }
                Ok(()) = sources.trust.changed() => {
                    let trust = sources.trust.borrow_and_update().clone();
                    send(outbound, ca_message::Message::Trust(wire::trust_message(&trust))).await?;
                    self.fleet.given(&self.member.id, self.number, trust.sequence);
                }
                Ok(()) = key_changes.changed() => {
                    let keys = self.keys(&sources.clusters)?.filter(|keys| told.as_ref() != Some(keys));
                    if let Some(keys) = keys {
                        send(outbound, ca_message::Message::ClusterKeys(keys.clone())).await?;
                        told = Some(keys);
                    }
                }
                Ok(()) = sources.ledger.standing.changed(), if self.keeps_acts => {
                    let acts = sources.ledger.standing.borrow_and_update().clone();
                    // Before the ledger was read there is none.
                    if !acts.origin.is_empty() {
                        send(outbound, ca_message::Message::StandingActs(StandingActs::clone(&acts))).await?;
                    }
                }
                looked = compared(&mut showing) => {
                    self.fleet.compared(&self.member.id, self.number, looked.alarm);
                    if let Some(offer) = looked.offer {
                        send(outbound, ca_message::Message::LedgerCheckpoint(offer)).await?;
                    }
                }
                Some(order) = self.orders.recv() => send(outbound, ca_message::Message::Order(order)).await?,
                () = self.replaced.cancelled() => return Err(SessionEnd::Replaced),
                () = sources.shutdown.cancelled() => return Err(SessionEnd::ShuttingDown),
                () = tokio::time::sleep_until(sources.drain_at) => return Err(SessionEnd::Aged),
                _ = tick.tick() => {
                    if self.fleet.clock.now() >= self.member.svid_not_after {
                        return Err(SessionEnd::SvidExpired);
                    }
                    if heard.elapsed() >= SILENT {
                        return Err(SessionEnd::Silent);
                    }
                }
            }
        }
    }
}

impl Session {
    /// The keys of the agent's cluster; none while they are not loaded.
    fn keys(&self, clusters: &Clusters) -> Result<Option<ClusterKeys>, SessionEnd> {
        let cluster = &self.member.cluster;
        if clusters.contains(cluster) { Ok(clusters.cluster_keys(cluster)) } else { Err(SessionEnd::ClusterRemoved) }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.fleet.detach(&self.member.id, self.number);
    }
}

/// The next outcome, if the agent is shown checkpoints. Safe to cancel.
async fn compared(showing: &mut Option<Showing>) -> Looked {
    match showing {
        Some(showing) => showing.next().await,
        None => std::future::pending().await,
    }
}

/// The report in a message; none in a kind of message that a newer agent may send.
fn report_of<E>(message: Option<Result<AgentMessage, E>>) -> Result<Option<Report>, SessionEnd> {
    let Some(Ok(message)) = message else { return Err(SessionEnd::Left) };
    match message.message {
        Some(agent_message::Message::Report(report)) => Ok(Some(report)),
        Some(agent_message::Message::Hello(_)) => Err(SessionEnd::Protocol("a hello is only the first message of a session")),
        None => Ok(None),
    }
}

async fn send(outbound: &mpsc::Sender<CaMessage>, message: ca_message::Message) -> Result<(), SessionEnd> {
    outbound.send_timeout(CaMessage { message: Some(message) }, STUCK).await.map_err(|error| match error {
        mpsc::error::SendTimeoutError::Timeout(_) => SessionEnd::Stuck,
        mpsc::error::SendTimeoutError::Closed(_) => SessionEnd::Left,
    })
}
