//! The hashes of the Merkle tree over the entries (RFC 6962, SHA-256): derived from the log, and made anew when they are missing or damaged.
//!
//! ```text
//! level-0, level-1 …   hashes of 32 bytes: level L has the roots of complete subtrees of 256^L entries, so that a tile is one read
//! hashed               how many entries are durably in the levels, and the root of their tree
//! ```
//!
//! Nothing here is trusted for being there. Of the levels counts what `hashed` covers, which is written after they were synced; the rest, and
//! everything when they do not lead to the root that it names, is hashed again from the log. The last, incomplete tile of each level is
//! held in memory; these make up the root. Each complete tile is compared with its hash in the level above whenever it is read, and if it
//! does not fit, the tree is made anew before anybody gets an answer.

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use bytes::Bytes;
use chancery_identity::checkpoint::{Hash, empty_root, leaf_hash, root_of};
use tracing::warn;

use super::files::{self, LogFile, LogFiles};
use super::follower::Derived;
use super::reader::Segments;
use super::segment::LogId;
use super::{failed_in, remove_if_there};
use crate::store::StoreError;

/// Hashes in a complete tile.
const WIDTH: usize = 256;
const HASH_BYTES: usize = 32;
/// The most hashes that are read at once: 2 MiB.
const MAX_HASHES: u64 = 65_536;
/// How many entries are hashed before the hashes are made durable: what a start after a crash hashes again takes less than a second.
const FLUSH_ENTRIES: u64 = 65_536;
const HASHED: &str = "hashed";
const FIRST_LINE: &str = "chancery-ledger-tree 1";
const MAX_HASHED_BYTES: usize = 1024;

/// The tree of one log. All calls block.
#[derive(Debug)]
pub(super) struct HashTree {
    files: Arc<dyn LogFiles>,
    dir: PathBuf,
    log: LogId,
    /// None after a failure, until the next call opens it again.
    opened: RwLock<Option<Opened>>,
    /// Held by who adds to it, writes it out or forgets it.
    adding: Mutex<()>,
}

#[derive(Debug, Default)]
struct Opened {
    levels: Vec<Level>,
    /// How many entries are in it.
    entries: u64,
    /// How many of them survive a crash.
    flushed: u64,
}

#[derive(Debug)]
struct Level {
    path: PathBuf,
    file: Arc<dyn LogFile>,
    /// How many hashes are in complete tiles, which are in the file.
    complete: u64,
    /// The hashes behind them.
    tail: Vec<Hash>,
}

/// Why hashes could not be read.
enum Unread {
    Io(StoreError),
    /// The tree is not what it was.
    Damaged(String),
}

/// How many entries the first `end` hashes of `level` are about; nothing if that is more than can be counted.
pub(super) fn entries_below(level: u8, end: u64) -> Option<u64> {
    let width = 1_u64.checked_shl(8 * u32::from(level))?;
    end.checked_mul(width)
}

impl HashTree {
    /// Opens the tree in `dir` of the log `log`; one that is not of these entries is begun anew.
    pub(super) fn open(files: Arc<dyn LogFiles>, dir: PathBuf, log: LogId, segments: &Segments) -> Result<Self, StoreError> {
        files.create_dir(&dir).map_err(failed_in(&dir))?;
        let tree = Self { files, dir, log, opened: RwLock::default(), adding: Mutex::default() };
        let entries = tree.with_opened(|opened| Ok(opened.entries))?;
        let Some(last) = entries.checked_sub(1).filter(|_| entries <= segments.head().entries) else { return Ok(tree) };
        // A backup of the log may have been restored, which has gone on since.
        let entry = segments.read(last..entries, 0)?;
        let known = tree.hashes(0, last..entries);
        if !known.is_ok_and(|known| entry.iter().map(|entry| leaf_hash(entry)).eq(known)) {
            warn!(entry = last, "the ledger's tree is of other entries; it is built anew");
            tree.clear()?;
        }
        Ok(tree)
    }

    /// The hashes `range` of `level`, as far as it has them.
    pub(super) fn hashes(&self, level: u8, range: Range<u64>) -> Result<Vec<Hash>, StoreError> {
        if range.end.saturating_sub(range.start) > MAX_HASHES {
            return Err(StoreError::Invalid(format!("more than {MAX_HASHES} hashes at once")));
        }
        let read = self.with_opened(|opened| match entries_below(level, range.end) {
            Some(needed) if needed <= opened.entries => Ok(opened.hashes(level, range)),
            _ => Err(self.io_error(format!("the tree has {} entries so far; try again", opened.entries))),
        })?;
        read.map_err(|unread| match unread {
            Unread::Io(error) => error,
            Unread::Damaged(detail) => {
                warn!(tree = %self.dir.display(), detail, "the ledger's tree is damaged and is built anew");
                let _ = self.clear().inspect_err(|error| warn!(%error, "the ledger's tree could not be begun anew"));
                self.io_error(detail)
            }
        })
    }

    /// Does `work`; the tree is opened before if a failure closed it.
    fn with_opened<T>(&self, work: impl FnOnce(&Opened) -> Result<T, StoreError>) -> Result<T, StoreError> {
        loop {
            if let Some(opened) = &*self.opened.read().unwrap_or_else(PoisonError::into_inner) {
                return work(opened);
            }
            let mut opened = self.opened.write().unwrap_or_else(PoisonError::into_inner);
            if opened.is_none() {
                *opened = Some(self.load()?);
            }
        }
    }

    /// What is certain of the levels.
    fn load(&self) -> Result<Opened, StoreError> {
        let path = self.dir.join(HASHED);
        let text = files::read_text(self.files.as_ref(), &path, MAX_HASHED_BYTES).map_err(failed_in(&path))?;
        let Some(text) = text else { return Ok(Opened::default()) };
        let hashed = parse(&text).filter(|(log, ..)| *log == self.log);
        let found = hashed.map(|(_, entries, root)| self.load_levels(entries, root)).transpose()?.flatten();
        if found.is_none() {
            warn!(tree = %self.dir.display(), "the ledger's tree is not what was written, and is built anew");
            self.forget()?;
        }
        Ok(found.unwrap_or_default())
    }

    /// The levels with `entries` entries; nothing if their root is not `root`.
    fn load_levels(&self, entries: u64, root: Hash) -> Result<Option<Opened>, StoreError> {
        let mut opened = Opened { levels: Vec::new(), entries, flushed: entries };
        let mut hashes = entries;
        while hashes > 0 {
            let path = self.level_path(opened.levels.len());
            let file = match self.files.open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                file => file.map_err(failed_in(&path))?,
            };
            let tail = usize::try_from(hashes % WIDTH as u64).unwrap_or_default();
            let complete = hashes - tail as u64;
            match read_hashes(file.as_ref(), complete, tail).map_err(failed_in(&path))? {
                None => return Ok(None),
                Some(tail) => opened.levels.push(Level { path, file, complete, tail }),
            }
            hashes /= WIDTH as u64;
        }
        Ok((opened.root() == root).then_some(opened))
    }

    /// Makes what `hashed` says untrue durably.
    fn forget(&self) -> Result<(), StoreError> {
        let path = self.dir.join(HASHED);
        remove_if_there(self.files.as_ref(), &path).map_err(failed_in(&path))?;
        self.files.sync_dir(&self.dir).map_err(failed_in(&self.dir))
    }

    /// Makes the hashes of all entries so far durable, and then says so.
    fn write_out(&self) -> Result<(), StoreError> {
        let written = self.with_opened(|opened| opened.write_tails().map(|()| (opened.entries, opened.flushed)))?;
        let (entries, flushed) = written;
        if flushed == entries {
            return Ok(());
        }
        // After a failed sync nothing since the last good one is certain: it is read again as it is on disk, and written once more.
        self.with_opened(Opened::sync).inspect_err(|_| self.close())?;
        let path = self.dir.join(HASHED);
        let hashed = self.with_opened(|opened| Ok(print(self.log, entries, &opened.root())))?;
        files::replace(self.files.as_ref(), &path, hashed.as_bytes()).map_err(failed_in(&path))?;
        if let Some(opened) = &mut *self.opened.write().unwrap_or_else(PoisonError::into_inner) {
            opened.flushed = entries;
        }
        Ok(())
    }

    fn add(&self, first: u64, leaves: Vec<Hash>) -> Result<bool, StoreError> {
        let mut opened = self.opened.write().unwrap_or_else(PoisonError::into_inner);
        let opened = opened.as_mut().filter(|opened| opened.entries == first);
        let opened = opened.ok_or_else(|| self.io_error("it failed while it was added to".into()))?;
        for leaf in leaves {
            opened.push(leaf, |level| self.new_level(level))?;
        }
        Ok(opened.entries - opened.flushed >= FLUSH_ENTRIES)
    }

    fn new_level(&self, level: usize) -> Result<Level, StoreError> {
        let path = self.level_path(level);
        // Nothing of one that is there counts, and whether its name is durable is not known.
        remove_if_there(self.files.as_ref(), &path).map_err(failed_in(&path))?;
        let file = self.files.create(&path).map_err(failed_in(&path))?;
        self.files.sync_dir(&self.dir).map_err(failed_in(&self.dir))?;
        Ok(Level { path, file, complete: 0, tail: Vec::with_capacity(WIDTH) })
    }

    fn level_path(&self, level: usize) -> PathBuf {
        self.dir.join(format!("level-{level}"))
    }

    fn adding(&self) -> MutexGuard<'_, ()> {
        self.adding.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes it; the next call opens it as it is on disk.
    fn close(&self) {
        *self.opened.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn io_error(&self, detail: String) -> StoreError {
        StoreError::Io { place: self.dir.display().to_string(), detail }
    }
}

impl Derived for HashTree {
    const NAME: &'static str = "tree";

    fn applied(&self) -> u64 {
        self.with_opened(|opened| Ok(opened.entries)).unwrap_or(0)
    }

    fn apply(&self, first: u64, entries: &[Bytes]) -> Result<(), StoreError> {
        let _adding = self.adding();
        let leaves = entries.iter().map(|entry| leaf_hash(entry)).collect();
        if self.add(first, leaves)? { self.write_out() } else { Ok(()) }
    }

    fn clear(&self) -> Result<(), StoreError> {
        let _adding = self.adding();
        // Before the first new hash is written over an old one.
        let forgotten = self.forget();
        self.close();
        forgotten?;
        self.with_opened(|_| Ok(()))
    }

    fn flush(&self) -> Result<(), StoreError> {
        let _adding = self.adding();
        self.write_out()
    }
}

impl Opened {
    /// Adds the hash of the next entry. After an error nothing was added.
    fn push(&mut self, leaf: Hash, new_level: impl Fn(usize) -> Result<Level, StoreError>) -> Result<(), StoreError> {
        let mut hash = leaf;
        let mut filled = 0;
        loop {
            if filled == self.levels.len() {
                self.levels.push(new_level(filled)?);
            }
            let level = &self.levels[filled];
            if level.tail.len() + 1 < WIDTH {
                break;
            }
            let mut tile = level.tail.clone();
            tile.push(hash);
            level.write(&tile)?;
            hash = root_of(&tile);
            filled += 1;
        }
        for level in &mut self.levels[..filled] {
            level.tail.clear();
            level.complete += WIDTH as u64;
        }
        self.levels[filled].tail.push(hash);
        self.entries += 1;
        Ok(())
    }

    /// Of the tree over all entries: of each level, what is not in a complete tile, with the root of what is to the right of it and below.
    fn root(&self) -> Hash {
        let mut right = None;
        for level in &self.levels {
            let hashes: Vec<_> = level.tail.iter().copied().chain(right).collect();
            right = if hashes.is_empty() { None } else { Some(root_of(&hashes)) };
        }
        right.unwrap_or_else(empty_root)
    }

    fn write_tails(&self) -> Result<(), StoreError> {
        self.levels.iter().try_for_each(|level| level.write(&level.tail))
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.levels.iter().try_for_each(|level| level.file.sync_data().map_err(failed_in(&level.path)))
    }

    fn hashes(&self, level: u8, range: Range<u64>) -> Result<Vec<Hash>, Unread> {
        let level = usize::from(level);
        let mut hashes = Vec::new();
        let mut next = range.start;
        while next < range.end {
            let first = next - next % WIDTH as u64;
            let tile = self.tile(level, first)?;
            let wanted = place(next - first)..place(range.end - first).min(WIDTH);
            let found = tile.get(wanted).ok_or_else(|| Unread::Damaged(format!("hash {next} of level {level} is not there")))?;
            hashes.extend_from_slice(found);
            next += found.len() as u64;
        }
        Ok(hashes)
    }

    /// The tile that begins with the hash `first` of a level, as far as there is one.
    fn tile(&self, level: usize, first: u64) -> Result<Vec<Hash>, Unread> {
        let damaged = |what: &str| Unread::Damaged(format!("the tile with hash {first} of level {level} {what}"));
        let at = self.levels.get(level).ok_or_else(|| damaged("is not there"))?;
        if first >= at.complete {
            return Ok(if first == at.complete { at.tail.clone() } else { Vec::new() });
        }
        let tile = at.read(first, WIDTH)?.ok_or_else(|| damaged("is cut off"))?;
        let above = self.levels.get(level + 1).ok_or_else(|| damaged("has none above it"))?;
        let index = first / WIDTH as u64;
        let due = match index.checked_sub(above.complete) {
            Some(in_tail) => above.tail.get(place(in_tail)).copied(),
            None => above.read(index, 1)?.and_then(|hashes| hashes.first().copied()),
        };
        if due == Some(root_of(&tile)) { Ok(tile) } else { Err(damaged("does not lead to the hash above it")) }
    }
}

impl Level {
    /// Writes hashes behind the complete tiles.
    fn write(&self, hashes: &[Hash]) -> Result<(), StoreError> {
        self.file.write_at(hashes.as_flattened(), self.complete * HASH_BYTES as u64).map_err(failed_in(&self.path))
    }

    fn read(&self, first: u64, count: usize) -> Result<Option<Vec<Hash>>, Unread> {
        read_hashes(self.file.as_ref(), first, count).map_err(|error| Unread::Io(failed_in(&self.path)(error)))
    }
}

/// `count` hashes of a level's file; nothing if it ends before.
fn read_hashes(file: &dyn LogFile, first: u64, count: usize) -> io::Result<Option<Vec<Hash>>> {
    let mut hashes = vec![[0; HASH_BYTES]; count];
    let bytes = hashes.as_flattened_mut();
    let read = file.read_at(bytes, first * HASH_BYTES as u64)?;
    Ok((read == bytes.len()).then_some(hashes))
}

fn place(index: u64) -> usize {
    usize::try_from(index).unwrap_or(usize::MAX)
}

fn print(log: LogId, entries: u64, root: &Hash) -> String {
    format!("{FIRST_LINE}\n{}\n{entries}\n{}\n", hex::encode(log), hex::encode(root))
}

/// What `hashed` says; nothing if it is not as it was written.
pub(super) fn parse(text: &str) -> Option<(LogId, u64, Hash)> {
    let mut lines = text.strip_prefix(FIRST_LINE)?.lines().skip(1);
    let (mut log, mut root) = (LogId::default(), Hash::default());
    hex::decode_to_slice(lines.next()?, &mut log).ok()?;
    let entries = lines.next()?.parse().ok()?;
    hex::decode_to_slice(lines.next()?, &mut root).ok()?;
    (print(log, entries, &root) == text).then_some((log, entries, root))
}
