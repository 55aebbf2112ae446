//! `chancery log prove`: proofs from the CA, verified here before they are printed.

use std::io::Write;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use chancery_ca::ledger::{Body, Entry, read_identity};
use chancery_identity::checkpoint::{Checkpoint, Hash, leaf_hash, unverified, verify_consistency, verify_inclusion};
use chancery_process::output::{Format, OutputError, fields};
use chancery_proto::chancery::v1::prove_inclusion_request::Of;
use chancery_proto::chancery::v1::{
    GetCheckpointRequest, GetCheckpointResponse, IdentityFilter, ProveConsistencyRequest, ProveInclusionRequest,
};
use clap::{ArgGroup, Args};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::Serialize;
use serde_json::Value;

use super::checkpoint::{believed, hashes, open, read_note};
use crate::client::{CliError, Log};
use crate::identity::check;

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("subject").required(true).args(["target", "consistency"]))]
pub(crate) struct ProveArgs {
    /// An entry's number, a certificate's serial number (hexadecimal), or a file with a certificate (PEM or DER).
    #[arg(value_name = "ENTRY|SERIAL|CERTIFICATE")]
    target: Option<String>,
    /// Prove that the ledger begins with the checkpoint in this file.
    #[arg(long, value_name = "FILE")]
    consistency: Option<PathBuf>,
    /// The ledger's verifier key, or several of them, instead of those that the CA gives.
    #[arg(long, value_name = "KEY")]
    verifier_key: Vec<String>,
}

/// That an entry is in the tree of a checkpoint.
#[derive(Debug, Serialize)]
struct Inclusion {
    /// The entry's number.
    entry: u64,
    /// Of the checkpoint.
    entries: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    spiffe_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    serial: Option<String>,
    /// Hexadecimal.
    leaf_hash: String,
    /// Base64, the leaf's sibling first.
    hashes: Vec<String>,
    /// The entry as it is stored, base64.
    bytes: String,
    /// A signed note.
    checkpoint: String,
    verifier_keys: Vec<String>,
}

/// What of it people read.
#[derive(Debug, Serialize)]
struct Summary<'a> {
    verdict: String,
    entry: u64,
    spiffe_id: &'a str,
    serial: &'a str,
    leaf_hash: &'a str,
}

#[derive(Serialize)]
struct Consistency {
    old_entries: u64,
    entries: u64,
    hashes: Vec<String>,
    old_checkpoint: String,
    checkpoint: String,
    verifier_keys: Vec<String>,
}

/// What a proof is about.
enum Target {
    Entry(u64),
    Serial(String),
    Certificate(Vec<u8>),
}

/// A newer checkpoint, verified to begin with an older one.
pub(super) struct Newer {
    pub(super) checkpoint: Checkpoint,
    pub(super) note: String,
    pub(super) verifier_keys: Vec<String>,
    pub(super) hashes: Vec<Hash>,
}

pub(super) async fn run(mut log: Log, args: ProveArgs, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let given = &args.verifier_key[..];
    if let Some(file) = &args.consistency {
        let old_note = read_note(file)?;
        let (old, newer) = since(&mut log, &old_note, given).await?;
        let shown = Consistency {
            old_entries: old.size,
            entries: newer.checkpoint.size,
            hashes: newer.hashes.iter().map(|hash| STANDARD.encode(hash)).collect(),
            old_checkpoint: old_note,
            checkpoint: newer.note,
            verifier_keys: newer.verifier_keys,
        };
        if format == Format::Table {
            let said =
                format!("the {} entries of the newest checkpoint begin with the {} of the older one", shown.entries, shown.old_entries);
            return Ok(writeln!(out, "{said}").map_err(OutputError::Write)?);
        }
        return Ok(fields(out, format, &shown)?);
    }
    let target = Target::read(args.target.as_deref().unwrap_or_default())?;
    let proof = inclusion(&mut log, target, given).await?;
    if format == Format::Table { Ok(fields(out, format, &proof.summary())?) } else { Ok(fields(out, format, &proof)?) }
}

/// A proof that this entry is in the ledger, verified; in a table, in words.
pub(crate) async fn proof_of(mut log: Log, entry: u64, format: Format) -> Result<Value, CliError> {
    let proof = match inclusion(&mut log, Target::Entry(entry), &[]).await {
        // What there is to show is shown all the same: on a full disk, say, nothing newer is published.
        Err(CliError::Refused(status)) => return Ok(format!("none at the moment: {}", status.message()).into()),
        proof => proof?,
    };
    if format == Format::Table {
        return Ok(proof.summary().verdict.into());
    }
    Ok(serde_json::to_value(proof).map_err(OutputError::Json)?)
}

impl Inclusion {
    fn summary(&self) -> Summary<'_> {
        Summary {
            verdict: format!("in the ledger: verified against the checkpoint of {} entries", self.entries),
            entry: self.entry,
            spiffe_id: self.spiffe_id.as_deref().unwrap_or_default(),
            serial: self.serial.as_deref().unwrap_or_default(),
            leaf_hash: &self.leaf_hash,
        }
    }
}

/// Asks for a proof and verifies it, as it would be if somebody else had made it.
async fn inclusion(log: &mut Log, target: Target, given: &[String]) -> Result<Inclusion, CliError> {
    let answer = log.prove_inclusion(ProveInclusionRequest { of: Some(target.of()) }).await?.into_inner();
    let checkpoint = open(&answer.note, believed(given, &answer.verifier_keys))?;
    let proof = hashes(&answer.hashes)?;
    let failed = |problem: String| CliError::Failed(format!("the CA's proof proves nothing: {problem}"));
    verify_inclusion(&answer.bytes, answer.entry, &checkpoint, &proof).map_err(|error| failed(error.to_string()))?;
    let identity = read_identity(answer.entry, &answer.bytes).map_err(|error| CliError::Failed(error.to_string()))?;
    let is_it = match (&target, &identity) {
        (Target::Entry(entry), _) => *entry == answer.entry,
        (Target::Serial(serial), Some(identity)) => identity.leaf.serial.to_string() == serial.replace(':', "").to_lowercase(),
        (Target::Certificate(der), Some(identity)) => identity.issuance.certificate == *der,
        (Target::Certificate(der), None) => own_certificate(&answer.bytes).is_some_and(|own| own == *der),
        (Target::Serial(_), None) => false,
    };
    if !is_it {
        return Err(failed(format!("entry {} is about something else", answer.entry)));
    }
    Ok(Inclusion {
        entry: answer.entry,
        entries: checkpoint.size,
        spiffe_id: identity.as_ref().map(|identity| identity.leaf.spiffe_id.to_string()),
        serial: identity.as_ref().map(|identity| identity.leaf.serial.to_string()),
        leaf_hash: hex::encode(leaf_hash(&answer.bytes)),
        hashes: proof.iter().map(|hash| STANDARD.encode(hash)).collect(),
        bytes: STANDARD.encode(&answer.bytes),
        checkpoint: answer.note,
        verifier_keys: answer.verifier_keys,
    })
}

/// The CA's own certificate that an entry is about.
fn own_certificate(entry: &[u8]) -> Option<Vec<u8>> {
    match Entry::decode(Bytes::copy_from_slice(entry)).ok()?.body {
        Body::Authority(own) => Some(own.certificate),
        _ => None,
    }
}

/// Proves that the CA's ledger begins with the checkpoint in `old_note`, which one of the same keys has to have signed.
pub(super) async fn since(log: &mut Log, old_note: &str, given: &[String]) -> Result<(Checkpoint, Newer), CliError> {
    let newest = log.get_checkpoint(GetCheckpointRequest {}).await?.into_inner();
    is_same_ledger(log, old_note, &newest.note).await?;
    let old = open(old_note, believed(given, &newest.verifier_keys))?;
    let newer = continued(log, &old, newest, given).await?;
    Ok((old, newer))
}

/// That the CA did not begin another ledger since, which proves nothing of the old one.
async fn is_same_ledger(log: &mut Log, old_note: &str, newest: &str) -> Result<(), CliError> {
    let read = |note: &str| unverified(note).map_err(|error| CliError::Failed(error.to_string()));
    let (old, new) = (read(old_note)?.origin, read(newest)?.origin);
    if old == new {
        return Ok(());
    }
    let request = ProveInclusionRequest { of: Some(Of::Entry(0)) };
    let first = log.prove_inclusion(request).await.ok().map(|answer| answer.into_inner().bytes);
    let because = match first.as_deref().and_then(accepted_loss) {
        Some(why) => format!("its first entry says why: {why}. Whoever audits the new one begins with another file"),
        None => "its first entry does not say why".to_owned(),
    };
    let problem = format!("the checkpoint that was kept is of the ledger {old}, and the CA shows {new}; {because}");
    Err(CliError::Inconsistent { problem, note: newest.to_owned() })
}

/// Why this entry accepts the loss of an older ledger's end, if that is what it does.
fn accepted_loss(first: &[u8]) -> Option<String> {
    match Entry::decode(Bytes::copy_from_slice(first)).ok()?.body {
        Body::Act(act) if act.action == "log.accept-loss" => Some(format!("{} ({})", act.why, act.target)),
        _ => None,
    }
}

/// Proves that the CA's ledger, of which it has shown the checkpoint `newest`, begins with the checkpoint `old`, whoever signed that.
pub(super) async fn continued(log: &mut Log, old: &Checkpoint, newest: GetCheckpointResponse, given: &[String]) -> Result<Newer, CliError> {
    let keys = believed(given, &newest.verifier_keys).to_vec();
    let mut newer =
        Newer { checkpoint: open(&newest.note, &keys)?, note: newest.note, verifier_keys: newest.verifier_keys, hashes: Vec::new() };
    // Of a smaller ledger no proof is asked for: there is none.
    if newer.checkpoint.size > old.size && old.size > 0 {
        let answer = log.prove_consistency(ProveConsistencyRequest { since: old.size }).await?.into_inner();
        newer.checkpoint = open(&answer.note, &keys)?;
        newer.hashes = hashes(&answer.hashes)?;
        newer.note = answer.note;
    }
    match verify_consistency(old, &newer.checkpoint, &newer.hashes) {
        Ok(()) => Ok(newer),
        Err(error) => Err(CliError::Inconsistent { problem: error.to_string(), note: newer.note }),
    }
}

impl Target {
    fn read(text: &str) -> Result<Self, CliError> {
        if Path::new(text).is_file() {
            return Ok(Self::Certificate(certificate(Path::new(text))?));
        }
        match text.parse() {
            // A serial number has 32 digits, and some have no letter among them.
            Ok(entry) if text.len() < 32 => Ok(Self::Entry(entry)),
            _ if !text.is_empty() && check(&IdentityFilter { serial: text.to_owned(), ..IdentityFilter::default() }).is_ok() => {
                Ok(Self::Serial(text.to_owned()))
            }
            _ => Err(CliError::Usage(format!("{text} is no file, no entry's number and no serial number (32 hexadecimal digits)"))),
        }
    }

    fn of(&self) -> Of {
        match self {
            Self::Entry(entry) => Of::Entry(*entry),
            Self::Serial(serial) => Of::Serial(serial.clone()),
            Self::Certificate(der) => Of::Certificate(der.clone()),
        }
    }
}

/// The first certificate in a file; a chain's leaf.
fn certificate(path: &Path) -> Result<Vec<u8>, CliError> {
    let bytes = std::fs::read(path).map_err(|error| CliError::Failed(format!("{}: {error}", path.display())))?;
    if !bytes.starts_with(b"-----") && !bytes.windows(10).any(|window| window == b"-----BEGIN") {
        return Ok(bytes);
    }
    let first = CertificateDer::from_pem_slice(&bytes);
    first.map(|der| der.to_vec()).map_err(|error| CliError::Failed(format!("{}: {error}", path.display())))
}
