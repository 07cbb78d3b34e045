//! `ringtune inspect file`: what a file or folder is, its shapes and hashes, and a preview.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::bail;
use crate::checkpoint::manifest;
use crate::checkpoint::manifest::{MANIFEST, hash_file};
use crate::data::encode::Encoded;
use crate::data::jsonl::{RowOptions, read_rows};
use crate::data::token_file::TokenFile;
use crate::data::tokenizer::{SpecialIds, Specials, Tokenizer};
use crate::error::{Context, Result};
use crate::files::{nearby, open_file, parent, read_text};
use crate::hf::peft::{Adapter, AdapterConfig};
use crate::hf::safetensors::{ModelFiles, TensorFile};
use crate::hf::{TensorSource, peft};
use crate::log::metrics::METRICS;
use crate::model::weights::{Place, Weights};
use crate::say::Out;
use crate::say::visible;
use crate::text::{Style, bytes, grouped};

/// Rows or documents of a preview.
const PREVIEW: usize = 3;

/// What there is to say: one object about the whole, one for each part, and a preview as text.
struct Report {
    facts: Vec<(&'static str, Value)>,
    parts: Vec<Value>,
    preview: Vec<String>,
}

/// Prints what `path` is. With `json`: one line of facts, then one for each tensor or document of the preview.
///
/// # Errors
/// If nothing is there, or it is damaged, or of no kind that is known.
pub fn run(path: &Path, tokenizer: Option<&Path>, json: bool) -> Result<()> {
    let tokenizer = tokenizer.map(|t| Tokenizer::open(t, SpecialIds::default())).transpose()?;
    let report = report(path, tokenizer)?;
    let mut out = Out::new();
    if json {
        let mut facts = json!({"path": path.display().to_string()});
        for (name, value) in report.facts {
            facts[name] = value;
        }
        writeln!(out, "{facts}")?;
        for part in report.parts {
            writeln!(out, "{part}")?;
        }
    } else {
        let style = Style::stdout();
        writeln!(out, "{}", style.heading(&path.display().to_string()))?;
        for (name, value) in report.facts {
            let text = value.as_str().map_or_else(|| value.to_string(), String::from);
            writeln!(out, "  {:<20} {}", name.replace('_', " "), visible(&text))?;
        }
        for part in report.parts.iter().filter(|p| p.get("tensor").is_some()) {
            let shape = part["shape"].to_string();
            writeln!(
                out,
                "  {:<6} {shape:<16} {}",
                part["dtype"].as_str().unwrap_or(""),
                visible(part["tensor"].as_str().unwrap_or(""))
            )?;
        }
        for text in report.preview {
            writeln!(out, "\n{text}")?;
        }
    }
    out.flush()?;
    Ok(())
}

fn report(path: &Path, tokenizer: Option<Tokenizer>) -> Result<Report> {
    let name = || path.display().to_string();
    let meta = std::fs::metadata(path).context(name).map_err(|e| match nearby::near(path) {
        Some(near) => e.hint(&format!("did you mean {}?", near.display())),
        None => e,
    })?;
    if meta.is_dir() {
        return folder(path);
    }
    let mut head = [0u8; 16];
    let n = open_file(path)?.read(&mut head).context(name)?;
    let ending = path.extension().map(|e| e.to_string_lossy().into_owned()).unwrap_or_default();
    if TokenFile::is_token_file(&head[..n]) || ending == "tok" {
        return token_file(path, tokenizer);
    }
    let named = |name: &str| path.file_name().is_some_and(|f| f == name);
    match ending.as_str() {
        "jsonl" if named(METRICS) => metrics(path),
        "safetensors" => tensor_file(path),
        "jsonl" | "ndjson" | "gz" | "parquet" | "csv" | "tsv" => rows(path),
        "model" => tokenizer_file(path),
        "json" if path.file_name().is_some_and(|f| f == "tokenizer.json") => tokenizer_file(path),
        "json"
            if path.file_name().is_some_and(|f| f == MANIFEST || f == "config.json" || f == "adapter_config.json") =>
        {
            folder(&path.parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf))
        }
        "json" => rows(path),
        _ => bail!(
            "{}: expected a token file, .safetensors, .model, tokenizer.json, .jsonl, .parquet or .csv file, or the folder of a model, adapter or \
             checkpoint; found a file of {} that is none of them",
            path.display(),
            bytes(meta.len())
        ),
    }
}

fn folder(dir: &Path) -> Result<Report> {
    if dir.join(MANIFEST).is_file() {
        return checkpoint(dir);
    }
    if peft::is_adapter(dir) {
        return adapter(dir);
    }
    if dir.join("config.json").is_file() {
        return model(dir);
    }
    let checkpoints = manifest::list(dir)?;
    if let Some((_, newest)) = checkpoints.last() {
        let mut report = checkpoint(newest)?;
        let all: Vec<String> = checkpoints.iter().map(|c| c.1.display().to_string()).collect();
        report.facts.insert(0, ("checkpoints", json!(all)));
        report.facts.insert(1, ("shown", json!(newest.display().to_string())));
        return Ok(report);
    }
    if dir.join(METRICS).is_file() {
        return metrics(&dir.join(METRICS));
    }
    if Tokenizer::in_folder(dir).is_some() {
        return tokenizer_file(dir);
    }
    bail!(
        "{}: expected config.json (a model), adapter_config.json (an adapter) or {MANIFEST} (a checkpoint) in the folder, \
         found none",
        dir.display()
    )
}

fn token_file(path: &Path, mut tokenizer: Option<Tokenizer>) -> Result<Report> {
    let file = TokenFile::open(path)?;
    if let Some(t) = &mut tokenizer {
        file.expect(t.hash(), None)?;
        if file.vocab_size() > t.vocab_size() {
            t.add_chatml();
        }
    }
    let meta = file.meta();
    let supervised = 100.0 * file.n_supervised() as f64 / (file.n_tokens().max(1)) as f64;
    let facts = vec![
        ("kind", json!("token file")),
        ("documents", json!(file.n_docs())),
        ("tokens", json!(file.n_tokens())),
        ("supervised", json!(file.n_supervised())),
        ("supervised_percent", json!((supervised * 10.0).round() / 10.0)),
        ("longest", json!(meta.longest)),
        ("vocab_size", json!(file.vocab_size())),
        ("token_bytes", json!(file.token_bytes())),
        ("template", json!(meta.template)),
        ("sources", json!(meta.sources)),
        ("rows", json!(meta.counts)),
        ("settings", meta.settings.clone()),
        ("tokenizer_hash", json!(file.tokenizer_hash())),
        ("settings_hash", json!(file.settings_hash())),
        ("checksum", json!(file.checksum())),
    ];
    let style = Style::stdout();
    let (mut parts, mut preview) = (Vec::new(), Vec::new());
    for doc in 0..file.n_docs().min(PREVIEW) {
        let (info, encoded) = (file.info(doc), file.doc(doc));
        parts.push(json!({
            "document": doc, "line": info.line, "tokens": encoded.tokens, "supervised": encoded.supervised,
        }));
        let heading = format!("-- document {doc}, line {}, {} tokens", info.line, encoded.tokens.len());
        preview.push(format!("{}\n{}", style.heading(&heading), marked(&encoded, tokenizer.as_ref(), style)));
    }
    Ok(Report { facts, parts, preview })
}

/// A document's text, or its ids without a tokenizer; at most 400 tokens; what is trained marked.
fn marked(doc: &Encoded, tokenizer: Option<&Tokenizer>, style: Style) -> String {
    let n = doc.tokens.len().min(400);
    let mut out = String::new();
    let mut start = 0;
    for end in 1..=n {
        if end < n && doc.supervised[end] == doc.supervised[start] {
            continue;
        }
        let ids = &doc.tokens[start..end];
        let text = match tokenizer {
            Some(t) => t.decode(ids, Specials::Show),
            None => ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" "),
        };
        out += &if doc.supervised[start] { style.trained(&text) } else { style.context(&text) };
        if tokenizer.is_none() {
            out.push(' ');
        }
        start = end;
    }
    if n < doc.tokens.len() {
        out += "…";
    }
    out
}

fn tensors(file: &TensorFile) -> (u64, Vec<Value>) {
    let mut count = 0;
    let line = |name: &str| {
        let (shape, dtype) = file.info(name).expect("the name is in the file");
        count += shape.iter().map(|&d| d as u64).product::<u64>();
        json!({"tensor": name, "shape": shape, "dtype": dtype})
    };
    let parts = file.names().map(line).collect();
    (count, parts)
}

fn tensor_file(path: &Path) -> Result<Report> {
    let file = TensorFile::open(path)?;
    let (count, parts) = tensors(&file);
    let facts = vec![
        ("kind", json!("safetensors file")),
        ("tensors", json!(parts.len())),
        ("parameters", json!(count)),
        ("bytes", json!(std::fs::metadata(path)?.len())),
        ("metadata", json!(file.metadata())),
        ("blake3", json!(hash_file(path)?)),
    ];
    Ok(Report { facts, parts, preview: Vec::new() })
}

fn model(dir: &Path) -> Result<Report> {
    let files = ModelFiles::open(dir)?;
    let c = files.config();
    let mut facts = vec![
        ("kind", json!("model")),
        ("architecture", json!(c.architecture.to_string())),
        ("parameters", json!(grouped(Weights::count(c)))),
        ("layers", json!(c.n_layers)),
        ("hidden_size", json!(c.hidden_size)),
        ("intermediate_size", json!(c.intermediate_size)),
        ("heads", json!(format!("{} query, {} key-value, of {}", c.heads.n_query, c.heads.n_kv, c.heads.head_dim))),
        ("vocab_size", json!(c.vocab_size)),
        ("max_position", json!(c.max_position)),
        ("rope", json!(format!("theta {}, {}", c.rope_theta, c.rope_scaling))),
        ("tied", json!(c.tied)),
        ("dtype", json!(files.dtype().torch_name())),
        ("files", json!(files.n_files())),
        ("bytes", json!(files.bytes())),
    ];
    let mut shards: Vec<PathBuf> = std::fs::read_dir(dir)?
        .filter_map(|e| e.ok().map(|e| e.path()))
        .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    shards.sort();
    let mut hashes = serde_json::Map::new();
    for shard in shards {
        let name = shard.file_name().unwrap_or_default().to_string_lossy().into_owned();
        hashes.insert(name, json!(hash_file(&shard)?));
    }
    facts.push(("blake3", Value::Object(hashes)));
    for warning in &files.hf_config().warnings {
        facts.push(("note", json!(warning)));
    }
    let dtype = files.dtype().torch_name();
    let part = |at: Place| json!({"tensor": at.to_string(), "shape": at.file_shape(c, 0), "dtype": dtype});
    let parts = Weights::of(c).places().into_iter().map(|(at, _)| part(at)).collect();
    Ok(Report { facts, parts, preview: Vec::new() })
}

fn adapter(dir: &Path) -> Result<Report> {
    let adapter = Adapter::open(dir)?;
    let weights = dir.join("adapter_model.safetensors");
    let (count, parts) = tensors(&TensorFile::open(&weights)?);
    let AdapterConfig { lora, base, revision } = &adapter.config;
    let facts = vec![
        ("kind", json!("adapter")),
        ("rank", json!(lora.r)),
        ("alpha", json!(lora.alpha)),
        ("scale", json!(lora.scale())),
        ("targets", json!(lora.targets.iter().map(|p| p.name()).collect::<Vec<_>>())),
        ("base", json!(base)),
        ("base_revision", json!(revision.as_deref().unwrap_or("none named"))),
        ("parameters", json!(grouped(count))),
        ("blake3", json!(hash_file(&weights)?)),
    ];
    Ok(Report { facts, parts, preview: Vec::new() })
}

fn checkpoint(dir: &Path) -> Result<Report> {
    let m = manifest::verify(dir)?;
    let files: serde_json::Map<String, Value> =
        m.files.iter().map(|(name, f)| (name.clone(), json!({"bytes": f.bytes, "blake3": f.blake3}))).collect();
    let mut facts = vec![
        ("kind", json!("checkpoint")),
        ("step", json!(m.step)),
        ("verified", json!(format!("{} files agree with {MANIFEST}", m.files.len()))),
        ("files", Value::Object(files)),
    ];
    let inner = match (peft::is_adapter(dir), dir.join("config.json").is_file()) {
        (true, _) => Some(adapter(dir)?),
        (_, true) => Some(model(dir)?),
        _ => None,
    };
    let parts = inner.map_or_else(Vec::new, |report| {
        facts.push(("holds", report.facts[0].1.clone()));
        facts.extend(report.facts.into_iter().skip(1).filter(|f| f.0 != "files" && f.0 != "blake3"));
        report.parts
    });
    Ok(Report { facts, parts, preview: Vec::new() })
}

/// The figures of a run's steps and evaluations.
fn metrics(path: &Path) -> Result<Report> {
    let text = read_text(path, 1 << 30)?;
    let lines: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let last = |key: &str| lines.iter().rev().find_map(|line| line[key].as_f64());
    let least = |key: &str| lines.iter().filter_map(|line| line[key].as_f64()).reduce(f64::min);
    let count = |key: &str| lines.iter().filter(|line| !line[key].is_null()).count();
    let mut facts = vec![
        ("kind", json!("metrics of a run")),
        ("steps", json!(count("loss"))),
        ("evaluations", json!(count("eval_loss"))),
        ("skipped_steps", json!(count("skipped"))),
    ];
    let figures = [
        ("last_step", last("step")),
        ("last_loss", last("loss")),
        ("last_eval_loss", last("eval_loss")),
        ("best_eval_loss", least("eval_loss")),
        ("tokens_per_second", last("tokens_per_second")),
    ];
    facts.extend(figures.into_iter().filter_map(|(name, value)| Some((name, json!(value?)))));
    let dir = parent(path);
    facts.push(("curves", json!(format!("`ringtune report {}` draws them", dir.display()))));
    Ok(Report { facts, parts: Vec::new(), preview: Vec::new() })
}

fn rows(path: &Path) -> Result<Report> {
    let file = read_rows(path, &RowOptions::default())?;
    let facts = vec![
        ("kind", json!("rows")),
        ("form", json!(file.form())),
        ("rows", json!(file.rows.len())),
        ("blank_lines", json!(file.blank_lines)),
        ("blake3", json!(hash_file(path)?)),
    ];
    let style = Style::stdout();
    let (mut parts, mut preview) = (Vec::new(), Vec::new());
    for row in file.rows.iter().take(PREVIEW) {
        parts.push(json!({"line": row.line, "prompt": row.prompt(), "response": row.response()}));
        preview.push(format!("{}\n{}", style.context(row.prompt()), style.trained(row.response())));
    }
    Ok(Report { facts, parts, preview })
}

fn tokenizer_file(path: &Path) -> Result<Report> {
    let t = Tokenizer::open(path, SpecialIds::default())?;
    let s = t.special();
    let mut facts = vec![
        ("kind", json!("tokenizer")),
        ("model_type", json!(format!("{:?}", t.model_type()).to_lowercase())),
        ("pieces", json!(t.pieces().len())),
        ("special_ids", json!({"pad": s.pad, "unk": s.unk, "bos": s.bos, "eos": s.eos})),
        ("newline", json!(t.newline().to_string())),
        ("byte_fallback", json!(t.byte_ids().is_some())),
        ("blake3", json!(t.hash())),
    ];
    facts.extend(t.warnings().into_iter().map(|w| ("note", json!(w))));
    Ok(Report { facts, parts: Vec::new(), preview: Vec::new() })
}
