//! Text generation: prompts are run once, then one token at a time against a cache; greedy or seeded sampling.

mod conversation;
mod sampling;
mod stop;
mod text;

use std::ops::ControlFlow;

use crate::backend::Backend;
use crate::error::Result;
use crate::model::Model;
use crate::model::config::ModelConfig;
use crate::model::decode::Decoder;
use crate::{bail, ensure};

pub use conversation::Conversation;
pub use sampling::Sampling;
pub use stop::StopText;
pub use text::TextStream;

/// What to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// Most new tokens of a sequence.
    pub max_new_tokens: usize,
    /// A sequence ends with any of these.
    pub stop_ids: Vec<u32>,
    /// Sequences at once.
    pub batch: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
}

/// One continuation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Generated {
    /// New tokens; the stop token, where there is one, is the last.
    pub tokens: Vec<u32>,
    /// Whether a stop token ended it, not the limit or the caller.
    pub stopped: bool,
}

/// Continues every prompt. `on_token(prompt, token, logits)` is called for each new token as it comes, with the logits it was
/// chosen from; where it breaks, that sequence ends there, with the token as its last.
///
/// The result for a prompt does not depend on the other prompts or on the batch.
///
/// # Errors
/// If a prompt is empty, holds a token the model does not have, or is too long for the model; if a logit is NaN; if the device
/// fails.
pub fn generate<B: Backend>(
    dev: &B,
    model: &Model<B>,
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
    mut on_token: impl FnMut(usize, u32, &[f32]) -> ControlFlow<()>,
) -> Result<Vec<Generated>> {
    options.sampling.check()?;
    let c = &model.config;
    prompts.iter().enumerate().try_for_each(|(i, prompt)| check_prompt(c, i, prompt, options.max_new_tokens))?;
    let mut out = vec![Generated::default(); prompts.len()];
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    if longest == 0 || options.max_new_tokens == 0 {
        return Ok(out);
    }
    let sequences = options.batch.clamp(1, prompts.len());
    let mut decoder = Decoder::new(dev, model, sequences, longest + options.max_new_tokens)?;
    decoder.prepare(dev, model, prompts.iter().map(Vec::len))?;
    // A finished sequence hands its place in the batch to the next prompt.
    let mut seats: Vec<Option<usize>> = vec![None; sequences];
    let mut next = 0;
    loop {
        for (s, seat) in seats.iter_mut().enumerate() {
            while seat.is_none() && next < prompts.len() {
                let logits = decoder.prefill(dev, model, s, &prompts[next])?;
                if accept(&logits, c, next, prompts, &mut out, options, &mut on_token)? {
                    *seat = Some(next);
                }
                next += 1;
            }
        }
        let running: Vec<(usize, usize)> = seats.iter().enumerate().filter_map(|(s, i)| Some((s, (*i)?))).collect();
        if running.is_empty() {
            return Ok(out);
        }
        let last = |i: usize| *out[i].tokens.last().expect("a running sequence has a token");
        let step: Vec<(usize, u32)> = running.iter().map(|&(s, i)| (s, last(i))).collect();
        let logits = decoder.step(dev, model, &step)?;
        for ((s, i), row) in running.into_iter().zip(logits.chunks(c.vocab_size)) {
            if !accept(row, c, i, prompts, &mut out, options, &mut on_token)? {
                seats[s] = None;
            }
        }
    }
}

fn check_prompt(c: &ModelConfig, i: usize, prompt: &[u32], new: usize) -> Result<()> {
    ensure!(!prompt.is_empty(), "prompt {i} has no token");
    ensure!(
        prompt.len() + new <= c.max_position,
        "prompt {i} has {} tokens and {new} new ones are asked for; the model's limit is {} (max_position_embeddings)",
        prompt.len(),
        c.max_position
    );
    if let Some(t) = prompt.iter().find(|&&t| t as usize >= c.vocab_size) {
        bail!("prompt {i} holds token {t}; the model has {} tokens", c.vocab_size);
    }
    Ok(())
}

/// Chooses and records the next token of prompt `i`; whether the sequence goes on.
fn accept(
    logits: &[f32],
    c: &ModelConfig,
    i: usize,
    prompts: &[Vec<u32>],
    out: &mut [Generated],
    options: &GenerateOptions,
    on_token: &mut impl FnMut(usize, u32, &[f32]) -> ControlFlow<()>,
) -> Result<bool> {
    let seen = [prompts[i].as_slice(), &out[i].tokens].concat();
    let logits = &logits[..c.n_classes];
    let token = options.sampling.choose(logits, &seen, i as u64)?;
    out[i].tokens.push(token);
    let asked = on_token(i, token, logits);
    out[i].stopped = options.stop_ids.contains(&token);
    Ok(asked.is_continue() && !out[i].stopped && out[i].tokens.len() < options.max_new_tokens)
}
