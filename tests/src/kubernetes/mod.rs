//! The real Kubernetes API server, with its etcd, on loopback: what a cluster is as far as Chancery can see it, without kubelets and controllers.
//!
//! No controller runs, so a test creates its nodes, service accounts and pods itself ([`Admin`]); the tokens are real, and so is what the API
//! server thinks of them. Each test works in namespaces and on nodes of its own, so that several can share one server ([`shared`]); a test
//! that kills the server or changes its keys starts one for itself ([`ApiServer::start`]).

mod admin;
mod audit;
mod certificates;
mod kubeconfig;
pub mod place;
mod shared;

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kube::Client;
use kube::config::{Config, KubeConfigOptions, Kubeconfig};
use rustix::process::Signal;

pub use admin::{Admin, Node, Pod};
pub use audit::Call;
pub use shared::{SharedApiServer, shared};

use crate::lab::{Lab, free_address};
use crate::process::Process;
use crate::{Result, tools, wait};
use certificates::Authority;

/// `iss` of every token.
pub const ISSUER: &str = "https://kubernetes.mesh.test";
const ADMIN: &str = "test-admin";
/// The group that may do everything.
const MASTERS: &str = "system:masters";
const READY_WITHIN: Duration = Duration::from_secs(60);
/// Everything that is asked, once it has been answered, and watches as soon as they begin.
const AUDIT_POLICY: &str =
    r#"{"apiVersion":"audit.k8s.io/v1","kind":"Policy","omitStages":["RequestReceived"],"rules":[{"level":"Metadata"}]}"#;

/// An API server with its etcd; running or not. Dropped, both end.
pub struct ApiServer {
    server: Option<Process>,
    // Before the directory that it writes to.
    _etcd: Process,
    program: PathBuf,
    etcd: SocketAddr,
    address: SocketAddr,
    authority: Authority,
    /// The keys that tokens are verified with, the one that signs first.
    signers: Vec<PathBuf>,
    signers_made: usize,
    /// `--runtime-config`: which APIs are there.
    apis: &'static str,
    lab: Lab,
}

impl ApiServer {
    /// Starts etcd and the API server and waits until it is ready; `None` where they are not installed, and the test is counted as skipped.
    pub async fn start() -> Result<Option<Self>> {
        Self::start_with("").await
    }

    /// The same, with these APIs switched on or off (`--runtime-config`).
    pub async fn start_with(apis: &'static str) -> Result<Option<Self>> {
        match tools::kubernetes() {
            Some(programs) => Ok(Some(Self::start_from(&programs, apis).await?)),
            None => Ok(None),
        }
    }

    async fn start_from(programs: &Path, apis: &'static str) -> Result<Self> {
        let lab = Lab::new()?;
        let (etcd, peers, address) = (free_address()?, free_address()?, free_address()?);
        let authority = Authority::create(&lab.at("pki"))?;
        std::fs::write(lab.at("audit-policy.json"), AUDIT_POLICY)?;
        let process = start_etcd(&lab, &programs.join("etcd"), etcd, peers)?;
        let program = programs.join("kube-apiserver");
        let signers = Vec::new();
        let mut server = Self { server: None, _etcd: process, program, etcd, address, authority, signers, signers_made: 0, apis, lab };
        server.add_signer()?;
        server.run().await?;
        Ok(server)
    }

    /// Starts the API server again after it was killed, and waits until it is ready.
    pub async fn run(&mut self) -> Result<()> {
        let mut command = self.lab.command(&self.program);
        command.args(self.arguments());
        self.server = Some(Process::start("kube-apiserver", &mut command, &self.lab.log("kube-apiserver"))?);
        let admin = self.admin().await?;
        let process = self.server.as_mut().ok_or("just started")?;
        wait::until("the API server is ready", READY_WITHIN, async || {
            process.check().map_err(|error| error.to_string())?;
            admin.get("/readyz").await.map_err(|error| error.to_string())
        })
        .await?;
        Ok(())
    }

    /// The same at another address, where those who know the former do not find it: as if a cluster's second API server went on alone.
    pub async fn run_at(&mut self, address: SocketAddr) -> Result<()> {
        self.address = address;
        self.run().await
    }

    /// SIGKILL, to the API server alone: etcd keeps what it holds.
    pub fn kill(&mut self) -> Result<()> {
        self.server.take().map_or(Ok(()), Process::kill)
    }

    /// It is there and says nothing (SIGSTOP).
    pub fn freeze(&self) -> Result<()> {
        self.server.as_ref().ok_or("not running")?.signal(Signal::STOP)
    }

    /// It goes on where it was frozen.
    pub fn thaw(&self) -> Result<()> {
        self.server.as_ref().ok_or("not running")?.signal(Signal::CONT)
    }

    /// Signs tokens with a new key from now on. The old ones stay published. The server is restarted for it.
    pub async fn rotate_signer(&mut self) -> Result<()> {
        self.kill()?;
        self.add_signer()?;
        self.run().await
    }

    /// Publishes no key but the one that signs: tokens of the others are good no more. The server is restarted for it.
    pub async fn retire_signers(&mut self) -> Result<()> {
        self.kill()?;
        self.signers.truncate(1);
        self.run().await
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The same as a URL.
    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// The certificate that its own chains to.
    pub fn ca_file(&self) -> &Path {
        self.authority.certificate()
    }

    /// The kubeconfig of somebody who may do everything.
    pub fn kubeconfig(&self) -> Result<PathBuf> {
        self.kubeconfig_for(ADMIN, Some(MASTERS))
    }

    /// The kubeconfig of this user, of this group, who proves both by a client certificate.
    pub fn kubeconfig_for(&self, user: &str, group: Option<&str>) -> Result<PathBuf> {
        let (certificate, key) = self.authority.client(user, group)?;
        kubeconfig::write(self, &self.lab, &kubeconfig::Proof::Certificate { certificate, key })
    }

    /// The kubeconfig of whom this token names.
    pub fn kubeconfig_for_token(&self, token: &str) -> Result<PathBuf> {
        kubeconfig::write(self, &self.lab, &kubeconfig::Proof::Token(token.to_owned()))
    }

    /// A client that may do everything. Its connections belong to the caller's runtime, so each test asks for its own.
    pub async fn client(&self) -> Result<Client> {
        client(&self.kubeconfig()?).await
    }

    /// Creates and changes objects. One for each test, as [`ApiServer::client`].
    pub async fn admin(&self) -> Result<Admin> {
        Ok(Admin::new(self.client().await?))
    }

    /// Every call that was answered since the first start, and every watch that has begun, in their order.
    pub fn calls(&self) -> Result<Vec<Call>> {
        audit::read(&self.audit_log())
    }

    fn audit_log(&self) -> PathBuf {
        self.lab.log("audit")
    }

    fn add_signer(&mut self) -> Result<()> {
        self.signers_made += 1;
        let name = format!("service-accounts-{}", self.signers_made);
        self.signers.insert(0, certificates::signing_key(&self.lab.at(&name))?);
        Ok(())
    }

    fn arguments(&self) -> Vec<OsString> {
        let file = |name: &str, path: &Path| OsString::from(format!("--{name}={}", path.display()));
        let mut arguments: Vec<OsString> = [
            format!("--etcd-servers=http://{}", self.etcd),
            format!("--bind-address={}", self.address.ip()),
            format!("--secure-port={}", self.address.port()),
            format!("--advertise-address={}", self.address.ip()),
            // It would make an object that leads to a loopback address, which is refused.
            "--endpoint-reconciler-type=none".to_owned(),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
            format!("--service-account-issuer={ISSUER}"),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--enable-admission-plugins=NodeRestriction".to_owned(),
            "--allow-privileged=true".to_owned(),
            format!("--runtime-config={}", self.apis),
        ]
        .map(OsString::from)
        .to_vec();
        arguments.push(file("client-ca-file", self.authority.certificate()));
        arguments.push(file("tls-cert-file", self.authority.server_certificate()));
        arguments.push(file("tls-private-key-file", self.authority.server_key()));
        arguments.push(file("audit-policy-file", &self.lab.at("audit-policy.json")));
        arguments.push(file("audit-log-path", &self.audit_log()));
        arguments.push(file("service-account-signing-key-file", &self.signers[0]));
        arguments.extend(self.signers.iter().map(|signer| file("service-account-key-file", signer)));
        arguments
    }
}

/// A client with what this kubeconfig says.
pub async fn client(kubeconfig: &Path) -> Result<Client> {
    let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

fn start_etcd(lab: &Lab, program: &Path, clients: SocketAddr, peers: SocketAddr) -> Result<Process> {
    let (clients, peers) = (format!("http://{clients}"), format!("http://{peers}"));
    let mut command = lab.command(program);
    command.args(["--name=test", "--log-level=warn", "--unsafe-no-fsync"]);
    command.arg(format!("--data-dir={}", lab.at("etcd").display()));
    command.args([format!("--listen-client-urls={clients}"), format!("--advertise-client-urls={clients}")]);
    command.args([format!("--listen-peer-urls={peers}"), format!("--initial-advertise-peer-urls={peers}")]);
    command.arg(format!("--initial-cluster=test={peers}"));
    Process::start("etcd", &mut command, &lab.log("etcd"))
}
