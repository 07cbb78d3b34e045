//! Results held to f64 on samples, before anything is timed.

use std::collections::BTreeMap;

use crate::bail;
use crate::error::Result;
use crate::tensor::DType;

/// Samples of one tensor that are of one size, such as those of a row.
#[derive(Clone, Debug)]
pub struct Samples {
    /// The tensor's name.
    pub what: &'static str,
    /// How it is stored.
    pub dtype: DType,
    /// What arithmetic before the last rounding may add, relative to the samples' root mean square.
    pub inner: f64,
    /// Their places and values.
    pub points: Vec<Point>,
}

/// One sample.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    /// Row and column.
    pub place: (usize, usize),
    /// In f64, from the operands as they are stored.
    pub expected: f64,
    /// What the device gave.
    pub found: f64,
}

/// The largest error of rounding to a storage type, relative to the value: half a unit in the last place of the least fraction.
fn rounding(dtype: DType) -> f64 {
    if dtype == DType::Bf16 { 1.0 / 256.0 } else { 1.0 / 16_777_216.0 }
}

/// Holds samples to what is expected, each within one rounding and `inner` times the root mean square of its group; gives the relative
/// error in the Frobenius norm, of the tensor where it is largest.
///
/// # Errors
/// If one is further away, or not a number: the case, the place, what was expected and found.
pub fn judge(case: &str, all: &[Samples]) -> Result<f64> {
    // By tensor: squares of errors, and of what is expected.
    let mut tensors: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
    for s in all {
        let rms = (s.points.iter().map(|p| p.expected.powi(2)).sum::<f64>() / s.points.len().max(1) as f64).sqrt();
        for p in &s.points {
            let (off, allowed) = ((p.found - p.expected).abs(), rounding(s.dtype) * p.expected.abs() + s.inner * rms);
            // NaN is not within anything.
            let within = off <= allowed;
            if !within {
                bail!(
                    "{case}: wrong result at row {}, column {} of {}: expected {:.7e}, found {:.7e}, off by {off:.1e} of {allowed:.1e} \
                     that rounding allows; nothing of it was timed",
                    p.place.0,
                    p.place.1,
                    s.what,
                    p.expected,
                    p.found
                );
            }
            let (error, size) = tensors.entry(s.what).or_default();
            *error += off * off;
            *size += p.expected.powi(2);
        }
    }
    assert!(!tensors.is_empty(), "{case}: nothing was verified");
    Ok(tensors.values().map(|(error, size)| (error / size.max(f64::MIN_POSITIVE)).sqrt()).fold(0.0, f64::max))
}

/// `count` places of `n`, or all: the first and the last among them, the others spread over the rest.
pub fn picks(n: usize, count: usize) -> Vec<usize> {
    let count = count.min(n);
    // The golden ratio spreads any number of places evenly and hits no regular stride.
    let inner = (0..).map(|i| ((i as f64 + 1.0) * 0.618_033_988_749_895).fract()).map(|x| (x * n as f64) as usize);
    let mut all: Vec<usize> = [0, n.saturating_sub(1)].into_iter().take(count).collect();
    for place in inner.take(8 * n + 8) {
        if all.len() >= count {
            break;
        }
        if !all.contains(&place) {
            all.push(place);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(dtype: DType, found: &[f64]) -> Vec<Samples> {
        let points = found.iter().enumerate().map(|(i, &found)| Point { place: (i, 3), expected: 1.0, found });
        vec![Samples { what: "out", dtype, inner: 1e-3, points: points.collect() }]
    }

    #[test]
    fn what_rounding_allows_passes_and_more_is_named_with_its_place() {
        let bf16 = |found: &[f64]| judge("rmsnorm forward", &group(DType::Bf16, found));
        assert_eq!(bf16(&[1.0, 1.0]).unwrap(), 0.0);
        let error = bf16(&[1.003, 0.997]).unwrap();
        assert!((error - 0.003).abs() < 1e-6, "{error}");
        let message = bf16(&[1.0, 1.006]).unwrap_err();
        assert_eq!(message.exit_code(), 1);
        let text = message.to_string();
        for part in ["rmsnorm forward", "row 1, column 3 of out", "expected 1.0000000e0", "found 1.0060000e0"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(bf16(&[f64::NAN, 1.0]).is_err() && bf16(&[f64::INFINITY]).is_err());
        assert!(judge("x", &group(DType::F32, &[1.003])).is_err());
    }

    #[test]
    fn picks_are_distinct_and_have_both_ends() {
        for (n, count) in [(1, 4), (3, 8), (100, 8), (49_152, 5)] {
            let mut all = picks(n, count);
            assert!(all.contains(&0) && all.contains(&(n - 1)), "{all:?}");
            all.sort_unstable();
            all.dedup();
            assert_eq!(all.len(), count.min(n));
            assert!(all.iter().all(|&i| i < n));
        }
        assert!(picks(0, 3).is_empty());
    }
}
