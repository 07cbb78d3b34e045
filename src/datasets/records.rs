//! Reads the records of an upstream file: JSONL, a JSON array, Parquet, any of the first two gzipped.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde_json::Value;

use crate::bail;
use crate::error::{Context, Error, Result};
use crate::files::MARK;
use crate::tables::{PARQUET, parquet_rows};

/// Longest accepted line or JSON text, in bytes, after decompression: the largest upstream file has 250 MB.
const MAX_BYTES: u64 = 2 << 30;

/// Every record of the file, in file order. The format is told by the first bytes, not by the name.
///
/// # Errors
/// If the file cannot be read, is truncated, or holds something else; with path and line.
pub fn read(path: &Path) -> Result<Vec<Value>> {
    let at = || path.display().to_string();
    let mut magic = [0u8; 4];
    let n = File::open(path).and_then(|mut f| read_up_to(&mut f, &mut magic)).context(at)?;
    if n == 0 {
        bail!("{}: the file is empty; expected JSONL, JSON, gzip or Parquet", path.display());
    }
    if magic == *PARQUET {
        return read_parquet(path);
    }
    let file = File::open(path).context(at)?;
    let mut text: Box<dyn BufRead> = if magic[..2] == [0x1f, 0x8b] {
        Box::new(BufReader::new(flate2::read::MultiGzDecoder::new(file)))
    } else {
        Box::new(BufReader::new(file))
    };
    skip_bom(&mut text).context(at)?;
    if first_char(&mut text).context(at)? == Some(b'[') {
        return read_array(path, text);
    }
    read_lines(path, text)
}

/// Fills as much of `buf` as the reader has.
fn read_up_to(r: &mut impl Read, buf: &mut [u8]) -> std::io::Result<usize> {
    let mut n = 0;
    while n < buf.len() {
        match r.read(&mut buf[n..])? {
            0 => break,
            k => n += k,
        }
    }
    Ok(n)
}

fn skip_bom(r: &mut Box<dyn BufRead>) -> std::io::Result<()> {
    if r.fill_buf()?.starts_with(MARK.as_bytes()) {
        r.consume(MARK.len());
    }
    Ok(())
}

/// The first byte that is not white space, left unread.
fn first_char(r: &mut Box<dyn BufRead>) -> std::io::Result<Option<u8>> {
    loop {
        let buf = r.fill_buf()?;
        let Some(&b) = buf.first() else { return Ok(None) };
        if !b.is_ascii_whitespace() {
            return Ok(Some(b));
        }
        r.consume(1);
    }
}

fn read_array(path: &Path, r: Box<dyn BufRead>) -> Result<Vec<Value>> {
    let value: Value = serde_json::from_reader(r.take(MAX_BYTES))
        .map_err(|e| Error::new(format!("{}: {e}; expected a JSON array of objects", path.display())))?;
    match value {
        Value::Array(records) => Ok(records),
        _ => bail!("{}: expected a JSON array of objects", path.display()),
    }
}

fn read_lines(path: &Path, mut r: Box<dyn BufRead>) -> Result<Vec<Value>> {
    let mut records = Vec::new();
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let n =
            (&mut r).take(MAX_BYTES).read_until(b'\n', &mut line).context(|| format!("{}:{number}", path.display()))?;
        if n == 0 {
            break;
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let value = serde_json::from_slice(&line).map_err(|e| {
            Error::new(format!("{}:{number}: expected one JSON object a line, found: {e}", path.display()))
        })?;
        records.push(value);
    }
    Ok(records)
}

fn read_parquet(path: &Path) -> Result<Vec<Value>> {
    let rows = parquet_rows(path).and_then(Iterator::collect);
    rows.map_err(|e| Error::new(format!("{}: {e}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The reader takes memory for as many values as a header says: here for two thousand million, and the process ended.
    #[test]
    fn a_dictionary_that_claims_too_much_is_an_error() {
        let path = Path::new("tests/data/found/parquet-dictionary-of-more-values-than-bytes/rows.parquet");
        let e = read(path).unwrap_err().to_string();
        assert!(e.contains("not a readable Parquet file") && e.contains("values in a dictionary of"), "{e}");
    }

    /// A page's header names a list of 2^60 elements: the reader went through all of them behind the end of the file.
    #[test]
    fn a_list_that_goes_on_behind_the_end_is_an_error() {
        let path = Path::new("tests/data/found/parquet-list-longer-than-the-file/rows.parquet");
        let e = read(path).unwrap_err().to_string();
        assert!(e.contains("Parquet file"), "{e}");
    }
}
