//! Pretraining data: plain text, JSON Lines with a `text` field, or files of token ids; every token is supervised.
//!
//! * `.jsonl`, `.json`, a table ([`crate::tables`]): one document a row, its string `text`.
//! * `.tok` (ours), `.bin` (nanoGPT, llm.c): documents as they are. Anything that starts with our magic counts as ours.
//! * Anything else is UTF-8 text. Documents are separated by two or more blank lines; a text without any is one document.
//!   CRLF becomes LF, a BOM and blank lines at either end of a document are dropped.
//!
//! Text becomes BOS, its ids, EOS. Documents longer than a row are cut into pieces that overlap by one token, so that each
//! token but the first is predicted exactly once.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use serde_json::{Value, json};

use crate::data::cache;
use crate::data::columns::Columns;
use crate::data::encode::Encoded;
use crate::data::mix::{Mix, WeightUnit};
use crate::data::progress::Progress;
use crate::data::raw_tokens::{RawTokens, RawWidth};
use crate::data::sft::{SetReport, SftData};
use crate::data::source::{self, Item, Source};
use crate::data::split::split_sets;
use crate::data::token_file::{Counts, DocInfo, Meta, TokenFile};
use crate::data::tokenizer::{Format, Newline, Tokenizer};
use crate::data::train_set::{Piece, PieceSet, Tokens, TrainSet};
use crate::error::{Error, Result};
use crate::files::unpacked;
use crate::{bail, ensure};

/// What decides the data of a pretraining run.
#[derive(Clone, Debug, PartialEq)]
pub struct PretrainDataSpec {
    /// Training files.
    pub paths: Vec<PathBuf>,
    /// Validation files; without any, `val_fraction` of each training file's pieces is held out.
    pub val_paths: Vec<PathBuf>,
    /// Relative weights, one for each path.
    pub weights: Option<Vec<f64>>,
    /// What the weights share out.
    pub weight_unit: WeightUnit,
    /// Rows of an epoch; as many as there are without it.
    pub epoch_samples: Option<u64>,
    /// Held out of each file, in [0, 1).
    pub val_fraction: f64,
    /// Tokens of a full row.
    pub max_seq_len: usize,
    /// Whether several documents share a row.
    pub packing: bool,
    /// Seed of split, rotation and order.
    pub seed: u64,
    /// Which column holds the text, where it is not called so.
    pub columns: Columns,
    /// Bytes of a token in `.bin` files without a header.
    pub raw_width: Option<RawWidth>,
    /// Where token files are kept.
    pub cache_dir: PathBuf,
}

/// Text is encoded in blocks of about this many bytes, in parallel.
const BLOCK: usize = 1 << 16;

/// Reads, encodes and cuts the files.
///
/// # Errors
/// If a file cannot be read or is not what its name says, or weights or fraction are bad.
pub fn tokenise(
    spec: &PretrainDataSpec,
    tokenizer: &Tokenizer,
    progress: Progress,
    log: &mut dyn FnMut(String),
) -> Result<SftData> {
    if spec.paths.is_empty() {
        return Err(Error::usage("no training file, expected at least one path"));
    }
    ensure!(spec.max_seq_len >= 2, "rows of {} tokens, expected at least 2", spec.max_seq_len);
    if let Some(weights) = &spec.weights {
        crate::data::mix::check_weights(weights, spec.paths.len())?;
    }
    let mut open = |path: &PathBuf| -> Result<PieceSet> {
        let tokens = Arc::new(tokens_of(path, spec, tokenizer, progress, log)?);
        let pieces = cut(&tokens, spec.max_seq_len);
        let name = path.display().to_string();
        ensure!(!pieces.is_empty(), "{name}: no document of two tokens or more, expected at least one");
        Ok(PieceSet { name, tokens, pieces })
    };
    let whole: Vec<PieceSet> = spec.paths.iter().map(&mut open).collect::<Result<_>>()?;
    let mut val: Vec<PieceSet> = spec.val_paths.iter().map(&mut open).collect::<Result<_>>()?;
    tokenizer.warnings().into_iter().for_each(&mut *log);
    let held_out = if spec.val_paths.is_empty() { spec.val_fraction } else { 0.0 };
    // Pieces are told apart by their place: there are no prompts that could come twice.
    let keys: Vec<Vec<u64>> = whole
        .iter()
        .enumerate()
        .map(|(set, s)| (0..s.pieces.len()).map(|p| crate::rng::mix(&[set as u64, p as u64])).collect())
        .collect();
    let splits = split_sets(&keys, held_out, spec.seed)?;
    let (mut train, mut sets) = (Vec::new(), Vec::new());
    for (set, split) in whole.into_iter().zip(splits) {
        let side =
            |ids: &[u32]| PieceSet { pieces: ids.iter().map(|&p| set.pieces[p as usize]).collect(), ..set.clone() };
        let n_docs = set.tokens.n_docs() as u64;
        let counts = match set.tokens.as_ref() {
            Tokens::File(f) => f.meta().counts.clone(),
            Tokens::Raw(_) => Counts { rows: n_docs, kept: n_docs, ..Counts::default() },
        };
        let form = match set.tokens.as_ref() {
            Tokens::File(f) if f.path().as_os_str() == set.name.as_str() => "token file".into(),
            Tokens::File(f) => f.meta().form.clone(),
            Tokens::Raw(r) => r.form(),
        };
        sets.push(SetReport {
            name: set.name.clone(),
            form,
            counts,
            n_train: split.train.len(),
            n_val: split.val.len(),
            none_held_out: split.none.clone().filter(|_| spec.val_paths.is_empty()),
        });
        if spec.val_paths.is_empty() {
            val.push(side(&split.val));
        }
        train.push(side(&split.train));
    }
    let sizes: Vec<_> = train.iter().map(PieceSet::size).collect();
    let mix = Mix::new(&sizes, spec.weights.as_deref(), spec.weight_unit, spec.epoch_samples, spec.seed)?;
    let train = TrainSet::new(train, mix, spec.max_seq_len, spec.packing, spec.seed)?;
    Ok(SftData { train: Arc::new(train), val, sets })
}

/// Pieces of at most `max_seq_len` tokens, each but the first starting with the last token of the one before. Pieces without
/// a target are left out.
fn cut(tokens: &Tokens, max_seq_len: usize) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for doc in 0..tokens.n_docs() {
        let n = tokens.doc_len(doc);
        let mut start = 0;
        while start + 1 < n {
            let len = (n - start).min(max_seq_len);
            pieces.push(Piece { doc: doc as u32, start: start as u64, len: len as u32, n_targets: len as u32 - 1 });
            start += len - 1;
        }
    }
    pieces
}

/// Opens or makes the tokens of a file; `ringtune pack` is this with a folder of the user's choice.
///
/// # Errors
/// As [`tokenise`].
pub fn tokens_of(
    path: &Path,
    spec: &PretrainDataSpec,
    tokenizer: &Tokenizer,
    progress: Progress,
    log: &mut dyn FnMut(String),
) -> Result<Tokens> {
    let name = path.display().to_string();
    let extension = unpacked(path).extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
    let head = source::head(path)?;
    if extension == "bin" {
        return Ok(Tokens::Raw(RawTokens::open(
            path,
            tokenizer.vocab_size(),
            tokenizer.special().eos,
            spec.raw_width,
        )?));
    }
    if extension == "tok" || TokenFile::is_token_file(&head) {
        let file = TokenFile::open(path)?;
        file.expect(tokenizer.hash(), None)?;
        ensure!(
            file.vocab_size() <= tokenizer.vocab_size(),
            "token file {name}: made for a vocabulary of {}, expected at most {}",
            file.vocab_size(),
            tokenizer.vocab_size()
        );
        return Ok(Tokens::File(Box::new(file)));
    }
    tokenizer.newline_id()?;
    let source = Source::open(path)?;
    ensure!(source.bytes() > 0, "{name}: the file is empty, expected text");
    let is_jsonl = source.table().is_some() || ["jsonl", "json"].contains(&extension.as_str());
    let s = tokenizer.special();
    let mut settings = json!({
        "form": if is_jsonl { "jsonl" } else { "text" },
        "special_ids": [s.pad, s.unk, s.bos, s.eos],
        "added_tokens": tokenizer.added(),
        "encoding": 2,
    });
    if !spec.columns.is_empty() {
        settings["columns"] = json!(spec.columns.pairs());
    }
    let data = source.hash();
    let key = cache::key(&[data.as_bytes(), tokenizer.hash().as_bytes(), settings.to_string().as_bytes()]);
    let to = cache::path(&spec.cache_dir, path, &key);
    let file = cache::open_or_make(&to, tokenizer, &key, log, |to| {
        let bar = progress.bar(source.bytes(), &format!("tokenising {name}"));
        let encode = |texts: &[Text], bytes| {
            let docs = encode_texts(texts, tokenizer)?;
            bar.inc(bytes);
            docs.iter().try_for_each(|(info, doc)| to.push(info, doc))
        };
        if is_jsonl {
            jsonl_texts(&name, &source, spec.columns.column("text"), encode)?
        } else {
            plain_texts(&name, &source, encode)?
        }
        bar.finish_and_clear();
        let (form, gzip) =
            (if is_jsonl { "rows of text" } else { "text" }, if source.is_gzip() { ", gzip" } else { "" });
        let table = source.table().map_or(String::new(), |t| format!(", {}", t.name()));
        Ok(Meta {
            sources: vec![name.clone()],
            settings: settings.clone(),
            form: format!("{form}{table}{gzip}"),
            counts: Counts { rows: to.n_docs(), kept: to.n_docs(), ..Counts::default() },
            longest: to.longest(),
            ..Meta::default()
        })
    })?;
    Ok(Tokens::File(Box::new(file)))
}

/// A document and the line it starts on.
type Text = (u32, String);

/// Text that is tokenised at once, or one document where that is longer.
const AT_ONCE: usize = 4 << 20;
/// Documents that are tokenised at once.
const MOST_TEXTS: usize = 1 << 14;

fn utf8<'a>(name: &str, line: &Item<'a>) -> Result<&'a str> {
    std::str::from_utf8(line.text).map_err(|e| {
        let byte = line.text[e.valid_up_to()];
        Error::new(format!("{name}:{}: invalid UTF-8, expected UTF-8 text, found byte 0x{byte:02x}", line.number))
    })
}

fn number(name: &str, item: &Item<'_>) -> Result<u32> {
    u32::try_from(item.number).map_err(|_| Error::new(format!("{name}: expected fewer than 2^32 lines, found more")))
}

/// Documents separated by two or more blank lines; `each` gets some of them, in order, and how many bytes they were cut from.
fn plain_texts(name: &str, source: &Source<'_>, mut each: impl FnMut(&[Text], u64) -> Result<()>) -> Result<()> {
    let (mut docs, mut bytes, mut any): (Vec<Text>, u64, bool) = (Vec::new(), 0, false);
    let (mut current, mut start, mut blank) = (String::new(), 0u32, 0);
    let mut batches = source.lines()?;
    while let Some(batch) = batches.next_batch()? {
        for item in batch.items() {
            let line = utf8(name, &item)?;
            bytes += item.bytes + 1;
            if line.trim().is_empty() {
                blank += 1;
                continue;
            }
            if current.is_empty() {
                start = number(name, &item)?;
            } else if blank >= 2 {
                docs.push((start, std::mem::take(&mut current)));
                start = number(name, &item)?;
                if docs.iter().map(|d| d.1.len()).sum::<usize>() >= AT_ONCE || docs.len() >= MOST_TEXTS {
                    any = true;
                    each(&std::mem::take(&mut docs), std::mem::take(&mut bytes))?;
                }
            } else {
                current.push_str(if blank == 1 { "\n\n" } else { "\n" });
            }
            blank = 0;
            current.push_str(line);
        }
    }
    if !current.is_empty() {
        docs.push((start, current));
    }
    ensure!(any || !docs.is_empty(), "{name}: expected text, found only white space");
    each(&docs, bytes)
}

/// The texts of rows; `each` as for [`plain_texts`].
fn jsonl_texts(
    name: &str,
    source: &Source<'_>,
    key: &str,
    mut each: impl FnMut(&[Text], u64) -> Result<()>,
) -> Result<()> {
    let mut any = false;
    let mut batches = source.batches(usize::MAX)?;
    while let Some(batch) = batches.next_batch()? {
        let (mut docs, mut bytes) = (Vec::new(), 0);
        for item in batch.items() {
            bytes += item.bytes + 1;
            utf8(name, &item)?;
            if !source.is_array() && item.text.trim_ascii().is_empty() {
                continue;
            }
            let (line, at) = (number(name, &item)?, format!("{name}:{}", item.number));
            let value: Value = serde_json::from_slice(item.text)
                .map_err(|e| Error::new(format!("{at}: invalid JSON, expected an object with \"{key}\", found {e}")))?;
            match value.get(key) {
                Some(Value::String(s)) if !s.trim().is_empty() => docs.push((line, s.clone())),
                Some(Value::String(_)) => {
                    bail!("{at}: field \"{key}\" is empty, expected text, found only white space")
                }
                Some(other) => bail!("{at}: field \"{key}\" is not a string, expected a string, found {other}"),
                None => bail!(
                    "{at}: field \"{key}\" is missing, expected a string, found {}",
                    match value.as_object() {
                        None => "no object".to_string(),
                        Some(fields) => {
                            let names: Vec<String> = fields.keys().take(8).map(|k| format!("\"{k}\"")).collect();
                            let asks = ["prompt", "messages", "conversations", "instruction"];
                            let hint = match asks.iter().any(|k| fields.contains_key(*k)) {
                                true => "what is asked and answered is trained on by ringtune sft",
                                false => "a column of another name is read with --columns text=NAME",
                            };
                            format!("the fields {}; {hint}", names.join(", "))
                        }
                    }
                ),
            }
        }
        any |= !docs.is_empty();
        each(&docs, bytes)?;
    }
    ensure!(any, "{name}: no rows, expected one JSON object a line");
    Ok(())
}

/// BOS, the ids, EOS for each text. Long texts are cut before newlines into blocks, so all cores have work: no piece of the vocabulary
/// holds a newline when newlines are kept byte by byte, so the ids are those of the whole text.
fn encode_texts(texts: &[Text], tokenizer: &Tokenizer) -> Result<Vec<(DocInfo, Encoded)>> {
    let by_bytes = match (tokenizer.newline(), tokenizer.byte_ids()) {
        (Newline::Kept(id), Some(bytes)) => bytes[usize::from(b'\n')] == id,
        _ => false,
    };
    // A byte-level vocabulary joins newlines with what follows, so its texts are encoded whole.
    let splits = by_bytes
        && tokenizer.format() == Format::SentencePiece
        && !tokenizer.pieces().iter().any(|p| p.text.contains('\n'));
    let blocks: Vec<(usize, &str, bool)> = texts
        .iter()
        .enumerate()
        .flat_map(|(doc, (_, text))| {
            let parts = if splits { blocks_of(text) } else { vec![text.as_str()] };
            parts.into_iter().enumerate().map(move |(k, part)| (doc, part, k > 0))
        })
        .collect();
    let encode = |&(_, part, continuing): &(usize, &str, bool)| {
        Ok(tokenizer.encode_cut(part, &[], continuing)?.into_iter().map(|t| t.id).collect())
    };
    let encoded: Vec<Vec<u32>> = blocks.par_iter().map(encode).collect::<Result<_>>()?;
    let special = tokenizer.special();
    let mut docs: Vec<(DocInfo, Encoded)> = texts
        .iter()
        .map(|(line, _)| {
            (
                DocInfo { line: *line, ..DocInfo::default() },
                Encoded { tokens: special.bos.into_iter().collect(), supervised: Vec::new() },
            )
        })
        .collect();
    for ((doc, ..), ids) in blocks.iter().zip(encoded) {
        docs[*doc].1.tokens.extend(ids);
    }
    for (info, doc) in &mut docs {
        doc.tokens.push(special.eos);
        doc.supervised = vec![true; doc.tokens.len()];
        // Nothing predicts the first token.
        doc.supervised[0] = false;
        info.n_targets = doc.n_targets() as u32;
    }
    Ok(docs)
}

/// Cuts a text before newlines into blocks.
fn blocks_of(text: &str) -> Vec<&str> {
    let mut out = Vec::new();
    let mut rest = text;
    while rest.len() > BLOCK {
        let at = text_boundary(rest);
        let Some(at) = at else { break };
        let (block, tail) = rest.split_at(at);
        out.push(block);
        rest = tail;
    }
    out.push(rest);
    out
}

/// The first newline behind [`BLOCK`] bytes.
fn text_boundary(text: &str) -> Option<usize> {
    let from = text.ceil_char_boundary(BLOCK);
    text[from..].find('\n').map(|i| from + i).filter(|&at| at > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_blank_lines_separate_documents() {
        let plain_texts = |bytes: &[u8]| -> Result<Vec<Text>> {
            let mut all = Vec::new();
            plain_texts("t", &Source::of(bytes), |texts, _| {
                all.extend_from_slice(texts);
                Ok(())
            })?;
            Ok(all)
        };
        let texts = plain_texts(b"\xef\xbb\xbf\n\na\r\n\r\nb\r\n\n \t\nc\n\n\n\n\nd\n").unwrap();
        assert_eq!(texts, [(3, "a\n\nb".to_string()), (8, "c".to_string()), (13, "d".to_string())]);
        assert!(plain_texts(b"\n \n").is_err());
        assert!(plain_texts(b"ok\ncaf\xe9").unwrap_err().to_string().contains("t:2: invalid UTF-8"));
    }

    #[test]
    fn blocks_give_the_ids_of_the_whole_text() {
        let special = crate::data::tokenizer::SpecialIds::default();
        let t = Tokenizer::open(Path::new("tests/data/tokenizer/spm4k.model"), special).unwrap();
        let stream = crate::rng::Stream::new(&[3]);
        let text: String =
            (0..60_000).map(|i| ["the ", "\n", "\n\n", "Word", " x", "é"][stream.u64_at(i) as usize % 6]).collect();
        assert!(blocks_of(&text).len() > 1);
        let docs = encode_texts(&[(1, text.clone())], &t).unwrap();
        let ids = &docs[0].1.tokens;
        assert_eq!(ids[1..ids.len() - 1], t.encode(&text).unwrap());
    }
}
