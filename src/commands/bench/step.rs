//! `ringtune bench step`: whole training steps, full and with low-rank updates: time, memory against what `check` estimates, launches.

use std::io::Write;
use std::time::Instant;

use serde_json::{Value, json};

use super::baseline::{self, Ratio};
use super::case::Setup;
use super::demand::{What, estimated};
use super::options::{Options, Which};
use super::print;
use super::remedy;
use super::roofline::{Ceilings, hold_to_peak};
use super::timing::Times;
use super::values::RandomWeights;
use crate::backend::Backend;
use crate::batch::{IGNORE, MicroBatch};
use crate::comm::Solo;
use crate::commands::device::{self, OnDevice};
use crate::data::loader::Step;
use crate::ensure;
use crate::error::{Error, Result};
use crate::machine::available_memory;
use crate::measure::{Nature, Tally};
use crate::rng::Stream;
use crate::say::{self, Out};
use crate::text::bytes;
use crate::train::setup::workload;

/// Steps that count at least.
const LEAST: usize = 3;
/// How far the loss of random weights may be from what their deviation makes expected.
const NEAR: f64 = 0.05;

/// Measures what was asked for and prints it.
///
/// # Errors
/// If a flag makes no sense, the device fails, a loss is wrong or memory is too small.
pub fn run(o: &Options) -> Result<()> {
    o.check_only(What::ALL.iter().map(|w| w.name()), &["full", "LoRA"])?;
    let wanted: Vec<What> = What::ALL.into_iter().filter(|w| o.wants(w.name())).collect();
    let mut found = None;
    for (i, &what) in wanted.iter().enumerate() {
        if say::stderr_is_terminal() {
            say::note(&format!("{} of {}: {}", i + 1, wanted.len(), what.name()));
        }
        // A device of its own: scratch that a case leaves would not count for the next.
        let case = Case { options: o, what, wanted: &wanted, no_gpu: None, found: &mut found };
        device::run(&o.device, o.threads, case)?;
    }
    let Some(Found { heading, mut document, nature, peak, rows }) = found else { return Ok(()) };
    let mut out = Out::new();
    document["peak_flops_per_second"] = json!(peak);
    document["cases"] = rows.iter().map(|r| row_json(r, peak, &nature)).collect();
    let ratios = baseline::compare(o.baseline.as_ref(), &mut document, rows.iter().map(|r| r.times));
    if o.json {
        writeln!(out, "{document:#}")?;
    } else {
        let compared = o.baseline.as_ref().map(|b| (b.heading(&document), ratios.as_slice()));
        write!(out, "{heading}{}", report(&rows, peak, &nature, compared))?;
    }
    out.flush()?;
    o.baseline.as_ref().map_or(Ok(()), |b| b.judge(o.fail_below, &document, &ratios))
}

/// What the cases have in common, and what came of them.
struct Found {
    heading: String,
    document: Value,
    nature: Nature,
    peak: Option<f64>,
    rows: Vec<Row>,
}

/// The job of one case on a device.
struct Case<'a> {
    options: &'a Options,
    what: What,
    wanted: &'a [What],
    no_gpu: Option<String>,
    found: &'a mut Option<Found>,
}

/// What came of a case.
struct Row {
    what: What,
    times: Option<Times>,
    /// Tokens of a step.
    tokens: usize,
    /// Floating-point operations of a step.
    flop: f64,
    losses: (f64, f64),
    /// Seconds from drawing the weights to the end of the first step.
    first_step: f64,
    peak: Option<u64>,
    estimated: u64,
    /// Of one step.
    tally: Option<Tally>,
}

impl OnDevice for Case<'_> {
    fn without_gpu(&mut self, why: String) {
        self.no_gpu = Some(why);
    }

    fn run<B: Backend + 'static>(self, dev: &B) -> Result<()> {
        let (o, nature) = (self.options, dev.nature());
        let setup = o.setup(&nature, dev.free_memory().is_some());
        if self.found.is_none() {
            o.check_baseline(&nature)?;
            for &what in self.wanted {
                fits(dev, o, &setup, what)?;
            }
            let flags = o.line(Which::Step, &nature, &setup);
            let known = dev.peak_flops(o.dtype).or_else(|| dev.measured_peak(o.dtype));
            *self.found = Some(Found {
                heading: print::heading(dev, &nature, o, &flags, self.no_gpu.as_deref()),
                document: print::machine_json(dev, Which::Step, &nature, o, &flags),
                nature: nature.clone(),
                peak: known.filter(|_| !nature.emulated),
                rows: Vec::new(),
            });
        }
        let row = steps(dev, o, &setup, self.what, &nature)?;
        let found = self.found.as_mut().expect("set above");
        if let (Some(peak), Some(t), None) = (&mut found.peak, row.times, dev.peak_flops(o.dtype)) {
            let rate = [(row.what.name().to_string(), row.flop / t.median)];
            hold_to_peak(&rate, peak, || dev.measured_peak(o.dtype))?;
        }
        found.rows.push(row);
        Ok(())
    }
}

/// Whether there is memory for a case.
///
/// # Errors
/// If there is not: what is needed, what is free, and flags that fit.
fn fits<B: Backend>(dev: &B, o: &Options, setup: &Setup, what: What) -> Result<()> {
    let own = dev.free_memory();
    let needed = estimated(what, o, setup, own.is_some())?;
    let Some(free) = own.or_else(available_memory).filter(|&free| free < needed) else {
        return Ok(());
    };
    let advice = remedy::flags(what, o, setup, own.is_some(), free)?;
    let (name, needed, free) = (what.name(), bytes(needed), bytes(free));
    Err(Error::new(format!("bench: {name} needs {needed} and {free} are free; {advice}")))
}

/// Documents whose tokens are often followed by the same, so that there is something to learn; the last `supervised` of each have a target.
fn batch(setup: &Setup, supervised: f64) -> MicroBatch {
    let (stream, vocabulary) = (Stream::new(&[0x7374_6570_7300]), setup.config.vocab_size);
    let draw = |i: u64| (stream.f64_at(i).powi(3) * vocabulary as f64) as i32;
    let tokens: Vec<i32> = (0..setup.tokens as u64).map(draw).collect();
    let doc_start = setup.doc_start();
    let without = ((1.0 - supervised) * setup.document as f64) as usize;
    let target = |(i, &t): (usize, &i32)| match i - doc_start[i] as usize >= without || i + 1 == setup.tokens {
        true => ((i64::from(t) * 7 + 3) % vocabulary as i64) as i32,
        false => IGNORE,
    };
    let targets: Vec<i32> = tokens.iter().enumerate().map(target).collect();
    let documents = setup.tokens.div_ceil(setup.document) as u32;
    MicroBatch {
        n_valid: targets.iter().filter(|&&t| t != IGNORE).count(),
        tokens,
        targets,
        doc_start,
        samples: (0..documents).collect(),
    }
}

/// Takes steps, and holds their losses to what random weights give at first and to falling.
fn steps<B: Backend>(dev: &B, o: &Options, setup: &Setup, what: What, nature: &Nature) -> Result<Row> {
    let (settings, started) = (what.settings(o), Instant::now());
    // The first compiles, allocates and draws: it never counts.
    let warm = o.warmup.max(1);
    let mut first_step = 0.0;
    let held = dev.memory_use().map(|m| m.now);
    let mut work = workload(dev, &RandomWeights(setup.config.clone()), &settings, None, setup.tokens)?;
    dev.synchronize()?;
    let forgotten = dev.forget_peak();
    let step = Step { micro_batches: vec![batch(setup, o.supervised); o.grad_accum], ..Default::default() };
    // What suits the narrowest model is too much for wider ones. More makes the first steps of low-rank updates rise.
    let lr = 1e-3 * (576.0 / setup.config.hidden_size as f64).min(1.0);
    let (mut times, mut losses, mut flop, mut tally) = (Vec::new(), Vec::new(), 0.0, None);
    let mut begin = Instant::now();
    let least = o.steps.unwrap_or(if nature.emulated { 1 } else { LEAST });
    for i in 0.. {
        if i == warm {
            begin = Instant::now();
        }
        let (before, start) = (dev.tally(), Instant::now());
        let stepped = work.step(dev, &Solo, &step, i as u64, lr)?;
        dev.synchronize()?;
        let seconds = start.elapsed().as_secs_f64();
        ensure!(stepped.loss.is_finite() && stepped.problem.is_none(), "{}: step {i} failed: {stepped:?}", what.name());
        losses.push(stepped.loss);
        flop = stepped.flops;
        if i >= warm {
            times.push(seconds);
            // The wait above is not the step's.
            let of = |now: Tally, then: Tally| Tally { waits: now.waits - then.waits - 1, ..now.since(then) };
            tally = dev.tally().zip(before).map(|(now, then)| of(now, then));
        }
        if i == 0 {
            first_step = started.elapsed().as_secs_f64();
        }
        if times.len() >= least && (o.steps.is_some() || nature.emulated || begin.elapsed().as_secs_f64() >= o.seconds)
        {
            break;
        }
    }
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    let expected = expected_loss(setup);
    ensure!(
        (first / expected - 1.0).abs() <= NEAR,
        "{}: wrong result: the first loss is {first:.4}, expected {expected:.4} of random weights, within {:.0} %",
        what.name(),
        100.0 * NEAR
    );
    ensure!(
        last < first,
        "{}: wrong result: the loss is {last:.6} after {} steps, expected less than the first, {first:.6}",
        what.name(),
        losses.len()
    );
    let peak = dev.memory_use().filter(|_| forgotten).zip(held).map(|(m, held)| m.peak.saturating_sub(held));
    Ok(Row {
        what,
        times: (!nature.emulated).then(|| Times::of(times)),
        tokens: setup.tokens * o.grad_accum,
        flop,
        losses: (first, last),
        first_step,
        peak,
        estimated: estimated(what, o, setup, dev.free_memory().is_some())?,
        tally,
    })
}

/// The mean loss of a model whose weights are random and whose final norm gives rows of deviation 1: logits are normal with deviation
/// s = 0.02 sqrt(C), so that the mean of logsumexp is ln V + s²/2.
fn expected_loss(setup: &Setup) -> f64 {
    let deviation = 0.02 * (setup.config.hidden_size as f64).sqrt();
    (setup.config.n_classes as f64).ln() + deviation * deviation / 2.0
}

/// The least time that the data sheet allows for the arithmetic of a step.
fn projected(r: &Row, nature: &Nature) -> Option<f64> {
    let flops = nature.sheet_flops?;
    let ceilings = Ceilings { flops, bandwidth: f64::INFINITY };
    Some(ceilings.least(super::roofline::Work { flop: r.flop, bytes: 0.0 }).0)
}

fn mib(bytes: u64) -> String {
    format!("{:.0}", bytes as f64 / f64::from(1 << 20))
}

/// The table; `compared`: lines and ratios of a baseline.
fn report(rows: &[Row], peak: Option<f64>, nature: &Nature, compared: Option<(String, &[Option<Ratio>])>) -> String {
    let launches = rows.iter().any(|r| r.tally.is_some());
    let mut header = vec!["step"];
    match nature.emulated {
        true => header.extend(["warp instr.", "tensor flop / needed", "GB requested", "projected ms, at least"]),
        false => header.extend(["ms median", "min", "max", "spread %", "tokens/s", "TFLOP/s", "% of peak"]),
    }
    header.extend(["loss", "to", "peak MiB", "estimated MiB"]);
    header.extend(["launches", "waits"].into_iter().filter(|_| launches));
    header.extend(compared.as_ref().map(|_| "ratio"));
    let mut lines = vec![header.into_iter().map(String::from).collect::<Vec<_>>()];
    for (i, r) in rows.iter().enumerate() {
        let mut line = vec![r.what.name().to_string()];
        if let Some(t) = r.times {
            let ms = |s: f64| format!("{:.1}", s * 1e3);
            line.extend([
                ms(t.median),
                ms(t.min),
                ms(t.max),
                print::spread(&t),
                format!("{:.0}", r.tokens as f64 / t.median),
            ]);
            line.push(format!("{:.2}", r.flop / t.median / 1e12));
            line.push(peak.map_or("-".into(), |peak| format!("{:.1}", 100.0 * r.flop / t.median / peak)));
        } else {
            let c = r.tally.and_then(|t| t.counted).unwrap_or_default();
            line.push(print::short(c.instructions as f64));
            line.extend([format!("{:.2}", c.tensor_flops as f64 / r.flop), format!("{:.2}", c.requested as f64 / 1e9)]);
            line.push(projected(r, nature).map_or("-".into(), |s| format!("{:.3}", s * 1e3)));
        }
        line.extend([format!("{:.4}", r.losses.0), format!("{:.4}", r.losses.1)]);
        line.extend([r.peak.map_or("-".into(), mib), mib(r.estimated)]);
        line.extend(r.tally.into_iter().flat_map(|t| [t.launches.to_string(), t.waits.to_string()]));
        line.extend(compared.as_ref().map(|(_, ratios)| ratios[i].as_ref().map_or("new".into(), Ratio::text)));
        lines.push(line);
    }
    let notes = match (nature.emulated, peak) {
        (true, _) => {
            "emulated device: nothing was timed. Counters are the emulator's; \"projected\" is a projection, the least time that the data \
             sheet allows for the arithmetic, not a speed of this build."
                .into()
        }
        (false, Some(peak)) => {
            let whose = if nature.sheet_flops.is_some() { "data sheet" } else { "measured in registers" };
            format!("peak: {:.2} TFLOP/s ({whose})", peak / 1e12)
        }
        (false, None) => "peak: this device's is not known".into(),
    };
    let baseline = compared.map_or(String::new(), |(heading, _)| heading);
    format!(
        "{baseline}{notes}\npeak memory: beyond what was held before; estimated: as `check` counts it\n\n{}",
        print::table(&lines, 1)
    )
}

fn row_json(r: &Row, peak: Option<f64>, nature: &Nature) -> Value {
    let mut v = json!({
        "name": r.what.name(), "tokens": r.tokens, "flop": r.flop,
        "loss": { "first": r.losses.0, "last": r.losses.1 },
        "peak_bytes": r.peak, "estimated_bytes": r.estimated,
        "launches": r.tally.map(|t| t.launches), "waits": r.tally.map(|t| t.waits),
    });
    if let Some(t) = r.times {
        v["seconds"] = print::times_json(&t);
        v["first_step_seconds"] = json!(r.first_step);
        v["tokens_per_second"] = json!(r.tokens as f64 / t.median);
        // Of the middle half of the steps: as far as the quartiles lie apart.
        v["tokens_per_second_spread"] = json!(r.tokens as f64 * (1.0 / t.quartile1 - 1.0 / t.quartile3));
        v["flops_per_second"] = json!(r.flop / t.median);
        v["mfu"] = json!(peak.map(|peak| r.flop / t.median / peak));
    }
    if nature.emulated {
        v["counted"] = json!(r.tally.and_then(|t| t.counted).map(|c| print::counted_json(&c)));
        v["projection"] = json!(projected(r, nature).map(|s| json!({ "seconds_at_least": s, "bound": "product" })));
    }
    v
}
