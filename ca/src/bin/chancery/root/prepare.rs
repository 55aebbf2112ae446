//! `chancery root prepare`: the next root, made by the CA or signed by a corporate one.

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use chancery_process::output::{Format, fields};
use chancery_proto::chancery::v1::{AnswerRootRequest, PrepareRootRequest, RequestRootRequest};
use clap::{ArgGroup, Args};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::Serialize;

use super::Roots;
use super::step::Moved;
use crate::client::CliError;
use crate::identity::pem_block;

pub(super) const EXAMPLES: &str = "\
Examples:
  chancery root prepare --reason 'once a year'
  chancery root prepare --csr root.csr --reason 'the next root, for the corporate CA to sign'
  chancery root prepare --certificate root.pem --reason 'signed by the corporate CA'";

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("origin").args(["csr", "certificate", "self_signed"]))]
pub(crate) struct PrepareArgs {
    /// Write the request that a corporate CA is to sign the next root for. Until it is answered, asking again writes the same.
    #[arg(long, value_name = "FILE")]
    csr: Option<PathBuf>,
    /// Bring back what the corporate CA signed (PEM or DER). It becomes the anchor itself; certificates above it are left out.
    #[arg(long, value_name = "FILE")]
    certificate: Option<PathBuf>,
    /// Have the CA make it, although the active one is a corporate CA's.
    #[arg(long)]
    self_signed: bool,
    /// Why: recorded with the act.
    #[arg(long)]
    reason: String,
}

#[derive(Debug, Serialize)]
struct Requested {
    /// False if it is the one that was asked for before.
    changed: bool,
    request: String,
    next_step: &'static str,
}

pub(super) async fn run(mut ca: Roots, args: PrepareArgs, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let PrepareArgs { csr, certificate, self_signed, reason } = args;
    let moved = match (csr, certificate) {
        (Some(path), _) => return request(ca, &path, reason, out, format).await,
        (None, Some(path)) => ca.answer_root(AnswerRootRequest { reason, certificates: read(&path)? }).await?,
        (None, None) => ca.prepare_root(PrepareRootRequest { reason, self_signed }).await?,
    };
    Ok(fields(out, format, &Moved::from(moved.into_inner()))?)
}

async fn request(mut ca: Roots, path: &Path, reason: String, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let answer = ca.request_root(RequestRootRequest { reason }).await?.into_inner();
    write_new(path, &pem_block("CERTIFICATE REQUEST", &answer.csr))?;
    let next_step = "have it signed as a CA that allows one more below, then `chancery root prepare --certificate FILE --reason …`";
    Ok(fields(out, format, &Requested { changed: answer.changed, request: path.display().to_string(), next_step })?)
}

/// Never over a file that holds something else.
fn write_new(path: &Path, pem: &str) -> Result<(), CliError> {
    let failed = |problem: &dyn std::fmt::Display| CliError::Failed(format!("{}: {problem}", path.display()));
    match fs::read_to_string(path) {
        Ok(before) if before == pem => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => fs::write(path, pem).map_err(|error| failed(&error)),
        Ok(_) => Err(failed(&"is there already and holds something else; name another file, which gets the same request")),
        Err(error) => Err(failed(&error)),
    }
}

/// The certificates in a file, DER.
fn read(path: &Path) -> Result<Vec<Vec<u8>>, CliError> {
    let failed = |problem: &str| CliError::Failed(format!("{}: {problem}", path.display()));
    let bytes = fs::read(path).map_err(|error| failed(&error.to_string()))?;
    if !bytes.starts_with(b"0") && std::str::from_utf8(&bytes).is_ok() {
        let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
        let found = found.map_err(|error| failed(&format!("is no PEM: {error}")))?;
        if found.is_empty() {
            return Err(failed("has no certificate in it"));
        }
        return Ok(found.into_iter().map(|certificate| certificate.to_vec()).collect());
    }
    Ok(vec![bytes])
}
