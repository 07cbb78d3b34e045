//! How a case is timed: every set of its buffers once around, until the time is up; the median of the rounds and their spread.

use std::time::{Duration, Instant};

use crate::backend::Backend;
use crate::error::Result;

/// Rounds that are timed at least, and at most.
const LEAST: usize = 3;
const MOST: usize = 1000;

/// Sets of buffers at most: what is small enough to need more is bound by launches anyway.
const MOST_SETS: u64 = 256;

/// How many times the last cache all that a round touches is, and what its sets take at most.
const CACHES: u64 = 3;
const MOST_CACHES: u64 = 8;

/// Times of a case in seconds a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Times {
    /// Median.
    pub median: f64,
    /// Least.
    pub min: f64,
    /// Greatest.
    pub max: f64,
    /// A quarter is below it.
    pub quartile1: f64,
    /// A quarter is above it.
    pub quartile3: f64,
    /// How many rounds they are of.
    pub rounds: usize,
}

impl Times {
    /// Of the times of rounds.
    ///
    /// # Panics
    /// Without any.
    pub fn of(mut all: Vec<f64>) -> Self {
        all.sort_by(f64::total_cmp);
        let n = all.len();
        // Between two ranks, their mean in proportion.
        let at = |share: f64| {
            let place = share * (n - 1) as f64;
            let low = place as usize;
            let high = (low + 1).min(n - 1);
            all[low] + (all[high] - all[low]) * (place - low as f64)
        };
        Self { median: at(0.5), min: all[0], max: all[n - 1], quartile1: at(0.25), quartile3: at(0.75), rounds: n }
    }
}

/// How the buffers of a case are kept out of the last cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotation {
    /// Sets of buffers, each run once in a round.
    pub sets: usize,
    /// Whether they are too few, so that other memory is swept through the cache before each round.
    pub sweep: bool,
}

/// The rotation of a case a run of which touches so many bytes, of sets that take `memory` bytes each.
pub fn rotation(touched: u64, memory: u64, cache: u64, free: u64) -> Rotation {
    // A set that is several times the cache leaves nothing of itself in it.
    let wanted = (CACHES * cache).div_ceil(touched.max(1)).max(1);
    let most = (MOST_CACHES * cache).min(free / 4) / memory.max(1);
    let sets = wanted.min(MOST_SETS).min(most.max(1));
    Rotation { sets: sets as usize, sweep: sets < wanted }
}

/// Times `round`, which does `runs` runs, for `seconds` after one round that warms up; `before` each round, untimed, puts back what a
/// run overwrites.
///
/// # Errors
/// Those of the closures, or if the device fails.
pub fn rounds<B: Backend>(
    dev: &B,
    seconds: f64,
    runs: usize,
    mut before: impl FnMut() -> Result<()>,
    mut round: impl FnMut() -> Result<()>,
) -> Result<Times> {
    before()?;
    round()?;
    let (begin, budget) = (Instant::now(), Duration::from_secs_f64(seconds));
    let mut all = Vec::new();
    while all.len() < LEAST || (begin.elapsed() < budget && all.len() < MOST) {
        before()?;
        all.push(dev.timed(&mut round)? / runs as f64);
    }
    Ok(Times::of(all))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_spread() {
        let t = Times::of(vec![5.0, 1.0, 2.0, 4.0, 3.0]);
        assert_eq!((t.min, t.quartile1, t.median, t.quartile3, t.max, t.rounds), (1.0, 2.0, 3.0, 4.0, 5.0, 5));
        let t = Times::of(vec![1.0, 2.0]);
        assert_eq!((t.quartile1, t.median, t.quartile3), (1.25, 1.5, 1.75));
        assert_eq!(Times::of(vec![7.0]).median, 7.0);
    }

    #[test]
    fn buffers_go_around_beyond_the_cache() {
        const MIB: u64 = 1 << 20;
        let of = |touched, memory, cache, free| {
            let r = rotation(touched, memory, cache, free);
            (r.sets, r.sweep)
        };
        assert_eq!(of(MIB, MIB, 50 * MIB, 1 << 40), (150, false));
        assert_eq!(of(200 * MIB, 200 * MIB, 50 * MIB, 1 << 40), (1, false));
        // Small ones would need more sets than there may be; of a large table a run touches little.
        assert_eq!(of(1000, 1000, 50 * MIB, 1 << 40), (256, true));
        assert_eq!(of(MIB, 100 * MIB, 50 * MIB, 1 << 40), (4, true));
        assert_eq!(of(MIB, MIB, 50 * MIB, 40 * MIB), (10, true));
        // No cache is known: nothing to keep out of.
        assert_eq!(of(0, 0, 0, 0), (1, false));
    }
}
