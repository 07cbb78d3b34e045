//! The JSON of a row, field by field: what serde's derive would not tell apart (missing, empty, twice, of another kind).

use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::row::{Message, Role};

/// A JSON value as far as rows care.
enum Field {
    Text(String),
    Bool(bool),
    Messages(Vec<MessageField>),
    /// Anything else, by its kind.
    Other(&'static str),
}

impl Field {
    fn kind(&self) -> &'static str {
        match self {
            Field::Text(_) => "a string",
            Field::Bool(_) => "a boolean",
            Field::Messages(_) => "an array",
            Field::Other(kind) => kind,
        }
    }
}

/// An element of `messages`: its fields, or the kind of what is there instead of an object.
enum MessageField {
    Object(Fields),
    Other(&'static str),
}

/// The fields of an object that rows know.
#[derive(Default)]
pub(super) struct Fields {
    known: Vec<(String, Field)>,
    /// The first few keys, for messages.
    seen: Vec<String>,
    /// The first known key that came twice.
    pub(super) duplicate: Option<String>,
}

const KNOWN: [&str; 7] = ["prompt", "response", "system", "messages", "role", "content", "train"];

/// Reads an object into [`Fields`].
pub(super) struct FieldsSeed;

impl<'de> DeserializeSeed<'de> for FieldsSeed {
    type Value = Fields;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Fields, D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for FieldsSeed {
    type Value = Fields;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
        let mut fields = Fields::default();
        while let Some(key) = map.next_key::<String>()? {
            if fields.seen.len() < 8 {
                fields.seen.push(key.clone());
            }
            if !KNOWN.contains(&key.as_str()) {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            if fields.known.iter().any(|(k, _)| *k == key) {
                fields.duplicate.get_or_insert_with(|| key.clone());
            }
            let value = map.next_value_seed(FieldSeed)?;
            fields.known.push((key, value));
        }
        Ok(fields)
    }
}

struct FieldSeed;

impl<'de> DeserializeSeed<'de> for FieldSeed {
    type Value = Field;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Field, D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for FieldSeed {
    type Value = Field;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }
    fn visit_str<E: de::Error>(self, v: &str) -> Result<Field, E> {
        Ok(Field::Text(v.to_string()))
    }
    fn visit_string<E: de::Error>(self, v: String) -> Result<Field, E> {
        Ok(Field::Text(v))
    }
    fn visit_bool<E: de::Error>(self, v: bool) -> Result<Field, E> {
        Ok(Field::Bool(v))
    }
    fn visit_unit<E: de::Error>(self) -> Result<Field, E> {
        Ok(Field::Other("null"))
    }
    fn visit_u64<E: de::Error>(self, _: u64) -> Result<Field, E> {
        Ok(Field::Other("a number"))
    }
    fn visit_i64<E: de::Error>(self, _: i64) -> Result<Field, E> {
        Ok(Field::Other("a number"))
    }
    fn visit_f64<E: de::Error>(self, _: f64) -> Result<Field, E> {
        Ok(Field::Other("a number"))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Field, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Field::Other("an object"))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Field, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(MessageSeed)? {
            items.push(item);
        }
        Ok(Field::Messages(items))
    }
}

struct MessageSeed;

impl<'de> DeserializeSeed<'de> for MessageSeed {
    type Value = MessageField;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<MessageField, D::Error> {
        d.deserialize_any(self)
    }
}

/// Delegates scalars to their kind and objects to [`FieldsSeed`].
impl<'de> Visitor<'de> for MessageSeed {
    type Value = MessageField;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a message")
    }
    fn visit_str<E: de::Error>(self, _: &str) -> Result<MessageField, E> {
        Ok(MessageField::Other("a string"))
    }
    fn visit_bool<E: de::Error>(self, _: bool) -> Result<MessageField, E> {
        Ok(MessageField::Other("a boolean"))
    }
    fn visit_unit<E: de::Error>(self) -> Result<MessageField, E> {
        Ok(MessageField::Other("null"))
    }
    fn visit_u64<E: de::Error>(self, _: u64) -> Result<MessageField, E> {
        Ok(MessageField::Other("a number"))
    }
    fn visit_i64<E: de::Error>(self, _: i64) -> Result<MessageField, E> {
        Ok(MessageField::Other("a number"))
    }
    fn visit_f64<E: de::Error>(self, _: f64) -> Result<MessageField, E> {
        Ok(MessageField::Other("a number"))
    }
    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<MessageField, A::Error> {
        FieldsSeed.visit_map(map).map(MessageField::Object)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<MessageField, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(MessageField::Other("an array"))
    }
}

impl Fields {
    fn take(&mut self, key: &str) -> Option<Field> {
        let at = self.known.iter().position(|(k, _)| k == key)?;
        Some(self.known.swap_remove(at).1)
    }

    fn has(&self, key: &str) -> bool {
        self.known.iter().any(|(k, _)| k == key)
    }

    fn keys(&self) -> String {
        let all: Vec<_> = self.seen.iter().map(|k| format!("\"{k}\"")).collect();
        if all.is_empty() { "no fields".to_string() } else { format!("the fields {}", all.join(", ")) }
    }

    /// A string with something in it.
    fn text(&mut self, key: &str, place: &str) -> Result<String, String> {
        match self.take(key) {
            None => Err(format!("field \"{key}\"{place} is missing, expected a string, found {}", self.keys())),
            Some(Field::Text(s)) if s.is_empty() => {
                Err(format!("field \"{key}\"{place} is empty, expected text, found \"\""))
            }
            Some(Field::Text(s)) if s.chars().all(char::is_whitespace) => {
                Err(format!("field \"{key}\"{place} is empty, expected text, found only white space"))
            }
            Some(Field::Text(s)) => Ok(s),
            Some(other) => {
                Err(format!("field \"{key}\"{place} is not a string, expected a string, found {}", other.kind()))
            }
        }
    }

    /// The conversation of a row, or what is wrong with it.
    pub(super) fn into_messages(mut self) -> Result<Vec<Message>, String> {
        if self.has("messages") {
            if self.has("prompt") || self.has("response") {
                return Err(format!(
                    "two forms at once, expected \"messages\" or \"prompt\" and \"response\", found {}",
                    self.keys()
                ));
            }
            let items = match self.take("messages") {
                Some(Field::Messages(items)) => items,
                other => {
                    let kind = other.map_or("nothing", |f| f.kind());
                    return Err(format!("field \"messages\" is not a list, expected a list of messages, found {kind}"));
                }
            };
            if items.is_empty() {
                return Err("field \"messages\" is empty, expected at least one message, found []".to_string());
            }
            return items.into_iter().enumerate().map(|(i, item)| item.into_message(i)).collect();
        }
        if !self.has("prompt") && !self.has("response") {
            let found = self.keys();
            return Err(format!(
                "field \"prompt\" is missing, expected \"prompt\" and \"response\", or \"messages\", found {found}"
            ));
        }
        let mut messages = Vec::with_capacity(3);
        if self.has("system") {
            messages.push(Message::new(Role::System, self.text("system", "")?));
        }
        messages.push(Message::new(Role::User, self.text("prompt", "")?));
        messages.push(Message::new(Role::Assistant, self.text("response", "")?));
        Ok(messages)
    }
}

impl MessageField {
    fn into_message(self, index: usize) -> Result<Message, String> {
        let place = format!(" of messages[{index}]");
        let mut fields = match self {
            MessageField::Object(fields) => fields,
            MessageField::Other(kind) => {
                return Err(format!(
                    "messages[{index}] is not an object, expected {{\"role\": …, \"content\": …}}, found {kind}"
                ));
            }
        };
        if let Some(key) = fields.duplicate.take() {
            return Err(format!(
                "field \"{key}\"{place} appears twice, expected each field once, found a duplicate (dup)"
            ));
        }
        let name = fields.text("role", &place)?;
        let Some(role) = Role::parse(&name) else {
            return Err(format!(
                "field \"role\"{place} is unknown, expected system, user or assistant, found \"{name}\""
            ));
        };
        let train = match fields.take("train") {
            None => true,
            Some(Field::Bool(train)) => train,
            Some(other) => {
                return Err(format!(
                    "field \"train\"{place} is not a boolean, expected true or false, found {}",
                    other.kind()
                ));
            }
        };
        Ok(Message { role, content: fields.text("content", &place)?, train, input: None })
    }
}
