//! Model files: what is read, what is written, and every way they can be wrong.

use std::path::{Path, PathBuf};

use proptest::prelude::*;

use ringtune::error::Result;
use ringtune::hf::safetensors::{ModelFiles, TensorFile};
use ringtune::hf::save::{Entry, SaveOptions, parse_size, save_model, write_tensors};
use ringtune::hf::{HostTensor, SaveDType, TensorSource};
use ringtune::model::config::ModelConfig;
use ringtune::model::weights::{Part, Place, Product, Weights};
use serde_json::{Value, json};

/// The embedding's name in files.
const EMBED: &str = "model.embed_tokens.weight";

fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/model").join(name)
}

const MODELS: [&str; 6] =
    ["tiny-llama-tied", "tiny-llama-untied", "qwen2-untied", "qwen3-tied", "mistral-window", "llama3-rope"];

/// A writable copy of a model folder.
fn copy(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(model(name).join(file), dir.path().join(file)).unwrap();
    }
    dir
}

fn open_error(dir: &Path) -> String {
    match ModelFiles::open(dir) {
        Ok(_) => panic!("{} was accepted", dir.display()),
        Err(e) => e.to_string(),
    }
}

/// The header of a file as JSON, and its data.
fn split(path: &Path) -> (Value, Vec<u8>) {
    let bytes = std::fs::read(path).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + n]).unwrap(), bytes[8 + n..].to_vec())
}

fn join(path: &Path, header: &Value, data: &[u8]) {
    let header = header.to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn every_model_round_trips_exactly_in_one_file_and_in_shards() {
    for name in MODELS {
        let source = ModelFiles::open(&model(name)).unwrap();
        for (max_shard_bytes, sharded) in [(u64::MAX, false), (60_000, true)] {
            let dir = tempfile::tempdir().unwrap();
            let dtype = source.dtype();
            save_model(dir.path(), &source, SaveOptions { dtype, max_shard_bytes }).unwrap();
            let back = ModelFiles::open(dir.path()).unwrap();
            assert_eq!(back.config(), source.config(), "{name}");
            assert_eq!(back.n_files() > 1, sharded, "{name}");
            for (at, _) in Weights::of(source.config()).places() {
                let (a, b) = (source.load(at).unwrap(), back.load(at).unwrap());
                assert!(a == b, "{name}: {at}");
            }
            assert_eq!(dir.path().join("model.safetensors.index.json").is_file(), sharded);
        }
    }
}

#[test]
fn saving_again_leaves_no_shard_of_the_model_before() {
    let dir = tempfile::tempdir().unwrap();
    let source = ModelFiles::open(&model("qwen2-untied")).unwrap();
    for max_shard_bytes in [60_000, 30_000, u64::MAX, 60_000] {
        save_model(dir.path(), &source, SaveOptions { dtype: SaveDType::Bf16, max_shard_bytes }).unwrap();
        let back = ModelFiles::open(dir.path()).unwrap();
        assert!(back.load(Place::Embed).unwrap() == source.load(Place::Embed).unwrap());
        let files = std::fs::read_dir(dir.path()).unwrap();
        let weights = files.filter(|f| f.as_ref().unwrap().file_name().to_string_lossy().ends_with(".safetensors"));
        assert_eq!(weights.count(), back.n_files());
    }
}

#[test]
fn shards_stay_below_the_limit_and_the_index_adds_up() {
    let dir = tempfile::tempdir().unwrap();
    let source = ModelFiles::open(&model("mistral-window")).unwrap();
    save_model(dir.path(), &source, SaveOptions { dtype: SaveDType::F32, max_shard_bytes: 110_000 }).unwrap();
    let index: Value =
        serde_json::from_slice(&std::fs::read(dir.path().join("model.safetensors.index.json")).unwrap()).unwrap();
    let elements = Weights::count(source.config());
    assert_eq!(index["metadata"]["total_size"], 4 * elements);
    for (shard, _) in index["weight_map"].as_object().unwrap().values().map(|f| (f.as_str().unwrap(), ())) {
        assert!(shard.starts_with("model-0000") && shard.ends_with(".safetensors"), "{shard}");
        let (header, data) = split(&dir.path().join(shard));
        assert!(data.len() <= 110_000, "{shard}: {}", data.len());
        assert_eq!(header["__metadata__"], json!({"format": "pt"}));
    }
}

#[test]
fn damaged_and_hostile_files_are_refused() {
    let dir = copy("qwen2-untied");
    let path = dir.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let write = |bytes: &[u8]| std::fs::write(&path, bytes).unwrap();

    write(&[]);
    assert!(open_error(dir.path()).contains("0 bytes are too few"));
    for cut in [1, 7, 8, 9, 100, 1000, whole.len() / 2, whole.len() - 1] {
        write(&whole[..cut]);
        let e = open_error(dir.path());
        assert!(e.contains("model.safetensors") && (e.contains("cut short") || e.contains("too few")), "{cut}: {e}");
    }
    let mut longer = whole.clone();
    longer.push(0);
    write(&longer);
    assert!(open_error(dir.path()).contains("1 byte beyond the data"));

    let mut huge = whole.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    write(&huge);
    assert!(open_error(dir.path()).contains("the header claims 18446744073709551615 bytes"));
    huge[..8].copy_from_slice(&(whole.len() as u64).to_le_bytes());
    write(&huge);
    assert!(open_error(dir.path()).contains("cut short: the header needs"));

    let (header, data) = split_bytes(&whole);
    let with = |key: &str, info: Value| {
        let mut h = header.clone();
        h[key] = info;
        join(&path, &h, &data);
        open_error(dir.path())
    };
    let bf16 = |shape: Value, from: u64, to: u64| json!({"dtype": "BF16", "shape": shape, "data_offsets": [from, to]});
    let hostile = [
        bf16(json!([640, 48]), 0, u64::MAX),
        bf16(json!([u64::MAX, u64::MAX]), 0, 61440),
        bf16(json!([1u64 << 62, 4]), 0, 61440),
        bf16(json!([640, 48]), 100, 61540),
        bf16(json!([640, 48]), 61440, 0),
        bf16(json!([640, 47]), 0, 61440),
        bf16(json!([-640, 48]), 0, 61440),
        json!({"dtype": "XX", "shape": [640, 48], "data_offsets": [0, 61440]}),
        json!({"dtype": "BF16"}),
        json!(7),
    ];
    for info in hostile {
        let e = with("lm_head.weight", info.clone());
        assert!(e.contains("model.safetensors"), "{info}: {e}");
    }
    // Eight tensors of nearly 2^61 bytes each: their sum plus the header's length overflows, which must not wrap around.
    let mut h = serde_json::Map::new();
    for i in 0..8u64 {
        let size = (1u64 << 61) - 1;
        let info = json!({"dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size]});
        h.insert(format!("t{i}"), info);
    }
    join(&path, &Value::Object(h), &[]);
    assert!(open_error(dir.path()).contains("cut short"));

    write(b"PK\x03\x04 this is a pickle and no safetensors file at all");
    assert!(open_error(dir.path()).contains("is it one?"));
}

fn split_bytes(bytes: &[u8]) -> (Value, Vec<u8>) {
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + n]).unwrap(), bytes[8 + n..].to_vec())
}

#[test]
fn weights_that_are_not_the_models_are_named() {
    let name = "model.layers.1.mlp.up_proj.weight";
    let edit = |change: &dyn Fn(&mut Value)| {
        let dir = copy("qwen2-untied");
        let path = dir.path().join("model.safetensors");
        let (mut header, data) = split(&path);
        change(&mut header);
        join(&path, &header, &data);
        open_error(dir.path())
    };
    let rename = |h: &mut Value, from: &str, to: &str| {
        let info = h.as_object_mut().unwrap().remove(from).unwrap();
        h[to] = info;
    };
    let e = edit(&|h| rename(h, name, "model.layers.1.mlp.up.weight"));
    assert!(e.contains(&format!("missing weight {name}")), "{e}");
    let e = edit(&|h| {
        rename(h, "model.layers.0.self_attn.q_proj.bias", "a");
        rename(h, "model.layers.0.self_attn.k_proj.bias", "b");
    });
    assert!(e.contains("q_proj.bias (and 1 more)") || e.contains("k_proj.bias (and 1 more)"), "{e}");
    let e = edit(&|h| h[name]["shape"] = json!([48, 112]));
    assert!(e.contains(name) && e.contains("expected shape [112, 48] from config.json, found [48, 112]"), "{e}");
    let e = edit(&|h| h[name]["shape"] = json!([112 * 48]));
    assert!(e.contains("found [5376]"), "{e}");
    let e = edit(&|h| {
        h[name]["dtype"] = json!("I16");
    });
    assert!(e.contains("element type I16 is not supported; expected F32, BF16 or F16"), "{e}");

    let config = |key: &str, value: Value| {
        let dir = copy("qwen2-untied");
        let path = dir.path().join("config.json");
        let mut c: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        c[key] = value;
        std::fs::write(&path, c.to_string()).unwrap();
        open_error(dir.path())
    };
    let e = config("vocab_size", json!(1000));
    assert!(e.contains("vocabulary mismatch") && e.contains("has 640 rows, vocab_size in config.json is 1000"), "{e}");
    let e = config("num_hidden_layers", json!(1));
    assert!(e.contains("unexpected weight model.layers.1."), "{e}");
    let e = config("num_hidden_layers", json!(3));
    assert!(e.contains("missing weight model.layers.2."), "{e}");

    let dir = copy("qwen3-tied");
    let path = dir.path().join("config.json");
    let text = std::fs::read_to_string(&path)
        .unwrap()
        .replace("\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false");
    std::fs::write(&path, text).unwrap();
    assert!(open_error(dir.path()).contains("set tie_word_embeddings to true"));
}

#[test]
fn known_buffers_and_the_head_of_a_tied_model_are_ignored() {
    let source = ModelFiles::open(&model("qwen3-tied")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(model("qwen3-tied").join("config.json"), dir.path().join("config.json")).unwrap();
    let places: Vec<Place> = Weights::of(source.config()).places().into_iter().map(|(at, _)| at).collect();
    let entry =
        |at: &Place| Entry { name: at.to_string(), shape: at.file_shape(source.config(), 0), dtype: SaveDType::Bf16 };
    let mut entries: Vec<Entry> = places.iter().map(entry).collect();
    entries.push(Entry { name: Place::Head.to_string(), shape: vec![720, 56], dtype: SaveDType::Bf16 });
    let inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq";
    entries.push(Entry { name: inv_freq.into(), shape: vec![12], dtype: SaveDType::F32 });
    let load = |i: usize, name: &str| match places.get(i) {
        Some(&at) => source.load(at),
        None if name == inv_freq => Ok(HostTensor::zeros(1, 12)),
        None => source.load(Place::Embed),
    };
    write_tensors(&dir.path().join("model.safetensors"), &entries, load).unwrap();
    assert!(ModelFiles::open(dir.path()).is_ok());
}

#[test]
fn values_that_are_not_finite_are_named_on_reading_and_writing() {
    let place = Place::Layer(0, Part::Matrix(Product::Down));
    let name = &place.to_string();
    for (bits, shown) in [(0x7fc0u16, "NaN"), (0x7f80, "inf"), (0xff80, "-inf")] {
        let dir = copy("qwen2-untied");
        let path = dir.path().join("model.safetensors");
        let (header, mut data) = split(&path);
        let start = header[name]["data_offsets"][0].as_u64().unwrap() as usize;
        let at = start + 2 * (3 * 112 + 5);
        data[at..at + 2].copy_from_slice(&bits.to_le_bytes());
        join(&path, &header, &data);
        let e = ModelFiles::open(dir.path()).unwrap().load(place).unwrap_err().to_string();
        assert!(e.contains(&format!("{name}: value at row 3, column 5 is {shown}; 1 of 5376 are not finite")), "{e}");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let write = |dtype, value: f32| {
        let entry = Entry { name: "x".into(), shape: vec![2], dtype };
        let tensor = HostTensor { rows: 1, cols: 2, data: vec![1.0, value] };
        write_tensors(&path, &[entry], |_, _| Ok(tensor.clone()))
    };
    write(SaveDType::F32, 5.0).unwrap();
    let before = std::fs::read(&path).unwrap();
    assert!(write(SaveDType::F32, f32::NAN).unwrap_err().to_string().contains("column 1 is NaN"));
    assert!(write(SaveDType::F16, 70_000.0).unwrap_err().to_string().contains("value 70000 does not fit float16"));
    assert!(write(SaveDType::F16, 65_519.0).is_ok(), "rounds to 65504");
    assert!(write(SaveDType::Bf16, f32::MAX).unwrap_err().to_string().contains("does not fit bfloat16"));
    std::fs::write(&path, &before).unwrap();
    assert!(write(SaveDType::Bf16, f32::INFINITY).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), before, "a failed write leaves the file before as it was");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "and no temporary file");
}

#[test]
fn halves_widen_exactly_and_round_to_even() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    for (dtype, values, expected) in [
        (
            SaveDType::Bf16,
            [1.0f32, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, 3.3895314e38],
            [1.0f32, 1.0, 1.015625, 3.3895314e38],
        ),
        (SaveDType::F16, [1.0, 1.0004883, 5.9604645e-8, 65504.0], [1.0, 1.0, 5.9604645e-8, 65504.0]),
        (
            SaveDType::F32,
            [0.1, -0.0, f32::MIN_POSITIVE / 4.0, f32::MAX],
            [0.1, -0.0, f32::MIN_POSITIVE / 4.0, f32::MAX],
        ),
    ] {
        let entry = Entry { name: "x".into(), shape: vec![2, 2], dtype };
        let tensor = HostTensor { rows: 2, cols: 2, data: values.to_vec() };
        write_tensors(&path, &[entry], |_, _| Ok(tensor.clone())).unwrap();
        let back = TensorFile::open(&path).unwrap().load("x").unwrap();
        assert_eq!(back.data.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), expected.map(f32::to_bits), "{dtype:?}");
        assert_eq!((back.rows, back.cols), (2, 2));
    }
}

#[test]
fn folders_without_a_model_say_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    assert!(open_error(&dir.path().join("nowhere")).contains("nothing there"));
    assert!(open_error(&model("qwen3-tied").join("config.json")).contains("expected a model folder, found a file"));
    assert!(open_error(dir.path()).contains("config.json"));
    std::fs::write(dir.path().join("adapter_config.json"), "{}").unwrap();
    assert!(open_error(dir.path()).contains("this is an adapter"));
    std::fs::copy(model("qwen3-tied").join("config.json"), dir.path().join("config.json")).unwrap();
    assert!(open_error(dir.path()).contains("neither model.safetensors nor model.safetensors.index.json"));
    std::fs::write(dir.path().join("pytorch_model.bin"), "x").unwrap();
    assert!(open_error(dir.path()).contains("pytorch_model.bin is not read"));
}

#[test]
fn an_index_that_lies_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let source = ModelFiles::open(&model("mistral-window")).unwrap();
    save_model(dir.path(), &source, SaveOptions { dtype: SaveDType::Bf16, max_shard_bytes: 110_000 }).unwrap();
    let path = dir.path().join("model.safetensors.index.json");
    let good: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let with = |change: &dyn Fn(&mut Value)| {
        let mut index = good.clone();
        change(&mut index);
        std::fs::write(&path, index.to_string()).unwrap();
        open_error(dir.path())
    };
    assert!(with(&|i| drop(i.as_object_mut().unwrap().remove("weight_map"))).contains("missing key weight_map"));
    assert!(with(&|i| i["weight_map"] = json!({})).contains("weight_map is empty"));
    assert!(with(&|i| i["weight_map"][EMBED] = json!("../../etc/passwd")).contains("is not a plain file name"));
    assert!(with(&|i| i["weight_map"][EMBED] = json!(3)).contains("expected a file name"));
    assert!(with(&|i| i["weight_map"][EMBED] = json!("model-00009-of-00009.safetensors")).contains("No such file"));
    assert!(with(&|i| i["weight_map"]["ghost"] = i["weight_map"][EMBED].clone()).contains("places ghost"));
    let last = good["weight_map"]["lm_head.weight"].clone();
    assert!(with(&|i| i["weight_map"][EMBED] = last.clone()).contains("it is in model-00001"));
    std::fs::write(&path, "{").unwrap();
    assert!(open_error(dir.path()).contains("invalid JSON"));
    std::fs::write(&path, good.to_string()).unwrap();
    std::fs::remove_file(dir.path().join(last.as_str().unwrap())).unwrap();
    assert!(open_error(dir.path()).contains("No such file"));
}

/// A source that fails after some tensors.
struct Failing<'a>(&'a ModelFiles, Place);

impl TensorSource for Failing<'_> {
    fn config(&self) -> &ModelConfig {
        self.0.config()
    }

    fn load(&self, at: Place) -> Result<HostTensor> {
        if at == self.1 {
            return Err(ringtune::error::Error::new("no more"));
        }
        self.0.load(at)
    }
}

#[test]
fn a_failed_save_leaves_no_half_file() {
    let source = ModelFiles::open(&model("qwen2-untied")).unwrap();
    let dir = copy("qwen2-untied");
    let before = std::fs::read(dir.path().join("model.safetensors")).unwrap();
    let options = SaveOptions { dtype: SaveDType::F32, max_shard_bytes: u64::MAX };
    let e = save_model(dir.path(), &Failing(&source, Place::FinalNorm), options).unwrap_err().to_string();
    assert!(e.contains("model.safetensors") && e.contains("no more"), "{e}");
    assert_eq!(std::fs::read(dir.path().join("model.safetensors")).unwrap(), before);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    assert!(ModelFiles::open(dir.path()).is_ok());
}

#[test]
fn sizes_are_read_as_people_write_them() {
    for (text, bytes) in
        [("5GB", 5_000_000_000u64), ("500MB", 500_000_000), ("1GiB", 1 << 30), ("1.5kb", 1500), ("77", 77)]
    {
        assert_eq!(parse_size(text).unwrap(), bytes, "{text}");
    }
    for bad in ["", "0", "GB", "-5GB", "5XB", "1e99GB", "nan"] {
        assert_eq!(parse_size(bad).unwrap_err().exit_code(), 2, "{bad:?}");
    }
}

/// A small file of three tensors.
fn small_file() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let entries =
        [("a", vec![2, 3], SaveDType::F32), ("b", vec![4], SaveDType::Bf16), ("c", vec![1, 2], SaveDType::F16)]
            .map(|(name, shape, dtype)| Entry { name: name.into(), shape, dtype });
    write_tensors(&path, &entries, |i, _| {
        let n = entries[i].shape.iter().product();
        Ok(HostTensor { rows: 1, cols: n, data: vec![0.5; n] })
    })
    .unwrap();
    std::fs::read(&path).unwrap()
}

proptest! {
    /// Damaged bytes give an error or tensors that decode within the file, never a panic.
    #[test]
    fn damaged_files_never_panic(changes in prop::collection::vec((0usize..400, any::<u8>()), 1..4), cut in 0usize..60) {
        let mut bytes = small_file();
        let n = bytes.len();
        for (at, byte) in changes {
            bytes[at % n] = byte;
        }
        bytes.truncate(n - cut % 40);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &bytes).unwrap();
        if let Ok(file) = TensorFile::open(file.path()) {
            let names: Vec<String> = file.names().map(String::from).collect();
            names.iter().for_each(|name| drop(file.load(name)));
        }
    }
}
