//! The table of settings: every key of a config file, and so every flag of `pretrain`, `sft`, `pack` and `inspect rows|packs`.
//! Other commands take rows from here too: see [`super::flags`].

use super::fields::Content;
use super::train::{EarlyStopping, Every, GenTest, Reporter, Resume, Zero};
use super::value::{Kind, Range, Value};
use super::{Commands, Needs, Row, Setting, Settings};
use crate::comm::{Choice as Transport, Fold};
use crate::data::encode::Overflow;
use crate::data::mix::WeightUnit;
use crate::data::raw_tokens::RawWidth;
use crate::model::{LoraSpec, Recompute};
use crate::optim::{Shape, Warmup};
use crate::tensor::DType;
use crate::words::Words;

use Commands as C;
use Kind::{Bool, Choice, Float, Int, Path, Paths, Text, Texts, Weights};
use Range::{BelowOne, NotNegative, Positive, PositiveShare, Share, UpTo};

const MODEL: &str = "Model and tokenizer";
const DATA: &str = "Data";
const TRAIN: &str = "Training";
const OPTIM: &str = "Optimiser and schedule";
const LORA: &str = "LoRA";
const EVAL: &str = "Evaluation";
const GEN: &str = "Generation test";
const OUT: &str = "Output and resume";
const RUN: &str = "Run";

/// Most steps and the like: numbers near 2^64 are no numbers of anything, and products of such numbers have to fit.
const STEPS: u64 = 1_000_000_000;
/// Rows are counted in 32 bits.
pub(super) const ROWS: u64 = u32::MAX as u64;

/// A row that still has to say where its value goes.
pub(super) const fn set(
    group: &'static str,
    commands: Commands,
    key: &'static str,
    kind: Kind,
    help: &'static str,
) -> Row<()> {
    let (aliases, default, unset, placeholder, needs) = (&[], None, "", "", None);
    Row { key, aliases, group, commands, kind, default, unset, help, placeholder, needs, to: () }
}

impl<T: Copy> Row<T> {
    pub(super) const fn default(mut self, value: &'static str) -> Self {
        (self.default, self.unset) = (Some(value), "");
        self
    }

    pub(super) const fn unset(mut self, what: &'static str) -> Self {
        (self.default, self.unset) = (None, what);
        self
    }

    pub(super) const fn alias(mut self, names: &'static [&'static str]) -> Self {
        self.aliases = names;
        self
    }

    pub(super) const fn needs(mut self, key: &'static str, values: &'static [&'static str]) -> Self {
        self.needs = Some(Needs { key, values });
        self
    }

    /// Closes the row, or gives a copy of one another field.
    pub(super) const fn to(self, to: fn(&mut Settings, &Value)) -> Setting {
        let Row { key, aliases, group, commands, kind, default, unset, help, placeholder, needs, .. } = self;
        Row { key, aliases, group, commands, kind, default, unset, help, placeholder, needs, to }
    }
}

/// Low-rank updates whose fields the rows below `use_lora` write.
fn unwritten_lora() -> LoraSpec {
    LoraSpec { r: 0, alpha: 0.0, dropout: 0.0, rslora: false, targets: Vec::new() }
}

/// Writes on the low-rank updates where there are any.
fn lora(s: &mut Settings, write: impl FnOnce(&mut LoraSpec)) {
    if let Some(lora) = &mut s.train.lora {
        write(lora);
    }
}

/// Writes on the generation test where one was asked for.
fn gen_test(s: &mut Settings, write: impl FnOnce(&mut GenTest)) {
    if let Some(test) = &mut s.train.gen_test {
        write(test);
    }
}

/// Every setting, in the order of the help and of configs/README.md. A row may read what rows above it wrote.
#[rustfmt::skip] // One setting, a few short lines: a table.
pub static TABLE: &[Setting] = &[
    set(MODEL, C::SFT, "model_path", Path, "Model to fine-tune: a folder in the Hugging Face layout, or org/name[@revision] of the hub")
        .alias(&["model_name_or_path"])
        .unset("required")
        .to(|s, v| s.model.path = v.given().map(Value::path)),
    set(MODEL, C::PRETRAIN, "model_config", Path, "Shape of the new model: a config.json, or tiny, small or base")
        .unset("required")
        .to(|s, v| s.model.config = v.given().map(Value::path)),
    set(MODEL, C::DATA, "tokenizer_path", Path, "Tokenizer: a SentencePiece model (.model), a tokenizer.json, a folder with one, or org/name of the hub")
        .alias(&["tokenizer_name_or_path"])
        .unset("sft: the one in the model's folder; otherwise required")
        .to(|s, v| s.model.tokenizer = v.given().map(Value::path)),
    set(MODEL, C::DATA, "special_ids", Text, "Ids a SentencePiece model has to have, as pad,unk,bos,eos (Llama-2: 0,0,1,2); of a tokenizer.json, instead of what its files say")
        .default("0,1,2,3")
        .to(|s, v| s.model.special_ids = v.text()),
    set(MODEL, C::SFT, "pad_vocab_to", Int(1, 1 << 26), "Pad embedding and head to this many rows, which the softmax never sees")
        .unset("no padding")
        .to(|s, v| s.model.pad_vocab_to = v.given().map(Value::count)),
    // Data
    set(DATA, C::DATA, "dataset_paths", Paths, "Data sets: JSON Lines, Parquet, CSV (gzip too); .txt and .bin for pretrain; a folder or a pattern stands for its files; hf:org/name[/config][:split] is one of the hub")
        .alias(&["dataset_path"])
        .unset("required")
        .to(|s, v| s.data.paths = v.paths()),
    set(DATA, C::DATA, "columns", Texts, "Columns under other names, as FIELD=COLUMN: prompt=question response=answer; text=body for pretrain")
        .unset("each field under its own name")
        .to(|s, v| s.data.columns = v.texts()),
    set(DATA, C::TRAIN, "dataset_weights", Weights, "Relative share of each data set in an epoch, in the order of dataset_paths")
        .unset("every row once")
        .to(|s, v| s.data.weights = v.given().map(Value::floats)),
    set(DATA, C::TRAIN, "weight_unit", Choice(WeightUnit::WORDS), "What the weights share out")
        .default("samples")
        .needs("dataset_weights", &[])
        .to(|s, v| s.data.weight_unit = v.choice()),
    set(DATA, C::TRAIN, "epoch_samples", Int(1, ROWS), "Rows of an epoch").unset("all rows")
        .to(|s, v| s.data.epoch_samples = v.given().map(Value::int)),
    set(DATA, C::SFT_DATA, "prompt_template", Text, "chatml, instruct, alpaca, llama2, zephyr, plain, a .jinja file, or model: the model's own chat template")
        .default("chatml")
        .to(|s, v| s.model.template = v.given().map(Value::text)),
    set(DATA, C::SFT_DATA, "template_date", Text, "Day, as YYYY-MM-DD, of a template that asks for strftime_now")
        .unset("the template finds no such function")
        .to(|s, v| s.model.template_date = v.given().map(Value::text)),
    set(DATA, C::SFT_DATA, "supervise_turn_newline", Bool, "Train the newline after a closing token too, as TRL does")
        .default("false")
        .needs("prompt_template", &["chatml", "zephyr"])
        .to(|s, v| s.model.supervise_turn_newline = v.bool()),
    set(DATA, C::TRAIN, "val_fraction", Float(BelowOne), "Share of each data set kept for validation")
        .alias(&["test_size"])
        .default("0.05")
        .to(|s, v| s.data.val_fraction = v.float()),
    set(DATA, C::TRAIN, "val_paths", Paths, "Validation data, as dataset_paths; instead of val_fraction")
        .alias(&["eval_dataset_paths", "eval_dataset_path"])
        .unset("val_fraction")
        .to(|s, v| s.data.val_paths = v.paths()),
    set(DATA, C::DATA, "max_seq_len", Int(2, 1 << 26), "Longest row in tokens")
        .alias(&["max_length", "max_seq_length", "seq_len"])
        .unset("the model's maximum, at most 1024; pack: 1024")
        .to(|s, v| s.train.max_seq_len = v.given().map(Value::count)),
    set(DATA, C::TRAIN, "packing", Bool, "Pack several rows into one, each seeing itself alone")
        .default("true")
        .to(|s, v| s.data.packing = v.bool()),
    set(DATA, C::SFT_DATA, "overflow", Choice(Overflow::WORDS), "What happens to a row longer than max_seq_len")
        .default("truncate")
        .to(|s, v| s.data.overflow = v.choice()),
    set(DATA, C::SFT_DATA, "skip_bad_rows", Bool, "Count, log and skip malformed rows instead of stopping")
        .default("false")
        .to(|s, v| s.data.skip_bad_rows = v.bool()),
    set(DATA, C::PRETRAIN_DATA, "raw_width", Choice(RawWidth::WORDS), "Size of a token in .bin files without a header")
        .unset("u16 where the vocabulary allows it")
        .to(|s, v| s.data.raw_width = v.given().map(Value::choice)),
    set(DATA, C::PACK, "content", Choice(Content::WORDS), "Whether the files hold prompts and responses or text to pretrain on")
        .unset("text for .txt and .bin, else rows")
        .to(|s, v| s.data.content = v.given().map(Value::choice)),
    set(DATA, C::TRAIN, "cache_dir", Path, "Where token files are kept for later runs")
        .unset("$RINGTUNE_CACHE, or ringtune in the user's cache folder")
        .to(|s, v| s.data.cache_dir = v.given().map(Value::path)),
    // Training
    set(TRAIN, C::TRAIN, "num_train_epochs", Float(UpTo(100_000)), "Passes over the data; 0.5 is half of one")
        .alias(&["epochs", "num_epochs"])
        .default("3")
        .to(|s, v| s.train.epochs = v.float()),
    set(TRAIN, C::TRAIN, "max_steps", Int(1, STEPS), "Optimiser steps; overrides num_train_epochs")
        .unset("as many as the epochs have")
        .to(|s, v| s.train.max_steps = v.given().map(Value::int)),
    set(TRAIN, C::TRAIN, "per_device_train_batch_size", Int(1, 65_536), "Rows of a micro-batch")
        .alias(&["micro_batch_size", "batch_size"])
        .default("8")
        .to(|s, v| s.train.micro_batch_size = v.count()),
    set(TRAIN, C::TRAIN, "gradient_accumulation_steps", Int(1, 65_536), "Micro-batches of an optimiser step")
        .alias(&["grad_accum"])
        .default("1")
        .to(|s, v| s.train.grad_accum = v.count()),
    set(TRAIN, C::TRAIN, "global_batch_size", Int(1, ROWS), "Rows of an optimiser step over all ranks; gradient_accumulation_steps follows")
        .unset("rows of a micro-batch times gradient_accumulation_steps times ranks")
        .to(|s, v| s.train.global_batch_size = v.given().map(Value::count)),
    set(TRAIN, C::TRAIN, "mixed_precision", Choice(DType::WORDS), "bf16: weights and activations in bfloat16, sums and masters in f32; no: all f32")
        .default("no")
        .to(|s, v| s.train.dtype = v.choice()),
    set(TRAIN, C::TRAIN, "recompute", Choice(Recompute::WORDS), "Recompute activations in backward to save memory; same bits")
        .default("none")
        .to(|s, v| s.train.recompute = v.choice()),
    set(TRAIN, C::TRAIN, "seed", Int(0, u64::MAX), "Seed of everything random").default("42")
        .to(|s, v| s.train.seed = v.int()),
    set(TRAIN, C::TRAIN, "max_bad_steps", Int(1, STEPS), "Steps in a row that may have a loss or gradient that is not finite")
        .default("10")
        .to(|s, v| s.train.max_bad_steps = v.small()),
    // Optimiser
    set(OPTIM, C::TRAIN, "learning_rate", Float(Positive), "Peak learning rate")
        .alias(&["lr"])
        .unset("2e-4 with LoRA, 2e-5 in full fine-tuning, 1e-3 in pretraining")
        .to(|s, v| s.train.learning_rate = v.given().map(Value::float)),
    set(OPTIM, C::TRAIN, "lr_scheduler_type", Choice(Shape::WORDS), "Shape of the learning rate over the run")
        .alias(&["lr_scheduler"])
        .default("cosine")
        .to(|s, v| s.train.schedule.shape = v.choice()),
    set(OPTIM, C::TRAIN, "warmup_ratio", Float(BelowOne), "Share of the steps in which the rate rises to its peak")
        .default("0.03")
        .to(|s, v| s.train.schedule.warmup = Warmup::Ratio(v.float())),
    set(OPTIM, C::TRAIN, "warmup_steps", Int(0, STEPS), "Steps in which the rate rises to its peak; instead of warmup_ratio")
        .unset("warmup_ratio")
        .to(|s, v| s.train.schedule.warmup = v.given().map_or(s.train.schedule.warmup, |n| Warmup::Steps(n.int()))),
    set(OPTIM, C::TRAIN, "warmup_from_zero", Bool, "transformers' warmup, whose first step runs at rate 0")
        .default("false")
        .to(|s, v| s.train.schedule.warmup_from_zero = v.bool()),
    set(OPTIM, C::TRAIN, "min_lr_ratio", Float(Share), "The schedule ends at this share of the peak")
        .default("0")
        .needs("lr_scheduler_type", &["cosine", "linear", "wsd"])
        .to(|s, v| s.train.schedule.min_lr_ratio = v.float()),
    set(OPTIM, C::TRAIN, "wsd_decay_ratio", Float(PositiveShare), "Share of the steps in which wsd decays")
        .default("0.2")
        .needs("lr_scheduler_type", &["wsd"])
        .to(|s, v| s.train.schedule.wsd_decay_ratio = v.float()),
    set(OPTIM, C::TRAIN, "weight_decay", Float(NotNegative), "Decoupled decay of matrices; never of norms and biases")
        .default("0")
        .to(|s, v| s.train.weight_decay = v.float()),
    set(OPTIM, C::TRAIN, "max_grad_norm", Float(NotNegative), "Clip the global gradient norm here; 0: no clipping")
        .default("1")
        .to(|s, v| s.train.max_grad_norm = Some(v.float()).filter(|&norm| norm > 0.0)),
    set(OPTIM, C::TRAIN, "adam_beta1", Float(BelowOne), "Decay of the first moment")
        .default("0.9")
        .to(|s, v| s.train.adam_beta1 = v.float()),
    set(OPTIM, C::TRAIN, "adam_beta2", Float(BelowOne), "Decay of the second moment")
        .default("0.999")
        .to(|s, v| s.train.adam_beta2 = v.float()),
    set(OPTIM, C::TRAIN, "adam_epsilon", Float(Positive), "Added to the root of the second moment")
        .alias(&["adam_eps"])
        .default("1e-8")
        .to(|s, v| s.train.adam_eps = v.float()),
    // LoRA
    set(LORA, C::SFT, "use_lora", Bool, "Train a low-rank adapter; off: all weights")
        .alias(&["use_peft"])
        .default("true")
        .to(|s, v| s.train.lora = v.bool().then(unwritten_lora)),
    set(LORA, C::SFT, "lora_r", Int(1, 65_536), "Rank")
        .default("16")
        .needs("use_lora", &["true"])
        .to(|s, v| lora(s, |l| l.r = v.count())),
    set(LORA, C::SFT, "lora_alpha", Float(Positive), "The adapter is scaled by lora_alpha / lora_r")
        .unset("twice lora_r")
        .needs("use_lora", &["true"])
        .to(|s, v| lora(s, |l| l.alpha = v.given().map_or(2.0 * l.r as f64, Value::float))),
    set(LORA, C::SFT, "lora_dropout", Float(BelowOne), "Probability of dropping an input of the adapter")
        .default("0.05")
        .needs("use_lora", &["true"])
        .to(|s, v| lora(s, |l| l.dropout = v.float())),
    set(LORA, C::SFT, "lora_targets", Texts, "Linears with an adapter: q k v o gate up down")
        .alias(&["lora_target_modules"])
        .default("q,k,v,o,gate,up,down")
        .needs("use_lora", &["true"])
        .to(|s, v| s.train.lora_targets = v.texts()),
    set(LORA, C::SFT, "use_rslora", Bool, "Scale by lora_alpha / sqrt(lora_r)")
        .default("false")
        .needs("use_lora", &["true"])
        .to(|s, v| lora(s, |l| l.rslora = v.bool())),
    set(LORA, C::SFT, "loraplus_lr_ratio", Float(Positive), "LoRA+: B learns at this multiple of the learning rate")
        .unset("1")
        .needs("use_lora", &["true"])
        .to(|s, v| s.train.lora_plus = v.given().map(Value::float)),
    set(LORA, C::SFT, "merge_adapters", Bool, "Write the merged model too")
        .alias(&["merge_adapter"])
        .default("false")
        .needs("use_lora", &["true"])
        .to(|s, v| s.train.merge_adapters = v.bool() && s.train.lora.is_some()),
    // Evaluation
    set(EVAL, C::TRAIN, "eval_strategy", Choice(Every::WORDS), "When to evaluate on the validation rows")
        .alias(&["evaluation_strategy"])
        .unset("steps when eval_steps is given, else epoch")
        .to(|s, v| s.train.eval_every = v.given().map_or(Every::Epoch, Value::choice)),
    set(EVAL, C::TRAIN, "eval_steps", Int(1, STEPS), "Steps between evaluations")
        .unset("an evaluation at the end of each epoch")
        .to(|s, v| s.train.eval_every = v.given().map_or(s.train.eval_every, |n| Every::Steps(n.int()))),
    set(EVAL, C::TRAIN, "eval_on_start", Bool, "Evaluate before the first step too")
        .default("false")
        .to(|s, v| s.train.eval_on_start = v.bool()),
    set(EVAL, C::TRAIN, "per_device_eval_batch_size", Int(1, 65_536), "Rows of a micro-batch in evaluation; changes speed only")
        .default("8")
        .to(|s, v| s.train.eval_batch_size = v.count()),
    set(EVAL, C::TRAIN, "early_stopping_patience", Int(1, STEPS), "Stop after this many evaluations without a better loss")
        .unset("no early stopping")
        .to(|s, v| s.train.early_stopping = v.given().map(|n| EarlyStopping { patience: n.small(), threshold: 0.0 })),
    set(EVAL, C::TRAIN, "early_stopping_threshold", Float(NotNegative), "A loss is better when it is lower by more than this")
        .default("0")
        .needs("early_stopping_patience", &[])
        .to(|s, v| { if let Some(stop) = &mut s.train.early_stopping { stop.threshold = v.float() } }),
    set(EVAL, C::TRAIN, "load_best_model_at_end", Bool, "Write the model of the best evaluation, not of the last step")
        .default("true")
        .to(|s, v| s.train.load_best_at_end = v.bool()),
    // Generation test
    set(GEN, C::SFT, "do_gen_test", Bool, "At the end, answer held-out prompts and print the answers")
        .default("false")
        .to(|s, v| s.train.gen_test = v.bool().then(GenTest::blank)),
    set(GEN, C::SFT, "num_gen_samples", Int(1, 1_000_000), "Prompts to answer")
        .default("5")
        .needs("do_gen_test", &["true"])
        .to(|s, v| gen_test(s, |g| g.num_samples = v.count())),
    set(GEN, C::SFT, "max_new_tokens", Int(1, 1 << 26), "Longest answer in tokens")
        .default("64")
        .needs("do_gen_test", &["true"])
        .to(|s, v| gen_test(s, |g| g.max_new_tokens = v.count())),
    set(GEN, C::SFT, "gen_temperature", Float(NotNegative), "Temperature of the sampled answers")
        .alias(&["temperature"])
        .default("0.7")
        .needs("do_gen_test", &["true"])
        .to(|s, v| gen_test(s, |g| g.temperature = v.float() as f32)),
    set(GEN, C::SFT, "gen_top_p", Float(PositiveShare), "Nucleus of the sampled answers")
        .alias(&["top_p"])
        .default("0.9")
        .needs("do_gen_test", &["true"])
        .to(|s, v| gen_test(s, |g| g.top_p = v.float() as f32)),
    // Output
    set(OUT, C::TRAIN, "output_dir", Path, "Where checkpoints, logs and the final model go")
        .unset("required")
        .to(|s, v| s.output_dir = v.given().map(Value::path)),
    set(OUT, C::PACK, "output", Path, "Token file to write").unset("required")
        .to(|s, v| s.output = v.given().map(Value::path)),
    set(OUT, C::TRAIN, "save_strategy", Choice(Every::WORDS), "When to save a checkpoint")
        .default("steps")
        .to(|s, v| s.train.save_every = v.choice()),
    set(OUT, C::TRAIN, "save_steps", Int(1, STEPS), "Steps between checkpoints")
        .default("500")
        .needs("save_strategy", &["steps"])
        .to(|s, v| { if let Every::Steps(n) = &mut s.train.save_every { *n = v.int() } }),
    set(OUT, C::TRAIN, "save_total_limit", Int(1, STEPS), "Checkpoints to keep besides the best")
        .unset("all")
        .to(|s, v| s.train.save_total_limit = v.given().map(Value::count)),
    set(OUT, C::TRAIN, "resume_from_checkpoint", Path, "A checkpoint folder, or auto: the newest valid one in output_dir")
        .unset("start at step 0")
        .to(|s, v| s.train.resume = v.given().map_or(Resume::No, |v| Resume::of(v.path()))),
    set(OUT, C::TRAIN, "allow_changed", Texts, "What may differ from the checkpoint's run: data, tokenizer, base_model, config")
        .unset("nothing")
        .needs("resume_from_checkpoint", &[])
        .to(|s, v| s.train.allow_changed = v.texts()),
    set(OUT, C::TRAIN, "logging_steps", Int(1, STEPS), "Steps between log lines").default("1")
        .to(|s, v| s.train.logging_steps = v.int()),
    set(OUT, C::TRAIN, "report_to", Kind::Choices(Reporter::WORDS), "Where figures go: TensorBoard files in output_dir/runs, the server of MLFLOW_TRACKING_URI, output_dir/metrics.jsonl; none: to the console alone")
        .default("tensorboard json")
        .to(|s, v| s.train.report_to = v.texts().iter().filter_map(|w| Reporter::of_word(w)).collect()),
    set(OUT, C::TRAIN, "tensorboard", Bool, "Write TensorBoard event files to output_dir/runs, where report_to names it")
        .default("true")
        .to(|s, v| { if !v.bool() { s.train.report_to.retain(|r| *r != Reporter::TensorBoard) } }),
    set(OUT, C::TRAIN, "trace", Path, "Write the phases of every step (data, forward, backward, reduce, update, evaluate, save) to this file, as a Chrome trace")
        .unset("no trace")
        .to(|s, v| s.train.trace = v.given().map(Value::path)),
    // Run
    set(RUN, C::TRAIN, "device", Text, "Device to compute on: auto, cpu, or cuda and the number of a GPU (cuda:1); auto is the first GPU that gives right results, else the CPU")
        .default("auto")
        .to(|s, v| s.device = v.text()),
    set(RUN, C::TRAIN, "transport", Choice(Transport::WORDS), "What carries gradients between ranks; auto: NCCL between GPUs, else MPI where mpirun or srun offers it and it was built in, else sockets")
        .default("auto")
        .to(|s, v| s.train.transport = v.choice()),
    set(RUN, C::TRAIN, "fold", Choice(Fold::WORDS), "When ranks sum gradients: after every micro-batch, which gives the bits of one rank and sends 4 bytes a trained weight each time, or once a step")
        .unset("step over NCCL, else micro_batch")
        .to(|s, v| s.train.fold = v.given().map(Value::choice)),
    set(RUN, C::TRAIN, "zero", Choice(Zero::WORDS), "ZeRO stage on several ranks: 1 has each of them hold its part of moments and masters; same bits")
        .default("0")
        .to(|s, v| s.train.zero = v.choice()),
    set(RUN, C::DATA, "threads", Int(1, 4096), "Worker threads").unset("one per core")
        .to(|s, v| s.train.threads = v.given().map(Value::count)),
    set(RUN, C::TRAIN, "verbose", Bool, "Show every setting at the start, those that nobody set too")
        .default("false")
        .to(|s, v| s.train.verbose = v.bool()),
    set(RUN, C::DATA, "quiet", Bool, "Print less: no tables, no sample rows, no progress bar")
        .default("false")
        .to(|s, v| s.train.quiet = v.bool()),
];

#[cfg(test)]
mod tests;
