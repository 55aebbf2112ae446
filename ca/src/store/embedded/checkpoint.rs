//! Two notes beside the log, each a head in a file of its own that is replaced in one step.
//!
//! - `checkpoint`: the last published one, a floor below which the log is never cut.
//! - `closed`: where the log ended when it was closed cleanly. Opening takes it away, so one that is there proves that nobody has written
//!   since, and that the open segment, its name and its content, is durable.
//!
//! Both have the line `chancery-log-checkpoint 1`, then the log's ID, the number of entries, the epoch, the hash of the last frame, and the
//! CRC-32C of all lines before it, one a line; bytes and checksum in hexadecimal.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::files::{self, LogFiles};
use super::segment::LogId;
use super::{damaged, failed_in, remove_if_there};
use crate::store::{Head, StoreError};

const NAME: &str = "checkpoint";
const CLOSED: &str = "closed";
const FIRST_LINE: &str = "chancery-log-checkpoint 1";
const MAX_BYTES: usize = 1024;

/// Writes the checkpoint of one log.
#[derive(Debug)]
pub(super) struct Checkpoints {
    files: Arc<dyn LogFiles>,
    dir: PathBuf,
    id: LogId,
    /// How many entries the published one has; held while one is written.
    published: Mutex<u64>,
}

impl Checkpoints {
    /// For the log `id` in `dir`, whose published checkpoint has `published` entries.
    pub(super) fn new(files: Arc<dyn LogFiles>, dir: PathBuf, id: LogId, published: u64) -> Self {
        Self { files, dir, id, published: Mutex::new(published) }
    }

    /// Makes `head` the floor, durably, unless the floor is there or higher already. `head` is durable in the log.
    pub(super) fn publish(&self, head: &Head) -> Result<(), StoreError> {
        let mut published = self.published.lock().unwrap_or_else(PoisonError::into_inner);
        if head.entries <= *published {
            return Ok(());
        }
        self.write(NAME, head)?;
        *published = head.entries;
        Ok(())
    }

    /// Notes that the log is closed at `head`; everything in it is durable.
    pub(super) fn close(&self, head: &Head) -> Result<(), StoreError> {
        let _published = self.published.lock().unwrap_or_else(PoisonError::into_inner);
        self.write(CLOSED, head)
    }

    fn write(&self, name: &str, head: &Head) -> Result<(), StoreError> {
        let path = self.dir.join(name);
        files::replace(self.files.as_ref(), &path, encode(self.id, head).as_bytes()).map_err(failed_in(&path))
    }
}

/// The published checkpoint in `dir` and the log it is of; nothing if none was published.
pub(super) fn read(files: &dyn LogFiles, dir: &Path) -> Result<Option<(LogId, Head)>, StoreError> {
    let path = dir.join(NAME);
    let text = files::read_text(files, &path, MAX_BYTES).map_err(failed_in(&path))?;
    text.map(|text| parse(&text).ok_or_else(|| damaged(&path, 0, "it is not an intact checkpoint".into()))).transpose()
}

/// Where the log in `dir` was closed cleanly, if it was; takes the note away.
pub(super) fn take_closed(files: &dyn LogFiles, dir: &Path) -> Result<Option<(LogId, Head)>, StoreError> {
    let path = dir.join(CLOSED);
    let text = files::read_text(files, &path, MAX_BYTES).map_err(failed_in(&path))?;
    remove_if_there(files, &path).map_err(failed_in(&path))?;
    Ok(text.and_then(|text| parse(&text)))
}

/// The note of `head` in the log `id`.
pub(super) fn encode(id: LogId, head: &Head) -> String {
    let mut text = format!("{FIRST_LINE}\n{}\n{}\n{}\n{}\n", hex::encode(id), head.entries, head.epoch, hex::encode(head.frame));
    let checksum = crc32c::crc32c(text.as_bytes());
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{checksum:08x}");
    text
}

fn parse(text: &str) -> Option<(LogId, Head)> {
    let mut lines = text.lines();
    if lines.next()? != FIRST_LINE {
        return None;
    }
    let mut id = [0; 16];
    hex::decode_to_slice(lines.next()?, &mut id).ok()?;
    let entries = lines.next()?.parse().ok()?;
    let epoch = lines.next()?.parse().ok()?;
    let mut frame = [0; 32];
    hex::decode_to_slice(lines.next()?, &mut frame).ok()?;
    let head = Head { entries, epoch, frame };
    (encode(id, &head) == text).then_some((id, head))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_is_read_as_it_was_written_and_in_no_other_form() {
        let head = Head { entries: 12, epoch: 3, frame: [7; 32] };
        let text = encode([1; 16], &head);
        assert_eq!(parse(&text), Some(([1; 16], head)));
        for at in 0..text.len() {
            assert_eq!(parse(&text[..at]), None, "{at} bytes");
        }
        assert_eq!(parse(&text.replace("12", "11")), None);
    }
}
