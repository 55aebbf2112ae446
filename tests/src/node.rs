//! A node of its own on this machine: a mount namespace, so that what is mounted there is seen there alone and is gone when the node is.
//!
//! Programs on the node have namespaces of their own, as in containers, which end with them. What they mount below the kubelet's `pods` is mounted
//! on the node as well, as with `mountPropagation: Bidirectional`; all else stays theirs.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::lab::Lab;
use crate::process::Process;
use crate::{Result, kubelet, tools, wait};

const UP_WITHIN: Duration = Duration::from_secs(5);

/// Nothing is propagated out of the node, and on it nothing but what is mounted below this directory.
const BOOT: &str = "mount --bind \"$1\" \"$1\" && mount --make-shared \"$1\" && exec sleep infinity";

/// A running node. Dropped, it goes down, and its mounts with it.
pub struct Node {
    process: Process,
}

/// A directory of the node as something has it open that goes on seeing it, whatever is mounted over its path later: a container.
pub struct Container {
    directory: File,
}

impl Node {
    /// Boots. Without the right to mount, the test that asks is counted as skipped.
    pub async fn boot(lab: &Lab) -> Result<Option<Self>> {
        if !rustix::process::geteuid().is_root() {
            tools::skip("mounting is for root");
            return Ok(None);
        }
        let Some(unshare) = tools::on_path("unshare").filter(|_| tools::on_path("nsenter").is_some()) else {
            tools::skip("unshare and nsenter (util-linux) are not installed");
            return Ok(None);
        };
        let mut command = lab.command_outside(&unshare);
        command.args(["--mount", "--propagation", "private", "--", "sh", "-c", BOOT, "sh"]).arg(kubelet::pods(lab)?);
        let process = Process::start("the node", &mut command, &lab.log("node"))?;
        let mut node = Self { process };
        wait::until("the node is up", UP_WITHIN, async || {
            node.process.check().map_err(|error| error.to_string())?;
            let name = std::fs::read_to_string(node.proc("comm")).map_err(|error| error.to_string())?;
            if name.trim() == "sleep" { Ok(()) } else { Err(format!("still {name}")) }
        })
        .await?;
        let mut container = node.words();
        container.extend(["unshare", "--mount", "--propagation", "unchanged", "--"].map(OsString::from));
        lab.enter(&container);
        Ok(Some(node))
    }

    /// Everything on it ends; what is not on a disk of its own is gone.
    pub fn crash(self) -> Result<()> {
        self.process.kill()
    }

    /// Where this is mounted: how often.
    pub fn mounts(&self, target: &Path) -> Result<usize> {
        let table = std::fs::read_to_string(self.proc("mountinfo"))?;
        let at = target.to_str().ok_or("not UTF-8")?;
        Ok(table.lines().filter(|line| line.split(' ').nth(4) == Some(at)).count())
    }

    /// Whether what is mounted there has all of these flags (`ro`, `nosuid` …).
    pub fn has_flags(&self, target: &Path, flags: &[&str]) -> Result<bool> {
        let table = std::fs::read_to_string(self.proc("mountinfo"))?;
        let at = target.to_str().ok_or("not UTF-8")?;
        let line = table.lines().rfind(|line| line.split(' ').nth(4) == Some(at)).ok_or("nothing is mounted there")?;
        let set: Vec<_> = line.split(' ').nth(5).unwrap_or_default().split(',').collect();
        Ok(flags.iter().all(|flag| set.contains(flag)))
    }

    /// All mounts.
    pub fn all_mounts(&self) -> Result<usize> {
        Ok(std::fs::read_to_string(self.proc("mountinfo"))?.lines().count())
    }

    /// What is seen there on the node, from outside.
    pub fn see(&self, path: &Path) -> PathBuf {
        self.proc("root").join(path.strip_prefix("/").unwrap_or(path))
    }

    /// As a container is given a volume.
    pub fn container(&self, volume: &Path) -> Result<Container> {
        Container::open(&self.see(volume))
    }

    /// Runs a program there to its end.
    pub fn run(&self, program: &str, arguments: &[&Path]) -> Result<()> {
        let words = self.words();
        let status = std::process::Command::new(&words[0]).args(&words[1..]).arg(program).args(arguments).status()?;
        if status.success() { Ok(()) } else { Err(format!("{program} ended with {status}").into()) }
    }

    /// What a command on the node begins with.
    fn words(&self) -> Vec<OsString> {
        ["nsenter", "--target", &self.process.id().to_string(), "--mount", "--"].map(OsString::from).into()
    }

    fn proc(&self, what: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{what}", self.process.id()))
    }
}

impl Container {
    /// Of a directory that is seen there now.
    pub fn open(directory: &Path) -> Result<Self> {
        Ok(Self { directory: File::open(directory)? })
    }

    /// A file in the directory, by a path that is short enough for a socket.
    pub fn at(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.directory.as_raw_fd()))
    }
}
