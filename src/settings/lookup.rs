//! Finding a config file: as given, under `configs/`, or the copy inside the program.

use std::path::{Path, PathBuf};

use super::file::is_yaml;
use crate::error::{Error, Result};
use crate::files::{nearby, read_bytes, text_of};

/// Copies of the repository's configs, so that commands work outside it.
const EMBEDDED: &[(&str, &str)] = &[
    ("tiny.json", include_str!("../../configs/tiny.json")),
    ("small.json", include_str!("../../configs/small.json")),
    ("base.json", include_str!("../../configs/base.json")),
    ("sft_tiny.json", include_str!("../../configs/sft_tiny.json")),
    ("sft_small.json", include_str!("../../configs/sft_small.json")),
];

/// A config file that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// What messages call it: its path, or `built-in NAME`.
    pub name: String,
    /// Its content.
    pub text: String,
}

/// Bytes of a config at most.
const LONGEST: u64 = 16 << 20;

/// Looks for `path`; a path that does not exist is also looked for under `configs/` and among the built-in files, by its
/// file name with or without `.json`, when it lies in no other folder than `config` or `configs`.
///
/// # Errors
/// A usage error that lists where it was looked for; an error when the file cannot be read or is not UTF-8.
pub fn find_config(path: &str) -> Result<Source> {
    let given = Path::new(path);
    let folder = given.parent().map_or("", |p| p.to_str().unwrap_or("?"));
    let mut places: Vec<PathBuf> = vec![given.into()];
    let mut file = String::new();
    if ["", "config", "configs", "./config", "./configs"].contains(&folder) {
        file = given.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if !file.ends_with(".json") && !is_yaml(&file) {
            file.push_str(".json");
        }
        places.push(Path::new("configs").join(&file));
        places.dedup();
    }
    for place in &places {
        // A pipe is one too: `<(…)` of a shell.
        if place.exists() && !place.is_dir() {
            let text = text_of(place, read_bytes(place, LONGEST)?)?;
            return Ok(Source { name: place.display().to_string(), text });
        }
    }
    if let Some((name, text)) = EMBEDDED.iter().find(|(name, _)| *name == file) {
        return Ok(Source { name: format!("built-in {name}"), text: (*text).into() });
    }
    let places: Vec<String> = places.iter().map(|p| p.display().to_string()).collect();
    let names: Vec<&str> = EMBEDDED.iter().map(|(n, _)| *n).collect();
    Err(Error::usage(format!(
        "{path}: no such config file; looked for {}; built in are {}{}",
        places.join(", "),
        names.join(", "),
        nearby::hint(given)
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_path_finds_configs() {
        let source = find_config("config/sft_tiny.json").unwrap();
        assert_eq!(source.name, "configs/sft_tiny.json");
        assert_eq!(find_config("tiny").unwrap().name, "configs/tiny.json");
        let e = find_config("elsewhere/sft_tiny.json").unwrap_err();
        assert!(e.to_string().starts_with("elsewhere/sft_tiny.json: no such config file"), "{e}");
        assert_eq!(e.exit_code(), 2);
    }

    #[test]
    fn built_in_files_are_valid() {
        for (name, text) in EMBEDDED {
            if name.starts_with("sft_") {
                super::super::file::read(text, name).unwrap();
            } else {
                serde_json::from_str::<serde_json::Value>(text).unwrap();
            }
        }
    }
}
