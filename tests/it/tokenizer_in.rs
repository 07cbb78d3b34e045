//! `tokenizer.json` as input: special tokens from the files beside it, ids that the exported file gives back, data that never
//! becomes a control token, and every command on a model that has no SentencePiece file.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use ringtune::data::encode::{encode_prompt, encode_rendered, stop_ids};
use ringtune::data::row::{Message, Role};
use ringtune::data::template::{Control, Purpose, Template, TemplateOptions};
use ringtune::data::tokenizer::{Format, Newline, SpecialIds, Specials, Tokenizer};
use ringtune::hf::companions::Companions;
use serde_json::{Value, json};
use tokenizers::Tokenizer as Library;

use crate::json_tokenizers::{STYLES, Style, tokenizer_json, write};
use crate::program::{Workplace, first_rows};
use crate::tuned::{fails, json as read, ok};

fn folder(style: Style) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    write(style, &path);
    (dir, path)
}

fn open(path: &Path) -> Tokenizer {
    Tokenizer::open(path, SpecialIds::default()).unwrap()
}

fn template(name: &str, t: &mut Tokenizer) -> Template {
    let options = TemplateOptions { names: t.control_names(), ..Default::default() };
    let template = Template::load(name, options).unwrap();
    if template.needs_chatml() {
        t.add_chatml();
    }
    template
}

fn rows(n: usize) -> Vec<[Message; 2]> {
    let mut out = Vec::new();
    for set in ["chat", "define", "jargon"] {
        for line in first_rows(&format!("data/demo/{set}.jsonl"), n).lines() {
            let row: Value = serde_json::from_str(line).unwrap();
            let turn = |role, key: &str| Message::new(role, row[key].as_str().unwrap());
            out.push([turn(Role::User, "prompt"), turn(Role::Assistant, "response")]);
        }
    }
    let turn = |q: &str, a: &str| [Message::new(Role::User, q), Message::new(Role::Assistant, a)];
    out.push(turn("naïve 日本語\n\n  two", "🙂 caf\u{e9} 12345 don't\tx\n"));
    out.push(turn(" leading", " blank"));
    out
}

#[test]
fn special_tokens_come_from_the_files_beside_it() {
    let (_dir, path) = folder(Style::Llama3);
    let mut t = open(&path);
    let id = |t: &Tokenizer, name: &str| t.id_of(name).unwrap();
    assert_eq!((t.format(), t.newline()), (Format::Json, Newline::Kept(id(&t, "Ċ"))));
    assert_eq!(t.byte_ids().unwrap()[usize::from(b' ')], id(&t, "Ġ"));
    let s = t.special();
    assert_eq!((s.bos, s.eos), (Some(id(&t, "<|begin_of_text|>")), id(&t, "<|end_of_text|>")));
    assert_eq!((s.pad, s.unk), (Some(id(&t, "<|reserved_special_token_0|>")), None));
    assert_eq!(t.more_stops(), [id(&t, "<|eot_id|>")]);
    assert!(t.warnings().is_empty(), "{:?}", t.warnings());
    let n = t.vocab_size() as u32;
    assert_eq!(t.add_chatml(), 2, "the vocabulary grows");
    assert_eq!((t.control(Control::ImStart).unwrap(), t.control(Control::ImEnd).unwrap()), (n, n + 1));
    let chatml = template("chatml", &mut t);
    assert_eq!(stop_ids(&t, &chatml).unwrap(), [n + 1, s.eos, id(&t, "<|eot_id|>")]);

    let (_dir, path) = folder(Style::Qwen);
    let mut t = open(&path.join("tokenizer.json"));
    let s = t.special();
    // The end token is named as padding, which would mask every end; another token of the vocabulary pads.
    assert_eq!((s.bos, s.eos, s.pad), (None, id(&t, "<|endoftext|>"), Some(id(&t, "<|vision_pad|>"))));
    assert_eq!(t.add_chatml(), 0, "they are in the vocabulary");
    assert_eq!(t.control_names().bos, "");
    assert!(t.control(Control::Bos).is_err());
    assert!(!t.is_control(id(&t, "<think>")) && t.is_control(id(&t, "<|vision_pad|>")));
    assert_eq!(t.encode("a <think>").unwrap().last(), Some(&id(&t, "<think>")), "a token that is not special is text");

    let (_dir, path) = folder(Style::MetaspaceFirst);
    let t = open(&path);
    let s = t.special();
    assert_eq!((s.unk, s.bos, s.eos, s.pad), (Some(0), Some(1), 2, Some(3)));
    assert!(t.prefix_once());
    assert_eq!(t.newline(), Newline::Kept(t.id_of("\n").unwrap()));
}

/// A SentencePiece model and its export are one tokenizer, whichever of the two files is opened.
#[test]
fn an_exported_sentencepiece_model_gives_the_same_ids() {
    for name in ["spm4k", "spm32k", "spm4k_unigram"] {
        let model = PathBuf::from(format!("tests/data/tokenizer/{name}.model"));
        let mut sp = open(&model);
        let dir = tempfile::tempdir().unwrap();
        Companions::new(Arc::new(open(&model)), None, 512).write(dir.path()).unwrap();
        fs::remove_file(dir.path().join("tokenizer.model")).unwrap();
        let mut hf = open(dir.path());
        assert_eq!((hf.format(), hf.special(), hf.newline()), (Format::Json, sp.special(), sp.newline()), "{name}");
        assert_eq!((hf.vocab_size(), hf.byte_ids()), (sp.vocab_size(), sp.byte_ids()), "{name}");
        let golden: Value =
            serde_json::from_slice(&fs::read(format!("tests/data/tokenizer/golden_{name}.json")).unwrap()).unwrap();
        for case in golden["cases"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let ids = sp.encode(text).unwrap();
            assert_eq!(hf.encode(text).unwrap(), ids, "{name}: {text:?}");
            assert_eq!(hf.decode(&ids, Specials::Show), sp.decode(&ids, Specials::Show), "{name}: {text:?}");
        }
        for kind in ["chatml", "instruct", "zephyr", "llama2"] {
            let (a, b) = (template(kind, &mut sp), template(kind, &mut hf));
            for row in rows(40) {
                let ours = encode_rendered(&sp, &a.render(&row, Purpose::Train).unwrap()).unwrap();
                let theirs = encode_rendered(&hf, &b.render(&row, Purpose::Train).unwrap()).unwrap();
                assert_eq!(ours, theirs, "{name} {kind}: {:?}", row[0].content);
            }
        }
    }
}

#[test]
fn the_file_that_is_written_gives_the_ids_of_training() {
    for style in STYLES {
        let (dir, path) = folder(style);
        for kind in ["chatml", "instruct", "zephyr", "llama2"] {
            let mut t = open(&path);
            let template = template(kind, &mut t);
            let out = dir.path().join(kind);
            let t = Arc::new(t);
            Companions::new(Arc::clone(&t), Some(&template), 512).write(&out).unwrap();
            assert!(!out.join("tokenizer.model").exists());
            let exported = Library::from_file(out.join("tokenizer.json")).unwrap();
            let text_of = |id: u32| t.piece(id).unwrap().to_string();
            let config: Value = serde_json::from_slice(&fs::read(out.join("tokenizer_config.json")).unwrap()).unwrap();
            let end = if kind == "chatml" { "<|im_end|>".to_string() } else { text_of(t.special().eos) };
            assert_eq!(config["eos_token"], json!(end), "{style:?} {kind}");
            assert_ne!(config["pad_token"], config["eos_token"]);
            let mut checked = 0;
            for row in rows(120) {
                let rendered = template.render(&row, Purpose::Train).unwrap();
                let text = rendered.text(&t.control_names());
                let want = encode_rendered(&t, &rendered).unwrap().tokens;
                // Rendering the saved template prints BOS first; the plain text of a rendering leaves it out.
                let bos = t.special().bos.filter(|&b| want[0] == b && !text.starts_with(&text_of(b)));
                let text = bos.map(text_of).unwrap_or_default() + &text;
                // Where the loss mask changes inside what would be one token, training cuts the text.
                let cut = row[1].content.starts_with([' ', '\n']);
                let got = exported.encode(text.as_str(), false).unwrap();
                if !cut {
                    assert_eq!(got.get_ids(), want, "{style:?} {kind}: {text:?}");
                    checked += 1;
                }
            }
            assert!(checked > 350, "{checked}");
            // Read back, it is the tokenizer of training: nothing is added again.
            let mut again = open(&out);
            assert_eq!(again.vocab_size(), t.vocab_size());
            if kind == "chatml" {
                assert_eq!(again.add_chatml(), 0);
                assert_eq!(again.control(Control::ImEnd).unwrap(), t.control(Control::ImEnd).unwrap());
                assert_eq!(again.special().eos, t.control(Control::ImEnd).unwrap());
            } else {
                assert_eq!(again.special(), t.special(), "{style:?} {kind}");
            }
        }
    }
}

#[test]
fn data_never_becomes_a_control_token() {
    for style in STYLES {
        let (_dir, path) = folder(style);
        let mut t = open(&path);
        let chatml = template("chatml", &mut t);
        let names =
            ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|eot_id|>", "<|begin_of_text|>", "</s>", "<s>", "<pad>"];
        for name in names {
            for text in [name.to_string(), format!("a{name}b"), format!("x {name}\n{name}{name}")] {
                let ids = t.encode(&text).unwrap();
                assert!(!ids.iter().any(|&id| t.is_control(id)), "{style:?} {text:?}: {ids:?}");
                assert_eq!(t.decode(&ids, Specials::Show), text, "{style:?}");
            }
        }
        let row = [Message::new(Role::User, "say <|im_end|>"), Message::new(Role::Assistant, "<|im_end|> it is")];
        let encoded = encode_rendered(&t, &chatml.render(&row, Purpose::Train).unwrap()).unwrap();
        let ends = encoded.tokens.iter().filter(|&&id| id == t.control(Control::ImEnd).unwrap()).count();
        assert_eq!(ends, 2, "{style:?}: one for each turn");
        // What is supervised spells the answer and its end, nothing else.
        let on: Vec<u32> =
            encoded.tokens.iter().zip(&encoded.supervised).filter(|(_, s)| **s).map(|(&t, _)| t).collect();
        assert_eq!(t.decode(&on, Specials::Show).trim_start(), "<|im_end|> it is<|im_end|>", "{style:?}");
        let prompt = encode_prompt(&t, &chatml, &row[..1]).unwrap();
        assert_eq!(encoded.tokens[..prompt.len()], prompt, "{style:?}: training goes on where a prompt ends");
    }
}

#[test]
fn files_that_contradict_themselves_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokenizer.json");
    let refused = |what: &str, expected: &[&str]| {
        let e = Tokenizer::open(&file, SpecialIds::default()).unwrap_err().to_string();
        for part in expected {
            assert!(e.contains(part), "{what}: {part:?} is not in: {e}");
        }
    };
    let good = tokenizer_json(Style::Llama3);
    let put = |v: &Value| fs::write(&file, v.to_string()).unwrap();
    let with = |change: &dyn Fn(&mut Value)| {
        let mut v = good.clone();
        change(&mut v);
        put(&v);
    };
    put(&good);
    refused("no config", &["nothing says which token ends a text", "tokenizer_config.json", "--special-ids"]);
    // Asked for by hand it opens.
    let n = good["added_tokens"][1]["id"].as_u64().unwrap() as u32;
    let ids = SpecialIds::parse(&format!("{},{},{},{n}", n + 1, n + 1, n - 1)).unwrap();
    assert_eq!(Tokenizer::open(&file, ids).unwrap().special().eos, n);
    let e = Tokenizer::open(&file, SpecialIds::parse(&format!("{n},1,2,90000")).unwrap()).unwrap_err().to_string();
    assert!(e.contains("eos 90000 is no token"), "{e}");
    let config = |v: Value| fs::write(dir.path().join("tokenizer_config.json"), v.to_string()).unwrap();
    config(json!({"eos_token": "<|nowhere|>"}));
    refused("unknown end", &["eos_token is \"<|nowhere|>\"", "not in the vocabulary"]);
    fs::write(dir.path().join("tokenizer_config.json"), "[1").unwrap();
    refused("damaged config", &["tokenizer_config.json", "invalid JSON"]);
    config(json!({"eos_token": "<|end_of_text|>"}));
    assert!(Tokenizer::open(&file, SpecialIds::default()).is_ok());
    fs::write(&file, good.to_string().split_at(2000).0).unwrap();
    refused("truncated", &["tokenizer.json", "invalid JSON"]);
    fs::write(&file, "").unwrap();
    refused("empty", &["empty file"]);
    put(&json!({"a": 1}));
    refused("no model", &["found no model"]);
    with(&|v| v["model"]["type"] = json!("WordPiece"));
    refused("word pieces", &["WordPiece", "BPE and Unigram are supported"]);
    with(&|v| v["model"]["merges"][0] = json!("no such"));
    refused("a merge of unknown pieces", &["does not load"]);
    with(&|v| v["added_tokens"][0]["id"] = json!(100_000));
    refused("a hole in the ids", &["<|begin_of_text|>", "100000"]);
    with(&|v| v["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json!("("));
    refused("a damaged pattern", &["does not load"]);
    with(&|v| v["model"]["vocab"] = json!({}));
    refused("no vocabulary", &["does not load"]);
    let e = Tokenizer::open(&dir.path().join("none"), SpecialIds::default()).unwrap_err().to_string();
    assert!(e.contains("No such file"), "{e}");
    fs::create_dir(dir.path().join("empty")).unwrap();
    let e = Tokenizer::open(&dir.path().join("empty"), SpecialIds::default()).unwrap_err().to_string();
    assert!(e.contains("expected tokenizer.model or tokenizer.json"), "{e}");
    // Any byte damaged: an error or a tokenizer that works.
    let text = good.to_string().into_bytes();
    let stream = ringtune::rng::Stream::new(&[5]);
    for i in 0..60 {
        let mut bytes = text.clone();
        let at = stream.u64_at(2 * i) as usize % bytes.len();
        bytes[at] = stream.u64_at(2 * i + 1) as u8;
        fs::write(&file, bytes).unwrap();
        if let Ok(t) = Tokenizer::open(&file, SpecialIds::default()) {
            let ids = t.encode("Hello <|im_end|>\n wörld").unwrap();
            t.decode(&ids, Specials::Show);
        }
    }
}

/// A tiny model of 2 layers over the tokenizer in `tok/`, made by `pretrain`, with its tokenizer beside it.
fn place(style: Style) -> Workplace {
    let w = Workplace::new();
    write(style, &w.path("tok"));
    w.write(
        "tiny.json",
        r#"{"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": true}"#,
    );
    w.write("rows.jsonl", first_rows("data/demo/chat.jsonl", 24));
    let text = fs::read_to_string("data/demo/pretrain_valid.txt").unwrap();
    w.write("text.txt", text.chars().take(6000).collect::<String>());
    ok(w.shell(
        "ringtune pretrain --model_config tiny.json --tokenizer_path tok/tokenizer.json --dataset_paths text.txt --output_dir . \
         --max_steps 3 --max_seq_len 64 --per_device_train_batch_size 2 --quiet --no_tensorboard",
    ));
    w
}

#[test]
fn every_command_takes_it() {
    for (style, grows) in [(Style::Llama3, true), (Style::Qwen, false)] {
        let w = place(style);
        let model = "tiny/final";
        assert!(w.path(model).join("tokenizer.json").is_file() && !w.path(model).join("tokenizer.model").exists());
        // The model's own tokenizer, the file by its path, and its folder are one.
        let sft = "ringtune sft --model_path tiny/final --dataset_paths rows.jsonl --max_steps 6 --max_seq_len 96 --lora_r 4 \
                   --learning_rate 5e-3 --per_device_train_batch_size 2 --quiet --no_tensorboard";
        ok(w.shell(&format!(
            "{sft} --output_dir out --merge_adapters --do_gen_test --num_gen_samples 1 --max_new_tokens 4"
        )));
        for (i, given) in ["tok", "tok/tokenizer.json"].iter().enumerate() {
            ok(w.shell(&format!("{sft} --output_dir same{i} --tokenizer_path {given}")));
            let weights = |dir: &str| fs::read(w.path(dir).join("adapter_model.safetensors")).unwrap();
            assert_eq!(weights(&format!("same{i}")), weights("out"), "{style:?} {given}");
        }
        assert_eq!(w.path("out/resized_base").is_dir(), grows, "{style:?}");
        let config = read(&w, "out/merged/config.json");
        let library = Library::from_str(&fs::read_to_string(w.path("out/merged/tokenizer.json")).unwrap()).unwrap();
        let im_end = library.token_to_id("<|im_end|>").unwrap();
        assert_eq!(config["eos_token_id"], json!(im_end));
        assert_eq!(config["vocab_size"].as_u64().unwrap() as usize, library.get_vocab_size(true));
        assert_eq!(read(&w, "out/generation_config.json")["eos_token_id"][0], json!(im_end));
        // Evaluation, generation and merging find the tokenizer in the folder.
        let eval = |words: &str| {
            ok(w.shell(&format!("ringtune eval --dataset_paths rows.jsonl --output r.json --quiet {words}")));
            read(&w, "r.json")["all"]["loss"].as_f64().unwrap()
        };
        let loss = eval("--model_path out");
        assert!((eval("--model_path out --no_lora") - loss).abs() < 1e-4);
        assert_eq!(eval("--model_path out --tokenizer_path tok/tokenizer.json"), loss, "grown again in the same way");
        assert_eq!(eval("--model_path out --tokenizer_path tok"), loss);
        let answer = ok(w.shell("ringtune generate --model-path out --greedy --max-new-tokens 6 --json 'What is AI?'"));
        let one: Value = serde_json::from_str(&answer.stdout).unwrap();
        let merged =
            ok(w.shell("ringtune generate --model-path out/merged --greedy --max-new-tokens 6 --json 'What is AI?'"));
        assert_eq!(serde_json::from_str::<Value>(&merged.stdout).unwrap()["ids"], one["ids"]);
        ok(w.shell("ringtune merge --model-path out --output-dir again"));
        for name in ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
            assert_eq!(
                fs::read(w.path("again").join(name)).unwrap(),
                fs::read(w.path("out/merged").join(name)).unwrap(),
                "{name}"
            );
        }
        // And the rest: packing, inspecting, checking, training on.
        ok(w.shell("ringtune pack --tokenizer_path tok --dataset_paths rows.jsonl --output rows.tok"));
        ok(w.shell("ringtune inspect file rows.tok --tokenizer tok/tokenizer.json"));
        ok(w.shell("ringtune inspect file tok/tokenizer.json"));
        ok(w.shell("ringtune inspect rows --tokenizer_path tok/tokenizer.json --dataset_paths rows.tok --json"));
        ok(w.shell("ringtune inspect packs --tokenizer_path tok --dataset_paths rows.jsonl"));
        w.write("strings.json", r#"["Hello", "a <|im_end|> b"]"#);
        ok(w.shell("ringtune inspect tokens --tokenizer tok/tokenizer.json --strings strings.json"));
        ok(w.shell(
            "ringtune check --model_path tiny/final --dataset_paths rows.jsonl --max_seq_len 96 --output_dir checked",
        ));
        ok(w.shell(&format!("{sft} --output_dir more").replace("tiny/final", "out/merged")));
        assert!(!w.path("more/resized_base").exists(), "what was grown is not grown again");
        // A token file made with another tokenizer is refused.
        fails(
            &w.shell("ringtune eval --model_path out --tokenizer_path tests.model --dataset_paths rows.tok"),
            1,
            &["tests.model"],
        );
        let other = if style == Style::Qwen { Style::Llama3 } else { Style::Qwen };
        write(other, &w.path("other"));
        fails(
            &w.shell("ringtune pack --tokenizer_path other --dataset_paths rows.tok --output x.tok"),
            1,
            &["rows.tok", "tokenizer"],
        );
    }
}

/// Same text, same tokens: merges are never left out by chance, in training or in the file that is written.
/// The library's decoder for end-of-word suffixes counts down from the last token before it looks for one.
#[test]
fn a_decoder_that_panics_without_tokens_is_never_asked() {
    let (_dir, path) = folder(Style::Llama3);
    let file = path.join("tokenizer.json");
    let mut json: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    json["decoder"] = json!({"type": "BPEDecoder", "suffix": "</w>"});
    fs::write(&file, json.to_string()).unwrap();
    let t = open(&path);
    assert_eq!(t.decode_raw(&[]).unwrap(), "");
    assert_eq!(t.decode(&[t.special().eos], Specials::Skip), "");
}

/// Editors of some systems put a byte order mark before what they save.
#[test]
fn files_with_a_byte_order_mark_are_read() {
    let (_dir, path) = folder(Style::Llama3);
    let plain = open(&path);
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        let file = path.join(name);
        fs::write(&file, ["\u{feff}".as_bytes(), &fs::read(&file).unwrap()].concat()).unwrap();
    }
    let marked = open(&path);
    assert_eq!((marked.special(), marked.hash()), (plain.special(), plain.hash()));
    let config = path.join("text.json");
    fs::write(&config, "\u{feff}{}").unwrap();
    assert_eq!(ringtune::files::read_text(&config, 10).unwrap(), "{}");
    fs::write(&config, [0xff, 0xfe, b'{', 0]).unwrap();
    let e = ringtune::files::read_text(&config, 10).unwrap_err().to_string();
    assert!(e.contains("this is UTF-16 text"), "{e}");
}

#[test]
fn bpe_dropout_is_off_and_said() {
    let (dir, path) = folder(Style::Llama3);
    let plain = open(&path);
    let mut file = tokenizer_json(Style::Llama3);
    file["model"]["dropout"] = json!(0.9);
    fs::write(path.join("tokenizer.json"), file.to_string()).unwrap();
    let t = open(&path);
    let text = "The river is small, and it has a name.";
    for _ in 0..5 {
        assert_eq!(t.encode(text).unwrap(), plain.encode(text).unwrap());
    }
    assert!(t.warnings().iter().any(|w| w.contains("BPE dropout 0.9 is taken as 0")), "{:?}", t.warnings());
    let out = dir.path().join("out");
    Companions::new(t.into(), None, 512).write(&out).unwrap();
    let written: Value = serde_json::from_slice(&fs::read(out.join("tokenizer.json")).unwrap()).unwrap();
    assert_eq!(written["model"]["dropout"], Value::Null);
}

/// Bytes that a byte-level vocabulary lacks vanish without a token; a vocabulary that has all raises no alarm.
#[test]
fn bytes_without_a_token_are_named_and_rows_that_lose_them_are_counted() {
    let (_dir, path) = folder(Style::Llama3);
    assert_eq!(open(&path).unknown_characters(), None);
    let mut file = tokenizer_json(Style::Llama3);
    let vocab = file["model"]["vocab"].as_object_mut().unwrap();
    for (byte, other) in [("\u{104}", "\u{2603}a"), ("\u{106}", "\u{2603}b")] {
        let id = vocab.remove(byte).expect("the byte's piece");
        vocab.insert(other.to_string(), id);
    }
    fs::write(path.join("tokenizer.json"), file.to_string()).unwrap();
    let t = open(&path);
    let what = t.unknown_characters().unwrap();
    assert_eq!(what, "no token for the bytes 0x04 and 0x06, so characters with them are dropped without a token");
    assert!(!t.unknown_advice().contains("--byte_fallback"));
    assert!(t.drops('\u{4}').unwrap() && !t.drops('a').unwrap() && !t.drops('é').unwrap());
    let w = place(Style::Llama3);
    fs::write(w.path("tiny/final/tokenizer.json"), file.to_string()).unwrap();
    w.write(
        "rows.jsonl",
        "{\"prompt\": \"a\\u0004\", \"response\": \"b\"}\n{\"prompt\": \"a\", \"response\": \"b\"}\n",
    );
    let line = "ringtune check --model_path tiny/final --dataset_paths rows.jsonl --max_seq_len 96 --val_fraction 0 --output_dir c --json";
    let report: Value = serde_json::from_str(&w.shell(line).stdout).unwrap();
    assert_eq!(report["data"]["lost"][0]["unknown"], json!(1), "{report:#}");
    let codes: Vec<&str> = report["warnings"].as_array().unwrap().iter().map(|f| f["code"].as_str().unwrap()).collect();
    assert!(codes.contains(&"unknown-characters") && codes.contains(&"byte-fallback"), "{codes:?}");
}

/// A tokenizer that is named is held to the one that lies with the model: other ids are an error, other pieces are said.
#[test]
fn a_named_tokenizer_is_compared_with_the_models_own() {
    let w = Workplace::new();
    for file in ["config.json", "model.safetensors"] {
        w.copy(&format!("tests/data/model/tiny-llama-tied/{file}"), &format!("model/{file}"));
    }
    w.copy("tests/data/tokenizer/spm4k.model", "model/tokenizer.model");
    w.copy("tests/data/tokenizer/spm4k.model", "same.model");
    w.copy("tests/data/tokenizer/spm4k_unigram.model", "other.model");
    w.write("rows.jsonl", first_rows("data/demo/chat.jsonl", 20));
    let sft = "sft --dataset-paths rows.jsonl --max-seq-len 64 --max-steps 1 --output-dir";
    let found =
        ["vocabulary mismatch: other.model (4096 pieces, hash", "the model's own model", "leave --tokenizer-path out"];
    fails(&w.shell(&format!("ringtune {sft} out --model-path model --tokenizer-path other.model")), 1, &found);
    let eval = "ringtune eval --dataset-paths rows.jsonl --max-eval-samples 2 --model-path";
    fails(&w.shell(&format!("{eval} model --tokenizer-path other.model")), 1, &found);

    let chatml = "--prompt-template chatml --merge-adapters";
    let outcome = ok(w.shell(&format!("ringtune {sft} out --model-path model --tokenizer-path same.model {chatml}")));
    assert!(!outcome.stderr.contains("another tokenizer"), "{}", outcome.stderr);
    // What a training added does not count: the file has the same pieces.
    ok(w.shell(&format!("{eval} out --tokenizer-path same.model")));

    let w = place(Style::Llama3);
    let mut file = tokenizer_json(Style::Llama3);
    let vocab = file["model"]["vocab"].as_object_mut().unwrap();
    let id = vocab.remove("\u{104}").expect("the byte's piece");
    vocab.insert("\u{2603}a".into(), id);
    w.write("changed/tokenizer.json", file.to_string());
    w.write("rows.jsonl", first_rows("data/demo/chat.jsonl", 20));
    let line = "ringtune check --model_path tiny/final --tokenizer_path changed --dataset_paths rows.jsonl --max_seq_len 96 --output_dir c --json";
    let report: Value = serde_json::from_str(&w.shell(line).stdout).unwrap();
    let said: Vec<&str> = report["warnings"].as_array().unwrap().iter().filter_map(|f| f["what"].as_str()).collect();
    assert!(
        said.iter().any(|s| s.contains("another tokenizer than the model's own") && s.contains("hash")),
        "{said:?}"
    );
}
