//! A conversation: a line is a turn, and every answer has the turns before it as context.

use std::io::{BufRead, Write};
use std::ops::ControlFlow;

use super::answers::Answer;
use super::{Speaker, show};
use crate::backend::Backend;
use crate::data::encode::encode_prompt;
use crate::data::row::{Message, Role};
use crate::error::{Context, Error, Result};
use crate::generate::generate;
use crate::say::{self, Out};

/// Reads turns from `input` until it ends or says `/exit`.
///
/// # Errors
/// If the template refuses the conversation, a line is not UTF-8, or the device fails. A conversation that has grown too long is
/// said, and goes on after `/reset`.
pub(super) fn run<B: Backend>(speaker: &Speaker<B>, input: &mut dyn BufRead) -> Result<()> {
    let system = speaker.args.system.iter().map(|s| Message::new(Role::System, s));
    let start: Vec<Message> = system.collect();
    let mut turns = start.clone();
    let mut out = Out::new();
    say::remark("a line is a turn; /reset forgets the conversation, /exit ends it");
    loop {
        // On stderr: standard output holds answers alone.
        say::invite("> ");
        let mut line = String::new();
        let read = input.read_line(&mut line).context(|| "standard input".to_string())?;
        let said = line.trim_end_matches(['\n', '\r']);
        match said.trim() {
            _ if read == 0 => return Ok(()),
            "/exit" | "/quit" => return Ok(()),
            "/reset" => {
                turns = start.clone();
                say::remark("forgotten");
            }
            "" => {}
            command if command.starts_with('/') && !command.contains(char::is_whitespace) => {
                say::remark(&format!("{command}: unknown; expected /reset or /exit"));
            }
            _ => {
                turns.push(Message::new(Role::User, said));
                match answer(speaker, &turns, &mut out) {
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

enum Unanswered {
    TooLong(Error),
    Failed(Error),
}

/// Answers the last turn, printing as it goes; the answer's text.
fn answer<B: Backend>(speaker: &Speaker<B>, turns: &[Message], out: &mut Out) -> Result<String, Unanswered> {
    let failed = Unanswered::Failed;
    let ids = encode_prompt(&speaker.tokenizer, &speaker.template, turns).map_err(failed)?;
    let room = speaker.room(ids.len()).map_err(Unanswered::TooLong)?;
    let mut answer = Answer::new(&speaker.tokenizer, &speaker.stop_texts);
    let loaded = &speaker.loaded;
    let options = speaker.options(room);
    let mut broken = None;
    generate(speaker.dev, loaded, &[ids], &options, |_, token, _| {
        let new = answer.push(token, &speaker.stop_ids, room);
        if let Err(e) = show(out, &new) {
            broken = Some(e);
        }
        match answer.ended() || broken.is_some() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    })
    .map_err(failed)?;
    let end = broken.map_or_else(|| writeln!(out).and_then(|()| out.flush()), Err);
    end.map_err(|e| failed(Error::from(e).context("standard output")))?;
    Ok(answer.into_text())
}
