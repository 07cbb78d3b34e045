//! `config.json` of Hugging Face models, in the spellings of transformers 4 and 5, to and from [`ModelConfig`].
//!
//! Key names and defaults are those of transformers' configuration classes of the four families. Whatever would change the
//! model's function and is not supported is refused by name; keys that do not are ignored, as transformers does.

mod keys;

use std::path::Path;

use serde_json::{Value, json};

use self::keys::{Keys, kind};
use super::SaveDType;
use crate::backend::Heads;
use crate::error::{Context, Result};
use crate::model::config::{Architecture, AttentionBias, ModelConfig, RopeScaling};
use crate::{bail, ensure};

/// What a `config.json` says.
#[derive(Clone, Debug, PartialEq)]
pub struct HfConfig {
    /// The shape of the model.
    pub model: ModelConfig,
    /// `torch_dtype` (transformers 4) or `dtype` (5), where given.
    pub dtype: Option<SaveDType>,
    /// Things a user should know: settings of the file that have no effect here.
    pub warnings: Vec<String>,
}

/// Most layers accepted, far above any published model, so that a hostile file cannot ask for a huge allocation.
const MAX_LAYERS: usize = 4096;

/// Reads and checks `dir/config.json`.
///
/// # Errors
/// If the file is missing, is no JSON object, lacks a key, has one of the wrong type, contradicts itself, or asks for
/// something that is not supported; the message names file and key.
pub fn read(dir: &Path) -> Result<HfConfig> {
    let path = dir.join("config.json");
    let text = crate::files::read_text(&path, 16 << 20)?;
    parse(&text).context(|| path.display().to_string())
}

/// Parses the text of a `config.json`; see [`read`].
///
/// # Errors
/// As [`read`], without the file's name.
pub fn parse(text: &str) -> Result<HfConfig> {
    let value: Value =
        serde_json::from_str(text).map_err(|e| crate::error::Error::new(format!("invalid JSON: {e}")))?;
    let Value::Object(map) = value else {
        bail!("expected a JSON object, found {}", kind(&value));
    };
    let keys = Keys { map: &map, prefix: "" };
    let mut warnings = Vec::new();
    let architecture = architecture(&keys, &mut warnings)?;
    refuse_unsupported(&keys, architecture, &mut warnings)?;

    let hidden_size = keys.dim("hidden_size")?;
    let n_query = keys.dim("num_attention_heads")?;
    let n_kv = match keys.opt_dim("num_key_value_heads")? {
        Some(n) => n,
        None if architecture == Architecture::Llama => n_query,
        None => bail!("missing key num_key_value_heads"),
    };
    ensure!(
        n_query.is_multiple_of(n_kv),
        "num_attention_heads {n_query} is not a multiple of num_key_value_heads {n_kv}"
    );
    let head_dim = match keys.opt_dim("head_dim")? {
        Some(d) => d,
        None if architecture == Architecture::Qwen3 => 128, // Qwen3Config's default does not depend on hidden_size.
        None => {
            ensure!(
                hidden_size.is_multiple_of(n_query),
                "hidden_size {hidden_size} is not a multiple of num_attention_heads {n_query} and head_dim is missing"
            );
            hidden_size / n_query
        }
    };
    ensure!(head_dim.is_multiple_of(2), "head_dim {head_dim} is odd; rotary embeddings turn pairs");
    let n_layers = keys.dim("num_hidden_layers")?;
    ensure!(n_layers <= MAX_LAYERS, "num_hidden_layers: expected at most {MAX_LAYERS}, found {n_layers}");
    let vocab_size = keys.dim("vocab_size")?;
    let n_classes = keys.opt_dim("unpadded_vocab_size")?.unwrap_or(vocab_size);
    ensure!(n_classes <= vocab_size, "unpadded_vocab_size {n_classes} is above vocab_size {vocab_size}");
    let rms_norm_eps = keys.opt_number("rms_norm_eps")?.unwrap_or(1e-6);
    ensure!((0.0..1.0).contains(&rms_norm_eps), "rms_norm_eps: expected 0 to below 1, found {rms_norm_eps}");
    let (rope_theta, rope_scaling) = rope(&keys, &mut warnings)?;
    let bias = keys.opt_bool("attention_bias")?.unwrap_or(false);
    let id = |key: &str| keys.opt_id(key);
    let model = ModelConfig {
        architecture,
        vocab_size,
        n_classes,
        hidden_size,
        intermediate_size: keys.dim("intermediate_size")?,
        n_layers,
        heads: Heads { n_query, n_kv, head_dim },
        max_position: keys.opt_dim("max_position_embeddings")?.unwrap_or(match architecture {
            Architecture::Llama => 2048,
            Architecture::Mistral => 131_072,
            Architecture::Qwen2 | Architecture::Qwen3 => 32_768,
        }),
        rms_norm_eps,
        rope_theta,
        rope_scaling,
        tied: keys.opt_bool("tie_word_embeddings")?.unwrap_or(false),
        attention_bias: match architecture {
            Architecture::Qwen2 => AttentionBias::Qkv,
            Architecture::Llama | Architecture::Qwen3 if bias => AttentionBias::Qkvo,
            _ => AttentionBias::None,
        },
        mlp_bias: keys.opt_bool("mlp_bias")?.unwrap_or(false),
        qk_norm: architecture == Architecture::Qwen3,
        sliding_window: sliding_window(&keys, architecture, n_layers)?,
        bos_token_id: id("bos_token_id")?,
        eos_token_ids: eos_ids(&keys)?,
        pad_token_id: id("pad_token_id")?,
    };
    let ids = [("bos_token_id", model.bos_token_id), ("pad_token_id", model.pad_token_id)];
    let eos = model.eos_token_ids.iter().map(|&e| ("eos_token_id", Some(e)));
    for (key, id) in ids.into_iter().chain(eos) {
        if let Some(id) = id.filter(|&id| id as usize >= vocab_size) {
            warnings.push(format!("config.json: {key} {id} is not below vocab_size {vocab_size}"));
        }
    }
    Ok(HfConfig { model, dtype: dtype(&keys)?, warnings })
}

/// The family, from `model_type`, as in transformers. The class in `architectures` may be an old or another one: what counts is that
/// every weight is there.
fn architecture(keys: &Keys, warnings: &mut Vec<String>) -> Result<Architecture> {
    let model_type = keys.text("model_type")?;
    let known = [
        ("llama", "LlamaForCausalLM", Architecture::Llama),
        ("mistral", "MistralForCausalLM", Architecture::Mistral),
        ("qwen2", "Qwen2ForCausalLM", Architecture::Qwen2),
        ("qwen3", "Qwen3ForCausalLM", Architecture::Qwen3),
    ];
    let Some(&(_, class, architecture)) = known.iter().find(|(name, ..)| *name == model_type) else {
        bail!("model_type {model_type:?} is not supported; expected llama, mistral, qwen2 or qwen3");
    };
    match keys.get("architectures") {
        None => {}
        Some(Value::Array(list)) => {
            let fits = list.is_empty() || list.iter().any(|v| v.as_str() == Some(class));
            if !fits {
                let found = Value::Array(list.clone());
                warnings.push(format!(
                    "config.json: architectures {found} is not [{class:?}]; model_type {model_type} decides, and the model is taken as that"
                ));
            }
        }
        Some(other) => bail!("architectures: expected a list, found {}", kind(other)),
    }
    Ok(architecture)
}

/// Refuses by name what would change the model's function, and notes what has no effect.
fn refuse_unsupported(keys: &Keys, architecture: Architecture, warnings: &mut Vec<String>) -> Result<()> {
    if let Some(act) = keys.opt_text("hidden_act")? {
        ensure!(act == "silu" || act == "swish", "hidden_act {act:?} is not supported; expected silu");
    }
    let mlp_bias = keys.opt_bool("mlp_bias")?.unwrap_or(false);
    ensure!(!mlp_bias || architecture == Architecture::Llama, "mlp_bias true is not supported for this model_type");
    for key in ["quantization_config", "compression_config"] {
        ensure!(
            keys.get(key).is_none(),
            "{key}: quantised models are not supported; use the model in bfloat16, float16 or float32"
        );
    }
    if let Some(f) = keys.opt_number("partial_rotary_factor")? {
        ensure!(f == 1.0, "partial_rotary_factor {f} is not supported; expected 1");
    }
    if let Some(p) = keys.opt_number("attention_dropout")?.filter(|&p| p != 0.0) {
        warnings.push(format!("config.json: attention_dropout {p} is not applied in training"));
    }
    // transformers has no bias in Mistral whatever the key says; Qwen2's biases are fixed.
    if matches!(architecture, Architecture::Mistral | Architecture::Qwen2) {
        let bias = keys.opt_bool("attention_bias")?.unwrap_or(false);
        ensure!(!bias, "attention_bias true is not supported for this model_type");
    }
    // pretraining_tp only splits the sums of the products; the function is the same, and transformers 5 ignores it.
    if keys.opt_number("pretraining_tp")?.is_some_and(|tp| tp > 1.0) {
        warnings.push("config.json: pretraining_tp has no effect".to_string());
    }
    Ok(())
}

/// Base and scaling of the rotary frequencies from `rope_parameters` (5) or `rope_theta` and `rope_scaling` (4).
fn rope(keys: &Keys, warnings: &mut Vec<String>) -> Result<(f64, RopeScaling)> {
    let v4_theta = keys.opt_number("rope_theta")?;
    let v4 = match keys.opt_object("rope_scaling")? {
        Some(map) => Some(scaling(&Keys { map, prefix: "rope_scaling." }, warnings)?),
        None => None,
    };
    let (theta, found) = match keys.opt_object("rope_parameters")? {
        None => (v4_theta, v4.unwrap_or(RopeScaling::Default)),
        Some(map) => {
            let inner = Keys { map, prefix: "rope_parameters." };
            for key in ["full_attention", "sliding_attention"] {
                ensure!(
                    inner.get(key).is_none(),
                    "rope_parameters.{key}: rotary settings per layer type are not supported"
                );
            }
            let theta = inner.opt_number("rope_theta")?;
            if let (Some(a), Some(b)) = (theta, v4_theta) {
                ensure!(a == b, "rope_theta {b} and rope_parameters.rope_theta {a} contradict each other");
            }
            let v5 = scaling(&inner, warnings)?;
            if let Some(v4) = v4 {
                ensure!(v4 == v5, "rope_scaling and rope_parameters contradict each other: {v4:?} and {v5:?}");
            }
            (theta.or(v4_theta), v5)
        }
    };
    let theta = theta.unwrap_or(10_000.0);
    ensure!(theta >= 1.0 && theta.is_finite(), "rope_theta: expected at least 1, found {theta}");
    Ok((theta, found))
}

/// One rope dictionary: `rope_type` (or the old `type`) and its numbers. Numbers that the type does not read are warned of: as in
/// transformers, a factor without a type scales nothing.
fn scaling(keys: &Keys, warnings: &mut Vec<String>) -> Result<RopeScaling> {
    if let Some(f) = keys.opt_number("partial_rotary_factor")? {
        ensure!(f == 1.0, "{}partial_rotary_factor {f} is not supported; expected 1", keys.prefix);
    }
    let rope_type = match (keys.opt_text("rope_type")?, keys.opt_text("type")?) {
        (Some(a), Some(b)) if a != b => bail!("{}rope_type {a:?} and type {b:?} contradict each other", keys.prefix),
        (a, b) => a.or(b).unwrap_or("default"),
    };
    let positive = |key: &str| -> Result<f64> {
        let x = keys.number(key)?;
        ensure!(x > 0.0 && x.is_finite(), "{}{key}: expected a positive number, found {x}", keys.prefix);
        Ok(x)
    };
    let read: &[&str] = match rope_type {
        "linear" => &["factor"],
        "llama3" => &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
        _ => &[],
    };
    let always = ["rope_type", "type", "rope_theta", "partial_rotary_factor"];
    let unread = |(key, value): &(&String, &Value)| {
        !value.is_null() && !always.contains(&key.as_str()) && !read.contains(&key.as_str())
    };
    for (key, value) in keys.map.iter().filter(unread) {
        warnings.push(format!(
            "config.json: {}{key} {value} has no effect with rope_type {rope_type}; name the type that reads it, or remove it",
            keys.prefix
        ));
    }
    match rope_type {
        "default" => Ok(RopeScaling::Default),
        "linear" => Ok(RopeScaling::Linear { factor: positive("factor")? }),
        "llama3" => {
            let (low, high) = (positive("low_freq_factor")?, positive("high_freq_factor")?);
            ensure!(low < high, "{}low_freq_factor {low} is not below high_freq_factor {high}", keys.prefix);
            Ok(RopeScaling::Llama3 {
                factor: positive("factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position: keys.dim("original_max_position_embeddings")?,
            })
        }
        other => bail!("{}rope_type {other:?} is not supported; expected default, linear or llama3", keys.prefix),
    }
}

/// The window, where it is in force on every layer.
fn sliding_window(keys: &Keys, architecture: Architecture, n_layers: usize) -> Result<Option<usize>> {
    let window = keys.opt_dim("sliding_window")?;
    // Mistral's class has a window of 4096 when the key is missing; an explicit null means none.
    let mut window = match architecture {
        Architecture::Llama => None,
        Architecture::Mistral => window.or_else(|| (!keys.map.contains_key("sliding_window")).then_some(4096)),
        Architecture::Qwen2 | Architecture::Qwen3 if keys.opt_bool("use_sliding_window")?.unwrap_or(false) => {
            let w = window.unwrap_or(4096);
            let from = keys.opt_count("max_window_layers")?.unwrap_or(28);
            match keys.get("layer_types") {
                Some(_) => Some(w),
                None if from == 0 => Some(w),
                None if from >= n_layers => None,
                None => {
                    bail!("max_window_layers {from} of {n_layers}: a window on some of the layers is not supported")
                }
            }
        }
        Architecture::Qwen2 | Architecture::Qwen3 => None,
    };
    match keys.get("layer_types") {
        None => {}
        Some(Value::Array(types)) => {
            ensure!(types.len() == n_layers, "layer_types: expected {n_layers} entries, found {}", types.len());
            let sliding = types.iter().filter(|t| t.as_str() == Some("sliding_attention")).count();
            let full = types.iter().filter(|t| t.as_str() == Some("full_attention")).count();
            if let Some(t) = types.iter().find(|t| !matches!(t.as_str(), Some("sliding_attention" | "full_attention")))
            {
                bail!("layer_types: {t} is not supported; expected full_attention or sliding_attention");
            }
            ensure!(
                sliding == 0 || full == 0,
                "layer_types: {sliding} sliding and {full} full layers; a window on some of the layers is not supported"
            );
            ensure!(
                sliding == 0 || window.is_some(),
                "layer_types asks for sliding_attention but no window is in force"
            );
            if architecture != Architecture::Mistral && full > 0 {
                window = None;
            }
        }
        Some(other) => bail!("layer_types: expected a list, found {}", kind(other)),
    }
    Ok(window)
}

fn eos_ids(keys: &Keys) -> Result<Vec<u32>> {
    match keys.get("eos_token_id") {
        Some(Value::Array(list)) => list
            .iter()
            .map(|v| match v.as_u64().and_then(|id| u32::try_from(id).ok()) {
                Some(id) => Ok(id),
                None => bail!("eos_token_id: expected token ids, found {v}"),
            })
            .collect(),
        _ => Ok(keys.opt_id("eos_token_id")?.into_iter().collect()),
    }
}

fn dtype(keys: &Keys) -> Result<Option<SaveDType>> {
    let mut found = None;
    for key in ["dtype", "torch_dtype"] {
        let Some(name) = keys.opt_text(key)? else { continue };
        let this = match name.strip_prefix("torch.").unwrap_or(name) {
            "float32" => SaveDType::F32,
            "bfloat16" => SaveDType::Bf16,
            "float16" => SaveDType::F16,
            "auto" => continue,
            other => bail!("{key} {other:?} is not supported; expected bfloat16, float16 or float32"),
        };
        ensure!(found.is_none_or(|f| f == this), "dtype and torch_dtype contradict each other");
        found = Some(this);
    }
    Ok(found)
}

/// The `config.json` of a model, with the keys of transformers 4 (`torch_dtype`, `rope_theta`, `rope_scaling`) and 5
/// (`dtype`, `rope_parameters`), so that both load it.
pub fn to_json(c: &ModelConfig, dtype: SaveDType) -> Value {
    let (class, model_type) = match c.architecture {
        Architecture::Llama => ("LlamaForCausalLM", "llama"),
        Architecture::Mistral => ("MistralForCausalLM", "mistral"),
        Architecture::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
        Architecture::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
    };
    let scaling = match c.rope_scaling {
        RopeScaling::Default => None,
        RopeScaling::Linear { factor } => Some(json!({"rope_type": "linear", "factor": factor})),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => Some(json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_position,
        })),
    };
    let mut parameters = scaling.clone().unwrap_or_else(|| json!({"rope_type": "default"}));
    parameters["rope_theta"] = json!(c.rope_theta);
    let eos = match c.eos_token_ids.as_slice() {
        [] => Value::Null,
        [id] => json!(id),
        ids => json!(ids),
    };
    let mut v = json!({
        "architectures": [class],
        "model_type": model_type,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.heads.n_query,
        "num_key_value_heads": c.heads.n_kv,
        "head_dim": c.heads.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_position,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": parameters,
        "attention_dropout": 0.0,
        "tie_word_embeddings": c.tied,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": c.pad_token_id,
        "initializer_range": 0.02,
        "use_cache": true,
        "torch_dtype": dtype.torch_name(),
        "dtype": dtype.torch_name(),
    });
    match c.architecture {
        Architecture::Llama => {
            v["attention_bias"] = json!(c.attention_bias != AttentionBias::None);
            v["mlp_bias"] = json!(c.mlp_bias);
        }
        Architecture::Mistral => v["sliding_window"] = json!(c.sliding_window),
        Architecture::Qwen2 | Architecture::Qwen3 => {
            if c.architecture == Architecture::Qwen3 {
                v["attention_bias"] = json!(c.attention_bias != AttentionBias::None);
            }
            let windowed = c.sliding_window.is_some();
            v["use_sliding_window"] = json!(windowed);
            v["sliding_window"] = json!(c.sliding_window);
            v["max_window_layers"] = json!(if windowed { 0 } else { c.n_layers });
            let layer = if windowed { "sliding_attention" } else { "full_attention" };
            v["layer_types"] = json!(vec![layer; c.n_layers]);
        }
    }
    if c.n_classes != c.vocab_size {
        v["unpadded_vocab_size"] = json!(c.n_classes);
    }
    v
}
