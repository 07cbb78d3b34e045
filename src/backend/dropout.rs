//! Dropout: which elements fall is a function of a key and their place, so nothing is stored and backward draws again.

use super::expect_shape;
use crate::rng::Stream;
use crate::tensor::{Device, Tensor};

/// Dropout named by a key: element `e` of the flattened input is dropped where the Philox draw at counter `e` is below `p`,
/// and scaled by `1/(1-p)` elsewhere. Nothing is stored; backward draws the same numbers again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Key of the stream: made of (seed, step, micro-batch, layer, target).
    pub key: u64,
    /// Probability of dropping an element, in `[0, 1)`.
    pub p: f32,
}

impl Dropout {
    /// The stream of its draws.
    pub fn stream(&self) -> Stream {
        Stream::new(&[self.key])
    }

    /// Draws below this value drop: `p · 2^32`.
    pub fn threshold(&self) -> u64 {
        (f64::from(self.p) * 4_294_967_296.0) as u64
    }

    /// Whether element `e` is dropped: word `e mod 4` of block `e / 4` of the stream lies below the threshold.
    pub fn drops(&self, e: u64) -> bool {
        u64::from(self.stream().block(e / 4)[(e % 4) as usize]) < self.threshold()
    }

    /// Panics unless both shapes are equal and p is a probability below 1.
    pub fn check<B: Device>(&self, what: &str, dst: &Tensor<B>, src: &Tensor<B>) {
        expect_shape(what, "dst", dst, src.shape());
        assert!((0.0..1.0).contains(&self.p), "{what}: p is {}, expected one of 0 to 1, 1 left out", self.p);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::testing::{each_wrong_shape_is_refused, f32s, refuses};
    use crate::tensor::DType;

    #[test]
    fn every_wrong_shape_is_refused() {
        let (x, d) = (f32s(3, 8), Dropout { key: 0, p: 0.5 });
        each_wrong_shape_is_refused(&[("dst", (3, 8), DType::F32)], |t| d.check("dropout", &t[0], &x));
        for p in [1.0, -0.1, f32::NAN] {
            refuses("p is", || Dropout { key: 0, p }.check("dropout", &x, &x));
        }
    }
}
