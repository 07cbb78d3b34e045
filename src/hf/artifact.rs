//! What a run produces, in files other tools load: a PEFT adapter or a Hugging Face model, with the tokenizer beside it.

use std::path::Path;

use crate::error::{Error, Result};
use crate::hf::peft::{Adapter, AdapterConfig, save_adapter};
use crate::hf::resize::{Resize, Resized};
use crate::hf::safetensors::ModelFiles;
use crate::hf::save::{SaveOptions, save_model};
use crate::hf::{HostTensor, SaveDType, TensorSource, WithConfig};
use crate::model::config::ModelConfig;
use crate::model::weights::{Kind, Part, Place};

/// Trained weights on the host.
pub type HostParams = Vec<(Place, HostTensor)>;

/// Gives the trained values of a weight, from wherever they stand: files are written with one weight in memory at a time.
pub type Trained<'a> = dyn Fn(Place) -> Result<HostTensor> + 'a;

/// The form in which a run's weights are saved.
pub enum Artifact {
    /// LoRA.
    Adapter {
        /// Rank, scale and targets, and where the base model is.
        config: AdapterConfig,
        /// The base model as it lies on disk.
        base: Box<ModelFiles>,
        /// How its vocabulary was grown.
        resize: Resize,
        /// Shape of the model with its grown vocabulary.
        model: ModelConfig,
        /// The trained rows of embedding and head, where the vocabulary was grown: the first, and how many.
        new_rows: Option<(usize, usize)>,
    },
    /// Full training.
    Model {
        /// Shape of the model.
        config: ModelConfig,
        /// Element type of the files: that of the weights in training, so that reading them back gives the same bits.
        dtype: SaveDType,
    },
}

impl Artifact {
    /// Writes weights and configuration into a folder.
    ///
    /// # Errors
    /// If a weight is not finite or a file cannot be written.
    pub fn write(&self, dir: &Path, trained: &Trained<'_>) -> Result<()> {
        match self {
            Artifact::Model { config, dtype } => {
                let source = TrainedModel { config, trained };
                save_model(dir, &source, SaveOptions { dtype: *dtype, ..Default::default() })
            }
            Artifact::Adapter { config, base, resize, new_rows, .. } => {
                let resized = Resized::new(&**base, resize.clone())?;
                save_adapter(dir, config, resized.config(), new_rows.is_some(), |at| match new_rows {
                    // The file holds the whole embedding; training has the new rows of it.
                    Some((first, _)) if at.kind() == Kind::Vocabulary => {
                        let mut whole = resized.load(at)?;
                        let rows = trained(at)?;
                        whole.data[first * rows.cols..][..rows.data.len()].copy_from_slice(&rows.data);
                        Ok(whole)
                    }
                    _ => trained(at),
                })
            }
        }
    }

    /// Writes the base model of an adapter with its grown vocabulary, in the element type of its files.
    ///
    /// # Errors
    /// If a weight or a file cannot be written.
    pub fn write_base(&self, dir: &Path) -> Result<()> {
        let Artifact::Adapter { base, resize, model, .. } = self else {
            return Ok(());
        };
        let options = SaveOptions { dtype: base.dtype(), ..Default::default() };
        let resized = Resized::new(&**base, resize.clone())?;
        save_model(dir, &WithConfig { source: &resized, config: model.clone() }, options)
    }

    /// Reads back weights exactly as they were in training.
    ///
    /// # Errors
    /// If a file is damaged or a weight is missing.
    pub fn read(&self, dir: &Path, places: &[Place]) -> Result<HostParams> {
        match self {
            Artifact::Model { .. } => {
                let files = ModelFiles::open(dir)?;
                places.iter().map(|&at| Ok((at, files.load(at)?))).collect()
            }
            Artifact::Adapter { new_rows, .. } => {
                let adapter = Adapter::open(dir)?;
                places.iter().map(|&at| Ok((at, adapter_weight(&adapter, at, *new_rows)?))).collect()
            }
        }
    }
}

/// A trained tensor of an adapter.
fn adapter_weight(adapter: &Adapter, at: Place, new_rows: Option<(usize, usize)>) -> Result<HostTensor> {
    let missing = || Error::new(format!("{}: {at} is missing", adapter.dir().display()));
    match at {
        Place::Embed | Place::Head => {
            let (first, rows) = new_rows.ok_or_else(missing)?;
            let whole = adapter.full(at)?.ok_or_else(missing)?;
            let (cols, end) = (whole.cols, (first + rows) * whole.cols);
            let data = whole.data.get(first * cols..end).ok_or_else(missing)?.to_vec();
            Ok(HostTensor { rows, cols, data })
        }
        Place::Layer(i, Part::LoraA(p)) => Ok(adapter.lora(i, p)?.ok_or_else(missing)?.0),
        Place::Layer(i, Part::LoraB(p)) => Ok(adapter.lora(i, p)?.ok_or_else(missing)?.1),
        Place::Layer(..) | Place::FinalNorm => Err(missing()),
    }
}

/// The one of `params` that stands at a place.
///
/// # Errors
/// If there is none.
pub fn find(params: &HostParams, at: Place) -> Result<&HostTensor> {
    let found = params.iter().find(|(place, _)| *place == at).map(|(_, t)| t);
    found.ok_or_else(|| not_trained(at))
}

/// The error of a weight that is not trained.
pub fn not_trained(at: Place) -> Error {
    Error::new(format!("{at} is not among the trained weights"))
}

/// Trained weights of a whole model as a source to be saved.
struct TrainedModel<'a> {
    config: &'a ModelConfig,
    trained: &'a Trained<'a>,
}

impl TensorSource for TrainedModel<'_> {
    fn config(&self) -> &ModelConfig {
        self.config
    }

    fn load(&self, at: Place) -> Result<HostTensor> {
        (self.trained)(at)
    }
}
