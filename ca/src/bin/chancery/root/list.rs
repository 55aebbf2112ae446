//! `chancery root list` and `show`.

use std::io::Write;

use chancery_process::output::{Format, fields, rows};
use chancery_proto::chancery::v1::{ListRootsRequest, RootRecord, RootState};
use serde::Serialize;

use super::Roots;
use crate::client::CliError;
use crate::identity::pem;
use crate::output::{moment, remark};

/// How a root is printed.
#[derive(Clone, Debug, Serialize)]
pub(super) struct RootRow {
    pub(super) fingerprint: String,
    pub(super) state: &'static str,
    since: String,
    /// When it is out of the bundles, if it is being distrusted.
    leaves_by: String,
    not_before: String,
    not_after: String,
    subject: String,
    /// The corporate CA above it; empty if there is none.
    signed_by: String,
    /// Whether it can sign.
    has_key: bool,
    issuing_until: String,
    /// Of the act that brought it there.
    entry: u64,
}

/// With its certificate.
#[derive(Debug, Serialize)]
struct Shown {
    #[serde(flatten)]
    row: RootRow,
    certificate_pem: String,
}

impl From<&RootRecord> for RootRow {
    fn from(record: &RootRecord) -> Self {
        Self {
            fingerprint: record.fingerprint.clone(),
            state: word(record.state()),
            since: moment(record.since_ms),
            leaves_by: moment(record.leave_by_ms),
            not_before: moment(record.not_before_ms),
            not_after: moment(record.not_after_ms),
            subject: record.subject.clone(),
            signed_by: record.signed_by.clone(),
            has_key: record.has_key,
            issuing_until: moment(record.issuing_until_ms),
            entry: record.entry,
        }
    }
}

pub(super) async fn run(mut ca: Roots, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let roots = ca.list_roots(ListRootsRequest {}).await?.into_inner().roots;
    for root in roots.iter().filter(|root| !root.advice.is_empty()) {
        let what = match root.leave_by_ms {
            0 => format!("ends at {}", moment(root.not_after_ms)),
            _ => "is being distrusted".to_owned(),
        };
        remark(format!("the root {} {what}: {}", root.fingerprint, root.advice));
    }
    let roots: Vec<RootRow> = roots.iter().map(RootRow::from).collect();
    Ok(rows(out, format, &["state", "since", "not_after", "leaves_by", "fingerprint", "subject"], &roots)?)
}

pub(super) async fn show(mut ca: Roots, root: &str, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let wanted = root.replace(':', "").to_ascii_lowercase();
    let roots = ca.list_roots(ListRootsRequest {}).await?.into_inner().roots;
    let mut found = roots.iter().filter(|root| root.fingerprint.starts_with(&wanted));
    let (Some(root), None) = (found.next(), found.next()) else {
        return Err(CliError::Failed(format!(
            "{wanted:?} is not the beginning of one root's fingerprint; `chancery root list` shows them"
        )));
    };
    Ok(fields(out, format, &Shown { row: RootRow::from(root), certificate_pem: pem(&root.certificate) })?)
}

pub(super) fn word(state: RootState) -> &'static str {
    match state {
        RootState::Unspecified => "unknown",
        RootState::Prepared => "prepared",
        RootState::Published => "published",
        RootState::Active => "active",
        RootState::Draining => "draining",
        RootState::Retired => "retired",
        RootState::Distrusted => "distrusted",
    }
}
