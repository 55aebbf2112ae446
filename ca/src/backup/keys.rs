//! The keys in a backup: a tar file of their directories, encrypted with age to a recipient, who need not be near.

use std::fs;
use std::io::Read;
use std::path::Path;

use age::x25519::Recipient;
use age::{Decryptor, IdentityFile};
use chancery_process::files;
use tar::{Archive, Builder};
use zeroize::Zeroizing;

use super::contents::is_plain;
use super::{BackupError, archive};

/// Directories of a data directory. Those of a CA in production are the first two.
pub(super) const DIRECTORIES: [&str; 3] = ["keys", "ledger-keys", "development"];

/// A tar file's header, the padding behind a member, and the end, at most.
const TAR_BYTES: usize = 4096;

/// A file with a key: its name in the data directory, and its content.
pub(super) type KeyFile = (String, Zeroizing<Vec<u8>>);

/// Reads a public key of age.
pub(super) fn recipient(text: &str) -> Result<Recipient, BackupError> {
    text.trim().parse().map_err(|_| BackupError::Recipient)
}

/// These keys, encrypted to `recipient`.
pub(super) fn pack(found: &[KeyFile], recipient: &Recipient) -> Result<Vec<u8>, BackupError> {
    // Room for all of it, so that the buffer never moves and leaves a copy behind.
    let room = found.iter().map(|(_, bytes)| bytes.len() + TAR_BYTES).sum::<usize>() + TAR_BYTES;
    let mut plain = Zeroizing::new(Vec::with_capacity(room));
    let failed = |error: std::io::Error| BackupError::Keys(error.to_string());
    let mut tar = Builder::new(&mut *plain);
    for (name, bytes) in found {
        archive::append(&mut tar, name, bytes, 0).map_err(failed)?;
    }
    tar.into_inner().map_err(failed)?;
    age::encrypt(recipient, &plain).map_err(|error| BackupError::Keys(error.to_string()))
}

/// The keys in `sealed`, decrypted with the identity in a file that `age-keygen` wrote.
pub(super) fn unpack(sealed: &[u8], identity: &Path) -> Result<Vec<KeyFile>, BackupError> {
    let refused = |problem: String| BackupError::Keys(format!("{}: {problem}", identity.display()));
    let text = files::read_private(identity)?;
    let identities = IdentityFile::from_buffer(text.as_slice()).map_err(|error| refused(error.to_string()))?;
    let identities = identities.into_identities().map_err(|error| refused(error.to_string()))?;
    let decryptor = Decryptor::new_buffered(sealed).map_err(|error| refused(error.to_string()))?;
    let opened = decryptor.decrypt(identities.iter().map(|identity| &**identity as &dyn age::Identity));
    let mut opened = opened.map_err(|error| refused(error.to_string()))?;
    // The plaintext is never longer than what it was encrypted to.
    let mut plain = Zeroizing::new(Vec::with_capacity(sealed.len()));
    opened.read_to_end(&mut plain).map_err(|error| refused(error.to_string()))?;
    let mut found = Vec::new();
    let failed = |error: std::io::Error| BackupError::Keys(error.to_string());
    for entry in Archive::new(plain.as_slice()).entries().map_err(failed)? {
        let mut entry = entry.map_err(failed)?;
        let name = entry.path().ok().and_then(|name| name.to_str().map(str::to_owned)).unwrap_or_default();
        let is_known = name.split_once('/').is_some_and(|(directory, file)| DIRECTORIES.contains(&directory) && is_plain(file));
        if !is_known {
            return Err(BackupError::Keys(format!("{name:?} is no file with a key")));
        }
        let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(entry.size()).unwrap_or_default().min(plain.len())));
        entry.read_to_end(&mut bytes).map_err(failed)?;
        found.push((name, bytes));
    }
    Ok(found)
}

/// The keys of `data_dir`, by name.
pub(super) fn collect(data_dir: &Path) -> Result<Vec<KeyFile>, BackupError> {
    let mut found = Vec::new();
    for directory in DIRECTORIES {
        let path = data_dir.join(directory);
        if path.is_dir() {
            found.extend(read_directory(&path, directory)?);
        }
    }
    found.sort_by(|(one, _), (other, _)| one.cmp(other));
    Ok(found)
}

/// The keys in the directory `path`, named as files of `directory` in a data directory.
pub(super) fn read_directory(path: &Path, directory: &str) -> Result<Vec<KeyFile>, BackupError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(path).map_err(BackupError::io("read", path))? {
        let entry = entry.map_err(BackupError::io("read", path))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !is_plain(&name) || !entry.path().is_file() {
            continue;
        }
        match files::read_private(&entry.path()) {
            Ok(bytes) => found.push((format!("{directory}/{name}"), bytes)),
            // A key of an issuing certificate that was superseded meanwhile.
            Err(_) if !entry.path().exists() => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(found)
}
