//! The loss of each of several data sets in one step, for those who watch them: from the losses of single tokens that the step has left on
//! the device. Nothing of a run depends on it.

use super::batches::TrainBatches;
use super::step::Workload;
use crate::backend::Backend;
use crate::batch::{IGNORE, MicroBatch};
use crate::comm::Communicator;
use crate::data::loader::Step;
use crate::error::Result;

/// Summed negative log-likelihood and number of targets.
type Sum = [f64; 2];

/// `train/NAME_loss` of each data set that has a target in the step, over all ranks, which call it together.
///
/// # Errors
/// If the device refuses a copy or a peer is gone.
pub fn set_losses<B: Backend>(
    dev: &B,
    comm: &dyn Communicator<B>,
    work: &Workload<B>,
    batches: &TrainBatches,
    step: &Step,
) -> Result<Vec<(String, f64)>> {
    let names = batches.set_names();
    let mut own: Vec<Sum> = vec![[0.0; 2]; names.len()];
    for (i, b) in step.micro_batches.iter().enumerate().filter(|(_, b)| b.n_valid > 0) {
        add(b, &work.acts.losses_at(dev, i)?, |sample| batches.set_of(sample), &mut own);
    }
    let bytes: Vec<u8> = own.iter().flatten().flat_map(|v| v.to_le_bytes()).collect();
    let mut all = vec![0.0; 2 * names.len()];
    for rank in comm.gather("losses of data sets", &bytes)? {
        let values = rank.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().expect("eight bytes")));
        all.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
    }
    let named = names.iter().zip(all.chunks_exact(2)).filter(|(_, sum)| sum[1] > 0.0);
    Ok(named.map(|(name, sum)| (format!("train/{name}_loss"), sum[0] / sum[1])).collect())
}

/// Adds the losses of a micro-batch to the sums of its data sets. Where its documents are not its samples, which is so in pretraining, it
/// counts if all of it is of one data set.
fn add(b: &MicroBatch, losses: &[f32], set_of: impl Fn(u32) -> usize, sums: &mut [Sum]) {
    let starts = b.doc_start.iter().enumerate().filter(|(i, start)| **start as usize == *i).count();
    let sets: Vec<usize> = b.samples.iter().map(|&sample| set_of(sample)).collect();
    let single = sets.first().copied().filter(|first| sets.iter().all(|set| set == first));
    if starts != sets.len() && single.is_none() {
        return;
    }
    let mut document = 0;
    for (i, (&loss, &target)) in losses.iter().zip(&b.targets).enumerate() {
        document += usize::from(b.doc_start[i] as usize == i);
        if target != IGNORE
            && let Some(set) = single.or_else(|| sets.get(document - 1).copied())
        {
            sums[set][0] += f64::from(loss);
            sums[set][1] += 1.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_go_to_the_data_set_of_their_document() {
        let b = MicroBatch {
            doc_start: vec![0, 0, 2, 2, 4],
            targets: vec![1, IGNORE, 1, 1, 1],
            samples: vec![7, 3, 8],
            ..Default::default()
        };
        let sums_of = |b: &MicroBatch, set_of: fn(u32) -> usize| {
            let mut sums = vec![[0.0; 2]; 2];
            add(b, &[1.0, 9.0, 2.0, 4.0, 8.0], set_of, &mut sums);
            sums
        };
        assert_eq!(sums_of(&b, |sample| usize::from(sample < 5)), [[9.0, 2.0], [6.0, 2.0]]);
        // Pieces of text: documents and samples differ.
        let text = MicroBatch { samples: vec![7, 8], ..b };
        assert_eq!(sums_of(&text, |_| 1), [[0.0; 2], [15.0, 4.0]]);
        assert_eq!(sums_of(&text, |sample| usize::from(sample == 8)), [[0.0; 2]; 2]);
    }
}
