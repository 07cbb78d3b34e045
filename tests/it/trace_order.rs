//! What `--trace` shows of ZeRO-1: the weights of a layer are gathered before the layer begins, and beside the layers before it.

use std::path::Path;
use std::time::Duration;

use ringtune::comm::Timing;
use ringtune::cpu::Cpu;
use ringtune::data::loader::{Step, dealt};
use ringtune::hf::safetensors::ModelFiles;
use ringtune::log::trace::{self, Trace};
use ringtune::settings::{TrainSettings, Zero};
use ringtune::train::setup;
use serde_json::Value;

use crate::ranks::micro_batches;
use crate::ranks_as_threads::on_ranks_with;

const STEPS: usize = 5;
/// Elements of a bucket: so few that each part of the model is one.
const BUCKET: usize = 20_000;
/// How long rank 1 rests after each of its gathers.
const BETWEEN_GATHERS: Duration = Duration::from_millis(15);

/// A span: when it began and ended, of which step, and its bucket.
#[derive(Clone, Copy, Debug)]
struct Span {
    begun: f64,
    ended: f64,
    step: usize,
    bucket: usize,
}

fn spans(events: &[Value], rank: usize, thread: u64, name: &str) -> Vec<Span> {
    let of = |e: &&Value| e["pid"] == rank && e["tid"] == thread && e["name"] == name;
    let mut all: Vec<Span> = events
        .iter()
        .filter(of)
        .map(|e| {
            let begun = e["ts"].as_f64().unwrap();
            let number = |key: &str| e["args"][key].as_u64().unwrap_or(0) as usize;
            Span { begun, ended: begun + e["dur"].as_f64().unwrap(), step: number("step"), bucket: number("bucket") }
        })
        .collect();
    all.sort_by(|a, b| a.begun.total_cmp(&b.begun));
    all
}

/// Two ranks that train all weights, each with its trace as a run has it.
fn traced(path: &Path) -> Vec<Value> {
    on_ranks_with(2, BUCKET, |comm| {
        let dev = Cpu::new(Some(1)).unwrap();
        let all = micro_batches();
        let grad_accum = all.len() / 2;
        let settings = TrainSettings { lora: None, grad_accum, zero: Zero::Moments, ..TrainSettings::default() };
        let base = ModelFiles::open(Path::new("tests/data/model/tiny-llama-untied")).unwrap();
        comm.barrier().unwrap();
        let trace = Trace::create(&trace::file_of(path, comm.rank()), comm.rank()).unwrap();
        let row = trace.clone();
        let slow = comm.rank() == 1;
        let tell = move |Timing { what, bucket, begun, ended }| {
            row.record(what, trace::COLLECTIVES, (begun, ended), bucket);
            // Rank 0 waits so long in its next gather: it lasts longer than what is computed beside it, however fast that is.
            if slow && what == "gather" {
                std::thread::sleep(BETWEEN_GATHERS);
            }
        };
        comm.listen(Some(Box::new(tell))).unwrap();
        let mut work = setup::workload_of(&dev, comm, &base, &settings, None, 512).unwrap();
        work.trace = trace;
        let own = dealt(comm.rank(), 2).take(grad_accum);
        let batch = Step { micro_batches: own.map(|k| all[k].clone()).collect(), ..Default::default() };
        for i in 0..STEPS {
            work.trace.at_step(i as u64 + 1);
            work.step_ahead(&dev, comm, &batch, i as u64, 1e-2).unwrap();
        }
        work.settle(&dev, comm).unwrap();
        comm.listen(None).unwrap();
        // The thread of the collectives has let go of the trace by then.
        comm.barrier().unwrap();
        if comm.rank() == 1 {
            work.trace.finish().unwrap();
        }
        comm.barrier().unwrap();
        if comm.rank() == 0 {
            work.trace.finish_with(&[trace::file_of(path, 1)]).unwrap();
        }
    });
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn a_trace_shows_weights_that_are_gathered_before_their_layer_and_beside_the_layers_before_it() {
    let dir = tempfile::tempdir().unwrap();
    // Where others keep the cores busy, the two threads of a rank may never run at once.
    let beside: usize = (0..8).map(|_| beside(&traced(&dir.path().join("trace.json")))).find(|n| *n > 0).unwrap_or(0);
    assert!(beside > 0, "no gather lies beside what a forward pass computes");
}

/// Gathers that lie beside what a forward pass computes; each is there before its layer begins.
fn beside(events: &[Value]) -> usize {
    let mut beside = 0;
    for rank in [0, 1] {
        let (gathers, waits) = (spans(events, rank, 2, "gather"), spans(events, rank, 0, "weights"));
        let forwards = spans(events, rank, 0, "forward");
        let buckets = gathers.iter().map(|g| g.bucket).max().unwrap() + 1;
        // One more than may wait for the main thread, and the one that it takes first.
        assert!(buckets == 4 && gathers.len() == STEPS * buckets, "{buckets} buckets, {} gathers", gathers.len());
        // The first step finds its weights, each later one waits for those that the step before it has updated.
        for (step, gathers) in (2..=STEPS).zip(gathers.chunks(buckets)) {
            let order: Vec<usize> = gathers.iter().map(|g| g.bucket).collect();
            assert_eq!(order, (0..buckets).rev().collect::<Vec<_>>(), "the first layers' weights come first");
            let waits: Vec<Span> = waits.iter().filter(|w| w.step == step).copied().collect();
            assert!(waits.len() >= 3, "rank {rank} waits {} times in step {step}", waits.len());
            for wait in &waits {
                // Those of later layers come after it, and need not be there.
                for gather in gathers.iter().filter(|g| g.bucket >= wait.bucket) {
                    assert!(
                        gather.ended <= wait.ended,
                        "rank {rank}, step {step}: bucket {} is gathered until {}, and its layer begins at {}",
                        gather.bucket,
                        gather.ended,
                        wait.ended
                    );
                }
            }
            // What the forward pass computes lies between its waits.
            let forward = forwards.iter().find(|f| f.step == step).unwrap();
            let starts = std::iter::once(forward.begun).chain(waits.iter().map(|w| w.ended));
            let ends = waits.iter().map(|w| w.begun).chain([forward.ended]);
            let computes: Vec<(f64, f64)> = starts.zip(ends).collect();
            let overlaps = |g: &&Span| computes.iter().any(|(from, to)| g.begun.max(*from) < g.ended.min(*to));
            beside += gathers.iter().filter(overlaps).count();
        }
    }
    beside
}
