//! Does to a faulty disk what a process did to a real one, so that the power can be cut in the middle of any of it.

use std::collections::BTreeSet;
use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::trace::Call;
use crate::store::embedded::faulty::FaultyFiles;
use crate::store::embedded::files::LogFiles as _;

/// What a file has of zeros that were put there in advance, at most: a journal that nothing is written to would take most of the time.
const MAX_ZEROS: u64 = 1 << 16;

/// The files below a directory, as they are after some of the calls.
#[derive(Clone, Debug)]
pub(super) struct Replay {
    disk: FaultyFiles,
    root: PathBuf,
    dirs: BTreeSet<PathBuf>,
    /// Files with fewer zeros at their end than they should have.
    cut_off: BTreeSet<(PathBuf, u64)>,
}

impl Replay {
    /// Of an empty directory `root`.
    pub(super) fn new(root: &Path, disk: FaultyFiles) -> Self {
        Self { disk, root: root.to_owned(), dirs: BTreeSet::from([root.to_owned()]), cut_off: BTreeSet::new() }
    }

    pub(super) fn apply(&mut self, call: &Call) -> io::Result<()> {
        match call {
            Call::Say(_) => Ok(()),
            // A name like that of a file, which a power cut takes, too, until the directory above is synced.
            Call::CreateDir(path) => {
                self.dirs.insert(path.clone());
                self.disk.create(path).map(drop)
            }
            Call::CreateFile(path) => match self.disk.create(path) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error),
                _ => Ok(()),
            },
            Call::Write(path, place, bytes) => self.disk.open(path)?.write_at(bytes, *place),
            Call::SetLen(path, len) | Call::Allocate(path, len) => {
                let file = self.disk.open(path)?;
                let kept = if *len > file.length()? + MAX_ZEROS { file.length()? + MAX_ZEROS } else { *len };
                if kept < *len {
                    self.cut_off.insert((path.clone(), *len));
                }
                if matches!(call, Call::SetLen(..)) { file.set_len(kept) } else { file.preallocate(kept) }
            }
            Call::SyncAll(path) if self.dirs.contains(path) => self.disk.sync_dir(path),
            Call::SyncAll(path) => self.disk.open(path)?.sync_all(),
            Call::SyncData(path) => self.disk.open(path)?.sync_data(),
            Call::Rename(from, to) => self.disk.rename(from, to),
            Call::Remove(path) => {
                self.dirs.remove(path);
                self.disk.remove(path)
            }
        }
    }

    /// The power goes off in the middle of `call`: what is left of the files comes to be in the directory `to`.
    pub(super) fn cut_power_in(&self, call: &Call, seed: u64, to: &Path) -> io::Result<()> {
        let mut cut = Self { disk: self.disk.fork(seed), ..self.clone() };
        cut.disk.cut_power_after(0);
        // A name that the call takes away is one of a directory all the same.
        cut.apply(call).err().ok_or_else(|| io::Error::other("the call changed nothing"))?;
        cut.disk.power_on();
        cut.dirs.extend(self.dirs.iter().cloned());
        cut.write(&self.root.clone(), to)
    }

    fn write(&self, from: &Path, to: &Path) -> io::Result<()> {
        for name in self.disk.list(from)? {
            let (from, to) = (from.join(&name), to.join(&name));
            if self.dirs.contains(&from) {
                DirBuilder::new().mode(0o700).create(&to)?;
                self.write(&from, &to)?;
                continue;
            }
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&to)?;
            file.write_all(&self.disk.content(&from).unwrap_or_default())?;
            if let Some((_, len)) = self.cut_off.iter().find(|(path, _)| *path == from) {
                file.set_len(*len)?;
            }
        }
        Ok(())
    }
}
