//! Model folders as other tools leave them: tokens added in any order or without rows, several tokenizer files, pointers instead of
//! weights, other class names and weight names, a head that contradicts the tie flag.

use std::fs;
use std::path::Path;

use ringtune::data::template::Control;
use ringtune::data::tokenizer::{Format, SpecialIds, Tokenizer};
use ringtune::hf::safetensors::{ModelFiles, TensorFile};
use ringtune::hf::save::{Entry, write_tensors};
use ringtune::hf::{HostTensor, SaveDType, TensorSource};
use ringtune::model::weights::Place;
use serde_json::{Value, json};

use crate::program::Workplace;
use crate::tuned::{fails, json as read, ok, untuned};

const MODEL: &str = "tests/data/model/tiny-llama-tied";
/// Pieces of the SentencePiece model.
const PIECES: u32 = 4096;

/// A folder with the SentencePiece model and files that add tokens to it.
fn spm(files: &[(&str, Value)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::copy("tests/data/tokenizer/spm4k.model", dir.path().join("tokenizer.model")).unwrap();
    for (name, content) in files {
        fs::write(dir.path().join(name), content.to_string()).unwrap();
    }
    dir
}

#[test]
fn added_tokens_have_the_ids_that_the_files_say() {
    let ids = |files: &[(&str, Value)]| {
        let dir = spm(files);
        let mut t = Tokenizer::open(dir.path(), SpecialIds::default()).unwrap();
        let new = t.add_chatml();
        (t.control(Control::ImStart).unwrap(), t.control(Control::ImEnd).unwrap(), new, t.added().to_vec())
    };
    let swapped = json!({"<|im_end|>": 4096, "<|im_start|>": 4097});
    let both = ["<|im_end|>", "<|im_start|>"].map(String::from).to_vec();
    assert_eq!(ids(&[("added_tokens.json", swapped)]), (4097, 4096, 0, both));
    let padded = json!({"[PAD]": 4096, "<|im_start|>": 4097, "<|im_end|>": 4098});
    assert_eq!(ids(&[("added_tokens.json", padded)]).0, 4097);
    let decoder = json!({"added_tokens_decoder": {
        "2": {"content": "<s>"}, "3": {"content": "</s>"}, "4097": {"content": "<|im_end|>"},
    }});
    // An id that nobody names is kept free; what is missing comes behind.
    let (start, end, new, added) = ids(&[("tokenizer_config.json", decoder)]);
    assert_eq!((start, end, new, added[0].as_str()), (4098, 4097, 1, "<|unused_4096|>"));
    assert_eq!(ids(&[]), (4096, 4097, 2, ["<|im_start|>", "<|im_end|>"].map(String::from).to_vec()));
    // Another folder's files count for the tokenizer that lies there.
    let (model, lone) = (spm(&[("added_tokens.json", json!({"<|im_end|>": 4096, "<|im_start|>": 4097}))]), spm(&[]));
    let beside = |model: &Path| {
        let file = lone.path().join("tokenizer.model");
        Tokenizer::open_beside(&file, SpecialIds::default(), Some(model)).unwrap().added().len()
    };
    assert_eq!(beside(model.path()), 2);
    fs::copy("tests/data/tokenizer/spm32k.model", model.path().join("tokenizer.model")).unwrap();
    assert_eq!(beside(model.path()), 0);
}

#[test]
fn added_tokens_that_contradict_the_model_are_refused() {
    let refused = |files: &[(&str, Value)], parts: &[&str]| {
        let dir = spm(files);
        let e = Tokenizer::open(dir.path(), SpecialIds::default()).unwrap_err().to_string();
        for part in parts {
            assert!(e.contains(part), "{part:?} is not in: {e}");
        }
    };
    refused(&[("added_tokens.json", json!({"<|im_end|>": 5}))], &["\"<|im_end|>\" has the id 5", "in the model"]);
    refused(&[("added_tokens.json", json!({"</s>": 4096}))], &["\"</s>\" has the id 4096", "it has 3 too"]);
    refused(&[("added_tokens.json", json!({"a": 4096, "b": 4096}))], &["added_tokens.json", "id 4096"]);
    refused(&[("added_tokens.json", json!({"a": -1}))], &["added_tokens.json", "expected a token id"]);
    refused(
        &[("added_tokens.json", json!({"<far>": 4_000_000_000u32}))],
        &["expected an id soon behind the model's 4096"],
    );
    let decoder = json!({"added_tokens_decoder": {"4096": {"content": "b"}}});
    let both = [("added_tokens.json", json!({"a": 4096})), ("tokenizer_config.json", decoder)];
    refused(&both, &["tokenizer_config.json", "id 4096", "\"a\" as well"]);
}

/// `base/` with its tokenizer, ChatML's tokens named by a file.
fn named() -> Workplace {
    let w = untuned();
    w.copy("tests/data/tokenizer/spm4k.model", "base/tokenizer.model");
    w.write("base/added_tokens.json", json!({"<|im_end|>": PIECES, "<|im_start|>": PIECES + 1}).to_string());
    w
}

#[test]
fn tokens_without_rows_get_rows_and_are_named() {
    let w = named();
    let named = ["the model has no rows for", "<|im_end|> (4096)", "<|im_start|> (4097)"];
    let rows = "--dataset_paths rows.jsonl --max_seq_len 64";
    let out = ok(w.shell(&format!("ringtune check --model_path base {rows} --output_dir out")));
    named.iter().for_each(|part| assert!(out.stdout.contains(part), "{part}: {}", out.stdout));
    let sft = "--max_steps 2 --lora_r 4 --no_tensorboard --merge_adapters --output_dir out";
    let out = ok(w.shell(&format!("ringtune sft --model_path base {rows} {sft}")));
    named.iter().for_each(|part| assert!(out.stderr.contains(part), "{part}: {}", out.stderr));
    assert_eq!(read(&w, "out/merged/config.json")["eos_token_id"], json!(PIECES));
    let saved = read(&w, "out/merged/added_tokens.json");
    assert_eq!(saved, json!({"<|im_end|>": PIECES, "<|im_start|>": PIECES + 1}));
    let out = ok(w.shell("ringtune eval --model_path base --dataset_paths rows.jsonl --max_eval_samples 3"));
    assert!(out.stderr.contains("was not trained with <|im_end|> and <|im_start|>"), "{}", out.stderr);
    let out = ok(w.shell("ringtune eval --model_path out --dataset_paths rows.jsonl --max_eval_samples 3"));
    assert!(!out.stderr.contains("not trained with"), "{}", out.stderr);
}

/// A tokenizer.json with more added tokens than the model has rows, and one with more pieces.
#[test]
fn added_tokens_of_a_tokenizer_json_without_rows_get_rows_too() {
    let golden: Value = serde_json::from_slice(&fs::read("tests/data/chat_templates.json").unwrap()).unwrap();
    let w = untuned();
    w.write("tok/tokenizer.json", golden["tokenizer"].to_string());
    w.write("tok/tokenizer_config.json", golden["forms"]["qwen2.5"]["config"].to_string());
    let cut = |rows: usize| {
        rewrite(&repository_model(), &w.path("small"), |name, t| {
            if name == "model.embed_tokens.weight" {
                t.rows = rows;
                t.data.truncate(rows * t.cols);
            }
            Some(name.to_string())
        });
        config(
            &w.path("small"),
            &[("vocab_size", json!(rows)), ("eos_token_id", json!(1)), ("pad_token_id", json!(0))],
        );
    };
    let sft = "ringtune sft --model_path small --tokenizer_path tok --dataset_paths rows.jsonl --max_steps 1 --max_seq_len 64 \
               --no_tensorboard --no_lora --output_dir out";
    cut(402);
    let out = ok(w.shell(sft));
    assert!(out.stderr.contains("no rows for <|start_header_id|> (402), <|end_header_id|> (403)"), "{}", out.stderr);
    assert_eq!(read(&w, "out/config.json")["vocab_size"], json!(423));
    cut(300);
    fails(&w.shell(&sft.replace("--output_dir out", "--output_dir no")), 1, &["has 400 pieces", "has 300 rows"]);
}

#[test]
fn a_tokenizer_model_of_another_kind_gives_way_to_the_json_beside_it() {
    let golden: Value = serde_json::from_slice(&fs::read("tests/data/chat_templates.json").unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tokenizer.json"), golden["tokenizer"].to_string()).unwrap();
    fs::write(dir.path().join("tokenizer_config.json"), golden["forms"]["llama3"]["config"].to_string()).unwrap();
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n";
    for (model, why) in [("IQ== 0\nIg== 1\nIw== 2\n", "SentencePiece"), (pointer, "Git LFS pointer")] {
        fs::write(dir.path().join("tokenizer.model"), model).unwrap();
        let t = Tokenizer::open(dir.path(), SpecialIds::default()).unwrap();
        assert_eq!(t.format(), Format::Json);
        assert!(
            t.warnings().iter().any(|w| w.contains("tokenizer.json: taken") && w.contains(why)),
            "{:?}",
            t.warnings()
        );
        // Named alone it is refused.
        assert!(Tokenizer::open(&dir.path().join("tokenizer.model"), SpecialIds::default()).is_err());
    }
    fs::write(dir.path().join("tokenizer.json"), pointer).unwrap();
    let e = Tokenizer::open(dir.path(), SpecialIds::default()).unwrap_err().to_string();
    assert!(e.contains("tokenizer.json: a Git LFS pointer") && e.contains("git lfs pull"), "{e}");
}

/// The tokenizer.json that a run wrote, with another file in the place of the SentencePiece model that it was made of.
#[test]
fn commands_say_which_of_several_tokenizer_files_they_take() {
    let w = untuned();
    let line = "--dataset_paths rows.jsonl --max_seq_len 64 --no_tensorboard --max_steps 1 --no_lora --prompt_template instruct";
    ok(w.shell(&format!("ringtune sft --model_path base --tokenizer_path spm.model {line} --output_dir base2")));
    w.write("base2/tokenizer.model", "IQ== 0\nIg== 1\nIw== 2\n");
    let taken = ["tokenizer.json: taken", "base2/tokenizer.model", "SentencePiece"];
    let said = |text: &str| taken.iter().for_each(|part| assert!(text.contains(part), "{part}: {text}"));
    said(&ok(w.shell(&format!("ringtune sft --model_path base2 {line} --output_dir out"))).stderr);
    said(&ok(w.shell("ringtune eval --model_path base2 --dataset_paths rows.jsonl --max_eval_samples 2")).stderr);
    said(&ok(w.shell("ringtune generate --model_path base2 --max_new_tokens 2 hello")).stderr);
    let out = w.shell("ringtune check --model_path base2 --dataset_paths rows.jsonl --max_seq_len 64 --output_dir c");
    assert_eq!(out.code, Some(0), "{}{}", out.stdout, out.stderr);
}

fn repository_model() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(MODEL)
}

/// Copies a model, each weight under the name that `change` gives it; `None` leaves it out.
fn rewrite(from: &Path, to: &Path, change: impl Fn(&str, &mut HostTensor) -> Option<String>) {
    let file = TensorFile::open(&from.join("model.safetensors")).unwrap();
    let mut kept = Vec::new();
    for name in file.names() {
        let mut t = file.load(name).unwrap();
        let vector = file.info(name).unwrap().0.len() == 1;
        if let Some(name) = change(name, &mut t) {
            let shape = if vector { vec![t.cols] } else { vec![t.rows, t.cols] };
            kept.push((Entry { name, shape, dtype: SaveDType::F32 }, t));
        }
    }
    fs::create_dir_all(to).unwrap();
    fs::copy(from.join("config.json"), to.join("config.json")).unwrap();
    let entries: Vec<Entry> = kept.iter().map(|(e, _)| e.clone()).collect();
    write_tensors(&to.join("model.safetensors"), &entries, |i, _| Ok(&kept[i].1)).unwrap();
}

/// Writes keys into a folder's config.json.
fn config(dir: &Path, keys: &[(&str, Value)]) {
    let path = dir.join("config.json");
    let mut v: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    keys.iter().for_each(|(key, value)| v[*key] = value.clone());
    fs::write(path, v.to_string()).unwrap();
}

#[test]
fn pointers_and_other_formats_are_named() {
    let w = untuned();
    let line = "ringtune eval --model_path base --tokenizer_path spm.model --dataset_paths rows.jsonl";
    w.write("base/model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n");
    fails(&w.shell(line), 1, &["base/model.safetensors: a Git LFS pointer", "git lfs pull"]);
    fs::rename(w.path("base/model.safetensors"), w.path("base/model-Q4_K_M.gguf")).unwrap();
    fails(&w.shell(line), 1, &["found model-Q4_K_M.gguf; GGUF is not read, take the original model"]);
    fs::remove_file(w.path("base/config.json")).unwrap();
    fails(&w.shell(line), 1, &["found model-Q4_K_M.gguf"]);
}

#[test]
fn weights_of_a_model_saved_without_its_head_load() {
    let dir = tempfile::tempdir().unwrap();
    rewrite(&repository_model(), dir.path(), |name, _| Some(name.strip_prefix("model.").unwrap().to_string()));
    config(dir.path(), &[("architectures", json!(["LlamaModel"]))]);
    let (bare, whole) = (ModelFiles::open(dir.path()).unwrap(), ModelFiles::open(&repository_model()).unwrap());
    for at in [Place::Embed, Place::FinalNorm] {
        assert!(bare.load(at).unwrap() == whole.load(at).unwrap());
    }
    assert_eq!(bare.dtype(), whole.dtype());
    let warnings = &bare.hf_config().warnings;
    assert!(
        warnings.iter().any(|w| w.contains("LlamaModel") && w.contains("model_type llama decides")),
        "{warnings:?}"
    );
    // An untied model without its head lacks a weight.
    config(dir.path(), &[("tie_word_embeddings", json!(false))]);
    assert!(ModelFiles::open(dir.path()).err().unwrap().to_string().contains("missing weight lm_head.weight"));
}

#[test]
fn a_head_that_is_not_the_embedding_stays_whatever_the_tie_flag_says() {
    let untied = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/model/tiny-llama-untied");
    let dir = tempfile::tempdir().unwrap();
    rewrite(&untied, dir.path(), |name, _| Some(name.to_string()));
    config(dir.path(), &[("tie_word_embeddings", json!(true))]);
    let (found, whole) = (ModelFiles::open(dir.path()).unwrap(), ModelFiles::open(&untied).unwrap());
    assert!(!found.config().tied && found.load(Place::Head).unwrap() == whole.load(Place::Head).unwrap());
    let warnings = &found.hf_config().warnings;
    assert!(warnings.iter().any(|w| w.contains("lm_head.weight differs from the embedding")), "{warnings:?}");
    // The same matrix twice is a tied model, without a word.
    let embed = whole.load(Place::Embed).unwrap();
    rewrite(&untied, dir.path(), |name, t| {
        if name == "lm_head.weight" {
            t.data.clone_from(&embed.data);
        }
        Some(name.to_string())
    });
    config(dir.path(), &[("tie_word_embeddings", json!(true))]);
    let found = ModelFiles::open(dir.path()).unwrap();
    assert!(found.config().tied && found.hf_config().warnings.is_empty(), "{:?}", found.hf_config().warnings);
}

#[test]
fn the_loss_is_that_of_the_kept_head_and_biases_of_the_mlp_count() {
    let w = Workplace::new();
    w.write("rows.jsonl", "{\"prompt\": \"What is it?\", \"response\": \"It is a test of the head.\"}\n");
    let untied = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/model/tiny-llama-untied");
    let loss = |dir: &str| {
        w.copy("tests/data/tokenizer/spm4k.model", &format!("{dir}/tokenizer.model"));
        let line = format!(
            "ringtune eval --model_path {dir} --dataset_paths rows.jsonl --prompt_template instruct --output r.json --mixed_precision no"
        );
        ok(w.shell(&line));
        read(&w, "r.json")["all"]["loss"].as_f64().unwrap()
    };
    rewrite(&untied, &w.path("a"), |name, _| Some(name.to_string()));
    rewrite(&untied, &w.path("b"), |name, _| Some(name.to_string()));
    config(&w.path("b"), &[("tie_word_embeddings", json!(true))]);
    assert_eq!(loss("a"), loss("b"));
    // Biases of zero change nothing, others do.
    let biased = |dir: &str, value: f32| {
        let file = TensorFile::open(&untied.join("model.safetensors")).unwrap();
        let mut all: Vec<(Entry, HostTensor)> = Vec::new();
        for name in file.names() {
            let (shape, t) = (file.info(name).unwrap().0.to_vec(), file.load(name).unwrap());
            if name.contains(".mlp.") {
                let bias = HostTensor { rows: 1, cols: shape[0], data: vec![value; shape[0]] };
                let name = name.replace(".weight", ".bias");
                all.push((Entry { name, shape: vec![shape[0]], dtype: SaveDType::F32 }, bias));
            }
            all.push((Entry { name: name.to_string(), shape, dtype: SaveDType::F32 }, t));
        }
        rewrite(&untied, &w.path(dir), |name, _| Some(name.to_string()));
        let entries: Vec<Entry> = all.iter().map(|(e, _)| e.clone()).collect();
        write_tensors(&w.path(dir).join("model.safetensors"), &entries, |i, _| Ok(&all[i].1)).unwrap();
        config(&w.path(dir), &[("mlp_bias", json!(true))]);
        loss(dir)
    };
    assert_eq!(biased("zero", 0.0), loss("a"));
    assert_ne!(biased("half", 0.5), loss("a"));
}

#[test]
fn padding_without_effect_is_said_and_its_rows_never_join_a_softmax() {
    let w = untuned();
    let sft = "ringtune sft --model_path base --tokenizer_path spm.model --dataset_paths rows.jsonl --max_steps 2 --max_seq_len 64 \
               --no_tensorboard --lora_r 4";
    let out = ok(w.shell(&format!("{sft} --output_dir same --pad_vocab_to 4098")));
    assert!(out.stderr.contains("pad_vocab_to 4098 has no effect: the vocabulary has as many rows"), "{}", out.stderr);
    let out = ok(w.shell(&format!("{sft} --output_dir lone --pad_vocab_to 4160 --prompt_template instruct")));
    assert!(out.stderr.contains("pad_vocab_to 4160 has no effect: the adapter carries no embedding"), "{}", out.stderr);
    let out = ok(w.shell(&format!("{sft} --output_dir out --pad_vocab_to 8192 --merge_adapters --mixed_precision no")));
    assert!(!out.stderr.contains("has no effect"), "{}", out.stderr);
    let loss = |words: &str| {
        ok(w.shell(&format!(
            "ringtune eval --dataset_paths rows.jsonl --output r.json --mixed_precision no --quiet {words}"
        )));
        read(&w, "r.json")["all"]["loss"].as_f64().unwrap()
    };
    // On its own base, on the original one, and merged: no softmax has the 4,094 rows of padding in it.
    let own = loss("--model_path out");
    assert_eq!(loss("--model_path out --base_model base"), own);
    assert!((loss("--model_path out/merged") - own).abs() < 1e-5);
    ok(w.shell("ringtune merge --model_path out --base_model base --output_dir merged"));
    assert!((loss("--model_path merged") - own).abs() < 1e-5);
    assert_eq!(read(&w, "merged/config.json")["unpadded_vocab_size"], json!(4098));
    // The next training finds ChatML's rows trained, among the rows of padding: none of them is made anew, with the model's own
    // tokenizer, with the first one, which does not name them, or with one of other bytes (a field that nobody reads), which is
    // not known to be the model's.
    let saved_again = [fs::read(w.path("spm.model")).unwrap(), vec![0xc0, 0x3e, 1]].concat();
    fs::write(w.path("saved_again.model"), saved_again).unwrap();
    let tokenizers = ["", "--tokenizer_path spm.model", "--tokenizer_path saved_again.model"];
    for (out, tokenizer) in ["next", "again", "other"].into_iter().zip(tokenizers) {
        let next =
            sft.replace("--model_path base --tokenizer_path spm.model", &format!("--model_path merged {tokenizer}"));
        ok(w.shell(&format!("{next} --output_dir {out} --mixed_precision no")));
        assert!(!w.path(&format!("{out}/resized_base")).exists(), "{out}");
        let adapter = TensorFile::open(&w.path(&format!("{out}/adapter_model.safetensors"))).unwrap();
        assert!(adapter.names().all(|n| n.contains(".lora_")), "{out}: {:?}", adapter.names().collect::<Vec<_>>());
    }
}
