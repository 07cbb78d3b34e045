//! Where a command's tokenizer comes from.

use std::path::Path;

use crate::bail;
use crate::data::tokenizer::{SpecialIds, Tokenizer};
use crate::error::Result;

/// The tokenizer at `given`, or in the first of `folders` that has one.
///
/// # Errors
/// If there is none, or it is not one that can be used.
pub fn open_tokenizer(given: Option<&Path>, folders: &[&Path], special: SpecialIds) -> Result<Tokenizer> {
    if let Some(path) = given {
        return Tokenizer::open_beside(path, special, folders.first().copied());
    }
    match folders.iter().find_map(|d| Tokenizer::in_folder(d)) {
        Some(path) => Tokenizer::open(&path, special),
        None => {
            let places: Vec<String> = folders.iter().map(|d| d.display().to_string()).collect();
            bail!("no tokenizer in {}; name one with --tokenizer-path", places.join(" or "))
        }
    }
}
