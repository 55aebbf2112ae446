//! Keys sealed at rest: what lies on the disk opens with a passphrase or a key file alone.
//!
//! Each key is encrypted (age, X25519) to a sealing key of the directory, and that one to the operator's secret: so one derivation from a
//! passphrase opens all keys, new ones are sealed without it, and another passphrase replaces one small file, whole or not at all.

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};

use age::Decryptor;
use age::secrecy::{ExposeSecret, SecretString};
use age::{scrypt, x25519};
use chancery_process::files;
use serde::Deserialize;
use zeroize::Zeroizing;

use super::KeyError;

/// The directory's sealing key, encrypted to the operator's secret.
const SEALING_KEY: &str = "sealing-key.age";
/// scrypt with N = 2^17: a third of a second and 128 MiB, once, when a CA starts (OWASP's recommendation).
const WORK_FACTOR: u8 = if cfg!(test) { 10 } else { 17 };
/// A file that asks for more would keep the CA from starting for minutes.
const MAX_WORK_FACTOR: u8 = 20;
/// How the line with the key in a file of `age-keygen` begins.
const IDENTITY: &str = "AGE-SECRET-KEY-1";

/// The `[keys]` of the configuration: what the CA's private keys are sealed with; nothing, and they lie in clear.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SealSettings {
    /// A file with a passphrase.
    pub passphrase_file: Option<PathBuf>,
    /// A file with an age identity.
    pub identity_file: Option<PathBuf>,
}

impl SealSettings {
    /// Reads the secret; nothing if none is configured.
    ///
    /// # Errors
    /// If two are configured, or the file is missing, open to others, or holds no secret.
    pub fn secret(&self) -> Result<Option<Secret>, KeyError> {
        match (&self.passphrase_file, &self.identity_file) {
            (None, None) => Ok(None),
            (Some(path), None) => Secret::passphrase(path).map(Some),
            (None, Some(path)) => Secret::identity(path).map(Some),
            (Some(path), Some(_)) => Err(refused(path, "keys are sealed with a passphrase or with an identity, not with both")),
        }
    }
}

/// An operator's secret, which opens the sealing key.
pub struct Secret {
    place: PathBuf,
    kind: Kind,
}

enum Kind {
    Passphrase(SecretString),
    Identity(x25519::Identity),
}

impl Secret {
    /// The passphrase in a file; line breaks behind it do not belong to it.
    ///
    /// # Errors
    /// If the file is missing, open to others, or empty.
    pub fn passphrase(path: &Path) -> Result<Self, KeyError> {
        let bytes = files::read_handed_over(path)?;
        let text = std::str::from_utf8(&bytes).map_err(|_| refused(path, "a passphrase is text in UTF-8"))?;
        let text = text.trim_end_matches(['\n', '\r']);
        if text.trim().is_empty() {
            return Err(refused(path, "it is empty; write a passphrase into it, such as `openssl rand -base64 32` prints"));
        }
        Ok(Self { place: path.to_owned(), kind: Kind::Passphrase(SecretString::from(text.to_owned())) })
    }

    /// The identity in a file that `age-keygen` wrote.
    ///
    /// # Errors
    /// If the file is missing, open to others, or does not hold exactly one.
    pub fn identity(path: &Path) -> Result<Self, KeyError> {
        let bytes = files::read_handed_over(path)?;
        let text = std::str::from_utf8(&bytes).unwrap_or_default();
        let mut found = text.lines().map(str::trim).filter(|line| line.starts_with(IDENTITY));
        let (Some(line), None) = (found.next(), found.next()) else {
            return Err(refused(path, "it does not hold one age identity; `age-keygen` writes such a file"));
        };
        let identity = line.parse().map_err(|problem| refused(path, problem))?;
        Ok(Self { place: path.to_owned(), kind: Kind::Identity(identity) })
    }

    fn encrypt(&self, plain: &[u8]) -> Result<Vec<u8>, KeyError> {
        let sealed = match &self.kind {
            Kind::Passphrase(passphrase) => {
                let mut recipient = scrypt::Recipient::new(passphrase.clone());
                recipient.set_work_factor(WORK_FACTOR);
                age::encrypt(&recipient, plain)
            }
            Kind::Identity(identity) => age::encrypt(&identity.to_public(), plain),
        };
        sealed.map_err(|error| refused(&self.place, &error.to_string()))
    }

    fn decrypt(&self, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, age::DecryptError> {
        match &self.kind {
            Kind::Passphrase(passphrase) => {
                let mut identity = scrypt::Identity::new(passphrase.clone());
                identity.set_max_work_factor(MAX_WORK_FACTOR);
                decrypt(&identity, sealed)
            }
            Kind::Identity(identity) => decrypt(identity, sealed),
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secret").field("place", &self.place).finish_non_exhaustive()
    }
}

/// A directory's sealing key.
pub(super) struct Seal(x25519::Identity);

impl Seal {
    /// Opens the directory's sealing key; without one, makes it.
    ///
    /// # Errors
    /// [`KeyError::Sealed`] if `secret` does not open it. If it cannot be read or written.
    pub(super) fn open_or_create(directory: &Path, secret: &Secret) -> Result<Self, KeyError> {
        let path = directory.join(SEALING_KEY);
        if !path.exists() {
            let new = x25519::Identity::generate();
            files::write_private(&path, &secret.encrypt(new.to_string().expose_secret().as_bytes())?)?;
        }
        // Opened from the disk in either case: what only memory could open would be lost with the process.
        Self::open(&path, secret)
    }

    fn open(path: &Path, secret: &Secret) -> Result<Self, KeyError> {
        let unopened = |problem: String| KeyError::Sealed {
            place: path.display().to_string(),
            problem: format!(
                "what is in {} does not open it ({problem}); name the passphrase or identity that the keys were last sealed with under \
                 [keys] (an older one if a backup was restored); nothing was changed",
                secret.place.display()
            ),
        };
        let plain = secret.decrypt(&files::read_private(path)?).map_err(|error| unopened(error.to_string()))?;
        let identity = std::str::from_utf8(&plain).ok().and_then(|text| text.parse().ok());
        identity.map(Self).ok_or_else(|| unopened("it holds no sealing key".into()))
    }

    pub(super) fn seal(&self, plain: &[u8]) -> Result<Vec<u8>, KeyError> {
        age::encrypt(&self.0.to_public(), plain).map_err(|error| KeyError::Failed { name: String::new(), problem: error.to_string() })
    }

    pub(super) fn unseal(&self, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, age::DecryptError> {
        decrypt(&self.0, sealed)
    }
}

impl fmt::Debug for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Seal")
    }
}

/// Has the keys in `directory` open with `new` from now on, and not with `old` any more. A CA may be running on it meanwhile.
///
/// # Errors
/// [`KeyError::Sealed`] if they are not sealed, or `old` does not open them. If the file cannot be written; then `old` still opens them.
pub fn reseal(directory: &Path, old: &Secret, new: &Secret) -> Result<(), KeyError> {
    let path = directory.join(SEALING_KEY);
    if !path.exists() {
        let problem = "there is none yet: the keys are sealed when the CA starts with a [keys] in its configuration".to_owned();
        return Err(KeyError::Sealed { place: path.display().to_string(), problem });
    }
    let Seal(identity) = Seal::open(&path, old)?;
    let sealed = new.encrypt(identity.to_string().expose_secret().as_bytes())?;
    // What could not be opened again would cost every key.
    new.decrypt(&sealed).map_err(|error| refused(&new.place, &error.to_string()))?;
    Ok(files::write_private(&path, &sealed)?)
}

/// Refuses a directory whose keys are sealed.
pub(super) fn check_not_sealed(directory: &Path) -> Result<(), KeyError> {
    let path = directory.join(SEALING_KEY);
    if !path.exists() {
        return Ok(());
    }
    let problem =
        "the keys are sealed, and the configuration does not say with what: set `passphrase_file` or `identity_file` under [keys]";
    Err(KeyError::Sealed { place: path.display().to_string(), problem: problem.into() })
}

fn decrypt(identity: &dyn age::Identity, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, age::DecryptError> {
    let mut reader = Decryptor::new_buffered(sealed)?.decrypt(std::iter::once(identity))?;
    // The plaintext is shorter than what it was encrypted to: the buffer never moves, and leaves no copy behind.
    let mut plain = Zeroizing::new(Vec::with_capacity(sealed.len()));
    reader.read_to_end(&mut plain)?;
    Ok(plain)
}

fn refused(path: &Path, problem: &str) -> KeyError {
    KeyError::Sealed { place: path.display().to_string(), problem: problem.to_owned() }
}
