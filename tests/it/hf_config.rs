//! config.json in both spellings, and everything wrong with one.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use ringtune::hf::{SaveDType, config as hf_config};
use ringtune::model::config::{Architecture, AttentionBias, RopeScaling};
use serde_json::{Value, json};

fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/model").join(name)
}

fn text(name: &str, file: &str) -> String {
    std::fs::read_to_string(model(name).join(file)).unwrap()
}

#[test]
fn published_shapes_are_understood() {
    let llama = hf_config::read(&model("tiny-llama-tied")).unwrap();
    assert_eq!(llama.model.architecture, Architecture::Llama);
    assert_eq!((llama.model.vocab_size, llama.model.n_classes, llama.model.hidden_size), (4096, 4096, 64));
    assert_eq!((llama.model.intermediate_size, llama.model.n_layers, llama.model.max_position), (176, 2, 512));
    assert_eq!((llama.model.heads.n_query, llama.model.heads.n_kv, llama.model.heads.head_dim), (4, 2, 16));
    assert!(llama.model.tied && llama.dtype == Some(SaveDType::F32) && llama.warnings.is_empty());
    assert_eq!((llama.model.bos_token_id, llama.model.pad_token_id), (Some(2), Some(0)));
    assert_eq!(llama.model.eos_token_ids, [3]);

    let qwen2 = hf_config::read(&model("qwen2-untied")).unwrap().model;
    assert_eq!((qwen2.architecture, qwen2.attention_bias), (Architecture::Qwen2, AttentionBias::Qkv));
    assert_eq!((qwen2.sliding_window, qwen2.rope_theta, qwen2.heads.head_dim), (None, 1e6, 12));

    let qwen3 = hf_config::read(&model("qwen3-tied")).unwrap().model;
    assert_eq!(
        (qwen3.architecture, qwen3.attention_bias, qwen3.qk_norm),
        (Architecture::Qwen3, AttentionBias::None, true)
    );
    assert_eq!((qwen3.heads.head_dim, qwen3.q_dim(), qwen3.hidden_size), (24, 96, 56));

    let mistral = hf_config::read(&model("mistral-window")).unwrap().model;
    assert_eq!((mistral.architecture, mistral.sliding_window), (Architecture::Mistral, Some(16)));

    let llama3 = hf_config::read(&model("llama3-rope")).unwrap().model;
    let rope =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position: 64 };
    assert_eq!((llama3.rope_scaling, llama3.rope_theta), (rope, 5e5));
}

#[test]
fn both_spellings_say_the_same() {
    for name in ["qwen2-untied", "llama3-rope"] {
        let old = hf_config::parse(&text(name, "config.json")).unwrap();
        assert_eq!(old, hf_config::parse(&text(name, "config_v5.json")).unwrap(), "{name}");
    }
}

#[test]
fn what_is_written_has_both_spellings_and_reads_back() {
    let models =
        ["tiny-llama-tied", "tiny-llama-untied", "qwen2-untied", "qwen3-tied", "mistral-window", "llama3-rope"];
    for name in models {
        for dtype in [SaveDType::F32, SaveDType::Bf16, SaveDType::F16] {
            let read = hf_config::read(&model(name)).unwrap().model;
            let written = hf_config::to_json(&read, dtype);
            for key in ["torch_dtype", "dtype", "rope_theta", "rope_scaling", "rope_parameters", "architectures"] {
                assert!(written.get(key).is_some(), "{name}: {key}");
            }
            let back = hf_config::parse(&written.to_string()).unwrap();
            assert_eq!((back.model, back.dtype), (read.clone(), Some(dtype)), "{name}");
            // A reader of one spelling alone finds everything it needs.
            for (mine, other) in [
                (["torch_dtype", "rope_theta", "rope_scaling"].as_slice(), ["dtype", "rope_parameters"].as_slice()),
                (["dtype", "rope_parameters"].as_slice(), ["torch_dtype", "rope_theta", "rope_scaling"].as_slice()),
            ] {
                let mut one = written.clone();
                other.iter().for_each(|k| drop(one.as_object_mut().unwrap().remove(*k)));
                assert!(mine.iter().all(|k| one.get(k).is_some()));
                assert_eq!(hf_config::parse(&one.to_string()).unwrap().model, read, "{name} without {other:?}");
            }
        }
    }
}

#[test]
fn padded_vocabularies_windows_and_lists_of_ends_survive() {
    let mut c = hf_config::read(&model("qwen3-tied")).unwrap().model;
    (c.n_classes, c.sliding_window, c.eos_token_ids) = (700, Some(8), vec![5, 3]);
    c.rope_scaling = RopeScaling::Linear { factor: 2.5 };
    c.attention_bias = AttentionBias::Qkvo;
    c.pad_token_id = None;
    let back = hf_config::parse(&hf_config::to_json(&c, SaveDType::Bf16).to_string()).unwrap();
    assert_eq!(back.model, c);
}

/// Applies `edits` to the configuration of `name` and returns the message of the error.
fn message(name: &str, edits: &[(&str, Value)]) -> Result<Vec<String>, String> {
    let mut v: Value = serde_json::from_str(&text(name, "config.json")).unwrap();
    for (key, value) in edits {
        match value {
            Value::String(s) if s == "<remove>" => drop(v.as_object_mut().unwrap().remove(*key)),
            _ => v[*key] = value.clone(),
        }
    }
    hf_config::parse(&v.to_string()).map(|c| c.warnings).map_err(|e| e.to_string())
}

/// A factor that no type reads scales nothing: as transformers says, and does.
#[test]
fn rotary_numbers_without_effect_are_warned_of() {
    let check = |key: &str, value: Value, part: &str| {
        let warnings = message("tiny-llama-untied", &[("rope_parameters", json!(null)), (key, value.clone())]).unwrap();
        match part {
            "" => assert!(warnings.is_empty(), "{value}: {warnings:?}"),
            part => assert!(warnings.len() == 1 && warnings[0].contains(part), "{value}: {warnings:?}"),
        }
    };
    check("rope_scaling", json!({"factor": 4.0}), "rope_scaling.factor 4.0 has no effect with rope_type default");
    check("rope_scaling", json!({"rope_type": "default", "factor": 4.0}), "rope_scaling.factor 4.0 has no effect");
    check("rope_parameters", json!({"rope_theta": 10000.0, "factor": 2.0}), "rope_parameters.factor 2.0 has no effect");
    check(
        "rope_scaling",
        json!({"type": "linear", "factor": 4.0, "low_freq_factor": 1.0}),
        "low_freq_factor 1.0 has no effect",
    );
    check("rope_scaling", json!({"rope_type": "default", "factor": null}), "");
    check("rope_scaling", json!({"type": "linear", "factor": 4.0}), "");
}

#[test]
fn what_is_not_supported_or_wrong_is_named() {
    let gone = || json!("<remove>");
    let llama = "tiny-llama-untied";
    type Case = (&'static str, Vec<(&'static str, Value)>, &'static str);
    let cases: Vec<Case> = vec![
        (llama, vec![("hidden_size", gone())], "missing key hidden_size"),
        (llama, vec![("model_type", gone())], "missing key model_type"),
        (
            llama,
            vec![("vocab_size", json!("many"))],
            "vocab_size: expected a whole number from 1 to 67108864, found \"many\"",
        ),
        (llama, vec![("vocab_size", json!(0))], "vocab_size: expected a whole number"),
        (llama, vec![("hidden_size", json!(-4))], "hidden_size: expected a whole number"),
        (llama, vec![("num_hidden_layers", json!(1u64 << 40))], "num_hidden_layers"),
        (llama, vec![("num_hidden_layers", json!(5000))], "expected at most 4096"),
        (
            llama,
            vec![("num_key_value_heads", json!(3))],
            "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
        ),
        (llama, vec![("head_dim", json!(15))], "head_dim 15 is odd"),
        (llama, vec![("head_dim", gone()), ("hidden_size", json!(66))], "not a multiple of num_attention_heads 4"),
        (llama, vec![("hidden_act", json!("gelu"))], "hidden_act \"gelu\" is not supported; expected silu"),
        ("mistral-window", vec![("mlp_bias", json!(true))], "mlp_bias true is not supported"),
        (llama, vec![("mlp_bias", json!(1))], "mlp_bias: expected true or false, found 1"),
        (llama, vec![("quantization_config", json!({"bits": 4}))], "quantization_config"),
        (llama, vec![("partial_rotary_factor", json!(0.5))], "partial_rotary_factor 0.5 is not supported"),
        (llama, vec![("model_type", json!("gemma2"))], "model_type \"gemma2\" is not supported"),
        (llama, vec![("architectures", json!("LlamaForCausalLM"))], "architectures: expected a list, found a string"),
        (
            llama,
            vec![("rope_scaling", json!({"rope_type": "yarn", "factor": 4.0}))],
            "rope_type \"yarn\" is not supported",
        ),
        (
            llama,
            vec![("rope_scaling", json!({"type": "dynamic", "factor": 4.0}))],
            "rope_type \"dynamic\" is not supported",
        ),
        (llama, vec![("rope_scaling", json!({"rope_type": "linear"}))], "missing key rope_scaling.factor"),
        (
            llama,
            vec![("rope_scaling", json!({"rope_type": "linear", "factor": 0}))],
            "rope_scaling.factor: expected a positive",
        ),
        (llama, vec![("rope_scaling", json!("linear"))], "rope_scaling: expected an object, found \"linear\""),
        (
            "llama3-rope",
            vec![(
                "rope_scaling",
                json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4,
            "high_freq_factor": 4, "original_max_position_embeddings": 64}),
            )],
            "low_freq_factor 4 is not below",
        ),
        ("llama3-rope", vec![("rope_parameters", json!({"rope_type": "default"}))], "contradict each other"),
        (llama, vec![("rope_parameters", json!({"rope_type": "default", "rope_theta": 5.0}))], "contradict each other"),
        (llama, vec![("rope_theta", json!("10000"))], "rope_theta: expected a number, found \"10000\""),
        (llama, vec![("rope_theta", json!(0))], "rope_theta: expected at least 1, found 0"),
        (llama, vec![("rms_norm_eps", json!(-1e-5))], "rms_norm_eps"),
        (llama, vec![("torch_dtype", json!("float64"))], "torch_dtype \"float64\" is not supported"),
        (llama, vec![("dtype", json!("float32"))], "dtype and torch_dtype contradict each other"),
        (llama, vec![("eos_token_id", json!([3, "x"]))], "eos_token_id: expected token ids, found \"x\""),
        (llama, vec![("bos_token_id", json!(1u64 << 33))], "bos_token_id: expected a token id"),
        (llama, vec![("unpadded_vocab_size", json!(5000))], "unpadded_vocab_size 5000 is above vocab_size 4096"),
        ("mistral-window", vec![("num_key_value_heads", gone())], "missing key num_key_value_heads"),
        ("mistral-window", vec![("attention_bias", json!(true))], "attention_bias true is not supported"),
        ("qwen2-untied", vec![("use_sliding_window", json!(true))], "max_window_layers 1 of 2"),
        (
            "qwen3-tied",
            vec![("layer_types", json!(["full_attention", "sliding_attention"]))],
            "1 sliding and 1 full layers",
        ),
        ("qwen3-tied", vec![("layer_types", json!(["full_attention"]))], "layer_types: expected 2 entries, found 1"),
        (
            "qwen3-tied",
            vec![("layer_types", json!(["linear_attention", "full_attention"]))],
            "\"linear_attention\" is not supported",
        ),
        (
            "qwen3-tied",
            vec![("rope_parameters", json!({"full_attention": {"rope_type": "default"}}))],
            "per layer type",
        ),
    ];
    for (name, edits, expected) in cases {
        let found = message(name, &edits).expect_err(expected);
        assert!(found.contains(expected), "{edits:?}: {found}");
    }
}

#[test]
fn what_has_no_effect_is_a_warning_or_silent() {
    let llama = "tiny-llama-untied";
    assert_eq!(message(llama, &[("pretraining_tp", json!(2))]).unwrap().len(), 1);
    assert!(message(llama, &[("attention_dropout", json!(0.1))]).unwrap()[0].contains("attention_dropout 0.1"));
    assert!(message(llama, &[("eos_token_id", json!(4096))]).unwrap()[0].contains("eos_token_id 4096"));
    assert_eq!(message(llama, &[("pad_token_id", json!(-1)), ("some_new_key", json!([1]))]), Ok(vec![]));
    let qwen = [("use_sliding_window", json!(true)), ("max_window_layers", json!(0))];
    assert_eq!(message("qwen2-untied", &qwen), Ok(vec![]));
}

#[test]
fn the_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let e = hf_config::read(dir.path()).unwrap_err().to_string();
    assert!(e.contains("config.json") && e.contains("No such file"), "{e}");
    for (content, expected) in
        [("{", "invalid JSON"), ("[]", "expected a JSON object, found a list"), ("\u{0}", "invalid JSON")]
    {
        std::fs::write(dir.path().join("config.json"), content).unwrap();
        let e = hf_config::read(dir.path()).unwrap_err().to_string();
        assert!(e.contains("config.json") && e.contains(expected), "{e}");
    }
    for (bytes, expected) in [([0xff, 0x80], "byte 0 is not UTF-8"), ([0xff, 0xfe], "this is UTF-16 text")] {
        std::fs::write(dir.path().join("config.json"), bytes).unwrap();
        let e = hf_config::read(dir.path()).unwrap_err().to_string();
        assert!(e.contains("config.json") && e.contains(expected), "{e}");
    }
    std::fs::write(dir.path().join("config.json"), "[".repeat(100_000)).unwrap();
    assert!(hf_config::read(dir.path()).unwrap_err().to_string().contains("invalid JSON"));
}

proptest! {
    /// Damaged text is an error or still a configuration, never a panic.
    #[test]
    fn damaged_text_never_panics(at in 0usize..600, byte in any::<u8>(), cut in 0usize..700, which in 0usize..4) {
        let name = ["qwen2-untied", "qwen3-tied", "mistral-window", "llama3-rope"][which];
        let mut bytes = text(name, "config.json").into_bytes();
        let n = bytes.len();
        bytes[at % n] = byte;
        bytes.truncate(n - cut.saturating_sub(600) % n);
        drop(hf_config::parse(&String::from_utf8_lossy(&bytes)));
    }

    /// A key with a value of any other kind never panics.
    #[test]
    fn any_value_for_any_key_never_panics(key in 0usize..30, value in 0usize..9, which in 0usize..4) {
        let name = ["qwen2-untied", "qwen3-tied", "mistral-window", "llama3-rope"][which];
        let mut v: Value = serde_json::from_str(&text(name, "config.json")).unwrap();
        let keys: Vec<String> = v.as_object().unwrap().keys().cloned().collect();
        let values = [json!(null), json!(0), json!(-1), json!(1e300), json!(u64::MAX), json!(""), json!([]), json!({}), json!(true)];
        v[&keys[key % keys.len()]] = values[value].clone();
        drop(hf_config::parse(&v.to_string()));
    }
}
