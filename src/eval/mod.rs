//! Evaluation figures: summed negative log-likelihood over supervised tokens, per data set and together.

pub mod gen_test;
pub mod sets;

use serde_json::{Map, Value, json};

use crate::say;
use crate::text::{fitted, grouped, table};

/// Sums over one data set. Sums, not means: figures of parts add up to those of the whole, whatever the parts were.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SetSums {
    /// The data set.
    pub name: String,
    /// Summed negative log-likelihood in nats.
    pub nll: f64,
    /// Supervised tokens.
    pub supervised: f64,
    /// Supervised tokens whose arg max was right.
    pub correct: f64,
}

impl SetSums {
    /// Mean negative log-likelihood: eval_loss.
    pub fn loss(&self) -> f64 {
        self.nll / self.supervised
    }

    /// `exp(loss)`.
    pub fn perplexity(&self) -> f64 {
        self.loss().exp()
    }

    /// Share of right arg maxes.
    pub fn accuracy(&self) -> f64 {
        self.correct / self.supervised
    }
}

/// One evaluation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Evaluation {
    /// In the order of the data sets; those without a supervised validation token are left out.
    pub sets: Vec<SetSums>,
    /// Wall time.
    pub seconds: f64,
}

impl Evaluation {
    /// All data sets together, or `None` when nothing was evaluated.
    pub fn together(&self) -> Option<SetSums> {
        let mut all = SetSums { name: "all".into(), ..Default::default() };
        for s in &self.sets {
            all.nll += s.nll;
            all.supervised += s.supervised;
            all.correct += s.correct;
        }
        (all.supervised > 0.0).then_some(all)
    }

    /// The figures under Hugging Face's names, without times: they belong to the log history, which resuming repeats exactly.
    pub fn to_json(&self, step: u64, epoch: f64) -> Value {
        let mut v = Map::new();
        let mut put = |prefix: &str, s: &SetSums| {
            v.insert(format!("{prefix}_loss"), json!(s.loss()));
            v.insert(format!("{prefix}_perplexity"), json!(s.perplexity()));
            v.insert(format!("{prefix}_mean_token_accuracy"), json!(s.accuracy()));
            v.insert(format!("{prefix}_num_tokens"), json!(s.supervised as u64));
        };
        if let Some(all) = self.together() {
            put("eval", &all);
        }
        if self.sets.len() > 1 {
            self.sets.iter().for_each(|s| put(&format!("eval_{}", s.name), s));
        }
        v.insert("epoch".into(), json!(epoch));
        v.insert("step".into(), json!(step));
        Value::Object(v)
    }

    /// A line for all data, and a table of the data sets where there are several.
    pub fn text(&self, step: u64, max_steps: u64) -> String {
        let Some(all) = self.together() else {
            return "eval: no supervised validation token".into();
        };
        let digits = max_steps.to_string().len();
        let parts = [
            (0, format!("eval {step:>digits$}/{max_steps}")),
            (0, format!("loss {:>7.4}", all.loss())),
            (1, format!("ppl {:.2}", all.perplexity())),
            (2, format!("acc {:.1}%", 100.0 * all.accuracy())),
            (3, format!("{} tokens", grouped(all.supervised as u64))),
            (4, format!("{:.1} s", self.seconds)),
        ];
        let mut out = fitted(&parts, say::width());
        if self.sets.len() > 1 {
            let mut rows = vec![["data set", "loss", "ppl", "acc", "tokens"].map(String::from).to_vec()];
            rows.extend(self.sets.iter().map(|s| {
                vec![
                    s.name.clone(),
                    format!("{:.4}", s.loss()),
                    format!("{:.2}", s.perplexity()),
                    format!("{:.1}%", 100.0 * s.accuracy()),
                    grouped(s.supervised as u64),
                ]
            }));
            out.push('\n');
            out.push_str(table(&rows).trim_end());
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sums(name: &str, nll: f64, supervised: f64, correct: f64) -> SetSums {
        SetSums { name: name.into(), nll, supervised, correct }
    }

    #[test]
    fn the_whole_is_weighted_by_tokens() {
        let e = Evaluation { sets: vec![sums("a", 30.0, 10.0, 5.0), sums("b", 10.0, 30.0, 30.0)], seconds: 1.0 };
        let all = e.together().unwrap();
        assert_eq!((all.loss(), all.accuracy()), (1.0, 0.875));
        let v = e.to_json(7, 0.5);
        assert_eq!(v["eval_loss"], 1.0);
        assert_eq!(v["eval_a_loss"], 3.0);
        assert_eq!(v["eval_b_mean_token_accuracy"], 1.0);
        let text = e.text(7, 20);
        let first = "eval  7/20 | loss  1.0000 | ppl 2.72 | acc 87.5% | 40 tokens | 1.0 s\n  data set    loss";
        assert!(text.starts_with(first), "{text}");
    }

    #[test]
    fn nothing_and_nan_are_said() {
        assert!(Evaluation::default().together().is_none());
        assert!(Evaluation::default().text(1, 2).contains("no supervised"));
        let e = Evaluation { sets: vec![sums("a", f64::NAN, 10.0, 5.0)], seconds: 0.0 };
        assert!(e.text(1, 2).contains("loss     NaN"), "{}", e.text(1, 2));
        assert!(e.to_json(1, 0.1)["eval_loss"].is_null());
    }
}
