//! Cells and leases, in sled: small, changeable, and nothing that is not elsewhere or can be done without.
//!
//! sled has no repair: one flipped byte, and it cannot be opened. It is moved aside then and begun anew, so **whatever must not be lost
//! belongs in the log**. Also: its `flush` is not an fsync, so its file is synced through a handle of our own; concurrent flushes deadlock, so
//! everything happens under one lock; its cache is capped, and what an unfinished snapshot left is removed, since it would not open with it.

use std::collections::HashMap;
use std::fs::File;
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use chancery_identity::Clock;
use time::OffsetDateTime;
use tracing::warn;

use super::failed_in;
use super::files::{LogFiles, SystemFiles};
use crate::store::{Lease, MAX_CELL_BYTES, StoreError};

const CACHE_BYTES: u64 = 4 << 20;
/// Is in every catalogue.
const MADE: &[u8] = b"made";
const DAMAGED_SUFFIX: &str = "damaged";
const RELEASED_WITHIN: Duration = Duration::from_secs(5);
const RELEASE_PAUSE: Duration = Duration::from_millis(10);

/// The cells and leases of one store. All calls block.
#[derive(Debug)]
pub(super) struct Catalogue {
    dir: PathBuf,
    clock: Arc<dyn Clock>,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    db: sled::Db,
    cells: sled::Tree,
    /// The last epoch of each lease. Who holds it is in memory: the claim on the directory proves that earlier holders have ended.
    epochs: sled::Tree,
    /// To sync what sled has flushed.
    file: File,
    held: HashMap<String, Held>,
}

#[derive(Debug)]
struct Held {
    holder: String,
    epoch: u64,
    until: OffsetDateTime,
}

impl Catalogue {
    /// Opens the catalogue in `dir`, or begins a new one there; `repairs` is told if one was damaged and moved aside.
    pub(super) fn open(dir: &Path, clock: Arc<dyn Clock>, repairs: &mut Vec<String>) -> Result<Self, StoreError> {
        SystemFiles.create_dir(dir).map_err(failed_in(dir))?;
        let inner = match open_sled(dir) {
            Ok(inner) => inner,
            Err(Unopened::Damaged(detail)) => {
                let aside = move_aside(dir).map_err(failed_in(dir))?;
                let repair = format!("the catalogue was damaged ({detail}); it was begun anew, and the old one is in {}", aside.display());
                warn!(%repair, "the ledger was repaired");
                repairs.push(repair);
                SystemFiles.create_dir(dir).map_err(failed_in(dir))?;
                open_sled(dir).map_err(|error| error.in_dir(dir))?
            }
            Err(error) => return Err(error.in_dir(dir)),
        };
        Ok(Self { dir: dir.to_owned(), clock, inner: Mutex::new(inner) })
    }

    pub(super) fn cell(&self, name: &str) -> Result<Option<Bytes>, StoreError> {
        let value = self.inner().cells.get(name).map_err(|error| self.failed(error))?;
        Ok(value.map(|value| Bytes::copy_from_slice(&value)))
    }

    pub(super) fn compare_and_swap(&self, name: &str, expected: Option<&[u8]>, new: Option<&[u8]>) -> Result<bool, StoreError> {
        if new.is_some_and(|new| new.len() > MAX_CELL_BYTES) {
            return Err(StoreError::Invalid(format!("a cell holds at most {MAX_CELL_BYTES} bytes")));
        }
        let inner = self.inner();
        let swapped = inner.cells.compare_and_swap(name, expected, new).map_err(|error| self.failed(error))?;
        if swapped.is_err() {
            return Ok(false);
        }
        self.make_durable(&inner)?;
        Ok(true)
    }

    /// A new holder's epoch is larger than any before it, also when the catalogue was lost meanwhile: it is at least the microseconds since
    /// 1970.
    pub(super) fn lease(&self, name: &str, holder: &str, for_: Duration) -> Result<Option<Lease>, StoreError> {
        let now = self.clock.now();
        let until = now.saturating_add(for_.try_into().unwrap_or(time::Duration::MAX));
        let mut inner = self.inner();
        if let Some(held) = inner.held.get_mut(name).filter(|held| held.until > now) {
            if held.holder != holder {
                return Ok(None);
            }
            held.until = until;
            return Ok(Some(Lease { name: name.to_owned(), epoch: held.epoch }));
        }
        let last = inner.epochs.get(name).map_err(|error| self.failed(error))?;
        let last = last.and_then(|bytes| Some(u64::from_be_bytes(bytes.as_ref().try_into().ok()?))).unwrap_or_default();
        let micros = u64::try_from(now.unix_timestamp_nanos() / 1000).unwrap_or_default();
        let epoch = micros.max(last + 1);
        inner.epochs.insert(name, &epoch.to_be_bytes()).map_err(|error| self.failed(error))?;
        self.make_durable(&inner)?;
        inner.held.insert(name.to_owned(), Held { holder: holder.to_owned(), epoch, until });
        Ok(Some(Lease { name: name.to_owned(), epoch }))
    }

    fn make_durable(&self, inner: &Inner) -> Result<(), StoreError> {
        inner.db.flush().map_err(|error| self.failed(error))?;
        inner.file.sync_data().map_err(failed_in(&self.dir))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, error: sled::Error) -> StoreError {
        Unopened::from(error).in_dir(&self.dir)
    }
}

/// Why sled did not open or answer.
enum Unopened {
    Damaged(String),
    Failed(std::io::Error),
}

impl Unopened {
    fn in_dir(self, dir: &Path) -> StoreError {
        match self {
            Self::Damaged(detail) => StoreError::Io { place: dir.display().to_string(), detail },
            Self::Failed(error) => failed_in(dir)(error),
        }
    }
}

impl From<sled::Error> for Unopened {
    fn from(error: sled::Error) -> Self {
        match error {
            sled::Error::Io(error) => Self::Failed(error),
            error => Self::Damaged(error.to_string()),
        }
    }
}

fn open_sled(dir: &Path) -> Result<Inner, Unopened> {
    for entry in std::fs::read_dir(dir).map_err(Unopened::Failed)? {
        let path = entry.map_err(Unopened::Failed)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("snap.") && name.ends_with(".generating") {
            std::fs::remove_file(&path).map_err(Unopened::Failed)?;
        }
    }
    // Some damage makes sled panic.
    match catch_unwind(AssertUnwindSafe(|| open_and_read(dir))) {
        Ok(result) => result,
        Err(_) => Err(Unopened::Damaged("it could not be read".into())),
    }
}

fn open_and_read(dir: &Path) -> Result<Inner, Unopened> {
    let is_new = !dir.join("db").exists();
    let config = sled::Config::new().path(dir).cache_capacity(CACHE_BYTES).mode(sled::Mode::LowSpace).flush_every_ms(None);
    let db = open_when_released(&config)?;
    if is_new {
        db.insert(MADE, MADE)?;
        db.flush()?;
    } else if db.get(MADE)?.is_none() {
        // Damage at the beginning makes sled take it for empty.
        return Err(Unopened::Damaged("its beginning is missing".into()));
    }
    let (cells, epochs) = (db.open_tree("cells")?, db.open_tree("lease epochs")?);
    for pair in cells.iter().chain(epochs.iter()) {
        pair?;
    }
    let file = File::open(dir.join("db")).map_err(Unopened::Failed)?;
    Ok(Inner { db, cells, epochs, file, held: HashMap::new() })
}

/// sled's own threads may hold a database for a moment after it was dropped. Nobody else can: the store's directory is claimed.
fn open_when_released(config: &sled::Config) -> sled::Result<sled::Db> {
    let deadline = Instant::now() + RELEASED_WITHIN;
    loop {
        match config.open() {
            // So sled says that the file is locked.
            Err(sled::Error::Io(error)) if error.kind() == ErrorKind::Other && Instant::now() < deadline => {
                std::thread::sleep(RELEASE_PAUSE);
            }
            result => return result,
        }
    }
}

/// Moves the directory aside, in place of one that was moved before.
fn move_aside(dir: &Path) -> std::io::Result<PathBuf> {
    let aside = dir.with_extension(DAMAGED_SUFFIX);
    if aside.exists() {
        std::fs::remove_dir_all(&aside)?;
    }
    std::fs::rename(dir, &aside)?;
    Ok(aside)
}

#[cfg(test)]
mod tests {
    use chancery_identity::SystemClock;

    use super::*;

    fn open(dir: &Path) -> (Catalogue, Vec<String>) {
        let mut repairs = Vec::new();
        let catalogue = Catalogue::open(&dir.join("catalogue"), Arc::new(SystemClock), &mut repairs).unwrap();
        (catalogue, repairs)
    }

    #[test]
    fn a_damaged_catalogue_is_begun_anew_and_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let (catalogue, _) = open(dir.path());
        assert!(catalogue.compare_and_swap("a", None, Some(b"1")).unwrap());
        drop(catalogue);
        let path = dir.path().join("catalogue/db");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, bytes.iter().map(|byte| byte ^ 0x55).collect::<Vec<u8>>()).unwrap();
        let (catalogue, repairs) = open(dir.path());
        assert!(repairs.iter().any(|repair| repair.contains("begun anew")), "{repairs:?}");
        assert_eq!(catalogue.cell("a").unwrap(), None);
        assert!(catalogue.compare_and_swap("a", None, Some(b"1")).unwrap());
        assert!(dir.path().join("catalogue.damaged/db").exists());
    }

    #[test]
    fn an_unfinished_snapshot_does_not_stop_it() {
        let dir = tempfile::tempdir().unwrap();
        let (catalogue, _) = open(dir.path());
        assert!(catalogue.compare_and_swap("a", None, Some(b"1")).unwrap());
        drop(catalogue);
        std::fs::write(dir.path().join("catalogue/snap.00000000000000AA.generating"), b"half").unwrap();
        let (catalogue, repairs) = open(dir.path());
        assert_eq!(catalogue.cell("a").unwrap().as_deref(), Some(b"1".as_slice()));
        assert_eq!(repairs, Vec::<String>::new());
    }

    #[test]
    fn a_lease_has_a_larger_epoch_even_when_the_catalogue_was_lost() {
        let dir = tempfile::tempdir().unwrap();
        let take = |catalogue: &Catalogue| catalogue.lease("duty", "a", Duration::from_secs(60)).unwrap().unwrap().epoch;
        let (catalogue, _) = open(dir.path());
        let before = take(&catalogue);
        drop(catalogue);
        std::fs::remove_dir_all(dir.path().join("catalogue")).unwrap();
        assert!(take(&open(dir.path()).0) > before);
    }
}
