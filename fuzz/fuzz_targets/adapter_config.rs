//! Fuzz target: see `adapter_config` in `src/parsers.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ringtune_fuzz::run("adapter_config", bytes));
