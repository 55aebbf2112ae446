//! The real agent, of a node or as a sidecar.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use chancery_ca::attestation::development::TokenRequest;
use serde_json::Value;
use time::OffsetDateTime;

use crate::ca::{CLUSTER, Ca, TRUST_DOMAIN, ready};
use crate::lab::{Lab, free_address};
use crate::process::Process;
use crate::tokens::TokenVolume;
use crate::{Result, tools, wait};

const READY_WITHIN: Duration = Duration::from_secs(20);
/// An agent joins once; from then on its certificate is its proof.
const JOIN_TOKEN_LIFETIME: Duration = Duration::from_secs(3600);

/// An agent with its state; running or not.
pub struct Agent {
    process: Option<Process>,
    config: PathBuf,
    log: PathBuf,
    state_dir: PathBuf,
    environment: Vec<(String, String)>,
    /// Metrics and probes.
    pub http: SocketAddr,
    /// Where proxies fetch their secrets.
    pub sds_socket: PathBuf,
}

impl Agent {
    /// Starts the agent of a node, and waits until it is ready.
    pub async fn start(lab: &Lab, ca: &Ca, node: &str) -> Result<Self> {
        let mut agent = Self::configure(lab, ca, node)?;
        agent.run(lab).await?;
        Ok(agent)
    }

    /// The agent of a node, with all it needs, but not started.
    pub fn configure(lab: &Lab, ca: &Ca, node: &str) -> Result<Self> {
        let volume = TokenVolume::create(&lab.at("agent-token"))?;
        volume.replace(&ca.issuer()?.sign(&join_token(node), OffsetDateTime::now_utc())?)?;
        Self::configure_with_token(lab, ca, &volume)
    }

    /// The agent of the node that the token in this volume names, with all it needs, but not started.
    pub fn configure_with_token(lab: &Lab, ca: &Ca, volume: &TokenVolume) -> Result<Self> {
        Self::written(lab, ca, "agent", "node", volume)
    }

    /// Starts a sidecar for the pod whose token is in this volume, and waits until it is ready.
    pub async fn sidecar(lab: &Lab, ca: &Ca, volume: &TokenVolume) -> Result<Self> {
        let mut agent = Self::configure_sidecar(lab, ca, volume)?;
        agent.run(lab).await?;
        Ok(agent)
    }

    /// A sidecar with all it needs, but not started.
    pub fn configure_sidecar(lab: &Lab, ca: &Ca, volume: &TokenVolume) -> Result<Self> {
        Self::written(lab, ca, "sidecar", "sidecar", volume)
    }

    /// With its configuration written; `name` begins the names of its files.
    fn written(lab: &Lab, ca: &Ca, name: &str, mode: &str, volume: &TokenVolume) -> Result<Self> {
        let at = |what: &str| lab.at(&format!("{name}{what}"));
        let agent = Self {
            process: None,
            config: at(".toml"),
            log: lab.log(name),
            state_dir: at("-state"),
            environment: Vec::new(),
            http: free_address()?,
            sds_socket: at("-sds.sock"),
        };
        let text = format!(
            "trust_domain = \"{TRUST_DOMAIN}\"\ncluster = \"{CLUSTER}\"\nca_address = \"{ca}\"\nmode = \"{mode}\"\ntoken_file = \"{token}\"\n\
             state_dir = \"{state}\"\nhttp_listen = \"{http}\"\nadmin_socket = \"{admin}\"\n\n\
             [trust]\nbundle_file = \"{bundle}\"\n\n[sds]\nsocket = \"{sds}\"\n",
            ca = ca.address,
            token = volume.token().display(),
            state = agent.state_dir.display(),
            http = agent.http,
            admin = at("-admin.sock").display(),
            bundle = ca.bundle().display(),
            sds = agent.sds_socket.display(),
        );
        std::fs::write(&agent.config, text)?;
        Ok(agent)
    }

    /// Starts the agent again after it ended, and waits until it is ready.
    pub async fn run(&mut self, lab: &Lab) -> Result<()> {
        let mut command = lab.command(&tools::chancery("chancery-agent")?);
        command.args(["run", "--config"]).arg(&self.config);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        let process = self.process.insert(Process::start("the agent", &mut command, &self.log)?);
        wait::until("the agent is ready", READY_WITHIN, async || {
            process.check().map_err(|error| error.to_string())?;
            ready(self.http).await
        })
        .await
    }

    /// From the next start on, the agent has this in its environment.
    pub fn set_environment(&mut self, name: &str, value: &str) {
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// The process id of the running agent.
    pub fn id(&self) -> Result<u32> {
        Ok(self.process.as_ref().ok_or("the agent is not running")?.id())
    }

    /// What it has of the machine's memory.
    pub fn resident_kib(&self) -> Result<usize> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id()?))?;
        let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok());
        kib.ok_or_else(|| "the kernel does not say how much memory is resident".into())
    }

    /// Waits until the agent would still know this identity after a crash.
    pub async fn kept(&self, spiffe_id: &str) -> Result<()> {
        wait::until(&format!("the agent's state holds {spiffe_id}"), READY_WITHIN, async || {
            let state = std::fs::read(self.state_dir.join("state")).map_err(|error| error.to_string())?;
            // The certificate carries its URI as plain text.
            let found = state.windows(spiffe_id.len()).any(|window| window == spiffe_id.as_bytes());
            if found { Ok(()) } else { Err("not yet".to_owned()) }
        })
        .await
    }

    /// Adds these lines to the end of its configuration, for its next start.
    pub fn append(&self, more: &str) -> Result<()> {
        let text = std::fs::read_to_string(&self.config)?;
        Ok(std::fs::write(&self.config, text + more)?)
    }

    /// Everything it has said.
    pub fn log(&self) -> Result<String> {
        Ok(std::fs::read_to_string(&self.log)?)
    }

    /// SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().map_or(Ok(()), Process::kill)
    }

    /// Waits until it has ended by itself.
    pub async fn ended(&mut self, within: Duration) -> Result<ExitStatus> {
        self.process.take().ok_or("the agent is not running")?.ended(within).await
    }

    /// Runs `chancery-agent --output json` against this agent.
    pub fn ask(&self, arguments: &[&str]) -> Result<Value> {
        let mut command = Command::new(tools::chancery("chancery-agent")?);
        let output = command.args(arguments).args(["--output", "json", "--config"]).arg(&self.config).output()?;
        if !output.status.success() {
            let complaint = String::from_utf8_lossy(&output.stderr);
            return Err(format!("`chancery-agent {}` ended with {}: {complaint}", arguments.join(" "), output.status).into());
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Its configuration.
    pub fn config(&self) -> &std::path::Path {
        &self.config
    }

    /// Leaves the agent running after this process.
    pub fn detach(self) -> Option<u32> {
        self.process.map(Process::detach)
    }
}

/// What the agent's own pod on a node presents to join.
pub fn join_token(node: &str) -> TokenRequest {
    TokenRequest {
        namespace: "chancery".into(),
        service_account: "agent".into(),
        pod: format!("agent-{node}"),
        node: node.to_owned(),
        audience: "chancery-agent".into(),
        lifetime: JOIN_TOKEN_LIFETIME,
        pod_uid: None,
        node_uid: None,
    }
}
