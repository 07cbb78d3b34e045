//! Prompt templates: conversations to segments of text and control tokens, each with its loss mask.
//!
//! A template never makes a string that is searched afterwards. It yields [`Segment`]s: text of the template, text of the
//! data, and control tokens that are inserted by id. Each segment says whether it is supervised. So a literal
//! `<|im_end|>` in the data is text, whatever it looks like.
//!
//! Supervised is what the assistant says and the token that closes its turn. Where the forms leave something open:
//!
//! * `instruct` (alias `alpaca`): a system turn replaces the sentence "Below is an instruction …"; later turns follow the
//!   closing token as `\n\n### Instruction:\n…\n\n### Response:\n…`.
//! * `llama2`: turns must alternate user, assistant; contents are stripped; each user turn opens with BOS, as in Meta's form.
//! * `plain`: turns one after the other as they are, a line end after a system turn, EOS after each response.
//! * BOS comes first, once, in every template but ChatML. Only `llama2` has it in its text; elsewhere it is
//!   [`Segment::implicit`]: in the ids and in [`Template::jinja_source`], not in [`Rendered::text`].
//! * `zephyr` and ChatML close a turn with a newline that is supervised only with
//!   [`TemplateOptions::supervise_turn_newline`].

mod builtin;
pub mod cases;
mod jinja;

use std::path::Path;

use crate::data::row::Message;
use crate::error::{Context, Error, Result};

/// Tokens that steer a conversation; inserted by id, never read from text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Control {
    /// Begin of sequence.
    Bos,
    /// End of sequence.
    Eos,
    /// `<|im_start|>` of ChatML.
    ImStart,
    /// `<|im_end|>` of ChatML.
    ImEnd,
}

/// `<|im_start|>` as text.
pub const IM_START: &str = "<|im_start|>";
/// `<|im_end|>` as text.
pub const IM_END: &str = "<|im_end|>";

/// What a segment holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Text of the template; its newlines are inserted by id with tokenizers that lose them.
    Template(String),
    /// Text of the data: untrusted.
    Data(String),
    /// A control token.
    Control(Control),
}

/// A stretch of a rendering that is wholly supervised or wholly not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// What it holds.
    pub part: Part,
    /// Whether its tokens carry loss.
    pub supervised: bool,
    /// In the ids but not in the text: the BOS that a tokenizer adds.
    pub implicit: bool,
}

/// A rendered conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rendered {
    /// In order.
    pub segments: Vec<Segment>,
}

impl Rendered {
    fn push(&mut self, part: Part, supervised: bool) {
        self.segments.push(Segment { part, supervised, implicit: false });
    }

    fn template(&mut self, text: &str, supervised: bool) {
        if !text.is_empty() {
            self.push(Part::Template(text.to_string()), supervised);
        }
    }

    fn data(&mut self, text: &str, supervised: bool) {
        if !text.is_empty() {
            self.push(Part::Data(text.to_string()), supervised);
        }
    }

    fn control(&mut self, token: Control, supervised: bool) {
        self.push(Part::Control(token), supervised);
    }

    fn implicit_bos(&mut self) {
        self.segments.push(Segment { part: Part::Control(Control::Bos), supervised: false, implicit: true });
    }

    /// The rendering as a chat template would print it, and the byte spans `[start, end)` of what is supervised.
    pub fn text_and_spans(&self, names: &ControlNames) -> (String, Vec<[usize; 2]>) {
        let mut text = String::new();
        let mut spans: Vec<[usize; 2]> = Vec::new();
        for segment in self.segments.iter().filter(|s| !s.implicit) {
            let start = text.len();
            match &segment.part {
                Part::Template(t) | Part::Data(t) => text.push_str(t),
                Part::Control(c) => text.push_str(names.of(*c)),
            }
            if segment.supervised && text.len() > start {
                match spans.last_mut() {
                    Some(last) if last[1] == start => last[1] = text.len(),
                    _ => spans.push([start, text.len()]),
                }
            }
        }
        (text, spans)
    }

    /// The rendering as text, implicit tokens left out.
    pub fn text(&self, names: &ControlNames) -> String {
        self.text_and_spans(names).0
    }

    /// Whether anything carries loss.
    pub fn is_supervised(&self) -> bool {
        self.segments.iter().any(|s| s.supervised)
    }
}

/// How BOS and EOS are written in text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlNames {
    /// `bos_token` of a chat template.
    pub bos: String,
    /// `eos_token` of a chat template.
    pub eos: String,
}

impl Default for ControlNames {
    fn default() -> Self {
        Self { bos: "<s>".to_string(), eos: "</s>".to_string() }
    }
}

impl ControlNames {
    /// The text of a control token.
    pub fn of(&self, token: Control) -> &str {
        match token {
            Control::Bos => &self.bos,
            Control::Eos => &self.eos,
            Control::ImStart => IM_START,
            Control::ImEnd => IM_END,
        }
    }
}

/// Choices that hold for a whole run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TemplateOptions {
    /// Also train on the newline after a closing token (`chatml` and `zephyr` only).
    pub supervise_turn_newline: bool,
    /// How BOS and EOS are written.
    pub names: ControlNames,
}

/// What a rendering is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The whole conversation.
    Train,
    /// The conversation and the header after which the assistant speaks.
    Generate,
}

#[derive(Debug)]
enum Kind {
    ChatMl,
    Instruct,
    Llama2,
    Zephyr,
    Plain,
    Jinja(Box<jinja::Jinja>),
}

/// A prompt template.
#[derive(Debug)]
pub struct Template {
    name: String,
    kind: Kind,
    options: TemplateOptions,
}

impl Template {
    /// The built-in templates by name, aliases left out.
    pub const NAMES: [&'static str; 5] = ["chatml", "instruct", "llama2", "zephyr", "plain"];

    /// A built-in template by name, or a Jinja file by path (anything with a `.` or a `/`).
    ///
    /// # Errors
    /// A usage error if the name is unknown or an option has no effect; an error if the file cannot be read or parsed.
    pub fn load(name: &str, options: TemplateOptions) -> Result<Self> {
        let kind = match name {
            "chatml" => Kind::ChatMl,
            "instruct" | "alpaca" => Kind::Instruct,
            "llama2" => Kind::Llama2,
            "zephyr" => Kind::Zephyr,
            "plain" => Kind::Plain,
            path if path.contains(['.', '/']) => {
                let source = std::fs::read(path).context(|| format!("prompt template {path}"))?;
                let source = String::from_utf8(source).map_err(|e| {
                    Error::new(format!("prompt template {path}: expected UTF-8 text, found {}", e.utf8_error()))
                })?;
                let name = Path::new(path).file_stem().map_or(path.into(), |s| s.to_string_lossy());
                return Self::from_jinja(&name, &source, options).context(|| format!("prompt template {path}"));
            }
            _ => {
                let near = Self::NAMES
                    .into_iter()
                    .max_by(|a, b| strsim::jaro_winkler(name, a).total_cmp(&strsim::jaro_winkler(name, b)))
                    .expect("there are templates");
                return Err(Error::usage(format!(
                    "unknown prompt template \"{name}\", expected one of {}, alpaca, or the path of a .jinja file; did you mean \"{near}\"?",
                    Self::NAMES.join(", ")
                )));
            }
        };
        if options.supervise_turn_newline && !matches!(kind, Kind::ChatMl | Kind::Zephyr) {
            return Err(Error::usage(format!(
                "supervise_turn_newline has no effect with the template {name}, expected chatml or zephyr; remove it"
            )));
        }
        let name = if name == "alpaca" { "instruct" } else { name };
        Ok(Self { name: name.to_string(), kind, options })
    }

    /// A template from Jinja source with `{% generation %}` … `{% endgeneration %}` around what is supervised.
    ///
    /// # Errors
    /// If the source does not parse, has no generation marks, or an option has no effect.
    pub fn from_jinja(name: &str, source: &str, options: TemplateOptions) -> Result<Self> {
        if options.supervise_turn_newline {
            return Err(Error::usage(
                "supervise_turn_newline has no effect with a Jinja template; move {% endgeneration %} behind the newline",
            ));
        }
        let kind = Kind::Jinja(Box::new(jinja::Jinja::new(source, &options.names)?));
        Ok(Self { name: name.to_string(), kind, options })
    }

    /// The name; `instruct` for its alias.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How BOS and EOS are written in text.
    pub fn names(&self) -> &ControlNames {
        &self.options.names
    }

    /// Whether the tokenizer needs `<|im_start|>` and `<|im_end|>`.
    pub fn needs_chatml(&self) -> bool {
        match &self.kind {
            Kind::ChatMl => true,
            Kind::Jinja(j) => j.uses_chatml(),
            _ => false,
        }
    }

    /// The tokens that end a response: the closing token first.
    pub fn stop_controls(&self) -> &'static [Control] {
        if self.needs_chatml() { &[Control::ImEnd, Control::Eos] } else { &[Control::Eos] }
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// If the template refuses the conversation (roles out of order, a `raise_exception` of a Jinja template).
    pub fn render(&self, messages: &[Message], purpose: Purpose) -> Result<Rendered> {
        let newline = self.options.supervise_turn_newline;
        let rendered = match &self.kind {
            Kind::ChatMl => Ok(builtin::chatml(messages, purpose, newline)),
            Kind::Instruct => builtin::instruct(messages),
            Kind::Llama2 => builtin::llama2(messages),
            Kind::Zephyr => Ok(builtin::zephyr(messages, purpose, newline)),
            Kind::Plain => builtin::plain(messages),
            Kind::Jinja(j) => j.render(messages, purpose),
        };
        rendered.map_err(|e| e.context(format!("template {}", self.name)))
    }

    /// The template in Jinja, for `chat_template.jinja`: rendering and encoding it with the exported tokenizer gives
    /// the ids of training, BOS included.
    pub fn jinja_source(&self) -> String {
        match &self.kind {
            Kind::ChatMl => builtin::chatml_jinja(self.options.supervise_turn_newline),
            Kind::Instruct => builtin::INSTRUCT_JINJA.to_string(),
            Kind::Llama2 => builtin::LLAMA2_JINJA.to_string(),
            Kind::Zephyr => builtin::zephyr_jinja(self.options.supervise_turn_newline),
            Kind::Plain => builtin::PLAIN_JINJA.to_string(),
            Kind::Jinja(j) => j.source_with_bos(),
        }
    }

    /// Everything that decides a rendering, hashed: part of the key of cached token files.
    pub fn fingerprint(&self) -> String {
        let mut h = blake3::Hasher::new();
        let newline = [u8::from(self.options.supervise_turn_newline)];
        let names = &self.options.names;
        let source = self.jinja_source();
        let parts = [self.name.as_bytes(), source.as_bytes(), names.bos.as_bytes(), names.eos.as_bytes(), &newline];
        for part in parts {
            h.update(&(part.len() as u64).to_le_bytes());
            h.update(part);
        }
        h.finalize().to_hex().to_string()
    }
}
