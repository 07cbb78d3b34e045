//! AdamW with f32 moments and, under bf16 parameters, f32 master weights; clipping on the global norm.

use super::groups::{GroupSettings, Slot, slots};
use crate::backend::{AdamWSlot, AdamWStep, Backend};
use crate::error::Result;
use crate::model::weights::Weights;
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
        /// Global norm of the gradient before clipping.
        grad_norm: f64,
    },
    /// The gradient is not finite; nothing was changed, the step does not count.
    NonFinite {
        /// The norm: NaN or infinite.
        grad_norm: f64,
        /// Tensors whose own gradient is not finite.
        tensors: Vec<String>,
    },
}

/// Optimiser state on the device: one entry for each trained tensor, in the order of [`slots`].
pub struct Optimizer<B: Backend> {
    settings: AdamWSettings,
    /// Updates made; the bias correction depends on it.
    updates: u64,
    entries: Vec<Moments<B>>,
}

struct Moments<B: Backend> {
    name: String,
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
    pub fn new(
        dev: &B,
        settings: AdamWSettings,
        params: &mut Weights<Tensor<B>>,
        grads: &Weights<Option<Tensor<B>>>,
    ) -> Result<Self> {
        let mut entries = Vec::new();
        for slot in slots(params, grads, settings.groups) {
            let (rows, cols) = slot.grad.shape();
            let master = match slot.param.dtype() {
                DType::F32 => None,
                _ => Some(copy_rows(dev, &slot)?),
            };
            entries.push(Moments {
                m: dev.alloc(rows, cols, DType::F32)?,
                v: dev.alloc(rows, cols, DType::F32)?,
                master,
                name: slot.name,
            });
        }
        Ok(Self { settings, updates: 0, entries })
    }

    /// Updates made so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Names of the trained tensors, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|e| e.name.as_str())
    }

    /// Bytes of moments and masters on the device.
    pub fn bytes(&self) -> usize {
        let each = |e: &Moments<B>| e.m.len() * (2 + usize::from(e.master.is_some())) * 4;
        self.entries.iter().map(each).sum()
    }

    /// Replaces the masters by exact f32 values, where a file holds more than bf16: `load` returns the whole tensor called
    /// `name`, or `None` to keep the rounded one.
    ///
    /// # Errors
    /// If `load` fails or the device refuses a copy.
    pub fn set_masters(&mut self, dev: &B, mut load: impl FnMut(&str) -> Result<Option<Vec<f32>>>) -> Result<()> {
        let first_row = self.settings.groups.new_rows.unwrap_or(0);
        for e in &mut self.entries {
            let Some(master) = &mut e.master else { continue };
            let Some(all) = load(&e.name)? else { continue };
            let partial = matches!(e.name.as_str(), "model.embed_tokens.weight" | "lm_head.weight");
            let start = if partial { first_row * master.cols() } else { 0 };
            let len = master.len();
            ensure!(all.len() >= start + len, "{}: {} values, expected {}", e.name, all.len(), start + len);
            dev.upload(master, &all[start..start + len])?;
        }
        Ok(())
    }

    /// The f32 master of a tensor, where it has one; its height is that of the trained rows.
    pub fn master(&self, name: &str) -> Option<&Tensor<B>> {
        self.entries.iter().find(|e| e.name == name)?.master.as_ref()
    }

    /// One update with learning rate `lr`: global norm, clipping by `min(1, max / (norm + 1e-6))`, AdamW. The gradients are the
    /// finished means over the step's targets.
    ///
    /// # Errors
    /// If the device refuses an operation.
    ///
    /// # Panics
    /// If the parameters or gradients are not those the state was made for.
    pub fn step(
        &mut self,
        dev: &B,
        params: &mut Weights<Tensor<B>>,
        grads: &Weights<Option<Tensor<B>>>,
        lr: f64,
    ) -> Result<Verdict> {
        let slots = slots(params, grads, self.settings.groups);
        assert_eq!(slots.len(), self.entries.len(), "trained tensors");
        let all: Vec<&Tensor<B>> = slots.iter().map(|s| s.grad).collect();
        let grad_norm = dev.norm2(&all)?.sqrt();
        if !grad_norm.is_finite() {
            let mut tensors = Vec::new();
            for s in &slots {
                if !dev.norm2(&[s.grad])?.is_finite() {
                    tensors.push(s.name.clone());
                }
            }
            return Ok(Verdict::NonFinite { grad_norm, tensors });
        }
        let clip = self.settings.max_grad_norm.map_or(1.0, |max| (max / (grad_norm + 1e-6)).min(1.0));
        self.updates += 1;
        let t = self.updates as f64;
        let s = &self.settings;
        let step = AdamWStep {
            lr: lr as f32,
            beta1: s.beta1 as f32,
            beta2: s.beta2 as f32,
            eps: s.eps as f32,
            weight_decay: s.weight_decay as f32,
            bias_correction1: (1.0 - s.beta1.powf(t)) as f32,
            bias_correction2: (1.0 - s.beta2.powf(t)) as f32,
            grad_scale: clip as f32,
        };
        for (slot, e) in slots.into_iter().zip(&mut self.entries) {
            assert_eq!(slot.name, e.name, "order of the trained tensors");
            let weight_decay = if slot.decays { step.weight_decay } else { 0.0 };
            let own = AdamWStep { lr: (lr * slot.lr_scale) as f32, weight_decay, ..step };
            let Slot { param: p, grad: g, first_row, .. } = slot;
            let (m, v) = (&mut e.m, &mut e.v);
            dev.adamw(AdamWSlot { p, master: e.master.as_mut(), m, v, g, first_row }, own)?;
        }
        Ok(Verdict::Updated { grad_norm })
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
                tensors.push((format!("{part}.{}", e.name), copy));
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
                let name = format!("{part}.{}", e.name);
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
            let known: Vec<&str> = self.entries.iter().map(|e| e.name.as_str()).collect();
            let rest = state.tensors.iter().find(|(n, _)| !known.iter().any(|k| n.ends_with(k)));
            let name = rest.map_or("a master weight", |(n, _)| n.as_str());
            bail!("optimiser state: {name} is not trained in this run; the checkpoint is of a run with other settings");
        }
        self.updates = state.updates;
        Ok(())
    }
}

/// An f32 copy of the rows that a slot trains.
fn copy_rows<B: Backend>(dev: &B, slot: &Slot<B>) -> Result<Tensor<B>> {
    let (rows, cols) = slot.grad.shape();
    let mut copy = dev.alloc(rows, cols, DType::F32)?;
    if slot.param.shape() == (rows, cols) {
        dev.copy(&mut copy, slot.param)?;
    } else {
        let mut all = vec![0.0; slot.param.len()];
        dev.download(&mut all, slot.param)?;
        dev.upload(&mut copy, &all[slot.first_row * cols..(slot.first_row + rows) * cols])?;
    }
    Ok(copy)
}
