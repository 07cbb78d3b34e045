//! The bytes of a data set: a file that can be read again, unpacked where it is gzip, refused by name where it is something else.

use std::io::Read;
use std::path::Path;

use flate2::read::MultiGzDecoder;

use crate::error::{Context, Result};
use crate::files::open_file;
use crate::machine::available_memory;
use crate::{bail, ensure};

/// A file's bytes as its reader takes them.
#[derive(Debug)]
pub struct Source {
    /// Unpacked, without a byte order mark.
    pub bytes: Vec<u8>,
    /// Whether the file was gzip.
    pub gzip: bool,
}

/// What files of other kinds begin with, what they are, and what to do.
const OTHERS: [(&[u8], &str, &str); 16] = [
    (b"\xff\xfe", "UTF-16 text", TO_UTF8),
    (b"\xfe\xff", "UTF-16 text", TO_UTF8),
    (b"{\0", "UTF-16 text", TO_UTF8),
    (b"\0{", "UTF-16 text", TO_UTF8),
    (b"PAR1", "a Parquet file", FROM_TABLE),
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

/// Reads a file whole.
///
/// # Errors
/// If it is not there, no file that can be read again, damaged gzip or larger than the memory, or of a kind that holds no text.
pub fn read(path: &Path) -> Result<Source> {
    let name = || path.display().to_string();
    let mut bytes = Vec::new();
    open_file(path)?.read_to_end(&mut bytes).context(name)?;
    let gzip = bytes.starts_with(b"\x1f\x8b");
    if gzip {
        // A small file may unpack to more than any memory holds.
        let most = available_memory().unwrap_or(u64::MAX - 1);
        let mut unpacked = Vec::new();
        let read = MultiGzDecoder::new(bytes.as_slice()).take(most).read_to_end(&mut unpacked);
        read.map_err(|e| crate::error::Error::new(format!("{}: damaged gzip file, expected {e}", name())))?;
        ensure!((unpacked.len() as u64) < most, "{}: unpacks to more than the {most} bytes of free memory", name());
        bytes = unpacked;
    }
    refuse_others(&bytes).context(name)?;
    if bytes.starts_with(b"\xef\xbb\xbf") {
        bytes.drain(..3);
    }
    Ok(Source { bytes, gzip })
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

/// The rows of a body: its lines, or the elements of the one JSON array that it is. Each with its number, from 1.
pub struct Items<'a> {
    /// The texts in their order; lines without their end, a byte order mark or the carriage return before it.
    pub all: Vec<&'a [u8]>,
    /// Whether they are elements of an array.
    pub array: bool,
}

/// Takes a body apart.
pub fn items(body: &[u8]) -> Items<'_> {
    if let Some(all) = elements(body) {
        return Items { all, array: true };
    }
    // Files that were put together have the byte order marks of their parts inside.
    let lines = body.split(|&b| b == b'\n').map(|l| l.strip_prefix(b"\xef\xbb\xbf").unwrap_or(l));
    Items { all: lines.map(|l| l.strip_suffix(b"\r").unwrap_or(l)).collect(), array: false }
}

/// The elements of an array of objects that takes up the whole body; an array that breaks off ends with an empty one, which
/// parses as nothing. `None` where the body is anything else, lists of messages one a line among it.
fn elements(body: &[u8]) -> Option<Vec<&[u8]>> {
    let inner = body.trim_ascii_start().strip_prefix(b"[")?;
    if !matches!(inner.trim_ascii_start().first(), Some(b'{' | b']')) {
        return None;
    }
    let mut all = Vec::new();
    let (mut start, mut depth, mut quoted, mut escaped) = (0, 0usize, false, false);
    for (i, &byte) in inner.iter().enumerate() {
        if quoted {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => quoted = false,
                // No text of JSON goes on in the next line: a line is broken, not an array.
                b'\n' => return None,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => quoted = true,
            b'{' | b'[' => depth += 1,
            b'}' | b']' if depth > 0 => depth -= 1,
            b',' if depth == 0 => {
                all.push(inner[start..i].trim_ascii());
                start = i + 1;
            }
            b']' => {
                let last = inner[start..i].trim_ascii();
                if !(last.is_empty() && all.is_empty()) {
                    all.push(last);
                }
                return inner[i + 1..].trim_ascii().is_empty().then_some(all);
            }
            _ => {}
        }
    }
    all.extend([inner[start..].trim_ascii(), b""]);
    Some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(body: &str) -> (bool, Vec<String>) {
        let items = items(body.as_bytes());
        (items.array, items.all.iter().map(|i| String::from_utf8_lossy(i).into_owned()).collect())
    }

    #[test]
    fn an_array_is_taken_apart_and_lines_are_lines() {
        let array = |all: &[&str]| (true, all.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(
            split(" [\n {\"a\": \"],[\\\"\"},\n{\"b\": [1, {}]}\n]\n"),
            array(&["{\"a\": \"],[\\\"\"}", "{\"b\": [1, {}]}"])
        );
        assert_eq!(split("[]"), array(&[]));
        assert_eq!(split("[{},]"), array(&["{}", ""]));
        assert_eq!(split("[{\"a\": 1},\n{\"b\""), array(&["{\"a\": 1}", "{\"b\"", ""]));
        let lines = |all: &[&str]| (false, all.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(split("[{}]\n[{}]"), lines(&["[{}]", "[{}]"]));
        assert_eq!(split("[\"a\", \"b\"]"), lines(&["[\"a\", \"b\"]"]));
        assert_eq!(split("{}\r\n\u{feff}{}\n"), lines(&["{}", "{}", ""]));
    }
}
