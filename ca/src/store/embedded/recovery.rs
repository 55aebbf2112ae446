//! Opening a log: finds its end, judges what lies behind it, and leaves an open segment of which nothing is in doubt.
//!
//! Of the older segments only header and seal are read, and whether each follows the one before; their content is the scrub's. The newest
//! one is read whole. What follows its last good frame is
//! - **zeros**: the normal end;
//! - **a write that was cut off**: cut, with a warning, since nobody was told that it was durable. But never below the published checkpoint;
//! - **damage**, if an intact frame of a later group follows: each frame is synced before the next is written, so the broken one was durable.
//!
//! The newest segment is then copied to a new file, unless the log was closed cleanly there. For what can be read now may have never reached
//! the disk: the process before may have died because a sync failed, of the file or of its directory, and then neither reading nor another
//! sync tells the truth.

use std::path::Path;
use std::sync::Arc;

use tracing::warn;

use super::checkpoint::{self, Checkpoints};
use super::files::{LogFile, LogFiles};
use super::log::{Layout, Log, OpenSegment, Spares};
use super::reader::{self, Segments};
use super::segment::{self, LogId, Points, Scan, Tail};
use super::{damaged, failed_in};
use crate::store::{Head, StoreError};

const EMPTY: Head = Head { entries: 0, epoch: 0, frame: [0; 32] };

/// Opens the log in `dir`, or creates it; tells what had to be repaired, one sentence each.
pub(super) fn open(files: Arc<dyn LogFiles>, dir: &Path, layout: Layout) -> Result<(Log, Vec<String>), StoreError> {
    let segments_dir = dir.join("log");
    files.create_dir(&segments_dir).map_err(failed_in(&segments_dir))?;
    let floor = checkpoint::read(files.as_ref(), dir)?;
    let names = files.list(&segments_dir).map_err(failed_in(&segments_dir))?;
    let mut firsts: Vec<u64> = names.iter().filter_map(|name| segment::first_of(name)).collect();
    firsts.sort_unstable();
    let closed = checkpoint::take_closed(files.as_ref(), dir)?;
    let mut opening = Opening { files, dir, segments_dir: &segments_dir, layout, floor, closed, repairs: Vec::new() };
    let log = match firsts.pop() {
        None => opening.create()?,
        Some(newest) => opening.recover(firsts, newest)?,
    };
    for repair in &opening.repairs {
        warn!(%repair, "the ledger was repaired");
    }
    Ok((log, opening.repairs))
}

struct Opening<'a> {
    files: Arc<dyn LogFiles>,
    dir: &'a Path,
    segments_dir: &'a Path,
    layout: Layout,
    floor: Option<(LogId, Head)>,
    closed: Option<(LogId, Head)>,
    repairs: Vec<String>,
}

/// The newest segment, as it was read.
struct Newest {
    first: u64,
    file: Arc<dyn LogFile>,
    bytes: Vec<u8>,
    scan: Scan,
}

impl Opening<'_> {
    fn create(&mut self) -> Result<Log, StoreError> {
        if let Some((_, floor)) = &self.floor {
            let detail = format!("no segment is there, but a checkpoint with {} entries was published", floor.entries);
            return Err(damaged(self.segments_dir, 0, detail));
        }
        let id: LogId = rand::random();
        self.install(id, &segment::encode_header(id, &EMPTY), EMPTY, Vec::new(), 0, Points::default())
    }

    fn recover(&mut self, mut firsts: Vec<u64>, newest: u64) -> Result<Log, StoreError> {
        let (id, start) = self.follow_seals(&firsts, newest)?;
        let newest = self.read_newest(id, start, newest)?;
        let end = newest.scan.end;
        self.check_floor(id, &newest)?;
        self.report_tail(&newest);
        let Newest { first, file, mut bytes, scan } = newest;
        if scan.tail == Tail::Empty && self.closed == Some((id, end)) {
            firsts.push(first);
            let open = OpenSegment { file: file.clone(), first, data_end: scan.data_end as u64 };
            let tag = segment::tag(id);
            let segments = Segments::new(self.files.clone(), self.segments_dir.to_owned(), tag, end, firsts, file, scan.points);
            return Log::new(Arc::new(segments), self.checkpoints(id), self.spares()?, id, self.layout, open);
        }
        bytes.truncate(scan.data_end);
        self.install(id, &bytes, end, firsts, first, scan.points)
    }

    /// Makes a new open segment of `content` (the log ends with `head` in it), durably, and opens the log with it.
    fn install(&self, id: LogId, content: &[u8], head: Head, mut firsts: Vec<u64>, first: u64, points: Points) -> Result<Log, StoreError> {
        let mut spares = self.spares()?;
        // One that was written with a larger segment size is sealed by the next group.
        let size = content.len() as u64;
        spares.ensure_of(size + segment::seal_bytes(size))?;
        let file = spares.install(content, first).map_err(failed_in(&self.segments_dir.join(segment::name(first))))?;
        firsts.push(first);
        let open = OpenSegment { file: file.clone(), first, data_end: size };
        let segments = Segments::new(self.files.clone(), self.segments_dir.to_owned(), segment::tag(id), head, firsts, file, points);
        Log::new(Arc::new(segments), self.checkpoints(id), spares, id, self.layout, open)
    }

    fn spares(&self) -> Result<Spares, StoreError> {
        Spares::new(self.files.clone(), self.segments_dir.to_owned(), self.layout.segment_bytes)
    }

    fn checkpoints(&self, id: LogId) -> Arc<Checkpoints> {
        let published = self.floor.as_ref().map_or(0, |(_, floor)| floor.entries);
        Arc::new(Checkpoints::new(self.files.clone(), self.dir.to_owned(), id, published))
    }

    /// Checks that each of the full segments `firsts` follows the one before; tells the log's ID, and where the `newest` one has to begin.
    fn follow_seals(&self, firsts: &[u64], newest: u64) -> Result<(LogId, Head), StoreError> {
        let mut due = EMPTY;
        let mut log = None;
        for first in firsts.iter().copied().chain([newest]) {
            let path = self.segments_dir.join(segment::name(first));
            let file = self.files.open(&path).map_err(failed_in(&path))?;
            let mut header = [0; segment::HEADER_BYTES];
            reader::read_exactly(file.as_ref(), &mut header, 0, &path)?;
            let parsed = segment::parse_header(&header);
            let (id, start) = parsed.ok_or_else(|| damaged(&path, 0, "the segment's header is not intact".into()))?;
            if *log.get_or_insert(id) != id {
                return Err(damaged(&path, 0, "the segment belongs to another log".into()));
            }
            if start != due || start.entries != first {
                let detail = format!("the segment does not follow the one before: entry {} is due", due.entries);
                return Err(damaged(&path, 0, detail));
            }
            if first != newest {
                due = reader::read_seal(file.as_ref(), &path, segment::tag(id), first)?.end;
            }
        }
        log.map(|id| (id, due)).ok_or_else(|| damaged(self.segments_dir, 0, "there is no segment".into()))
    }

    fn read_newest(&self, id: LogId, start: Head, first: u64) -> Result<Newest, StoreError> {
        let path = self.segments_dir.join(segment::name(first));
        let file = self.files.open(&path).map_err(failed_in(&path))?;
        let len = file.length().map_err(failed_in(&path))?;
        let mut bytes = vec![0; usize::try_from(len).map_err(|error| damaged(&path, len, error.to_string()))?];
        reader::read_exactly(file.as_ref(), &mut bytes, 0, &path)?;
        let floor = self.floor.as_ref().map(|(_, floor)| floor);
        let scan = segment::scan(&bytes, segment::tag(id), start, |head| match floor {
            Some(floor) if floor.entries == head.entries && floor != head => {
                Err(format!("entry {} is not the one that was published", head.entries - 1))
            }
            _ => Ok(()),
        });
        let scan = scan.map_err(|found| damaged(&path, found.offset as u64, found.detail))?;
        Ok(Newest { first, file, bytes, scan })
    }

    fn check_floor(&self, id: LogId, newest: &Newest) -> Result<(), StoreError> {
        let Some((of, floor)) = &self.floor else { return Ok(()) };
        if *of != id {
            return Err(damaged(self.dir, 0, "the published checkpoint is of another log".into()));
        }
        if floor.entries > newest.scan.end.entries {
            let path = self.segments_dir.join(segment::name(newest.first));
            let detail = format!(
                "the log ends here with {} entries, but a checkpoint with {} was published; restore the missing ones from a backup",
                newest.scan.end.entries, floor.entries
            );
            return Err(damaged(&path, newest.scan.data_end as u64, detail));
        }
        Ok(())
    }

    fn report_tail(&mut self, newest: &Newest) {
        let Newest { first, scan, .. } = newest;
        let entries = scan.end.entries;
        if scan.tail == Tail::Torn {
            let place = self.segments_dir.join(segment::name(*first));
            self.repairs.push(format!(
                "a write that was cut off was removed from {} at offset {}; the log goes on with entry {entries}",
                place.display(),
                scan.data_end
            ));
        }
        if self.floor.is_none() && *first > 0 {
            self.repairs.push(format!("the published checkpoint is missing in {}; the log has {entries} entries", self.dir.display()));
        }
    }
}
