//! The items of a source, cut from its text as that is read: lines, or the elements of one JSON array.

use std::io::Read;

use super::{CHUNK, Source, fill};
use crate::ensure;
use crate::error::Result;
use crate::files::MARK;

/// Bytes of text that are worked on at once, or one item where that is longer.
const BATCH: usize = 2 << 20;
/// Items that are worked on at once: short ones cost more than their text.
const MOST_ITEMS: usize = 1 << 14;

/// A row of a file: a line, or an element of the one array that the file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item<'a> {
    /// Its number, from 1.
    pub number: u64,
    /// Its text, without its end, a byte order mark or the carriage return before it; cut behind the limit.
    pub text: &'a [u8],
    /// Bytes of the whole of it.
    pub bytes: u64,
    /// Whether the file ends with it: behind a last line end that is an empty line.
    pub last: bool,
    /// Whether it is where a file that was cut would break off.
    pub cut: bool,
}

/// Some items, one after the other.
#[derive(Debug, Default)]
pub struct Batch {
    text: Vec<u8>,
    spans: Vec<Span>,
}

#[derive(Debug)]
struct Span {
    start: usize,
    end: usize,
    item: Item<'static>,
}

impl Batch {
    /// The items.
    pub fn items(&self) -> impl Iterator<Item = Item<'_>> {
        self.spans.iter().map(|s| Item { text: &self.text[s.start..s.end], ..s.item })
    }
}

/// Cuts a source into batches of items.
pub struct Batches<'s, 'a> {
    source: &'s Source<'a>,
    text: Box<dyn Read + 'a>,
    chunk: Vec<u8>,
    /// Bytes of the chunk that were taken.
    at: usize,
    hasher: blake3::Hasher,
    splitter: Splitter,
    limit: usize,
    number: u64,
    ended: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Splitter {
    Lines,
    Array(Array),
}

impl<'s, 'a> Batches<'s, 'a> {
    pub(super) fn new(source: &'s Source<'a>, text: Box<dyn Read + 'a>, splitter: Splitter, limit: usize) -> Self {
        let hasher = blake3::Hasher::new();
        Self { source, text, chunk: Vec::new(), at: 0, hasher, splitter, limit, number: 0, ended: false }
    }

    /// The next batch; `None` behind the last.
    ///
    /// # Errors
    /// If the file cannot be read, or is not what it was when it was opened.
    pub fn next_batch(&mut self) -> Result<Option<Batch>> {
        let mut batch = Batch::default();
        while !self.ended && batch.text.len() < BATCH && batch.spans.len() < MOST_ITEMS {
            match self.splitter {
                Splitter::Lines => self.line(&mut batch)?,
                Splitter::Array(mut array) => {
                    self.element(&mut array, &mut batch)?;
                    self.splitter = Splitter::Array(array);
                }
            }
        }
        Ok((!batch.spans.is_empty()).then_some(batch))
    }

    /// What is left of the chunk, or the next one; empty where the text ends.
    fn more(&mut self) -> Result<&[u8]> {
        if self.at == self.chunk.len() {
            self.chunk.resize(CHUNK, 0);
            let n = fill(&mut self.text, &mut self.chunk).map_err(|e| self.source.explain(&e))?;
            self.chunk.truncate(n);
            self.at = 0;
            self.hasher.update(&self.chunk);
            // Rows of one file under the hash of another would be found again in its stead.
            ensure!(
                n > 0 || self.hasher.finalize() == self.source.hash,
                "{}: the file changed while it was read; start again when it is complete",
                self.source.name()
            );
        }
        Ok(&self.chunk[self.at..])
    }

    /// One line, or what stands behind the last line end.
    fn line(&mut self, batch: &mut Batch) -> Result<()> {
        let (start, limit) = (batch.text.len(), self.limit.saturating_add(8));
        let (mut bytes, mut before_end) = (0u64, None);
        let last = loop {
            let more = self.more()?;
            if more.is_empty() {
                break true;
            }
            let end = more.iter().position(|&b| b == b'\n');
            let part = &more[..end.unwrap_or(more.len())];
            batch.text.extend(&part[..part.len().min(start.saturating_add(limit).saturating_sub(batch.text.len()))]);
            before_end = part.last().copied().or(before_end);
            let (part, taken) = (part.len(), end.map_or(more.len(), |end| end + 1));
            bytes += part as u64;
            self.at += taken;
            if end.is_some() {
                break false;
            }
        };
        // Files that were put together have the byte order marks of their parts inside.
        let bom = if batch.text[start..].starts_with(MARK.as_bytes()) { MARK.len() } else { 0 };
        bytes -= bom as u64;
        if before_end == Some(b'\r') && bytes > 0 {
            bytes -= 1;
            let kept = (start + bom) as u64 + bytes;
            batch.text.truncate(usize::try_from(kept).map_or(batch.text.len(), |kept| kept.min(batch.text.len())));
        }
        self.push(batch, start + bom, bytes, last, last);
        self.ended = last;
        Ok(())
    }

    /// One element, or what there is of it where the array breaks off; then an empty one follows, which parses as nothing.
    fn element(&mut self, array: &mut Array, batch: &mut Batch) -> Result<()> {
        let (start, limit) = (batch.text.len(), self.limit.saturating_add(8));
        let (mut bytes, mut blanks) = (0u64, 0u64);
        loop {
            let more = self.more()?;
            if more.is_empty() {
                self.push(batch, start, bytes - blanks, false, true);
                self.push(batch, batch.text.len(), 0, true, true);
                self.ended = true;
                return Ok(());
            }
            let mut taken = 0;
            let mut mark = Mark::Skip;
            for &byte in more {
                taken += 1;
                mark = array.step(byte);
                if matches!(mark, Mark::Comma | Mark::Close) {
                    break;
                }
                let blank = byte.is_ascii_whitespace();
                if mark == Mark::Keep && !(blank && bytes == 0) {
                    bytes += 1;
                    blanks = if blank { blanks + 1 } else { 0 };
                    if batch.text.len() - start < limit {
                        batch.text.push(byte);
                    }
                }
            }
            self.at += taken;
            match mark {
                Mark::Comma => {
                    self.push(batch, start, bytes - blanks, false, false);
                    return Ok(());
                }
                Mark::Close => {
                    // `[]` has none.
                    if bytes > 0 {
                        self.push(batch, start, bytes - blanks, true, true);
                    } else if self.number > 0 {
                        // Behind a comma: what is wrong there is the bracket.
                        batch.text.push(b']');
                        self.push(batch, start, 1, true, false);
                    }
                    // To the end, for its hash.
                    while !self.more()?.is_empty() {
                        self.at = self.chunk.len();
                    }
                    self.ended = true;
                    return Ok(());
                }
                _ => {}
            }
        }
    }

    fn push(&mut self, batch: &mut Batch, start: usize, bytes: u64, last: bool, cut: bool) {
        self.number += 1;
        let end = usize::try_from(bytes).map_or(batch.text.len(), |n| batch.text.len().min(start + n));
        let item = Item { number: self.number, text: &[], bytes, last, cut };
        batch.spans.push(Span { start, end, item });
    }
}

/// What a byte is to an array of objects that takes up a whole text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    /// Part of an element, or a blank beside it.
    Keep,
    /// Part of no element.
    Skip,
    /// An element ends, another follows.
    Comma,
    /// The last one ends.
    Close,
    /// The text is no such array.
    No,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Before,
    Opened,
    Inside,
    After,
}

/// Follows an array of objects byte by byte; lists of messages one a line are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Array {
    phase: Phase,
    depth: usize,
    quoted: bool,
    escaped: bool,
}

impl Array {
    /// Whether an element was begun.
    pub(super) fn begun(&self) -> bool {
        matches!(self.phase, Phase::Inside | Phase::After)
    }

    pub(super) fn step(&mut self, byte: u8) -> Mark {
        match self.phase {
            Phase::Before | Phase::Opened | Phase::After if byte.is_ascii_whitespace() => Mark::Skip,
            Phase::Before if byte == b'[' => {
                self.phase = Phase::Opened;
                Mark::Skip
            }
            Phase::Opened if byte == b'{' => {
                self.phase = Phase::Inside;
                self.inside(byte)
            }
            Phase::Opened if byte == b']' => {
                self.phase = Phase::After;
                Mark::Close
            }
            Phase::Inside => self.inside(byte),
            _ => Mark::No,
        }
    }

    fn inside(&mut self, byte: u8) -> Mark {
        if self.quoted {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.quoted = false,
                // No text of JSON goes on in the next line: a line is broken, not an array.
                b'\n' => return Mark::No,
                _ => {}
            }
            return Mark::Keep;
        }
        match byte {
            b'"' => self.quoted = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' if self.depth > 0 => self.depth -= 1,
            b',' if self.depth == 0 => return Mark::Comma,
            b']' => {
                self.phase = Phase::After;
                return Mark::Close;
            }
            _ => {}
        }
        Mark::Keep
    }
}
