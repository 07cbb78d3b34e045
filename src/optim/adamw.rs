//! AdamW with f32 moments and, under bf16 parameters, f32 master weights; clipping on the global norm.

use super::groups::GroupSettings;
use crate::backend::{AdamWSlot, AdamWStep, Backend};
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
    entries: Vec<Moments<B>>,
    /// Loss of the step that is under way, norm and clip factor of its gradient.
    stats: B::Stats,
}

struct Moments<B: Backend> {
    at: Place,
    m: Tensor<B>,
    v: Tensor<B>,
    /// f32 copy of the trained rows where the parameter is bf16.
    master: Option<Tensor<B>>,
}

/// Optimiser state on the host: moments and masters under `m.NAME`, `v.NAME`, `master.NAME`.
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
        let mut entries = Vec::new();
        let trained = trained(params, grads);
        let shapes: Vec<_> = trained.iter().map(|(_, _, grad)| grad.shape()).collect();
        let moments = || dev.alloc_together(&shapes, DType::F32, BLOCK);
        for (((at, param, grad), m), v) in trained.into_iter().zip(moments()?).zip(moments()?) {
            let rows = grad.rows();
            let first_row = settings.groups.first_row(at);
            assert!(first_row + rows <= param.rows(), "{at}: a gradient of {rows} rows from {first_row} on");
            let master = match param.dtype() {
                DType::F32 => None,
                _ => Some(copy_rows(dev, param, first_row, rows)?),
            };
            entries.push(Moments { at, m, v, master });
        }
        Ok(Self { settings, updates: 0, entries, stats: dev.new_stats()? })
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
        let each = |e: &Moments<B>| e.m.len() * (2 + usize::from(e.master.is_some())) * 4;
        self.entries.iter().map(each).sum()
    }

    /// Replaces the masters by exact f32 values, where a file holds more than bf16: `load` returns the whole tensor of
    /// a weight, or `None` to keep the rounded one.
    ///
    /// # Errors
    /// If `load` fails or the device refuses a copy.
    pub fn set_masters(&mut self, dev: &B, mut load: impl FnMut(Place) -> Result<Option<Vec<f32>>>) -> Result<()> {
        for e in &mut self.entries {
            let Some(master) = &mut e.master else { continue };
            let Some(all) = load(e.at)? else { continue };
            let start = self.settings.groups.first_row(e.at) * master.cols();
            let len = master.len();
            ensure!(all.len() >= start + len, "{}: {} values, expected {}", e.at, all.len(), start + len);
            dev.upload(master, &all[start..start + len])?;
        }
        Ok(())
    }

    /// The f32 master of a weight, where it has one; its height is that of the trained rows.
    pub fn master(&self, at: Place) -> Option<&Tensor<B>> {
        self.entries.iter().find(|e| e.at == at)?.master.as_ref()
    }

    /// As [`Optimizer::master`], to write to.
    pub fn master_mut(&mut self, at: Place) -> Option<&mut Tensor<B>> {
        self.entries.iter_mut().find(|e| e.at == at)?.master.as_mut()
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
    pub fn step(&mut self, dev: &B, params: &mut Params<B>, grads: &Grads<B>, lr: f64) -> Result<Verdict> {
        self.queue(dev, params, grads, lr)?;
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
        params: &mut Params<B>,
        grads: &Grads<B>,
        loss: &Tensor<B>,
        micro_batches: usize,
    ) -> Result<()> {
        (0..micro_batches).try_for_each(|_| self.add_loss(dev, loss))?;
        self.queue(dev, params, grads, 0.0)?;
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
    fn queue(&mut self, dev: &B, params: &mut Params<B>, grads: &Grads<B>, lr: f64) -> Result<()> {
        let trained = trained(params, grads);
        assert_eq!(trained.len(), self.entries.len(), "trained weights");
        let all: Vec<&Tensor<B>> = trained.iter().map(|(_, _, grad)| *grad).collect();
        dev.grad_norm2(&mut self.stats, &all)?;
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
            let Moments { m, v, master, .. } = e;
            let (first_row, decays, lr_scale) = (s.groups.first_row(at), s.groups.decays(at), s.groups.lr_scale(at));
            slots.push(AdamWSlot { p, master: master.as_mut(), m, v, g, first_row, decays, lr_scale });
        }
        dev.adamw_all(&self.stats, &mut slots, step)
    }

    /// The weights whose gradient is not finite.
    fn not_finite(&mut self, dev: &B, grads: &Grads<B>) -> Result<Vec<Place>> {
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

    /// Copies the state to the host.
    ///
    /// # Errors
    /// If the device refuses a copy.
    pub fn export(&self, dev: &B) -> Result<OptimizerState> {
        let mut tensors = Vec::new();
        for e in &self.entries {
            let parts = [("m", Some(&e.m)), ("v", Some(&e.v)), ("master", e.master.as_ref())];
            for (part, tensor) in parts.into_iter().filter_map(|(part, t)| Some((part, t?))) {
                let mut copy = HostTensor::zeros(tensor.rows(), tensor.cols());
                dev.download(&mut copy.data, tensor)?;
                tensors.push((format!("{part}.{}", e.at), copy));
            }
        }
        Ok(OptimizerState { updates: self.updates, tensors })
    }

    /// Restores what [`Optimizer::export`] gave. The parameters themselves come from the model or adapter files.
    ///
    /// # Errors
    /// If a tensor is missing, is of another shape, or is left over; then the run differs from the one that saved it.
    pub fn import(&mut self, dev: &B, state: &OptimizerState) -> Result<()> {
        let mut used = 0;
        for e in &mut self.entries {
            let parts = [("m", Some(&mut e.m)), ("v", Some(&mut e.v)), ("master", e.master.as_mut())];
            for (part, tensor) in parts.into_iter().filter_map(|(part, t)| Some((part, t?))) {
                let name = format!("{part}.{}", e.at);
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
            let known: Vec<String> = self.places().map(|at| at.to_string()).collect();
            let rest = state.tensors.iter().find(|(n, _)| !known.iter().any(|k| n.ends_with(k.as_str())));
            let name = rest.map_or("a master weight", |(n, _)| n.as_str());
            bail!("optimiser state: {name} is not trained in this run; the checkpoint is of a run with other settings");
        }
        self.updates = state.updates;
        Ok(())
    }
}

/// An f32 copy of `rows` rows of a weight.
fn copy_rows<B: Backend>(dev: &B, param: &Tensor<B>, first_row: usize, rows: usize) -> Result<Tensor<B>> {
    let cols = param.cols();
    let mut copy = dev.alloc(rows, cols, DType::F32)?;
    if param.rows() == rows {
        dev.copy(&mut copy, param)?;
    } else {
        let mut all = vec![0.0; param.len()];
        dev.download(&mut all, param)?;
        dev.upload(&mut copy, &all[first_row * cols..(first_row + rows) * cols])?;
    }
    Ok(copy)
}
