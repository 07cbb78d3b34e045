//! ZeRO-1: the state lies on several ranks, each updates its part, and nothing of it can be seen in the bits.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use ringtune::backend::Backend;
use ringtune::batch::MicroBatch;
use ringtune::checkpoint::shards::{self, StateFiles};
use ringtune::checkpoint::state::write_state_tensors;
use ringtune::comm::ranks::BUCKET;
use ringtune::comm::transport::{Incoming, Outgoing, Sockets, Transport, call};
use ringtune::comm::{Communicator, Position, Solo};
use ringtune::cpu::Cpu;
use ringtune::data::loader::{Step, dealt};
use ringtune::hf::HostTensor;
use ringtune::hf::artifact::HostParams;
use ringtune::hf::safetensors::ModelFiles;
use ringtune::log::tables::MemoryClass;
use ringtune::model::LoraSpec;
use ringtune::optim::OptimizerState;
use ringtune::settings::{TrainSettings, Zero};
use ringtune::tensor::DType;
use ringtune::train::memory::{Demand, estimate_on};
use ringtune::train::step::{Stepped, Workload};
use ringtune::train::{drift, setup};

use crate::ranks::micro_batches;
use crate::ranks_as_threads::{Place, on_ranks_through, on_ranks_with};

const TIED: &str = "tests/data/model/tiny-llama-tied";
const UNTIED: &str = "tests/data/model/tiny-llama-untied";

/// What is trained.
#[derive(Clone, Copy, Debug)]
struct Case {
    model: &'static str,
    lora: bool,
    dtype: DType,
}

const CASES: [Case; 5] = [
    Case { model: TIED, lora: false, dtype: DType::F32 },
    Case { model: UNTIED, lora: false, dtype: DType::Bf16 },
    Case { model: TIED, lora: true, dtype: DType::Bf16 },
    Case { model: UNTIED, lora: true, dtype: DType::F32 },
    Case { model: UNTIED, lora: false, dtype: DType::F32 },
];

/// What a training left behind: figures, the bits of weights and of the whole state, on the main rank.
#[derive(Debug, Default, PartialEq)]
struct Left {
    stepped: Vec<Stepped>,
    weights: Vec<u32>,
    state: BTreeMap<String, Vec<u32>>,
}

/// A rank in the middle of a training.
struct Rank<'a> {
    comm: &'a dyn Communicator<Cpu>,
    dev: Cpu,
    work: Workload<Cpu>,
    batch: Step,
}

impl<'a> Rank<'a> {
    fn new(comm: &'a dyn Communicator<Cpu>, case: Case, zero: Zero) -> Self {
        let dev = Cpu::new(Some(1)).unwrap();
        let all: Vec<MicroBatch> = micro_batches();
        let defaults = TrainSettings::default();
        let lora = LoraSpec { r: 40, alpha: 8.0, dropout: 0.2, ..defaults.lora.clone().unwrap() };
        let grad_accum = all.len().div_ceil(comm.world_size());
        let lora = case.lora.then_some(lora);
        let settings = TrainSettings { lora, grad_accum, zero, dtype: case.dtype, weight_decay: 0.1, ..defaults };
        let base = ModelFiles::open(Path::new(case.model)).unwrap();
        let work = setup::workload_of(&dev, comm, &base, &settings, None, 512).unwrap();
        let own = dealt(comm.rank(), comm.world_size()).take(grad_accum);
        let micro_batches = own.map(|k| all.get(k).cloned().unwrap_or_default()).collect();
        Self { comm, dev, work, batch: Step { micro_batches, ..Default::default() } }
    }

    fn step(&mut self, i: u64) -> Stepped {
        self.work.step(&self.dev, self.comm, &self.batch, i, 1e-2).unwrap()
    }

    fn params(&mut self) -> HostParams {
        match self.work.optimizer.is_sharded() {
            true => self.work.collect_params(&self.dev, self.comm).unwrap().unwrap_or_default(),
            false => self.work.export_params(&self.dev).unwrap(),
        }
    }

    fn state(&self) -> OptimizerState {
        self.work.optimizer.export(&self.dev).unwrap()
    }
}

fn bits(values: &[f32]) -> impl Iterator<Item = u32> {
    values.iter().map(|x| x.to_bits())
}

/// The files hold bf16 where a whole model is bf16.
fn weights(case: Case, params: &HostParams) -> Vec<u32> {
    let stored = |x: f32| match case.dtype == DType::Bf16 && !case.lora {
        true => half::bf16::from_f32(x).to_f32(),
        false => x,
    };
    params.iter().flat_map(|(_, t)| t.data.iter().map(move |&x| stored(x).to_bits())).collect()
}

/// The parts of all ranks joined: each name once, its elements in order.
fn joined(parts: impl IntoIterator<Item = OptimizerState>) -> BTreeMap<String, Vec<u32>> {
    let mut all: BTreeMap<String, BTreeMap<usize, Vec<f32>>> = BTreeMap::new();
    for (name, t) in parts.into_iter().flat_map(|state| state.tensors) {
        let (name, first) = name.split_once('@').unwrap_or((&name, "0"));
        let before = all.entry(name.into()).or_default().insert(first.parse().unwrap(), t.data);
        assert_eq!(before, None, "{name}@{first} on two ranks");
    }
    all.into_iter()
        .map(|(name, parts)| (name, parts.into_values().flat_map(|part| bits(&part).collect::<Vec<_>>()).collect()))
        .collect()
}

fn alone(case: Case, steps: u64) -> Left {
    let mut rank = Rank::new(&Solo, case, Zero::None);
    let stepped: Vec<Stepped> = (0..steps).map(|i| rank.step(i)).collect();
    assert!(stepped.iter().all(|s| s.problem.is_none() && s.loss > 0.0), "{stepped:?}");
    Left { stepped, weights: weights(case, &rank.params()), state: joined([rank.state()]) }
}

/// What the ranks left: figures are the same on all of them, weights those of the main one.
fn of_ranks(case: Case, ranks: Vec<(Vec<Stepped>, HostParams, OptimizerState)>, sharded: bool) -> Left {
    let (mut figures, mut params, mut states) = (Vec::new(), Vec::new(), Vec::new());
    for (stepped, own, state) in ranks {
        figures.push(stepped);
        params.push(own);
        states.push(state);
    }
    assert!(figures.iter().all(|f| *f == figures[0]));
    if !sharded {
        states.truncate(1);
    }
    Left { stepped: figures.swap_remove(0), weights: weights(case, &params[0]), state: joined(states) }
}

#[test]
fn ranks_and_shares_of_the_state_are_one() {
    for case in CASES {
        let one = alone(case, 2);
        for (size, zero, bucket) in [
            (1, Zero::Moments, 0),
            (2, Zero::None, 0),
            (2, Zero::Moments, 0),
            (3, Zero::Moments, 1 << 18),
            (4, Zero::Moments, 30_000),
            (4, Zero::None, 30_000),
            (6, Zero::Moments, 0),
            (6, Zero::None, 1 << 18),
        ] {
            let ranks = on_ranks_with(size, bucket, |comm| {
                let mut rank = Rank::new(comm, case, zero);
                let stepped: Vec<Stepped> = (0..2).map(|i| rank.step(i)).collect();
                (stepped, rank.params(), rank.state())
            });
            let sharded = size > 1 && zero == Zero::Moments;
            let held =
                |(.., state): &(_, _, OptimizerState)| state.tensors.iter().map(|(_, t)| t.data.len()).sum::<usize>();
            let (whole, most) =
                (one.state.values().map(Vec::len).sum::<usize>(), ranks.iter().map(held).max().unwrap());
            assert!(!sharded || most * 4 <= whole * 3, "{case:?}: a rank of {size} holds {most} of {whole} values");
            assert!(of_ranks(case, ranks, sharded) == one, "{case:?} on {size} ranks, {zero:?}, buckets of {bucket}");
        }
    }
}

/// What `check` says of a rank is what it holds.
#[test]
fn memory_of_a_rank_is_estimated_to_the_byte() {
    for case in CASES {
        for size in [2, 3] {
            let found = on_ranks_with(size, BUCKET, |comm| {
                let rank = Rank::new(comm, case, Zero::Moments);
                let lora = rank.work.model.lora.clone();
                let settings = TrainSettings {
                    zero: Zero::Moments,
                    dtype: case.dtype,
                    micro_batch_size: 1,
                    eval_batch_size: 1,
                    grad_accum: micro_batches().len().div_ceil(size),
                    ..TrainSettings::default()
                };
                let demand = Demand {
                    config: &rank.work.model.config,
                    settings: &settings,
                    lora: lora.as_ref(),
                    new_rows: None,
                    max_seq_len: 512,
                    saves: false,
                    device: Cpu::footprint(rank.work.model.config.n_classes),
                };
                (setup::memory(&rank.work), estimate_on(&demand, size))
            });
            let state = |of: &[MemoryClass]| of.iter().find(|c| c.name == "moments and masters").unwrap().bytes;
            let (held, said) = found.iter().max_by_key(|(held, _)| state(held)).unwrap();
            assert_eq!(*held, said[..held.len()], "{case:?} on {size} ranks");
        }
    }
}

/// Sockets that hold the weights of the last parts back until their rank computes the first layer with those that came before.
struct Late {
    sockets: Sockets,
    place: Place,
    /// Gathers that were held back, and how many there are to hold.
    held: u64,
    steps: u64,
}

impl Transport for Late {
    fn exchange(&mut self, what: u32, to: &[Outgoing], from: &mut [Incoming]) -> ringtune::error::Result<()> {
        // Bucket 0 has the head, which a forward pass needs last.
        if what == call::WEIGHTS && self.held < self.steps {
            self.held += 1;
            let until = Instant::now() + Duration::from_secs(60);
            let computes = || Position::unpack(self.place.load(SeqCst)).step > self.held;
            while !computes() {
                ringtune::ensure!(Instant::now() < until, "the next step waits for weights that it does not need yet");
                std::thread::yield_now();
            }
        }
        self.sockets.exchange(what, to, from)
    }
}

/// A forward pass begins with the weights that it needs first, while others are still on their way; nothing of it can be seen in the bits.
#[test]
fn weights_are_gathered_beside_the_next_forward_pass() {
    const STEPS: u64 = 3;
    for case in [CASES[1], CASES[4]] {
        let one = alone(case, STEPS);
        let wrap =
            |sockets, place| -> Box<dyn Transport> { Box::new(Late { sockets, place, held: 0, steps: STEPS - 1 }) };
        let ranks = on_ranks_through(2, 30_000, wrap, |comm| {
            let mut rank = Rank::new(comm, case, Zero::Moments);
            let stepped: Vec<Stepped> = (0..STEPS)
                .map(|i| {
                    let stepped = rank.work.step_ahead(&rank.dev, rank.comm, &rank.batch, i, 1e-2).unwrap();
                    assert!(!rank.work.gathering.is_done(), "all weights are there, and nobody has asked for them");
                    stepped
                })
                .collect();
            rank.work.settle(&rank.dev, rank.comm).unwrap();
            assert!(rank.work.gathering.is_done());
            (stepped, rank.params(), rank.state())
        });
        assert!(of_ranks(case, ranks, true) == one, "{case:?}");
    }
}

/// Whatever reads all weights waits for them, or says that it was not allowed to.
#[test]
fn weights_on_their_way_are_not_read() {
    on_ranks_with(2, 30_000, |comm| {
        let mut rank = Rank::new(comm, CASES[0], Zero::Moments);
        let ahead = |rank: &mut Rank, i| {
            rank.work.step_ahead(&rank.dev, rank.comm, &rank.batch, i, 1e-2).unwrap();
            assert!(!rank.work.gathering.is_done());
        };
        ahead(&mut rank, 0);
        // What ends a step compares the weights of all ranks, and writes them.
        drift::compare(&rank.dev, comm, &mut rank.work, 1).unwrap();
        assert!(rank.work.gathering.is_done());
        ahead(&mut rank, 1);
        rank.params();
        assert!(rank.work.gathering.is_done());
        ahead(&mut rank, 2);
        let batch = rank.batch.micro_batches[0].clone();
        let early = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| rank.work.evaluate(&rank.dev, &batch)));
        let said = *early.unwrap_err().downcast::<String>().unwrap();
        assert!(said.contains("settle() comes first"), "{said}");
        rank.work.settle(&rank.dev, comm).unwrap();
        rank.work.evaluate(&rank.dev, &batch).unwrap();
    });
}

/// All ranks hold the same weights after a step, those that others updated too.
#[test]
fn updated_weights_reach_every_rank() {
    for case in CASES {
        let on_device = on_ranks_with(3, 30_000, |comm| {
            let mut rank = Rank::new(comm, case, Zero::Moments);
            rank.step(0);
            let model = &rank.work.model;
            let mut all = Vec::new();
            for (_, t) in model.params.places() {
                let mut values = vec![0.0; t.len()];
                ringtune::tensor::Device::download(&rank.dev, &mut values, t).unwrap();
                all.extend(bits(&values));
            }
            all
        });
        assert!(on_device.iter().all(|rank| *rank == on_device[0]), "{case:?}");
    }
}

/// The state that `w` ranks write in the middle is gone on with by `v`: to the bits of the run that was never stopped.
#[test]
fn state_of_any_number_of_ranks_is_gone_on_with_by_any_other() {
    for case in [CASES[0], CASES[2]] {
        let one = alone(case, 3);
        for (w, v, zero) in [
            (1, 3, Zero::Moments),
            (3, 2, Zero::Moments),
            (2, 4, Zero::Moments),
            (4, 1, Zero::Moments),
            (3, 2, Zero::None),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let middle = on_ranks_with(w, 30_000, |comm| {
                let mut rank = Rank::new(comm, case, Zero::Moments);
                let first = rank.step(0);
                let (params, state) = (rank.params(), rank.state());
                match w {
                    1 => write_state_tensors(&dir.path().join("optimizer.safetensors"), &state.tensors).unwrap(),
                    _ => shards::write(dir.path(), comm.rank(), w, &state.tensors).unwrap(),
                }
                (first, params, state.updates)
            });
            let (first, params, updates) = &middle[0];
            let ranks = on_ranks_with(v, 0, |comm| {
                let mut rank = Rank::new(comm, case, zero);
                rank.work.import_params(&rank.dev, params).unwrap();
                let parts = rank.work.optimizer.parts();
                let tensors: Vec<(String, HostTensor)> = StateFiles::open(dir.path()).unwrap().read(&parts).unwrap();
                let state = OptimizerState { updates: *updates, tensors };
                rank.work.optimizer.import(&rank.dev, &state).unwrap();
                let stepped = [vec![first.clone()], (1..3).map(|i| rank.step(i)).collect()].concat();
                (stepped, rank.params(), rank.state())
            });
            let sharded = v > 1 && zero == Zero::Moments;
            assert!(of_ranks(case, ranks, sharded) == one, "{case:?} from {w} to {v} ranks, {zero:?}");
        }
    }
}
