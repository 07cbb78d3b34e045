//! Between files and a device: loading weights into tensors, and tensors as a source to be saved.

use super::peft::Adapter;
use super::{HostTensor, InFile, Pieces, TensorSource};
use crate::backend::Backend;
use crate::error::Result;
use crate::model::Params;
use crate::model::config::ModelConfig;
use crate::model::weights::{Kind, Lora, Place, Weights};
use crate::tensor::{DType, Tensor};
use crate::{bail, ensure};

/// Loads every weight of `source` into tensors of `dtype` (f32 or bf16), one at a time.
///
/// # Errors
/// If a weight cannot be read or the device has not enough memory.
pub fn load_params<B: Backend>(dev: &B, source: &dyn TensorSource, dtype: DType) -> Result<Params<B>> {
    Weights::of(source.config()).try_map(|at, _| load_own(dev, source, at, dtype))
}

/// As [`load_params`]; weights of the type that are `frozen` stay in their files where the device works in the machine's memory.
///
/// # Errors
/// As [`load_params`].
pub fn load_params_where<B: Backend>(
    dev: &B,
    source: &dyn TensorSource,
    dtype: DType,
    frozen: impl Fn(Place) -> bool,
) -> Result<Params<B>> {
    Weights::of(source.config()).try_map(|at, _| {
        let there = if frozen(at) { source.in_file(at)? } else { None };
        let there = there.filter(|t| t.dtype == dtype);
        let adopted = there.and_then(|InFile { part, shape: (rows, cols), .. }| dev.adopt(part, rows, cols, dtype));
        adopted.map_or_else(|| load_own(dev, source, at, dtype), Ok)
    })
}

/// A weight in memory of its own.
fn load_own<B: Backend>(dev: &B, source: &dyn TensorSource, at: Place, dtype: DType) -> Result<Tensor<B>> {
    let Some(pieces) = source.pieces(at)? else { return upload(dev, &source.load(at)?, dtype) };
    let (rows, cols) = pieces.shape();
    let mut tensor = dev.alloc(rows, cols, dtype)?;
    upload_pieces(dev, &mut tensor, &*pieces)?;
    Ok(tensor)
}

/// As [`load_params`], in one piece of memory where the device has such: each weight in a room of so many elements, in the order of files.
///
/// # Errors
/// As [`load_params`], or if a weight has another shape than the model's.
///
/// # Panics
/// If there are more or fewer rooms than weights, or one is too small.
pub fn load_params_in<B: Backend>(
    dev: &B,
    source: &dyn TensorSource,
    dtype: DType,
    rooms: &[usize],
) -> Result<Params<B>> {
    let places = Weights::of(source.config());
    let shapes: Vec<_> = places.places().into_iter().map(|(at, _)| at.shape(source.config(), 0)).collect();
    let mut all = dev.alloc_together(&shapes, rooms, dtype)?.into_iter();
    places.try_map(|at, _| {
        let mut tensor = all.next().expect("one for each weight");
        let fits = |found: (usize, usize), t: &Tensor<B>| {
            ensure!(found == t.shape(), "{at}: expected shape {:?}, found {found:?}", t.shape());
            Ok(())
        };
        if let Some(pieces) = source.pieces(at)? {
            fits(pieces.shape(), &tensor)?;
            upload_pieces(dev, &mut tensor, &*pieces)?;
        } else {
            let host = source.load(at)?;
            fits((host.rows, host.cols), &tensor)?;
            dev.upload(&mut tensor, &host.data)?;
        }
        Ok(tensor)
    })
}

fn upload_pieces<B: Backend>(dev: &B, tensor: &mut Tensor<B>, pieces: &dyn Pieces) -> Result<()> {
    dev.upload_by(tensor, &|first, out| pieces.fill(first, out))?;
    pieces.finish()
}

/// A tensor with the values of a host tensor, rounded once where `dtype` is bf16.
///
/// # Errors
/// If the device has not enough memory or refuses the copy.
pub fn upload<B: Backend>(dev: &B, host: &HostTensor, dtype: DType) -> Result<Tensor<B>> {
    let mut tensor = dev.alloc(host.rows, host.cols, dtype)?;
    dev.upload(&mut tensor, &host.data)?;
    Ok(tensor)
}

/// A copy of a tensor in host memory, widened exactly.
///
/// # Errors
/// If the device refuses the copy.
pub fn download<B: Backend>(dev: &B, tensor: &Tensor<B>) -> Result<HostTensor> {
    let mut host = HostTensor::zeros(tensor.rows(), tensor.cols());
    dev.download(&mut host.data, tensor)?;
    Ok(host)
}

/// Gives the products their low-rank updates from an adapter, in f32. Grown embeddings are not touched here: load the parameters
/// from [`super::merge::Adapted`] for them.
///
/// # Errors
/// If a tensor cannot be read or the device has not enough memory.
pub fn load_adapter<B: Backend>(dev: &B, params: &mut Params<B>, adapter: &Adapter) -> Result<()> {
    for (i, layer) in params.layers.iter_mut().enumerate() {
        for linear in layer.products_mut() {
            if let Some((a, b)) = adapter.lora(i, linear.product)? {
                linear.lora = Some(Lora { a: upload(dev, &a, DType::F32)?, b: upload(dev, &b, DType::F32)? });
            }
        }
    }
    Ok(())
}

/// Gives the f32 master of a weight, where there is one.
type Master<'a, B> = dyn Fn(Place) -> Option<&'a Tensor<B>> + 'a;

/// A model on a device as a source to be saved. Where the optimiser holds an f32 master of a weight, `master` gives it, so that an
/// f32 file holds it exactly.
pub struct DeviceSource<'a, B: Backend> {
    dev: &'a B,
    config: &'a ModelConfig,
    params: Vec<(Place, &'a Tensor<B>)>,
    master: Box<Master<'a, B>>,
    first_row: usize,
}

impl<'a, B: Backend> DeviceSource<'a, B> {
    /// The parameters themselves.
    pub fn new(dev: &'a B, config: &'a ModelConfig, params: &'a Params<B>) -> Self {
        Self { dev, config, params: params.places(), master: Box::new(|_| None), first_row: 0 }
    }

    /// With masters: `master(at)` is the f32 tensor of the trained rows of a weight; those of the embedding and head begin at
    /// `first_row`.
    #[must_use]
    pub fn with_masters(mut self, first_row: usize, master: impl Fn(Place) -> Option<&'a Tensor<B>> + 'a) -> Self {
        self.master = Box::new(master);
        self.first_row = first_row;
        self
    }

    /// A weight or a part of a low-rank update.
    ///
    /// # Errors
    /// If the model has none there or the device refuses the copy.
    pub fn get(&self, at: Place) -> Result<HostTensor> {
        let Some((_, tensor)) = self.params.iter().find(|(place, _)| *place == at) else { bail!("no weight {at}") };
        let mut host = download(self.dev, tensor)?;
        if let Some(master) = (self.master)(at) {
            let first_row = if at.kind() == Kind::Vocabulary { self.first_row } else { 0 };
            let start = first_row * tensor.cols();
            self.dev.download(&mut host.data[start..start + master.len()], master)?;
        }
        Ok(host)
    }
}

impl<B: Backend> TensorSource for DeviceSource<'_, B> {
    fn config(&self) -> &ModelConfig {
        self.config
    }

    fn load(&self, at: Place) -> Result<HostTensor> {
        self.get(at)
    }
}
