//! The fields of a row: which of the known forms they have, the turns, and the keys that nothing reads.

use serde::de::DeserializeSeed;

use super::row::{Message, Role};
use super::row_json::{Fields, Json, Levels};
use crate::text::shortened;

/// A row as it was understood.
pub(super) struct Turns {
    pub(super) messages: Vec<Message>,
    /// Name of the form.
    pub(super) form: &'static str,
    /// Whether contents were lists of text parts.
    pub(super) parts: bool,
    /// Keys that say something and were not read; those of turns as `messages[].KEY`.
    pub(super) ignored: Vec<String>,
}

impl Fields {
    fn get(&self, key: &str) -> Option<&Json> {
        self.all.iter().find(|(k, _)| k == key)?.1.as_ref()
    }

    fn take(&mut self, key: &str) -> Option<Json> {
        self.all.iter_mut().find(|(k, _)| k == key)?.1.take()
    }

    /// Whether there is such a field, read or not.
    fn contains(&self, key: &str) -> bool {
        self.all.iter().any(|(k, _)| k == key)
    }

    /// Whether a field is there to be read and not null.
    fn has(&self, key: &str) -> bool {
        self.get(key).is_some_and(|v| !matches!(v, Json::Null))
    }

    /// The first of the keys that is there and not null; else the first that is null; else the first.
    fn first_of<'a>(&self, keys: &[&'a str]) -> &'a str {
        let found = keys.iter().find(|k| self.has(k)).or_else(|| keys.iter().find(|k| self.contains(k)));
        found.unwrap_or(&keys[0])
    }

    fn keys(&self) -> String {
        let all: Vec<_> = self.all.iter().take(8).map(|(k, _)| format!("\"{}\"", named(k))).collect();
        let replaced: Vec<_> = self.replaced.iter().take(8).map(|k| format!("\"{}\"", named(k))).collect();
        let replaced = match replaced.is_empty() {
            true => String::new(),
            false => format!(" (not read, as --columns names others for them: {})", replaced.join(", ")),
        };
        let found = if all.is_empty() { "no fields".to_string() } else { format!("the fields {}", all.join(", ")) };
        found + &replaced
    }

    fn once(&self, place: &str) -> Result<(), String> {
        match &self.duplicate {
            Some(key) => {
                let key = named(key);
                Err(format!("field \"{key}\"{place} appears twice, expected each field once, found a duplicate (dup)"))
            }
            None => Ok(()),
        }
    }

    /// A string with something in it.
    fn text(&mut self, key: &str, place: &str) -> Result<String, String> {
        match self.take(key) {
            None => Err(format!("field \"{key}\"{place} is missing, expected a string, found {}", self.keys())),
            Some(Json::Text(s)) if s.is_empty() => {
                Err(format!("field \"{key}\"{place} is empty, expected text, found \"\""))
            }
            Some(Json::Text(s)) if s.trim().is_empty() => {
                Err(format!("field \"{key}\"{place} is empty, expected text, found only white space"))
            }
            Some(Json::Text(s)) => Ok(s),
            Some(other) => {
                let calls = ["tool_calls", "function_call"].into_iter().find(|k| self.has(k));
                let hint = match calls {
                    Some(key) => {
                        format!(" beside \"{key}\"; calls are not trained: leave the row out or write the call as text")
                    }
                    None => String::new(),
                };
                let found = other.kind();
                Err(format!("field \"{key}\"{place} is not a string, expected a string, found {found}{hint}"))
            }
        }
    }

    /// A string that may be left out, null or empty.
    fn optional(&mut self, key: &str) -> Result<Option<String>, String> {
        match self.get(key) {
            None | Some(Json::Null) => Ok(None),
            Some(Json::Text(s)) if s.trim().is_empty() => Ok(None),
            Some(_) => self.text(key, "").map(Some),
        }
    }

    /// `"train": false` or `"weight": 0`, the same in the words of hosted services; `None` where neither is said.
    fn train(&mut self, place: &str) -> Result<Option<bool>, String> {
        let train = match self.take("train") {
            None | Some(Json::Null) => None,
            Some(Json::Bool(train)) => Some(train),
            Some(other) => {
                let found = match &other {
                    Json::Text(text) => format!("the text {text:?}"),
                    // A file of splits.
                    Json::List(_) if place.is_empty() => {
                        "an array; of a file of splits write the rows of one with jq -c '.train[]'".to_string()
                    }
                    other => other.kind().to_string(),
                };
                return Err(format!("field \"train\"{place} is not a boolean, expected true or false, found {found}"));
            }
        };
        let weight = match self.take("weight") {
            None | Some(Json::Null) => None,
            Some(Json::Number(0.0)) => Some(false),
            Some(Json::Number(1.0)) => Some(true),
            Some(other) => {
                let found = match other {
                    Json::Number(n) => n.to_string(),
                    Json::Text(text) => format!("the text {text:?}"),
                    other => other.kind().to_string(),
                };
                return Err(format!(
                    "field \"weight\"{place} is neither 0 nor 1, expected 0 (not trained) or 1, found {found}"
                ));
            }
        };
        match (train, weight) {
            (Some(a), Some(b)) if a != b => Err(format!(
                "fields \"train\" and \"weight\"{place} contradict each other, expected one of them, found {a} and {}",
                u8::from(b)
            )),
            _ => Ok(train.or(weight)),
        }
    }

    /// Of a table of texts: what other files write as a boolean or a number is one.
    pub(super) fn of_texts(&mut self) {
        for (key, value) in &mut self.all {
            let Some(Json::Text(text)) = &value else { continue };
            let word = text.trim().to_ascii_lowercase();
            let read = match (key.as_str(), word.as_str()) {
                ("train" | "weight", "") => Some(Json::Null),
                ("train", "true" | "yes" | "1") => Some(Json::Bool(true)),
                ("train", "false" | "no" | "0") => Some(Json::Bool(false)),
                ("weight", number) => number.parse().ok().map(Json::Number),
                _ => None,
            };
            if read.is_some() {
                *value = read;
            }
        }
    }

    /// The conversation of a row, or what is wrong with it.
    pub(super) fn into_turns(mut self) -> Result<Turns, String> {
        self.once("")?;
        let mut turns = Turns { messages: Vec::with_capacity(3), form: "", parts: false, ignored: Vec::new() };
        let train = self.train("")?;
        let answered = self.has("response") || self.has("completion");
        let list = ["messages", "conversations"].into_iter().find(|k| self.has(k));
        if let Some(key) = list {
            let both =
                format!("two forms at once, expected \"{key}\" or \"prompt\" and \"response\", found {}", self.keys());
            if answered || (key == "messages" && self.has("conversations")) {
                return Err(both);
            }
            turns.form = if key == "messages" { "messages" } else { "ShareGPT" };
            match self.take(key).map(unfolded) {
                Some(Json::List(items)) => turns.extend(key, items, true)?,
                other => {
                    let kind = other.as_ref().map_or("nothing", Json::kind);
                    let python = matches!(&other, Some(Json::Text(text)) if text.trim_start().starts_with("[{'"));
                    let hint = if python { " (Python's repr? write lists with json.dumps)" } else { "" };
                    return Err(format!(
                        "field \"{key}\" is not a list, expected a list of messages, found {kind}{hint}"
                    ));
                }
            }
            // Published sets repeat the first question beside the turns.
            match self.take("prompt") {
                None | Some(Json::Null) => {}
                Some(Json::Text(prompt)) if turns.asks(&prompt) => {}
                Some(_) => return Err(both),
            }
        } else if self.has("instruction") && !(self.has("prompt") && answered) {
            turns.form = "Alpaca";
            let mut instruction = self.text("instruction", "")?;
            let input = self.first_of(&["input", "context"]);
            if let Some(input) = self.optional(input)? {
                instruction = format!("{instruction}\n{input}");
            }
            if let Some(history) = self.take("history").map(unfolded) {
                turns.earlier(history)?;
            }
            turns.messages.push(Message::new(Role::User, instruction));
            let answers = ["output", "response", "completion"];
            if answers.iter().filter(|k| self.has(k)).count() > 1 {
                return Err(format!(
                    "two answers at once, expected one of {}, found {}",
                    answers.join(", "),
                    self.keys()
                ));
            }
            let answer = self.first_of(&answers);
            turns.messages.push(Message::new(Role::Assistant, self.text(answer, "")?));
        } else if ["prompt", "response", "completion"].into_iter().any(|k| self.contains(k)) {
            if self.has("response") && self.has("completion") {
                return Err(format!(
                    "two answers at once, expected \"response\" or \"completion\", found {}",
                    self.keys()
                ));
            }
            let answer = self.first_of(&["response", "completion"]);
            turns.form = if answer == "response" { "prompt and response" } else { "prompt and completion" };
            // What the assistant said before belongs to the prompt: as in TRL, the completion alone is trained.
            for (key, role, train) in [("prompt", Role::User, false), (answer, Role::Assistant, true)] {
                if !matches!(self.get(key), Some(Json::List(_))) {
                    let text = self.text(key, "");
                    turns.messages.push(Message::new(role, text.map_err(|e| e + &self.advice())?));
                } else if let Some(Json::List(items)) = self.take(key) {
                    turns.form = "conversational prompt and completion";
                    turns.extend(key, items, train)?;
                }
            }
        } else {
            return Err(format!(
                "field \"prompt\" is missing, expected \"prompt\" and \"response\", or \"messages\", found {}{}",
                self.keys(),
                self.advice()
            ));
        }
        if let Some(system) = self.optional("system")? {
            if turns.messages[0].role == Role::System {
                return Err(format!(
                    "field \"system\" beside a first turn of the system, expected one of them, found {}",
                    self.keys()
                ));
            }
            turns.messages.insert(0, Message::new(Role::System, system));
        }
        if train == Some(false) {
            turns.messages.iter_mut().for_each(|m| m.train = false);
        }
        turns.ignore(self, "");
        Ok(turns)
    }

    /// What to do with rows of forms that other trainers read, by their keys.
    fn advice(&self) -> String {
        const PAIRS: [(&str, &str); 12] = [
            ("prompt", "response"),
            ("prompt", "completion"),
            ("instruction", "response"),
            ("instruction", "output"),
            ("question", "answer"),
            ("question", "response"),
            ("query", "response"),
            ("query", "answer"),
            ("input", "output"),
            ("inputs", "targets"),
            ("source", "target"),
            ("user", "assistant"),
        ];
        let lone_list = match self.all.as_slice() {
            [(key, Some(Json::List(items)))] if !items.is_empty() && named(key) == *key => Some(key),
            _ => None,
        };
        let jq = |filter: String| format!("; write them with jq -c '{filter}'");
        let columns = |pairs: String| format!("; read them with --columns {pairs}");
        if self.has("chosen") {
            let pair = if self.contains("prompt") { "response=chosen" } else { "messages=chosen" };
            return format!("; preference pairs are not trained on: read one side with --columns {pair}");
        }
        if self.contains("role") && self.contains("content") {
            return "; this is one turn: put the turns of a conversation under \"messages\", one conversation a line"
                .into();
        }
        // In any spelling of small and capital letters.
        let named = |name: &str| {
            let found = |(k, v): &&(String, Option<Json>)| {
                k.eq_ignore_ascii_case(name) && v.as_ref().is_some_and(|v| !v.is_void())
            };
            self.all.iter().find(found).map(|(k, _)| k.as_str())
        };
        if let Some((a, b)) = PAIRS.into_iter().find_map(|(a, b)| Some((named(a)?, named(b)?)))
            && !(a == "prompt" && ["response", "completion"].contains(&b))
        {
            return columns(format!("prompt={a} response={b}"));
        }
        let a_list = |key: &&str| matches!(self.get(key), Some(Json::List(_)));
        let others = || ["dialog", "dialogue", "dialogs", "turns", "chat"].into_iter().filter_map(named).find(a_list);
        if let Some(list) = ["messages", "conversations", "conversation"].into_iter().find_map(named).or_else(others) {
            return columns(format!("messages={list}"));
        }
        match lone_list {
            Some(key) => jq(format!(".{key}[]")),
            None if self.has("text") => "; text without a response is trained on by ringtune pretrain".into(),
            None => String::new(),
        }
    }
}

/// A key as it is shown: one may be as long as its line.
fn named(key: &str) -> String {
    shortened(key, 60)
}

/// Names of turns that belong to tools.
const TOOLS: [&str; 8] =
    ["tool", "function", "ipython", "function_call", "tool_call", "observation", "tool_response", "function_response"];

/// Whether a content is null, blank, or parts without any text.
fn says_nothing(content: &Json) -> bool {
    let blank = |part: &Json| match part {
        Json::Object(fields) => {
            let said = |key: &str| fields.all.iter().find(|(k, _)| k == key).and_then(|(_, v)| v.as_ref());
            matches!(said("type"), Some(Json::Text(kind)) if kind.ends_with("text"))
                && said("text").is_some_and(Json::is_void)
        }
        _ => false,
    };
    content.is_void() || matches!(content, Json::List(parts) if parts.iter().all(blank))
}

/// The list behind a text that is one in JSON: tables of columns without lists hold conversations so.
fn unfolded(value: Json) -> Json {
    if let Json::Text(text) = &value
        && text.trim_start().starts_with('[')
        && let Ok(list @ Json::List(_)) = Levels::of_list().deserialize(&mut serde_json::Deserializer::from_str(text))
    {
        return list;
    }
    value
}

impl Turns {
    /// Whether the first turn of the user says this.
    fn asks(&self, prompt: &str) -> bool {
        let first = self.messages.iter().find(|m| m.role == Role::User);
        first.is_some_and(|m| m.content.trim() == prompt.trim())
    }

    /// Questions and answers that came before an instruction, as pairs.
    fn earlier(&mut self, history: Json) -> Result<(), String> {
        let bad = |found: &str| {
            Err(format!(
                "field \"history\" is no list of pairs, expected [[\"question\", \"answer\"], …], found {found}"
            ))
        };
        let pairs = match history {
            Json::List(pairs) => pairs,
            other if other.is_void() => return Ok(()),
            other => return bad(other.kind()),
        };
        for pair in pairs {
            match pair {
                Json::List(pair) => match &pair[..] {
                    [Json::Text(question), Json::Text(answer)]
                        if !question.trim().is_empty() && !answer.trim().is_empty() =>
                    {
                        self.messages.push(Message::new(Role::User, question.clone()));
                        self.messages.push(Message::new(Role::Assistant, answer.clone()));
                    }
                    _ => return bad("a pair of other than two texts"),
                },
                other => return bad(other.kind()),
            }
        }
        Ok(())
    }

    /// Appends the turns of a list.
    fn extend(&mut self, key: &str, items: Vec<Json>, train: bool) -> Result<(), String> {
        let empty = || Err(format!("field \"{key}\" is empty, expected at least one message, found []"));
        if items.is_empty() {
            return empty();
        }
        let before = self.messages.len();
        for (i, item) in items.into_iter().enumerate() {
            let turn = self.turn(item, &format!("{key}[{i}]"), key, train)?;
            self.messages.extend(turn);
        }
        if self.messages.len() == before { empty() } else { Ok(()) }
    }

    /// A turn; none where it is an empty one of the system.
    fn turn(&mut self, item: Json, place: &str, list: &str, train: bool) -> Result<Option<Message>, String> {
        let Json::Object(mut fields) = item else {
            return Err(format!(
                "{place} is not an object, expected {{\"role\": …, \"content\": …}}, found {}",
                item.kind()
            ));
        };
        let place = format!(" of {place}");
        fields.once(&place)?;
        let share_gpt = fields.has("from") && !fields.has("role");
        let (role_key, text_key) = if share_gpt { ("from", "value") } else { ("role", "content") };
        let name = fields.text(role_key, &place)?;
        let role = match name.as_str() {
            "human" if share_gpt => Some(Role::User),
            "gpt" | "chatgpt" | "bing" | "bard" | "model" if share_gpt => Some(Role::Assistant),
            // The newer name of who sets the scene.
            "developer" => Some(Role::System),
            name => Role::parse(name),
        };
        let Some(role) = role else {
            let expected = if share_gpt { "system, human or gpt" } else { "system, user or assistant" };
            let hint = match TOOLS.contains(&name.as_str()) {
                true => {
                    "; tools, their calls and what they give are not trained: leave the row out or write them as text"
                }
                false => "",
            };
            return Err(format!("field \"{role_key}\"{place} is unknown, expected {expected}, found \"{name}\"{hint}"));
        };
        let train = fields.train(&place)?.unwrap_or(train);
        let content = match fields.get(text_key) {
            Some(said) if role == Role::System && says_nothing(said) => {
                fields.take(text_key);
                None
            }
            Some(Json::List(parts)) if !parts.is_empty() => match fields.take(text_key) {
                Some(Json::List(parts)) => Some(self.joined(parts, &place)?),
                _ => None,
            },
            _ => Some(fields.text(text_key, &place)?),
        };
        self.ignore(fields, &format!("{list}[]."));
        Ok(content.map(|content| Message { role, content, train, input: None }))
    }

    /// The text of a list of parts, one after the other as they are.
    fn joined(&mut self, parts: Vec<Json>, place: &str) -> Result<String, String> {
        self.parts = true;
        let mut all = String::new();
        for (i, part) in parts.into_iter().enumerate() {
            let at = format!("content[{i}]{place}");
            let Json::Object(mut fields) = part else {
                let kind = part.kind();
                return Err(format!(
                    "{at} is not an object, expected {{\"type\": \"text\", \"text\": …}}, found {kind}"
                ));
            };
            let kind = fields.text("type", &format!(" of {at}"))?;
            if !["text", "input_text", "output_text"].contains(&kind.as_str()) {
                return Err(format!("{at} is no text, expected parts of type \"text\" alone, found \"{kind}\""));
            }
            match fields.take("text") {
                Some(Json::Text(text)) => all += &text,
                other => {
                    let found = other.map_or("nothing", |f| f.kind());
                    return Err(format!("field \"text\" of {at} is not a string, expected a string, found {found}"));
                }
            }
            self.ignore(fields, "content[].");
        }
        if all.trim().is_empty() {
            return Err(format!("field \"content\"{place} is empty, expected text, found only white space"));
        }
        Ok(all)
    }

    /// Notes the keys that are left.
    fn ignore(&mut self, fields: Fields, before: &str) {
        for (key, _) in fields.all.into_iter().filter(|(_, v)| v.as_ref().is_some_and(|v| !v.is_void())) {
            let key = format!("{before}{}", named(&key));
            if !self.ignored.contains(&key) {
                self.ignored.push(key);
            }
        }
    }
}
