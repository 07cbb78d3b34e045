//! What is drawn: the shape of a model, the settings of a training, micro-batches, prompts.

use ringtune::backend::Heads;
use ringtune::batch::{IGNORE, MicroBatch};
use ringtune::model::config::{Architecture, AttentionBias, ModelConfig, RopeScaling};
use ringtune::model::weights::Product;
use ringtune::model::{LoraSpec, Recompute};
use ringtune::rng::Stream;
use ringtune::settings::TrainSettings;
use ringtune::tensor::DType;

/// Numbers of a seed, one after the other.
pub struct Dice {
    stream: Stream,
    next: u64,
}

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self { stream: Stream::new(&[0x6469_6365, seed]), next: 0 }
    }

    /// From the least to the most, both among them.
    pub fn within(&mut self, least: usize, most: usize) -> usize {
        self.next += 1;
        least + (self.stream.u64_at(self.next) % (most - least + 1) as u64) as usize
    }

    pub fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.within(0, all.len() - 1)]
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.within(1, n) == 1
    }

    /// A width: any, or one that tiles, pieces of 16 bytes or boxes of copies like.
    fn width(&mut self, most: usize) -> usize {
        let step = self.of(&[1, 8, 16, 64]);
        step * self.within(1, (most / step).max(1))
    }
}

/// Heads: widths that have kernels on tensor cores, and all others, odd halves among them; groups of one to more than a tile has rows.
fn heads(dice: &mut Dice) -> Heads {
    let head_dim = match dice.within(0, 3) {
        0 | 1 => dice.of(&[32, 64, 80, 96, 128]),
        2 => dice.of(&[2, 4, 6, 16, 24, 40, 48, 72, 112, 160, 192, 250, 256]),
        _ => 2 * dice.within(1, 128),
    };
    // All heads of queries together are 640 wide at most.
    let most = (640 / head_dim).max(1);
    let n_kv = dice.of(&[1, 1, 2, 3, 4]).min(most);
    let n_query = n_kv * dice.of(&[1, 2, 3, 5, 8, 17]).min(most / n_kv);
    Heads { n_query, n_kv, head_dim }
}

/// A shape that `src/hf/config.rs` takes, of any of its families.
pub fn shape(dice: &mut Dice) -> ModelConfig {
    let architecture = dice.of(&[Architecture::Llama, Architecture::Mistral, Architecture::Qwen2, Architecture::Qwen3]);
    let biased = dice.one_in(2);
    let vocab_size = if dice.one_in(2) { dice.of(&[64, 257, 1001, 1024]) } else { dice.within(2, 300) };
    let windows = [None, Some(1), Some(2), Some(7), Some(63), Some(64), Some(65), Some(1 << 20), Some((1 << 31) + 5)];
    ModelConfig {
        architecture,
        vocab_size,
        n_classes: if dice.one_in(4) { dice.within(vocab_size / 2 + 1, vocab_size) } else { vocab_size },
        hidden_size: dice.width(136),
        intermediate_size: dice.width(200),
        n_layers: dice.within(1, 2),
        heads: heads(dice),
        max_position: 4096,
        rms_norm_eps: dice.of(&[1e-5, 1e-6]),
        rope_theta: dice.of(&[10_000.0, 1e6, 1.0]),
        rope_scaling: match dice.within(0, 3) {
            0 => RopeScaling::Linear { factor: 4.0 },
            1 => RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position: 32,
            },
            _ => RopeScaling::Default,
        },
        tied: dice.one_in(2),
        attention_bias: match architecture {
            Architecture::Qwen2 => AttentionBias::Qkv,
            Architecture::Llama | Architecture::Qwen3 if biased => AttentionBias::Qkvo,
            _ => AttentionBias::None,
        },
        mlp_bias: architecture == Architecture::Llama && dice.one_in(2),
        qk_norm: architecture == Architecture::Qwen3,
        sliding_window: if architecture == Architecture::Llama { None } else { dice.of(&windows) },
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        pad_token_id: None,
    }
}

/// Settings of a training, of `steps` micro-batches each.
fn settings(dice: &mut Dice, dtype: DType, grad_accum: usize) -> TrainSettings {
    let r = dice.of(&[1, 2, 3, 7, 8, 16, 16, 24, 32, 40, 64, 65, 128, 256]);
    let rslora = dice.one_in(4);
    let scale = dice.of(&[0.25, 1.0, 2.0]);
    let mut targets: Vec<Product> = Product::ALL.into_iter().filter(|_| !dice.one_in(3)).collect();
    if dice.one_in(3) || targets.is_empty() {
        targets = if dice.one_in(2) { Product::ALL.to_vec() } else { vec![dice.of(&Product::ALL)] };
    }
    let lora = LoraSpec {
        r,
        alpha: scale * if rslora { (r as f64).sqrt() } else { r as f64 },
        dropout: dice.of(&[0.0, 0.0, 0.1, 0.5, 0.99]),
        rslora,
        targets: Vec::new(),
    };
    TrainSettings {
        dtype,
        grad_accum,
        micro_batch_size: 1,
        eval_batch_size: 1,
        recompute: dice.of(&[Recompute::None, Recompute::Attention, Recompute::Layer]),
        lora: (!dice.one_in(3)).then_some(lora),
        lora_targets: targets.into_iter().map(|p| p.name().to_string()).collect(),
        lora_plus: dice.of(&[None, Some(16.0)]),
        weight_decay: dice.of(&[0.0, 0.1]),
        max_grad_norm: dice.of(&[None, Some(1.0), Some(1e-3), Some(1e6)]),
        adam_eps: dice.of(&[1e-8, 1e-3]),
        seed: dice.within(0, 1 << 40) as u64,
        ..TrainSettings::default()
    }
}

/// Where the document of each of `n` tokens begins: one, as many as tokens, or some of lengths around those of tiles.
fn documents(dice: &mut Dice, n: usize) -> Vec<i32> {
    let kind = dice.within(0, 3);
    let mut starts = Vec::new();
    while starts.len() < n {
        let len = match kind {
            0 => n,
            1 => dice.of(&[1, 1, 1, 2]),
            _ => dice.of(&[1, 3, 31, 63, 64, 65, 128, 129]),
        };
        let start = starts.len();
        starts.resize(n.min(start + len), start as i32);
    }
    starts
}

/// A micro-batch of `n` tokens, of which all, some, one or none are supervised.
fn micro_batch(dice: &mut Dice, c: &ModelConfig, n: usize) -> MicroBatch {
    let doc_start = documents(dice, n);
    let tokens: Vec<i32> = (0..n).map(|_| dice.within(0, c.vocab_size - 1) as i32).collect();
    let of = dice.of(&[1, 1, 2, 9, 0]);
    let targets: Vec<i32> = (0..n)
        .map(|i| {
            let last = doc_start.get(i + 1).is_none_or(|&next| next as usize == i + 1);
            if last || of == 0 || !dice.one_in(of) { IGNORE } else { dice.within(0, c.n_classes - 1) as i32 }
        })
        .collect();
    let n_valid = targets.iter().filter(|&&t| t != IGNORE).count();
    MicroBatch { tokens, targets, doc_start, n_valid, samples: vec![0] }
}

/// A training of a model that nobody wrote down.
#[derive(Debug)]
pub struct Case {
    pub seed: u64,
    pub config: ModelConfig,
    pub settings: TrainSettings,
    /// First of the rows of the vocabulary that are trained beside low-rank updates, and how many.
    pub new_rows: Option<(usize, usize)>,
    /// Tokens that there is room for.
    pub capacity: usize,
    /// Micro-batches of each step.
    pub steps: Vec<Vec<MicroBatch>>,
    /// What is continued, at once.
    pub prompts: Vec<Vec<u32>>,
}

/// New tokens of every prompt.
pub const NEW: usize = 3;

impl Case {
    pub fn draw(seed: u64) -> Self {
        let dice = &mut Dice::new(seed);
        let config = shape(dice);
        let dtype = dice.of(&[DType::Bf16, DType::Bf16, DType::F32]);
        let grad_accum = dice.of(&[1, 1, 2, 3]);
        let settings = settings(dice, dtype, grad_accum);
        let tokens = |dice: &mut Dice| match dice.within(0, 9) {
            0 => 1,
            1 => dice.within(513, 600),
            2..=4 => dice.of(&[63, 64, 65, 127, 128, 129, 130]),
            _ => dice.within(2, 160),
        };
        let steps: Vec<Vec<MicroBatch>> = (0..2)
            .map(|_| {
                (0..grad_accum)
                    .map(|_| {
                        let n = tokens(dice);
                        micro_batch(dice, &config, n)
                    })
                    .collect()
            })
            .collect();
        let most = steps.iter().flatten().map(|b| b.tokens.len()).max().unwrap_or(1);
        let new = dice.within(1, config.n_classes.min(9));
        let prompts = (0..dice.within(1, 3))
            .map(|_| {
                let n = if dice.one_in(4) { dice.within(127, 131) } else { dice.within(1, 20) };
                (0..n).map(|_| dice.within(0, config.vocab_size - 1) as u32).collect()
            })
            .collect();
        Self {
            seed,
            new_rows: (settings.lora.is_some() && dice.one_in(3)).then_some((config.n_classes - new, new)),
            capacity: most + dice.within(0, 70),
            config,
            settings,
            steps,
            prompts,
        }
    }

    /// In a line.
    pub fn words(&self) -> String {
        let Self { seed, config: c, settings: s, new_rows, steps, prompts, .. } = self;
        let batches: Vec<Vec<String>> = steps
            .iter()
            .map(|step| step.iter().map(|b| format!("{}/{}", b.n_valid, b.tokens.len())).collect())
            .collect();
        format!(
            "case {seed}: {:?} {:?} C {} F {} L {} {:?} V {}/{} tied {} bias {:?} {} window {:?} rope {:?} {} lora {:?} of {:?} new rows {new_rows:?} \
             recompute {:?} clip {:?} targets/tokens {batches:?} prompts {:?}",
            c.architecture,
            s.dtype,
            c.hidden_size,
            c.intermediate_size,
            c.n_layers,
            c.heads,
            c.n_classes,
            c.vocab_size,
            c.tied,
            c.attention_bias,
            c.mlp_bias,
            c.sliding_window,
            c.rope_scaling,
            c.rope_theta,
            s.lora.as_ref().map(|l| (l.r, l.alpha, l.dropout)),
            s.lora_targets,
            s.recompute,
            s.max_grad_norm,
            prompts.iter().map(Vec::len).collect::<Vec<_>>(),
        )
    }
}
