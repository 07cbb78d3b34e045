//! SentencePiece tokenizers, checked before use: special ids, byte fallback, newlines, ChatML tokens.
//!
//! How text becomes ids:
//!
//! * [`Tokenizer::encode_raw`] is SentencePiece's own `encode`.
//! * [`Tokenizer::encode`] never yields a control token. A vocabulary may hold `<|im_end|>` as a user-defined symbol, which
//!   SentencePiece matches anywhere in text; where that happens the text is cut inside the symbol and both parts are
//!   encoded apart, so the ids spell the symbol as plain text.
//! * A stretch between two control tokens is encoded on its own, so the model's dummy prefix `▁` comes at its start, as
//!   in transformers. See `encode.rs` for stretches that are supervised in part.
//! * A model that loses newlines (SentencePiece's default normaliser does) gets those of the template as the
//!   `<0x0A>` id; [`Tokenizer::warnings`] says that newlines in the data are lost.

use std::collections::HashMap;
use std::path::Path;

use sentencepiece::SentencePieceProcessor;
use sentencepiece_model::{ModelType, SentencePieceModel, Type};

use crate::data::sp_model;
use crate::data::template::{Control, ControlNames, IM_END, IM_START};
use crate::error::{Context, Error, Result};
use crate::{bail, ensure};

/// Ids of the special tokens; `pad` may be absent only where no map asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpecialIds {
    /// Padding; never equal to `eos`.
    pub pad: u32,
    /// Unknown text.
    pub unk: u32,
    /// Begin of sequence.
    pub bos: u32,
    /// End of sequence.
    pub eos: u32,
}

impl Default for SpecialIds {
    fn default() -> Self {
        Self {
            pad: 0,
            unk: 1,
            bos: 2,
            eos: 3,
        }
    }
}

impl SpecialIds {
    /// Reads `pad,unk,bos,eos`, four distinct ids; `pad` may equal `unk`, as users of Llama-2's vocabulary choose.
    ///
    /// # Errors
    /// A usage error if it is anything else.
    pub fn parse(text: &str) -> Result<Self> {
        let ids: Result<Vec<u32>, _> = text.split(',').map(|s| s.trim().parse::<u32>()).collect();
        let Ok(&[pad, unk, bos, eos]) = ids.as_deref() else {
            return Err(Error::usage(format!(
                "special ids \"{text}\", expected four ids pad,unk,bos,eos such as 0,1,2,3"
            )));
        };
        let this = Self { pad, unk, bos, eos };
        if pad == eos || bos == eos || unk == bos || unk == eos || pad == bos {
            return Err(Error::usage(format!(
                "special ids \"{text}\" are not distinct, expected four ids of which only pad and unk may agree"
            )));
        }
        Ok(this)
    }
}

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
    /// No id stands for a newline.
    Missing,
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

/// A checked SentencePiece tokenizer with the control tokens of the run.
#[derive(Debug)]
pub struct Tokenizer {
    name: String,
    sp: SentencePieceProcessor,
    /// The same model without a dummy prefix: for text that continues a stretch.
    continuing: SentencePieceProcessor,
    pieces: Vec<VocabPiece>,
    model_type: ModelType,
    special: SpecialIds,
    newline: Newline,
    byte_ids: Option<Vec<u32>>,
    im: Option<[u32; 2]>,
    /// Tokens appended to the vocabulary, in order of their ids.
    added: Vec<String>,
    hash: String,
    bytes: Vec<u8>,
}

// SAFETY: encoding and decoding are `const` methods of a `SentencePieceProcessor` that keeps no hidden state; the library
// documents them as safe to call from several threads once the model is loaded, and nothing here changes it afterwards.
unsafe impl Sync for Tokenizer {}
// SAFETY: the processor owns its memory and uses no thread-local state.
unsafe impl Send for Tokenizer {}

impl Tokenizer {
    /// Opens a `.model` file and checks its special ids.
    ///
    /// # Errors
    /// If the file cannot be read, is no SentencePiece model, or has other special ids than `special`.
    pub fn open(path: &Path, special: SpecialIds) -> Result<Self> {
        let bytes = std::fs::read(path).context(|| format!("tokenizer {}", path.display()))?;
        Self::from_bytes(&path.display().to_string(), bytes, special)
    }

    /// As [`Tokenizer::open`], from the bytes of a file called `name` in messages.
    ///
    /// # Errors
    /// As [`Tokenizer::open`].
    pub fn from_bytes(name: &str, bytes: Vec<u8>, special: SpecialIds) -> Result<Self> {
        let model = sp_model::parse(&bytes).context(|| format!("tokenizer {name}"))?;
        check_special_ids(name, &model, special)?;
        let load = |bytes: &[u8]| {
            SentencePieceProcessor::from_serialized_proto(bytes).map_err(|e| {
                Error::new(format!(
                    "tokenizer {name}: expected a SentencePiece model, found one that does not load ({e})"
                ))
            })
        };
        let sp = load(&bytes)?;
        ensure!(
            sp.len() == model.pieces.len(),
            "tokenizer {name}: expected {} pieces, found {} after loading",
            model.pieces.len(),
            sp.len()
        );
        let continuing = load(&sp_model::without_dummy_prefix(&bytes))?;
        let pieces: Vec<VocabPiece> = model
            .pieces
            .iter()
            .map(|p| VocabPiece {
                text: p.piece().to_string(),
                score: p.score(),
                kind: p.r#type(),
            })
            .collect();
        let mut this = Self {
            name: name.to_string(),
            sp,
            continuing,
            byte_ids: sp_model::byte_ids(&model),
            pieces,
            model_type: model.trainer().map_or(ModelType::Unigram, |t| t.model_type()),
            special,
            newline: Newline::Missing,
            im: None,
            added: Vec::new(),
            hash: blake3::hash(&bytes).to_hex().to_string(),
            bytes,
        };
        let at = |text: &str| this.pieces.iter().position(|p| p.text == text).map(|i| i as u32);
        this.im = at(IM_START).zip(at(IM_END)).map(|(s, e)| [s, e]);
        this.newline = this.find_newline()?;
        Ok(this)
    }

    fn find_newline(&self) -> Result<Newline> {
        let ids = self.encode_raw("\n")?;
        if let Some(&last) = ids.last().filter(|&&id| id != self.special.unk)
            && self.decode_raw(&ids)?.ends_with('\n')
        {
            return Ok(Newline::Kept(last));
        }
        Ok(self
            .byte_ids
            .as_ref()
            .map_or(Newline::Missing, |b| Newline::Lost(b[usize::from(b'\n')])))
    }

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
        let added = || self.added.iter().position(|t| t == text).map(|i| self.pieces.len() + i);
        self.pieces
            .iter()
            .position(|p| p.text == text)
            .or_else(added)
            .map(|i| i as u32)
    }

    /// Path or name it was opened with.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Pieces and added tokens.
    pub fn vocab_size(&self) -> usize {
        self.pieces.len() + self.added.len()
    }

    /// The pieces of the model file, by id.
    pub fn pieces(&self) -> &[VocabPiece] {
        &self.pieces
    }

    /// Unigram or BPE.
    pub fn model_type(&self) -> ModelType {
        self.model_type
    }

    /// Tokens appended by [`Tokenizer::add_chatml`], in order; the first has the id `pieces().len()`.
    pub fn added(&self) -> &[String] {
        &self.added
    }

    /// Ids of the special tokens.
    pub fn special(&self) -> SpecialIds {
        self.special
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

    /// The ids of the 256 bytes, with byte fallback.
    pub fn byte_ids(&self) -> Option<&[u32]> {
        self.byte_ids.as_deref()
    }

    /// The text of a token as in the vocabulary.
    pub fn piece(&self, id: u32) -> Option<&str> {
        let i = id as usize;
        self.pieces
            .get(i)
            .map(|p| p.text.as_str())
            .or_else(|| self.added.get(i.checked_sub(self.pieces.len())?).map(String::as_str))
    }

    /// How BOS and EOS of this vocabulary are written, for templates.
    pub fn control_names(&self) -> ControlNames {
        let text = |id: u32| self.piece(id).expect("special ids were checked").to_string();
        ControlNames {
            bos: text(self.special.bos),
            eos: text(self.special.eos),
        }
    }

    /// The id of a control token.
    ///
    /// # Errors
    /// If it is a ChatML token and the vocabulary has none; see [`Tokenizer::add_chatml`].
    pub fn control(&self, token: Control) -> Result<u32> {
        match token {
            Control::Bos => Ok(self.special.bos),
            Control::Eos => Ok(self.special.eos),
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
        let s = self.special;
        id == s.bos
            || id == s.eos
            || (id == s.pad && id != s.unk)
            || self.im.is_some_and(|ids| ids.contains(&id))
            || id as usize >= self.pieces.len()
    }

    /// What a user should know about this model, one sentence each.
    pub fn warnings(&self) -> Vec<String> {
        let mut out = Vec::new();
        if let Newline::Lost(id) = self.newline {
            out.push(format!(
                "tokenizer {}: newlines inside prompts and responses are lost (the model's normaliser removes or blanks them); those of the template are inserted as <0x0A> (id {id})",
                self.name
            ));
        }
        if self.byte_ids.is_none() {
            out.push(format!(
                "tokenizer {}: no byte fallback, so unknown characters become <unk> (id {})",
                self.name, self.special.unk
            ));
        }
        out
    }

    /// The id that stands for a newline of a template or a document.
    ///
    /// # Errors
    /// If the model can neither encode a newline nor has a `<0x0A>` piece.
    pub fn newline_id(&self) -> Result<u32> {
        match self.newline {
            Newline::Kept(id) | Newline::Lost(id) => Ok(id),
            Newline::Missing => bail!(
                "tokenizer {}: newlines cannot be encoded, expected encode(\"\\n\") to keep the newline or a <0x0A> piece, \
                 found encode(\"\\n\") = {:?} and no byte fallback; train the tokenizer with --byte_fallback",
                self.name,
                self.encode_raw("\n")?
            ),
        }
    }

    /// SentencePiece's own `encode`: user-defined symbols are matched, nothing is added.
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
            return if tokens.iter().any(|t| self.is_control(t.id)) {
                self.spell(text)
            } else {
                Ok(tokens)
            };
        }
        forced.push(text.len());
        let mut out = Vec::with_capacity(tokens.len() + forced.len());
        let mut from = 0;
        for to in forced {
            let inner: Vec<usize> = cuts.iter().filter(|&&c| c > from && c < to).map(|c| c - from).collect();
            let part = self.encode_cut(&text[from..to], &inner, continuing || from > 0)?;
            out.extend(part.into_iter().map(|t| Token {
                id: t.id,
                begin: t.begin + from,
                end: t.end + from,
            }));
            from = to;
        }
        Ok(out)
    }

    /// Text in byte tokens, or as unknown where there are none.
    fn spell(&self, text: &str) -> Result<Vec<Token>> {
        let end = text.len();
        Ok(match &self.byte_ids {
            Some(ids) => text
                .bytes()
                .enumerate()
                .map(|(i, b)| Token {
                    id: ids[usize::from(b)],
                    begin: i,
                    end: i + 1,
                })
                .collect(),
            None => vec![Token {
                id: self.special.unk,
                begin: 0,
                end,
            }],
        })
    }

    fn tokens(&self, text: &str, continuing: bool) -> Result<Vec<Token>> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let sp = if continuing { &self.continuing } else { &self.sp };
        let pieces = sp
            .encode(text)
            .map_err(|e| Error::new(format!("tokenizer {}: {e}", self.name)))?;
        Ok(pieces
            .into_iter()
            .map(|p| Token {
                id: p.id,
                begin: p.span.0 as usize,
                end: p.span.1 as usize,
            })
            .collect())
    }

    /// SentencePiece's own `decode` of ids of the model file.
    ///
    /// # Errors
    /// If an id is not of the model file.
    pub fn decode_raw(&self, ids: &[u32]) -> Result<String> {
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= self.pieces.len()) {
            bail!(
                "tokenizer {}: expected ids below {}, found {id}",
                self.name,
                self.pieces.len()
            );
        }
        self.sp
            .decode_piece_ids(ids)
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

fn check_special_ids(name: &str, model: &SentencePieceModel, expected: SpecialIds) -> Result<()> {
    let n = model.pieces.len();
    let asked = [
        ("pad", expected.pad),
        ("unk", expected.unk),
        ("bos", expected.bos),
        ("eos", expected.eos),
    ];
    let default = SpecialIds::default() == expected;
    let trainer = model.trainer();
    let found = [
        trainer.map_or(-1, |t| t.pad_id()),
        trainer.map_or(0, |t| t.unk_id()),
        trainer.map_or(1, |t| t.bos_id()),
        trainer.map_or(2, |t| t.eos_id()),
    ];
    let show = |id: i32| if id < 0 { "none".to_string() } else { id.to_string() };
    // A map given by hand may name any piece as padding, since many models have none.
    let differs = asked
        .iter()
        .zip(found)
        .any(|((what, id), found)| i64::from(found) != i64::from(*id) && (default || *what != "pad" || found >= 0));
    let list = |ids: [String; 4]| format!("pad {}, unk {}, bos {}, eos {}", ids[0], ids[1], ids[2], ids[3]);
    ensure!(
        !differs,
        "tokenizer {name}: wrong special ids, expected {}, found {}; pass --special-ids pad,unk,bos,eos to accept another map",
        list(asked.map(|(_, id)| id.to_string())),
        list(found.map(show))
    );
    for (what, id) in asked {
        ensure!(
            (id as usize) < n,
            "tokenizer {name}: expected the id of {what} below {n}, found {id}"
        );
    }
    let kinds: HashMap<u32, Type> = asked
        .iter()
        .map(|&(_, id)| (id, model.pieces[id as usize].r#type()))
        .collect();
    for (what, id) in [("bos", expected.bos), ("eos", expected.eos)] {
        let kind = kinds[&id];
        ensure!(
            matches!(kind, Type::Control | Type::UserDefined),
            "tokenizer {name}: expected {what} (id {id}) to be a control piece, found {:?} of kind {kind:?}",
            model.pieces[id as usize].piece()
        );
    }
    Ok(())
}
