//! `chancery identity show`: one identity with all that is known about it.

use std::io::Write;

use chancery_process::output::{Format, OutputError, fields};
use chancery_proto::chancery::v1::{AuthorityStatus, IdentityFilter, IdentityStanding, ShowIdentityRequest, show_identity_request::By};
use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::filter;
use super::row::IdentityRow;
use crate::client::{CliError, Log, Operator};
use crate::log::proof_of;
use crate::output::moment;

pub(super) const EXAMPLES: &str = "\
Examples:
  chancery identity show 2f7c91d05b3e4a86a1c40e97d2f86b15
  chancery identity show --entry 20417 -o json";

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct ShowArgs {
    /// Serial number, hexadecimal.
    serial: Option<String>,
    /// The number of its entry in the ledger.
    #[arg(long)]
    entry: Option<u64>,
}

/// An identity with its context, as it is printed.
#[derive(Debug, Serialize)]
struct ShownRow {
    /// In words.
    state: String,
    #[serde(flatten)]
    identity: IdentityRow,
    expired: bool,
    superseded_by: Option<u64>,
    revoked_by: Option<u64>,
    revoked_at: Option<String>,
    issued_by: Option<OwnCertificateRow>,
    trust_root: Option<OwnCertificateRow>,
    /// That its entry is in the ledger; in a table, in words.
    proof: Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    certificate_pem: Option<String>,
}

/// A certificate of the CA's own, as it is printed.
#[derive(Debug, Serialize)]
struct OwnCertificateRow {
    name: String,
    fingerprint: String,
    not_before: String,
    not_after: String,
}

pub(super) async fn run(mut ca: Operator, log: Log, args: ShowArgs, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    if let Some(serial) = &args.serial {
        filter::check(&IdentityFilter { serial: serial.clone(), ..IdentityFilter::default() })?;
    }
    let by = args.entry.map(By::Entry).or(args.serial.map(By::Serial));
    let shown = ca.show_identity(ShowIdentityRequest { by }).await?.into_inner();
    let (identity, standing) = (shown.identity.unwrap_or_default(), shown.standing.unwrap_or_default());
    let certificate = identity.issuance.as_ref().map_or(&[][..], |issuance| &issuance.certificate);
    let row = ShownRow {
        state: state(&standing),
        identity: IdentityRow::of(&identity),
        expired: standing.expired,
        superseded_by: standing.superseded_by,
        revoked_by: standing.revoked_by,
        revoked_at: (standing.revoked_at_ms != 0).then(|| moment(standing.revoked_at_ms)),
        issued_by: standing.issuing_certificate.map(OwnCertificateRow::of),
        trust_root: standing.root.map(OwnCertificateRow::of),
        proof: proof_of(log, identity.entry, format).await?,
        certificate_pem: (format != Format::Table).then(|| pem(certificate)),
    };
    fields(out, format, &row)?;
    if format == Format::Table {
        write!(out, "\n{}", shown.text).map_err(OutputError::Write)?;
    }
    Ok(())
}

/// All that is to be said of it, or that it is valid.
fn state(standing: &IdentityStanding) -> String {
    let mut words = Vec::new();
    words.extend((standing.revoked_at_ms != 0).then(|| match standing.revoked_by {
        Some(entry) => format!("revoked by entry {entry}"),
        None => format!("revoked at {}, in the ledger that this one continues", moment(standing.revoked_at_ms)),
    }));
    words.extend(standing.not_yet_valid.then(|| "not yet valid".to_owned()));
    words.extend(standing.expired.then(|| "expired".to_owned()));
    words.extend(standing.superseded_by.map(|entry| format!("superseded by entry {entry}")));
    if words.is_empty() { "valid".into() } else { words.join(", ") }
}

impl OwnCertificateRow {
    fn of(own: AuthorityStatus) -> Self {
        Self { name: own.subject, fingerprint: own.fingerprint, not_before: moment(own.not_before_ms), not_after: moment(own.not_after_ms) }
    }
}

/// RFC 7468.
pub(crate) fn pem(der: &[u8]) -> String {
    pem_block("CERTIFICATE", der)
}

/// PEM with this label.
pub(crate) fn pem_block(label: &str, der: &[u8]) -> String {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut pem = format!("-----BEGIN {label}-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.push_str(&String::from_utf8_lossy(line));
        pem.push('\n');
    }
    pem + &format!("-----END {label}-----\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_says_all_that_is_wrong_or_that_nothing_is() {
        assert_eq!(state(&IdentityStanding::default()), "valid");
        let (superseded_by, revoked_by) = (Some(7), Some(9));
        let standing = IdentityStanding { expired: true, superseded_by, revoked_by, revoked_at_ms: 1000, ..IdentityStanding::default() };
        assert_eq!(state(&standing), "revoked by entry 9, expired, superseded by entry 7");
        let standing = IdentityStanding { revoked_at_ms: 1000, ..IdentityStanding::default() };
        assert_eq!(state(&standing), "revoked at 1970-01-01T00:00:01Z, in the ledger that this one continues");
    }
}
