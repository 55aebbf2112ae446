//! How a group of entries lies in a segment: one frame.
//!
//! ```text
//! offset  bytes
//!      0      4  "CHF1"
//!      4      8  tag of the log, so that a frame of another log, or an entry that looks like a frame, is never taken for one
//!     12      8  index of the first entry
//!     20      8  epoch after the group
//!     28      4  number of entries, at least 1
//!     32      4  bytes of the table and the entries together
//!     36     32  SHA-256 of the frame before, from its "CHF1" to its last entry; zero in a log's first frame
//!     68      4  CRC-32C of the bytes 0 to 68 and of the table
//!     72    6·n  the table: for each entry its length (2 bytes) and its CRC-32C (4 bytes)
//!             …  the entries, one behind the other
//! ```
//!
//! All numbers are little-endian. The checksums cover every byte, and an entry can be checked without reading its neighbours.

use aws_lc_rs::digest;
use bytes::Bytes;

/// Bytes before the table.
pub(super) const HEADER_BYTES: usize = 72;
/// Bytes of the table for each entry.
pub(super) const ROW_BYTES: usize = 6;
/// How a frame begins; the log's tag follows.
pub(super) const MAGIC: [u8; 4] = *b"CHF1";

const CHECKED_HEADER_BYTES: usize = 68;

/// Which log a frame belongs to.
pub(super) type Tag = [u8; 8];
/// SHA-256 of a frame.
pub(super) type Hash = [u8; 32];

/// What a frame says about itself before its table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) first: u64,
    pub(super) epoch: u64,
    pub(super) count: u32,
    pub(super) payload_bytes: u32,
    pub(super) previous: Hash,
    checksum: u32,
}

impl Header {
    /// Reads the beginning of a frame; nothing if `bytes` do not begin like a frame of the log `tag`. The checksum is not looked at.
    pub(super) fn parse(bytes: &[u8], tag: Tag) -> Option<Self> {
        let (magic, rest) = bytes.split_first_chunk::<4>()?;
        let (of, rest) = rest.split_first_chunk::<8>()?;
        let (first, rest) = rest.split_first_chunk::<8>()?;
        let (epoch, rest) = rest.split_first_chunk::<8>()?;
        let (count, rest) = rest.split_first_chunk::<4>()?;
        let (payload_bytes, rest) = rest.split_first_chunk::<4>()?;
        let (previous, rest) = rest.split_first_chunk::<32>()?;
        let (checksum, _) = rest.split_first_chunk::<4>()?;
        let header = Self {
            first: u64::from_le_bytes(*first),
            epoch: u64::from_le_bytes(*epoch),
            count: u32::from_le_bytes(*count),
            payload_bytes: u32::from_le_bytes(*payload_bytes),
            previous: *previous,
            checksum: u32::from_le_bytes(*checksum),
        };
        let plausible = header.count > 0 && header.table_bytes() < header.payload_bytes as usize && header.first < u64::MAX >> 1;
        (*magic == MAGIC && *of == tag && plausible).then_some(header)
    }

    /// Index of the first entry behind the frame.
    pub(super) fn end(&self) -> u64 {
        self.first + u64::from(self.count)
    }

    pub(super) fn table_bytes(&self) -> usize {
        (self.count as usize).saturating_mul(ROW_BYTES)
    }

    pub(super) fn frame_bytes(&self) -> usize {
        HEADER_BYTES.saturating_add(self.payload_bytes as usize)
    }

    /// Whether header and table are as they were written. `bytes` begin with the frame and hold at least its table.
    pub(super) fn is_sound(&self, bytes: &[u8]) -> bool {
        let (Some(header), Some(table)) =
            (bytes.get(..CHECKED_HEADER_BYTES), bytes.get(HEADER_BYTES..HEADER_BYTES.saturating_add(self.table_bytes())))
        else {
            return false;
        };
        crc32c::crc32c_append(crc32c::crc32c(header), table) == self.checksum
    }
}

/// One row of a frame's table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    pub(super) bytes: usize,
    checksum: u32,
}

impl Row {
    /// Whether `entry` is what was written.
    pub(super) fn fits(&self, entry: &[u8]) -> bool {
        entry.len() == self.bytes && crc32c::crc32c(entry) == self.checksum
    }
}

/// The rows of a `table`.
pub(super) fn rows(table: &[u8]) -> impl Iterator<Item = Row> {
    let (rows, _) = table.as_chunks::<ROW_BYTES>();
    rows.iter()
        .map(|[a, b, c, d, e, f]| Row { bytes: usize::from(u16::from_le_bytes([*a, *b])), checksum: u32::from_le_bytes([*c, *d, *e, *f]) })
}

/// A frame's header if `bytes` begin with a whole frame that is as it was written.
pub(super) fn check(bytes: &[u8], tag: Tag) -> Option<Header> {
    let header = Header::parse(bytes, tag)?;
    let frame = bytes.get(..header.frame_bytes())?;
    if !header.is_sound(frame) {
        return None;
    }
    let (table, mut entries) = frame.get(HEADER_BYTES..)?.split_at_checked(header.table_bytes())?;
    for row in rows(table) {
        let (entry, rest) = entries.split_at_checked(row.bytes)?;
        if !row.fits(entry) {
            return None;
        }
        entries = rest;
    }
    entries.is_empty().then_some(header)
}

/// SHA-256 of a whole frame.
pub(super) fn hash(frame: &[u8]) -> Hash {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest::digest(&digest::SHA256, frame).as_ref());
    hash
}

/// How many bytes the frame of `entries` has.
pub(super) fn encoded_bytes(entries: &[Bytes]) -> usize {
    HEADER_BYTES + entries.iter().map(|entry| ROW_BYTES + entry.len()).sum::<usize>()
}

/// What a group's frame says besides its entries.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) tag: Tag,
    pub(super) first: u64,
    pub(super) epoch: u64,
    pub(super) previous: Hash,
}

/// Writes the frame of `entries` into `buffer`, in place of what was there. Each entry has at most 65,535 bytes, and all together less than
/// 4 GiB; the caller has checked that.
pub(super) fn encode(buffer: &mut Vec<u8>, place: &Place, entries: &[Bytes]) {
    buffer.clear();
    let frame_bytes = encoded_bytes(entries);
    buffer.reserve(frame_bytes);
    buffer.extend_from_slice(&MAGIC);
    buffer.extend_from_slice(&place.tag);
    buffer.extend_from_slice(&place.first.to_le_bytes());
    buffer.extend_from_slice(&place.epoch.to_le_bytes());
    buffer.extend_from_slice(&u32::try_from(entries.len()).unwrap_or(u32::MAX).to_le_bytes());
    buffer.extend_from_slice(&u32::try_from(frame_bytes - HEADER_BYTES).unwrap_or(u32::MAX).to_le_bytes());
    buffer.extend_from_slice(&place.previous);
    buffer.extend_from_slice(&[0; 4]);
    for entry in entries {
        buffer.extend_from_slice(&u16::try_from(entry.len()).unwrap_or(u16::MAX).to_le_bytes());
        buffer.extend_from_slice(&crc32c::crc32c(entry).to_le_bytes());
    }
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&buffer[..CHECKED_HEADER_BYTES]), &buffer[HEADER_BYTES..]);
    buffer[CHECKED_HEADER_BYTES..HEADER_BYTES].copy_from_slice(&checksum.to_le_bytes());
    for entry in entries {
        buffer.extend_from_slice(entry);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place = Place { tag: *b"12345678", first: 7, epoch: 3, previous: [9; 32] };

    fn encoded() -> Vec<u8> {
        let mut buffer = Vec::new();
        encode(&mut buffer, &PLACE, &[Bytes::from_static(b"one"), Bytes::from_static(b"two, longer")]);
        buffer
    }

    #[test]
    fn a_frame_says_what_was_written() {
        let frame = encoded();
        let header = check(&frame, PLACE.tag).unwrap();
        assert_eq!((header.first, header.end(), header.epoch, header.previous), (7, 9, 3, [9; 32]));
        assert_eq!(header.frame_bytes(), frame.len());
    }

    #[test]
    fn every_flipped_bit_and_every_missing_byte_is_noticed() {
        let frame = encoded();
        for at in 0..frame.len() {
            for bit in 0..8 {
                let mut flipped = frame.clone();
                flipped[at] ^= 1 << bit;
                assert_eq!(check(&flipped, PLACE.tag), None, "bit {bit} of byte {at}");
            }
            assert_eq!(check(&frame[..at], PLACE.tag), None, "{at} bytes");
        }
    }

    #[test]
    fn a_frame_of_another_log_is_none() {
        assert_eq!(check(&encoded(), *b"87654321"), None);
    }
}
