//! What is done to the points of a line before it is drawn: a mean, fewer points, the range of y that shows most of them.

use std::ops::Range;

/// Below this many values a range holds all of them: of a few points none is an outlier.
const FEW: usize = 20;
/// How many spans between the 2nd and the 98th percentile a value may lie beyond these and still be in the frame.
const BEYOND: f64 = 2.0;

/// A mean over a twentieth of the line: the straight line of least squares through the points around each, at its place. Inside that
/// is the plain mean of a centred window. So it has no lag, and a line that falls straight is left as it is, up to its two ends.
/// Points that are not finite are left out, and single ones far beyond the others ([`shown`]): they are marked, and tell of nothing else.
pub fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let range = shown(points.iter().map(|p| p.1)).unwrap_or(0.0..0.0);
    let usual = |p: &(f64, f64)| p.0.is_finite() && p.1 >= range.start && p.1 <= range.end;
    let finite: Vec<(f64, f64)> = points.iter().copied().filter(usual).collect();
    let n = finite.len();
    // Sums of y and of i·y before each point, about the first value, so that little is lost of long lines.
    let first = finite.first().map_or(0.0, |p| p.1);
    let (mut sums, mut moments) = (vec![0.0; n + 1], vec![0.0; n + 1]);
    for (i, &(_, y)) in finite.iter().enumerate() {
        sums[i + 1] = sums[i] + (y - first);
        moments[i + 1] = moments[i] + i as f64 * (y - first);
    }
    let half = (n / 40).max(1);
    let at = |i: usize| {
        let (a, b) = (i.saturating_sub(half), (i + half + 1).min(n));
        let count = (b - a) as f64;
        let middle = (a + b - 1) as f64 / 2.0;
        let mean = (sums[b] - sums[a]) / count;
        // Sum of squares of distances from the middle of `count` points, one apart.
        let spread = count * (count * count - 1.0) / 12.0;
        let slope = if spread > 0.0 { (moments[b] - moments[a] - middle * count * mean) / spread } else { 0.0 };
        first + mean + slope * (i as f64 - middle)
    };
    (0..n)
        .map(|i| (finite[i].0, if i < half || i + half >= n { at(i) } else { centred(&sums, i, half, first) }))
        .collect()
}

fn centred(sums: &[f64], i: usize, half: usize, first: f64) -> f64 {
    first + (sums[i + half + 1] - sums[i - half]) / (2 * half + 1) as f64
}

/// Which of some values stay when at most about `n` may, with the same outline: the lowest and highest of each stretch. Values that
/// are not finite never do.
pub fn outline(values: &[f64], n: usize) -> Vec<usize> {
    let finite: Vec<usize> = (0..values.len()).filter(|&i| values[i].is_finite()).collect();
    if finite.len() <= n {
        return finite;
    }
    let stretch = finite.len().div_ceil(n / 2);
    let mut out = Vec::new();
    for part in finite.chunks(stretch) {
        let by = |a: &&usize, b: &&usize| values[**a].total_cmp(&values[**b]);
        let low = part.iter().min_by(by).copied().unwrap_or(part[0]);
        let high = part.iter().max_by(by).copied().unwrap_or(part[0]);
        out.push(low.min(high));
        if low != high {
            out.push(low.max(high));
        }
    }
    out
}

/// At most about `n` points with the same outline.
pub fn thin(points: &[(f64, f64)], n: usize) -> Vec<(f64, f64)> {
    let values: Vec<f64> = points.iter().map(|p| if p.0.is_finite() { p.1 } else { f64::NAN }).collect();
    outline(&values, n).into_iter().map(|i| points[i]).collect()
}

/// The least and the largest of the values that a frame has to show: all of them, but for single ones far beyond the rest, which would
/// press the others into a flat line.
pub fn shown(values: impl Iterator<Item = f64>) -> Option<Range<f64>> {
    let mut sorted: Vec<f64> = values.filter(|v| v.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    let (&low, &high) = (sorted.first()?, sorted.last()?);
    let n = sorted.len();
    if n < FEW {
        return Some(low..high);
    }
    let (p2, p98) = (sorted[(0.02 * (n - 1) as f64).ceil() as usize], sorted[(0.98 * (n - 1) as f64) as usize]);
    let reach = BEYOND * (p98 - p2);
    if reach <= 0.0 {
        return Some(low..high);
    }
    // What is left out must leave the frame with a value of the line at its edge.
    let least = sorted.iter().copied().find(|v| *v >= p2 - reach).unwrap_or(low);
    let most = sorted.iter().copied().rfind(|v| *v <= p98 + reach).unwrap_or(high);
    Some(least..most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thinning_keeps_the_outline() {
        let points: Vec<(f64, f64)> = (0..10_000).map(|i| (f64::from(i), f64::from(i % 100))).collect();
        let thinned = thin(&points, 500);
        assert!(thinned.len() <= 502 && thinned.len() > 200);
        assert!(thinned.iter().any(|p| p.1 == 99.0) && thinned.iter().any(|p| p.1 == 0.0));
        assert!(thinned.windows(2).all(|w| w[0].0 < w[1].0));
        assert_eq!(thin(&[(1.0, f64::NAN), (2.0, 1.0)], 500), [(2.0, 1.0)]);
    }

    #[test]
    fn the_mean_of_a_straight_line_is_the_line() {
        for n in [1, 2, 3, 39, 40, 400, 4001] {
            let line: Vec<(f64, f64)> = (0..n).map(|i| (f64::from(i), 7.0 - 0.01 * f64::from(i))).collect();
            let mean = smooth(&line);
            assert_eq!(mean.len(), line.len());
            let worst = mean.iter().zip(&line).map(|(m, l)| (m.1 - l.1).abs()).fold(0.0, f64::max);
            assert!(worst < 1e-9, "{n}: {worst}");
        }
        // Inside it is the plain mean of the window.
        let noise: Vec<(f64, f64)> = (0..200).map(|i| (f64::from(i), f64::from(i * 37 % 11))).collect();
        let mean = smooth(&noise)[100].1;
        let plain = noise[95..=105].iter().map(|p| p.1).sum::<f64>() / 11.0;
        assert!((mean - plain).abs() < 1e-12, "{mean} {plain}");
        assert_eq!(smooth(&[(1.0, f64::NAN), (2.0, 3.0)]), [(2.0, 3.0)]);
        let mut spiked = noise.clone();
        spiked[100].1 = 1e6;
        assert!(smooth(&spiked).iter().all(|p| p.0 != 100.0 && p.1 < 11.0), "a spike is no part of the mean");
    }

    #[test]
    fn a_spike_is_left_out_of_the_range_and_a_fall_is_not() {
        let falling = |i: u32| 2.0 + 8.0 / (1.0 + f64::from(i) / 20.0);
        let usual: Vec<f64> = (0..200).map(falling).collect();
        assert_eq!(shown(usual.iter().copied()), Some(usual[199]..10.0));
        let mut spiked = usual.clone();
        spiked[120] = 900.0;
        assert_eq!(shown(spiked.iter().copied()), Some(usual[199]..10.0));
        spiked[60] = -500.0;
        assert_eq!(shown(spiked.iter().copied()), Some(usual[199]..10.0));
        // A few values are all shown, and so is a line that steps once.
        assert_eq!(shown([1.0, 50.0, 1.1].into_iter()), Some(1.0..50.0));
        assert_eq!(shown((0..40).map(|i| if i < 39 { 1.0 } else { 2.0 })), Some(1.0..2.0));
        assert_eq!(shown([f64::NAN].into_iter()), None);
    }
}
