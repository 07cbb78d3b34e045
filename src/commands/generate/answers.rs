//! The answers in the making: tokens to text, stop texts, and printing in the order of the prompts.

use std::io::{self, Write};
use std::ops::ControlFlow;

use serde_json::json;

use super::flags::GenerateArgs;
use super::show;
use crate::data::tokenizer::Tokenizer;
use crate::generate::{StopText, TextStream};
use crate::say::{self, Out, visible};

/// What is said of an answer without text.
pub(super) const EMPTY: &str = "(the model ended its answer at once; a model that was not tuned with this template often does: see --prompt-template, --raw)";

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    /// A stop token.
    Token,
    /// A stop text.
    Text,
    /// As many tokens as were asked for.
    Length,
}

impl Reason {
    fn name(self) -> &'static str {
        match self {
            Reason::Token => "stop_token",
            Reason::Text => "stop_text",
            Reason::Length => "length",
        }
    }
}

/// One answer so far.
pub(super) struct Answer<'a> {
    stream: TextStream<'a>,
    stop: StopText,
    text: String,
    ids: Vec<u32>,
    /// For each new token, the likeliest ones and their log probabilities.
    logprobs: Vec<serde_json::Value>,
    ended: Option<Reason>,
}

impl<'a> Answer<'a> {
    pub fn new(tokenizer: &'a Tokenizer, stop_texts: &[String]) -> Self {
        Self {
            stream: TextStream::new(tokenizer),
            stop: StopText::new(stop_texts),
            text: String::new(),
            ids: Vec::new(),
            logprobs: Vec::new(),
            ended: None,
        }
    }

    /// Takes the next token; the text that may be shown now.
    pub fn push(&mut self, token: u32, stop_ids: &[u32], most: usize) -> String {
        self.ids.push(token);
        let mut new = String::new();
        if stop_ids.contains(&token) {
            self.ended = Some(Reason::Token);
        } else {
            new = self.stop.push(&self.stream.push(token));
            if self.stop.found() {
                self.ended = Some(Reason::Text);
            } else if self.ids.len() >= most {
                self.ended = Some(Reason::Length);
            }
        }
        if matches!(self.ended, Some(Reason::Token | Reason::Length)) {
            new += &self.stop.push(&self.stream.finish());
            if self.stop.found() {
                self.ended = Some(Reason::Text);
            }
            new += &self.stop.finish();
        }
        self.text += &new;
        new
    }

    pub fn ended(&self) -> bool {
        self.ended.is_some()
    }

    pub fn into_text(self) -> String {
        self.text
    }
}

/// The answers to some prompts.
pub(super) struct Answers<'a> {
    prompts: &'a [String],
    prompt_ids: &'a [Vec<u32>],
    args: &'a GenerateArgs,
    stop_ids: &'a [u32],
    most: usize,
    answers: Vec<Answer<'a>>,
    /// Answers printed whole.
    printed: usize,
}

impl<'a> Answers<'a> {
    /// None begun; each of at most `most` tokens.
    pub fn new(
        tokenizer: &'a Tokenizer,
        prompts: &'a [String],
        prompt_ids: &'a [Vec<u32>],
        args: &'a GenerateArgs,
        stop_ids: &'a [u32],
        stop_texts: &[String],
        most: usize,
    ) -> Self {
        Self {
            prompts,
            prompt_ids,
            args,
            stop_ids,
            most,
            answers: prompts.iter().map(|_| Answer::new(tokenizer, stop_texts)).collect(),
            printed: 0,
        }
    }

    /// Takes the next token of answer `i` and prints what can be printed; whether the answer goes on.
    pub fn push(&mut self, i: usize, token: u32, logits: &[f32], out: &mut Out) -> io::Result<ControlFlow<()>> {
        if self.args.logprobs > 0 {
            let top = top_logprobs(logits, self.args.logprobs);
            self.answers[i].logprobs.push(json!(top));
        }
        let new = self.answers[i].push(token, self.stop_ids, self.most);
        if self.prompts.len() == 1 && !self.args.json {
            show(out, &new)?;
        }
        if !self.answers[i].ended() {
            return Ok(ControlFlow::Continue(()));
        }
        // Later prompts may end first; they wait for their turn.
        while self.printed < self.answers.len() && self.answers[self.printed].ended() {
            self.print(self.printed, out)?;
            self.printed += 1;
        }
        Ok(ControlFlow::Break(()))
    }

    fn print(&self, i: usize, out: &mut Out) -> io::Result<()> {
        let answer = &self.answers[i];
        if self.args.json {
            let mut line = json!({
                "prompt": self.prompts[i],
                "text": answer.text,
                "finish_reason": answer.ended.map(Reason::name),
                "prompt_tokens": self.prompt_ids[i].len(),
                "new_tokens": answer.ids.len(),
                "prompt_ids": self.prompt_ids[i],
                "ids": answer.ids,
            });
            if self.args.logprobs > 0 {
                line["logprobs"] = json!(answer.logprobs);
            }
            writeln!(out, "{line}")?;
        } else if self.prompts.len() == 1 {
            writeln!(out)?;
        } else {
            let gap = if i == 0 { "" } else { "\n" };
            writeln!(out, "{gap}prompt: {}\n{}", visible(&self.prompts[i]), visible(&answer.text))?;
        }
        out.flush()?;
        if !self.args.json && answer.text.trim().is_empty() {
            say::remark(EMPTY);
        }
        Ok(())
    }
}

/// The `n` likeliest tokens with the logarithm of their probabilities, before any filter; lower ids first on ties.
fn top_logprobs(logits: &[f32], n: usize) -> Vec<(u32, f64)> {
    let top = logits.iter().fold(f32::NEG_INFINITY, |m, &l| m.max(l));
    let sum: f64 = logits.iter().map(|&l| f64::from(l - top).exp()).sum();
    let lse = f64::from(top) + sum.ln();
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
    order.truncate(n);
    order.into_iter().map(|id| (id, f64::from(logits[id as usize]) - lse)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probabilities_sum_to_one() {
        let found = top_logprobs(&[1.0, 3.0, 3.0, -2.0], 3);
        assert_eq!(found.iter().map(|f| f.0).collect::<Vec<_>>(), [1, 2, 0]);
        let all: f64 = top_logprobs(&[1.0, 3.0, 3.0, -2.0], 9).iter().map(|f| f.1.exp()).sum();
        assert!((all - 1.0).abs() < 1e-12);
        assert!((found[0].1 - found[2].1 - 2.0).abs() < 1e-12);
    }
}
