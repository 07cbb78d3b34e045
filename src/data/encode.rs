//! Rendered conversations to token ids with a loss bit each, and rows to documents that fit.
//!
//! A stretch of text between two control tokens is encoded on its own. With a model that keeps newlines it is encoded as
//! one, so rendering the saved chat template and encoding it with the exported tokenizer gives the same ids;
//! where the loss mask changes inside the stretch and a token would cross that place, the text is cut there and
//! the rest continues without a second dummy prefix. With a model that loses newlines, each newline of the template is
//! the `<0x0A>` id and the text between two of them is encoded on its own; without such an id they are text as well.

use crate::data::row::{Message, Row};
use crate::data::template::{Control, Part, Purpose, Rendered, Segment, Template};
use crate::data::tokenizer::{Newline, Tokenizer};
use crate::error::Result;
use crate::words::words;

/// Token ids, each with whether it carries loss as a target.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// As long as `tokens`.
    pub supervised: Vec<bool>,
}

impl Encoded {
    fn push(&mut self, id: u32, supervised: bool) {
        self.tokens.push(id);
        self.supervised.push(supervised);
    }

    /// Number of targets: supervised tokens but the first, which nothing predicts.
    pub fn n_targets(&self) -> usize {
        self.supervised.iter().skip(1).filter(|&&s| s).count()
    }
}

/// Encodes a rendering.
///
/// # Errors
/// If the tokenizer has no ChatML tokens or no newline where the template needs them.
pub fn encode_rendered(tokenizer: &Tokenizer, rendered: &Rendered) -> Result<Encoded> {
    let mut out = Encoded::default();
    let is_control = |s: &Segment| matches!(s.part, Part::Control(_));
    let strips = |s: Option<&Segment>| match s.map(|s| &s.part) {
        Some(&Part::Control(token)) => tokenizer.control(token).map_or([false; 2], |id| tokenizer.strips(id)),
        _ => [false; 2],
    };
    let mut at = 0;
    for stretch in rendered.segments.chunk_by(|a, b| !is_control(a) && !is_control(b)) {
        at += stretch.len();
        if let Part::Control(token) = stretch[0].part {
            // A vocabulary without a begin token begins with nothing.
            if token != Control::Bos || tokenizer.special().bos.is_some() {
                out.push(tokenizer.control(token)?, stretch[0].supervised);
            }
        } else if matches!(tokenizer.newline(), Newline::Kept(_) | Newline::Text(_)) {
            let mut parts: Vec<(&str, bool)> = stretch.iter().map(|s| (text_of(s), s.supervised)).collect();
            // White space that belongs to the tokens around the text.
            if strips((at - stretch.len()).checked_sub(1).map(|i| &rendered.segments[i]))[1] {
                strip(parts.iter_mut(), str::trim_start);
            }
            if strips(rendered.segments.get(at))[0] {
                strip(parts.iter_mut().rev(), str::trim_end);
            }
            encode_stretch(tokenizer, parts.into_iter(), &mut out)?;
        } else {
            encode_between_newlines(tokenizer, stretch, &mut out)?;
        }
    }
    Ok(out)
}

/// Takes white space from one end of texts that follow each other.
fn strip<'a: 'b, 'b>(parts: impl Iterator<Item = &'b mut (&'a str, bool)>, trim: fn(&'a str) -> &'a str) {
    for (text, _) in parts {
        *text = trim(text);
        if !text.is_empty() {
            break;
        }
    }
}

fn text_of(segment: &Segment) -> &str {
    match &segment.part {
        Part::Template(text) | Part::Data(text) => text,
        Part::Control(_) => unreachable!("stretches hold no control tokens"),
    }
}

/// Encodes texts that follow each other as one, cut where the mask changes.
fn encode_stretch<'a>(
    tokenizer: &Tokenizer,
    parts: impl Iterator<Item = (&'a str, bool)>,
    out: &mut Encoded,
) -> Result<()> {
    let mut text = String::new();
    // Where each run of equal masks starts.
    let mut runs: Vec<(usize, bool)> = Vec::new();
    for (part, supervised) in parts {
        if !part.is_empty() && runs.last().is_none_or(|&(_, s)| s != supervised) {
            runs.push((text.len(), supervised));
        }
        text.push_str(part);
    }
    let cuts: Vec<usize> = runs.iter().skip(1).map(|&(at, _)| at).collect();
    let mut run = 0;
    let continuing = tokenizer.prefix_once() && !out.tokens.is_empty();
    for token in tokenizer.encode_cut(&text, &cuts, continuing)? {
        while run + 1 < runs.len() && runs[run + 1].0 <= token.begin {
            run += 1;
        }
        out.push(token.id, runs[run].1);
    }
    Ok(())
}

/// For models that lose newlines: those of the template by id, the text between them on its own.
fn encode_between_newlines(tokenizer: &Tokenizer, stretch: &[Segment], out: &mut Encoded) -> Result<()> {
    let mut pending: Vec<(&str, bool)> = Vec::new();
    for segment in stretch {
        let text = text_of(segment);
        if matches!(segment.part, Part::Data(_)) {
            pending.push((text, segment.supervised));
            continue;
        }
        for (i, line) in text.split('\n').enumerate() {
            if i > 0 {
                encode_stretch(tokenizer, pending.drain(..), out)?;
                out.push(tokenizer.newline_id()?, segment.supervised);
            }
            pending.push((line, segment.supervised));
        }
    }
    encode_stretch(tokenizer, pending.drain(..), out)
}

/// The ids a response is generated from: the conversation and the assistant's header.
///
/// # Errors
/// If the template refuses the conversation, or as [`encode_rendered`].
pub fn encode_prompt(tokenizer: &Tokenizer, template: &Template, messages: &[Message]) -> Result<Vec<u32>> {
    Ok(encode_rendered(tokenizer, &template.render(messages, Purpose::Generate)?)?.tokens)
}

/// The ids that end a response: those of the template first, then those of the model's files.
///
/// # Errors
/// As [`Tokenizer::control`].
pub fn stop_ids(tokenizer: &Tokenizer, template: &Template) -> Result<Vec<u32>> {
    let closing: Vec<u32> =
        template.stop_controls().into_iter().map(|c| tokenizer.control(c)).collect::<Result<_>>()?;
    let mut ids = Vec::new();
    for &id in closing.iter().chain(tokenizer.more_stops()) {
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    Ok(ids)
}

/// What to do with a row longer than the model's rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overflow {
    /// Leave it out.
    Drop,
    /// Keep its start; leave it out if nothing supervised is left.
    #[default]
    Truncate,
}
words!(Overflow { Truncate = "truncate", Drop = "drop" });

/// What became of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A document, as it is.
    Kept(Encoded),
    /// A document, cut to the row length; how long it was.
    Truncated(Encoded, usize),
    /// Longer than a row, and overflow drops.
    TooLong(usize),
    /// Cut to the row length, its whole response would be lost.
    ResponseCut(usize),
    /// Nothing in it is trained on.
    Unsupervised,
}

/// Renders, encodes and fits one row.
///
/// # Errors
/// If the template refuses the conversation, or as [`encode_rendered`].
pub fn encode_row(
    tokenizer: &Tokenizer,
    template: &Template,
    row: &Row,
    max_seq_len: usize,
    overflow: Overflow,
) -> Result<Outcome> {
    let mut encoded = encode_rendered(tokenizer, &template.render(&row.messages, Purpose::Train)?)?;
    let len = encoded.tokens.len();
    Ok(if encoded.n_targets() == 0 {
        Outcome::Unsupervised
    } else if len <= max_seq_len {
        Outcome::Kept(encoded)
    } else if overflow == Overflow::Drop {
        Outcome::TooLong(len)
    } else {
        encoded.tokens.truncate(max_seq_len);
        encoded.supervised.truncate(max_seq_len);
        if encoded.n_targets() == 0 { Outcome::ResponseCut(len) } else { Outcome::Truncated(encoded, len) }
    })
}
