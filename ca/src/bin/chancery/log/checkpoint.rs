//! Checkpoints: asked for, read from files, verified.

use std::io::Write;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use chancery_identity::checkpoint::{Checkpoint, CheckpointVerifier, Hash, MAX_NOTE_BYTES, verify};
use chancery_process::output::{Format, OutputError, fields};
use chancery_proto::chancery::v1::{GetCheckpointRequest, RotateCheckpointKeyRequest};
use serde::Serialize;

use crate::client::{CliError, Log};

#[derive(Serialize)]
struct Shown<'a> {
    origin: &'a str,
    entries: u64,
    root: String,
    note: &'a str,
    verifier_keys: &'a [String],
}

#[derive(Serialize)]
struct Keys {
    verifier_keys: Vec<String>,
}

/// Prints the newest checkpoint: the note alone, or with what it says.
pub(super) async fn show(mut log: Log, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let answer = log.get_checkpoint(GetCheckpointRequest {}).await?.into_inner();
    let checkpoint = open(&answer.note, &answer.verifier_keys)?;
    if format == Format::Table {
        return Ok(write!(out, "{}", answer.note).map_err(OutputError::Write)?);
    }
    let shown = Shown {
        origin: &checkpoint.origin,
        entries: checkpoint.size,
        root: STANDARD.encode(checkpoint.root),
        note: &answer.note,
        verifier_keys: &answer.verifier_keys,
    };
    Ok(fields(out, format, &shown)?)
}

/// Prints the verifier key alone; while it is being rotated both, the older one first.
pub(super) async fn key(mut log: Log, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let answer = log.get_checkpoint(GetCheckpointRequest {}).await?.into_inner();
    print_keys(answer.verifier_keys, out, format)
}

/// Has another key made, and prints what verifies it.
pub(super) async fn rotate_key(mut log: Log, reason: String, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let answer = log.rotate_checkpoint_key(RotateCheckpointKeyRequest { reason }).await?.into_inner();
    print_keys(vec![answer.verifier_key], out, format)
}

fn print_keys(verifier_keys: Vec<String>, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    if format == Format::Table {
        return Ok(verifier_keys.iter().try_for_each(|key| writeln!(out, "{key}")).map_err(OutputError::Write)?);
    }
    Ok(fields(out, format, &Keys { verifier_keys })?)
}

/// The checkpoint in a note that one of these keys has signed; there may be several in one of the texts, a line each.
pub(super) fn open(note: &str, verifier_keys: &[String]) -> Result<Checkpoint, CliError> {
    let keys = verifier_keys.iter().flat_map(|keys| keys.lines()).map(str::trim).filter(|key| !key.is_empty());
    let keys = keys.map(str::parse::<CheckpointVerifier>).collect::<Result<Vec<_>, _>>();
    keys.and_then(|keys| verify(note, &keys)).map_err(|error| CliError::Failed(error.to_string()))
}

/// The keys to believe: those that were given, which the CA cannot choose, or else the CA's.
pub(super) fn believed<'a>(given: &'a [String], of_ca: &'a [String]) -> &'a [String] {
    if given.is_empty() { of_ca } else { given }
}

/// A note from a file.
pub(super) fn read_note(path: &Path) -> Result<String, CliError> {
    let failed = |problem: &dyn std::fmt::Display| CliError::Failed(format!("{}: {problem}", path.display()));
    let length = std::fs::metadata(path).map_err(|error| failed(&error))?.len();
    if length > MAX_NOTE_BYTES as u64 {
        return Err(failed(&"too long for a checkpoint"));
    }
    std::fs::read_to_string(path).map_err(|error| failed(&error))
}

/// Hashes of a proof, as they came.
pub(super) fn hashes(proof: &[Vec<u8>]) -> Result<Vec<Hash>, CliError> {
    let hash = |bytes: &Vec<u8>| Hash::try_from(bytes.as_slice());
    proof
        .iter()
        .map(hash)
        .collect::<Result<_, _>>()
        .map_err(|_| CliError::Failed("the CA sent a proof with a hash that has not 32 bytes".into()))
}
