//! Models, trainings and micro-batches that nobody wrote down, drawn by a seed: two steps, an evaluation and a decoding of each on the
//! device, on the CPU and in f64. `RANDOM_CASES=100..200` draws these; else a few of them, or with `RINGTUNE_FULL=1` two hundred. `VGPU_CC`
//! says on what kind of device; a test of its own takes those of other architectures.

mod commands;
mod draw;
mod training;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use ringtune::cpu::Cpu;
use ringtune::cuda::Cuda;
use ringtune::error::Result;
use ringtune::model::Recompute;

use self::draw::Case;
use self::training::{Training, too_far};
use crate::reference::Reference;
use crate::skip::device;

/// The seeds to draw.
fn seeds() -> Range<u64> {
    if let Ok(named) = std::env::var("RANDOM_CASES") {
        let (first, end) = named.split_once("..").expect("RANDOM_CASES=FIRST..END");
        return first.parse().unwrap()..end.parse().unwrap();
    }
    if std::env::var("RINGTUNE_FULL").is_ok_and(|v| v == "1") { 0..200 } else { 0..3 }
}

/// Runs a case; lines of what is wrong, and the largest distance in units of what is allowed.
fn run(dev: &Cuda, cpu: &Cpu, case: &Case) -> Result<(Vec<String>, f64)> {
    let dtype = case.settings.dtype;
    let (mut wrong, mut worst) = (Vec::new(), 0.0f64);
    let mut join = |what: &str, (lines, far): (Vec<String>, f64)| {
        wrong.extend(lines.into_iter().map(|line| format!("{what}: {line}")));
        worst = if far > worst || far.is_nan() { far } else { worst };
    };
    let mut ours = Training::new(dev, case)?;
    let (mut theirs, mut exact) = (Training::new(cpu, case)?, Training::new(&Reference, case)?);
    for step in 0..case.steps.len() {
        let (results, problem) = ours.step(step)?;
        let (cpu, cpu_problem) = theirs.step(step)?;
        let (expected, expected_problem) = exact.step(step)?;
        assert!(problem == expected_problem && cpu_problem == expected_problem, "{problem:?}, {expected_problem:?}");
        join(&format!("step {step}"), too_far(dtype, &results, &cpu, &expected));
        if step == 0 {
            // Other modes give the same bits.
            let modes = [Recompute::None, Recompute::Attention, Recompute::Layer];
            let other = modes[(modes.iter().position(|m| *m == case.settings.recompute).unwrap() + 1) % 3];
            let settings = ringtune::settings::TrainSettings { recompute: other, ..case.settings.clone() };
            let again = Case { settings, ..Case::draw(case.seed) };
            let (again, _) = Training::new(dev, &again)?.step(0)?;
            let bits = |all: &[(String, Vec<f32>)]| -> Vec<u32> {
                all.iter().flat_map(|(_, x)| x).map(|x| x.to_bits()).collect()
            };
            if bits(&again) != bits(&results) {
                join("recompute", (vec![format!("other bits by {other:?}")], 0.0));
            }
        }
        // Each step begins with the same weights everywhere.
        let weights = exact.weights()?;
        ours.take(&weights)?;
        theirs.take(&weights)?;
        exact.take(&weights)?;
    }
    join("evaluation", too_far(dtype, &ours.evaluate()?, &theirs.evaluate()?, &exact.evaluate()?));
    join("decoding", too_far(dtype, &ours.decode()?, &theirs.decode()?, &exact.decode()?));
    Ok((wrong, worst))
}

/// Twice as far from f64 as the CPU at most, whatever is drawn, and never a panic.
#[test]
fn drawn_trainings_are_as_close_as_the_cpu() {
    let Some(dev) = device() else { return };
    let cpu = Cpu::new(None).unwrap();
    let mut failed = Vec::new();
    for seed in seeds() {
        let case = Case::draw(seed);
        let words = case.words();
        let done = catch_unwind(AssertUnwindSafe(|| run(&dev, &cpu, &case)));
        match done {
            Ok(Ok((wrong, worst))) if wrong.is_empty() => println!("{worst:.2} {words}"),
            Ok(Ok((wrong, _))) => failed.push(format!("{words}\n  {}", wrong.join("\n  "))),
            Ok(Err(e)) => failed.push(format!("{words}\n  error: {e}")),
            Err(_) => failed.push(format!("{words}\n  a panic, above")),
        }
        if let Some(last) = failed.last().filter(|text| text.starts_with(&format!("case {seed}:"))) {
            println!("FAILED {last}");
        }
    }
    assert!(failed.is_empty(), "{} cases:\n{}", failed.len(), failed.join("\n"));
}

/// The same on devices with other tiles, other kernels and other sums: processes of their own, where the emulated device poses as one. They
/// draw other cases.
#[test]
fn drawn_trainings_on_other_devices() {
    let chosen = ["RANDOM_CASES", "VGPU_CC"].iter().any(|name| std::env::var_os(name).is_some());
    if chosen || !device().is_some_and(|dev| dev.properties().emulated) {
        return;
    }
    let few = seeds();
    let each = (few.end - few.start).div_ceil(5);
    for (i, (cc, products)) in [("8.9", "ampere"), ("9.0", "hopper"), ("12.0", "exact")].into_iter().enumerate() {
        let first = few.end + i as u64 * each;
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "random::drawn_trainings_are_as_close_as_the_cpu", "--nocapture"]);
        child.env("VGPU_CC", cc).env("VGPU_MMA", products).env("RANDOM_CASES", format!("{first}..{}", first + each));
        let status = child.status().unwrap();
        assert!(status.success(), "cases {first}..{} with VGPU_CC={cc} VGPU_MMA={products}: {status}", first + each);
    }
}

/// The same of whole commands, of which few are drawn: each case is ten processes.
#[test]
fn drawn_commands_give_what_the_cpu_gives() {
    if device().is_none() {
        return;
    }
    let seeds = seeds();
    let few = if std::env::var("RANDOM_CASES").is_ok() { seeds } else { 0..seeds.end.div_ceil(10) };
    let mut failed = Vec::new();
    for seed in few {
        let (said, wrong) = commands::run(seed);
        let text = format!("case {seed}: {}\n  {}", said.join("\n  "), wrong.join("\n  WRONG "));
        println!("{}{text}", if wrong.is_empty() { "" } else { "FAILED " });
        if !wrong.is_empty() {
            failed.push(text);
        }
    }
    assert!(failed.is_empty(), "{} cases:\n{}", failed.len(), failed.join("\n"));
}
