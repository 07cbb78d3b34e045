//! Every parser of bytes that ringtune did not make itself, each as a function of bytes that must end: with a value or an
//! error, never with a panic, a loop, or memory that the input only claims to need.
//!
//! Fuzz targets and the bounded run in `tests/it/hostile.rs` share this file and the seeds.

use std::cell::OnceCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ringtune::checkpoint::manifest;
use ringtune::checkpoint::state::Fingerprints;
use ringtune::commands::report::parse_metrics;
use ringtune::commands::start::new_model_config;
use ringtune::data::columns::Columns;
use ringtune::data::encode::{Overflow, encode_rendered};
use ringtune::data::jsonl::{BadRows, RowOptions, parse_rows, read_rows};
use ringtune::data::mix::WeightUnit;
use ringtune::data::pretrain::{self, PretrainDataSpec};
use ringtune::data::progress::Progress;
use ringtune::data::raw_tokens::{RawTokens, RawWidth};
use ringtune::data::row::{Message, Role};
use ringtune::data::sft::{RowSpec, token_file_of};
use ringtune::data::template::cases::render_cases;
use ringtune::data::template::{Purpose, Template, TemplateOptions};
use ringtune::data::token_file::TokenFile;
use ringtune::data::tokenizer::{SpecialIds, Specials, Tokenizer, named_tokens};
use ringtune::datasets::{self, Dataset, Paths, PrepareSpec};
use ringtune::hf::config as hf_config;
use ringtune::hf::peft::Adapter;
use ringtune::hf::safetensors::{ModelFiles, TensorFile};
use ringtune::hf::tokenizer_json::tokenizer_json;
use ringtune::hub::{DataName, Listing, choose};
use ringtune::model::weights::Product;
use ringtune::settings::TrainSettings;
use ringtune::train::checkpoints::read_state;
use ringtune::train::state::RunState;
use ringtune::words::Words;

use crate::seeds::{
    adapter_config_seeds, added_token_seeds, alpaca_seeds, config_seeds, conversation_seeds, dolly_seeds, file,
    hub_card_seeds, hub_listing_seeds, jinja_seeds, manifest_seeds, metrics_seeds, oasst_seeds, raw_token_seeds,
    row_seeds, run_record_seeds, safetensors_seeds, sentencepiece_seeds, settings_file_seeds, shard_index_seeds,
    table_seeds, text_jsonl_seeds, text_seeds, token_file_seeds, tokenizer_config_seeds, tokenizer_json_seeds,
    trainer_state_seeds,
};

/// A parser and how its input looks.
#[derive(Clone, Copy)]
pub struct Parser {
    /// Name of the fuzz target.
    pub name: &'static str,
    /// The parser.
    pub run: fn(&[u8]),
    /// Inputs that it takes, to start from.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const ALL: &[Parser] = &[
    Parser { name: "jsonl_rows", run: jsonl_rows, seeds: row_seeds },
    Parser { name: "token_file", run: token_file, seeds: token_file_seeds },
    Parser { name: "raw_tokens", run: raw_tokens, seeds: raw_token_seeds },
    Parser { name: "safetensors", run: safetensors, seeds: safetensors_seeds },
    Parser { name: "shard_index", run: shard_index, seeds: shard_index_seeds },
    Parser { name: "config_json", run: config_json, seeds: config_seeds },
    Parser { name: "adapter_config", run: adapter_config, seeds: adapter_config_seeds },
    Parser { name: "sentencepiece", run: sentencepiece, seeds: sentencepiece_seeds },
    Parser { name: "tokenizer_json_input", run: tokenizer_json_input, seeds: tokenizer_json_seeds },
    Parser { name: "tokenizer_config", run: tokenizer_config, seeds: tokenizer_config_seeds },
    Parser { name: "added_tokens", run: added_tokens, seeds: added_token_seeds },
    Parser { name: "manifest", run: manifest_json, seeds: manifest_seeds },
    Parser { name: "trainer_state", run: trainer_state, seeds: trainer_state_seeds },
    Parser { name: "settings_file", run: settings_file, seeds: settings_file_seeds },
    Parser { name: "jinja", run: jinja, seeds: jinja_seeds },
    Parser { name: "dolly", run: dolly, seeds: dolly_seeds },
    Parser { name: "oasst", run: oasst, seeds: oasst_seeds },
    Parser { name: "alpaca", run: alpaca, seeds: alpaca_seeds },
    Parser { name: "tables", run: tables, seeds: table_seeds },
    Parser { name: "encoded_rows", run: encoded_rows, seeds: row_seeds },
    Parser { name: "pretrain_text", run: pretrain_text, seeds: text_seeds },
    Parser { name: "pretrain_jsonl", run: pretrain_jsonl, seeds: text_jsonl_seeds },
    Parser { name: "conversations", run: conversations, seeds: conversation_seeds },
    Parser { name: "metrics", run: metrics, seeds: metrics_seeds },
    Parser { name: "run_record", run: run_record, seeds: run_record_seeds },
    Parser { name: "hub_listing", run: hub_listing, seeds: hub_listing_seeds },
    Parser { name: "hub_card", run: hub_card, seeds: hub_card_seeds },
];

/// The parser of a name.
///
/// # Panics
/// If there is none.
pub fn by_name(name: &str) -> Parser {
    let found = ALL.iter().find(|p| p.name == name);
    *found.unwrap_or_else(|| panic!("no parser {name}"))
}

/// A folder of this thread, in memory where there is such a file system, for parsers that read files.
pub fn scratch() -> PathBuf {
    thread_local! {
        static DIR: OnceCell<tempfile::TempDir> = const { OnceCell::new() };
    }
    let make = || {
        let memory = Path::new("/dev/shm");
        if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.expect("a temporary folder")
    };
    DIR.with(|d| d.get_or_init(make).path().to_path_buf())
}

/// The bytes as a file of this name.
fn as_file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = scratch().join(name);
    fs::create_dir_all(path.parent().expect("a folder")).expect("a folder can be made");
    fs::write(&path, bytes).expect("a file can be written");
    path
}

fn jsonl_rows(bytes: &[u8]) {
    for bad_rows in [BadRows::Fail, BadRows::Skip] {
        let options = RowOptions { max_line_bytes: 1 << 16, bad_rows, ..RowOptions::default() };
        if let Ok(rows) = parse_rows("rows.jsonl", bytes, &options) {
            for row in &rows.rows {
                std::hint::black_box((row.prompt(), row.response(), row.context()));
            }
        }
    }
}

/// Rows of a table: a Parquet file where the bytes begin as one, else CSV, with a column under another name.
fn tables(bytes: &[u8]) {
    let path = as_file("tables/rows.csv", bytes);
    for pairs in [Vec::new(), vec!["prompt=instruction".to_string(), "response=output".to_string()]] {
        let columns = Columns::parse(&pairs).expect("they are fields");
        let options = RowOptions { max_line_bytes: 1 << 16, bad_rows: BadRows::Skip, columns };
        if let Ok(rows) = read_rows(&path, &options) {
            assert!(rows.rows.iter().all(|row| !row.messages.is_empty()));
        }
    }
}

/// As it is, and with a checksum that is right, so that what lies behind it is reached.
fn token_file(bytes: &[u8]) {
    let open = |bytes: &[u8]| {
        let Ok(f) = TokenFile::open(&as_file("x.tok", bytes)) else {
            return;
        };
        for doc in 0..f.n_docs() {
            let info = f.info(doc);
            f.visit(doc, 0, f.doc_len(doc), |token, supervised| {
                std::hint::black_box((token, supervised, info));
            });
        }
    };
    open(bytes);
    if bytes.len() >= 152 {
        let mut mended = bytes.to_vec();
        let mut h = blake3::Hasher::new();
        h.update(&bytes[..120]).update(&bytes[152..]);
        mended[120..152].copy_from_slice(h.finalize().as_bytes());
        open(&mended);
    }
}

fn raw_tokens(bytes: &[u8]) {
    let path = as_file("x.bin", bytes);
    for width in [None, Some(RawWidth::U16), Some(RawWidth::U32)] {
        let Ok(raw) = RawTokens::open(&path, 300, 3, width) else {
            continue;
        };
        for doc in 0..raw.n_docs() {
            raw.visit(doc, 0, raw.doc_len(doc), |token, supervised| {
                std::hint::black_box((token, supervised));
            });
        }
    }
}

/// As it is, and with a header length that fits, so that changes of the header's text are reached.
fn safetensors(bytes: &[u8]) {
    let open = |bytes: &[u8]| {
        let path = as_file("x.safetensors", bytes);
        let Ok(f) = TensorFile::open(&path) else { return };
        let names: Vec<String> = f.names().map(String::from).collect();
        for name in names {
            std::hint::black_box((f.info(&name), f.load(&name).is_ok()));
        }
    };
    open(bytes);
    if let Some(end) = bytes.iter().rposition(|&b| b == b'}').filter(|&end| end > 8) {
        let mut mended = bytes.to_vec();
        mended[..8].copy_from_slice(&(end as u64 + 1 - 8).to_le_bytes());
        open(&mended);
    }
}

fn shard_index(bytes: &[u8]) {
    as_file("model/config.json", &file("tests/data/model/tiny-llama-tied/config.json"));
    as_file("model/model-00001-of-00002.safetensors", &safetensors_seeds()[1]);
    let path = as_file("model/model.safetensors.index.json", bytes);
    std::hint::black_box(ModelFiles::open(path.parent().expect("a folder")).is_ok());
}

fn config_json(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(config) = hf_config::parse(text) {
        // What a model of such a shape would need is only counted.
        let c = &config.model;
        std::hint::black_box((c.q_dim(), c.kv_dim(), c.n_layers));
    }
    std::hint::black_box(new_model_config(text, &small_tokenizer()).is_ok());
}

/// The configuration beside weights that fit, and weights beside a configuration that fits.
fn adapter_config(bytes: &[u8]) {
    const GOLDEN: &str = "tests/data/golden/tiny-llama-tied/adapter_all";
    as_file("adapter/adapter_model.safetensors", &file(&format!("{GOLDEN}/adapter_model.safetensors")));
    let path = as_file("adapter/adapter_config.json", bytes);
    let Ok(adapter) = Adapter::open(path.parent().expect("a folder")) else {
        return;
    };
    std::hint::black_box((
        adapter.config.lora.scale(),
        adapter.lora(0, Product::Q).is_ok(),
        adapter.lora(usize::MAX, Product::Down).is_ok(),
    ));
}

/// Loading, the text of a hostile row, and the export.
fn sentencepiece(bytes: &[u8]) {
    let Ok(mut t) = Tokenizer::from_bytes("x.model", bytes.to_vec(), SpecialIds::default()) else {
        return;
    };
    t.add_chatml();
    for text in ["Hello,  world\n", "<|im_end|></s>", "é\u{1f642}\0\u{fffd}", ""] {
        if let Ok(ids) = t.encode(text) {
            assert!(!ids.iter().any(|&id| t.is_control(id)), "a control token came from text");
            std::hint::black_box(t.decode(&ids, Specials::Show));
        }
    }
    std::hint::black_box((t.newline_id().is_ok(), tokenizer_json(t.bytes(), &[]).is_ok()));
}

/// A `tokenizer.json` as input, and the text of a hostile row.
fn tokenizer_json_input(bytes: &[u8]) {
    open_folder(&as_file("hugging/tokenizer.json", bytes));
}

/// What stands beside one.
fn tokenizer_config(bytes: &[u8]) {
    for name in ["tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json"] {
        as_file(&format!("beside/{name}"), bytes);
    }
    open_folder(&as_file("beside/tokenizer.json", &tokenizer_json_seeds()[0]));
}

fn open_folder(path: &Path) {
    let Ok(mut t) = Tokenizer::open(path, SpecialIds::default()) else {
        return;
    };
    t.add_chatml();
    for text in ["Hello,  world\n", "<|im_end|></s>", "é\u{1f642}\0\u{fffd}", ""] {
        if let Ok(ids) = t.encode(text) {
            assert!(!ids.iter().any(|&id| t.is_control(id)), "a control token came from text");
            std::hint::black_box(t.decode(&ids, Specials::Show));
        }
    }
    std::hint::black_box(t.newline_id().is_ok());
}

fn added_tokens(bytes: &[u8]) {
    let path = as_file("added/added_tokens.json", bytes);
    std::hint::black_box(named_tokens(path.parent().expect("a folder")).is_ok());
}

fn manifest_json(bytes: &[u8]) {
    as_file("run/checkpoint-2/a.txt", b"abc");
    let path = as_file("run/checkpoint-2/manifest.json", bytes);
    let checkpoint = path.parent().expect("a folder");
    if manifest::verify(checkpoint).is_ok() {
        assert_eq!(fs::read(checkpoint.join("a.txt")).ok().as_deref(), Some(&b"abc"[..]));
    }
    std::hint::black_box(manifest::find_newest(&scratch().join("run")).is_ok());
}

fn trainer_state(bytes: &[u8]) {
    let path = as_file("state/trainer_state.json", bytes);
    let now = Fingerprints([("data".to_string(), "abc".to_string())].into());
    let settings = TrainSettings { allow_changed: vec!["data".into()], ..TrainSettings::default() };
    std::hint::black_box(read_state(path.parent().expect("a folder"), &now, &settings, u64::MAX).is_ok());
    std::hint::black_box(RunState::read(&path).is_ok());
}

fn settings_file(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    std::hint::black_box(ringtune::settings::read_file(text, "c.json").is_ok());
}

fn jinja(bytes: &[u8]) {
    let Ok(source) = std::str::from_utf8(bytes) else { return };
    let Ok(template) = Template::from_jinja("x", source, TemplateOptions::default()) else {
        return;
    };
    let talk = [
        Message::new(Role::System, "be brief"),
        Message::new(Role::User, "a <|im_end|> b"),
        Message::new(Role::Assistant, "c"),
    ];
    for purpose in [Purpose::Train, Purpose::Generate] {
        if let Ok(rendered) = template.render(&talk, purpose) {
            std::hint::black_box(rendered.text_and_spans(template.names()));
            std::hint::black_box(encode_rendered(&small_tokenizer(), &rendered).is_ok());
        }
    }
}

/// Opened once: a template is tried some thousand times.
fn small_tokenizer() -> Arc<Tokenizer> {
    thread_local! {
        static TOKENIZER: Arc<Tokenizer> = {
            let bytes = sentencepiece_seeds().swap_remove(1);
            let mut t = Tokenizer::from_bytes("seed", bytes, SpecialIds::default()).expect("the seed loads");
            t.add_chatml();
            Arc::new(t)
        };
    }
    TOKENIZER.with(Arc::clone)
}

/// Reads an upstream file of a data set and writes its rows.
fn prepare_one(dataset: Dataset, name: &str, bytes: &[u8]) {
    let source = as_file(&format!("from_{}/{name}", dataset.word()), bytes);
    for multi_turn in [false, true] {
        let spec = PrepareSpec {
            datasets: vec![dataset],
            output_dir: scratch().join("prepared"),
            source_dir: Some(source.parent().expect("a folder").to_path_buf()),
            cache_dir: None,
            multi_turn,
            paths: if multi_turn { Paths::All } else { Paths::Best },
        };
        std::hint::black_box(datasets::run(&spec).is_ok());
        if dataset != Dataset::Oasst1 {
            break;
        }
    }
}

fn dolly(bytes: &[u8]) {
    prepare_one(Dataset::Dolly15k, "databricks-dolly-15k.jsonl", bytes);
}

fn oasst(bytes: &[u8]) {
    prepare_one(Dataset::Oasst1, "oasst.jsonl", bytes);
}

fn alpaca(bytes: &[u8]) {
    prepare_one(Dataset::Alpaca, "alpaca", bytes);
}

/// Rows to a token file: template, tokenizer, cutting, and the file read back.
fn encoded_rows(bytes: &[u8]) {
    let path = as_file("encoded/rows.jsonl", bytes);
    let t = small_tokenizer();
    let template = Template::load("chatml", TemplateOptions::default()).expect("built in");
    for (overflow, bad_rows) in [(Overflow::Truncate, BadRows::Skip), (Overflow::Drop, BadRows::Fail)] {
        let spec = RowSpec {
            max_seq_len: 48,
            overflow,
            rows: RowOptions { bad_rows, ..RowOptions::default() },
            skip_log: None,
            cache_dir: scratch().join("encoded"),
        };
        if let Ok(f) = token_file_of(&path, &spec, &t, &template, Progress::Hide, &mut |_| ()) {
            assert!((0..f.n_docs()).all(|d| f.doc_len(d) <= 48 && f.info(d).n_targets > 0));
            fs::remove_file(f.path()).expect("it can be removed");
        }
    }
}

/// A text of pretraining, and JSON Lines of it.
fn pretrain_text(bytes: &[u8]) {
    text_as("text/x.txt", bytes);
}

fn pretrain_jsonl(bytes: &[u8]) {
    text_as("text/x.jsonl", bytes);
}

fn text_as(name: &str, bytes: &[u8]) {
    let path = as_file(name, bytes);
    let spec = PretrainDataSpec {
        paths: vec![path.clone()],
        val_paths: Vec::new(),
        weights: None,
        weight_unit: WeightUnit::Samples,
        epoch_samples: None,
        val_fraction: 0.1,
        max_seq_len: 16,
        packing: true,
        seed: 1,
        columns: Columns::default(),
        raw_width: None,
        cache_dir: scratch().join("text"),
    };
    if let Ok(data) = pretrain::tokenise(&spec, &small_tokenizer(), Progress::Hide, &mut |_| ()) {
        assert!(data.train.sets().iter().all(|s| s.pieces.iter().all(|p| p.len <= 16 && p.len > 1)));
    }
    for entry in fs::read_dir(scratch().join("text")).into_iter().flatten().flatten() {
        if entry.path().extension().is_some_and(|e| e == "tok") {
            fs::remove_file(entry.path()).expect("it can be removed");
        }
    }
}

/// The conversations of `inspect templates`.
fn conversations(bytes: &[u8]) {
    std::hint::black_box(render_cases(bytes, None, &TemplateOptions::default()).is_ok());
}

/// A run's figures, and the page that shows them.
fn metrics(bytes: &[u8]) {
    let read = parse_metrics(bytes);
    assert!(read.steps.iter().all(|p| p.step >= 0.0 && p.tokens.is_finite()));
    let path = as_file("figures/metrics.jsonl", bytes);
    page_of(path.parent().expect("a folder"));
}

/// What a run is made of and its samples, beside figures that can be read.
fn run_record(bytes: &[u8]) {
    as_file("record/metrics.jsonl", &metrics_seeds()[1]);
    as_file("record/samples.json", bytes);
    as_file("record/trainer_state.json", bytes);
    let path = as_file("record/run.json", bytes);
    page_of(path.parent().expect("a folder"));
}

/// What the hub says of a repository: no file of it may lie outside the folder that it is fetched into.
fn hub_listing(bytes: &[u8]) {
    let Ok(listing) = Listing::from_api(&String::from_utf8_lossy(bytes)) else { return };
    for entry in &listing.entries {
        let inside = |c| matches!(c, std::path::Component::Normal(_));
        assert!(Path::new(&entry.path).components().all(inside) && !entry.path.is_empty());
        assert!(entry.etag.as_deref().is_none_or(|tag| !tag.contains('/') && !tag.starts_with('.')));
    }
}

/// The card of a data set: what it chooses is among the files that there are.
fn hub_card(bytes: &[u8]) {
    let files =
        ["README.md", "a/train-00000-of-00002.parquet", "a/train-00001-of-00002.parquet", "b/test.jsonl", "c.csv"];
    let card = String::from_utf8_lossy(bytes);
    for name in ["hf:o/r", "hf:o/r/en:test", "hf:o/r/b"] {
        let name = DataName::parse(name).expect("a name").expect("of the hub");
        if let Ok(chosen) = choose(&name, &files, Some(&card)) {
            assert!(!chosen.is_empty() && chosen.iter().all(|f| files.contains(&f.as_str())));
        }
    }
}

/// Whatever the files say, the page holds its own two scripts and no element of theirs.
fn page_of(dir: &Path) {
    let to = scratch().join("report.html");
    if let Ok(page) = ringtune::commands::report::html_of(&[dir.to_path_buf()]) {
        assert_eq!(page.matches("<script").count(), 2, "an element of a file is in the page");
        fs::write(to, page).expect("a file can be written");
    }
}
