//! Fuzz target: see `trainer_state` in `src/parsers.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ringtune_fuzz::run("trainer_state", bytes));
