//! Supervised fine-tuning data: JSON Lines to token files, split, mix, and what there is to say about them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use serde_json::json;

use crate::data::cache;
use crate::data::encode::{Encoded, Outcome, Overflow, encode_row};
use crate::data::jsonl::{BadRows, RowOptions, RowReader};
use crate::data::mix::{Mix, WeightUnit, check_weights};
use crate::data::progress::Progress;
use crate::data::row::Row;
use crate::data::source::{self, Source};
use crate::data::split::split_sets;
use crate::data::template::Template;
use crate::data::text_loss::{Lost, TextLoss};
use crate::data::token_file::{Counts, DocInfo, Findings, Meta, TokenFile, Writer};
use crate::data::tokenizer::Tokenizer;
use crate::data::train_set::{Piece, PieceSet, Tokens, TrainSet};
use crate::error::{Error, Result};
use crate::files::{create_dir_all, parent, write_bytes};
use crate::say::visible;
use crate::words::Words;
use crate::{bail, ensure};

/// What decides the tokens of a data set.
#[derive(Clone, Debug, PartialEq)]
pub struct RowSpec {
    /// Tokens of a full row.
    pub max_seq_len: usize,
    /// What to do with longer ones.
    pub overflow: Overflow,
    /// Limits on lines, and whether bad ones stop the run or are skipped.
    pub rows: RowOptions,
    /// Where skipped rows are named, one a line, `file:line: what`.
    pub skip_log: Option<PathBuf>,
    /// Where token files are kept.
    pub cache_dir: PathBuf,
}

/// What decides the data of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct SftDataSpec {
    /// Files of rows, or token files written by `ringtune pack`.
    pub paths: Vec<PathBuf>,
    /// Validation files; without any, `val_fraction` of each training file's rows is held out.
    pub val_paths: Vec<PathBuf>,
    /// Relative weights, one for each path.
    pub weights: Option<Vec<f64>>,
    /// What the weights share out.
    pub weight_unit: WeightUnit,
    /// Rows of an epoch; as many as there are without it.
    pub epoch_samples: Option<u64>,
    /// Held out of each data set, in [0, 1).
    pub val_fraction: f64,
    /// Whether several documents share a row.
    pub packing: bool,
    /// Seed of split, rotation and order.
    pub seed: u64,
    /// What decides the tokens.
    pub row: RowSpec,
}

/// A tokenised data set and what became of its rows.
#[derive(Clone, Debug)]
pub struct SetReport {
    /// The path as given.
    pub name: String,
    /// What the file was: the forms of its rows, for example.
    pub form: String,
    /// Counts by reason.
    pub counts: Counts,
    /// Rows trained on before weights.
    pub n_train: usize,
    /// Rows held out.
    pub n_val: usize,
    /// Why none is, where some could have been.
    pub none_held_out: Option<String>,
}

/// Everything a run needs of its data.
#[derive(Debug)]
pub struct SftData {
    /// What is trained on.
    pub train: Arc<TrainSet>,
    /// What is held out, per data set; sets without held-out rows are there with no pieces.
    pub val: Vec<PieceSet>,
    /// What became of the rows, per data set.
    pub sets: Vec<SetReport>,
}

impl SftData {
    /// The first training rows in the order of the files, with their loss bits, to print at start.
    pub fn first_rows(&self, n: usize) -> Vec<Encoded> {
        let sets = self.train.sets().iter();
        sets.flat_map(|s| (0..s.pieces.len()).map(|p| s.encoded(p))).take(n).collect()
    }
}

/// Reads, encodes, splits and mixes the data sets. Token files are made in parallel or reused; `log` hears which, and of every
/// count that is not zero.
///
/// # Errors
/// If a file or row is bad, weights or fraction are, or a data set has no usable training row.
pub fn tokenise(
    spec: &SftDataSpec,
    tokenizer: &Tokenizer,
    template: &Template,
    progress: Progress,
    log: &mut dyn FnMut(String),
) -> Result<SftData> {
    if spec.paths.is_empty() {
        return Err(Error::usage("no data set, expected at least one path"));
    }
    if let Some(weights) = &spec.weights {
        check_weights(weights, spec.paths.len())?;
    }
    tokenizer.newline_id()?;
    tokenizer.warnings().into_iter().for_each(&mut *log);
    let files = load_files(&spec.paths, &spec.row, tokenizer, template, progress, log)?;
    let hashes: Vec<Vec<u64>> =
        files.iter().map(|f| (0..f.n_docs()).map(|d| f.info(d).prompt_hash).collect()).collect();
    let own = spec.val_paths.is_empty();
    let splits = split_sets(&hashes, if own { spec.val_fraction } else { 0.0 }, spec.seed)?;
    let (mut train, mut val, mut sets) = (Vec::new(), Vec::new(), Vec::new());
    for ((path, file), split) in spec.paths.iter().zip(files).zip(splits) {
        let name = path.display().to_string();
        let counts = file.meta().counts.clone();
        ensure!(
            !split.train.is_empty(),
            "{name}: no usable training row, expected at least one, found {}",
            why_empty(file.meta())
        );
        if let (Some(why), true) = (&split.none, own && spec.val_fraction > 0.0) {
            log(format!("{name}: no row is held out: {why}"));
        }
        let form = if file.path() == path { "token file".into() } else { file.meta().form.clone() };
        let tokens = Arc::new(Tokens::File(Box::new(file)));
        let side = |docs: &[u32]| PieceSet {
            name: name.clone(),
            tokens: tokens.clone(),
            pieces: docs.iter().map(|&d| whole(&tokens, d)).collect(),
        };
        let (n_train, n_val) = (split.train.len(), split.val.len());
        let none_held_out = split.none.clone().filter(|_| own);
        sets.push(SetReport { name: name.clone(), form, counts, n_train, n_val, none_held_out });
        train.push(side(&split.train));
        if own {
            val.push(side(&split.val));
        }
    }
    if !own {
        val = load_sets(&spec.val_paths, &spec.row, tokenizer, template, progress, log)?;
    }
    let sizes: Vec<_> = train.iter().map(PieceSet::size).collect();
    let mix = Mix::new(&sizes, spec.weights.as_deref(), spec.weight_unit, spec.epoch_samples, spec.seed)?;
    for (set, n) in train.iter().zip(&mix.counts).filter(|(_, n)| **n == 0) {
        log(format!("{}: its weight is so small that an epoch takes {n} of its rows", set.name));
    }
    let train = TrainSet::new(train, mix, spec.row.max_seq_len, spec.packing, spec.seed)?;
    Ok(SftData { train: Arc::new(train), val, sets })
}

/// Data sets to evaluate whole: every usable row of each path.
///
/// # Errors
/// If a file or row is bad, or no row is usable.
pub fn load_sets(
    paths: &[PathBuf],
    row: &RowSpec,
    tokenizer: &Tokenizer,
    template: &Template,
    progress: Progress,
    log: &mut dyn FnMut(String),
) -> Result<Vec<PieceSet>> {
    tokenizer.newline_id()?;
    let files = load_files(paths, row, tokenizer, template, progress, log)?;
    let sets = paths.iter().zip(files).map(|(path, file)| {
        let name = path.display().to_string();
        ensure!(file.n_docs() > 0, "{name}: no usable row, expected at least one, found {}", why_empty(file.meta()));
        let tokens = Arc::new(Tokens::File(Box::new(file)));
        let pieces = (0..tokens.n_docs() as u32).map(|d| whole(&tokens, d)).collect();
        Ok(PieceSet { name, tokens, pieces })
    });
    sets.collect()
}

/// A document as one piece.
fn whole(tokens: &Tokens, doc: u32) -> Piece {
    let n_targets = match tokens {
        Tokens::File(f) => f.info(doc as usize).n_targets,
        Tokens::Raw(r) => r.doc_len(doc as usize) as u32 - 1,
    };
    Piece { doc, start: 0, len: tokens.doc_len(doc as usize) as u32, n_targets }
}

/// Skipped rows that are named where no file names them all.
const NAMED: usize = 5;

fn load_files(
    paths: &[PathBuf],
    row: &RowSpec,
    tokenizer: &Tokenizer,
    template: &Template,
    progress: Progress,
    log: &mut dyn FnMut(String),
) -> Result<Vec<TokenFile>> {
    // One that cannot be read is said before the others are tokenised.
    paths.iter().try_for_each(|p| source::head(p).map(|_| ()))?;
    let files: Vec<TokenFile> =
        paths.iter().map(|p| token_file_of(p, row, tokenizer, template, progress, log)).collect::<Result<_>>()?;
    let mut skipped = String::new();
    for (path, file) in paths.iter().zip(&files) {
        let counts = &file.meta().counts;
        if counts.rows != counts.kept || counts.truncated + counts.bad + counts.blank_lines > 0 {
            log(format!("{}: {}", path.display(), describe(counts)));
            if let Some(Findings { longest_row: (tokens, line), .. }) = &file.meta().findings
                && *tokens > row.max_seq_len as u64
            {
                log(format!("{}:{line}: the longest row, {tokens} tokens", path.display()));
            }
        }
        for (line, what) in unread_keys(file.meta()) {
            log(match line {
                Some(line) => format!("warning: {}:{line}: {what}", path.display()),
                None => format!("{}: {what}", path.display()),
            });
        }
        let bad = &file.meta().bad;
        for (i, (line, what)) in bad.iter().enumerate() {
            let named = format!("{}:{line}: {what}", path.display());
            skipped += &visible(&format!("{named}\n"));
            // Without a file for all of them the first ones are named here.
            match row.skip_log {
                None if i < NAMED => log(format!("skipped {named}")),
                None if i == NAMED => log(format!("{}: {} more rows skipped", path.display(), bad.len() - NAMED)),
                _ => {}
            }
        }
    }
    if let (false, Some(to)) = (skipped.is_empty(), &row.skip_log) {
        create_dir_all(&parent(to))?;
        write_bytes(to, skipped.as_bytes())?;
        log(format!("skipped rows are named in {}", to.display()));
    }
    Ok(files)
}

/// Keys that say what is to be learned in other tools.
const CHANGE_WHAT_IS_TRAINED: &str = "input context instruction output history tools functions tool_calls function_call tool_call_id \
    reasoning_content reasoning thinking refusal documents system_prompt system_message response completion chat_template_kwargs \
    image images audio audios video videos chosen rejected label labels training trainable train_on_turn train_on_input mask masked \
    loss loss_mask prefix";

/// The keys that were not read: those that change what should be trained one by one with the first line that has them, the
/// others together.
pub fn unread_keys(meta: &Meta) -> Vec<(Option<u32>, String)> {
    let changes = |key: &str| CHANGE_WHAT_IS_TRAINED.split_whitespace().any(|k| key.rsplit('.').next() == Some(k));
    let (these, others): (Vec<_>, Vec<_>) = meta.ignored.iter().partition(|(key, ..)| changes(key));
    let mut all: Vec<_> = these
        .into_iter()
        .map(|(key, n, line)| {
            (
                Some(*line),
                format!(
                    "\"{key}\" is not read and changes nothing of what is trained; {n} rows have it, this is the first"
                ),
            )
        })
        .collect();
    if !others.is_empty() {
        let keys: Vec<_> = others.into_iter().map(|(key, n, _)| format!("\"{key}\" ({n} rows)")).collect();
        all.push((None, format!("keys that are not read: {}", keys.join(", "))));
    }
    all
}

/// Why no row of a data set can be used: the counts, and the first bad row.
fn why_empty(meta: &Meta) -> String {
    let first = meta.bad.first().map(|(line, what)| format!("; the first of them, line {line}: {what}"));
    describe(&meta.counts) + &first.unwrap_or_default()
}

/// What became of the rows of a data set, in words.
pub fn describe(c: &Counts) -> String {
    let mut parts = vec![format!("{} rows, {} kept", c.rows, c.kept)];
    let reasons = [
        (c.truncated, "cut to the row length"),
        (c.too_long, "dropped: longer than a row"),
        (c.response_cut, "dropped: the response would be cut away"),
        (c.unsupervised, "dropped: nothing supervised"),
        (c.bad, "bad and skipped"),
        (c.blank_lines, "blank lines ignored"),
    ];
    parts.extend(reasons.iter().filter(|r| r.0 > 0).map(|(n, what)| format!("{n} {what}")));
    parts.join(", ")
}

/// The token file of one data set: the path itself if it is one, else made from its JSON Lines or reused. `ringtune pack`
/// is this with a folder of the user's choice.
///
/// # Errors
/// If the file or a row is bad, or a token file was made with another tokenizer or template, or has longer rows.
pub fn token_file_of(
    path: &Path,
    row: &RowSpec,
    tokenizer: &Tokenizer,
    template: &Template,
    progress: Progress,
    log: &mut dyn FnMut(String),
) -> Result<TokenFile> {
    let name = path.display().to_string();
    let settings = settings(row, tokenizer, template);
    if TokenFile::is_token_file(&source::head(path)?) {
        let file = TokenFile::open(path)?;
        file.expect(tokenizer.hash(), None)?;
        let meta = file.meta();
        ensure!(
            meta.settings["template"] == settings["template"],
            "token file {name}: made with another template, expected {} ({}), found {} ({})",
            template.name(),
            settings["template"],
            if meta.template.is_empty() { "none" } else { &meta.template },
            meta.settings["template"]
        );
        for key in ["special_ids", "added_tokens"] {
            let (expected, found) = (&settings[key], &meta.settings[key]);
            ensure!(found == expected, "token file {name}: made with other {key}, expected {expected}, found {found}");
        }
        ensure!(
            meta.longest <= row.max_seq_len as u64,
            "token file {name}: a row of {} tokens, expected at most {}; pack it again with this row length",
            meta.longest,
            row.max_seq_len
        );
        return Ok(file);
    }
    let source = Source::open(path)?;
    let data = source.hash();
    let key = cache::key(&[data.as_bytes(), tokenizer.hash().as_bytes(), settings.to_string().as_bytes()]);
    let to = cache::path(&row.cache_dir, path, &key);
    cache::open_or_make(&to, tokenizer, &key, log, |to| {
        let meta = encode_file(&name, &source, row, tokenizer, template, progress, to)?;
        Ok(Meta { settings: settings.clone(), ..meta })
    })
}

fn settings(row: &RowSpec, tokenizer: &Tokenizer, template: &Template) -> serde_json::Value {
    let s = tokenizer.special();
    let mut all = json!({
        "template": template.fingerprint(),
        "max_seq_len": row.max_seq_len,
        "overflow": row.overflow.word(),
        "max_line_bytes": row.rows.max_line_bytes,
        "skip_bad_rows": row.rows.bad_rows == BadRows::Skip,
        "special_ids": [s.pad, s.unk, s.bos, s.eos],
        "added_tokens": tokenizer.added(),
        // Special tokens that a template spells are one id each.
        "encoding": 2,
        // Files of builds that did not look for what the rows show are made again.
        "findings": 2,
        // The same of those that read fewer fields of rows.
        "rows": 2,
        "prompt_hash": "context",
    });
    if !row.rows.columns.is_empty() {
        all["columns"] = json!(row.rows.columns.pairs());
    }
    all
}

/// Rows to documents, in parallel, in file order, batch by batch: the file may be larger than the memory.
fn encode_file(
    name: &str,
    source: &Source<'_>,
    spec: &RowSpec,
    tokenizer: &Tokenizer,
    template: &Template,
    progress: Progress,
    to: &mut Writer,
) -> Result<Meta> {
    let mut reader = RowReader::new(name, source, &spec.rows)?;
    let bar = progress.bar(source.bytes(), &format!("tokenising {name}"));
    let loss = TextLoss::of(tokenizer)?;
    let (mut counts, mut findings, mut refused) = (Counts::default(), Findings::default(), Vec::new());
    let unk = tokenizer.unknown();
    while let Some((rows, bytes)) = reader.next_rows()? {
        let encode = |row: &Row| {
            let outcome = encode_row(tokenizer, template, row, spec.max_seq_len, spec.overflow);
            Ok((outcome?, loss.in_row(tokenizer, row)?))
        };
        let outcomes: Vec<Result<(Outcome, Lost)>> = rows.par_iter().map(encode).collect();
        for (row, outcome) in rows.iter().zip(outcomes) {
            counts.rows += 1;
            if let Ok((outcome, lost)) = &outcome {
                findings.add(row.line, outcome, *lost, unk);
            }
            let encoded = match outcome {
                Ok((Outcome::Kept(encoded), _)) => encoded,
                Ok((Outcome::Truncated(encoded, _), _)) => {
                    counts.truncated += 1;
                    encoded
                }
                Ok((dropped, _)) => {
                    match dropped {
                        Outcome::TooLong(_) => counts.too_long += 1,
                        Outcome::ResponseCut(_) => counts.response_cut += 1,
                        _ => counts.unsupervised += 1,
                    }
                    continue;
                }
                // A conversation that the template refuses is as bad as a line that does not parse.
                Err(e) if spec.rows.bad_rows == BadRows::Skip => {
                    counts.rows -= 1;
                    refused.push((row.line, e.to_string()));
                    continue;
                }
                Err(e) => bail!("{name}:{}: {e}", row.line),
            };
            let n_targets = encoded.n_targets() as u32;
            to.push(&DocInfo { line: row.line, n_targets, prompt_hash: prompt_hash(row), source: 0 }, &encoded)?;
        }
        bar.inc(bytes);
    }
    bar.finish_and_clear();
    let file = reader.finish()?;
    let mut bad: Vec<(u32, String)> = file.bad.iter().map(|b| (b.line, b.what.clone())).chain(refused).collect();
    bad.sort();
    counts.blank_lines = file.blank_lines as u64;
    counts.kept = to.n_docs();
    counts.bad = bad.len() as u64;
    Ok(Meta {
        sources: vec![name.to_string()],
        template: template.name().to_string(),
        form: file.form(),
        ignored: file.ignored,
        longest: to.longest(),
        findings: Some(findings),
        bad,
        counts,
        ..Meta::default()
    })
}

impl Findings {
    fn add(&mut self, line: u32, outcome: &Outcome, lost: Lost, unk: Option<u32>) {
        let (encoded, tokens) = match outcome {
            Outcome::Kept(e) => (Some(e), e.tokens.len()),
            Outcome::Truncated(e, n) => (Some(e), *n),
            Outcome::TooLong(n) | Outcome::ResponseCut(n) => (None, *n),
            Outcome::Unsupervised => (None, 0),
        };
        if tokens as u64 > self.longest_row.0 {
            self.longest_row = (tokens as u64, line);
        }
        if lost.newlines {
            Self::count(&mut self.newlines_lost, line);
        }
        if lost.blanks {
            Self::count(&mut self.blanks_lost, line);
        }
        if lost.characters || encoded.zip(unk).is_some_and(|(e, unk)| e.tokens.contains(&unk)) {
            Self::count(&mut self.unknown, line);
        }
    }
}

/// What makes two rows equal for the split: everything before the last answer, or an answer that nothing precedes.
fn prompt_hash(row: &Row) -> u64 {
    let mut hasher = blake3::Hasher::new();
    let context = row.context();
    for turn in if context.is_empty() { &row.messages } else { context } {
        hasher.update(turn.role.name().as_bytes()).update(&(turn.content.len() as u64).to_le_bytes());
        hasher.update(turn.content.as_bytes());
    }
    u64::from_le_bytes(hasher.finalize().as_bytes()[..8].try_into().expect("8 bytes"))
}
