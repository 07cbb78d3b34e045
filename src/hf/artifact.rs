//! What a run produces, in files other tools load: a PEFT adapter or a Hugging Face model, with the tokenizer beside it.

use std::path::Path;

use crate::error::{Error, Result};
use crate::hf::names::{EMBED, LM_HEAD};
use crate::hf::peft::{Adapter, AdapterConfig, save_adapter};
use crate::hf::resize::{Resize, Resized};
use crate::hf::safetensors::ModelFiles;
use crate::hf::save::{SaveOptions, save_model};
use crate::hf::{HostTensor, SaveDType, TensorSource};
use crate::model::config::ModelConfig;

/// Trained weights on the host, by their names in Hugging Face files.
pub type HostParams = Vec<(String, HostTensor)>;

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
    pub fn write(&self, dir: &Path, params: &HostParams) -> Result<()> {
        match self {
            Artifact::Model { config, dtype } => {
                save_model(dir, &HostModel { config, params }, SaveOptions { dtype: *dtype, ..Default::default() })
            }
            Artifact::Adapter { config, base, resize, new_rows, .. } => {
                let resized = Resized::new(&**base, resize.clone())?;
                save_adapter(dir, config, resized.config(), new_rows.is_some(), |name| match new_rows {
                    // The file holds the whole embedding; training has the new rows of it.
                    Some((first, _)) if matches!(name, EMBED | LM_HEAD) => {
                        let mut whole = resized.load(name)?;
                        let rows = find(params, name)?;
                        whole.data[first * rows.cols..][..rows.data.len()].copy_from_slice(&rows.data);
                        Ok(whole)
                    }
                    _ => find(params, name).cloned(),
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
        save_model(dir, &Reconfigured { source: &resized, config: model.clone() }, options)
    }

    /// Reads back the weights called `names` exactly as they were in training.
    ///
    /// # Errors
    /// If a file is damaged or a weight is missing.
    pub fn read(&self, dir: &Path, names: &[String]) -> Result<HostParams> {
        match self {
            Artifact::Model { .. } => {
                let files = ModelFiles::open(dir)?;
                names.iter().map(|n| Ok((n.clone(), files.load(n)?))).collect()
            }
            Artifact::Adapter { new_rows, .. } => {
                let adapter = Adapter::open(dir)?;
                names.iter().map(|n| Ok((n.clone(), adapter_weight(&adapter, n, *new_rows)?))).collect()
            }
        }
    }
}

/// A trained tensor of an adapter by its name in training.
fn adapter_weight(adapter: &Adapter, name: &str, new_rows: Option<(usize, usize)>) -> Result<HostTensor> {
    let missing = || Error::new(format!("{}: {name} is missing", adapter.dir().display()));
    if matches!(name, EMBED | LM_HEAD) {
        let (first, rows) = new_rows.ok_or_else(missing)?;
        let whole = adapter.full(name)?.ok_or_else(missing)?;
        let (cols, end) = (whole.cols, (first + rows) * whole.cols);
        let data = whole.data.get(first * cols..end).ok_or_else(missing)?.to_vec();
        return Ok(HostTensor { rows, cols, data });
    }
    // model.layers.{i}.{block}.{product}.lora_{A|B}.weight
    let parts: Vec<&str> = name.split('.').collect();
    let [_, _, layer, _, product, part, _] = parts[..] else {
        return Err(missing());
    };
    let layer = layer.parse().map_err(|_| missing())?;
    let (a, b) = adapter.lora(layer, product)?.ok_or_else(missing)?;
    Ok(if part == "lora_A" { a } else { b })
}

fn find<'a>(params: &'a HostParams, name: &str) -> Result<&'a HostTensor> {
    let found = params.iter().find(|(n, _)| n == name).map(|(_, t)| t);
    found.ok_or_else(|| Error::new(format!("{name} is not among the trained weights")))
}

/// Trained weights of a whole model as a source to be saved.
struct HostModel<'a> {
    config: &'a ModelConfig,
    params: &'a HostParams,
}

impl TensorSource for HostModel<'_> {
    fn config(&self) -> &ModelConfig {
        self.config
    }

    fn load(&self, name: &str) -> Result<HostTensor> {
        find(self.params, name).cloned()
    }
}

/// A model under a configuration that differs from its own in token ids alone.
pub struct Reconfigured<'a> {
    /// The weights.
    pub source: &'a dyn TensorSource,
    /// The configuration.
    pub config: ModelConfig,
}

impl TensorSource for Reconfigured<'_> {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn load(&self, name: &str) -> Result<HostTensor> {
        self.source.load(name)
    }
}
