//! `ringtune sft` and `ringtune pretrain`: from paths and settings to a run.
//!
//! Folders. `sft` writes checkpoints, logs and the final adapter or model into `output_dir` itself, so that the folder can be
//! given to `--model_path`; `merged/` holds the merged model and `resized_base/` the base with a grown vocabulary. `pretrain`
//! writes into `output_dir/<name of the model config>`, the model into its `final/`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;

use super::jobs::{PretrainJob, SftJob};
use super::style::Style;
use super::warn;
use crate::checkpoint::hf_config;
use crate::checkpoint::manifest::hash_file;
use crate::checkpoint::peft::AdapterConfig;
use crate::checkpoint::resize::{NewToken, Resize, Resized};
use crate::checkpoint::safetensors::ModelFiles;
use crate::checkpoint::state::Fingerprints;
use crate::checkpoint::tokenizer_files::read_added_tokens;
use crate::checkpoint::{SaveDType, TensorSource};
use crate::comm::Solo;
use crate::cpu::Cpu;
use crate::data::MicroBatch;
use crate::data::encode::Encoded;
use crate::data::pretrain;
use crate::data::progress::Progress;
use crate::data::sft::{self, SftData};
use crate::data::template::{Control, Template, TemplateOptions};
use crate::data::tokenizer::{Specials, Tokenizer};
use crate::ensure;
use crate::error::{Context, Error, Result};
use crate::model::config::ModelConfig;
use crate::tensor::DType;
use crate::train::artifact::{Artifact, Reconfigured};
use crate::train::checkpoints::RESIZED_BASE;
use crate::train::companions::Companions;
use crate::train::finish::{self, GenRun, MergeCheck};
use crate::train::init::RandomModel;
use crate::train::report::{grouped, table};
use crate::train::run::{self, RunSpec};
use crate::train::settings::TrainSettings;
use crate::train::setup;
use crate::train::signals::StopFlag;

/// Longest row where neither the user nor the model asks for less.
const DEFAULT_SEQ_LEN: usize = 1024;
/// Rows printed at the start with their mask.
const PREVIEW_ROWS: usize = 2;

/// Fine-tunes a model.
///
/// # Errors
/// Whatever stops the run; see [`run::run`].
pub fn run_sft(job: &SftJob) -> Result<()> {
    let stop = StopFlag::on_signals()?;
    let settings = &job.settings;
    settings.check()?;
    setup::lora_spec(settings)?;
    run::check_output_dir(&job.output_dir)?;
    let dev = Cpu::new(settings.threads)?;
    let base = ModelFiles::open(&job.model_path)?;
    base.hf_config().warnings.iter().for_each(|w| warn(w));
    let at_model = job.model_path.join("tokenizer.model");
    let mut tokenizer = Tokenizer::open(job.tokenizer_path.as_deref().unwrap_or(&at_model), job.special_ids)?;
    let options = TemplateOptions {
        supervise_turn_newline: job.supervise_turn_newline,
        names: tokenizer.control_names(),
    };
    let template = Template::load(&job.prompt_template, options)?;
    if template.needs_chatml() {
        tokenizer.add_chatml();
    }
    let resize = plan_resize(&base, &tokenizer, job.pad_vocab_to, settings.seed)?;
    let mut data = job.data.clone();
    data.row.max_seq_len = row_length(settings.max_seq_len, base.config())?;
    let progress = if settings.quiet { Progress::Hide } else { Progress::Show };
    let prepared = sft::prepare(&data, &tokenizer, &template, progress, &mut note)?;
    let preview = preview(&prepared, &tokenizer);

    let resized = Resized::new(&base, resize.clone())?;
    let config = with_token_ids(resized.config().clone(), &tokenizer, Some(&template))?;
    let source = Reconfigured {
        source: &resized,
        config: config.clone(),
    };
    let tokenizer = Arc::new(tokenizer);
    let companions = Companions::new(Arc::clone(&tokenizer), Some(&template), config.max_position);
    // Where a padded model had rows to spare for the new tokens, all of its spare rows from the first one on are trained.
    let new_rows = resized.first_new_row().map(|first| (first, config.n_classes - first));
    let (artifact, new_rows) = match setup::lora_spec(settings)? {
        None => (model_artifact(&config, settings), None),
        Some(lora) => {
            let base_path = match new_rows {
                Some(_) => job.output_dir.join(RESIZED_BASE),
                None => job.model_path.clone(),
            };
            let adapter = AdapterConfig {
                r: lora.r,
                alpha: lora.alpha,
                dropout: lora.dropout,
                rslora: lora.rslora,
                targets: lora.targets,
                base: base_path.display().to_string(),
            };
            let base = Box::new(ModelFiles::open(&job.model_path)?);
            (
                Artifact::Adapter {
                    config: adapter,
                    base,
                    resize,
                    model: config.clone(),
                    new_rows,
                },
                new_rows,
            )
        }
    };
    let mut fingerprints = fingerprints(&prepared, &tokenizer);
    fingerprints.0.insert("base_model".into(), hash_model(&job.model_path)?);
    let (val, held_out) = (prepared.val.clone(), prepared.val);
    let spec = RunSpec {
        settings,
        resolved: &job.resolved,
        run_dir: job.output_dir.clone(),
        final_dir: job.output_dir.clone(),
        peak_lr: settings.sft_learning_rate(),
        source: &source,
        new_rows,
        artifact: Arc::new(artifact),
        companions,
        train: prepared.train,
        val,
        packing: data.packing,
        fingerprints,
        preview,
    };
    let ended = run::run(&dev, &Solo, &spec, stop)?;
    let mut written = vec![match settings.lora {
        Some(_) => ("adapter", job.output_dir.clone()),
        None => ("model", job.output_dir.clone()),
    }];
    if new_rows.is_some() {
        written.push(("base with the grown vocabulary", job.output_dir.join(RESIZED_BASE)));
    }
    if settings.merge_adapters {
        let merged = job.output_dir.join(run::MERGED);
        let mut batch = MicroBatch::default();
        spec.train.append_row(&spec.train.plan(0), 0, &mut batch);
        let check = finish::merge(&dev, &source, &job.output_dir, &merged, base.dtype(), &batch)?;
        spec.companions.write(&merged)?;
        let MergeCheck { exact, rounded } = check;
        println!(
            "merged model: logits differ from base + adapter by {exact:.1e} relative, as written by {rounded:.1e}"
        );
        written.push(("merged model", merged));
    }
    if let Some(test) = &settings.gen_test {
        let prompts = finish::held_out_rows(&held_out, test.num_samples, &data.row.rows)?;
        let run = GenRun {
            tokenizer: &tokenizer,
            template: &template,
            test,
            lora: setup::lora_spec(settings)?,
            dtype: setup::dtype(settings),
            seed: settings.seed,
        };
        finish::generation_test(&dev, &ended.work, &run, &prompts)?;
    }
    report_written(&written, settings.quiet);
    Ok(())
}

/// Trains a new model on text.
///
/// # Errors
/// Whatever stops the run; see [`run::run`].
pub fn run_pretrain(job: &PretrainJob) -> Result<()> {
    let stop = StopFlag::on_signals()?;
    let settings = &job.settings;
    settings.check()?;
    ensure!(settings.lora.is_none(), "pretraining has no LoRA");
    let run_dir = job.output_dir.join(&job.config_name);
    run::check_output_dir(&run_dir)?;
    let dev = Cpu::new(settings.threads)?;
    let tokenizer = Tokenizer::open(&job.tokenizer_path, job.special_ids)?;
    let config =
        new_model_config(&job.config_text, &tokenizer).context(|| format!("model config {}", job.config_name))?;
    let mut data = job.data.clone();
    data.max_seq_len = row_length(settings.max_seq_len, &config)?;
    let progress = if settings.quiet { Progress::Hide } else { Progress::Show };
    let prepared = pretrain::prepare(&data, &tokenizer, progress, &mut note)?;
    let preview = preview(&prepared, &tokenizer);
    let tokenizer = Arc::new(tokenizer);
    let final_dir = run_dir.join("final");
    let source = RandomModel::new(config.clone(), settings.seed);
    let spec = RunSpec {
        settings,
        resolved: &job.resolved,
        run_dir,
        final_dir: final_dir.clone(),
        peak_lr: settings.learning_rate.unwrap_or(1e-3),
        source: &source,
        new_rows: None,
        artifact: Arc::new(model_artifact(&config, settings)),
        companions: Companions::new(Arc::clone(&tokenizer), None, config.max_position),
        fingerprints: fingerprints(&prepared, &tokenizer),
        train: prepared.train,
        val: prepared.val,
        packing: data.packing,
        preview,
    };
    run::run(&dev, &Solo, &spec, stop)?;
    report_written(&[("model", final_dir)], settings.quiet);
    Ok(())
}

fn report_written(written: &[(&str, PathBuf)], quiet: bool) {
    if !quiet {
        let rows: Vec<Vec<String>> = written
            .iter()
            .map(|(what, path)| vec![what.to_string(), path.display().to_string()])
            .collect();
        println!("\nwritten:\n{}", table(&rows).trim_end());
    }
}

/// What preparing the data has to say; standard output is for results.
fn note(line: String) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Rows as long as asked for, or as the model allows.
fn row_length(asked: Option<usize>, model: &ModelConfig) -> Result<usize> {
    let most = model.max_position;
    match asked {
        Some(n) if n > most => Err(Error::usage(format!(
            "max_seq_len {n} is longer than the model's maximum of {most} positions (max_position_embeddings)"
        ))),
        Some(n) => Ok(n),
        None => Ok(most.min(DEFAULT_SEQ_LEN)),
    }
}

/// Which rows embedding and head need for tokens that the base model does not know.
fn plan_resize(base: &ModelFiles, tokenizer: &Tokenizer, pad_to: Option<usize>, seed: u64) -> Result<Resize> {
    let rows = base.config().vocab_size;
    let (pieces, all) = (tokenizer.pieces().len(), tokenizer.vocab_size());
    ensure!(
        pieces <= rows,
        "vocabulary mismatch: tokenizer {} has {pieces} pieces, model {} has {rows} rows; give the tokenizer the model was \
         trained with",
        tokenizer.name(),
        base.dir().display()
    );
    // A model that was fine-tuned with these tokens before says so, or has exactly their rows: they are trained already.
    let known = read_added_tokens(base.dir())?;
    let special = tokenizer.special();
    let mut tokens = Vec::new();
    if rows != all {
        for (id, text) in (pieces..).zip(tokenizer.added()) {
            if !known.iter().any(|k| k.text == *text && k.id as usize == id) {
                let like = if tokenizer.control(Control::ImEnd).ok() == Some(id as u32) {
                    special.eos
                } else {
                    special.bos
                };
                tokens.push(NewToken {
                    id,
                    like: like as usize,
                });
            }
        }
    }
    Ok(Resize { tokens, pad_to, seed })
}

/// The model's token ids as the files will say them: with ChatML `<|im_end|>` ends a text.
fn with_token_ids(mut config: ModelConfig, tokenizer: &Tokenizer, template: Option<&Template>) -> Result<ModelConfig> {
    let special = tokenizer.special();
    config.bos_token_id = Some(special.bos);
    config.pad_token_id = Some(special.pad);
    config.eos_token_ids = vec![match template.is_some_and(Template::needs_chatml) {
        true => tokenizer.control(Control::ImEnd)?,
        false => special.eos,
    }];
    Ok(config)
}

/// The config of a new model: the tokenizer's vocabulary and ids where the text leaves them out.
fn new_model_config(text: &str, tokenizer: &Tokenizer) -> Result<ModelConfig> {
    let mut value: serde_json::Value =
        serde_json::from_str(text).map_err(|e| Error::new(format!("invalid JSON: {e}")))?;
    if let Some(map) = value.as_object_mut() {
        map.entry("vocab_size").or_insert(json!(tokenizer.vocab_size()));
    }
    let config = hf_config::parse(&value.to_string())?.model;
    ensure!(
        config.vocab_size >= tokenizer.vocab_size(),
        "vocab_size {} is below the tokenizer's {} pieces",
        config.vocab_size,
        tokenizer.vocab_size()
    );
    with_token_ids(config, tokenizer, None)
}

fn model_artifact(config: &ModelConfig, settings: &TrainSettings) -> Artifact {
    let dtype = match setup::dtype(settings) {
        DType::Bf16 => SaveDType::Bf16,
        _ => SaveDType::F32,
    };
    Artifact::Model {
        config: config.clone(),
        dtype,
    }
}

fn fingerprints(data: &SftData, tokenizer: &Tokenizer) -> Fingerprints {
    let mut f = Fingerprints::default();
    f.0.insert("data".into(), data.train.fingerprint());
    f.0.insert("tokenizer".into(), tokenizer.hash().to_string());
    f
}

/// Hash of config.json and every weight file of a model folder.
fn hash_model(dir: &Path) -> Result<String> {
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

/// The mix and the first rows with what is trained marked.
fn preview(data: &SftData, tokenizer: &Tokenizer) -> Vec<String> {
    let style = Style::stdout();
    let mut lines = vec![style.heading("data"), mix_table(data)];
    for (i, row) in data.first_rows(PREVIEW_ROWS).iter().enumerate() {
        lines.push(style.heading(&format!("row {}", i + 1)) + &format!(" (trained: {})", style.trained("like this")));
        lines.push(show_row(row, tokenizer, style));
    }
    lines.push(String::new());
    lines
}

fn show_row(row: &Encoded, tokenizer: &Tokenizer, style: Style) -> String {
    const LONGEST: usize = 400;
    let n = row.tokens.len().min(LONGEST);
    let mut out = String::new();
    let mut at = 0;
    while at < n {
        let trained = row.supervised[at];
        let end = (at..n).find(|&i| row.supervised[i] != trained).unwrap_or(n);
        let text = tokenizer.decode(&row.tokens[at..end], Specials::Show);
        out += &if trained {
            style.trained(&text)
        } else {
            style.context(&text)
        };
        at = end;
    }
    if row.tokens.len() > LONGEST {
        out += &format!(" … {} tokens more", row.tokens.len() - LONGEST);
    }
    out.trim_end().to_string()
}

/// Rows by data set: read, kept, held out; requested and achieved share in the three units.
fn mix_table(data: &SftData) -> String {
    let header = [
        "data set",
        "rows",
        "kept",
        "train",
        "validation",
        "samples",
        "tokens",
        "supervised tokens",
    ];
    let mut rows = vec![header.map(String::from).to_vec()];
    for (set, mix) in data.sets.iter().zip(data.train.mix_report(0)) {
        let mut row = vec![set.name.clone()];
        row.extend([set.counts.rows, set.counts.kept, set.n_train as u64, set.n_val as u64].map(grouped));
        let shares = mix.requested.iter().zip(mix.achieved);
        row.extend(shares.map(|(asked, got)| format!("{:.1}% → {:.1}%", 100.0 * asked, 100.0 * got)));
        rows.push(row);
    }
    format!("{}(shares of an epoch: asked → achieved)", table(&rows))
}
