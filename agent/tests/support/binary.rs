//! The real `chancery-agent`, as a process.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use super::{CLUSTER, FakeCa, Place, SOON, eventually};
use chancery_agent::ca_client::Anchor;

/// A running agent. Killed when dropped.
pub struct Process {
    child: Child,
    log: PathBuf,
    pub http: SocketAddr,
}

impl Place {
    pub fn config_file(&self) -> PathBuf {
        self.directory.path().join("agent.toml")
    }

    pub fn sds_socket(&self) -> PathBuf {
        self.directory.path().join("sds.sock")
    }

    /// Writes the configuration of an agent of `ca`, and tells where its HTTP port is. `first` goes before everything else.
    pub fn write_config(&self, ca: &FakeCa, http: SocketAddr, first: &str) {
        let at = |name: &str| self.directory.path().join(name).display().to_string();
        let Anchor::BundleFile(bundle) = &self.anchor else { panic!("a bundle file") };
        let text = format!(
            "{first}\ntrust_domain = \"example.org\"\ncluster = \"{CLUSTER}\"\nca_address = \"{}\"\ntoken_file = \"{}\"\nstate_dir = \"{}\"\n\
             http_listen = \"{http}\"\nadmin_socket = \"{}\"\ntrust.bundle_file = \"{}\"\nsds.socket = \"{}\"\n",
            ca.address,
            at("token"),
            at("state"),
            at("admin.sock"),
            bundle.display(),
            at("sds.sock"),
        );
        let new = self.directory.path().join("agent.toml.new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, self.config_file()).unwrap();
    }

    /// Starts the program on a port of its own.
    pub fn run(&self, ca: &FakeCa) -> Process {
        let http = TcpListener::bind((super::LISTENS, 0)).unwrap().local_addr().unwrap();
        self.write_config(ca, http, "");
        // Beside the directory of the configuration, which the agent watches.
        let log = self.logs.path().join("agent.log");
        let file = std::fs::OpenOptions::new().append(true).create(true).open(&log).unwrap();
        let mut command = self.command(&["run"]);
        let child = command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file).spawn().unwrap();
        Process { child, log, http }
    }

    /// What the program says when it is asked `verb`.
    pub fn ask(&self, verb: &[&str]) -> Output {
        self.command(verb).output().unwrap()
    }

    fn command(&self, verb: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_chancery-agent"));
        command.args(verb).arg("--config").arg(self.config_file());
        command
    }
}

impl Process {
    pub fn signal(&self, signal: Signal) {
        let id = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        kill_process(id, signal).unwrap();
    }

    /// Waits until it is ready and has a session with the CA; without one it would be degraded.
    pub async fn ready(&self) {
        eventually("the agent is ready", || self.get("/readyz").contains("\r\n\r\nready")).await;
    }

    /// Waits until it has ended.
    pub async fn ended(mut self) -> ExitStatus {
        let child = &mut self.child;
        let mut status = None;
        eventually("the agent has ended", || {
            status = child.try_wait().unwrap();
            status.is_some()
        })
        .await;
        status.unwrap()
    }

    /// Everything it has said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// A metric's value; empty while there is none.
    pub fn metric(&self, name: &str) -> String {
        let text = self.get("/metrics");
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("chancery_agent_{name} ")));
        line.unwrap_or_default().to_owned()
    }

    /// The answer of its plain HTTP port; empty while nobody listens.
    pub fn get(&self, path: &str) -> String {
        let Ok(mut stream) = TcpStream::connect(self.http) else { return String::new() };
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n\r\n").as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
