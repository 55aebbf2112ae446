//! Who made an act: signatures over exact bytes, by a key that the store does not hold.
//!
//! What is signed is, one after the other: a line that says what it is (`chancery act v1` or `chancery state v1`) and ends with a newline; the
//! log's origin and a newline; the epoch as 8 bytes, big endian; and the encoded message up to its signature, which is its last field and
//! takes [`SIGNATURE_FIELD_BYTES`]. So a signature is good for one place in one log, and for the bytes as they are stored.

use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use bytes::Buf;
use chancery_identity::csr::KeyType;
use chancery_proto::chancery::v1 as wire;
use prost::Message;
use prost::encoding::{WireType, decode_key, decode_varint};

use super::ActError;
use crate::keys::{KeyError, KeyManager, PublicKey};
use crate::ledger::LedgerError;

/// The name of the key that signs acts and states.
pub const ACTS_KEY: &str = "acts";
/// The signature's field: key of field 100, length 64, signature.
const SIGNATURE_FIELD_BYTES: usize = 3 + 64;
const SIGNATURE_FIELD: [u8; 3] = [0xa2, 0x06, 64];
/// The header before the key itself in an Ed25519 `SubjectPublicKeyInfo`.
const SPKI_HEADER_BYTES: usize = 12;

/// What a signature is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Act,
    State,
}

impl Kind {
    fn domain(self) -> &'static [u8] {
        match self {
            Self::Act => b"chancery act v1\n",
            Self::State => b"chancery state v1\n",
        }
    }

    /// Its field in `chancery.v1.Entry`.
    fn field(self) -> u32 {
        match self {
            Self::Act => 4,
            Self::State => 8,
        }
    }
}

/// Verifies acts and states of one log.
#[derive(Clone, Debug)]
pub struct ActsVerifier {
    origin: String,
    key: [u8; 32],
    key_id: [u8; 16],
}

/// Signs acts and states of one log.
#[derive(Clone, Debug)]
pub(super) struct ActsSigner {
    keys: Arc<dyn KeyManager>,
    verifier: ActsVerifier,
}

impl ActsVerifier {
    /// For the log of this origin, and acts signed by this key.
    ///
    /// # Errors
    /// If it is no Ed25519 key.
    pub fn new(origin: String, key: &PublicKey) -> Result<Self, LedgerError> {
        let wrong = || LedgerError::ActsKey(format!("the key `{ACTS_KEY}` is no Ed25519 key; restore the right one from a backup"));
        if key.key_type != KeyType::Ed25519 {
            return Err(wrong());
        }
        let raw = key.spki.get(SPKI_HEADER_BYTES..).and_then(|raw| raw.try_into().ok()).ok_or_else(wrong)?;
        let mut key_id = [0; 16];
        key_id.copy_from_slice(&digest(&SHA256, &key.spki).as_ref()[..16]);
        Ok(Self { origin, key: raw, key_id })
    }

    /// For another log, whose acts are signed by the same key.
    pub(super) fn of_log(&self, origin: &str) -> Self {
        Self { origin: origin.to_owned(), ..self.clone() }
    }

    /// The act in an entry, if it was signed for this log and by this key.
    pub(super) fn act(&self, entry: &[u8]) -> Result<wire::Act, ActError> {
        let bytes = body_of(entry, Kind::Act)?;
        let act = wire::Act::decode(bytes).map_err(|error| ActError::Malformed(error.to_string()))?;
        self.verify(Kind::Act, act.epoch, &act.key_id, bytes)?;
        Ok(act)
    }

    /// The state, or the part of one, in an entry, if it was signed for this log and by this key.
    pub(super) fn state(&self, entry: &[u8]) -> Result<wire::State, ActError> {
        let bytes = body_of(entry, Kind::State)?;
        let state = wire::State::decode(bytes).map_err(|error| ActError::Malformed(error.to_string()))?;
        self.verify(Kind::State, state.epoch, &state.key_id, bytes)?;
        Ok(state)
    }

    fn verify(&self, kind: Kind, epoch: u64, key_id: &[u8], bytes: &[u8]) -> Result<(), ActError> {
        let (signed, field) = bytes.split_last_chunk::<SIGNATURE_FIELD_BYTES>().ok_or(ActError::Unsigned)?;
        let signature = field.strip_prefix(&SIGNATURE_FIELD).ok_or(ActError::Unsigned)?;
        if key_id != self.key_id {
            return Err(ActError::ForeignKey { found: hex::encode(key_id), own: hex::encode(self.key_id) });
        }
        let message = message(kind, &self.origin, epoch, signed);
        UnparsedPublicKey::new(&ED25519, self.key).verify(&message, signature).map_err(|_| ActError::Signature)
    }
}

impl ActsSigner {
    /// With the key of that name in `keys`, which is made if `may_generate`.
    pub(super) async fn open(keys: Arc<dyn KeyManager>, origin: String, may_generate: bool) -> Result<Self, LedgerError> {
        let public = match keys.public_key(ACTS_KEY).await {
            Err(KeyError::Unknown(_)) if may_generate => keys.generate(ACTS_KEY, KeyType::Ed25519).await,
            Err(KeyError::Unknown(_)) => {
                let problem = format!(
                    "the ledger holds acts of operators, but the key `{ACTS_KEY}` that signed them is missing; restore the directory \
                     `ledger-keys` from a backup"
                );
                return Err(LedgerError::ActsKey(problem));
            }
            public => public,
        };
        let public = public.map_err(|error| LedgerError::ActsKey(error.to_string()))?;
        Ok(Self { keys, verifier: ActsVerifier::new(origin, &public)? })
    }

    pub(super) fn verifier(&self) -> &ActsVerifier {
        &self.verifier
    }

    pub(super) async fn sign_act(&self, mut act: wire::Act) -> Result<wire::Act, LedgerError> {
        act.key_id = self.verifier.key_id.to_vec();
        act.signature = self.sign(Kind::Act, act.epoch, &act.encode_to_vec()).await?;
        Ok(act)
    }

    pub(super) async fn sign_state(&self, mut state: wire::State) -> Result<wire::State, LedgerError> {
        state.key_id = self.verifier.key_id.to_vec();
        state.signature = self.sign(Kind::State, state.epoch, &state.encode_to_vec()).await?;
        Ok(state)
    }

    async fn sign(&self, kind: Kind, epoch: u64, bytes: &[u8]) -> Result<Vec<u8>, LedgerError> {
        let message = message(kind, &self.verifier.origin, epoch, bytes);
        self.keys.sign(ACTS_KEY, &message).await.map_err(|error| LedgerError::ActsKey(error.to_string()))
    }
}

fn message(kind: Kind, origin: &str, epoch: u64, bytes: &[u8]) -> Vec<u8> {
    [kind.domain(), origin.as_bytes(), b"\n", &epoch.to_be_bytes(), bytes].concat()
}

/// The keys for checkpoints that an act or a state in an encoded entry names, whoever signed it; none in any other entry.
pub fn named_checkpoint_keys(entry: &[u8]) -> Vec<[u8; 32]> {
    let act = body_of(entry, Kind::Act).ok().and_then(|bytes| wire::Act::decode(bytes).ok());
    let state = || body_of(entry, Kind::State).ok().and_then(|bytes| wire::State::decode(bytes).ok());
    let named = match act.map(|act| act.change) {
        Some(Some(wire::act::Change::CheckpointKey(key))) => vec![key.public_key],
        Some(_) => Vec::new(),
        None => state().map_or_else(Vec::new, |state| state.checkpoint_keys.into_iter().map(|key| key.public_key).collect()),
    };
    named.into_iter().filter_map(|key| key.try_into().ok()).collect()
}

/// The bytes of the body in an encoded entry. Exactly version, time and that one body are accepted: protobuf would merge a second one into
/// the first, and what is read would not be what was signed.
fn body_of(entry: &[u8], kind: Kind) -> Result<&[u8], ActError> {
    let malformed = |error: prost::DecodeError| ActError::Malformed(error.to_string());
    let mut rest = entry;
    while rest.has_remaining() {
        let (field, wire_type) = decode_key(&mut rest).map_err(malformed)?;
        match wire_type {
            WireType::Varint => {
                decode_varint(&mut rest).map_err(malformed)?;
            }
            WireType::LengthDelimited if field == kind.field() => {
                let length = decode_varint(&mut rest).map_err(malformed)?;
                return if length == rest.len() as u64 { Ok(rest) } else { Err(ActError::Malformed("it is not the last field".into())) };
            }
            _ => break,
        }
    }
    Err(ActError::Malformed("it has another body".into()))
}
