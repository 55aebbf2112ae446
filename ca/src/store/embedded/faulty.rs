//! A disk in memory for tests: it forgets at a power cut what was not synced, keeps torn and reordered parts of it, fails and delays
//! syncs, fills up, and takes nothing more.
//!
//! Everything random comes from one seed, so that a failing run can be repeated.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustix::io::Errno;

use super::files::{LogFile, LogFiles};

/// What a disk writes as a whole or not at all, in bytes.
const SECTOR: usize = 512;

/// The disk. Clones are the same disk, so that a test keeps one while the log uses another.
#[derive(Clone, Debug)]
pub struct FaultyFiles(Arc<Mutex<Disk>>);

#[derive(Clone, Debug)]
#[allow(clippy::struct_excessive_bools, reason = "each is a fault of its own, and any of them come together")]
struct Disk {
    random: StdRng,
    nodes: Vec<Node>,
    /// Names as processes see them.
    names: BTreeMap<PathBuf, usize>,
    /// Names that survive a power cut, and what was done to them since.
    durable_names: BTreeMap<PathBuf, usize>,
    unsynced_names: Vec<NameChange>,
    is_off: bool,
    operations_until_off: Option<u64>,
    syncs_until_failure: Option<u64>,
    operations: u64,
    syncs: u64,
    sync_delay: Duration,
    ignores_sync_data: bool,
    every_sync_fails: bool,
    capacity: Option<u64>,
    is_read_only: bool,
}

/// A file. `content` is what a process reads, `durable` what a power cut leaves, `dirty` the sectors that a sync has to write.
#[derive(Clone, Debug, Default)]
struct Node {
    content: Vec<u8>,
    durable: Vec<u8>,
    dirty: BTreeSet<usize>,
}

#[derive(Clone, Debug)]
enum NameChange {
    Set(PathBuf, usize),
    Rename(PathBuf, PathBuf, usize),
    Remove(PathBuf),
}

impl FaultyFiles {
    /// An empty disk without faults.
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(Disk {
            random: StdRng::seed_from_u64(seed),
            nodes: Vec::new(),
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            unsynced_names: Vec::new(),
            is_off: false,
            operations_until_off: None,
            syncs_until_failure: None,
            operations: 0,
            syncs: 0,
            sync_delay: Duration::ZERO,
            ignores_sync_data: false,
            every_sync_fails: false,
            capacity: None,
            is_read_only: false,
        })))
    }

    /// Another disk with the same on it, whose faults are its own.
    #[must_use]
    pub fn fork(&self, seed: u64) -> Self {
        Self(Arc::new(Mutex::new(Disk { random: StdRng::seed_from_u64(seed), ..self.disk().clone() })))
    }

    /// The power goes off in the middle of the change after `operations` more; from then on everything fails.
    pub fn cut_power_after(&self, operations: u64) {
        self.disk().operations_until_off = Some(operations);
    }

    /// The power goes off now.
    pub fn cut_power(&self) {
        self.disk().is_off = true;
    }

    /// Whether the power is off.
    pub fn is_off(&self) -> bool {
        self.disk().is_off
    }

    /// The power is back: what was not synced is gone, but for random parts of it.
    pub fn power_on(&self) {
        self.disk().power_on();
    }

    /// The sync after `syncs` more fails; what it covered is partly written and no longer known to be unwritten.
    pub fn fail_sync_after(&self, syncs: u64) {
        self.disk().syncs_until_failure = Some(syncs);
    }

    /// Every sync fails from now on, whichever thread's comes first.
    pub fn fail_every_sync(&self) {
        self.disk().every_sync_fails = true;
    }

    /// Takes back every fault that has not happened yet, and the capacity.
    pub fn no_more_faults(&self) {
        let mut disk = self.disk();
        disk.operations_until_off = None;
        disk.syncs_until_failure = None;
        disk.every_sync_fails = false;
        disk.capacity = None;
        disk.is_read_only = false;
    }

    /// Every sync takes that long.
    pub fn delay_syncs(&self, delay: Duration) {
        self.disk().sync_delay = delay;
    }

    /// `sync_data` succeeds and does nothing, as if it were not called.
    pub fn ignore_sync_data(&self) {
        self.disk().ignores_sync_data = true;
    }

    /// No file can grow once all files together have that many bytes.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.disk().capacity = bytes;
    }

    /// Nothing can be changed from now on, as where the system found the disk broken.
    pub fn make_read_only(&self) {
        self.disk().is_read_only = true;
    }

    /// How many bytes all files have.
    pub fn used(&self) -> u64 {
        self.disk().used()
    }

    /// How many changes and syncs there were.
    pub fn operations(&self) -> u64 {
        self.disk().operations
    }

    /// How many syncs there were.
    pub fn syncs(&self) -> u64 {
        self.disk().syncs
    }

    /// Changes a file behind everybody's back, on the disk itself.
    pub fn tamper(&self, path: &Path, change: impl Fn(&mut Vec<u8>)) {
        let mut disk = self.disk();
        if let Some(node) = disk.names.get(path).copied() {
            change(&mut disk.nodes[node].content);
            change(&mut disk.nodes[node].durable);
        }
    }

    /// What a process reads in a file.
    pub fn content(&self, path: &Path) -> Option<Vec<u8>> {
        let disk = self.disk();
        disk.names.get(path).map(|node| disk.nodes[*node].content.clone())
    }

    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for_sync(&self) {
        let delay = self.disk().sync_delay;
        if !delay.is_zero() {
            std::thread::sleep(delay);
        }
    }
}

impl Disk {
    /// Counts a change; fails if the power is off or goes off now, or nothing may change.
    fn change(&mut self) -> io::Result<()> {
        self.look()?;
        if self.is_read_only {
            return Err(Errno::ROFS.into());
        }
        self.operations += 1;
        match &mut self.operations_until_off {
            Some(0) => {
                self.is_off = true;
                self.operations_until_off = None;
                self.look()
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn look(&self) -> io::Result<()> {
        if self.is_off { Err(io::Error::other("the power is off")) } else { Ok(()) }
    }

    /// Counts a sync; tells whether it fails.
    fn sync_fails(&mut self) -> bool {
        self.syncs += 1;
        match &mut self.syncs_until_failure {
            Some(0) => {
                self.syncs_until_failure = None;
                true
            }
            Some(left) => {
                *left -= 1;
                false
            }
            None => self.every_sync_fails,
        }
    }

    fn used(&self) -> u64 {
        let linked: BTreeSet<usize> = self.names.values().copied().collect();
        linked.iter().map(|node| self.nodes[*node].content.len() as u64).sum()
    }

    fn grow(&mut self, node: usize, len: usize) -> io::Result<()> {
        let more = len.saturating_sub(self.nodes[node].content.len()) as u64;
        if more > 0 && self.capacity.is_some_and(|capacity| self.used() + more > capacity) {
            return Err(Errno::NOSPC.into());
        }
        self.nodes[node].grow(len);
        Ok(())
    }

    fn power_on(&mut self) {
        self.is_off = false;
        self.operations_until_off = None;
        let survive = self.random.random_range(0..=self.unsynced_names.len());
        for change in self.unsynced_names.drain(..).take(survive) {
            change.apply(&mut self.durable_names);
        }
        self.names = self.durable_names.clone();
        for node in &mut self.nodes {
            node.write_back_partly(&mut self.random);
            node.content = node.durable.clone();
        }
    }

    fn change_name(&mut self, change: NameChange) {
        change.apply(&mut self.names);
        self.unsynced_names.push(change);
    }

    fn node(&self, path: &Path) -> io::Result<usize> {
        self.names.get(path).copied().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    }
}

impl Node {
    fn grow(&mut self, len: usize) {
        let old = self.content.len();
        if len > old {
            self.content.resize(len, 0);
            // Where the disk still has what was cut off before, zeros must be written.
            self.dirty.extend(old / SECTOR..self.durable.len().min(len).div_ceil(SECTOR));
        }
    }

    fn write(&mut self, bytes: &[u8], offset: usize) {
        self.content[offset..offset + bytes.len()].copy_from_slice(bytes);
        self.dirty.extend(offset / SECTOR..(offset + bytes.len()).div_ceil(SECTOR));
    }

    fn write_back(&mut self, sector: usize) {
        let begin = sector * SECTOR;
        let end = (begin + SECTOR).min(self.content.len()).min(self.durable.len());
        if begin < end {
            self.durable[begin..end].copy_from_slice(&self.content[begin..end]);
        }
    }

    fn sync(&mut self, with_length: bool) {
        if with_length || self.durable.len() < self.content.len() {
            self.durable.resize(self.content.len(), 0);
        }
        for sector in std::mem::take(&mut self.dirty) {
            self.write_back(sector);
        }
    }

    /// Some of what is dirty reaches the disk: none, all, a prefix, or any parts of it. The rest is not dirty any more.
    fn write_back_partly(&mut self, random: &mut StdRng) {
        if random.random() {
            self.durable.resize(self.content.len(), 0);
        }
        let dirty = std::mem::take(&mut self.dirty);
        let (kind, cut) = (random.random_range(0..4), random.random_range(0..=dirty.len()));
        for (place, sector) in dirty.into_iter().enumerate() {
            let arrives = match kind {
                0 => false,
                1 => true,
                2 => place < cut,
                _ => random.random(),
            };
            if arrives {
                self.write_back(sector);
            }
        }
    }
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<PathBuf, usize>) {
        match self {
            Self::Set(path, node) => {
                names.insert(path.clone(), *node);
            }
            Self::Rename(from, to, node) => {
                if names.get(from) == Some(node) {
                    names.remove(from);
                }
                names.insert(to.clone(), *node);
            }
            Self::Remove(path) => {
                names.remove(path);
            }
        }
    }

    fn is_in(&self, dir: &Path) -> bool {
        let (Self::Set(path, _) | Self::Rename(_, path, _) | Self::Remove(path)) = self;
        path.parent() == Some(dir)
    }
}

#[derive(Debug)]
struct FaultyFile {
    files: FaultyFiles,
    node: usize,
}

impl LogFiles for FaultyFiles {
    fn open(&self, path: &Path) -> io::Result<Arc<dyn LogFile>> {
        let disk = self.disk();
        disk.look()?;
        let node = disk.node(path)?;
        Ok(Arc::new(FaultyFile { files: self.clone(), node }))
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn LogFile>> {
        let mut disk = self.disk();
        disk.change()?;
        if disk.names.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let node = disk.nodes.len();
        disk.nodes.push(Node::default());
        disk.change_name(NameChange::Set(path.to_owned(), node));
        Ok(Arc::new(FaultyFile { files: self.clone(), node }))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let disk = self.disk();
        disk.look()?;
        let inside = disk.names.keys().filter(|path| path.parent() == Some(dir));
        Ok(inside.filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned())).collect())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut disk = self.disk();
        disk.change()?;
        let node = disk.node(from)?;
        disk.change_name(NameChange::Rename(from.to_owned(), to.to_owned(), node));
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut disk = self.disk();
        disk.change()?;
        disk.node(path)?;
        disk.change_name(NameChange::Remove(path.to_owned()));
        Ok(())
    }

    fn create_dir(&self, _dir: &Path) -> io::Result<()> {
        self.disk().look()
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.wait_for_sync();
        let mut disk = self.disk();
        disk.change()?;
        let fails = disk.sync_fails();
        let (covered, rest): (Vec<_>, Vec<_>) = disk.unsynced_names.drain(..).partition(|change| change.is_in(dir));
        disk.unsynced_names = rest;
        let arrive = if fails { disk.random.random_range(0..=covered.len()) } else { covered.len() };
        for change in covered.into_iter().take(arrive) {
            change.apply(&mut disk.durable_names);
        }
        if fails { Err(Errno::IO.into()) } else { Ok(()) }
    }

    fn available(&self, _dir: &Path) -> io::Result<u64> {
        let disk = self.disk();
        disk.look()?;
        Ok(disk.capacity.map_or(u64::MAX, |capacity| capacity.saturating_sub(disk.used())))
    }
}

impl FaultyFile {
    fn sync(&self, with_length: bool) -> io::Result<()> {
        self.files.wait_for_sync();
        let mut disk = self.files.disk();
        disk.change()?;
        if disk.sync_fails() {
            let Disk { random, nodes, .. } = &mut *disk;
            nodes[self.node].write_back_partly(random);
            return Err(Errno::IO.into());
        }
        if with_length || !disk.ignores_sync_data {
            disk.nodes[self.node].sync(with_length);
        }
        Ok(())
    }
}

impl LogFile for FaultyFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let disk = self.files.disk();
        disk.look()?;
        let rest = disk.nodes[self.node].content.get(place(offset)..).unwrap_or_default();
        let bytes = rest.len().min(buffer.len());
        buffer[..bytes].copy_from_slice(&rest[..bytes]);
        Ok(bytes)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut disk = self.files.disk();
        let was_on = !disk.is_off && !disk.is_read_only;
        let result = disk.change();
        let bytes = match &result {
            Err(_) if was_on => &bytes[..disk.random.random_range(0..=bytes.len())],
            Err(_) => &[],
            Ok(()) => bytes,
        };
        if !bytes.is_empty() {
            disk.grow(self.node, place(offset) + bytes.len())?;
            disk.nodes[self.node].write(bytes, place(offset));
        }
        result
    }

    fn sync_data(&self) -> io::Result<()> {
        self.sync(false)
    }

    fn sync_all(&self) -> io::Result<()> {
        self.sync(true)
    }

    fn length(&self) -> io::Result<u64> {
        let disk = self.files.disk();
        disk.look()?;
        Ok(disk.nodes[self.node].content.len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut disk = self.files.disk();
        disk.change()?;
        disk.grow(self.node, place(len))?;
        disk.nodes[self.node].content.truncate(place(len));
        Ok(())
    }

    fn preallocate(&self, len: u64) -> io::Result<()> {
        let mut disk = self.files.disk();
        disk.change()?;
        disk.grow(self.node, place(len))
    }
}

fn place(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}
