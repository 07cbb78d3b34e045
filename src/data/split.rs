//! Train and validation split: per data set, before resampling, seeded; rows with one context (all before the last answer)
//! never land on both sides.

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::rng::Stream;

const STREAM_SPLIT: u64 = 0x7370_6c69;

/// Indices of rows on each side, ascending.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Split {
    /// Trained on.
    pub train: Vec<u32>,
    /// Held out.
    pub val: Vec<u32>,
    /// Why none is held out, where none is.
    pub none: Option<String>,
}

/// Why none is held out where nobody asked for it.
pub const SWITCHED_OFF: &str = "val_fraction is 0";

/// Splits data sets given by the hashes of their rows' contexts. Each set holds out `ceil(fraction * rows)` rows, or as near
/// to it as its groups of equal contexts allow without exceeding it; a context that an earlier set put on one side
/// stays there in later sets, so a leak from one data set to another is impossible too. A set never loses its last training row.
///
/// # Errors
/// A usage error unless `0 <= fraction < 1`.
pub fn split_sets(prompt_hashes: &[Vec<u64>], fraction: f64, seed: u64) -> Result<Vec<Split>> {
    if !(0.0..1.0).contains(&fraction) {
        return Err(Error::usage(format!("val fraction {fraction}, expected a number of at least 0 and below 1")));
    }
    // Only looked up, never iterated: its order decides nothing.
    let mut side_of: HashMap<u64, bool> = HashMap::new();
    let mut out = Vec::with_capacity(prompt_hashes.len());
    for (set, hashes) in prompt_hashes.iter().enumerate() {
        // The small term keeps 0.05 * 60 from being rounded up to 4.
        let target =
            ((fraction * hashes.len() as f64 - 1e-9).ceil().max(0.0) as usize).min(hashes.len().saturating_sub(1));
        let mut group_of: HashMap<u64, usize> = HashMap::new();
        let mut groups: Vec<(u64, usize)> = Vec::new();
        for &hash in hashes {
            let g = *group_of.entry(hash).or_insert_with(|| {
                groups.push((hash, 0));
                groups.len() - 1
            });
            groups[g].1 += 1;
        }
        let smallest = groups.iter().map(|g| g.1).min().unwrap_or(0);
        let mut held: usize = groups.iter().filter(|(h, _)| side_of.get(h) == Some(&true)).map(|g| g.1).sum();
        for g in Stream::new(&[seed, STREAM_SPLIT, set as u64]).permutation(groups.len()) {
            let (hash, n) = groups[g as usize];
            side_of.entry(hash).or_insert_with(|| {
                let hold = held + n <= target;
                held += if hold { n } else { 0 };
                hold
            });
        }
        let mut split = Split::default();
        for (i, hash) in hashes.iter().enumerate() {
            if side_of[hash] { split.val.push(i as u32) } else { split.train.push(i as u32) }
        }
        split.none = split.val.is_empty().then(|| match (hashes.len(), groups.len()) {
            _ if fraction == 0.0 => SWITCHED_OFF.into(),
            (0 | 1, _) => "there is but one row".into(),
            (n, 1) => format!("all {n} rows have one context: what stands before the last answer is the same"),
            (_, n) if smallest > target => format!(
                "rows with one context stay together, and the smallest of the {n} groups has {smallest} rows, more than the \
                 {target} to hold out"
            ),
            _ => "an earlier data set has the same contexts and trains on them".into(),
        });
        out.push(split);
    }
    Ok(out)
}
