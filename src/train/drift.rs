//! Whether ranks still hold the same weights: they are compared at the start and with every checkpoint, so that silent divergence gets a name.

use super::step::Workload;
use crate::backend::Backend;
use crate::bail;
use crate::comm::Communicator;
use crate::error::Result;
use crate::model::trained;
use crate::tensor::Tensor;

/// Elements that are summed at once: bounds the memory of the copy.
const PART: usize = 1 << 20;

/// A number that follows from the bits of every element and its place.
fn sum_of_bits<B: Backend>(dev: &B, t: &Tensor<B>) -> Result<u64> {
    let (mut sum, mut values) = (0u64, Vec::new());
    for first in (0..t.len()).step_by(PART) {
        values.resize(PART.min(t.len() - first), 0.0f32);
        dev.download_at(&mut values, t, first)?;
        for (x, i) in values.iter().zip(first as u64..) {
            // An odd factor for each place: neither a swap nor a change of one bit is lost.
            sum =
                sum.wrapping_add(u64::from(x.to_bits()).wrapping_mul((2 * i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        }
    }
    Ok(sum)
}

/// Compares the trained weights of all ranks after `step` steps.
///
/// # Errors
/// If a rank has others than rank 0: it is named, with the first weight that differs; or if a peer is gone.
pub fn compare<B: Backend>(dev: &B, comm: &dyn Communicator<B>, work: &mut Workload<B>, step: u64) -> Result<()> {
    if comm.world_size() == 1 {
        return Ok(());
    }
    work.settle(dev, comm)?;
    let weights = trained(&mut work.model.params, &work.grads);
    let own: Vec<u64> = weights.iter().map(|(_, t, _)| sum_of_bits(dev, t)).collect::<Result<_>>()?;
    let all = comm.gather("bits of the weights", bytemuck::cast_slice(&own))?;
    let Some(rank) = all.iter().position(|sums| *sums != all[0]) else { return Ok(()) };
    let sums = |r: usize| bytemuck::pod_collect_to_vec::<u8, u64>(&all[r]);
    let (first, other) = (sums(0), sums(rank));
    let differs = first.iter().zip(&other).zip(&weights).find(|((a, b), _)| a != b);
    let place = differs.map_or("their number".into(), |(_, (at, ..))| at.to_string());
    let (n, of) = (first.iter().zip(&other).filter(|(a, b)| a != b).count(), weights.len());
    bail!(
        "after step {step} the weights of rank {rank} differ from those of rank 0 in {n} of {of} tensors, from {place} on: the ranks have \
         drifted apart, by a fault of a machine or of this program; go on from an earlier checkpoint"
    )
}
