//! Text as HTML: every string of a file goes through [`escape`] or [`json`], whatever it holds.

use serde_json::Value;

use super::chart::COLOURS;
use super::files::Run;

/// Longest text shown of a file; samples and paths beyond it are cut.
const LONGEST: usize = 6000;

/// Text inside an element or a quoted attribute. Control characters, which HTML forbids, become U+FFFD.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 16);
    for (i, c) in text.char_indices() {
        if i > LONGEST {
            out.push_str(" … (cut)");
            break;
        }
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(c),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// A JSON value as text for a script element of type `application/json`: no character of it can end the element or begin
/// another.
pub fn json(value: &Value) -> String {
    let mut out = String::new();
    for c in value.to_string().chars() {
        match c {
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => out.push_str(&format!("\\u{:04x}", c as u32)),
            c => out.push(c),
        }
    }
    out
}

/// A square of the run's colour; no line ends between it and what follows.
pub fn swatch(run: usize) -> String {
    format!("<i class=\"swatch c{}\"></i>&#8288;", run % COLOURS)
}

/// The run's name with its colour, where there are several.
pub fn heading(runs: &[Run], i: usize) -> String {
    match runs.len() {
        1 => String::new(),
        _ => format!("<h3>{}{}</h3>", swatch(i), escape(&runs[i].name)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_a_text_is_markup() {
        let text = "<script>alert('x')</script> & \"q\" \0\u{1b}[31m\n";
        assert_eq!(
            escape(text),
            "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &quot;q&quot; \u{fffd}\u{fffd}[31m\n"
        );
        assert!(escape(&"é".repeat(9000)).ends_with("(cut)"));
        let value = serde_json::json!({"a": "</script><!--\u{2028}"});
        let text = json(&value);
        assert!(!text.contains(['<', '>', '\u{2028}']));
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), value);
    }
}
