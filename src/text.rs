//! Text for people: tables, sizes, counts, times, and which of it is trained.

use std::fmt::Write;
use std::ops::Range;
use std::path::{Component, Path};

use crate::files::unpacked;
use crate::say::{self, look, visible};

/// Columns two blanks apart, numbers to the right, within the width of the terminal: see [`lines_in`]. The first row is the header.
pub fn table(rows: &[Vec<String>]) -> String {
    lines_in(rows, say::width()).into_iter().map(|(_, line)| line + "\n").collect()
}

/// Shortest that a column of text is made.
const NARROW: usize = 16;

/// The lines of a table, each with the number of its row. Where the table is wider than `width`, its widest columns of text are shortened in
/// the middle; where that does not suffice, the columns that do not fit follow below, behind the first column again. Nothing is left out.
pub fn lines_in(rows: &[Vec<String>], width: Option<usize>) -> Vec<(usize, String)> {
    let mut rows: Vec<Vec<String>> = rows.iter().map(|r| r.iter().map(|c| visible(c).into_owned()).collect()).collect();
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let number = |cell: &str| cell.trim_start_matches(['-', '+']).starts_with(|c: char| c.is_ascii_digit());
    let right: Vec<bool> = (0..columns)
        .map(|c| {
            let mut body = rows.iter().skip(1).filter_map(|r| r.get(c)).filter(|cell| !cell.is_empty()).peekable();
            body.peek().is_some() && body.all(|cell| number(cell))
        })
        .collect();
    let width_of = |rows: &[Vec<String>], c: usize| {
        rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0)
    };
    let mut widths: Vec<usize> = (0..columns).map(|c| width_of(&rows, c)).collect();
    let all = |widths: &[usize]| widths.iter().map(|w| w + 2).sum::<usize>();
    if let Some(width) = width {
        while all(&widths) > width {
            let Some(c) = (0..columns).filter(|&c| !right[c] && widths[c] > NARROW).max_by_key(|&c| widths[c]) else {
                break;
            };
            let most = (widths[c] - (all(&widths) - width).min(widths[c] - NARROW)).max(NARROW);
            rows.iter_mut().filter_map(|r| r.get_mut(c)).for_each(|cell| *cell = shortened(cell, most));
            widths[c] = width_of(&rows, c).max(1).min(most);
        }
    }
    let mut blocks: Vec<Vec<usize>> = vec![Vec::new()];
    for c in 0..columns {
        let block = blocks.last().expect("there is one");
        let used = block.iter().map(|&c| widths[c] + 2).sum::<usize>() + widths[c] + 2;
        match width {
            Some(width) if used > width && block.len() > 1 => blocks.push(vec![0, c]),
            _ => blocks.last_mut().expect("there is one").push(c),
        }
    }
    let mut lines = Vec::new();
    for block in blocks {
        for (i, row) in rows.iter().enumerate() {
            let mut line = String::new();
            for &c in &block {
                let (cell, w) = (row.get(c).map_or("", String::as_str), widths[c]);
                let _ = if right[c] { write!(line, "  {cell:>w$}") } else { write!(line, "  {cell:<w$}") };
            }
            lines.push((i, line.trim_end().to_string()));
        }
    }
    lines
}

/// At most `most` characters of a text, the middle left out: a path keeps where it begins and its name. Words keep their beginning.
pub fn shortened(text: &str, most: usize) -> String {
    let chars: Vec<char> = text.chars().collect();
    if chars.len() <= most || most < 3 {
        return chars.into_iter().take(most.max(1)).collect();
    }
    let words = text.contains(' ') && !text.contains(['/', '.']);
    let head = if words { most - 1 } else { (most - 1) / 3 };
    let tail = most - 1 - head;
    chars[..head].iter().chain(['…'].iter()).chain(&chars[chars.len() - tail..]).collect()
}

/// Parts of a line joined by ` | `, each with a rank: those of the highest ranks are left out until the line fits. Rank 0 stays.
pub fn fitted(parts: &[(u8, String)], width: Option<usize>) -> String {
    let mut parts: Vec<&(u8, String)> = parts.iter().collect();
    let join = |parts: &[&(u8, String)]| parts.iter().map(|p| p.1.as_str()).collect::<Vec<_>>().join(" | ");
    while let Some(width) = width.filter(|&w| join(&parts).chars().count() > w) {
        let Some(i) = (0..parts.len()).filter(|&i| parts[i].0 > 0).max_by_key(|&i| parts[i].0) else {
            return shortened(&join(&parts), width);
        };
        parts.remove(i);
    }
    join(&parts)
}

/// `812 B`, `1.5 MiB`.
pub fn bytes(n: u64) -> String {
    let mut value = n as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1023.95 {
            return if unit == "B" { format!("{n} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

/// `12 500 352` as `12,500,352`.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// `1 warning`, `3 warnings`.
pub fn plural(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// `45 s`, `12 min`, `3.4 h`, `2.1 days`.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 99.5 => format!("{s:.0} s"),
        s if s < 5970.0 => format!("{:.0} min", s / 60.0),
        s if s < 48.0 * 3600.0 => format!("{:.1} h", s / 3600.0),
        s => format!("{:.1} days", s / 86400.0),
    }
}

/// How to show which text is trained: in colour on a terminal that wants it (no `NO_COLOR`), else with marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Style {
    colour: bool,
}

impl Style {
    /// What suits stdout.
    pub fn stdout() -> Self {
        Self { colour: say::stdout_has_colour() }
    }

    /// A style with or without colour.
    pub fn new(colour: bool) -> Self {
        Self { colour }
    }

    /// Text that carries loss: green, or between « and ».
    pub fn trained(self, text: &str) -> String {
        let text = visible(text);
        match self.colour {
            true => self.paint(look::TRAINED, &text),
            false => format!("«{text}»"),
        }
    }

    /// Text that is context only: grey, or as it is.
    pub fn context(self, text: &str) -> String {
        let text = visible(text);
        match self.colour {
            true => self.paint(look::DIM, &text),
            false => text.into(),
        }
    }

    /// A heading: bold, or as it is.
    pub fn heading(self, text: &str) -> String {
        let text = visible(text);
        match self.colour {
            true => self.paint(look::HEADING, &text),
            false => text.into(),
        }
    }

    /// A good verdict: green, or as it is.
    pub fn good(self, text: &str) -> String {
        if self.colour { self.paint(look::TRAINED, text) } else { text.into() }
    }

    /// A finding: red where it is a problem, else yellow; or as it is.
    pub fn finding(self, problem: bool, text: &str) -> String {
        let text = visible(text);
        match self.colour {
            true => self.paint(if problem { look::ERROR } else { look::WARNING }, &text),
            false => text.into(),
        }
    }

    /// `text` with the byte spans `[start, end)` shown as trained and the rest as context.
    pub fn spans(self, text: &str, spans: &[[usize; 2]]) -> String {
        let mut out = String::new();
        let mut at = 0;
        for &[start, end] in spans {
            out += &self.context(&text[at..start]);
            out += &self.trained(&text[start..end]);
            at = end;
        }
        out + &self.context(&text[at..])
    }

    /// A row of `n` tokens with its mask: stretches that are `trained` or not, each shown as that; `text` gives a stretch's text.
    pub fn row(self, n: usize, trained: impl Fn(usize) -> bool, text: impl Fn(Range<usize>) -> String) -> String {
        let mut out = String::new();
        let mut start = 0;
        for end in 1..=n {
            if end == n || trained(end) != trained(start) {
                let text = text(start..end);
                out += &if trained(start) { self.trained(&text) } else { self.context(&text) };
                start = end;
            }
        }
        out
    }

    /// Colour line by line: pagers reset it at line ends.
    fn paint(self, look: anstyle::Style, text: &str) -> String {
        let line = |l: &str| {
            if l.is_empty() { String::new() } else { format!("{look}{l}{look:#}") }
        };
        text.split('\n').map(line).collect::<Vec<_>>().join("\n")
    }
}

/// A date and time in UTC, `2026-11-24 06:00`; the calendar after Hinnant, "chrono-Compatible Low-Level Date Algorithms".
pub fn date(unix: u64) -> String {
    let (days, rest) = (unix / 86_400, unix % 86_400);
    let z = days as i64 + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let mp = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02} UTC", rest / 3600, rest / 60 % 60)
}

/// `data/sft/dolly15k.jsonl` as `dolly15k`: a name for tables, metrics and files. Where several would have one name, as many folders
/// as tell them apart come first (`a_train`), or else a number behind it.
pub fn short_names(paths: &[String]) -> Vec<String> {
    let parts: Vec<Vec<String>> = paths
        .iter()
        .map(|path| {
            let path = unpacked(Path::new(path)).with_extension("");
            let names = path.components().filter(|c| matches!(c, Component::Normal(_) | Component::ParentDir));
            names.map(|c| c.as_os_str().to_string_lossy().into_owned()).collect()
        })
        .collect();
    let name = |i: usize, n: usize| parts[i][parts[i].len().saturating_sub(n)..].join("_");
    let deepest = parts.iter().map(Vec::len).max().unwrap_or(0);
    let mut names: Vec<String> = Vec::with_capacity(paths.len());
    for i in 0..paths.len() {
        let alone = |n: &usize| (0..paths.len()).all(|k| parts[k] == parts[i] || name(k, *n) != name(i, *n));
        let base = name(i, (1..=deepest).find(alone).unwrap_or(deepest));
        let numbered = (2..).map(|n| format!("{base}_{n}"));
        let free = std::iter::once(base.clone()).chain(numbered).find(|n| !names.contains(n));
        names.push(free.expect("numbers do not end"));
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_groups() {
        assert_eq!(bytes(812), "812 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(24 << 30), "24.0 GiB");
        assert_eq!(bytes(u64::MAX), "16777216.0 TiB");
        assert_eq!(grouped(12_500_352), "12,500,352");
        assert_eq!(grouped(999), "999");
    }

    #[test]
    fn times_have_the_unit_that_suits_them() {
        assert_eq!(duration(42.4), "42 s");
        assert_eq!(duration(600.0), "10 min");
        assert_eq!(duration(7200.0), "2.0 h");
        assert_eq!(duration(864_000.0), "10.0 days");
    }

    #[test]
    fn spans_with_and_without_colour() {
        assert_eq!(Style::new(false).spans("ab cd\nef", &[[3, 8]]), "ab «cd\nef»");
        assert_eq!(Style::new(true).spans("a\nb", &[[0, 3]]), "\x1b[1m\x1b[32ma\x1b[0m\n\x1b[1m\x1b[32mb\x1b[0m");
    }

    #[test]
    fn what_would_move_a_cursor_or_hide_text_is_written_out() {
        assert_eq!(visible("a\n\tb é 🙂 ಕ್\u{200d}ಷ"), "a\n\tb é 🙂 ಕ್\u{200d}ಷ");
        let hidden = "\x1b[2K\x07\r\u{9b}\0\x7f\u{202e}\u{2066}\u{feff}";
        assert_eq!(visible(hidden), "\\u001b[2K\\u0007\\u000d\\u009b\\u0000\\u007f\\u202e\\u2066\\ufeff");
        assert_eq!(Style::new(true).trained("\x1b[8m"), "\x1b[1m\x1b[32m\\u001b[8m\x1b[0m");
        assert_eq!(Style::new(false).spans("a\rb\x1b", &[[2, 4]]), "a\\u000d«b\\u001b»");
        assert_eq!(table(&[vec!["\x1b]0;x\x07".into(), "b".into()]]), "  \\u001b]0;x\\u0007  b\n");
    }

    fn rows(text: &str) -> Vec<Vec<String>> {
        text.lines().map(|l| l.split('|').map(String::from).collect()).collect()
    }

    fn printed(text: &str, width: usize) -> String {
        lines_in(&rows(text), Some(width)).into_iter().map(|(_, l)| l + "\n").collect()
    }

    #[test]
    fn numbers_stand_to_the_right_and_words_to_the_left() {
        let text = "set|rows|size|of\na|1,051|1.5 MiB|one\nlonger|7|12 KiB|three";
        let expected = "  set      rows     size  of\n  a       1,051  1.5 MiB  one\n  longer      7   12 KiB  three\n";
        assert_eq!(printed(text, 80), expected);
    }

    /// No line is longer than the width, and nothing but the middle of long texts is left out.
    #[test]
    fn a_table_fits_every_width() {
        let text = "data set|form|rows|kept|train|validation|samples|tokens\n\
                    data/a/very/long/folder/of/files/dolly15k.jsonl|prompt and response|15,011|15,011|14,260|751|40.0% → 40.0%|40.0% → 38.1%\n\
                    b.jsonl|messages|9|9|8|1|60.0% → 60.0%|60.0% → 61.9%";
        for width in 40..=200 {
            let lines = lines_in(&rows(text), Some(width));
            lines.iter().for_each(|(_, l)| assert!(l.chars().count() <= width, "{width}: {l}"));
            let whole: String = lines.iter().map(|l| l.1.as_str()).collect();
            for cell in ["15,011", "14,260", "751", "40.0% → 38.1%", "60.0% → 61.9%", "k.jsonl"] {
                assert!(whole.contains(cell), "{width}: {cell} is lost in\n{whole}");
            }
        }
        assert_eq!(lines_in(&rows(text), Some(150)).len(), 3, "one block where there is room");
        assert_eq!(lines_in(&rows(text), Some(80)).len(), 6);
    }

    #[test]
    fn the_middle_of_a_path_is_left_out() {
        assert_eq!(shortened("checkpoints/sft/tiny-mixed/final", 20), "checkp…y-mixed/final");
        assert_eq!(shortened("prompt and response", 16), "prompt and resp…");
        assert_eq!(shortened("abc", 3), "abc");
        for most in 1..40 {
            assert!(shortened("checkpoints/sft/tiny-mixed/final", most).chars().count() <= most);
        }
    }

    #[test]
    fn parts_of_a_line_are_left_out_by_rank() {
        let parts = [(0, "step 1".to_string()), (2, "norm 3".into()), (0, "loss 2".into()), (1, "lr 4".into())];
        assert_eq!(fitted(&parts, None), "step 1 | norm 3 | loss 2 | lr 4");
        assert_eq!(fitted(&parts, Some(24)), "step 1 | loss 2 | lr 4");
        assert_eq!(fitted(&parts, Some(16)), "step 1 | loss 2");
        assert_eq!(fitted(&parts, Some(9)).chars().count(), 9);
    }

    #[test]
    fn a_row_is_cut_where_its_mask_changes() {
        let row = |mask: &[bool]| Style::new(false).row(mask.len(), |i| mask[i], |r| format!("{r:?}"));
        assert_eq!(row(&[false, true, true, false]), "0..1«1..3»3..4");
        assert_eq!(row(&[true]), "«0..1»");
        assert_eq!(row(&[]), "");
    }

    #[test]
    fn dates() {
        assert_eq!(date(0), "1970-01-01 00:00 UTC");
        assert_eq!(date(951_782_400), "2000-02-29 00:00 UTC");
        assert_eq!(date(1_795_500_060), "2026-11-24 06:01 UTC");
        assert!(date(u64::MAX / 4).ends_with("UTC"));
    }

    #[test]
    fn data_sets_of_one_file_name_have_names_apart() {
        let check = |paths: &[&str], names: &[&str]| {
            assert_eq!(short_names(&paths.iter().map(ToString::to_string).collect::<Vec<_>>()), names);
        };
        check(&["data/dolly15k.jsonl", "b/x.jsonl.gz", "c.tok"], &["dolly15k", "x", "c"]);
        check(&["a/train.jsonl", "b/train.jsonl", "dev.jsonl"], &["a_train", "b_train", "dev"]);
        check(&["x/a/train.jsonl", "y/a/train.jsonl"], &["x_a_train", "y_a_train"]);
        check(&["train.jsonl", "b/train.jsonl", "b/train.json"], &["train", "b_train", "b_train_2"]);
        check(&["train.jsonl", "./train.jsonl", "/d/train.jsonl"], &["train", "train_2", "d_train"]);
        check(&["a/train.jsonl", "b/train.jsonl", "a_train.jsonl"], &["a_train", "b_train", "a_train_2"]);
    }
}
