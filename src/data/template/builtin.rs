//! The built-in templates, each as code over segments and as Jinja for `chat_template.jinja`; a test holds both together.

use super::{Control, Purpose, Rendered};
use crate::bail;
use crate::data::row::{Message, Role};
use crate::error::Result;

/// Whether the words of this message carry loss.
fn trained(m: &Message) -> bool {
    m.role == Role::Assistant && m.train
}

pub(super) fn chatml(messages: &[Message], purpose: Purpose, supervise_newline: bool) -> Rendered {
    let mut out = Rendered::default();
    for m in messages {
        let on = trained(m);
        out.control(Control::ImStart, false);
        out.template(&format!("{}\n", m.role.name()), false);
        out.data(&m.content, on);
        out.control(Control::ImEnd, on);
        out.template("\n", on && supervise_newline);
    }
    if purpose == Purpose::Generate {
        out.control(Control::ImStart, false);
        out.template("assistant\n", false);
    }
    out
}

pub(super) fn chatml_jinja(supervise_newline: bool) -> String {
    let tail = closing_newline(supervise_newline);
    format!(
        "{{% for message in messages %}}{{{{ '<|im_start|>' + message['role'] + '\\n' }}}}{{% if message['role'] == 'assistant' %}}\
         {{% generation %}}{{{{ message['content'] + '<|im_end|>' }}}}{tail}\
         {{% else %}}{{{{ message['content'] + '<|im_end|>\\n' }}}}{{% endif %}}{{% endfor %}}\
         {{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n' }}}}{{% endif %}}"
    )
}

/// The end of a generation mark and the newline of the turn, in the order that the mask asks for.
fn closing_newline(supervise_newline: bool) -> &'static str {
    if supervise_newline { "{{ '\\n' }}{% endgeneration %}" } else { "{% endgeneration %}{{ '\\n' }}" }
}

const PREAMBLE: &str =
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.";

/// The Alpaca form with a newline after `### Response:`.
pub(super) fn instruct(messages: &[Message]) -> Result<Rendered> {
    let mut out = Rendered::default();
    out.implicit_bos();
    for (i, m) in messages.iter().enumerate() {
        let on = trained(m);
        match m.role {
            Role::System if i == 0 => {
                out.data(&m.content, false);
                out.template("\n\n", false);
            }
            Role::System => bail!("expected a system turn only at the start, found one at messages[{i}]"),
            Role::User => {
                match i {
                    0 => out.template(&format!("{PREAMBLE}\n\n"), false),
                    1 if messages[0].role == Role::System => {}
                    _ => out.template("\n\n", false),
                }
                out.template("### Instruction:\n", false);
                out.data(&m.content, false);
                out.template("\n\n### Response:\n", false);
            }
            Role::Assistant => {
                if i == 0 || messages[i - 1].role != Role::User {
                    bail!("expected an assistant turn after a user turn, found one at messages[{i}]");
                }
                out.data(&m.content, on);
                out.control(Control::Eos, on);
            }
        }
    }
    Ok(out)
}

pub(super) const INSTRUCT_JINJA: &str = "{{ bos_token }}{% for message in messages %}\
{% if message['role'] == 'system' %}{% if not loop.first %}{{ raise_exception('expected a system turn only at the start') }}{% endif %}\
{{ message['content'] + '\\n\\n' }}\
{% elif message['role'] == 'user' %}\
{% if loop.first %}{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request.\\n\\n' }}\
{% elif loop.index0 != 1 or messages[0]['role'] != 'system' %}{{ '\\n\\n' }}{% endif %}\
{{ '### Instruction:\\n' + message['content'] + '\\n\\n### Response:\\n' }}\
{% else %}{% if loop.first or messages[loop.index0 - 1]['role'] != 'user' %}{{ raise_exception('expected an assistant turn after a user turn') }}{% endif %}\
{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}";

pub(super) fn llama2(messages: &[Message]) -> Result<Rendered> {
    let mut out = Rendered::default();
    let (system, turns) = match messages.split_first() {
        Some((first, rest)) if first.role == Role::System => (Some(first), rest),
        _ => (None, messages),
    };
    for (i, m) in turns.iter().enumerate() {
        let expected = if i % 2 == 0 { Role::User } else { Role::Assistant };
        if m.role != expected {
            let at = i + usize::from(system.is_some());
            bail!(
                "turns must alternate user, assistant, user, …, expected {} at messages[{at}], found {}",
                expected.name(),
                m.role.name()
            );
        }
        if m.role == Role::User {
            out.control(Control::Bos, false);
            out.template("[INST] ", false);
            match system.filter(|_| i == 0) {
                // The whole first turn is stripped, system text and all; its end is the user's, its start is `<<SYS>>`.
                Some(s) => {
                    out.template("<<SYS>>\n", false);
                    out.data(&s.content, false);
                    out.template("\n<</SYS>>", false);
                    let end = strip_end(&m.content);
                    if !end.is_empty() {
                        out.template("\n\n", false);
                        out.data(end, false);
                    }
                }
                None => out.data(strip(&m.content), false),
            }
            out.template(" [/INST]", false);
        } else {
            let on = trained(m);
            out.template(" ", on);
            out.data(strip(&m.content), on);
            out.template(" ", on);
            out.control(Control::Eos, on);
        }
    }
    Ok(out)
}

/// White space as Python's `str.strip` sees it, which templates use: Unicode's, and the separators 0x1c to 0x1f.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn strip(s: &str) -> &str {
    s.trim_matches(is_space)
}

fn strip_end(s: &str) -> &str {
    s.trim_end_matches(is_space)
}

pub(super) const LLAMA2_JINJA: &str = "{% set first = 1 if messages[0]['role'] == 'system' else 0 %}{% for message in messages[first:] %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) or message['role'] == 'system' %}{{ raise_exception('turns must alternate user, assistant, user, …') }}{% endif %}\
{% if message['role'] == 'user' %}\
{% if loop.first and first == 1 %}{% set content = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' + message['content'] %}\
{% else %}{% set content = message['content'] %}{% endif %}\
{{ bos_token }}{{ '[INST] ' + content.strip() + ' [/INST]' }}\
{% else %}{% generation %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}";

pub(super) fn zephyr(messages: &[Message], purpose: Purpose, supervise_newline: bool) -> Rendered {
    let mut out = Rendered::default();
    out.implicit_bos();
    for m in messages {
        let on = trained(m);
        out.template(&format!("<|{}|>\n", m.role.name()), false);
        out.data(&m.content, on);
        out.control(Control::Eos, on);
        out.template("\n", on && supervise_newline);
    }
    if purpose == Purpose::Generate {
        out.template("<|assistant|>\n", false);
    }
    out
}

pub(super) fn zephyr_jinja(supervise_newline: bool) -> String {
    let tail = closing_newline(supervise_newline);
    format!(
        "{{{{ bos_token }}}}{{% for message in messages %}}{{{{ '<|' + message['role'] + '|>\\n' }}}}{{% if message['role'] == 'assistant' %}}\
         {{% generation %}}{{{{ message['content'] + eos_token }}}}{tail}\
         {{% else %}}{{{{ message['content'] + eos_token + '\\n' }}}}{{% endif %}}{{% endfor %}}\
         {{% if add_generation_prompt %}}{{{{ '<|assistant|>\\n' }}}}{{% endif %}}"
    )
}

pub(super) fn plain(messages: &[Message]) -> Result<Rendered> {
    let mut out = Rendered::default();
    out.implicit_bos();
    for (i, m) in messages.iter().enumerate() {
        let on = trained(m);
        out.data(&m.content, on);
        match m.role {
            Role::System if i == 0 => out.template("\n", false),
            Role::System => bail!("expected a system turn only at the start, found one at messages[{i}]"),
            Role::User => {}
            Role::Assistant => out.control(Control::Eos, on),
        }
    }
    Ok(out)
}

pub(super) const PLAIN_JINJA: &str = "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}\
{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}\
{% elif message['role'] == 'system' %}{% if not loop.first %}{{ raise_exception('expected a system turn only at the start') }}{% endif %}\
{{ message['content'] + '\\n' }}\
{% else %}{{ message['content'] }}{% endif %}{% endfor %}";
