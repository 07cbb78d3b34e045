//! `ringtune plan`: what a training would take on GPUs that one does not have yet: memory, time, communication, tokens a second as a range.

pub mod hardware;
pub mod links;
pub mod step;
pub mod traffic;

use std::io::Write;
use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgGroup, ArgMatches, Command, value_parser};
use serde_json::{Value, json};

use super::bench::shapes::Shape;
use super::fetch::ALONE;
use super::{device, open};
use crate::comm::Fold;
use crate::error::{Error, Result};
use crate::hf;
use crate::hub::Part;
use crate::model::Recompute;
use crate::say::Out;
use crate::settings::{TrainSettings, Zero};
use crate::tensor::DType;
use crate::text::{grouped, table};
use crate::train::setup::lora_spec;
use crate::words::Words;
use hardware::{Gpu, find, network};
use step::{Assumed, Job, Memory, Times};

/// Share of the peak, where none was measured: what trainings of other programs publish for dense models on A100 and H100.
const MFU: (f64, f64) = (0.30, 0.50);
/// Share of a line's rate that collectives reach, where none was measured: the table in links.rs's tests has both ends.
const OF_LINE: (f64, f64) = (0.35, 0.8);
/// Share of a GPU's memory that a training can have: the driver, NCCL and fragments take the rest.
const USABLE: f64 = 0.95;

const FORMULAS: &str = "\
Formulas:
  compute        FLOP of a micro-batch (matrix products and attention, 6 a weight and token; 4 with LoRA) x accumulation / (peak x MFU)
  all-reduce     2(w-1)/w x bytes / B + latency; reduce-scatter and all-gather half of it (Patarasuk and Yuan 2009); gradients travel as f32
  B              bus bandwidth of nccl-tests: of NVLink or PCI Express on one host, of all network cards of a host together on several, never
                 more than the host's own; 0.35 to 0.8 of the line's rate unless it was measured
  latency        NCCL's table (src/graph/tuning.cc): ring 8.4 us + 3.4 (NVLink), 5.7 (PCIe), 9.6 (network) a step; tree 4.4 + 0.52, 1.0, 5.0
  ordered fold   (w-1)/w x bytes / B after each micro-batch, sent point to point; of g GPUs on each of several hosts g(w-g)/w, B being the host's
                 network; a step of latency for each other GPU; copies at the memory bandwidth; two stages of 64 MiB each way
  not hidden     what sums outlast the backward pass of the last micro-batch, bucket by bucket; what folds keep the next micro-batch waiting;
                 with --zero 1 what the forward pass waits for weights, which are gathered beside it
  update         30 bytes (bf16) or 28 (f32) a trained weight / memory bandwidth
  step           the sum of compute, not hidden and update, and 2 % on several hosts
Held in this program's tests to published figures: BERT-Large's all-reduce on 2 to 16 hosts of 40 Gb/s within 4 %, over InfiniBand within 6 % from 4
hosts on (2 hosts are faster by 64 %), Llama 3.1 8B from 8 to 128 H100 within 1 %, MPT from 8 to 64 and 128 GPUs within 3.5 %.";

/// The command's flags.
pub fn command() -> Command {
    let arg = |name: &'static str, value: &'static str| Arg::new(name).long(name).value_name(value);
    let count =
        |name, most, default| arg(name, "N").default_value(default).value_parser(value_parser!(u64).range(1..=most));
    let number = |name, value| arg(name, value).value_parser(value_parser!(f64)).allow_hyphen_values(true);
    let words = |list: &[&'static str]| list.to_vec();
    Command::new("plan")
        .about("Say what a training would take on GPUs that are not here: memory, time, communication, tokens a second as a range")
        .after_help(FORMULAS)
        .arg(arg("model-path", "DIR").value_parser(value_parser!(PathBuf)).help("Model whose shape it is: a folder with config.json"))
        .arg(arg("model", "MODEL").value_parser(words(Shape::WORDS)).help("Shape of Llama-3-8B, Llama-3.2-1B, SmolLM2-135M or a tiny model"))
        .group(ArgGroup::new("shape").args(["model-path", "model"]).required(true))
        .arg(arg("gpu", "NAME").default_value("h100").help("Kind of GPU: h100, h200, b200, a100, l40s, rtx-4090 and others; an unknown one lists them"))
        .arg(count("gpus", 65_536, "8").help("GPUs over all hosts"))
        .arg(arg("hosts", "N").value_parser(value_parser!(u64).range(1..=65_536)).help("Hosts [default: one for each 8 GPUs]"))
        .arg(arg("network", "CARDSxGBITS").help("Network of a host: 8x400 is eight cards of 400 Gb/s, 25 one of 25; needed for several hosts"))
        .arg(arg("zero", "STAGE").default_value("0").value_parser(words(Zero::WORDS)).help("1: the optimiser's state is sharded over the GPUs"))
        .arg(arg("fold", "WHEN").value_parser(words(Fold::WORDS)).help("When gradients are summed: once a step, or in order after every micro-batch, which gives the bits of one GPU [default: step]"))
        .arg(Arg::new("use-lora").long("use-lora").action(ArgAction::SetTrue).help("Train low-rank updates of the seven products"))
        .arg(count("lora-r", 1024, "16").help("Their rank"))
        .arg(arg("max-seq-len", "N").value_parser(value_parser!(u64).range(1..=1 << 24)).help("Tokens of a row [default: 2048, or what the model allows]"))
        .arg(count("per-device-train-batch-size", 1 << 20, "1").help("Rows of a micro-batch"))
        .arg(count("gradient-accumulation-steps", 1 << 20, "1").help("Micro-batches of a step on each GPU"))
        .arg(arg("dtype", "TYPE").default_value("bf16").value_parser(words(&["bf16", "f32"])).help("How weights and activations are stored"))
        .arg(arg("recompute", "WHAT").default_value("none").value_parser(words(Recompute::WORDS)).help("What backward computes again"))
        .arg(number("mfu", "SHARE").help("Share of the peak that was measured (`ringtune bench step`), as 0.42 [default: 0.30 to 0.50, a guess]"))
        .arg(number("bus-bandwidth", "GB/S").help("busbw that was measured (nccl-tests, `ringtune bench collectives`) [default: 0.35 to 0.8 of the line]"))
        .arg(number("peak-tflops", "N").help("Peak of the GPU instead of its data sheet's, dense bf16"))
        .arg(number("device-memory", "GB").help("Memory of the GPU instead of its data sheet's"))
        .arg(number("memory-bandwidth", "GB/S").help("Memory bandwidth of the GPU instead of its data sheet's"))
        .arg(Arg::new("json").long("json").action(ArgAction::SetTrue).help("Print one JSON document"))
}

/// A number in a range that was typed.
fn number(m: &ArgMatches, id: &str, least: f64, most: f64) -> Result<Option<f64>> {
    match m.get_one::<f64>(id) {
        Some(&x) if !(least..=most).contains(&x) => {
            Err(Error::usage(format!("--{id}: expected a number from {least} to {most}, found {x}")))
        }
        given => Ok(given.copied()),
    }
}

/// Plans and prints.
///
/// # Errors
/// A usage error if flags make no sense together; or if the model's config cannot be read.
pub fn run(m: &ArgMatches) -> Result<()> {
    let count = |id: &str| m.get_one::<u64>(id).map(|&n| n as usize);
    let word = |id: &str| m.get_one::<String>(id).map(String::as_str);
    let config = match m.get_one::<PathBuf>("model-path") {
        Some(dir) => hf::config::read(&ALONE.model(dir, Part::Config)?.0)?.model,
        None => word("model").and_then(Shape::of_word).map(|s| s.config(None)).expect("clap requires one of the two"),
    };
    let gpu = gpu(m)?;
    let world = count("gpus").expect("it has a default");
    let hosts = count("hosts").unwrap_or(world.div_ceil(8));
    if hosts > world || !world.is_multiple_of(hosts) {
        return Err(Error::usage(format!(
            "--gpus {world}: expected a multiple of --hosts {hosts}: every host has as many"
        )));
    }
    if world == 1 && word("fold").is_some() {
        return Err(Error::usage("--fold: has no effect on one GPU; leave it out, or give --gpus"));
    }
    let line = line(word("network"), hosts, &gpu)?;
    let row = open::row_length(count("max-seq-len").or(Some(config.max_position.min(2048))), config.max_position)?;
    let settings = TrainSettings {
        micro_batch_size: count("per-device-train-batch-size").expect("it has a default"),
        eval_batch_size: 1,
        grad_accum: count("gradient-accumulation-steps").expect("it has a default"),
        dtype: if word("dtype") == Some("f32") { DType::F32 } else { DType::Bf16 },
        zero: word("zero").and_then(Zero::of_word).unwrap_or_default(),
        fold: word("fold").and_then(Fold::of_word),
        recompute: word("recompute").and_then(Recompute::of_word).unwrap_or(Recompute::None),
        ..TrainSettings::default()
    };
    let mut lora = lora_spec(&settings)?.filter(|_| m.get_flag("use-lora"));
    if let Some(lora) = &mut lora {
        lora.r = count("lora-r").expect("it has a default");
    }
    let job = Job {
        config: &config,
        settings: &settings,
        lora: lora.as_ref(),
        row,
        gpu,
        world,
        hosts,
        device: device::footprint(true, config.n_classes),
    };
    // Another forward pass is no part of MFU's arithmetic.
    let again = if settings.recompute == Recompute::Layer { 0.75 } else { 1.0 };
    let mfu = number(m, "mfu", 0.001, 1.0)?.map_or((MFU.0 * again, MFU.1 * again), |x| (x, x));
    let bus =
        number(m, "bus-bandwidth", 1e-6, 1e6)?.map_or((OF_LINE.0 * line, OF_LINE.1 * line), |x| (x * 1e9, x * 1e9));
    let plan = Plan {
        memory: job.memory(),
        worst: (Assumed { mfu: mfu.0, bus: bus.0 }, job.times(Assumed { mfu: mfu.0, bus: bus.0 })),
        best: (Assumed { mfu: mfu.1, bus: bus.1 }, job.times(Assumed { mfu: mfu.1, bus: bus.1 })),
        job,
    };
    let mut out = Out::new();
    match m.get_flag("json") {
        true => writeln!(out, "{:#}", plan.json())?,
        false => write!(out, "{}", plan.text(word("network")))?,
    }
    out.flush()?;
    Ok(())
}

fn gpu(m: &ArgMatches) -> Result<Gpu> {
    let known = find(m.get_one::<String>("gpu").expect("it has a default"))?;
    Ok(Gpu {
        flops: number(m, "peak-tflops", 0.001, 1e6)?.map_or(known.flops, |x| x * 1e12),
        memory: number(m, "device-memory", 0.1, 1e5)?.map_or(known.memory, |x| x * 1e9),
        memory_rate: number(m, "memory-bandwidth", 0.1, 1e6)?.map_or(known.memory_rate, |x| x * 1e9),
        ..known
    })
}

/// Bytes a second of the slowest line on the way around, in one direction.
fn line(text: Option<&str>, hosts: usize, gpu: &Gpu) -> Result<f64> {
    match (text, hosts) {
        (None, 1) => Ok(gpu.link_rate),
        (Some(text), 2..) => Ok(network(text)?.min(gpu.link_rate)),
        (None, _) => Err(Error::usage(format!(
            "--network: {hosts} hosts need one: cards of a host and gigabits a second of each, as 8x400, 2x100 or 25"
        ))),
        (Some(_), _) => Err(Error::usage("--network: has no effect on one host; leave it out, or give --hosts")),
    }
}

/// What came of it.
struct Plan<'a> {
    job: Job<'a>,
    memory: Memory,
    worst: (Assumed, Times),
    best: (Assumed, Times),
}

/// Two digits: a plan knows no more.
fn two(x: f64) -> f64 {
    if x == 0.0 || !x.is_finite() {
        return x;
    }
    let unit = 10f64.powi(x.abs().log10().floor() as i32 - 1);
    (x / unit).round() * unit
}

/// Two digits and a unit of seconds.
fn time(seconds: f64) -> String {
    let s = two(seconds);
    let digits = |x: f64| if x < 9.95 { 1 } else { 0 };
    match s {
        0.0 => "0".into(),
        s if s < 1e-3 => format!("{:.*} us", digits(s * 1e6), s * 1e6),
        s if s < 1.0 => format!("{:.*} ms", digits(s * 1e3), s * 1e3),
        s => format!("{:.*} s", digits(s), s),
    }
}

fn gb(bytes: f64) -> String {
    format!("{:.1} GB", bytes / 1e9)
}

/// A range of numbers of two digits.
fn range(low: f64, high: f64) -> String {
    let text = |x: f64| if x < 10.0 { format!("{x:.1}") } else { grouped(x.round() as u64) };
    let (low, high) = (text(two(low)), text(two(high)));
    if low == high { low } else { format!("{low} to {high}") }
}

impl Plan<'_> {
    fn fits(&self) -> bool {
        self.memory.total() <= USABLE * self.job.gpu.memory
    }

    fn speed(&self, t: &Times) -> f64 {
        self.job.tokens() / t.step
    }

    /// Share of the step in which a GPU computes.
    fn computing(t: &Times) -> f64 {
        t.compute / t.step
    }

    fn text(&self, network: Option<&str>) -> String {
        let (j, m) = (&self.job, &self.memory);
        let row = |name: &str, x: String| vec![name.to_string(), x];
        let what = match j.lora {
            Some(l) => format!("{} trained by LoRA of rank {}", grouped(j.trained() as u64), l.r),
            None => "all trained".into(),
        };
        let joined = if j.hosts > 1 { format!("; {} Gb/s a host", network.unwrap_or("?")) } else { String::new() };
        let s = j.settings;
        let weights = crate::model::weights::Weights::count(j.config);
        let given = table(&[
            row(
                "model",
                format!(
                    "{} weights, {what}, {}",
                    grouped(weights),
                    if s.dtype == DType::Bf16 { "bf16" } else { "f32" }
                ),
            ),
            row(
                "GPUs",
                format!(
                    "{} x {} on {} host{}{joined}",
                    j.world,
                    j.gpu.name,
                    j.hosts,
                    if j.hosts == 1 { "" } else { "s" }
                ),
            ),
            row(
                "step",
                format!(
                    "{} tokens: {} x {} tokens, {} micro-batch{}, {} GPUs",
                    grouped(j.tokens() as u64),
                    s.micro_batch_size,
                    j.row,
                    s.grad_accum,
                    if s.grad_accum == 1 { "" } else { "es" },
                    j.world
                ),
            ),
        ]);
        let verdict = if self.fits() {
            "fits".into()
        } else {
            format!(
                "does not fit; try {}--recompute layer, a smaller micro-batch or --use-lora",
                if j.zero() { "" } else { "--zero 1, " }
            )
        };
        let memory = table(&[
            row("weights", gb(m.weights)),
            row("gradients", gb(m.gradients)),
            row("moments and masters", gb(m.state)),
            row("activations", gb(m.activations)),
            row("sum", gb(m.total())),
            row("of", gb(j.gpu.memory)),
        ]);
        let line =
            |name: &str, of: fn(&Times) -> f64| vec![name.to_string(), time(of(&self.best.1)), time(of(&self.worst.1))];
        let times = table(&[
            vec!["".into(), "at best".into(), "at worst".into()],
            line("compute", |t| t.compute),
            line("communication", |t| t.communication),
            line("not hidden", |t| t.exposed),
            line("update", |t| t.update),
            line("step", |t| t.step),
        ]);
        let t = j.traffic();
        let calls = t.all_reduce + t.reduce_scatter + t.all_gather + t.send + t.receive;
        let (low, high) = (self.speed(&self.worst.1), self.speed(&self.best.1));
        let (w, b) = (&self.worst.0, &self.best.0);
        let world = j.world as f64;
        format!(
            "{given}\nmemory per GPU\n{memory}{verdict}\n\ntime of a step\n{times}\nNCCL      {} calls a step of each GPU, which sends {}\ntokens/s  {}, {} a GPU; \
             GPUs compute {} % of the time\nassumed   {} % of the peak, {:.0} TFLOP/s; bus bandwidth {} GB/s a GPU\n\n{FORMULAS}\n",
            grouped(calls as u64),
            gb(t.sent as f64),
            range(low, high),
            range(low / world, high / world),
            range(100.0 * Self::computing(&self.worst.1), 100.0 * Self::computing(&self.best.1)),
            range(100.0 * w.mfu, 100.0 * b.mfu),
            j.gpu.flops / 1e12,
            range(w.bus / 1e9, b.bus / 1e9),
        )
    }

    fn json(&self) -> Value {
        let (j, m, t) = (&self.job, &self.memory, self.job.traffic());
        let side = |(a, t): &(Assumed, Times)| {
            json!({
                "mfu": a.mfu, "bus_bytes_per_second": a.bus,
                "seconds": {"compute": two(t.compute), "communication": two(t.communication), "exposed": two(t.exposed), "update": two(t.update),
                    "step": two(t.step)},
                "computing": two(Self::computing(t)), "tokens_per_second": two(self.speed(t)),
                "tokens_per_second_per_gpu": two(self.speed(t) / j.world as f64),
            })
        };
        json!({
            "command": "plan", "version": env!("CARGO_PKG_VERSION"),
            "weights": crate::model::weights::Weights::count(j.config), "trained": j.trained() as u64,
            "gpu": {"name": j.gpu.name, "flops_per_second": j.gpu.flops, "memory_bytes": j.gpu.memory,
                "memory_bytes_per_second": j.gpu.memory_rate, "link_bytes_per_second": j.gpu.link_rate},
            "gpus": j.world, "hosts": j.hosts, "zero": u8::from(j.zero()), "fold": j.fold().word(),
            "nccl_per_step": {"ncclAllReduce": t.all_reduce, "ncclReduceScatter": t.reduce_scatter, "ncclAllGather": t.all_gather,
                "ncclSend": t.send, "ncclRecv": t.receive, "sent_bytes": t.sent},
            "tokens_per_step": j.tokens() as u64,
            "memory_bytes": {"weights": m.weights, "gradients": m.gradients, "moments_and_masters": m.state, "activations": m.activations,
                "total": m.total()},
            "fits": self.fits(), "best": side(&self.best), "worst": side(&self.worst),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(line: &str) -> Result<()> {
        run(&command().try_get_matches_from(line.split_whitespace()).map_err(|e| Error::usage(e.to_string()))?)
    }

    #[test]
    fn two_digits_and_no_more() {
        assert_eq!([0.0123456, 1234.0, 99.6, 0.0].map(two), [0.012, 1200.0, 100.0, 0.0]);
        assert_eq!(
            [0.0, 3.21e-6, 0.01234, 0.5678, 1.234, 123.4].map(time),
            ["0", "3.2 us", "12 ms", "570 ms", "1.2 s", "120 s"]
        );
        assert_eq!((range(1234.0, 98_765.0), range(1.23, 1.21)), ("1,200 to 99,000".into(), "1.2".into()));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (line, words) in [
            ("plan", "required"),
            ("plan --model 8b --gpus 12 --hosts 5", "--gpus 12: expected a multiple of --hosts 5"),
            ("plan --model 8b --gpus 2 --hosts 4 --network 25", "--gpus 2: expected a multiple"),
            ("plan --model 8b --gpus 64", "--network: 8 hosts need one"),
            ("plan --model 8b --network 25", "--network: has no effect on one host"),
            ("plan --model 8b --gpus 1 --fold step", "--fold: has no effect on one GPU"),
            ("plan --model 8b --gpus 16 --network fast", "expected CARDSxGBITS"),
            ("plan --model 8b --gpu k80", "\"k80\" is not known; expected b200"),
            ("plan --model 8b --mfu 45", "--mfu: expected a number from 0.001 to 1, found 45"),
            ("plan --model 8b --bus-bandwidth -1", "--bus-bandwidth: expected a number"),
            ("plan --model 8b --max-seq-len 100000", "max_seq_len"),
            ("plan --model-path /surely/missing", "/surely/missing/config.json"),
        ] {
            let e = planned(line).unwrap_err().to_string();
            assert!(e.contains(words), "{line}: {e}");
        }
    }
}
