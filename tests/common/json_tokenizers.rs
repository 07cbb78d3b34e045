//! Small tokenizers in the forms of today's models, trained on a few demo rows by the `tokenizers` library, as folders with the
//! files that lie beside a published model's weights.

use std::fs;
use std::path::Path;
use std::str::FromStr;

use serde_json::{Value, json};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::BpeTrainerBuilder;
use tokenizers::models::unigram::UnigramTrainer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

/// How words are cut before merging, in Llama-3's and Qwen's files (from OpenAI's cl100k, with three or one digits).
const WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Forms of tokenizers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Byte-level BPE, whole words first, BOS by the post-processor, two end tokens, no padding, no ChatML.
    Llama3,
    /// Byte-level BPE behind NFC, ChatML's tokens in it, no BOS; a token that is not special.
    Qwen,
    /// Unigram with `▁` before the first stretch alone and byte fallback.
    MetaspaceFirst,
}

/// All of them.
pub const STYLES: [Style; 3] = [Style::Llama3, Style::Qwen, Style::MetaspaceFirst];

fn texts() -> Vec<String> {
    let mut out = Vec::new();
    for set in ["chat", "define"] {
        let text = fs::read_to_string(format!("data/demo/{set}.jsonl")).unwrap();
        for line in text.lines().take(300) {
            let row: Value = serde_json::from_str(line).unwrap();
            out.push(row["prompt"].as_str().unwrap().to_string());
            out.push(row["response"].as_str().unwrap().to_string());
        }
    }
    out
}

fn skeleton(style: Style) -> Value {
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let split = json!({"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": false});
    let words = json!({"type": "Sequence", "pretokenizers": [split, byte_level]});
    let bpe = json!({"type": "BPE", "vocab": {}, "merges": []});
    let (normalizer, pre_tokenizer, decoder, model) = match style {
        Style::Llama3 => (Value::Null, words, byte_level, bpe),
        Style::Qwen => (json!({"type": "NFC"}), words, byte_level, bpe),
        Style::MetaspaceFirst => {
            let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true});
            let decoder = json!({"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
            let unigram = json!({"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0]]});
            (Value::Null, metaspace, decoder, unigram)
        }
    };
    json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": normalizer,
           "pre_tokenizer": pre_tokenizer, "post_processor": null, "decoder": decoder, "model": model})
}

fn special(names: &[&str]) -> Vec<AddedToken> {
    names.iter().map(|n| AddedToken::from(n.to_string(), true)).collect()
}

/// The content of `tokenizer.json`.
pub fn tokenizer_json(style: Style) -> Value {
    let mut t = Tokenizer::from_str(&skeleton(style).to_string()).unwrap();
    let mut trainer: TrainerWrapper = match style {
        Style::MetaspaceFirst => UnigramTrainer::builder()
            .show_progress(false)
            .vocab_size(400)
            .special_tokens(special(&["<unk>", "<s>", "</s>", "<pad>"]))
            .unk_token(Some("<unk>".to_string()))
            .build()
            .unwrap()
            .into(),
        _ => BpeTrainerBuilder::new()
            .show_progress(false)
            .vocab_size(500)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build()
            .into(),
    };
    t.train(&mut trainer, texts().iter()).unwrap();
    match style {
        Style::Llama3 => {
            t.add_special_tokens(&special(&[
                "<|begin_of_text|>",
                "<|end_of_text|>",
                "<|reserved_special_token_0|>",
                "<|eot_id|>",
            ]));
        }
        Style::Qwen => {
            t.add_special_tokens(&special(&["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>"]));
            t.add_tokens(&[AddedToken::from("<think>".to_string(), false).normalized(false)]);
        }
        Style::MetaspaceFirst => {}
    }
    let mut v: Value = serde_json::from_str(&t.to_string(false).unwrap()).unwrap();
    match style {
        Style::Llama3 => {
            v["model"]["ignore_merges"] = json!(true);
            let bos = t.token_to_id("<|begin_of_text|>").unwrap();
            let token = json!({"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}});
            let (a, b) =
                (json!({"Sequence": {"id": "A", "type_id": 0}}), json!({"Sequence": {"id": "B", "type_id": 1}}));
            v["post_processor"] = json!({"type": "TemplateProcessing", "single": [token, a], "pair": [token, a, token, b],
                "special_tokens": {"<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [bos], "tokens": ["<|begin_of_text|>"]}}});
        }
        Style::Qwen => {}
        Style::MetaspaceFirst => {
            // Byte fallback, which the trainer does not make.
            let vocab = v["model"]["vocab"].as_array_mut().unwrap();
            (0..=255u8).for_each(|b| vocab.push(json!([format!("<0x{b:02X}>"), -100.0])));
            v["model"]["byte_fallback"] = json!(true);
        }
    }
    v
}

/// Writes the folder of a tokenizer: `tokenizer.json`, `tokenizer_config.json`, and where published models have one,
/// `generation_config.json` with the list of end tokens.
pub fn write(style: Style, dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    let file = tokenizer_json(style);
    let library = Tokenizer::from_str(&file.to_string()).unwrap();
    let id = |name: &str| library.token_to_id(name).unwrap();
    let put = |name: &str, v: &Value| fs::write(dir.join(name), v.to_string()).unwrap();
    put("tokenizer.json", &file);
    match style {
        Style::Llama3 => {
            put(
                "tokenizer_config.json",
                &json!({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>",
                "eos_token": {"content": "<|end_of_text|>", "special": true}, "model_max_length": 131072}),
            );
            put("generation_config.json", &json!({"eos_token_id": [id("<|end_of_text|>"), id("<|eot_id|>")]}));
        }
        Style::Qwen => put(
            "tokenizer_config.json",
            &json!({"tokenizer_class": "Qwen2Tokenizer", "bos_token": null, "unk_token": null,
            "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "add_bos_token": false,
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}),
        ),
        Style::MetaspaceFirst => put(
            "tokenizer_config.json",
            &json!({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
            "pad_token": "<pad>"}),
        ),
    }
}
