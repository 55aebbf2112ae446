//! The real CA, started for development, and the operators' command line.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use chancery_ca::attestation::development::{DevelopmentIssuer, ISSUER, JWKS_FILE};
use chancery_identity::tls::{ServerTrust, client_config, trust_from};
use chancery_identity::{SystemClock, TrustBundle, TrustDomain, TrustState, X509Svid};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};

use crate::lab::{Lab, free_address};
use crate::process::Process;
use crate::{Result, http, tools, wait};

/// The trust domain of every test.
pub const TRUST_DOMAIN: &str = "mesh.test";
/// The cluster of the development issuer.
pub const CLUSTER: &str = "dev";
const HOUR: Duration = Duration::from_secs(3600);
const READY_WITHIN: Duration = Duration::from_secs(20);

/// A CA with its data directory; running or not.
pub struct Ca {
    process: Option<Process>,
    config: PathBuf,
    data: PathBuf,
    log: PathBuf,
    environment: Vec<(String, String)>,
    /// The TLS port.
    pub address: SocketAddr,
    /// Metrics and probes.
    pub http: SocketAddr,
}

impl Ca {
    /// Starts a CA that issues to workloads for `lifetime`, and waits until it is ready.
    pub async fn start(lab: &Lab, lifetime: Duration) -> Result<Self> {
        Self::start_in(lab, &lab.at("ca"), lifetime, "").await
    }

    /// The same, with its data in this directory and `more` at the end of its configuration.
    pub async fn start_in(lab: &Lab, data: &Path, lifetime: Duration, more: &str) -> Result<Self> {
        let mut ca = Self::configure(lab, data, lifetime, more)?;
        ca.run(lab).await?;
        Ok(ca)
    }

    /// The same, but not started.
    pub fn configure(lab: &Lab, data: &Path, lifetime: Duration, more: &str) -> Result<Self> {
        let (address, http) = (free_address()?, free_address()?);
        let config = lab.at("ca.toml");
        let seconds = lifetime.as_secs();
        let text = format!(
            "trust_domain = \"{TRUST_DOMAIN}\"\nlisten = \"{address}\"\nhttp_listen = \"{http}\"\n\n\
             [policy.lifetimes]\nmin = \"1s\"\ndefault = \"{seconds}s\"\n{more}"
        );
        std::fs::write(&config, text)?;
        let log = lab.log("ca");
        Ok(Self { process: None, config, data: data.to_owned(), log, environment: Vec::new(), address, http })
    }

    /// Starts a CA whose cluster may speak for these accounts alone.
    pub async fn start_for(lab: &Lab, accounts: &str) -> Result<Self> {
        let data = lab.at("ca");
        let jwks = chancery_ca::config::development_issuer_dir(&data).join(JWKS_FILE);
        let cluster = format!(
            "\n[[cluster]]\nname = \"{CLUSTER}\"\nissuer = \"{ISSUER}\"\nagent_accounts = [\"chancery/agent\"]\n\
             service_accounts = [\"{accounts}\"]\njwks = {{ file = \"{}\" }}\n",
            jwks.display()
        );
        Self::start_in(lab, &data, HOUR, &cluster).await
    }

    /// Starts the CA again after it ended, and waits until it is ready.
    pub async fn run(&mut self, lab: &Lab) -> Result<()> {
        let mut command = self.command(lab)?;
        let process = self.process.insert(Process::start("the CA", &mut command, &self.log)?);
        wait::until("the CA is ready", READY_WITHIN, async || {
            process.check().map_err(|error| error.to_string())?;
            ready(self.http).await
        })
        .await
    }

    /// Starts the CA, which has to refuse that by itself, and returns what it says.
    pub async fn refused(&self, lab: &Lab) -> Result<String> {
        Process::refused("the CA", &mut self.command(lab)?, &lab.at("refused.log")).await
    }

    /// What starts this CA.
    pub fn command(&self, lab: &Lab) -> Result<Command> {
        let mut command = lab.command(&tools::chancery("chancery-ca")?);
        command.args(["serve", "--dev", "--config"]).arg(&self.config).arg("--data-dir").arg(&self.data);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        Ok(command)
    }

    /// From the next start on, the CA has this in its environment.
    pub fn set_environment(&mut self, name: &str, value: &str) {
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().map_or(Ok(()), Process::kill)
    }

    /// SIGTERM, and waits for the end.
    pub async fn stop(&mut self) -> Result<()> {
        if let Some(process) = self.process.take() {
            let status = process.stop().await?;
            if !status.success() {
                return Err(format!("the CA ended with {status}").into());
            }
        }
        Ok(())
    }

    /// The process id of the running CA.
    pub fn id(&self) -> Result<u32> {
        Ok(self.process.as_ref().ok_or("the CA is not running")?.id())
    }

    /// The trust bundle, for agents.
    pub fn bundle(&self) -> PathBuf {
        self.data.join("bundle.pem")
    }

    /// Its configuration.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// Everything it has said since its first start.
    pub fn log(&self) -> Result<String> {
        Ok(std::fs::read_to_string(&self.log)?)
    }

    /// The data directory.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// The operators' socket.
    pub fn admin_socket(&self) -> PathBuf {
        self.data.join("admin.sock")
    }

    /// A connection over the TLS port of somebody who shows no certificate.
    pub async fn connect(&self) -> Result<Channel> {
        let mut stream = Some(TokioIo::new(self.shake_hands(None).await?));
        let connector = tower::service_fn(move |_| std::future::ready(stream.take().ok_or(io::Error::from(io::ErrorKind::NotConnected))));
        Ok(Endpoint::from_static("http://localhost").connect_with_connector(connector).await?)
    }

    /// A TLS session, with this certificate if there is one, over which nothing was sent yet.
    pub(crate) async fn shake_hands(&self, svid: Option<&X509Svid>) -> Result<TlsStream<TcpStream>> {
        let trust_domain: TrustDomain = TRUST_DOMAIN.parse()?;
        let bundle = TrustBundle::from_pem(trust_domain.clone(), &std::fs::read(self.bundle())?)?;
        let ca = trust_domain.member(["chancery", "ca"])?;
        let trust = trust_from(TrustState::new(0, trust_domain, [bundle])?);
        let tls = client_config(ServerTrust::Bundle(trust), ca, svid, Arc::new(SystemClock))?;
        let tcp = TcpStream::connect(self.address).await?;
        let name = ServerName::IpAddress(self.address.ip().into());
        Ok(TlsConnector::from(Arc::new(tls)).connect(name, tcp).await?)
    }

    /// Runs `chancery` with these arguments and returns what it printed.
    pub fn chancery(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(tools::chancery("chancery")?);
        let output = command.arg("--socket").arg(self.admin_socket()).args(arguments).output()?;
        if !output.status.success() {
            let complaint = String::from_utf8_lossy(&output.stderr);
            return Err(format!("`chancery {}` ended with {}: {complaint}", arguments.join(" "), output.status).into());
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Runs `chancery --output json`.
    pub fn ask(&self, arguments: &[&str]) -> Result<Value> {
        Ok(serde_json::from_str(&self.chancery(&[&["--output", "json"], arguments].concat())?)?)
    }

    /// Signs tokens as the development cluster's API server would.
    pub fn issuer(&self) -> Result<DevelopmentIssuer> {
        Ok(DevelopmentIssuer::open_or_create(&chancery_ca::config::development_issuer_dir(&self.data))?)
    }

    /// Leaves the CA running after this process.
    pub fn detach(self) -> Option<u32> {
        self.process.map(Process::detach)
    }
}

/// Asks `/readyz`.
pub(crate) async fn ready(address: SocketAddr) -> Result<(), String> {
    match http::get(address, "/readyz").await {
        Ok((200, _)) => Ok(()),
        Ok((status, reasons)) => Err(format!("{status} {reasons}")),
        Err(error) => Err(error.to_string()),
    }
}
