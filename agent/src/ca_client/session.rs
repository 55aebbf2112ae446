//! The one stream between the agent and the CA: trust and orders down, reports up.

use std::time::Duration;

use chancery_proto::chancery::v1 as wire;
use chancery_proto::chancery::v1::agent_message::Message as Up;
use chancery_proto::chancery::v1::agent_service_client::AgentServiceClient;
use chancery_proto::chancery::v1::ca_message::Message as Down;
use time::OffsetDateTime;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

use super::identity::VERSION;
use super::{CaClient, CaError, ProxyLag, milliseconds};

/// Reports on their way; one more is not queued but sent later, with newer numbers.
const REPORTS_QUEUED: usize = 2;
const WELCOME_TIMEOUT: Duration = Duration::from_secs(10);
/// What this agent can do on a session beyond its beginnings.
const CAPABILITIES: [&str; 4] = ["ledger-checkpoints", "convergence", "ledger-continued", "standing-acts"];
/// At most this many lagging proxies are named.
const MAX_LAGGING: usize = 100;

/// At most this many distrusted roots are named.
const MAX_DISTRUSTED: usize = 64;

/// An open stream.
pub(super) struct Session {
    pub(super) channel: Channel,
    up: mpsc::Sender<wire::AgentMessage>,
    /// Of the pods that the CA was told last on this stream.
    told_pods: u64,
    down: Streaming<wire::CaMessage>,
}

impl Session {
    /// Opens the stream on `channel` and waits for the CA's first message.
    pub(super) async fn open(client: &CaClient, channel: Channel, started_at: OffsetDateTime) -> Result<(Self, Option<Down>), CaError> {
        let (up, reports) = mpsc::channel(REPORTS_QUEUED);
        let report = client.report();
        let told_pods = pods_version(&report);
        let hello = wire::Hello {
            version: VERSION.to_owned(),
            capabilities: CAPABILITIES.map(str::to_owned).to_vec(),
            started_at_ms: milliseconds(started_at),
            report: Some(report),
            distrusted: client.distrusted(),
        };
        let hello = wire::AgentMessage { message: Some(Up::Hello(hello)) };
        up.try_send(hello).map_err(|e| CaError::Local(format!("the first message: {e}")))?;
        let open = async {
            let mut down = AgentServiceClient::new(channel.clone()).session(ReceiverStream::new(reports)).await?.into_inner();
            let first = down.message().await?;
            Ok((down, first))
        };
        let (down, first) = tokio::time::timeout(WELCOME_TIMEOUT, open)
            .await
            .unwrap_or_else(|_| Err(tonic::Status::deadline_exceeded(format!("no answer within {WELCOME_TIMEOUT:?}"))))
            .map_err(|status| CaError::from_status("Session", &status))?;
        let first = first.ok_or_else(|| CaError::Unavailable("Session: the CA ended it at once".into()))?;
        Ok((Self { channel, up, told_pods, down }, first.message))
    }

    /// The CA's next message; `None` once it has ended the stream. Safe to cancel.
    pub(super) async fn next(&mut self) -> Result<Option<Down>, CaError> {
        loop {
            match self.down.message().await.map_err(|status| CaError::from_status("Session", &status))? {
                None => return Ok(None),
                // A kind of message that this version does not know.
                Some(wire::CaMessage { message: None }) => {}
                Some(wire::CaMessage { message }) => return Ok(message),
            }
        }
    }

    /// Sends a report, or tells that the one before has not left yet.
    pub(super) fn report(&mut self, client: &CaClient) -> bool {
        let mut report = client.report();
        let version = pods_version(&report);
        if let Some(convergence) = report.convergence.as_mut().filter(|_| version == self.told_pods) {
            convergence.pods.clear();
        }
        let sent = self.up.try_send(wire::AgentMessage { message: Some(Up::Report(report)) }).is_ok();
        if sent {
            self.told_pods = version;
        }
        sent
    }
}

fn pods_version(report: &wire::Report) -> u64 {
    report.convergence.as_ref().map_or(0, |convergence| convergence.pods_version)
}

fn lags(lags: &[ProxyLag]) -> Vec<wire::ProxyLag> {
    let lag = |lag: &ProxyLag| wire::ProxyLag {
        proxy: lag.proxy.clone(),
        pod: lag.pod.clone(),
        trust_sequence: lag.trust_sequence,
        nack: lag.nack.clone(),
        certificate_entry: lag.certificate_entry,
        away_since_ms: lag.away_since.map_or(0, milliseconds),
        not_back: lag.not_back,
        pod_uid: lag.pod_uid.as_bytes().to_vec(),
    };
    lags.iter().take(MAX_LAGGING).map(lag).collect()
}

impl CaClient {
    fn distrusted(&self) -> Vec<Vec<u8>> {
        let trust = self.published.trust.borrow();
        let roots = trust.iter().flat_map(|trust| &trust.distrusted);
        roots.take(MAX_DISTRUSTED).map(|root| root.0.to_vec()).collect()
    }

    fn report(&self) -> wire::Report {
        let holdings = *self.published.holdings.borrow();
        // Before the trust state: what the proxies hold must not be reckoned newer than it is.
        let proxies = self.published.proxies.borrow().clone();
        let trust_sequence = self.published.trust.borrow().as_ref().map_or(0, |trust| trust.sequence);
        wire::Report {
            clock_ms: milliseconds(self.clock.now()),
            trust_sequence,
            workloads: holdings.workloads,
            streams: proxies.streams,
            acks: proxies.acks,
            nacks: proxies.nacks,
            lagging: lags(&proxies.lagging),
            lagging_total: proxies.lagging_total,
            first_expiry_ms: holdings.first_expiry.map_or(0, milliseconds),
            ledger: Some(self.published.ledger.memory().borrow().report()),
            convergence: Some(wire::Convergence {
                trust_sequence: proxies.trust_sequence.min(trust_sequence),
                certificate_entry: proxies.certificate_entry,
                holders: proxies.holders,
                pods: proxies.pods.iter().map(|uid| uid.as_bytes().to_vec()).collect(),
                pods_version: proxies.pods_version,
                svid_entry: self.published.own.borrow().as_ref().map_or(0, |own| own.entry),
                unproven: lags(&proxies.unproven),
                unproven_total: proxies.unproven_total,
                outdated_total: proxies.outdated_total,
            }),
        }
    }
}
