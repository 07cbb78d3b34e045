//! Packing: documents into rows of at most `max_seq_len` tokens by best-fit decreasing, and what a packed row looks like.
//!
//! Longest first, each document goes into the fullest row that still takes it (Johnson 1973, "Near-optimal bin packing
//! algorithms"; at most 11/9 of the optimum plus one row). Rows are kept by what is left of them, so a step costs O(log C).

use std::collections::BTreeMap;

use crate::batch::IGNORE;
use crate::data::encode::Encoded;

/// Packs documents of the given lengths into rows of `capacity`; returns the documents of each row. Among documents of one
/// length the order given decides, so a shuffled input packs differently every epoch. A pure function of its arguments.
///
/// # Panics
/// If a document is longer than a row.
pub fn best_fit_decreasing(lengths: &[u32], capacity: u32) -> Vec<Vec<u32>> {
    let by_length = longest_first(lengths, capacity);
    let mut rows: Vec<Vec<u32>> = Vec::new();
    let mut open: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for doc in by_length {
        let len = lengths[doc as usize];
        let fullest = open.range_mut(len..).next();
        let (room, row) = match fullest {
            Some((&room, list)) => {
                let row = list.pop().expect("lists in the map hold rows");
                if list.is_empty() {
                    open.remove(&room);
                }
                (room, row)
            }
            None => {
                rows.push(Vec::new());
                (capacity, rows.len() as u32 - 1)
            }
        };
        rows[row as usize].push(doc);
        if room > len {
            open.entry(room - len).or_default().push(row);
        }
    }
    rows
}

/// The documents by length, longest first, those of one length in their order: a counting sort.
fn longest_first(lengths: &[u32], capacity: u32) -> Vec<u32> {
    let longest = lengths.iter().copied().max().unwrap_or(0);
    assert!(longest <= capacity, "document of {longest} tokens in a row of {capacity}");
    // Where the documents of each length begin, by how much shorter than the longest they are.
    let mut starts = vec![0u32; longest as usize + 2];
    lengths.iter().for_each(|len| starts[(longest - len) as usize + 1] += 1);
    (1..starts.len()).for_each(|i| starts[i] += starts[i - 1]);
    let mut sorted = vec![0; lengths.len()];
    for (doc, &len) in (0..).zip(lengths) {
        let place = &mut starts[(longest - len) as usize];
        sorted[*place as usize] = doc;
        *place += 1;
    }
    sorted
}

/// A row as other trainers lay it out: padded, labels not shifted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PackedRow {
    /// Token ids, then padding.
    pub input_ids: Vec<u32>,
    /// The token itself where it is a target, else -100: unsupervised, first of its document, or padding.
    pub labels: Vec<i32>,
    /// Position in its document, from 0; padding is a document of its own.
    pub position_ids: Vec<u32>,
    /// Where documents start, padding included, and the length of the row.
    pub cu_seqlens: Vec<u32>,
}

impl PackedRow {
    /// Lays documents out in a row of `capacity`.
    pub fn new(docs: &[Encoded], capacity: usize, pad: u32) -> Self {
        let mut row = Self { cu_seqlens: vec![0], ..Self::default() };
        for doc in docs {
            for (i, (&token, &supervised)) in doc.tokens.iter().zip(&doc.supervised).enumerate() {
                row.input_ids.push(token);
                row.labels.push(if supervised && i > 0 { token as i32 } else { IGNORE });
                row.position_ids.push(i as u32);
            }
            row.cu_seqlens.push(row.input_ids.len() as u32);
        }
        let used = row.input_ids.len();
        assert!(used <= capacity, "{used} tokens in a row of {capacity}");
        if used < capacity {
            row.input_ids.resize(capacity, pad);
            row.labels.resize(capacity, IGNORE);
            row.position_ids.extend(0..(capacity - used) as u32);
            row.cu_seqlens.push(capacity as u32);
        }
        row
    }
}
