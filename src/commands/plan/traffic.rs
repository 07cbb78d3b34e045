//! What ranks on GPUs ask of NCCL in a step: calls, and the bytes that a rank sends. `tests/cuda/ranks/plan.rs` holds it to what the emulated NCCL
//! was asked for.

use std::ops::Range;

use crate::comm::bucket::{Extent, at_once};

/// Bytes of f32: gradients travel as such.
const WORD: usize = 4;
/// Bytes of a sum of squares.
const SQUARE: usize = 8;

/// A bucket of gradients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Its parts, in the order of backward.
    pub parts: Range<usize>,
    /// How long it is on these ranks.
    pub extent: Extent,
}

impl Bucket {
    /// Elements of each slot that go at once in an ordered fold, and in how many parts.
    pub fn chunks(&self, size: usize) -> (usize, usize) {
        let longest = self.extent.slot(0);
        let chunk = at_once(longest, size);
        (chunk, longest.div_ceil(chunk))
    }
}

/// How ranks sum gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    /// Ranks.
    pub size: usize,
    /// Micro-batches of each in a step, where sums are folded in order after every one; `None`: they are summed once a step.
    pub folds: Option<usize>,
    /// Bytes of a weight and blocks of the gradient on the rank that has most, where the state is sharded.
    pub sharded: Option<(usize, usize)>,
}

/// Calls of a rank in a step, and what it sends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Calls of `ncclAllReduce`.
    pub all_reduce: usize,
    /// Calls of `ncclReduceScatter`.
    pub reduce_scatter: usize,
    /// Calls of `ncclAllGather`.
    pub all_gather: usize,
    /// Calls of `ncclSend`, in groups with those of `ncclRecv`.
    pub send: usize,
    /// Calls of `ncclRecv`.
    pub receive: usize,
    /// Bytes that the rank sends; around a ring 2(w-1)/w of what an all-reduce sums, and the slots of all others in its two halves.
    pub sent: usize,
}

impl Traffic {
    /// Of the main rank, in a step that sums these buckets.
    pub fn of(buckets: &[Bucket], form: Form) -> Self {
        let mut all = Self::default();
        if form.size < 2 {
            return all;
        }
        for bucket in buckets.iter().filter(|b| b.extent.len > 0) {
            all.add(bucket, form);
        }
        if let Some((_, blocks)) = form.sharded {
            // Slots of sums of squares begin at multiples of 16 bytes.
            all.gather(blocks.next_multiple_of(2) * SQUARE, form.size);
        }
        all
    }

    /// An all-gather of slots of so many bytes.
    fn gather(&mut self, slot: usize, size: usize) {
        self.all_gather += 1;
        self.sent += slot * (size - 1);
    }

    fn add(&mut self, bucket: &Bucket, Form { size, folds, sharded }: Form) {
        let Extent { share, len } = bucket.extent;
        match (folds, sharded) {
            (Some(micro_batches), _) => {
                let (chunk, parts) = bucket.chunks(size);
                let n = |r: usize, part: usize| bucket.extent.slot(r).saturating_sub(part * chunk).min(chunk);
                for part in 0..parts {
                    let theirs: Vec<usize> = (1..size).map(|r| n(r, part)).filter(|&n| n > 0).collect();
                    self.send += micro_batches * theirs.len();
                    self.receive += micro_batches * if n(0, part) > 0 { size - 1 } else { 0 };
                    self.sent += micro_batches * WORD * theirs.iter().sum::<usize>();
                }
                if sharded.is_none() {
                    self.gather(share * WORD, size);
                }
            }
            (None, None) => {
                self.all_reduce += 1;
                self.sent += 2 * (size - 1) * len * WORD / size;
            }
            (None, Some(_)) => {
                self.reduce_scatter += 1;
                self.sent += (size - 1) * share * WORD;
            }
        }
        if let Some((bytes, _)) = sharded {
            self.gather(share * bytes, size);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::bucket::BLOCK;

    fn traffic(lengths: &[usize], form: Form) -> Traffic {
        let bucket = Bucket { parts: 0..1, extent: Extent::of(lengths, form.size) };
        Traffic::of(&[bucket, Bucket { parts: 1..2, extent: Extent::of(&[], form.size) }], form)
    }

    /// Per rank (w-1)/w · 4 bytes a weight and micro-batch, as much again at the end, or 2 with sharded state and bf16.
    #[test]
    fn an_ordered_fold_sends_what_its_documentation_says() {
        let n = 4 * 64 * BLOCK;
        let folded = |sharded| traffic(&[n], Form { size: 4, folds: Some(3), sharded });
        let whole = folded(None);
        assert_eq!(whole.sent, n * 3 / 4 * 4 * (3 + 1));
        assert_eq!((whole.send, whole.receive, whole.all_gather, whole.all_reduce), (3 * 3, 3 * 3, 1, 0));
        let sharded = folded(Some((2, 64)));
        assert_eq!(sharded.sent, n * 3 / 4 * (4 * 3 + 2) + 3 * 64 * 8);
        assert_eq!((sharded.send, sharded.all_gather), (9, 2));
        // A bucket that is longer than the stages goes in parts, the last rank's share is shorter.
        let long = traffic(&[100_000_000], Form { size: 3, folds: Some(1), sharded: None });
        assert_eq!((long.send, long.receive), (2 * 6, 2 * 6));
        let sums = Extent::of(&[100_000_000], 3).share * 4 * 2;
        assert_eq!(long.sent, 4 * (100_000_000 - Extent::of(&[100_000_000], 3).share) + sums);
        // Two ranks own nothing of a small one: nobody sends to them.
        let small = traffic(&[100], Form { size: 3, folds: Some(1), sharded: None });
        assert_eq!((small.send, small.receive, small.all_gather), (0, 2, 1));
    }

    #[test]
    fn sums_once_a_step_are_a_call_for_each_bucket() {
        let once = |sharded| traffic(&[BLOCK], Form { size: 2, folds: None, sharded });
        assert_eq!(once(None), Traffic { all_reduce: 1, sent: 4 * BLOCK, ..Default::default() });
        let expected =
            Traffic { reduce_scatter: 1, all_gather: 2, sent: 4 * BLOCK + 2 * BLOCK + 16, ..Default::default() };
        assert_eq!(once(Some((2, 1))), expected);
        assert_eq!(traffic(&[BLOCK], Form { size: 1, folds: Some(2), sharded: None }), Traffic::default());
    }
}
