//! One optimiser step: count the targets, accumulate gradients, clip, update; or say why the update was left out.
//!
//! ```text
//! N      = supervised targets of all micro-batches of all ranks        known before the first backward
//! grads  = sum over micro-batches and ranks of d(summed nll) / N
//! update = AdamW(grads · min(1, clip / |grads|))                       unless N = 0 or something is not finite
//! ```

use std::cell::Cell;
use std::time::Instant;

use super::buckets::Buckets;
use super::gathering::{Gathering, Way};
use crate::backend::Backend;
use crate::batch::MicroBatch;
use crate::comm::{Communicator, Fold, Phase, Position, Sums, fold, joined};
use crate::data::loader::{Step, dealt};
use crate::ensure;
use crate::error::{Error, Result};
use crate::hf::HostTensor;
use crate::hf::artifact::{HostParams, not_trained};
use crate::hf::device::download;
use crate::log::trace::Trace;
use crate::model::flops::FlopCount;
use crate::model::weights::Place;
use crate::model::{self, Acts, Grads, Model, Params, Ready, trained};
use crate::optim::{Optimizer, Verdict};
use crate::rng;
use crate::tensor::DType;

/// A model in training: weights, gradients, activations, optimiser.
pub struct Workload<B: Backend> {
    /// The model; with LoRA the adapter is among its weights.
    pub model: Model<B>,
    /// Bytes that weights take beyond their own in the form that products read.
    pub packed: u64,
    /// Gradients of what is trained.
    pub grads: Grads<B>,
    /// Activations of one micro-batch.
    pub acts: Acts<B>,
    /// Moments and masters.
    pub optimizer: Optimizer<B>,
    /// Sums of a micro-batch that is evaluated.
    pub stats: B::Stats,
    /// Arithmetic of a micro-batch.
    pub flops: FlopCount,
    /// Seed of the run, for dropout.
    pub seed: u64,
    /// Where the phases of a step are written down.
    pub trace: Trace,
    /// With ZeRO-1, weights that other ranks updated in the step before and that are still on their way.
    pub gathering: Gathering,
}

/// A bug of the caller's.
const ON_THEIR_WAY: &str = "weights are read or written while some are on their way: settle() comes first";

/// What one step did, over all ranks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stepped {
    /// Mean negative log-likelihood over the step's targets; NaN without any.
    pub loss: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Tokens processed.
    pub tokens: u64,
    /// Supervised targets.
    pub supervised: u64,
    /// Floating-point operations.
    pub flops: f64,
    /// Why there was no update.
    pub problem: Option<Problem>,
}

/// Why a step made no update.
#[derive(Clone, Debug, PartialEq)]
pub enum Problem {
    /// No target in the whole step.
    NoTarget,
    /// The loss of these samples is not finite.
    Loss {
        /// Indices into the data set.
        samples: Vec<u32>,
    },
    /// The loss is finite, the gradient of these tensors is not.
    Gradient {
        /// The weights.
        tensors: Vec<Place>,
        /// Samples of the micro-batches whose own gradient is not finite; all of the step where it is their sum alone.
        samples: Vec<u32>,
        /// The ranks that had them, of several.
        ranks: Vec<usize>,
    },
}

impl Problem {
    /// A word for machines and a sentence for people.
    pub fn describe(&self, stepped: &Stepped) -> (&'static str, String) {
        match self {
            Problem::NoTarget => ("no_target", "no supervised target in any of its micro-batches".into()),
            Problem::Loss { .. } => ("loss", format!("loss is {}", stepped.loss)),
            Problem::Gradient { tensors, ranks, .. } => {
                let ranks = match &ranks[..] {
                    [] => String::new(),
                    [one] => format!(", on rank {one}"),
                    all => format!(", on ranks {}", all.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")),
                };
                let first = tensors.first().map_or(String::new(), Place::to_string);
                let norm = stepped.grad_norm;
                (
                    "gradient",
                    format!("gradient norm is {norm}, not finite in {} tensors from {first} on{ranks}", tensors.len()),
                )
            }
        }
    }

    /// Samples to look at.
    pub fn samples(&self) -> &[u32] {
        match self {
            Problem::NoTarget => &[],
            Problem::Loss { samples } | Problem::Gradient { samples, .. } => samples,
        }
    }
}

impl<B: Backend> Workload<B> {
    /// Runs the step with number `step` (from 0) at learning rate `lr`.
    ///
    /// # Errors
    /// If the device or a peer fails.
    pub fn step(&mut self, dev: &B, comm: &dyn Communicator<B>, batch: &Step, step: u64, lr: f64) -> Result<Stepped> {
        let stepped = self.step_ahead(dev, comm, batch, step, lr)?;
        self.settle(dev, comm)?;
        Ok(stepped)
    }

    /// As [`Workload::step`], but weights that other ranks updated may still be on their way when it returns: the next step waits for them
    /// layer by layer, everything else asks for [`Workload::settle`] first.
    ///
    /// # Errors
    /// If the device or a peer fails.
    pub fn step_ahead(
        &mut self,
        dev: &B,
        comm: &dyn Communicator<B>,
        batch: &Step,
        step: u64,
        lr: f64,
    ) -> Result<Stepped> {
        let stood = Cell::new(Position::default());
        self.step_from(dev, comm, batch, (step, lr), &stood).map_err(|e| e.stood(&stood.get()))
    }

    /// [`Workload::step_ahead`], which leaves in `stood` where the host has come.
    fn step_from(
        &mut self,
        dev: &B,
        comm: &dyn Communicator<B>,
        batch: &Step,
        (step, lr): (u64, f64),
        stood: &Cell<Position>,
    ) -> Result<Stepped> {
        let n = batch.micro_batches.len() * comm.world_size();
        let numbered = || dealt(comm.rank(), comm.world_size()).zip(&batch.micro_batches);
        let counts = numbered().map(|(k, b)| (k, [b.n_valid as f64, b.tokens.len() as f64, self.flops.step(b)]));
        let [supervised, tokens, flops] = fold(comm, n, counts)?;
        let mut stepped = Stepped {
            loss: f64::NAN,
            grad_norm: f64::NAN,
            tokens: tokens as u64,
            supervised: supervised as u64,
            flops,
            problem: None,
        };
        if supervised == 0.0 {
            stepped.problem = Some(Problem::NoTarget);
            return Ok(stepped);
        }
        let Self { model, grads, acts, optimizer, trace, gathering, .. } = self;
        let new_rows = model.new_rows.clone();
        let at = |phase, layer| {
            let position = Position { step: step + 1, phase, layer };
            stood.set(position);
            comm.at(position);
        };
        let buckets = Buckets::of(comm, grads);
        let way = Way { dev, comm, buckets: &buckets, new_rows: new_rows.as_ref() };
        model::zero_grads(dev, grads)?;
        let n_layers = model.params.layers.len();
        let last = batch.micro_batches.len() - 1;
        for (i, (k, b)) in numbered().enumerate() {
            // What is final is reduced while the layers below are still computed.
            let reduces = comm.fold() == Fold::MicroBatch || i == last;
            let mut reduce = |ready: Ready, grads: &mut Grads<B>| {
                let below = ready.number(n_layers);
                at(Phase::Backward, n_layers.checked_sub(below + 1).map(|layer| layer as u16));
                match buckets.completed_by(ready).filter(|_| reduces) {
                    Some(bucket) => buckets.start(dev, comm, grads, bucket),
                    None => Ok(()),
                }
            };
            // A micro-batch without targets has no gradient, but every rank takes part in every reduction, in the same order.
            if b.n_valid == 0 {
                // Reductions come after the weights, on every rank.
                at(Phase::Gather, None);
                gathering.wait(&way, &mut model.params, grads, None)?;
                if reduces {
                    buckets.skip(dev, comm, grads)?;
                }
                continue;
            }
            at(Phase::Forward, None);
            let scale = (1.0 / supervised) as f32 * comm.gain();
            acts.load_at(dev, i, b)?;
            // The number of a micro-batch names the same rows whatever the number of ranks.
            acts.set_dropout_key(rng::mix(&[self.seed, step, k as u64]));
            {
                let _span = trace.span("forward");
                let mut need = |part: Ready, params: &mut Params<B>| {
                    let layer = part.layer().map(|layer| layer as u16);
                    if !gathering.is_done() {
                        at(Phase::Gather, layer);
                        let begun = Instant::now();
                        gathering.wait(&way, params, grads, Some(part))?;
                        trace.record("weights", 0, (begun, Instant::now()), Some(buckets.bucket_with(part)));
                    }
                    at(Phase::Forward, layer);
                    Ok(())
                };
                model::forward_with(dev, model, acts, &mut need)?;
            }
            at(Phase::Backward, None);
            let _span = trace.span("backward");
            model::backward(dev, model, grads, acts, scale, &mut reduce)?;
            optimizer.add_loss(dev, acts.loss_tensor())?;
        }
        {
            let _span = trace.span("reduce");
            at(Phase::Reduce, None);
            let wanted = if optimizer.is_sharded() { Sums::Owned } else { Sums::Whole };
            buckets.finish(dev, comm, grads, wanted)?;
        }
        at(Phase::Update, None);
        let update = trace.span("update");
        // The one wait of the step. A loss that is not finite on one rank is in the gradients of all of them.
        let verdict = optimizer.step(dev, comm, &mut model.params, grads, lr)?;
        if optimizer.is_sharded() {
            gathering.start(&way, &mut model.params, grads)?;
        }
        drop(update);
        if matches!(verdict, Verdict::NonFinite { .. }) {
            self.settle(dev, comm)?;
        }
        let (Verdict::Updated { nll, grad_norm } | Verdict::NonFinite { nll, grad_norm, .. }) = &verdict;
        let with_targets = numbered().filter(|(_, b)| b.n_valid > 0);
        let [sum] = fold(comm, n, with_targets.zip(nll).map(|((k, _), nll)| (k, [*nll])))?;
        stepped.loss = sum / supervised;
        if !stepped.loss.is_finite() {
            let own = self.suspects(dev, batch)?;
            let samples =
                joined(comm, own.into_iter().map(|(i, samples)| (i * comm.world_size() + comm.rank(), samples)))?;
            stepped.problem = Some(Problem::Loss { samples });
            return Ok(stepped);
        }
        stepped.grad_norm = *grad_norm;
        if let Verdict::NonFinite { mut tensors, .. } = verdict {
            let bad = self.replay(dev, comm, batch, step, (1.0 / supervised) as f32)?;
            let places: Vec<Place> = self.optimizer.places().collect();
            // Sums that overflow have no micro-batch of their own.
            let own: Vec<Place> = bad.iter().flat_map(|(_, tensors)| tensors.clone()).chain(tensors).collect();
            tensors = known_to_any(comm, &places, &own)?;
            let said = comm.gather("ranks that are not finite", &[u8::from(!bad.is_empty())])?;
            let ranks: Vec<usize> = (0..said.len()).filter(|&r| said[r] == [1]).collect();
            let sums_alone = ranks.is_empty();
            let suspect = |k: usize| sums_alone || bad.iter().any(|(own, _)| *own == k);
            let suspects = numbered().filter(|(k, _)| suspect(*k)).map(|(k, b)| (k, b.samples.clone()));
            let samples = joined(comm, suspects)?;
            let ranks = if comm.world_size() > 1 { ranks } else { Vec::new() };
            stepped.problem = Some(Problem::Gradient { tensors, samples, ranks });
        }
        Ok(stepped)
    }

    /// Waits until the weights that other ranks updated are where they belong.
    ///
    /// # Errors
    /// If a peer is gone or the device fails.
    pub fn settle(&mut self, dev: &B, comm: &dyn Communicator<B>) -> Result<()> {
        if self.gathering.is_done() {
            return Ok(());
        }
        let Self { model: Model { params, new_rows, .. }, grads, gathering, .. } = self;
        let way = Way { dev, comm, buckets: &Buckets::of(comm, grads), new_rows: new_rows.as_ref() };
        gathering.wait(&way, params, grads, None)
    }

    /// Runs the micro-batches of a step again, each from zero and without the other ranks, as all of it follows from seed and step: those
    /// whose own gradient is not finite, with its tensors.
    fn replay(
        &mut self,
        dev: &B,
        comm: &dyn Communicator<B>,
        batch: &Step,
        step: u64,
        scale: f32,
    ) -> Result<Vec<(usize, Vec<Place>)>> {
        let mut bad = Vec::new();
        let numbered = dealt(comm.rank(), comm.world_size()).zip(&batch.micro_batches).enumerate();
        for (i, (k, b)) in numbered.filter(|(_, (_, b))| b.n_valid > 0) {
            comm.at(Position { step: step + 1, phase: Phase::Forward, layer: None });
            model::zero_grads(dev, &mut self.grads)?;
            self.acts.load_at(dev, i, b)?;
            self.acts.set_dropout_key(rng::mix(&[self.seed, step, k as u64]));
            model::forward(dev, &self.model, &mut self.acts)?;
            let nobody = &mut |_, _: &mut Grads<B>| Ok(());
            model::backward(dev, &self.model, &mut self.grads, &mut self.acts, scale * comm.gain(), nobody)?;
            let tensors = self.optimizer.not_finite(dev, &self.grads)?;
            if !tensors.is_empty() {
                bad.push((k, tensors));
            }
        }
        Ok(bad)
    }

    /// The samples of this rank whose loss is not finite, by its micro-batches, from the losses of each token that the step left on the
    /// device.
    fn suspects(&self, dev: &B, batch: &Step) -> Result<Vec<(usize, Vec<u32>)>> {
        let mut samples = Vec::new();
        for (i, b) in batch.micro_batches.iter().enumerate().filter(|(_, b)| b.n_valid > 0) {
            let losses = self.acts.losses_at(dev, i)?;
            if !losses.iter().map(|&l| f64::from(l)).sum::<f64>().is_finite() {
                samples.push((i, samples_not_finite(b, &losses)));
            }
        }
        Ok(samples)
    }

    /// Summed negative log-likelihood, supervised tokens and right arg maxes of a micro-batch.
    ///
    /// # Errors
    /// If the device fails.
    pub fn evaluate(&mut self, dev: &B, batch: &MicroBatch) -> Result<[f64; 3]> {
        assert!(self.gathering.is_done(), "{ON_THEIR_WAY}");
        if batch.n_valid == 0 {
            return Ok([0.0; 3]);
        }
        self.acts.load(dev, batch)?;
        model::loss(dev, &self.model, &mut self.acts)?;
        dev.begin_step(&mut self.stats)?;
        dev.add_loss(&mut self.stats, self.acts.loss_tensor(), Some(self.acts.correct_tensor()))?;
        let figures = dev.figures(&self.stats)?;
        Ok([figures.nll.iter().sum(), batch.n_valid as f64, figures.correct])
    }

    /// The trained weights.
    pub fn trained(&self) -> Vec<Place> {
        self.optimizer.places().collect()
    }

    /// Copies a trained weight to the host: its f32 master where it has one, else the weight itself. Of an embedding whose new rows alone are
    /// trained, these rows.
    ///
    /// # Errors
    /// If it is not trained, or the device refuses the copy.
    pub fn exported(&self, dev: &B, at: Place) -> Result<HostTensor> {
        assert!(self.gathering.is_done(), "{ON_THEIR_WAY}");
        if let Some(master) = self.optimizer.master(at) {
            return download(dev, master);
        }
        let (params, grads) = (self.model.params.places(), self.grads.places());
        let found = params.iter().zip(&grads).find(|((place, _), _)| *place == at);
        let (param, grad) = found.and_then(|((_, p), (_, g))| Some((p, g.as_ref()?))).ok_or_else(|| not_trained(at))?;
        let mut host = HostTensor::zeros(grad.rows(), grad.cols());
        dev.download_at(&mut host.data, param, self.model.first_row(at) * grad.cols())?;
        Ok(host)
    }

    /// Copies all trained weights to the host, as [`Workload::exported`] gives them.
    ///
    /// # Errors
    /// If the device refuses a copy.
    pub fn export_params(&self, dev: &B) -> Result<HostParams> {
        self.optimizer.places().map(|at| Ok((at, self.exported(dev, at)?))).collect()
    }

    /// As [`Workload::export_params`] where the state lies on several ranks: on the main rank, `None` elsewhere. Each gives its part of
    /// the masters where files hold them.
    ///
    /// # Errors
    /// If the device refuses a copy or a peer is gone.
    pub fn collect_params(&mut self, dev: &B, comm: &dyn Communicator<B>) -> Result<Option<HostParams>> {
        self.settle(dev, comm)?;
        // The files of an adapter are f32; those of a model have the type of its weights, which all ranks have.
        let masters = match self.model.lora.is_some() && self.model.dtype != DType::F32 {
            true => {
                let own = self.optimizer.masters(dev)?;
                let lengths: Vec<_> =
                    self.grads.places().into_iter().filter_map(|(at, g)| Some((at, g.as_ref()?.len()))).collect();
                Buckets::of(comm, &self.grads).collect(comm, &lengths, &own)?
            }
            false => None,
        };
        if !comm.is_main() {
            return Ok(None);
        }
        let mut params = self.export_params(dev)?;
        if let Some(masters) = masters {
            params.iter_mut().zip(masters).for_each(|((_, t), master)| t.data = master);
        }
        Ok(Some(params))
    }

    /// The whole state of the optimiser where ranks hold parts of it, as [`crate::optim::Optimizer::export`] gives it on one rank: on the
    /// main rank, `None` elsewhere.
    ///
    /// # Errors
    /// If the device refuses a copy or a peer is gone.
    pub fn collect_state(&self, dev: &B, comm: &dyn Communicator<B>) -> Result<Option<Vec<(String, HostTensor)>>> {
        let lengths: Vec<_> =
            self.grads.places().into_iter().filter_map(|(at, g)| Some((at, g.as_ref()?.len()))).collect();
        let (buckets, parts) = (Buckets::of(comm, &self.grads), self.optimizer.parts());
        // Moments, and masters where there are any, of each weight one after the other.
        let kinds = parts.len() / lengths.len().max(1);
        let mut held = self.optimizer.export(dev)?.tensors.into_iter();
        let mut own = vec![Vec::new(); kinds];
        for (i, part) in parts.iter().enumerate() {
            let owned = if part.range.is_empty() { None } else { held.next() };
            own[i % kinds].push(owned.map_or(Vec::new(), |(_, t)| t.data));
        }
        let all: Vec<_> = own.iter().map(|own| buckets.collect(comm, &lengths, own)).collect::<Result<_>>()?;
        let Some(mut all) = all.into_iter().collect::<Option<Vec<_>>>() else { return Ok(None) };
        let whole = parts.into_iter().enumerate().map(|(i, part)| {
            let data = std::mem::take(&mut all[i % kinds][i / kinds]);
            (part.name, HostTensor { rows: part.shape.0, cols: part.shape.1, data })
        });
        Ok(Some(whole.collect()))
    }

    /// Puts back what [`Workload::export_params`] copied, into masters too.
    ///
    /// # Errors
    /// If a trained weight is missing or of another shape, or the device refuses a copy.
    pub fn import_params(&mut self, dev: &B, params: &HostParams) -> Result<()> {
        assert!(self.gathering.is_done(), "{ON_THEIR_WAY}");
        let first_rows: Vec<usize> = self.optimizer.places().map(|at| self.model.first_row(at)).collect();
        for ((at, param, grad), first_row) in trained(&mut self.model.params, &self.grads).into_iter().zip(first_rows) {
            let found = params.iter().find(|(place, _)| *place == at);
            let (_, new) = found.ok_or_else(|| Error::new(format!("{at}: missing")))?;
            let (rows, cols) = grad.shape();
            let shape = (new.rows, new.cols);
            ensure!(shape == (rows, cols), "{at}: expected shape {:?}, found {shape:?}", (rows, cols));
            self.optimizer.set_master(dev, at, &new.data)?;
            if param.shape() == shape {
                dev.upload(param, &new.data)?;
                continue;
            }
            let mut all = download(dev, param)?.data;
            all[first_row * cols..][..rows * cols].copy_from_slice(&new.data);
            dev.upload(param, &all)?;
        }
        Ok(())
    }
}

/// The weights that any rank names, of all that are trained.
fn known_to_any<B: Backend>(comm: &dyn Communicator<B>, all: &[Place], own: &[Place]) -> Result<Vec<Place>> {
    let named: Vec<u8> = all.iter().map(|at| u8::from(own.contains(at))).collect();
    let by_rank = comm.gather("tensors that are not finite", &named)?;
    let any = |i: usize| by_rank.iter().any(|named| named.get(i) == Some(&1));
    Ok((0..all.len()).filter(|&i| any(i)).map(|i| all[i]).collect())
}

/// The samples whose documents hold a loss that is not finite; all of the micro-batch where documents and samples differ.
fn samples_not_finite(b: &MicroBatch, losses: &[f32]) -> Vec<u32> {
    let starts: Vec<usize> = (0..b.doc_start.len()).filter(|&i| b.doc_start[i] as usize == i).collect();
    if starts.len() != b.samples.len() {
        return b.samples.clone();
    }
    let ends = starts.iter().skip(1).copied().chain([losses.len()]);
    let documents = starts.iter().zip(ends).zip(&b.samples);
    documents.filter(|((s, e), _)| losses[**s..*e].iter().any(|l| !l.is_finite())).map(|(_, &sample)| sample).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_with_the_bad_loss_is_named() {
        let b = MicroBatch { doc_start: vec![0, 0, 2, 2, 2, 5], samples: vec![7, 8, 9], ..Default::default() };
        let nan = f32::NAN;
        assert_eq!(samples_not_finite(&b, &[0.0, 1.0, 0.0, nan, 1.0, 0.0]), [8]);
        assert_eq!(samples_not_finite(&b, &[f32::INFINITY, 1.0, 0.0, 1.0, 1.0, nan]), [7, 9]);
        let pretraining = MicroBatch { samples: vec![3], ..b };
        assert_eq!(samples_not_finite(&pretraining, &[0.0, 1.0, 0.0, nan, 1.0, 0.0]), [3]);
    }
}
