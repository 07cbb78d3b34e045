//! Elements of tensors: how a storage type widens and rounds, and a slice with its type as a value.

use bytemuck::Pod;
use half::bf16;

use crate::tensor::DType;

/// Elements of an f32 or bf16 tensor.
#[derive(Clone, Copy)]
pub enum View<'a> {
    /// f32 elements.
    F32(&'a [f32]),
    /// bf16 elements.
    Bf16(&'a [bf16]),
}

impl<'a> View<'a> {
    /// The elements from `at` on.
    pub fn from(self, at: usize) -> View<'a> {
        match self {
            View::F32(x) => View::F32(&x[at..]),
            View::Bf16(x) => View::Bf16(&x[at..]),
        }
    }
}

/// What a tensor can hold.
pub trait Stored: Pod + Send + Sync {
    /// Its name among the tensors.
    const DTYPE: DType;
}

impl Stored for f32 {
    const DTYPE: DType = DType::F32;
}

impl Stored for bf16 {
    const DTYPE: DType = DType::Bf16;
}

impl Stored for i32 {
    const DTYPE: DType = DType::I32;
}

/// A type of numbers: computed with as f32, rounded once when stored.
pub trait Elem: Stored {
    /// Widens exactly.
    fn get(self) -> f32;

    /// Rounds to nearest, ties to even; NaN stays NaN.
    fn put(x: f32) -> Self;

    /// A slice with its type as a value.
    fn view(x: &[Self]) -> View<'_>;
}

impl Elem for f32 {
    #[inline(always)]
    fn get(self) -> f32 {
        self
    }

    #[inline(always)]
    fn put(x: f32) -> Self {
        x
    }

    fn view(x: &[Self]) -> View<'_> {
        View::F32(x)
    }
}

impl Elem for bf16 {
    #[inline(always)]
    fn get(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn put(x: f32) -> Self {
        bf16::from_bits(round_bits(x))
    }

    fn view(x: &[Self]) -> View<'_> {
        View::Bf16(x)
    }
}

/// The bits of `x` rounded to bf16.
#[inline(always)]
pub fn round_bits(x: f32) -> u16 {
    let b = x.to_bits();
    let rounded = b.wrapping_add(0x7fff).wrapping_add((b >> 16) & 1);
    // A quiet NaN, because rounding its payload could give infinity.
    let bits = if x.is_nan() { b | 0x0040_0000 } else { rounded };
    (bits >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_as_the_half_crate() {
        for i in 0..200_000u32 {
            let x = f32::from_bits(i.wrapping_mul(0x9E37_79B9));
            let (ours, theirs) = (bf16::put(x), bf16::from_f32(x));
            assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{x:?}");
        }
    }
}
