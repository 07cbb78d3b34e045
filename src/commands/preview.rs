//! What is printed of the data before the first step: the mix, and the first rows with what is trained marked.

use crate::data::encode::Encoded;
use crate::data::sft::SftData;
use crate::data::tokenizer::{Specials, Tokenizer};
use crate::text::Style;
use crate::text::{grouped, table};

/// Rows printed at the start with their mask.
const PREVIEW_ROWS: usize = 2;

/// The mix and the first rows with what is trained marked.
pub fn preview(data: &SftData, tokenizer: &Tokenizer) -> Vec<String> {
    let style = Style::stdout();
    let mut lines = vec![style.heading("data"), mix_table(data)];
    lines.extend(first_rows(data, tokenizer, style, PREVIEW_ROWS));
    lines.push(String::new());
    lines
}

/// The first rows, each below a line with its number.
pub fn first_rows(data: &SftData, tokenizer: &Tokenizer, style: Style, n: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for (i, row) in data.first_rows(n).iter().enumerate() {
        lines.push(style.heading(&format!("row {}", i + 1)) + &format!(" (trained: {})", style.trained("like this")));
        lines.push(show_row(row, tokenizer, style));
    }
    lines
}

/// A row's text with what is trained marked; long ones are cut.
pub fn show_row(row: &Encoded, tokenizer: &Tokenizer, style: Style) -> String {
    const LONGEST: usize = 400;
    let n = row.tokens.len().min(LONGEST);
    let text = |stretch| tokenizer.decode(&row.tokens[stretch], Specials::Show);
    let mut out = style.row(n, |i| row.supervised[i], text);
    if row.tokens.len() > LONGEST {
        out += &format!(" … {} tokens more", row.tokens.len() - LONGEST);
    }
    out.trim_end().to_string()
}

/// Rows by data set: read, kept, held out; requested and achieved share in the three units.
pub fn mix_table(data: &SftData) -> String {
    let header = ["data set", "form", "rows", "kept", "train", "validation", "samples", "tokens", "supervised tokens"];
    let mut rows = vec![header.map(String::from).to_vec()];
    for (set, mix) in data.sets.iter().zip(data.train.mix_report(0)) {
        let mut row = vec![set.name.clone(), set.form.clone()];
        row.extend([set.counts.rows, set.counts.kept, set.n_train as u64, set.n_val as u64].map(grouped));
        let shares = mix.requested.iter().zip(mix.achieved);
        row.extend(shares.map(|(asked, got)| format!("{:.1}% → {:.1}%", 100.0 * asked, 100.0 * got)));
        rows.push(row);
    }
    format!("{}(shares of an epoch: asked → achieved)", table(&rows))
}
