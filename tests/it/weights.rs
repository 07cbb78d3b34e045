//! The one list of weights: what the walk visits, in which order, and what follows from a place.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::path::Path;

use ringtune::hf::config as hf_config;
use ringtune::hf::safetensors::TensorFile;
use ringtune::model::config::{AttentionBias, ModelConfig};
use ringtune::model::lora::first_values;
use ringtune::model::weights::{Kind, Part, Place, Product, Weights};

const MODELS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/model");

fn config(name: &str) -> ModelConfig {
    hf_config::read(&Path::new(MODELS).join(name)).unwrap().model
}

#[test]
fn the_walk_names_every_weight_of_the_recorded_models() {
    let mut models = 0;
    for dir in std::fs::read_dir(MODELS).unwrap() {
        let dir = dir.unwrap().path();
        let c = hf_config::read(&dir).unwrap().model;
        let file = TensorFile::open(&dir.join("model.safetensors")).unwrap();
        let weights = Weights::of(&c);
        let names: BTreeSet<String> = weights.places().iter().map(|(at, _)| at.to_string()).collect();
        let recorded: BTreeSet<String> = file.names().map(String::from).collect();
        assert_eq!(names, recorded, "{}", dir.display());
        for (at, _) in weights.places() {
            let (shape, _) = file.info(&at.to_string()).unwrap();
            assert_eq!(at.file_shape(&c, 0), shape, "{}: {at}", dir.display());
        }
        models += 1;
    }
    assert_eq!(models, 8);
}

/// Files, checkpoints and the sum of the norm are in this order, so it is part of their bits.
#[test]
fn the_order_is_that_of_files() {
    let layer = "
        input_layernorm.weight
        self_attn.q_proj.weight self_attn.q_proj.bias self_attn.q_proj.lora_A.weight self_attn.q_proj.lora_B.weight
        self_attn.k_proj.weight self_attn.k_proj.bias
        self_attn.v_proj.weight self_attn.v_proj.bias
        self_attn.o_proj.weight self_attn.o_proj.bias self_attn.o_proj.lora_A.weight self_attn.o_proj.lora_B.weight
        self_attn.q_norm.weight self_attn.k_norm.weight
        post_attention_layernorm.weight
        mlp.gate_proj.weight mlp.up_proj.weight
        mlp.down_proj.weight mlp.down_proj.lora_A.weight mlp.down_proj.lora_B.weight";
    let c = ModelConfig { attention_bias: AttentionBias::Qkvo, tied: false, ..config("qwen3-tied") };
    assert!(c.qk_norm && c.n_layers > 1);
    let mut expected = vec!["model.embed_tokens.weight".to_string()];
    for i in 0..c.n_layers {
        expected.extend(layer.split_whitespace().map(|part| format!("model.layers.{i}.{part}")));
    }
    expected.extend(["model.norm.weight".into(), "lm_head.weight".into()]);
    let mut weights = Weights::with_updates(&c, &[Product::Down, Product::Q, Product::O]);
    let names: Vec<String> = weights.places().iter().map(|(at, _)| at.to_string()).collect();
    assert_eq!(names, expected);

    // Every way to walk gives a value its own place, in that order.
    assert!(weights.places().iter().all(|(at, value)| at == *value));
    let mut mapped = Vec::new();
    let copy = weights.try_map(|at, value| {
        mapped.push(at.to_string());
        Ok::<_, Infallible>(*value)
    });
    assert_eq!((copy.unwrap(), mapped), (weights.clone(), expected.clone()));
    let written: Vec<String> = weights
        .places_mut()
        .into_iter()
        .map(|(at, value)| {
            assert_eq!(at, *value);
            at.to_string()
        })
        .collect();
    assert_eq!(written, expected);
    for (product, linear) in Product::ALL.into_iter().zip(weights.layers[1].products_mut()) {
        assert_eq!((linear.product, linear.w), (product, Place::Layer(1, Part::Matrix(product))));
    }
}

#[test]
fn shape_kind_and_decay_follow_from_the_place() {
    let c = config("qwen2-untied");
    let (q, kv) = (c.q_dim(), c.kv_dim());
    assert!(kv < q, "grouped queries");
    let at = |part| Place::Layer(1, part);
    for (place, shape, in_files, kind) in [
        (Place::Head, (c.vocab_size, c.hidden_size), 2, Kind::Vocabulary),
        (Place::FinalNorm, (1, c.hidden_size), 1, Kind::Norm),
        (at(Part::Matrix(Product::K)), (kv, c.hidden_size), 2, Kind::Matrix),
        (at(Part::Matrix(Product::O)), (c.hidden_size, q), 2, Kind::Matrix),
        (at(Part::Bias(Product::V)), (1, kv), 1, Kind::Bias),
        (at(Part::LoraA(Product::Down)), (5, c.intermediate_size), 2, Kind::LowRank),
        (at(Part::LoraB(Product::Gate)), (c.intermediate_size, 5), 2, Kind::LowRank),
    ] {
        assert_eq!((place.shape(&c, 5), place.kind()), (shape, kind), "{place}");
        assert_eq!((place.file_shape(&c, 5).len(), place.decays()), (in_files, in_files == 2), "{place}");
    }
}

#[test]
fn products_have_two_spellings() {
    for product in Product::ALL {
        let name = product.to_string();
        assert_eq!(Product::from_word(&name), Some(product));
        assert_eq!(Product::from_word(name.strip_suffix("_proj").unwrap()), Some(product));
    }
    assert_eq!(Product::from_word("query"), None);
}

/// Kaiming's uniform distribution with a = √5, as PEFT draws A; B is zero.
#[test]
fn first_values_of_low_rank_updates_fill_their_bound_and_differ_everywhere() {
    let c = config("tiny-llama-untied");
    let mut all: Vec<Vec<f32>> = Vec::new();
    for layer in 0..c.n_layers {
        for product in Product::ALL {
            let of = |part, seed| first_values(&c, Place::Layer(layer, part), 4, seed);
            let (a, bound) = (of(Part::LoraA(product), 7), 1.0 / (product.shape(&c).1 as f32).sqrt());
            let (largest, mean) =
                (a.iter().fold(0.0f32, |m, x| m.max(x.abs())), a.iter().sum::<f32>() / a.len() as f32);
            assert!(largest <= bound && largest > 0.97 * bound, "layer {layer} {product}: {largest} of {bound}");
            assert!(mean.abs() < 0.15 * bound, "layer {layer} {product}: mean {mean}");
            assert!(of(Part::LoraB(product), 7).iter().all(|&x| x == 0.0));
            assert_ne!(a, of(Part::LoraA(product), 8), "another seed");
            all.push(a.into_iter().take(64).collect());
        }
    }
    // Each begins with values of its own, scale apart.
    let scaled = |v: &[f32]| v.iter().map(|x| (x / v[0] * 1e4) as i64).collect::<Vec<_>>();
    let distinct: BTreeSet<_> = all.iter().map(|v| scaled(v)).collect();
    assert_eq!(distinct.len(), all.len());
}
