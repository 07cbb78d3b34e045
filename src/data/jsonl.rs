//! Rows of supervised fine-tuning: JSON in, checked conversations out. Data is untrusted: every row is checked by name.
//!
//! One object a line, or one array of objects, plain or gzip, or a row of a table ([`crate::tables`]). Forms:
//!
//! * `{"prompt", "response" | "completion", "system"?}`; TRL's conversational form has lists of messages in place of texts;
//! * `{"messages": [{"role", "content"}, …], "system"?}`, the content a text or OpenAI's list of text parts;
//! * ShareGPT, `{"conversations": [{"from", "value"}, …], "system"?}`;
//! * Alpaca, `{"instruction", "input"?, "output"}`: the input follows the instruction on a line of its own.
//!
//! `"train": false`, or `"weight": 0`, on an assistant turn or a row: it is not trained. Null is a field left out, an empty
//! system is none. Keys that nothing reads are counted ([`RowFile::ignored`]). Lines of white space alone are ignored and
//! counted (many tools end or separate files with them, and they hold no data). A known key given twice is an error, since
//! readers disagree about which one counts. NUL characters (`\u0000`) are ordinary text; lone surrogates (`\ud83d` alone)
//! are not text at all and are refused.

use std::path::Path;

use rayon::prelude::*;
use serde::de::DeserializeSeed;

use crate::data::columns::Columns;
use crate::data::row::Row;
use crate::data::row_fields::Turns;
use crate::data::row_json::{Json, Levels};
use crate::data::source::{Batches, Item, Source};
use crate::error::Result;
use crate::say::visible;
use crate::tables::Table;
use crate::text::shortened;
use crate::{bail, ensure};

/// What to do with a bad line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadRows {
    /// The first one, in file order, is the error.
    Fail,
    /// Leave it out and report it in [`RowFile::bad`].
    Skip,
}

/// Limits and policy of [`read_rows`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowOptions {
    /// Longest line in bytes, line end excluded.
    pub max_line_bytes: usize,
    /// What to do with a bad line.
    pub bad_rows: BadRows,
    /// Which keys are read as others.
    pub columns: Columns,
}

impl Default for RowOptions {
    fn default() -> Self {
        Self { max_line_bytes: 16 << 20, bad_rows: BadRows::Fail, columns: Columns::default() }
    }
}

/// A line that is not a row, and why: what, expected, found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadLine {
    /// Line in the file, or element of its array, from 1.
    pub line: u32,
    /// What is wrong with it.
    pub what: String,
}

/// The rows of one file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RowFile {
    /// Good rows in file order.
    pub rows: Vec<Row>,
    /// Bad lines in file order; empty unless they are skipped.
    pub bad: Vec<BadLine>,
    /// Lines of white space alone.
    pub blank_lines: usize,
    /// The forms that were read, and of how many rows each; then what the file was besides JSON Lines.
    pub forms: Vec<(String, u64)>,
    /// Keys that say something and were not read, in how many rows, and the first one's line.
    pub ignored: Vec<(String, u64, u32)>,
}

/// Keys that are told apart in [`RowFile::ignored`]; what data sets have, and no more memory than that for others.
const MOST_KEYS: usize = 64;

impl RowFile {
    fn add(&mut self, line: u32, turns: Turns) {
        let form = format!("{}{}", turns.form, if turns.parts { " (lists of text parts)" } else { "" });
        match self.forms.iter_mut().find(|f| f.0 == form) {
            Some(found) => found.1 += 1,
            // What the file was stands behind them.
            None => self.forms.insert(self.forms.iter().filter(|f| f.1 > 0).count(), (form, 1)),
        }
        for key in turns.ignored {
            match self.ignored.iter().position(|i| i.0 == key) {
                Some(at) => self.ignored[at].1 += 1,
                None if self.ignored.len() < MOST_KEYS => self.ignored.push((key, 1, line)),
                None => {}
            }
        }
        self.rows.push(Row { line, messages: turns.messages });
    }

    /// The forms in words.
    pub fn form(&self) -> String {
        let alone = self.forms.iter().filter(|f| f.1 > 0).count() == 1;
        let name = |(name, n): &(String, u64)| if alone || *n == 0 { name.clone() } else { format!("{name} ({n})") };
        self.forms.iter().map(name).collect::<Vec<_>>().join(", ")
    }
}

/// Reads and checks a file of rows, whole; [`RowReader`] reads one that may be larger than the memory.
///
/// # Errors
/// If the file cannot be read, is empty, or has a bad line that is not skipped: `file:line: what, expected, found`.
pub fn read_rows(path: &Path, options: &RowOptions) -> Result<RowFile> {
    read_all(RowReader::new(&path.display().to_string(), &Source::open(path)?, options)?)
}

/// Checks the bytes of a file of rows called `name` in messages.
///
/// # Errors
/// As [`read_rows`].
pub fn parse_rows(name: &str, bytes: &[u8], options: &RowOptions) -> Result<RowFile> {
    read_all(RowReader::new(name, &Source::of(bytes), options)?)
}

fn read_all(mut reader: RowReader<'_, '_>) -> Result<RowFile> {
    let mut rows = Vec::new();
    while let Some((more, _)) = reader.next_rows()? {
        rows.extend(more);
    }
    Ok(RowFile { rows, ..reader.finish()? })
}

/// Reads the rows of a file in batches of bounded size.
pub struct RowReader<'s, 'a> {
    name: String,
    batches: Batches<'s, 'a>,
    unit: Unit,
    options: RowOptions,
    /// What was found so far, but for the rows.
    file: RowFile,
    rows: u64,
}

impl<'s, 'a> RowReader<'s, 'a> {
    /// Of a source called `name` in messages.
    ///
    /// # Errors
    /// If it is empty or cannot be read.
    pub fn new(name: &str, source: &'s Source<'a>, options: &RowOptions) -> Result<Self> {
        ensure!(
            source.table().is_some() || !source.is_empty(),
            "{name}: the file is empty, expected one JSON object a line, found 0 bytes"
        );
        let mut file = RowFile::default();
        file.forms.extend(source.is_array().then(|| ("JSON array".to_string(), 0)));
        file.forms.extend(source.table().map(|table| (table.name().to_string(), 0)));
        file.forms.extend(source.is_gzip().then(|| ("gzip".to_string(), 0)));
        let unit = match (source.is_array(), source.table()) {
            (true, _) => Unit::Element,
            (_, Some(Table::Csv | Table::Tsv)) => Unit::TextRow,
            (_, Some(Table::Parquet)) => Unit::TableRow,
            _ => Unit::Line,
        };
        let batches = source.batches(options.max_line_bytes)?;
        Ok(Self { name: name.to_string(), batches, unit, options: options.clone(), file, rows: 0 })
    }

    /// The next rows in file order, perhaps none of them good, and how many bytes of text they were; `None` behind the last.
    ///
    /// # Errors
    /// If the file cannot be read or changes, or has a bad line that is not skipped.
    pub fn next_rows(&mut self) -> Result<Option<(Vec<Row>, u64)>> {
        let Some(batch) = self.batches.next_batch()? else { return Ok(None) };
        let items: Vec<Item> = batch.items().collect();
        let (unit, options) = (self.unit, &self.options);
        let parsed: Vec<Option<Result<Turns, String>>> =
            items.par_iter().map(|item| parse_item(item, unit, options)).collect();
        let bytes = items.iter().map(|item| item.bytes + 1).sum();
        for (item, row) in items.iter().zip(parsed) {
            let Ok(line) = u32::try_from(item.number) else {
                bail!("{}: expected fewer than 2^32 lines, found more", self.name)
            };
            match row {
                // What follows the last line end is no line.
                None if item.last => {}
                None => self.file.blank_lines += 1,
                Some(Ok(turns)) => self.file.add(line, turns),
                Some(Err(what)) if self.options.bad_rows == BadRows::Skip => self.file.bad.push(BadLine { line, what }),
                Some(Err(what)) => bail!("{}:{line}: {what}", self.name),
            }
        }
        let rows = std::mem::take(&mut self.file.rows);
        self.rows += rows.len() as u64;
        Ok(Some((rows, bytes)))
    }

    /// What was found, but for the rows, once all of them were read.
    ///
    /// # Errors
    /// If there was none, not even a bad one.
    pub fn finish(self) -> Result<RowFile> {
        ensure!(
            self.rows > 0 || !self.file.bad.is_empty(),
            "{}: no rows, expected {}, found {}",
            self.name,
            if self.unit == Unit::Line { "one JSON object a line" } else { "at least one" },
            match self.unit {
                Unit::Line => format!("{} blank lines", self.file.blank_lines.max(1)),
                Unit::Element => "an empty array".into(),
                Unit::TableRow | Unit::TextRow => "a table without any".into(),
            }
        );
        Ok(self.file)
    }
}

/// Characters of a message about a row at most.
const MESSAGE: usize = 700;

/// What the items of a file are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unit {
    Line,
    /// Of the one array that the file is.
    Element,
    TableRow,
    /// Of a table in which everything is text.
    TextRow,
}

/// An item of a file; `None` for a blank line.
fn parse_item(item: &Item<'_>, unit: Unit, options: &RowOptions) -> Option<Result<Turns, String>> {
    let blank = || item.bytes == item.text.len() as u64 && item.text.iter().all(u8::is_ascii_whitespace);
    if unit != Unit::Element && blank() {
        return None;
    }
    // What a message quotes may be as long as the line.
    let parsed = parse_line(item, unit, options).map_err(|e| shortened(&e, MESSAGE));
    let number = item.number;
    Some(match unit {
        Unit::Line => parsed,
        Unit::Element => parsed.map_err(|e| format!("{e} (element {number} of the array)")),
        Unit::TableRow => parsed.map_err(|e| format!("{e} (row {number} of the table)")),
        Unit::TextRow => parsed.map_err(|e| {
            let nameless = number == 1 && e.contains("is missing, expected \"prompt\"") && !e.contains("; ");
            let hint = if nameless { "; its first line has to name the columns, as in prompt,response" } else { "" };
            format!("{e} (row {number} of the table{hint})")
        }),
    })
}

/// One line to its turns, or what is wrong with it.
fn parse_line(item: &Item<'_>, unit: Unit, options: &RowOptions) -> Result<Turns, String> {
    let (Item { text: raw, bytes, cut, .. }, RowOptions { max_line_bytes, columns, .. }) = (*item, options);
    if bytes > *max_line_bytes as u64 {
        return Err(format!("the line is too long, expected at most {max_line_bytes} bytes, found {bytes}"));
    }
    let text = std::str::from_utf8(raw).map_err(|e| {
        let at = e.valid_up_to();
        let convert = "; convert the file, from Latin-1 with iconv -f latin1 -t UTF-8";
        format!("invalid UTF-8, expected UTF-8 text, found byte 0x{:02x} at column {}{convert}", raw[at], at + 1)
    })?;
    let mut de = serde_json::Deserializer::from_str(text);
    // A row, its list of turns, a turn, its list of parts, a part.
    let row = Levels::of_row(columns).deserialize(&mut de);
    match row.and_then(|f| de.end().map(|()| f)).map_err(|e| json_error(&e, text, cut))? {
        Json::Object(mut fields) => {
            if unit == Unit::TextRow {
                fields.of_texts();
            }
            fields.into_turns().map_err(|e| columns.in_words(e))
        }
        other => Err(format!("not a JSON object, expected {{\"prompt\": …, \"response\": …}}, found {}", other.kind())),
    }
}

/// Says where JSON is broken, with the text around it.
fn json_error(e: &serde_json::Error, text: &str, cut: bool) -> String {
    let column = e.column();
    if e.is_eof() {
        let hint = match text.trim_end().chars().last() {
            _ if cut => " (the file ends here: it looks truncated)",
            Some('{' | '[' | ',' | ':') => " (an object over several lines? make one line of each with jq -c .)",
            _ => "",
        };
        return format!(
            "invalid JSON, expected the rest of the object, found the end of the line at column {column}{hint}"
        );
    }
    let cause = e.to_string();
    let cause = cause.split(" at line ").next().unwrap_or_default();
    let start = text.floor_char_boundary(column.saturating_sub(1).saturating_sub(10));
    // Invisible characters are often the very fault.
    let shown = visible(&text[start..].chars().take(24).collect::<String>()).replace('\u{a0}', "\\u00a0");
    let hint = match text.trim_start() {
        _ if cause.contains("hex escape") || cause.contains("surrogate") => " (half of a surrogate pair is no text)",
        _ if shown.contains("NaN") || shown.contains("Infinity") => " (NaN and Infinity are no JSON: write null)",
        "]" => " (a comma behind the last element?)",
        t if t.starts_with('<') => " (a page instead of the file?)",
        t if t.starts_with("{'") => " (Python's repr? write rows with json.dumps)",
        t if cause.contains("trailing") && t.trim_end().ends_with("},") => {
            " (objects a line, without commas between them)"
        }
        t if !t.contains('{') && t.contains([',', '\t']) => " (a table? its name has to end in .csv or .tsv)",
        t if !t.contains(['{', '"']) => " (plain text? ringtune pretrain trains on it)",
        _ => "",
    };
    format!("invalid JSON, expected a JSON object, found {cause}{hint} at column {column}, near `{shown}`")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::row::{Message, Role};

    fn parse(line: &str) -> Result<Vec<Message>, String> {
        let item = Item { number: 1, text: line.as_bytes(), bytes: line.len() as u64, last: false, cut: false };
        parse_line(&item, Unit::Line, &RowOptions { max_line_bytes: 1000, ..RowOptions::default() })
            .map(|turns| turns.messages)
    }

    #[test]
    fn keys_are_read_in_any_order_and_unknown_ones_ignored() {
        let a = parse(r#"{"x": [{"prompt": 1}], "response": "b", "prompt": "a", "x": {}, "content": 5}"#).unwrap();
        assert_eq!(a, [Message::new(Role::User, "a"), Message::new(Role::Assistant, "b")]);
    }

    #[test]
    fn messages_carry_their_train_flag() {
        let a =
            parse(r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","train":false}]}"#);
        assert_eq!(a.unwrap().iter().map(|m| m.train).collect::<Vec<_>>(), [true, false]);
    }

    #[test]
    fn escapes_are_decoded_and_lone_surrogates_refused() {
        assert_eq!(parse(r#"{"prompt":"\ud83d\ude42\u0000","response":"x"}"#).unwrap()[0].content, "\u{1f642}\0");
        assert!(parse(r#"{"prompt":"\ud83d","response":"x"}"#).unwrap_err().starts_with("invalid JSON"));
    }
}
