//! The tokenizer files that go beside weights, made from the run's tokenizer and template.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use crate::data::encode::stop_ids;
use crate::data::template::{Control, NEWLINE, Template};
use crate::data::tokenizer::{Format, Newline, Tokenizer, with_control_tokens};
use crate::error::Result;
use crate::files::write_bytes;
use crate::hf::tokenizer_files::{SpecialToken, TokenizerFiles, Vocabulary};
use crate::hf::tokenizer_json::{ControlToken, tokenizer_json};
use crate::model::config::Architecture;
use crate::say;

/// Everything the tokenizer's files are made from; shared with the thread that writes checkpoints.
#[derive(Clone)]
pub struct Companions {
    tokenizer: Arc<Tokenizer>,
    /// The template in Jinja; `None` in pretraining.
    template: Option<String>,
    chatml: bool,
    /// Ids besides EOS that end an answer.
    stops: Vec<u32>,
    max_length: usize,
    architecture: Option<Architecture>,
    /// `tokenizer.json`, made at the first write; `None` in it: the model has no counterpart in that format.
    exported: Arc<OnceLock<Option<Vec<u8>>>>,
}

impl Companions {
    /// For a model of at most `max_length` tokens; `template` is `None` in pretraining.
    pub fn new(tokenizer: Arc<Tokenizer>, template: Option<&Template>, max_length: usize) -> Self {
        let chatml = template.is_some_and(Template::needs_chatml);
        // A tokenizer without ChatML's tokens has no way to end with them.
        let stops = template.and_then(|t| stop_ids(&tokenizer, t).ok());
        let stops = stops.unwrap_or_else(|| tokenizer.more_stops().to_vec());
        let template = template.map(Template::jinja_source);
        Self { tokenizer, template, chatml, stops, max_length, architecture: None, exported: Arc::default() }
    }

    /// For a model of this family.
    #[must_use]
    pub fn of(self, architecture: Architecture) -> Self {
        Self { architecture: Some(architecture), ..self }
    }

    /// Writes tokenizer.model, tokenizer.json, tokenizer_config.json, generation_config.json and the others into `dir`.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let t = &self.tokenizer;
        let token = |id: u32| SpecialToken { text: t.piece(id).unwrap_or_default().to_string(), id };
        let ids = t.special();
        let chatml = match self.chatml {
            true => Some([token(t.control(Control::ImStart)?), token(t.control(Control::ImEnd)?)]),
            false => None,
        };
        let first_added = t.pieces().len() as u32;
        let added = (first_added..).zip(t.added()).map(|(id, text)| SpecialToken { text: text.clone(), id });
        let mut files = TokenizerFiles {
            vocabulary: match t.format() {
                Format::SentencePiece => Vocabulary::SentencePiece(t.bytes()),
                Format::Json => Vocabulary::Json(t.config()),
            },
            bos: ids.bos.map(token),
            eos: token(ids.eos),
            unk: ids.unk.map(token),
            pad: ids.pad.map(token),
            more_stops: self.stops.clone(),
            chatml,
            added: added.collect(),
            add_bos: !self.chatml,
            with_json: true,
            class_by_model: self.architecture == Some(Architecture::Qwen2),
            max_length: self.max_length,
            chat_template: self.template.as_deref(),
        };
        let export = || {
            let template = files.chatml.iter().flatten().cloned().chain(t.reserved().iter().map(|&id| token(id)));
            let control = template.chain(files.added.iter().cloned());
            let made = match t.format() {
                Format::SentencePiece => {
                    let newline = match (t.newline(), &self.template) {
                        (Newline::Lost(id), Some(source)) if source.contains(NEWLINE) => Some(token(id)),
                        _ => None,
                    };
                    let control = control.chain(newline).map(|t| ControlToken { text: t.text, id: t.id });
                    let control: Vec<ControlToken> = control.collect();
                    tokenizer_json(t.bytes(), &control).map(|v| v.to_string().into_bytes())
                }
                Format::Json => {
                    let ends = [files.bos.as_ref(), Some(&files.eos)].into_iter().flatten().cloned();
                    let tokens: Vec<(String, u32)> = ends.chain(control).map(|t| (t.text, t.id)).collect();
                    with_control_tokens(t.name(), t.bytes(), &tokens)
                }
            };
            match made {
                Ok(bytes) => Some(bytes),
                Err(e) => {
                    say::warning(&format!("no tokenizer.json is written: {e}"));
                    None
                }
            }
        };
        let exported = self.exported.get_or_init(export);
        files.with_json = exported.is_some();
        files.write(dir)?;
        match exported {
            Some(bytes) => write_bytes(&dir.join("tokenizer.json"), bytes),
            None => Ok(()),
        }
    }
}
