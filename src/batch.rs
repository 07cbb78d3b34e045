//! One micro-batch: as the loader makes it, as a view for the device, and on the device.

use crate::tensor::{Device, Tensor};

/// Target value of a token that carries no loss.
pub const IGNORE: i32 = -100;

/// Flattened documents of one micro-batch, padding already removed; vectors of length N.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MicroBatch {
    /// Token ids.
    pub tokens: Vec<i32>,
    /// The token to predict at each position, or [`IGNORE`]; never across a document's end.
    pub targets: Vec<i32>,
    /// First position of the token's document in this micro-batch.
    pub doc_start: Vec<i32>,
    /// Number of targets that carry loss.
    pub n_valid: usize,
    /// Which samples are in it, for messages about bad steps: indices into the data set.
    pub samples: Vec<u32>,
}

impl MicroBatch {
    /// One document of `n` tokens that all have a target, to ask a device what so many take.
    pub fn of_size(n: usize) -> Self {
        Self { tokens: vec![0; n], targets: vec![0; n], doc_start: vec![0; n], n_valid: n, samples: Vec::new() }
    }
}

/// What follows from the vectors of a micro-batch; kept, so that its memory is used again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BatchIndex {
    /// Place of each token in its document.
    positions: Vec<i32>,
    /// The rows with a target, ascending.
    rows: Vec<i32>,
    /// All rows by (token, row).
    by_token: Vec<i32>,
}

impl BatchIndex {
    /// The view of a micro-batch that a device loads.
    ///
    /// # Panics
    /// If its vectors differ in length.
    pub fn view<'a>(&'a mut self, b: &'a MicroBatch) -> BatchView<'a> {
        let n = b.tokens.len();
        assert!(b.targets.len() == n && b.doc_start.len() == n, "vectors of a micro-batch differ in length");
        let rows = 0..n as i32;
        self.positions.clear();
        self.positions.extend(rows.clone().zip(&b.doc_start).map(|(i, start)| i - start));
        self.rows.clear();
        self.rows.extend(rows.clone().zip(&b.targets).filter(|(_, t)| **t != IGNORE).map(|(i, _)| i));
        self.by_token.clear();
        self.by_token.extend(rows);
        self.by_token.sort_unstable_by_key(|&i| (b.tokens[i as usize], i));
        BatchView {
            tokens: &b.tokens,
            targets: &b.targets,
            positions: &self.positions,
            doc_start: &b.doc_start,
            rows: &self.rows,
            by_token: &self.by_token,
        }
    }
}

/// A micro-batch on the host, ready to be loaded.
#[derive(Clone, Copy, Debug)]
pub struct BatchView<'a> {
    /// N token ids.
    pub tokens: &'a [i32],
    /// N targets or [`IGNORE`].
    pub targets: &'a [i32],
    /// N places in the rotary table.
    pub positions: &'a [i32],
    /// N first positions of documents.
    pub doc_start: &'a [i32],
    /// The rows with a target, ascending.
    pub rows: &'a [i32],
    /// All rows by (token, row).
    pub by_token: &'a [i32],
}

/// A micro-batch on a device, all of i32.
pub struct Batch<B: Device> {
    /// (N, 1).
    pub tokens: Tensor<B>,
    /// (N, 1): the token to predict, or [`IGNORE`].
    pub targets: Tensor<B>,
    /// (N, 1): place in the rotary table.
    pub positions: Tensor<B>,
    /// (N, 1): first position of the token's document.
    pub doc_start: Tensor<B>,
    /// (rows, 1): the rows with a target, ascending.
    pub rows: Tensor<B>,
    /// (N, 1): all rows by (token, row), so that the embedding's gradient needs no search and no sort on the device.
    pub by_token: Tensor<B>,
    /// What the device works out of these on the host.
    pub plan: B::Plan,
}

impl<B: Device> Batch<B> {
    /// The vectors with those of a view.
    pub fn columns<'a>(&'a mut self, from: &BatchView<'a>) -> [(&'a mut Tensor<B>, &'a [i32]); 6] {
        [
            (&mut self.tokens, from.tokens),
            (&mut self.targets, from.targets),
            (&mut self.positions, from.positions),
            (&mut self.doc_start, from.doc_start),
            (&mut self.rows, from.rows),
            (&mut self.by_token, from.by_token),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_rows_and_order_by_token() {
        let b = MicroBatch {
            tokens: vec![7, 3, 7, 1, 3],
            targets: vec![3, IGNORE, 1, IGNORE, IGNORE],
            doc_start: vec![0, 0, 2, 2, 4],
            ..Default::default()
        };
        let mut index = BatchIndex::default();
        // Twice: what is kept is overwritten.
        for _ in 0..2 {
            let v = index.view(&b);
            assert_eq!((v.positions, v.rows, v.by_token), (&[0, 1, 0, 1, 0][..], &[0, 2][..], &[3, 1, 4, 0, 2][..]));
        }
    }
}
