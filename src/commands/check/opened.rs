//! What `check` says of each step of a start: tokenizer, template, model, and rows, of which every bad one is named.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::{Check, Finding, Severity};
use crate::commands::start::{self, Guide, Start};
use crate::data::encode::stop_ids;
use crate::data::jsonl::BadRows;
use crate::data::pretrain::{self, PretrainDataSpec};
use crate::data::progress::Progress;
use crate::data::sft::{self, SftData, SftDataSpec};
use crate::data::template::{Control, Template};
use crate::data::token_file::TokenFile;
use crate::data::tokenizer::{Newline, SpecialTokens, Tokenizer};
use crate::data::train_set::Tokens;
use crate::error::{Error, Result};
use crate::files::kind_of;
use crate::hf::SaveDType;
use crate::hf::safetensors::ModelFiles;
use crate::model::config::ModelConfig;
use crate::model::weights::Weights;
use crate::say::visible;
use crate::text::grouped;

/// Bad rows named one by one for each data set.
const NAMED_ROWS: usize = 5;

impl Guide for Check {
    fn step<T>(&mut self, code: &'static str, place: &str, result: Result<T>) -> Result<Option<T>> {
        Ok(self.take(code, place, result))
    }

    fn warning(&mut self, code: &'static str, place: &str, warning: &str) {
        self.push(Finding::warning(code, place, warning));
    }

    fn opened_tokenizer(&mut self, start: &Start) {
        if let Some(t) = &start.tokenizer {
            tokenizer_section(self, t, start.template.as_ref());
        }
    }

    fn opened_model(&mut self, start: &Start, read: &ModelConfig) {
        model_section(self, read, start);
        if let Some(base) = &start.base {
            self.take("weights", "", base.check_finite());
            ids_agree(self, &base.dir().display().to_string(), read, start.tokenizer.as_ref());
        }
    }

    fn rows(&mut self, mut spec: SftDataSpec, t: &Tokenizer, template: &Template) -> Result<Option<SftData>> {
        // Where skipped rows go is a matter of the training itself.
        spec.row.skip_log = None;
        Ok(tokenise(self, spec, t, template))
    }

    fn texts(&mut self, spec: PretrainDataSpec, t: &Tokenizer) -> Result<Option<SftData>> {
        if !all_there(self, spec.paths.iter().chain(&spec.val_paths)) {
            return Ok(None);
        }
        let tokenised = pretrain::tokenise(&spec, t, Progress::Hide, &mut |_| ());
        Ok(self.take("data", "", tokenised))
    }
}

/// Whether every file is there; those that are not are problems.
fn all_there<'a>(check: &mut Check, paths: impl Iterator<Item = &'a PathBuf>) -> bool {
    let mut all = true;
    for path in paths.filter(|p| !p.is_file()) {
        all = false;
        let found = kind_of(path).unwrap_or("nothing");
        let place = path.display().to_string();
        let pipe = ["a pipe", "a socket", "a device"].contains(&found);
        check.push(Finding::problem("data-missing", place, "no such data set").but("a file", found).advice(if pipe {
            "write what it gives to a file"
        } else {
            "correct --dataset-paths"
        }));
    }
    all
}

/// Begin and end ids of the model's config.json against the tokenizer's.
fn ids_agree(check: &mut Check, place: &str, config: &ModelConfig, tokenizer: Option<&Tokenizer>) {
    let Some(t) = tokenizer else { return };
    let special = t.special();
    let mut differs = |name: &str, found: String, expected: u32| {
        check.push(
            Finding::warning("token-ids", format!("{place}/config.json"), format!("{name} is not the tokenizer's"))
                .but(expected.to_string(), found)
                .advice("make sure that the tokenizer is the model's own; the files written say the tokenizer's ids"),
        );
    };
    if let Some((found, bos)) = config.bos_token_id.zip(special.bos).filter(|(a, b)| a != b) {
        differs("bos_token_id", found.to_string(), bos);
    }
    // A model that was fine-tuned with ChatML ends its turns with another token than texts.
    let ends = [Some(special.eos), t.control(Control::ImEnd).ok()];
    if !config.eos_token_ids.is_empty() && !config.eos_token_ids.iter().any(|id| ends.contains(&Some(*id))) {
        let ids: Vec<String> = config.eos_token_ids.iter().map(u32::to_string).collect();
        differs("eos_token_id", ids.join(", "), special.eos);
    }
}

fn tokenizer_section(check: &mut Check, t: &Tokenizer, template: Option<&Template>) {
    let SpecialTokens { pad, unk, bos, eos } = t.special();
    let newline = match t.newline() {
        Newline::Kept(_) => "kept",
        Newline::Lost(_) => "lost",
        Newline::Text(_) => "changed",
        Newline::Missing => "missing",
    };
    if let Err(e) = t.newline_id() {
        check.push(Finding::error("newline", t.name(), &e));
    }
    if let Some(what) = t.unknown_characters() {
        check.push(Finding::warning("byte-fallback", t.name(), what).advice(t.unknown_advice()));
    }
    let stops: Vec<u32> = template.and_then(|p| stop_ids(t, p).ok()).unwrap_or_default();
    let named = |id: u32| format!("{} ({id})", t.piece(id).unwrap_or("?"));
    let named_or_none = |id: Option<u32>| id.map_or("none".to_string(), named);
    let mut lines = vec![
        format!(
            "{}, {} pieces, {}",
            t.name(),
            grouped(t.pieces().len() as u64),
            format!("{:?}", t.model_type()).to_lowercase()
        ),
        format!("hash          {}", t.hash()),
        format!(
            "special ids   pad {}, unk {}, bos {}, eos {}",
            named_or_none(pad),
            named_or_none(unk),
            named_or_none(bos),
            named(eos)
        ),
        format!("newlines      {}", t.newline()),
        format!("byte fallback {}", if t.byte_ids().is_some() { "yes" } else { "no" }),
    ];
    if let Some(p) = template {
        let stop: Vec<String> = stops.iter().map(|&id| named(id)).collect();
        lines.push(format!("template      {}; a response ends with {}", p.name(), stop.join(", ")));
    }
    if !t.added().is_empty() {
        lines.push(format!("added tokens  {}", t.added().join(" ")));
    }
    let facts = json!({
        "name": t.name(), "hash": t.hash(), "pieces": t.pieces().len(), "added": t.added(),
        "special_ids": {"pad": pad, "unk": unk, "bos": bos, "eos": eos},
        "newlines": newline, "byte_fallback": t.byte_ids().is_some(),
        "template": template.map(Template::name), "stop_ids": stops,
    });
    check.section("tokenizer", visible(&lines.join("\n")), facts);
}

fn model_section(check: &mut Check, c: &ModelConfig, start: &Start) {
    let grown = start.base.as_ref().and(start.config.as_ref());
    let dtype = start.base.as_ref().map(ModelFiles::dtype);
    let all = Weights::count(grown.unwrap_or(c));
    let what = match &start.base {
        Some(base) => base.dir().display().to_string(),
        None => "a new model".into(),
    };
    let mut lines = vec![
        format!(
            "{what}: {}, {} layers, hidden {}, feed-forward {}, heads {}/{}, vocabulary {}{}",
            c.architecture,
            c.n_layers,
            c.hidden_size,
            c.intermediate_size,
            c.heads.n_query,
            c.heads.n_kv,
            grouped(c.vocab_size as u64),
            if c.tied { ", head tied" } else { "" }
        ),
        format!(
            "weights       {}{}",
            grouped(all),
            dtype.map_or(String::new(), |d| format!(", {} in the files", d.torch_name()))
        ),
        format!("positions     {}", grouped(c.max_position as u64)),
    ];
    if let Some(g) = grown.filter(|g| g.vocab_size != c.vocab_size) {
        lines.push(format!("grows to      {} rows of the vocabulary", grouped(g.vocab_size as u64)));
    }
    let mut lora = Value::Null;
    if let Some(l) = &start.lora {
        let targets: Vec<&str> = l.targets.iter().map(|p| p.name()).collect();
        lines.push(format!("adapter       rank {}, scale {}, on {}", l.r, l.scale(), targets.join(" ")));
        lora = json!({"r": l.r, "scale": l.scale(), "targets": targets});
        if let Some(side) = start::narrower_than_rank(l, c) {
            check.push(
                Finding::warning("lora-rank", "lora_r", "the update is no longer of low rank")
                    .but(format!("below {side}, the narrowest product it is put on"), l.r.to_string())
                    .advice("lower --lora-r or use --no-lora"),
            );
        }
    }
    let facts = json!({
        "path": start.base.as_ref().map(|b| b.dir().display().to_string()),
        "architecture": c.architecture.to_string().to_lowercase(), "layers": c.n_layers, "hidden_size": c.hidden_size,
        "vocab_size": c.vocab_size, "grown_vocab_size": grown.map(|g| g.vocab_size), "max_position": c.max_position,
        "weights": all, "dtype": dtype.map(SaveDType::torch_name), "lora": lora,
    });
    check.section("model", visible(&lines.join("\n")), facts);
}

/// The data of fine-tuning. After a bad row the rest is looked at as well; then each data set alone, to name every bad one.
fn tokenise(check: &mut Check, mut spec: SftDataSpec, t: &Tokenizer, template: &Template) -> Option<SftData> {
    if t.newline_id().is_err() || !all_there(check, spec.paths.iter().chain(&spec.val_paths)) {
        return None;
    }
    let first = match sft::tokenise(&spec, t, template, Progress::Hide, &mut |_| ()) {
        Ok(data) => {
            files(&data).for_each(|(name, file)| examine_rows(check, name, file, true));
            return Some(data);
        }
        Err(e) => e,
    };
    let strict = spec.row.rows.bad_rows == BadRows::Fail;
    spec.row.rows.bad_rows = BadRows::Skip;
    if strict && let Ok(data) = sft::tokenise(&spec, t, template, Progress::Hide, &mut |_| ()) {
        if data.sets.iter().all(|s| s.counts.bad == 0) {
            check.push(Finding::error("data", "", &first));
        }
        files(&data).for_each(|(name, file)| examine_rows(check, name, file, false));
        return Some(data);
    }
    let before = check.count(Severity::Problem);
    for path in &spec.paths {
        let name = path.display().to_string();
        let made = sft::token_file_of(path, &spec.row, t, template, Progress::Hide, &mut |_| ());
        if let Some(file) = check.take("data", &name, made) {
            examine_rows(check, &name, &file, !strict);
        }
    }
    // What concerns the data sets together, for example their weights.
    if check.count(Severity::Problem) == before {
        check.push(Finding::error("data", "", &first));
    }
    None
}

/// The token files of data sets, with their names.
fn files(data: &SftData) -> impl Iterator<Item = (&str, &TokenFile)> {
    data.train.sets().iter().filter_map(|set| match set.tokens.as_ref() {
        Tokens::File(file) => Some((set.name.as_str(), file.as_ref())),
        Tokens::Raw(_) => None,
    })
}

/// The first bad rows of a data set, how many more there are, and the keys that nothing reads.
fn examine_rows(check: &mut Check, name: &str, file: &TokenFile, skipped: bool) {
    let bad = &file.meta().bad;
    for (i, (line, what)) in bad.iter().enumerate().take(NAMED_ROWS) {
        let mut finding = Finding::error("bad-row", format!("{name}:{line}"), &Error::new(what.as_str()));
        if skipped {
            finding.severity = Severity::Warning;
            finding.advice = "it is left out, as --skip-bad-rows asks".into();
        } else if finding.advice.is_empty() {
            finding.advice = "mend the row, or pass --skip-bad-rows to leave such rows out".into();
        }
        if i + 1 == NAMED_ROWS && bad.len() > NAMED_ROWS {
            finding.advice += &format!(" ({} more in this file)", bad.len() - NAMED_ROWS);
        }
        check.push(finding);
    }
    for (line, what) in sft::unread_keys(file.meta()) {
        if let Some(line) = line {
            check.push(Finding::warning("unread-keys", format!("{name}:{line}"), what));
        }
    }
}
