//! CSV and TSV: the first line names the columns, quotes and line ends as in RFC 4180.

use std::io::{self, BufRead, BufReader, Read};

use csv::{ByteRecord, ErrorKind, ReaderBuilder};
use serde_json::{Map, Value};

use super::damaged;

/// The rows of a text, each as an object of strings. Without a separator the first line decides: commas, semicolons or tabulators,
/// whichever it has most of.
pub fn rows<'a>(
    text: impl Read + 'a,
    separator: Option<u8>,
) -> io::Result<impl Iterator<Item = io::Result<Value>> + 'a> {
    let mut text = BufReader::with_capacity(1 << 16, text);
    let separator = match separator {
        Some(byte) => byte,
        None => most_frequent(text.fill_buf()?),
    };
    let mut reader = ReaderBuilder::new().delimiter(separator).from_reader(text);
    let names = reader.byte_headers().map_err(explain)?.clone();
    let names: Vec<String> = names.iter().enumerate().map(|(i, n)| utf8(n, &place(0, i))).collect::<io::Result<_>>()?;
    if let Some((i, name)) = names.iter().enumerate().find(|(i, name)| names[..*i].contains(name)) {
        return Err(damaged(format!(
            "two columns named {name:?}, expected different names in the first line (column {})",
            i + 1
        )));
    }
    let mut record = ByteRecord::new();
    let mut row = 0;
    Ok(std::iter::from_fn(move || {
        row += 1;
        match reader.read_byte_record(&mut record) {
            Ok(false) => None,
            Ok(true) => Some(object(&names, &record, row)),
            Err(e) => Some(Err(explain(e))),
        }
    }))
}

/// The separator that a first line has most of, a comma where there is none.
fn most_frequent(start: &[u8]) -> u8 {
    let (mut quoted, mut counts) = (false, [(b',', 0), (b';', 0), (b'\t', 0)]);
    for &byte in start.iter().take_while(|&&b| b != b'\n') {
        quoted ^= byte == b'"';
        counts.iter_mut().filter(|c| !quoted && c.0 == byte).for_each(|c| c.1 += 1);
    }
    counts.into_iter().reduce(|best, c| if c.1 > best.1 { c } else { best }).map_or(b',', |c| c.0)
}

fn object(names: &[String], record: &ByteRecord, row: u64) -> io::Result<Value> {
    let mut fields = Map::new();
    for (i, (name, cell)) in names.iter().zip(record).enumerate() {
        fields.insert(name.clone(), Value::String(utf8(cell, &place(row, i))?));
    }
    Ok(Value::Object(fields))
}

/// Row 0 is the first line.
fn place(row: u64, column: usize) -> String {
    let row = if row == 0 { "the first line".to_string() } else { format!("row {row}") };
    format!("{row}, column {}", column + 1)
}

fn utf8(cell: &[u8], place: &str) -> io::Result<String> {
    let convert = "convert the file, from Latin-1 with iconv -f latin1 -t UTF-8";
    String::from_utf8(cell.to_vec()).map_err(|e| {
        damaged(format!(
            "{place}: invalid UTF-8, expected UTF-8 text, found byte 0x{:02x}; {convert}",
            cell[e.utf8_error().valid_up_to()]
        ))
    })
}

fn explain(e: csv::Error) -> io::Error {
    let text = e.to_string();
    match e.into_kind() {
        ErrorKind::Io(e) => e,
        ErrorKind::UnequalLengths { pos, expected_len, len } => {
            let (line, row) = pos.map_or((0, 0), |p| (p.line(), p.record()));
            damaged(format!(
                "row {row} (line {line}): expected {expected_len} values as in the first line, found {len}; a value with a separator or a \
                 line end has to stand in quotes"
            ))
        }
        _ => damaged(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &[u8]) -> Result<Vec<String>, String> {
        let rows = rows(text, None).map_err(|e| e.to_string())?;
        rows.map(|r| r.map(|v| v.to_string()).map_err(|e| e.to_string())).collect()
    }

    #[test]
    fn quotes_separators_and_marks() {
        let row = |prompt: &str| Ok(vec![format!(r#"{{"prompt":{prompt},"response":"b"}}"#)]);
        assert_eq!(read(b"prompt,response\na,b\n"), row(r#""a""#));
        assert_eq!(read(b"\xef\xbb\xbfprompt;response\r\n\"x;\"\"y\"\"\nz\";b"), row(r#""x;\"y\"\nz""#));
        assert_eq!(read(b"prompt\tresponse\na, b, c\tb"), row(r#""a, b, c""#));
        assert_eq!(read(b"\"a,b;\";c\n1;2\n"), Ok(vec![r#"{"a,b;":"1","c":"2"}"#.to_string()]));
        assert_eq!(read(b"prompt,response\n"), Ok(vec![]));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |text: &[u8]| read(text).unwrap_err();
        assert!(
            error(b"a,b\n1,2\n1,2,3\n")
                .starts_with("row 2 (line 3): expected 2 values as in the first line, found 3; ")
        );
        assert!(
            error(b"a,a\n1,2\n")
                .starts_with("two columns named \"a\", expected different names in the first line (column 2)")
        );
        assert!(
            error(b"a,b\n1,\xe9\n")
                .contains("row 1, column 2: invalid UTF-8, expected UTF-8 text, found byte 0xe9; convert")
        );
    }
}
