//! The generation test: held-out prompts answered greedily and by seeded sampling, and figures over the answers.

use std::fmt::Write as _;
use std::ops::ControlFlow;

use serde_json::{Value, json};

use crate::backend::Backend;
use crate::data::encode::{encode_prompt, stop_ids};
use crate::data::jsonl::RowOptions;
use crate::data::row::Row;
use crate::data::rows::piece_rows;
use crate::data::template::Template;
use crate::data::tokenizer::{Specials, Tokenizer};
use crate::data::train_set::PieceSet;
use crate::error::Result;
use crate::generate::{GenerateOptions, Generated, Sampling, generate};
use crate::model::Model;
use crate::say::visible;
use crate::settings::GenTest;
use crate::text::table;

/// What [`GenReport::to_json`] gives, in the folder of a run.
pub const SAMPLES: &str = "samples.json";

/// The first held-out rows of each data set in turn, `n` in all.
///
/// # Errors
/// If a source cannot be read.
pub fn held_out_rows(sets: &[PieceSet], n: usize, options: &RowOptions) -> Result<Vec<Row>> {
    let mut queues = Vec::new();
    for set in sets {
        let pieces: Vec<usize> = (0..set.pieces.len().min(n)).collect();
        queues.push(piece_rows(set, &pieces, options)?.into_iter());
    }
    let mut rows = Vec::new();
    while rows.len() < n {
        let before = rows.len();
        rows.extend(queues.iter_mut().filter_map(Iterator::next).take(n - before));
        if rows.len() == before {
            break;
        }
    }
    Ok(rows)
}

/// What the generation test needs besides the model.
pub struct GenRun<'a> {
    /// The run's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The run's template: prompts end with its header of the assistant's turn.
    pub template: &'a Template,
    /// How much, how long, how warm.
    pub test: &'a GenTest,
    /// Seed of the draws.
    pub seed: u64,
    /// Prompts at once; changes speed only.
    pub batch: usize,
    /// Called with every token.
    pub moved: &'a dyn Fn(),
}

/// A prompt with its answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answered {
    /// The last user turn.
    pub prompt: String,
    /// The answer of the data.
    pub reference: String,
    /// The likeliest tokens.
    pub greedy: String,
    /// Drawn ones.
    pub sampled: String,
}

/// What a generation test found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenReport {
    /// Prompts with their answers; those that leave no room for an answer are left out.
    pub answers: Vec<Answered>,
    /// Prompts left out.
    pub too_long: usize,
    /// Figures over the greedy answers.
    pub greedy: GenStats,
    /// Figures over the sampled answers.
    pub sampled: GenStats,
}

/// Answers prompts greedily and by seeded sampling.
///
/// # Errors
/// If a prompt cannot be rendered or the device fails.
pub fn generation_test<B: Backend>(dev: &B, model: &Model<B>, run: &GenRun, rows: &[Row]) -> Result<GenReport> {
    let stops = stop_ids(run.tokenizer, run.template)?;
    // A prompt that leaves no room for an answer tells nothing.
    let room = model.config.max_position.saturating_sub(run.test.max_new_tokens);
    let mut kept = Vec::new();
    for row in rows {
        let ids = encode_prompt(run.tokenizer, run.template, row.context())?;
        if (1..=room).contains(&ids.len()) {
            kept.push((row, ids));
        }
    }
    let prompts: Vec<Vec<u32>> = kept.iter().map(|(_, ids)| ids.clone()).collect();
    let answer = |temperature: f64, top_p: f64| {
        let options = GenerateOptions {
            max_new_tokens: run.test.max_new_tokens,
            stop_ids: stops.clone(),
            batch: run.batch,
            sampling: Sampling { temperature, top_p, seed: run.seed, ..Default::default() },
        };
        generate(dev, model, &prompts, &options, |_, _, _| {
            (run.moved)();
            ControlFlow::Continue(())
        })
    };
    let greedy = answer(0.0, 1.0)?;
    let sampled = answer(f64::from(run.test.temperature), f64::from(run.test.top_p))?;
    let text = |g: &Generated| run.tokenizer.decode(body(g), Specials::Show);
    let stats = |all: &[Generated]| GenStats::of(all, |id| run.tokenizer.is_control(id));
    Ok(GenReport {
        too_long: rows.len() - kept.len(),
        greedy: stats(&greedy),
        sampled: stats(&sampled),
        answers: kept
            .iter()
            .zip(greedy.iter().zip(&sampled))
            .map(|((row, _), (g, s))| Answered {
                prompt: row.prompt().to_string(),
                reference: row.response().to_string(),
                greedy: text(g),
                sampled: text(s),
            })
            .collect(),
    })
}

/// The tokens of an answer without the stop token.
fn body(g: &Generated) -> &[u32] {
    &g.tokens[..g.tokens.len() - usize::from(g.stopped)]
}

impl GenReport {
    /// Prompt, reference and both outputs of each, then how many answers stopped by themselves, how long they are, and whether
    /// control tokens leak into their text.
    pub fn text(&self, max_new_tokens: usize) -> String {
        if self.answers.is_empty() && self.too_long == 0 {
            return "generation test: no prompt is held out, or the rows behind a token file are gone\n".into();
        }
        if self.answers.is_empty() {
            return format!("generation test: no prompt leaves room for {max_new_tokens} new tokens\n");
        }
        let mut out = format!("generation test on {} held-out prompts\n", self.answers.len());
        for a in &self.answers {
            for (name, text) in [
                ("\nprompt:   ", &a.prompt),
                ("reference:", &a.reference),
                ("greedy:   ", &a.greedy),
                ("sampled:  ", &a.sampled),
            ] {
                let _ = writeln!(out, "{name} {}", indent(text));
            }
        }
        let header = ["", "stopped", "mean tokens", "longest", "control tokens leaked"].map(String::from).to_vec();
        let line = |name: &str, s: &GenStats| {
            vec![
                name.to_string(),
                format!("{:.0}%", 100.0 * s.stop_rate()),
                format!("{:.1}", s.mean_tokens()),
                s.longest.to_string(),
                s.leaked.to_string(),
            ]
        };
        let rows = [header, line("greedy", &self.greedy), line("sampled", &self.sampled)];
        let _ = write!(out, "\n{}", table(&rows));
        out
    }

    /// The same for programs.
    pub fn to_json(&self) -> Value {
        let samples: Vec<Value> = self
            .answers
            .iter()
            .map(|a| json!({"prompt": a.prompt, "reference": a.reference, "greedy": a.greedy, "sampled": a.sampled}))
            .collect();
        let stats = |s: &GenStats| {
            json!({"stop_rate": s.stop_rate(), "mean_tokens": s.mean_tokens(), "longest": s.longest,
                   "control_tokens_leaked": s.leaked})
        };
        json!({"greedy": stats(&self.greedy), "sampled": stats(&self.sampled), "prompts_too_long": self.too_long,
               "samples": samples})
    }
}

/// Figures over some answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GenStats {
    /// Answers.
    pub answers: usize,
    /// Answers ended by a stop token.
    pub stopped: usize,
    /// New tokens, stop tokens left out.
    pub tokens: usize,
    /// Longest answer.
    pub longest: usize,
    /// Answers with a control token in their text.
    pub leaked: usize,
}

impl GenStats {
    fn of(all: &[Generated], is_control: impl Fn(u32) -> bool) -> Self {
        let mut stats = Self { answers: all.len(), ..Self::default() };
        for g in all {
            let body = body(g);
            stats.stopped += usize::from(g.stopped);
            stats.tokens += body.len();
            stats.longest = stats.longest.max(body.len());
            stats.leaked += usize::from(body.iter().any(|&id| is_control(id)));
        }
        stats
    }

    /// Share of answers ended by a stop token.
    pub fn stop_rate(&self) -> f64 {
        self.stopped as f64 / self.answers.max(1) as f64
    }

    /// Mean length without stop tokens.
    pub fn mean_tokens(&self) -> f64 {
        self.tokens as f64 / self.answers.max(1) as f64
    }
}

/// Further lines below the first one.
fn indent(text: &str) -> String {
    visible(text.trim()).replace('\n', "\n           ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stops_lengths_and_leaks_are_counted() {
        let g = |tokens: &[u32], stopped| Generated { tokens: tokens.to_vec(), stopped };
        let all = [g(&[9, 9, 3], true), g(&[9, 4, 9, 9], false), g(&[3], true)];
        let stats = GenStats::of(&all, |id| id == 3 || id == 4);
        assert_eq!(stats, GenStats { answers: 3, stopped: 2, tokens: 6, longest: 4, leaked: 1 });
        assert_eq!(stats.mean_tokens(), 2.0);
        assert_eq!(GenStats::default().stop_rate(), 0.0);
    }
}
