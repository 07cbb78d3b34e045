//! From JSONL to micro-batches: rows, templates, tokenizer, mix, packing, token files, loader.

pub mod cache;
pub mod columns;
pub mod encode;
pub mod jsonl;
pub mod leak;
pub mod listed;
pub mod loader;
pub mod mix;
pub mod named;
pub mod pack;
pub mod pretrain;
pub mod progress;
pub mod raw_tokens;
pub mod row;
mod row_fields;
mod row_json;
pub mod rows;
pub mod sft;
pub mod source;
mod sp_model;
pub mod split;
pub mod template;
pub mod text_loss;
pub mod token_file;
pub mod tokenizer;
pub mod train_set;
