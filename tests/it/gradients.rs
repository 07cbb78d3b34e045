//! Finite differences of every parameter tensor, on the f64 reference; and what must be equal bit for bit on the CPU.

use std::collections::BTreeSet;
use std::convert::Infallible;

use ringtune::backend::Backend;
use ringtune::batch::{IGNORE, MicroBatch};
use ringtune::comm::Solo;
use ringtune::cpu::Cpu;
use ringtune::data::loader::Step;
use ringtune::log::trace::Trace;
use ringtune::model::config::{Architecture, AttentionBias, ModelConfig, RopeScaling};
use ringtune::model::flops::FlopCount;
use ringtune::model::weights::{Kind, Lora, Place, Product, Weights};
use ringtune::model::{self, Acts, ActsOptions, Grads, LoraSpec, Model, Params, Ready, Recompute};
use ringtune::optim::{AdamWSettings, Optimizer};
use ringtune::rng::Stream;
use ringtune::tensor::{DType, Device, Tensor};
use ringtune::train::step::Workload;

use crate::reference::{MASKS, Reference, f, f_mut};

/// Grouped queries, a head width that is not C / H, three documents.
fn config() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        vocab_size: 23,
        n_classes: 23,
        hidden_size: 10,
        intermediate_size: 14,
        n_layers: 2,
        heads: ringtune::backend::Heads { n_query: 4, n_kv: 2, head_dim: 6 },
        max_position: 64,
        rms_norm_eps: 1e-5,
        rope_theta: 100.0,
        rope_scaling: RopeScaling::Default,
        tied: false,
        attention_bias: AttentionBias::None,
        mlp_bias: false,
        qk_norm: false,
        sliding_window: None,
        bos_token_id: Some(2),
        eos_token_ids: vec![3],
        pad_token_id: Some(0),
    }
}

/// Every setting of the shape that has code of its own.
fn configs() -> Vec<(&'static str, ModelConfig)> {
    let with = |change: fn(&mut ModelConfig)| {
        let mut c = config();
        change(&mut c);
        c
    };
    let llama3 =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position: 16 };
    let mut scaled = with(|c| c.tied = true);
    scaled.rope_scaling = llama3;
    vec![
        ("untied", config()),
        ("tied, llama3 rope", scaled),
        (
            "linear rope, biases on q k v o",
            with(|c| {
                c.rope_scaling = RopeScaling::Linear { factor: 2.0 };
                c.attention_bias = AttentionBias::Qkvo;
            }),
        ),
        ("biases on gate, up and down", with(|c| c.mlp_bias = true)),
        ("biases on q k v", with(|c| c.attention_bias = AttentionBias::Qkv)),
        (
            "norms of q and k, tied",
            with(|c| {
                c.qk_norm = true;
                c.tied = true;
            }),
        ),
        ("window", with(|c| c.sliding_window = Some(3))),
        ("padded vocabulary", with(|c| c.n_classes = 20)),
    ]
}

fn batch() -> MicroBatch {
    let tokens = vec![2, 5, 7, 5, 11, 2, 19, 7, 13, 4, 6, 2];
    let targets = vec![IGNORE, 7, 5, 11, IGNORE, 19, 7, IGNORE, 4, 6, IGNORE, IGNORE];
    let doc_start = vec![0, 0, 0, 0, 0, 5, 5, 5, 5, 5, 5, 11];
    let n_valid = targets.iter().filter(|&&t| t != IGNORE).count();
    MicroBatch { tokens, targets, doc_start, n_valid, samples: vec![0, 1, 2] }
}

fn random(n: usize, words: &[u64], size: f64) -> Vec<f32> {
    let s = Stream::new(words);
    (0..n as u64).map(|i| (size * s.normal_at(i)) as f32).collect()
}

fn spec(targets: &[Product], dropout: f64) -> LoraSpec {
    LoraSpec { r: 3, alpha: 6.0, dropout, rslora: true, targets: targets.to_vec() }
}

/// A model of random weights, large enough that every part of it shows.
fn random_model<B: Backend>(dev: &B, c: &ModelConfig, lora: Option<LoraSpec>, dtype: DType) -> Model<B> {
    let mut number = 0;
    let mut next = |rows: usize, cols: usize, dtype, size: f64, shift: f32| {
        number += 1;
        let mut t = dev.alloc(rows, cols, dtype).unwrap();
        let values: Vec<f32> = random(rows * cols, &[7, number], size).iter().map(|x| x + shift).collect();
        dev.upload(&mut t, &values).unwrap();
        t
    };
    let draw = |at: Place, _: &Place| {
        let ((rows, cols), norm) = (at.shape(c, 0), at.kind() == Kind::Norm);
        Ok::<_, Infallible>(next(rows, cols, dtype, if norm { 0.2 } else { 0.5 }, f32::from(u8::from(norm))))
    };
    let mut p = Weights::of(c).try_map(draw).unwrap();
    if let Some(spec) = &lora {
        for layer in &mut p.layers {
            for linear in layer.products_mut().into_iter().filter(|l| spec.has(l.product)) {
                let (rows, cols) = linear.product.shape(c);
                let (a, b) = (next(spec.r, cols, DType::F32, 0.4, 0.0), next(rows, spec.r, DType::F32, 0.4, 0.0));
                linear.lora = Some(Lora { a, b });
            }
        }
    }
    Model::fixed(c.clone(), p, lora, dtype)
}

fn acts<B: Backend>(dev: &B, model: &Model<B>, recompute: Recompute) -> Acts<B> {
    let mut a = Acts::new(dev, model, 40, ActsOptions { recompute, training: true, micro_batches: 1 }).unwrap();
    a.set_dropout_key(99);
    a
}

/// Summed loss of the batch in the training pass, times `scale`.
fn summed_loss(m: &Model<Reference>, g: &mut Grads<Reference>, a: &mut Acts<Reference>, scale: f32) -> f64 {
    let dev = &Reference;
    model::zero_grads(dev, g).unwrap();
    model::forward(dev, m, a).unwrap();
    model::backward(dev, m, g, a, scale, &mut |_, _| Ok(())).unwrap();
    f64::from(scale) * f(a.loss_tensor()).iter().sum::<f64>()
}

/// Central differences at the largest entry of each trained tensor and at four others.
fn check(name: &str, c: &ModelConfig, lora: Option<LoraSpec>, new_rows: Option<usize>) {
    let dev = &Reference;
    let mut m = random_model(dev, c, lora, DType::F32);
    m.new_rows = new_rows.map(|n| c.n_classes - n..c.n_classes);
    let mut g = model::alloc_grads(dev, &m).unwrap();
    let mut a = acts(dev, &m, Recompute::None);
    a.load(dev, &batch()).unwrap();
    let scale = 0.125;
    summed_loss(&m, &mut g, &mut a, scale);
    let analytic: Vec<(Place, usize, Vec<f64>)> = model::trained(&mut m.params, &g)
        .into_iter()
        .map(|(at, p, g)| {
            let first = if g.rows() == p.rows() { 0 } else { (c.n_classes - g.rows()) * g.cols() };
            (at, first, f(g).to_vec())
        })
        .collect();
    assert!(!analytic.is_empty());
    let (mut worst, mut checked) = (0.0f64, 0);
    for (tensor, (tname, first, grad)) in analytic.iter().enumerate() {
        let largest = (0..grad.len()).max_by(|&i, &j| grad[i].abs().total_cmp(&grad[j].abs())).unwrap();
        assert!(grad[largest].abs() > 1e-9, "{name}: {tname} has no gradient at all");
        let draw = Stream::new(&[5, tensor as u64]);
        let others = (0..4).map(|i| (draw.u64_at(i) % grad.len() as u64) as usize);
        for at in others.chain([largest]) {
            let h = 1e-5;
            let mut loss_at = |delta: f64| {
                let mut scratch = model::alloc_grads(dev, &m).unwrap();
                nudge(&mut m.params, *tname, first + at, delta);
                let loss = summed_loss(&m, &mut scratch, &mut a, scale);
                nudge(&mut m.params, *tname, first + at, -delta);
                loss
            };
            let numeric = (loss_at(h) - loss_at(-h)) / (2.0 * h);
            let error = (numeric - grad[at]).abs() / grad[at].abs().max(grad[largest].abs() * 1e-2);
            assert!(error < 3e-6, "{name}: {tname}[{at}]: analytic {}, numeric {numeric}, error {error:e}", grad[at]);
            worst = worst.max(error);
            checked += 1;
        }
    }
    println!("{name}: {checked} entries of {} tensors, worst relative error {worst:.1e}", analytic.len());
}

fn nudge(p: &mut Params<Reference>, place: Place, at: usize, by: f64) {
    let (_, t) = p.places_mut().into_iter().find(|(x, _)| *x == place).unwrap();
    f_mut(t)[at] += by;
}

#[test]
fn every_parameter_of_every_architecture() {
    for (name, c) in configs() {
        check(name, &c, None, None);
    }
}

#[test]
fn low_rank_updates_with_dropout_and_new_rows() {
    for (name, c) in configs() {
        check(&format!("lora, {name}"), &c, Some(spec(&Product::ALL, 0.3)), None);
    }
    // Tokens 19 and 13 are below the last rows; 20 to 22 are reached as targets' rivals in the head.
    let mut tied = config();
    tied.tied = true;
    check("lora on two products and new rows, tied", &tied, Some(spec(&[Product::Q, Product::V], 0.0)), Some(5));
    check("lora and new rows", &config(), Some(spec(&[Product::Down], 0.1)), Some(5));
}

/// Every part is announced once and in order, whatever is trained: ranks start the same reductions, or they wait for each other.
#[test]
fn every_part_is_announced_whatever_is_trained() {
    let dev = &Reference;
    let c = config();
    let expected = [Ready::Head, Ready::Layer(1), Ready::Layer(0), Ready::Embed];
    for (lora, trains_nothing) in [(None, false), (Some(spec(&[Product::V], 0.0)), false), (None, true)] {
        let m = random_model(dev, &c, lora, DType::F32);
        let mut g = model::alloc_grads(dev, &m).unwrap();
        if trains_nothing {
            g.places_mut().into_iter().for_each(|(_, g)| *g = None);
        }
        let mut a = acts(dev, &m, Recompute::None);
        a.load(dev, &batch()).unwrap();
        model::forward(dev, &m, &mut a).unwrap();
        let mut announced = Vec::new();
        let mut on_ready = |ready, _: &mut Grads<Reference>| {
            announced.push(ready);
            Ok(())
        };
        model::backward(dev, &m, &mut g, &mut a, 1.0, &mut on_ready).unwrap();
        assert_eq!(announced, expected);
        assert!(Ready::all(2).eq(expected));
        for (at, _) in m.params.places() {
            assert!(expected.contains(&Ready::of(at)), "{at}");
        }
    }
}

/// Gradients and losses on the CPU as bits.
fn bits(
    c: &ModelConfig,
    batch: &MicroBatch,
    recompute: Recompute,
    dtype: DType,
    lora: Option<LoraSpec>,
) -> (Vec<u32>, Vec<u32>) {
    let dev = Cpu::new(Some(2)).unwrap();
    let m = random_model(&dev, c, lora, dtype);
    let mut g = model::alloc_grads(&dev, &m).unwrap();
    let mut a = acts(&dev, &m, recompute);
    a.load(&dev, batch).unwrap();
    model::zero_grads(&dev, &mut g).unwrap();
    model::forward(&dev, &m, &mut a).unwrap();
    model::backward(&dev, &m, &mut g, &mut a, 0.1, &mut |_, _| Ok(())).unwrap();
    let mut all = Vec::new();
    for t in g.places().into_iter().filter_map(|(_, t)| t.as_ref()) {
        let mut host = vec![0.0; t.len()];
        dev.download(&mut host, t).unwrap();
        all.extend(host.iter().map(|x| x.to_bits()));
    }
    (a.losses(&dev).unwrap().iter().map(|x| x.to_bits()).collect(), all)
}

#[test]
fn recompute_changes_no_bit() {
    for (name, c) in configs() {
        for dtype in [DType::F32, DType::Bf16] {
            let lora = || Some(spec(&[Product::Q, Product::O, Product::Up, Product::Down], 0.2));
            let kept = bits(&c, &batch(), Recompute::None, dtype, lora());
            assert!(kept.1.iter().any(|&b| f32::from_bits(b) != 0.0));
            for mode in [Recompute::Attention, Recompute::Layer] {
                assert!(kept == bits(&c, &batch(), mode, dtype, lora()), "{name}, {dtype:?}, {mode:?}");
            }
        }
    }
}

/// A step's gradient is the sum of those of its micro-batches, each formed from zero and added once: then ranks that form one each
/// get the same bits.
#[test]
fn each_micro_batch_adds_its_own_gradient_once() {
    let dev = Cpu::new(Some(2)).unwrap();
    for (name, c) in configs() {
        let m = random_model(&dev, &c, None, DType::F32);
        let mut a =
            Acts::new(&dev, &m, 40, ActsOptions { micro_batches: 2, training: true, ..ActsOptions::FORWARD }).unwrap();
        let mut other = batch();
        other.tokens.rotate_left(3);
        let batches = [batch(), other];
        let mut run = |slots: std::ops::Range<usize>| {
            let mut g = model::alloc_grads(&dev, &m).unwrap();
            for slot in slots {
                a.load_at(&dev, slot, &batches[slot]).unwrap();
                model::forward(&dev, &m, &mut a).unwrap();
                model::backward(&dev, &m, &mut g, &mut a, 0.1, &mut |_, _| Ok(())).unwrap();
            }
            g
        };
        let (both, mut first, second) = (run(0..2), run(0..1), run(1..2));
        for ((at, sum), (_, one)) in first.places_mut().into_iter().zip(second.places()) {
            let (sum, one) = (sum.as_mut().unwrap(), one.as_ref().unwrap());
            dev.add(sum, one).unwrap();
            let (_, both) = both.places().into_iter().find(|(x, _)| *x == at).unwrap();
            let bits = |t: &Tensor<Cpu>| {
                let mut host = vec![0.0; t.len()];
                dev.download(&mut host, t).unwrap();
                host.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            assert!(bits(sum) == bits(both.as_ref().unwrap()), "{name}: {at}");
        }
    }
}

/// Logits on the CPU as bits, one row a token.
fn logit_bits(c: &ModelConfig, batch: &MicroBatch, dtype: DType) -> Vec<Vec<u32>> {
    let dev = Cpu::new(Some(2)).unwrap();
    let m = random_model(&dev, c, None, dtype);
    let mut a = acts(&dev, &m, Recompute::None);
    a.load(&dev, batch).unwrap();
    let logits = model::logits(&dev, &m, &mut a).unwrap();
    logits.chunks(c.vocab_size).map(|r| r.iter().map(|x| x.to_bits()).collect()).collect()
}

#[test]
fn documents_do_not_see_each_other_and_packed_equals_alone() {
    for (name, c) in configs() {
        for dtype in [DType::F32, DType::Bf16] {
            let packed = batch();
            let before = logit_bits(&c, &packed, dtype);
            let mut other = batch();
            other.tokens[1] = 17;
            let after = logit_bits(&c, &other, dtype);
            assert_ne!(before[1], after[1], "{name}: a changed token must change its own document");
            assert_eq!(before[5..], after[5..], "{name}, {dtype:?}: the second document saw the first");
            let slice = |v: &[i32]| v[5..11].to_vec();
            let alone = MicroBatch {
                tokens: slice(&packed.tokens),
                targets: slice(&packed.targets),
                doc_start: vec![0; 6],
                ..MicroBatch::default()
            };
            assert_eq!(before[5..11], logit_bits(&c, &alone, dtype), "{name}, {dtype:?}: packed differs from alone");
        }
    }
}

#[test]
fn frozen_weights_have_no_gradient_and_low_rank_alone_trains() {
    let dev = &Reference;
    let c = config();
    let lora = spec(&[Product::Q], 0.0);
    let m = random_model(dev, &c, Some(lora), DType::F32);
    let g = model::alloc_grads(dev, &m).unwrap();
    let trained: Vec<String> =
        g.places().into_iter().filter(|(_, t)| t.is_some()).map(|(at, _)| at.to_string()).collect();
    assert_eq!(trained.len(), 4, "{trained:?}");
    assert!(trained.iter().all(|n| n.contains("q_proj.lora_")));
}

#[test]
fn a_dropout_mask_belongs_to_its_step_micro_batch_layer_and_target() {
    let dev = &Reference;
    let c = config();
    let masks = |seed: u64, steps: u64| {
        MASKS.with_borrow_mut(BTreeSet::clear);
        let mut model = random_model(dev, &c, Some(spec(&Product::ALL, 0.25)), DType::F32);
        let grads = model::alloc_grads(dev, &model).unwrap();
        let options = ActsOptions { recompute: Recompute::None, training: true, micro_batches: 2 };
        let mut work = Workload {
            acts: Acts::new(dev, &model, 40, options).unwrap(),
            optimizer: Optimizer::new(dev, AdamWSettings::default(), &mut model.params, &grads).unwrap(),
            stats: dev.new_stats().unwrap(),
            flops: FlopCount::new(&model.config, None),
            seed,
            trace: Trace::default(),
            packed: 0,
            model,
            grads,
            gathering: Default::default(),
        };
        let step = Step { micro_batches: vec![batch(), batch()], ..Default::default() };
        (0..steps).for_each(|n| drop(work.step(dev, &Solo, &step, n, 0.0).unwrap()));
        MASKS.take()
    };
    let (three, other) = (masks(1, 3), masks(2, 3));
    assert_eq!(three.len(), 3 * 2 * c.n_layers * Product::ALL.len());
    assert!(three.is_disjoint(&other), "another seed, another mask");
    assert_eq!(masks(1, 3), three);
}
