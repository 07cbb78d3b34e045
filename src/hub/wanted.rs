//! Which files of a model's repository are needed.

use super::cache::Listing;
use super::name::Repo;
use crate::error::{Error, Result};
use crate::{bail, ensure};

/// How much of a model is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Configuration, tokenizer, template and weights.
    Whole,
    /// All but weights.
    Tokenizer,
    /// The shape alone.
    Config,
}

/// Small files that belong to a model, as far as it has them.
const SMALL: [&str; 13] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "adapter_config.json",
];

/// The list of a model's weight files.
pub const INDEX: &str = "model.safetensors.index.json";

/// Names of the small files, and of the weights: what [`INDEX`] names (its text is `index`), one whole file, or those of an adapter.
///
/// # Errors
/// If there is no configuration, or no weights in a form that is read.
pub fn files(repo: &Repo, listing: &Listing, part: Part, index: Option<&str>) -> Result<Vec<String>> {
    let has = |name: &str| listing.entries.iter().any(|e| e.path == name);
    let mut names: Vec<String> = SMALL.iter().filter(|n| has(n)).map(ToString::to_string).collect();
    let adapter = has("adapter_config.json") && !has("config.json");
    let described = adapter || has("config.json");
    match part {
        Part::Config => {
            ensure!(described, "{repo}: no config.json; {}", found(listing));
            names.retain(|n| n == "config.json" || n == "adapter_config.json");
        }
        Part::Tokenizer => {
            let any = ["tokenizer.json", "tokenizer.model", "spiece.model"].iter().any(|n| has(n));
            ensure!(any, "{repo}: no tokenizer.json and no tokenizer.model; {}", found(listing));
        }
        Part::Whole => {
            ensure!(described, "{repo}: no config.json, so no model that can be read; {}", found(listing));
            match index {
                _ if adapter && has("adapter_model.safetensors") => names.push("adapter_model.safetensors".into()),
                Some(text) => {
                    names.push(INDEX.into());
                    names.extend(shards(repo, text)?);
                }
                None if has("model.safetensors") => names.push("model.safetensors".into()),
                None => return Err(no_weights(repo, listing)),
            }
        }
    }
    Ok(names)
}

/// The files that an index names.
fn shards(repo: &Repo, index: &str) -> Result<Vec<String>> {
    let wrong =
        |what: &str| Error::new(format!("{repo}: {INDEX}: expected a map of weights (weight_map), found {what}"));
    let value: serde_json::Value = serde_json::from_str(index).map_err(|e| wrong(&e.to_string()))?;
    let map = value["weight_map"].as_object().ok_or_else(|| wrong("none"))?;
    let mut shards = Vec::new();
    for file in map.values() {
        let Some(name) = file.as_str() else { bail!("{repo}: {INDEX}: expected names of files, found {file}") };
        shards.push(name.to_string());
    }
    shards.sort();
    shards.dedup();
    Ok(shards)
}

fn no_weights(repo: &Repo, listing: &Listing) -> Error {
    let ends = |endings: &[&str]| listing.entries.iter().any(|e| endings.iter().any(|x| e.path.ends_with(x)));
    let advice = if ends(&[".bin", ".pt", ".pth"]) {
        "; pickled weights are not read: https://huggingface.co/spaces/safetensors/convert makes a revision with safetensors, which is \
         then taken by org/name@refs/pr/N"
    } else if ends(&[".gguf"]) {
        "; GGUF is for inference: take the repository that it was made of"
    } else {
        ""
    };
    Error::new(format!("{repo}: no weights as model.safetensors or with {INDEX}{advice}; {}", found(listing)))
}

/// What a repository has, for messages.
pub(super) fn found(listing: &Listing) -> String {
    let names: Vec<&str> = listing.entries.iter().map(|e| e.path.as_str()).filter(|n| !n.starts_with('.')).collect();
    let shown = names[..names.len().min(12)].join(", ");
    match names.len() {
        0 => "found no file".into(),
        n if n > 12 => format!("found {shown} and {} more", n - 12),
        _ => format!("found {shown}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::cache::Entry;
    use super::*;

    fn listing(names: &[&str]) -> Listing {
        let entries = names.iter().map(|n| Entry { path: n.to_string(), ..Entry::default() }).collect();
        Listing { commit: "c".into(), entries, whole: true }
    }

    #[test]
    fn what_is_needed_and_nothing_else() {
        let repo = Repo::model("o/n").unwrap();
        let of = |names: &[&str], part, index| files(&repo, &listing(names), part, index);
        let all = [
            "README.md",
            "config.json",
            "tokenizer.json",
            "model.safetensors",
            "consolidated.safetensors",
            "pytorch_model.bin",
            "onnx/model.onnx",
            "original/params.json",
            "m.gguf",
        ];
        assert_eq!(of(&all, Part::Whole, None).unwrap(), ["config.json", "tokenizer.json", "model.safetensors"]);
        assert_eq!(of(&all, Part::Tokenizer, None).unwrap(), ["config.json", "tokenizer.json"]);
        assert_eq!(of(&all, Part::Config, None).unwrap(), ["config.json"]);
        let index = r#"{"weight_map": {"a": "m-2.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}}"#;
        let got = of(&["config.json", INDEX], Part::Whole, Some(index)).unwrap();
        assert_eq!(got, ["config.json", INDEX, "m-1.safetensors", "m-2.safetensors"]);
        let got = of(&["adapter_config.json", "adapter_model.safetensors"], Part::Whole, None).unwrap();
        assert_eq!(got, ["adapter_config.json", "adapter_model.safetensors"]);
        let fails = |names: &[&str], part, want: &str| {
            let e = of(names, part, None).unwrap_err().to_string();
            assert!(e.starts_with("o/n: ") && e.contains(want), "{e}");
        };
        fails(&["config.json", "pytorch_model.bin"], Part::Whole, "pickled weights are not read");
        fails(&["config.json", "m.gguf"], Part::Whole, "GGUF");
        fails(&["README.md"], Part::Whole, "no config.json");
        fails(&["config.json"], Part::Tokenizer, "no tokenizer.json");
        assert!(of(&["config.json", INDEX], Part::Whole, Some("{}")).is_err());
    }
}
