//! The store's directory: one process at a time, and only in a format that this version knows.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::failed_in;
use super::files::{LogFiles, SystemFiles};
use crate::store::StoreError;

/// The format that this version writes, and the newest that it reads.
const FORMAT: u32 = 1;
const NAME: &str = "chancery-ledger";

/// A claim on a directory; it ends when this is dropped, and with the process.
#[derive(Debug)]
pub(super) struct Directory {
    _lock: File,
}

impl Directory {
    /// Creates `dir` if it is missing, and claims it.
    pub(super) fn claim(dir: &Path) -> Result<Self, StoreError> {
        SystemFiles.create_dir(dir).map_err(failed_in(dir))?;
        let path = dir.join("lock");
        let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path).map_err(failed_in(&path))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Err(StoreError::InUse(dir.display().to_string())),
            result => result.map_err(|error| failed_in(&path)(error.into()))?,
        }
        check_format(dir)?;
        Ok(Self { _lock: lock })
    }
}

/// The file `version` has two lines: the format, and the oldest version of Chancery that reads it.
fn check_format(dir: &Path) -> Result<(), StoreError> {
    let path = dir.join("version");
    let text = match std::fs::read_to_string(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return write_format(dir).map_err(failed_in(&path)),
        result => result.map_err(failed_in(&path))?,
    };
    let mut lines = text.lines();
    let format = lines.next().and_then(|line| line.strip_prefix(NAME)?.trim().parse::<u32>().ok());
    let Some(found) = format else {
        let detail = format!("not the version file of a ledger: it begins with {:?}", text.lines().next().unwrap_or_default());
        return Err(StoreError::Damaged { place: path.display().to_string(), detail });
    };
    if found > FORMAT {
        let reader = lines.next().and_then(|line| line.strip_prefix("reader ")).unwrap_or("a newer version of Chancery").to_owned();
        return Err(StoreError::NewerFormat { place: dir.display().to_string(), found, known: FORMAT, reader });
    }
    Ok(())
}

fn write_format(dir: &Path) -> io::Result<()> {
    let temporary = dir.join("version.tmp");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    writeln!(file, "{NAME} {FORMAT}\nreader Chancery {} or later", env!("CARGO_PKG_VERSION"))?;
    file.sync_all()?;
    std::fs::rename(&temporary, dir.join("version"))?;
    SystemFiles.sync_dir(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_claim_is_refused_until_the_first_ends() {
        let dir = tempfile::tempdir().unwrap();
        let first = Directory::claim(dir.path()).unwrap();
        let refused = Directory::claim(dir.path()).unwrap_err();
        assert!(matches!(&refused, StoreError::InUse(place) if *place == dir.path().display().to_string()), "{refused}");
        drop(first);
        Directory::claim(dir.path()).unwrap();
    }

    #[test]
    fn a_newer_format_is_refused_with_the_version_that_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        drop(Directory::claim(dir.path()).unwrap());
        std::fs::write(dir.path().join("version"), "chancery-ledger 2\nreader Chancery 3.1 or later\n").unwrap();
        let refused = Directory::claim(dir.path()).unwrap_err().to_string();
        assert!(refused.contains("format 2") && refused.contains("use Chancery 3.1 or later"), "{refused}");
    }

    #[test]
    fn a_version_file_of_something_else_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("version"), "postgres 15\n").unwrap();
        assert!(matches!(Directory::claim(dir.path()), Err(StoreError::Damaged { .. })));
    }
}
