//! What `ringtune check` finds: each with a code that scripts can rely on, its place, what was expected and found, what to do.

use std::fmt;

use serde_json::{Value, json};

use crate::error::Error;

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// The training would fail, or what comes out would be wrong: exit code 1.
    Problem,
    /// The training runs; the user should know.
    Warning,
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How much it matters.
    pub severity: Severity,
    /// Which kind it is: stable, kebab case.
    pub code: &'static str,
    /// File, file and line, or setting.
    pub place: String,
    /// What is the matter.
    pub what: String,
    /// What was expected; empty where the message says it all.
    pub expected: String,
    /// What was found; as above.
    pub found: String,
    /// What to do about it; as above.
    pub advice: String,
}

impl Finding {
    fn new(severity: Severity, code: &'static str, place: impl Into<String>, what: impl Into<String>) -> Self {
        Self {
            severity,
            code,
            place: place.into(),
            what: what.into(),
            expected: String::new(),
            found: String::new(),
            advice: String::new(),
        }
    }

    /// Something that would make the training fail or be wrong.
    pub fn problem(code: &'static str, place: impl Into<String>, what: impl Into<String>) -> Self {
        Self::new(Severity::Problem, code, place, what)
    }

    /// Something to know.
    pub fn warning(code: &'static str, place: impl Into<String>, what: impl Into<String>) -> Self {
        Self::new(Severity::Warning, code, place, what)
    }

    /// What was expected, what was found.
    #[must_use]
    pub fn but(mut self, expected: impl Into<String>, found: impl Into<String>) -> Self {
        (self.expected, self.found) = (expected.into(), found.into());
        self
    }

    /// What to do.
    #[must_use]
    pub fn advice(mut self, advice: impl Into<String>) -> Self {
        self.advice = advice.into();
        self
    }

    /// The error with which the training would stop. Messages have one form, `what, expected …, found …; what to do`; the parts
    /// are taken apart where they stand so.
    pub fn error(code: &'static str, place: impl Into<String>, error: &Error) -> Self {
        let (place, text) = (place.into(), error.to_string());
        // The place stands in its own field; `tokenizer PLACE: what` and `PLACE: what` begin with it.
        let text = match text.split_once(&format!("{place}: ")) {
            Some((before, rest)) if !place.is_empty() && !before.contains(':') && before.len() < 24 => rest,
            _ => &text,
        };
        let (body, advice) = text.split_once("; ").unwrap_or((text, ""));
        let parts = body.split_once(", expected ").or_else(|| body.split_once(": expected "));
        let parts = parts.and_then(|(what, rest)| Some((what, rest.split_once(", found ")?)));
        match parts {
            Some((what, (expected, found))) => Self::problem(code, place, what).but(expected, found).advice(advice),
            None => Self::problem(code, place, body).advice(advice),
        }
    }

    /// As a JSON object.
    pub fn to_json(&self) -> Value {
        json!({
            "code": self.code, "place": self.place, "what": self.what,
            "expected": self.expected, "found": self.found, "do": self.advice,
        })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.severity {
            Severity::Problem => "problem",
            Severity::Warning => "warning",
        };
        write!(f, "{name} [{}] ", self.code)?;
        if !self.place.is_empty() {
            write!(f, "{}: ", self.place)?;
        }
        f.write_str(&self.what)?;
        if !self.expected.is_empty() {
            write!(f, ", expected {}, found {}", self.expected, self.found)?;
        }
        if !self.advice.is_empty() {
            write!(f, "; {}", self.advice)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_taken_apart_and_prints_as_it_was() {
        let e = Error::new("a.jsonl:3: bad row, expected an object, found an array; mend it");
        let f = Finding::error("bad-rows", "a.jsonl:3", &e);
        let parts = (f.what.as_str(), f.expected.as_str(), f.found.as_str(), f.advice.as_str());
        assert_eq!(parts, ("bad row", "an object", "an array", "mend it"));
        assert_eq!(f.to_string(), "problem [bad-rows] a.jsonl:3: bad row, expected an object, found an array; mend it");
        let e = Error::new("tokenizer t.model: no newline, expected one, found none");
        assert_eq!(Finding::error("newline", "t.model", &e).what, "no newline");
        let whole = Finding::error("x", "", &Error::new("no such file"));
        assert_eq!((whole.what.as_str(), whole.expected.as_str()), ("no such file", ""));
        assert_eq!(Finding::warning("y", "z", "w").to_json()["code"], "y");
    }
}
