//! C2SP signed-note with Ed25519: a text, an empty line, and a line for each signature. Written here because the published crates for it bring
//! a second provider of cryptography.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::digest::{Context, SHA256};
use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::{Checkpoint, CheckpointError};

/// The longest note that is read, in bytes.
pub const MAX_NOTE_BYTES: usize = 16 << 10;
/// The most signatures that a note may have.
pub const MAX_SIGNATURES: usize = 64;

/// The signature type of Ed25519, in keys and in what their hash is of.
const ED25519_TYPE: u8 = 1;
/// How a line with a signature begins.
const DASH: &str = "\u{2014} ";
/// What `SubjectPublicKeyInfo` puts before an Ed25519 key (RFC 8410).
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// The public half of a key that signs a ledger's checkpoints. Its text form is `<name>+<hash>+<base64>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointVerifier {
    name: String,
    hash: [u8; 4],
    public_key: [u8; 32],
}

/// One key's signature of a checkpoint's text.
#[derive(Clone, Debug)]
pub struct Signature {
    /// Whose.
    pub key: CheckpointVerifier,
    /// Ed25519, 64 bytes.
    pub bytes: Vec<u8>,
}

/// A note, taken apart.
struct Parts<'a> {
    text: &'a str,
    signatures: Vec<(&'a str, [u8; 4], Vec<u8>)>,
}

impl CheckpointVerifier {
    /// For the Ed25519 key of the ledger `origin`.
    ///
    /// # Errors
    /// If `origin` cannot name a key: it is empty, or has white space, control characters or `+` in it.
    pub fn new(origin: &str, public_key: [u8; 32]) -> Result<Self, CheckpointError> {
        if origin.is_empty() || origin.contains(|c: char| c.is_whitespace() || c.is_control() || c == '+') {
            return Err(CheckpointError::Key("the name is empty, or has white space, control characters or `+` in it"));
        }
        let mut context = Context::new(&SHA256);
        context.update(origin.as_bytes());
        context.update(&[b'\n', ED25519_TYPE]);
        context.update(&public_key);
        let mut hash = [0; 4];
        hash.copy_from_slice(&context.finish().as_ref()[..4]);
        Ok(Self { name: origin.to_owned(), hash, public_key })
    }

    /// For a key that is given as `SubjectPublicKeyInfo`, DER, which is how key managers give it.
    ///
    /// # Errors
    /// If it is no Ed25519 key, or `origin` cannot name one.
    pub fn from_spki(origin: &str, spki: &[u8]) -> Result<Self, CheckpointError> {
        let public_key = spki.strip_prefix(&SPKI_PREFIX).and_then(|key| key.try_into().ok());
        Self::new(origin, public_key.ok_or(CheckpointError::Key("the public key is not Ed25519"))?)
    }

    /// The origin of the ledger.
    pub fn origin(&self) -> &str {
        &self.name
    }

    /// The Ed25519 key.
    pub fn public_key(&self) -> &[u8; 32] {
        &self.public_key
    }

    /// Whether `signature` is this key's of `message`.
    pub fn is_signature(&self, message: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, &self.public_key).verify(message, signature).is_ok()
    }

    /// The checkpoint in `note`, if this key has signed it.
    ///
    /// # Errors
    /// See [`verify`].
    pub fn verify(&self, note: &str) -> Result<Checkpoint, CheckpointError> {
        verify(note, std::slice::from_ref(self))
    }

    /// `<name>+<hash>`: names the key in errors.
    fn id(&self) -> String {
        format!("{}+{}", self.name, hex::encode(self.hash))
    }
}

/// The checkpoint in `note`, if one of `keys` has signed it and the others have not signed it wrongly. Signatures of unknown keys are ignored.
///
/// # Errors
/// If it is no note or no checkpoint, is not signed, a signature of one of `keys` does not fit, or it is another ledger's.
pub fn verify(note: &str, keys: &[CheckpointVerifier]) -> Result<Checkpoint, CheckpointError> {
    let Parts { text, signatures } = parse(note)?;
    let mut signed_by = None;
    for (name, hash, signature) in &signatures {
        let Some(key) = keys.iter().find(|key| key.name == *name && key.hash == *hash) else { continue };
        if !key.is_signature(text.as_bytes(), signature) {
            return Err(CheckpointError::Signature(key.id()));
        }
        signed_by = Some(key);
    }
    let key = signed_by.ok_or_else(|| {
        let ids: Vec<_> = keys.iter().map(CheckpointVerifier::id).collect();
        CheckpointError::NotSigned(ids.join(", "))
    })?;
    let checkpoint: Checkpoint = text.parse()?;
    if checkpoint.origin != key.name {
        return Err(CheckpointError::OtherOrigin { found: checkpoint.origin, wanted: key.name.clone() });
    }
    Ok(checkpoint)
}

/// The checkpoint in `note`, whoever signed it: for those who find out otherwise whether it is true.
///
/// # Errors
/// If it is no note or no checkpoint.
pub fn unverified(note: &str) -> Result<Checkpoint, CheckpointError> {
    let (text, _) = note.split_once("\n\n").ok_or(CheckpointError::Malformed("no empty line stands before the signatures"))?;
    format!("{text}\n").parse()
}

/// The note of `checkpoint` with `signatures` of its text ([`Checkpoint`]'s `to_string`), in this order.
///
/// # Errors
/// If there is none, or one does not fit the text or is of another ledger's key: such a note is not to be published.
pub fn assemble(checkpoint: &Checkpoint, signatures: &[Signature]) -> Result<String, CheckpointError> {
    let text = checkpoint.to_string();
    let mut note = format!("{text}\n");
    for Signature { key, bytes } in signatures {
        if !key.is_signature(text.as_bytes(), bytes) {
            return Err(CheckpointError::Signature(key.id()));
        }
        let signature = [&key.hash[..], bytes].concat();
        note.extend([DASH, &key.name, " ", &STANDARD.encode(signature), "\n"]);
    }
    let keys: Vec<_> = signatures.iter().map(|signature| signature.key.clone()).collect();
    verify(&note, &keys)?;
    Ok(note)
}

fn parse(note: &str) -> Result<Parts<'_>, CheckpointError> {
    let malformed = CheckpointError::Malformed;
    if note.len() > MAX_NOTE_BYTES {
        return Err(malformed("it is longer than a note may be"));
    }
    if note.contains(|c: char| c.is_control() && c != '\n') {
        return Err(malformed("it has control characters in it"));
    }
    let (text, lines) = note.rsplit_once("\n\n").ok_or(malformed("no empty line stands before the signatures"))?;
    let text = note.get(..=text.len()).unwrap_or(text);
    let lines = lines.strip_suffix('\n').ok_or(malformed("it does not end with a line break"))?;
    let signatures = lines.split('\n').map(|line| signature(line).ok_or(malformed("a line behind the text is no signature")));
    let signatures = signatures.collect::<Result<Vec<_>, _>>()?;
    if signatures.len() > MAX_SIGNATURES {
        return Err(malformed("it has more signatures than a note may have"));
    }
    Ok(Parts { text, signatures })
}

fn signature(line: &str) -> Option<(&str, [u8; 4], Vec<u8>)> {
    let (name, bytes) = line.strip_prefix(DASH)?.split_once(' ')?;
    let bytes = STANDARD.decode(bytes).ok()?;
    let (hash, signature) = bytes.split_first_chunk::<4>()?;
    (!name.is_empty() && !name.contains('+') && !signature.is_empty()).then(|| (name, *hash, signature.to_vec()))
}

impl fmt::Display for CheckpointVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = [&[ED25519_TYPE][..], &self.public_key].concat();
        write!(f, "{}+{}+{}", self.name, hex::encode(self.hash), STANDARD.encode(key))
    }
}

impl FromStr for CheckpointVerifier {
    type Err = CheckpointError;

    fn from_str(text: &str) -> Result<Self, CheckpointError> {
        let mut parts = text.splitn(3, '+');
        let (Some(name), Some(hash), Some(key)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(CheckpointError::Key("it has not three parts with `+` between them"));
        };
        let key = STANDARD.decode(key).map_err(|_| CheckpointError::Key("its last part is not base64"))?;
        let Some((&ED25519_TYPE, key)) = key.split_first() else {
            return Err(CheckpointError::Key("it is of another type than Ed25519"));
        };
        let key = key.try_into().map_err(|_| CheckpointError::Key("an Ed25519 key has 32 bytes"))?;
        let verifier = Self::new(name, key)?;
        if hex::encode(verifier.hash) == hash {
            Ok(verifier)
        } else {
            Err(CheckpointError::Key("its hash is not the key's; was it copied whole?"))
        }
    }
}
