//! Files of conversations with the templates to print them with: what `ringtune inspect templates` reads and writes.

use serde_json::{Map, Value, json};

use super::{Purpose, Template, TemplateOptions};
use crate::data::row::{Message, Role};
use crate::error::{Error, Result};
use crate::{bail, ensure};

/// One conversation in one template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// Index of the conversation in the file.
    pub conversation: usize,
    /// Name of the template.
    pub template: String,
    /// The rendering, or why the template does not apply to the conversation.
    pub rendering: Result<Rendering, String>,
}

/// A rendering as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendering {
    /// The whole conversation.
    pub text: String,
    /// The conversation up to where the assistant's last turn starts.
    pub generation_prompt_text: String,
    /// Byte spans `[start, end)` of what is supervised in `text`.
    pub spans_bytes: Vec<[usize; 2]>,
}

impl Case {
    /// The JSON line of the case: conversation, template, text, spans_bytes of what is supervised, and the texts of the spans.
    pub fn to_json(&self) -> Value {
        match &self.rendering {
            Ok(r) => json!({
                "conversation": self.conversation,
                "template": self.template,
                "text": r.text,
                "generation_prompt_text": r.generation_prompt_text,
                "spans_bytes": r.spans_bytes,
                "trained_text": r.spans_bytes.iter().map(|s| &r.text[s[0]..s[1]]).collect::<Vec<_>>(),
            }),
            Err(why) => {
                json!({"conversation": self.conversation, "template": self.template, "applies": false, "why": why})
            }
        }
    }
}

/// Renders every conversation of a file in every template, or in one.
///
/// The file is one JSON object: `conversations`, a list of lists of `{"role", "content"}`; optional `templates`, Jinja
/// sources by name: one with `{% generation %}` marks is used in place of the built-in template of that name; optional
/// `alpaca_inputs`, the separate input of a conversation by its index, for the template called `alpaca`; optional
/// `cases`, where `"applies": false` leaves a conversation out of a template.
/// `name` may also be the path of a Jinja file.
///
/// # Errors
/// If the file is not of that form, or a template is unknown or does not parse.
pub fn render_cases(file: &[u8], name: Option<&str>, options: &TemplateOptions) -> Result<Vec<Case>> {
    let root: Value =
        serde_json::from_slice(file).map_err(|e| Error::new(format!("invalid JSON, expected an object, found {e}")))?;
    let list = root.get("conversations").and_then(Value::as_array);
    let Some(list) = list else { bail!("field \"conversations\" is missing, expected a list of conversations") };
    let conversations = list.iter().enumerate().map(|(i, c)| conversation(i, c)).collect::<Result<Vec<_>>>()?;
    let empty = Map::new();
    let sources = root.get("templates").and_then(Value::as_object).unwrap_or(&empty);
    let names: Vec<String> = match name {
        Some(name) => vec![name.to_string()],
        None if sources.is_empty() => Template::NAMES.iter().map(ToString::to_string).collect(),
        None => sources.keys().cloned().collect(),
    };
    let mut templates = Vec::new();
    for name in names {
        let source = sources.get(&name).and_then(Value::as_str).filter(|s| s.contains("endgeneration"));
        let template = match source {
            Some(source) => Template::from_jinja(&name, source, options.clone())
                .map_err(|e| e.context(format!("template {name}")))?,
            None => Template::load(&name, options.clone())?,
        };
        templates.push((name, template));
    }
    let mut cases = Vec::new();
    for (i, messages) in conversations.iter().enumerate() {
        for (name, template) in &templates {
            let rendering = if left_out(&root, i, name) {
                Err("the file leaves this conversation out".to_string())
            } else {
                let mut messages = messages.clone();
                if name == "alpaca" {
                    let input = root.get("alpaca_inputs").and_then(|m| m.get(i.to_string())).and_then(Value::as_str);
                    messages[0].input = input.map(ToString::to_string);
                }
                render_case(template, &messages).map_err(|e| e.to_string())
            };
            cases.push(Case { conversation: i, template: name.clone(), rendering });
        }
    }
    Ok(cases)
}

fn left_out(root: &Value, conversation: usize, template: &str) -> bool {
    let cases = root.get("cases").and_then(Value::as_array);
    cases.into_iter().flatten().any(|c| {
        c["conversation"] == conversation && c["template"] == template && c.get("applies") == Some(&Value::Bool(false))
    })
}

fn render_case(template: &Template, messages: &[Message]) -> Result<Rendering> {
    let (text, spans_bytes) = template.render(messages, Purpose::Train)?.text_and_spans(template.names());
    // A conversation that ends with the user's turn is a prompt as a whole.
    let n = messages.len();
    let prompt = if messages[n - 1].role == Role::Assistant { &messages[..n - 1] } else { messages };
    let generation_prompt_text = if prompt.is_empty() {
        String::new()
    } else {
        template.render(prompt, Purpose::Generate)?.text(template.names())
    };
    Ok(Rendering { text, generation_prompt_text, spans_bytes })
}

/// Conversations to look at may hold what rows may not: empty contents.
fn conversation(index: usize, value: &Value) -> Result<Vec<Message>> {
    let list = value.as_array().map(Vec::as_slice).unwrap_or_default();
    ensure!(!list.is_empty(), "conversations[{index}]: expected a list of messages, found {value}");
    list.iter()
        .enumerate()
        .map(|(k, m)| {
            let role = m["role"].as_str().and_then(Role::parse);
            let (Some(role), Some(content)) = (role, m["content"].as_str()) else {
                bail!("conversations[{index}][{k}]: expected a role (system, user, assistant) and a content, found {m}")
            };
            let mut message = Message::new(role, content);
            message.train = m.get("train").and_then(Value::as_bool).unwrap_or(true);
            Ok(message)
        })
        .collect()
}
