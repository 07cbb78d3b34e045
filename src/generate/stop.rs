//! Stop texts: an answer ends before the first of them, and what may be the beginning of one is held back until that is known.

/// Watches the text of one sequence.
#[derive(Clone, Debug, Default)]
pub struct StopText {
    stops: Vec<String>,
    held: String,
    found: bool,
}

impl StopText {
    /// Watches for any of `stops`; empty ones are left out.
    pub fn new(stops: &[String]) -> Self {
        Self { stops: stops.iter().filter(|s| !s.is_empty()).cloned().collect(), held: String::new(), found: false }
    }

    /// Takes more text and gives what may be shown; after a stop text nothing more comes.
    pub fn push(&mut self, text: &str) -> String {
        if self.found {
            return String::new();
        }
        self.held.push_str(text);
        let first = self.stops.iter().filter_map(|s| self.held.find(s.as_str())).min();
        if let Some(at) = first {
            self.found = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let safe = self.held.len() - self.longest_beginning();
        let rest = self.held.split_off(safe);
        std::mem::replace(&mut self.held, rest)
    }

    /// What is still held back when no more text comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Whether a stop text has come.
    pub fn found(&self) -> bool {
        self.found
    }

    /// Length of the longest end of the held text that begins a stop text.
    fn longest_beginning(&self) -> usize {
        let begins = |at: usize| self.stops.iter().any(|s| s.starts_with(&self.held[at..]));
        let mut ends = self.held.char_indices().map(|(at, _)| at);
        ends.find(|&at| begins(at)).map_or(0, |at| self.held.len() - at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], parts: &[&str]) -> (String, bool) {
        let stops: Vec<String> = stops.iter().map(|s| s.to_string()).collect();
        let mut watch = StopText::new(&stops);
        let mut out: String = parts.iter().map(|p| watch.push(p)).collect();
        out.push_str(&watch.finish());
        (out, watch.found())
    }

    #[test]
    fn text_ends_before_the_first_stop() {
        assert_eq!(run(&["###"], &["a #", "#", "# b"]), ("a ".into(), true));
        assert_eq!(run(&["###"], &["a ##", " b"]), ("a ## b".into(), false));
        assert_eq!(run(&["bc", "b"], &["ab", "c"]), ("a".into(), true));
        assert_eq!(run(&["é\n"], &["caf", "é", "\nx"]), ("caf".into(), true));
        assert_eq!(run(&[], &["a", "b"]), ("ab".into(), false));
        assert_eq!(run(&[""], &["a"]), ("a".into(), false));
        let mut watch = StopText::new(&["END".into()]);
        assert_eq!(watch.push("x E"), "x ");
        assert_eq!(watch.push("N"), "");
        assert_eq!(watch.push("o"), "ENo");
    }
}
