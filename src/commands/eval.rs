//! `ringtune eval`: loss, perplexity and token accuracy of a model on data sets, and a generation test on their prompts.

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use clap::Command;
use serde_json::{Value, json};

use super::data::{cache_dir, named, row_options};
use super::device::{self, OnDevice};
use super::model_folder::{ModelArgs, ModelFolder};
use super::open;
use crate::backend::Backend;
use crate::data::encode::Overflow;
use crate::data::jsonl::RowOptions;
use crate::data::progress::Progress;
use crate::data::sft::{RowSpec, load_sets};
use crate::data::template::{Template, Unmarked};
use crate::data::tokenizer::Tokenizer;
use crate::data::train_set::PieceSet;
use crate::error::{Error, Result};
use crate::eval::gen_test::{GenReport, GenRun, generation_test, held_out_rows};
use crate::eval::sets::{EvalOptions, SetEval, evaluate_sets};
use crate::eval::{Evaluation, SetSums};
use crate::files::{check_replaces, write_json};
use crate::hf::TensorSource;
use crate::model::Model;
use crate::say::Out;
use crate::settings::{GenTest, Settings};
use crate::text::{grouped, table};
use crate::words::Words;
use crate::{ensure, say};

/// What its help says besides its flags.
pub fn about(clap: Command) -> Command {
    clap.about("Evaluate a model or adapter on data sets: loss, perplexity, token accuracy, generation samples")
}

/// What the command is asked to do.
struct EvalArgs {
    model: ModelArgs,
    dataset_paths: Vec<PathBuf>,
    max_eval_samples: Option<usize>,
    batch_size: usize,
    max_seq_len: Option<usize>,
    overflow: Overflow,
    rows: RowOptions,
    gen_only: bool,
    gen_test: GenTest,
    output: Option<PathBuf>,
    cache_dir: PathBuf,
}

impl EvalArgs {
    fn of(s: &Settings) -> Result<Self> {
        let gen_test = s.train.gen_test.clone().expect("a row of eval writes it");
        if s.eval.gen_only && gen_test.num_samples == 0 {
            return Err(Error::usage("--gen-only with --num-gen-samples 0 does nothing"));
        }
        Ok(Self {
            model: ModelArgs::of(s, if s.eval.gen_only { Unmarked::Whole } else { Unmarked::Turns })?,
            dataset_paths: named(&s.data.paths)?,
            rows: row_options(s)?,
            max_eval_samples: s.eval.max_samples,
            batch_size: s.train.eval_batch_size,
            max_seq_len: s.train.max_seq_len,
            overflow: s.data.overflow,
            gen_only: s.eval.gen_only,
            gen_test,
            output: s.output.clone(),
            cache_dir: cache_dir(s),
        })
    }
}

/// Runs the command.
///
/// # Errors
/// If the model, the tokenizer or a data set is not usable, a loss is not finite, or the report cannot be written.
pub fn run(settings: &Settings) -> Result<()> {
    say::set_quiet(settings.train.quiet);
    device::run(&settings.device, settings.train.threads, EvalArgs::of(settings)?)
}

impl OnDevice for EvalArgs {
    fn run<B: Backend>(self, dev: &B) -> Result<()> {
        let args = self;
        if let Some(path) = &args.output {
            let keys = ["\"max_eval_samples\":", "\"prompt_template\":", "\"version\":"];
            check_replaces("--output", path, "report of eval", |head| {
                let text = String::from_utf8_lossy(head);
                text.starts_with("{\n") && keys.iter().any(|key| text.contains(key))
            })?;
        }
        let (folder, tokenizer, template) = ModelFolder::open_all(&args.model)?;
        let max_seq_len = open::row_length(args.max_seq_len, folder.files.config().max_position)?;
        tokenizer.warnings().iter().for_each(|w| say::warning(w));
        let spec = RowSpec {
            max_seq_len,
            overflow: args.overflow,
            rows: args.rows.clone(),
            skip_log: args.output.as_ref().map(|report| report.with_file_name("skipped_rows.txt")),
            cache_dir: args.cache_dir.clone(),
        };
        let progress = if args.model.quiet { Progress::Hide } else { Progress::Show };
        let mut log = |line: String| say::remark(&line);
        // Before the weights: bad rows are found in seconds, a large model takes longer.
        let sets = load_sets(&args.dataset_paths, &spec, &tokenizer, &template, progress, &mut log)?;
        let loaded = folder.load(dev, &tokenizer, args.model.seed, args.model.dtype)?;
        let mut report = header(&args, &folder, &tokenizer, &template, max_seq_len);
        let mut out = Out::new();
        if !args.gen_only {
            let started = Instant::now();
            let found = losses(dev, &loaded, &sets, &args, max_seq_len, progress)?;
            let seconds = started.elapsed().as_secs_f64();
            write!(out, "{}", figures_table(&sets, &found))?;
            out.flush()?;
            report["data_sets"] = sets.iter().zip(&found).map(|(set, f)| set_json(set, f)).collect();
            report["all"] = figures(&together(&found));
            report["seconds"] = json!(seconds);
            check_finite(&found)?;
        }
        if args.gen_test.num_samples > 0 {
            let made = samples(dev, &loaded, &sets, &args, &tokenizer, &template)?;
            let gap = if args.gen_only { "" } else { "\n" };
            write!(out, "{gap}{}", made.text(args.gen_test.max_new_tokens))?;
            report["generation"] = made.to_json();
        }
        out.flush()?;
        if let Some(path) = &args.output {
            write_json(path, &report)?;
            say::note(&format!("report: {}", path.display()));
        }
        Ok(())
    }
}

fn losses<B: Backend>(
    dev: &B,
    loaded: &Model<B>,
    sets: &[PieceSet],
    args: &EvalArgs,
    max_seq_len: usize,
    progress: Progress,
) -> Result<Vec<SetEval>> {
    let options = EvalOptions {
        batch: args.batch_size,
        max_seq_len,
        packing: true,
        max_samples: args.max_eval_samples,
        seed: args.model.seed,
    };
    let most = args.max_eval_samples.unwrap_or(usize::MAX);
    let rows: usize = sets.iter().map(|s| s.pieces.len().min(most)).sum();
    let bar = progress.bar(rows as u64, "evaluating");
    let found = evaluate_sets(dev, loaded, sets, &options, |n| bar.inc(n as u64))?;
    bar.finish_and_clear();
    Ok(found)
}

fn samples<B: Backend>(
    dev: &B,
    loaded: &Model<B>,
    sets: &[PieceSet],
    args: &EvalArgs,
    tokenizer: &Tokenizer,
    template: &Template,
) -> Result<GenReport> {
    let rows = held_out_rows(sets, args.gen_test.num_samples, &args.rows)?;
    ensure!(
        !rows.is_empty(),
        "no prompt to answer: the data sets are token files whose JSON Lines are gone; give the JSON Lines"
    );
    let run = GenRun {
        tokenizer,
        template,
        test: &args.gen_test,
        seed: args.model.seed,
        batch: args.batch_size,
        moved: &|| (),
    };
    generation_test(dev, loaded, &run, &rows)
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
        "mixed_precision": args.model.dtype.word(),
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
