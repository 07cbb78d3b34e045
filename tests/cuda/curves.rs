//! Loss curves beside the CPU's: every kind of training in every mode. `RINGTUNE_FULL=1` takes 200 steps of each, which `make test-full` does,
//! and prints them as the table of kernels/README.md; else two of them, drawn by a fixed seed, one of each precision, take a few.

use ringtune::rng::Stream;

use crate::skip::device;
use crate::train::{Place, losses};

/// One kind of training: flags that decide its bits.
#[derive(Clone, Copy, Debug)]
struct Kind {
    lora: bool,
    packed: bool,
    bf16: bool,
}

/// Largest relative difference of a curve.
const NEAR: f64 = 5e-3;

/// Steps in which runs in bf16 are still close one by one. Later they part: what one rounding moves by a unit, the next steps enlarge. The
/// CPU's own instruction levels differ by up to 9 % in a single one of 200 steps, and their means over all of these by 0.08 %.
const TOGETHER: usize = 20;

const RECOMPUTE: [&str; 3] = ["none", "attention", "layer"];

impl Kind {
    fn all() -> impl Iterator<Item = Self> {
        (0..8).map(|i| Kind { lora: i & 1 > 0, packed: i & 2 > 0, bf16: i & 4 > 0 })
    }

    fn flags(self, steps: usize) -> String {
        let Self { lora, packed, bf16 } = self;
        let kind =
            if lora { "--lora-r 8 --lora-dropout 0.1 --learning-rate 5e-3" } else { "--no-lora --learning-rate 2e-3" };
        let packing = if packed { "" } else { " --no-packing" };
        let precision = if bf16 { "bf16" } else { "no" };
        format!("{kind}{packing} --mixed-precision {precision} --max-steps {steps} --val-fraction 0 --save-strategy no")
    }

    /// As the table has it.
    fn words(self) -> String {
        let Self { lora, packed, bf16 } = self;
        let (kind, rows) =
            (if lora { "LoRA with dropout" } else { "full" }, if packed { "packed" } else { "a document a row" });
        format!("{} | {kind} | {rows}", if bf16 { "bf16" } else { "f32" })
    }

    /// Trains on both devices, on the first in these modes, and holds its curve to the CPU's.
    fn follows_the_cpu(self, steps: usize, modes: &[&str]) {
        let place = Place::new();
        let flags = self.flags(steps);
        let cpu = losses(&place.sft("cpu", "cpu", &flags, &[]));
        // Something is learnt, or curves would agree whatever the gradients are.
        let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
        let quarter = steps / 4;
        assert!(mean(&cpu[steps - quarter..]) < mean(&cpu[..quarter]) - 0.3, "{self:?}: {cpu:?}");
        for mode in modes {
            let ours = losses(&place.sft(mode, "cuda", &format!("{flags} --recompute {mode}"), &[]));
            let what = format!("{self:?}, recompute {mode}");
            assert_eq!((ours.len(), cpu.len()), (steps, steps), "{what}");
            let apart: Vec<f64> = ours.iter().zip(&cpu).map(|(a, b)| (a / b - 1.0).abs()).collect();
            let worst = |steps: usize| apart.iter().take(steps).copied().fold(0.0, f64::max);
            let (together, single) = (worst(TOGETHER), worst(steps));
            let whole = (mean(&ours) / mean(&cpu) - 1.0).abs();
            println!("| {} | {mode} | {together:.1e} | {single:.1e} | {whole:.1e} |", self.words());
            let one_by_one = if self.bf16 { together } else { single };
            assert!(one_by_one < NEAR && whole < NEAR, "{what}: {ours:?} and on the CPU {cpu:?}");
        }
    }
}

#[test]
fn curves_follow_the_cpu() {
    if device().is_none() {
        return;
    }
    println!("| precision | training | rows | recompute | first {TOGETHER} steps | all, one by one | their mean |");
    if std::env::var("RINGTUNE_FULL").is_ok_and(|v| v == "1") {
        Kind::all().for_each(|kind| kind.follows_the_cpu(200, &RECOMPUTE));
        return;
    }
    let drawn = |i: u64, n: usize| (Stream::new(&[0x6375_7276]).f64_at(i) * n as f64) as usize;
    for (i, bf16) in [false, true].into_iter().enumerate() {
        let kind = Kind::all().filter(|k| k.bf16 == bf16).nth(drawn(2 * i as u64, 4)).expect("four of each precision");
        kind.follows_the_cpu(20, &[RECOMPUTE[drawn(2 * i as u64 + 1, 3)]]);
    }
}
