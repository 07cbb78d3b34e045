//! What a training costs: steps, memory by class, time.

use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};

use super::{Check, Finding, Options};
use crate::backend::Backend;
use crate::comm::Solo;
use crate::commands::device::{self, OnDevice};
use crate::commands::start::Start;
use crate::data::loader::{StepShape, steps_until};
use crate::data::sft::SftData;
use crate::data::train_set::Cursor;
use crate::error::Result;
use crate::hf::resize::Resized;
use crate::hf::{TensorSource, WithConfig};
use crate::machine::{available_memory, resident_memory};
use crate::model::LoraSpec;
use crate::model::config::ModelConfig;
use crate::model::flops::FlopCount;
use crate::optim::Schedule;
use crate::settings::{Every, TrainSettings};
use crate::text::{bytes, duration, grouped, table};
use crate::train::batches::TrainBatches;
use crate::train::init::RandomModel;
use crate::train::memory::Demand;
use crate::train::{memory, setup};

/// Steps that `--time` measures after one that warms up.
const MEASURED_STEPS: usize = 3;
/// It stops early after this long, in seconds.
const LONGEST_MEASUREMENT: f64 = 20.0;

/// Steps of the run, and of an epoch.
#[derive(Clone, Copy, Debug)]
pub struct Steps {
    /// In all.
    pub total: u64,
    /// In the first epoch.
    pub epoch: u64,
}

fn shape(s: &TrainSettings, ranks: usize) -> StepShape {
    StepShape { micro_batch: s.micro_batch_size, grad_accum: s.grad_accum, world_size: ranks }
}

/// Steps of an epoch and in all, and whether the schedule fits them.
pub fn steps(check: &mut Check, start: &Start, ranks: usize) -> Option<Steps> {
    let data = start.data.as_ref()?;
    let s = &start.settings;
    if s.check().is_err() {
        return None;
    }
    let shape = shape(s, ranks);
    let epoch = shape.steps(data.train.plan(0).n_rows() as u64);
    let total = s.max_steps.unwrap_or_else(|| steps_until(&data.train, Cursor::default(), s.epochs, shape));
    let schedule = Schedule::new(s.schedule, start.peak_lr, total);
    let epochs = total as f64 / epoch.max(1) as f64;
    let warmup = (0..total).find(|&t| schedule.lr(t) >= start.peak_lr).unwrap_or(total);
    let text = format!(
        "{} steps an epoch of {} rows each, {} in all ({epochs:.2} epochs); peak learning rate {:e} at step {}",
        grouped(epoch),
        grouped(shape.rows()),
        grouped(total),
        start.peak_lr,
        warmup + 1
    );
    if total < 10 {
        check.push(
            Finding::warning("few-steps", "", "the run is very short")
                .but("10 steps or more", total.to_string())
                .advice("more epochs, fewer rows a step (--gradient-accumulation-steps), or more data"),
        );
    }
    if warmup >= total && total > 1 {
        check.push(
            Finding::warning("warmup", "warmup_steps", "the learning rate never reaches its peak")
                .but(format!("fewer than {total} steps of warmup"), warmup.to_string())
                .advice("lower --warmup-steps"),
        );
    }
    check.section(
        "steps",
        text,
        json!({
            "per_epoch": epoch, "total": total, "epochs": epochs, "rows_per_step": shape.rows(),
            "peak_learning_rate": start.peak_lr, "warmup_steps": warmup,
        }),
    );
    Some(Steps { total, epoch })
}

/// Memory by class, of a rank where there are several, against what there is, and which settings to change where it does not fit.
pub fn memory(check: &mut Check, start: &Start, steps: Option<Steps>, device: &str, memory: Option<u64>, ranks: usize) {
    let (Some(config), Some(max_seq_len)) = (&start.config, start.max_seq_len) else {
        return;
    };
    let limits = device::limits(device, config.n_classes);
    let demand = Demand {
        config,
        settings: &start.settings,
        lora: start.lora.as_ref(),
        new_rows: start.new_rows.map(|(_, n)| n),
        max_seq_len,
        saves: steps.is_some_and(|steps| saves_on_the_way(start, steps)),
        device: limits.footprint,
    };
    let (available, whose) = match (memory, limits.free) {
        (Some(n), _) => (Some(n), "--device-memory"),
        (None, Some(n)) => (Some(n), "free on the device"),
        (None, None) => (available_memory(), "free on this machine"),
    };
    let classes = memory::estimate_within(&demand, ranks, available);
    let total = memory::sum(&classes);
    let mut rows: Vec<Vec<String>> = classes.iter().map(|c| vec![c.name.into(), bytes(c.bytes)]).collect();
    rows.push(vec!["sum".into(), bytes(total)]);
    // A run has read as much by the time it begins as this process has now.
    let program = if limits.free.is_none() { resident_memory().map(|(now, _)| now) } else { None };
    if let Some(n) = program {
        rows.push(vec!["program, tokenizer, data".into(), bytes(n)]);
    }
    if let Some(n) = available {
        rows.push(vec![whose.into(), bytes(n)]);
    }
    let mut remedy_fact = Value::Null;
    if let Some(n) = available.filter(|&n| n < total) {
        let lora = setup::lora_spec(&TrainSettings::default()).ok().flatten().expect("the table's defaults are valid");
        let remedy = memory::remedy(&demand, &lora, n);
        let advice = match &remedy {
            Some(r) => format!("{} takes {}", r.flags, bytes(r.bytes)),
            None => "use a smaller model or a device with more memory".into(),
        };
        remedy_fact = json!(remedy.map(|r| json!({"flags": r.flags, "bytes": r.bytes})));
        check.push(
            Finding::problem("memory", whose, "the run does not fit into memory")
                .but(format!("at most {}", bytes(n)), bytes(total))
                .advice(advice),
        );
    }
    let all = demand.base_weights() + demand.lora_weights();
    let trained = demand.trained_weights();
    let text = format!(
        "{}{} weights in all, {} trained ({:.2}%); micro-batches of up to {} tokens",
        table(&rows),
        grouped(all),
        grouped(trained),
        100.0 * trained as f64 / all as f64,
        grouped(demand.max_tokens() as u64),
    );
    let by_class: serde_json::Map<String, Value> =
        classes.iter().map(|c| (c.name.replace(' ', "_"), json!(c.bytes))).collect();
    check.section(
        "memory per device",
        text,
        json!({
            "bytes": by_class, "total": total, "program": program, "available": available, "fits": available.map(|n| n >= total),
            "remedy": remedy_fact, "weights": all, "trained": trained,
        }),
    );
}

/// Whether a checkpoint is due before the last step: that one is written when nothing is left to do beside it.
fn saves_on_the_way(start: &Start, steps: Steps) -> bool {
    let s = &start.settings;
    let first = |every: Every| match every {
        Every::Never => u64::MAX,
        Every::Steps(n) => n,
        Every::Epoch => steps.epoch,
    };
    // An evaluation saves where it is the best so far.
    let evaluates = start.data.as_ref().is_some_and(|data| data.val.iter().any(|set| !set.pieces.is_empty()));
    let due = first(s.save_every).min(if evaluates { first(s.eval_every) } else { u64::MAX });
    s.save_every != Every::Never && due < steps.total
}

/// Arithmetic and time: from a stated rate, from measured steps, or neither.
pub fn time(check: &mut Check, start: &Start, steps: Option<Steps>, options: &Options, device: &str) {
    let (Some(data), Some(config), Some(steps)) = (&start.data, &start.config, steps) else {
        return;
    };
    let demand_trained = start.lora.as_ref().map(|l| lora_weights(start, l));
    let flops = FlopCount::new(config, demand_trained);
    let plan = data.train.plan(0);
    let (mut per_epoch, mut tokens) = (0.0, 0u64);
    for &sample in plan.samples() {
        let (set, piece) = data.train.locate(sample);
        let p = data.train.sets()[set].pieces[piece];
        per_epoch += flops.document(p.len, p.n_targets);
        tokens += u64::from(p.len);
    }
    let epochs = steps.total as f64 / steps.epoch.max(1) as f64;
    let (total, tokens) = (per_epoch * epochs, tokens as f64 * epochs);
    let mut lines = vec![format!("{} tokens, {} of arithmetic", grouped(tokens as u64), flop(total))];
    let mut facts = json!({"tokens": tokens as u64, "flops": total});
    if let Some(rate) = options.flops_rate {
        let seconds = total / rate;
        lines.push(format!("about {} at {}/s", duration(seconds), flop(rate)));
        facts["at_rate"] = json!({"flops_per_second": rate, "seconds": seconds});
    }
    // What does not fit here cannot be measured here.
    let fits = check.findings.iter().all(|f| f.code != "memory");
    if options.time && fits {
        let mut measured = None;
        let measure = Measure { start, data, config, out: &mut measured };
        match device::run(device, start.settings.threads, measure).map(|()| measured) {
            Ok(Some(m)) => {
                let seconds = tokens / m.tokens * m.seconds;
                lines.push(format!(
                    "about {} on this machine: {} steps measured, {:.0} tokens/s, {}/s ({})",
                    duration(seconds),
                    m.steps,
                    m.tokens / m.seconds,
                    flop(m.flops / m.seconds),
                    m.device
                ));
                facts["measured"] = json!({
                    "steps": m.steps, "tokens_per_second": m.tokens / m.seconds, "flops_per_second": m.flops / m.seconds,
                    "seconds": seconds, "device": m.device,
                });
            }
            Ok(None) => {}
            Err(e) => check.push(Finding::error("time", "--time", &e)),
        }
    }
    check.section("time", lines.join("\n"), facts);
}

fn lora_weights(start: &Start, lora: &LoraSpec) -> u64 {
    let Some(config) = &start.config else { return 0 };
    let demand = Demand {
        config,
        settings: &start.settings,
        lora: Some(lora),
        new_rows: start.new_rows.map(|(_, n)| n),
        max_seq_len: 1,
        saves: false,
        device: device::footprint(false, config.n_classes),
    };
    demand.trained_weights()
}

struct Measured {
    steps: usize,
    tokens: f64,
    flops: f64,
    seconds: f64,
    device: String,
}

/// Takes a few real steps and throws them away.
struct Measure<'a> {
    start: &'a Start,
    data: &'a SftData,
    config: &'a ModelConfig,
    out: &'a mut Option<Measured>,
}

impl OnDevice for Measure<'_> {
    fn run<B: Backend>(self, dev: &B) -> Result<()> {
        let Self { start, data, config, out } = self;
        let s = &start.settings;
        let max_tokens = s.micro_batch_size.max(s.eval_batch_size) * data.train.max_seq_len();
        let random = RandomModel::new(config.clone(), s.seed);
        let resized = match (&start.base, &start.resize) {
            (Some(base), Some(how)) => Some(Resized::new(base, how.clone())?),
            _ => None,
        };
        let grown = resized.as_ref().map(|r| WithConfig { source: r, config: config.clone() });
        let source: &dyn TensorSource = match &grown {
            Some(g) => g,
            None => &random,
        };
        let mut work = setup::workload(dev, source, s, start.new_rows, max_tokens)?;
        let mut batches = TrainBatches::start(&Arc::clone(&data.train), Cursor::default(), shape(s, 1), 0)?;
        let mut measured = Measured { steps: 0, tokens: 0.0, flops: 0.0, seconds: 0.0, device: dev.describe() };
        let begin = Instant::now();
        for step in 0..=MEASURED_STEPS as u64 {
            let batch = batches.next_step()?;
            let start = Instant::now();
            let done = work.step(dev, &Solo, &batch, step, 0.0)?;
            let seconds = start.elapsed().as_secs_f64();
            let late = begin.elapsed().as_secs_f64() > LONGEST_MEASUREMENT;
            // The first step touches memory for the first time; it counts only where there is no time for another.
            if step > 0 || late {
                measured.steps += 1;
                measured.tokens += done.tokens as f64;
                measured.flops += done.flops;
                measured.seconds += seconds;
            }
            if late {
                break;
            }
        }
        *out = Some(measured);
        Ok(())
    }
}

/// `3.2 TFLOP`.
fn flop(v: f64) -> String {
    let mut value = v;
    for unit in ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"] {
        if value < 999.5 {
            let digits = if value < 9.95 { 2 } else { 0 };
            return format!("{value:.digits$} {unit}");
        }
        value /= 1e3;
    }
    format!("{value:.0} EFLOP")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_numbers_are_readable() {
        assert_eq!(flop(3.2e12), "3.20 TFLOP");
        assert_eq!(flop(412e9), "412 GFLOP");
        assert_eq!(flop(5.0), "5.00 FLOP");
    }
}
