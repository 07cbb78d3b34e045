//! Dropout: which elements fall is a function of a key and their place, so nothing is stored and backward draws again.

use super::expect_shape;
use crate::rng::Stream;
use crate::tensor::{Device, Tensor};

/// Dropout named by a key. Element `e` of the flattened input draws 16 bits: half `e mod 2` (the low one first) of word
/// `e / 2 mod 4` of Philox block `e / 8`. Below the threshold it is dropped; elsewhere it is scaled so that its expectation stays.
/// Nothing is stored; backward draws the same numbers again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Key of the stream: made of (seed, step, micro-batch, layer, target).
    pub key: u64,
    /// Probability of dropping an element, in `[0, 1)`; rounded to a multiple of 2^-16.
    pub p: f32,
}

/// Values of a draw.
const DRAWS: u32 = 1 << 16;

impl Dropout {
    /// Elements that one Philox block serves.
    pub const PER_BLOCK: usize = 8;

    /// The stream of its draws.
    pub fn stream(&self) -> Stream {
        Stream::new(&[self.key])
    }

    /// Draws below this value drop: `p · 2^16`, and never none where p is above 0, nor all.
    pub fn threshold(&self) -> u32 {
        let wanted = (f64::from(self.p) * f64::from(DRAWS)).round() as u32;
        wanted.clamp(u32::from(self.p > 0.0), DRAWS - 1)
    }

    /// Factor on what is kept: one over the probability of keeping an element.
    pub fn scale(&self) -> f32 {
        (f64::from(DRAWS) / f64::from(DRAWS - self.threshold())) as f32
    }

    /// Whether element `e` is dropped.
    pub fn drops(&self, e: u64) -> bool {
        let word = self.stream().block(e / 8)[(e / 2 % 4) as usize];
        (word >> (16 * (e % 2))) & (DRAWS - 1) < self.threshold()
    }

    /// Panics unless both shapes are equal and p is a probability below 1.
    pub fn check<B: Device>(&self, what: &str, dst: &Tensor<B>, src: &Tensor<B>) {
        expect_shape(what, "dst", dst, src.shape());
        assert!((0.0..1.0).contains(&self.p), "{what}: p is {}, expected one of 0 to 1, 1 left out", self.p);
    }
}
