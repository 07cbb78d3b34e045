//! What attention needs to know of a micro-batch before it starts: lists of tiles, none across two documents.

use super::device::Cuda;
use crate::batch::{Batch, BatchView};
use crate::error::Result;
use crate::tensor::{DType, Device};

/// Queries of a tile of forward.
pub(super) const ROWS: usize = 128;
/// Queries, or keys, of a tile of backward.
pub(super) const ROWS_BACKWARD: usize = 64;

/// Words of a tile: its document's first token, the one after its last, its own first row.
pub(super) const WORDS: usize = 3;

/// Work lists of a micro-batch: where they begin and how long they are. Their words lie behind `doc_start`, in its memory, so that one copy
/// brings both to the device.
#[derive(Default)]
pub struct Plan {
    /// `doc_start` and what lies behind it; kept, so that its memory is used again.
    words: Vec<i32>,
    /// Words before the lists.
    before: usize,
    /// Tiles of each list.
    lens: [usize; LISTS],
}

/// Words that the vectors of a micro-batch and its lists take for each token at most: six vectors, and a tile per token in each list.
pub(super) const TOKEN_WORDS: usize = 6 + LISTS * WORDS;

/// How many lists there are.
const LISTS: usize = 3;

/// A work list: what its tiles hold, and which come first. Those that take longest do, so that the device is busy to the end.
#[derive(Clone, Copy, Debug)]
pub(super) enum List {
    /// Queries of forward: late ones see the most keys.
    Forward,
    /// Queries of backward.
    Queries,
    /// Keys of backward: early ones are seen by the most queries.
    Keys,
}

impl Plan {
    /// Which element of the memory of `doc_start` a list begins at, and its tiles.
    pub(super) fn list(&self, list: List) -> (usize, usize) {
        let tiles: usize = self.lens[..list as usize].iter().sum();
        (self.before + tiles * WORDS, self.lens[list as usize])
    }
}

/// The tiles of `rows` rows of each document, in order.
fn tiles(doc_start: &[i32], rows: usize) -> Vec<[i32; WORDS]> {
    let mut tiles = Vec::new();
    for document in doc_start.chunk_by(|a, b| a == b) {
        let (start, end) = (document[0], document[0] + document.len() as i32);
        tiles.extend((start..end).step_by(rows).map(|row| [start, end, row]));
    }
    tiles
}

fn lists(doc_start: &[i32]) -> [Vec<[i32; WORDS]>; LISTS] {
    let mut lists = [ROWS, ROWS_BACKWARD, ROWS_BACKWARD].map(|rows| tiles(doc_start, rows));
    lists[..2].iter_mut().for_each(|list| list.sort_by_key(|[start, _, row]| start - row));
    lists[2].sort_by_key(|[_, end, row]| row - end);
    lists
}

/// [`crate::backend::Backend::new_batch`]: room for a tile per token in each list.
pub(super) fn new_batch(dev: &Cuda, max_tokens: usize) -> Result<Batch<Cuda>> {
    let column = |rows| dev.alloc(rows, 1, DType::I32);
    Ok(Batch {
        tokens: column(max_tokens)?,
        targets: column(max_tokens)?,
        positions: column(max_tokens)?,
        doc_start: column(max_tokens * (1 + LISTS * WORDS))?,
        rows: column(max_tokens)?,
        by_token: column(max_tokens)?,
        plan: Plan::default(),
    })
}

/// [`crate::backend::Backend::load_batch`].
pub(super) fn load_batch(dev: &Cuda, to: &mut Batch<Cuda>, from: BatchView<'_>) -> Result<()> {
    let lists = lists(from.doc_start);
    let mut words = std::mem::take(&mut to.plan.words);
    words.clear();
    words.extend_from_slice(from.doc_start);
    words.extend(lists.iter().flatten().flatten());
    for (column, values) in to.columns(&BatchView { doc_start: &words, ..from }) {
        column.set_rows(values.len());
        dev.upload_i32(column, values)?;
    }
    to.doc_start.set_rows(from.doc_start.len());
    to.plan = Plan { words, before: from.doc_start.len(), lens: lists.map(|list| list.len()) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_begin_where_documents_do_and_the_longest_come_first() {
        let mut starts = vec![0; 7];
        starts.extend([7; 300]);
        starts.push(307);
        let [forward, queries, keys] = lists(&starts);
        assert_eq!(forward, [[7, 307, 263], [7, 307, 135], [0, 7, 0], [7, 307, 7], [307, 308, 307]]);
        assert_eq!(queries.len(), 7);
        assert_eq!(queries[..2], [[7, 307, 263], [7, 307, 199]]);
        assert_eq!(keys[..2], [[7, 307, 7], [7, 307, 71]]);
        assert_eq!(keys[5..], [[0, 7, 0], [307, 308, 307]]);
    }
}
