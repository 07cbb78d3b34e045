//! What a training needs, step by step: model, tokenizer, template, vocabulary, row length, data.
//!
//! `sft` and `pretrain` stop at the first step that fails; `check` goes on with what there is and collects what is wrong.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::did_you_mean;
use super::jobs::{PretrainJob, SftJob};
use super::open::{self, TemplateArgs};
use crate::checkpoint::manifest::hash_file;
use crate::checkpoint::state::Fingerprints;
use crate::data::leak::{Same, leaks};
use crate::data::pretrain::{self, PretrainDataSpec};
use crate::data::progress::Progress;
use crate::data::sft::{self, SftData, SftDataSpec};
use crate::data::template::{Control, Template};
use crate::data::tokenizer::{Tokenizer, named_tokens};
use crate::data::train_set::PieceSet;
use crate::error::{Context, Error, Result};
use crate::hf;
use crate::hf::artifact::Artifact;
use crate::hf::resize::{NewToken, Resize, Resized};
use crate::hf::safetensors::ModelFiles;
use crate::hf::{SaveDType, TensorSource};
use crate::model::LoraSpec;
use crate::model::config::ModelConfig;
use crate::say;
use crate::settings::{ResolvedSetting, TrainSettings};
use crate::tensor::DType;
use crate::train::setup;
use crate::{bail, ensure};

/// What a training starts from; a part is `None` where its step failed and the guide went on.
#[derive(Default)]
pub struct Start {
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
    /// The model to start from; `None` in pretraining too.
    pub base: Option<ModelFiles>,
    /// Shape of the model, vocabulary grown.
    pub config: Option<ModelConfig>,
    /// How an existing model's vocabulary is grown.
    pub resize: Option<Resize>,
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

/// Who is led through the start of a training, and decides what becomes of an error.
pub trait Guide {
    /// What a step gave; where it failed, the error that ends the start, or `None` to go on without.
    ///
    /// # Errors
    /// The step's own.
    fn step<T>(&mut self, code: &'static str, place: &str, result: Result<T>) -> Result<Option<T>>;

    /// What the files of the model in `place`, or a setting, leave to be wished for.
    fn warning(&mut self, code: &'static str, place: &str, warning: &str);

    /// Tokenizer and template were opened, as far as they are there.
    fn opened_tokenizer(&mut self, _start: &Start) {}

    /// The model was opened and its vocabulary grown, as far as that went.
    fn opened_model(&mut self, _start: &Start, _read: &ModelConfig) {}

    /// Tokenises the rows of fine-tuning.
    ///
    /// # Errors
    /// If they cannot be used and the guide does not go on.
    fn rows(&mut self, spec: SftDataSpec, tokenizer: &Tokenizer, template: &Template) -> Result<Option<SftData>>;

    /// Tokenises the texts of pretraining.
    ///
    /// # Errors
    /// As [`Guide::rows`].
    fn texts(&mut self, spec: PretrainDataSpec, tokenizer: &Tokenizer) -> Result<Option<SftData>>;
}

/// The guide of `sft` and `pretrain`: the first error ends the start, warnings are said and kept.
pub struct StopAtFirst {
    progress: Progress,
    /// What was said, for the run's record.
    pub warnings: Vec<String>,
}

impl StopAtFirst {
    /// Shows progress unless that is unwanted.
    pub fn new(quiet: bool) -> Self {
        Self { progress: if quiet { Progress::Hide } else { Progress::Show }, warnings: Vec::new() }
    }
}

impl Guide for StopAtFirst {
    fn step<T>(&mut self, _code: &'static str, _place: &str, result: Result<T>) -> Result<Option<T>> {
        result.map(Some)
    }

    fn warning(&mut self, _code: &'static str, _place: &str, warning: &str) {
        say::warning(warning);
        self.warnings.push(warning.into());
    }

    fn opened_model(&mut self, start: &Start, _read: &ModelConfig) {
        let narrow = |l: &LoraSpec| Some((l.r, narrower_than_rank(l, start.config.as_ref()?)?));
        if let Some((rank, side)) = start.lora.as_ref().and_then(narrow) {
            let what = format!(
                "lora_r {rank}: the narrowest product it is put on has {side} rows or columns, so the update is no longer of low rank; lower \
                 --lora-r, or train all weights with --no-lora"
            );
            self.warning("lora-rank", "lora_r", &what);
        }
    }

    fn opened_tokenizer(&mut self, start: &Start) {
        // They are said when the data are tokenised.
        self.warnings.extend(start.tokenizer.iter().flat_map(Tokenizer::warnings));
    }

    fn rows(&mut self, spec: SftDataSpec, tokenizer: &Tokenizer, template: &Template) -> Result<Option<SftData>> {
        let data = sft::tokenise(&spec, tokenizer, template, self.progress, &mut |line| say::note(&line))?;
        // Rows that are held out of the training data are none of them.
        let others = if spec.val_paths.is_empty() { &[][..] } else { &data.val };
        for leak in leaks(data.train.sets(), others, Same::Context) {
            self.warning("validation-leak", &leak.first, &leak.to_string());
        }
        Ok(Some(data))
    }

    fn texts(&mut self, spec: PretrainDataSpec, tokenizer: &Tokenizer) -> Result<Option<SftData>> {
        pretrain::tokenise(&spec, tokenizer, self.progress, &mut |line| say::note(&line)).map(Some)
    }
}

/// The narrowest side of the products that low-rank updates are put on, where their rank is not below it.
pub fn narrower_than_rank(lora: &LoraSpec, c: &ModelConfig) -> Option<usize> {
    let sides = lora.targets.iter().map(|p| p.shape(c)).map(|(a, b)| a.min(b));
    sides.min().filter(|&side| lora.r >= side)
}

/// The settings among each other; the low-rank updates they ask for.
///
/// # Errors
/// As the guide decides.
pub fn settings(guide: &mut impl Guide, s: &TrainSettings) -> Result<Option<LoraSpec>> {
    guide.step("settings", "", s.check())?;
    Ok(guide.step("lora", "lora_targets", setup::lora_spec(s))?.flatten())
}

/// Opens what `sft` needs.
///
/// # Errors
/// As the guide decides.
pub fn of_sft(guide: &mut impl Guide, job: &SftJob, lora: Option<LoraSpec>) -> Result<Start> {
    let mut start = Start {
        settings: job.settings.clone(),
        lora,
        peak_lr: job.settings.sft_learning_rate(),
        run_dir: job.output_dir.clone(),
        packing: job.data.packing,
        ..Start::default()
    };
    let place = job.model_path.display().to_string();
    start.base = guide.step(
        "model",
        &place,
        ModelFiles::open(&job.model_path).map_err(|e| did_you_mean::model(e, &job.model_path, true)),
    )?;
    for warning in start.base.iter().flat_map(|b| &b.hf_config().warnings) {
        guide.warning("model", &place, warning);
    }
    let place = job.tokenizer_path.as_ref().unwrap_or(&job.model_path).display().to_string();
    let opened = open::tokenizer(job.tokenizer_path.as_deref(), &[&job.model_path], job.special_ids);
    start.tokenizer = guide.step("tokenizer", &place, opened)?;
    if let (Some(t), Some(_)) = (&start.tokenizer, &job.tokenizer_path) {
        let other = open::beside_own(t, &[&job.model_path], job.special_ids);
        if let Some(Some(warning)) = guide.step("tokenizer", &place, other)? {
            guide.warning("tokenizer", &place, &warning);
        }
    }
    if let Some(t) = &mut start.tokenizer {
        let name = job.template.name.clone().unwrap_or_default();
        let opened = open::template(&job.template, &[&job.model_path], "chatml", t);
        start.template = guide.step("template", &name, opened)?;
        if let Some(warning) = start.template.as_ref().and_then(|template| other_template(job, t, template)) {
            guide.warning("template", &job.model_path.display().to_string(), &warning);
        }
    }
    guide.opened_tokenizer(&start);
    if let (Some(base), Some(t), Some(template)) = (&start.base, &start.tokenizer, &start.template)
        && let Some(Grown { resize, config, new_rows }) =
            guide.step("vocabulary", t.name(), grown(base, t, template, job))?
    {
        (start.config, start.resize, start.new_rows) = (Some(config), Some(resize), new_rows);
    }
    if let (Some(resize), Some(t)) = (&start.resize, &start.tokenizer)
        && let Some(names) = named_without_rows(resize, t)
    {
        let place = job.model_path.display().to_string();
        guide.warning(
            "vocabulary",
            &place,
            &format!("{place}: the model has no rows for {names} of the tokenizer; they are made and trained"),
        );
    }
    if let (Some(n), Some(base), Some(resize)) = (job.pad_vocab_to, &start.base, &start.resize) {
        let rows = base.config().vocab_size;
        let why = if resize.tokens.iter().map(|t| t.id + 1).fold(rows, usize::max) == n {
            "the vocabulary has as many rows without it"
        } else if start.lora.is_some() && start.new_rows.is_none() {
            "the adapter carries no embedding, and belongs to the base as it is"
        } else {
            ""
        };
        if !why.is_empty() {
            guide.warning(
                "vocabulary",
                &job.model_path.display().to_string(),
                &format!("pad_vocab_to {n} has no effect: {why}"),
            );
        }
    }
    if let Some(base) = &start.base {
        guide.opened_model(&start, base.config());
    }
    start.max_seq_len = match &start.base {
        Some(base) => {
            let rows = open::row_length(job.settings.max_seq_len, base.config().max_position);
            guide.step("row-length", "max_seq_len", rows)?
        }
        // Without a model the rows are as long as asked for.
        None => job.settings.max_seq_len,
    };
    if let (Some(t), Some(template)) = (&start.tokenizer, &start.template) {
        let mut data = job.data.clone();
        data.row.max_seq_len = start.max_seq_len.unwrap_or(data.row.max_seq_len);
        start.data = guide.rows(data, t, template)?;
    }
    validation(guide, &start, &job.resolved)?;
    Ok(start)
}

/// Whether there are validation rows for what was asked to look at them.
fn validation(guide: &mut impl Guide, start: &Start, resolved: &[ResolvedSetting]) -> Result<()> {
    let Some(data) = start.data.as_ref().filter(|d| d.val.iter().all(|v| v.pieces.is_empty())) else {
        return Ok(());
    };
    let why = data.sets.iter().find_map(|s| s.none_held_out.as_deref()).unwrap_or("the files hold none");
    if start.settings.early_stopping.is_some() {
        let e = Error::usage(format!(
            "early_stopping_patience: no row is held out to evaluate: {why}; leave it out, or hold rows out with val_fraction"
        ));
        guide.step::<()>("settings", "early_stopping_patience", Err(e))?;
    }
    let asked = ["load_best_model_at_end", "eval_on_start", "eval_steps", "eval_strategy", "do_gen_test"];
    let given = |r: &&ResolvedSetting| {
        asked.contains(&r.name.as_str()) && r.origin != "default" && !["false", "no", ""].contains(&r.value.as_str())
    };
    for r in resolved.iter().filter(given) {
        guide.warning("no-effect", &r.name, &format!("{} has no effect: no row is held out: {why}", r.name));
    }
    Ok(())
}

/// Tokens that the tokenizer's files name, and for which rows are made.
fn named_without_rows(resize: &Resize, tokenizer: &Tokenizer) -> Option<String> {
    let named = resize.tokens.iter().filter(|t| t.id < tokenizer.first_unnamed());
    let names: Vec<String> =
        named.map(|t| format!("{} ({})", tokenizer.piece(t.id as u32).unwrap_or("a token"), t.id)).collect();
    (!names.is_empty()).then(|| names.join(", "))
}

/// What to say where the model has a chat template and another one is trained with.
fn other_template(job: &SftJob, tokenizer: &Tokenizer, template: &Template) -> Option<String> {
    let asked = TemplateArgs { date: None, supervise_turn_newline: false, ..job.template.clone() };
    let why = match open::own_template(&asked, &[&job.model_path], tokenizer) {
        Ok(Some(own)) if !own.prints_as(template) => String::new(),
        Ok(_) => return None,
        Err(e) => format!(" ({e})"),
    };
    Some(format!(
        "{}: the model has a chat template of its own{why}, but {} is trained with; --prompt-template model takes the model's",
        job.model_path.display(),
        template.name()
    ))
}

/// A model as the training has it, how its vocabulary grew, and its new rows: the first and their number.
struct Grown {
    resize: Resize,
    config: ModelConfig,
    new_rows: Option<(usize, usize)>,
}

/// The base with rows for the tokens that it does not know.
fn grown(base: &ModelFiles, tokenizer: &Tokenizer, template: &Template, job: &SftJob) -> Result<Grown> {
    let resize = plan_resize(base.config(), base.dir(), tokenizer, job.pad_vocab_to, job.settings.seed)?;
    let resized = Resized::new(base, resize.clone())?;
    let config = with_token_ids(resized.config().clone(), tokenizer, Some(template))?;
    // Where a padded model had rows to spare for the new tokens, all of its spare rows from the first one on are trained.
    let new_rows = resized.first_new_row().map(|first| (first, config.n_classes - first));
    Ok(Grown { resize, config, new_rows })
}

/// Opens what `pretrain` needs.
///
/// # Errors
/// As the guide decides.
pub fn of_pretrain(guide: &mut impl Guide, job: &PretrainJob) -> Result<Start> {
    let mut start = Start {
        settings: job.settings.clone(),
        peak_lr: job.settings.pretrain_learning_rate(),
        run_dir: job.output_dir.join(&job.config_name),
        packing: job.data.packing,
        ..Start::default()
    };
    let opened = Tokenizer::open(&job.tokenizer_path, job.special_ids);
    start.tokenizer = guide.step("tokenizer", &job.tokenizer_path.display().to_string(), opened)?;
    let Some(t) = &start.tokenizer else { return Ok(start) };
    guide.opened_tokenizer(&start);
    let place = format!("model config {}", job.config_name);
    let config = new_model_config(&job.config_text, t);
    start.config = guide.step("model", &place, config.map_err(|e| e.context(place.clone())))?;
    let Some(config) = &start.config else { return Ok(start) };
    guide.opened_model(&start, config);
    let rows = open::row_length(job.settings.max_seq_len, config.max_position);
    start.max_seq_len = guide.step("row-length", "max_seq_len", rows)?;
    if let Some(rows) = start.max_seq_len {
        start.data = guide.texts(PretrainDataSpec { max_seq_len: rows, ..job.data.clone() }, t)?;
    }
    validation(guide, &start, &job.resolved)?;
    Ok(start)
}

/// Which rows embedding and head of a model need for tokens that it does not know; its folder `dir` says what tokens it was
/// trained with.
///
/// # Errors
/// If the tokenizer has more pieces than the model has rows, or the model's list of added tokens cannot be read.
pub fn plan_resize(
    model: &ModelConfig,
    dir: &Path,
    tokenizer: &Tokenizer,
    pad_to: Option<usize>,
    seed: u64,
) -> Result<Resize> {
    let (rows, all) = (model.vocab_size, tokenizer.vocab_size());
    let first_added = tokenizer.first_added();
    ensure!(
        first_added <= rows,
        "vocabulary mismatch: tokenizer {} has {first_added} pieces, model {} has {rows} rows; give the tokenizer the model was \
         trained with",
        tokenizer.name(),
        dir.display()
    );
    // A model that was fine-tuned with these tokens before says so, or has exactly their rows: they are trained already.
    let known = if rows == all { BTreeMap::new() } else { named_tokens(dir)? };
    let special = tokenizer.special();
    let mut tokens = Vec::new();
    for id in first_added.min(rows)..all {
        let spare = || {
            rows != all
                && id >= tokenizer.first_unnamed()
                && known.get(&(id as u32)).map(String::as_str) != tokenizer.piece(id as u32)
        };
        if id >= rows || spare() {
            // Any token but EOS: two rows made from one are all but equal, and an adapter could not tell them apart.
            let others = [special.bos, special.unk, tokenizer.newline_id().ok()];
            let ends = tokenizer.control(Control::ImEnd).ok() == Some(id as u32);
            let eos = |wanted: bool| Some(special.eos).filter(|_| wanted);
            let order = [eos(ends)].into_iter().chain(others).chain([eos(true)]).flatten();
            let Some(like) = order.map(|like| like as usize).find(|&like| like < rows) else {
                bail!(
                    "vocabulary mismatch: none of the special tokens of tokenizer {} has a row in model {}, which has {rows}; give the \
                     tokenizer the model was trained with",
                    tokenizer.name(),
                    dir.display()
                )
            };
            tokens.push(NewToken { id, like });
        }
    }
    Ok(Resize { tokens, pad_to, seed })
}

/// The model's token ids as the files will say them: with ChatML `<|im_end|>` ends a text.
///
/// # Errors
/// If the tokenizer lacks ChatML's tokens.
pub fn with_token_ids(
    mut config: ModelConfig,
    tokenizer: &Tokenizer,
    template: Option<&Template>,
) -> Result<ModelConfig> {
    let special = tokenizer.special();
    config.bos_token_id = special.bos;
    config.pad_token_id = special.pad;
    config.eos_token_ids = vec![match template.is_some_and(Template::needs_chatml) {
        true => tokenizer.control(Control::ImEnd)?,
        false => special.eos,
    }];
    Ok(config)
}

/// The config of a new model: the tokenizer's vocabulary and ids where the text leaves them out.
///
/// # Errors
/// If the text is no config of a supported model, or its vocabulary is smaller than the tokenizer's.
pub fn new_model_config(text: &str, tokenizer: &Tokenizer) -> Result<ModelConfig> {
    let mut value: serde_json::Value =
        serde_json::from_str(text).map_err(|e| Error::new(format!("invalid JSON: {e}")))?;
    if let Some(map) = value.as_object_mut() {
        map.entry("vocab_size").or_insert(json!(tokenizer.vocab_size()));
    }
    let config = hf::config::parse(&value.to_string())?.model;
    ensure!(
        config.vocab_size >= tokenizer.vocab_size(),
        "vocab_size {} is below the tokenizer's {} pieces",
        config.vocab_size,
        tokenizer.vocab_size()
    );
    with_token_ids(config, tokenizer, None)
}

/// How a wholly trained model is saved: in the type its weights are trained in.
pub fn model_artifact(config: &ModelConfig, settings: &TrainSettings) -> Artifact {
    let dtype = match settings.dtype {
        DType::Bf16 => SaveDType::Bf16,
        _ => SaveDType::F32,
    };
    Artifact::Model { config: config.clone(), dtype }
}

/// Hashes of data and tokenizer.
pub fn fingerprints(data: &SftData, tokenizer: &Tokenizer) -> Fingerprints {
    let mut f = Fingerprints::default();
    f.0.insert("data".into(), data.train.fingerprint());
    f.0.insert("data.validation".into(), held_out(&data.val));
    f.0.insert("tokenizer".into(), tokenizer.hash().to_string());
    f
}

/// Hash of the rows that evaluations read.
fn held_out(sets: &[PieceSet]) -> String {
    let mut hasher = blake3::Hasher::new();
    sets.iter().for_each(|set| set.add_to(&mut hasher));
    hasher.finalize().to_hex().to_string()
}

/// Hash of config.json and every weight file of a model folder.
///
/// # Errors
/// If a file cannot be read.
pub fn hash_model(dir: &Path) -> Result<String> {
    let entries = std::fs::read_dir(dir).context(|| dir.display().to_string())?;
    let mut files: Vec<PathBuf> = entries.map(|e| Ok(e?.path())).collect::<Result<_>>()?;
    files.retain(|p| {
        p.file_name().is_some_and(|n| n == "config.json") || p.extension().is_some_and(|e| e == "safetensors")
    });
    files.sort();
    let mut hasher = blake3::Hasher::new();
    for file in files {
        hasher.update(hash_file(&file)?.as_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}
