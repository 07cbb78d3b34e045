//! Dataset weights: how many rows of each data set make an epoch, and which.
//!
//! `N_i` is shared out by largest remainder. An epoch takes `floor(N_i / len_i)` whole copies of a set and, for the rest, the
//! next `N_i mod len_i` rows of a sequence of seeded permutations that goes on from epoch to epoch: every row is
//! taken once before any is taken twice. Nothing is ever sampled with replacement.

use crate::error::{Error, Result};
use crate::rng::Stream;
use crate::words::{Words, words};

/// An epoch that repeats its rows more often than this is a mistake: it is planned as a whole, and would take memory and minutes.
const MOST_COPIES: u64 = 1000;
/// So many rows are no burden, however few there are to take them from.
const FEW: u64 = 1_000_000;
const STREAM_ROTATION: u64 = 0x6d69_7801;

/// What a weight shares out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightUnit {
    /// Rows.
    #[default]
    Samples,
    /// Tokens.
    Tokens,
    /// Tokens that carry loss.
    SupervisedTokens,
}
words!(WeightUnit { Samples = "samples", Tokens = "tokens", SupervisedTokens = "supervised-tokens" });

impl WeightUnit {
    /// All units, in the order of the fields of [`SetSize`].
    pub const ALL: [Self; 3] = [Self::Samples, Self::Tokens, Self::SupervisedTokens];
}

/// Size of a data set (or of a part of an epoch) in all units.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetSize {
    /// Rows.
    pub samples: u64,
    /// Tokens.
    pub tokens: u64,
    /// Targets.
    pub supervised: u64,
}

impl SetSize {
    /// In a unit.
    pub fn in_unit(&self, unit: WeightUnit) -> u64 {
        match unit {
            WeightUnit::Samples => self.samples,
            WeightUnit::Tokens => self.tokens,
            WeightUnit::SupervisedTokens => self.supervised,
        }
    }

    /// Adds a row.
    pub fn add(&mut self, tokens: u64, supervised: u64) {
        self.samples += 1;
        self.tokens += tokens;
        self.supervised += supervised;
    }
}

/// Rows of each data set in an epoch.
#[derive(Clone, Debug, PartialEq)]
pub struct Mix {
    /// Rows an epoch takes of each set.
    pub counts: Vec<u64>,
    /// Requested shares, normalised, in [`Mix::unit`].
    pub shares: Vec<f64>,
    /// What the shares are shares of.
    pub unit: WeightUnit,
    lens: Vec<u64>,
    seed: u64,
}

impl Mix {
    /// Shares an epoch out. Without weights each set counts as often as it has rows. `epoch_samples` rows in all, or as many as
    /// there are.
    ///
    /// # Errors
    /// A usage error if the number of weights differs from the number of sets, or one is negative, zero, NaN or infinite.
    /// An error if a set has no rows.
    pub fn new(
        sizes: &[SetSize],
        weights: Option<&[f64]>,
        unit: WeightUnit,
        epoch_samples: Option<u64>,
        seed: u64,
    ) -> Result<Self> {
        if let Some(weights) = weights {
            check_weights(weights, sizes.len())?;
        }
        for (i, s) in sizes.iter().enumerate() {
            crate::ensure!(s.samples > 0, "data set {} has no usable training row, expected at least one", i + 1);
            crate::ensure!(
                s.in_unit(unit) > 0,
                "data set {} has no {}, expected some to weigh it by",
                i + 1,
                unit.word()
            );
        }
        let total: u64 = sizes.iter().map(|s| s.samples).sum();
        let n_total = epoch_samples.unwrap_or(total);
        if n_total == 0 || n_total > u64::from(u32::MAX) {
            return Err(Error::usage(format!("epoch samples {n_total}, expected 1 to {}", u32::MAX)));
        }
        let most = total.saturating_mul(MOST_COPIES).max(FEW);
        if n_total > most {
            return Err(Error::usage(format!(
                "epoch_samples {n_total}: an epoch would have each of the {total} rows more than {MOST_COPIES} times, expected at most \
                 {most}; lower it, and give more epochs with num_train_epochs"
            )));
        }
        let weights: Vec<f64> = match weights {
            Some(w) => w.to_vec(),
            None => sizes.iter().map(|s| s.in_unit(unit) as f64).collect(),
        };
        // Dividing by the largest first keeps the sum finite whatever the weights.
        let largest = weights.iter().copied().fold(0.0, f64::max);
        let sum: f64 = weights.iter().map(|w| w / largest).sum();
        let shares: Vec<f64> = weights.iter().map(|w| w / largest / sum).collect();
        // A share of tokens is a share of rows divided by the tokens of a row.
        let rows: Vec<f64> =
            shares.iter().zip(sizes).map(|(p, s)| p * s.samples as f64 / s.in_unit(unit) as f64).collect();
        let sum: f64 = rows.iter().sum();
        let quotas: Vec<f64> = rows.iter().map(|r| r / sum * n_total as f64).collect();
        Ok(Self {
            counts: largest_remainder(&quotas, n_total),
            shares,
            unit,
            lens: sizes.iter().map(|s| s.samples).collect(),
            seed,
        })
    }

    /// Rows of set `set` in epoch `epoch`, by index: whole copies, then the rest; in no particular order.
    pub fn rows(&self, set: usize, epoch: u64) -> Vec<u32> {
        let (n, len) = (self.counts[set], self.lens[set]);
        let mut out = Vec::with_capacity(n as usize);
        for _ in 0..n / len {
            out.extend(0..len as u32);
        }
        out.extend(self.rotation(set, epoch, (n % len) as usize));
        out
    }

    /// The `r` rows that epoch `epoch` takes of the endless sequence of permutations. Where an epoch takes the end of one
    /// permutation and the start of the next, the latter is reordered so that no row comes twice in the epoch.
    fn rotation(&self, set: usize, epoch: u64, r: usize) -> Vec<u32> {
        if r == 0 {
            return Vec::new();
        }
        let len = self.lens[set] as usize;
        let permutation = |cycle: u64| Stream::new(&[self.seed, STREAM_ROTATION, set as u64, cycle]).permutation(len);
        let (mut cycle, mut at, mut current) = (0, 0, permutation(0));
        for e in 0..=epoch {
            if at + r <= len {
                at += r;
                if e == epoch {
                    return current[at - r..at].to_vec();
                }
                continue;
            }
            let tail = current[at..].to_vec();
            let mut in_tail = vec![false; len];
            tail.iter().for_each(|&row| in_tail[row as usize] = true);
            cycle += 1;
            let next = permutation(cycle);
            let n_head = r - tail.len();
            let head: Vec<u32> = next.iter().copied().filter(|&row| !in_tail[row as usize]).take(n_head).collect();
            let mut in_head = vec![false; len];
            head.iter().for_each(|&row| in_head[row as usize] = true);
            current = head.clone();
            current.extend(next.iter().filter(|&&row| !in_head[row as usize]));
            at = n_head;
            if e == epoch {
                return tail.into_iter().chain(head).collect();
            }
        }
        unreachable!("the loop returns at the epoch asked for")
    }
}

/// Checks weights against the number of data sets.
///
/// # Errors
/// As [`Mix::new`].
pub fn check_weights(weights: &[f64], n_sets: usize) -> Result<()> {
    if weights.len() != n_sets {
        return Err(Error::usage(format!(
            "dataset weights: expected one for each of the {n_sets} data sets, found {}",
            weights.len()
        )));
    }
    for (i, &w) in weights.iter().enumerate() {
        if !(w.is_finite() && w > 0.0) {
            return Err(Error::usage(format!(
                "dataset weight {}: expected a finite number above 0, found {w}; leave the data set out instead",
                i + 1
            )));
        }
    }
    Ok(())
}

/// Whole numbers that sum to `total` and differ from the quotas by less than one; ties go to the first.
pub fn largest_remainder(quotas: &[f64], total: u64) -> Vec<u64> {
    let mut counts: Vec<u64> = quotas.iter().map(|q| q.floor() as u64).collect();
    let mut order: Vec<usize> = (0..quotas.len()).collect();
    order.sort_by(|&a, &b| (quotas[b] - quotas[b].floor()).total_cmp(&(quotas[a] - quotas[a].floor())).then(a.cmp(&b)));
    let missing = total.saturating_sub(counts.iter().sum());
    for k in 0..missing as usize {
        counts[order[k % order.len()]] += 1;
    }
    counts
}

/// One data set's part of an epoch, in one unit each: requested where the weight is in that unit, and achieved.
#[derive(Clone, Debug, PartialEq)]
pub struct MixRow {
    /// The data set.
    pub name: String,
    /// Rows it has.
    pub available: u64,
    /// Its part of the epoch.
    pub size: SetSize,
    /// Requested share in samples, tokens, supervised tokens: the weight in its own unit, in the others what follows from it.
    pub requested: [f64; 3],
    /// Achieved share in samples, tokens, supervised tokens.
    pub achieved: [f64; 3],
}

/// Requested and achieved shares of an epoch; `achieved` holds what the epoch takes of each set.
pub fn mix_report(mix: &Mix, names: &[String], sizes: &[SetSize], achieved: &[SetSize]) -> Vec<MixRow> {
    // Exact (fractional) rows that the weights ask for, and from them the share in each unit.
    let ask: Vec<f64> = mix.shares.iter().zip(sizes).map(|(p, s)| p / s.in_unit(mix.unit) as f64).collect();
    let share = |values: &[f64], i: usize| {
        let sum: f64 = values.iter().sum();
        if sum > 0.0 { values[i] / sum } else { 0.0 }
    };
    (0..names.len())
        .map(|i| {
            let mut row = MixRow {
                name: names[i].clone(),
                available: sizes[i].samples,
                size: achieved[i],
                requested: [0.0; 3],
                achieved: [0.0; 3],
            };
            for (k, unit) in WeightUnit::ALL.into_iter().enumerate() {
                let wanted: Vec<f64> = ask.iter().zip(sizes).map(|(a, s)| a * s.in_unit(unit) as f64).collect();
                let got: Vec<f64> = achieved.iter().map(|s| s.in_unit(unit) as f64).collect();
                row.requested[k] = share(&wanted, i);
                row.achieved[k] = share(&got, i);
            }
            row
        })
        .collect()
}
