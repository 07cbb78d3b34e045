//! Inputs that each parser takes, to start from: small, made from `tests/data` and by ringtune's own writers.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::basic::Compression;
use parquet::column::writer::ColumnWriter;
use parquet::data_type::ByteArray;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use ringtune::checkpoint::state::write_state_tensors;
use ringtune::data::encode::Encoded;
use ringtune::data::template::{Template, TemplateOptions};
use ringtune::data::token_file::{DocInfo, Meta, Writer};
use ringtune::hf::HostTensor;
use ringtune::hf::tokenizer_json::tokenizer_json;
use ringtune::settings::TrainSettings;
use ringtune::train::state::{RunFacts, RunState};

use crate::parsers::scratch;

/// The repository: this file is compiled into packages at its root and below it.
fn repository() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let found = here.ancestors().find(|d| d.join("tests/data").is_dir());
    found.expect("tests/data lies above").to_path_buf()
}

/// A file of the repository.
pub fn file(path: &str) -> Vec<u8> {
    fs::read(repository().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The inputs of `tests/data/found` whose file name ends so, in the order of their folders; each once.
fn found(end: &str) -> Vec<Vec<u8>> {
    let entries = |dir: &Path| -> Vec<PathBuf> {
        let mut paths: Vec<_> = fs::read_dir(dir).expect("a folder").map(|e| e.expect("an entry").path()).collect();
        paths.sort();
        paths
    };
    let folders = entries(&repository().join("tests/data/found")).into_iter().filter(|p| p.is_dir());
    let files = folders.flat_map(|dir| entries(&dir)).filter(|p| p.to_string_lossy().ends_with(end));
    files.map(|p| fs::read(&p).unwrap_or_else(|e| panic!("{}: {e}", p.display()))).collect()
}

/// Inputs of `row`.
pub fn row_seeds() -> Vec<Vec<u8>> {
    let chat = String::from_utf8(file("data/demo/chat.jsonl")).expect("UTF-8");
    let mut all = found(".jsonl");
    all.extend([found(".jsonl.gz"), found("array.json")].concat());
    all.extend([
        chat.lines().take(3).collect::<Vec<_>>().join("\n").into_bytes(),
        file("tests/data/handmade/bad_rows.jsonl"),
        file("tests/data/handmade/crlf_bom.jsonl"),
        file("tests/data/handmade/latin1.jsonl"),
        br#"{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "\ud83d\ude42"}, {"role": "assistant", "content": "b", "train": false}], "x": [{}]}"#.to_vec(),
    ]);
    all
}

/// Inputs of `token_file`.
pub fn token_file_seeds() -> Vec<Vec<u8>> {
    let doc = |n: u32| {
        let encoded = Encoded { tokens: (0..n).collect(), supervised: (0..n).map(|i| i % 2 == 0).collect() };
        (DocInfo { line: n, n_targets: n / 2, prompt_hash: 7, source: 0 }, encoded)
    };
    [300, 70_000]
        .into_iter()
        .map(|vocab_size| {
            let path = scratch().join("seed.tok");
            let mut to = Writer::new(&path, vocab_size).expect("a token file can be written");
            for (info, encoded) in [3, 17, 40].map(doc) {
                to.push(&info, &encoded).expect("the disk is not full");
            }
            let meta = Meta { sources: vec!["a.jsonl".into()], ..Meta::default() };
            to.finish(&meta, [&"ab".repeat(32), &"cd".repeat(32)]).expect("a token file can be written");
            fs::read(path).expect("it can be read")
        })
        .collect()
}

/// Inputs of `raw_token`.
pub fn raw_token_seeds() -> Vec<Vec<u8>> {
    let ids = [2u16, 9, 8, 3, 2, 7, 3];
    let flat: Vec<u8> = ids.iter().flat_map(|i| i.to_le_bytes()).collect();
    let mut header = vec![0i32; 256];
    header[..3].copy_from_slice(&[20_240_520, 1, ids.len() as i32]);
    let mut with_header: Vec<u8> = header.iter().flat_map(|i| i.to_le_bytes()).collect();
    with_header.extend(&flat);
    [vec![flat, with_header], found("text.bin")].concat()
}

/// Inputs of `safetensors`.
pub fn safetensors_seeds() -> Vec<Vec<u8>> {
    let path = scratch().join("seed.safetensors");
    let t = HostTensor { rows: 2, cols: 3, data: vec![0.5; 6] };
    let tensors = [("m.a".to_string(), t.clone()), ("v.a".to_string(), t)];
    write_state_tensors(&path, &tensors).expect("tensors can be written");
    let mixed = br#"{"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]},"b":{"dtype":"F16","shape":[2],"data_offsets":[4,8]}}"#;
    let mut other = (mixed.len() as u64).to_le_bytes().to_vec();
    other.extend(mixed);
    other.extend([0, 0x3f, 0x80, 0x3f, 0, 0x3c, 0, 0x40]);
    [vec![fs::read(path).expect("it can be read"), other], found(".safetensors")].concat()
}

/// Inputs of `shard_index`.
pub fn shard_index_seeds() -> Vec<Vec<u8>> {
    let text = r#"{"metadata": {"total_size": 8}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"}}"#;
    vec![text.into(), br#"{"weight_map": {"a": "../x", "b": "model-00002-of-00002.safetensors"}}"#.to_vec()]
}

/// Inputs of `config`.
pub fn config_seeds() -> Vec<Vec<u8>> {
    let dirs = ["tiny-llama-tied", "llama3-rope", "mistral-window", "qwen2-untied", "qwen3-tied"];
    let mut all: Vec<Vec<u8>> = dirs.iter().map(|d| file(&format!("tests/data/model/{d}/config.json"))).collect();
    all.push(file("tests/data/model/llama3-rope/config_v5.json"));
    [all, found("/config.json")].concat()
}

/// Inputs of `adapter_config`.
pub fn adapter_config_seeds() -> Vec<Vec<u8>> {
    [vec![file("tests/data/golden/tiny-llama-tied/adapter_all/adapter_config.json")], found("/adapter_config.json")]
        .concat()
}

/// Models small enough to be loaded thousands of times: the smallest of the tests, and the start of a larger one.
pub fn sentencepiece_seeds() -> Vec<Vec<u8>> {
    let whole = file("tests/data/tokenizer/spm4k.model");
    let mut short = Vec::new();
    let (mut at, mut pieces) = (0, 0);
    // Fields of the message: a tag byte, a length, that many bytes; pieces have the tag 0x0a.
    while at < whole.len() {
        let (mut length, mut shift, mut next) = (0usize, 0, at + 1);
        loop {
            let byte = whole[next];
            length |= usize::from(byte & 0x7f) << shift;
            (next, shift) = (next + 1, shift + 7);
            if byte & 0x80 == 0 {
                break;
            }
        }
        let end = next + length;
        if whole[at] != 0x0a || pieces < 330 {
            short.extend(&whole[at..end]);
        }
        pieces += usize::from(whole[at] == 0x0a);
        at = end;
    }
    vec![file("tests/data/tokenizer/spm600_nobyte.model"), short]
}

/// Inputs of `added_token`.
pub fn added_token_seeds() -> Vec<Vec<u8>> {
    [vec![br#"{"<|im_start|>": 4096, "<|im_end|>": 4097}"#.to_vec()], found("/added_tokens.json")].concat()
}

/// Inputs of `manifest`.
pub fn manifest_seeds() -> Vec<Vec<u8>> {
    let hash = blake3::hash(b"abc").to_hex();
    let text = format!(
        r#"{{"format": "ringtune checkpoint", "version": 1, "step": 2, "files": {{"a.txt": {{"bytes": 3, "blake3": "{hash}"}}}}}}"#
    );
    vec![text.into_bytes()]
}

/// Inputs of `trainer_state`.
pub fn trainer_state_seeds() -> Vec<Vec<u8>> {
    let settings = TrainSettings::default();
    let facts = RunFacts { settings: &settings, output_dir: Path::new("out"), max_steps: 40 };
    let mut value = RunState { step: 3, ..RunState::default() }.to_json(facts);
    value["ringtune"]["fingerprints"] = serde_json::json!({"data": "abc"});
    vec![value.to_string().into_bytes()]
}

/// Inputs of `settings_file`.
pub fn settings_file_seeds() -> Vec<Vec<u8>> {
    vec![
        file("configs/sft_tiny.json"),
        br#"{"// a": 1, "dataset_paths": ["a", "b"], "dataset_weights": [0.5, 1e-3], "lora_r": 8, "max_steps": null}"#
            .to_vec(),
    ]
}

/// Inputs of `jinja`.
pub fn jinja_seeds() -> Vec<Vec<u8>> {
    let options = TemplateOptions::default;
    let builtin = Template::NAMES.map(|name| Template::load(name, options()).expect("built in").jinja_source());
    let mut all: Vec<Vec<u8>> = builtin.map(String::into_bytes).to_vec();
    all.push(b"{% for i in range(99999) %}{% for m in messages %}{% generation %}{{ m.content * 9 }}{% endgeneration %}{% endfor %}{% endfor %}".to_vec());
    [all, found(".jinja")].concat()
}

/// Inputs of `dolly`.
pub fn dolly_seeds() -> Vec<Vec<u8>> {
    let plain = file("tests/data/prepare/raw_dolly_edge.jsonl");
    vec![gzip(&plain), plain]
}

/// Inputs of `oasst`.
pub fn oasst_seeds() -> Vec<Vec<u8>> {
    let flat = String::from_utf8(file("tests/data/prepare/raw_oasst_edge_messages.jsonl")).expect("UTF-8");
    let tree = br#"{"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": {"message_id": "t", "text": "q", "role": "prompter", "lang": "en", "replies": [{"message_id": "u", "text": "a", "role": "assistant", "lang": "en", "rank": 0, "replies": []}]}}"#;
    vec![flat.lines().take(6).collect::<Vec<_>>().join("\n").into_bytes(), tree.to_vec(), gzip(tree)]
}

/// Inputs of `alpaca`.
pub fn alpaca_seeds() -> Vec<Vec<u8>> {
    let array = file("tests/data/prepare/raw_alpaca_edge.json");
    let found = file("tests/data/found/parquet-dictionary-of-more-values-than-bytes/rows.parquet");
    let endless = file("tests/data/found/parquet-list-longer-than-the-file/rows.parquet");
    vec![parquet(Compression::UNCOMPRESSED), parquet(Compression::SNAPPY), gzip(&array), array, found, endless]
}

/// Inputs of `tables`.
pub fn table_seeds() -> Vec<Vec<u8>> {
    let csv = b"instruction,output\r\n\"a, \"\"b\"\"\nc\",d\r\n".to_vec();
    let list = b"id;messages\n1;\"[{\"\"role\"\": \"\"user\"\", \"\"content\"\": \"\"a\"\"}]\"\n".to_vec();
    [vec![csv, list], alpaca_seeds()].concat()
}

/// Inputs of `metrics`.
pub fn metrics_seeds() -> Vec<Vec<u8>> {
    let line = |step: u64| {
        format!(
            r#"{{"step": {step}, "epoch": 0.1, "loss": {}, "grad_norm": 0.5, "lr": 1e-4, "tokens": 512, "supervised": 300, "ms": 12.5, "tokens_per_second": 40960.0}}"#,
            3.0 / step as f64
        )
    };
    let eval = r#"{"eval_loss": 2.5, "eval_perplexity": 12.2, "eval_mean_token_accuracy": 0.4, "eval_a_loss": 2.0, "eval_b_loss": 3.0, "epoch": 0.1, "step": 2}"#;
    let skipped =
        r#"{"step": 3, "epoch": 0.2, "skipped": "loss", "why": "the loss is not finite", "samples": ["a.jsonl:3"]}"#;
    let whole = format!("{}\n{}\n{eval}\n{skipped}\n{}\n{{\"step\": 5, \"lo", line(1), line(2), line(4));
    vec![whole.into_bytes(), format!("{}\n", line(1)).into_bytes()]
}

/// Inputs of `hub_listing`.
pub fn hub_listing_seeds() -> Vec<Vec<u8>> {
    let listing = serde_json::json!({
        "sha": "0123456789abcdef0123456789abcdef01234567",
        "siblings": [
            {"rfilename": "config.json", "size": 7, "blobId": "ab12"},
            {"rfilename": "a/model.safetensors", "lfs": {"sha256": "0".repeat(64), "size": 9, "pointerSize": 130}},
        ],
    });
    vec![listing.to_string().into_bytes()]
}

/// Inputs of `hub_card`.
pub fn hub_card_seeds() -> Vec<Vec<u8>> {
    let lists = "---\nconfigs:\n- config_name: en\n  default: true\n  data_files:\n  - split: train\n    path: a/train-*\n  - split: test\n    path: [b/*]\n---\n";
    let maps = "---\nconfigs:\n- config_name: b\n  data_dir: b\n- config_name: en\n  data_files: {train: 'c.csv', test: '**/*'}\n---\n# Text\n";
    vec![lists.into(), maps.into()]
}

/// Inputs of `run_record`.
pub fn run_record_seeds() -> Vec<Vec<u8>> {
    let record = serde_json::json!({
        "program": "ringtune", "started": 1_795_500_060u64, "first_step": 3, "max_steps": 40, "device": "cpu", "world_size": 1,
        "machine": {"processor": "p", "cores": 2, "memory": 1u64 << 34, "system": "linux"},
        "parameters": {"all": 100, "trained": 7}, "memory": {"weights": 400},
        "mix": [{"name": "a", "rows": 3, "rows_of_an_epoch": 2, "shares": {"samples": {"requested": 0.5, "achieved": 0.25}}}],
        "settings": [{"name": "seed", "value": "42", "origin": "--seed"}], "warnings": ["<b>"],
        "best_global_step": 2, "epoch": 0.5,
    });
    let samples = r#"{"samples": [{"prompt": "<i>", "reference": "b", "greedy": "c", "sampled": "d"}], "greedy": {"stop_rate": 0.5, "longest": 9}}"#;
    vec![record.to_string().into_bytes(), samples.into()]
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    std::io::Write::write_all(&mut out, bytes).expect("memory can be written");
    out.finish().expect("memory can be written")
}

/// A small Parquet file with the columns of Alpaca.
fn parquet(compression: Compression) -> Vec<u8> {
    let schema = "message rows { required binary instruction (UTF8); required binary input (UTF8); required binary output (UTF8); }";
    let schema = Arc::new(parse_message_type(schema).expect("the schema is well formed"));
    let properties = WriterProperties::builder().set_compression(compression).build();
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, Arc::new(properties)).expect("a writer");
    let mut group = writer.next_row_group().expect("a row group");
    for column in [["Add", "Name"], ["1 and 1", ""], ["2", "Ada"]] {
        let mut next = group.next_column().expect("a column").expect("three columns");
        if let ColumnWriter::ByteArrayColumnWriter(w) = next.untyped() {
            let values = column.map(ByteArray::from);
            w.write_batch(&values, None, None).expect("memory can be written");
        }
        next.close().expect("a whole column");
    }
    group.close().expect("a whole group");
    writer.into_inner().expect("a whole file")
}

/// Inputs of `pretrain_text`.
pub fn text_seeds() -> Vec<Vec<u8>> {
    let book = file("data/demo/pretrain_valid.txt");
    vec![book[..3000].to_vec(), b"\xef\xbb\xbfone\r\n\r\n\r\ntwo\n\n\nthree".to_vec()]
}

/// Inputs of `pretrain_jsonl`.
pub fn text_jsonl_seeds() -> Vec<Vec<u8>> {
    vec![b"{\"text\": \"one two three\"}\n{\"text\": \"four\", \"x\": 1}\n".to_vec()]
}

/// Inputs of `conversations`.
pub fn conversation_seeds() -> Vec<Vec<u8>> {
    let mut all: serde_json::Value = serde_json::from_slice(&file("tests/data/templates.json")).expect("JSON");
    all["conversations"].as_array_mut().expect("a list").truncate(2);
    let two = serde_json::json!({"conversations": all["conversations"]});
    let own = serde_json::json!({
        "conversations": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]],
        "templates": {"x": "{{ messages[0].content }}{% generation %}{{ messages[1].content }}{% endgeneration %}"},
        "alpaca_inputs": {"0": "input"}, "cases": [{"conversation": 0, "template": "x", "applies": false}],
    });
    vec![two.to_string().into_bytes(), own.to_string().into_bytes()]
}

/// Inputs of `tokenizer_json_input`: what ringtune exports of a small SentencePiece model.
pub fn tokenizer_json_seeds() -> Vec<Vec<u8>> {
    let model = &sentencepiece_seeds()[1];
    [vec![tokenizer_json(model, &[]).expect("the seed is exported").to_string().into_bytes()], found("/tokenizer.json")]
        .concat()
}

/// Inputs of `tokenizer_config`.
pub fn tokenizer_config_seeds() -> Vec<Vec<u8>> {
    let text = r#"{"bos_token": "<s>", "eos_token": {"content": "</s>", "special": true}, "pad_token": "<pad>", "unk_token": null,
        "bos_token_id": 2, "eos_token_id": [3, 2], "pad_token_id": 0, "added_tokens_decoder": {"3": {"content": "</s>", "special": true}}}"#;
    [vec![text.into(), b"{}".to_vec()], found("/tokenizer_config.json")].concat()
}
