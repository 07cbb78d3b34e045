//! `ringtune eval`: loss, perplexity and token accuracy of a model on data sets, and a generation test on their prompts.

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use serde_json::{Value, json};

use super::model_folder::{Loaded, ModelArgs, ModelFolder, count, long, model_flags, path};
use super::startup::DEFAULT_SEQ_LEN;
use super::{Out, note, warn};
use crate::backend::Backend;
use crate::data::cache;
use crate::data::encode::Overflow;
use crate::data::jsonl::{BadRows, RowOptions};
use crate::data::progress::Progress;
use crate::data::sft::{RowSpec, load_sets};
use crate::data::template::Template;
use crate::data::tokenizer::Tokenizer;
use crate::data::train_set::PieceSet;
use crate::ensure;
use crate::error::{Error, Result};
use crate::eval::gen_test::{GenReport, GenRun, generation_test, held_out_rows};
use crate::eval::sets::{EvalOptions, SetEval, evaluate_sets};
use crate::eval::{Evaluation, SetSums};
use crate::files::write_json;
use crate::hf::TensorSource;
use crate::log::tables::{grouped, table};
use crate::settings::GenTest;

/// Prompts answered with `--gen-only` when their number is left open.
const DEFAULT_SAMPLES: usize = 5;

/// The command's flags.
pub fn command() -> Command {
    model_flags(Command::new("eval"))
        .about("Evaluate a model or adapter on data sets: loss, perplexity, token accuracy, generation samples")
        .arg(
            path("dataset_paths", "dataset-paths")
                .aliases(["dataset_path", "dataset-path"])
                .required(true)
                .num_args(1..)
                .help("Data sets: JSONL rows or token files"),
        )
        .arg(
            count("max_eval_samples", "max-eval-samples", 1)
                .help("Evaluate at most this many rows of each data set, a seeded choice [default: all]"),
        )
        .arg(
            count("batch_size", "batch-size", 1)
                .aliases(["per_device_eval_batch_size", "per-device-eval-batch-size"])
                .default_value("8")
                .help("Rows at once; changes speed and memory only"),
        )
        .arg(
            count("max_seq_len", "max-seq-len", 2)
                .aliases(["max_length", "max-length", "max_seq_length", "max-seq-length"])
                .help("Longest row in tokens [default: the model's maximum, at most 1024]"),
        )
        .arg(
            long("overflow", "overflow")
                .value_name("CHOICE")
                .value_parser(["truncate", "drop"])
                .default_value("truncate")
                .help("What happens to a longer row"),
        )
        .arg(
            long("skip_bad_rows", "skip-bad-rows")
                .action(ArgAction::SetTrue)
                .help("Count and skip malformed rows instead of stopping"),
        )
        .arg(
            long("supervise_turn_newline", "supervise-turn-newline")
                .action(ArgAction::SetTrue)
                .help("Count the newline after a closing token too, as the training flag of this name"),
        )
        .arg(long("gen_only", "gen-only").action(ArgAction::SetTrue).help("Answer prompts only; no loss"))
        .arg(
            count("num_gen_samples", "num-gen-samples", 0)
                .help("Prompts to answer, greedily and by sampling [default: none; with --gen-only 5]"),
        )
        .arg(count("max_new_tokens", "max-new-tokens", 1).default_value("64").help("Longest answer in tokens"))
        .arg(float("gen_temperature", "gen-temperature", "0.7").help("Temperature of the sampled answers"))
        .arg(float("gen_top_p", "gen-top-p", "0.9").help("Nucleus of the sampled answers"))
        .arg(path("output", "output").help("JSON file for the report"))
        .arg(path("cache_dir", "cache-dir").help("Where token files are kept [default: the user's cache folder]"))
}

fn float(id: &'static str, dashed: &'static str, default: &'static str) -> Arg {
    long(id, dashed)
        .value_name("NUMBER")
        .allow_hyphen_values(true)
        .value_parser(value_parser!(f32))
        .default_value(default)
}

/// What the command is asked to do.
struct EvalArgs {
    model: ModelArgs,
    dataset_paths: Vec<PathBuf>,
    max_eval_samples: Option<usize>,
    batch_size: usize,
    max_seq_len: Option<usize>,
    overflow: Overflow,
    skip_bad_rows: bool,
    gen_only: bool,
    gen_test: GenTest,
    output: Option<PathBuf>,
    cache_dir: PathBuf,
}

impl EvalArgs {
    fn of(m: &ArgMatches) -> Result<Self> {
        let number = |id: &str| m.get_one::<u64>(id).map(|&n| usize::try_from(n).unwrap_or(usize::MAX));
        let paths = |id: &str| m.get_many::<PathBuf>(id).into_iter().flatten().cloned().collect();
        let gen_only = m.get_flag("gen_only");
        let asked = number("num_gen_samples");
        if gen_only && asked == Some(0) {
            return Err(Error::usage("--gen-only with --num-gen-samples 0 does nothing"));
        }
        let gen_test = GenTest {
            num_samples: asked.unwrap_or(if gen_only { DEFAULT_SAMPLES } else { 0 }),
            max_new_tokens: number("max_new_tokens").expect("it has a default"),
            temperature: *m.get_one("gen_temperature").expect("it has a default"),
            top_p: *m.get_one("gen_top_p").expect("it has a default"),
        };
        Ok(Self {
            model: ModelArgs { supervise_turn_newline: m.get_flag("supervise_turn_newline"), ..ModelArgs::of(m)? },
            dataset_paths: paths("dataset_paths"),
            max_eval_samples: number("max_eval_samples"),
            batch_size: number("batch_size").expect("it has a default"),
            max_seq_len: number("max_seq_len"),
            overflow: match m.get_one::<String>("overflow").map(String::as_str) {
                Some("drop") => Overflow::Drop,
                _ => Overflow::Truncate,
            },
            skip_bad_rows: m.get_flag("skip_bad_rows"),
            gen_only,
            gen_test,
            output: m.get_one::<PathBuf>("output").cloned(),
            cache_dir: m.get_one::<PathBuf>("cache_dir").cloned().unwrap_or_else(cache::default_dir),
        })
    }

    fn rows(&self) -> RowOptions {
        RowOptions { bad_rows: if self.skip_bad_rows { BadRows::Skip } else { BadRows::Fail }, ..RowOptions::default() }
    }
}

/// Runs the command.
///
/// # Errors
/// If the model, the tokenizer or a data set is not usable, a loss is not finite, or the report cannot be written.
pub fn run(m: &ArgMatches) -> Result<()> {
    let args = EvalArgs::of(m)?;
    let dev = args.model.device()?;
    let folder = ModelFolder::open(&args.model.model_path, args.model.base_model.as_deref(), args.model.no_lora)?;
    let mut tokenizer = folder.tokenizer(&args.model)?;
    let template = folder.template(&args.model, &mut tokenizer)?;
    let max_seq_len = row_length(args.max_seq_len, folder.files.config().max_position)?;
    tokenizer.warnings().iter().for_each(|w| warn(w));
    let spec = RowSpec {
        max_seq_len,
        overflow: args.overflow,
        rows: args.rows(),
        skip_log: None,
        cache_dir: args.cache_dir.clone(),
    };
    let (progress, mut log): (_, Box<dyn FnMut(String)>) = match args.model.quiet {
        true => (Progress::Hide, Box::new(|_| ())),
        false => (Progress::Show, Box::new(|line: String| note(&line))),
    };
    // Before the weights: bad rows are found in seconds, a large model takes longer.
    let sets = load_sets(&args.dataset_paths, &spec, &tokenizer, &template, progress, &mut log)?;
    let loaded = folder.load(&dev, &tokenizer, args.model.seed, args.model.dtype)?;
    let mut report = header(&args, &folder, &tokenizer, &template, max_seq_len);
    let mut out = Out::new();
    if !args.gen_only {
        let started = Instant::now();
        let found = losses(&dev, &loaded, &sets, &args, max_seq_len, progress)?;
        let seconds = started.elapsed().as_secs_f64();
        write!(out, "{}", figures_table(&sets, &found))?;
        out.flush()?;
        report["data_sets"] = sets.iter().zip(&found).map(|(set, f)| set_json(set, f)).collect();
        report["all"] = figures(&together(&found));
        report["seconds"] = json!(seconds);
        check_finite(&found)?;
    }
    if args.gen_test.num_samples > 0 {
        let made = samples(&dev, &loaded, &sets, &args, &tokenizer, &template)?;
        let gap = if args.gen_only { "" } else { "\n" };
        write!(out, "{gap}{}", made.text(args.gen_test.max_new_tokens))?;
        report["generation"] = made.to_json();
    }
    out.flush()?;
    if let Some(path) = &args.output {
        write_json(path, &report)?;
        note(&format!("report: {}", path.display()));
    }
    Ok(())
}

fn row_length(asked: Option<usize>, most: usize) -> Result<usize> {
    match asked {
        Some(n) if n > most => Err(Error::usage(format!(
            "--max-seq-len: {n} is longer than the model's maximum; expected at most {most} (max_position_embeddings)"
        ))),
        Some(n) => Ok(n),
        None => Ok(most.min(DEFAULT_SEQ_LEN)),
    }
}

fn losses<B: Backend>(
    dev: &B,
    loaded: &Loaded<B>,
    sets: &[PieceSet],
    args: &EvalArgs,
    max_seq_len: usize,
    progress: Progress,
) -> Result<Vec<SetEval>> {
    let options = EvalOptions {
        dtype: args.model.dtype,
        lora: loaded.lora.clone(),
        batch: args.batch_size,
        max_seq_len,
        packing: true,
        max_samples: args.max_eval_samples,
        seed: args.model.seed,
    };
    let most = args.max_eval_samples.unwrap_or(usize::MAX);
    let rows: usize = sets.iter().map(|s| s.pieces.len().min(most)).sum();
    let bar = progress.bar(rows as u64, "evaluating");
    let found = evaluate_sets(dev, &loaded.config, &loaded.params, sets, &options, |n| bar.inc(n as u64))?;
    bar.finish_and_clear();
    Ok(found)
}

fn samples<B: Backend>(
    dev: &B,
    loaded: &Loaded<B>,
    sets: &[PieceSet],
    args: &EvalArgs,
    tokenizer: &Tokenizer,
    template: &Template,
) -> Result<GenReport> {
    let rows = held_out_rows(sets, args.gen_test.num_samples, &args.rows())?;
    ensure!(
        !rows.is_empty(),
        "no prompt to answer: the data sets are token files whose JSON Lines are gone; give the JSON Lines"
    );
    let run = GenRun {
        tokenizer,
        template,
        test: &args.gen_test,
        lora: loaded.lora.clone(),
        dtype: args.model.dtype,
        seed: args.model.seed,
        batch: args.batch_size,
    };
    generation_test(dev, &loaded.config, &loaded.params, &run, &rows)
}

/// All data sets as one.
fn together(found: &[SetEval]) -> SetEval {
    let sets = found.iter().map(|f| f.sums.clone()).collect();
    let sums = Evaluation { sets, seconds: 0.0 }.together().unwrap_or_default();
    SetEval { sums, documents: found.iter().map(|f| f.documents).sum(), tokens: found.iter().map(|f| f.tokens).sum() }
}

fn figures_table(sets: &[PieceSet], found: &[SetEval]) -> String {
    let header = ["data set", "rows", "tokens", "supervised", "loss", "perplexity", "accuracy"];
    let line = |name: &str, f: &SetEval| {
        let s: &SetSums = &f.sums;
        vec![
            name.to_string(),
            grouped(f.documents as u64),
            grouped(f.tokens),
            grouped(s.supervised as u64),
            format!("{:.4}", s.loss()),
            format!("{:.2}", s.perplexity()),
            format!("{:.1}%", 100.0 * s.accuracy()),
        ]
    };
    let mut rows = vec![header.map(String::from).to_vec()];
    rows.extend(sets.iter().zip(found).map(|(set, f)| line(&set.name, f)));
    if sets.len() > 1 {
        rows.push(line("together", &together(found)));
    }
    table(&rows)
}

fn check_finite(found: &[SetEval]) -> Result<()> {
    for f in found {
        ensure!(
            f.sums.nll.is_finite(),
            "{}: the loss is {}; the weights are damaged or training diverged",
            f.sums.name,
            f.sums.loss()
        );
    }
    Ok(())
}

fn header(
    args: &EvalArgs,
    folder: &ModelFolder,
    tokenizer: &Tokenizer,
    template: &Template,
    max_seq_len: usize,
) -> Value {
    let adapter = folder.adapter.as_ref().map(|a| a.dir().display().to_string());
    json!({
        "model": folder.files.dir().display().to_string(),
        "adapter": adapter,
        "tokenizer": tokenizer.name(),
        "prompt_template": template.name(),
        "mixed_precision": match args.model.dtype { crate::tensor::DType::Bf16 => "bf16", _ => "no" },
        "max_seq_len": max_seq_len,
        "max_eval_samples": args.max_eval_samples,
        "seed": args.model.seed,
        "version": env!("CARGO_PKG_VERSION"),
    })
}

fn figures(f: &SetEval) -> Value {
    let s = &f.sums;
    json!({
        "rows": f.documents,
        "tokens": f.tokens,
        "supervised_tokens": s.supervised as u64,
        "loss": s.loss(),
        "perplexity": s.perplexity(),
        "token_accuracy": s.accuracy(),
    })
}

fn set_json(set: &PieceSet, f: &SetEval) -> Value {
    let mut v = json!({"path": set.name, "rows_usable": set.pieces.len()});
    if let (Some(to), Value::Object(figures)) = (v.as_object_mut(), figures(f)) {
        to.extend(figures);
    }
    v
}
