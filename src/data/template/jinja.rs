//! Chat templates in Jinja, rendered as transformers renders them: `trim_blocks`, `lstrip_blocks`, `raise_exception`, `tojson`
//! and Python's string methods. `strftime_now` is there only with a pinned day: data prepared today and tomorrow would differ.
//!
//! Data is told from template by escaping it before rendering: a mark is put inside every control token's name that the
//! data contains, so that such a name without a mark can only be the template's own. Marks are Unicode noncharacters, which are
//! never text (Unicode 16.0, section 23.7); where data has them all the same, they are escaped too. `{% generation %}` blocks
//! print marks of their own, which give the supervised spans; in a template without such blocks an assistant turn is what
//! its rendering adds to that of the turns before it.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Value, context};

use super::python;
use super::{IM_END, IM_START, Part, Purpose, Rendered, Segment, TemplateOptions, Unmarked, probes};
use crate::data::row::{Message, Role};
use crate::error::{Error, Result};
use crate::files::unmarked;
use crate::heap::OfTemplate;
use crate::panics::caught;
use crate::{bail, ensure};

/// Starts a two-character escape in data; see [`escape`].
const ESCAPE: char = '\u{fdd0}';
const GENERATION: char = '\u{fdd1}';
const END_GENERATION: char = '\u{fdd2}';

/// Lines of a template and characters of a line stay below this.
const MOST: usize = 60_000;

/// Names, numbers, texts and signs in one tag: the parser goes as deep as an expression is long.
const MOST_WORDS: usize = 2000;

/// A parsed chat template.
#[derive(Debug)]
pub(super) struct Jinja {
    source: String,
    env: Environment<'static>,
    options: TemplateOptions,
    /// Whether it has generation marks.
    marked: bool,
    /// Whether BOS comes before what it prints.
    adds_bos: bool,
}

impl Jinja {
    pub(super) fn new(source: &str, options: &TemplateOptions) -> Result<Self> {
        ensure!(
            !source.contains([ESCAPE, GENERATION, END_GENERATION]),
            "the template contains Unicode noncharacters (U+FDD0 to U+FDD2), expected text"
        );
        // Jinja2 reads every line end as a newline. A byte order mark is none of the template's text: every row would begin with it.
        let source = &unmarked(source).replace("\r\n", "\n").replace('\r', "\n");
        let (marked, n_marks) = mark_generation(source)?;
        ensure!(
            n_marks > 0 || options.unmarked != Unmarked::Refuse,
            "no {{% generation %}} mark, expected {{% generation %}} … {{% endgeneration %}} around what the assistant says"
        );
        // The engine counts lines and columns in 16 bits.
        let longest = marked.split('\n').map(|l| l.chars().count()).max().unwrap_or(0);
        let lines = marked.split('\n').count();
        ensure!(
            longest < MOST && lines < MOST,
            "the template has {lines} lines, the longest of {longest} characters, expected fewer than {MOST} of each"
        );
        if let Some((line, n)) = longest_tag(&marked).filter(|(_, n)| *n > MOST_WORDS) {
            bail!("line {line}: a tag of {n} names, numbers, texts and signs, expected at most {MOST_WORDS}");
        }
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(syntax.map_err(|e| jinja_error(&e))?);
        // A template is a file like any other: it must not run forever or fill the memory. A unit pays for an instruction or for
        // 64 bytes of text: a line of the greatest length taken, 16 MiB, costs a sixth of it.
        env.set_fuel(Some(1_500_000));
        env.set_unknown_method_callback(python::method);
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        env.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        env.add_filter("tojson", python::to_json);
        env.add_filter("trim", python::trim);
        env.add_filter("default", python::default);
        env.add_filter("d", python::default);
        if let Some(date) = options.date {
            env.add_function("strftime_now", move |format: String| -> Result<String, minijinja::Error> {
                let wrong = |e: Error| minijinja::Error::new(ErrorKind::InvalidOperation, e.to_string());
                date.format(&format).map_err(wrong)
            });
        }
        let parsed = guarded(|| env.add_template_owned("chat", marked))?;
        parsed.map_err(|e| jinja_error(&e))?;
        let mut this =
            Self { source: source.to_string(), env, options: options.clone(), marked: n_marks > 0, adds_bos: false };
        // A template that names BOS prints it where it wants it. Others may spell it, in conversations that they take.
        let spelled = |m: Vec<Message>| this.print(&m, Purpose::Train).is_ok_and(|text| this.begins_with_bos(&text));
        let silent = !options.of_model && !this.uses_chatml() && !source.contains("bos_token");
        this.adds_bos = silent && !probes().into_iter().any(spelled);
        Ok(this)
    }

    pub(super) fn uses_chatml(&self) -> bool {
        self.source.contains(IM_START) || self.source.contains(IM_END)
    }

    fn begins_with_bos(&self, text: &str) -> bool {
        text.trim_start_matches(GENERATION).starts_with(&self.options.names.bos)
    }

    /// The source as it is saved: what it prints, encoded by the saved tokenizer, has the ids of training.
    pub(super) fn source_to_save(&self) -> String {
        let names = &self.options.names;
        let printed = names.said_eos.as_ref().unwrap_or(&names.eos);
        // With ChatML the saved tokenizer's eos_token is `<|im_end|>`.
        let saved = if self.uses_chatml() { IM_END } else { &names.eos };
        let bind = match self.source.contains("eos_token") && printed != saved {
            true => format!("{{% set eos_token = {} %}}{{{{ '' }}}}", serde_json::Value::from(printed.as_str())),
            false => String::new(),
        };
        format!("{}{bind}{}", if self.adds_bos { "{{ bos_token }}" } else { "" }, self.source)
    }

    /// The text with marks and escapes in it.
    fn print(&self, messages: &[Message], purpose: Purpose) -> Result<String> {
        let messages: Vec<Value> = messages
            .iter()
            .map(|m| {
                let content = Value::from(self.escape(&m.content));
                match &m.input {
                    Some(input) => context! { role => m.role.name(), content, input => self.escape(input) },
                    None => context! { role => m.role.name(), content },
                }
            })
            .collect();
        let template = self.env.get_template("chat").expect("the template was added");
        // As transformers does it: a token that is missing has no name, and what is not given is none.
        let name = |text: Option<&str>| text.filter(|t| !t.is_empty()).map_or(Value::UNDEFINED, Value::from);
        let names = &self.options.names;
        let values = context! {
                messages,
                bos_token => name(Some(&names.bos)),
                eos_token => name(names.said_eos.as_deref().or(Some(&names.eos))),
                pad_token => name(names.pad.as_deref()),
                unk_token => name(names.unk.as_deref()),
                tools => (),
                documents => (),
                add_generation_prompt => purpose == Purpose::Generate,
        };
        guarded(|| template.render(values))?.map_err(|e| jinja_error(&e))
    }

    pub(super) fn render(&self, messages: &[Message], purpose: Purpose) -> Result<Rendered> {
        let mut marked = self.print(messages, purpose)?;
        let mut trained: Vec<bool> = messages.iter().filter(|m| m.role == Role::Assistant).map(|m| m.train).collect();
        if !self.marked && self.options.unmarked == Unmarked::Whole {
            marked = format!("{GENERATION}{marked}{END_GENERATION}");
            trained.clear();
        } else if !self.marked && purpose == Purpose::Train {
            marked = self.mark_turns(messages, &marked)?;
        }
        let n_spans = marked.matches(GENERATION).count();
        let mixed = trained.iter().any(|&t| !t);
        ensure!(
            !mixed || n_spans == trained.len(),
            "\"train\": false needs one {{% generation %}} block for each assistant turn, expected {}, found {n_spans}",
            trained.len()
        );
        let mut out = Rendered::default();
        if self.adds_bos && !self.begins_with_bos(&marked) {
            out.implicit_bos();
        }
        let mut span = 0;
        let mut inside = false;
        let mut rest = marked.as_str();
        let mut text = String::new();
        let on = |inside: bool, span: usize| inside && (!mixed || trained[span - 1]);
        while let Some(c) = rest.chars().next() {
            if c == GENERATION || c == END_GENERATION {
                flush(&mut out, &mut text, on(inside, span));
                ensure!(
                    inside == (c == END_GENERATION),
                    "{{% generation %}} blocks are nested, expected one after the other"
                );
                inside = c == GENERATION;
                span += usize::from(inside);
                rest = &rest[c.len_utf8()..];
            } else if c == ESCAPE {
                let mut chars = rest[c.len_utf8()..].chars();
                match chars.next() {
                    Some('1') => text.push(ESCAPE),
                    Some('2') => text.push(GENERATION),
                    Some('3') => text.push(END_GENERATION),
                    Some('0') => {}
                    // The template cut a text in the middle of an escape; what is left of it is not text of the data.
                    _ => bail!("the template cuts its contents apart within a control token's name"),
                }
                rest = chars.as_str();
            } else if let Some((token, name)) = self.options.names.at(rest) {
                flush(&mut out, &mut text, on(inside, span));
                out.control(token, on(inside, span));
                rest = &rest[name.len()..];
            } else {
                text.push(c);
                rest = &rest[c.len_utf8()..];
            }
        }
        flush(&mut out, &mut text, on(inside, span));
        Ok(out)
    }

    /// Marks around what each assistant turn adds to the rendering of the turns before it and the header after which the
    /// assistant speaks. White space behind a closing token is not the assistant's.
    fn mark_turns(&self, messages: &[Message], whole: &str) -> Result<String> {
        let mut out = String::with_capacity(whole.len());
        let mut from = 0;
        for (k, _) in messages.iter().enumerate().filter(|(_, m)| m.role == Role::Assistant) {
            let unknown = "the template has no {% generation %} marks, and what the assistant says cannot be told from its \
                           renderings turn by turn";
            let part = |n: usize, purpose| match n < messages.len() || purpose == Purpose::Generate {
                true => self
                    .print(&messages[..n], purpose)
                    .map_err(|e| e.context(format!("{unknown}: up to messages[{n}]"))),
                false => Ok(whole.to_string()),
            };
            let (before, after) = (part(k, Purpose::Generate)?, part(k + 1, Purpose::Train)?);
            ensure!(
                after.starts_with(&before) && before.len() >= from,
                "{unknown}: with messages[{k}] it does not go on where the prompt before it ends; put marks into a copy of it"
            );
            ensure!(
                whole.starts_with(&after),
                "{unknown}: the turns up to messages[{k}] look different once others follow; put marks into a copy of it"
            );
            let said = &after[before.len()..];
            let closed = said.trim_end();
            let end = before.len() + if self.options.names.ends(closed) { closed.len() } else { said.len() };
            out.push_str(&whole[from..before.len()]);
            out.push(GENERATION);
            out.push_str(&whole[before.len()..end]);
            out.push(END_GENERATION);
            from = end;
        }
        out.push_str(&whole[from..]);
        Ok(out)
    }

    /// Marks data so that nothing in it can be taken for a control token or a generation mark.
    fn escape(&self, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        for (i, c) in text.char_indices() {
            match c {
                ESCAPE => out.extend([ESCAPE, '1']),
                GENERATION => out.extend([ESCAPE, '2']),
                END_GENERATION => out.extend([ESCAPE, '3']),
                _ => out.push(c),
            }
            if self.options.names.at(&text[i..]).is_some() {
                out.extend([ESCAPE, '0']);
            }
        }
        out
    }
}

fn flush(out: &mut Rendered, text: &mut String, supervised: bool) {
    if !text.is_empty() {
        let part = Part::Template(std::mem::take(text));
        out.segments.push(Segment { part, supervised, implicit: false });
    }
}

/// Calls the engine; what a template makes it do wrong is an error.
fn guarded<T>(call: impl FnOnce() -> T) -> Result<T> {
    let _deep = OfTemplate::begin();
    caught(call)
        .ok_or_else(|| Error::new("the template asks for what the engine cannot do; look at its slices and numbers"))
}

/// The tag with the most words, as a line and their number. A text in quotes is one word, whatever stands in it.
fn longest_tag(source: &str) -> Option<(usize, usize)> {
    let mut longest = None;
    let mut rest = source;
    while let Some(at) = rest.find("{%").into_iter().chain(rest.find("{{")).min() {
        let line = source[..source.len() - rest.len() + at].matches('\n').count() + 1;
        let close = if rest[at..].starts_with("{%") { "%}" } else { "}}" };
        rest = &rest[at + 2..];
        let (mut words, mut quote, mut inside, mut escaped) = (0, None, false, false);
        let mut end = rest.len();
        for (i, c) in rest.char_indices() {
            if let Some(q) = quote {
                quote = if c == q && !escaped { None } else { quote };
                escaped = c == '\\' && !escaped;
                continue;
            }
            if rest[i..].starts_with(close) {
                end = i + close.len();
                break;
            }
            let of_name = c.is_alphanumeric() || c == '_';
            words += usize::from(if of_name { !inside } else { !c.is_whitespace() });
            inside = of_name;
            quote = Some(c).filter(|c| ['"', '\''].contains(c));
        }
        rest = &rest[end..];
        longest = longest.max(Some((words, line)));
    }
    longest.map(|(words, line)| (line, words))
}

fn jinja_error(e: &minijinja::Error) -> Error {
    let mut what = e.detail().map_or_else(|| e.kind().to_string(), ToString::to_string);
    if e.kind() == ErrorKind::UnknownFunction && what.contains("strftime_now") {
        what = "strftime_now: the rows would depend on the day; name one with --template-date YYYY-MM-DD".to_string();
    }
    match e.line() {
        Some(line) => Error::new(format!("line {line}: {what}")),
        None => Error::new(what),
    }
}

/// Replaces generation tags by blocks that print a mark and treat white space as the tags would. What is set between them does not leave
/// them: in transformers they are a call block.
fn mark_generation(source: &str) -> Result<(String, usize)> {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    let (mut n, mut open) = (0, false);
    while let Some(at) = rest.find("{%") {
        // From behind the opening on: `{%}` is no tag.
        let Some(len) = rest[at + 2..].find("%}") else { break };
        let tag = &rest[at + 2..at + 2 + len];
        let (left, tag) = tag.strip_prefix('-').map_or(("", tag), |t| ("-", t));
        let (right, tag) = tag.strip_suffix('-').map_or(("", tag), |t| ("-", t));
        let mark = match tag.trim() {
            "generation" => Some(GENERATION),
            "endgeneration" => Some(END_GENERATION),
            _ => None,
        };
        match mark {
            Some(mark) => {
                ensure!(
                    open == (mark == END_GENERATION),
                    "{{% {} %}} out of place, expected {{% generation %}} and {{% endgeneration %}} in turn",
                    tag.trim()
                );
                open = !open;
                n += 1;
                out.push_str(&rest[..at]);
                match open {
                    true => out
                        .push_str(&format!("{{%{left} with %}}{{{{ '{mark}' }}}}{{% if true %}}{{% endif {right}%}}")),
                    false => out.push_str(&format!(
                        "{{%{left} if true %}}{{{{ '{mark}' }}}}{{% endif %}}{{% endwith {right}%}}"
                    )),
                }
                rest = &rest[at + 2 + len + 2..];
            }
            None => {
                out.push_str(&rest[..at + 2]);
                rest = &rest[at + 2..];
            }
        }
    }
    ensure!(!open, "{{% generation %}} is never closed, expected {{% endgeneration %}}");
    out.push_str(rest);
    Ok((out, n / 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_engine_cannot_count_is_refused() {
        let options = TemplateOptions::default();
        let make = |filler: String| Jinja::new(&format!("{{% generation %}}x{{% endgeneration %}}{filler}"), &options);
        assert!(make("y".repeat(50_000)).is_ok());
        for filler in ["y".repeat(70_000) + "{{ '", "\n".repeat(70_000) + "{{ '"] {
            let e = make(filler).unwrap_err().to_string();
            assert!(e.contains("expected fewer than 60000"), "{e}");
        }
    }

    /// As Jinja2 prints it where generation is a call block, as in transformers.
    #[test]
    fn what_is_set_between_the_marks_stays_there() {
        for (template, printed) in [
            ("{% set x = 'a' %}{% generation %}{% set x = 'b' %}{{ x }}{% endgeneration %}{{ x }}", "ba"),
            ("{% generation %}{% set y = 'b' %}{{ y }}{% endgeneration %}[{{ y }}]", "b[]"),
            (
                "{% set ns = namespace(x='a') %}{% generation %}{% set ns.x = 'b' %}{{ ns.x }}{% endgeneration %}{{ ns.x }}",
                "bb",
            ),
            (
                "{% for m in [1, 2] %}{% generation %}{{ loop.index }}{% set z = m %}{{ z }}{% endgeneration %}({{ z }}){% endfor %}",
                "11()22()",
            ),
        ] {
            let jinja =
                Jinja::new(template, &TemplateOptions { of_model: true, ..TemplateOptions::default() }).unwrap();
            let text = jinja.print(&[], Purpose::Train).unwrap().replace([GENERATION, END_GENERATION], "");
            assert_eq!(text, printed, "{template}");
        }
    }

    #[test]
    fn tags_keep_their_white_space_control() {
        let (marked, n) = mark_generation("a\n  {%- generation -%}\n b {% endgeneration %}\nc").unwrap();
        assert_eq!(n, 1);
        assert_eq!(
            marked,
            "a\n  {%- with %}{{ '\u{fdd1}' }}{% if true %}{% endif -%}\n b {% if true %}{{ '\u{fdd2}' }}{% endif %}{% endwith %}\nc"
        );
        assert_eq!(mark_generation("{%} {% if a %}").unwrap().1, 0);
        assert!(mark_generation("{% generation %}").is_err());
        assert!(mark_generation("{% endgeneration %}{% generation %}").is_err());
    }
}
