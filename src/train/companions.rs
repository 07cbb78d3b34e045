//! The tokenizer files that go beside weights, made from the run's tokenizer and template.

use std::path::Path;
use std::sync::Arc;

use crate::checkpoint::tokenizer_files::{SpecialToken, TokenizerFiles};
use crate::data::template::{Control, Template};
use crate::data::tokenizer::Tokenizer;
use crate::error::Result;

/// Everything the tokenizer's files are made from; shared with the thread that writes checkpoints.
#[derive(Clone)]
pub struct Companions {
    tokenizer: Arc<Tokenizer>,
    /// The template in Jinja; `None` in pretraining.
    template: Option<String>,
    chatml: bool,
    max_length: usize,
}

impl Companions {
    /// For a model of at most `max_length` tokens; `template` is `None` in pretraining.
    pub fn new(tokenizer: Arc<Tokenizer>, template: Option<&Template>, max_length: usize) -> Self {
        let chatml = template.is_some_and(Template::needs_chatml);
        Self {
            tokenizer,
            template: template.map(Template::jinja_source),
            chatml,
            max_length,
        }
    }

    /// Writes tokenizer.model, tokenizer_config.json, generation_config.json and the others into `dir`.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let t = &self.tokenizer;
        let token = |id: u32| SpecialToken {
            text: t.piece(id).unwrap_or_default().to_string(),
            id,
        };
        let ids = t.special();
        let chatml = match self.chatml {
            true => Some([token(t.control(Control::ImStart)?), token(t.control(Control::ImEnd)?)]),
            false => None,
        };
        let first_added = t.pieces().len() as u32;
        let added = (first_added..)
            .zip(t.added())
            .map(|(id, text)| SpecialToken { text: text.clone(), id });
        let files = TokenizerFiles {
            model: t.bytes(),
            bos: token(ids.bos),
            eos: token(ids.eos),
            unk: token(ids.unk),
            pad: token(ids.pad),
            chatml,
            added: added.collect(),
            add_bos: !self.chatml,
            max_length: self.max_length,
            chat_template: self.template.as_deref(),
        };
        files.write(dir)
    }
}
