//! Rows of supervised fine-tuning: JSON Lines in, checked conversations out. Data is untrusted: every line is checked by name.
//!
//! One object a line, either `{"prompt", "response", "system"?}` or `{"messages": [{"role", "content", "train"?}, …]}`.
//! Unknown keys are ignored. Lines of white space alone are ignored and counted (many tools end or separate files with
//! them, and they hold no data). A known key given twice is an error, since readers disagree about which one counts. NUL
//! characters (`\u0000`) are ordinary text; lone surrogates (`\ud83d` alone) are not text at all and are refused.

use std::path::Path;

use rayon::prelude::*;
use serde::de::{DeserializeSeed, IgnoredAny};

use crate::data::row::{Message, Row};
use crate::data::row_fields::{Fields, FieldsSeed};
use crate::error::{Context, Result};
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowOptions {
    /// Longest line in bytes, line end excluded.
    pub max_line_bytes: usize,
    /// What to do with a bad line.
    pub bad_rows: BadRows,
}

impl Default for RowOptions {
    fn default() -> Self {
        Self { max_line_bytes: 16 << 20, bad_rows: BadRows::Fail }
    }
}

/// A line that is not a row, and why: what, expected, found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadLine {
    /// Line in the file, from 1.
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
}

/// Reads and checks a JSON Lines file.
///
/// # Errors
/// If the file cannot be read, is empty, or has a bad line that is not skipped: `file:line: what, expected, found`.
pub fn read_rows(path: &Path, options: &RowOptions) -> Result<RowFile> {
    let bytes = std::fs::read(path).context(|| path.display().to_string())?;
    parse_rows(&path.display().to_string(), &bytes, options)
}

/// Checks the bytes of a JSON Lines file called `name` in messages.
///
/// # Errors
/// As [`read_rows`].
pub fn parse_rows(name: &str, bytes: &[u8], options: &RowOptions) -> Result<RowFile> {
    ensure!(!bytes.is_empty(), "{name}: the file is empty, expected one JSON object a line, found 0 bytes");
    let body = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let lines: Vec<&[u8]> = body.split(|&b| b == b'\n').collect();
    ensure!(u32::try_from(lines.len()).is_ok(), "{name}: {} lines, expected fewer than 2^32", lines.len());
    let last = lines.len() - 1;
    let parsed: Vec<Option<Result<Row, BadLine>>> = lines
        .par_iter()
        .enumerate()
        .map(|(i, &raw)| {
            let raw = raw.strip_suffix(b"\r").unwrap_or(raw);
            if raw.iter().all(u8::is_ascii_whitespace) {
                return None;
            }
            let number = i as u32 + 1;
            // Without a line end after it, a line that breaks off is most likely a file that was cut.
            let cut = i == last;
            Some(match parse_line(raw, options.max_line_bytes, cut) {
                Ok(messages) => Ok(Row { line: number, messages }),
                Err(what) => Err(BadLine { line: number, what }),
            })
        })
        .collect();
    let mut file = RowFile::default();
    for (i, line) in parsed.into_iter().enumerate() {
        match line {
            // What follows the last line end is no line.
            None if i == last => {}
            None => file.blank_lines += 1,
            Some(Ok(row)) => file.rows.push(row),
            Some(Err(bad)) if options.bad_rows == BadRows::Skip => file.bad.push(bad),
            Some(Err(bad)) => bail!("{name}:{}: {}", bad.line, bad.what),
        }
    }
    ensure!(
        !file.rows.is_empty() || !file.bad.is_empty(),
        "{name}: no rows, expected one JSON object a line, found {} blank lines",
        file.blank_lines.max(1)
    );
    Ok(file)
}

/// One line to its messages, or what is wrong with it.
fn parse_line(raw: &[u8], max_line_bytes: usize, cut: bool) -> Result<Vec<Message>, String> {
    if raw.len() > max_line_bytes {
        return Err(format!("the line is too long, expected at most {max_line_bytes} bytes, found {}", raw.len()));
    }
    let text = std::str::from_utf8(raw).map_err(|e| {
        let at = e.valid_up_to();
        format!("invalid UTF-8, expected UTF-8 text, found byte 0x{:02x} at column {}", raw[at], at + 1)
    })?;
    let first = text.trim_start().chars().next().unwrap_or(' ');
    if first != '{' {
        let kind = match first {
            '[' => "an array",
            '"' => "a string",
            '0'..='9' | '-' => "a number",
            _ => "",
        };
        if serde_json::from_str::<IgnoredAny>(text).is_ok() {
            let kind = if kind.is_empty() { text.trim() } else { kind };
            return Err(format!("not a JSON object, expected {{\"prompt\": …, \"response\": …}}, found {kind}"));
        }
    }
    let fields: Fields = {
        let mut de = serde_json::Deserializer::from_str(text);
        FieldsSeed.deserialize(&mut de).and_then(|f| de.end().map(|()| f)).map_err(|e| json_error(&e, text, cut))?
    };
    if let Some(key) = fields.duplicate {
        return Err(format!("field \"{key}\" appears twice, expected each field once, found a duplicate (dup)"));
    }
    fields.into_messages()
}

/// Says where JSON is broken, with the text around it.
fn json_error(e: &serde_json::Error, text: &str, cut: bool) -> String {
    let column = e.column();
    if e.is_eof() {
        let hint = if cut { " (the last line has no line end: the file looks truncated)" } else { "" };
        return format!(
            "invalid JSON, expected the rest of the object, found the end of the line at column {column}{hint}"
        );
    }
    let cause = e.to_string();
    let cause = cause.split(" at line ").next().unwrap_or_default();
    let half = if cause.contains("hex escape") || cause.contains("surrogate") {
        " (half of a surrogate pair is no text)"
    } else {
        ""
    };
    let start = text.floor_char_boundary(column.saturating_sub(1).saturating_sub(10));
    let shown: String = text[start..].chars().take(24).collect();
    format!("invalid JSON, expected a JSON object, found {cause}{half} at column {column}, near `{shown}`")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::row::Role;

    fn parse(line: &str) -> Result<Vec<Message>, String> {
        parse_line(line.as_bytes(), 1000, false)
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
