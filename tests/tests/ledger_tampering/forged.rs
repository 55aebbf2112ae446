//! What somebody writes who knows how entries lie in a segment (`ca/src/store/embedded/frame.rs`) and a segment in a backup: each frame's
//! checksums, its hash in the next one, and the backup's digests are made to fit again.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use aws_lc_rs::digest::{SHA256, digest};
use serde_json::Value;

const SEGMENT_HEADER_BYTES: usize = 80;
const HEADER_BYTES: usize = 72;
const ROW_BYTES: usize = 6;

/// Entries that were recorded together.
struct Group {
    epoch: [u8; 8],
    entries: Vec<Vec<u8>>,
}

/// The segment with the entries that `change` makes of its own.
pub(crate) fn segment(bytes: &[u8], change: impl FnOnce(&mut Vec<Vec<u8>>)) -> Vec<u8> {
    let (header, mut rest) = bytes.split_at(SEGMENT_HEADER_BYTES);
    let mut groups = Vec::new();
    while rest.starts_with(b"CHF1") {
        let payload = u32::from_le_bytes(rest[32..36].try_into().unwrap()) as usize;
        let (frame, behind) = rest.split_at(HEADER_BYTES + payload);
        groups.push(group(frame));
        rest = behind;
    }
    let sizes: Vec<usize> = groups.iter().map(|group| group.entries.len()).collect();
    let mut entries = groups.iter_mut().flat_map(|group| std::mem::take(&mut group.entries)).collect();
    change(&mut entries);
    // As many in each group as there were, and the last one has the difference.
    let mut entries = entries.into_iter();
    for (group, size) in groups.iter_mut().zip(sizes) {
        group.entries = entries.by_ref().take(size).collect();
    }
    groups.last_mut().unwrap().entries.extend(entries);
    groups.retain(|group| !group.entries.is_empty());

    let mut written = header.to_vec();
    let (mut first, mut previous) = (u64::from_le_bytes(header[24..32].try_into().unwrap()), header[40..72].to_vec());
    for group in groups {
        let frame = group.frame(&header[8..16], first, &previous);
        first += group.entries.len() as u64;
        previous = digest(&SHA256, &frame).as_ref().to_vec();
        written.extend(frame);
    }
    // What was allocated.
    if rest.iter().all(|byte| *byte == 0) {
        written.resize(written.len().max(bytes.len()), 0);
    }
    written
}

fn group(frame: &[u8]) -> Group {
    let count = u32::from_le_bytes(frame[28..32].try_into().unwrap()) as usize;
    let (table, mut rest) = frame[HEADER_BYTES..].split_at(count * ROW_BYTES);
    let mut entries = Vec::new();
    for row in table.chunks_exact(ROW_BYTES) {
        let (entry, behind) = rest.split_at(usize::from(u16::from_le_bytes([row[0], row[1]])));
        entries.push(entry.to_vec());
        rest = behind;
    }
    Group { epoch: frame[20..28].try_into().unwrap(), entries }
}

impl Group {
    fn frame(&self, tag: &[u8], first: u64, previous: &[u8]) -> Vec<u8> {
        let row = |entry: &Vec<u8>| {
            let length = u16::try_from(entry.len()).unwrap();
            [&length.to_le_bytes()[..], &crc32c::crc32c(entry).to_le_bytes()].concat()
        };
        let (table, entries) = (self.entries.iter().map(row).collect::<Vec<_>>().concat(), self.entries.concat());
        let (count, payload) = (u32::try_from(self.entries.len()).unwrap(), u32::try_from(table.len() + entries.len()).unwrap());
        let numbers = [&count.to_le_bytes()[..], &payload.to_le_bytes()].concat();
        let checked = [&b"CHF1"[..], tag, &first.to_le_bytes(), &self.epoch, &numbers, previous].concat();
        let checksum = crc32c::crc32c_append(crc32c::crc32c(&checked), &table);
        [&checked[..], &checksum.to_le_bytes(), &table, &entries].concat()
    }
}

/// Puts the entries that `change` makes of its own into the backup at `path`, which has one segment.
pub(crate) fn backup(path: &Path, change: impl FnOnce(&mut Vec<Vec<u8>>)) {
    let mut members: Vec<(String, Vec<u8>)> = Vec::new();
    for member in tar::Archive::new(File::open(path).unwrap()).entries().unwrap() {
        let mut member = member.unwrap();
        let mut bytes = Vec::new();
        member.read_to_end(&mut bytes).unwrap();
        members.push((member.path().unwrap().to_str().unwrap().to_owned(), bytes));
    }
    let log = members.iter_mut().find(|(name, _)| name.starts_with("ledger/log/")).unwrap();
    let mut count = 0;
    log.1 = segment(&log.1, |entries| {
        change(entries);
        count = entries.len();
    });
    let mut info: Value = serde_json::from_slice(&members[0].1).unwrap();
    info["entries"] = count.into();
    members[0].1 = info.to_string().into_bytes();
    members.pop();
    let sum = |(name, bytes): &(String, Vec<u8>)| format!("{}  {name}\n", crate::hex(digest(&SHA256, bytes).as_ref()));
    members.push(("SHA256SUMS".to_owned(), members.iter().map(sum).collect::<String>().into_bytes()));

    let mut tar = tar::Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Regular);
        header.set_size(bytes.len() as u64);
        tar.append_data(&mut header, name, &bytes[..]).unwrap();
    }
    fs::write(path, tar.into_inner().unwrap()).unwrap();
}
