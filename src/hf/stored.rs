//! Elements as they stand in a safetensors file: little-endian f32, bf16 or f16.

use half::f16;
use rayon::prelude::*;

use super::SaveDType;
use crate::tensor::DType;

/// The elements of a tensor in a file.
#[derive(Clone, Copy)]
pub struct Stored<'a> {
    /// All of them.
    pub bytes: &'a [u8],
    /// Their type.
    pub dtype: SaveDType,
}

impl Stored<'_> {
    /// How many there are.
    pub fn elements(&self) -> usize {
        self.bytes.len() / self.dtype.bytes()
    }

    /// The elements from `first` on, widened exactly.
    pub fn widen(&self, first: usize, out: &mut [f32]) {
        fn each<const N: usize>(bytes: &[u8], out: &mut [f32], one: impl Fn([u8; N]) -> f32) {
            for (x, b) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
                *x = one(*b);
            }
        }
        let size = self.dtype.bytes();
        let bytes = &self.bytes[first * size..(first + out.len()) * size];
        match self.dtype {
            SaveDType::F32 => each(bytes, out, f32::from_le_bytes),
            SaveDType::Bf16 => each(bytes, out, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)),
            SaveDType::F16 => each(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
        }
    }

    /// The type under which a tensor can read them where they are, and then whether all are finite.
    pub fn as_tensor(&self) -> Option<(DType, bool)> {
        let dtype = match self.dtype {
            SaveDType::F32 => DType::F32,
            SaveDType::Bf16 => DType::Bf16,
            SaveDType::F16 => return None,
        };
        let aligned = (self.bytes.as_ptr() as usize).is_multiple_of(dtype.bytes());
        (aligned && !self.bytes.is_empty() && cfg!(target_endian = "little")).then(|| (dtype, self.finite()))
    }

    /// Whether no value has an exponent of ones; it stands in the last two bytes of each.
    pub fn finite(&self) -> bool {
        fn any_ones<const N: usize>(bytes: &[u8], exponent: u16) -> bool {
            let ones = |b: &[u8; N]| u16::from_le_bytes([b[N - 2], b[N - 1]]) & exponent == exponent;
            // Without a way out of the loop, so that it becomes vectors.
            bytes.as_chunks::<N>().0.iter().fold(false, |any, b| any | ones(b))
        }
        let refused = |bytes: &[u8]| match self.dtype {
            SaveDType::F32 => any_ones::<4>(bytes, 0x7f80),
            SaveDType::Bf16 => any_ones::<2>(bytes, 0x7f80),
            SaveDType::F16 => any_ones::<2>(bytes, 0x7c00),
        };
        !self.bytes.par_chunks(1 << 18).any(refused)
    }
}
