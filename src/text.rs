//! Text for people: tables, sizes, counts, times, and which of it is trained.

use std::borrow::Cow;
use std::fmt::Write;
use std::ops::Range;
use std::path::{Component, Path};

use crate::say::{self, visible};

/// Columns as wide as their widest cell, two blanks apart; the last one ragged. The first row is the header.
pub fn table(rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<Cow<str>>> = rows.iter().map(|r| r.iter().map(|c| visible(c)).collect()).collect();
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for row in &rows {
        let mut line = String::new();
        for (cell, w) in row.iter().zip(&widths) {
            let _ = write!(line, "  {cell:<w$}");
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
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
    /// What suits stdout. `NO_COLOR` (no-color.org) and `TERM=dumb` switch colour off.
    pub fn stdout() -> Self {
        let set = |name: &str| std::env::var_os(name).is_some_and(|v| !v.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|t| t == "dumb");
        Self { colour: say::stdout_is_terminal() && !set("NO_COLOR") && !dumb }
    }

    /// A style with or without colour.
    pub fn new(colour: bool) -> Self {
        Self { colour }
    }

    /// Text that carries loss: green, or between « and ».
    pub fn trained(self, text: &str) -> String {
        let text = visible(text);
        match self.colour {
            true => self.paint("1;32", &text),
            false => format!("«{text}»"),
        }
    }

    /// Text that is context only: grey, or as it is.
    pub fn context(self, text: &str) -> String {
        let text = visible(text);
        match self.colour {
            true => self.paint("2", &text),
            false => text.into(),
        }
    }

    /// A heading: bold, or as it is.
    pub fn heading(self, text: &str) -> String {
        let text = visible(text);
        match self.colour {
            true => self.paint("1", &text),
            false => text.into(),
        }
    }

    /// A finding: red where it is a problem, else yellow; or as it is.
    pub fn finding(self, problem: bool, text: &str) -> String {
        let text = visible(text);
        match self.colour {
            true => self.paint(if problem { "31" } else { "33" }, &text),
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
    fn paint(self, code: &str, text: &str) -> String {
        let line = |l: &str| {
            if l.is_empty() { String::new() } else { format!("\x1b[{code}m{l}\x1b[0m") }
        };
        text.split('\n').map(line).collect::<Vec<_>>().join("\n")
    }
}

/// `data/sft/dolly15k.jsonl` as `dolly15k`: a name for tables, metrics and files. Where several would have one name, as many folders
/// as tell them apart come first (`a_train`), or else a number behind it.
pub fn short_names(paths: &[String]) -> Vec<String> {
    let parts: Vec<Vec<String>> = paths
        .iter()
        .map(|path| {
            let path = Path::new(path.strip_suffix(".gz").unwrap_or(path)).with_extension("");
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
        assert_eq!(Style::new(true).spans("a\nb", &[[0, 3]]), "\x1b[1;32ma\x1b[0m\n\x1b[1;32mb\x1b[0m");
    }

    #[test]
    fn what_would_move_a_cursor_or_hide_text_is_written_out() {
        assert_eq!(visible("a\n\tb é 🙂 ಕ್\u{200d}ಷ"), "a\n\tb é 🙂 ಕ್\u{200d}ಷ");
        let hidden = "\x1b[2K\x07\r\u{9b}\0\x7f\u{202e}\u{2066}\u{feff}";
        assert_eq!(visible(hidden), "\\u001b[2K\\u0007\\u000d\\u009b\\u0000\\u007f\\u202e\\u2066\\ufeff");
        assert_eq!(Style::new(true).trained("\x1b[8m"), "\x1b[1;32m\\u001b[8m\x1b[0m");
        assert_eq!(Style::new(false).spans("a\rb\x1b", &[[2, 4]]), "a\\u000d«b\\u001b»");
        assert_eq!(table(&[vec!["\x1b]0;x\x07".into(), "b".into()]]), "  \\u001b]0;x\\u0007  b\n");
    }

    #[test]
    fn a_row_is_cut_where_its_mask_changes() {
        let row = |mask: &[bool]| Style::new(false).row(mask.len(), |i| mask[i], |r| format!("{r:?}"));
        assert_eq!(row(&[false, true, true, false]), "0..1«1..3»3..4");
        assert_eq!(row(&[true]), "«0..1»");
        assert_eq!(row(&[]), "");
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
