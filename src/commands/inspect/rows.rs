//! `ringtune inspect rows` and `inspect packs`: what an epoch of `sft` trains on, from the same code that trains.

use std::io::Write;

use serde_json::json;

use crate::commands::data;
use crate::data::sft::SftData;
use crate::data::template::Template;
use crate::data::tokenizer::{Specials, Tokenizer};
use crate::data::{rows, sft};
use crate::error::Result;
use crate::say;
use crate::say::Out;
use crate::say::visible;
use crate::settings::Resolved;
use crate::text::Style;

fn load(resolved: &Resolved) -> Result<(Tokenizer, Template, SftData)> {
    let settings = &resolved.settings;
    let mut tokenizer = data::tokenizer(resolved)?;
    let template = data::template(settings, &mut tokenizer)?;
    let spec = data::sft_spec(resolved, data::max_seq_len_of_model(resolved)?, None)?;
    let data = sft::tokenise(&spec, &tokenizer, &template, data::progress(settings), &mut |line| say::note(&line))?;
    Ok((tokenizer, template, data))
}

/// Prints the rows of an epoch in the order they are trained on: prompt, response, source, line, tokens, targets, and the
/// packed row they lie in.
///
/// # Errors
/// As [`sft::tokenise`].
pub fn rows(resolved: &Resolved, epoch: u64, json: bool) -> Result<()> {
    let (_, _, data) = load(resolved)?;
    let options = data::row_options(&resolved.settings)?;
    let plan = data.train.plan(epoch);
    let mut out = Out::new();
    for view in rows::epoch_rows(&data.train, &plan, &options)? {
        let text = view.text.as_ref();
        let (prompt, response) = (text.map(|r| r.prompt()), text.map(|r| r.response()));
        if json {
            let mut line = json!({
                "prompt": prompt, "response": response, "source": view.source, "line": view.line, "row": view.row,
                "tokens": view.tokens, "targets": view.n_targets,
            });
            // A conversation of several turns is more than its first prompt and last response.
            if let Some(messages) = text.map(|r| &r.messages).filter(|m| m.len() != 2) {
                let turn = |m: &crate::data::row::Message| json!({"role": m.role.name(), "content": m.content});
                line["messages"] = messages.iter().map(turn).collect();
            }
            writeln!(out, "{line}")?;
        } else {
            let short = |t: Option<&str>| t.map_or("?".into(), |t| excerpt(t, 60));
            writeln!(
                out,
                "{:>5} {}:{} ({} tokens, {} trained) {} => {}",
                view.row,
                visible(&view.source),
                view.line,
                view.tokens,
                view.n_targets,
                short(prompt),
                short(response)
            )?;
        }
    }
    out.flush()?;
    Ok(())
}

/// Prints the packed rows of an epoch: input_ids, labels, position_ids, cu_seqlens; without `json` as text, what is trained
/// in colour.
///
/// # Errors
/// As [`sft::tokenise`].
pub fn packs(resolved: &Resolved, epoch: u64, json: bool) -> Result<()> {
    let (tokenizer, _, data) = load(resolved)?;
    let plan = data.train.plan(epoch);
    let style = Style::stdout();
    let mut out = Out::new();
    for row in 0..plan.n_rows() {
        // A vocabulary without padding: its end token fills the row, and no label marks it.
        let special = tokenizer.special();
        let packed = data.train.packed_row(&plan, row, special.pad.unwrap_or(special.eos));
        if json {
            let line = json!({
                "row": row, "input_ids": packed.input_ids, "labels": packed.labels,
                "position_ids": packed.position_ids, "cu_seqlens": packed.cu_seqlens,
            });
            writeln!(out, "{line}")?;
            continue;
        }
        let n_docs = plan.row(row).len();
        let used = packed.cu_seqlens[n_docs];
        let heading = format!("== row {row}: {n_docs} documents, {used} of {} tokens", packed.input_ids.len());
        writeln!(out, "{}", style.heading(&heading))?;
        for doc in packed.cu_seqlens.windows(2).take(n_docs) {
            let at = doc[0] as usize..doc[1] as usize;
            writeln!(out, "{}", marked(&tokenizer, style, &packed.input_ids[at.clone()], &packed.labels[at]))?;
        }
    }
    out.flush()?;
    Ok(())
}

/// Tokens as text, runs of trained ones marked.
fn marked(tokenizer: &Tokenizer, style: Style, ids: &[u32], labels: &[i32]) -> String {
    let trained = |i: usize| labels[i] != crate::batch::IGNORE;
    style.row(ids.len(), trained, |stretch| tokenizer.decode(&ids[stretch], Specials::Show))
}

/// The first characters of a text on one line.
fn excerpt(text: &str, n: usize) -> String {
    let line = visible(&text.replace(['\n', '\t'], " ")).into_owned();
    match line.chars().count() > n {
        true => line.chars().take(n - 1).collect::<String>() + "…",
        false => line,
    }
}
