//! `ringtune bench kernels`: every case verified, then timed against the ceilings of the same run; on an emulated device counted.

use std::cell::RefCell;
use std::io::Write;

use serde_json::{Value, json};

use super::baseline::{self, Ratio};
use super::case::{Case, Kernel, Setup, Verified};
use super::cases;
use super::options::{Options, Which};
use super::print;
use super::products::{self, Dims};
use super::roofline::{Bound, Ceilings, Work, hold_to_peak};
use super::timing::{self, Times};
use crate::backend::{Backend, MatMul};
use crate::commands::device::OnDevice;
use crate::error::{Error, Result};
use crate::machine::available_memory;
use crate::measure::{Nature, Tally};
use crate::say::{self, Out};
use crate::tensor::{DType, Device, Tensor};
use crate::text::bytes;
use crate::words::Words;

/// Side of the square product that shows what products reach: on a device of its own memory, on the CPU, for a quick look.
const SQUARE: [usize; 3] = [8192, 1024, 256];

/// Bytes of the copy that shows what the memory reaches, at least.
const COPY: u64 = 32 << 20;

/// The job on a device.
pub struct Bench<'a> {
    /// What was asked.
    pub options: &'a Options,
    /// Why `auto` took no GPU.
    pub no_gpu: Option<String>,
}

/// What came of a case.
struct Row {
    kernel: &'static str,
    name: String,
    shape: String,
    work: Work,
    error: f64,
    tally: Option<Tally>,
    times: Option<(Times, usize)>,
}

/// The ceilings of a run: those that were measured, or those of a data sheet; the name of the best product.
struct Under {
    ceilings: Ceilings,
    product: String,
    /// Operations a second of a loop in registers, where the device has one.
    peak: Option<f64>,
}

impl OnDevice for Bench<'_> {
    fn without_gpu(&mut self, why: String) {
        self.no_gpu = Some(why);
    }

    fn run<B: Backend + 'static>(self, dev: &B) -> Result<()> {
        let (o, nature) = (self.options, dev.nature());
        let setup = o.setup(&nature, dev.free_memory().is_some());
        let flags = o.line(Which::Kernels, &nature, &setup);
        o.check_baseline(&nature)?;
        let side = square_side(o, dev.free_memory().is_some());
        let mut all = wanted(o, &setup)?;
        all.extend(beside(dev, o, &setup, side));
        fits(dev, o, &setup)?;
        let (rows, under) = match nature.emulated {
            true => (all.iter().map(|c| counted(dev, c)).collect::<Result<Vec<_>>>()?, sheet(&nature)),
            false => {
                let (rows, under) = measured(dev, o, &nature, &all, side)?;
                (rows, Some(under))
            }
        };
        let mut out = Out::new();
        let mut document = print::machine_json(dev, Which::Kernels, &nature, o, &flags);
        document["ceilings"] = ceilings_json(under.as_ref(), &nature);
        document["cases"] = rows.iter().map(|r| row_json(r, setup.dtype, under.as_ref(), &nature)).collect();
        let ratios =
            baseline::compare(o.baseline.as_ref(), &mut document, rows.iter().map(|r| r.times.map(|(t, _)| t)));
        if o.json {
            writeln!(out, "{document:#}")?;
        } else {
            write!(out, "{}", print::heading(dev, &nature, o, &flags, self.no_gpu.as_deref()))?;
            write!(out, "{}", o.baseline.as_ref().map_or(String::new(), |b| b.heading(&document)))?;
            write!(out, "{}", report(&rows, &ratios, under.as_ref(), o, &nature))?;
        }
        out.flush()?;
        o.baseline.as_ref().map_or(Ok(()), |b| b.judge(o.fail_below, &document, &ratios))
    }
}

/// The cases that were asked for.
fn wanted<B: Backend + 'static>(o: &Options, setup: &Setup) -> Result<Vec<Case<B>>> {
    let mut all = cases::all::<B>(setup);
    let mut kernels: Vec<&str> = all.iter().map(|c| c.kernel).collect();
    kernels.dedup();
    o.check_only(all.iter().map(|c| c.name.as_str()), &kernels)?;
    all.retain(|c| o.wants(&c.name));
    Ok(all)
}

/// The products of the maker's library, where they are asked for and there is one.
fn beside<B: Backend + 'static>(dev: &B, o: &Options, setup: &Setup, side: usize) -> Vec<Case<B>> {
    if !o.peer {
        return Vec::new();
    }
    let found = match setup.dtype {
        DType::Bf16 => dev.peer(),
        _ => Err(Error::new("cuBLASLt: products of bf16 alone are compared")),
    };
    match found {
        Ok(path) => say::note(&format!("beside our products: {path}")),
        Err(why) => {
            say::note(&format!("--compare: {why}; our kernels alone are measured"));
            return Vec::new();
        }
    }
    // Those of which ours is wanted.
    let mut peers = products::peers::<B>(setup, side);
    peers.retain(|c| o.wants(&c.name) || o.wants(&c.name.replacen(products::PEER, "matmul", 1)));
    peers
}

/// Side of the square product.
fn square_side(o: &Options, has_memory: bool) -> usize {
    match (o.seconds > 0.0, has_memory) {
        (true, true) => SQUARE[0],
        (true, false) => SQUARE[1],
        (false, _) => SQUARE[2],
    }
}

/// Bytes that the largest of the wanted cases takes, on the device and, where a device works in the machine's memory, for the
/// values that are verified.
fn need<B: Backend + 'static>(o: &Options, setup: &Setup, own: bool) -> u64 {
    let cases = cases::all::<B>(setup);
    let largest = cases.iter().filter(|c| o.wants(&c.name)).map(|c| c.memory).max().unwrap_or(0);
    // Values are drawn and downloaded as f32.
    if own { largest } else { largest * 3 }
}

/// Whether there is memory for every case.
///
/// # Errors
/// If there is not: what is needed, what is free, and flags that fit.
fn fits<B: Backend + 'static>(dev: &B, o: &Options, setup: &Setup) -> Result<()> {
    let own = dev.free_memory();
    let Some(free) = own.or_else(available_memory) else { return Ok(()) };
    let needed = need::<B>(o, setup, own.is_some());
    if needed <= free {
        return Ok(());
    }
    let fewer = |tokens: usize| Setup { tokens, document: setup.document.min(tokens), ..setup.clone() };
    let halves = std::iter::successors(Some(setup.tokens / 2), |n| Some(n / 2)).take_while(|&n| n >= 16);
    let advice = match halves.into_iter().find(|&n| need::<B>(o, &fewer(n), own.is_some()) <= free) {
        Some(n) => format!("--tokens {n} fits"),
        None => "use a smaller --model, or --only with the cases of interest".into(),
    };
    Err(Error::new(format!("bench: the largest case needs {} and {} are free; {advice}", bytes(needed), bytes(free))))
}

/// A case on an emulated device: verified, and what it did.
fn counted<B: Backend>(dev: &B, case: &Case<B>) -> Result<Row> {
    let Verified { error, tally, .. } = case.verified(dev)?;
    Ok(row(case, error, tally, None))
}

fn row<B: Backend>(case: &Case<B>, error: f64, tally: Option<Tally>, times: Option<(Times, usize)>) -> Row {
    let (name, shape) = (case.name.clone(), case.shape.clone());
    Row { kernel: case.kernel, name, shape, work: case.work, error, tally, times }
}

/// The ceilings of the data sheet of the device that an emulated one poses as.
fn sheet(nature: &Nature) -> Option<Under> {
    let ceilings = Ceilings { flops: nature.sheet_flops?, bandwidth: nature.sheet_bandwidth? };
    Some(Under { ceilings, product: "data sheet".into(), peak: None })
}

/// Memory larger than the last cache, to copy: what that reaches is a ceiling, and it leaves nothing else in the cache.
struct Sweep<B: Device> {
    src: Tensor<B>,
    dst: Tensor<B>,
}

impl<B: Device> Sweep<B> {
    fn new(dev: &B, cache: u64) -> Result<Self> {
        let (rows, cols) = ((COPY.max(4 * cache) / 4096) as usize, 1024);
        let mut sweep = Self { src: dev.alloc(rows, cols, DType::F32)?, dst: dev.alloc(rows, cols, DType::F32)? };
        // Pages that were never written may all be one.
        dev.upload(&mut sweep.src, &vec![1.0; rows * cols])?;
        sweep.run(dev)?;
        Ok(sweep)
    }

    fn run(&mut self, dev: &B) -> Result<()> {
        dev.copy(&mut self.dst, &self.src)
    }

    /// Bytes a second, read and written.
    fn rate(&mut self, dev: &B, seconds: f64) -> Result<f64> {
        let bytes = 2.0 * (self.src.len() * 4) as f64;
        let mut times = Vec::new();
        let begin = std::time::Instant::now();
        while times.len() < 5 || begin.elapsed().as_secs_f64() < seconds {
            times.push(dev.timed(&mut || self.run(dev))?);
        }
        Ok(bytes / Times::of(times).median)
    }
}

/// The cache that buffers are kept out of; a quick look keeps them out of none.
fn cache(o: &Options, nature: &Nature) -> u64 {
    if o.seconds > 0.0 { nature.cache } else { 0 }
}

/// Verifies a case and times it.
fn timed<B: Backend>(dev: &B, o: &Options, cache: u64, sweep: &mut Sweep<B>, case: &Case<B>) -> Result<Row> {
    let Verified { kernel, error, tally } = case.verified(dev)?;
    let free = dev.free_memory().or_else(available_memory).unwrap_or(u64::MAX);
    let touched = case.memory.min(case.work.bytes as u64);
    let rotation = timing::rotation(touched, case.memory, cache, free);
    let mut sets = vec![kernel];
    for seed in 2..=rotation.sets as u64 {
        sets.push((case.make)(dev, seed)?);
    }
    let sets = RefCell::new(sets);
    let each =
        |f: &dyn Fn(&mut dyn Kernel<B>) -> Result<()>| sets.borrow_mut().iter_mut().try_for_each(|k| f(k.as_mut()));
    let before = || {
        each(&|k| k.restore(dev))?;
        if rotation.sweep { sweep.run(dev) } else { Ok(()) }
    };
    let times = timing::rounds(dev, o.seconds, rotation.sets, before, || each(&|k| k.run(dev)))?;
    Ok(row(case, error, tally, Some((times, rotation.sets))))
}

/// Every case, and the ceilings that were reached: a copy's, and the best product's.
fn measured<B: Backend + 'static>(
    dev: &B,
    o: &Options,
    nature: &Nature,
    all: &[Case<B>],
    side: usize,
) -> Result<(Vec<Row>, Under)> {
    let cache = cache(o, nature);
    let mut peak = dev.measured_peak(o.dtype);
    let mut sweep = Sweep::new(dev, cache)?;
    let bandwidth = sweep.rate(dev, o.seconds)?;
    let square = products::case(MatMul::NT, "square", Dims { m: side, n: side, k: side }, o.dtype);
    let mut rows = vec![timed(dev, o, cache, &mut sweep, &square)?];
    for (i, case) in all.iter().enumerate() {
        if say::stderr_is_terminal() {
            say::note(&format!("{} of {}: {}, {}", i + 1, all.len(), case.name, case.shape));
        }
        rows.push(timed(dev, o, cache, &mut sweep, case)?);
    }
    let rate = |r: &Row| r.times.map_or(0.0, |(t, _)| r.work.flop / t.median);
    let best = rows.iter().filter(|r| r.kernel == "matmul").max_by(|a, b| rate(a).total_cmp(&rate(b)));
    let (flops, product) = best.map_or((0.0, String::new()), |r| (rate(r), format!("{}, {}", r.name, r.shape)));
    if let Some(peak) = &mut peak {
        let rates: Vec<_> = rows.iter().map(|r| (format!("{}, {}", r.name, r.shape), rate(r))).collect();
        hold_to_peak(&rates, peak, || dev.measured_peak(o.dtype))?;
    }
    Ok((rows, Under { ceilings: Ceilings { flops, bandwidth }, product, peak }))
}

/// How near a row came to the ceilings, and which one decides.
fn share(r: &Row, under: &Under) -> Option<(f64, Bound)> {
    let (least, bound) = under.ceilings.least(r.work);
    r.times.map(|(t, _)| (least / t.median, bound))
}

fn report(rows: &[Row], ratios: &[Option<Ratio>], under: Option<&Under>, o: &Options, nature: &Nature) -> String {
    match under {
        _ if nature.emulated => projection(rows, under),
        Some(under) => measurement(rows, ratios, under, o, nature),
        None => unreachable!("a device that is not emulated is measured"),
    }
}

/// The table of times.
fn measurement(rows: &[Row], ratios: &[Option<Ratio>], under: &Under, o: &Options, nature: &Nature) -> String {
    let (unit, scale) = if under.ceilings.flops >= 5e12 { ("TFLOP/s", 1e12) } else { ("GFLOP/s", 1e9) };
    let rate = |flops: f64| {
        if flops / scale < 99.95 { format!("{:.1}", flops / scale) } else { format!("{:.0}", flops / scale) }
    };
    let launches = rows.iter().any(|r| r.tally.is_some());
    let mut header =
        vec!["kernel", "shape", "error", "us median", "min", "max", "spread %", unit, "GB/s", "% of ceiling", "which"];
    header.extend(launches.then_some("launches"));
    header.extend(o.baseline.as_ref().map(|_| "ratio"));
    let mut lines = vec![header.into_iter().map(String::from).collect::<Vec<_>>()];
    for (r, ratio) in rows.iter().zip(ratios) {
        let (Some((t, _)), Some((share, bound))) = (r.times, share(r, under)) else { continue };
        let mut line = vec![r.name.clone(), r.shape.clone(), format!("{:.1e}", r.error)];
        line.extend([print::us(t.median), print::us(t.min), print::us(t.max), print::spread(&t)]);
        line.extend([rate(r.work.flop / t.median), format!("{:.1}", r.work.bytes / t.median / 1e9)]);
        line.extend([format!("{:.0}", 100.0 * share), bound.word().into()]);
        line.extend(launches.then(|| r.tally.map_or("-".into(), |t| t.launches.to_string())));
        line.extend(o.baseline.as_ref().map(|_| ratio.as_ref().map_or("new".into(), Ratio::text)));
        lines.push(line);
    }
    let rotation = match cache(o, nature) {
        0 => "buffers warm in the caches".into(),
        n => format!("buffers beyond the last cache of {}", bytes(n)),
    };
    let registers = under.peak.map_or(String::new(), |f| format!("; in registers {} {unit}", rate(f)));
    let sheet = nature.sheet_flops.map_or(registers, |f| format!("; data sheet {} {unit}", rate(f)));
    let memory = nature.sheet_bandwidth.map_or(String::new(), |b| format!("; data sheet {:.0} GB/s", b / 1e9));
    format!(
        "ceilings of this run: product {} {unit} ({}){sheet}; copy {:.1} GB/s, read and written{memory}\n\
         error: relative, of samples against f64; spread: of the middle half of the rounds, to the median; bytes: each operand once; \
         {rotation}\n\n{}",
        rate(under.ceilings.flops),
        under.product,
        under.ceilings.bandwidth / 1e9,
        print::table(&lines, 2)
    )
}

/// The table of counters: what was done against what has to be, and what a data sheet makes of the latter.
fn projection(rows: &[Row], under: Option<&Under>) -> String {
    let header = [
        "kernel",
        "shape",
        "error",
        "launches",
        "warp instr.",
        "tensor flop / needed",
        "bytes requested / needed",
        "bank conflicts %",
        "projected us, at least",
        "which",
    ];
    let mut lines = vec![header.map(String::from).to_vec()];
    for r in rows {
        let Some(tally) = r.tally else { continue };
        let c = tally.counted.unwrap_or_default();
        let part = |x: f64, of: f64| if of > 0.0 && x > 0.0 { format!("{:.2}", x / of) } else { "-".into() };
        let mut line = vec![r.name.clone(), r.shape.clone(), format!("{:.1e}", r.error), tally.launches.to_string()];
        line.push(print::short(c.instructions as f64));
        line.extend([part(c.tensor_flops as f64, r.work.flop), part(c.requested as f64, r.work.bytes)]);
        line.push(part(100.0 * c.bank_conflicts as f64, c.shared_passes as f64));
        line.extend(match under.map(|u| u.ceilings.least(r.work)) {
            Some((seconds, bound)) => [print::us(seconds), bound.word().into()],
            None => ["-".into(), "-".into()],
        });
        lines.push(line);
    }
    let sheet = match under {
        Some(u) => format!("{:.0} TFLOP/s and {:.0} GB/s", u.ceilings.flops / 1e12, u.ceilings.bandwidth / 1e9),
        None => "unknown".into(),
    };
    format!(
        "emulated device: nothing was timed. Counters are the emulator's; \"projected\" is a projection, the least time that the data sheet \
         ({sheet}) allows for what has to be done, not a speed of these kernels.\n\
         error: relative, of samples against f64; requested: whole sectors, before any cache\n\n{}",
        print::table(&lines, 2)
    )
}

fn ceilings_json(under: Option<&Under>, nature: &Nature) -> Value {
    let Some(u) = under else { return Value::Null };
    let source = if nature.emulated { "data sheet" } else { "measured" };
    json!({
        "source": source, "flops_per_second": u.ceilings.flops, "bytes_per_second": u.ceilings.bandwidth, "product": u.product,
        "peak_flops_per_second": u.peak,
    })
}

fn row_json(r: &Row, dtype: DType, under: Option<&Under>, nature: &Nature) -> Value {
    let mut v = json!({
        "kernel": r.kernel, "name": r.name, "shape": r.shape, "dtype": super::options::dtype_word(dtype),
        "flop": r.work.flop, "bytes": r.work.bytes, "error": r.error,
        "launches": r.tally.map(|t| t.launches),
    });
    if let (Some((t, sets)), Some(under)) = (r.times, under) {
        let share = share(r, under);
        v["seconds"] = print::times_json(&t);
        v["sets"] = json!(sets);
        v["flops_per_second"] = json!(r.work.flop / t.median);
        v["bytes_per_second"] = json!(r.work.bytes / t.median);
        v["share"] = json!(share.map(|s| s.0));
        v["bound"] = json!(share.map(|s| s.1.word()));
    }
    if nature.emulated {
        v["counted"] = json!(r.tally.and_then(|t| t.counted).map(|c| print::counted_json(&c)));
        let least = under.map(|u| u.ceilings.least(r.work));
        v["projection"] = json!(least.map(|(s, b)| json!({ "seconds_at_least": s, "bound": b.word() })));
    }
    v
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::bench::case::values;
    use crate::commands::bench::shapes::Shape;
    use crate::commands::bench::verify::{Samples, judge};
    use crate::cpu::Cpu;
    use crate::model::config::ModelConfig;

    fn setup(dtype: DType) -> Setup {
        // Few classes: the loss of a sampled row takes a product with each.
        let config = ModelConfig { vocab_size: 1000, n_classes: 1000, ..Shape::Tiny.config(Some(1)) };
        Setup { config, tokens: 40, document: 24, dtype }
    }

    /// A kernel one of whose outputs is damaged after every run.
    struct Damaged {
        kernel: Box<dyn Kernel<Cpu>>,
        output: usize,
    }

    impl Kernel<Cpu> for Damaged {
        fn run(&mut self, dev: &Cpu) -> Result<()> {
            self.kernel.run(dev)
        }

        fn outputs(&self) -> Vec<&Tensor<Cpu>> {
            self.kernel.outputs()
        }

        fn samples(&self, dev: &Cpu, found: &[Vec<f32>]) -> Result<Vec<Samples>> {
            let mut found = found.to_vec();
            found[self.output].iter_mut().for_each(|x| *x = *x * 1.25 + 1e-3);
            self.kernel.samples(dev, &found)
        }
    }

    /// Every output of every case is looked at: one that is wrong ends the bench with the case's name.
    #[test]
    fn a_wrong_result_of_any_output_is_noticed() {
        let dev = Cpu::new(Some(2)).unwrap();
        for dtype in [DType::F32, DType::Bf16] {
            for case in cases::all::<Cpu>(&setup(dtype)) {
                let right = case.verified(&dev).unwrap();
                for output in 0..right.kernel.outputs().len() {
                    let mut kernel = Damaged { kernel: (case.make)(&dev, 1).unwrap(), output };
                    kernel.run(&dev).unwrap();
                    let found: Vec<_> = kernel.outputs().into_iter().map(|t| values(&dev, t).unwrap()).collect();
                    let samples = kernel.samples(&dev, &found).unwrap();
                    let e = judge(&case.name, &samples).unwrap_err();
                    let text = e.to_string();
                    assert!(text.starts_with(&format!("{}: wrong result at row ", case.name)), "{text}");
                    assert!(text.contains("expected ") && text.contains("found "), "{text}");
                }
            }
        }
    }

    #[test]
    fn every_kernel_is_a_word_that_finds_its_cases() {
        for case in cases::all::<Cpu>(&setup(DType::Bf16)) {
            assert!(case.name.contains(case.kernel), "{}: {}", case.kernel, case.name);
        }
    }

    #[test]
    fn work_is_what_the_shapes_say() {
        let of = |name: &str| {
            let all = cases::all::<Cpu>(&setup(DType::Bf16));
            all.iter().find(|c| c.name == name).unwrap_or_else(|| panic!("no {name}")).work
        };
        // 40 tokens, hidden 256, ffn 688, 8 query and 4 key heads of 32, documents of 24 and 16.
        assert_eq!(of("matmul nt gate, up").flop, 2.0 * 40.0 * 688.0 * 256.0);
        assert_eq!(of("matmul nt gate, up").bytes, 2.0 * (40.0 * 256.0 + 688.0 * 256.0 + 40.0 * 688.0));
        // The gradient of a weight is read, added to and written.
        assert_eq!(of("matmul tn down").bytes, 2.0 * (40.0 * 256.0 + 40.0 * 688.0) + 8.0 * 256.0 * 688.0);
        let pairs = 24.0 * 25.0 / 2.0 + 16.0 * 17.0 / 2.0;
        assert_eq!(of("attention forward").flop, 4.0 * pairs * 256.0);
        assert_eq!(of("attention backward").flop, 10.0 * pairs * 256.0);
        assert_eq!(of("rmsnorm forward").bytes, 2.0 * 2.0 * 40.0 * 256.0 + 4.0 * 40.0);
        assert_eq!(of("swiglu backward").bytes, 6.0 * 2.0 * 40.0 * 688.0);
        assert_eq!(of("head trained").flop, 6.0 * 40.0 * 256.0 * 1000.0);
        assert_eq!(of("adamw").bytes, 30.0 * 256.0 * (2.0 * 256.0 + 2.0 * 128.0 + 3.0 * 688.0));
    }
}
