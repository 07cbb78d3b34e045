//! What attention needs to know of a micro-batch before it starts: lists of tiles, none across two documents.

use super::device::Cuda;
use super::launch::too_large;
use super::memory::{CudaBuf, Memory};
use super::upload::Uploads;
use crate::batch::{Batch, BatchView};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// Queries of a tile of forward.
pub(super) const ROWS: usize = 128;
/// Queries, or keys, of a tile of backward.
pub(super) const ROWS_BACKWARD: usize = 64;

/// Words of a tile: its document's first token, the one after its last, its own first row.
pub(super) const WORDS: usize = 3;

/// Work lists of a micro-batch: where they begin and how long they are. Their words lie behind `doc_start`, in the block that brings all
/// vectors to the device in one copy.
#[derive(Default)]
pub struct Plan {
    /// How the block comes to the device; `None` before there is a batch.
    uploads: Option<Uploads>,
    /// Words from `doc_start` to the lists.
    before: usize,
    /// Tiles of each list.
    lens: [usize; LISTS],
}

/// Words that the vectors of a micro-batch and its lists take for each token at most: six vectors, and a tile per token in each list.
pub(super) const TOKEN_WORDS: usize = 6 + LISTS * WORDS;

/// Blocks of words that take turns.
pub(super) const SLOTS: usize = 2;

/// Every vector begins at a multiple of so many words.
const ALIGNED: usize = CudaBuf::ALIGNMENT as usize / size_of::<i32>();

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

/// Most tokens of a micro-batch: kernels find the words of a tile by an index of 32 bits.
const MOST_TOKENS: usize = 1 << 30;

/// [`crate::backend::Backend::new_batch`]: room for a tile per token in each list.
pub(super) fn new_batch(dev: &Cuda, max_tokens: usize) -> Result<Batch<Cuda>> {
    if max_tokens > MOST_TOKENS {
        return Err(too_large("a micro-batch", &format!("{max_tokens} tokens"), MOST_TOKENS));
    }
    // Six vectors and the lists begin at multiples.
    let mut uploads = Uploads::new(dev, max_tokens * TOKEN_WORDS + 7 * ALIGNED)?;
    let memory = uploads.bring(dev, |_| 0)?;
    let column = || column(&memory, 0, 0);
    Ok(Batch {
        tokens: column(),
        targets: column(),
        positions: column(),
        doc_start: column(),
        rows: column(),
        by_token: column(),
        plan: Plan { uploads: Some(uploads), ..Plan::default() },
    })
}

/// `rows` words from word `at` on, as a column.
fn column(memory: &Memory, at: usize, rows: usize) -> Tensor<Cuda> {
    let bytes = size_of::<i32>();
    Tensor::from_buf(CudaBuf::part(memory, at * bytes, rows * bytes), rows, 1, DType::I32)
}

/// Puts words behind each other in a block.
struct Packing<'a> {
    block: &'a mut [i32],
    end: usize,
}

impl Packing<'_> {
    /// Behind what is there.
    fn put(&mut self, words: &[i32]) {
        self.block[self.end..][..words.len()].copy_from_slice(words);
        self.end += words.len();
    }

    /// The same from the next multiple of [`ALIGNED`] on: where that is.
    fn put_aligned(&mut self, words: &[i32]) -> usize {
        self.end = self.end.next_multiple_of(ALIGNED);
        let at = self.end;
        self.put(words);
        at
    }
}

/// [`crate::backend::Backend::load_batch`]: while what was queued for the micro-batch before is still computed.
pub(super) fn load_batch(dev: &Cuda, to: &mut Batch<Cuda>, from: BatchView<'_>) -> Result<()> {
    let lists = lists(from.doc_start);
    let uploads = to.plan.uploads.as_mut().expect("made by new_batch");
    let vectors = [from.tokens, from.targets, from.positions, from.rows, from.by_token, from.doc_start];
    let mut begins = [0; 6];
    let mut behind = 0;
    let memory = uploads.bring(dev, |block| {
        let mut packing = Packing { block, end: 0 };
        begins = vectors.map(|vector| packing.put_aligned(vector));
        behind = packing.put_aligned(lists[0].as_flattened());
        lists[1..].iter().for_each(|list| packing.put(list.as_flattened()));
        packing.end
    })?;
    let column = |i: usize| column(&memory, begins[i], vectors[i].len());
    (to.tokens, to.targets, to.positions) = (column(0), column(1), column(2));
    (to.rows, to.by_token, to.doc_start) = (column(3), column(4), column(5));
    (to.plan.before, to.plan.lens) = (behind - begins[5], lists.map(|list| list.len()));
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
