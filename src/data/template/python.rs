//! Python's side of Jinja where the engine's differs: white space, methods of strings, and the arguments that transformers' and
//! Jinja2's filters take. Templates are written against Python; a difference would change rows without a word.

use std::io;

use minijinja::value::{Kwargs, Rest, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;
use serde::Serialize;

/// White space as `str.isspace` has it: Unicode's, and the four separators of ASCII (Python's Objects/unicodetype_db.h).
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// What ends a line for `str.splitlines`.
fn ends_line(c: char) -> bool {
    matches!(c, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}')
}

/// Methods of values: Python's own, then those of the engine's collection.
///
/// # Errors
/// If there is no such method, or its arguments are others.
pub(super) fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let (ValueKind::String, Some(text)) = (value.kind(), value.as_str())
        && let Some(out) = of_text(text, name, args)
    {
        return out;
    }
    pycompat::unknown_method_callback(state, value, name, args)
}

/// A method of a string; `None` where the engine's collection has it as Python does, or has none either.
fn of_text(text: &str, name: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    let parts = |parts: [&str; 3]| Value::from(parts.map(Value::from).to_vec());
    Some(match name {
        "strip" | "lstrip" | "rstrip" => from_args(args).map(|(chars,): (Option<&str>,)| {
            let (left, right) = (name != "rstrip", name != "lstrip");
            Value::from(strip(text, chars, left, right))
        }),
        "isspace" => from_args(args).map(|()| Value::from(!text.is_empty() && text.chars().all(is_space))),
        "title" => from_args(args).map(|()| Value::from(title(text))),
        "splitlines" => from_args(args).map(|(keep,): (Option<bool>,)| Value::from(lines(text, keep == Some(true)))),
        "split" if args.is_empty() || (args.len() == 1 && args[0].is_none()) => {
            Ok(Value::from(text.split(is_space).filter(|part| !part.is_empty()).map(Value::from).collect::<Vec<_>>()))
        }
        "split" if args.first().is_some_and(|by| by.as_str() == Some("")) => not_empty("").map(|()| Value::UNDEFINED),
        "rsplit" => from_args(args).and_then(|(by, most): (&str, Option<i64>)| {
            not_empty(by)?;
            let most = most.and_then(|n| usize::try_from(n).ok()).map_or(usize::MAX, |n| n.saturating_add(1));
            let mut all: Vec<Value> = text.rsplitn(most, by).map(Value::from).collect();
            all.reverse();
            Ok(Value::from(all))
        }),
        "partition" => from_args(args).and_then(|(by,): (&str,)| {
            not_empty(by)?;
            Ok(parts(text.split_once(by).map_or([text, "", ""], |(a, b)| [a, by, b])))
        }),
        "rpartition" => from_args(args).and_then(|(by,): (&str,)| {
            not_empty(by)?;
            Ok(parts(text.rsplit_once(by).map_or(["", "", text], |(a, b)| [a, by, b])))
        }),
        "removeprefix" => {
            from_args(args).map(|(start,): (&str,)| Value::from(text.strip_prefix(start).unwrap_or(text)))
        }
        "removesuffix" => from_args(args).map(|(end,): (&str,)| Value::from(text.strip_suffix(end).unwrap_or(text))),
        "index" | "rindex" => from_args(args).and_then(|(part,): (&str,)| {
            let at = if name == "index" { text.find(part) } else { text.rfind(part) };
            let missing = || Error::new(ErrorKind::InvalidOperation, "substring not found");
            at.map(|at| Value::from(text[..at].chars().count())).ok_or_else(missing)
        }),
        _ => return None,
    })
}

fn not_empty(by: &str) -> Result<(), Error> {
    match by {
        "" => Err(Error::new(ErrorKind::InvalidOperation, "empty separator")),
        _ => Ok(()),
    }
}

fn strip<'a>(text: &'a str, chars: Option<&str>, left: bool, right: bool) -> &'a str {
    let gone = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    let text = if left { text.trim_start_matches(gone) } else { text };
    if right { text.trim_end_matches(gone) } else { text }
}

/// `str.title`: a letter behind anything else is upper case, the others lower case.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut within = false;
    for c in text.chars() {
        if within {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
        }
        within = c.is_alphabetic();
    }
    out
}

fn lines(text: &str, keep: bool) -> Vec<Value> {
    let mut out = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(ends_line) {
        let end = if rest[at..].starts_with("\r\n") { 2 } else { rest[at..].chars().next().map_or(0, char::len_utf8) };
        out.push(Value::from(&rest[..if keep { at + end } else { at }]));
        rest = &rest[at + end..];
    }
    if !rest.is_empty() {
        out.push(Value::from(rest));
    }
    out
}

/// Jinja2's `trim`.
pub(super) fn trim(text: String, chars: Option<String>) -> String {
    strip(&text, chars.as_deref(), true, true).to_string()
}

/// Jinja2's `default`, whose second argument may be named.
///
/// # Errors
/// If there are more arguments, or others.
pub(super) fn default(value: &Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let mut args = args.into_values();
    let named = Kwargs::try_from(args.pop_if(|last| last.is_kwargs()).unwrap_or_default())?;
    if args.len() > 2 {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let mut args = args.into_iter();
    let mut next = |key: &str| match args.next() {
        None if named.has(key) => named.get::<Value>(key).map(Some),
        given => Ok(given),
    };
    let (other, lax) = (next("default_value")?, next("boolean")?);
    named.assert_all_used()?;
    let empty = value.is_undefined() || (lax.is_some_and(|lax| lax.is_true()) && !value.is_true());
    Ok(if empty { other.unwrap_or_else(|| Value::from("")) } else { value.clone() })
}

/// JSON as transformers' `tojson` writes it: Python's `json.dumps` with `ensure_ascii` off, nothing escaped for HTML. It takes
/// `ensure_ascii`, `indent`, `separators` and `sort_keys`.
///
/// # Errors
/// If an argument is another one or of another kind, or the value has no JSON.
pub(super) fn to_json(value: Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<Value> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let (ascii, sort): (Option<bool>, Option<bool>) = (options.get("ensure_ascii")?, options.get("sort_keys")?);
    options.assert_all_used()?;
    let error = |what: String| Error::new(ErrorKind::InvalidOperation, format!("tojson: {what}"));
    let mut value = serde_json::to_value(&value).map_err(|e| error(e.to_string()))?;
    if sort == Some(true) {
        value.sort_all_objects();
    }
    // Python: a number of blanks, or the text itself.
    let indent = match indent {
        None => None,
        Some(v) if v.is_none() => None,
        Some(v) => Some(match (v.as_str(), v.as_i64()) {
            (Some(text), _) => text.to_string(),
            (None, Some(n)) => " ".repeat(usize::try_from(n).unwrap_or(0).min(16)),
            _ => return Err(error(format!("indent: expected a number or a text, found {v}"))),
        }),
    };
    let (item, key) = match separators.as_deref() {
        None => (if indent.is_some() { "," } else { ", " }, ": "),
        Some([item, key]) => (item.as_str(), key.as_str()),
        Some(other) => return Err(error(format!("separators: expected two texts, found {}", other.len()))),
    };
    let format = Dumps { item, key, indent: indent.as_deref(), depth: 0, filled: false };
    let mut out = Vec::new();
    value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, format)).map_err(|e| error(e.to_string()))?;
    let text = String::from_utf8(out).map_err(|e| error(e.to_string()))?;
    Ok(if ascii == Some(true) { escaped(&text) } else { text })
}

/// `ensure_ascii`: what is not ASCII in `\u` escapes of UTF-16, DEL as it is.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            let units = &mut [0; 2];
            c.encode_utf16(units).iter().for_each(|unit| out.push_str(&format!("\\u{unit:04x}")));
        }
    }
    out
}

/// The layout of `json.dumps`.
struct Dumps<'a> {
    item: &'a str,
    key: &'a str,
    indent: Option<&'a str>,
    depth: usize,
    /// Whether the list or object that is being written has something in it.
    filled: bool,
}

impl Dumps<'_> {
    fn line<W: ?Sized + io::Write>(&self, w: &mut W) -> io::Result<()> {
        let Some(indent) = self.indent else { return Ok(()) };
        w.write_all(b"\n")?;
        (0..self.depth).try_for_each(|_| w.write_all(indent.as_bytes()))
    }

    fn open<W: ?Sized + io::Write>(&mut self, w: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.filled = false;
        w.write_all(bracket)
    }

    fn close<W: ?Sized + io::Write>(&mut self, w: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if self.filled {
            self.line(w)?;
        }
        w.write_all(bracket)
    }

    fn next<W: ?Sized + io::Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        if !first {
            w.write_all(self.item.as_bytes())?;
        }
        self.line(w)
    }
}

impl serde_json::ser::Formatter for Dumps<'_> {
    fn begin_array<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.open(w, b"[")
    }
    fn end_array<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.close(w, b"]")
    }
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.next(w, first)
    }
    fn end_array_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.filled = true;
        Ok(())
    }
    fn begin_object<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.open(w, b"{")
    }
    fn end_object<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.close(w, b"}")
    }
    fn begin_object_key<W: ?Sized + io::Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.next(w, first)
    }
    fn begin_object_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        w.write_all(self.key.as_bytes())
    }
    fn end_object_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.filled = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use minijinja::Environment;

    fn print(source: &str) -> Result<String, String> {
        let mut env = Environment::new();
        env.set_unknown_method_callback(super::method);
        env.add_filter("trim", super::trim);
        env.add_filter("default", super::default);
        env.add_filter("tojson", super::to_json);
        env.render_str(source, ()).map_err(|e| format!("{e:#}"))
    }

    /// The right column is what Jinja2 3.1 prints with transformers 5.24's `tojson`.
    #[test]
    fn filters_and_methods_print_what_python_prints() {
        for (source, expected) in [
            (r#"{{ "\u00a0 a \u3000\x1c"|trim }}|"#, "a|"),
            (r#"{{ "xxaxx"|trim("x") }}"#, "a"),
            (
                r#"{{ "\x1fa\x1d".strip() }}|{{ "xa x".strip("x") }}|{{ "a \n".rstrip("\n") }}|{{ " \x1ca ".lstrip() }}"#,
                "a|a |a |a ",
            ),
            (r#"{{ "a\x1cb  c".split()|join(",") }}"#, "a,b,c"),
            (r#"{{ "they're bill's ÉTÉ".title() }}"#, "They'Re Bill'S Été"),
            (r#"{{ "a\u2028b\r\nc\x0bd\n".splitlines()|join("|") }}"#, "a|b|c|d"),
            (r#"{{ "a\r\nb".splitlines(true)|join("|") }}"#, "a\r\n|b"),
            (r#"{{ "a-b-c".rsplit("-", 1)|join("|") }}|{{ "a-b-c".rsplit("-")|join("|") }}"#, "a-b|c|a|b|c"),
            (r#"{{ "a-b-c".partition("-")|join("|") }} {{ "abc".partition("-")|join("|") }}"#, "a|-|b-c abc||"),
            (r#"{{ "a-b-c".rpartition("-")|join("|") }} {{ "abc".rpartition("-")|join("|") }}"#, "a-b|-|c ||abc"),
            (r#"{{ "a-b".removeprefix("a-") }}{{ "a-b".removesuffix("-b") }}{{ "é-".index("-") }}"#, "ba1"),
            (
                r#"{{ ""|default("d", true) }}{{ ""|default("d", boolean=true) }}{{ x|default(default_value="e") }}{{ false|default("d") }}{{ x|default(none) }}"#,
                "ddeFalseNone",
            ),
            (
                r#"{{ {"b": 1, "a": [2, {"é": "😀"}]}|tojson(sort_keys=true, ensure_ascii=true) }}"#,
                r#"{"a": [2, {"\u00e9": "\ud83d\ude00"}], "b": 1}"#,
            ),
            (r#"{{ [1, {"a": "<é>"}]|tojson(separators=(",", ":")) }}"#, r#"[1,{"a":"<é>"}]"#),
            (
                r#"{{ {"a": [], "b": {}, "c": [1, 2]}|tojson(indent=2) }}"#,
                "{\n  \"a\": [],\n  \"b\": {},\n  \"c\": [\n    1,\n    2\n  ]\n}",
            ),
            (r#"{{ [1, 2]|tojson(indent=none) }}"#, "[1, 2]"),
            (r#"{{ [[], [1]]|tojson(indent=1) }}"#, "[\n [],\n [\n  1\n ]\n]"),
        ] {
            assert_eq!(print(source).as_deref(), Ok(expected), "{source}");
        }
    }

    #[test]
    fn arguments_that_python_does_not_take_are_errors() {
        for source in [
            r#"{{ [1]|tojson(allow_nan=true) }}"#,
            r#"{{ [1]|tojson(separators=[","]) }}"#,
            r#"{{ ""|default("a", true, 3) }}"#,
            r#"{{ ""|default("a", bool=true) }}"#,
            r#"{{ "a".split("") }}"#,
            r#"{{ "a".rsplit("") }}"#,
            r#"{{ "a".partition("") }}"#,
            r#"{{ "a".index("b") }}"#,
        ] {
            assert!(print(source).is_err(), "{source}: {:?}", print(source));
        }
    }
}
