//! Parquet files, row by row. The file is untrusted: what its headers claim is held to the bytes that are there.

use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;

use bytes::Bytes;
use parquet::basic::Type;
use parquet::column::page::Page;
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, FileReader, Length, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::Type as Schema;
use serde_json::{Map, Value};

use super::damaged;
use crate::panics::caught;

/// The rows of a file, each as an object. Values of types that JSON has no word for are text, bytes that are no text a list.
///
/// # Errors
/// If the file cannot be opened, or is no Parquet file; of the iterator: a damaged row.
pub fn rows(path: &Path) -> io::Result<impl Iterator<Item = io::Result<Value>> + use<>> {
    let unreadable = |e: ParquetError| damaged(format!("not a readable Parquet file: {e}"));
    let file = File::open(path)?;
    // The reader indexes into pages as their headers say; a damaged file must end in an error, not in a panic.
    let guarded = move |read: &mut dyn FnMut() -> Result<Option<Row>, ParquetError>| match caught(read) {
        Some(row) => row.map_err(unreadable),
        None => Err(damaged("damaged Parquet file; download it again".into())),
    };
    let mut all = None;
    guarded(&mut || {
        let reader = SerializedFileReader::new(ToTheEnd(file.try_clone()?))?;
        expect_different_names(reader.metadata().file_metadata().schema())?;
        expect_dictionaries_within_their_pages(&reader)?;
        all = Some(RowIter::from_file_into(Box::new(reader)));
        Ok(None)
    })?;
    Ok(std::iter::from_fn(move || {
        let rows = all.as_mut()?;
        let row = guarded(&mut || rows.next().transpose()).transpose()?;
        if row.is_err() {
            all = None;
        }
        Some(row.map(|row| group(&row)))
    }))
}

/// A file in which reading beyond the end is an error: the Parquet reader goes on for as many elements as a damaged header says, each
/// read as nothing, and takes memory for as many bytes as it says.
struct ToTheEnd(File);

impl Read for ToTheEnd {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
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

/// Refuses a group with two fields of one name: a row would have the last of them.
fn expect_different_names(schema: &Schema) -> Result<(), ParquetError> {
    if !schema.is_group() {
        return Ok(());
    }
    let fields = schema.get_fields();
    for (i, field) in fields.iter().enumerate() {
        if fields[..i].iter().any(|other| other.name() == field.name()) {
            return Err(ParquetError::General(format!(
                "two columns named {:?}, expected different names",
                field.name()
            )));
        }
        expect_different_names(field)?;
    }
    Ok(())
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

fn group(row: &Row) -> Value {
    Value::Object(row.get_column_iter().map(|(name, field)| (name.clone(), json(field))).collect::<Map<_, _>>())
}

/// A Parquet value as JSON.
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
        // Older writers do not mark texts as such; other bytes are no text of a row, and no field that was left out.
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => Value::from(text),
            Err(_) => Value::Array(bytes.data().iter().map(|&b| Value::from(b)).collect()),
        },
        Field::Null => Value::Null,
        _ => Value::from(field.to_string()),
    }
}
