//! Adapters written by PEFT and by us, merging, and everything wrong with an adapter.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use ringtune::hf::merge::Merged;
use ringtune::hf::peft::{self, Adapter, AdapterConfig};
use ringtune::hf::resize::{NewToken, Resize, Resized};
use ringtune::hf::safetensors::{ModelFiles, TensorFile};
use ringtune::hf::save::{Entry, SaveOptions, save_model, write_tensors};
use ringtune::hf::{HostTensor, SaveDType, TensorSource};
use ringtune::model::LoraSpec;
use ringtune::model::weights::{Kind, Part, Place, Product};
use serde_json::{Value, json};

const CASES: [&str; 6] =
    ["tiny-llama-tied", "tiny-llama-untied", "qwen2-untied", "qwen3-tied", "mistral-window", "llama3-rope"];

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

fn model(name: &str) -> ModelFiles {
    ModelFiles::open(&data().join("model").join(name)).unwrap()
}

fn golden_adapter(name: &str) -> PathBuf {
    data().join("golden").join(name).join("adapter_all")
}

/// A writable copy of an adapter.
fn copy(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in [peft::CONFIG, peft::WEIGHTS] {
        std::fs::copy(golden_adapter(name).join(file), dir.path().join(file)).unwrap();
    }
    dir
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn refuse(dir: &Path) -> String {
    match Adapter::open(dir) {
        Ok(_) => panic!("{} was accepted", dir.display()),
        Err(e) => e.to_string(),
    }
}

/// The tensor of an adapter by its place in the model.
fn tensor(adapter: &Adapter, at: Place) -> ringtune::error::Result<HostTensor> {
    TensorFile::open(&adapter.dir().join(peft::WEIGHTS))?.load(&format!("base_model.model.{at}"))
}

#[test]
fn adapters_of_peft_are_read_and_ours_are_alike() {
    for name in CASES {
        let base = model(name);
        let adapter = Adapter::open(&golden_adapter(name)).unwrap();
        assert_eq!(adapter.config.lora.targets, Product::ALL);
        assert_eq!(adapter.config.lora.scale(), 2.0, "{name}");
        assert_eq!(&adapter.fit(base.config()).unwrap(), base.config());

        let dir = tempfile::tempdir().unwrap();
        peft::save_adapter(dir.path(), &adapter.config, base.config(), false, |at| tensor(&adapter, at)).unwrap();
        let ours = Adapter::open(dir.path()).unwrap();
        assert_eq!(ours.config, adapter.config);
        let (a, b) = (golden_adapter(name).join(peft::WEIGHTS), dir.path().join(peft::WEIGHTS));
        let (a, b) = (TensorFile::open(&a).unwrap(), TensorFile::open(&b).unwrap());
        assert_eq!(a.names().collect::<Vec<_>>(), b.names().collect::<Vec<_>>(), "{name}");
        for key in a.names() {
            assert_eq!(a.info(key), b.info(key), "{name}: {key}");
            assert!(a.load(key).unwrap() == b.load(key).unwrap(), "{name}: {key}");
        }
        assert_eq!(b.metadata().iter().collect::<Vec<_>>(), [(&"format".to_string(), &"pt".to_string())]);
        // Every setting we write is one that PEFT writes, with a value it understands the same way.
        let (theirs, ours) =
            (json_of(&golden_adapter(name).join(peft::CONFIG)), json_of(&dir.path().join(peft::CONFIG)));
        for (key, value) in ours.as_object().unwrap() {
            if key == "target_modules" {
                let sorted = |v: &Value| {
                    let mut names: Vec<String> = v.as_array().unwrap().iter().map(Value::to_string).collect();
                    names.sort();
                    names
                };
                assert_eq!(sorted(value), sorted(&theirs[key]));
            } else {
                assert_eq!(value, &theirs[key], "{name}: {key}");
            }
        }
    }
}

#[test]
fn the_scale_is_that_of_the_settings() {
    let config = |r, alpha, rslora| LoraSpec { r, alpha, dropout: 0.0, rslora, targets: vec![] };
    assert_eq!(config(16, 32.0, false).scale(), 2.0);
    assert_eq!(config(16, 32.0, true).scale(), 8.0);
    let dir = copy("qwen3-tied");
    let path = dir.path().join(peft::CONFIG);
    let mut c = json_of(&path);
    (c["use_rslora"], c["lora_alpha"]) = (json!(true), json!(7.5));
    std::fs::write(&path, c.to_string()).unwrap();
    let adapter = Adapter::open(dir.path()).unwrap();
    assert_eq!((adapter.config.lora.rslora, adapter.config.lora.scale()), (true, 3.75));
    let out = tempfile::tempdir().unwrap();
    let shape = model("qwen3-tied");
    peft::save_adapter(out.path(), &adapter.config, shape.config(), false, |at| tensor(&adapter, at)).unwrap();
    assert_eq!(Adapter::open(out.path()).unwrap().config, adapter.config);
    assert_eq!(json_of(&out.path().join(peft::CONFIG))["lora_alpha"], json!(7.5));
}

/// An adapter of q and v on a vocabulary grown by two tokens, and its base before it grew.
fn grown(name: &str) -> (tempfile::TempDir, ModelFiles) {
    let base = model(name);
    let n = base.config().vocab_size;
    let tokens = vec![NewToken { id: n, like: 2 }, NewToken { id: n + 1, like: 3 }];
    let resized = Resized::new(&base, Resize { tokens, pad_to: None, seed: 1 }).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let targets = vec![Product::Q, Product::V];
    let source = Adapter::open(&golden_adapter(name)).unwrap();
    let lora = LoraSpec { r: source.config.lora.r, alpha: 8.0, dropout: 0.05, rslora: false, targets };
    let config = AdapterConfig { lora, base: name.into(), revision: None };
    let load = |at: Place| {
        if at.kind() == Kind::LowRank { tensor(&source, at) } else { resized.load(at) }
    };
    peft::save_adapter(dir.path(), &config, resized.config(), true, load).unwrap();
    (dir, base)
}

#[test]
fn a_grown_vocabulary_travels_with_the_adapter() {
    for name in ["tiny-llama-tied", "tiny-llama-untied"] {
        let (dir, base) = grown(name);
        let adapter = Adapter::open(dir.path()).unwrap();
        assert_eq!(adapter.config.lora.targets, [Product::Q, Product::V]);
        let merged = Merged::new(&base, &adapter).unwrap();
        assert_eq!((merged.config().vocab_size, merged.config().n_classes), (4098, 4098));
        assert_eq!(merged.load(Place::Embed).unwrap().rows, 4098);
        let file = TensorFile::open(&dir.path().join(peft::WEIGHTS)).unwrap();
        let head = format!("base_model.model.{}", Place::Head);
        assert_eq!(file.info(&head).is_some(), !base.config().tied, "{name}");
        assert_eq!(
            file.info(&format!("base_model.model.{}", Place::Embed)).unwrap(),
            ([4098usize, 64].as_slice(), "F32".to_string())
        );
        let out = tempfile::tempdir().unwrap();
        save_model(out.path(), &merged, SaveOptions { dtype: SaveDType::F32, max_shard_bytes: u64::MAX }).unwrap();
        let back = ModelFiles::open(out.path()).unwrap();
        let untouched = Place::Layer(0, Part::Matrix(Product::Up));
        assert!(back.load(untouched).unwrap() == base.load(untouched).unwrap());
        assert!(
            back.load(Place::Layer(0, Part::Matrix(Product::Q))).unwrap()
                != base.load(Place::Layer(0, Part::Matrix(Product::Q))).unwrap()
        );
    }
}

#[test]
fn an_adapter_of_another_model_is_refused() {
    let adapter = Adapter::open(&golden_adapter("tiny-llama-tied")).unwrap();
    let mut c = model("tiny-llama-tied").config().clone();
    c.n_layers = 3;
    let e = adapter.fit(&c).unwrap_err().to_string();
    assert!(e.contains("the adapter has 2 layers, the base model 3"), "{e}");
    c = model("tiny-llama-tied").config().clone();
    c.intermediate_size = 170;
    let e = adapter.fit(&c).unwrap_err().to_string();
    assert!(e.contains("gate_proj.lora_B.weight: expected shape [170, 8] for this base model, found [176, 8]"), "{e}");
    let (dir, base) = grown("tiny-llama-untied");
    let mut c = base.config().clone();
    c.vocab_size = 5000;
    let e = Adapter::open(dir.path()).unwrap().fit(&c).unwrap_err().to_string();
    assert!(e.contains("vocabulary mismatch") && e.contains("has 4098 rows, the base model 5000"), "{e}");
}

#[test]
fn kinds_of_adapters_that_are_not_supported_are_named() {
    let cases: Vec<(&str, Value, &str)> = vec![
        ("peft_type", json!("IA3"), "peft_type IA3 is not supported; expected LORA"),
        ("peft_type", json!(null), "peft_type missing is not supported"),
        ("task_type", json!("SEQ_CLS"), "task_type \"SEQ_CLS\" is not supported"),
        ("use_dora", json!(true), "use_dora is not supported"),
        ("bias", json!("all"), "bias \"all\" is not supported; expected \"none\""),
        ("lora_bias", json!(true), "lora_bias is not supported"),
        ("fan_in_fan_out", json!(true), "fan_in_fan_out is not supported"),
        ("rank_pattern", json!({"q_proj": 4}), "rank_pattern is not supported"),
        ("alpha_pattern", json!({"q_proj": 4}), "alpha_pattern is not supported"),
        ("layers_to_transform", json!([0]), "layers_to_transform [0] is not supported; expected null"),
        ("layer_replication", json!([[0, 1]]), "layer_replication is not supported"),
        ("init_lora_weights", json!("pissa"), "init_lora_weights \"pissa\" is not supported"),
        ("trainable_token_indices", json!([1, 2]), "trainable_token_indices is not supported"),
        ("modules_to_save", json!(["embed_tokens", "score"]), "modules_to_save \"score\" is not supported"),
        ("r", json!(null), "missing key r"),
        ("r", json!(0), "r: expected a positive rank, found 0"),
        ("r", json!("8"), "r: expected a positive rank, found \"8\""),
        ("r", json!(4), "expected rank 4 from adapter_config.json, found shape [8, "),
        ("lora_alpha", json!(null), "missing key lora_alpha"),
        ("lora_alpha", json!("x"), "lora_alpha: expected a number"),
        ("lora_dropout", json!(1.0), "lora_dropout: expected 0 to below 1"),
        ("use_rslora", json!("yes"), "use_rslora: expected true or false"),
        ("target_modules", json!(["q_proj", "embed_tokens"]), "target_modules names embed_tokens"),
        ("target_modules", json!([1]), "target_modules: expected names, found 1"),
        (
            "target_modules",
            json!(["q_proj", "v_proj"]),
            "does not name model.layers.0.self_attn.k_proj, but adapter_model",
        ),
        ("target_modules", json!([]), "does not name model.layers.0.self_attn.q_proj"),
        ("target_modules", json!("layers.0.q_proj"), "does not name model.layers.0.self_attn.q_proj"),
        ("target_modules", json!(r".*\.layers\.0\..*_proj"), "does not name model.layers.1.self_attn.q_proj"),
        ("base_model_name_or_path", json!(3), "base_model_name_or_path: expected a path, found 3"),
    ];
    for (key, value, expected) in cases {
        let dir = copy("tiny-llama-tied");
        let path = dir.path().join(peft::CONFIG);
        let mut c = json_of(&path);
        c[key] = value;
        std::fs::write(&path, c.to_string()).unwrap();
        let e = refuse(dir.path());
        assert!(e.contains(expected) && e.contains("adapter_"), "{key}: {e}");
    }
    let dir = copy("tiny-llama-tied");
    let path = dir.path().join(peft::CONFIG);
    let mut c = json_of(&path);
    (c["target_modules"], c["init_lora_weights"], c["modules_to_save"]) =
        (json!("all-linear"), json!("gaussian"), json!(["lm_head"]));
    std::fs::write(&path, c.to_string()).unwrap();
    assert_eq!(Adapter::open(dir.path()).unwrap().config.lora.targets.len(), 7);
    let paths = ["self_attn.q_proj", "k_proj", "v_proj", "self_attn.o_proj", "gate_proj", "mlp.up_proj", "down_proj"];
    for named in [
        json!(paths),
        json!(r".*\.(?:self_attn|mlp)\.[a-z]+_proj"),
        json!("model.layers.[01].*"),
        json!("All-Linear"),
        json!(null),
    ] {
        c["target_modules"] = named;
        std::fs::write(&path, c.to_string()).unwrap();
        assert_eq!(Adapter::open(dir.path()).unwrap().config.lora.targets.len(), 7, "{}", c["target_modules"]);
    }
}

#[test]
fn tensors_that_do_not_belong_in_an_adapter_are_named() {
    let source = Adapter::open(&golden_adapter("qwen3-tied")).unwrap();
    let keys: Vec<String> =
        TensorFile::open(&source.dir().join(peft::WEIGHTS)).unwrap().names().map(String::from).collect();
    let with = |change: &dyn Fn(&mut Vec<Entry>)| {
        let dir = copy("qwen3-tied");
        let file = TensorFile::open(&source.dir().join(peft::WEIGHTS)).unwrap();
        let mut entries: Vec<Entry> = keys
            .iter()
            .map(|k| Entry { name: k.clone(), shape: file.info(k).unwrap().0.to_vec(), dtype: SaveDType::F32 })
            .collect();
        change(&mut entries);
        let zeros = |shape: &[usize]| HostTensor::zeros(1, shape.iter().product());
        let load = |i: usize, _: &str| Ok(zeros(&entries[i].shape));
        write_tensors(&dir.path().join(peft::WEIGHTS), &entries, load).unwrap();
        refuse(dir.path())
    };
    let key = |layer: usize, rest: &str| format!("base_model.model.model.layers.{layer}.{rest}");
    let rename = |entries: &mut Vec<Entry>, from: String, to: String| {
        entries.iter_mut().find(|e| e.name == from).unwrap().name = to;
    };
    let b = "self_attn.q_proj.lora_B.weight";
    assert!(with(&|e| e.retain(|e| e.name != key(1, b))).contains("layer 1: q_proj.lora_B is missing"));
    assert!(
        with(&|e| e.retain(|e| e.name != key(0, "mlp.up_proj.lora_A.weight")))
            .contains("layer 0: up_proj.lora_A is missing")
    );
    assert!(
        with(&|e| e.retain(|e| !e.name.contains("layers.0.self_attn.q_proj")))
            .contains("layer 0 has no update of q_proj")
    );
    assert!(with(&|e| e.retain(|e| !e.name.contains("layers.0"))).contains("layer 0 has no update"));
    assert!(with(&|e| e.truncate(0)).contains("no low-rank update"));
    let dora = key(0, "self_attn.q_proj.lora_magnitude_vector");
    let e = with(&|e| e.push(Entry { name: dora.clone(), shape: vec![96], dtype: SaveDType::F32 }));
    assert!(e.contains("DoRA is not supported"), "{e}");
    assert!(with(&|e| rename(e, key(1, b), key(1, "self_attn.qkv.lora_B.weight"))).contains("unexpected tensor"));
    assert!(
        with(&|e| rename(e, key(1, b), "model.x".into()))
            .contains("expected a name that begins with base_model.model.")
    );
    assert!(with(&|e| rename(e, key(1, b), key(4_000_000_000, b))).contains("layers up to 4000000000"));
    let e = with(&|e| e.iter_mut().find(|e| e.name == key(1, b)).unwrap().shape = vec![192, 2]);
    assert!(e.contains("expected rank 4 from adapter_config.json, found shape [192, 2]"), "{e}");

    // A NaN is found when the tensor is loaded.
    let dir = copy("qwen3-tied");
    let path = dir.path().join(peft::WEIGHTS);
    let mut bytes = std::fs::read(&path).unwrap();
    let n = bytes.len();
    bytes[n - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let adapter = Adapter::open(dir.path()).unwrap();
    let found: Vec<String> = (0..2)
        .flat_map(|i| Product::ALL.map(|p| adapter.lora(i, p)))
        .filter_map(|r| r.err().map(|e| e.to_string()))
        .collect();
    assert!(found.len() == 1 && found[0].contains("NaN; 1 of"), "{found:?}");
}

#[test]
fn the_base_is_found_from_the_adapter() {
    let root = tempfile::tempdir().unwrap();
    let base = root.path().join("models/base");
    save_model(&base, &model("qwen3-tied"), SaveOptions::default()).unwrap();
    let dir = root.path().join("out/run/adapter");
    let source = Adapter::open(&golden_adapter("qwen3-tied")).unwrap();
    let save = |base: &str| {
        let config = AdapterConfig { base: base.into(), ..source.config.clone() };
        peft::save_adapter(&dir, &config, model("qwen3-tied").config(), false, |at| tensor(&source, at)).unwrap();
        Adapter::open(&dir).unwrap()
    };
    let canonical = |p: PathBuf| p.canonicalize().unwrap();
    for name in [base.to_str().unwrap(), "../../../models/base", "models/base"] {
        assert_eq!(canonical(save(name).find_base(None).unwrap()), canonical(base.clone()), "{name}");
    }
    assert!(peft::is_adapter(&dir) && !peft::is_adapter(&base));
    let lost = save("meta-llama/Llama-2-7b-hf");
    let e = lost.find_base(None).unwrap_err().to_string();
    assert!(e.contains("adapter_config.json") && e.contains("\"meta-llama/Llama-2-7b-hf\" is no model folder"), "{e}");
    assert_eq!(lost.find_base(Some(&base)).unwrap(), base);
    assert!(
        lost.find_base(Some(&root.path().join("x"))).unwrap_err().to_string().contains("no such base model folder")
    );
    assert!(save("").find_base(None).unwrap_err().to_string().contains("is empty"));
}

#[test]
fn folders_without_an_adapter_say_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    assert!(refuse(&dir.path().join("nowhere")).contains("no such adapter folder"));
    assert!(refuse(dir.path()).contains("adapter_config.json: No such file"));
    std::fs::copy(golden_adapter("qwen3-tied").join(peft::CONFIG), dir.path().join(peft::CONFIG)).unwrap();
    assert!(refuse(dir.path()).contains("adapter_model.safetensors: No such file"));
    std::fs::write(dir.path().join("adapter_model.bin"), "x").unwrap();
    assert!(refuse(dir.path()).contains("adapter_model.bin is not read"));
    let dir = copy("qwen3-tied");
    let path = dir.path().join(peft::WEIGHTS);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 10]).unwrap();
    assert!(refuse(dir.path()).contains("cut short"));
    for text in ["", "{", "[]", "3"] {
        std::fs::write(dir.path().join(peft::CONFIG), text).unwrap();
        assert!(refuse(dir.path()).contains("adapter_config.json"), "{text}");
    }
}

proptest! {
    /// Damaged settings and tensors give an error or an adapter that loads within its file, never a panic.
    #[test]
    fn damaged_adapters_never_panic(in_config in any::<bool>(), at in 0usize..4000, byte in any::<u8>()) {
        let dir = copy("mistral-window");
        let path = dir.path().join(if in_config { peft::CONFIG } else { peft::WEIGHTS });
        let mut bytes = std::fs::read(&path).unwrap();
        let n = bytes.len();
        bytes[at % n] = byte;
        std::fs::write(&path, bytes).unwrap();
        if let Ok(adapter) = Adapter::open(dir.path()) {
            drop(adapter.fit(model("mistral-window").config()));
            (0..3).for_each(|i| Product::ALL.iter().for_each(|&p| drop(adapter.lora(i, p))));
        }
    }
}

/// Writes an adapter of q in each layer, and the matrices of the vocabulary under the names given.
fn with_vocabulary(dir: &Path, base: &ModelFiles, modules: &Value, matrices: &[(&str, HostTensor)]) {
    let c = base.config();
    let mut all: Vec<(String, HostTensor)> = Vec::new();
    for i in 0..c.n_layers {
        for part in [Part::LoraA(Product::Q), Part::LoraB(Product::Q)] {
            let at = Place::Layer(i, part);
            let (rows, cols) = at.shape(c, 4);
            all.push((at.to_string(), HostTensor { rows, cols, data: vec![0.0; rows * cols] }));
        }
    }
    all.extend(matrices.iter().map(|(name, t)| (name.to_string(), t.clone())));
    all.sort_by(|a, b| a.0.cmp(&b.0));
    let entry = |(name, t): &(String, HostTensor)| Entry {
        name: format!("base_model.model.{name}"),
        shape: vec![t.rows, t.cols],
        dtype: SaveDType::F32,
    };
    let entries: Vec<Entry> = all.iter().map(entry).collect();
    write_tensors(&dir.join(peft::WEIGHTS), &entries, |i, _| Ok(&all[i].1)).unwrap();
    let mut config = json_of(&golden_adapter("tiny-llama-tied").join(peft::CONFIG));
    (config["r"], config["target_modules"]) = (json!(4), json!(["q_proj"]));
    config.as_object_mut().unwrap().extend(modules.as_object().unwrap().clone());
    std::fs::write(dir.join(peft::CONFIG), config.to_string()).unwrap();
}

/// What PEFT runs: a saved module is a copy of its own, and on a tied base the other side keeps the base's matrix.
#[test]
fn saved_embeddings_and_heads_are_what_peft_runs() {
    let (tied, untied) = (model("tiny-llama-tied"), model("tiny-llama-untied"));
    let embed = tied.load(Place::Embed).unwrap();
    let changed = |by: f32| {
        let mut t = embed.clone();
        t.data.iter_mut().for_each(|x| *x += by);
        t
    };
    let dir = tempfile::tempdir().unwrap();
    // Which matrices the merged model has: its embedding, its head, and whether they are one.
    let merged = |base: &ModelFiles, modules: Value, matrices: &[(&str, HostTensor)]| {
        with_vocabulary(dir.path(), base, &modules, matrices);
        let adapter = Adapter::open(dir.path()).map_err(|e| e.to_string())?;
        let merged = Merged::new(base, &adapter).map_err(|e| e.to_string())?;
        let is_tied = merged.config().tied;
        let head = if is_tied { Place::Embed } else { Place::Head };
        let load = |at| merged.load(at).map_err(|e| e.to_string());
        Ok::<_, String>((load(Place::Embed)?, load(head)?, is_tied))
    };
    let (e, h) = ("model.embed_tokens.weight", "lm_head.weight");
    let (new, other) = (changed(0.5), changed(0.25));
    for name in ["embed_tokens", "model.embed_tokens"] {
        let found = merged(&tied, json!({"modules_to_save": [name]}), &[(e, new.clone())]).unwrap();
        assert!(found == (new.clone(), embed.clone(), false), "the head stays the base's");
    }
    let found = merged(&tied, json!({"modules_to_save": ["lm_head"]}), &[(h, new.clone())]).unwrap();
    assert!(found == (embed.clone(), new.clone(), false));
    let both = json!({"modules_to_save": ["embed_tokens", "lm_head"]});
    let found = merged(&tied, both.clone(), &[(e, new.clone()), (h, new.clone())]).unwrap();
    assert!(found == (new.clone(), new.clone(), true), "two that are alike stay tied");
    let found = merged(&tied, both.clone(), &[(e, new.clone()), (h, other.clone())]).unwrap();
    assert!(found == (new.clone(), other.clone(), false));
    // Tied by PEFT, or no module of its own: one matrix on both sides.
    for modules in [json!({"modules_to_save": ["model.embed_tokens"], "ensure_weight_tying": true}), json!({})] {
        let found = merged(&tied, modules, &[(e, new.clone())]).unwrap();
        assert!(found == (new.clone(), new.clone(), true));
    }
    let error = merged(&tied, json!({}), &[(e, new.clone()), (h, other.clone())]).unwrap_err();
    assert!(error.contains("lm_head.weight differs from model.embed_tokens.weight"), "{error}");

    // The copies that PEFT writes: what was trained counts, the base's own does not.
    let copies = |trained: &HostTensor, plain: &HostTensor| {
        let named = |name: &'static str, t: &HostTensor| (name, t.clone());
        vec![
            named("model.embed_tokens.modules_to_save.weight", trained),
            named("model.embed_tokens.original_module.weight", &embed),
            named("model.embed_tokens.weight", plain),
            named("lm_head.modules_to_save.weight", trained),
            named("lm_head.original_module.weight", &embed),
            named("lm_head.weight", plain),
        ]
    };
    let found = merged(&untied, both.clone(), &copies(&new, &new)).unwrap();
    assert!(found == (new.clone(), new.clone(), false));
    let without: Vec<_> = copies(&new, &new).into_iter().filter(|(name, _)| ![e, h].contains(name)).collect();
    assert!(merged(&untied, both.clone(), &without).unwrap() == found);
    let error = merged(&untied, both, &copies(&new, &other)).unwrap_err();
    assert!(error.contains("embed_tokens.modules_to_save.weight") && error.contains("differ"), "{error}");
    let error = merged(&untied, json!({}), &[("model.norm.weight", changed(0.0))]).unwrap_err();
    assert!(error.contains("model.norm.weight: unexpected tensor"), "{error}");
}
