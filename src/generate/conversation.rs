//! A conversation's cache: keys and values of what was said stay for the next turn as far as it begins with the same tokens.

use std::ops::ControlFlow;

use super::{GenerateOptions, Generated, accept, check_prompt};
use crate::backend::Backend;
use crate::error::Result;
use crate::model::Model;
use crate::model::decode::Decoder;

/// Tokens that a cache has room for at first; it doubles where a conversation grows.
const FIRST_ROOM: usize = 512;

/// One sequence that is continued again and again.
pub struct Conversation<B: Backend> {
    decoder: Option<Decoder<B>>,
    /// Tokens whose keys and values are in the cache.
    held: Vec<u32>,
    computed: usize,
}

impl<B: Backend> Default for Conversation<B> {
    fn default() -> Self {
        Self { decoder: None, held: Vec::new(), computed: 0 }
    }
}

impl<B: Backend> Conversation<B> {
    /// Tokens of prompts that were computed so far: those found in the cache are not among them.
    pub fn computed(&self) -> usize {
        self.computed
    }

    /// Continues `prompt` as [`super::generate`] does for one prompt. What it begins with alike to the prompt and answer before is not
    /// computed again.
    ///
    /// # Errors
    /// As [`super::generate`].
    pub fn answer(
        &mut self,
        dev: &B,
        model: &Model<B>,
        prompt: &[u32],
        options: &GenerateOptions,
        mut on_token: impl FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generated> {
        options.sampling.check()?;
        check_prompt(&model.config, 0, prompt, options.max_new_tokens)?;
        let mut out = vec![Generated::default()];
        if options.max_new_tokens == 0 {
            return Ok(out.remove(0));
        }
        let prompts = [prompt.to_vec()];
        let mut logits = self.take_in(dev, model, prompt, prompt.len() + options.max_new_tokens)?;
        let decoder = self.decoder.as_mut().expect("it was made");
        let mut said = |_: usize, token: u32, _: &[f32]| on_token(token);
        while accept(&logits, &model.config, 0, &prompts, &mut out, options, &mut said)? {
            let token = *out[0].tokens.last().expect("one was accepted");
            // What a failed step leaves in the cache is not counted on.
            let held = std::mem::take(&mut self.held);
            logits = decoder.step(dev, model, &[(0, token)])?;
            self.held = held;
            self.held.push(token);
        }
        Ok(out.remove(0))
    }

    /// Has the cache hold `prompt`, with room for `needed` tokens; the logits of what follows.
    fn take_in(&mut self, dev: &B, model: &Model<B>, prompt: &[u32], needed: usize) -> Result<Vec<f32>> {
        let most = model.config.max_position;
        if self.decoder.as_ref().is_none_or(|decoder| decoder.capacity() < needed) {
            self.held.clear();
            self.decoder = None;
            let room = needed.max(FIRST_ROOM).next_power_of_two().min(most);
            let mut decoder = Decoder::new(dev, model, 1, room)?;
            decoder.prepare(dev, model, [prompt.len(), room].into_iter())?;
            self.decoder = Some(decoder);
        }
        let decoder = self.decoder.as_mut().expect("it was made");
        let same = self.held.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        // The logits come from the last token, so that one is computed whatever is held.
        let same = same.min(prompt.len() - 1);
        self.held.clear();
        let logits = match same {
            0 => decoder.prefill(dev, model, 0, prompt)?,
            _ => decoder.extend(dev, model, same, &prompt[same..])?,
        };
        self.computed += prompt.len() - same;
        self.held = prompt.to_vec();
        Ok(logits)
    }
}
