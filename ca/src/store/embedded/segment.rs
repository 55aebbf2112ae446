//! One file of the log: a header, frames, and, once it is full, a seal.
//!
//! ```text
//! header, 80 bytes                          seal, at the very end of a full segment
//!  0   8  "CHANLOG1"                         0  8·n  the table: index behind the segment's first (4), offset (4)
//!  8  16  ID of the log, random              +   8  "CHANSEAL"
//! 24   8  index of the first entry           +   8  tag of the log
//! 32   8  epoch before it                    +   8  index of the next segment's first entry
//! 40  32  hash of the frame before           +   8  epoch after the last frame
//! 72   4  zero                               +  32  hash of the last frame
//! 76   4  CRC-32C of the bytes 0 to 76       +   8  offset behind the last frame
//!                                            +   4  rows of the table
//!                                            +   4  CRC-32C of all that
//! ```
//!
//! All numbers are little-endian. The tag in frames and seals is the first half of the log's ID. A segment's name is the index of its first
//! entry, in 20 digits. Behind the last frame of the segment that is still open there are only zeros. The table in the seal names about one
//! frame in every 16 KiB, so that an entry is found without reading the segment.

use super::frame::{self, Header, Tag};
use crate::store::Head;

/// Bytes of a segment's header.
pub(super) const HEADER_BYTES: usize = 80;
/// Bytes of a seal behind its table.
pub(super) const TRAILER_BYTES: usize = 80;
/// How far apart, in bytes, the frames are that can be found directly.
pub(super) const STRIDE: u64 = 16 << 10;

const MAGIC: [u8; 8] = *b"CHANLOG1";
const SEAL_MAGIC: [u8; 8] = *b"CHANSEAL";
const SUFFIX: &str = ".segment";

/// A log's random ID.
pub(super) type LogId = [u8; 16];

/// The part of a log's ID that its frames carry.
pub(super) fn tag(id: LogId) -> Tag {
    let mut tag = [0; 8];
    tag.copy_from_slice(&id[..8]);
    tag
}

/// The file name of the segment that begins with the entry `first`.
pub(super) fn name(first: u64) -> String {
    format!("{first:020}{SUFFIX}")
}

/// With which entry the segment of that file name begins; nothing if it is another file.
pub(super) fn first_of(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(SUFFIX)?;
    (digits.len() == 20 && digits.bytes().all(|digit| digit.is_ascii_digit())).then(|| digits.parse().ok())?
}

/// The header of a segment that begins at `start`.
pub(super) fn encode_header(id: LogId, start: &Head) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(&MAGIC);
    header[8..24].copy_from_slice(&id);
    header[24..32].copy_from_slice(&start.entries.to_le_bytes());
    header[32..40].copy_from_slice(&start.epoch.to_le_bytes());
    header[40..72].copy_from_slice(&start.frame);
    let checksum = crc32c::crc32c(&header[..76]);
    header[76..].copy_from_slice(&checksum.to_le_bytes());
    header
}

/// Which log a segment belongs to, and where it begins; nothing if `bytes` do not begin with an intact header.
pub(super) fn parse_header(bytes: &[u8]) -> Option<(LogId, Head)> {
    let header: &[u8; HEADER_BYTES] = bytes.first_chunk()?;
    if header[..8] != MAGIC || crc32c::crc32c(&header[..76]).to_le_bytes() != header[76..] {
        return None;
    }
    let id = header[8..24].try_into().ok()?;
    let entries = u64::from_le_bytes(header[24..32].try_into().ok()?);
    let epoch = u64::from_le_bytes(header[32..40].try_into().ok()?);
    Some((id, Head { entries, epoch, frame: header[40..72].try_into().ok()? }))
}

/// Where a frame begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Point {
    /// Index of its first entry.
    pub(super) index: u64,
    /// Offset in the segment.
    pub(super) offset: u64,
}

/// Some of the frames of one segment, at least one in every [`STRIDE`] bytes, in order.
#[derive(Clone, Debug, Default)]
pub(super) struct Points(Vec<Point>);

impl Points {
    /// Notes a frame behind those before, if it is far enough from the last one noted.
    pub(super) fn note(&mut self, point: Point) {
        if self.0.last().is_none_or(|last| point.offset >= last.offset + STRIDE) {
            self.0.push(point);
        }
    }

    /// The last frame noted that begins at or before the entry `index`.
    pub(super) fn before(&self, index: u64) -> Option<Point> {
        self.0.get(self.0.partition_point(|point| point.index <= index).checked_sub(1)?).copied()
    }
}

/// The end of a full segment.
#[derive(Clone, Debug)]
pub(super) struct Seal {
    /// Where the log stands behind the segment.
    pub(super) end: Head,
    /// Offset behind the last frame.
    pub(super) data_end: u64,
    /// Where frames begin.
    pub(super) points: Points,
}

/// The most bytes that the seal of a segment of `segment_bytes` has.
pub(super) fn seal_bytes(segment_bytes: u64) -> u64 {
    TRAILER_BYTES as u64 + 8 * (segment_bytes / STRIDE + 1)
}

impl Seal {
    /// The bytes of the seal of a segment that begins with the entry `first`. Segments are smaller than 4 GiB, and so are their numbers.
    pub(super) fn encode(&self, tag: Tag, first: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.points.0.len() * 8 + TRAILER_BYTES);
        for point in &self.points.0 {
            bytes.extend_from_slice(&u32::try_from(point.index - first).unwrap_or(u32::MAX).to_le_bytes());
            bytes.extend_from_slice(&u32::try_from(point.offset).unwrap_or(u32::MAX).to_le_bytes());
        }
        bytes.extend_from_slice(&SEAL_MAGIC);
        bytes.extend_from_slice(&tag);
        bytes.extend_from_slice(&self.end.entries.to_le_bytes());
        bytes.extend_from_slice(&self.end.epoch.to_le_bytes());
        bytes.extend_from_slice(&self.end.frame);
        bytes.extend_from_slice(&self.data_end.to_le_bytes());
        bytes.extend_from_slice(&u32::try_from(self.points.0.len()).unwrap_or(u32::MAX).to_le_bytes());
        let checksum = crc32c::crc32c(&bytes);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// How many bytes the table has before this trailer, the last [`TRAILER_BYTES`] of a segment; nothing if it is none.
    pub(super) fn table_bytes(trailer: &[u8; TRAILER_BYTES]) -> Option<u64> {
        let rows = u32::from_le_bytes(trailer[72..76].try_into().ok()?);
        trailer.starts_with(&SEAL_MAGIC).then_some(u64::from(rows) * 8)
    }

    /// Reads a seal of the log `tag`, table and trailer, of a segment that begins with the entry `first`; nothing if it is not intact.
    pub(super) fn parse(bytes: &[u8], tag: Tag, first: u64) -> Option<Self> {
        let (table, trailer) = bytes.split_last_chunk::<TRAILER_BYTES>()?;
        let (checked, checksum) = bytes.split_last_chunk::<4>()?;
        let intact = crc32c::crc32c(checked).to_le_bytes() == *checksum
            && trailer.starts_with(&SEAL_MAGIC)
            && trailer[8..16] == tag
            && Self::table_bytes(trailer)? == table.len() as u64;
        if !intact {
            return None;
        }
        let (rows, _) = table.as_chunks::<8>();
        let points = rows.iter().map(|[a, b, c, d, e, f, g, h]| Point {
            index: first + u64::from(u32::from_le_bytes([*a, *b, *c, *d])),
            offset: u64::from(u32::from_le_bytes([*e, *f, *g, *h])),
        });
        let end = Head {
            entries: u64::from_le_bytes(trailer[16..24].try_into().ok()?),
            epoch: u64::from_le_bytes(trailer[24..32].try_into().ok()?),
            frame: trailer[32..64].try_into().ok()?,
        };
        Some(Self { end, data_end: u64::from_le_bytes(trailer[64..72].try_into().ok()?), points: Points(points.collect()) })
    }
}

/// What reading the frames of a segment from its beginning found.
#[derive(Debug)]
pub(super) struct Scan {
    /// Where the log stands behind the last good frame.
    pub(super) end: Head,
    /// Offset behind the last good frame.
    pub(super) data_end: usize,
    /// Where frames begin.
    pub(super) points: Points,
    /// What follows the last good frame.
    pub(super) tail: Tail,
}

/// What follows the last good frame of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tail {
    /// Nothing, or the zeros that were allocated.
    Empty,
    /// A seal that was written, though no segment follows.
    Sealed,
    /// Bytes that are no frame, and no frame after them: a write that was cut off.
    Torn,
}

/// Something that contradicts the rest of the log.
#[derive(Debug)]
pub(super) struct Break {
    /// Offset in the segment.
    pub(super) offset: usize,
    /// What does not fit.
    pub(super) detail: String,
}

/// Follows the frames in `segment`, which begins at `start`. `at_frame` is told where the log stands behind each.
pub(super) fn scan(segment: &[u8], tag: Tag, start: Head, mut at_frame: impl FnMut(&Head) -> Result<(), String>) -> Result<Scan, Break> {
    let mut found = Scan { end: start, data_end: HEADER_BYTES, points: Points::default(), tail: Tail::Empty };
    loop {
        let offset = found.data_end;
        let rest = segment.get(offset..).unwrap_or_default();
        let Some(header) = frame::check(rest, tag) else {
            found.tail = judge_tail(rest, tag, &found).map_err(|(behind, detail)| Break { offset: offset + behind, detail })?;
            return Ok(found);
        };
        let head = follow(&found.end, &header, rest).map_err(|detail| Break { offset, detail })?;
        at_frame(&head).map_err(|detail| Break { offset, detail })?;
        found.points.note(Point { index: header.first, offset: offset as u64 });
        found.end = head;
        found.data_end += header.frame_bytes();
    }
}

/// Where the log stands behind the intact frame at the beginning of `bytes`, if it is the one that follows `end`.
pub(super) fn follow(end: &Head, header: &Header, bytes: &[u8]) -> Result<Head, String> {
    if header.first != end.entries {
        return Err(format!("the frame begins with entry {}, but entry {} is due", header.first, end.entries));
    }
    if header.previous != end.frame {
        return Err(format!("the frame with entry {} does not follow the frame before it", header.first));
    }
    if header.epoch != end.epoch && header.epoch != end.epoch + 1 {
        return Err(format!("the frame with entry {} has epoch {} after {}", header.first, header.epoch, end.epoch));
    }
    let frame = bytes.get(..header.frame_bytes()).unwrap_or(bytes);
    Ok(Head { entries: header.end(), epoch: header.epoch, frame: frame::hash(frame) })
}

/// Judges what follows the last good frame. Each frame is synced before the next one is written; so a frame further on proves that the one
/// that should be here was durable once, and was damaged since.
fn judge_tail(rest: &[u8], tag: Tag, found: &Scan) -> Result<Tail, (usize, String)> {
    if is_zero(rest) {
        return Ok(Tail::Empty);
    }
    if let Some(behind) = find_frame(rest, tag, found.end.entries) {
        let detail = format!("no intact frame with entry {} here, though later ones follow {behind} bytes further on", found.end.entries);
        return Err((0, detail));
    }
    let seal = Seal { end: found.end, data_end: found.data_end as u64, points: found.points.clone() };
    let first = found.points.0.first().map_or(found.end.entries, |point| point.index);
    let seal = seal.encode(tag, first);
    let sealed = rest.strip_prefix(seal.as_slice()).is_some_and(is_zero);
    Ok(if sealed { Tail::Sealed } else { Tail::Torn })
}

/// The offset of the first frame of a later group than the one with the entry `index`, anywhere in `bytes`.
fn find_frame(bytes: &[u8], tag: Tag, index: u64) -> Option<usize> {
    let mut at = 0;
    while let Some(step) = bytes.get(at..)?.iter().position(|byte| *byte == frame::MAGIC[0]) {
        at += step;
        let candidate = &bytes[at..];
        if Header::parse(candidate, tag).is_some_and(|header| header.first > index && header.is_sound(candidate)) {
            return Some(at);
        }
        at += 1;
    }
    None
}

fn is_zero(bytes: &[u8]) -> bool {
    const ZEROS: [u8; 4096] = [0; 4096];
    bytes.chunks(ZEROS.len()).all(|chunk| chunk == &ZEROS[..chunk.len()])
}
