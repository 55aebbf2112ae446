//! Local questions to a running agent: `chancery-agent status` and `streams`.
//!
//! The agent answers in JSON over HTTP on a Unix socket that is for its owner alone (0600): `curl --unix-socket … http://agent/status`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::HOST;
use axum::routing::get;
use axum::{Json, Router};
use bytes::Bytes;
use chancery_process::output::{self, Format, OutputError};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::net::UnixStream;
use tokio::sync::watch;

use crate::ca_client::{ProxyLag, ProxySummary};
use crate::csi::{Health, Plugin, VolumeStatus};
use crate::sds::{Registry, StreamStatus};
use crate::svids::{AgentStatus, Svids, WorkloadStatus};
use chancery_process::moment::moment;

/// The admin socket's permissions.
pub const SOCKET_MODE: u32 = 0o600;
const TIMEOUT: Duration = Duration::from_secs(5);
/// An agent with tens of thousands of streams answers with less.
const MAX_ANSWER_BYTES: usize = 64 << 20;
/// Problems named in a status; the streams tell the rest.
const MAX_PROBLEMS: usize = 100;

/// The answer to `status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// What the agent says of itself and its workloads.
    #[serde(flatten)]
    pub agent: AgentStatus,
    /// Open proxy streams.
    pub streams: usize,
    /// The CSI volumes: pods with a socket of their own.
    #[serde(default)]
    pub volumes: Vec<VolumeStatus>,
    /// What the CA is told of who holds what.
    #[serde(default)]
    pub convergence: Convergence,
    /// When the first of the certificates expires, the agent's own included.
    #[serde(with = "time::serde::rfc3339::option")]
    pub next_expiry: Option<OffsetDateTime>,
    /// Why the configuration on disk is not the one in force; empty while it is.
    #[serde(default)]
    pub configuration_error: String,
    /// What somebody should look at, a sentence each; the first 100.
    pub problems: Vec<String>,
}

/// Who holds what, connected or not.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Convergence {
    /// Proxies that hold secrets of this agent.
    pub holders: u32,
    /// The oldest trust state that any of them has acknowledged.
    pub trust_sequence: u64,
    /// The oldest ledger entry of a certificate that any of them may be using; nothing if none does.
    pub certificate_entry: Option<u64>,
    /// Proxies that are behind, a sentence each; the first 100.
    pub behind: Vec<String>,
    /// Proxies that took a certificate and no validation context, likewise.
    pub unproven: Vec<String>,
}

/// A question that got no answer.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// Nobody listens, or not to us.
    #[error("{}: cannot reach the agent: {error}; is it running, is `admin_socket` the same here and there, and may this user open it?", socket.display())]
    Unreachable {
        /// The admin socket.
        socket: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// It takes too long.
    #[error("{}: the agent has not answered within {TIMEOUT:?}", .0.display())]
    Timeout(PathBuf),
    /// It answered with an error, or not in HTTP.
    #[error("{}: {problem}", socket.display())]
    Refused {
        /// The admin socket.
        socket: PathBuf,
        /// The agent's words.
        problem: String,
    },
    /// It answered something else: another version, or another program.
    #[error("{}: cannot read the agent's answer: {error}; are this program and the agent of one version?", socket.display())]
    Unreadable {
        /// The admin socket.
        socket: PathBuf,
        /// What is wrong with it.
        error: serde_json::Error,
    },
    /// The answer could not be printed.
    #[error(transparent)]
    Output(#[from] OutputError),
}

/// The agent's side, to be served with [`chancery_process::http::serve_unix`] on a socket of mode [`SOCKET_MODE`].
/// `refused`: why the configuration on disk is not in force.
pub fn routes(svids: Svids, registry: Registry, plugin: Option<Plugin>, refused: watch::Receiver<Option<String>>) -> Router {
    let streams = registry.clone();
    Router::new()
        .route("/status", get(answer_status))
        .with_state((svids, registry, plugin, refused))
        .route("/streams", get(move || async move { Json(streams.list()) }))
}

type Shared = (Svids, Registry, Option<Plugin>, watch::Receiver<Option<String>>);

async fn answer_status(State((svids, registry, plugin, refused)): State<Shared>) -> Result<Json<Status>, (StatusCode, String)> {
    match svids.status().await {
        Ok(agent) => {
            let convergence = Convergence::of(&svids.proxies());
            let refused = refused.borrow().clone().unwrap_or_default();
            Ok(Json(Status::of(agent, &registry, plugin.as_ref(), convergence, refused)))
        }
        Err(error) => Err((StatusCode::SERVICE_UNAVAILABLE, error.to_string())),
    }
}

impl Status {
    fn of(agent: AgentStatus, registry: &Registry, plugin: Option<&Plugin>, convergence: Convergence, configuration_error: String) -> Self {
        let volumes = plugin.map(Plugin::list).unwrap_or_default();
        let expiries = agent.workloads.iter().map(|workload| workload.expires_at).chain([agent.expires_at]);
        let next_expiry = expiries.flatten().min();
        let mut problems = Vec::new();
        if !agent.ca_reachable {
            problems.push(agent.ca_problem.clone());
        }
        if !configuration_error.is_empty() {
            problems.push(format!("the configuration on disk is not in force: {configuration_error}"));
        }
        if agent.trust_sequence == 0 {
            problems.push("no trust bundle yet: every proxy waits".to_owned());
        }
        if let Some(alarm) = &agent.ledger.alarm {
            problems.push(format!(
                "{alarm} (at {}); `--output json` shows both checkpoints; the alarm stays until `chancery-agent reset --ledger`",
                moment(alarm.raised_at)
            ));
        }
        if let Some(log) = &agent.ledger.continued {
            problems.push(format!("{log} at {}; `chancery-agent reset --ledger` forgets it", moment(log.accepted_at)));
        }
        let failing = agent.workloads.iter().filter(|workload| !workload.problem.is_empty());
        problems.extend(failing.map(|WorkloadStatus { workload, pod, problem, .. }| format!("{}/{pod}: {problem}", workload.namespace)));
        if let Some(Health::Unregistered(problem) | Health::Unreachable(problem)) = plugin.map(Plugin::health) {
            problems.push(problem);
        }
        let failing = volumes.iter().filter(|volume| !volume.problem.is_empty());
        problems.extend(failing.map(|volume| format!("{}/{}: its volume: {}", volume.namespace, volume.pod, volume.problem)));
        problems.extend(registry.problems());
        problems.truncate(MAX_PROBLEMS);
        Self { streams: registry.len(), volumes, convergence, next_expiry, configuration_error, problems, agent }
    }
}

impl Convergence {
    fn of(summary: &ProxySummary) -> Self {
        Self {
            holders: summary.holders,
            trust_sequence: summary.trust_sequence,
            certificate_entry: Some(summary.certificate_entry).filter(|entry| *entry != u64::MAX),
            behind: summary.lagging.iter().map(sentence).collect(),
            unproven: summary.unproven.iter().map(|lag| format!("{} {}", lag.pod, lag.proxy)).collect(),
        }
    }
}

fn sentence(lag: &ProxyLag) -> String {
    let certificate = Some(lag.certificate_entry).filter(|entry| *entry != u64::MAX);
    let parts = [
        Some(format!("{} {}: bundle of sequence {}", lag.pod, lag.proxy, lag.trust_sequence)),
        certificate.map(|entry| format!("certificate of ledger entry {entry}")),
        lag.not_back.then(|| "not back since the agent started".to_owned()),
        lag.away_since.map(|since| format!("away since {}", moment(since))),
        (!lag.nack.is_empty()).then(|| format!("refused: {}", lag.nack)),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join("; ")
}

/// Asks the agent how it is.
pub async fn status(socket: &Path) -> Result<Status, AdminError> {
    ask(socket, "/status").await
}

/// Asks the agent for its open proxy streams.
pub async fn streams(socket: &Path) -> Result<Vec<StreamStatus>, AdminError> {
    ask(socket, "/streams").await
}

/// `chancery-agent status`: as a table, one block for the agent, one line for each workload, each problem and each CSI volume.
pub async fn print_status(out: &mut impl Write, socket: &Path, format: Format) -> Result<(), AdminError> {
    let status = status(socket).await?;
    match format {
        Format::Json => output::fields(out, format, &status)?,
        Format::Csv => output::rows(out, format, WORKLOAD_COLUMNS, &status.agent.workloads)?,
        Format::Table => {
            output::fields(out, format, &Summary::of(&status))?;
            writeln!(out).map_err(OutputError::from)?;
            output::rows(out, format, WORKLOAD_COLUMNS, &status.agent.workloads)?;
            if !status.volumes.is_empty() {
                writeln!(out).map_err(OutputError::from)?;
                output::rows(out, format, VOLUME_COLUMNS, &status.volumes)?;
            }
        }
    }
    Ok(())
}

/// `chancery-agent streams`: a line for each stream.
pub async fn print_streams(out: &mut impl Write, socket: &Path, format: Format) -> Result<(), AdminError> {
    let streams = streams(socket).await?;
    if format == Format::Json {
        return Ok(output::rows(out, format, &[], &streams)?);
    }
    let lines: Vec<_> = streams.iter().map(StreamLine::of).collect();
    Ok(output::rows(out, format, STREAM_COLUMNS, &lines)?)
}

const WORKLOAD_COLUMNS: &[&str] =
    &["workload.namespace", "pod", "spiffe_id", "serial", "expires_at", "next_try_at", "token_expires_at", "streams", "problem"];
const VOLUME_COLUMNS: &[&str] = &["namespace", "pod", "pod_uid", "service_account", "socket", "target", "problem"];
const STREAM_COLUMNS: &[&str] = &[
    "stream",
    "connection",
    "protocol",
    "proxy",
    "namespace",
    "pod",
    "own_socket",
    "names",
    "held",
    "pending",
    "trust_sequence",
    "certificate_entry",
    "stale_token",
    "nack",
];

/// A status without its lists.
#[derive(Serialize)]
struct Summary<'s> {
    version: &'s str,
    trust_domain: &'s str,
    cluster: &'s str,
    spiffe_id: Option<&'s str>,
    #[serde(with = "time::serde::rfc3339::option")]
    expires_at: Option<OffsetDateTime>,
    ca_reachable: bool,
    trust_sequence: u64,
    ledger_size: u64,
    workloads: usize,
    streams: usize,
    volumes: usize,
    holders: u32,
    proven_sequence: u64,
    behind: String,
    #[serde(with = "time::serde::rfc3339::option")]
    next_expiry: Option<OffsetDateTime>,
    problems: String,
}

impl<'s> Summary<'s> {
    fn of(status: &'s Status) -> Self {
        let agent = &status.agent;
        Self {
            version: &agent.version,
            trust_domain: &agent.trust_domain,
            cluster: &agent.cluster,
            spiffe_id: agent.spiffe_id.as_deref(),
            expires_at: agent.expires_at,
            ca_reachable: agent.ca_reachable,
            trust_sequence: agent.trust_sequence,
            ledger_size: agent.ledger.size,
            workloads: agent.workloads.len(),
            streams: status.streams,
            volumes: status.volumes.len(),
            holders: status.convergence.holders,
            proven_sequence: status.convergence.trust_sequence,
            behind: if status.convergence.behind.is_empty() { "none".to_owned() } else { status.convergence.behind.join("\n") },
            next_expiry: status.next_expiry,
            problems: if status.problems.is_empty() { "none".to_owned() } else { status.problems.join("\n") },
        }
    }
}

/// A stream without nesting: what does not fit on a line is in `--output json`.
#[derive(Serialize)]
struct StreamLine<'s> {
    #[serde(flatten)]
    stream: &'s StreamStatus,
    /// Versions that the proxy accepted.
    held: Vec<&'s str>,
    /// Names that are not delivered, with the reason.
    pending: Vec<String>,
    /// In place of the stream's own list.
    names: Vec<&'s str>,
}

impl<'s> StreamLine<'s> {
    fn of(stream: &'s StreamStatus) -> Self {
        let names = stream.names.iter();
        let undelivered = names.clone().filter(|name| name.standing != "served");
        Self {
            stream,
            held: names.clone().map(|name| &*name.held).collect(),
            pending: undelivered.map(|name| format!("{}: {}", name.name, name.standing)).collect(),
            names: names.map(|name| &*name.name).collect(),
        }
    }
}

async fn ask<T: DeserializeOwned>(socket: &Path, path: &'static str) -> Result<T, AdminError> {
    let answer = tokio::time::timeout(TIMEOUT, fetch(socket, path)).await;
    let answer = answer.map_err(|_| AdminError::Timeout(socket.to_owned()))??;
    serde_json::from_slice(&answer).map_err(|error| AdminError::Unreadable { socket: socket.to_owned(), error })
}

async fn fetch(socket: &Path, path: &'static str) -> Result<Bytes, AdminError> {
    let refused = |problem: String| AdminError::Refused { socket: socket.to_owned(), problem };
    let stream = UnixStream::connect(socket).await;
    let stream = stream.map_err(|error| AdminError::Unreachable { socket: socket.to_owned(), error })?;
    let connected = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = connected.map_err(|error| refused(error.to_string()))?;
    let exchange = async move {
        let request =
            http::Request::get(path).header(HOST, "agent").body(Empty::<Bytes>::new()).map_err(|error| refused(error.to_string()))?;
        let response = sender.send_request(request).await.map_err(|error| refused(error.to_string()))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await;
        let body = body.map_err(|error| refused(error.to_string()))?.to_bytes();
        if status == StatusCode::OK { Ok(body) } else { Err(refused(String::from_utf8_lossy(&body).into_owned())) }
    };
    // The exchange goes on only while the connection is driven, and the connection ends when the exchange has dropped its sender.
    let (answer, _) = tokio::join!(exchange, connection);
    answer
}
