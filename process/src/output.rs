//! Answers of a command line: a table for people, JSON for programs, CSV for spreadsheets.
//!
//! JSON carries everything, under the names of the serialized type; a table shows the columns that the caller chose; CSV has the same.

mod listing;

use std::io::Write;

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;
use serde_json::{Map, Value};

pub use self::listing::{Json, Listing};

/// `--output` of every command that lists or shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Aligned columns.
    #[default]
    Table,
    /// One document; where something is waited for, a line for each event.
    Json,
    /// A header and a line per row.
    Csv,
}

/// An answer that could not be printed.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// A row that is no object.
    #[error("this answer cannot be written as {0:?}; use `--output json`")]
    Shape(Format),
    /// Not JSON.
    #[error("cannot write JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// Not CSV.
    #[error("cannot write CSV: {0}")]
    Csv(#[from] csv::Error),
    /// The other end has gone.
    #[error("cannot write the answer: {0}")]
    Write(#[from] std::io::Error),
}

impl OutputError {
    /// Whether the reader of a pipe has seen enough.
    pub fn is_broken_pipe(&self) -> bool {
        let kind = match self {
            Self::Shape(_) => None,
            Self::Json(error) => error.io_error_kind(),
            Self::Csv(error) => match error.kind() {
                csv::ErrorKind::Io(error) => Some(error.kind()),
                _ => None,
            },
            Self::Write(error) => Some(error.kind()),
        };
        kind == Some(std::io::ErrorKind::BrokenPipe)
    }
}

/// Prints a list. `columns` are field names of `T`; nested ones are written `outer.inner`.
pub fn rows<T: Serialize>(out: &mut impl Write, format: Format, columns: &[&str], rows: &[T]) -> Result<(), OutputError> {
    let mut listing = Listing::begin(out, format, Json::Array, columns)?;
    listing.add(rows)?;
    listing.finish()
}

/// Prints one object: a table has a line for each of its fields.
pub fn fields<T: Serialize>(out: &mut impl Write, format: Format, value: &T) -> Result<(), OutputError> {
    if format == Format::Json {
        return json(out, value);
    }
    let Value::Object(object) = serde_json::to_value(value)? else { return Err(OutputError::Shape(format)) };
    if format == Format::Csv {
        let columns: Vec<&str> = object.keys().map(String::as_str).collect();
        return rows(out, format, &columns, std::slice::from_ref(&object));
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    add_fields(&mut table, "", &object);
    for line in table.lines() {
        // Less the padding before the first column: what goes on below a value stays there.
        writeln!(out, "{}", line.strip_prefix(' ').unwrap_or(&line).trim_end())?;
    }
    Ok(())
}

fn json<T: Serialize + ?Sized>(out: &mut impl Write, value: &T) -> Result<(), OutputError> {
    serde_json::to_writer_pretty(&mut *out, value)?;
    Ok(writeln!(out)?)
}

fn add_fields(table: &mut Table, prefix: &str, object: &Map<String, Value>) {
    for (name, value) in object {
        let name = format!("{prefix}{}", name.replace('_', " "));
        match value {
            Value::Object(inner) => add_fields(table, &format!("{name} "), inner),
            other => {
                table.add_row([name, printable(&sentences(other).unwrap_or_else(|| cell(Some(other))))]);
            }
        }
    }
}

/// A line for each item of a list that has sentences, not words.
fn sentences(value: &Value) -> Option<String> {
    let items: Vec<&str> = value.as_array()?.iter().map(Value::as_str).collect::<Option<_>>()?;
    items.iter().any(|item| item.contains([' ', ','])).then(|| items.join("\n"))
}

fn lookup<'v>(row: &'v Value, column: &str) -> Option<&'v Value> {
    column.split('.').try_fold(row, |value, name| value.get(name))
}

fn cell(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(items)) => items.iter().map(|item| cell(Some(item))).collect::<Vec<_>>().join(", "),
        Some(other) => other.to_string(),
    }
}

/// Names and messages come from elsewhere; a terminal must not obey what they contain. Line breaks stay.
fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|character| {
            let escape = character.is_control() && character != '\n';
            let escaped = escape.then(|| character.escape_default());
            escaped.into_iter().flatten().chain((!escape).then_some(character))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Row {
        spiffe_id: &'static str,
        dns_names: Vec<&'static str>,
        pod: Pod,
        revoked: Option<bool>,
    }

    #[derive(Serialize)]
    struct Pod {
        name: &'static str,
    }

    const ROWS: [fn() -> Row; 2] = [
        || Row { spiffe_id: "spiffe://a/b", dns_names: vec!["x", "y"], pod: Pod { name: "cart-0" }, revoked: None },
        || Row { spiffe_id: "spiffe://a/longer", dns_names: vec![], pod: Pod { name: "red\u{1b}[31m" }, revoked: Some(true) },
    ];

    fn printed(format: Format) -> String {
        let mut out = Vec::new();
        rows(&mut out, format, &["spiffe_id", "dns_names", "pod.name"], &ROWS.map(|row| row())).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_table_is_aligned_and_harmless_to_the_terminal() {
        let table = printed(Format::Table);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines[0].split_whitespace().collect::<Vec<_>>(), ["SPIFFE", "ID", "DNS", "NAMES", "POD", "NAME"]);
        assert_eq!(lines[0].find("POD"), lines[1].find("cart-0"), "{table}");
        assert!(lines[2].contains("red\\u{1b}[31m"), "{table}");
    }

    #[test]
    fn csv_has_the_columns_that_were_asked_for() {
        assert!(printed(Format::Csv).starts_with("spiffe_id,dns_names,pod.name\nspiffe://a/b,\"x, y\",cart-0\n"));
    }

    #[test]
    fn json_has_everything_in_order() {
        let json = printed(Format::Json);
        let read: Value = serde_json::from_str(&json).unwrap();
        assert_eq!(read[1]["revoked"], true);
        assert!(json.find("spiffe_id") < json.find("dns_names"), "{json}");
    }

    #[test]
    fn an_empty_list_still_says_what_it_would_hold() {
        let mut out = Vec::new();
        rows::<Row>(&mut out, Format::Table, &["serial"], &[]).unwrap();
        assert_eq!(out, b"SERIAL\n");
    }

    #[test]
    fn a_list_that_comes_in_parts_is_one_list() {
        let all = ROWS.map(|row| row());
        let columns = ["spiffe_id", "pod.name"];
        for format in [Format::Table, Format::Json, Format::Csv] {
            let (mut whole, mut parts) = (Vec::new(), Vec::new());
            rows(&mut whole, format, &columns, &all).unwrap();
            let mut listing = Listing::begin(&mut parts, format, Json::Array, &columns).unwrap();
            listing.add::<Row>(&[]).unwrap();
            for row in &all {
                listing.add(std::slice::from_ref(row)).unwrap();
            }
            listing.finish().unwrap();
            // The first part of a table cannot know how wide the second one is.
            let words = |bytes: &[u8]| String::from_utf8_lossy(bytes).split_whitespace().map(str::to_owned).collect::<Vec<_>>();
            assert_eq!(words(&parts), words(&whole), "{format:?}");
        }
    }

    #[test]
    fn each_json_line_is_an_object() {
        let mut out = Vec::new();
        let mut listing = Listing::begin(&mut out, Format::Json, Json::Lines, &[]).unwrap();
        listing.add(&ROWS.map(|row| row())).unwrap();
        listing.finish().unwrap();
        let ids: Vec<Value> =
            out.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(|line| serde_json::from_slice(line).unwrap()).collect();
        assert_eq!((ids.len(), &ids[1]["spiffe_id"]), (2, &"spiffe://a/longer".into()));
    }

    #[test]
    fn one_object_has_a_line_for_each_field() {
        let mut out = Vec::new();
        fields(&mut out, Format::Table, &ROWS[0]()).unwrap();
        let text = String::from_utf8(out).unwrap();
        let words: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(words[0], ["spiffe", "id", "spiffe://a/b"]);
        assert_eq!(words[2], ["pod", "name", "cart-0"]);
    }

    #[test]
    fn sentences_stand_below_each_other_and_words_beside_each_other() {
        #[derive(Serialize)]
        struct Lists {
            dns_names: [&'static str; 2],
            problems: [&'static str; 2],
        }
        let mut out = Vec::new();
        fields(&mut out, Format::Table, &Lists { dns_names: ["x", "y"], problems: ["one, and two", "three"] }).unwrap();
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert_eq!(lines[0].find("x, y"), lines[1].find("one, and two"), "{text}");
        assert_eq!(lines[1].find("one, and two"), lines[2].find("three"), "{text}");
    }
}
