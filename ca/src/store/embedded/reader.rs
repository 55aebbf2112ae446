//! Reading the log while it is written: everything before the durable head, by `pread`.
//!
//! Memory does not grow with the log: of each segment only the first entry's index is held, and of a few the table of its seal.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use bytes::Bytes;

use super::files::{LogFile, LogFiles};
use super::frame::{self, Header, Tag};
use super::segment::{self, Point, Points, Seal};
use super::{damaged, failed_in};
use crate::store::{Head, StoreError};

/// How many sealed segments are held open, with the tables of their seals.
const KEPT_OPEN: usize = 32;

/// What the writer and all readers share.
#[derive(Debug)]
pub(super) struct Segments {
    pub(super) files: Arc<dyn LogFiles>,
    /// Where the segments are.
    pub(super) dir: PathBuf,
    pub(super) tag: Tag,
    /// How many commits were synced.
    pub(super) syncs: AtomicU64,
    durable: RwLock<Durable>,
    kept_open: Mutex<VecDeque<Arc<Sealed>>>,
}

#[derive(Debug)]
struct Durable {
    head: Head,
    /// With which entries the segments begin; the last one is open for writing.
    firsts: Vec<u64>,
    open: Arc<dyn LogFile>,
    points: Points,
}

#[derive(Debug)]
struct Sealed {
    first: u64,
    file: Arc<dyn LogFile>,
    points: Points,
}

/// A segment, and a frame in it shortly before an entry.
struct Near {
    path: PathBuf,
    file: Arc<dyn LogFile>,
    point: Option<Point>,
}

/// A frame of a segment, found.
struct Found {
    path: PathBuf,
    file: Arc<dyn LogFile>,
    offset: u64,
    header: Header,
}

impl Segments {
    pub(super) fn new(
        files: Arc<dyn LogFiles>,
        dir: PathBuf,
        tag: Tag,
        head: Head,
        firsts: Vec<u64>,
        open: Arc<dyn LogFile>,
        points: Points,
    ) -> Self {
        let durable = RwLock::new(Durable { head, firsts, open, points });
        Self { files, dir, tag, syncs: AtomicU64::new(0), durable, kept_open: Mutex::default() }
    }

    /// The end of what is durable.
    pub(super) fn head(&self) -> Head {
        self.durable.read().unwrap_or_else(PoisonError::into_inner).head
    }

    /// Tells readers that the frame at `offset` of the open segment, before which the head was, is durable now.
    pub(super) fn advance(&self, head: Head, offset: u64) {
        let mut durable = self.durable.write().unwrap_or_else(PoisonError::into_inner);
        let index = durable.head.entries;
        durable.points.note(Point { index, offset });
        durable.head = head;
    }

    /// The frames noted of the open segment.
    pub(super) fn points(&self) -> Points {
        self.durable.read().unwrap_or_else(PoisonError::into_inner).points.clone()
    }

    /// Tells readers that `open` is the open segment now and begins at the head.
    pub(super) fn roll(&self, open: Arc<dyn LogFile>) {
        let mut durable = self.durable.write().unwrap_or_else(PoisonError::into_inner);
        let first = durable.head.entries;
        durable.firsts.push(first);
        durable.open = open;
        durable.points = Points::default();
    }

    /// With which entries the segments begin.
    pub(super) fn firsts(&self) -> Vec<u64> {
        self.durable.read().unwrap_or_else(PoisonError::into_inner).firsts.clone()
    }

    /// With which entry the open segment begins.
    pub(super) fn open_first(&self) -> u64 {
        self.durable.read().unwrap_or_else(PoisonError::into_inner).firsts.last().copied().unwrap_or(0)
    }

    /// The entries of `range`, at most `max_bytes` of them but at least one.
    pub(super) fn read(&self, range: Range<u64>, max_bytes: usize) -> Result<Vec<Bytes>, StoreError> {
        let head = self.head();
        if range.end > head.entries {
            return Err(StoreError::Invalid(format!("entry {} is not there yet: the log has {}", range.end - 1, head.entries)));
        }
        let mut entries = Vec::new();
        let mut left = max_bytes;
        let mut next = range.start;
        while next < range.end {
            let found = self.find(next)?;
            let wanted = next..range.end.min(found.header.end());
            let count = found.read(wanted.clone(), &mut left, &mut entries)?;
            next += count;
            if next < wanted.end {
                break;
            }
        }
        Ok(entries)
    }

    /// The frame that holds the entry `index`, which is before the head.
    fn find(&self, index: u64) -> Result<Found, StoreError> {
        let Near { path, file, point } = self.find_near(index)?;
        let none = |offset| damaged(&path, offset, format!("no frame with entry {index}"));
        let mut offset = point.ok_or_else(|| none(0))?.offset;
        let start = offset;
        let mut chunk = vec![0; usize::try_from(segment::STRIDE).unwrap_or(usize::MAX) + frame::HEADER_BYTES];
        let read = file.read_at(&mut chunk, offset).map_err(failed_in(&path))?;
        chunk.truncate(read);
        loop {
            // The points are so close that all frames between two of them begin in the chunk.
            let bytes = usize::try_from(offset - start).ok().and_then(|at| chunk.get(at..));
            let header = bytes.and_then(|bytes| Header::parse(bytes, self.tag)).filter(|header| header.first <= index);
            let header = header.ok_or_else(|| none(offset))?;
            if index < header.end() {
                return Ok(Found { path, file, offset, header });
            }
            offset += header.frame_bytes() as u64;
        }
    }

    fn find_near(&self, index: u64) -> Result<Near, StoreError> {
        let first = {
            let durable = self.durable.read().unwrap_or_else(PoisonError::into_inner);
            let segment = durable.firsts.partition_point(|first| *first <= index).saturating_sub(1);
            let first = durable.firsts.get(segment).copied().unwrap_or_default();
            if segment + 1 >= durable.firsts.len() {
                return Ok(Near { path: self.path(first), file: durable.open.clone(), point: durable.points.before(index) });
            }
            first
        };
        let sealed = self.sealed(first)?;
        Ok(Near { path: self.path(first), file: sealed.file.clone(), point: sealed.points.before(index) })
    }

    fn path(&self, first: u64) -> PathBuf {
        self.dir.join(segment::name(first))
    }

    fn sealed(&self, first: u64) -> Result<Arc<Sealed>, StoreError> {
        let find = |kept: &VecDeque<Arc<Sealed>>| kept.iter().find(|sealed| sealed.first == first).cloned();
        if let Some(sealed) = find(&self.kept_open.lock().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(sealed);
        }
        let path = self.path(first);
        let file = self.files.open(&path).map_err(failed_in(&path))?;
        let seal = read_seal(file.as_ref(), &path, self.tag, first)?;
        let sealed = Arc::new(Sealed { first, file, points: seal.points });
        let mut kept = self.kept_open.lock().unwrap_or_else(PoisonError::into_inner);
        if find(&kept).is_none() {
            kept.push_back(sealed.clone());
            if kept.len() > KEPT_OPEN {
                kept.pop_front();
            }
        }
        Ok(sealed)
    }

    /// Checks everything in the segment that begins with the entry `first`; tells how many bytes that were.
    pub(super) fn scrub(&self, first: u64) -> Result<u64, StoreError> {
        let path = self.path(first);
        let file = self.files.open(&path).map_err(failed_in(&path))?;
        let (head, is_open) = {
            // Both at once: a segment that is sealed meanwhile is still read as the open one, up to this head.
            let durable = self.durable.read().unwrap_or_else(PoisonError::into_inner);
            (durable.head, durable.firsts.last() == Some(&first))
        };
        let seal = if is_open { None } else { Some(read_seal(file.as_ref(), &path, self.tag, first)?) };
        let (stop, due) = seal.as_ref().map_or((u64::MAX, head), |seal| (seal.data_end, seal.end));
        let mut buffer = vec![0; segment::HEADER_BYTES];
        read_exactly(file.as_ref(), &mut buffer, 0, &path)?;
        let header = segment::parse_header(&buffer).filter(|(id, start)| segment::tag(*id) == self.tag && start.entries == first);
        let (_, mut at) = header.ok_or_else(|| damaged(&path, 0, "it has no intact header of this log".into()))?;
        let mut offset = segment::HEADER_BYTES as u64;
        while at.entries < due.entries && offset < stop {
            let broken = || damaged(&path, offset, format!("no intact frame with entry {}", at.entries));
            buffer.resize(frame::HEADER_BYTES, 0);
            read_exactly(file.as_ref(), &mut buffer, offset, &path)?;
            let header = Header::parse(&buffer, self.tag).filter(|header| header.end() <= due.entries).ok_or_else(broken)?;
            buffer.resize(header.frame_bytes(), 0);
            read_exactly(file.as_ref(), &mut buffer, offset, &path)?;
            let header = frame::check(&buffer, self.tag).ok_or_else(broken)?;
            at = segment::follow(&at, &header, &buffer).map_err(|detail| damaged(&path, offset, detail))?;
            offset += buffer.len() as u64;
        }
        if at == due && seal.is_none_or(|seal| seal.data_end == offset) {
            Ok(offset)
        } else {
            Err(damaged(&path, offset, format!("the segment ends with {} entries, but {} are due", at.entries, due.entries)))
        }
    }

    /// How many commits were synced.
    pub(super) fn syncs(&self) -> u64 {
        self.syncs.load(Ordering::Relaxed)
    }
}

impl Found {
    /// Adds the entries `wanted` of the frame, as long as `left` bytes are not used up or there is none yet; tells how many.
    fn read(&self, wanted: Range<u64>, left: &mut usize, entries: &mut Vec<Bytes>) -> Result<u64, StoreError> {
        let Self { path, file, offset, header } = self;
        let cut_off = || damaged(path, *offset, format!("the frame with entry {} does not hold what its header says", header.first));
        let mut table = vec![0; frame::HEADER_BYTES + header.table_bytes()];
        let read = file.read_at(&mut table, *offset).map_err(failed_in(path))?;
        if read < table.len() || !header.is_sound(&table) {
            return Err(cut_off());
        }
        let mut rows = frame::rows(&table[frame::HEADER_BYTES..]);
        let before: usize =
            rows.by_ref().take(usize::try_from(wanted.start - header.first).unwrap_or(usize::MAX)).map(|row| row.bytes).sum();
        let mut taken = Vec::new();
        let mut bytes = 0;
        for row in rows.take(usize::try_from(wanted.end - wanted.start).unwrap_or(usize::MAX)) {
            if row.bytes > *left && !(entries.is_empty() && taken.is_empty()) {
                break;
            }
            *left = left.saturating_sub(row.bytes);
            bytes += row.bytes;
            taken.push(row);
        }
        let mut content = vec![0; bytes];
        let begin = offset + (table.len() + before) as u64;
        if file.read_at(&mut content, begin).map_err(failed_in(path))? < bytes {
            return Err(cut_off());
        }
        let mut content = Bytes::from(content);
        for (index, row) in (wanted.start..).zip(&taken) {
            let entry = content.split_to(row.bytes);
            if !row.fits(&entry) {
                return Err(damaged(path, begin, format!("entry {index} is not what was written")));
            }
            entries.push(entry);
        }
        Ok(taken.len() as u64)
    }
}

/// The seal of the full segment that begins with the entry `first`.
pub(super) fn read_seal(file: &dyn LogFile, path: &Path, tag: Tag, first: u64) -> Result<Seal, StoreError> {
    let len = file.length().map_err(failed_in(path))?;
    let broken = || damaged(path, len, "a segment follows, but this one does not end with an intact seal".into());
    let mut trailer = [0; segment::TRAILER_BYTES];
    let trailer_at = len.checked_sub(trailer.len() as u64).ok_or_else(broken)?;
    read_exactly(file, &mut trailer, trailer_at, path)?;
    let table_bytes = Seal::table_bytes(&trailer).ok_or_else(broken)?;
    let table_at = trailer_at.checked_sub(table_bytes).ok_or_else(broken)?;
    let mut bytes = vec![0; usize::try_from(len - table_at).map_err(|_| broken())?];
    read_exactly(file, &mut bytes, table_at, path)?;
    Seal::parse(&bytes, tag, first).filter(|seal| seal.data_end == table_at).ok_or_else(broken)
}

/// Fills `buffer` from `offset` on; a file that ends before is damaged.
pub(super) fn read_exactly(file: &dyn LogFile, buffer: &mut [u8], offset: u64, path: &Path) -> Result<(), StoreError> {
    match file.read_at(buffer, offset).map_err(failed_in(path))? {
        read if read == buffer.len() => Ok(()),
        read => Err(damaged(path, offset + read as u64, io::Error::from(io::ErrorKind::UnexpectedEof).to_string())),
    }
}
