//! `ringtune inspect`: look at files, templates, tokens, and the rows a training sees.

pub mod file;
pub mod rows;
pub mod templates;
pub mod tokens;
