//! The container: a tar file whose last member has the digests of the others.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use aws_lc_rs::digest::{SHA256, digest};
use tar::{Archive, Builder, EntryType, Header};
use time::OffsetDateTime;

use super::{BackupError, SUMS};

/// A segment is smaller than 4 GiB; nobody makes one larger than a quarter of that.
const MAX_MEMBER_BYTES: u64 = 1 << 30;

/// Digests by the names of members.
type Sums = BTreeMap<String, String>;

/// A tar file being written.
pub(super) struct Writer {
    tar: Builder<BufWriter<File>>,
    path: PathBuf,
    made_at: u64,
    sums: Sums,
}

impl Writer {
    /// Into `file`, whose name is `path`.
    pub(super) fn new(file: File, path: &Path, made_at: OffsetDateTime) -> Self {
        let made_at = u64::try_from(made_at.unix_timestamp()).unwrap_or_default();
        Self { tar: Builder::new(BufWriter::new(file)), path: path.to_owned(), made_at, sums: Sums::new() }
    }

    /// Adds a member.
    pub(super) fn add(&mut self, name: &str, bytes: &[u8]) -> Result<(), BackupError> {
        append(&mut self.tar, name, bytes, self.made_at).map_err(BackupError::io("write", &self.path))?;
        self.sums.insert(name.to_owned(), hex::encode(digest(&SHA256, bytes)));
        Ok(())
    }

    /// Adds the digests, and makes everything durable.
    pub(super) fn finish(mut self) -> Result<(), BackupError> {
        let sums: Vec<String> = self.sums.iter().map(|(name, sum)| format!("{sum}  {name}\n")).collect();
        let sums = sums.concat();
        let failed = BackupError::io("write", &self.path);
        let finished = append(&mut self.tar, SUMS, sums.as_bytes(), self.made_at)
            .and_then(|()| self.tar.into_inner())
            .and_then(|buffered| buffered.into_inner().map_err(std::io::IntoInnerError::into_error))
            .and_then(|file| file.sync_all());
        finished.map_err(failed)
    }
}

/// Adds a file that is its owner's alone.
pub(super) fn append(tar: &mut Builder<impl Write>, name: &str, bytes: &[u8], made_at: u64) -> std::io::Result<()> {
    let mut header = Header::new_ustar();
    header.set_entry_type(EntryType::Regular);
    header.set_mode(0o600);
    header.set_mtime(made_at);
    header.set_size(bytes.len() as u64);
    tar.append_data(&mut header, name, bytes)
}

/// Hands each member's name and content to `member`, in their order; then all of them have been as they were written, or there is an error.
/// What `member` was told before an error may be wrong.
pub(super) fn read(path: &Path, mut member: impl FnMut(&str, Vec<u8>) -> Result<(), BackupError>) -> Result<(), BackupError> {
    let damaged = |problem: String| BackupError::Damaged { path: path.to_owned(), problem };
    let file = File::open(path).map_err(BackupError::io("open", path))?;
    let mut tar = Archive::new(BufReader::with_capacity(1 << 20, file));
    let mut found = Sums::new();
    let mut said = None;
    for entry in tar.entries().map_err(|error| damaged(error.to_string()))? {
        let mut entry =
            entry.map_err(|error| damaged(if found.is_empty() { format!("it is no tar file ({error})") } else { error.to_string() }))?;
        let name = entry.path().ok().and_then(|name| name.to_str().map(str::to_owned)).unwrap_or_default();
        if said.is_some() || entry.header().entry_type() != EntryType::Regular || entry.size() > MAX_MEMBER_BYTES {
            return Err(damaged(format!("the member {name:?} is none of a backup's")));
        }
        let mut bytes = Vec::with_capacity(usize::try_from(entry.size()).unwrap_or_default());
        let read = entry.read_to_end(&mut bytes).map_err(|error| damaged(format!("{name}: {error}")))?;
        if read as u64 != entry.size() {
            return Err(damaged(format!("{name} is cut off")));
        }
        if name == SUMS {
            said = Some(parse(&bytes).ok_or_else(|| damaged(format!("{SUMS} cannot be read")))?);
            continue;
        }
        if found.insert(name.clone(), hex::encode(digest(&SHA256, &bytes))).is_some() {
            return Err(damaged(format!("{name} is in it twice")));
        }
        member(&name, bytes)?;
    }
    let said = said.ok_or_else(|| damaged(format!("it is cut off: its last member, {SUMS}, is missing")))?;
    let differing =
        said.iter().find(|(name, sum)| found.get(*name) != Some(*sum)).or_else(|| found.iter().find(|(name, _)| !said.contains_key(*name)));
    match differing {
        Some((name, _)) => Err(damaged(format!("{name} is not what was written"))),
        None => Ok(()),
    }
}

fn parse(bytes: &[u8]) -> Option<Sums> {
    let line = |line: &str| line.split_once("  ").map(|(sum, name)| (name.to_owned(), sum.to_owned()));
    std::str::from_utf8(bytes).ok()?.lines().map(line).collect()
}
