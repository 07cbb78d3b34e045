//! After training: the merged model, proven against base + adapter, and the generation test on held-out prompts.

use std::path::Path;

use super::artifact::Reconfigured;
use super::report::table;
use super::settings::GenTest;
use super::step::Workload;
use crate::backend::Backend;
use crate::checkpoint::device::{load_adapter, load_params};
use crate::checkpoint::merge::{Adapted, Merged};
use crate::checkpoint::peft::Adapter;
use crate::checkpoint::safetensors::ModelFiles;
use crate::checkpoint::save::{SaveOptions, save_model};
use crate::checkpoint::{SaveDType, TensorSource};
use crate::data::MicroBatch;
use crate::data::encode::{encode_prompt, stop_ids};
use crate::data::jsonl::{Row, RowOptions};
use crate::data::sft::piece_rows;
use crate::data::template::Template;
use crate::data::tokenizer::{Specials, Tokenizer};
use crate::data::train_set::PieceSet;
use crate::ensure;
use crate::error::{Context, Result};
use crate::generate::{GenerateOptions, Generated, Sampling, generate};
use crate::model::{self, Acts, ActsOptions, LoraSpec, Params, Recompute};
use crate::tensor::DType;

/// Tokens whose logits are compared: enough for every weight to show, few enough to be quick.
const CHECK_TOKENS: usize = 64;

/// How far a merged model is from base + adapter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MergeCheck {
    /// Relative distance of the logits of the merge before rounding: `|merged - adapted| / |adapted|`.
    pub exact: f64,
    /// The same of the file as it was written.
    pub rounded: f64,
}

/// Writes the merged model of `adapter_dir` and `base` to `dir` and compares logits on the first tokens of `batch`: before the
/// rounding to the file's element type they have to agree to f32's accuracy, and the file has to hold just that rounding.
///
/// # Errors
/// If the adapter does not fit, a weight is not finite, a file cannot be written, or the comparison fails.
pub fn merge<B: Backend>(
    dev: &B,
    base: &dyn TensorSource,
    adapter_dir: &Path,
    dir: &Path,
    dtype: SaveDType,
    batch: &MicroBatch,
) -> Result<MergeCheck> {
    let adapter = Adapter::open(adapter_dir)?;
    let adapted = Adapted::new(base, &adapter)?;
    let merged = Merged::new(base, &adapter)?;
    let config = base.config().clone();
    let merged = Reconfigured {
        source: &merged,
        config: config.clone(),
    };
    save_model(
        dir,
        &merged,
        SaveOptions {
            dtype,
            ..Default::default()
        },
    )?;

    let sample = head_of(batch, CHECK_TOKENS);
    let mut with_adapter = load_params(dev, &adapted, DType::F32)?;
    load_adapter(dev, &mut with_adapter, &adapter)?;
    let a = &adapter.config;
    let spec = LoraSpec {
        r: a.r,
        alpha: a.alpha,
        dropout: 0.0,
        rslora: a.rslora,
        targets: a.targets.clone(),
    };
    let logits = |params: &Params<B>, lora: Option<LoraSpec>| -> Result<Vec<f32>> {
        let options = ActsOptions {
            dtype: DType::F32,
            recompute: Recompute::None,
            lora,
            training: false,
        };
        let mut acts = Acts::new(dev, &config, sample.tokens.len(), options)?;
        acts.load(dev, &sample)?;
        model::logits(dev, &config, params, &mut acts)
    };
    let expected = logits(&with_adapter, Some(spec))?;
    drop(with_adapter);
    let exact = distance(&logits(&load_params(dev, &merged, DType::F32)?, None)?, &expected);
    let written = ModelFiles::open(dir)?;
    let rounded = distance(&logits(&load_params(dev, &written, DType::F32)?, None)?, &expected);
    // Both sides sum the same products in another order. A term carries an error of 2^-24 a rounding; a chain of layers with
    // some thousand terms each stays well below 2^-24 · 2^12, while a wrong scale or a missing update is larger by far.
    let tolerance = 2f64.powi(-12);
    let check = MergeCheck { exact, rounded };
    ensure!(
        exact <= tolerance,
        "{}: the merged model's logits differ from base + adapter by {exact:.2e}, expected at most {tolerance:.2e}; do not use it",
        dir.display()
    );
    check_rounding(&merged, &written).context(|| dir.display().to_string())?;
    Ok(check)
}

/// Every weight of the file is the merged one after one rounding: within half a unit in the last place of its type.
fn check_rounding(merged: &dyn TensorSource, written: &ModelFiles) -> Result<()> {
    let half_ulp = match written.dtype() {
        SaveDType::F32 => 0.0,
        SaveDType::Bf16 => 2f32.powi(-8),
        SaveDType::F16 => 2f32.powi(-11),
    };
    for w in crate::checkpoint::names::weights(merged.config()) {
        let (a, b) = (merged.load(&w.name)?, written.load(&w.name)?);
        // Below the smallest normal number of f16 steps are absolute.
        let close =
            |(x, y): (&f32, &f32)| (x - y).abs() <= half_ulp * x.abs().max(f32::MIN_POSITIVE).max(6.2e-5 * half_ulp);
        ensure!(
            a.data.iter().zip(&b.data).all(close),
            "{}: the file holds another weight than the merge gave",
            w.name
        );
    }
    Ok(())
}

/// `|a - b| / |b|`, in the Euclidean norm.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let difference: f64 = a
        .iter()
        .zip(b)
        .map(|(&x, &y)| square(f64::from(x) - f64::from(y)))
        .sum();
    let size: f64 = b.iter().map(|&y| square(f64::from(y))).sum();
    (difference / size.max(f64::MIN_POSITIVE)).sqrt()
}

/// The first tokens of a micro-batch.
fn head_of(batch: &MicroBatch, n: usize) -> MicroBatch {
    let n = n.min(batch.tokens.len());
    MicroBatch {
        tokens: batch.tokens[..n].to_vec(),
        targets: batch.targets[..n].to_vec(),
        doc_start: batch.doc_start[..n].to_vec(),
        ..Default::default()
    }
}

/// The first held-out rows of each data set in turn, `n` in all.
///
/// # Errors
/// If a source cannot be read.
pub fn held_out_rows(sets: &[PieceSet], n: usize, options: &RowOptions) -> Result<Vec<Row>> {
    let mut queues = Vec::new();
    for set in sets {
        let pieces: Vec<usize> = (0..set.pieces.len().min(n)).collect();
        queues.push(piece_rows(set, &pieces, options)?.into_iter());
    }
    let mut rows = Vec::new();
    while rows.len() < n {
        let before = rows.len();
        rows.extend(queues.iter_mut().filter_map(Iterator::next).take(n - before));
        if rows.len() == before {
            break;
        }
    }
    Ok(rows)
}

/// What the generation test needs besides the model.
pub struct GenRun<'a> {
    /// The run's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The run's template: prompts end with its header of the assistant's turn.
    pub template: &'a Template,
    /// How much, how long, how warm.
    pub test: &'a GenTest,
    /// Low-rank updates among the weights.
    pub lora: Option<LoraSpec>,
    /// Storage type of weights and activations.
    pub dtype: DType,
    /// Seed of the draws.
    pub seed: u64,
}

/// Answers prompts greedily and by seeded sampling, prints prompt, reference and both outputs, then how many answers stopped by
/// themselves, how long they are, and whether control tokens leak into their text.
///
/// # Errors
/// If a prompt cannot be rendered or the device fails.
pub fn generation_test<B: Backend>(dev: &B, work: &Workload<B>, run: &GenRun, rows: &[Row]) -> Result<()> {
    let stops = stop_ids(run.tokenizer, run.template)?;
    // A prompt that leaves no room for an answer tells nothing.
    let room = work.config.max_position.saturating_sub(run.test.max_new_tokens);
    let mut kept = Vec::new();
    for row in rows {
        let ids = encode_prompt(run.tokenizer, run.template, row.context())?;
        if (1..=room).contains(&ids.len()) {
            kept.push((row, ids));
        }
    }
    if kept.is_empty() {
        println!(
            "generation test: no held-out prompt leaves room for {} new tokens",
            run.test.max_new_tokens
        );
        return Ok(());
    }
    let prompts: Vec<Vec<u32>> = kept.iter().map(|(_, ids)| ids.clone()).collect();
    let answer = |temperature: f64, top_p: f64| {
        let options = GenerateOptions {
            dtype: run.dtype,
            lora: run.lora.clone(),
            max_new_tokens: run.test.max_new_tokens,
            stop_ids: stops.clone(),
            batch: 8,
            sampling: Sampling {
                temperature,
                top_p,
                seed: run.seed,
                ..Default::default()
            },
        };
        generate(dev, &work.config, &work.params, &prompts, &options, |_, _| ())
    };
    let greedy = answer(0.0, 1.0)?;
    let sampled = answer(f64::from(run.test.temperature), f64::from(run.test.top_p))?;
    let text = |g: &Generated| {
        let body = if g.stopped {
            &g.tokens[..g.tokens.len() - 1]
        } else {
            &g.tokens[..]
        };
        run.tokenizer.decode(body, Specials::Show)
    };
    println!("\ngeneration test on {} held-out prompts", kept.len());
    for (((row, _), g), s) in kept.iter().zip(&greedy).zip(&sampled) {
        println!("\nprompt:    {}", indent(row.prompt()));
        println!("reference: {}", indent(row.response()));
        println!("greedy:    {}", indent(&text(g)));
        println!("sampled:   {}", indent(&text(s)));
    }
    let header = ["", "stopped", "mean tokens", "longest", "control tokens leaked"]
        .map(String::from)
        .to_vec();
    let line = |name: &str, all: &[Generated]| {
        let stats = GenStats::of(all, &stops, |id| run.tokenizer.is_control(id));
        vec![
            name.to_string(),
            format!("{:.0}%", 100.0 * stats.stopped as f64 / all.len() as f64),
            format!("{:.1}", stats.tokens as f64 / all.len() as f64),
            stats.longest.to_string(),
            stats.leaked.to_string(),
        ]
    };
    println!(
        "\n{}",
        table(&[header, line("greedy", &greedy), line("sampled", &sampled)]).trim_end()
    );
    Ok(())
}

/// Figures over some answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct GenStats {
    /// Answers ended by a stop token.
    stopped: usize,
    /// New tokens, stop tokens left out.
    tokens: usize,
    /// Longest answer.
    longest: usize,
    /// Answers with a control token in their text.
    leaked: usize,
}

impl GenStats {
    fn of(all: &[Generated], stops: &[u32], is_control: impl Fn(u32) -> bool) -> Self {
        let mut stats = Self::default();
        for g in all {
            let body = match g.tokens.split_last() {
                Some((last, body)) if g.stopped && stops.contains(last) => body,
                _ => &g.tokens[..],
            };
            stats.stopped += usize::from(g.stopped);
            stats.tokens += body.len();
            stats.longest = stats.longest.max(body.len());
            stats.leaked += usize::from(body.iter().any(|&id| is_control(id)));
        }
        stats
    }
}

/// Further lines below the first one.
fn indent(text: &str) -> String {
    text.trim().replace('\n', "\n           ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stops_lengths_and_leaks_are_counted() {
        let g = |tokens: &[u32], stopped| Generated {
            tokens: tokens.to_vec(),
            stopped,
        };
        let all = [g(&[9, 9, 3], true), g(&[9, 4, 9, 9], false), g(&[3], true)];
        let stats = GenStats::of(&all, &[3], |id| id == 3 || id == 4);
        assert_eq!(
            stats,
            GenStats {
                stopped: 2,
                tokens: 6,
                longest: 4,
                leaked: 1
            }
        );
    }

    #[test]
    fn distance_is_relative() {
        assert_eq!(distance(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
        assert!((distance(&[3.0, 9.0], &[3.0, 4.0]) - 1.0).abs() < 1e-12);
        assert!(distance(&[f32::NAN], &[1.0]).is_nan());
    }
}
