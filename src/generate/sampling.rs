//! How the next token is chosen: repetition penalty, temperature, top-k, top-p and min-p in transformers' order, then one draw.

use crate::bail;
use crate::error::Result;
use crate::rng::Stream;

const STREAM_SAMPLE: u64 = 0x7361_6d70;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0 takes the arg max (lowest id on ties).
    pub temperature: f64,
    /// Only the k likeliest tokens; 0: all.
    pub top_k: usize,
    /// Only the likeliest tokens that together reach this probability; 1: all (Holtzman et al. 2020, arXiv:1904.09751).
    pub top_p: f64,
    /// Only tokens with at least this share of the likeliest one's probability; 0: all (Nguyen et al. 2024, arXiv:2407.01082).
    pub min_p: f64,
    /// Logits of tokens seen before are divided (positive) or multiplied (negative) by it; 1: off (Keskar et al. 2019,
    /// arXiv:1909.05858).
    pub repetition_penalty: f64,
    /// Seed of the draws. A draw depends on it, the sequence's number and the position alone, not on the batch.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// Checks every value.
    ///
    /// # Errors
    /// A usage error with the setting, what it expects and what was found.
    pub fn check(&self) -> Result<()> {
        let bad = |name: &str, expected: &str, found: f64| {
            Err(crate::error::Error::usage(format!("{name}: expected {expected}, found {found}")))
        };
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return bad("temperature", "0 or more", self.temperature);
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return bad("top_p", "more than 0 and at most 1", self.top_p);
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return bad("min_p", "0 to 1", self.min_p);
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return bad("repetition_penalty", "more than 0", self.repetition_penalty);
        }
        Ok(())
    }

    /// The next token of sequence `sequence`, whose tokens so far are `seen`.
    ///
    /// # Errors
    /// If a logit is NaN.
    pub fn choose(&self, logits: &[f32], seen: &[u32], sequence: u64) -> Result<u32> {
        // A sum that no branch ends goes over many logits at once.
        if logits.iter().fold(false, |any, l| any | l.is_nan()) {
            bail!(
                "logit of token {} is NaN after {} tokens; the weights are damaged or training diverged",
                logits.iter().position(|l| l.is_nan()).unwrap_or(0),
                seen.len()
            );
        }
        if self.temperature == 0.0 && self.repetition_penalty == 1.0 {
            return Ok(arg_max(logits));
        }
        let mut logits: Vec<f64> = logits.iter().map(|&l| f64::from(l)).collect();
        if self.repetition_penalty != 1.0 {
            let mut once: Vec<u32> = seen.to_vec();
            once.sort_unstable();
            once.dedup();
            for t in once {
                if let Some(l) = logits.get_mut(t as usize) {
                    *l = if *l > 0.0 { *l / self.repetition_penalty } else { *l * self.repetition_penalty };
                }
            }
        }
        if self.temperature == 0.0 {
            return Ok(arg_max(&logits));
        }
        let draw = Stream::new(&[self.seed, STREAM_SAMPLE, sequence]).f64_at(seen.len() as u64);
        Ok(self.draw(&logits, draw))
    }

    /// Draws by `u` in [0, 1) from the distribution that the settings leave: tokens from the likeliest on, the lower id first on ties.
    fn draw(&self, logits: &[f64], u: f64) -> u32 {
        let ranks = Ranks::new(logits, self.temperature);
        if !ranks.total.is_finite() {
            return arg_max(logits);
        }
        let (top_p, min_p) = (self.top_p, self.min_p);
        let most = if self.top_k > 0 { self.top_k.min(logits.len()) } else { logits.len() };
        let mut kept = Prefix { count: logits.len(), sum: ranks.total };
        if most < logits.len() {
            kept = ranks.before(|so_far, _| so_far.count >= most);
        }
        if top_p < 1.0 || min_p > 0.0 {
            // The token that reaches the share is the last one; one below the least share is taken only if it is the likeliest.
            let (most, all) = (kept.count, kept.sum);
            kept = ranks.before(|so_far, weight| {
                so_far.count >= most || top_p < 1.0 && so_far.sum / all >= top_p || so_far.count > 0 && weight < min_p
            });
        }
        ranks.at(u * kept.sum, kept.count)
    }
}

/// Tokens in the order of their likelihood, as far as somebody asks: they are dealt into buckets by their logits, and only a bucket in
/// which something is decided is sorted.
struct Ranks<'a> {
    logits: &'a [f64],
    /// `exp((logit - largest) / temperature)`: 1 for the likeliest.
    weights: Vec<f64>,
    /// The bucket of each token; the likeliest are in the first.
    bucket_of: Vec<u16>,
    /// All tokens of each bucket, and their least weight.
    buckets: Vec<(Prefix, f64)>,
    /// Sum of all weights, bucket by bucket.
    total: f64,
}

/// Some tokens, likeliest first: how many, and the sum of their weights.
#[derive(Clone, Copy, Default)]
struct Prefix {
    count: usize,
    sum: f64,
}

impl Prefix {
    fn and(self, count: usize, sum: f64) -> Self {
        Self { count: self.count + count, sum: self.sum + sum }
    }
}

/// Buckets of tokens: few enough to stay in the L1 cache, so many that one of them is soon sorted.
const BUCKETS: usize = 1024;

impl<'a> Ranks<'a> {
    fn new(logits: &'a [f64], temperature: f64) -> Self {
        let top = logits.iter().fold(f64::NEG_INFINITY, |m, &l| if l > m { l } else { m });
        let least = logits.iter().fold(top, |m, &l| if l < m && l.is_finite() { l } else { m });
        let per_logit = (BUCKETS - 1) as f64 / (top - least);
        // What is no number of a bucket becomes one: 0 where all logits are alike, the last for a logit of minus infinity.
        let bucket = |l: f64| (((top - l) * per_logit) as usize).min(BUCKETS - 1) as u16;
        let mut ranks = Self {
            logits,
            weights: logits.iter().map(|l| ((l - top) / temperature).exp()).collect(),
            bucket_of: logits.iter().map(|&l| bucket(l)).collect(),
            buckets: vec![(Prefix::default(), f64::INFINITY); BUCKETS],
            total: 0.0,
        };
        for (&bucket, &weight) in ranks.bucket_of.iter().zip(&ranks.weights) {
            let (of, least) = &mut ranks.buckets[usize::from(bucket)];
            *of = of.and(1, weight);
            *least = least.min(weight);
        }
        ranks.total = ranks.buckets.iter().map(|(of, _)| of.sum).sum();
        ranks
    }

    /// The tokens of a bucket, likeliest first, with their weights.
    fn sorted(&self, bucket: usize) -> impl Iterator<Item = (u32, f64)> {
        let ids = self.bucket_of.iter().zip(0..).filter(|&(&b, _)| usize::from(b) == bucket).map(|(_, id)| id);
        let mut ids: Vec<u32> = ids.collect();
        ids.sort_unstable_by(|&a, &b| self.logits[b as usize].total_cmp(&self.logits[a as usize]).then(a.cmp(&b)));
        ids.into_iter().map(|id| (id, self.weights[id as usize]))
    }

    /// The tokens before the first one at which `ends` says yes, which is told of those before it and of its weight. What is true for
    /// some tokens and a weight stays true for more tokens and a smaller weight.
    fn before(&self, ends: impl Fn(Prefix, f64) -> bool) -> Prefix {
        let mut so_far = Prefix::default();
        for (bucket, &(of, least)) in self.buckets.iter().enumerate().filter(|(_, (of, _))| of.count > 0) {
            let after = so_far.and(of.count, of.sum);
            if ends(after, least) {
                for (_, weight) in self.sorted(bucket) {
                    if ends(so_far, weight) {
                        return so_far;
                    }
                    so_far = so_far.and(1, weight);
                }
            } else {
                so_far = after;
            }
        }
        so_far
    }

    /// Of the first `count` tokens the one in which a sum of weights passes `rest`.
    fn at(&self, mut rest: f64, mut count: usize) -> u32 {
        let mut last = 0;
        for (bucket, &(of, _)) in self.buckets.iter().enumerate().filter(|(_, (of, _))| of.count > 0) {
            if of.count < count && rest >= of.sum {
                (rest, count) = (rest - of.sum, count - of.count);
                continue;
            }
            for (id, weight) in self.sorted(bucket).take(count) {
                (rest, last, count) = (rest - weight, id, count - 1);
                if rest < 0.0 {
                    return id;
                }
            }
            if count == 0 {
                break;
            }
        }
        last
    }
}

/// The index of the largest, the lowest on ties.
fn arg_max<T: Copy + PartialOrd>(logits: &[T]) -> u32 {
    let Some(&first) = logits.first() else { return 0 };
    let largest = logits.iter().fold(first, |m, &l| if l > m { l } else { m });
    logits.iter().position(|&l| l == largest).unwrap_or(0) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(f: impl FnOnce(&mut Sampling)) -> Sampling {
        let mut s = Sampling { temperature: 1.0, ..Sampling::default() };
        f(&mut s);
        s
    }

    /// Tokens that a dense sweep of draws reaches.
    fn reachable(s: Sampling, logits: &[f64]) -> Vec<u32> {
        let mut all: Vec<u32> = (0..1000).map(|i| s.draw(logits, f64::from(i) / 1000.0)).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    #[test]
    fn filters_leave_the_likeliest_tokens() {
        let logits: Vec<f64> = [0.4f64, 0.3, 0.2, 0.1].iter().map(|p| p.ln()).collect();
        assert_eq!(reachable(with(|_| ()), &logits), [0, 1, 2, 3]);
        assert_eq!(reachable(with(|s| s.top_k = 2), &logits), [0, 1]);
        assert_eq!(reachable(with(|s| s.top_p = 0.7), &logits), [0, 1]);
        assert_eq!(reachable(with(|s| s.top_p = 0.71), &logits), [0, 1, 2]);
        assert_eq!(reachable(with(|s| s.min_p = 0.6), &logits), [0, 1]);
        assert_eq!(reachable(with(|s| s.min_p = 1.0), &logits), [0]);
    }

    /// The same by sorting all tokens and adding all weights in that order.
    fn by_sorting(s: Sampling, logits: &[f64], u: f64) -> u32 {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        if s.top_k > 0 {
            order.truncate(s.top_k);
        }
        let top = logits[order[0]];
        let weights: Vec<f64> = order.iter().map(|&t| ((logits[t] - top) / s.temperature).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let mut kept = 0;
        let mut reached = 0.0;
        while kept < order.len() && (kept == 0 || reached < s.top_p && weights[kept] >= s.min_p) {
            reached += weights[kept] / sum;
            kept += 1;
        }
        let mut rest = u * weights[..kept].iter().sum::<f64>();
        for (&token, weight) in order[..kept].iter().zip(&weights) {
            rest -= weight;
            if rest < 0.0 {
                return token as u32;
            }
        }
        order[kept - 1] as u32
    }

    #[test]
    fn buckets_draw_what_a_sort_of_all_tokens_would() {
        let stream = Stream::new(&[5, 6]);
        let spread = |i: u64, by: f64| (stream.f64_at(i) * by).powi(3);
        let (mut wide, ties): (Vec<f64>, Vec<f64>) =
            ((0..3000).map(|i| spread(i, 4.0)).collect(), (0..500).map(|i| (i % 7) as f64).collect());
        wide[17] = f64::NEG_INFINITY;
        let settings = [
            with(|_| ()),
            with(|s| s.temperature = 0.3),
            with(|s| s.top_k = 40),
            with(|s| s.top_p = 0.9),
            with(|s| (s.top_k, s.top_p) = (1000, 0.8)),
            with(|s| s.min_p = 0.01),
            with(|s| (s.top_p, s.min_p, s.temperature) = (0.99, 0.001, 1.5)),
        ];
        for (logits, s) in [&wide, &ties, &vec![-1.0; 9]].into_iter().flat_map(|l| settings.map(|s| (l, s))) {
            for i in 0..200 {
                let u = stream.f64_at(10_000 + i);
                assert_eq!(s.draw(logits, u), by_sorting(s, logits, u), "{s:?}, {} tokens, {u}", logits.len());
            }
        }
        let endless = [0.0, f64::INFINITY, 1.0];
        assert_eq!(settings.map(|s| s.draw(&endless, 0.99)), [1; 7]);
    }

    #[test]
    fn draws_have_the_right_frequencies() {
        let logits: Vec<f64> = [0.5f64, 0.3, 0.2].iter().map(|p| p.ln()).collect();
        let n = 10_000;
        let hits = (0..n).filter(|&i| with(|_| ()).draw(&logits, f64::from(i) / f64::from(n)) == 1).count();
        assert!((2990..=3010).contains(&hits), "{hits}");
        // Half the temperature squares the odds: 0.09 / (0.25 + 0.09 + 0.04).
        let cold = with(|s| s.temperature = 0.5);
        let hits = (0..n).filter(|&i| cold.draw(&logits, f64::from(i) / f64::from(n)) == 1).count();
        assert!((2360..=2376).contains(&hits), "{hits}");
    }

    #[test]
    fn every_token_of_every_sequence_has_a_draw_of_its_own() {
        let (s, logits) = (with(|_| ()), [0.0f32; 1000]);
        let drawn = |sequence| -> Vec<u32> {
            let mut seen = Vec::new();
            (0..50).for_each(|_| seen.push(s.choose(&logits, &seen, sequence).unwrap()));
            seen
        };
        let distinct = drawn(0).into_iter().collect::<std::collections::BTreeSet<_>>().len();
        assert!(distinct > 40, "{distinct} different tokens of 50 draws among 1000");
        assert_ne!(drawn(0), drawn(1));
    }

    #[test]
    fn greedy_penalty_and_nan() {
        let greedy = Sampling::default();
        assert_eq!(greedy.choose(&[1.0, 2.0, 2.0], &[], 0).unwrap(), 1);
        let penal = Sampling { repetition_penalty: 2.0, ..greedy };
        assert_eq!(penal.choose(&[1.5, 2.0, -1.0], &[1, 1], 0).unwrap(), 0);
        assert_eq!(penal.choose(&[-3.0, -1.0, -1.5], &[1], 0).unwrap(), 2);
        assert!(greedy.choose(&[0.0, f32::NAN], &[5], 0).unwrap_err().to_string().contains("token 1 is NaN"));
    }

    #[test]
    fn bad_settings_are_usage_errors() {
        for s in [
            with(|s| s.temperature = -1.0),
            with(|s| s.temperature = f64::NAN),
            with(|s| s.top_p = 0.0),
            with(|s| s.min_p = 2.0),
            with(|s| s.repetition_penalty = 0.0),
        ] {
            assert_eq!(s.check().unwrap_err().exit_code(), 2);
        }
    }
}
