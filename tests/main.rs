//! Every behaviour test of ringtune in one program: one file per behaviour in `tests/it`, shared pieces in `tests/common`.

#[path = "it/prepare.rs"]
mod prepare;
