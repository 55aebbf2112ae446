//! A backup as it lies there, without being unpacked: for auditors, and before somebody relies on it.

use std::path::Path;

use super::{BackupError, Info, PREVIOUS, contents};

/// A backup that is intact.
#[derive(Clone, Debug)]
pub struct Verified {
    /// What it says about itself.
    pub info: Info,
    /// The newest checkpoint in it, which its entries lead to; who signed that was not looked at.
    pub note: String,
    /// Whether logs that this one continues are in it, too. Those were not read.
    pub has_previous: bool,
}

/// Reads the backup at `path`, and hands each entry with its index to `entry`. `progress` is told how many bytes were read since it was
/// told last.
///
/// # Errors
/// If the backup cannot be read or is not intact, or what `entry` says. [`BackupError::OtherEntries`] comes behind the last entry, and has
/// the checkpoint that they do not lead to.
pub fn verify(
    path: &Path,
    entry: impl FnMut(u64, &[u8]) -> Result<(), String>,
    mut progress: impl FnMut(u64),
) -> Result<Verified, BackupError> {
    let mut has_previous = false;
    let member = |name: &str, bytes: &[u8]| {
        has_previous |= name.starts_with(PREVIOUS);
        progress(bytes.len() as u64);
        Ok(())
    };
    let contents = contents::read(path, &[], member, entry)?;
    Ok(Verified { info: contents.info, note: contents.note, has_previous })
}
