//! What `sft`, `pretrain` and `check` work out before anything is trained: row length, vocabulary, ids, fingerprints.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::jobs::SftJob;
use crate::checkpoint::manifest::hash_file;
use crate::checkpoint::state::Fingerprints;
use crate::data::sft::SftData;
use crate::data::template::{Control, Template, TemplateOptions};
use crate::data::tokenizer::Tokenizer;
use crate::ensure;
use crate::error::{Context, Error, Result};
use crate::hf;
use crate::hf::artifact::Artifact;
use crate::hf::resize::{NewToken, Resize};
use crate::hf::safetensors::ModelFiles;
use crate::hf::tokenizer_files::read_added_tokens;
use crate::hf::{SaveDType, TensorSource};
use crate::model::config::ModelConfig;
use crate::settings::TrainSettings;
use crate::tensor::DType;

/// Longest row where neither the user nor the model asks for less, in training and in evaluation.
pub(super) const DEFAULT_SEQ_LEN: usize = 1024;

/// The tokenizer of a job: the one it names, or the one in the model's folder.
///
/// # Errors
/// If it is missing or cannot be trained with.
pub fn open_tokenizer(job: &SftJob) -> Result<Tokenizer> {
    Tokenizer::open_beside(&tokenizer_path(job), job.special_ids, Some(&job.model_path))
}

/// Where a job's tokenizer lies.
pub fn tokenizer_path(job: &SftJob) -> PathBuf {
    let beside = || Tokenizer::in_folder(&job.model_path).unwrap_or_else(|| job.model_path.join("tokenizer.model"));
    job.tokenizer_path.clone().unwrap_or_else(beside)
}

/// The template of a job; ChatML's tokens are added to a tokenizer that lacks them.
///
/// # Errors
/// If the template is unknown or does not parse.
pub fn open_template(job: &SftJob, tokenizer: &mut Tokenizer) -> Result<Template> {
    let options =
        TemplateOptions { supervise_turn_newline: job.supervise_turn_newline, names: tokenizer.control_names() };
    let template = Template::load(&job.prompt_template, options)?;
    if template.needs_chatml() {
        tokenizer.add_chatml();
    }
    Ok(template)
}

/// Rows as long as asked for, or as the model allows.
///
/// # Errors
/// A usage error when more is asked for than the model has positions.
pub fn row_length(asked: Option<usize>, model: &ModelConfig) -> Result<usize> {
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
///
/// # Errors
/// If the tokenizer has more pieces than the model has rows, or the model's list of added tokens cannot be read.
pub fn plan_resize(base: &ModelFiles, tokenizer: &Tokenizer, pad_to: Option<usize>, seed: u64) -> Result<Resize> {
    plan_resize_of(base.config(), base.dir(), tokenizer, pad_to, seed)
}

/// As [`plan_resize`], for a model of this configuration; the folder `dir` says what tokens it was trained with.
///
/// # Errors
/// As [`plan_resize`].
pub fn plan_resize_of(
    model: &ModelConfig,
    dir: &Path,
    tokenizer: &Tokenizer,
    pad_to: Option<usize>,
    seed: u64,
) -> Result<Resize> {
    let rows = model.vocab_size;
    let (pieces, all) = (tokenizer.pieces().len(), tokenizer.vocab_size());
    ensure!(
        pieces <= rows,
        "vocabulary mismatch: tokenizer {} has {pieces} pieces, model {} has {rows} rows; give the tokenizer the model was \
         trained with",
        tokenizer.name(),
        dir.display()
    );
    // A model that was fine-tuned with these tokens before says so, or has exactly their rows: they are trained already.
    let known = read_added_tokens(dir)?;
    let special = tokenizer.special();
    let mut tokens = Vec::new();
    if rows != all {
        for (id, text) in (pieces..).zip(tokenizer.added()) {
            if !known.iter().any(|k| k.text == *text && k.id as usize == id) {
                let like = if tokenizer.control(Control::ImEnd).ok() == Some(id as u32) {
                    special.eos
                } else {
                    // Any token but EOS: two rows made from one are all but equal, and an adapter could not tell them apart.
                    special.bos.or(special.unk).or(tokenizer.newline_id().ok()).unwrap_or(special.eos)
                };
                tokens.push(NewToken { id, like: like as usize });
            }
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
    f.0.insert("tokenizer".into(), tokenizer.hash().to_string());
    f
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
