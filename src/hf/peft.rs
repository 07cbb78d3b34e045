//! LoRA adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use tokenizers::utils::SysRegex;

use super::safetensors::TensorFile;
use super::save::{Entry, write_tensors_with};
use super::{HostTensor, SaveDType};
use crate::checkpoint::state::read_json;
use crate::error::{Context, Error, Result};
use crate::files::{create_dir_all, write_json};
use crate::model::LoraSpec;
use crate::model::config::ModelConfig;
use crate::model::weights::{Kind, Part, Place, Product, Weights};
use crate::{bail, ensure};

/// Name of the configuration in an adapter folder.
pub const CONFIG: &str = "adapter_config.json";
/// Name of the weights in an adapter folder.
pub const WEIGHTS: &str = "adapter_model.safetensors";
/// Folder of a base model with a grown vocabulary, in the output folder of a run.
pub const RESIZED_BASE: &str = "resized_base";
const PREFIX: &str = "base_model.model.";
/// What PEFT writes between a module it saves whole and `.weight`: nothing or the trained copy, or the base's own.
const TRAINED: [&str; 3] = [".modules_to_save", ".modules_to_save.default", ""];
const UNTRAINED: &str = ".original_module";
/// In the header: rows of the vocabulary that take part in the softmax, where others pad it.
const CLASSES: &str = "unpadded_vocab_size";
/// Ranks beyond this are no low-rank updates.
const MAX_RANK: u64 = 1 << 16;

/// What `adapter_config.json` says.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// The updates, as they were trained; targets in the order of [`Product::ALL`].
    pub lora: LoraSpec,
    /// Where the base model is: a path, or a name of the hub.
    pub base: String,
    /// Revision of a base on the hub; `None`: its main branch.
    pub revision: Option<String>,
}

impl AdapterConfig {
    fn to_json(&self) -> Value {
        let LoraSpec { r, alpha, dropout, rslora, targets } = &self.lora;
        let whole = alpha.fract() == 0.0 && alpha.abs() < 1e15;
        let alpha = if whole { json!(*alpha as i64) } else { json!(alpha) };
        json!({
            "alpha_pattern": {},
            "auto_mapping": null,
            "base_model_name_or_path": self.base,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layers_pattern": null,
            "layers_to_transform": null,
            "lora_alpha": alpha,
            "lora_dropout": dropout,
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": r,
            "rank_pattern": {},
            "revision": self.revision,
            "target_modules": targets.iter().map(|p| p.name()).collect::<Vec<_>>(),
            "task_type": "CAUSAL_LM",
            "use_dora": false,
            "use_rslora": rslora,
        })
    }
}

/// Whether a folder holds an adapter.
pub fn is_adapter(dir: &Path) -> bool {
    dir.join(CONFIG).is_file()
}

/// An adapter on disk, its header checked.
pub struct Adapter {
    dir: PathBuf,
    /// What adapter_config.json says.
    pub config: AdapterConfig,
    file: TensorFile,
    n_layers: usize,
    /// PEFT keeps a copy of each saved module, whatever is tied in the base.
    apart: bool,
}

impl Adapter {
    /// Opens an adapter folder written by PEFT or ringtune.
    ///
    /// # Errors
    /// If a file is missing or damaged, or the adapter is of a kind that is not supported; the message names the setting or tensor.
    pub fn open(dir: &Path) -> Result<Self> {
        ensure!(dir.is_dir(), "{}: no such adapter folder", dir.display());
        let path = dir.join(CONFIG);
        let value = read_json(&path)?;
        let map = value.as_object().expect("read_json gives objects");
        let mut config = parse_config(map).context(|| path.display().to_string())?;
        if !dir.join(WEIGHTS).is_file() && dir.join("adapter_model.bin").is_file() {
            bail!("{}: adapter_model.bin is not read; save the adapter with safe_serialization", dir.display());
        }
        let file = TensorFile::open(&dir.join(WEIGHTS))?;
        let (targets, n_layers) = targets_in(&file, &config).context(|| file.path().display().to_string())?;
        check_target_modules(map, &targets, n_layers).context(|| path.display().to_string())?;
        config.lora.targets = targets;
        let saves = map.get("modules_to_save").and_then(Value::as_array).is_some_and(|names| !names.is_empty());
        let apart = saves && map.get("ensure_weight_tying") != Some(&Value::Bool(true));
        Ok(Self { dir: dir.to_path_buf(), config, file, n_layers, apart })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A and B of a product in layer `layer`, where the adapter updates it.
    ///
    /// # Errors
    /// If the tensors cannot be decoded or hold values that are not finite.
    pub fn lora(&self, layer: usize, product: Product) -> Result<Option<(HostTensor, HostTensor)>> {
        if layer >= self.n_layers || !self.config.lora.targets.contains(&product) {
            return Ok(None);
        }
        let load = |part| self.file.load(&key(Place::Layer(layer, part)));
        Ok(Some((load(Part::LoraA(product))?, load(Part::LoraB(product))?)))
    }

    /// The whole embedding or head that the adapter carries, trained or for a grown vocabulary.
    ///
    /// # Errors
    /// If it cannot be decoded, holds values that are not finite, or is there twice with other values.
    pub fn full(&self, at: Place) -> Result<Option<HostTensor>> {
        let mut copies = copies(&self.file, at);
        let Some(first) = copies.next() else { return Ok(None) };
        let tensor = self.file.load(&first)?;
        for other in copies {
            let path = self.file.path().display();
            ensure!(
                self.file.load(&other)? == tensor,
                "{path}: {first} and {other} differ; expected two copies of one matrix"
            );
        }
        Ok(Some(tensor))
    }

    /// Checks the adapter against a base model and returns the configuration of the model they make: that of the base, with the
    /// vocabulary the adapter brings.
    ///
    /// # Errors
    /// If layers or shapes differ; the message says which, expected and found.
    pub fn fit(&self, base: &ModelConfig) -> Result<ModelConfig> {
        let path = self.file.path().display();
        ensure!(
            self.n_layers == base.n_layers,
            "{path}: the adapter has {} layers, the base model {}; was it trained on another model? Updates of some layers alone are \
             not supported",
            self.n_layers,
            base.n_layers
        );
        let expect = |at: Place, want: [usize; 2]| -> Result<()> {
            let key = key(at);
            let (got, _) = self.file.info(&key).expect("the keys were checked when the adapter was opened");
            ensure!(got == want, "{path}: {key}: expected shape {want:?} for this base model, found {got:?}");
            Ok(())
        };
        for at in low_rank(base, &self.config.lora.targets) {
            expect(at, at.shape(base, self.config.lora.r).into())?;
        }
        let rows = |at: Place| self.file.info(&copies(&self.file, at).next()?).map(|(shape, _)| shape.to_vec());
        let mut config = base.clone();
        let (embed, head) = (rows(Place::Embed), rows(Place::Head));
        let Some(vocab) = embed.as_ref().or(head.as_ref()).map(|shape| shape[0]) else {
            return Ok(config);
        };
        ensure!(
            vocab >= base.vocab_size,
            "{path}: vocabulary mismatch: the adapter's embedding has {vocab} rows, the base model {}",
            base.vocab_size
        );
        if base.tied && (self.apart || head.is_some()) {
            config.tied = self.full(Place::Embed)? == self.full(Place::Head)?;
            let (embed, head) = (Place::Embed, Place::Head);
            ensure!(config.tied || self.apart, "{path}: {head} differs from {embed}, but the base model ties them");
        }
        for (at, shape) in [(Place::Embed, &embed), (Place::Head, &head)] {
            let required = vocab != base.vocab_size && (at == Place::Embed || !config.tied);
            match shape {
                Some(got) => {
                    let want = [vocab, base.hidden_size];
                    ensure!(*got == want, "{path}: {at}: expected shape {want:?} for this base model, found {got:?}");
                }
                None if required => bail!("{path}: the vocabulary was grown to {vocab} but {at} is missing"),
                None => {}
            }
        }
        config.n_classes = match self.file.metadata().get(CLASSES).map(|n| n.parse()) {
            Some(Ok(n)) if (1..=vocab).contains(&n) => n,
            Some(_) => bail!("{path}: {CLASSES}: expected a number of rows up to {vocab}"),
            None if vocab == base.vocab_size => base.n_classes,
            None => vocab,
        };
        config.vocab_size = vocab;
        Ok(config)
    }

    /// The folder of the base model: `given` where the user names one, else `base_model_name_or_path` as it is, relative to
    /// the adapter's folder, or relative to a folder above it, or `resized_base/` in an output folder that was moved.
    ///
    /// # Errors
    /// If there is no such folder.
    pub fn find_base(&self, given: Option<&Path>) -> Result<PathBuf> {
        if let Some(dir) = given {
            ensure!(dir.is_dir(), "{}: no such base model folder", dir.display());
            return Ok(dir.to_path_buf());
        }
        let (name, config) = (&self.config.base, self.dir.join(CONFIG));
        ensure!(!name.is_empty(), "{}: base_model_name_or_path is empty; name the base model", config.display());
        match self.local_base()? {
            Some(dir) => Ok(dir),
            None => bail!(
                "{}: base_model_name_or_path {name:?} is no model folder, neither from here nor from the adapter's folder; \
                 put the base model there or name its folder (--base-model)",
                config.display()
            ),
        }
    }

    /// The folder that `base_model_name_or_path` names, if there is one; see [`Adapter::find_base`].
    ///
    /// # Errors
    /// If the working directory is gone.
    pub fn local_base(&self) -> Result<Option<PathBuf>> {
        let name = &self.config.base;
        let here = std::path::absolute(&self.dir).context(|| self.dir.display().to_string())?;
        let above = here.ancestors().take(4).map(|d| d.join(name));
        // An output folder that was moved still has the grown base in it, or above its checkpoints.
        let grown = Path::new(name).file_name().filter(|n| *n == RESIZED_BASE);
        let beside = grown.into_iter().flat_map(|n| here.ancestors().take(2).map(move |d| d.join(n)));
        let mut places = std::iter::once(PathBuf::from(name)).chain(above).chain(beside);
        Ok(places.find(|d| !name.is_empty() && d.join("config.json").is_file()))
    }
}

/// Parses and checks the settings; `targets` stays empty, it comes from the tensors.
fn parse_config(map: &Map<String, Value>) -> Result<AdapterConfig> {
    let get = |key: &str| map.get(key).filter(|v| !v.is_null());
    let wrong = |key: &str, what: &str, v: &Value| Error::new(format!("{key}: expected {what}, found {v}"));
    let peft_type = get("peft_type").and_then(Value::as_str).unwrap_or("missing");
    ensure!(peft_type == "LORA", "peft_type {peft_type} is not supported; expected LORA");
    if let Some(task) = get("task_type") {
        ensure!(task == "CAUSAL_LM", "task_type {task} is not supported; expected CAUSAL_LM");
    }
    // Settings that change what the adapter computes: only these values are understood.
    let fixed: [(&str, &[Value]); 5] = [
        ("bias", &[json!("none")]),
        ("init_lora_weights", &[json!(true), json!(false), json!("gaussian"), json!("eva"), json!("orthogonal")]),
        ("megatron_config", &[]),
        ("layers_to_transform", &[]),
        ("exclude_modules", &[json!([])]),
    ];
    for (key, allowed) in fixed {
        if let Some(v) = get(key) {
            let default = allowed.first().map_or("null".to_string(), ToString::to_string);
            ensure!(allowed.contains(v), "{key} {v} is not supported; expected {default}");
        }
    }
    // Variants of LoRA that are switched on by a key: anything but off is refused.
    let variants = [
        "use_dora",
        "use_qalora",
        "use_bdlora",
        "lora_bias",
        "fan_in_fan_out",
        "rank_pattern",
        "alpha_pattern",
        "layer_replication",
        "trainable_token_indices",
        "target_parameters",
        "alora_invocation_tokens",
        "arrow_config",
        "loftq_config",
        "corda_config",
        "kasa_config",
        "lora_ga_config",
        "monteclora_config",
        "velora_config",
    ];
    for key in variants {
        let off = match get(key) {
            None | Some(Value::Bool(false)) => true,
            Some(Value::Object(m)) => m.is_empty(),
            Some(Value::Array(a)) => a.is_empty(),
            Some(_) => false,
        };
        ensure!(off, "{key} is not supported; expected it to be off");
    }
    if let Some(list) = get("modules_to_save") {
        let names = list.as_array().ok_or_else(|| wrong("modules_to_save", "a list", list))?;
        let short = |n: &Value| n.as_str().and_then(|n| n.rsplit('.').next().map(str::to_string));
        let other = names.iter().find(|n| !matches!(short(n).as_deref(), Some("embed_tokens" | "lm_head")));
        if let Some(n) = other {
            bail!("modules_to_save {n} is not supported; expected null, embed_tokens or lm_head");
        }
    }
    let Some(r) = get("r") else { bail!("missing key r") };
    let rank = r.as_u64().filter(|n| (1..=MAX_RANK).contains(n)).ok_or_else(|| wrong("r", "a positive rank", r))?;
    let Some(alpha) = get("lora_alpha") else { bail!("missing key lora_alpha") };
    let finite = |key, v: &Value| v.as_f64().filter(|x| x.is_finite()).ok_or_else(|| wrong(key, "a number", v));
    let dropout = get("lora_dropout").map_or(Ok(0.0), |v| finite("lora_dropout", v))?;
    ensure!((0.0..1.0).contains(&dropout), "lora_dropout: expected 0 to below 1, found {dropout}");
    let base = match get("base_model_name_or_path") {
        None => String::new(),
        Some(v) => v.as_str().ok_or_else(|| wrong("base_model_name_or_path", "a path", v))?.to_string(),
    };
    let rslora =
        get("use_rslora").map_or(Ok(false), |v| v.as_bool().ok_or_else(|| wrong("use_rslora", "true or false", v)))?;
    let (r, alpha, targets) = (rank as usize, finite("lora_alpha", alpha)?, Vec::new());
    let revision = match get("revision") {
        None => None,
        Some(v) => Some(v.as_str().ok_or_else(|| wrong("revision", "a branch, tag or commit", v))?.to_string()),
    };
    Ok(AdapterConfig { lora: LoraSpec { r, alpha, dropout, rslora, targets }, base, revision })
}

/// The products that the file updates, and the number of layers; every key has to be understood, every layer alike.
fn targets_in(file: &TensorFile, config: &AdapterConfig) -> Result<(Vec<Product>, usize)> {
    let mut layers: BTreeMap<(usize, Product), [bool; 2]> = BTreeMap::new();
    let vocabulary: Vec<String> = [Place::Embed, Place::Head]
        .into_iter()
        .flat_map(|at| TRAINED.iter().chain([&UNTRAINED]).map(move |between| spelled(at, between)))
        .collect();
    for key in file.names() {
        let Some(name) = key.strip_prefix(PREFIX) else {
            bail!("{key}: expected a name that begins with {PREFIX}; is this an adapter of a causal language model?");
        };
        if vocabulary.iter().any(|v| v == key) {
            let (shape, _) = file.info(key).expect("a name of the file");
            ensure!(shape.len() == 2, "{key}: expected two dimensions, found shape {shape:?}");
            continue;
        }
        ensure!(!name.contains("lora_magnitude_vector"), "{key}: DoRA is not supported");
        let Some((layer, product, part)) = parse_key(name) else {
            bail!("{key}: unexpected tensor; expected low-rank updates of the seven products of a layer");
        };
        let (shape, dtype) = file.info(key).expect("a name of the file");
        let rank = if part == 0 { shape.first() } else { shape.get(1) };
        let (two, r) = (shape.len() == 2, config.lora.r);
        ensure!(two && rank == Some(&r), "{key}: expected rank {r} from {CONFIG}, found shape {shape:?}");
        ensure!(matches!(dtype.as_str(), "F32" | "BF16" | "F16"), "{key}: element type {dtype} is not supported");
        layers.entry((layer, product)).or_default()[part] = true;
    }
    let Some(n_layers) = layers.keys().map(|(i, _)| i + 1).max() else { bail!("no low-rank update in it") };
    let targets: Vec<Product> =
        Product::ALL.into_iter().filter(|p| layers.keys().any(|(_, target)| target == p)).collect();
    // The count is bounded by the keys, so that a layer number of 10^9 in a hostile file costs nothing.
    ensure!(n_layers <= layers.len(), "layers up to {} but only {} updates", n_layers - 1, layers.len());
    for i in 0..n_layers {
        for t in &targets {
            match layers.get(&(i, *t)) {
                Some([true, true]) => {}
                Some([true, false]) => bail!("layer {i}: {t}.lora_B is missing"),
                Some(_) => bail!("layer {i}: {t}.lora_A is missing"),
                None => bail!("layer {i} has no update of {t}, others do; updates of some layers are not supported"),
            }
        }
    }
    Ok((targets, n_layers))
}

/// `model.layers.{i}.{path}.lora_{A|B}.weight` -> layer, product, 0 for A and 1 for B.
fn parse_key(name: &str) -> Option<(usize, Product, usize)> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    // `00` and `+0` would be the same layer under a name that nobody looks up.
    let layer = layer.parse::<usize>().ok().filter(|n| n.to_string() == layer)?;
    let (path, part) = rest.split_once(".lora_")?;
    let product = Product::ALL.into_iter().find(|p| p.path() == path)?;
    let part = match part {
        "A.weight" => 0,
        "B.weight" => 1,
        _ => return None,
    };
    Some((layer, product, part))
}

/// `target_modules` has to say what the tensors update: PEFT leaves tensors of other modules out when it loads the adapter. A list
/// has names, of modules or of the ends of their paths; a text is a pattern for whole paths, or `all-linear`.
fn check_target_modules(map: &Map<String, Value>, targets: &[Product], n_layers: usize) -> Result<()> {
    let updates = || targets.iter().map(|t| t.name()).collect::<Vec<_>>().join(", ");
    let fits: Box<dyn Fn(&str) -> bool> = match map.get("target_modules") {
        Some(Value::Array(list)) => {
            let mut names = Vec::with_capacity(list.len());
            for module in list {
                let Some(name) = module.as_str() else { bail!("target_modules: expected names, found {module}") };
                let short = name.rsplit('.').next().unwrap_or(name);
                ensure!(
                    targets.iter().any(|t| t.name() == short),
                    "target_modules names {name}, but {WEIGHTS} has no update of it (it has {})",
                    updates()
                );
                names.push(name.to_string());
            }
            let ends = |path: &str, name: &str| {
                path.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            };
            Box::new(move |path| names.iter().any(|name| ends(path, name)))
        }
        Some(Value::String(pattern)) if !pattern.eq_ignore_ascii_case("all-linear") => {
            // A pattern that is none here may be one in Python.
            let Ok(pattern) = SysRegex::new(&format!("^(?:{pattern})$")) else { return Ok(()) };
            Box::new(move |path| pattern.find_iter(path).next().is_some())
        }
        _ => return Ok(()),
    };
    for (layer, product) in (0..n_layers).flat_map(|layer| targets.iter().map(move |t| (layer, t))) {
        let path = format!("model.layers.{layer}.{}", product.path());
        ensure!(
            fits(&path),
            "target_modules does not name {path}, but {WEIGHTS} has an update of it, which PEFT would leave out (it has {}); name \
             what was trained",
            updates()
        );
    }
    Ok(())
}

/// Writes an adapter folder. `load` gives A and B of every update, and with `embeddings` the whole embedding and (untied) head. All
/// are written in f32.
///
/// # Errors
/// If a tensor cannot be read or is not finite, or a file cannot be written.
pub fn save_adapter(
    dir: &Path,
    config: &AdapterConfig,
    model: &ModelConfig,
    embeddings: bool,
    mut load: impl FnMut(Place) -> Result<HostTensor>,
) -> Result<()> {
    create_dir_all(dir)?;
    let mut places = low_rank(model, &config.lora.targets);
    if embeddings {
        places.push(Place::Embed);
        places.extend((!model.tied).then_some(Place::Head));
    }
    let entry =
        |at: &Place| Entry { name: key(*at), shape: at.file_shape(model, config.lora.r), dtype: SaveDType::F32 };
    let entries: Vec<Entry> = places.iter().map(entry).collect();
    // A base without the padding does not tell which rows are none of the tokens.
    let classes = (embeddings && model.n_classes != model.vocab_size).then(|| (CLASSES, model.n_classes.to_string()));
    let more: Vec<(&str, String)> = classes.into_iter().collect();
    write_tensors_with(&dir.join(WEIGHTS), &entries, &more, |i, _| load(places[i]))?;
    write_json(&dir.join(CONFIG), &config.to_json())
}

/// The name of a copy of the embedding or head, with `between` before its last part.
fn spelled(at: Place, between: &str) -> String {
    let whole = key(at);
    format!("{}{between}.weight", whole.strip_suffix(".weight").unwrap_or(&whole))
}

/// The names of the trained copies of the embedding or head that a file has.
fn copies(file: &TensorFile, at: Place) -> impl Iterator<Item = String> {
    TRAINED.iter().map(move |between| spelled(at, between)).filter(|name| file.info(name).is_some())
}

/// The name of a weight in an adapter's file.
fn key(at: Place) -> String {
    format!("{PREFIX}{at}")
}

/// A and B of every product in `targets`, layer by layer.
fn low_rank(model: &ModelConfig, targets: &[Product]) -> Vec<Place> {
    let all = Weights::with_updates(model, targets);
    all.places().into_iter().map(|(at, _)| at).filter(|at| at.kind() == Kind::LowRank).collect()
}
