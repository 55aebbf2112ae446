//! Reads a log from its first entry to its last without opening the store: nothing is locked, repaired or written, so that a copy, a backup
//! or the evidence itself can be looked at; and the log of a running CA, up to entries that are known to be durable.

use std::fs;
use std::path::{Path, PathBuf};

use super::checkpoint;
use super::frame::{self, Header, Tag};
use super::merkle;
use super::segment::{self, LogId, Seal, Tail};
use super::{damaged, failed_in};
use crate::store::{Head, StoreError};

/// Where a log begins.
const START: Head = Head { entries: 0, epoch: 0, frame: [0; 32] };

/// The segments of a log.
#[derive(Debug)]
pub struct Audit {
    segments: Vec<PathBuf>,
    bytes: u64,
}

/// What was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Audited {
    /// The log's ID.
    pub log: Option<[u8; 16]>,
    /// How many entries.
    pub entries: u64,
    /// A write that was cut off follows them, which the next start removes.
    pub is_torn: bool,
}

/// What a store says of the hashes that it keeps beside its log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hashed {
    /// The ID of the log that they are of.
    pub log: [u8; 16],
    /// How many entries they cover.
    pub entries: u64,
    /// The root of the tree of these.
    pub root: [u8; 32],
}

impl Hashed {
    /// Reads the file `tree/hashed`; nothing if it is not as it was written.
    pub fn parse(text: &str) -> Option<Self> {
        merkle::parse(text).map(|(log, entries, root)| Self { log, entries, root })
    }
}

impl Audit {
    /// Finds the segments of the store in `dir`.
    ///
    /// # Errors
    /// If there are none.
    pub fn of(dir: &Path) -> Result<Self, StoreError> {
        let log = dir.join("log");
        let mut audit = Self { segments: Vec::new(), bytes: 0 };
        for entry in fs::read_dir(&log).map_err(failed_in(&log))? {
            let entry = entry.map_err(failed_in(&log))?;
            if segment::first_of(&entry.file_name().to_string_lossy()).is_some() {
                audit.bytes += entry.metadata().map_err(failed_in(&entry.path()))?.len();
                audit.segments.push(entry.path());
            }
        }
        // The names are as long as each other, and numbers.
        audit.segments.sort();
        if audit.segments.is_empty() { Err(damaged(&log, 0, "there is no segment".into())) } else { Ok(audit) }
    }

    /// How many bytes will be read.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Leaves out what begins behind the first `entries` entries, which may still be written to.
    #[must_use]
    pub fn up_to(mut self, entries: u64) -> Self {
        let begins = |path: &PathBuf| path.file_name().and_then(|name| segment::first_of(&name.to_string_lossy()));
        self.segments.retain(|path| begins(path).is_some_and(|first| first == 0 || first < entries));
        self
    }

    /// The segments, from the first one on.
    pub fn segments(&self) -> &[PathBuf] {
        &self.segments
    }

    /// Checks everything, and hands each entry with its index to `entry`. `read` is told how many bytes each segment had.
    ///
    /// # Errors
    /// The first place that is not as it was written, or what `entry` says.
    pub fn read<E: From<StoreError>>(
        &self,
        mut entry: impl FnMut(u64, &[u8]) -> Result<(), E>,
        mut read: impl FnMut(u64),
    ) -> Result<Audited, E> {
        let (mut walk, mut is_torn) = (Walk::default(), false);
        for (number, path) in self.segments.iter().enumerate() {
            let bytes = fs::read(path).map_err(failed_in(path))?;
            if number + 1 < self.segments.len() {
                walk.full(path, &bytes, &mut entry)?;
            } else {
                is_torn = walk.last(path, &bytes, &mut entry)?;
            }
            read(bytes.len() as u64);
        }
        Ok(Audited { log: walk.log_id(), entries: walk.entries(), is_torn })
    }
}

/// Follows a log through its segments, which are handed over from the first one on, and checks that they hang together.
#[derive(Debug)]
pub struct Walk {
    at: Head,
    log: Option<LogId>,
}

impl Default for Walk {
    fn default() -> Self {
        Self { at: START, log: None }
    }
}

impl Walk {
    /// How many entries there were.
    pub fn entries(&self) -> u64 {
        self.at.entries
    }

    /// The log's ID; none before the first segment.
    pub fn log_id(&self) -> Option<[u8; 16]> {
        self.log
    }

    /// The note that a store keeps of where its log must not end before: here.
    pub fn floor(&self) -> Option<String> {
        self.log.map(|log| checkpoint::encode(log, &self.at))
    }

    /// The next segment, whose file is `path`, one that others follow.
    ///
    /// # Errors
    /// The first place that is not as it was written, or what `entry` says.
    pub fn full<E: From<StoreError>>(
        &mut self,
        path: &Path,
        bytes: &[u8],
        mut entry: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let segment = self.begin(path, bytes)?;
        let end = segment.sealed()?;
        self.at = segment.frames(self.at, end, &mut entry)?;
        Ok(())
    }

    /// The segment that none follows; tells whether a write that was cut off is at its end.
    ///
    /// # Errors
    /// The first place that is not as it was written, or what `entry` says.
    pub fn last<E: From<StoreError>>(
        &mut self,
        path: &Path,
        bytes: &[u8],
        mut entry: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<bool, E> {
        let segment = self.begin(path, bytes)?;
        let mut is_torn = false;
        let end = segment.last(self.at, &mut is_torn)?;
        self.at = segment.frames(self.at, end, &mut entry)?;
        Ok(is_torn)
    }

    /// The segment that is written to, up to and with the entry before `entries`, which is durable; tells how many of its bytes that are. What
    /// is behind them may change while it is read, and is not looked at.
    ///
    /// # Errors
    /// The first place that is not as it was written, or if no group ends there.
    pub fn beginning(&mut self, path: &Path, bytes: &[u8], entries: u64) -> Result<usize, StoreError> {
        let segment = self.begin(path, bytes)?;
        let mut offset = segment::HEADER_BYTES;
        while self.at.entries < entries {
            let (header, rest) = segment.frame(offset, bytes.len(), self.at)?;
            self.at = segment::follow(&self.at, &header, rest).map_err(|detail| segment.damaged(offset, detail))?;
            offset += header.frame_bytes();
        }
        if self.at.entries == entries {
            return Ok(offset);
        }
        let detail = format!("a group ends behind entry {}, and none behind entry {entries}", self.at.entries);
        Err(segment.damaged(offset, detail))
    }

    fn begin<'a>(&mut self, path: &'a Path, bytes: &'a [u8]) -> Result<Segment<'a>, StoreError> {
        let header = segment::parse_header(bytes);
        let (id, start) = header.ok_or_else(|| damaged(path, 0, "the segment's header is not intact".into()))?;
        if *self.log.get_or_insert(id) != id {
            return Err(damaged(path, 0, "the segment belongs to another log".into()));
        }
        if start != self.at {
            return Err(damaged(path, 0, format!("the segment does not follow the one before: entry {} is due", self.at.entries)));
        }
        Ok(Segment { path, bytes, tag: segment::tag(id) })
    }
}

/// A segment in memory.
struct Segment<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    tag: Tag,
}

impl Segment<'_> {
    /// Where the data of a full segment end, and where the log stands there.
    fn sealed(&self) -> Result<(usize, Head), StoreError> {
        let broken =
            || damaged(self.path, self.bytes.len() as u64, "a segment follows, but this one does not end with an intact seal".into());
        let first = self.path.file_name().and_then(|name| segment::first_of(&name.to_string_lossy())).ok_or_else(broken)?;
        let trailer = self.bytes.last_chunk::<{ segment::TRAILER_BYTES }>().ok_or_else(broken)?;
        let table = Seal::table_bytes(trailer).and_then(|bytes| usize::try_from(bytes).ok()).ok_or_else(broken)?;
        let data_end = self.bytes.len().checked_sub(segment::TRAILER_BYTES + table).ok_or_else(broken)?;
        let seal = self.bytes.get(data_end..).and_then(|seal| Seal::parse(seal, self.tag, first));
        let seal = seal.filter(|seal| seal.data_end == data_end as u64).ok_or_else(broken)?;
        Ok((data_end, seal.end))
    }

    /// The same of the segment that is still written to.
    fn last(&self, start: Head, is_torn: &mut bool) -> Result<(usize, Head), StoreError> {
        match segment::scan(self.bytes, self.tag, start, |_| Ok(())) {
            Ok(scan) => {
                *is_torn = scan.tail == Tail::Torn;
                Ok((scan.data_end, scan.end))
            }
            Err(found) => Err(self.damaged(found.offset, self.bad_entry(found.offset).unwrap_or(found.detail))),
        }
    }

    fn frames<E: From<StoreError>>(
        &self,
        mut at: Head,
        (data_end, due): (usize, Head),
        entry: &mut impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<Head, E> {
        let mut offset = segment::HEADER_BYTES;
        while offset < data_end {
            let (header, rest) = self.frame(offset, data_end, at)?;
            at = segment::follow(&at, &header, rest).map_err(|detail| self.damaged(offset, detail))?;
            let mut place = frame::HEADER_BYTES + header.table_bytes();
            for (index, row) in (header.first..).zip(frame::rows(&rest[frame::HEADER_BYTES..place])) {
                entry(index, &rest[place..place + row.bytes])?;
                place += row.bytes;
            }
            offset += header.frame_bytes();
        }
        if at == due {
            return Ok(at);
        }
        let detail = format!("the segment ends with {} entries, but its seal says {}", at.entries, due.entries);
        Err(self.damaged(offset, detail).into())
    }

    /// The frame at `offset`, where the log is `at`, and all bytes from there on.
    fn frame(&self, offset: usize, data_end: usize, at: Head) -> Result<(Header, &[u8]), StoreError> {
        let rest = self.bytes.get(offset..data_end).unwrap_or_default();
        let header = frame::check(rest, self.tag).ok_or_else(|| {
            let detail = self.bad_entry(offset).unwrap_or_else(|| format!("no intact frame with entry {}", at.entries));
            self.damaged(offset, detail)
        })?;
        Ok((header, rest))
    }

    /// Which entry of the frame at `offset` is not as it was written, if the frame's header and table are.
    fn bad_entry(&self, offset: usize) -> Option<String> {
        let rest = self.bytes.get(offset..)?;
        let header = Header::parse(rest, self.tag).filter(|header| header.is_sound(rest))?;
        let mut place = frame::HEADER_BYTES + header.table_bytes();
        for (index, row) in (header.first..).zip(frame::rows(rest.get(frame::HEADER_BYTES..place)?)) {
            let is_intact = rest.get(place..place + row.bytes).is_some_and(|entry| row.fits(entry));
            if !is_intact {
                return Some(format!("entry {index} is not as it was written"));
            }
            place += row.bytes;
        }
        None
    }

    fn damaged(&self, offset: usize, detail: String) -> StoreError {
        damaged(self.path, offset as u64, detail)
    }
}
