//! Reads the records of an upstream file: JSONL, a JSON array, Parquet, any of the first two gzipped.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;

use bytes::Bytes;
use parquet::basic::Type;
use parquet::column::page::Page;
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, FileReader, Length, SerializedFileReader};
use parquet::record::Field;
use serde_json::{Map, Value};

use crate::bail;
use crate::error::{Context, Error, Result};

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
    if &magic == b"PAR1" {
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
    if r.fill_buf()?.starts_with(&[0xef, 0xbb, 0xbf]) {
        r.consume(3);
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
    let fail = |e: ParquetError| Error::new(format!("{}: not a readable Parquet file: {e}", path.display()));
    let file = File::open(path).context(|| path.display().to_string())?;
    // The reader indexes into pages as their headers say; a damaged file must end in an error, not in a panic.
    let rows = std::panic::catch_unwind(|| -> Result<Vec<Value>, ParquetError> {
        let reader = SerializedFileReader::new(ToTheEnd(file))?;
        expect_dictionaries_within_their_pages(&reader)?;
        let mut out = Vec::new();
        for row in reader.get_row_iter(None)? {
            out.push(group(&row?));
        }
        Ok(out)
    });
    match rows {
        Ok(rows) => rows.map_err(fail),
        Err(_) => bail!("{}: damaged Parquet file; download it again", path.display()),
    }
}

/// A file in which reading beyond the end is an error: the Parquet reader goes on for as many elements as a damaged header says, each
/// read as nothing, and takes memory for as many bytes as it says.
struct ToTheEnd(File);

impl Read for ToTheEnd {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        match self.0.read(buf)? {
            0 if !buf.is_empty() => Err(ErrorKind::UnexpectedEof.into()),
            n => Ok(n),
        }
    }
}

impl Length for ToTheEnd {
    fn len(&self) -> u64 {
        self.0.metadata().map_or(0, |m| m.len())
    }
}

impl ChunkReader for ToTheEnd {
    type T = BufReader<ToTheEnd>;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        let mut file = self.0.try_clone()?;
        file.seek(SeekFrom::Start(start))?;
        Ok(BufReader::new(ToTheEnd(file)))
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        if start.checked_add(length as u64).is_none_or(|end| end > self.len()) {
            return Err(ParquetError::EOF(format!("{length} bytes at {start}, in a file of {}", self.len())));
        }
        let mut bytes = vec![0; length];
        self.get_read(start)?.read_exact(&mut bytes)?;
        Ok(bytes.into())
    }
}

/// Refuses a dictionary of more values than its page has room for: memory is taken for as many as the header says, and where there is
/// not enough the process ends, which no caller can catch.
fn expect_dictionaries_within_their_pages(reader: &SerializedFileReader<ToTheEnd>) -> Result<(), ParquetError> {
    for group in 0..reader.num_row_groups() {
        let group = reader.get_row_group(group)?;
        for column in 0..group.num_columns() {
            // A value takes four bytes at least, its length's; one of a fixed length may take one.
            let least = match group.metadata().column(column).column_type() {
                Type::FIXED_LEN_BYTE_ARRAY => 1,
                _ => 4,
            };
            let mut pages = group.get_column_page_reader(column)?;
            while let Some(page) = pages.peek_next_page()? {
                if !page.is_dict {
                    pages.skip_next_page()?;
                    continue;
                }
                if let Some(Page::DictionaryPage { buf, num_values, .. }) = pages.get_next_page()?
                    && num_values as usize > buf.len() / least
                {
                    let name = group.metadata().column(column).column_path().string();
                    let text = format!("column {name}: {num_values} values in a dictionary of {} bytes", buf.len());
                    return Err(ParquetError::General(text));
                }
            }
        }
    }
    Ok(())
}

fn group(row: &parquet::record::Row) -> Value {
    Value::Object(row.get_column_iter().map(|(name, field)| (name.clone(), json(field))).collect::<Map<_, _>>())
}

/// A Parquet value as JSON. Types that no upstream data set uses become null.
fn json(field: &Field) -> Value {
    match field {
        Field::Bool(b) => Value::from(*b),
        Field::Byte(n) => Value::from(*n),
        Field::Short(n) => Value::from(*n),
        Field::Int(n) => Value::from(*n),
        Field::Long(n) => Value::from(*n),
        Field::UByte(n) => Value::from(*n),
        Field::UShort(n) => Value::from(*n),
        Field::UInt(n) => Value::from(*n),
        Field::ULong(n) => Value::from(*n),
        Field::Float(x) => Value::from(*x),
        Field::Double(x) => Value::from(*x),
        Field::Str(s) => Value::from(s.as_str()),
        Field::Group(row) => group(row),
        Field::ListInternal(list) => Value::Array(list.elements().iter().map(json).collect()),
        _ => Value::Null,
    }
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
