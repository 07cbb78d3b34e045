//! The JSON of a row, as far as rows care. What serde's derive would not tell apart (missing, empty, null, twice, of another kind) is told
//! apart here.

use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::columns::{Column, Columns, FIELDS};

/// A JSON value as far as rows care.
pub(super) enum Json {
    Null,
    Bool(bool),
    Number(f64),
    Text(String),
    List(Vec<Json>),
    Object(Fields),
}

impl Json {
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Json::Null => "null",
            Json::Bool(_) => "a boolean",
            Json::Number(_) => "a number",
            Json::Text(_) => "a string",
            Json::List(_) => "an array",
            Json::Object(_) => "an object",
        }
    }

    /// Whether it says nothing: what tables of columns write where a row has no such field.
    pub(super) fn is_void(&self) -> bool {
        match self {
            Json::Null => true,
            Json::Text(s) => s.trim().is_empty(),
            Json::List(items) => items.is_empty(),
            Json::Object(fields) => fields.all.is_empty(),
            Json::Bool(_) | Json::Number(_) => false,
        }
    }
}

/// The fields of an object, in their order; the value is gone once it is read.
#[derive(Default)]
pub(super) struct Fields {
    pub(super) all: Vec<(String, Option<Json>)>,
    /// The first known key that came twice: readers disagree about which one counts.
    pub(super) duplicate: Option<String>,
    /// Keys in whose place other columns are read.
    pub(super) replaced: Vec<String>,
}

/// Keys of turns and of their parts, and those of a row that no column is read as.
const WITHIN: [&str; 8] = ["role", "content", "from", "value", "train", "weight", "type", "history"];

/// Whether some form reads a key; the values of others are looked at no further than whether they are empty.
fn is_known(key: &str) -> bool {
    FIELDS.contains(&key) || WITHIN.contains(&key)
}

/// Reads a value.
pub(super) struct Levels<'a> {
    /// Below this many levels of known keys nothing is kept: no form is deeper.
    depth: u8,
    /// Which keys of the row itself are read as others.
    columns: Option<&'a Columns>,
}

impl<'a> Levels<'a> {
    /// A row, its list of turns, a turn, its list of parts, a part.
    pub(super) fn of_row(columns: &'a Columns) -> Self {
        Self { depth: 5, columns: Some(columns) }
    }

    /// A list of turns that stands in a text.
    pub(super) fn of_list() -> Self {
        Self { depth: 4, columns: None }
    }

    fn below(&self, kept: bool) -> Levels<'static> {
        Levels { depth: if kept { self.depth - 1 } else { 0 }, columns: None }
    }
}

impl<'de> DeserializeSeed<'de> for Levels<'_> {
    type Value = Json;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Json, D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Levels<'_> {
    type Value = Json;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }
    fn visit_str<E: de::Error>(self, v: &str) -> Result<Json, E> {
        Ok(Json::Text(v.to_string()))
    }
    fn visit_string<E: de::Error>(self, v: String) -> Result<Json, E> {
        Ok(Json::Text(v))
    }
    fn visit_bool<E: de::Error>(self, v: bool) -> Result<Json, E> {
        Ok(Json::Bool(v))
    }
    fn visit_unit<E: de::Error>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }
    fn visit_u64<E: de::Error>(self, v: u64) -> Result<Json, E> {
        Ok(Json::Number(v as f64))
    }
    fn visit_i64<E: de::Error>(self, v: i64) -> Result<Json, E> {
        Ok(Json::Number(v as f64))
    }
    fn visit_f64<E: de::Error>(self, v: f64) -> Result<Json, E> {
        Ok(Json::Number(v))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
        let mut fields = Fields::default();
        while let Some(mut key) = map.next_key::<String>()? {
            if self.depth == 0 {
                map.next_value::<IgnoredAny>()?;
                fields.all = vec![(key, None)];
                continue;
            }
            match self.columns.map_or(Column::AsItIs, |c| c.of(&key)) {
                Column::AsItIs => {}
                Column::Read(field) => key = field.to_string(),
                Column::Replaced => {
                    map.next_value::<IgnoredAny>()?;
                    fields.replaced.push(key);
                    continue;
                }
            }
            let known = is_known(&key);
            if known && fields.all.iter().any(|(k, _)| *k == key) {
                fields.duplicate.get_or_insert_with(|| key.clone());
            }
            let value = map.next_value_seed(self.below(known))?;
            fields.all.push((key, Some(value)));
        }
        Ok(Json::Object(fields))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Json, A::Error> {
        let mut items = Vec::new();
        if self.depth == 0 {
            while seq.next_element::<IgnoredAny>()?.is_some() {
                items = vec![Json::Null];
            }
            return Ok(Json::List(items));
        }
        while let Some(item) = seq.next_element_seed(self.below(true))? {
            items.push(item);
        }
        Ok(Json::List(items))
    }
}
