//! The rows behind tokens: an epoch's as `inspect rows` shows them, held-out ones for a generation test, read from their sources.

use std::path::Path;

use crate::data::jsonl::{BadRows, RowOptions, read_rows};
use crate::data::row::Row;
use crate::data::source;
use crate::data::token_file::TokenFile;
use crate::data::train_set::{EpochPlan, PieceSet, Tokens, TrainSet};
use crate::error::Result;

/// A row of an epoch as `inspect rows` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowView {
    /// Packed row it is in.
    pub row: usize,
    /// The data set's path as given.
    pub source: String,
    /// Its row there; absent when the data set is a token file whose source is gone.
    pub text: Option<Row>,
    /// Line in the source.
    pub line: u32,
    /// Tokens.
    pub tokens: u32,
    /// Of these, targets.
    pub n_targets: u32,
}

/// The rows an epoch trains on, in order, with their text read from the sources again.
///
/// # Errors
/// If a source cannot be read.
pub fn epoch_rows(train: &TrainSet, plan: &EpochPlan, options: &RowOptions) -> Result<Vec<RowView>> {
    let options = RowOptions { bad_rows: BadRows::Skip, ..*options };
    let texts: Vec<Vec<Row>> = train.sets().iter().map(|s| source_rows(s, &options)).collect::<Result<_>>()?;
    let mut out = Vec::with_capacity(plan.samples().len());
    for row in 0..plan.n_rows() {
        for &sample in plan.row(row) {
            let (set, piece) = train.locate(sample);
            let (source, p) = (&train.sets()[set], train.sets()[set].pieces[piece]);
            let line = source.line(piece);
            let text = texts[set].binary_search_by_key(&line, |r| r.line).ok().map(|i| texts[set][i].clone());
            out.push(RowView { row, source: source.name.clone(), text, line, tokens: p.len, n_targets: p.n_targets });
        }
    }
    Ok(out)
}

/// The rows of some pieces of a data set, for a generation test on held-out prompts. Pieces whose source is gone are left out.
///
/// # Errors
/// If the source cannot be read.
pub fn piece_rows(set: &PieceSet, pieces: &[usize], options: &RowOptions) -> Result<Vec<Row>> {
    let rows = source_rows(set, &RowOptions { bad_rows: BadRows::Skip, ..*options })?;
    let find = |&p: &usize| rows.binary_search_by_key(&set.line(p), |r| r.line).ok().map(|i| rows[i].clone());
    Ok(pieces.iter().filter_map(find).collect())
}

/// The JSON Lines behind a data set; none when it is a token file whose source no longer lies where it was.
fn source_rows(set: &PieceSet, options: &RowOptions) -> Result<Vec<Row>> {
    let Tokens::File(file) = set.tokens.as_ref() else {
        return Ok(Vec::new());
    };
    let packed_from = file.meta().sources.first().map(String::as_str).unwrap_or_default();
    for source in [set.name.as_str(), packed_from] {
        let path = Path::new(source);
        if path.exists() && !TokenFile::is_token_file(&source::head(path)?) {
            return Ok(read_rows(path, options)?.rows);
        }
    }
    Ok(Vec::new())
}
