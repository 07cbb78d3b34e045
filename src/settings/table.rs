//! The table of settings: every flag of `pretrain`, `sft`, `pack` and `inspect rows|packs` and every key of a config file.

use super::value::{Kind, Range};
use super::{Commands, Needs, Setting};

use Commands as C;
use Kind::{Bool, Choice, Float, Int, Path, Paths, Text, Texts, Weights};

const MODEL: &str = "Model and tokenizer";
const DATA: &str = "Data";
const TRAIN: &str = "Training";
const OPTIM: &str = "Optimiser and schedule";
const LORA: &str = "LoRA";
const EVAL: &str = "Evaluation";
const GEN: &str = "Generation test";
const OUT: &str = "Output and resume";
const RUN: &str = "Run";

const fn set(group: &'static str, commands: Commands, key: &'static str, kind: Kind, help: &'static str) -> Setting {
    Setting { key, aliases: &[], group, commands, kind, default: None, unset: "", help, needs: None }
}

impl Setting {
    const fn default(mut self, value: &'static str) -> Self {
        self.default = Some(value);
        self
    }

    const fn unset(mut self, what: &'static str) -> Self {
        self.unset = what;
        self
    }

    const fn alias(mut self, names: &'static [&'static str]) -> Self {
        self.aliases = names;
        self
    }

    const fn needs(mut self, key: &'static str, values: &'static [&'static str]) -> Self {
        self.needs = Some(Needs { key, values });
        self
    }
}

/// Every setting, in the order of the help and of configs/README.md.
#[rustfmt::skip] // One setting, a few short lines: a table.
pub static TABLE: &[Setting] = &[
    set(MODEL, C::SFT, "model_path", Path, "Model to fine-tune: a folder in the Hugging Face layout")
        .alias(&["model_name_or_path"])
        .unset("required"),
    set(MODEL, C::PRETRAIN, "model_config", Path, "Shape of the new model: a config.json, or tiny, small or base")
        .unset("required"),
    set(MODEL, C::DATA, "tokenizer_path", Path, "Tokenizer: a SentencePiece model (.model), a tokenizer.json, or a folder with one")
        .alias(&["tokenizer_name_or_path"])
        .unset("sft: the one in the model's folder; otherwise required"),
    set(MODEL, C::DATA, "special_ids", Text, "Ids a SentencePiece model has to have, as pad,unk,bos,eos (Llama-2: 0,0,1,2); of a tokenizer.json, instead of what its files say")
        .default("0,1,2,3"),
    set(MODEL, C::SFT, "pad_vocab_to", Int(1), "Pad embedding and head to this many rows, which the softmax never sees")
        .unset("no padding"),
    // Data
    set(DATA, C::DATA, "dataset_paths", Paths, "Data sets: JSONL for sft, .txt, .jsonl or .bin for pretrain")
        .alias(&["dataset_path"])
        .unset("required"),
    set(DATA, C::TRAIN, "dataset_weights", Weights, "Relative share of each data set in an epoch, in the order of dataset_paths")
        .unset("every row once"),
    set(DATA, C::TRAIN, "weight_unit", Choice(&["samples", "tokens", "supervised-tokens"]), "What the weights share out")
        .default("samples")
        .needs("dataset_weights", &[]),
    set(DATA, C::TRAIN, "epoch_samples", Int(1), "Rows of an epoch").unset("all rows"),
    set(DATA, C::SFT_DATA, "prompt_template", Text, "chatml, instruct, alpaca, llama2, zephyr, plain, or a .jinja file")
        .default("chatml"),
    set(DATA, C::SFT_DATA, "supervise_turn_newline", Bool, "Train the newline after a closing token too, as TRL does")
        .default("false")
        .needs("prompt_template", &["chatml", "zephyr"]),
    set(DATA, C::TRAIN, "val_fraction", Float(Range::BelowOne), "Share of each data set kept for validation")
        .alias(&["test_size"])
        .default("0.05"),
    set(DATA, C::PRETRAIN, "val_paths", Paths, "Validation data, as dataset_paths; instead of val_fraction")
        .alias(&["eval_dataset_paths"])
        .unset("val_fraction"),
    set(DATA, C::DATA, "max_seq_len", Int(2), "Longest row in tokens")
        .alias(&["max_length", "max_seq_length", "seq_len"])
        .unset("the model's maximum, at most 1024; pack: 1024"),
    set(DATA, C::TRAIN, "packing", Bool, "Pack several rows into one, each seeing itself alone")
        .default("true"),
    set(DATA, C::SFT_DATA, "overflow", Choice(&["truncate", "drop"]), "What happens to a row longer than max_seq_len")
        .default("truncate"),
    set(DATA, C::SFT_DATA, "skip_bad_rows", Bool, "Count, log and skip malformed rows instead of stopping")
        .default("false"),
    set(DATA, Commands::PRETRAIN_DATA, "raw_width", Choice(&["u16", "u32"]), "Size of a token in .bin files without a header")
        .unset("u16 where the vocabulary allows it"),
    set(DATA, C::PACK, "content", Choice(&["rows", "text"]), "Whether the files hold prompts and responses or text to pretrain on")
        .unset("text for .txt and .bin, else rows"),
    set(DATA, C::TRAIN, "cache_dir", Path, "Where token files are kept for later runs")
        .unset("$RINGTUNE_CACHE, or ringtune in the user's cache folder"),
    // Training
    set(TRAIN, C::TRAIN, "num_train_epochs", Int(1), "Passes over the data")
        .alias(&["epochs", "num_epochs"])
        .default("3"),
    set(TRAIN, C::TRAIN, "max_steps", Int(1), "Optimiser steps; overrides num_train_epochs")
        .unset("as many as the epochs have"),
    set(TRAIN, C::TRAIN, "per_device_train_batch_size", Int(1), "Rows of a micro-batch")
        .alias(&["micro_batch_size", "batch_size"])
        .default("8"),
    set(TRAIN, C::TRAIN, "gradient_accumulation_steps", Int(1), "Micro-batches of an optimiser step")
        .alias(&["grad_accum"])
        .default("1"),
    set(TRAIN, C::TRAIN, "mixed_precision", Choice(&["no", "bf16"]), "bf16: weights and activations in bfloat16, sums and masters in f32; no: all f32")
        .default("no"),
    set(TRAIN, C::TRAIN, "recompute", Choice(&["none", "attention", "layer"]), "Recompute activations in backward to save memory; same bits")
        .default("none"),
    set(TRAIN, C::TRAIN, "seed", Int(0), "Seed of everything random").default("42"),
    set(TRAIN, C::TRAIN, "max_bad_steps", Int(1), "Steps in a row that may have a loss or gradient that is not finite")
        .default("10"),
    // Optimiser
    set(OPTIM, C::TRAIN, "learning_rate", Float(Range::Positive), "Peak learning rate")
        .alias(&["lr"])
        .unset("2e-4 with LoRA, 2e-5 in full fine-tuning, 1e-3 in pretraining"),
    set(OPTIM, C::TRAIN, "lr_scheduler_type", Choice(&["cosine", "linear", "constant", "wsd"]), "Shape of the learning rate over the run")
        .alias(&["lr_scheduler"])
        .default("cosine"),
    set(OPTIM, C::TRAIN, "warmup_ratio", Float(Range::BelowOne), "Share of the steps in which the rate rises to its peak")
        .default("0.03"),
    set(OPTIM, C::TRAIN, "warmup_steps", Int(0), "Steps in which the rate rises to its peak; instead of warmup_ratio")
        .unset("warmup_ratio"),
    set(OPTIM, C::TRAIN, "warmup_from_zero", Bool, "transformers' warmup, whose first step runs at rate 0")
        .default("false"),
    set(OPTIM, C::TRAIN, "min_lr_ratio", Float(Range::Share), "The schedule ends at this share of the peak")
        .default("0")
        .needs("lr_scheduler_type", &["cosine", "linear", "wsd"]),
    set(OPTIM, C::TRAIN, "wsd_decay_ratio", Float(Range::PositiveShare), "Share of the steps in which wsd decays")
        .default("0.2")
        .needs("lr_scheduler_type", &["wsd"]),
    set(OPTIM, C::TRAIN, "weight_decay", Float(Range::NotNegative), "Decoupled decay of matrices; never of norms and biases")
        .default("0"),
    set(OPTIM, C::TRAIN, "max_grad_norm", Float(Range::NotNegative), "Clip the global gradient norm here; 0: no clipping")
        .default("1"),
    set(OPTIM, C::TRAIN, "adam_beta1", Float(Range::BelowOne), "Decay of the first moment")
        .default("0.9"),
    set(OPTIM, C::TRAIN, "adam_beta2", Float(Range::BelowOne), "Decay of the second moment")
        .default("0.999"),
    set(OPTIM, C::TRAIN, "adam_epsilon", Float(Range::Positive), "Added to the root of the second moment")
        .alias(&["adam_eps"])
        .default("1e-8"),
    // LoRA
    set(LORA, C::SFT, "use_lora", Bool, "Train a low-rank adapter; off: all weights")
        .alias(&["use_peft"])
        .default("true"),
    set(LORA, C::SFT, "lora_r", Int(1), "Rank")
        .default("16")
        .needs("use_lora", &["true"]),
    set(LORA, C::SFT, "lora_alpha", Float(Range::Positive), "The adapter is scaled by lora_alpha / lora_r")
        .unset("twice lora_r")
        .needs("use_lora", &["true"]),
    set(LORA, C::SFT, "lora_dropout", Float(Range::BelowOne), "Probability of dropping an input of the adapter")
        .default("0.05")
        .needs("use_lora", &["true"]),
    set(LORA, C::SFT, "lora_targets", Texts, "Linears with an adapter: q k v o gate up down")
        .alias(&["lora_target_modules"])
        .default("q,k,v,o,gate,up,down")
        .needs("use_lora", &["true"]),
    set(LORA, C::SFT, "use_rslora", Bool, "Scale by lora_alpha / sqrt(lora_r)")
        .default("false")
        .needs("use_lora", &["true"]),
    set(LORA, C::SFT, "loraplus_lr_ratio", Float(Range::Positive), "LoRA+: B learns at this multiple of the learning rate")
        .unset("1")
        .needs("use_lora", &["true"]),
    set(LORA, C::SFT, "merge_adapters", Bool, "Write the merged model too")
        .alias(&["merge_adapter"])
        .default("false")
        .needs("use_lora", &["true"]),
    // Evaluation
    set(EVAL, C::TRAIN, "eval_strategy", Choice(&["no", "steps", "epoch"]), "When to evaluate on the validation rows")
        .alias(&["evaluation_strategy"])
        .unset("steps when eval_steps is given, else epoch"),
    set(EVAL, C::TRAIN, "eval_steps", Int(1), "Steps between evaluations")
        .unset("an evaluation at the end of each epoch"),
    set(EVAL, C::TRAIN, "eval_on_start", Bool, "Evaluate before the first step too")
        .default("false"),
    set(EVAL, C::TRAIN, "per_device_eval_batch_size", Int(1), "Rows of a micro-batch in evaluation; changes speed only")
        .default("8"),
    set(EVAL, C::TRAIN, "early_stopping_patience", Int(1), "Stop after this many evaluations without a better loss")
        .unset("no early stopping"),
    set(EVAL, C::TRAIN, "early_stopping_threshold", Float(Range::NotNegative), "A loss is better when it is lower by more than this")
        .default("0")
        .needs("early_stopping_patience", &[]),
    set(EVAL, C::TRAIN, "load_best_model_at_end", Bool, "Write the model of the best evaluation, not of the last step")
        .default("true"),
    // Generation test
    set(GEN, C::SFT, "do_gen_test", Bool, "At the end, answer held-out prompts and print the answers")
        .default("false"),
    set(GEN, C::SFT, "num_gen_samples", Int(1), "Prompts to answer")
        .default("5")
        .needs("do_gen_test", &["true"]),
    set(GEN, C::SFT, "max_new_tokens", Int(1), "Longest answer in tokens")
        .default("64")
        .needs("do_gen_test", &["true"]),
    set(GEN, C::SFT, "gen_temperature", Float(Range::Positive), "Temperature of the sampled answers")
        .alias(&["temperature"])
        .default("0.7")
        .needs("do_gen_test", &["true"]),
    set(GEN, C::SFT, "gen_top_p", Float(Range::PositiveShare), "Nucleus of the sampled answers")
        .alias(&["top_p"])
        .default("0.9")
        .needs("do_gen_test", &["true"]),
    // Output
    set(OUT, C::TRAIN, "output_dir", Path, "Where checkpoints, logs and the final model go")
        .unset("required"),
    set(OUT, C::PACK, "output", Path, "Token file to write").unset("required"),
    set(OUT, C::TRAIN, "save_strategy", Choice(&["no", "steps", "epoch"]), "When to save a checkpoint")
        .default("steps"),
    set(OUT, C::TRAIN, "save_steps", Int(1), "Steps between checkpoints")
        .default("500")
        .needs("save_strategy", &["steps"]),
    set(OUT, C::TRAIN, "save_total_limit", Int(1), "Checkpoints to keep besides the best")
        .unset("all"),
    set(OUT, C::TRAIN, "resume_from_checkpoint", Path, "A checkpoint folder, or auto: the newest valid one in output_dir")
        .unset("start at step 0"),
    set(OUT, C::TRAIN, "allow_changed", Texts, "What may differ from the checkpoint's run: data, tokenizer, base_model, config")
        .unset("nothing")
        .needs("resume_from_checkpoint", &[]),
    set(OUT, C::TRAIN, "logging_steps", Int(1), "Steps between log lines").default("1"),
    set(OUT, C::TRAIN, "tensorboard", Bool, "Write TensorBoard event files to output_dir/runs")
        .default("true"),
    // Run
    set(RUN, C::DATA, "threads", Int(1), "Worker threads").unset("one per core"),
    set(RUN, C::DATA, "quiet", Bool, "Print less: no tables, no sample rows, no progress bar")
        .default("false"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sound() {
        let mut names: Vec<&str> = TABLE.iter().flat_map(|s| s.aliases.iter().copied().chain([s.key])).collect();
        let n = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), n, "a name stands twice");
        for s in TABLE {
            assert!(s.default.is_some() == s.unset.is_empty(), "{}: a default or what happens without one", s.key);
            assert!(!s.help.ends_with('.'), "{}: no full stop", s.key);
            assert!(s.kind != Bool || s.default.is_some(), "{}", s.key);
            if let Some(d) = s.default {
                let words: Vec<&str> = d.split(' ').collect();
                s.kind.parse(&words).unwrap_or_else(|e| panic!("{}: default {e}", s.key));
            }
            if let Some(n) = s.needs {
                assert!(super::super::find(n.key).is_some_and(|o| o.key == n.key), "{}: needs {}", s.key, n.key);
            }
        }
    }
}
