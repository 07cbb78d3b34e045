//! Tokenizers, SentencePiece models and `tokenizer.json` files, checked before use: special ids, bytes, newlines, ChatML tokens.
//!
//! How text becomes ids:
//!
//! * [`Tokenizer::encode_raw`] is the library's own `encode`.
//! * [`Tokenizer::encode`] never yields a control token. A vocabulary may hold `<|im_end|>` as a symbol that the library
//!   matches anywhere in text; where that happens the text is cut inside the symbol and both parts are encoded apart, so the
//!   ids spell the symbol as plain text.
//! * A stretch between two control tokens is encoded on its own, so the model's dummy prefix `▁` comes at its start, as
//!   in transformers. A `tokenizer.json` may say that it comes once, before the first stretch ([`Tokenizer::prefix_once`]).
//!   See `encode.rs` for stretches that are supervised in part.
//! * A model that loses newlines (SentencePiece's default normaliser does) gets those of the template as the
//!   `<0x0A>` id; [`Tokenizer::warnings`] says that newlines in the data are lost. Where a `tokenizer.json` has no such piece,
//!   the newlines of the template are encoded with the text around them ([`Newline::Text`]).

mod added;
mod hf_special;
mod hugging_face;
mod notes;
mod open;
mod sentencepiece;
mod special;

use std::collections::HashMap;
use std::fmt;

use sentencepiece_model::ModelType;
pub use sentencepiece_model::Type;
use serde_json::Value;

use self::hugging_face::HuggingFace;
use self::sentencepiece::SentencePiece;
use crate::bail;
use crate::data::template::{Control, ControlNames, IM_END, IM_START, NEWLINE};
use crate::error::{Error, Result};

pub use self::added::named_tokens;
pub use self::hugging_face::with_control_tokens;
pub use self::special::{SpecialIds, SpecialTokens};

/// Whether control tokens are printed by [`Tokenizer::decode`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Specials {
    /// Printed by name.
    Show,
    /// Left out.
    Skip,
}

/// How the model treats newlines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Newline {
    /// `encode("\n")` holds this id, which decodes to a newline.
    Kept(u32),
    /// `encode("\n")` loses it; this is the `<0x0A>` id that stands for it in templates.
    Lost(u32),
    /// `encode("\n")` loses or changes it, and no piece is spelled `<0x0A>`, which a saved template could print (a byte-level
    /// vocabulary behind a normaliser that strips): newlines of templates go the way of all text, as in transformers.
    /// The id is that of the byte.
    Text(u32),
    /// No id stands for a newline.
    Missing,
}

impl fmt::Display for Newline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Newline::Kept(id) => write!(f, "kept as id {id}"),
            Newline::Lost(id) => write!(f, "lost in text; <0x0A> (id {id}) stands for those of the template"),
            Newline::Text(_) => f.write_str("lost or changed in text and templates, as its tokenizer.json says"),
            Newline::Missing => f.write_str("cannot be encoded"),
        }
    }
}

/// One piece of the vocabulary.
#[derive(Clone, Debug, PartialEq)]
pub struct VocabPiece {
    /// As in the model, `▁` for a blank.
    pub text: String,
    /// Log probability or merge rank.
    pub score: f32,
    /// Its kind.
    pub kind: Type,
}

/// A token and where it starts in the text it was made from (bytes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    /// Id.
    pub id: u32,
    /// First byte of its text; several tokens may share one (byte fallback).
    pub begin: usize,
    /// One past its last byte.
    pub end: usize,
}

/// What a file says about its tokenizer.
struct Opened {
    pieces: Vec<VocabPiece>,
    model_type: ModelType,
    special: SpecialTokens,
    byte_ids: Option<Vec<u32>>,
    /// Bytes without a token, of a vocabulary that spells text in bytes.
    missing_bytes: Vec<u8>,
    /// What the model itself makes of text that it has no token for; where it has nothing, such text is dropped.
    unknown: Option<u32>,
    /// Share of merges that the file asks to leave out by chance; none are.
    dropout: Option<f64>,
    /// Special tokens that take white space before, and behind them, along.
    strips: HashMap<u32, [bool; 2]>,
    more_stops: Vec<u32>,
    prefix_once: bool,
    config: Option<Value>,
}

/// Form of a tokenizer's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `tokenizer.model`
    SentencePiece,
    /// `tokenizer.json`
    Json,
}

enum Engine {
    SentencePiece(Box<SentencePiece>),
    HuggingFace(Box<HuggingFace>),
}

/// A checked tokenizer with the control tokens of the run.
pub struct Tokenizer {
    name: String,
    engine: Engine,
    opened: Opened,
    newline: Newline,
    im: Option<[u32; 2]>,
    /// Tokens behind the pieces, in order of their ids: those of the files beside a model, then those of ChatML.
    added: Vec<String>,
    /// How many of them the files name.
    named: usize,
    /// What the files beside a SentencePiece model call the end token, where it is another than the model's.
    said_eos: Option<String>,
    /// What was chosen among several files.
    choice: Option<String>,
    /// Symbols of the model that the template prints: control tokens as well.
    reserved: Vec<u32>,
    hash: String,
    bytes: Vec<u8>,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Tokenizer({}, {} tokens)", self.name, self.vocab_size())
    }
}

impl Tokenizer {
    /// Makes `<|im_start|>` and `<|im_end|>` available: those of the vocabulary, or new ids at its end. Returns how many ids
    /// were added (0, 1 or 2); calling it again adds none.
    pub fn add_chatml(&mut self) -> usize {
        let before = self.added.len();
        let ids = [IM_START, IM_END].map(|token| {
            self.id_of(token).unwrap_or_else(|| {
                self.added.push(token.to_string());
                (self.vocab_size() - 1) as u32
            })
        });
        self.im = Some(ids);
        self.added.len() - before
    }

    /// The id of a piece or an added token by its exact text.
    pub fn id_of(&self, text: &str) -> Option<u32> {
        let pieces = self.pieces();
        let added = || self.added.iter().position(|t| t == text).map(|i| pieces.len() + i);
        pieces.iter().position(|p| p.text == text).filter(|_| !text.is_empty()).or_else(added).map(|i| i as u32)
    }

    /// Path or name it was opened with.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Pieces and added tokens.
    pub fn vocab_size(&self) -> usize {
        self.pieces().len() + self.added.len()
    }

    /// The pieces of the file, by id; an id without a token has no text.
    pub fn pieces(&self) -> &[VocabPiece] {
        &self.opened.pieces
    }

    /// Form of the file.
    pub fn format(&self) -> Format {
        match self.engine {
            Engine::SentencePiece(_) => Format::SentencePiece,
            Engine::HuggingFace(_) => Format::Json,
        }
    }

    /// The `tokenizer_config.json` beside a `tokenizer.json`.
    pub fn config(&self) -> Option<&Value> {
        self.opened.config.as_ref()
    }

    /// Ids besides the end token at which the model's files say that an answer ends.
    pub fn more_stops(&self) -> &[u32] {
        &self.opened.more_stops
    }

    /// Whether the dummy prefix stands before the first stretch of a text alone, not before each one.
    pub fn prefix_once(&self) -> bool {
        self.opened.prefix_once
    }

    /// The first id from which on every token was added to the vocabulary.
    pub fn first_added(&self) -> usize {
        let added = |p: &VocabPiece| matches!(p.kind, Type::Control | Type::UserDefined | Type::Unused);
        match self.format() {
            Format::SentencePiece => self.pieces().len(),
            Format::Json => self.pieces().iter().rposition(|p| !added(p)).map_or(0, |i| i + 1),
        }
    }

    /// The first id that no file names: that of a token which ChatML needed.
    pub fn first_unnamed(&self) -> usize {
        self.pieces().len() + self.named
    }

    /// Unigram or BPE.
    pub fn model_type(&self) -> ModelType {
        self.opened.model_type
    }

    /// Tokens behind the pieces, of the files and of [`Tokenizer::add_chatml`], in order; the first has the id `pieces().len()`.
    pub fn added(&self) -> &[String] {
        &self.added
    }

    /// Ids of the special tokens.
    pub fn special(&self) -> SpecialTokens {
        self.opened.special
    }

    /// blake3 of the model file, in hex. Added tokens are not part of it.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// The model file, for saving it beside a checkpoint.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How newlines are treated.
    pub fn newline(&self) -> Newline {
        self.newline
    }

    /// The ids of the 256 bytes, with byte fallback or a byte-level vocabulary.
    pub fn byte_ids(&self) -> Option<&[u32]> {
        self.opened.byte_ids.as_deref()
    }

    /// The text of a token as in the vocabulary.
    pub fn piece(&self, id: u32) -> Option<&str> {
        let i = id as usize;
        let pieces = self.pieces();
        match pieces.get(i) {
            Some(p) => (!p.text.is_empty()).then_some(p.text.as_str()),
            None => self.added.get(i - pieces.len()).map(String::as_str),
        }
    }

    /// How the control tokens of this vocabulary are written, for templates.
    pub fn control_names(&self) -> ControlNames {
        let text = |id: u32| self.piece(id).expect("special ids were checked");
        let SpecialTokens { pad, unk, bos, eos } = self.special();
        let special = |p: &VocabPiece| match p.kind {
            Type::Control | Type::Unknown => true,
            // SentencePiece has one kind for turn tokens and for words that are never split.
            Type::UserDefined => self.format() == Format::SentencePiece && is_markup(&p.text),
            _ => false,
        };
        let pieces = (0..).zip(self.pieces()).filter(|(_, p)| special(p)).map(|(id, p)| (p.text.clone(), id));
        let added = (self.pieces().len() as u32..).zip(&self.added).map(|(id, text)| (text.clone(), id));
        let named = |id: Option<u32>| id.map(|id| text(id).to_string());
        let newline = match self.newline {
            Newline::Lost(id) => Some((NEWLINE.to_string(), id)),
            _ => None,
        };
        // A vocabulary without a begin token: templates print nothing for it.
        let others = pieces.chain(added).chain(newline).collect();
        let mut names = ControlNames::new(bos.map_or("", text), text(eos), named(pad), named(unk), others);
        names.said_eos.clone_from(&self.said_eos);
        names
    }

    /// Makes control tokens of those among `ids` that the model finds in text: the template prints them.
    pub fn reserve(&mut self, ids: &[u32]) {
        let symbol = |id: u32| self.pieces().get(id as usize).is_some_and(|p| p.kind == Type::UserDefined);
        self.reserved = ids.iter().copied().filter(|&id| symbol(id)).collect();
    }

    /// What [`Tokenizer::reserve`] made control tokens.
    pub fn reserved(&self) -> &[u32] {
        &self.reserved
    }

    /// Whether a token takes white space before, and behind it, along.
    pub fn strips(&self, id: u32) -> [bool; 2] {
        self.opened.strips.get(&id).copied().unwrap_or_default()
    }

    /// The id of a control token.
    ///
    /// # Errors
    /// If the vocabulary has no such token; ChatML's are made by [`Tokenizer::add_chatml`].
    pub fn control(&self, token: Control) -> Result<u32> {
        match token {
            Control::Token(id) => Ok(id),
            Control::Bos => match self.special().bos {
                Some(id) => Ok(id),
                None => bail!("tokenizer {}: no token begins a text", self.name),
            },
            Control::Eos => Ok(self.special().eos),
            Control::ImStart | Control::ImEnd => match self.im {
                Some(ids) => Ok(ids[usize::from(token == Control::ImEnd)]),
                None => bail!(
                    "tokenizer {}: expected {IM_START} and {IM_END} in the vocabulary, found neither or one",
                    self.name
                ),
            },
        }
    }

    /// Whether an id steers a conversation and so may never come from text.
    pub fn is_control(&self, id: u32) -> bool {
        let s = self.special();
        let id_is = |token: Option<u32>| token == Some(id);
        id_is(s.bos)
            || id == s.eos
            || (id_is(s.pad) && s.pad != s.unk)
            || self.im.is_some_and(|ids| ids.contains(&id))
            || self.reserved.contains(&id)
            || match self.pieces().get(id as usize) {
                None => true,
                Some(piece) => self.format() == Format::Json && piece.kind == Type::Control,
            }
    }

    /// The id that stands for a newline of a template or a document.
    ///
    /// # Errors
    /// If the model can neither encode a newline nor has a `<0x0A>` piece.
    pub fn newline_id(&self) -> Result<u32> {
        match self.newline {
            Newline::Kept(id) | Newline::Lost(id) | Newline::Text(id) => Ok(id),
            Newline::Missing => bail!(
                "tokenizer {}: newlines cannot be encoded, expected encode(\"\\n\") to keep the newline or a <0x0A> piece, \
                 found encode(\"\\n\") = {:?} and no byte fallback; train the tokenizer with --byte_fallback",
                self.name,
                self.encode_raw("\n")?
            ),
        }
    }

    /// The library's own `encode`: user-defined symbols are matched, nothing is added.
    ///
    /// # Errors
    /// If the library fails.
    pub fn encode_raw(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.tokens(text, false)?.into_iter().map(|t| t.id).collect())
    }

    /// Untrusted text to ids; never a control token.
    ///
    /// # Errors
    /// If the library fails.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.encode_cut(text, &[], false)?.into_iter().map(|t| t.id).collect())
    }

    /// Untrusted text to tokens of which none crosses a byte offset of `cuts` (ascending, on character borders) and none is a
    /// control token. `continuing` leaves out the dummy prefix.
    ///
    /// The text is encoded as one; only where a token crosses a cut or is a control token it is encoded in parts.
    ///
    /// # Errors
    /// If the library fails.
    pub fn encode_cut(&self, text: &str, cuts: &[usize], continuing: bool) -> Result<Vec<Token>> {
        let tokens = self.tokens(text, continuing)?;
        let mut forced: Vec<usize> = Vec::new();
        let mut next_cut = 0;
        for t in &tokens {
            while next_cut < cuts.len() && cuts[next_cut] <= t.begin {
                next_cut += 1;
            }
            if next_cut < cuts.len() && cuts[next_cut] < t.end {
                forced.push(cuts[next_cut]);
            } else if self.is_control(t.id) {
                // One character is the least that can be cut off; a symbol of one character is spelled in bytes below.
                let begin = text.floor_char_boundary(t.begin);
                let first = text[begin..].chars().next().map_or(0, char::len_utf8);
                forced.extend([begin, begin + first].into_iter().filter(|&c| c > 0 && c < text.len()));
            }
        }
        forced.sort_unstable();
        forced.dedup();
        if forced.is_empty() {
            return if tokens.iter().any(|t| self.is_control(t.id)) { self.spell(text) } else { Ok(tokens) };
        }
        forced.push(text.len());
        let mut out = Vec::with_capacity(tokens.len() + forced.len());
        let mut from = 0;
        for to in forced {
            let inner: Vec<usize> = cuts.iter().filter(|&&c| c > from && c < to).map(|c| c - from).collect();
            let part = self.encode_cut(&text[from..to], &inner, continuing || from > 0)?;
            out.extend(part.into_iter().map(|t| Token { id: t.id, begin: t.begin + from, end: t.end + from }));
            from = to;
        }
        Ok(out)
    }

    /// Text in byte tokens, or as unknown where there are none.
    fn spell(&self, text: &str) -> Result<Vec<Token>> {
        let end = text.len();
        let unknown = |id| Token { id, begin: 0, end };
        Ok(match self.byte_ids() {
            Some(ids) => {
                text.bytes().enumerate().map(|(i, b)| Token { id: ids[usize::from(b)], begin: i, end: i + 1 }).collect()
            }
            None => self.special().unk.map(unknown).into_iter().collect(),
        })
    }

    fn tokens(&self, text: &str, continuing: bool) -> Result<Vec<Token>> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        match &self.engine {
            Engine::SentencePiece(sp) => sp.encode(text, continuing),
            Engine::HuggingFace(hf) => hf.encode(text, continuing),
        }
        .map_err(|e| Error::new(format!("tokenizer {}: {e}", self.name)))
    }

    /// The library's own `decode` of ids of the file.
    ///
    /// # Errors
    /// If an id is not of the file.
    pub fn decode_raw(&self, ids: &[u32]) -> Result<String> {
        let n = self.pieces().len();
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= n) {
            bail!("tokenizer {}: expected ids below {n}, found {id}", self.name);
        }
        match &self.engine {
            Engine::SentencePiece(sp) => sp.decode(ids),
            Engine::HuggingFace(hf) => hf.decode(ids),
        }
        .map_err(|e| Error::new(format!("tokenizer {}: {e}", self.name)))
    }

    /// Ids to text: each stretch between control tokens on its own, control tokens by name or left out. Ids beyond the
    /// vocabulary (rows that only pad the model's) print as `<unused:ID>`.
    pub fn decode(&self, ids: &[u32], specials: Specials) -> String {
        let mut out = String::new();
        for stretch in ids.chunk_by(|&a, &b| !self.is_control(a) && !self.is_control(b)) {
            if self.is_control(stretch[0]) {
                if specials == Specials::Show {
                    match self.piece(stretch[0]) {
                        Some(name) => out.push_str(name),
                        None => out.push_str(&format!("<unused:{}>", stretch[0])),
                    }
                }
            } else {
                out.push_str(&self.decode_raw(stretch).unwrap_or_default());
            }
        }
        out
    }
}

/// `<…>` or `[…]`.
fn is_markup(text: &str) -> bool {
    text.len() > 2 && (text.starts_with('<') && text.ends_with('>') || text.starts_with('[') && text.ends_with(']'))
}
