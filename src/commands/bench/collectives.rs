//! `ringtune bench collectives`: what the collectives of a training take between the ranks of this run, size by size: sums of gradients, for
//! all or for their owners, and weights from their owners to all.
//!
//! Bandwidths in the sense of nccl-tests (doc/PERFORMANCE.md there): algbw is the size over the time; busbw, which does not depend on the
//! number of ranks, is what every rank's link has to carry, algbw · 2(w-1)/w for an all-reduce, half of it for the others.

use std::io::Write;
use std::time::Instant;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use serde_json::{Value, json};

use super::baseline::{self, Baseline, Ratio};
use super::options::{comparison, fail_below};
use super::print::spread;
use super::timing::Times;
use crate::backend::Backend;
use crate::comm::bucket::cuts;
use crate::comm::{self, Comm, Communicator, Span, Sums, Ways, World};
use crate::commands::device::{self, OnDevice};
use crate::error::{Error, Result};
use crate::say::Out;
use crate::tensor::DType;
use crate::text::{bytes, table};
use crate::{ensure, machine};

/// Rounds before those that count.
const WARM: usize = 2;
/// Rounds that count at least, and at most.
const ROUNDS: (usize, usize) = (5, 2000);
/// Elements of a row of the tensors.
const ROW: usize = 256;

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Collective {
    /// Sums to all.
    AllReduce,
    /// Sums to their owners.
    ReduceScatter,
    /// Owners' values to all.
    AllGather,
}

impl Collective {
    const ALL: [Collective; 3] = [Collective::AllReduce, Collective::ReduceScatter, Collective::AllGather];

    fn name(self) -> &'static str {
        match self {
            Collective::AllReduce => "all_reduce",
            Collective::ReduceScatter => "reduce_scatter",
            Collective::AllGather => "all_gather",
        }
    }

    /// How often a byte of the size passes a link, as nccl-tests count it.
    fn passes(self, world: usize) -> f64 {
        let share = (world as f64 - 1.0) / world as f64;
        if self == Collective::AllReduce { 2.0 * share } else { share }
    }
}

/// The command's flags.
pub fn command() -> Command {
    let arg = |name: &'static str, value: &'static str| Arg::new(name).long(name).value_name(value);
    let size = |name, default| arg(name, "BYTES").default_value(default).value_parser(of_bytes);
    comparison(Command::new("collectives"))
        .about("Time sums of gradients and gathers of weights between ranks: ringrun -n 4 ringtune bench collectives")
        .after_help(
            "Every value is verified, to the bit. algbw and busbw are those of nccl-tests: size over time, and what a link has to carry, \
             algbw x 2(w-1)/w for an all-reduce, half of it for the others. `ringtune plan --bus-bandwidth` takes the latter. The time holds copies to and from the device, as a training has \
             them. What carries the values is chosen as for a training (RINGTUNE_TRANSPORT).",
        )
        .arg(arg("device", "DEVICE").default_value("cpu").help("Device whose tensors are summed: auto, cpu, cuda, cuda:1"))
        .arg(size("min-bytes", "1KiB").help("Smallest size"))
        .arg(size("max-bytes", "64MiB").help("Largest size"))
        .arg(
            arg("factor", "N")
                .default_value("4")
                .value_parser(value_parser!(u64).range(2..=1024))
                .help("From one size to the next"),
        )
        .arg(
            arg("seconds", "S")
                .default_value("0.3")
                .value_parser(value_parser!(f64))
                .help("Time to spend on each size after its first rounds"),
        )
        .arg(Arg::new("json").long("json").action(ArgAction::SetTrue).help("Print one JSON document"))
}

/// `4096`, `1KiB`, `64MiB`, `1GB`: bytes, a multiple of a row of f32.
fn of_bytes(text: &str) -> std::result::Result<usize, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" | "kb" => 1 << 10,
        "m" | "mib" | "mb" => 1 << 20,
        "g" | "gib" | "gb" => 1 << 30,
        _ => return Err("expected bytes, as 4096, 64KiB or 16MiB".into()),
    };
    let n = number.parse::<usize>().ok().and_then(|n| n.checked_mul(factor));
    n.filter(|n| (4 * ROW..=4 << 30).contains(n))
        .map(|n| n.next_multiple_of(4 * ROW))
        .ok_or_else(|| format!("expected {} to {}, found {text:?}", bytes(4 * ROW as u64), bytes(4 << 30)))
}

/// Measures and prints, on the main rank.
///
/// # Errors
/// If there is one rank only, a flag makes no sense, a sum is wrong, or a peer is gone.
pub fn run(m: &ArgMatches) -> Result<()> {
    comm::start::announce()?;
    let comm = comm::start(Ways::default())?;
    let size = |id: &str| *m.get_one::<usize>(id).expect("it has a default");
    let (least, most, factor) =
        (size("min-bytes"), size("max-bytes"), *m.get_one::<u64>("factor").expect("it has a default"));
    let seconds = *m.get_one::<f64>("seconds").expect("it has a default");
    let asked = || -> Result<(Vec<usize>, Option<Baseline>, Option<f64>)> {
        if comm.world().size < 2 {
            return Err(Error::usage(
                "bench collectives: there is one rank, and nothing to sum; start several: ringrun -n 4 ringtune bench collectives",
            ));
        }
        if !(0.0..=3600.0).contains(&seconds) {
            return Err(Error::usage(format!("--seconds: expected 0 to 3600, found {seconds}")));
        }
        if least > most {
            return Err(Error::usage("--min-bytes: expected at most --max-bytes"));
        }
        let next = |n: &usize| n.checked_mul(factor as usize).filter(|&n| n <= most);
        // The file need be on the main rank's machine alone.
        let file = m.get_one::<String>("baseline").filter(|_| comm.world().rank == 0);
        let baseline = file.map(|file| Baseline::read(file, "bench collectives")).transpose()?;
        Ok((std::iter::successors(Some(least), next).collect(), baseline, fail_below(m)?))
    };
    let name = match m.get_one::<String>("device").map_or("cpu", String::as_str) {
        "cuda" if comm.world().local_size > 1 => format!("cuda:{}", comm.world().local_rank),
        name => name.into(),
    };
    let result = asked().and_then(|(sizes, baseline, fail_below)| {
        let bench = Bench { comm: &comm, sizes: &sizes, seconds, json: m.get_flag("json"), baseline, fail_below };
        device::check(&name)?;
        device::run(&name, comm.threads(), bench)
    });
    comm.finish(result)
}

struct Bench<'a> {
    comm: &'a Comm,
    sizes: &'a [usize],
    seconds: f64,
    json: bool,
    baseline: Option<Baseline>,
    fail_below: Option<f64>,
}

/// What came of a size.
#[derive(Clone, Copy, Debug)]
struct Row {
    collective: Collective,
    bytes: usize,
    /// Of the rounds, of the slowest rank's time.
    times: Times,
}

impl Row {
    fn algbw(&self) -> f64 {
        self.bytes as f64 / self.times.median
    }

    fn busbw(&self, world: usize) -> f64 {
        self.algbw() * self.collective.passes(world)
    }
}

impl OnDevice for Bench<'_> {
    fn run<B: Backend + 'static>(self, dev: &B) -> Result<()> {
        let comm = self.comm.of::<B>();
        let device = dev.describe();
        let cases = Collective::ALL.into_iter().flat_map(|c| self.sizes.iter().map(move |&n| (c, n)));
        let measured = cases.enumerate().map(|(i, case)| measure(dev, comm, i, case, self.seconds));
        let rows: Vec<Row> = measured.collect::<Result<_>>()?;
        comm.end_reductions()?;
        if !comm.is_main() {
            return Ok(());
        }
        let (world, carrier) = (comm.world(), self.comm.carrier());
        let (mut out, baseline) = (Out::new(), self.baseline.as_ref());
        let mut document = as_json(&rows, world, carrier, &device);
        let ratios = baseline::compare(baseline, &mut document, rows.iter().map(|r| Some(r.times)));
        if self.json {
            writeln!(out, "{document:#}")?;
        } else {
            write!(out, "{}", baseline.map_or(String::new(), |b| b.heading(&document)))?;
            write!(out, "{}", as_text(&rows, world, carrier, &device, baseline.map(|_| ratios.as_slice())))?;
        }
        out.flush()?;
        baseline.map_or(Ok(()), |b| b.judge(self.fail_below, &document, &ratios))
    }
}

/// What rank r adds to element i: whole numbers, whose sums are exact.
fn term(rank: usize, i: usize) -> f32 {
    (i % 1021 + 3 * rank) as f32
}

/// One after the other on so many bytes, as often as the time allows, the last one verified.
fn measure<B: Backend>(
    dev: &B,
    comm: &dyn Communicator<B>,
    bucket: usize,
    (collective, n): (Collective, usize),
    seconds: f64,
) -> Result<Row> {
    let len = n / size_of::<f32>();
    let own: Vec<f32> = (0..len).map(|i| term(comm.rank(), i)).collect();
    let mut tensor = dev.alloc(len / ROW, ROW, DType::F32)?;
    let mut times: Vec<f64> = Vec::new();
    let mut rounds = WARM + ROUNDS.0;
    let mut begun = Instant::now();
    while times.len() < rounds {
        dev.upload(&mut tensor, &own)?;
        dev.synchronize()?;
        comm.barrier()?;
        let start = Instant::now();
        match collective {
            Collective::AllGather => comm.all_gather(dev, bucket, vec![Span { tensor: &mut tensor, first: 0, len }])?,
            _ => {
                let wanted = if collective == Collective::AllReduce { Sums::Whole } else { Sums::Owned };
                comm.reduce_start(dev, bucket, &[&tensor])?;
                comm.reduce_finish(dev, bucket, &mut [&mut tensor], wanted)?;
            }
        }
        dev.synchronize()?;
        times.push(start.elapsed().as_secs_f64());
        if times.len() == WARM {
            begun = Instant::now();
        }
        if times.len() == WARM + ROUNDS.0 {
            // All ranks take as many: what fits into the time by the main rank's clock.
            let each = begun.elapsed().as_secs_f64() / ROUNDS.0 as f64;
            let more = ((seconds / each) as usize).clamp(ROUNDS.0, ROUNDS.1);
            let said = comm.main_says("rounds", Ok((more as u64).to_le_bytes().to_vec()))?;
            let more =
                said.try_into().map(u64::from_le_bytes).map_err(|_| Error::new("the main rank said no number"))?;
            rounds = WARM + more as usize;
        }
    }
    let mut found = vec![0.0; len];
    dev.download(&mut found, &tensor)?;
    verify(collective, &found, comm.world())?;
    let all = comm.gather("times", bytemuck::cast_slice(&times[WARM..]))?;
    let mut slowest = vec![0.0f64; rounds - WARM];
    for rank in &all {
        let theirs: Vec<f64> = bytemuck::pod_collect_to_vec(rank);
        ensure!(theirs.len() == slowest.len(), "the ranks took {} and {} rounds", theirs.len(), slowest.len());
        slowest.iter_mut().zip(theirs).for_each(|(max, t)| *max = max.max(t));
    }
    Ok(Row { collective, bytes: n, times: Times::of(slowest) })
}

/// Holds what a rank has afterwards to what it should have.
fn verify(collective: Collective, found: &[f32], world: &World) -> Result<()> {
    let (len, size) = (found.len(), world.size);
    let cuts = cuts(&[len], size);
    let sum = |i: usize| (0..size).fold(0.0, |sum, rank| sum + term(rank, i));
    let owner = |i: usize| cuts.partition_point(|&cut| cut <= i) - 1;
    let looked_at =
        if collective == Collective::ReduceScatter { cuts[world.rank]..cuts[world.rank + 1] } else { 0..len };
    for i in looked_at {
        let expected = if collective == Collective::AllGather { term(owner(i), i) } else { sum(i) };
        ensure!(
            found[i].to_bits() == expected.to_bits(),
            "wrong result: {}: element {i} of {len} is {}, expected {expected}, on rank {} of {size}",
            collective.name(),
            found[i],
            world.rank
        );
    }
    Ok(())
}

fn as_text(rows: &[Row], world: &World, carrier: &str, device: &str, ratios: Option<&[Option<Ratio>]>) -> String {
    let header =
        ["collective", "size", "elements", "time us", "min", "max", "spread %", "algbw GB/s", "busbw GB/s", "rounds"];
    let header = header.into_iter().chain(ratios.map(|_| "ratio")).map(String::from).collect();
    let line = |(i, r): (usize, &Row)| {
        let (rate, t) = (|x: f64| format!("{:.3}", x / 1e9), &r.times);
        let times = [t.median, t.min, t.max].map(|s| format!("{:.1}", s * 1e6));
        let rates = [spread(t), rate(r.algbw()), rate(r.busbw(world.size)), t.rounds.to_string()];
        let ratio = ratios.map(|all| all[i].as_ref().map_or("new".into(), Ratio::text));
        let case = [r.collective.name().into(), bytes(r.bytes as u64), (r.bytes / 4).to_string()];
        case.into_iter().chain(times).chain(rates).chain(ratio).collect()
    };
    let rows: Vec<Vec<String>> = std::iter::once(header).chain(rows.iter().enumerate().map(line)).collect();
    format!(
        "f32 between {} ranks, {} of them on host {}, over {carrier}; {device}\nevery value verified; time: median over the rounds of the \
         slowest rank's; spread: of the middle half of the rounds, to the median; up to 64 KiB have one owner\n\n{}",
        world.size,
        world.local_size,
        machine::host(),
        table(&rows)
    )
}

fn as_json(rows: &[Row], world: &World, carrier: &str, device: &str) -> Value {
    let row = |r: &Row| {
        json!({
            "collective": r.collective.name(), "bytes": r.bytes, "rounds": r.times.rounds, "seconds": r.times.median,
            "seconds_min": r.times.min, "seconds_max": r.times.max, "seconds_quartile1": r.times.quartile1,
            "seconds_quartile3": r.times.quartile3, "algbw_bytes_per_second": r.algbw(),
            "busbw_bytes_per_second": r.busbw(world.size), "wrong": 0,
        })
    };
    json!({
        "command": "bench collectives", "version": env!("CARGO_PKG_VERSION"), "dtype": "f32",
        "ranks": world.size, "ranks_of_host": world.local_size, "transport": carrier, "device": device,
        "cases": rows.iter().map(row).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        assert_eq!(["4096", "1KiB", "64MiB", "3 k"].map(|t| of_bytes(t).unwrap()), [4096, 1024, 64 << 20, 3 << 10]);
        assert_eq!(of_bytes("1500").unwrap(), 2048, "whole rows");
        for wrong in ["", "x", "12", "-1", "1TiB", "99999999999999999999", "5GiB"] {
            assert!(of_bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_wrong_value_is_named() {
        let world = World { rank: 1, size: 3, local_rank: 1, local_size: 3 };
        let len = 40_000;
        let sums: Vec<f32> = (0..len).map(|i| (0..3).map(|rank| term(rank, i)).sum()).collect();
        for (collective, right) in
            [(Collective::AllReduce, true), (Collective::ReduceScatter, true), (Collective::AllGather, false)]
        {
            assert_eq!(verify(collective, &sums, &world).is_ok(), right);
        }
        let owner = |i: usize| i / (1 << 14);
        let gathered: Vec<f32> = (0..len).map(|i| term(owner(i), i)).collect();
        verify(Collective::AllGather, &gathered, &world).unwrap();
        let mut wrong = sums;
        wrong[20_000] += 1.0;
        let e = verify(Collective::ReduceScatter, &wrong, &world).unwrap_err().to_string();
        assert!(e.contains("reduce_scatter: element 20000 of 40000 is") && e.contains("rank 1 of 3"), "{e}");
        wrong[20_000] -= 1.0;
        wrong[0] += 1.0;
        assert!(verify(Collective::ReduceScatter, &wrong, &world).is_ok(), "not its own");
        assert!(verify(Collective::AllReduce, &wrong, &world).is_err());
    }

    /// nccl-tests: an all-reduce of 8 ranks at algbw 10 has busbw 17.5; of 2 ranks both are one.
    #[test]
    fn bandwidths_are_those_of_nccl_tests() {
        let row = Row { collective: Collective::AllReduce, bytes: 10_000_000, times: Times::of(vec![1e-3]) };
        assert_eq!(row.algbw(), 1e10);
        assert_eq!((row.busbw(8), row.busbw(2)), (1.75e10, 1e10));
        let half = Row { collective: Collective::AllGather, ..row };
        assert_eq!((half.busbw(8), half.busbw(2)), (0.875e10, 0.5e10));
    }
}
