//! What the log does with a damaged, cut, full or failing disk, case by case.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::faulty::FaultyFiles;
use super::log::{Layout, Log};
use super::{recovery, segment};
use crate::store::{Group, Head, StoreError};

const DIR: &str = "/ledger";
const LAYOUT: Layout = Layout { segment_bytes: 8192, act_reserve_bytes: 1024 };
/// An entry of this size, alone in its group, makes a frame of 500 bytes.
const ENTRY: usize = 500 - super::frame::HEADER_BYTES - super::frame::ROW_BYTES;

fn open(disk: &FaultyFiles) -> Result<(Log, Vec<String>), StoreError> {
    recovery::open(Arc::new(disk.clone()), Path::new(DIR), LAYOUT)
}

fn open_clean(disk: &FaultyFiles) -> Log {
    let (log, repairs) = open(disk).unwrap();
    assert_eq!(repairs, Vec::<String>::new());
    log
}

fn head(log: &Log) -> Head {
    log.segments().head()
}

fn try_append(log: &mut Log, is_act: bool) -> Result<Head, StoreError> {
    let head = head(log);
    let entry = format!("{:<ENTRY$}", head.entries);
    log.append(&head, &Group { entries: vec![Bytes::from(entry)], raises_epoch: is_act })
}

fn append(log: &mut Log, groups: usize) -> Head {
    for _ in 0..groups {
        try_append(log, false).unwrap();
    }
    head(log)
}

fn path(first: u64) -> PathBuf {
    Path::new(DIR).join("log").join(segment::name(first))
}

/// Where the frame of the entry `index` begins in the first segment.
fn offset(index: usize) -> usize {
    segment::HEADER_BYTES + 500 * index
}

fn check_all(log: &Log) {
    let head = head(log);
    let entries = log.segments().read(0..head.entries, usize::MAX).unwrap();
    for (index, entry) in entries.iter().enumerate() {
        assert_eq!(std::str::from_utf8(entry).unwrap().trim(), index.to_string());
    }
    assert_eq!(entries.len() as u64, head.entries);
}

#[track_caller]
fn assert_damaged(result: Result<(Log, Vec<String>), StoreError>, place: &Path, offset: usize, detail: &str) {
    match result.map(|(log, repairs)| (head(&log), repairs)) {
        Err(StoreError::Damaged { place: found, detail: said }) => {
            assert_eq!(found, format!("{}, offset {offset}", place.display()));
            assert!(said.contains(detail), "{said}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_torn_tail_is_cut_and_reported() {
    for torn in [1, 60, 80, 499] {
        let disk = FaultyFiles::new(1);
        let kept = append(&mut open_clean(&disk), 3);
        disk.tamper(&path(0), |bytes| bytes.truncate(offset(3)));
        let mut log = open_clean(&disk);
        append(&mut log, 1);
        drop(log);
        disk.tamper(&path(0), |bytes| bytes.truncate(offset(3) + torn));
        let (mut log, repairs) = open(&disk).unwrap();
        assert!(repairs.len() == 1 && repairs[0].contains(&format!("offset {}", offset(3))), "{repairs:?}");
        assert_eq!(head(&log), kept);
        append(&mut log, 2);
        drop(log);
        check_all(&open_clean(&disk));
    }
}

#[test]
fn a_flipped_byte_in_the_last_frame_is_a_torn_tail_too() {
    let disk = FaultyFiles::new(1);
    let mut log = open_clean(&disk);
    let kept = append(&mut log, 3);
    append(&mut log, 1);
    disk.tamper(&path(0), |bytes| bytes[offset(3) + 200] ^= 0x40);
    let (log, repairs) = open(&disk).unwrap();
    assert_eq!((head(&log), repairs.len()), (kept, 1));
}

#[test]
fn a_flipped_byte_in_the_middle_stops_the_opening_with_the_place_named() {
    for at in [0, 5, 30, 69, 75, 300] {
        let disk = FaultyFiles::new(1);
        append(&mut open_clean(&disk), 8);
        disk.tamper(&path(0), |bytes| bytes[offset(5) + at] ^= 0x40);
        assert_damaged(open(&disk), &path(0), offset(5), "no intact frame with entry 5 here");
        assert_damaged(open(&disk), &path(0), offset(5), "no intact frame with entry 5 here");
    }
}

#[test]
fn a_lost_sector_in_the_middle_stops_the_opening() {
    let disk = FaultyFiles::new(1);
    append(&mut open_clean(&disk), 8);
    disk.tamper(&path(0), |bytes| bytes[offset(5)..offset(6)].fill(0));
    assert_damaged(open(&disk), &path(0), offset(5), "later ones follow");
}

#[test]
fn a_log_cut_below_its_published_checkpoint_is_refused() {
    let disk = FaultyFiles::new(1);
    let mut log = open_clean(&disk);
    let published = append(&mut log, 4);
    log.checkpoints().publish(&published).unwrap();
    append(&mut log, 1);
    drop(log);
    disk.tamper(&path(0), |bytes| bytes.truncate(offset(4)));
    assert_eq!(head(&open_clean(&disk)), published, "the checkpoint itself is enough");
    disk.tamper(&path(0), |bytes| bytes.truncate(offset(3) + 10));
    assert_damaged(open(&disk), &path(0), offset(3), "a checkpoint with 4 was published");
}

#[test]
fn a_log_without_segments_below_its_published_checkpoint_is_refused() {
    let disk = FaultyFiles::new(1);
    let mut log = open_clean(&disk);
    append(&mut log, 1);
    log.close().unwrap();
    super::files::LogFiles::remove(&disk, &path(0)).unwrap();
    assert_damaged(open(&disk), &Path::new(DIR).join("log"), 0, "a checkpoint with 1 entries was published");
}

#[test]
fn sealed_segments_chain() {
    let disk = FaultyFiles::new(1);
    let mut log = open_clean(&disk);
    append(&mut log, 60);
    let firsts = log.segments().firsts();
    assert!(firsts.len() > 3, "{firsts:?}");
    check_all(&log);
    drop(log);
    let log = open_clean(&disk);
    assert_eq!(log.segments().firsts(), firsts);
    check_all(&log);
    drop(log);

    let second = path(firsts[1]);
    let sealed = disk.content(&second).unwrap().len();
    disk.tamper(&second, |bytes| bytes[30] ^= 0x40);
    assert_damaged(open(&disk), &second, 0, "header is not intact");
    disk.tamper(&second, |bytes| bytes[30] ^= 0x40);
    disk.tamper(&second, |bytes| bytes[sealed - 10] ^= 0x40);
    assert_damaged(open(&disk), &second, sealed, "does not end with an intact seal");
    disk.tamper(&second, |bytes| bytes[sealed - 10] ^= 0x40);
    super::files::LogFiles::remove(&disk, &second).unwrap();
    assert_damaged(open(&disk), &path(firsts[2]), 0, "does not follow the one before");
}

#[test]
fn scrubbing_finds_damage_in_a_sealed_segment_that_opening_does_not_read() {
    let disk = FaultyFiles::new(1);
    let mut log = open_clean(&disk);
    append(&mut log, 40);
    let scrub = |log: &Log| log.segments().firsts().into_iter().try_for_each(|first| log.segments().scrub(first).map(drop));
    scrub(&log).unwrap();
    drop(log);
    disk.tamper(&path(0), |bytes| bytes[offset(2) + 200] ^= 0x40);
    let log = open_clean(&disk);
    let found = scrub(&log).unwrap_err().to_string();
    assert!(found.contains(&format!("{}, offset {}", path(0).display(), offset(2))), "{found}");
    let read = log.segments().read(2..3, 1000);
    assert!(matches!(read, Err(StoreError::Damaged { .. })), "{read:?}");
    log.segments().read(3..4, 1000).unwrap();
}

#[test]
fn a_full_disk_stops_groups_then_acts_and_room_lets_them_go_on() {
    let disk = FaultyFiles::new(1);
    let mut log = open_clean(&disk);
    disk.set_capacity(Some(disk.used()));
    let full = std::iter::repeat_with(|| try_append(&mut log, false)).find_map(Result::err).unwrap();
    assert!(matches!(&full, StoreError::Full { detail, .. } if detail.contains("8192 bytes needed")), "{full}");
    let stopped = head(&log);
    assert!(matches!(try_append(&mut log, false), Err(StoreError::Full { .. })));
    assert_eq!(head(&log), stopped);
    for _ in 0..2 {
        try_append(&mut log, true).unwrap();
    }
    disk.set_capacity(None);
    append(&mut log, 30);
    drop(log);
    check_all(&open_clean(&disk));
}

#[test]
fn a_log_on_a_full_disk_opens_with_the_room_of_its_spare() {
    let disk = FaultyFiles::new(1);
    let mut log = open_clean(&disk);
    disk.set_capacity(Some(disk.used()));
    append(&mut log, 3);
    drop(log);
    let mut log = open_clean(&disk);
    append(&mut log, 3);
    check_all(&log);
}

#[test]
fn a_failed_sync_ends_the_log_and_the_next_opening_recovers() {
    let disk = FaultyFiles::new(1);
    let mut log = open_clean(&disk);
    let kept = append(&mut log, 3);
    disk.fail_sync_after(0);
    assert!(matches!(try_append(&mut log, false), Err(StoreError::NotDurable { .. })));
    assert_eq!(head(&log), kept, "the group is not shown");
    let (operations, syncs) = (disk.operations(), disk.syncs());
    assert!(matches!(try_append(&mut log, false), Err(StoreError::NotDurable { .. })));
    log.close().unwrap();
    assert_eq!((disk.operations(), disk.syncs()), (operations, syncs), "nothing is written any more");
    let log = open(&disk).unwrap().0;
    let recovered = head(&log);
    assert!(recovered.entries == 3 || recovered.entries == 4);
    drop(log);
    disk.cut_power();
    disk.power_on();
    let mut log = open_clean(&disk);
    assert_eq!(head(&log), recovered, "what was shown once stays");
    append(&mut log, 3);
    check_all(&log);
}

#[test]
fn a_log_that_was_closed_is_not_copied_when_it_is_opened() {
    let disk = FaultyFiles::new(1);
    let mut log = open_clean(&disk);
    append(&mut log, 3);
    log.close().unwrap();
    let syncs = disk.syncs();
    drop(open_clean(&disk));
    assert_eq!(disk.syncs(), syncs);
    drop(open_clean(&disk));
    assert!(disk.syncs() > syncs, "it was not closed the second time");
}

#[test]
fn another_segment_size_is_taken_over() {
    let disk = FaultyFiles::new(1);
    append(&mut open_clean(&disk), 10);
    for segment_bytes in [4096, 65536] {
        let layout = Layout { segment_bytes, ..LAYOUT };
        let (mut log, _) = recovery::open(Arc::new(disk.clone()), Path::new(DIR), layout).unwrap();
        append(&mut log, 20);
        check_all(&log);
    }
}

#[test]
fn every_entry_is_found_among_many_frames() {
    let disk = FaultyFiles::new(1);
    let layout = Layout { segment_bytes: 1 << 20, ..LAYOUT };
    let (mut log, _) = recovery::open(Arc::new(disk.clone()), Path::new(DIR), layout).unwrap();
    append(&mut log, 3000);
    for index in 0..3000 {
        let entry = log.segments().read(index..index + 1, 1000).unwrap();
        assert_eq!(std::str::from_utf8(&entry[0]).unwrap().trim(), index.to_string());
    }
}
