//! The log's one writer: appends groups, each durable before the next is written, and goes on to a new segment when one is full.
//!
//! **A full disk** is met before anything is written: the room of a segment is allocated when it is created, and the next segment, the
//! `spare`, is created in advance. While there is no spare and no room for one, ordinary groups stop a little before the end of the open
//! segment ([`Layout::act_reserve_bytes`]), so that acts still fit. A refused group changes nothing, and each later one tries again.
//!
//! **A failed sync** (or write) ends the writer: what it covered is in doubt, a retry may claim success with the data lost. So the file is
//! never written again, and everything later is refused; the next opening copies the open segment to a new file ([`super::recovery`]).

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tracing::warn;

use super::checkpoint::Checkpoints;
use super::files::{LogFile, LogFiles};
use super::frame::{self, Place};
use super::reader::Segments;
use super::segment::{self, LogId, Seal};
use super::{failed_in, is_full, remove_if_there};
use crate::store::{Group, Head, MAX_ENTRY_BYTES, MAX_GROUP_BYTES, MAX_GROUP_ENTRIES, StoreError};

const SPARE: &str = "spare";

/// Sizes of a log's files.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// Size of a new segment.
    pub(super) segment_bytes: u64,
    /// How much of a segment's end only acts may fill while there is no spare.
    pub(super) act_reserve_bytes: u64,
}

/// The log, open for writing.
#[derive(Debug)]
pub(super) struct Log {
    segments: Arc<Segments>,
    checkpoints: Arc<Checkpoints>,
    spares: Spares,
    id: LogId,
    layout: Layout,
    head: Head,
    /// The open segment.
    file: Arc<dyn LogFile>,
    /// With which entry it begins.
    first: u64,
    /// Its allocated length.
    size: u64,
    /// Where the next frame goes.
    data_end: u64,
    /// The frame being written.
    buffer: Vec<u8>,
    /// Why nothing can be written any more.
    failed: Option<StoreError>,
}

/// The open segment, as opening found or made it.
#[derive(Debug)]
pub(super) struct OpenSegment {
    pub(super) file: Arc<dyn LogFile>,
    pub(super) first: u64,
    pub(super) data_end: u64,
}

impl Log {
    /// Goes on behind what `segments` holds.
    pub(super) fn new(
        segments: Arc<Segments>,
        checkpoints: Arc<Checkpoints>,
        mut spares: Spares,
        id: LogId,
        layout: Layout,
        open: OpenSegment,
    ) -> Result<Self, StoreError> {
        let OpenSegment { file, first, data_end } = open;
        let size = file.length().map_err(failed_in(&segments.dir.join(segment::name(first))))?;
        spares.prepare();
        let head = segments.head();
        Ok(Self { segments, checkpoints, spares, id, layout, head, file, first, size, data_end, buffer: Vec::new(), failed: None })
    }

    /// What tells it from every other log.
    pub(super) fn id(&self) -> LogId {
        self.id
    }

    /// What readers share with this writer.
    pub(super) fn segments(&self) -> &Arc<Segments> {
        &self.segments
    }

    /// Where the floor is written.
    pub(super) fn checkpoints(&self) -> &Arc<Checkpoints> {
        &self.checkpoints
    }

    /// Why nothing can be written any more, if so.
    pub(super) fn failure(&self) -> Option<&StoreError> {
        self.failed.as_ref()
    }

    /// Appends `group` behind `expected` and syncs it.
    pub(super) fn append(&mut self, expected: &Head, group: &Group) -> Result<Head, StoreError> {
        if let Some(failure) = &self.failed {
            return Err(failure.clone());
        }
        if self.head != *expected {
            return Err(StoreError::HeadMoved(self.head));
        }
        self.check(group)?;
        let epoch = self.head.epoch + u64::from(group.raises_epoch);
        let place = Place { tag: segment::tag(self.id), first: self.head.entries, epoch, previous: self.head.frame };
        frame::encode(&mut self.buffer, &place, &group.entries);
        self.make_room(group.raises_epoch)?;
        match self.file.write_at(&self.buffer, self.data_end) {
            // Nothing was synced, and the next frame is written over whatever part of this one is there.
            Err(error) if is_full(&error) => return Err(self.spares.full(self.buffer.len() as u64)),
            result => result.map_err(|error| self.fail(&error))?,
        }
        self.file.sync_data().map_err(|error| self.fail(&error))?;
        self.segments.syncs.fetch_add(1, Ordering::Relaxed);
        let frame = frame::hash(&self.buffer);
        self.head = Head { entries: self.head.entries + group.entries.len() as u64, epoch, frame };
        self.segments.advance(self.head, self.data_end);
        self.data_end += self.buffer.len() as u64;
        Ok(self.head)
    }

    /// Allocates the next segment, if there is none and room for it.
    pub(super) fn prepare(&mut self) -> Result<(), StoreError> {
        match &self.failed {
            Some(failure) => Err(failure.clone()),
            None => self.spares.ensure(),
        }
    }

    /// Makes the head the floor, and notes that nothing is in doubt.
    pub(super) fn close(self) -> Result<(), StoreError> {
        if self.failed.is_some() {
            return Ok(());
        }
        self.checkpoints.publish(&self.head)?;
        self.checkpoints.close(&self.head)
    }

    fn check(&self, group: &Group) -> Result<(), StoreError> {
        let count = group.entries.len();
        if count == 0 || count > MAX_GROUP_ENTRIES {
            return Err(StoreError::Invalid(format!("a group of {count} entries: it may have 1 to {MAX_GROUP_ENTRIES}")));
        }
        if let Some(entry) = group.entries.iter().find(|entry| entry.is_empty() || entry.len() > MAX_ENTRY_BYTES) {
            let detail = format!("an entry of {} bytes: it may have 1 to {MAX_ENTRY_BYTES}", entry.len());
            return Err(StoreError::Invalid(detail));
        }
        let bytes = frame::encoded_bytes(&group.entries) as u64;
        let room = room_end(self.layout.segment_bytes) - segment::HEADER_BYTES as u64;
        let most = room.min((MAX_GROUP_BYTES + frame::HEADER_BYTES + MAX_GROUP_ENTRIES * frame::ROW_BYTES) as u64);
        if bytes > most {
            return Err(StoreError::Invalid(format!("a group of {bytes} bytes, but at most {most} fit; split it")));
        }
        Ok(())
    }

    /// Sees to it that the frame in the buffer fits behind `data_end`, before a byte of it is written.
    fn make_room(&mut self, is_act: bool) -> Result<(), StoreError> {
        let frame_bytes = self.buffer.len() as u64;
        if self.data_end + frame_bytes > room_end(self.size) {
            self.spares.ensure()?;
            self.roll()?;
        }
        let reserved_from = room_end(self.size).saturating_sub(self.layout.act_reserve_bytes);
        if !is_act && self.data_end + frame_bytes > reserved_from {
            self.spares.ensure()?;
        }
        Ok(())
    }

    /// Seals the open segment and turns the spare into the next one. An error ends the writer: how far it came is in doubt.
    fn roll(&mut self) -> Result<(), StoreError> {
        self.seal().map_err(|error| self.fail(&error))?;
        let header = segment::encode_header(self.id, &self.head);
        let file = self.spares.install(&header, self.head.entries).map_err(|error| self.fail(&error))?;
        self.size = file.length().map_err(|error| self.fail(&error))?;
        self.segments.roll(file.clone());
        self.file = file;
        self.first = self.head.entries;
        self.data_end = segment::HEADER_BYTES as u64;
        if let Err(error) = self.checkpoints.publish(&self.head) {
            warn!(%error, "the checkpoint was not moved on to the new segment");
        }
        self.spares.prepare();
        Ok(())
    }

    fn seal(&mut self) -> io::Result<()> {
        let seal = Seal { end: self.head, data_end: self.data_end, points: self.segments.points() };
        let bytes = seal.encode(segment::tag(self.id), self.first);
        self.file.write_at(&bytes, self.data_end)?;
        self.file.set_len(self.data_end + bytes.len() as u64)?;
        self.file.sync_all()
    }

    fn fail(&mut self, error: &io::Error) -> StoreError {
        let place = self.segments.dir.join(segment::name(self.first)).display().to_string();
        let failure = StoreError::NotDurable { place, detail: error.to_string() };
        self.failed = Some(failure.clone());
        failure
    }
}

/// Where the frames of a segment of `size` bytes end at the latest.
fn room_end(size: u64) -> u64 {
    size.saturating_sub(segment::seal_bytes(size))
}

/// Makes segments: allocated in advance under another name, so that a segment that has its name is complete.
#[derive(Debug)]
pub(super) struct Spares {
    files: Arc<dyn LogFiles>,
    dir: PathBuf,
    bytes: u64,
    ready: Option<Arc<dyn LogFile>>,
}

impl Spares {
    /// For segments of `bytes` in `dir`. What an earlier process left is removed: it may have been written to.
    pub(super) fn new(files: Arc<dyn LogFiles>, dir: PathBuf, bytes: u64) -> Result<Self, StoreError> {
        let path = dir.join(SPARE);
        remove_if_there(files.as_ref(), &path).map_err(failed_in(&path))?;
        Ok(Self { files, dir, bytes, ready: None })
    }

    /// Allocates a spare of at least `bytes` if there is none.
    pub(super) fn ensure_of(&mut self, bytes: u64) -> Result<(), StoreError> {
        if self.ready.is_some() {
            return Ok(());
        }
        let bytes = bytes.max(self.bytes);
        let path = self.dir.join(SPARE);
        let allocated = self.allocate(&path, bytes);
        if allocated.is_err() {
            // A part of it may be allocated, and whatever else is on the disk needs that room.
            let _ = self.files.remove(&path);
        }
        match allocated {
            Err(error) if is_full(&error) => Err(self.full(bytes)),
            Err(error) => Err(failed_in(&path)(error)),
            Ok(file) => {
                self.ready = Some(file);
                Ok(())
            }
        }
    }

    fn ensure(&mut self) -> Result<(), StoreError> {
        self.ensure_of(self.bytes)
    }

    fn allocate(&self, path: &Path, bytes: u64) -> io::Result<Arc<dyn LogFile>> {
        remove_if_there(self.files.as_ref(), path)?;
        let file = self.files.create(path)?;
        file.preallocate(bytes)?;
        Ok(file)
    }

    /// Allocates the spare ahead of need; without it the log goes on for a while.
    fn prepare(&mut self) {
        if let Err(error) = self.ensure() {
            warn!(%error, "no room for the next segment of the ledger");
        }
    }

    /// Turns the spare into the segment that begins with the entry `first` and has `content`, durably, in place of one of that name.
    pub(super) fn install(&mut self, content: &[u8], first: u64) -> io::Result<Arc<dyn LogFile>> {
        let file = self.ready.take().ok_or_else(|| io::Error::other("no segment was prepared"))?;
        file.write_at(content, 0)?;
        file.sync_all()?;
        self.files.rename(&self.dir.join(SPARE), &self.dir.join(segment::name(first)))?;
        self.files.sync_dir(&self.dir)?;
        Ok(file)
    }

    fn full(&self, needed: u64) -> StoreError {
        let left = self.files.available(&self.dir).map_or_else(|error| error.to_string(), |bytes| format!("{bytes} bytes"));
        StoreError::Full { place: self.dir.display().to_string(), detail: format!("{needed} bytes needed, {left} left") }
    }
}
