//! A program that a test started: its log, its end.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::{Result, wait};

const STOPPED_WITHIN: Duration = Duration::from_secs(15);
const REFUSED_WITHIN: Duration = Duration::from_secs(15);

/// A running program. Dropped, it is killed.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command`; what it says goes to the end of the file `log`.
    pub fn start(name: &str, command: &mut Command, log: &Path) -> Result<Self> {
        let file = OpenOptions::new().append(true).create(true).open(log)?;
        let child = command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).spawn();
        let child = child.map_err(|error| format!("{name} could not be started: {error}"))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned() })
    }

    /// Starts a program that has to end by itself, with an error, and returns what it said. What it says goes to the file `log` alone.
    pub async fn refused(name: &str, command: &mut Command, log: &Path) -> Result<String> {
        std::fs::write(log, "")?;
        let mut process = Self::start(name, command, log)?;
        let child = &mut process.child;
        let ended = wait::until(name, REFUSED_WITHIN, async || match child.try_wait() {
            Ok(Some(status)) => Ok(status),
            Ok(None) => Err("still running, although it had to refuse".to_owned()),
            Err(error) => Err(error.to_string()),
        });
        let status = ended.await?;
        let said = process.log()?;
        // A panic ends with 101, a signal with none.
        if status.code() == Some(1) { Ok(said) } else { Err(format!("{name} ended with {status}:\n{said}").into()) }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Fails, with the end of its log, if the program has ended.
    pub fn check(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => Err(format!("{} ended with {status}:\n{}", self.name, self.log_end()).into()),
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let id = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).ok_or("not a process id")?;
        Ok(kill_process(id, signal)?)
    }

    /// Asks the program to end and waits until it has.
    pub async fn stop(self) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.ended(STOPPED_WITHIN).await
    }

    /// Waits until the program has ended.
    pub async fn ended(mut self, within: Duration) -> Result<ExitStatus> {
        let child = &mut self.child;
        let ended = wait::until(&self.name, within, async || match child.try_wait() {
            Ok(Some(status)) => Ok(status),
            Ok(None) => Err("still running".to_owned()),
            Err(error) => Err(error.to_string()),
        });
        ended.await
    }

    /// SIGKILL: the program learns nothing of it.
    pub fn kill(mut self) -> Result<()> {
        self.end()?;
        Ok(())
    }

    /// Leaves the program running after this process.
    pub fn detach(self) -> u32 {
        let id = self.child.id();
        std::mem::forget(self);
        id
    }

    /// The last lines of its log.
    pub fn log_end(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// Everything it has said.
    pub fn log(&self) -> Result<String> {
        Ok(std::fs::read_to_string(&self.log)?)
    }

    fn end(&mut self) -> std::io::Result<ExitStatus> {
        self.child.kill()?;
        self.child.wait()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.end();
    }
}
