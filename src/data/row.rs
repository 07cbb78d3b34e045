//! A row of supervised fine-tuning: a conversation, whatever file it was read from.

/// Who speaks in a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Sets the scene.
    System,
    /// Asks.
    User,
    /// Answers; the turns that are trained on.
    Assistant,
}

impl Role {
    /// The name in JSON and in ChatML.
    pub fn name(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        }
    }

    /// The role of a name, if it is one.
    pub fn parse(name: &str) -> Option<Self> {
        [Role::System, Role::User, Role::Assistant].into_iter().find(|r| r.name() == name)
    }
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said, unstripped.
    pub content: String,
    /// Whether an assistant turn is trained on (`"train": false` and `"weight": 0` turn it off); no effect on other roles.
    pub train: bool,
    /// The separate `input` of an instruction, only known to templates that read it; never set by [`super::jsonl::read_rows`].
    pub input: Option<String>,
}

impl Message {
    /// A message that is trained on when it is the assistant's.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into(), train: true, input: None }
    }
}

/// One row: a conversation and where it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Line in the file, from 1.
    pub line: u32,
    /// The conversation; never empty.
    pub messages: Vec<Message>,
}

impl Row {
    /// The prompt to show: the first user turn (the first turn where there is none).
    pub fn prompt(&self) -> &str {
        let user = self.messages.iter().find(|m| m.role == Role::User);
        user.or(self.messages.first()).map_or("", |m| &m.content)
    }

    /// The last assistant turn, the reference of a generation test; empty where there is none.
    pub fn response(&self) -> &str {
        self.messages.iter().rev().find(|m| m.role == Role::Assistant).map_or("", |m| &m.content)
    }

    /// The turns before the last assistant turn: what a generation test starts from, and what identifies a row for the split.
    pub fn context(&self) -> &[Message] {
        let last = self.messages.iter().rposition(|m| m.role == Role::Assistant);
        &self.messages[..last.unwrap_or(self.messages.len())]
    }
}
