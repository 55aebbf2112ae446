//! A place for one test's files, ports and programs: in memory, private, and kept when the test fails.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use crate::{Result, tools};

/// State that agents keep must lie in memory, and sockets want short paths.
const MEMORY: &str = "/dev/shm";
const LOGS: &str = "logs";
const PORTS: Range<u16> = 15_000..30_000;
const LAST_PORT: &str = "chancery-tests-last-port";

/// A test's directory. Dropped, it is removed, unless the test is failing or it was asked to stay.
pub struct Lab {
    directory: Option<tempfile::TempDir>,
    path: PathBuf,
    survives: bool,
    /// What every command begins with.
    inside: Mutex<Vec<OsString>>,
}

impl Lab {
    /// An empty directory.
    pub fn new() -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("chancery-").tempdir_in(MEMORY)?;
        let lab = Self { path: directory.path().to_owned(), directory: Some(directory), survives: false, inside: Mutex::default() };
        std::fs::create_dir(lab.at(LOGS))?;
        Ok(lab)
    }

    /// A directory whose programs may go on running after this process.
    pub fn surviving() -> Result<Self> {
        let mut lab = Self::new()?;
        lab.survives = true;
        Ok(lab)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the program `name` logs. Not beside its configuration: that directory is watched, and each line would wake the watcher.
    pub fn log(&self, name: &str) -> PathBuf {
        self.path.join(LOGS).join(format!("{name}.log"))
    }

    /// A path inside.
    pub fn at(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// From now on commands begin with these words, which take them to another place of this machine.
    pub(crate) fn enter(&self, words: &[OsString]) {
        *self.inside.lock().unwrap_or_else(PoisonError::into_inner) = words.to_vec();
    }

    /// A command that the kernel kills when the thread that started it ends, however it ends; unless this is a surviving lab.
    pub fn command(&self, program: &Path) -> Command {
        let inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((first, more)) = inside.split_first() else { return self.command_outside(program) };
        let mut command = self.command_outside(Path::new(first));
        command.args(more).arg(program);
        command
    }

    /// The same, wherever other commands are taken.
    pub(crate) fn command_outside(&self, program: &Path) -> Command {
        match tools::on_path("setpriv") {
            Some(setpriv) if !self.survives => {
                let mut command = Command::new(setpriv);
                command.args([OsString::from("--pdeathsig"), "KILL".into(), "--".into(), program.into()]);
                command
            }
            _ => Command::new(program),
        }
    }

    /// Leaves the directory where it is.
    pub fn keep(&mut self) {
        if let Some(directory) = self.directory.take() {
            let _ = directory.keep();
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the failed test's configurations and logs are in {}", self.path.display());
            self.keep();
        }
    }
}

/// A loopback address whose port nobody listens on, and that no other test is given soon: each port is handed out in its turn, to all the
/// processes of a test run. They lie below those that the system gives to outgoing connections, which could otherwise take one before its
/// owner listens.
pub fn free_address() -> Result<SocketAddr> {
    let mut file = File::options().read(true).write(true).create(true).truncate(false).open(std::env::temp_dir().join(LAST_PORT))?;
    file.lock()?;
    let mut last = String::new();
    file.read_to_string(&mut last)?;
    let last = last.trim().parse().ok().filter(|port| PORTS.contains(port)).unwrap_or(PORTS.start);
    let free = (last + 1..PORTS.end).chain(PORTS.start..=last).find(|&port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok());
    let port = free.ok_or("every port for tests is in use")?;
    file.rewind()?;
    // Always five digits: nothing of what stood there remains.
    write!(file, "{port:05}")?;
    Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
}

/// Copies a directory as it is to a place where there is none.
pub fn copy_directory(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("cp").arg("-a").args([from, to]).status()?;
    if status.success() { Ok(()) } else { Err(format!("{} could not be copied: {status}", from.display()).into()) }
}
