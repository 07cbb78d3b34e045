//! The bytes of a data set: a file that can be read again, unpacked where it is gzip, as JSON Lines where it is a table, refused by name
//! where it is something else.

use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::path::Path;

use flate2::bufread::GzDecoder;

use self::items::{Array, Mark, Splitter};
use crate::error::{Context, Error, Result};
use crate::files::{MARK, open_file};
use crate::tables::Table;
use crate::{bail, ensure};

mod items;

pub use items::{Batch, Batches, Item};

/// A data set's file, unpacked where it is gzip, made JSON Lines where it is a table, without a byte order mark. It is read from its start whenever its items are asked
/// for, and never held whole: a file may be larger than the memory.
#[derive(Debug)]
pub struct Source<'a> {
    origin: Origin<'a>,
    gzip: bool,
    table: Option<Table>,
    bom: bool,
    array: bool,
    bytes: u64,
    hash: blake3::Hash,
}

#[derive(Clone, Copy, Debug)]
enum Origin<'a> {
    File(&'a Path),
    Memory(&'a [u8]),
}

/// What files of other kinds begin with, what they are, and what to do.
const OTHERS: [(&[u8], &str, &str); 19] = [
    (b"\xff\xfe\0\0", "UTF-32 text", FROM_UTF32),
    (b"\0\0\xfe\xff", "UTF-32 text", FROM_UTF32),
    (b"{\0\0\0", "UTF-32 text", FROM_UTF32),
    (b"\0\0\0{", "UTF-32 text", FROM_UTF32),
    (b"\xff\xfe", "UTF-16 text", TO_UTF8),
    (b"\xfe\xff", "UTF-16 text", TO_UTF8),
    (b"{\0", "UTF-16 text", TO_UTF8),
    (b"\0{", "UTF-16 text", TO_UTF8),
    (b"ARROW1", "an Arrow file", FROM_TABLE),
    (b"\xff\xff\xff\xff", "an Arrow stream", FROM_TABLE),
    (b"PK\x03\x04", "a zip file", "unpack it with unzip"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", "unpack it with zstd -d"),
    (b"\xfd7zXZ\0", "an xz file", "unpack it with xz -d"),
    (b"BZh", "a bzip2 file", "unpack it with bzip2 -d"),
    (b"SQLite format 3\0", "a SQLite database", FROM_TABLE),
    (b"\x89HDF", "an HDF5 file", FROM_TABLE),
    (b"\x80\x04\x95", "a Python pickle", FROM_TABLE),
    (b"GGUF", "a GGUF model", "name a data set"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch it with git lfs pull"),
];
const TO_UTF8: &str = "convert it with iconv -f UTF-16 -t UTF-8";
const FROM_UTF32: &str = "convert it with iconv -f UTF-32 -t UTF-8";
const FROM_TABLE: &str = "write it as JSON Lines, in pandas with to_json(FILE, orient=\"records\", lines=True)";

/// The first bytes of a file: what it is, without reading it whole.
///
/// # Errors
/// If it is not there, or no file that can be read again.
pub fn head(path: &Path) -> Result<Vec<u8>> {
    let mut head = Vec::with_capacity(16);
    open_file(path)?.take(16).read_to_end(&mut head).context(|| path.display().to_string())?;
    Ok(head)
}

/// Bytes that are read at once.
const CHUNK: usize = 1 << 20;

impl<'a> Source<'a> {
    /// Reads a file once, to know what it is and what hash its text has.
    ///
    /// # Errors
    /// If it is not there, no file that can be read again, damaged gzip, or of a kind that holds no text.
    pub fn open(path: &'a Path) -> Result<Self> {
        let gzip = head(path)?.starts_with(b"\x1f\x8b");
        let mut start = Vec::new();
        let mut all =
            Self { origin: Origin::File(path), gzip, table: None, bom: false, array: false, bytes: 0, hash: NOTHING };
        all.unread()?.take(512).read_to_end(&mut start).map_err(|e| all.explain(&e))?;
        all.table = Table::of(path, &start);
        ensure!(
            !(gzip && all.table == Some(Table::Parquet)),
            "{}: a Parquet file inside a gzip file, expected it alone; unpack it with gunzip",
            path.display()
        );
        refuse_others(&start).context(|| path.display().to_string())?;
        all.bom = all.table.is_none() && start.starts_with(MARK.as_bytes());
        all.scan()?;
        Ok(all)
    }

    /// Text in memory, as it is.
    pub fn of(bytes: &'a [u8]) -> Self {
        let bom = bytes.starts_with(MARK.as_bytes());
        let mut all = Self {
            origin: Origin::Memory(bytes),
            gzip: false,
            table: None,
            bom,
            array: false,
            bytes: 0,
            hash: NOTHING,
        };
        all.scan().expect("memory can be read");
        all
    }

    /// Whether the file is gzip.
    pub fn is_gzip(&self) -> bool {
        self.gzip
    }

    /// The table whose rows its items are, where it is one.
    pub fn table(&self) -> Option<Table> {
        self.table
    }

    /// Whether its items are the elements of one JSON array, not lines.
    pub fn is_array(&self) -> bool {
        self.array
    }

    /// Whether there is nothing in it, not even a byte order mark.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0 && !self.bom
    }

    /// Bytes of text.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// blake3 of the text, hex.
    pub fn hash(&self) -> String {
        self.hash.to_hex().to_string()
    }

    /// Its items in their order, in batches of bounded size. Of an item longer than `limit` bytes only the beginning is kept.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn batches(&self, limit: usize) -> Result<Batches<'_, 'a>> {
        self.split(if self.array { Splitter::Array(Array::default()) } else { Splitter::Lines }, limit)
    }

    /// The same of its lines, whatever they are.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn lines(&self) -> Result<Batches<'_, 'a>> {
        self.split(Splitter::Lines, usize::MAX)
    }

    fn split(&self, splitter: Splitter, limit: usize) -> Result<Batches<'_, 'a>> {
        Ok(Batches::new(self, self.text()?, splitter, limit))
    }

    fn scan(&mut self) -> Result<()> {
        let (mut text, mut chunk) = (self.text()?, vec![0; CHUNK]);
        let (mut hasher, mut array, mut is_array) = (blake3::Hasher::new(), Array::default(), true);
        loop {
            let n = fill(&mut text, &mut chunk).map_err(|e| self.explain(&e))?;
            if n == 0 {
                break;
            }
            hasher.update(&chunk[..n]);
            self.bytes += n as u64;
            is_array = is_array && chunk[..n].iter().all(|&b| array.step(b) != Mark::No);
        }
        // One that breaks off is an array too.
        self.array = is_array && array.begun();
        self.hash = hasher.finalize();
        Ok(())
    }

    /// The unpacked bytes from the start.
    fn unread(&self) -> Result<Box<dyn Read + 'a>> {
        Ok(match self.origin {
            Origin::Memory(bytes) => Box::new(bytes),
            Origin::File(path) if self.gzip => {
                Box::new(Members::of(BufReader::with_capacity(1 << 16, open_file(path)?)))
            }
            Origin::File(path) => Box::new(open_file(path)?),
        })
    }

    /// The text of its items: behind the byte order mark, or made of a table's rows.
    fn text(&self) -> Result<Box<dyn Read + 'a>> {
        let mut reader = self.unread()?;
        if let (Some(table), Origin::File(path)) = (self.table, self.origin) {
            return table.json_lines(path, reader).map_err(|e| self.explain(&e));
        }
        if self.bom {
            reader.read_exact(&mut [0; MARK.len()]).map_err(|e| self.explain(&e))?;
        }
        Ok(reader)
    }

    fn name(&self) -> String {
        match self.origin {
            Origin::File(path) => path.display().to_string(),
            Origin::Memory(_) => "text".to_string(),
        }
    }

    fn explain(&self, e: &std::io::Error) -> Error {
        let own = e.kind() == ErrorKind::InvalidData && self.table.is_some();
        let what = if self.gzip && !own { "damaged gzip file: " } else { "" };
        Error::new(format!("{}: {what}{e}", self.name()))
    }
}

/// What the members of a gzip file hold, one after the other. Zeros behind one are padding: who writes in blocks fills up the last.
struct Members<R>(Option<GzDecoder<R>>);

impl<R: BufRead> Members<R> {
    fn of(packed: R) -> Self {
        Self(Some(GzDecoder::new(packed)))
    }
}

impl<R: BufRead> Read for Members<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while let Some(member) = &mut self.0 {
            let n = member.read(buffer)?;
            if n > 0 || buffer.is_empty() {
                return Ok(n);
            }
            let mut packed = self.0.take().expect("it was just read from").into_inner();
            loop {
                let ahead = packed.fill_buf()?;
                let (zeros, all) = (ahead.iter().take_while(|&&b| b == 0).count(), ahead.len());
                packed.consume(zeros);
                if all == 0 {
                    return Ok(0);
                }
                if zeros < all {
                    self.0 = Some(GzDecoder::new(packed));
                    break;
                }
            }
        }
        Ok(0)
    }
}

const NOTHING: blake3::Hash = blake3::Hash::from_bytes([0; 32]);

/// Reads until the buffer is full or the text ends.
fn fill(from: &mut dyn Read, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut n = 0;
    while n < buffer.len() {
        match from.read(&mut buffer[n..]) {
            Ok(0) => break,
            Ok(more) => n += more,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(n)
}

/// Says what a file is that holds no text.
fn refuse_others(bytes: &[u8]) -> Result<()> {
    for (magic, what, advice) in OTHERS {
        if bytes.starts_with(magic) {
            bail!("this is {what}, expected UTF-8 text; {advice}");
        }
    }
    ensure!(bytes.get(257..262) != Some(b"ustar"), "this is a tar archive, expected UTF-8 text; unpack it with tar -x");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(body: &str) -> (bool, Vec<String>) {
        let source = Source::of(body.as_bytes());
        let mut batches = source.batches(usize::MAX).unwrap();
        let mut all = Vec::new();
        while let Some(batch) = batches.next_batch().unwrap() {
            for item in batch.items() {
                assert_eq!((item.bytes, item.number), (item.text.len() as u64, all.len() as u64 + 1));
                all.push(String::from_utf8_lossy(item.text).into_owned());
            }
        }
        (source.is_array(), all)
    }

    #[test]
    fn an_array_is_taken_apart_and_lines_are_lines() {
        let array = |all: &[&str]| (true, all.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(
            split(" [\n {\"a\": \"],[\\\"\"},\n{\"b\": [1, {}]}\n]\n"),
            array(&["{\"a\": \"],[\\\"\"}", "{\"b\": [1, {}]}"])
        );
        assert_eq!(split("[]"), array(&[]));
        assert_eq!(split("[{},]"), array(&["{}", "]"]));
        assert_eq!(split("[{\"a\": 1},\n{\"b\""), array(&["{\"a\": 1}", "{\"b\"", ""]));
        let lines = |all: &[&str]| (false, all.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(split("[{}]\n[{}]"), lines(&["[{}]", "[{}]"]));
        assert_eq!(split("[\"a\", \"b\"]"), lines(&["[\"a\", \"b\"]"]));
        assert_eq!(split("{}\r\n\u{feff}{}\n"), lines(&["{}", "{}", ""]));
    }
}
