//! Files: Hugging Face models, PEFT adapters, training checkpoints.
//!
//! Weights travel one at a time: a [`TensorSource`] decodes a tensor when it is asked for, so that neither loading, growing,
//! merging nor saving holds a model twice.

pub mod fs;
pub mod hf_config;
pub mod names;
pub mod safetensors;
pub mod save;

use crate::bail;
use crate::error::Result;
use crate::model::config::ModelConfig;

/// A matrix in host memory, row-major f32; vectors are `(1, n)`.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    /// Height.
    pub rows: usize,
    /// Width.
    pub cols: usize,
    /// `rows * cols` values.
    pub data: Vec<f32>,
}

impl HostTensor {
    /// A tensor of zeros.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self {
            rows,
            cols,
            data: vec![0.0; rows * cols],
        }
    }

    /// Row `i`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.cols..(i + 1) * self.cols]
    }

    /// Row `i`, to write to.
    pub fn row_mut(&mut self, i: usize) -> &mut [f32] {
        &mut self.data[i * self.cols..(i + 1) * self.cols]
    }

    /// Refuses infinities and NaN; `what` names the tensor in the message.
    ///
    /// # Errors
    /// If a value is not finite: the message has the tensor, the row and column of the first one, and how many there are.
    pub fn check_finite(&self, what: &str) -> Result<()> {
        if self.data.iter().all(|x| x.is_finite()) {
            return Ok(());
        }
        let first = self
            .data
            .iter()
            .position(|x| !x.is_finite())
            .expect("one is not finite");
        let count = self.data.iter().filter(|x| !x.is_finite()).count();
        let (row, col) = (first / self.cols, first % self.cols);
        bail!(
            "{what}: value at row {row}, column {col} is {}; {count} of {} are not finite",
            self.data[first],
            self.data.len()
        )
    }
}

/// Where a model's weights come from, by the names of Hugging Face files.
pub trait TensorSource {
    /// The shape of the model these weights make up.
    fn config(&self) -> &ModelConfig;

    /// The weight called `name`, one of [`names::weights`] of [`TensorSource::config`], in its shape, all values finite.
    ///
    /// # Errors
    /// If it cannot be read or has values that are not finite.
    fn load(&self, name: &str) -> Result<HostTensor>;
}

/// Element type of weights in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveDType {
    /// binary32.
    F32,
    /// bfloat16.
    Bf16,
    /// binary16; values beyond 65504 cannot be written.
    F16,
}

impl SaveDType {
    /// Size of an element in bytes.
    pub fn bytes(self) -> usize {
        match self {
            SaveDType::F32 => 4,
            SaveDType::Bf16 | SaveDType::F16 => 2,
        }
    }

    /// As `config.json` spells it.
    pub fn torch_name(self) -> &'static str {
        match self {
            SaveDType::F32 => "float32",
            SaveDType::Bf16 => "bfloat16",
            SaveDType::F16 => "float16",
        }
    }
}
