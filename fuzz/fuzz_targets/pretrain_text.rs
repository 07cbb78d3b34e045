//! Fuzz target: see `pretrain_text` in `src/parsers.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ringtune_fuzz::run("pretrain_text", bytes));
