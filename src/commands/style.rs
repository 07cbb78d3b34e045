//! Colour on stdout: only on a terminal, never with `NO_COLOR`.

use std::io::IsTerminal;

/// How to show which text is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Style {
    colour: bool,
}

impl Style {
    /// What suits stdout. `NO_COLOR` (no-color.org) and `TERM=dumb` switch colour off.
    pub fn stdout() -> Self {
        let set = |name: &str| std::env::var_os(name).is_some_and(|v| !v.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|t| t == "dumb");
        Self { colour: std::io::stdout().is_terminal() && !set("NO_COLOR") && !dumb }
    }

    /// A style with or without colour.
    pub fn new(colour: bool) -> Self {
        Self { colour }
    }

    /// Text that carries loss: green, or between « and ».
    pub fn trained(self, text: &str) -> String {
        match self.colour {
            true => self.paint("1;32", text),
            false => format!("«{text}»"),
        }
    }

    /// Text that is context only: grey, or as it is.
    pub fn context(self, text: &str) -> String {
        match self.colour {
            true => self.paint("2", text),
            false => text.into(),
        }
    }

    /// A heading: bold, or as it is.
    pub fn heading(self, text: &str) -> String {
        match self.colour {
            true => self.paint("1", text),
            false => text.into(),
        }
    }

    /// A finding: red where it is a problem, else yellow; or as it is.
    pub fn finding(self, problem: bool, text: &str) -> String {
        match self.colour {
            true => self.paint(if problem { "31" } else { "33" }, text),
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

    /// Colour line by line: pagers reset it at line ends.
    fn paint(self, code: &str, text: &str) -> String {
        let line = |l: &str| {
            if l.is_empty() { String::new() } else { format!("\x1b[{code}m{l}\x1b[0m") }
        };
        text.split('\n').map(line).collect::<Vec<_>>().join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_with_and_without_colour() {
        assert_eq!(Style::new(false).spans("ab cd\nef", &[[3, 8]]), "ab «cd\nef»");
        assert_eq!(Style::new(true).spans("a\nb", &[[0, 3]]), "\x1b[1;32ma\x1b[0m\n\x1b[1;32mb\x1b[0m");
    }
}
