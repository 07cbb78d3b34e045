//! Rows as `prepare` writes them, and the counts of what was kept and dropped.

use std::collections::{BTreeMap, HashSet};

use serde_json::{Value, json};

/// One turn: role and text.
pub type Turn = (&'static str, String);

/// One row of a prepared data set.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Row {
    /// `{"prompt", "response"}`.
    Pair {
        /// What the user asks.
        prompt: String,
        /// What the model shall answer.
        response: String,
    },
    /// `{"messages": [...]}`, ends with the assistant.
    Conversation(Vec<Turn>),
}

impl Row {
    /// The row as one JSON object.
    pub fn to_json(&self) -> Value {
        match self {
            Self::Pair { prompt, response } => json!({"prompt": prompt, "response": response}),
            Self::Conversation(turns) => {
                let messages: Vec<Value> =
                    turns.iter().map(|(role, text)| json!({"role": role, "content": text})).collect();
                json!({"messages": messages})
            }
        }
    }
}

/// Rows kept so far, without duplicates, and why the others were dropped.
#[derive(Debug, Default)]
pub struct Collected {
    /// Kept rows in upstream order.
    pub rows: Vec<Row>,
    /// Reason and count of what was dropped, in alphabetical order.
    pub dropped: BTreeMap<&'static str, usize>,
    seen: HashSet<blake3::Hash>,
}

impl Collected {
    /// Keeps the row unless the very same one was kept before.
    pub fn keep(&mut self, row: Row) {
        if self.seen.insert(blake3::hash(row.to_json().to_string().as_bytes())) {
            self.rows.push(row);
        } else {
            self.drop("duplicate");
        }
    }

    /// Counts a dropped record or message.
    pub fn drop(&mut self, reason: &'static str) {
        *self.dropped.entry(reason).or_default() += 1;
    }
}

/// The text without surrounding white space and with `\n` line ends: upstream files mix both, and neither carries meaning.
pub fn clean(text: &str) -> String {
    text.replace("\r\n", "\n").trim().to_string()
}

/// A string field of a record, cleaned; missing and null count as empty.
///
/// # Errors
/// What was found instead of a string.
pub fn field(record: &Value, key: &str) -> Result<String, String> {
    match record.get(key) {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(s)) => Ok(clean(s)),
        Some(other) => Err(format!("field \"{key}\": expected a string, found {}", kind(other))),
    }
}

/// JSON's name for the type of a value.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
