//! Fuzz target: see `raw_tokens` in `src/parsers.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ringtune_fuzz::run("raw_tokens", bytes));
