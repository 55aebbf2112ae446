//! The tree beside a log on a disk that cuts off, tears, reorders and forgets: **its hashes are always those of the log's entries.**

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use chancery_identity::checkpoint::{Hash, leaf_hash, root_of};
use proptest::prelude::*;

use super::faulty::FaultyFiles;
use super::files::LogFiles as _;
use super::follower::Derived;
use super::log::{Layout, Log};
use super::merkle::HashTree;
use super::recovery;
use crate::store::{Group, StoreError};

const DIR: &str = "/ledger";
const LAYOUT: Layout = Layout { segment_bytes: 1 << 20, act_reserve_bytes: 512 };
const ATTEMPTS: usize = 20;

/// A log with its tree, and the disk that both lie on.
struct Run {
    disk: FaultyFiles,
    log: Log,
    tree: HashTree,
    written: u64,
}

#[derive(Clone, Debug)]
enum Step {
    Commit(usize),
    /// The tree takes what is in the log, so many entries at a time.
    CatchUp(u64),
    Flush,
    Kill,
    CutPower,
    CutPowerAfter(u64),
    FailSyncAfter(u64),
    Fill(u64),
    MakeRoom,
}

fn path(file: &str) -> PathBuf {
    Path::new(DIR).join("tree").join(file)
}

fn open(disk: &FaultyFiles) -> Result<(Log, HashTree), String> {
    for _ in 0..ATTEMPTS {
        if disk.is_off() {
            disk.power_on();
        }
        let opened = recovery::open(Arc::new(disk.clone()), Path::new(DIR), LAYOUT).and_then(|(log, _)| {
            let tree = HashTree::open(Arc::new(disk.clone()), path(""), log.id(), log.segments())?;
            Ok((log, tree))
        });
        match opened {
            Err(StoreError::Io { .. }) => {}
            Err(StoreError::Full { .. }) => disk.set_capacity(None),
            opened => return opened.map_err(|error| error.to_string()),
        }
    }
    Err("it does not open".into())
}

impl Run {
    fn new(disk: FaultyFiles) -> Result<Self, String> {
        let (log, tree) = open(&disk)?;
        Ok(Self { disk, log, tree, written: 0 })
    }

    fn reopen(&mut self) -> Result<(), String> {
        (self.log, self.tree) = open(&self.disk)?;
        Ok(())
    }

    fn apply(&mut self, step: &Step) -> Result<(), String> {
        match *step {
            Step::Commit(count) => return self.commit(count),
            // What fails is tried again, or what the next process does.
            Step::CatchUp(at_once) => drop(self.catch_up(at_once)),
            Step::Flush => drop(self.tree.flush()),
            Step::Kill => return self.reopen(),
            Step::CutPower => {
                self.disk.cut_power();
                return self.reopen();
            }
            Step::CutPowerAfter(operations) => self.disk.cut_power_after(operations),
            Step::FailSyncAfter(syncs) => self.disk.fail_sync_after(syncs),
            Step::Fill(bytes) => self.disk.set_capacity(Some(self.disk.used() + bytes)),
            Step::MakeRoom => self.disk.set_capacity(None),
        }
        Ok(())
    }

    fn commit(&mut self, count: usize) -> Result<(), String> {
        let entries = (self.written..).take(count).map(|number| Bytes::from(number.to_string())).collect();
        self.written += count as u64;
        let head = self.log.segments().head();
        match self.log.append(&head, &Group { entries, raises_epoch: false }) {
            Ok(_) | Err(StoreError::Full { .. }) => Ok(()),
            Err(_) => self.reopen(),
        }
    }

    fn catch_up(&self, at_once: u64) -> Result<(), StoreError> {
        let head = self.log.segments().head().entries;
        loop {
            let from = self.tree.applied();
            if from > head {
                return self.tree.clear();
            }
            if from == head {
                return Ok(());
            }
            let entries = self.log.segments().read(from..head.min(from + at_once), usize::MAX)?;
            self.tree.apply(from, &entries)?;
        }
    }

    /// Reads every hash of the tree, after what was lost was made anew.
    fn check(&self) -> Result<(), String> {
        let entries = self.log.segments().head().entries;
        let leaves = self.log.segments().read(0..entries, usize::MAX).map_err(|error| error.to_string())?;
        let mut due: Vec<Hash> = leaves.iter().map(|entry| leaf_hash(entry)).collect();
        for level in 0.. {
            let found = self.all(level, due.len() as u64)?;
            if let Some(wrong) = found.iter().zip(&due).position(|(found, due)| found != due) {
                return Err(format!("hash {wrong} of level {level} is another one"));
            }
            due = due.chunks_exact(256).map(root_of).collect();
            if due.is_empty() {
                return Ok(());
            }
        }
        Ok(())
    }

    fn all(&self, level: u8, count: u64) -> Result<Vec<Hash>, String> {
        for _ in 0..ATTEMPTS {
            self.catch_up(1000).map_err(|error| error.to_string())?;
            let pages = (0..count).step_by(1000).map(|first| self.tree.hashes(level, first..count.min(first + 1000)));
            let pages: Result<Vec<_>, _> = pages.collect();
            // Damage was met, and the tree is made anew.
            if let Ok(pages) = pages {
                return Ok(pages.concat());
            }
        }
        Err("it is damaged again and again".into())
    }
}

fn run(seed: u64, steps: &[Step]) -> Result<(), String> {
    let mut run = Run::new(FaultyFiles::new(seed))?;
    for step in steps {
        run.apply(step)?;
    }
    run.disk.no_more_faults();
    run.reopen()?;
    run.check()?;
    run.commit(300)?;
    run.check()?;
    run.tree.flush().map_err(|error| error.to_string())?;
    run.apply(&Step::CutPower)?;
    let (applied, head) = (run.tree.applied(), run.log.segments().head().entries);
    if applied != head {
        return Err(format!("{applied} of {head} flushed entries survived"));
    }
    run.check()
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (1..400_usize).prop_map(Step::Commit),
        8 => (1..300_u64).prop_map(Step::CatchUp),
        3 => Just(Step::Flush),
        1 => Just(Step::Kill),
        1 => Just(Step::CutPower),
        3 => (0..40_u64).prop_map(Step::CutPowerAfter),
        3 => (0..10_u64).prop_map(Step::FailSyncAfter),
        1 => (0..20_000_u64).prop_map(Step::Fill),
        1 => Just(Step::MakeRoom),
    ];
    prop::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_tree_is_that_of_the_log_whatever_happens(seed in any::<u64>(), steps in steps()) {
        run(seed, &steps).map_err(TestCaseError::fail)?;
    }
}

/// Runs a fixed script once for each place where `fault` can happen.
fn check_everywhere(fault: fn(u64) -> Step) {
    let mut script = Vec::new();
    for round in 0..6 {
        script.extend([Step::Commit(200 + round * 31), Step::CatchUp(90), Step::Flush]);
    }
    let clean = FaultyFiles::new(0);
    let mut once = Run::new(clean.clone()).unwrap();
    for step in &script {
        once.apply(step).unwrap();
    }
    for place in 0..clean.operations() {
        let steps: Vec<Step> = [fault(place)].into_iter().chain(script.clone()).collect();
        run(place, &steps).unwrap_or_else(|error| panic!("place {place}: {error}"));
    }
}

#[test]
fn a_power_cut_at_every_write_and_sync_leaves_a_tree_of_the_log() {
    check_everywhere(Step::CutPowerAfter);
}

#[test]
fn a_failure_of_every_sync_leaves_a_tree_of_the_log() {
    check_everywhere(Step::FailSyncAfter);
}

/// With three levels, flushed.
fn large() -> Run {
    with_entries(70_000)
}

fn with_entries(count: usize) -> Run {
    let mut run = Run::new(FaultyFiles::new(1)).unwrap();
    for _ in 0..10 {
        run.commit(count / 10).unwrap();
    }
    run.catch_up(5000).unwrap();
    run.tree.flush().unwrap();
    run
}

#[test]
fn a_large_tree_is_there_again_without_hashing() {
    let mut run = large();
    run.check().unwrap();
    run.apply(&Step::CutPower).unwrap();
    assert_eq!(run.tree.applied(), 70_000);
    run.check().unwrap();
}

#[test]
fn what_was_hashed_since_the_last_flush_is_hashed_again_after_a_crash() {
    let mut run = large();
    run.commit(1000).unwrap();
    run.catch_up(400).unwrap();
    assert_eq!(run.tree.applied(), 71_000);
    run.apply(&Step::CutPower).unwrap();
    assert_eq!(run.tree.applied(), 70_000);
    run.check().unwrap();
}

#[test]
fn every_damaged_file_of_the_tree_is_noticed_and_made_anew() {
    let changes: [fn(&mut Vec<u8>); 4] = [
        |content| content[20] ^= 1,
        |content| {
            let last = content.len() - 1;
            content[last] ^= 1;
        },
        |content| content.truncate(content.len() / 2),
        Vec::clear,
    ];
    for (file, entries) in [("hashed", 1000), ("level-0", 1000), ("level-1", 1000), ("level-2", 70_000)] {
        for change in changes.into_iter().take(if entries > 1000 { 1 } else { 4 }) {
            let mut run = with_entries(entries);
            run.disk.tamper(&path(file), change);
            // While it is open, and after the next start.
            run.check().unwrap();
            run.commit(1).unwrap();
            run.catch_up(1).unwrap();
            run.tree.flush().unwrap();
            run.disk.tamper(&path(file), change);
            run.reopen().unwrap();
            run.check().unwrap();
        }
        let mut run = with_entries(entries);
        run.disk.remove(&path(file)).unwrap();
        run.reopen().unwrap();
        assert_eq!(run.tree.applied(), 0, "{file}");
        run.check().unwrap();
    }
}

#[test]
fn a_hash_that_was_changed_on_disk_is_never_given_out() {
    let run = with_entries(1000);
    run.disk.tamper(&path("level-0"), |content| content[32 * 700] ^= 1);
    assert!(run.tree.hashes(0, 700..701).is_err());
    assert_eq!(run.tree.applied(), 0, "it is made anew");
}

#[test]
fn a_tree_of_another_log_or_of_other_entries_is_made_anew() {
    let longer = with_entries(1000);
    let mut other = Run::new(FaultyFiles::new(2)).unwrap();
    other.written = 1_000_000;
    other.commit(200).unwrap();
    // The same log ID, as in a log that was restored from a backup and has gone on.
    let tree = HashTree::open(Arc::new(longer.disk.clone()), path(""), longer.log.id(), other.log.segments()).unwrap();
    assert_eq!(tree.applied(), 1000, "only the follower, who knows the head, finds that");
    other.commit(1000).unwrap();
    let tree = HashTree::open(Arc::new(longer.disk.clone()), path(""), longer.log.id(), other.log.segments()).unwrap();
    assert_eq!(tree.applied(), 0);
    let longer = with_entries(1000);
    let tree = HashTree::open(Arc::new(longer.disk.clone()), path(""), other.log.id(), longer.log.segments()).unwrap();
    assert_eq!(tree.applied(), 0);
}
