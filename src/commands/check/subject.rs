//! The training that is checked: model, tokenizer, template and data, each as far as it could be opened.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::{Check, Finding};
use crate::commands::jobs::{PretrainJob, SftJob};
use crate::commands::startup;
use crate::data::encode::stop_ids;
use crate::data::jsonl::BadRows;
use crate::data::progress::Progress;
use crate::data::sft::{SftData, SftDataSpec};
use crate::data::template::{Control, Template};
use crate::data::tokenizer::{Newline, SpecialTokens, Tokenizer};
use crate::data::train_set::Tokens;
use crate::data::{pretrain, sft};
use crate::hf::resize::{Resize, Resized};
use crate::hf::safetensors::ModelFiles;
use crate::hf::{SaveDType, TensorSource};
use crate::model::LoraSpec;
use crate::model::config::ModelConfig;
use crate::model::weights::Weights;
use crate::settings::TrainSettings;
use crate::text::grouped;
use crate::train::setup;

/// Bad rows named one by one for each data set.
const NAMED_ROWS: usize = 5;

/// What could be opened of a training; what is `None` had a problem that was said.
pub struct Subject {
    /// Settings of the loop.
    pub settings: TrainSettings,
    /// Low-rank updates.
    pub lora: Option<LoraSpec>,
    /// The peak learning rate.
    pub peak_lr: f64,
    /// Where checkpoints and logs go.
    pub run_dir: PathBuf,
    /// Whether several documents share a row.
    pub packing: bool,
    /// Shape of the model, vocabulary grown.
    pub config: Option<ModelConfig>,
    /// How an existing model's vocabulary is grown.
    pub resize: Option<Resize>,
    /// The model to start from; `None` in pretraining too.
    pub base: Option<ModelFiles>,
    /// First row that the vocabulary was grown by, and their number: with LoRA those of embedding and head that are trained.
    pub new_rows: Option<(usize, usize)>,
    /// The tokenizer, ChatML's tokens added.
    pub tokenizer: Option<Tokenizer>,
    /// The template; `None` in pretraining.
    pub template: Option<Template>,
    /// Tokens of a full row.
    pub max_seq_len: Option<usize>,
    /// Tokenised data.
    pub data: Option<SftData>,
}

/// Opens what `sft` would.
pub fn sft(check: &mut Check, job: &SftJob) -> Subject {
    let lora = settings(check, &job.settings);
    let model_place = job.model_path.display().to_string();
    let base = check.take("model", &model_place, ModelFiles::open(&job.model_path));
    for warning in base.iter().flat_map(|b| &b.hf_config().warnings) {
        check.push(Finding::warning("model", model_place.as_str(), warning.as_str()));
    }
    let tokenizer_place = startup::tokenizer_path(job).display().to_string();
    let mut tokenizer = check.take("tokenizer", &tokenizer_place, startup::open_tokenizer(job));
    let template = tokenizer.as_mut().and_then(|t| {
        let opened = startup::open_template(job, t);
        check.take("template", &job.prompt_template, opened)
    });
    if let Some(t) = &tokenizer {
        tokenizer_section(check, t, template.as_ref());
    }
    let mut subject = Subject {
        settings: job.settings.clone(),
        lora,
        peak_lr: job.settings.sft_learning_rate(),
        run_dir: job.output_dir.clone(),
        packing: job.data.packing,
        config: None,
        resize: None,
        base,
        new_rows: None,
        tokenizer,
        template,
        max_seq_len: None,
        data: None,
    };
    grow(check, &mut subject, job);
    if let Some(base) = &subject.base {
        model_section(check, base.config(), subject.config.as_ref(), Some(base.dtype()), &subject);
        ids_agree(check, &model_place, base.config(), subject.tokenizer.as_ref());
    }
    let mut data = job.data.clone();
    let model = subject.base.as_ref().map(TensorSource::config);
    // Without a model the rows are checked at the length that was asked for.
    let rows = match model {
        Some(model) => check.take("row-length", "max_seq_len", startup::row_length(job.settings.max_seq_len, model)),
        None => job.settings.max_seq_len,
    };
    subject.max_seq_len = rows;
    data.row.max_seq_len = rows.unwrap_or(data.row.max_seq_len);
    // Where skipped rows go is a matter of the training itself.
    data.row.skip_log = None;
    if let (Some(t), Some(template)) = (&subject.tokenizer, &subject.template) {
        subject.data = prepare(check, data, t, template);
    }
    subject
}

/// Opens what `pretrain` would.
pub fn pretrain(check: &mut Check, job: &PretrainJob) -> Subject {
    settings(check, &job.settings);
    let place = job.tokenizer_path.display().to_string();
    let opened = Tokenizer::open(&job.tokenizer_path, job.special_ids);
    let tokenizer = check.take("tokenizer", &place, opened);
    let mut subject = Subject {
        settings: job.settings.clone(),
        lora: None,
        peak_lr: job.settings.pretrain_learning_rate(),
        run_dir: job.output_dir.join(&job.config_name),
        packing: job.data.packing,
        config: None,
        resize: None,
        base: None,
        new_rows: None,
        tokenizer,
        template: None,
        max_seq_len: None,
        data: None,
    };
    let Some(t) = &subject.tokenizer else { return subject };
    tokenizer_section(check, t, None);
    let place = format!("model config {}", job.config_name);
    let config = check.take("model", &place, startup::new_model_config(&job.config_text, t));
    let Some(config) = config else { return subject };
    model_section(check, &config, None, None, &subject);
    let rows = startup::row_length(job.settings.max_seq_len, &config);
    if let Some(rows) = check.take("row-length", "max_seq_len", rows) {
        let mut data = job.data.clone();
        data.max_seq_len = rows;
        subject.max_seq_len = Some(rows);
        if all_there(check, data.paths.iter().chain(&data.val_paths)) {
            let prepared = pretrain::tokenise(&data, t, Progress::Hide, &mut |_| ());
            subject.data = check.take("data", "", prepared);
        }
    }
    subject.config = Some(config);
    subject
}

/// The settings among each other; the low-rank updates they ask for.
fn settings(check: &mut Check, s: &TrainSettings) -> Option<LoraSpec> {
    check.take("settings", "", s.check());
    check.take("lora", "lora_targets", setup::lora_spec(s)).flatten()
}

/// Whether every file is there; those that are not are problems.
fn all_there<'a>(check: &mut Check, paths: impl Iterator<Item = &'a PathBuf>) -> bool {
    let mut all = true;
    for path in paths.filter(|p| !p.is_file()) {
        all = false;
        let found = if path.is_dir() { "a folder" } else { "nothing" };
        let place = path.display().to_string();
        check.push(
            Finding::problem("data-missing", place, "no such data set")
                .but("a file", found)
                .advice("correct --dataset-paths"),
        );
    }
    all
}

/// The model as the training will have it: vocabulary grown, ids of the tokenizer.
fn grow(check: &mut Check, subject: &mut Subject, job: &SftJob) {
    let (Some(base), Some(tokenizer), Some(template)) = (&subject.base, &subject.tokenizer, &subject.template) else {
        return;
    };
    let place = tokenizer.name().to_string();
    let plan = startup::plan_resize(base, tokenizer, job.pad_vocab_to, job.settings.seed);
    let Some(resize) = check.take("vocabulary", &place, plan) else {
        return;
    };
    let grown = Resized::new(base, resize.clone()).and_then(|resized| {
        let config = resized.config().clone();
        let new_rows = resized.first_new_row().map(|first| (first, config.n_classes - first));
        Ok((startup::with_token_ids(config, tokenizer, Some(template))?, new_rows))
    });
    if let Some((config, new_rows)) = check.take("vocabulary", &place, grown) {
        subject.new_rows = new_rows;
        (subject.config, subject.resize) = (Some(config), Some(resize));
    }
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
        differs("eos_token_id", format!("{:?}", config.eos_token_ids), special.eos);
    }
}

fn tokenizer_section(check: &mut Check, t: &Tokenizer, template: Option<&Template>) {
    let SpecialTokens { pad, unk, bos, eos } = t.special();
    let (newline, text) = match t.newline() {
        Newline::Kept(id) => ("kept", format!("kept as id {id}")),
        Newline::Lost(id) => ("lost", format!("lost in text; <0x0A> (id {id}) stands for those of the template")),
        Newline::Missing => ("missing", "cannot be encoded".to_string()),
    };
    if let Err(e) = t.newline_id() {
        check.push(Finding::error("newline", t.name(), &e));
    }
    if t.byte_ids().is_none() {
        check.push(
            Finding::warning("byte-fallback", t.name(), "no byte fallback, so unknown characters become <unk>")
                .advice("train the tokenizer with --byte_fallback"),
        );
    }
    let stops: Vec<u32> = template.and_then(|p| stop_ids(t, p).ok()).unwrap_or_default();
    let named = |id: u32| format!("{} ({id})", t.piece(id).unwrap_or("?"));
    let named_or_none = |id: Option<u32>| id.map_or("none".to_string(), named);
    let mut lines = vec![
        format!("{}, {} pieces, {:?}", t.name(), grouped(t.pieces().len() as u64), t.model_type()),
        format!("hash          {}", t.hash()),
        format!(
            "special ids   pad {}, unk {}, bos {}, eos {}",
            named_or_none(pad),
            named_or_none(unk),
            named_or_none(bos),
            named(eos)
        ),
        format!("newlines      {text}"),
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
    check.section("tokenizer", lines.join("\n"), facts);
}

fn model_section(
    check: &mut Check,
    c: &ModelConfig,
    grown: Option<&ModelConfig>,
    dtype: Option<SaveDType>,
    subject: &Subject,
) {
    let all = Weights::count(grown.unwrap_or(c));
    let what = match &subject.base {
        Some(base) => base.dir().display().to_string(),
        None => "a new model".into(),
    };
    let mut lines = vec![
        format!(
            "{what}: {:?}, {} layers, hidden {}, feed-forward {}, heads {}/{}, vocabulary {}{}",
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
    if let Some(l) = &subject.lora {
        let targets: Vec<&str> = l.targets.iter().map(|p| p.name()).collect();
        lines.push(format!("adapter       rank {}, scale {}, on {}", l.r, l.scale(), targets.join(" ")));
        lora = json!({"r": l.r, "scale": l.scale(), "targets": targets});
        let narrowest = l.targets.iter().map(|p| p.shape(c));
        if let Some(side) = narrowest.map(|(a, b)| a.min(b)).min().filter(|&side| l.r >= side) {
            check.push(
                Finding::warning("lora-rank", "lora_r", "the update is no longer of low rank")
                    .but(format!("below {side}, the narrowest product it is put on"), l.r.to_string())
                    .advice("lower --lora-r or use --no-lora"),
            );
        }
    }
    let facts = json!({
        "path": subject.base.as_ref().map(|b| b.dir().display().to_string()),
        "architecture": format!("{:?}", c.architecture).to_lowercase(), "layers": c.n_layers, "hidden_size": c.hidden_size,
        "vocab_size": c.vocab_size, "grown_vocab_size": grown.map(|g| g.vocab_size), "max_position": c.max_position,
        "weights": all, "dtype": dtype.map(SaveDType::torch_name), "lora": lora,
    });
    check.section("model", lines.join("\n"), facts);
}

/// The data of fine-tuning. After a bad row the rest is looked at as well; then each data set alone, to name every bad one.
fn prepare(check: &mut Check, mut spec: SftDataSpec, t: &Tokenizer, template: &Template) -> Option<SftData> {
    if t.newline_id().is_err() || !all_there(check, spec.paths.iter()) {
        return None;
    }
    let first = match sft::tokenise(&spec, t, template, Progress::Hide, &mut |_| ()) {
        Ok(data) => {
            name_bad_rows(check, &data, true);
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
        name_bad_rows(check, &data, false);
        return Some(data);
    }
    let before = check.count(super::Severity::Problem);
    for path in &spec.paths {
        let one = SftDataSpec { paths: vec![path.clone()], weights: None, ..spec.clone() };
        let result = sft::tokenise(&one, t, template, Progress::Hide, &mut |_| ());
        if let Some(data) = check.take("data", &path.display().to_string(), result) {
            name_bad_rows(check, &data, !strict);
        }
    }
    // What concerns the data sets together, for example their weights.
    if check.count(super::Severity::Problem) == before {
        check.push(Finding::error("data", "", &first));
    }
    None
}

/// The first bad rows of each data set, and how many more there are.
fn name_bad_rows(check: &mut Check, data: &SftData, skipped: bool) {
    for set in data.train.sets() {
        let Tokens::File(file) = set.tokens.as_ref() else {
            continue;
        };
        let bad = &file.meta().bad;
        for (i, (line, what)) in bad.iter().enumerate().take(NAMED_ROWS) {
            let place = format!("{}:{line}", set.name);
            let mut finding = Finding::error("bad-row", place, &crate::error::Error::new(what.as_str()));
            if skipped {
                finding.severity = super::Severity::Warning;
                finding.advice = "it is left out, as --skip-bad-rows asks".into();
            } else if finding.advice.is_empty() {
                finding.advice = "mend the row, or pass --skip-bad-rows to leave such rows out".into();
            }
            if i + 1 == NAMED_ROWS && bad.len() > NAMED_ROWS {
                finding.advice += &format!(" ({} more in this file)", bad.len() - NAMED_ROWS);
            }
            check.push(finding);
        }
    }
}
