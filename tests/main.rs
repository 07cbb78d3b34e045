//! Every behaviour test of ringtune in one program: one file per behaviour in `tests/it`, shared pieces in `tests/common`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "it/bad_input.rs"]
mod bad_input;
#[path = "it/check.rs"]
mod check;
#[path = "it/checkpoint.rs"]
mod checkpoint;
#[path = "it/crash.rs"]
mod crash;
#[cfg(feature = "cuda")]
#[path = "it/doctor.rs"]
mod doctor;
#[path = "it/eval.rs"]
mod eval;
#[path = "it/floors.rs"]
mod floors;
#[path = "it/generate_cmd.rs"]
mod generate_cmd;
#[path = "it/golden.rs"]
mod golden;
#[path = "it/golden_steps.rs"]
mod golden_steps;
#[path = "it/gradients.rs"]
mod gradients;
#[path = "it/hf_config.rs"]
mod hf_config;
#[path = "it/hostile.rs"]
mod hostile;
#[path = "common/json_tokenizers.rs"]
mod json_tokenizers;
#[path = "it/loader.rs"]
mod loader;
#[path = "it/merge.rs"]
mod merge;
#[path = "it/merge_cmd.rs"]
mod merge_cmd;
#[path = "it/mix.rs"]
mod mix;
#[path = "it/pack.rs"]
mod pack;
#[path = "../fuzz/src/parsers.rs"]
mod parsers;
#[path = "it/peft.rs"]
mod peft;
#[path = "it/prepare.rs"]
mod prepare;
#[path = "common/program.rs"]
mod program;
#[path = "it/readme.rs"]
mod readme;
#[path = "common/reference.rs"]
mod reference;
#[path = "it/report.rs"]
mod report;
#[path = "it/resize.rs"]
mod resize;
#[path = "it/resume.rs"]
mod resume;
#[path = "it/rows.rs"]
mod rows;
#[path = "common/runs.rs"]
mod runs;
#[path = "it/safetensors.rs"]
mod safetensors;
#[path = "it/schedule.rs"]
mod schedule;
#[path = "../fuzz/src/seeds.rs"]
mod seeds;
#[path = "it/settings.rs"]
mod settings;
#[path = "it/templates.rs"]
mod templates;
#[path = "it/token_file.rs"]
mod token_file;
#[path = "it/tokenizer.rs"]
mod tokenizer;
#[path = "it/tokenizer_in.rs"]
mod tokenizer_in;
#[path = "it/tokenizer_json.rs"]
mod tokenizer_json;
#[path = "it/train.rs"]
mod train;
#[path = "common/tuned.rs"]
mod tuned;
#[path = "it/weights.rs"]
mod weights;
