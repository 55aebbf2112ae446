//! The hashes that a store keeps beside its log, read as they are on disk: level L has the roots of complete subtrees of 256^L entries.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use chancery_identity::checkpoint::Hash;

use super::examined::Finding;

const HASH_BYTES: u64 = size_of::<Hash>() as u64;
/// A level of tiles is so many levels of the tree.
const TILE_HEIGHT: u32 = 8;
/// Hashes in a complete tile; incomplete ones are not on disk.
const WIDTH: u64 = 256;

/// The tiles of a store.
#[derive(Debug)]
pub(super) struct Tiles {
    /// How many entries they are certainly about.
    entries: u64,
    levels: Vec<Level>,
}

#[derive(Debug)]
struct Level {
    path: PathBuf,
    file: File,
    /// The tile that was read last, and its number.
    tile: Option<(u64, Vec<u8>)>,
}

impl Tiles {
    /// Reads what is in `dir`; nothing if there are none, which the next start makes anew.
    pub(super) fn open(dir: &Path) -> Result<Option<Self>, String> {
        let failed = |path: &Path, error: std::io::Error| format!("{}: {error}", path.display());
        let hashed = dir.join("hashed");
        let text = match fs::read_to_string(&hashed) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            text => text.map_err(|error| failed(&hashed, error))?,
        };
        let entries = text.lines().nth(2).and_then(|line| line.parse().ok());
        let entries: u64 = entries.ok_or_else(|| format!("{}: it does not say how many entries were hashed", hashed.display()))?;
        let mut levels = Vec::new();
        while entries >> (TILE_HEIGHT * u32::try_from(levels.len()).unwrap_or(u32::MAX)) >= WIDTH {
            let path = dir.join(format!("level-{}", levels.len()));
            let file = File::open(&path).map_err(|error| failed(&path, error))?;
            levels.push(Level { path, file, tile: None });
        }
        Ok(Some(Self { entries, levels }))
    }

    /// What is wrong with the hash of the `number`th complete subtree of 2^`height` entries; nothing if it fits or is not on disk.
    pub(super) fn compare(&mut self, height: u32, number: u64, hash: &Hash) -> Option<Finding> {
        let level = usize::try_from(height / TILE_HEIGHT).ok()?;
        let there = (self.entries >> height) / WIDTH * WIDTH;
        if !height.is_multiple_of(TILE_HEIGHT) || number >= there {
            return None;
        }
        let kept = self.levels.get_mut(level)?;
        let problem = match kept.hash(number) {
            Ok(found) if found.as_ref() == Some(hash) => return None,
            Ok(Some(_)) => "is another one".to_owned(),
            Ok(None) => "is missing".to_owned(),
            Err(error) => format!("cannot be read: {error}"),
        };
        let problem = format!("its hash in {}, at {}, {problem}", kept.path.display(), number * HASH_BYTES);
        Some(match level {
            0 => Finding::at(number, problem),
            _ => Finding::elsewhere(format!("the entries {} to {}: {problem}", number << height, ((number + 1) << height) - 1)),
        })
    }

    /// Tiles of more entries than there are.
    pub(super) fn beyond(&self, entries: u64) -> Option<Finding> {
        (self.entries > entries).then(|| Finding::at(entries, format!("missing: the tiles are about {} entries", self.entries)))
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
        let mut file = &self.file;
        file.seek(SeekFrom::Start(tile * WIDTH * HASH_BYTES))?;
        file.take(WIDTH * HASH_BYTES).read_to_end(&mut hashes)?;
        Ok(hashes)
    }
}
