//! Lists that are printed as they come, however long they are.

use std::io::Write;

use serde::Serialize;
use serde_json::Value;

use super::{Format, OutputError, cell, lookup, printable};

/// Between the columns of a table.
const GAP: &str = "  ";

/// How a list looks in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Json {
    /// One array, whole with [`Listing::finish`].
    Array,
    /// One object in each line, each whole by itself (JSON Lines).
    Lines,
}

/// A list under way. What was added is written and flushed when [`Self::add`] returns.
#[derive(Debug)]
pub struct Listing<'a, W> {
    out: W,
    format: Format,
    json: Json,
    columns: &'a [&'a str],
    /// Of a table's columns, as far as they are known; they only grow.
    widths: Vec<usize>,
    added: u64,
}

impl<'a, W: Write> Listing<'a, W> {
    /// Begins a list with its header. `columns` are field names of what is listed, nested ones `outer.inner`; JSON has every field.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn begin(out: W, format: Format, json: Json, columns: &'a [&'a str]) -> Result<Self, OutputError> {
        let mut listing = Self { out, format, json, columns, widths: vec![0; columns.len()], added: 0 };
        if format == Format::Csv {
            listing.csv(&[columns.iter().map(ToString::to_string).collect()])?;
        }
        Ok(listing)
    }

    /// Adds rows. A table's columns are as wide as these and all before them need; its header comes with the first, which may be none.
    ///
    /// # Errors
    /// If they cannot be written, or are no objects.
    pub fn add<T: Serialize>(&mut self, rows: &[T]) -> Result<(), OutputError> {
        let rows: Vec<Value> = rows.iter().map(serde_json::to_value).collect::<Result<_, _>>()?;
        match self.format {
            Format::Json => self.objects(&rows)?,
            Format::Csv => self.csv(&self.cells(&rows)?)?,
            Format::Table => {
                let cells = self.cells(&rows)?;
                self.table(cells)?;
            }
        }
        self.added += rows.len() as u64;
        Ok(self.out.flush()?)
    }

    /// Ends the list.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn finish(mut self) -> Result<(), OutputError> {
        if self.format == Format::Json && self.json == Json::Array {
            writeln!(self.out, "{}", if self.added == 0 { "[]" } else { "\n]" })?;
        }
        Ok(self.out.flush()?)
    }

    fn cells(&self, rows: &[Value]) -> Result<Vec<Vec<String>>, OutputError> {
        let cells = |row: &Value| {
            let columns = row.is_object().then(|| self.columns.iter().map(|column| cell(lookup(row, column))).collect());
            columns.ok_or(OutputError::Shape(self.format))
        };
        rows.iter().map(cells).collect()
    }

    fn objects(&mut self, rows: &[Value]) -> Result<(), OutputError> {
        for (number, row) in (self.added..).zip(rows) {
            if self.json == Json::Lines {
                serde_json::to_writer(&mut self.out, row)?;
                writeln!(self.out)?;
            } else {
                self.out.write_all(if number == 0 { b"[" } else { b"," })?;
                for line in serde_json::to_string_pretty(row)?.lines() {
                    write!(self.out, "\n  {line}")?;
                }
            }
        }
        Ok(())
    }

    fn csv(&mut self, rows: &[Vec<String>]) -> Result<(), OutputError> {
        let mut writer = csv::Writer::from_writer(&mut self.out);
        for row in rows {
            writer.write_record(row)?;
        }
        Ok(writer.flush()?)
    }

    fn table(&mut self, mut rows: Vec<Vec<String>>) -> Result<(), OutputError> {
        for cell in rows.iter_mut().flatten() {
            *cell = printable(cell).replace('\n', " ");
        }
        if self.added == 0 && self.widths.iter().all(|width| *width == 0) {
            rows.insert(0, self.columns.iter().map(|column| column.replace(['_', '.'], " ").to_uppercase()).collect());
        }
        for row in &rows {
            for (width, cell) in self.widths.iter_mut().zip(row) {
                *width = cell.chars().count().max(*width);
            }
        }
        for row in &rows {
            let padded: Vec<_> = row.iter().zip(&self.widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            writeln!(self.out, "{}", padded.join(GAP).trim_end())?;
        }
        Ok(())
    }
}
