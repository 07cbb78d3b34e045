//! Tables as JSON Lines: Parquet files, and CSV or TSV, whose rows become one JSON object each, with the columns as its keys.

mod columnar;
mod delimited;

use std::io::{self, Read};
use std::path::Path;

use serde_json::Value;

use crate::files::unpacked;

pub use columnar::rows as parquet_rows;

/// What a Parquet file begins with.
pub const PARQUET: &[u8] = b"PAR1";

/// A kind of file that holds rows of named columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// Apache Parquet.
    Parquet,
    /// Values separated by commas, or by what the first line has more of: semicolons or tabulators.
    Csv,
    /// Values separated by tabulators.
    Tsv,
}

impl Table {
    /// What a file is: Parquet by what it begins with, CSV and TSV by its name (`.csv`, `.tsv`, gzip too); `None`: no table.
    pub fn of(path: &Path, start: &[u8]) -> Option<Self> {
        if start.starts_with(PARQUET) {
            return Some(Self::Parquet);
        }
        match unpacked(path).extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "csv" => Some(Self::Csv),
            "tsv" => Some(Self::Tsv),
            _ => None,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Parquet => "Parquet",
            Self::Csv => "CSV",
            Self::Tsv => "TSV",
        }
    }

    /// The text of a file's rows, one JSON object a line, made while it is read. `text` is what a file of text holds, unpacked.
    ///
    /// # Errors
    /// If a Parquet file cannot be opened as one, or the first line of the others names no columns; rows that are damaged are errors
    /// of the reader.
    pub fn json_lines<'a>(self, path: &Path, text: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
        Ok(match self {
            Self::Parquet => Box::new(JsonLines::of(columnar::rows(path)?)),
            Self::Csv => Box::new(JsonLines::of(delimited::rows(text, None)?)),
            Self::Tsv => Box::new(JsonLines::of(delimited::rows(text, Some(b'\t'))?)),
        })
    }
}

/// A row is not what its table promises.
fn damaged(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Values as the text of JSON Lines.
struct JsonLines<I> {
    rows: I,
    line: Vec<u8>,
    /// Bytes of the line that were taken.
    at: usize,
}

impl<I> JsonLines<I> {
    fn of(rows: I) -> Self {
        Self { rows, line: Vec::new(), at: 0 }
    }
}

impl<I: Iterator<Item = io::Result<Value>>> Read for JsonLines<I> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.line.len() {
            let Some(row) = self.rows.next() else { return Ok(0) };
            self.line.clear();
            self.at = 0;
            serde_json::to_writer(&mut self.line, &row?)?;
            self.line.push(b'\n');
        }
        let n = buffer.len().min(self.line.len() - self.at);
        buffer[..n].copy_from_slice(&self.line[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_told_by_content_and_name() {
        for (name, start, table) in [
            ("a.csv", &b"x,y"[..], Some(Table::Csv)),
            ("a.CSV.gz", b"x,y", Some(Table::Csv)),
            ("a.tsv", b"x\ty", Some(Table::Tsv)),
            ("a.jsonl", b"PAR1\x15", Some(Table::Parquet)),
            ("a.jsonl.gz", b"{", None),
            ("csv", b"x,y", None),
            ("a.csv.txt", b"x,y", None),
        ] {
            assert_eq!(Table::of(Path::new(name), start), table, "{name}");
        }
    }
}
