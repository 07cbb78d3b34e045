//! Where a bucket lies in device memory: pieces of tensors, by owner; or one range, of which every rank's share is a part.

use super::device::Cuda;
use crate::tensor::Tensor;

/// Bytes of a tensor in device memory: where they begin, and how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    address: u64,
    bytes: usize,
    /// Where what lies behind it begins: between them is nobody's.
    next: u64,
}

impl Piece {
    /// Elements `first..first + len` of a tensor.
    ///
    /// # Panics
    /// If it has fewer.
    pub fn of(t: &Tensor<Cuda>, first: usize, len: usize) -> Self {
        assert!(first + len <= t.len(), "elements {first}..{} of {:?}", first + len, t.shape());
        let size = t.dtype().bytes();
        let piece = Self::at(t.buf.address() + (first * size) as u64, len * size);
        if first + len == t.capacity() { Self { next: t.buf.next(), ..piece } } else { piece }
    }

    /// Bytes at an address.
    pub(super) fn at(address: u64, bytes: usize) -> Self {
        Self { address, bytes, next: address + bytes as u64 }
    }

    /// Where they begin.
    pub(super) fn address(&self) -> u64 {
        self.address
    }

    /// How many there are.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// `bytes` of them from byte `first` on.
    pub(super) fn part(&self, first: usize, bytes: usize) -> Self {
        assert!(first + bytes <= self.bytes, "bytes {first}..{} of {}", first + bytes, self.bytes);
        Self::at(self.address + first as u64, bytes)
    }
}

/// What each rank owns of a bucket, and how many bytes its share takes where all of them lie in a row.
pub struct Slots {
    /// By rank.
    pub pieces: Vec<Vec<Piece>>,
    /// Bytes of a share.
    pub share: usize,
}

/// A bucket that lies in one range of memory: rank r's share begins at `base + r share`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Whole {
    /// Where it begins.
    pub base: u64,
    /// Bytes of a share.
    pub share: usize,
    /// Bytes up to the end of its last piece.
    pub bytes: usize,
}

impl Slots {
    /// The range that the bucket is, where its tensors lie so: one after the other with nothing of others between them, and room for a
    /// share of every rank.
    pub(super) fn whole(&self) -> Option<Whole> {
        let first = self.pieces.iter().flatten().next()?;
        let (base, mut last) = (first.address, None::<&Piece>);
        for (r, slot) in self.pieces.iter().enumerate() {
            for (i, piece) in slot.iter().enumerate() {
                let follows = last.is_none_or(|last| last.next == piece.address);
                let begins = i > 0 || piece.address == base + (r * self.share) as u64;
                if !(follows && begins) {
                    return None;
                }
                last = Some(piece);
            }
        }
        let last = last?;
        let (end, room) = (last.address + last.bytes as u64 - base, last.next - base);
        (room >= (self.pieces.len() * self.share) as u64).then_some(Whole {
            base,
            share: self.share,
            bytes: end as usize,
        })
    }

    /// The same bytes with a piece for each rank where they are one range; else as they are.
    pub(super) fn joined(&self) -> Vec<Vec<Piece>> {
        let Some(Whole { base, share, bytes }) = self.whole() else { return self.pieces.clone() };
        let part = |r: usize| {
            let len = bytes.saturating_sub(r * share).min(share);
            (len > 0).then(|| Piece::at(base + (r * share) as u64, len)).into_iter().collect()
        };
        (0..self.pieces.len()).map(part).collect()
    }
}

/// `bytes` bytes of a slot from byte `from` on, as far as it goes.
pub(super) fn window(slot: &[Piece], from: usize, bytes: usize) -> Vec<Piece> {
    let (mut at, end) = (0, from + bytes);
    let part = |piece: &Piece| {
        let (first, last) = (from.clamp(at, at + piece.bytes) - at, end.clamp(at, at + piece.bytes) - at);
        at += piece.bytes;
        (first < last).then(|| piece.part(first, last - first))
    };
    slot.iter().filter_map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_has_the_bytes_of_a_slot_in_order() {
        let slot = [Piece::at(1000, 40), Piece::at(2000, 8), Piece::at(3000, 20)];
        assert_eq!(window(&slot, 0, 68), slot);
        assert_eq!(window(&slot, 12, 32), [Piece::at(1012, 28), Piece::at(2000, 4)]);
        assert_eq!(window(&slot, 40, 16), [Piece::at(2000, 8), Piece::at(3000, 8)]);
        assert_eq!(window(&slot, 64, 36), [Piece::at(3016, 4)]);
        assert_eq!(window(&slot, 68, 16), []);
    }

    #[test]
    fn a_bucket_is_one_range_where_nothing_of_others_lies_between() {
        let piece = |address, bytes, next| Piece { address, bytes, next };
        // Two tensors of 150 and 30 bytes in blocks of 100 on two ranks; the second is filled up to a share of 200.
        let lies = |second: u64, end: u64| Slots {
            pieces: vec![vec![piece(1000, 150, second)], vec![piece(second, 30, end)]],
            share: 200,
        };
        assert_eq!(lies(1200, 1400).whole(), Some(Whole { base: 1000, share: 200, bytes: 230 }));
        assert_eq!(lies(1200, 1400).joined(), [[Piece::at(1000, 200)], [Piece::at(1200, 30)]]);
        // Without room for the last share, or elsewhere, it is in pieces.
        for slots in [lies(1200, 1300), lies(1300, 1500)] {
            assert_eq!((slots.whole(), slots.joined()), (None, slots.pieces));
        }
        let apart = Slots { pieces: vec![vec![piece(1000, 100, 1100), piece(1200, 100, 1300)], vec![]], share: 200 };
        assert_eq!(apart.whole(), None);
        // A rank without a share of its own has its room.
        let alone = |end| Slots { pieces: vec![vec![piece(1000, 100, end)], vec![], vec![]], share: 100 };
        assert_eq!(alone(1300).whole(), Some(Whole { base: 1000, share: 100, bytes: 100 }));
        assert_eq!(
            (alone(1200).whole(), alone(1300).joined()),
            (None, vec![vec![Piece::at(1000, 100)], vec![], vec![]])
        );
    }
}
