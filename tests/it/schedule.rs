//! Learning rates and AdamW against recorded results of transformers and torch, and the rules of the groups.

use std::convert::Infallible;
use std::path::Path;

use ringtune::checkpoint::shards::StateFiles;
use ringtune::comm::Solo;
use ringtune::cpu::Cpu;
use ringtune::hf::{HostTensor, config as hf_config, device};
use ringtune::model::config::ModelConfig;
use ringtune::model::trained;
use ringtune::model::weights::{Kind, Lora, Part, Place, Weights};
use ringtune::optim::groups::GroupSettings;
use ringtune::optim::{AdamWSettings, Optimizer, Schedule, ScheduleSettings, Shape, Verdict, Warmup};
use ringtune::rng::Stream;
use ringtune::settings::{Command, Resolved, find};
use ringtune::tensor::{DType, Device, Tensor};
use serde_json::Value;

const CASES: [&str; 6] =
    ["tiny-llama-tied", "tiny-llama-untied", "qwen2-untied", "qwen3-tied", "mistral-window", "llama3-rope"];

fn data() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

fn golden(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(data().join("golden").join(name).join("golden.json")).unwrap()).unwrap()
}

fn schedule(peak: f64, shape: Shape, warmup: Warmup, steps: u64) -> Schedule {
    let settings = ScheduleSettings { shape, warmup, warmup_from_zero: true, ..Default::default() };
    Schedule::new(settings, peak, steps)
}

#[test]
fn cosine_gives_the_recorded_rates_bit_for_bit() {
    for name in CASES {
        let adamw = golden(name)["adamw"].clone();
        let h = &adamw["hyperparameters"];
        let (steps, warmup) = (h["steps"].as_u64().unwrap(), Warmup::Steps(h["warmup"].as_u64().unwrap()));
        let s = schedule(h["lr"].as_f64().unwrap(), Shape::Cosine, warmup, steps);
        let rates = adamw["lr"].as_array().unwrap();
        assert_eq!(rates.len() as u64, steps);
        for (t, lr) in rates.iter().enumerate() {
            assert_eq!(s.lr(t as u64), lr.as_f64().unwrap(), "{name}: step {t}");
        }
    }
}

/// transformers' own formulas (optimization.py of 5.x: `_get_linear_schedule_with_warmup_lr_lambda` and the constant one).
#[test]
fn linear_and_constant_are_transformers_lambdas() {
    let (warmup, total, peak) = (7u64, 50u64, 3e-4);
    let linear = schedule(peak, Shape::Linear, Warmup::Steps(warmup), total);
    let constant = schedule(peak, Shape::Constant, Warmup::Steps(warmup), total);
    for t in 0..total {
        let rise = t as f64 / warmup as f64;
        let fall = (total - t) as f64 / (total - warmup) as f64;
        assert_eq!(linear.lr(t), peak * if t < warmup { rise } else { fall }, "linear, step {t}");
        assert_eq!(constant.lr(t), peak * if t < warmup { rise } else { 1.0 }, "constant, step {t}");
    }
}

#[test]
fn settings_outside_their_range_are_usage_errors() {
    let cases = [
        ("learning_rate", "0"),
        ("learning_rate", "NaN"),
        ("min_lr_ratio", "1.5"),
        ("warmup_ratio", "-0.1"),
        ("warmup_ratio", "NaN"),
        ("wsd_decay_ratio", "0"),
    ];
    for (key, word) in cases {
        let setting = find(key).unwrap();
        let typed = vec![(setting, vec![word.to_string()])];
        let e = Resolved::new(Command::Sft, typed, None).unwrap_err();
        assert!(e.to_string().contains(&setting.flag()) && e.exit_code() == 2, "{e}");
    }
}

fn config(name: &str) -> ModelConfig {
    hf_config::read(&data().join("model").join(name)).unwrap().model
}

type Params = Weights<Tensor<Cpu>>;
type Grads = Weights<Option<Tensor<Cpu>>>;

fn random(rows: usize, cols: usize, key: &[u64]) -> HostTensor {
    let stream = Stream::new(key);
    let data = (0..rows * cols).map(|i| stream.normal_at(i as u64) as f32 * 0.1).collect();
    HostTensor { rows, cols, data }
}

/// Random parameters of `dtype` and gradients of a model.
fn full(dev: &Cpu, c: &ModelConfig, dtype: DType) -> (Params, Grads) {
    let mut n = 0;
    let mut next = |rows, cols, dtype| {
        n += 1;
        device::upload(dev, &random(rows, cols, &[n]), dtype)
    };
    let mut next = |at: Place, dtype| {
        let (rows, cols) = at.shape(c, 0);
        next(rows, cols, dtype)
    };
    let params = Weights::of(c).try_map(|at, _| next(at, dtype)).unwrap();
    let grads = Weights::of(c).try_map(|at, _| next(at, DType::F32).map(Some)).unwrap();
    (params, grads)
}

fn values(dev: &Cpu, t: &Tensor<Cpu>) -> Vec<f32> {
    device::download(dev, t).unwrap().data
}

fn bits(dev: &Cpu, p: &Params) -> Vec<u32> {
    p.places().into_iter().flat_map(|(_, t)| values(dev, t)).map(f32::to_bits).collect()
}

#[test]
fn what_decays_is_what_the_recorded_run_decays() {
    let dev = Cpu::new(Some(1)).unwrap();
    for name in CASES {
        let c = config(name);
        let (mut params, grads) = full(&dev, &c, DType::F32);
        let decay = golden(name)["adamw"]["decay"].clone();
        let trained = trained(&mut params, &grads);
        assert_eq!(trained.len(), decay.as_object().unwrap().len(), "{name}");
        for (at, ..) in trained {
            let decays = GroupSettings::default().decays(at);
            assert_eq!(decay[at.to_string()].as_bool(), Some(decays), "{name}: {at}");
        }
    }
}

/// AdamW in f64 as torch's documentation writes it, with clipping on the global norm.
struct Reference {
    m: Vec<f64>,
    v: Vec<f64>,
    t: i32,
}

impl Reference {
    fn step(&mut self, s: &AdamWSettings, p: &mut [f64], g: &[f64], clip: f64, lr: f64, decays: bool) {
        self.t += 1;
        for (i, p) in p.iter_mut().enumerate() {
            let g = g[i] * clip;
            self.m[i] = s.beta1 * self.m[i] + (1.0 - s.beta1) * g;
            self.v[i] = s.beta2 * self.v[i] + (1.0 - s.beta2) * g * g;
            let m = self.m[i] / (1.0 - s.beta1.powi(self.t));
            let v = self.v[i] / (1.0 - s.beta2.powi(self.t));
            *p -= lr * (m / (v.sqrt() + s.eps) + if decays { s.weight_decay * *p } else { 0.0 });
        }
    }
}

#[test]
fn steps_agree_with_the_formula_in_f64() {
    let dev = Cpu::new(Some(2)).unwrap();
    let c = config("qwen2-untied");
    let (mut params, _) = full(&dev, &c, DType::F32);
    let how = AdamWSettings { weight_decay: 0.1, max_grad_norm: Some(1.0), ..AdamWSettings::default() };
    let mut grads: Grads = full(&dev, &c, DType::F32).1;
    let mut optimizer = Optimizer::new(&dev, how, &mut params, &grads).unwrap();
    let wide = |v: Vec<f32>| v.into_iter().map(f64::from).collect::<Vec<f64>>();
    let mut model: Vec<(Place, Vec<f64>)> =
        params.places().into_iter().map(|(at, t)| (at, wide(values(&dev, t)))).collect();
    let start = model.clone();
    let mut reference: Vec<Reference> =
        model.iter().map(|(_, p)| Reference { m: vec![0.0; p.len()], v: vec![0.0; p.len()], t: 0 }).collect();
    for step in 0..5u64 {
        // The last steps have small gradients, which are not clipped.
        let size = if step < 3 { 1.0 } else { 1e-3 };
        let mut n = 1000 * (step + 1);
        let draw = |at: Place, _: &Place| {
            n += 1;
            let (rows, cols) = at.shape(&c, 0);
            let mut g = random(rows, cols, &[n]);
            g.data.iter_mut().for_each(|x| *x *= size);
            device::upload(&dev, &g, DType::F32).map(Some)
        };
        grads = Weights::of(&c).try_map(draw).unwrap();
        let host: Vec<Vec<f64>> =
            grads.places().into_iter().map(|(_, g)| wide(values(&dev, g.as_ref().unwrap()))).collect();
        let norm = host.iter().flatten().map(|g| g * g).sum::<f64>().sqrt();
        let clip = (1.0 / (norm + 1e-6)).min(1.0);
        assert_eq!(clip < 1.0, step < 3);
        let lr = 1e-3 * (step + 1) as f64;
        match optimizer.step(&dev, &Solo, &mut params, &grads, lr).unwrap() {
            Verdict::Updated { grad_norm, .. } => assert!((grad_norm / norm - 1.0).abs() < 1e-6, "{grad_norm} {norm}"),
            other => panic!("{other:?}"),
        }
        for (((at, p), g), r) in model.iter_mut().zip(&host).zip(&mut reference) {
            let name = at.to_string();
            let decays = !name.ends_with("bias") && !name.ends_with("norm.weight");
            r.step(&how, p, g, clip, lr, decays);
        }
    }
    // Tolerance of the recorded 20 steps: 5e-4 of a tensor's update; five steps in f32 stay well inside it.
    for (((name, p), (_, from)), (_, t)) in model.iter().zip(&start).zip(params.places()) {
        let got = wide(values(&dev, t));
        let error: f64 = got.iter().zip(p).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
        let update: f64 = p.iter().zip(from).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
        assert!(error < 5e-4 * update, "{name}: error {error} of an update of {update}");
    }
}

/// From moments of zero the first step leaves `(1 - beta) g`, and the bias correction divides by the same `1 - beta`.
#[test]
fn the_share_of_the_gradient_is_not_rounded_twice() {
    let dev = Cpu::new(Some(1)).unwrap();
    let (mut params, grads) = full(&dev, &config("qwen3-tied"), DType::F32);
    let how = AdamWSettings { max_grad_norm: None, ..AdamWSettings::default() };
    let mut optimizer = Optimizer::new(&dev, how, &mut params, &grads).unwrap();
    optimizer.step(&dev, &Solo, &mut params, &grads, 1e-3).unwrap();
    let state = optimizer.export(&dev).unwrap();
    for (at, g) in grads.places() {
        let g = values(&dev, g.as_ref().unwrap());
        for (part, share, power) in [("m", 1.0 - how.beta1, 1), ("v", 1.0 - how.beta2, 2)] {
            let (_, got) = state.tensors.iter().find(|(n, _)| *n == format!("{part}.{at}")).unwrap();
            for (got, g) in got.data.iter().zip(&g) {
                let want = share * f64::from(*g).powi(power);
                // At most three roundings of f32: of the share and of two products.
                assert!((f64::from(*got) - want).abs() <= want.abs() * 2f64.powi(-22), "{part}.{at}: {got} {want}");
            }
        }
    }
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing_and_is_named() {
    let dev = Cpu::new(Some(1)).unwrap();
    let c = config("qwen3-tied");
    for bad in [f32::NAN, f32::INFINITY] {
        let (mut params, mut grads) = full(&dev, &c, DType::F32);
        let mut optimizer = Optimizer::new(&dev, AdamWSettings::default(), &mut params, &grads).unwrap();
        optimizer.step(&dev, &Solo, &mut params, &grads, 1e-3).unwrap();
        let (before, state) = (bits(&dev, &params), optimizer.export(&dev).unwrap());
        let g = grads.layers[1].k_norm.as_mut().unwrap().as_mut().unwrap();
        let mut host = values(&dev, g);
        host[3] = bad;
        dev.upload(g, &host).unwrap();
        match optimizer.step(&dev, &Solo, &mut params, &grads, 1e-3).unwrap() {
            Verdict::NonFinite { grad_norm, tensors, .. } => {
                assert!(!grad_norm.is_finite());
                let names: Vec<String> = tensors.iter().map(Place::to_string).collect();
                assert_eq!(names, ["model.layers.1.self_attn.k_norm.weight"]);
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(bits(&dev, &params), before);
        assert_eq!((optimizer.export(&dev).unwrap(), optimizer.updates()), (state, 1));
    }
}

#[test]
fn exported_state_continues_bit_for_bit() {
    let dev = Cpu::new(Some(2)).unwrap();
    let c = config("mistral-window");
    for dtype in [DType::F32, DType::Bf16] {
        let (mut params, grads) = full(&dev, &c, dtype);
        let mut optimizer = Optimizer::new(&dev, AdamWSettings::default(), &mut params, &grads).unwrap();
        for _ in 0..3 {
            optimizer.step(&dev, &Solo, &mut params, &grads, 1e-3).unwrap();
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("optimizer.safetensors");
        let state = optimizer.export(&dev).unwrap();
        ringtune::checkpoint::state::write_state_tensors(&path, &state.tensors).unwrap();
        let mut other = params.try_map(|_, t| dev.alloc(t.rows(), t.cols(), dtype)).unwrap();
        for ((_, to), (_, from)) in other.places_mut().into_iter().zip(params.places()) {
            dev.upload(to, &values(&dev, from)).unwrap();
        }
        let mut resumed = Optimizer::new(&dev, AdamWSettings::default(), &mut other, &grads).unwrap();
        let tensors = StateFiles::open(dir.path()).unwrap().read(&resumed.parts()).unwrap();
        resumed.import(&dev, &ringtune::optim::OptimizerState { updates: state.updates, tensors }).unwrap();
        for _ in 0..3 {
            optimizer.step(&dev, &Solo, &mut params, &grads, 5e-4).unwrap();
            resumed.step(&dev, &Solo, &mut other, &grads, 5e-4).unwrap();
        }
        assert_eq!(bits(&dev, &params), bits(&dev, &other), "{dtype:?}");
        assert_eq!(optimizer.export(&dev).unwrap(), resumed.export(&dev).unwrap());
        assert_eq!(optimizer.bytes(), if dtype == DType::F32 { 8 } else { 12 } * bits(&dev, &params).len());
    }
}

#[test]
fn masters_collect_updates_that_bf16_cannot_hold() {
    let dev = Cpu::new(Some(1)).unwrap();
    let c = config("qwen3-tied");
    let (mut params, grads) = full(&dev, &c, DType::Bf16);
    let how = AdamWSettings { max_grad_norm: None, ..AdamWSettings::default() };
    let mut optimizer = Optimizer::new(&dev, how, &mut params, &grads).unwrap();
    let exact = random(c.vocab_size, c.hidden_size, &[99]);
    optimizer.set_masters(&dev, |at| Ok((at == Place::Embed).then(|| exact.data.clone()))).unwrap();
    assert_eq!(values(&dev, optimizer.master(Place::Embed).unwrap()), exact.data);
    optimizer.step(&dev, &Solo, &mut params, &grads, 1e-5).unwrap();
    for (name, p) in params.places() {
        let master = values(&dev, optimizer.master(name).unwrap());
        let rounded: Vec<f32> = master.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
        assert_eq!(values(&dev, p), rounded, "{name}: a parameter is its master, rounded");
        assert_ne!(master, rounded, "{name}: the master holds more than bf16");
    }
    assert!(optimizer.set_masters(&dev, |_| Ok(Some(vec![0.0]))).is_err());
}

/// LoRA on q and v with the last two of the vocabulary's rows new, the rest frozen.
fn lora(dev: &Cpu, c: &ModelConfig, dtype: DType, first_row: usize) -> (Params, Grads) {
    let (mut params, _) = full(dev, c, dtype);
    let mut grads: Grads = params.try_map(|_, _| Ok::<_, Infallible>(None)).unwrap();
    let of = |dtype, rows, cols, key| device::upload(dev, &random(rows, cols, &[key]), dtype).unwrap();
    let f32s = |rows, cols, key| of(DType::F32, rows, cols, key);
    for (p, g) in params.layers.iter_mut().zip(&mut grads.layers) {
        for (p, g) in [(&mut p.q, &mut g.q), (&mut p.v, &mut g.v)] {
            let (out, input) = p.w.shape();
            p.lora = Some(Lora { a: of(dtype, 4, input, 1), b: of(dtype, out, 4, 2) });
            g.lora = Some(Lora { a: Some(f32s(4, input, 3)), b: Some(f32s(out, 4, 4)) });
        }
    }
    grads.embed = Some(f32s(2, c.hidden_size, 5));
    assert!(first_row + 2 <= c.vocab_size);
    (params, grads)
}

#[test]
fn with_lora_only_updates_and_new_rows_move() {
    let dev = Cpu::new(Some(1)).unwrap();
    let c = config("qwen3-tied");
    let first_row = 700;
    for dtype in [DType::F32, DType::Bf16] {
        let (mut params, grads) = lora(&dev, &c, dtype, first_row);
        let before: Vec<(Place, Vec<f32>)> = params.places().into_iter().map(|(at, t)| (at, values(&dev, t))).collect();
        let groups = GroupSettings { lora_plus: Some(16.0), new_rows: Some(first_row) };
        for (at, ..) in trained(&mut params, &grads) {
            let (new_rows, b) = (at == Place::Embed, at.to_string().ends_with("lora_B.weight"));
            let first = if new_rows { first_row } else { 0 };
            assert_eq!((groups.decays(at), groups.first_row(at)), (!new_rows, first), "{at}");
            assert_eq!(groups.lr_scale(at), if b { 16.0 } else { 1.0 }, "{at}");
        }
        let how = AdamWSettings { groups, weight_decay: 0.5, ..AdamWSettings::default() };
        let mut optimizer = Optimizer::new(&dev, how, &mut params, &grads).unwrap();
        assert_eq!(optimizer.places().count(), 1 + 4 * c.n_layers);
        assert_eq!(optimizer.master(Place::Embed).is_some(), dtype == DType::Bf16);
        optimizer.step(&dev, &Solo, &mut params, &grads, 1e-2).unwrap();
        for ((at, old), (_, t)) in before.iter().zip(params.places()) {
            let new = values(&dev, t);
            let moved: Vec<usize> = (0..new.len()).filter(|&i| new[i] != old[i]).collect();
            match at.kind() {
                Kind::Vocabulary => {
                    let rows = first_row * t.cols()..(first_row + 2) * t.cols();
                    assert!(!moved.is_empty() && moved.iter().all(|i| rows.contains(i)), "{dtype:?}");
                }
                Kind::LowRank => assert!(moved.len() > new.len() / 2, "{at}"),
                Kind::Matrix | Kind::Norm | Kind::Bias => assert!(moved.is_empty(), "{at} is frozen"),
            }
        }
        // The first step of Adam moves by lr whatever the gradient: B by 16 times as much as the new rows.
        let is_b = |at: Place| matches!(at, Place::Layer(_, Part::LoraB(_)));
        let (_, old) = before.iter().find(|(at, _)| is_b(*at)).unwrap();
        let (at, b) = params.places().into_iter().find(|(at, _)| is_b(*at)).unwrap();
        let b = values(&dev, optimizer.master(at).unwrap_or(b));
        let step = (0..b.len()).map(|i| (b[i] - old[i] * (1.0 - 0.16 * 0.5)).abs()).fold(0.0, f32::max);
        assert!((step - 0.16).abs() < 1e-3, "{step}");
    }
}

#[test]
fn state_of_another_run_is_refused() {
    let dev = Cpu::new(Some(1)).unwrap();
    let c = config("qwen3-tied");
    let (mut params, grads) = full(&dev, &c, DType::F32);
    let mut optimizer = Optimizer::new(&dev, AdamWSettings::default(), &mut params, &grads).unwrap();
    let state = optimizer.export(&dev).unwrap();
    let mut refuse = |change: &dyn Fn(&mut ringtune::optim::OptimizerState)| {
        let mut other = state.clone();
        change(&mut other);
        optimizer.import(&dev, &other).unwrap_err().to_string()
    };
    assert!(refuse(&|s| drop(s.tensors.remove(0))).contains("m.model.embed_tokens.weight is missing"));
    let e = refuse(&|s| s.tensors[0].1 = HostTensor::zeros(3, 56));
    assert!(e.contains("m.model.embed_tokens.weight: expected shape (720, 56), found (3, 56)"), "{e}");
    let e = refuse(&|s| s.tensors.push(("m.other.weight".into(), HostTensor::zeros(1, 1))));
    assert!(e.contains("m.other.weight is not trained in this run"), "{e}");
}
