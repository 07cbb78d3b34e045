//! The data of a training: counts, what is lost, what ends a response, duplicates, the mix, packing, the first rows.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::{Check, Finding};
use crate::commands::preview::{first_rows, mix_table};
use crate::commands::start::Start;
use crate::data::encode::stop_ids;
use crate::data::leak::{Same, content, leaks};
use crate::data::mix::WeightUnit;
use crate::data::sft::{SftData, describe, unread_keys};
use crate::data::split::SWITCHED_OFF;
use crate::data::tokenizer::Newline;
use crate::data::train_set::Tokens;
use crate::say::visible;
use crate::text::{grouped, table};
use crate::words::Words;

/// Below this share of supervised tokens most of the arithmetic is spent on context.
const LOW_SHARE: f64 = 0.05;
/// Packing that fills less than this wastes nothing (rows have no padding), but leaves steps uneven.
const POOR_PACKING: f64 = 0.6;

/// Looks at everything that was tokenised.
pub fn examine(check: &mut Check, start: &Start, preview_rows: usize) {
    let Some(data) = &start.data else { return };
    rows(check, start, data);
    lost_text(check, start, data);
    if let (Some(t), Some(template)) = (&start.tokenizer, &start.template) {
        let stops = stop_ids(t, template).unwrap_or_default();
        endings(check, data, &stops);
    }
    duplicates(check, start, data);
    mix(check, data);
    packing(check, start, data);
    if let Some(t) = &start.tokenizer
        && preview_rows > 0
    {
        let lines = first_rows(data, t, check.style, preview_rows);
        let texts: Vec<Value> = data.first_rows(preview_rows).iter().map(spans(t)).collect();
        check.section("first rows", lines.join("\n"), json!(texts));
    }
}

/// A row's stretches of text with whether they are trained.
fn spans(t: &crate::data::tokenizer::Tokenizer) -> impl Fn(&crate::data::encode::Encoded) -> Value {
    move |row| {
        let flags = row.supervised.chunk_by(|a, b| a == b);
        let mut at = 0;
        let parts: Vec<Value> = flags
            .map(|part| {
                let ids = &row.tokens[at..at + part.len()];
                at += part.len();
                json!({"text": t.decode(ids, crate::data::tokenizer::Specials::Show), "trained": part[0]})
            })
            .collect();
        json!(parts)
    }
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// Counts by data set, dropped rows by reason, over-long rows, supervised share.
fn rows(check: &mut Check, start: &Start, data: &SftData) {
    let mut notes = Vec::new();
    let header = ["data set", "form", "rows", "kept", "train", "validation", "tokens", "supervised", "longest row"];
    let mut lines = vec![header.map(String::from).to_vec()];
    let mut facts = Vec::new();
    let limit = data.train.max_seq_len() as u64;
    for (set, pieces) in data.sets.iter().zip(data.train.sets()) {
        let size = pieces.size();
        let supervised = share(size.supervised, size.tokens);
        let c = &set.counts;
        let findings = match pieces.tokens.as_ref() {
            Tokens::File(f) => f.meta().findings.clone(),
            Tokens::Raw(_) => None,
        };
        let longest = findings.as_ref().map(|f| f.longest_row);
        let place = longest.map_or(String::new(), |(tokens, line)| format!("{} at line {line}", grouped(tokens)));
        lines.push(vec![
            set.name.clone(),
            set.form.clone(),
            grouped(c.rows),
            grouped(c.kept),
            grouped(set.n_train as u64),
            grouped(set.n_val as u64),
            grouped(size.tokens),
            format!("{:.1}%", 100.0 * supervised),
            place,
        ]);
        facts.push(json!({
            "name": set.name, "form": set.form, "rows": c.rows, "kept": c.kept, "train": set.n_train, "validation": set.n_val,
            "tokens": size.tokens, "supervised_tokens": size.supervised, "supervised_share": supervised,
            "over_long": {
                "limit": limit, "rows": c.truncated + c.too_long + c.response_cut,
                "longest": longest.map(|l| l.0), "line": longest.map(|l| l.1),
            },
            "dropped": {
                "too_long": c.too_long, "response_cut": c.response_cut, "unsupervised": c.unsupervised, "bad": c.bad,
            },
            "truncated": c.truncated, "blank_lines": c.blank_lines,
        }));
        over_long(check, set, longest, limit);
        if c.unsupervised > 0 {
            check.push(
                Finding::warning(
                    "unsupervised",
                    set.name.as_str(),
                    format!("{} rows have nothing to train on", c.unsupervised),
                )
                .advice("an assistant turn with content and without \"train\": false is trained; they are left out"),
            );
        }
        if start.template.is_some() && supervised < LOW_SHARE {
            check.push(
                Finding::warning("low-supervision", set.name.as_str(), "few of the tokens are trained")
                    .but(format!("more than {:.0}%", 100.0 * LOW_SHARE), format!("{:.1}%", 100.0 * supervised))
                    .advice("look at the first rows: is the mask where it should be?"),
            );
        }
        if let Some(why) = &set.none_held_out {
            let what = format!("no row is held out ({why}), so nothing says when the model overfits");
            let finding = Finding::warning("no-validation", set.name.as_str(), what);
            check.push(if why == SWITCHED_OFF { finding.advice("pass --val-fraction 0.05") } else { finding });
        }
        if let Tokens::File(f) = pieces.tokens.as_ref() {
            let unread = unread_keys(f.meta()).into_iter().filter(|(line, _)| line.is_none());
            notes.extend(unread.map(|(_, what)| format!("  {}: {}\n", visible(&set.name), visible(&what))));
        }
    }
    check.section("data", table(&lines) + &notes.concat(), json!({"sets": facts}));
}

fn over_long(check: &mut Check, set: &crate::data::sft::SetReport, longest: Option<(u64, u32)>, limit: u64) {
    let c = &set.counts;
    let affected = c.truncated + c.too_long + c.response_cut;
    if affected == 0 {
        return;
    }
    let place = match longest.filter(|l| l.0 > limit) {
        Some((_, line)) => format!("{}:{line}", set.name),
        None => set.name.clone(),
    };
    let found = match longest.filter(|l| l.0 > limit) {
        Some((tokens, _)) => format!("{affected}, the longest of {tokens} tokens here"),
        None => affected.to_string(),
    };
    check.push(
        Finding::warning("over-long", place, format!("rows longer than max_seq_len ({})", describe(c)))
            .but(format!("at most {limit} tokens"), found)
            .advice("raise --max-seq-len, or choose with --overflow what becomes of them"),
    );
}

/// White space and characters that the tokenizer does not keep.
fn lost_text(check: &mut Check, start: &Start, data: &SftData) {
    let mut facts = Vec::new();
    for set in data.train.sets() {
        let Tokens::File(file) = set.tokens.as_ref() else {
            continue;
        };
        let Some(f) = file.meta().findings.clone() else {
            continue;
        };
        let mut say = |code, (rows, line): (u64, u32), what: &str, advice: &str| {
            if rows > 0 {
                let place = format!("{}:{line}", set.name);
                let what = format!("{rows} rows {what}; this is the first");
                check.push(Finding::warning(code, place, what).advice(advice));
            }
        };
        say(
            "newlines-lost",
            f.newlines_lost,
            "have newlines that the tokenizer's normaliser removes",
            "use a tokenizer trained with --normalization_rule_name identity",
        );
        say(
            "blanks-lost",
            f.blanks_lost,
            "have blanks that the tokenizer's normaliser removes",
            "use a tokenizer trained with --remove_extra_whitespaces false",
        );
        let (what, advice) = match start.tokenizer.as_ref().filter(|t| t.unknown().is_none()) {
            Some(t) => ("have characters that are dropped without a token", t.unknown_advice()),
            None => ("have characters that become <unk>", "use a tokenizer with byte fallback"),
        };
        say("unknown-characters", f.unknown, what, advice);
        facts.push(json!({
            "name": set.name, "newlines_lost": f.newlines_lost.0, "blanks_lost": f.blanks_lost.0, "unknown": f.unknown.0,
        }));
    }
    // Text of pretraining is not looked at row by row; the tokenizer itself says what it does.
    if start.template.is_none()
        && let Some(t) = start.tokenizer.as_ref().filter(|t| matches!(t.newline(), Newline::Lost(_) | Newline::Text(_)))
    {
        check.push(
            Finding::warning("newlines-lost", t.name(), "newlines of the text are lost")
                .advice("use a tokenizer trained with --normalization_rule_name identity"),
        );
    }
    if let Some(Value::Object(map)) = check.facts.get_mut("data") {
        map.insert("lost".into(), json!(facts));
    }
}

/// Whether what ends a response is trained: a model that never sees it does not learn to stop.
fn endings(check: &mut Check, data: &SftData, stops: &[u32]) {
    let (mut without, mut all) = (0u64, 0u64);
    let mut first = None;
    for set in data.train.sets() {
        for piece in 0..set.pieces.len() {
            let p = set.pieces[piece];
            let mut ends = false;
            set.tokens.visit(p.doc as usize, p.start as usize, p.len as usize, |token, supervised| {
                ends |= supervised && stops.contains(&token);
            });
            all += 1;
            if !ends {
                without += 1;
                first.get_or_insert_with(|| format!("{}:{}", set.name, set.line(piece)));
            }
        }
    }
    if let Some(Value::Object(map)) = check.facts.get_mut("data") {
        map.insert("without_trained_end".into(), json!(without));
    }
    let Some(place) = first else { return };
    if without == all {
        check.push(
            Finding::problem(
                "end-not-trained",
                place,
                "no row trains the token that ends a response, so the model would never stop",
            )
            .but("a trained end token in every response", "none")
            .advice("let the template put the end token inside its generation part"),
        );
    } else {
        check.push(
            Finding::warning(
                "end-not-trained",
                place,
                format!("{without} of {all} rows do not train the token that ends a response; this is the first"),
            )
            .advice("rows that are cut lose it: raise --max-seq-len or use --overflow drop"),
        );
    }
}

/// Equal rows within the training data, and between training and validation.
fn duplicates(check: &mut Check, start: &Start, data: &SftData) {
    let mut buffer = Vec::new();
    let mut seen: HashMap<u64, (usize, usize)> = HashMap::new();
    let (mut repeated, mut first) = (0u64, None);
    for (s, set) in data.train.sets().iter().enumerate() {
        for piece in 0..set.pieces.len() {
            match seen.entry(content(set, piece, &mut buffer)) {
                std::collections::hash_map::Entry::Vacant(e) => {
                    e.insert((s, piece));
                }
                std::collections::hash_map::Entry::Occupied(e) => {
                    repeated += 1;
                    let (s0, p0) = *e.get();
                    let original = &data.train.sets()[s0];
                    first.get_or_insert_with(|| {
                        (
                            format!("{}:{}", set.name, set.line(piece)),
                            format!("{}:{}", original.name, original.line(p0)),
                        )
                    });
                }
            }
        }
    }
    let same = if start.template.is_some() { Same::Context } else { Same::Content };
    let leaks = leaks(data.train.sets(), &data.val, same);
    let leaked: usize = leaks.iter().map(|leak| leak.rows).sum();
    if let Some(Value::Object(map)) = check.facts.get_mut("data") {
        map.insert("duplicate_rows".into(), json!(repeated));
        map.insert("validation_rows_in_training".into(), json!(leaked));
    }
    if let Some((place, original)) = first {
        check.push(
            Finding::warning(
                "duplicate-rows",
                place,
                format!("{repeated} rows come more than once; this is the same as {original}"),
            )
            .advice("they weigh more than others; remove them unless that is meant"),
        );
    }
    if let Some(leak) = leaks.into_iter().next() {
        check.push(
            Finding::problem(
                "validation-leak",
                leak.first,
                format!("{leaked} validation rows are in the training data too; this is the first"),
            )
            .but("none", leaked.to_string())
            .advice("remove them from one of the two: the validation loss would look better than it is"),
        );
    }
}

/// Requested and achieved shares.
fn mix(check: &mut Check, data: &SftData) {
    let report = data.train.mix_report(0);
    let facts: Vec<Value> = report
        .iter()
        .map(|r| {
            let units = WeightUnit::ALL.into_iter().enumerate();
            let shares: serde_json::Map<String, Value> = units
                .map(|(i, u)| (u.word().into(), json!({"requested": r.requested[i], "achieved": r.achieved[i]})))
                .collect();
            json!({"name": r.name, "rows_of_an_epoch": r.size.samples, "available": r.available, "shares": shares})
        })
        .collect();
    for r in &report {
        let copies = share(r.size.samples, r.available);
        if r.size.samples == 0 {
            check.push(
                Finding::warning("mix", r.name.as_str(), "its weight is so small that an epoch takes none of its rows")
                    .advice("raise its weight or leave the data set out"),
            );
        } else if copies > 4.0 {
            check.push(
                Finding::warning(
                    "mix",
                    r.name.as_str(),
                    format!("every row is trained about {copies:.1} times an epoch"),
                )
                .advice("lower its weight, or expect it to be learned by heart"),
            );
        }
    }
    check.section("mix", mix_table(data), json!({"unit": data.train.weight_unit().word(), "sets": facts}));
}

/// How full the rows are.
fn packing(check: &mut Check, start: &Start, data: &SftData) {
    let plan = data.train.plan(0);
    let (mut tokens, mut supervised) = (0u64, 0u64);
    for &sample in plan.samples() {
        let (set, piece) = data.train.locate(sample);
        let p = data.train.sets()[set].pieces[piece];
        tokens += u64::from(p.len);
        supervised += u64::from(p.n_targets);
    }
    let rows = plan.n_rows() as u64;
    let capacity = rows * data.train.max_seq_len() as u64;
    let full = share(tokens, capacity);
    let text = format!(
        "{} documents in {} rows of at most {} tokens: {:.1}% full, {:.1} documents a row, {:.1}% of the tokens trained",
        grouped(plan.samples().len() as u64),
        grouped(rows),
        data.train.max_seq_len(),
        100.0 * full,
        plan.samples().len() as f64 / rows.max(1) as f64,
        100.0 * share(supervised, tokens),
    );
    if start.packing && full < POOR_PACKING && rows > 1 {
        check.push(
            Finding::warning("packing", "max_seq_len", "packed rows are far from full")
                .but(format!("{:.0}% or more", 100.0 * POOR_PACKING), format!("{:.0}%", 100.0 * full))
                .advice("documents are long for the row length; a larger --max-seq-len packs better"),
        );
    }
    check.section(
        if start.packing { "packing" } else { "rows" },
        text,
        json!({
            "packed": start.packing, "rows": rows, "documents": plan.samples().len(), "tokens": tokens,
            "supervised_tokens": supervised, "max_seq_len": data.train.max_seq_len(), "efficiency": full,
        }),
    );
}
