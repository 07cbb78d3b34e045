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
    /// If no logit is finite.
    pub fn choose(&self, logits: &[f32], seen: &[u32], sequence: u64) -> Result<u32> {
        if let Some(at) = logits.iter().position(|l| l.is_nan()) {
            bail!(
                "logit of token {at} is NaN after {} tokens; the weights are damaged or training diverged",
                seen.len()
            );
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

    /// Draws by `u` in [0, 1) from the distribution that the settings leave.
    fn draw(&self, logits: &[f64], u: f64) -> u32 {
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        // Likeliest first, lower id first on ties, so that the draw does not depend on the sort.
        order.sort_unstable_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
        if self.top_k > 0 {
            order.truncate(self.top_k);
        }
        let top = logits[order[0] as usize];
        let mut p: Vec<f64> = order.iter().map(|&t| ((logits[t as usize] - top) / self.temperature).exp()).collect();
        let sum: f64 = p.iter().sum();
        let mut reached = 0.0;
        let enough = p.iter().position(|x| {
            reached += x / sum;
            reached >= self.top_p
        });
        p.truncate(enough.map_or(p.len(), |i| i + 1));
        // p[0] is 1, so this is the share of the likeliest token.
        let kept = p.iter().take_while(|&&x| x >= self.min_p).count();
        p.truncate(kept.max(1));
        let mut rest = u * p.iter().sum::<f64>();
        for (&token, weight) in order.iter().zip(&p) {
            rest -= weight;
            if rest < 0.0 {
                return token;
            }
        }
        order[p.len() - 1]
    }
}

fn arg_max(logits: &[f64]) -> u32 {
    let mut best = 0;
    for (i, l) in logits.iter().enumerate() {
        if *l > logits[best] {
            best = i;
        }
    }
    best as u32
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
