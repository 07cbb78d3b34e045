//! The rows behind tokens: an epoch's as `inspect rows` shows them, held-out ones for a generation test, read from their sources.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::data::jsonl::{BadRows, RowOptions, RowReader};
use crate::data::row::Row;
use crate::data::source::{self, Source};
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
    let samples = (0..plan.n_rows()).flat_map(|row| plan.row(row).iter().map(move |&sample| (row, sample)));
    let places: Vec<(usize, usize, usize)> = samples
        .map(|(row, sample)| {
            let (set, piece) = train.locate(sample);
            (row, set, piece)
        })
        .collect();
    let lines = |set: usize| {
        let here = places.iter().filter(move |p| p.1 == set);
        here.map(|&(.., piece)| train.sets()[set].line(piece)).collect::<BTreeSet<u32>>()
    };
    let texts: Vec<BTreeMap<u32, Row>> =
        (0..train.sets().len()).map(|i| source_rows(&train.sets()[i], lines(i), options)).collect::<Result<_>>()?;
    let view = |&(row, set, piece): &(usize, usize, usize)| {
        let (source, p) = (&train.sets()[set], train.sets()[set].pieces[piece]);
        let line = source.line(piece);
        let text = texts[set].get(&line).cloned();
        RowView { row, source: source.name.clone(), text, line, tokens: p.len, n_targets: p.n_targets }
    };
    Ok(places.iter().map(view).collect())
}

/// The rows of some pieces of a data set, for a generation test on held-out prompts. Pieces whose source is gone are left out.
///
/// # Errors
/// If the source cannot be read.
pub fn piece_rows(set: &PieceSet, pieces: &[usize], options: &RowOptions) -> Result<Vec<Row>> {
    let rows = source_rows(set, pieces.iter().map(|&p| set.line(p)).collect(), options)?;
    Ok(pieces.iter().filter_map(|&p| rows.get(&set.line(p)).cloned()).collect())
}

/// The rows at some lines of the JSON Lines behind a data set; none when it is a token file whose source no longer lies where it
/// was. The source is read batch by batch, and not beyond the last of the lines.
fn source_rows(set: &PieceSet, lines: BTreeSet<u32>, options: &RowOptions) -> Result<BTreeMap<u32, Row>> {
    let mut found = BTreeMap::new();
    let Tokens::File(file) = set.tokens.as_ref() else {
        return Ok(found);
    };
    let packed_from = file.meta().sources.first().map(String::as_str).unwrap_or_default();
    for path in [set.name.as_str(), packed_from].map(Path::new) {
        if !path.exists() || TokenFile::is_token_file(&source::head(path)?) {
            continue;
        }
        let source = Source::open(path)?;
        let options = RowOptions { bad_rows: BadRows::Skip, ..options.clone() };
        let mut reader = RowReader::new(&path.display().to_string(), &source, &options)?;
        while found.len() < lines.len() {
            let Some((rows, _)) = reader.next_rows()? else { break };
            found.extend(rows.into_iter().filter(|r| lines.contains(&r.line)).map(|r| (r.line, r)));
        }
        return Ok(found);
    }
    Ok(found)
}
