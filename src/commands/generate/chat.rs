//! A conversation: a line is a turn, and every answer has the turns before it as context.

use std::ops::ControlFlow;

use super::answers::{Answer, EMPTY};
use super::lines::{Lines, Typed};
use super::{Speaker, show};
use crate::backend::Backend;
use crate::data::encode::encode_prompt;
use crate::data::row::{Message, Role};
use crate::error::{Error, Result};
use crate::generate::Conversation;
use crate::say::{self, Out};
use crate::settings::nearest;
use crate::train::signals::Interrupts;

/// What can be typed besides turns.
const HELP: &str = "  /reset        forget the conversation
  /system TEXT  begin anew with this system turn; without TEXT, with none
  /help         these lines
  /quit         end; so does Ctrl-D
Ctrl-C stops an answer.";

const COMMANDS: [&str; 5] = ["/reset", "/system", "/help", "/quit", "/exit"];

/// Reads turns until they end or one says `/quit`.
///
/// # Errors
/// If the template refuses the conversation, a line is not UTF-8, or the device fails. A conversation that has grown too long is
/// said, and goes on after `/reset`.
pub(super) fn run<B: Backend>(speaker: &Speaker<B>, mut lines: Lines) -> Result<()> {
    let mut system = speaker.args.system.clone();
    let start = |system: &Option<String>| -> Vec<Message> {
        system.iter().map(|text| Message::new(Role::System, text)).collect()
    };
    let mut turns = start(&system);
    let mut chat = Chat { speaker, kept: Conversation::default(), out: Out::new(), interrupts: lines.interrupts() };
    say::remark("a line is a turn; /reset forgets them, /help lists what there is, /quit ends it");
    loop {
        let said = match lines.next()? {
            Typed::Line(line) => line,
            Typed::Nothing => {
                say::remark("(Ctrl-D or /quit ends the conversation)");
                continue;
            }
            Typed::End => return Ok(()),
        };
        let (word, rest) = said.trim().split_once(char::is_whitespace).unwrap_or((said.trim(), ""));
        match word {
            "" => {}
            "/exit" | "/quit" => return Ok(()),
            "/help" => say::note(HELP),
            "/reset" => {
                turns = start(&system);
                say::remark("forgotten");
            }
            "/system" => {
                system = Some(rest.trim().to_string()).filter(|text| !text.is_empty());
                turns = start(&system);
                say::remark(match system {
                    Some(_) => "begun anew with this system turn",
                    None => "begun anew without a system turn",
                });
            }
            // A turn may begin with a path; a word alone, or one that is nearly a command, was meant as one.
            _ if word.starts_with('/') && (rest.is_empty() || meant(word).is_some()) => {
                let meant = meant(word).map_or(String::new(), |near| format!("; did you mean {near}?"));
                say::remark(&format!("{word}: unknown{meant} (/help lists what there is)"));
            }
            _ => {
                turns.push(Message::new(Role::User, &said));
                match chat.answer(&turns) {
                    Ok(text) => turns.push(Message::new(Role::Assistant, text)),
                    Err(Unanswered::TooLong(e)) => {
                        turns.pop();
                        say::remark(&format!("{e}; /reset starts anew"));
                    }
                    Err(Unanswered::Failed(e)) => return Err(e),
                }
            }
        }
    }
}

fn meant(word: &str) -> Option<&'static str> {
    nearest(word, COMMANDS).filter(|near| strsim::osa_distance(word, near) <= 2)
}

enum Unanswered {
    TooLong(Error),
    Failed(Error),
}

struct Chat<'a, B: Backend> {
    speaker: &'a Speaker<'a, B>,
    /// What was computed of the turns before.
    kept: Conversation<B>,
    out: Out,
    interrupts: Option<Interrupts>,
}

impl<B: Backend> Chat<'_, B> {
    /// Answers the last turn, printing as it goes; the answer's text.
    fn answer(&mut self, turns: &[Message]) -> Result<String, Unanswered> {
        let Self { speaker, kept, out, interrupts } = self;
        let failed = Unanswered::Failed;
        let ids = encode_prompt(&speaker.tokenizer, &speaker.template, turns).map_err(failed)?;
        let room = speaker.room(ids.len()).map_err(Unanswered::TooLong)?;
        let mut answer = Answer::new(&speaker.tokenizer, &speaker.stop_texts);
        let options = speaker.options(room);
        let (mut broken, mut stopped) = (None, false);
        let held = interrupts.as_ref().map(Interrupts::hold);
        kept.answer(speaker.dev, &speaker.loaded, &ids, &options, |token| {
            let new = answer.push(token, &speaker.stop_ids, room);
            if let Err(e) = show(out, &new) {
                broken = Some(e);
            }
            stopped = held.as_ref().is_some_and(|held| held.pressed());
            match answer.ended() || broken.is_some() || stopped {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        })
        .map_err(failed)?;
        drop(held);
        let text = answer.into_text();
        let end = broken.map_or_else(|| out.end_line(), Err);
        end.map_err(|e| failed(Error::from(e).context("standard output")))?;
        if stopped {
            say::remark("(stopped)");
        } else if text.trim().is_empty() {
            say::remark(EMPTY);
        }
        Ok(text)
    }
}
