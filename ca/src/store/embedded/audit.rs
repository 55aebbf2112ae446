//! Reads a log from its first entry to its last without opening the store: nothing is locked, repaired or written, so that a copy, a backup
//! or the evidence itself can be looked at.

use std::fs;
use std::path::{Path, PathBuf};

use super::frame::{self, Header, Tag};
use super::segment::{self, Seal, Tail};
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
    /// How many entries.
    pub entries: u64,
    /// A write that was cut off follows them, which the next start removes.
    pub is_torn: bool,
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

    /// Checks everything, and hands each entry with its index to `entry`. `read` is told how many bytes each segment had.
    ///
    /// # Errors
    /// The first place that is not as it was written, or what `entry` says.
    pub fn read<E: From<StoreError>>(
        &self,
        mut entry: impl FnMut(u64, &[u8]) -> Result<(), E>,
        mut read: impl FnMut(u64),
    ) -> Result<Audited, E> {
        let (mut at, mut log, mut is_torn) = (START, None, false);
        for (number, path) in self.segments.iter().enumerate() {
            let bytes = fs::read(path).map_err(failed_in(path))?;
            let header = segment::parse_header(&bytes);
            let (id, start) = header.ok_or_else(|| damaged(path, 0, "the segment's header is not intact".into()))?;
            if *log.get_or_insert(id) != id {
                return Err(damaged(path, 0, "the segment belongs to another log".into()).into());
            }
            if start != at {
                return Err(damaged(path, 0, format!("the segment does not follow the one before: entry {} is due", at.entries)).into());
            }
            let segment = Segment { path, bytes: &bytes, tag: segment::tag(id) };
            let end = if number + 1 < self.segments.len() { segment.sealed()? } else { segment.last(at, &mut is_torn)? };
            at = segment.frames(at, end, &mut entry)?;
            read(bytes.len() as u64);
        }
        Ok(Audited { entries: at.entries, is_torn })
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
            let rest = self.bytes.get(offset..data_end).unwrap_or_default();
            let header = frame::check(rest, self.tag).ok_or_else(|| {
                let detail = self.bad_entry(offset).unwrap_or_else(|| format!("no intact frame with entry {}", at.entries));
                self.damaged(offset, detail)
            })?;
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
