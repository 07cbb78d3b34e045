//! Random values that need no memory: a value is a function of its seed and place, so that an operand of any size is known on the
//! host wherever a result is verified.

use half::bf16;
use rayon::prelude::*;

use crate::backend::Backend;
use crate::error::Result;
use crate::hf::{HostTensor, Pieces, TensorSource};
use crate::model::config::ModelConfig;
use crate::model::weights::{Kind, Place, Weights};
use crate::rng::Stream;
use crate::tensor::{DType, Tensor};

/// Values of one block of random bits: 16 bits each.
const BLOCK: usize = 8;

/// Values drawn at once by a thread.
const CHUNK: usize = BLOCK << 13;

/// Uniform values of mean 0 and deviation `size`, rounded as the storage type holds them.
#[derive(Clone, Debug)]
pub struct Values {
    stream: Stream,
    size: f32,
    dtype: DType,
}

impl Values {
    /// The values of a seed.
    pub fn new(seed: u64, size: f64, dtype: DType) -> Self {
        Self { stream: Stream::new(&[seed, 0x6265_6e63_6800]), size: (size * 3f64.sqrt()) as f32, dtype }
    }

    /// The values from place `first` on, a multiple of [`BLOCK`], before they are rounded.
    fn draw(&self, first: usize, out: &mut [f32]) {
        debug_assert!(first.is_multiple_of(BLOCK));
        let mut bits = [0u64; 64];
        let mut block = (first / BLOCK) as u64;
        for values in out.chunks_mut(4 * bits.len()) {
            let bits = &mut bits[..values.len().div_ceil(4)];
            self.stream.fill(2 * block, bits);
            block += (values.len() / BLOCK) as u64;
            for (values, bits) in values.chunks_mut(4).zip(bits) {
                for (i, v) in values.iter_mut().enumerate() {
                    let bits = (*bits >> (16 * i)) as u16;
                    *v = ((f32::from(bits) + 0.5) / 32_768.0 - 1.0) * self.size;
                }
            }
        }
    }

    fn stored(&self, x: f32) -> f64 {
        match self.dtype {
            DType::Bf16 => f64::from(bf16::from_f32(x).to_f32()),
            _ => f64::from(x),
        }
    }

    /// The value at a place, as it is stored.
    pub fn at(&self, place: usize) -> f64 {
        let mut block = [0.0; BLOCK];
        self.draw(place / BLOCK * BLOCK, &mut block);
        self.stored(block[place % BLOCK])
    }

    /// `n` values from a place on, as they are stored.
    pub fn range(&self, from: usize, n: usize) -> Vec<f64> {
        let first = from / BLOCK * BLOCK;
        let mut all = vec![0.0; from - first + n];
        self.draw(first, &mut all);
        all[from - first..].iter().map(|&x| self.stored(x)).collect()
    }

    /// `n` values from the first on, not yet rounded.
    pub fn all(&self, n: usize) -> Vec<f32> {
        let mut all = vec![0.0; n];
        all.par_chunks_mut(CHUNK).enumerate().for_each(|(i, part)| self.draw(i * CHUNK, part));
        all
    }
}

/// A matrix of such values.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// Row by row.
    pub v: Values,
    cols: usize,
}

impl Matrix {
    /// The value at a place.
    pub fn at(&self, row: usize, col: usize) -> f64 {
        self.v.at(row * self.cols + col)
    }

    /// A row.
    pub fn row(&self, row: usize) -> Vec<f64> {
        self.part(row, 0, self.cols)
    }

    /// `n` elements of a row from a column on.
    pub fn part(&self, row: usize, col: usize, n: usize) -> Vec<f64> {
        self.v.range(row * self.cols + col, n)
    }
}

/// A matrix on the device, and what it was given.
pub struct Filled<B: Backend> {
    /// On the device.
    pub t: Tensor<B>,
    /// What it was given.
    pub m: Matrix,
}

impl<B: Backend> Filled<B> {
    /// A matrix of the values of a seed, of deviation `size`.
    ///
    /// # Errors
    /// If the device has not enough memory.
    pub fn new(dev: &B, seed: u64, size: f64, rows: usize, cols: usize, dtype: DType) -> Result<Self> {
        let m = Matrix { v: Values::new(seed, size, dtype), cols };
        let mut filled = Self { t: dev.alloc(rows, cols, dtype)?, m };
        filled.restore(dev)?;
        Ok(filled)
    }

    /// Puts the values back.
    ///
    /// # Errors
    /// If the device refuses the copy.
    pub fn restore(&mut self, dev: &B) -> Result<()> {
        let all = self.m.v.all(self.t.len());
        dev.upload(&mut self.t, &all)
    }
}

/// A model of random weights, drawn fast: matrices of deviation 0.02, norms 1, biases 0.
pub struct RandomWeights(pub ModelConfig);

impl RandomWeights {
    fn values(&self, at: Place) -> Values {
        let seed = Weights::of(&self.0).places().iter().position(|(place, _)| *place == at);
        Values::new(seed.unwrap_or_default() as u64, 0.02, DType::F32)
    }
}

impl TensorSource for RandomWeights {
    fn config(&self) -> &ModelConfig {
        &self.0
    }

    fn load(&self, at: Place) -> Result<HostTensor> {
        let (rows, cols) = at.shape(&self.0, 0);
        let data = match at.kind() {
            Kind::Norm => vec![1.0; rows * cols],
            Kind::Bias => vec![0.0; rows * cols],
            _ => self.values(at).all(rows * cols),
        };
        Ok(HostTensor { rows, cols, data })
    }

    fn pieces(&self, at: Place) -> Result<Option<Box<dyn Pieces + '_>>> {
        let values = match at.kind() {
            Kind::Norm | Kind::Bias => return Ok(None),
            _ => self.values(at),
        };
        Ok(Some(Box::new(Drawn { values, shape: at.shape(&self.0, 0) })))
    }
}

/// A weight whose values are drawn as they are asked for.
struct Drawn {
    values: Values,
    shape: (usize, usize),
}

impl Pieces for Drawn {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn fill(&self, first: usize, out: &mut [f32]) {
        self.values.draw(first, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_the_same_alone_in_a_range_and_among_all() {
        for dtype in [DType::F32, DType::Bf16] {
            let v = Values::new(3, 2.0, dtype);
            let n = CHUNK + 29;
            let all: Vec<f64> = v.all(n).iter().map(|&x| v.stored(x)).collect();
            assert_eq!(v.range(0, n), all);
            assert_eq!(v.range(CHUNK - 3, 17), all[CHUNK - 3..CHUNK + 14]);
            for at in [0, 7, 8, 1001, CHUNK, n - 1] {
                assert_eq!(v.at(at), all[at]);
            }
            let mean = all.iter().sum::<f64>() / n as f64;
            let square = all.iter().map(|x| x * x).sum::<f64>() / n as f64;
            assert!(mean.abs() < 0.02 && (square / 4.0 - 1.0).abs() < 0.02, "{mean} {square}");
        }
        assert_ne!(Values::new(3, 1.0, DType::F32).at(5), Values::new(4, 1.0, DType::F32).at(5));
    }
}
