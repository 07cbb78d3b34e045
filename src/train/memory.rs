//! How much memory a run will take, worked out from shapes alone: nothing is loaded or allocated.
//!
//! [`estimate`] follows what [`super::setup::workload`] allocates tensor by tensor; a test holds the two equal to the byte.

use std::ops::Range;

use super::buckets::Buckets;
use crate::backend::{Footprint, Keep};
use crate::comm::Fold;
use crate::comm::bucket::{BLOCK, BlockCounts, GPU_BUCKET, at_once, share};
use crate::comm::ranks::BUCKET;
use crate::log::tables::MemoryClass;
use crate::model::config::ModelConfig;
use crate::model::weights::{Kind, Place, Product, Weights};
use crate::model::{LoraSpec, Recompute, dropped_width, kept_packed};
use crate::settings::{TrainSettings, Zero};
use crate::tensor::DType;
use crate::text::bytes;
use crate::words::Words;

/// Bytes of f32 and of i32.
const WORD: u64 = 4;

/// What weights take beyond themselves in the form that products read. It spares time alone: a machine that has not the memory does without.
pub const PACKED: &str = "packed weights";

/// The copy from which a checkpoint is written while the training goes on. A machine that has not the memory writes it while the training waits.
pub const COPY: &str = "copy for a checkpoint";

/// What a run's memory depends on.
#[derive(Clone, Debug)]
pub struct Demand<'a> {
    /// Shape of the model, vocabulary grown.
    pub config: &'a ModelConfig,
    /// Settings of the loop.
    pub settings: &'a TrainSettings,
    /// Low-rank updates; `None` in full training.
    pub lora: Option<&'a LoraSpec>,
    /// With LoRA on a grown vocabulary: how many rows of embedding and head are trained.
    pub new_rows: Option<usize>,
    /// Tokens of a full row.
    pub max_seq_len: usize,
    /// Whether checkpoints are written while the training goes on.
    pub saves: bool,
    /// What a device of its kind keeps.
    pub device: Footprint,
}

impl Demand<'_> {
    /// Tokens of the largest micro-batch, of training or evaluation.
    pub fn max_tokens(&self) -> usize {
        self.settings.micro_batch_size.max(self.settings.eval_batch_size) * self.max_seq_len
    }

    /// Number of weights, low-rank updates left out.
    pub fn base_weights(&self) -> u64 {
        Weights::count(self.config)
    }

    /// Number of weights of the low-rank updates.
    pub fn lora_weights(&self) -> u64 {
        let Some(lora) = self.lora else { return 0 };
        let all = Weights::with_updates(self.config, &lora.targets);
        let updates = all.places().into_iter().filter(|(at, _)| at.kind() == Kind::LowRank);
        updates.map(|(at, _)| at.len(self.config, lora.r) as u64).sum()
    }

    /// Rows of the vocabulary that LoRA trains, as weights: of the embedding, and of the head where it is its own.
    fn vocabulary_weights(&self) -> u64 {
        let tables = if self.config.tied { 1 } else { 2 };
        (self.new_rows.unwrap_or(0) * self.config.hidden_size * tables) as u64
    }

    /// Every trained weight with its number of elements, in the order of files.
    fn trained_lengths(&self) -> Vec<(Place, usize)> {
        trained_lengths(self.config, self.lora, self.new_rows.unwrap_or(0))
    }

    /// Whether the device has memory of its own, over which ranks reach each other.
    fn on_gpus(&self) -> bool {
        self.device.block > 1
    }

    /// The buckets in which ranks sum gradients.
    fn buckets(&self, lengths: &[(Place, usize)]) -> Buckets {
        Buckets::new(self.config.n_layers, lengths, if self.on_gpus() { GPU_BUCKET } else { BUCKET })
    }

    /// Elements between the trained weights, and between their gradients, in the pieces of memory that hold them.
    fn between(&self, ranks: usize) -> u64 {
        if !self.on_gpus() {
            return 0;
        }
        let lengths = self.trained_lengths();
        let rooms = self.buckets(&lengths).rooms(&lengths, ranks);
        rooms.iter().zip(&lengths).map(|(room, (_, len))| (room - len) as u64).sum()
    }

    /// Weights whose gradients a rank sums, and whose state it holds with ZeRO-1: of the rank that has most.
    fn owned_weights(&self, ranks: usize) -> u64 {
        let lengths = self.trained_lengths();
        let all = self.buckets(&lengths).cuts(&lengths, ranks);
        let of = |r: usize| all.iter().map(|cuts| (cuts[r + 1] - cuts[r]) as u64).sum();
        (0..ranks).map(of).max().unwrap_or(0)
    }

    /// Bytes of [`PACKED`]: see [`crate::model::Model::keep_packed`].
    fn packed(&self) -> u64 {
        let pays = self.settings.dtype == DType::Bf16 && reads_again(self.settings, self.lora.is_some());
        let Some(packed) = self.device.packed.filter(|_| pays) else { return 0 };
        let element = self.settings.dtype.bytes() as u64;
        let of = |at: Place| {
            let how = kept_packed(self.config, self.lora.is_some(), self.new_rows.is_some(), at)?;
            let own = if how == Keep::Frozen { at.len(self.config, 0) as u64 * element } else { 0 };
            Some(packed.bytes(at.shape(self.config, 0)) - own)
        };
        Weights::of(self.config).places().into_iter().filter_map(|(at, _)| of(at)).sum()
    }

    /// The buckets in which ranks sum gradients: the parts of each in the order of backward, and the lengths of its weights.
    pub fn bucket_lengths(&self) -> Vec<(Range<usize>, Vec<usize>)> {
        let lengths = self.trained_lengths();
        let buckets = self.buckets(&lengths);
        let of = |bucket| {
            let own = lengths.iter().filter(|(at, _)| buckets.bucket_of(*at) == bucket).map(|(_, len)| *len).collect();
            (buckets.parts(bucket), own)
        };
        (0..buckets.count()).map(of).collect()
    }

    /// Blocks of the gradient that the rank of several has which has most: it gives the sum of squares of each.
    pub fn most_blocks(&self, ranks: usize) -> usize {
        let lengths = self.trained_lengths();
        let cuts = self.buckets(&lengths).cuts(&lengths, ranks);
        BlockCounts::new(&cuts).totals().into_iter().max().unwrap_or(0)
    }

    /// Elements of the stages through which terms go on GPUs: two that are sent, one that is received.
    fn stages(&self, ranks: usize) -> u64 {
        let longest = self.bucket_lengths().iter().map(|(_, own)| share(own, ranks) * BLOCK).max().unwrap_or(0);
        (3 * at_once(longest, ranks) * ranks) as u64
    }

    /// Number of trained weights.
    pub fn trained_weights(&self) -> u64 {
        match self.lora {
            Some(_) => self.lora_weights() + self.vocabulary_weights(),
            None => self.base_weights(),
        }
    }
}

/// Whether products read weights several times in each direction before they change: those under low-rank updates never do, others once a step.
pub(super) fn reads_again(s: &TrainSettings, lora: bool) -> bool {
    lora || s.grad_accum > 1
}

/// Every trained weight with its number of elements, in the order of files; `new_rows` of the vocabulary are trained beside low-rank updates.
pub(super) fn trained_lengths(c: &ModelConfig, lora: Option<&LoraSpec>, new_rows: usize) -> Vec<(Place, usize)> {
    let of = |at: Place| match (lora, at.kind()) {
        (None, _) => at.len(c, 0),
        (Some(lora), Kind::LowRank) => at.len(c, lora.r),
        (Some(_), Kind::Vocabulary) => new_rows * c.hidden_size,
        (Some(_), Kind::Matrix | Kind::Norm | Kind::Bias) => 0,
    };
    let all = match lora {
        Some(lora) => Weights::with_updates(c, &lora.targets),
        None => Weights::of(c),
    };
    all.places().into_iter().map(|(at, _)| (at, of(at))).filter(|(_, len)| *len > 0).collect()
}

/// Bytes on the device by class, on one rank.
pub fn estimate(d: &Demand) -> Vec<MemoryClass> {
    estimate_on(d, 1)
}

/// Bytes by class on the rank of several that has most. With ZeRO-1 its part of the state is its own. Where gradients are folded in order,
/// the sums of its part take memory: over sockets that of the machine, on GPUs the device's, with what is on its way.
pub fn estimate_on(d: &Demand, ranks: usize) -> Vec<MemoryClass> {
    let element = d.settings.dtype.bytes() as u64;
    let owned = if ranks > 1 { d.owned_weights(ranks) } else { d.trained_weights() };
    let sharded = ranks > 1 && d.settings.zero == Zero::Moments;
    let held = if d.settings.zero == Zero::Moments { owned } else { d.trained_weights() };
    // With several micro-batches in a step, the vocabulary's gradient of each is formed apart.
    let rows = if d.lora.is_some() { d.new_rows.unwrap_or(0) } else { d.config.vocab_size };
    let vocabulary = if d.settings.grad_accum > 1 { (rows * d.config.hidden_size) as u64 } else { 0 };
    // Moments and masters each begin at a multiple of so many elements; a rank has the same number of whole blocks.
    let between = d.between(ranks);
    let beside = if sharded { between / ranks as u64 } else { d.between(1) };
    // Rows of the vocabulary lie in a larger weight.
    let in_weights = if d.lora.is_some() && d.new_rows.is_some() { 0 } else { between };
    let kept = if d.settings.dtype == DType::Bf16 { 3 } else { 2 };
    let class = |name, bytes| MemoryClass { name, bytes };
    // Logits are f32; their gradient; the chunk's rows and their gradient.
    let rows = d.device.logits_rows.min(d.max_tokens()) as u64;
    let apart = if d.settings.dtype == DType::Bf16 && d.device.logits_gradient { element } else { 0 };
    let head = rows * (d.config.n_classes as u64 * (WORD + apart) + d.config.hidden_size as u64 * (WORD + element));
    let mut classes = vec![class("weights", (d.base_weights() + d.lora_weights() + in_weights) * element)];
    classes.extend(Some(d.packed()).filter(|&n| n > 0).map(|n| class(PACKED, n)));
    classes.extend([
        class("gradients", (d.trained_weights() + between) * WORD),
        class("moments and masters", kept * (held + beside) * WORD),
        class("activations", d.max_tokens() as u64 * per_token(d) + vocabulary * WORD),
        class("logits chunk", head),
    ]);
    if ranks > 1 {
        let gathered = d.between(ranks) / ranks as u64;
        let sums = match (d.on_gpus(), d.settings.fold) {
            // With ZeRO-1 what this rank updated waits there for the other ones, while the next step begins.
            (false, _) => owned * if sharded { 2 } else { 1 },
            (true, Some(Fold::MicroBatch)) => owned + gathered + d.stages(ranks),
            // They are formed where the gradients are.
            (true, _) => 0,
        };
        classes.push(class("sums over ranks", sums * WORD));
    }
    classes
}

/// As [`estimate_on`] for a device with `available` bytes, with what operations and files take beside where that is the device's memory too:
/// without [`PACKED`] and [`COPY`] where they do not fit.
pub fn estimate_within(d: &Demand, ranks: usize, available: Option<u64>) -> Vec<MemoryClass> {
    let mut classes = estimate_on(d, ranks);
    if !d.on_gpus() {
        classes.push(MemoryClass { name: "scratch of operations", bytes: of_operations(d) });
        classes.extend(for_files(d, ranks));
    }
    for spared in [PACKED, COPY] {
        if available.is_some_and(|n| n < sum(&classes)) {
            classes.retain(|c| c.name != spared);
        }
    }
    classes
}

/// What operations on the CPU keep for themselves, nearly: gradients of keys and values for each query head, and of a product's operands and its
/// sums a slab of at most 4 MiB each.
fn of_operations(d: &Demand) -> u64 {
    const SLAB: u64 = 4 << 20;
    let (tokens, element) = (d.max_tokens() as u64, d.settings.dtype.bytes() as u64);
    let largest =
        Weights::of(d.config).places().into_iter().map(|(at, _)| at.len(d.config, 0) as u64).max().unwrap_or(0);
    let rows = tokens * d.config.intermediate_size as u64;
    tokens * 2 * d.config.q_dim() as u64 * WORD + (rows * element).min(SLAB) + 2 * (largest * element).min(SLAB)
}

/// Host memory from which files are written, on the main rank: one weight at a time, or a copy of all that a checkpoint has.
fn for_files(d: &Demand, ranks: usize) -> Vec<MemoryClass> {
    let sharded = ranks > 1 && d.settings.zero == Zero::Moments;
    let largest = d.trained_lengths().iter().map(|(_, len)| *len as u64).max().unwrap_or(0);
    let masters = d.settings.dtype == DType::Bf16;
    // With a grown vocabulary the base is written too, each weight in the form of the file beside its values.
    let of_base = |at: Place| at.len(d.config, 0) as u64 * (WORD + d.settings.dtype.bytes() as u64);
    let grown = d.lora.is_some() && d.new_rows.is_some();
    let base = Weights::of(d.config).places().into_iter().filter(|_| grown).map(|(at, _)| of_base(at)).max();
    let bytes = base.unwrap_or(0).max(largest * WORD);
    let mut classes = vec![MemoryClass { name: "a weight for a file", bytes }];
    // Masters are the values of weights too, unless each rank has a part of them. Moments are two.
    let words = match (sharded, masters) {
        (false, _) => 3 * d.trained_weights(),
        (true, masters) => d.trained_weights() + if masters { 3 } else { 2 } * d.owned_weights(ranks),
    };
    if sharded || d.saves {
        classes.push(MemoryClass { name: COPY, bytes: words * WORD });
    }
    classes
}

/// Bytes of all classes.
pub fn sum(classes: &[MemoryClass]) -> u64 {
    classes.iter().map(|c| c.bytes).sum()
}

/// Bytes of activations and scratch that one token takes.
fn per_token(d: &Demand) -> u64 {
    let c = d.config;
    let element = d.settings.dtype.bytes() as u64;
    let (hidden, ffn) = (c.hidden_size as u64, c.intermediate_size as u64);
    let (q, kv) = (c.q_dim() as u64, c.kv_dim() as u64);
    let (heads, kv_heads) = (c.heads.n_query as u64, c.heads.n_kv as u64);
    let low_rank = |targets: &[Product]| {
        let Some(lora) = d.lora else { return 0 };
        targets.iter().filter(|&&t| lora.has(t)).count() as u64 * lora.r as u64
    };
    let layers = |kept: bool| if kept { c.n_layers as u64 } else { 1 };
    let keeps_attention = layers(d.settings.recompute == Recompute::None);
    let keeps_mlp = layers(d.settings.recompute != Recompute::Layer);
    // Queries, keys, values, output; with norms per head their inputs too.
    let norm = u64::from(c.qk_norm);
    let attention = (2 + norm) * q + (2 + norm) * kv + low_rank(&[Product::Q, Product::K, Product::V]);
    let lse_and_rstd = (1 + norm) * heads + norm * kv_heads;
    let mlp = 2 * ffn + low_rank(&[Product::O, Product::Gate, Product::Up, Product::Down]);
    let streams = c.n_layers as u64 + 1;
    // Final norm, a norm's output, SwiGLU's output; dres and dh; dact; dq, dk, dv and dout.
    let scratch = 2 * hidden + ffn + 2 * hidden + ffn + (2 + norm) * q + (2 + norm) * kv;
    let dropped =
        2 * dropped_width(&d.device, c, d.settings.dtype, d.lora) as u64 + 3 * d.lora.map_or(0, |l| l.r as u64);
    let elements = streams * hidden + keeps_mlp * (hidden + mlp) + keeps_attention * attention + scratch + dropped;
    // The vectors of a micro-batch; two rstd, correct, the losses of a step's micro-batches; a row of the rotary table.
    let words = d.device.batch_words as u64
        + 3
        + d.settings.grad_accum as u64
        + c.heads.head_dim as u64
        + keeps_attention * lse_and_rstd;
    elements * element + words * WORD
}

/// A change of settings that makes a run fit, and what it then takes.
#[derive(Clone, Debug, PartialEq)]
pub struct Remedy {
    /// The flags to add.
    pub flags: String,
    /// Bytes with them.
    pub bytes: u64,
}

/// The mildest change with which a run takes at most `available` bytes: first those that change no result (recomputation, then
/// smaller micro-batches with more of them in a step), then bf16, LoRA and shorter rows. `None`: not even all of them do.
pub fn remedy(d: &Demand, lora: &LoraSpec, available: u64) -> Option<Remedy> {
    let mut settings = d.settings.clone();
    let mut flags: Vec<String> = Vec::new();
    let total = |s: &TrainSettings, l: Option<&LoraSpec>, rows: usize| -> u64 {
        let changed = Demand { settings: s, lora: l, max_seq_len: rows, ..d.clone() };
        sum(&estimate_within(&changed, 1, Some(available)))
    };
    let fits = |s: &TrainSettings, l: Option<&LoraSpec>, rows: usize, flags: &[String]| {
        let bytes = total(s, l, rows);
        (bytes <= available).then(|| Remedy { flags: flags.join(" "), bytes })
    };
    for recompute in [Recompute::Attention, Recompute::Layer] {
        if settings.recompute == Recompute::Layer || settings.recompute == recompute {
            continue;
        }
        let changed = TrainSettings { recompute, ..settings.clone() };
        let found = fits(&changed, d.lora, d.max_seq_len, &[format!("--recompute {}", recompute.word())]);
        if found.is_some() {
            return found;
        }
        if recompute == Recompute::Layer {
            settings = changed;
            flags.push("--recompute layer".into());
        }
    }
    let whole = settings.micro_batch_size * settings.grad_accum;
    let base = flags.clone();
    while settings.micro_batch_size.max(settings.eval_batch_size) > 1 {
        settings.eval_batch_size = settings.eval_batch_size.min(settings.micro_batch_size.max(2) / 2).max(1);
        if settings.micro_batch_size > 1 {
            settings.micro_batch_size /= 2;
            settings.grad_accum = whole.div_ceil(settings.micro_batch_size);
        }
        flags.clone_from(&base);
        flags.push(format!(
            "--per-device-train-batch-size {} --gradient-accumulation-steps {} --per-device-eval-batch-size {}",
            settings.micro_batch_size, settings.grad_accum, settings.eval_batch_size
        ));
        if let Some(found) = fits(&settings, d.lora, d.max_seq_len, &flags) {
            return Some(found);
        }
    }
    if settings.dtype == DType::F32 {
        settings.dtype = DType::Bf16;
        flags.push("--mixed-precision bf16".into());
        if let Some(found) = fits(&settings, d.lora, d.max_seq_len, &flags) {
            return Some(found);
        }
    }
    let mut updates = d.lora;
    if updates.is_none() {
        updates = Some(lora);
        flags.push("--use-lora".into());
        if let Some(found) = fits(&settings, updates, d.max_seq_len, &flags) {
            return Some(found);
        }
    }
    let mut rows = d.max_seq_len;
    while rows > 64 {
        rows /= 2;
        let mut shorter = flags.clone();
        shorter.push(format!("--max-seq-len {rows}"));
        if let Some(found) = fits(&settings, updates, rows, &shorter) {
            return Some(found);
        }
    }
    None
}

/// What stands before a device's own words where its memory of `free` bytes did not take a run: what that needs, and with which flags it
/// would fit, low-rank updates being those of `lora`.
pub fn does_not_fit(d: &Demand, lora: &LoraSpec, free: u64) -> String {
    let total = estimate(d).iter().map(|c| c.bytes).sum::<u64>();
    // What is estimated to fit and did not has to become smaller too.
    let advice = match remedy(d, lora, free.min(total.saturating_sub(1))) {
        Some(r) => format!("{} takes {}", r.flags, bytes(r.bytes)),
        None => "use a smaller model or a device with more memory".into(),
    };
    format!(
        "the run does not fit into the device's memory: it takes {}, {} were free; {advice}",
        bytes(total),
        bytes(free)
    )
}
