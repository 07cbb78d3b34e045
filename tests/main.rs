//! Every behaviour test of ringtune in one program: one file per behaviour in `tests/it`, shared pieces in `tests/common`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "it/floors.rs"]
mod floors;
#[path = "it/prepare.rs"]
mod prepare;
#[path = "it/templates.rs"]
mod templates;
#[path = "it/tokenizer.rs"]
mod tokenizer;
