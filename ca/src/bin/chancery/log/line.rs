//! A line of an export.
//!
//! In JSON each entry is an object with `entry` (its number), `time`, `kind`, `leaf_hash` (hexadecimal), `bytes` (the entry as it is stored,
//! base64), and what it says in words; an issuance has the fields of `identity show`. Wherever an export ended there is a line with
//! `checkpoint` (a signed note) in place of an entry. In CSV there is what a spreadsheet can show of issuances and acts, and nothing that could
//! be verified.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use chancery_ca::ledger::{Body, Entry, read_identity};
use chancery_identity::checkpoint::leaf_hash;
use chancery_process::output::Format;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::identity::{self, IdentityRow};
use crate::output::moment;

/// The columns of acts, behind those of issuances.
const ACT_COLUMNS: [&str; 5] = ["actor", "action", "target", "why", "outcome"];

/// An entry, to be written.
#[derive(Serialize)]
pub(super) struct EntryLine {
    entry: u64,
    time: String,
    kind: &'static str,
    leaf_hash: String,
    bytes: String,
    #[serde(flatten)]
    words: Map<String, Value>,
}

/// Where an export ended, to be written.
#[derive(Serialize)]
pub(super) struct CheckpointLine<'a> {
    pub(super) checkpoint: &'a str,
    pub(super) verifier_keys: &'a [String],
}

/// What is read of a line again.
#[derive(Deserialize)]
pub(super) struct ReadLine<'a> {
    pub(super) entry: Option<u64>,
    pub(super) leaf_hash: Option<&'a str>,
    pub(super) bytes: Option<&'a str>,
    pub(super) checkpoint: Option<String>,
}

impl EntryLine {
    /// What an entry says, as far as this version understands it.
    pub(super) fn of(index: u64, bytes: &Bytes) -> Self {
        let (time, kind, words) = match Entry::decode(bytes.clone()) {
            Err(error) => (0, "unknown", words(json!({ "error": error.to_string() }))),
            Ok(entry) => {
                let (kind, words) = described(index, &entry);
                (entry.time_ms, kind, words)
            }
        };
        Self { entry: index, time: moment(time), kind, leaf_hash: hex::encode(leaf_hash(bytes)), bytes: STANDARD.encode(bytes), words }
    }

    /// The columns of [`header`].
    pub(super) fn cells(&self) -> Vec<String> {
        let number = self.entry.to_string();
        let mut cells = vec![number, self.time.clone(), self.kind.to_owned()];
        let has_columns = ["issuance", "act"].contains(&self.kind);
        cells.extend(columns().map(|column| match self.words.get(column).filter(|_| has_columns) {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) => text_cell(text),
            Some(Value::Array(values)) => values.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" "),
            Some(other) => other.to_string(),
        }));
        cells
    }
}

/// A line is an entry: whoever resumes an export relies on that. And no spreadsheet takes somebody's words for a formula.
fn text_cell(text: &str) -> String {
    let quote = if text.starts_with(['=', '+', '-', '@']) { "'" } else { "" };
    format!("{quote}{}", text.replace(char::is_control, " "))
}

/// The names of a CSV's columns.
pub(super) fn header() -> Vec<&'static str> {
    ["entry", "time", "kind"].into_iter().chain(columns()).collect()
}

fn columns() -> impl Iterator<Item = &'static str> {
    let of_issuances = identity::columns(Format::Csv).iter().copied().filter(|column| !["entry", "time"].contains(column));
    of_issuances.chain(ACT_COLUMNS)
}

fn described(index: u64, entry: &Entry) -> (&'static str, Map<String, Value>) {
    match &entry.body {
        Body::Issuance(_) => {
            let identity = read_identity(index, entry.bytes()).ok().flatten();
            let row = identity.map(|identity| serde_json::to_value(IdentityRow::of(&identity.into())));
            let mut words = row.and_then(Result::ok).map(words).unwrap_or_default();
            // They stand in front.
            words.retain(|name, _| !["entry", "time"].contains(&name.as_str()));
            ("issuance", words)
        }
        Body::Act(act) => {
            let said = json!({"actor": act.actor, "action": act.action, "target": act.target, "why": act.why, "outcome": act.outcome});
            ("act", words(said))
        }
        Body::State(state) => {
            let said = json!({"epoch": state.epoch, "part": state.part, "parts": state.parts, "roots": state.roots.len(),
                "revocations": state.revocations.len(), "bans": state.bans.len()});
            ("state", words(said))
        }
        Body::Start(start) => {
            let said = json!({"version": start.version, "configuration": hex::encode(&start.configuration),
                "development": start.development, "repairs": start.repairs});
            ("start", words(said))
        }
        Body::Configuration(change) => {
            let said = json!({"before": hex::encode(&change.before), "after": hex::encode(&change.after), "changed": change.changed});
            ("configuration", words(said))
        }
        Body::Authority(authority) => {
            ("authority", words(json!({"root": authority.root, "certificate": STANDARD.encode(&authority.certificate)})))
        }
    }
}

fn words(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(words) => words,
        _ => Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_is_one_line_and_no_formula() {
        let cells = ["two\nlines", "=HYPERLINK(\"x\")", "a=b", ""].map(text_cell);
        assert_eq!(cells, ["two lines", "'=HYPERLINK(\"x\")", "a=b", ""]);
    }
}
