//! Evaluation of whole data sets outside training. Figures are summed document by document in the order of the data, so they
//! are the same bits whatever the batch size and packing.

use std::collections::BTreeSet;

use super::SetSums;
use crate::backend::Backend;
use crate::backend::footprint::ROW_STEP;
use crate::batch::MicroBatch;
use crate::data::loader::EvalPlan;
use crate::data::train_set::PieceSet;
use crate::error::Result;
use crate::model::{self, Acts, ActsOptions, Model};

/// How data sets are evaluated.
#[derive(Clone, Debug, PartialEq)]
pub struct EvalOptions {
    /// Rows at once; changes speed only.
    pub batch: usize,
    /// Tokens of a packed row.
    pub max_seq_len: usize,
    /// Whether rows are packed; changes speed only.
    pub packing: bool,
    /// At most this many documents of a data set, in a seeded choice.
    pub max_samples: Option<usize>,
    /// Seed of the choice.
    pub seed: u64,
}

/// Figures of one data set.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SetEval {
    /// Sums over its documents.
    pub sums: SetSums,
    /// Documents evaluated.
    pub documents: usize,
    /// Tokens of these, supervised or not.
    pub tokens: u64,
}

/// Evaluates each data set; `done(documents)` is called after each batch.
///
/// # Errors
/// If the device fails, or another program cuts a file.
pub fn evaluate_sets<B: Backend>(
    dev: &B,
    model: &Model<B>,
    sets: &[PieceSet],
    options: &EvalOptions,
    mut done: impl FnMut(usize),
) -> Result<Vec<SetEval>> {
    let plans: Vec<EvalPlan> = sets
        .iter()
        .map(|s| EvalPlan::new(s, options.max_seq_len, options.packing, options.max_samples, options.seed))
        .collect();
    let batches = |i: usize| plans[i].micro_batches(&sets[i], options.batch, 0, 1);
    let tokens: BTreeSet<usize> = (0..sets.len()).flat_map(|i| batches(i).map(|(_, b)| b.tokens.len())).collect();
    let largest = tokens.last().copied().unwrap_or(1);
    let steps: BTreeSet<usize> = tokens.into_iter().map(|n| n.next_multiple_of(ROW_STEP).min(largest)).collect();
    let mut acts = Acts::new(dev, model, largest, ActsOptions::FORWARD)?;
    dev.prepare(&mut || {
        steps.iter().rev().try_for_each(|&n| {
            acts.load(dev, &MicroBatch::of_size(n))?;
            model::loss(dev, model, &mut acts)
        })
    })?;
    let mut out = Vec::with_capacity(sets.len());
    for (i, set) in sets.iter().enumerate() {
        let mut documents: Vec<(u32, [f64; 3])> = Vec::new();
        let mut tokens = 0;
        for (_, batch) in batches(i) {
            acts.load(dev, &batch)?;
            model::loss(dev, model, &mut acts)?;
            let (losses, corrects) = (acts.losses(dev)?, acts.corrects(dev)?);
            documents.extend(by_document(&batch, &losses, &corrects));
            tokens += batch.tokens.len() as u64;
            done(batch.samples.len());
        }
        set.tokens.check_whole()?;
        // Packing has its own order; the sums have that of the data.
        documents.sort_by_key(|d| d.0);
        let mut sums = SetSums { name: set.name.clone(), ..Default::default() };
        for (_, [nll, supervised, correct]) in &documents {
            sums.nll += nll;
            sums.supervised += supervised;
            sums.correct += correct;
        }
        out.push(SetEval { sums, documents: documents.len(), tokens });
    }
    Ok(out)
}

/// Summed negative log-likelihood, targets and right arg maxes of each document of a batch.
fn by_document(batch: &MicroBatch, losses: &[f32], corrects: &[f32]) -> Vec<(u32, [f64; 3])> {
    let mut out: Vec<(u32, [f64; 3])> = Vec::with_capacity(batch.samples.len());
    let mut samples = batch.samples.iter();
    for (t, &start) in batch.doc_start.iter().enumerate() {
        if start as usize == t {
            let sample = samples.next().expect("every document is a sample of the batch");
            out.push((*sample, [0.0; 3]));
        }
        if batch.targets[t] >= 0 {
            let sums = &mut out.last_mut().expect("a document starts at the first token").1;
            sums[0] += f64::from(losses[t]);
            sums[1] += 1.0;
            sums[2] += f64::from(corrects[t]);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_belong_to_their_document() {
        let batch = MicroBatch {
            tokens: vec![1; 5],
            targets: vec![-100, 4, -100, 5, 6],
            doc_start: vec![0, 0, 2, 2, 2],
            n_valid: 3,
            samples: vec![8, 3],
        };
        let found = by_document(&batch, &[9.0, 1.0, 9.0, 2.0, 3.0], &[1.0, 1.0, 1.0, 0.0, 1.0]);
        assert_eq!(found, [(8, [1.0, 1.0, 1.0]), (3, [5.0, 2.0, 1.0])]);
    }
}
