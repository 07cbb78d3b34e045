//! The keys of a JSON object, each of the kind that is expected.

use serde_json::{Map, Value};

use crate::bail;
use crate::error::Result;

/// Largest value accepted for a dimension, far above any published model, so that a hostile file cannot ask for a huge allocation.
const MAX_DIM: usize = 1 << 26;

/// Typed access to the keys of one JSON object; a JSON null counts as absent.
pub(super) struct Keys<'a> {
    pub map: &'a Map<String, Value>,
    pub prefix: &'a str,
}

impl<'a> Keys<'a> {
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    pub fn require<T>(&self, key: &str, found: Option<T>) -> Result<T> {
        match found {
            Some(x) => Ok(x),
            None => bail!("missing key {}{key}", self.prefix),
        }
    }

    pub fn typed<T>(&self, key: &str, what: &str, convert: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        match self.get(key) {
            None => Ok(None),
            Some(v) => match convert(v) {
                Some(x) => Ok(Some(x)),
                None => bail!("{}{key}: expected {what}, found {}", self.prefix, shown(v)),
            },
        }
    }

    pub fn opt_number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    pub fn number(&self, key: &str) -> Result<f64> {
        self.opt_number(key).and_then(|x| self.require(key, x))
    }

    pub fn opt_bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub fn opt_text(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a string", Value::as_str)
    }

    pub fn text(&self, key: &str) -> Result<&'a str> {
        self.opt_text(key).and_then(|x| self.require(key, x))
    }

    pub fn opt_object(&self, key: &str) -> Result<Option<&'a Map<String, Value>>> {
        self.typed(key, "an object", Value::as_object)
    }

    pub fn opt_count(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a count", |v| v.as_u64().and_then(|n| usize::try_from(n).ok()))
    }

    /// A positive size.
    pub fn opt_dim(&self, key: &str) -> Result<Option<usize>> {
        let what = format!("a whole number from 1 to {MAX_DIM}");
        self.typed(key, &what, |v| {
            v.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=MAX_DIM).contains(n))
        })
    }

    pub fn dim(&self, key: &str) -> Result<usize> {
        self.opt_dim(key).and_then(|x| self.require(key, x))
    }

    /// A token id; -1 counts as absent (Llama-1 files write it for a missing padding id).
    pub fn opt_id(&self, key: &str) -> Result<Option<u32>> {
        let id = self.typed(key, "a token id", Value::as_i64)?;
        match id {
            None | Some(-1) => Ok(None),
            Some(id) => match u32::try_from(id) {
                Ok(id) => Ok(Some(id)),
                Err(_) => bail!("{}{key}: expected a token id, found {id}", self.prefix),
            },
        }
    }
}

pub(super) fn kind(v: &Value) -> &'static str {
    match v {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

pub(super) fn shown(v: &Value) -> String {
    match v {
        Value::Bool(_) | Value::Number(_) => v.to_string(),
        Value::String(s) if s.len() <= 40 => format!("{s:?}"),
        _ => kind(v).to_string(),
    }
}
