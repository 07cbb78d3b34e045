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

    #[test]
    fn dates() {
        assert_eq!(date(0), "1970-01-01 00:00 UTC");
        assert_eq!(date(951_782_400), "2000-02-29 00:00 UTC");
        assert_eq!(date(1_795_500_060), "2026-11-24 06:01 UTC");
        assert!(date(u64::MAX / 4).ends_with("UTC"));
    }
}
