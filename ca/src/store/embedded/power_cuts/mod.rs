//! Cuts the power in the middle of any write, sync or change of a name that a process makes, also of those that libraries make.
//!
//! A test of this crate does its work in a process of its own, in a directory on a real disk, while `strace` writes down what it does there.
//! That is done once more to a disk that forgets and tears ([`FaultyFiles`]), whose power is cut in the middle of each call; another test looks
//! at what is left.

mod replay;
mod tests;
mod trace;

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use tempfile::TempDir;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use self::replay::Replay;
use self::trace::Call;
use super::faulty::FaultyFiles;

/// Names the directory for the process that is traced.
const DIR: &str = "CHANCERY_POWER_CUT_DIR";
/// How many are looked at at a time.
const AT_ONCE: usize = 4;

/// What a process did in a directory.
pub(crate) struct Traced {
    dir: TempDir,
    calls: Vec<Call>,
}

/// In the process that is traced: where it is to work. Nothing in any other.
pub(crate) fn traced_dir() -> Option<PathBuf> {
    std::env::var_os(DIR).map(PathBuf::from)
}

/// In the process that is traced: says something, which whoever checks is told if it was said before the power was cut.
pub(crate) fn say(line: &str) {
    writeln!(std::io::stdout(), "{line}").unwrap();
}

/// Traces the test of this crate that is called `test`. Nothing, and the running test counts as skipped, if no process can be traced here.
pub(crate) fn trace(test: &str) -> Option<Traced> {
    if let Err(reason) = trace::is_possible() {
        skip(&reason);
        return None;
    }
    let dir = in_memory();
    let mut process = Command::new(std::env::current_exe().unwrap());
    process.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(DIR, dir.path());
    let calls = trace::of(&process, dir.path());
    Some(Traced { dir, calls })
}

/// By its name. In CI nothing may be skipped.
fn skip(reason: &str) {
    assert!(std::env::var_os("CI").is_none(), "{reason}; in CI that is a failure");
    if let Some(list) = std::env::var_os("CHANCERY_SKIPPED") {
        let test = std::thread::current().name().unwrap_or_default().to_owned();
        let mut list = OpenOptions::new().append(true).create(true).open(list).unwrap();
        list.write_all(format!("{test}: {reason}\n").as_bytes()).unwrap();
    }
}

fn in_memory() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

impl Traced {
    /// Cuts the power in the middle of one call in so many, of each one in `make soak`, on `disk`, which is empty. `check` is given the directory
    /// with what is left, and what was said before.
    ///
    /// # Errors
    /// The first place after which what is left is not as it must be, and why.
    pub(crate) async fn cut_everywhere<C>(
        &self,
        disk: FaultyFiles,
        one_in: usize,
        check: impl Fn(PathBuf, String) -> C,
    ) -> Result<(), String>
    where
        C: Future<Output = Result<(), String>> + Send + 'static,
    {
        let mut replay = Replay::new(self.dir.path(), disk);
        let (mut said, mut checks, at_once) = (String::new(), JoinSet::new(), Arc::new(Semaphore::new(AT_ONCE)));
        let (one_in, rounds) = if std::env::var_os("SOAK").is_some() { (1, 10) } else { (one_in, 1) };
        for (number, call) in self.calls.iter().enumerate() {
            if let Call::Say(more) = call {
                said.push_str(more);
                continue;
            }
            for round in (0..rounds).filter(|_| number % one_in == 0) {
                let turn = at_once.clone().acquire_owned().await.map_err(|error| error.to_string())?;
                let left = in_memory();
                let seed = number as u64 * rounds + round;
                replay.cut_power_in(call, seed, left.path()).map_err(|error| format!("{call:?}: {error}"))?;
                let place = format!("the power cut of seed {seed} in call {number}, {}", self.name(call));
                let checked = check(left.path().to_owned(), said.clone());
                checks.spawn(async move {
                    let checked = checked.await;
                    drop((turn, left));
                    checked.map_err(|error| format!("{place}: {error}"))
                });
            }
            replay.apply(call).map_err(|error| format!("{call:?}: {error}"))?;
            while let Some(checked) = checks.try_join_next() {
                checked.map_err(|error| error.to_string())??;
            }
        }
        checks.join_all().await.into_iter().collect()
    }

    /// Without content.
    fn name(&self, call: &Call) -> String {
        match call {
            Call::Write(path, place, bytes) => format!("{} bytes written to {} at {place}", bytes.len(), path.display()),
            call => format!("{call:?}"),
        }
        .replace(&*self.dir.path().to_string_lossy(), "")
    }
}
