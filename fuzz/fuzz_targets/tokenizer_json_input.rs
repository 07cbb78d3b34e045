//! Fuzz target: see `tokenizer_json_input` in `src/parsers.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ringtune_fuzz::run("tokenizer_json_input", bytes));
