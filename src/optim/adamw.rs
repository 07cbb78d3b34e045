//! AdamW with f32 moments and, under bf16 parameters, f32 master weights; clipping on the global norm.

use std::ops::Range;

use super::groups::GroupSettings;
use super::shares::Shares;
use crate::backend::{AdamWSlot, AdamWStep, Backend};
use crate::comm::Communicator;
use crate::error::Result;
use crate::model::weights::Place;
use crate::model::{BLOCK, Grads, Params, trained};
use crate::tensor::{DType, HostTensor, Tensor};
use crate::{bail, ensure};

/// Constants of the optimiser.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWSettings {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the corrected root.
    pub eps: f64,
    /// Decoupled decay of matrices.
    pub weight_decay: f64,
    /// Largest global norm of the gradient; `None`: no clipping.
    pub max_grad_norm: Option<f64>,
    /// Which tensors are trained, and how.
    pub groups: GroupSettings,
}

impl Default for AdamWSettings {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: Some(1.0),
            groups: GroupSettings::default(),
        }
    }
}

/// What became of a step.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// The parameters were updated.
    Updated {
        /// Summed negative log-likelihood of each micro-batch with targets, in their order.
        nll: Vec<f64>,
        /// Global norm of the gradient before clipping.
        grad_norm: f64,
    },
    /// The loss or the gradient is not finite; nothing was changed, the step does not count.
    NonFinite {
        /// Summed negative log-likelihood of each micro-batch with targets, in their order.
        nll: Vec<f64>,
        /// The norm: NaN or infinite.
        grad_norm: f64,
        /// Weights whose own gradient is not finite, where the loss is.
        tensors: Vec<Place>,
    },
}

/// Optimiser state on the device: one entry for each trained weight, in the order of files.
pub struct Optimizer<B: Backend> {
    settings: AdamWSettings,
    /// Updates made; the bias correction depends on it.
    updates: u64,
    entries: Vec<Entry<B>>,
    /// What other ranks hold; `None` where every rank holds all.
    shares: Option<Shares>,
    /// Whether the state has masters: the parameters are bf16.
    has_masters: bool,
    /// Loss of the step that is under way, norm and clip factor of its gradient.
    stats: B::Stats,
}

/// A trained weight.
struct Entry<B: Backend> {
    at: Place,
    /// Shape of its gradient.
    shape: (usize, usize),
    /// Elements of the gradient whose state is held here.
    range: Range<usize>,
    /// `None` where that is none.
    held: Option<Held<B>>,
}

/// State of the elements of a weight: in its shape where they are all, else in one row.
struct Held<B: Backend> {
    m: Tensor<B>,
    v: Tensor<B>,
    /// f32 copy of the weight's elements where the parameter is bf16.
    master: Option<Tensor<B>>,
}

impl<B: Backend> Entry<B> {
    fn is_whole(&self) -> bool {
        self.range.len() == self.shape.0 * self.shape.1
    }
}

/// A tensor of an optimiser's state, or what a rank holds of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatePart {
    /// `m.NAME`, `v.NAME` or `master.NAME`.
    pub name: String,
    /// Shape of the whole tensor.
    pub shape: (usize, usize),
    /// Elements that this rank holds.
    pub range: Range<usize>,
}

impl StatePart {
    /// Its name in a file: with its first element where it is a part.
    pub fn file_name(&self) -> String {
        match self.range.len() == self.shape.0 * self.shape.1 {
            true => self.name.clone(),
            false => format!("{}@{}", self.name, self.range.start),
        }
    }
}

/// Optimiser state on the host: moments and masters under `m.NAME`, `v.NAME`, `master.NAME`, each with `@FIRST` where it is a part from
/// that element on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OptimizerState {
    /// Updates made.
    pub updates: u64,
    /// Each tensor with its name.
    pub tensors: Vec<(String, HostTensor)>,
}

impl<B: Backend> Optimizer<B> {
    /// State of zeros for every parameter that has a gradient; masters are copies of the bf16 parameters.
    ///
    /// # Errors
    /// If the device has not enough memory or refuses a copy.
    pub fn new(dev: &B, settings: AdamWSettings, params: &mut Params<B>, grads: &Grads<B>) -> Result<Self> {
        Self::sharded(dev, settings, params, grads, None)
    }

    /// As [`Optimizer::new`], of the elements that are this rank's by `shares`.
    ///
    /// # Errors
    /// As [`Optimizer::new`].
    pub fn sharded(
        dev: &B,
        settings: AdamWSettings,
        params: &mut Params<B>,
        grads: &Grads<B>,
        shares: Option<Shares>,
    ) -> Result<Self> {
        let mut entries: Vec<Entry<B>> = Vec::new();
        let trained = trained(params, grads);
        let has_masters = trained.iter().any(|(_, param, _)| param.dtype() != DType::F32);
        for (i, (at, _, grad)) in trained.iter().enumerate() {
            let range = shares.as_ref().map_or(0..grad.len(), |shares| shares.own(i));
            entries.push(Entry { at: *at, shape: grad.shape(), range, held: None });
        }
        let own = |e: &Entry<B>| if e.is_whole() { e.shape } else { (1, e.range.len()) };
        let shapes: Vec<_> = entries.iter().filter(|e| !e.range.is_empty()).map(own).collect();
        let rooms: Vec<usize> = shapes.iter().map(|(rows, cols)| (rows * cols).next_multiple_of(BLOCK)).collect();
        let together = |shapes: &[(usize, usize)]| -> Result<std::vec::IntoIter<Tensor<B>>> {
            Ok(dev.alloc_together(shapes, &rooms[..shapes.len()], DType::F32)?.into_iter())
        };
        let (mut ms, mut vs) = (together(&shapes)?, together(&shapes)?);
        let mut masters = together(if has_masters { &shapes } else { &[] })?;
        for ((at, param, grad), e) in trained.into_iter().zip(&mut entries) {
            let rows = grad.rows();
            let first_row = settings.groups.first_row(at);
            assert!(first_row + rows <= param.rows(), "{at}: a gradient of {rows} rows from {first_row} on");
            if e.range.is_empty() {
                continue;
            }
            let first = first_row * param.cols() + e.range.start;
            let (m, v) = ms.next().zip(vs.next()).expect("one of each for every range");
            let mut master = masters.next();
            if let Some(master) = &mut master {
                copy_elements(dev, master, param, first)?;
            }
            e.held = Some(Held { m, v, master });
        }
        Ok(Self { settings, updates: 0, entries, shares, has_masters, stats: dev.new_stats()? })
    }

    /// Whether other ranks hold a part of the state.
    pub fn is_sharded(&self) -> bool {
        self.shares.is_some()
    }

    /// Updates made so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// The trained weights, in order.
    pub fn places(&self) -> impl Iterator<Item = Place> {
        self.entries.iter().map(|e| e.at)
    }

    /// Bytes of moments and masters on the device.
    pub fn bytes(&self) -> usize {
        let each = |held: &Held<B>| held.m.len() * (2 + usize::from(held.master.is_some())) * 4;
        self.entries.iter().filter_map(|e| e.held.as_ref()).map(each).sum()
    }

    /// Replaces the masters by exact f32 values, where a file holds more than bf16: `load` returns the whole tensor of
    /// a weight, or `None` to keep the rounded one.
    ///
    /// # Errors
    /// If `load` fails or the device refuses a copy.
    pub fn set_masters(&mut self, dev: &B, mut load: impl FnMut(Place) -> Result<Option<Vec<f32>>>) -> Result<()> {
        for e in &mut self.entries {
            let Some(master) = e.held.as_mut().and_then(|held| held.master.as_mut()) else { continue };
            let Some(all) = load(e.at)? else { continue };
            let start = self.settings.groups.first_row(e.at) * e.shape.1;
            let end = start + e.shape.0 * e.shape.1;
            ensure!(all.len() >= end, "{}: {} values, expected {end}", e.at, all.len());
            dev.upload(master, &all[start + e.range.start..start + e.range.end])?;
        }
        Ok(())
    }

    /// The f32 master of a weight, where it has one that is held here whole; its height is that of the trained rows.
    pub fn master(&self, at: Place) -> Option<&Tensor<B>> {
        let e = self.entries.iter().find(|e| e.at == at)?;
        e.held.as_ref().filter(|_| e.is_whole())?.master.as_ref()
    }

    /// Copies what this rank holds of the masters to the host, by weight: nothing where weights are their own masters.
    ///
    /// # Errors
    /// If the device refuses a copy.
    pub fn masters(&self, dev: &B) -> Result<Vec<Vec<f32>>> {
        let of = |e: &Entry<B>| {
            let Some(master) = e.held.as_ref().and_then(|held| held.master.as_ref()) else { return Ok(Vec::new()) };
            let mut values = vec![0.0; master.len()];
            dev.download(&mut values, master)?;
            Ok(values)
        };
        self.entries.iter().map(of).collect()
    }

    /// Sets what this rank holds of a weight's master from the values of its trained rows.
    ///
    /// # Errors
    /// If the device refuses the copy.
    pub fn set_master(&mut self, dev: &B, at: Place, values: &[f32]) -> Result<()> {
        let Some(e) = self.entries.iter_mut().find(|e| e.at == at) else { return Ok(()) };
        match e.held.as_mut().and_then(|held| held.master.as_mut()) {
            Some(master) => dev.upload(master, &values[e.range.clone()]),
            None => Ok(()),
        }
    }

    /// Adds the losses of a micro-batch of the step that is under way.
    ///
    /// # Errors
    /// If the device refuses an operation.
    pub fn add_loss(&mut self, dev: &B, loss: &Tensor<B>) -> Result<()> {
        dev.add_loss(&mut self.stats, loss, None)
    }

    /// One update with learning rate `lr`: global norm, clipping by `min(1, max / (norm + 1e-6))`, AdamW. The gradients are the
    /// finished means over the step's targets. Loss, norm and factor stay on the device, which makes no update where they are not
    /// finite; the host waits once, for the figures.
    ///
    /// # Errors
    /// If the device refuses an operation.
    ///
    /// # Panics
    /// If the parameters or gradients are not those the state was made for.
    pub fn step(
        &mut self,
        dev: &B,
        comm: &dyn Communicator<B>,
        params: &mut Params<B>,
        grads: &Grads<B>,
        lr: f64,
    ) -> Result<Verdict> {
        self.queue(dev, comm, params, grads, lr)?;
        let figures = dev.figures(&self.stats)?;
        dev.begin_step(&mut self.stats)?;
        let (finite, grad_norm) = (figures.finite(), figures.grad_norm2.sqrt());
        let nll = figures.nll;
        if finite {
            self.updates += 1;
            return Ok(Verdict::Updated { nll, grad_norm });
        }
        let loss_is_finite = nll.iter().all(|nll| nll.is_finite());
        let tensors = if loss_is_finite { self.not_finite(dev, grads)? } else { Vec::new() };
        Ok(Verdict::NonFinite { nll, grad_norm, tensors })
    }

    /// What a step of so many micro-batches asks of the device, in [`Backend::prepare`]; `loss` is that of one of them.
    ///
    /// # Errors
    /// If the device has not enough memory.
    pub fn rehearse(
        &mut self,
        dev: &B,
        comm: &dyn Communicator<B>,
        params: &mut Params<B>,
        grads: &Grads<B>,
        loss: &Tensor<B>,
        micro_batches: usize,
    ) -> Result<()> {
        (0..micro_batches).try_for_each(|_| self.add_loss(dev, loss))?;
        self.queue(dev, comm, params, grads, 0.0)?;
        self.forget_step(dev)
    }

    /// Begins a step anew.
    ///
    /// # Errors
    /// If the device refuses an operation.
    pub fn forget_step(&mut self, dev: &B) -> Result<()> {
        dev.begin_step(&mut self.stats)
    }

    /// Queues norm, clip factor and update.
    fn queue(
        &mut self,
        dev: &B,
        comm: &dyn Communicator<B>,
        params: &mut Params<B>,
        grads: &Grads<B>,
        lr: f64,
    ) -> Result<()> {
        let trained = trained(params, grads);
        assert_eq!(trained.len(), self.entries.len(), "trained weights");
        let all: Vec<&Tensor<B>> = trained.iter().map(|(_, _, grad)| *grad).collect();
        match &self.shares {
            None => dev.grad_norm2(&mut self.stats, &all)?,
            Some(shares) => {
                let own: Vec<_> = all.iter().zip(&self.entries).map(|(g, e)| (*g, e.range.clone())).collect();
                comm.add_norm2(dev, &mut self.stats, &own, &shares.blocks())?;
            }
        }
        dev.set_clip(&mut self.stats, self.settings.max_grad_norm)?;
        let s = &self.settings;
        let t = (self.updates + 1) as f64;
        let step = AdamWStep {
            lr,
            beta1: s.beta1 as f32,
            beta2: s.beta2 as f32,
            one_minus_beta1: (1.0 - s.beta1) as f32,
            one_minus_beta2: (1.0 - s.beta2) as f32,
            eps: s.eps as f32,
            weight_decay: s.weight_decay as f32,
            bias_correction1: (1.0 - s.beta1.powf(t)) as f32,
            bias_correction2: (1.0 - s.beta2.powf(t)) as f32,
        };
        let mut slots = Vec::with_capacity(self.entries.len());
        for ((at, p, g), e) in trained.into_iter().zip(&mut self.entries) {
            assert_eq!(at, e.at, "order of the trained weights");
            let Some(Held { m, v, master }) = &mut e.held else { continue };
            let (first_row, decays, lr_scale) = (s.groups.first_row(at), s.groups.decays(at), s.groups.lr_scale(at));
            let range = e.range.clone();
            slots.push(AdamWSlot { p, master: master.as_mut(), m, v, g, first_row, range, decays, lr_scale });
        }
        dev.adamw_all(&self.stats, &mut slots, step)
    }

    /// The weights whose gradient is not finite.
    ///
    /// # Errors
    /// If the device refuses an operation.
    pub fn not_finite(&mut self, dev: &B, grads: &Grads<B>) -> Result<Vec<Place>> {
        let mut found = Vec::new();
        for (at, grad) in grads.places() {
            let Some(grad) = grad else { continue };
            dev.grad_norm2(&mut self.stats, &[grad])?;
            if !dev.figures(&self.stats)?.finite() {
                found.push(at);
            }
            dev.begin_step(&mut self.stats)?;
        }
        Ok(found)
    }

    /// Every tensor of the state, with what this rank holds of it, in the order in which [`Optimizer::export`] gives them.
    pub fn parts(&self) -> Vec<StatePart> {
        let kinds = ["m", "v", "master"].into_iter().take(if self.has_masters { 3 } else { 2 });
        let part = |e: &Entry<B>, kind: &str| StatePart {
            name: format!("{kind}.{}", e.at),
            shape: e.shape,
            range: e.range.clone(),
        };
        self.entries.iter().flat_map(|e| kinds.clone().map(move |kind| part(e, kind))).collect()
    }

    /// Copies what this rank holds of the state to the host.
    ///
    /// # Errors
    /// If the device refuses a copy.
    pub fn export(&self, dev: &B) -> Result<OptimizerState> {
        let copy = |(name, tensor): (String, &Tensor<B>)| {
            let mut copy = HostTensor::zeros(tensor.rows(), tensor.cols());
            dev.download(&mut copy.data, tensor)?;
            Ok((name, copy))
        };
        let tensors = self.held().into_iter().map(copy).collect::<Result<_>>()?;
        Ok(OptimizerState { updates: self.updates, tensors })
    }

    /// What this rank holds of the state, under the names of [`OptimizerState::tensors`].
    pub fn held(&self) -> Vec<(String, &Tensor<B>)> {
        let all = self.parts().into_iter().zip(self.tensors());
        all.filter_map(|(part, tensor)| Some((part.file_name(), tensor?))).collect()
    }

    /// Whether the weights are bf16 and have f32 masters in the state.
    pub fn has_masters(&self) -> bool {
        self.has_masters
    }

    /// The tensors of [`Optimizer::parts`]; `None` where this rank holds nothing of one.
    fn tensors(&self) -> Vec<Option<&Tensor<B>>> {
        let mut all = Vec::new();
        for held in self.entries.iter().map(|e| e.held.as_ref()) {
            all.extend([held.map(|h| &h.m), held.map(|h| &h.v)]);
            if self.has_masters {
                all.push(held.and_then(|h| h.master.as_ref()));
            }
        }
        all
    }

    /// Restores what [`Optimizer::export`] gave. The parameters themselves come from the model or adapter files.
    ///
    /// # Errors
    /// If a tensor is missing, is of another shape, or is left over; then the run differs from the one that saved it.
    pub fn import(&mut self, dev: &B, state: &OptimizerState) -> Result<()> {
        let mut used = 0;
        for e in &mut self.entries {
            let (shape, range) = (e.shape, e.range.clone());
            let Some(held) = &mut e.held else { continue };
            let kinds = [("m", Some(&mut held.m)), ("v", Some(&mut held.v)), ("master", held.master.as_mut())];
            for (kind, tensor) in kinds.into_iter().filter_map(|(kind, t)| Some((kind, t?))) {
                let name = StatePart { name: format!("{kind}.{}", e.at), shape, range: range.clone() }.file_name();
                let Some((_, found)) = state.tensors.iter().find(|(n, _)| *n == name) else {
                    bail!("optimiser state: {name} is missing; the checkpoint is of a run with other settings");
                };
                let (want, got) = (tensor.shape(), (found.rows, found.cols));
                ensure!(want == got, "optimiser state: {name}: expected shape {want:?}, found {got:?}");
                dev.upload(tensor, &found.data)?;
                used += 1;
            }
        }
        if used != state.tensors.len() {
            let known: Vec<String> = self.parts().iter().map(StatePart::file_name).collect();
            let rest = state.tensors.iter().find(|(name, _)| !known.contains(name));
            let name = rest.map_or("a master weight", |(n, _)| n.as_str());
            bail!("optimiser state: {name} is not trained in this run; the checkpoint is of a run with other settings");
        }
        self.updates = state.updates;
        Ok(())
    }
}

/// Copies the elements of a weight from `first` on to its master, as many as that has.
fn copy_elements<B: Backend>(dev: &B, master: &mut Tensor<B>, param: &Tensor<B>, first: usize) -> Result<()> {
    if param.shape() == master.shape() {
        return dev.copy(master, param);
    }
    let mut values = vec![0.0; master.len()];
    dev.download_at(&mut values, param, first)?;
    dev.upload(master, &values)
}
