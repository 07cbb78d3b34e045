//! `ringtune inspect`: look at files, templates, tokens, and the rows a training sees.

pub mod templates;
