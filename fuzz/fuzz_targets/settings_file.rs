//! Fuzz target: see `settings_file` in `src/parsers.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ringtune_fuzz::run("settings_file", bytes));
