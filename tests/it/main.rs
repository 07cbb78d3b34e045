//! Every behaviour test of ringtune in one program: one file per behaviour here, shared pieces in `tests/common`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[path = "../common/amx.rs"]
mod amx;
mod bad_input;
mod bench;
#[path = "../common/browser.rs"]
mod browser;
mod chat_templates;
mod check;
mod check_memory;
mod checkpoint;
mod contributing;
mod crash;
mod dist;
#[cfg(feature = "cuda")]
mod doctor;
mod durable;
mod eval;
mod floors;
mod foreign_folders;
mod forms;
mod frozen_base;
mod generate_cmd;
mod golden;
mod golden_steps;
mod gpu_check;
mod gradients;
mod habits;
mod hf_config;
mod hostile;
mod hub;
mod hub_network;
#[path = "../common/hub_server.rs"]
mod hub_server;
#[path = "../common/json_tokenizers.rs"]
mod json_tokenizers;
#[path = "../common/levels.rs"]
mod levels;
mod loader;
mod merge;
mod merge_cmd;
mod mix;
mod mlflow;
mod mpirun;
mod odd_files;
mod odd_settings;
mod other_forms;
mod pack;
#[path = "../common/parity/mod.rs"]
mod parity;
#[path = "../../fuzz/src/parsers.rs"]
mod parsers;
mod peak_memory;
mod peft;
mod plan;
mod prepare;
#[path = "../common/program.rs"]
mod program;
#[path = "../common/proxy.rs"]
mod proxy;
mod rank_apart;
mod rank_bits;
mod rank_ends;
mod rank_engines;
mod rank_failures;
mod rank_faults;
mod rank_limits;
mod rank_settings;
mod ranks;
#[path = "../common/ranks.rs"]
mod ranks_as_threads;
mod read_files;
mod readme;
mod recipes;
#[path = "../common/reference.rs"]
mod reference;
mod report;
mod report_seen;
mod resize;
mod resume;
mod ringrun;
#[path = "../common/ringrun.rs"]
mod ringrun_program;
mod rows;
#[path = "../common/runs.rs"]
mod runs;
mod safetensors;
mod schedule;
mod screen;
#[path = "../../fuzz/src/seeds.rs"]
mod seeds;
mod settings;
mod shapes;
#[path = "../common/skip.rs"]
mod skip;
mod templates;
#[path = "../common/terminal.rs"]
mod terminal;
mod texts;
mod token_file;
mod tokenizer;
mod tokenizer_in;
mod tokenizer_json;
mod tokenizer_kinds;
mod trace_order;
mod train;
#[path = "../common/tuned.rs"]
mod tuned;
mod watch;
mod weights;
mod zero;
