//! Entries in their order, and whether they are those of the checkpoints and tiles that they are compared with.
//!
//! Whatever is found, the first thing that does not fit is named: certificates wait for being checked together, so those before it are
//! checked then.

use std::collections::BTreeMap;
use std::fmt;

use chancery_identity::checkpoint::{Checkpoint, Hash};

use super::certificates::Certificates;
use super::frontier::Frontier;
use super::tiles::Tiles;

/// Entries that were looked at so far.
#[derive(Debug)]
pub(super) struct Examined {
    tree: Frontier,
    /// By their sizes; larger ones than the tree so far.
    expected: BTreeMap<u64, Vec<(String, Checkpoint)>>,
    /// The sizes of those that the entries lead to.
    fitted: Vec<u64>,
    origin: Option<String>,
    tiles: Option<Tiles>,
    /// The first thing in which the tree that is kept beside them and the entries differ, and behind how many entries that was found.
    mismatch: Option<(Finding, u64)>,
    certificates: Option<Certificates>,
}

/// What everything came to.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) entries: u64,
    pub(super) root: Hash,
    pub(super) fitted: Vec<u64>,
    pub(super) certificates: Option<u64>,
}

/// Something that does not fit, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Finding {
    entry: Option<u64>,
    problem: String,
    is_earlier: bool,
}

impl Finding {
    /// About an entry.
    pub(super) fn at(entry: u64, problem: String) -> Self {
        Self { entry: Some(entry), problem, is_earlier: false }
    }

    /// About an entry before the one that was read last.
    pub(super) fn earlier(entry: u64, problem: String) -> Self {
        Self { entry: Some(entry), problem, is_earlier: true }
    }

    /// About something whose place stands in `problem`.
    pub(super) fn elsewhere(problem: String) -> Self {
        Self { entry: None, problem, is_earlier: false }
    }

    /// Whether it lies before what was read last.
    pub(super) fn is_earlier(&self) -> bool {
        self.is_earlier
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.entry {
            Some(entry) => write!(f, "entry {entry}: {}", self.problem),
            None => f.write_str(&self.problem),
        }
    }
}

impl Examined {
    pub(super) fn new(check_certificates: bool) -> Self {
        Self {
            tree: Frontier::default(),
            expected: BTreeMap::new(),
            fitted: Vec::new(),
            origin: None,
            tiles: None,
            mismatch: None,
            certificates: check_certificates.then(Certificates::default),
        }
    }

    /// The entries have to lead to this checkpoint, which is called `name`.
    pub(super) fn expect(&mut self, name: String, checkpoint: Checkpoint) {
        self.expected.entry(checkpoint.size).or_default().push((name, checkpoint));
    }

    /// The entries are compared with these tiles.
    pub(super) fn compare_tiles(&mut self, tiles: Tiles) {
        self.tiles = Some(tiles);
    }

    /// The tree that is kept beside the entries is not theirs.
    pub(super) fn differs(&mut self, finding: Finding) {
        self.mismatch.get_or_insert((finding, self.tree.size()));
    }

    /// The entries are those of this log.
    pub(super) fn is_log(&mut self, log: Option<[u8; 16]>) {
        if let Some(finding) = self.tiles.as_ref().and_then(|tiles| tiles.of_another(log)) {
            self.differs(finding);
        }
    }

    /// The next entry, which was said to have the hash `known` (hexadecimal).
    pub(super) fn entry(&mut self, index: u64, bytes: &[u8], known: Option<&str>) -> Result<(), Finding> {
        self.next(index, bytes, known).map_err(|found| self.first(found))
    }

    /// A checkpoint stands here among the entries: it has to have as many as there were.
    pub(super) fn reached(&mut self, name: String, checkpoint: Checkpoint) -> Result<(), Finding> {
        self.stands(name, checkpoint).map_err(|found| self.first(found))
    }

    /// What is to be said where `found` does not fit: that, or a certificate before it.
    pub(super) fn first(&mut self, found: Finding) -> Finding {
        self.certificates.as_mut().and_then(|certificates| certificates.check().err()).unwrap_or(found)
    }

    fn next(&mut self, index: u64, bytes: &[u8], known: Option<&str>) -> Result<(), Finding> {
        let due = self.tree.size();
        if index > due {
            let problem = format!("missing; entry {index} follows (only an export of all entries can be verified as a whole)");
            return Err(Finding::at(due, problem));
        }
        if index < due {
            return Err(Finding::at(index, format!("it comes again, or too late: entry {due} is due")));
        }
        if due == 0 {
            self.compare()?;
        }
        let (tiles, mismatch) = (&mut self.tiles, &mut self.mismatch);
        let leaf = self.tree.push(bytes, |height, number, hash| {
            if let Some(tiles) = tiles
                && mismatch.is_none()
            {
                *mismatch = tiles.compare(height, number, hash).map(|finding| (finding, due + 1));
            }
        });
        if known.is_some_and(|known| known != hex::encode(leaf)) {
            return Err(Finding::at(index, "its bytes are not those that `leaf_hash` is the hash of".into()));
        }
        if let Some(certificates) = &mut self.certificates {
            certificates.entry(index, bytes)?;
        }
        self.compare()
    }

    fn stands(&mut self, name: String, checkpoint: Checkpoint) -> Result<(), Finding> {
        if checkpoint.size != self.tree.size() {
            let problem = format!("{name} has {} entries, but {} stand before it", checkpoint.size, self.tree.size());
            return Err(Finding::at(self.tree.size().min(checkpoint.size), problem));
        }
        self.expect(name, checkpoint);
        self.compare()
    }

    /// Everything was read.
    pub(super) fn finish(mut self) -> Result<Seen, Finding> {
        let entries = self.tree.size();
        let compared = self.compare();
        let certificates = self.certificates.take().map(Certificates::finish).transpose()?;
        compared?;
        if let Some((size, names)) = self.expected.pop_first() {
            let name = names.into_iter().next().map(|(name, _)| name).unwrap_or_default();
            return Err(Finding::at(entries, format!("missing: there are {entries} entries, but {name} has {size}")));
        }
        if let Some((mismatch, behind)) = self.mismatch {
            let is_signed = self.fitted.last().is_some_and(|signed| *signed >= behind);
            let because = if is_signed { "; the entries lead to the checkpoint, so it was changed there" } else { "" };
            return Err(Finding { problem: format!("{}{because}", mismatch.problem), ..mismatch });
        }
        if let Some(finding) = self.tiles.and_then(|tiles| tiles.beyond(entries)) {
            return Err(finding);
        }
        Ok(Seen { entries, root: self.tree.root(), fitted: self.fitted, certificates })
    }

    /// Compares the root with the checkpoints of this size, and with what was hashed.
    fn compare(&mut self) -> Result<(), Finding> {
        let size = self.tree.size();
        if let Some(finding) = self.tiles.as_ref().and_then(|tiles| tiles.compare_root(size, || self.tree.root())) {
            self.differs(finding);
        }
        if self.expected.first_key_value().is_none_or(|(first, _)| *first > size) {
            return Ok(());
        }
        let root = self.tree.root();
        for (name, checkpoint) in self.expected.remove(&size).unwrap_or_default() {
            if *self.origin.get_or_insert_with(|| checkpoint.origin.clone()) != checkpoint.origin {
                return Err(Finding::elsewhere(format!("{name} is of another ledger: {}", checkpoint.origin)));
            }
            if checkpoint.root != root {
                return Err(self.not_the_root(&name));
            }
            if self.fitted.last() != Some(&size) {
                self.fitted.push(size);
            }
        }
        Ok(())
    }

    fn not_the_root(&self, name: &str) -> Finding {
        let (first, last) = (self.fitted.last().copied().unwrap_or_default(), self.tree.size().saturating_sub(1));
        let range = format!("at least one of the entries {first} to {last} is not what was signed");
        match &self.mismatch {
            // The tiles know the entries one by one.
            Some((mismatch, _)) => Finding {
                problem: format!("{}; {name} is not that of these entries either: {range}", mismatch.problem),
                ..mismatch.clone()
            },
            None => Finding::elsewhere(format!("{name} is not that of these entries: {range}")),
        }
    }
}
