//! Which gradients ranks reduce together, and which part of each a rank owns: functions of lengths alone, the same on every rank.

use std::ops::Range;

use crate::backend::Backend;
use crate::comm::bucket::{rooms, tensor_cuts};
use crate::comm::{Communicator, Fold, Span, Sums};
use crate::error::Result;
use crate::model::weights::Place;
use crate::model::{Grads, Params, Ready, trained};
use crate::optim::Shares;
use crate::tensor::Tensor;

/// Parts of the gradients in the order in which backward announces them, small ones joined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buckets {
    n_layers: usize,
    /// The last part of each bucket; it is started when that one is final.
    ends: Vec<usize>,
}

impl Buckets {
    /// Buckets of at least `least` elements, but for the last: `lengths` are those of the trained weights.
    pub fn new(n_layers: usize, lengths: &[(Place, usize)], least: usize) -> Self {
        let mut parts = vec![0; n_layers + 2];
        for (at, len) in lengths {
            parts[Ready::of(*at).number(n_layers)] += len;
        }
        let (mut ends, mut elements) = (Vec::new(), 0);
        for (part, len) in parts.iter().enumerate() {
            elements += len;
            if elements >= least.max(1) || part + 1 == parts.len() {
                ends.push(part);
                elements = 0;
            }
        }
        Self { n_layers, ends }
    }

    /// Of these gradients, as the ranks want them.
    pub fn of<B: Backend>(comm: &dyn Communicator<B>, grads: &Grads<B>) -> Self {
        let lengths: Vec<_> = grads.places().into_iter().filter_map(|(at, g)| Some((at, g.as_ref()?.len()))).collect();
        Self::new(grads.layers.len(), &lengths, comm.bucket_elements())
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.ends.len()
    }

    /// The bucket of a weight.
    pub fn bucket_of(&self, at: Place) -> usize {
        self.bucket_with(Ready::of(at))
    }

    /// The bucket of a part.
    pub fn bucket_with(&self, part: Ready) -> usize {
        let part = part.number(self.n_layers);
        self.ends.partition_point(|&end| end < part)
    }

    /// The parts of a bucket, by their numbers in the order of backward.
    pub fn parts(&self, bucket: usize) -> Range<usize> {
        bucket.checked_sub(1).map_or(0, |before| self.ends[before] + 1)..self.ends[bucket] + 1
    }

    /// The bucket that is complete when this part is final, if one is.
    pub fn completed_by(&self, ready: Ready) -> Option<usize> {
        self.ends.binary_search(&ready.number(self.n_layers)).ok()
    }

    /// Which elements of each trained weight every rank owns: where their shares begin, in the order of `lengths`.
    pub fn cuts(&self, lengths: &[(Place, usize)], size: usize) -> Vec<Vec<usize>> {
        let mut all = vec![Vec::new(); lengths.len()];
        for bucket in 0..self.count() {
            let members: Vec<usize> = (0..lengths.len()).filter(|&i| self.bucket_of(lengths[i].0) == bucket).collect();
            let own: Vec<usize> = members.iter().map(|&i| lengths[i].1).collect();
            members.into_iter().zip(tensor_cuts(&own, size)).for_each(|(i, cuts)| all[i] = cuts);
        }
        all
    }

    /// The shares of the state of an optimiser; `None` where one rank has it all.
    pub fn shares<B: Backend>(&self, comm: &dyn Communicator<B>, grads: &Grads<B>) -> Option<Shares> {
        let lengths: Vec<_> = grads.places().into_iter().filter_map(|(at, g)| Some((at, g.as_ref()?.len()))).collect();
        (comm.world_size() > 1).then(|| Shares::new(comm.rank(), self.cuts(&lengths, comm.world_size())))
    }

    /// The gradients of a bucket, in the order of files.
    fn gradients<'a, B: Backend>(&self, grads: &'a mut Grads<B>, bucket: usize) -> Vec<&'a mut Tensor<B>> {
        let own = grads.places_mut().into_iter().filter(|(at, _)| self.bucket_of(*at) == bucket);
        own.filter_map(|(_, grad)| grad.as_mut()).collect()
    }

    /// Elements that each trained weight takes in a piece of memory that has all of them, in the order of `lengths`: so many that every
    /// bucket is one range of it, with a share of one length for each rank.
    pub fn rooms(&self, lengths: &[(Place, usize)], size: usize) -> Vec<usize> {
        let mut all = vec![0; lengths.len()];
        for bucket in 0..self.count() {
            let members: Vec<usize> = (0..lengths.len()).filter(|&i| self.bucket_of(lengths[i].0) == bucket).collect();
            let own: Vec<usize> = members.iter().map(|&i| lengths[i].1).collect();
            members.into_iter().zip(rooms(&own, size)).for_each(|(i, room)| all[i] = room);
        }
        all
    }

    /// Has the ranks take what their reductions will need: [`Communicator::prepare`]. `first_row` is as in [`Buckets::spans`], `None`
    /// where every rank updates every weight.
    ///
    /// # Errors
    /// If the device has not enough memory.
    pub fn prepare<B: Backend>(
        &self,
        dev: &B,
        comm: &dyn Communicator<B>,
        params: &mut Params<B>,
        grads: &Grads<B>,
        first_row: Option<&dyn Fn(Place) -> usize>,
    ) -> Result<()> {
        let mut all: Vec<Vec<&Tensor<B>>> = (0..self.count()).map(|_| Vec::new()).collect();
        for (at, grad) in grads.places() {
            all[self.bucket_of(at)].extend(grad.as_ref());
        }
        let weights = first_row.map_or_else(Vec::new, |first_row| self.spans(params, grads, first_row));
        comm.prepare(dev, &all, &weights)
    }

    /// Starts the reduction of a bucket. Where it is added after every micro-batch, the next one begins at zero.
    ///
    /// # Errors
    /// If a peer is gone or the device fails.
    pub fn start<B: Backend>(
        &self,
        dev: &B,
        comm: &dyn Communicator<B>,
        g: &mut Grads<B>,
        bucket: usize,
    ) -> Result<()> {
        let mut own = self.gradients(g, bucket);
        comm.reduce_start(dev, bucket, &shared(&own))?;
        match comm.fold() {
            Fold::MicroBatch => dev.fill_zeros(&mut own),
            Fold::Step => Ok(()),
        }
    }

    /// Takes this rank's place in every reduction of a micro-batch that has no gradient here.
    ///
    /// # Errors
    /// If a peer is gone.
    pub fn skip<B: Backend>(&self, dev: &B, comm: &dyn Communicator<B>, g: &mut Grads<B>) -> Result<()> {
        for bucket in 0..self.count() {
            match comm.fold() {
                Fold::MicroBatch => comm.reduce_skip(dev, bucket, &shared(&self.gradients(g, bucket)))?,
                Fold::Step => self.start(dev, comm, g, bucket)?,
            }
        }
        Ok(())
    }

    /// Waits for the sums.
    ///
    /// # Errors
    /// If a peer is gone or the device fails.
    pub fn finish<B: Backend>(
        &self,
        dev: &B,
        comm: &dyn Communicator<B>,
        g: &mut Grads<B>,
        wanted: Sums,
    ) -> Result<()> {
        (0..self.count()).try_for_each(|b| comm.reduce_finish(dev, b, &mut self.gradients(g, b), wanted))
    }

    /// The trained weights of each bucket. `first_row` is the first row of a weight that its gradient covers.
    pub fn spans<'a, B: Backend>(
        &self,
        params: &'a mut Params<B>,
        grads: &'a Grads<B>,
        first_row: impl Fn(Place) -> usize,
    ) -> Vec<Vec<Span<'a, B>>> {
        let mut all: Vec<Vec<Span<B>>> = (0..self.count()).map(|_| Vec::new()).collect();
        for (at, tensor, grad) in trained(params, grads) {
            let first = first_row(at) * tensor.cols();
            all[self.bucket_of(at)].push(Span { tensor, first, len: grad.len() });
        }
        all
    }

    /// What the owners hold of trained weights, `own` its part on this rank in their order, whole on the main rank in the order of
    /// `lengths`.
    ///
    /// # Errors
    /// If a peer is gone.
    pub fn collect<B: Backend>(
        &self,
        comm: &dyn Communicator<B>,
        lengths: &[(Place, usize)],
        own: &[Vec<f32>],
    ) -> Result<Option<Vec<Vec<f32>>>> {
        let mut all = vec![Vec::new(); lengths.len()];
        for bucket in 0..self.count() {
            let members: Vec<usize> = (0..lengths.len()).filter(|&i| self.bucket_of(lengths[i].0) == bucket).collect();
            let parts: Vec<usize> = members.iter().map(|&i| lengths[i].1).collect();
            let values = members.iter().flat_map(|&i| own[i].iter().copied()).collect();
            let Some(joined) = comm.collect(bucket, &parts, values)? else { continue };
            let mut rest = &joined[..];
            for i in members {
                let (whole, more) = rest.split_at(lengths[i].1);
                all[i] = whole.to_vec();
                rest = more;
            }
        }
        Ok(comm.is_main().then_some(all))
    }
}

/// To be read.
fn shared<'a, B: Backend>(tensors: &'a [&mut Tensor<B>]) -> Vec<&'a Tensor<B>> {
    tensors.iter().map(|t| &**t).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::comm::bucket::BLOCK;
    use crate::model::weights::Weights;

    fn lengths() -> (usize, Vec<(Place, usize)>) {
        let config = crate::hf::config::read(Path::new("tests/data/model/tiny-llama-untied")).unwrap().model;
        let all = Weights::of(&config).places().into_iter().map(|(at, _)| (at, at.len(&config, 0))).collect();
        (config.n_layers, all)
    }

    #[test]
    fn every_weight_is_in_one_bucket_and_every_element_has_one_owner() {
        let (n_layers, lengths) = lengths();
        for least in [0, 1, 10_000, 50_000, usize::MAX] {
            let buckets = Buckets::new(n_layers, &lengths, least);
            let started: Vec<usize> = Ready::all(n_layers).filter_map(|r| buckets.completed_by(r)).collect();
            assert_eq!(started, (0..buckets.count()).collect::<Vec<_>>(), "{least}");
            assert!(least < usize::MAX || buckets.count() == 1);
            let parts: Vec<usize> = (0..buckets.count()).flat_map(|b| buckets.parts(b)).collect();
            assert_eq!(parts, (0..n_layers + 2).collect::<Vec<_>>(), "{least}");
            // A bucket is started once all of it is final.
            for (at, _) in &lengths {
                let mut parts = Ready::all(n_layers).skip_while(|r| *r != Ready::of(*at));
                assert_eq!(parts.find_map(|r| buckets.completed_by(r)), Some(buckets.bucket_of(*at)), "{at}");
            }
            for size in 1..=5 {
                for ((at, len), cuts) in lengths.iter().zip(buckets.cuts(&lengths, size)) {
                    assert!(cuts.is_sorted() && cuts[0] == 0 && cuts[size] == *len, "{at}: {cuts:?}");
                    assert!(cuts.iter().all(|&cut| cut == *len || cut.is_multiple_of(BLOCK)), "{at}: {cuts:?}");
                }
                // The tensors of a bucket follow each other in the order of files, so that each bucket is one range.
                let of: Vec<usize> = lengths.iter().map(|(at, _)| buckets.bucket_of(*at)).collect();
                assert_eq!(of.chunk_by(|a, b| a == b).count(), buckets.count(), "{of:?}");
                let rooms = buckets.rooms(&lengths, size);
                assert!(rooms.iter().zip(&lengths).all(|(room, (_, len))| room >= len));
            }
        }
    }
}
