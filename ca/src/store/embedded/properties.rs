//! The promise of the log, checked on a disk that cuts off, tears, reorders and forgets: **no acknowledged entry is lost or changes its place,
//! the head never goes back behind what was acknowledged, and the log goes on.**

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;

use super::faulty::FaultyFiles;
use super::log::{Layout, Log};
use super::recovery;
use crate::store::{Group, Head, StoreError};

const DIR: &str = "/ledger";
/// Small, so that a few groups fill one.
const LAYOUT: Layout = Layout { segment_bytes: 4096, act_reserve_bytes: 512 };
const ATTEMPTS: usize = 20;

#[derive(Clone, Debug)]
enum Step {
    Commit {
        sizes: Vec<usize>,
        is_act: bool,
    },
    Publish,
    Close,
    /// The process dies; the page cache survives.
    Kill,
    CutPower,
    CutPowerAfter(u64),
    FailSyncAfter(u64),
    /// No file may grow by more than that any more.
    Fill(u64),
    MakeRoom,
}

/// A log on a faulty disk, and what its user was told.
struct Run {
    disk: FaultyFiles,
    /// Nothing between two processes.
    log: Option<Log>,
    head: Head,
    acknowledged: Vec<Bytes>,
    /// A group whose commit failed: it may be there after the next opening, as a whole, or not.
    in_doubt: Vec<Bytes>,
    written: u64,
}

impl Run {
    fn new(disk: FaultyFiles) -> Result<Self, String> {
        let log = open(&disk)?;
        let head = log.segments().head();
        Ok(Self { disk, log: Some(log), head, acknowledged: Vec::new(), in_doubt: Vec::new(), written: 0 })
    }

    fn apply(&mut self, step: &Step) -> Result<(), String> {
        match step {
            Step::Commit { sizes, is_act } => self.commit(sizes, *is_act),
            Step::Publish => {
                let published = self.log()?.checkpoints().clone().publish(&self.head);
                self.go_on(published)
            }
            Step::Close => {
                // What could not be noted leaves more to do for the next process.
                let _ = self.log.take().map(Log::close);
                self.reopen()
            }
            Step::Kill => self.reopen(),
            Step::CutPower => {
                self.disk.cut_power();
                self.reopen()
            }
            Step::CutPowerAfter(operations) => {
                self.disk.cut_power_after(*operations);
                Ok(())
            }
            Step::FailSyncAfter(syncs) => {
                self.disk.fail_sync_after(*syncs);
                Ok(())
            }
            Step::Fill(bytes) => {
                self.disk.set_capacity(Some(self.disk.used() + bytes));
                Ok(())
            }
            Step::MakeRoom => {
                self.disk.set_capacity(None);
                Ok(())
            }
        }
    }

    fn log(&mut self) -> Result<&mut Log, String> {
        self.log.as_mut().ok_or_else(|| "the log is not open".into())
    }

    fn commit(&mut self, sizes: &[usize], is_act: bool) -> Result<(), String> {
        let mut entries = Vec::new();
        for size in sizes {
            self.written += 1;
            entries.push(Bytes::from(format!("{:<size$}", self.written)));
        }
        let group = Group { entries, raises_epoch: is_act };
        let expected = self.head;
        match self.log()?.append(&expected, &group) {
            Ok(head) => {
                let due = (self.head.entries + group.entries.len() as u64, self.head.epoch + u64::from(is_act));
                if (head.entries, head.epoch) != due {
                    return Err(format!("the head became {head:?} after {:?}", self.head));
                }
                self.head = head;
                self.acknowledged.extend(group.entries);
                Ok(())
            }
            Err(StoreError::Full { .. }) if self.log()?.segments().head() == expected => Ok(()),
            Err(StoreError::NotDurable { .. }) => {
                self.in_doubt = group.entries;
                if !matches!(self.log()?.append(&expected, &Group::default()), Err(StoreError::NotDurable { .. })) {
                    return Err("the log took another group after a failed sync".into());
                }
                self.reopen()
            }
            // Allocating the next segment failed because the power is off, or because of a failed sync of something else.
            Err(StoreError::Io { .. }) => self.reopen(),
            Err(error) => Err(format!("a group was refused: {error}")),
        }
    }

    fn go_on(&mut self, result: Result<(), StoreError>) -> Result<(), String> {
        match result {
            Ok(()) | Err(StoreError::Full { .. }) => Ok(()),
            Err(StoreError::Io { .. }) => self.reopen(),
            Err(error) => Err(format!("the checkpoint was refused: {error}")),
        }
    }

    /// The next process: opens the log, and compares what is in it with what was acknowledged.
    fn reopen(&mut self) -> Result<(), String> {
        let there = loop {
            self.log = None;
            let segments = self.log.insert(open(&self.disk)?).segments();
            match segments.read(0..segments.head().entries, usize::MAX) {
                // The power went off at the very end of opening.
                Err(_) if self.disk.is_off() => {}
                result => break result.map_err(|error| error.to_string())?,
            }
        };
        let head = self.log()?.segments().head();
        if !there.starts_with(&self.acknowledged) {
            return Err(format!("lost: {} of {} acknowledged entries are there", there.len(), self.acknowledged.len()));
        }
        let more = &there[self.acknowledged.len()..];
        if more.is_empty() && head != self.head {
            return Err(format!("the head was {:?} and is {head:?}", self.head));
        }
        if !more.is_empty() && more != self.in_doubt {
            return Err(format!("{} entries are there that were never written, or part of a group", more.len()));
        }
        self.head = head;
        self.acknowledged = there;
        self.in_doubt.clear();
        Ok(())
    }

    /// With a disk that works again, the log is the same at every opening, is sound as a whole, and takes groups.
    fn finish(mut self) -> Result<(), String> {
        self.disk.no_more_faults();
        self.reopen()?;
        let head = self.head;
        self.apply(&Step::CutPower)?;
        if self.head != head {
            return Err(format!("the head was {head:?}, and is {:?} after another opening", self.head));
        }
        self.commit(&[100], false)?;
        if self.head.entries != head.entries + 1 {
            return Err("the log takes no group any more".into());
        }
        let segments = self.log()?.segments().clone();
        for first in segments.firsts() {
            segments.scrub(first).map_err(|error| error.to_string())?;
        }
        self.apply(&Step::CutPower)
    }
}

/// Opens the log as often as it takes: the power may go off and a sync may fail meanwhile.
fn open(disk: &FaultyFiles) -> Result<Log, String> {
    for _ in 0..ATTEMPTS {
        if disk.is_off() {
            disk.power_on();
        }
        match recovery::open(Arc::new(disk.clone()), Path::new(DIR), LAYOUT) {
            Ok((log, _)) => return Ok(log),
            Err(StoreError::Io { .. }) => {}
            // The new copy of the open segment needs room.
            Err(StoreError::Full { .. }) => disk.set_capacity(None),
            Err(error) => return Err(format!("the log does not open: {error}")),
        }
    }
    Err("the log does not open".into())
}

fn check(seed: u64, ignore_sync_data: bool, steps: &[Step]) -> Result<(), String> {
    let disk = FaultyFiles::new(seed);
    if ignore_sync_data {
        disk.ignore_sync_data();
    }
    let mut run = Run::new(disk)?;
    for step in steps {
        run.apply(step)?;
    }
    run.finish()
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        12 => (prop::collection::vec(1..700_usize, 1..5), prop::bool::weighted(0.2))
            .prop_map(|(sizes, is_act)| Step::Commit { sizes, is_act }),
        2 => Just(Step::Publish),
        1 => Just(Step::Close),
        1 => Just(Step::Kill),
        1 => Just(Step::CutPower),
        3 => (0..30_u64).prop_map(Step::CutPowerAfter),
        3 => (0..12_u64).prop_map(Step::FailSyncAfter),
        1 => (0..6000_u64).prop_map(Step::Fill),
        1 => Just(Step::MakeRoom),
    ];
    prop::collection::vec(step, 1..60)
}

/// A fixed run over several segments, with acts, a checkpoint and a clean close.
fn script() -> Vec<Step> {
    let commit = |size: usize, is_act| Step::Commit { sizes: vec![size, size / 2, 1], is_act };
    let mut script: Vec<Step> = (0..8).map(|at| commit(300 + at * 40, at % 3 == 0)).collect();
    script.insert(4, Step::Publish);
    script.push(Step::Close);
    script.extend((0..4).map(|_| commit(700, false)));
    script
}

/// Runs [`script`] once for each place where `fault` can happen, until it does not happen any more.
fn check_everywhere(ignore_sync_data: bool, fault: fn(u64) -> Step) -> Result<(), String> {
    let clean = FaultyFiles::new(0);
    let mut run = Run::new(clean.clone())?;
    for step in script() {
        run.apply(&step)?;
    }
    for place in 0..clean.operations() {
        for seed in 0..4 {
            let steps: Vec<Step> = [fault(place)].into_iter().chain(script()).collect();
            check(seed, ignore_sync_data, &steps).map_err(|error| format!("place {place}, seed {seed}: {error}"))?;
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4 * ProptestConfig::default().cases, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_acknowledged_entry_is_lost(seed in any::<u64>(), steps in steps()) {
        check(seed, false, &steps).map_err(TestCaseError::fail)?;
    }
}

#[test]
fn a_power_cut_at_every_write_and_sync_loses_nothing() {
    check_everywhere(false, Step::CutPowerAfter).unwrap();
}

#[test]
fn a_failure_of_every_sync_loses_nothing() {
    check_everywhere(false, Step::FailSyncAfter).unwrap();
}

#[test]
fn without_sync_data_the_property_fails() {
    let failure = check_everywhere(true, Step::CutPowerAfter).unwrap_err();
    assert!(failure.contains("lost: "), "{failure}");
}
