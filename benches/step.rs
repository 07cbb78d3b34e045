//! Whole training steps on the CPU: tokens per second and peak memory of two model shapes, full and LoRA, f32 and bf16.
//!
//! `cargo bench --bench step [-- [--threads N] FILTER]`, for example `"tiny LoRA"`. Every case runs in a process of its own,
//! so that its peak memory is its own. Forward, backward, clipping and AdamW on synthetic rows of 512 tokens, each a
//! document, all supervised; the loss has to be finite and to fall. The median step counts, the first is left out.
//!
//! The PyTorch columns: torch 2.15, transformers 5.23, PEFT 0.21 (sdpa, AdamW), measured with two threads on 2 cores of an AMD
//! EPYC (Zen 5), eager with the fast path of MKL on AMD in f32 and fused AdamW under bf16 autocast, then torch.compile in
//! bf16. Another processor has other figures: the peak printed by `--bench kernels` says how far apart two machines are.

use std::process::Command;
use std::time::Instant;

use ringtune::backend::Heads;
use ringtune::batch::MicroBatch;
use ringtune::comm::Solo;
use ringtune::cpu::Cpu;
use ringtune::data::loader::Step;
use ringtune::ensure;
use ringtune::error::{Error, Result};
use ringtune::model::LoraSpec;
use ringtune::model::config::{Architecture, AttentionBias, ModelConfig, RopeScaling};
use ringtune::rng::Stream;
use ringtune::settings::TrainSettings;
use ringtune::tensor::{DType, Device};
use ringtune::train::init::RandomModel;
use ringtune::train::setup::workload;

/// What PyTorch did: tokens per second eager and compiled, least peak memory in MiB of the two.
struct PyTorch(u32, Option<u32>, u32);

struct Case {
    name: &'static str,
    small: bool,
    lora: bool,
    dtype: DType,
    pytorch: Option<PyTorch>,
}

const CASES: [Case; 8] = [
    case("tiny full f32", false, false, DType::F32, Some(PyTorch(2180, None, 2180))),
    case("tiny full bf16", false, false, DType::Bf16, Some(PyTorch(2260, Some(2906), 1635))),
    case("tiny LoRA f32", false, true, DType::F32, None),
    case("tiny LoRA bf16", false, true, DType::Bf16, Some(PyTorch(2519, Some(3849), 1604))),
    case("small full f32", true, false, DType::F32, Some(PyTorch(235, None, 3699))),
    case("small full bf16", true, false, DType::Bf16, Some(PyTorch(232, Some(368), 3476))),
    case("small LoRA f32", true, true, DType::F32, None),
    case("small LoRA bf16", true, true, DType::Bf16, Some(PyTorch(362, Some(439), 2595))),
];

const fn case(name: &'static str, small: bool, lora: bool, dtype: DType, pytorch: Option<PyTorch>) -> Case {
    Case { name, small, lora, dtype, pytorch }
}

fn main() -> Result<()> {
    let mut filter = String::new();
    let (mut threads, mut only) = (None, None);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--threads" => threads = args.next().and_then(|n| n.parse::<usize>().ok()),
            // One case, in this process.
            "--case" => only = args.next(),
            // Cargo passes this to every bench.
            "--bench" => {}
            _ => filter = arg,
        }
    }
    if let Some(name) = only {
        let case = CASES.iter().find(|c| c.name == name);
        return run(case.ok_or_else(|| Error::usage(format!("no case {name:?}")))?, threads);
    }
    println!("{}", Cpu::new(threads)?.describe());
    println!(
        "{:<16} {:>8} {:>9} {:>8} {:>9}   PyTorch on Zen 5: eager / compiled tok/s, peak",
        "step", "ms", "tok/s", "GFLOP/s", "peak MiB"
    );
    let program = std::env::current_exe()?;
    for case in CASES.iter().filter(|c| c.name.contains(&filter)) {
        let mut command = Command::new(&program);
        command.args(["--case", case.name]);
        if let Some(n) = threads {
            command.args(["--threads", &n.to_string()]);
        }
        let status = command.status()?;
        ensure!(status.success(), "{}: failed with {status}", case.name);
    }
    Ok(())
}

fn model(small: bool) -> ModelConfig {
    let heads = |n_query, n_kv, head_dim| Heads { n_query, n_kv, head_dim };
    let (vocab_size, hidden_size, intermediate_size, n_layers, heads) = match small {
        true => (49152, 576, 1536, 30, heads(9, 3, 64)),
        false => (32000, 256, 688, 6, heads(8, 4, 32)),
    };
    ModelConfig {
        architecture: Architecture::Llama,
        vocab_size,
        n_classes: vocab_size,
        hidden_size,
        intermediate_size,
        n_layers,
        heads,
        max_position: 2048,
        rms_norm_eps: 1e-5,
        rope_theta: 10000.0,
        rope_scaling: RopeScaling::Default,
        tied: true,
        attention_bias: AttentionBias::None,
        mlp_bias: false,
        qk_norm: false,
        sliding_window: None,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
        pad_token_id: Some(0),
    }
}

/// Rows of 512 tokens whose successor is often the same, so that there is something to learn.
fn batch(rows: usize, vocab: usize) -> MicroBatch {
    let (stream, len) = (Stream::new(&[1]), 512);
    let draw = |i: usize| (stream.f64_at(i as u64).powi(3) * vocab as f64) as i32;
    let tokens: Vec<i32> = (0..rows * len).map(draw).collect();
    let targets: Vec<i32> = tokens.iter().map(|&t| (t * 7 + 3) % vocab as i32).collect();
    let doc_start = (0..rows * len).map(|i| (i / len * len) as i32).collect();
    MicroBatch { n_valid: targets.len(), tokens, targets, doc_start, samples: (0..rows as u32).collect() }
}

fn run(case: &Case, threads: Option<usize>) -> Result<()> {
    let dev = Cpu::new(threads)?;
    let config = model(case.small);
    let rows = if case.small { 1 } else { 4 };
    let lora = LoraSpec { dropout: 0.0, ..TrainSettings::default().lora.expect("the default") };
    let settings = TrainSettings { dtype: case.dtype, lora: case.lora.then_some(lora), ..Default::default() };
    let batch = batch(rows, config.vocab_size);
    let tokens = batch.tokens.len();
    let mut work = workload(&dev, &RandomModel::new(config, 1), &settings, None, tokens)?;
    let step = Step { micro_batches: vec![batch], ..Default::default() };
    let lr = if case.lora { 5e-3 } else { 1e-3 };
    let (mut times, mut losses, mut flops) = (vec![], vec![], 0.0);
    let begin = Instant::now();
    for i in 0.. {
        let t = Instant::now();
        let stepped = work.step(&dev, &Solo, &step, i, lr)?;
        dev.synchronize()?;
        times.push(t.elapsed().as_secs_f64());
        ensure!(stepped.loss.is_finite() && stepped.problem.is_none(), "{}: step {i}: {stepped:?}", case.name);
        losses.push(stepped.loss);
        flops = stepped.flops;
        if i >= 5 && begin.elapsed().as_secs_f64() > 8.0 {
            break;
        }
    }
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    ensure!(last < first, "{}: the loss rose from {first} to {last}", case.name);
    times.remove(0);
    times.sort_by(f64::total_cmp);
    let seconds = times[times.len() / 2];
    let peak = peak_mib().map_or("-".into(), |m| m.to_string());
    let pytorch = case.pytorch.as_ref().map_or("-".into(), |PyTorch(eager, compiled, mib)| {
        format!("{eager} / {} tok/s, {mib} MiB", compiled.map_or("-".into(), |c| c.to_string()))
    });
    println!(
        "{:<16} {:>8.0} {:>9.0} {:>8.0} {peak:>9}   {pytorch}",
        case.name,
        seconds * 1e3,
        tokens as f64 / seconds,
        flops / seconds / 1e9
    );
    Ok(())
}

/// Largest resident memory of this process so far, where the system tells.
fn peak_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib / 1024)
}
