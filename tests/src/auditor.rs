//! An auditor: keeps checkpoints, and lets programs that are not Chancery's read the ledger over HTTP.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use crate::ca::Ca;
use crate::lab::Lab;
use crate::{Result, tools};

/// `chancery log serve-local` of a running CA. Ended when dropped.
pub struct Served {
    child: Child,
    /// Where checkpoint and tiles are.
    pub url: String,
    /// What verifies the checkpoint.
    pub key: String,
}

impl Served {
    /// Serves on a free port of this machine.
    pub fn start(lab: &Lab, ca: &Ca) -> Result<Self> {
        let mut command = lab.command(&tools::chancery("chancery")?);
        command.arg("--socket").arg(ca.admin_socket()).args(["log", "serve-local", "--listen", "127.0.0.1:0"]);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let said = child.stdout.take().ok_or("no standard output")?;
        let mut lines = BufReader::new(said).lines();
        let mut line = || -> Result<String> { Ok(lines.next().ok_or("serve-local ended")??) };
        let (url, key) = (line()?, line()?);
        Ok(Self { child, url, key })
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program in `tests/tlog`, which verifies with Go's libraries.
pub struct GoClient(PathBuf);

impl GoClient {
    /// Builds it; nothing without Go, or where its modules are neither there nor to be had.
    pub fn build(lab: &Lab) -> Result<Option<Self>> {
        let Some(go) = tools::go() else { return Ok(None) };
        let program = lab.at("tlog");
        let cache = std::path::absolute(tools::source().join(".cache"))?;
        let run = |arguments: &[&str]| {
            let mut command = Command::new(&go);
            command.args(arguments).current_dir(tools::source().join("tests/tlog"));
            // Modules are pinned by go.sum; what is downloaded stays beside what else `tests/setup` installs.
            command.env("GOFLAGS", "-modcacherw").env("GOPATH", cache.join("go")).env("GOCACHE", cache.join("go-build"));
            command.env("GOTOOLCHAIN", "local").env("CGO_ENABLED", "0").output()
        };
        let downloaded = run(&["mod", "download"])?;
        if !downloaded.status.success() {
            let problem = String::from_utf8_lossy(&downloaded.stderr);
            // Modules that are not what go.sum says are no reason to skip.
            if problem.contains("SECURITY ERROR") {
                return Err(format!("the modules of tests/tlog: {problem}").into());
            }
            tools::skip(&format!("the modules of tests/tlog cannot be had, is Go's module proxy reachable? {}", problem.trim()));
            return Ok(None);
        }
        let built = run(&["build", "-mod=readonly", "-o", program.to_str().ok_or("the lab's path is no UTF-8")?, "."])?;
        if !built.status.success() {
            return Err(format!("tests/tlog does not build: {}", String::from_utf8_lossy(&built.stderr)).into());
        }
        Ok(Some(Self(program)))
    }

    /// Verifies everything that `served` serves; `more` are further arguments.
    pub fn verify(&self, served: &Served, more: &[(&str, &Path)]) -> Result<Output> {
        let mut command = Command::new(&self.0);
        command.args(["-url", &served.url, "-key", &served.key]);
        for (flag, file) in more {
            command.arg(flag).arg(file);
        }
        Ok(command.output()?)
    }
}
