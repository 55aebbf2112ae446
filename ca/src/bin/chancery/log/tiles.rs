//! What a store keeps of the tree beside its log, read as it is on disk: level L has the roots of complete subtrees of 256^L entries, and
//! `hashed` says of which log they are, how many entries they cover, and the root of these. What lies behind these entries is hashed again by
//! the next start, whatever it is, and not looked at.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use chancery_ca::store::embedded::audit::Hashed;
use chancery_identity::checkpoint::Hash;

use super::examined::Finding;

const HASH_BYTES: u64 = size_of::<Hash>() as u64;
/// A level of tiles is so many levels of the tree.
const TILE_HEIGHT: u32 = 8;
/// Hashes in a complete tile.
const WIDTH: u64 = 256;

/// The tiles of a store.
#[derive(Debug)]
pub(super) struct Tiles {
    /// Of `hashed`.
    path: PathBuf,
    hashed: Hashed,
    levels: Vec<Level>,
}

#[derive(Debug)]
struct Level {
    path: PathBuf,
    file: io::Result<File>,
    /// The tile that was read last, and its number.
    tile: Option<(u64, Vec<u8>)>,
}

impl Tiles {
    /// Reads what is in `dir`; nothing if there are none, which the next start makes anew.
    pub(super) fn open(dir: &Path) -> Result<Option<Self>, Finding> {
        let path = dir.join("hashed");
        let text = match fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            text => text.map_err(|error| Finding::elsewhere(format!("{}: {error}", path.display())))?,
        };
        let hashed = Hashed::parse(&String::from_utf8_lossy(&text));
        let hashed = hashed.ok_or_else(|| Finding::elsewhere(format!("{} is not as it was written", path.display())))?;
        let level = |level: u32| {
            let path = dir.join(format!("level-{level}"));
            Level { file: File::open(&path), path, tile: None }
        };
        let is_there = |level: &u32| hashed.entries.checked_shr(TILE_HEIGHT * level).is_some_and(|hashes| hashes > 0);
        let levels = (0..u64::BITS / TILE_HEIGHT).take_while(is_there).map(level).collect();
        Ok(Some(Self { path, hashed, levels }))
    }

    /// What is wrong with the hash of the `number`th complete subtree of 2^`height` entries; nothing if it fits or need not be on disk.
    pub(super) fn compare(&mut self, height: u32, number: u64, hash: &Hash) -> Option<Finding> {
        if !height.is_multiple_of(TILE_HEIGHT) || number >= self.hashed.entries >> height {
            return None;
        }
        let level = usize::try_from(height / TILE_HEIGHT).ok()?;
        let kept = self.levels.get_mut(level)?;
        let problem = match kept.hash(number) {
            Ok(found) if found.as_ref() == Some(hash) => return None,
            Ok(Some(_)) => "is another one".to_owned(),
            Ok(None) => "is missing".to_owned(),
            Err(error) => format!("cannot be read: {error}"),
        };
        let place = format!("hash in {}, at {}, {problem}", kept.path.display(), number * HASH_BYTES);
        Some(match level {
            0 => Finding::at(number, format!("its {place}")),
            _ => Finding::elsewhere(format!("the entries {} to {}: their {place}", number << height, ((number + 1) << height) - 1)),
        })
    }

    /// What is wrong with the root in `hashed`; nothing if it fits, or is not that of a tree of this size.
    pub(super) fn compare_root(&self, size: u64, root: impl FnOnce() -> Hash) -> Option<Finding> {
        let is_another = self.hashed.entries == size && self.hashed.root != root();
        is_another.then(|| Finding::elsewhere(format!("the first {size} entries: their root in {} is another one", self.path.display())))
    }

    /// Whether the hashes are said to be of another log than `log`.
    pub(super) fn of_another(&self, log: Option<[u8; 16]>) -> Option<Finding> {
        let of = hex::encode(self.hashed.log);
        (log != Some(self.hashed.log))
            .then(|| Finding::elsewhere(format!("{} says that the hashes are of the log {of}", self.path.display())))
    }

    /// Tiles of more entries than there are.
    pub(super) fn beyond(&self, entries: u64) -> Option<Finding> {
        let hashed = self.hashed.entries;
        (hashed > entries).then(|| Finding::at(entries, format!("missing: {} says that {hashed} entries were hashed", self.path.display())))
    }
}

impl Level {
    /// The hash with this number; nothing where the file ends before it.
    fn hash(&mut self, number: u64) -> io::Result<Option<Hash>> {
        let wanted = number / WIDTH;
        let tile = match self.tile.take() {
            Some((tile, hashes)) if tile == wanted => hashes,
            _ => self.read(wanted)?,
        };
        let place = usize::try_from(number % WIDTH).unwrap_or(usize::MAX);
        let (hashes, _) = tile.as_chunks::<{ size_of::<Hash>() }>();
        let hash = hashes.get(place).copied();
        self.tile = Some((wanted, tile));
        Ok(hash)
    }

    fn read(&self, tile: u64) -> io::Result<Vec<u8>> {
        let mut hashes = Vec::new();
        let mut file = self.file.as_ref().map_err(|error| io::Error::new(error.kind(), error.to_string()))?;
        file.seek(SeekFrom::Start(tile * WIDTH * HASH_BYTES))?;
        file.take(WIDTH * HASH_BYTES).read_to_end(&mut hashes)?;
        Ok(hashes)
    }
}
