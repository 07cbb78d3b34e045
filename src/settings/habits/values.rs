//! What names of other tools mean on commands that train nothing, and their words for values.

use super::Instead::{self, Do, Name};

/// Families whose chat templates other tools have by name, where the ones that are built in are no such template.
pub(super) const OF_MODELS: [&str; 16] = [
    "llama3",
    "llama-3",
    "llama4",
    "mistral",
    "mixtral",
    "ministral",
    "gemma",
    "qwen",
    "phi",
    "deepseek",
    "default",
    "yi",
    "falcon",
    "glm",
    "smollm",
    "tokenizer_default",
];

/// Names that mean something on a command that trains nothing: the command, its names, what to write there.
pub(super) const ELSEWHERE: &[(&str, &[&str], Instead)] = &[
    (
        "merge",
        &["adapter", "adapter_dir", "adapter_name_or_path", "lora_model_dir", "lora_path", "peft_model"],
        Name("model_path"),
    ),
    ("merge", &["model_name_or_path", "base", "base_model_name_or_path", "base_model_path"], Name("base_model")),
    ("merge", &["export_dir", "output", "out", "save_path", "save_dir"], Name("output_dir")),
    ("merge", &["export_size", "max_shard"], Name("max_shard_size")),
    ("merge", &["export_device"], Name("device")),
    ("merge", &["torch_dtype", "precision"], Name("dtype")),
    ("eval", &["limit", "max_samples", "num_samples"], Name("max_eval_samples")),
    ("eval", &["eval_batch_size"], Name("batch_size")),
    ("eval", &["adapter_name_or_path", "lora_model_dir", "adapter", "pretrained"], Name("model_path")),
    ("eval", &["output_path", "output_dir", "output_file"], Name("output")),
    ("generate", &["adapter_name_or_path", "lora_model_dir", "adapter"], Name("model_path")),
    ("generate", &["max_tokens", "max_length", "n_predict", "max_gen_len", "max_new_token"], Name("max_new_tokens")),
    ("generate", &["default_system", "system_prompt", "system_message"], Name("system")),
    ("generate", &["input_file", "prompts_file", "file"], Name("prompt_file")),
    ("generate", &["repeat_penalty"], Name("repetition_penalty")),
    (
        "generate",
        &["do_sample", "greedy", "sample"],
        Do("--temperature 0 takes the likeliest token, any other temperature samples"),
    ),
    (
        "generate",
        &["input", "query", "question", "message", "text", "instruction"],
        Do("prompts stand without a flag: `ringtune generate --model-path MODEL 'PROMPT'`"),
    ),
    (
        "pretrain",
        &["model_path", "model_name_or_path", "base_model", "model", "model_name"],
        Do(
            "a new model is made, of the shape that --model-config names; `ringtune sft --model-path MODEL` goes on with one",
        ),
    ),
    ("download", &["repo_type"], Do("a data set is written hf:ORG/NAME, a model ORG/NAME")),
    (
        "download",
        &["local_dir", "cache_dir", "output_dir", "output"],
        Do("files go to the hub's cache (HF_HOME moves it); `cp -rL` of the folder that is printed copies them"),
    ),
    ("eval", &["json", "save_json"], Do("--output FILE writes the figures as JSON")),
    (
        "convert",
        &[
            "input",
            "inputs",
            "input_file",
            "dataset_paths",
            "dataset",
            "output",
            "out",
            "output_dir",
            "output_file",
            "output_path",
        ],
        Do("files stand without flags, the one to write last: `ringtune convert IN.json OUT.jsonl`"),
    ),
    ("generate", &["interactive", "conversation"], Name("chat")),
    ("prepare", &["datasets", "dataset_name", "name"], Name("dataset")),
    ("prepare", &["output", "save_dir"], Name("output_dir")),
    ("pack", &["output_dir", "out", "save_dir"], Name("output")),
];

/// Words of other tools for a value, and what to write instead: the key, the words, the answer.
pub(super) const VALUES: &[(&str, &[&str], &str)] = &[
    (
        "report_to",
        &["wandb", "swanlab", "comet_ml", "clearml", "trackio", "all"],
        "other services are not called: `wandb sync --sync-tensorboard OUTPUT_DIR/runs` takes the files that tensorboard writes",
    ),
    (
        "lr_scheduler_type",
        &["constant_with_warmup"],
        "write constant: the warmup of warmup_ratio or warmup_steps comes first",
    ),
    (
        "lr_scheduler_type",
        &["cosine_with_min_lr", "cosine_warmup_with_min_lr"],
        "write cosine, and min_lr_ratio 0.1 for an end at a tenth of the peak",
    ),
    ("lr_scheduler_type", &["warmup_stable_decay"], "write wsd"),
    (
        "lr_scheduler_type",
        &["cosine_with_restarts", "polynomial", "inverse_sqrt", "reduce_lr_on_plateau", "rex"],
        "cosine is nearest",
    ),
    (
        "mixed_precision",
        &["fp16", "float16"],
        "float16 cannot hold small gradients without loss scaling, bf16 has the range of f32",
    ),
    ("mixed_precision", &["fp32", "float32", "f32"], "\"no\" is f32"),
    ("mixed_precision", &["fp8", "float8", "int8", "int4", "nf4"], "write bf16"),
    ("mixed_precision", &["true", "yes", "bfloat16", "auto"], "write bf16"),
    ("save_strategy", &["best"], "the best is always kept besides the newest: write epoch or steps"),
    ("save_strategy", &["true", "yes"], "write steps or epoch"),
    ("eval_strategy", &["true", "yes"], "write epoch, or eval_steps N"),
    ("recompute", &["true", "yes", "full", "selective", "unsloth"], "write layer"),
    ("overflow", &["split", "wrap", "stride"], "write truncate or drop"),
    ("zero", &["2", "3"], "1 is the one stage so far; recompute layer saves more"),
    ("transport", &["gloo"], "write sockets"),
];
