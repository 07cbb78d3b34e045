//! Which column of the data is read as which field: `--columns prompt=question response=answer`.

use std::sync::Arc;

use crate::error::{Error, Result};

/// The fields that a column may be read as: those of the forms of rows, and the text of pretraining.
pub(super) const FIELDS: [&str; 11] = [
    "prompt",
    "response",
    "completion",
    "system",
    "messages",
    "conversations",
    "instruction",
    "input",
    "context",
    "output",
    "text",
];

/// Columns that are read as fields of other names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Columns(Arc<[(&'static str, String)]>);

/// What a key of a row is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Column {
    /// Itself.
    AsItIs,
    /// Read as this field.
    Read(&'static str),
    /// Not read: another column is read as the field of its name.
    Replaced,
}

impl Columns {
    /// Reads `FIELD=COLUMN` pairs.
    ///
    /// # Errors
    /// A usage error for what is no pair, a field that no form has, or a field or column named twice.
    pub fn parse(pairs: &[String]) -> Result<Self> {
        let mut all: Vec<(&'static str, String)> = Vec::new();
        for pair in pairs {
            let bad = |what: String| Err(Error::usage(format!("columns: {what}")));
            let Some((field, column)) = pair.split_once('=').filter(|(f, c)| !f.is_empty() && !c.is_empty()) else {
                return bad(format!("expected FIELD=COLUMN such as prompt=question, found {pair:?}"));
            };
            let Some(field) = FIELDS.into_iter().find(|f| *f == field) else {
                let other_way =
                    if FIELDS.contains(&column) { format!("; did you mean {column}={field}?") } else { String::new() };
                return bad(format!("expected a field of {}, found {field:?}{other_way}", FIELDS.join(", ")));
            };
            if all.iter().any(|(f, c)| *f == field || c == column) {
                return bad(format!("{pair:?} names a field or column again, expected each once"));
            }
            all.push((field, column.to_string()));
        }
        Ok(Self(all.into()))
    }

    /// Whether every key is itself.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What a key of a row is.
    pub fn of(&self, key: &str) -> Column {
        if let Some((field, _)) = self.0.iter().find(|(_, column)| column == key) {
            return Column::Read(field);
        }
        if self.0.iter().any(|(field, _)| *field == key) { Column::Replaced } else { Column::AsItIs }
    }

    /// The column that is read as a field.
    pub fn column<'a>(&'a self, field: &'a str) -> &'a str {
        self.0.iter().find(|(f, _)| *f == field).map_or(field, |(_, column)| column)
    }

    /// The pairs, as they are typed.
    pub fn pairs(&self) -> Vec<String> {
        self.0.iter().map(|(field, column)| format!("{field}={column}")).collect()
    }

    /// What is wrong with a row, in the names of its columns.
    pub fn in_words(&self, error: String) -> String {
        self.0.iter().fold(error, |error, (field, column)| {
            error.replacen(&format!("field \"{field}\""), &format!("column \"{column}\", read as \"{field}\","), 1)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[&str]) -> Result<Columns, String> {
        Columns::parse(&pairs.iter().map(ToString::to_string).collect::<Vec<_>>()).map_err(|e| e.to_string())
    }

    #[test]
    fn pairs_are_held_to_known_fields() {
        let columns = parse(&["prompt=question", "response=prompt"]).unwrap();
        assert_eq!(columns.of("question"), Column::Read("prompt"));
        assert_eq!(columns.of("prompt"), Column::Read("response"));
        assert_eq!(columns.of("response"), Column::Replaced);
        assert_eq!(columns.of("other"), Column::AsItIs);
        for (pair, what) in [
            ("question", "expected FIELD=COLUMN such as prompt=question, found \"question\""),
            ("=a", "expected FIELD=COLUMN"),
            ("question=prompt", "found \"question\"; did you mean prompt=question?"),
            ("a=b", "expected a field of prompt, response"),
        ] {
            let e = parse(&[pair]).unwrap_err();
            assert!(e.contains(what), "{e}");
        }
        assert!(parse(&["prompt=a", "prompt=b"]).unwrap_err().contains("expected each once"));
        assert!(parse(&["prompt=a", "response=a"]).unwrap_err().contains("expected each once"));
    }
}
