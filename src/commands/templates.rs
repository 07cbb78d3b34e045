//! `ringtune templates`: each built-in template's rendering of one conversation, with what is trained in colour.

use std::io::Write;

use crate::data::row::{Message, Role};
use crate::data::template::{Purpose, Template, TemplateOptions};
use crate::error::Result;
use crate::say::Out;
use crate::text::Style;

/// Prints every template's name, rendering and mask.
///
/// # Errors
/// If stdout cannot be written.
pub fn run() -> Result<()> {
    let conversation = [
        Message::new(Role::System, "Answer in one sentence."),
        Message::new(Role::User, "What is photosynthesis?"),
        Message::new(Role::Assistant, "Plants turning light into sugar."),
        Message::new(Role::User, "And at night?"),
        Message::new(Role::Assistant, "They breathe as we do."),
    ];
    let style = Style::stdout();
    let mut out = Out::new();
    writeln!(out, "what is trained: {}; the rest is context\n", style.trained("like this"))?;
    for name in Template::NAMES {
        let template = Template::load(name, TemplateOptions::default())?;
        let (text, spans) = template.render(&conversation, Purpose::Train)?.text_and_spans(template.names());
        writeln!(out, "{}", style.heading(&format!("== {name}")))?;
        writeln!(out, "{}\n", style.spans(&text, &spans).trim_end_matches('\n'))?;
    }
    out.flush()?;
    Ok(())
}
