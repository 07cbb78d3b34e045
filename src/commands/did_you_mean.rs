//! What was meant by a path of a model that is none: a folder of it, a file of it, or another folder.

use std::path::{Path, PathBuf};

use crate::checkpoint::manifest;
use crate::error::Error;
use crate::files::nearby;
use crate::hf::peft;

/// Folders that are looked at below one: a run folder has few, and a disk many.
const MOST: usize = 2_000;

/// Whether weights lie in a folder.
pub fn has_weights(dir: &Path) -> bool {
    ["model.safetensors", "model.safetensors.index.json"].iter().any(|n| dir.join(n).is_file())
}

fn is_model(dir: &Path) -> bool {
    (has_weights(dir) && dir.join("config.json").is_file()) || peft::is_adapter(dir)
}

/// Adds to an error what was meant by `dir`, where something near it is a model; `whole`: an adapter would not do.
pub fn model(e: Error, dir: &Path, whole: bool) -> Error {
    let shown: Vec<String> = candidates(dir, whole).iter().map(|p| p.display().to_string()).collect();
    match shown.is_empty() {
        true if whole && peft::is_adapter(dir) => {
            let dir = dir.display();
            e.hint(&format!("make a model of it: `ringtune merge --model-path {dir} --output-dir {dir}/merged`"))
        }
        true => e,
        false => e.hint(&format!("did you mean {}?", shown.join(" or "))),
    }
}

/// Whether it is no result: what begins with a dot is being written, or kept aside.
fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
}

/// At most three folders, the likeliest first.
fn candidates(dir: &Path, whole: bool) -> Vec<PathBuf> {
    if dir.is_file() {
        let above = dir.parent().map(Path::to_path_buf).filter(|above| is_model(above));
        return above.into_iter().collect();
    }
    if !dir.exists() {
        return nearby::near(dir).into_iter().collect();
    }
    let below = |dir: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().take(MOST);
        let mut all: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|p| p.is_dir() && !is_hidden(p)).collect();
        all.sort();
        all
    };
    // The base of an adapter with a grown vocabulary is no result.
    let base = |dir: &Path| dir.file_name().is_some_and(|name| name == peft::RESIZED_BASE);
    let fits = |dir: &Path| is_model(dir) && !base(dir) && !(whole && peft::is_adapter(dir));
    let first = below(dir);
    let mut found: Vec<PathBuf> = first.iter().filter(|p| fits(p)).cloned().collect();
    if found.is_empty() {
        found = first.iter().flat_map(|p| below(p)).filter(|p| fits(p)).collect();
    }
    let newest = manifest::list(dir).ok().and_then(|mut all| all.pop()).map(|(_, path)| path);
    let rank = |path: &Path| match path.file_name().and_then(|name| name.to_str()).unwrap_or_default() {
        "final" => 0,
        "merged" => 1,
        _ if newest.as_deref() == Some(path) => 2,
        name if name.starts_with("checkpoint-") => 9,
        _ => 3,
    };
    found.sort_by_key(|path| (rank(path), path.clone()));
    let best = found.first().map_or(9, |path| rank(path));
    // Where a result lies, its older checkpoints are not what is meant.
    found.retain(|path| rank(path) < 9 || best == 9);
    found.truncate(3);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_that_was_meant_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(&path).unwrap();
            for file in ["config.json", "model.safetensors"] {
                std::fs::write(path.join(file), "{}").unwrap();
            }
        };
        let said = |name: &str| {
            let e = model(Error::new("no model"), &dir.path().join(name), true);
            e.to_string().replace(&format!("{}/", dir.path().display()), "")
        };
        make("run/tiny/final");
        make("models/a");
        make("models/b");
        make("models/.checkpoint-5.tmp");
        assert_eq!(said("run/tiny"), "no model; did you mean run/tiny/final?");
        assert_eq!(said("run"), "no model; did you mean run/tiny/final?");
        assert_eq!(said("models"), "no model; did you mean models/a or models/b?");
        assert_eq!(said("modles/a"), "no model; did you mean models/a?");
        assert_eq!(said("models/a/config.json"), "no model; did you mean models/a?");
        assert_eq!(said("nowhere/at/all"), "no model");
        std::fs::create_dir_all(dir.path().join("empty")).unwrap();
        assert_eq!(said("empty"), "no model");
        std::fs::create_dir_all(dir.path().join("adapters/x")).unwrap();
        std::fs::write(dir.path().join("adapters/x/adapter_config.json"), "{}").unwrap();
        assert_eq!(said("adapters"), "no model", "an adapter is no model to train");
    }
}
