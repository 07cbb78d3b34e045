//! What commands begin with, opened once each for all of them: tokenizer, template, row length.

use std::path::Path;

use crate::bail;
use crate::data::template::{Template, TemplateOptions};
use crate::data::tokenizer::{SpecialIds, Tokenizer};
use crate::error::{Error, Result};

/// Longest row where neither the user nor the model asks for less.
pub const DEFAULT_SEQ_LEN: usize = 1024;

/// The tokenizer at `given`, or in the first of `folders` that has one; those folders are also asked about its special tokens.
///
/// # Errors
/// If there is none, or it is not one that can be used.
pub fn tokenizer(given: Option<&Path>, folders: &[&Path], special: SpecialIds) -> Result<Tokenizer> {
    let inside = folders.iter().find_map(|d| Tokenizer::in_folder(d));
    match given.or(inside.as_deref()) {
        Some(path) => Tokenizer::open_beside(path, special, folders.first().copied()),
        None => {
            let places: Vec<String> = folders.iter().map(|d| d.display().to_string()).collect();
            bail!("no tokenizer in {}; name one with --tokenizer-path", places.join(" or "))
        }
    }
}

/// The template of a name or file, with the tokenizer's names of BOS and EOS; ChatML's tokens are added to a tokenizer that lacks
/// them.
///
/// # Errors
/// If the template is unknown or does not parse.
pub fn template(name: &str, supervise_turn_newline: bool, tokenizer: &mut Tokenizer) -> Result<Template> {
    let options = TemplateOptions { supervise_turn_newline, names: tokenizer.control_names() };
    Ok(with_tokens(Template::load(name, options)?, tokenizer))
}

/// The template, the tokens that it needs added to the tokenizer.
pub fn with_tokens(template: Template, tokenizer: &mut Tokenizer) -> Template {
    if template.needs_chatml() {
        tokenizer.add_chatml();
    }
    template
}

/// Rows as long as asked for, or as a model of `most` positions allows.
///
/// # Errors
/// A usage error when more is asked for than the model has positions.
pub fn row_length(asked: Option<usize>, most: usize) -> Result<usize> {
    match asked {
        Some(n) if n > most => Err(Error::usage(format!(
            "max_seq_len {n} is longer than the model's maximum: at most {most} (max_position_embeddings); lower --max-seq-len"
        ))),
        Some(n) => Ok(n),
        None => Ok(most.min(DEFAULT_SEQ_LEN)),
    }
}
