//! What people type who come from TRL, transformers, Axolotl, LLaMA-Factory or Unsloth, and what to type here instead.

/// What to do in place of a name that is no setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instead {
    /// Write this setting with this value; the text says why where it is not plain.
    Write(&'static str, &'static str, &'static str),
    /// The same setting under this name.
    Name(&'static str),
    /// A sentence.
    Do(&'static str),
}

use Instead::{Do, Name, Write};

const NOT_QUANTISED: Instead = Do(
    "weights are not quantised; mixed_precision bf16 halves their memory, recompute layer most of that of activations",
);
const LEAVE_OUT: Instead = Do("this is always so here; leave it out");

/// Names of other tools, in snake case.
const TABLE: &[(&[&str], Instead)] = &[
    (&["bf16", "bfloat16", "bf16_full_eval", "pure_bf16"], Write("mixed_precision", "bf16", "")),
    (
        &["fp16", "float16", "half", "fp16_full_eval"],
        Write("mixed_precision", "bf16", "fp16 is not supported, its range is too small for gradients; "),
    ),
    (
        &["dtype", "torch_dtype", "compute_dtype", "bnb_4bit_compute_dtype", "precision"],
        Write("mixed_precision", "bf16", ""),
    ),
    (&["tf32", "fp32", "float32"], Write("mixed_precision", "no", "")),
    (
        &[
            "gradient_checkpointing",
            "use_gradient_checkpointing",
            "activation_checkpointing",
            "gradient_checkpointing_kwargs",
        ],
        Write("recompute", "layer", ""),
    ),
    (&["lora_target_linear"], Do("all seven products are the default of lora_targets; leave it out")),
    (
        &["adapter", "finetuning_type", "peft", "lora_task_type", "task_type", "peft_type"],
        Do("LoRA is the default (no_lora trains all weights); leave it out"),
    ),
    (
        &["stage", "do_train", "do_eval", "do_predict", "training_type", "rl"],
        Do("the command says it: sft, pretrain, eval; leave it out"),
    ),
    (
        &["report_to", "logging_dir", "log_with", "use_tensorboard"],
        Do(
            "TensorBoard files are in runs/ of the output folder, metrics in metrics.jsonl (no_tensorboard leaves the first out)",
        ),
    ),
    (
        &[
            "use_wandb",
            "wandb_project",
            "wandb_name",
            "wandb_entity",
            "wandb_run_name",
            "run_name",
            "use_swanlab",
            "use_mlflow",
            "mlflow_tracking_uri",
        ],
        Do("no service is called; `wandb sync --sync-tensorboard` takes the files in runs/ of the output folder"),
    ),
    (&["optim", "optimizer", "optim_args"], Do("AdamW with f32 moments is the one optimiser; leave it out")),
    (
        &[
            "load_in_4bit",
            "load_in_8bit",
            "quantization_bit",
            "quantization_method",
            "quantization",
            "use_qlora",
            "qlora",
            "bnb_4bit_quant_type",
            "use_bnb_nested_quant",
            "load_in_fp8",
        ],
        NOT_QUANTISED,
    ),
    (
        &["overwrite_output_dir", "overwrite_cache"],
        Do("nothing is overwritten; resume_from_checkpoint auto takes a run up, another output_dir begins one"),
    ),
    (&["eval_dataset", "validation_file", "eval_file", "test_datasets", "val_dataset"], Name("val_paths")),
    (
        &["val_size", "val_set_size", "validation_split", "validation_split_percentage", "eval_split_ratio"],
        Name("val_fraction"),
    ),
    (
        &[
            "cutoff_len",
            "sequence_len",
            "sequence_length",
            "model_max_length",
            "block_size",
            "max_source_length",
            "context_length",
        ],
        Name("max_seq_len"),
    ),
    (
        &["template", "chat_template", "chat_template_path", "prompt_style", "conversation_template"],
        Name("prompt_template"),
    ),
    (&["base_model", "model_name", "pretrained_model_name_or_path", "model"], Name("model_path")),
    (&["tokenizer", "tokenizer_name", "tokenizer_config"], Name("tokenizer_path")),
    (
        &[
            "dataset",
            "datasets",
            "dataset_name",
            "dataset_dir",
            "train_file",
            "train_files",
            "data_path",
            "data_files",
            "train_dataset",
            "data",
        ],
        Name("dataset_paths"),
    ),
    (&["interleave_probs", "dataset_mixer", "mix_probs"], Name("dataset_weights")),
    (&["sample_packing", "pack", "packing_strategy", "neat_packing"], Write("packing", "true", "")),
    (
        &[
            "eval_packing",
            "eval_sample_packing",
            "pad_to_sequence_len",
            "padding_free",
            "group_by_length",
            "padding_side",
        ],
        Do("rows are packed and never padded; leave it out"),
    ),
    (
        &[
            "train_on_inputs",
            "train_on_prompt",
            "mask_history",
            "completion_only_loss",
            "assistant_only_loss",
            "train_on_responses_only",
        ],
        Do("answers alone are trained; \"train\": false on a turn of a row leaves one out"),
    ),
    (
        &[
            "attn_implementation",
            "flash_attention",
            "flash_attn",
            "use_flash_attention_2",
            "sdp_attention",
            "xformers_attention",
            "use_liger_kernel",
            "use_unsloth",
            "torch_compile",
            "use_cache",
            "enable_liger_kernel",
        ],
        LEAVE_OUT,
    ),
    (
        &[
            "deepspeed",
            "fsdp",
            "fsdp_config",
            "ddp_find_unused_parameters",
            "ddp_timeout",
            "local_rank",
            "tensor_parallel_size",
        ],
        Do("a run uses one device so far; leave it out"),
    ),
    (
        &[
            "dataloader_num_workers",
            "preprocessing_num_workers",
            "dataset_num_proc",
            "num_proc",
            "dataset_processes",
            "num_workers",
        ],
        Do("rows are prepared on all cores and loaded ahead; leave it out, or limit all of it with threads"),
    ),
    (&["no_cuda", "use_cpu"], Write("device", "cpu", "")),
    (&["device_map", "gpus", "n_gpu", "num_gpus"], Write("device", "cuda", "")),
    (
        &["push_to_hub", "hub_model_id", "hub_token", "hub_strategy"],
        Do("files are written here; `hf upload NAME OUTPUT_DIR` sends them"),
    ),
    (
        &["save_safetensors", "save_only_model", "safe_serialization"],
        Do(
            "checkpoints are safetensors with all that a resume needs; the output folder has the weights alone; leave it out",
        ),
    ),
    (&["metric_for_best_model", "greater_is_better"], Do("the lowest eval_loss is the best; leave it out")),
    (&["auto_resume_from_checkpoints", "resume", "auto_resume"], Write("resume_from_checkpoint", "auto", "")),
    (
        &["lora_modules_to_save", "modules_to_save", "additional_target", "resize_vocab", "add_tokens"],
        Do("rows of embedding and head that a template's tokens need are made and trained by themselves; leave it out"),
    ),
    (
        &[
            "dora",
            "use_dora",
            "peft_use_dora",
            "pissa_init",
            "neftune_noise_alpha",
            "neftune",
            "lora_bias",
            "galore",
            "use_galore",
            "badam",
        ],
        Do("not supported; leave it out"),
    ),
    (&["no_lora"], Write("use_lora", "false", "")),
    (&["no_packing"], Write("packing", "false", "")),
    (&["config_path", "config", "config_file"], Do("a config file cannot name another")),
];

/// What to type instead of `name`, in any spelling of its words; `None` for a name that nobody is known to use.
pub fn instead(name: &str) -> Option<Instead> {
    let snake = name.trim_start_matches('-').replace('-', "_").to_ascii_lowercase();
    TABLE.iter().find(|(names, _)| names.contains(&snake.as_str())).map(|(_, instead)| *instead)
}

impl Instead {
    /// As a key of a config file.
    pub fn in_file(self) -> String {
        match self {
            Write(key, value, why) if matches!(value, "true" | "false") => format!("{why}write \"{key}\": {value}"),
            Write(key, value, why) => format!("{why}write \"{key}\": \"{value}\""),
            Name(key) => format!("write \"{key}\""),
            Do(what) => what.to_string(),
        }
    }

    /// As a flag.
    pub fn as_flag(self) -> String {
        match self {
            Write(key, "true", why) => format!("{why}write --{key}"),
            Write(key, "false", why) => format!("{why}write --no_{}", key.trim_start_matches("use_")),
            Write(key, value, why) => format!("{why}write --{key} {value}"),
            Name(key) => format!("write --{key}"),
            Do(what) => what.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{Command, find};

    #[test]
    fn every_advice_names_a_setting_and_no_name_is_one() {
        let mut seen = std::collections::BTreeSet::new();
        for (names, instead) in TABLE {
            if let Write(key, ..) | Name(key) = instead {
                assert!(find(key).is_some(), "{key} is no setting");
            }
            for name in *names {
                assert!(seen.insert(*name), "{name} stands twice");
                // Flags of other commands are answered; off-flags are written otherwise in a file.
                let other = find(name).filter(|s| s.commands.contains(Command::Sft));
                assert!(other.is_none(), "{name} is a setting of sft");
            }
        }
    }

    #[test]
    fn both_forms_say_what_to_type() {
        let of = |name: &str| instead(name).unwrap();
        assert_eq!(of("--bf16").as_flag(), "write --mixed_precision bf16");
        assert_eq!(of("bf16").in_file(), "write \"mixed_precision\": \"bf16\"");
        assert_eq!(of("--gradient-checkpointing").as_flag(), "write --recompute layer");
        assert_eq!(of("no_packing").in_file(), "write \"packing\": false");
        assert_eq!(of("--sample_packing").as_flag(), "write --packing");
        assert_eq!(of("Cutoff-Len").as_flag(), "write --max_seq_len");
        assert_eq!(instead("zzz"), None);
    }
}
