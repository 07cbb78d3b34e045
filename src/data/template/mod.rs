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
mod date;
mod jinja;
mod names;
mod python;

use std::path::Path;

use crate::data::row::{Message, Role};
use crate::error::{Context, Error, Result};
use crate::files::{read_bytes, text_of};

pub use self::date::Date;
pub use self::names::{ControlNames, NEWLINE};

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
    /// Another special token of the vocabulary, by its id.
    Token(u32),
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

    /// Control tokens that the text of a template spells, as tokens.
    fn tokens_of_text(self, names: &ControlNames) -> Self {
        let mut out = Self::default();
        for segment in self.segments {
            let Part::Template(text) = &segment.part else {
                out.segments.push(segment);
                continue;
            };
            let mut from = 0;
            for (at, _) in text.char_indices() {
                if at >= from
                    && let Some((token, name)) = names.at(&text[at..])
                {
                    out.template(&text[from..at], segment.supervised);
                    out.control(token, segment.supervised);
                    from = at + name.len();
                }
            }
            out.template(&text[from..], segment.supervised);
        }
        out
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

/// Choices that hold for a whole run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TemplateOptions {
    /// Also train on the newline after a closing token (`chatml` and `zephyr` only).
    pub supervise_turn_newline: bool,
    /// How control tokens are written.
    pub names: ControlNames,
    /// The day that `strftime_now` tells; without one a template finds no such function.
    pub date: Option<Date>,
    /// What becomes of a Jinja template without `{% generation %}` marks.
    pub unmarked: Unmarked,
    /// The template belongs to the model: as in transformers, BOS comes only where it prints it.
    pub of_model: bool,
}

/// What is supervised by a Jinja template without `{% generation %}` marks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unmarked {
    /// Nothing: it is refused.
    #[default]
    Refuse,
    /// What each assistant turn adds to the rendering of the turns before it.
    Turns,
    /// Everything: for answering prompts, where nothing is masked.
    Whole,
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

/// What to write instead of a name of no template: a near one, but never one of another version; the model's own for its family's name.
fn meant(name: &str) -> String {
    let digits = |name: &str| -> String { name.chars().filter(char::is_ascii_digit).collect() };
    let near = |n: &&str| digits(n) == digits(name) && strsim::osa_distance(&name.to_lowercase(), n) <= 2;
    match Template::NAMES.into_iter().chain(["alpaca", "model"]).find(|n| near(n)) {
        Some(near) => format!("did you mean \"{near}\"?"),
        None => "`model` is the chat template that lies with the model".into(),
    }
}

/// A prompt template.
#[derive(Debug)]
pub struct Template {
    name: String,
    kind: Kind,
    options: TemplateOptions,
}

/// Bytes of a template at most: a file that does not end is none.
const LONGEST: u64 = 4 << 20;

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
                let file = Path::new(path);
                let source = read_bytes(file, LONGEST).and_then(|bytes| text_of(file, bytes));
                let source = source.map_err(|e| Error::new(format!("prompt template {e}")))?;
                let name = Path::new(path).file_stem().map_or(path.into(), |s| s.to_string_lossy());
                return Self::from_jinja(&name, &source, options).context(|| format!("prompt template {path}"));
            }
            _ => {
                return Err(Error::usage(format!(
                    "unknown prompt template \"{name}\", expected one of {}, alpaca, or the path of a .jinja file; {}",
                    Self::NAMES.join(", "),
                    meant(name)
                )));
            }
        };
        if options.supervise_turn_newline && !matches!(kind, Kind::ChatMl | Kind::Zephyr) {
            return Err(Error::usage(format!(
                "supervise_turn_newline has no effect with the template {name}, expected chatml or zephyr; remove it"
            )));
        }
        if options.date.is_some() {
            return Err(no_effect_of_date(name));
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
        if options.date.is_some() && !source.contains("strftime_now") {
            return Err(no_effect_of_date(name));
        }
        let kind = Kind::Jinja(Box::new(jinja::Jinja::new(source, &options)?));
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
    pub fn stop_controls(&self) -> Vec<Control> {
        let mut out = if self.needs_chatml() { vec![Control::ImEnd] } else { self.closing().into_iter().collect() };
        if !out.contains(&Control::Eos) {
            out.push(Control::Eos);
        }
        out
    }

    /// The token with which a small conversation's answer ends.
    fn closing(&self) -> Option<Control> {
        let rendered = self.probes(Purpose::Train).find(Rendered::is_supervised)?;
        let mut spoken = false;
        rendered.segments.iter().filter(|s| s.supervised).find_map(|s| match &s.part {
            Part::Control(token) => spoken.then_some(*token),
            Part::Template(text) | Part::Data(text) => {
                spoken |= !text.trim().is_empty();
                None
            }
        })
    }

    /// Special tokens of the vocabulary that the template prints besides the usual ones.
    pub fn tokens(&self) -> Vec<u32> {
        let both = self.probes(Purpose::Train).chain(self.probes(Purpose::Generate));
        let mut out: Vec<u32> = both
            .flat_map(|r| r.segments)
            .filter_map(|s| if let Part::Control(Control::Token(id)) = s.part { Some(id) } else { None })
            .collect();
        out.sort_unstable();
        out.dedup();
        out
    }

    /// Whether small conversations look the same in both templates, their masks left aside.
    pub fn prints_as(&self, other: &Self) -> bool {
        let print = |t: &Self, messages: &[Message], purpose| {
            let mut rendered = t.render(messages, purpose).ok()?;
            rendered.segments.iter_mut().for_each(|s| s.implicit = false);
            Some(rendered.text(t.names()))
        };
        let same = |m: &Vec<Message>, purpose| print(self, m, purpose) == print(other, m, purpose);
        probes().iter().all(|m| same(m, Purpose::Train) && same(m, Purpose::Generate))
    }

    /// The renderings of the small conversations that the template takes.
    fn probes(&self, purpose: Purpose) -> impl Iterator<Item = Rendered> {
        probes().into_iter().filter_map(move |m| self.render(&m, purpose).ok())
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
        let rendered = rendered.map_err(|e| e.context(format!("template {}", self.name)))?;
        Ok(match self.kind {
            // Text of the data is told from the template's while it is rendered.
            Kind::Jinja(_) => rendered,
            _ => rendered.tokens_of_text(self.names()),
        })
    }

    /// The template in Jinja, for `chat_template.jinja`: rendering and encoding it with the exported tokenizer gives
    /// the ids of training, BOS included.
    pub fn jinja_source(&self) -> String {
        let source = match &self.kind {
            Kind::ChatMl => builtin::chatml_jinja(self.options.supervise_turn_newline),
            Kind::Instruct => builtin::INSTRUCT_JINJA.to_string(),
            Kind::Llama2 => builtin::LLAMA2_JINJA.to_string(),
            Kind::Zephyr => builtin::zephyr_jinja(self.options.supervise_turn_newline),
            Kind::Plain => builtin::PLAIN_JINJA.to_string(),
            Kind::Jinja(j) => return j.source_to_save(),
        };
        if self.names().byte_newlines { source.replace("\\n", NEWLINE) } else { source }
    }

    /// Everything that decides a rendering, hashed: part of the key of cached token files.
    pub fn fingerprint(&self) -> String {
        let mut h = blake3::Hasher::new();
        let newline = [u8::from(self.options.supervise_turn_newline)];
        let (source, names) = (self.jinja_source(), self.names().parts());
        let rest = format!("{:?}", (self.options.date, self.options.unmarked, self.options.of_model));
        let parts = [self.name.as_bytes(), source.as_bytes(), &names, &newline, rest.as_bytes()];
        for part in parts {
            h.update(&(part.len() as u64).to_le_bytes());
            h.update(part);
        }
        h.finalize().to_hex().to_string()
    }
}

fn no_effect_of_date(name: &str) -> Error {
    Error::usage(format!("template_date has no effect: the template {name} does not ask for strftime_now; remove it"))
}

/// Small conversations with which a template is tried: it may refuse some of them.
fn probes() -> Vec<Vec<Message>> {
    let [system, user, assistant] =
        [(Role::System, "s"), (Role::User, "u"), (Role::Assistant, "a")].map(|(role, text)| Message::new(role, text));
    vec![
        vec![user.clone(), assistant.clone()],
        vec![system.clone(), user.clone(), assistant],
        vec![user.clone()],
        vec![system, user],
    ]
}
