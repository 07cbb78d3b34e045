//! The files of other tools: Hugging Face models, PEFT adapters, tokenizers.
//!
//! Weights travel one at a time: a [`TensorSource`] decodes a tensor when it is asked for, so that neither loading, growing,
//! merging nor saving holds a model twice.

pub mod artifact;
pub mod companions;
pub mod config;
pub mod device;
mod header;
pub mod merge;
pub mod merged;
pub mod peft;
pub mod resize;
pub mod safetensors;
pub mod save;
mod second_reading;
mod stored;
pub mod tokenizer_files;
pub mod tokenizer_json;

use crate::error::Result;
use crate::mapped::FilePart;
use crate::model::config::ModelConfig;
use crate::model::weights::Place;
use crate::tensor::DType;
pub use crate::tensor::HostTensor;
use crate::words::words;

/// Where a model's weights come from.
pub trait TensorSource {
    /// The shape of the model these weights make up.
    fn config(&self) -> &ModelConfig;

    /// A weight of the model that [`TensorSource::config`] describes, in its shape, all values finite.
    ///
    /// # Errors
    /// If it cannot be read or has values that are not finite.
    fn load(&self, at: Place) -> Result<HostTensor>;

    /// The same weight for who takes it piece by piece; `None` where it is only to be had whole.
    ///
    /// # Errors
    /// If it cannot be read.
    fn pieces(&self, _at: Place) -> Result<Option<Box<dyn Pieces + '_>>> {
        Ok(None)
    }

    /// The same weight where it stands in a file as f32 or bf16, for who can use it there: `None` where it does not, or has values that
    /// [`TensorSource::load`] refuses.
    ///
    /// # Errors
    /// If it cannot be read.
    fn in_file(&self, _at: Place) -> Result<Option<InFile>> {
        Ok(None)
    }
}

/// A weight as it stands in a file.
pub struct InFile {
    /// Its bytes, aligned for its type.
    pub part: FilePart,
    /// f32 or bf16.
    pub dtype: DType,
    /// Height and width.
    pub shape: (usize, usize),
}

/// A weight of which any part can be had, by several threads at once.
pub trait Pieces: Sync {
    /// Height and width.
    fn shape(&self) -> (usize, usize);

    /// Writes the values from element `first` on.
    fn fill(&self, first: usize, out: &mut [f32]);

    /// Whether all that was written are values of the weight.
    ///
    /// # Errors
    /// That of [`TensorSource::load`].
    fn finish(&self) -> Result<()> {
        Ok(())
    }
}

/// A source under another configuration of the same shapes, for example with the end token of ChatML.
pub struct WithConfig<'a> {
    /// Where the weights come from.
    pub source: &'a dyn TensorSource,
    /// What config.json is to say; every shape as in the source.
    pub config: ModelConfig,
}

impl TensorSource for WithConfig<'_> {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn load(&self, at: Place) -> Result<HostTensor> {
        self.source.load(at)
    }

    fn pieces(&self, at: Place) -> Result<Option<Box<dyn Pieces + '_>>> {
        self.source.pieces(at)
    }

    fn in_file(&self, at: Place) -> Result<Option<InFile>> {
        self.source.in_file(at)
    }
}

/// A source that says which weight is asked of it: whoever reads a large model does something all the while.
pub struct Told<'a> {
    /// Where the weights come from.
    pub source: &'a dyn TensorSource,
    /// Hears of each.
    pub to: &'a dyn Fn(Place),
}

impl TensorSource for Told<'_> {
    fn config(&self) -> &ModelConfig {
        self.source.config()
    }

    fn load(&self, at: Place) -> Result<HostTensor> {
        (self.to)(at);
        self.source.load(at)
    }

    fn pieces(&self, at: Place) -> Result<Option<Box<dyn Pieces + '_>>> {
        (self.to)(at);
        self.source.pieces(at)
    }

    fn in_file(&self, at: Place) -> Result<Option<InFile>> {
        (self.to)(at);
        self.source.in_file(at)
    }
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
words!(SaveDType { Bf16 = "bf16" | "bfloat16", F16 = "f16" | "float16", F32 = "f32" | "float32" });

impl SaveDType {
    /// Size of an element in bytes.
    pub fn bytes(self) -> usize {
        match self {
            SaveDType::F32 => 4,
            SaveDType::Bf16 | SaveDType::F16 => 2,
        }
    }

    /// `x` after one rounding to the type.
    pub fn round(self, x: f32) -> f32 {
        match self {
            SaveDType::F32 => x,
            SaveDType::Bf16 => half::bf16::from_f32(x).to_f32(),
            SaveDType::F16 => half::f16::from_f32(x).to_f32(),
        }
    }

    /// The largest relative error of a rounding, and the smallest number above zero, below which that bound ends.
    pub fn unit(self) -> (f64, f64) {
        let (unit, smallest) = match self {
            SaveDType::F32 => (-24, -149),
            SaveDType::Bf16 => (-8, -133),
            SaveDType::F16 => (-11, -24),
        };
        (2f64.powi(unit), 2f64.powi(smallest))
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
