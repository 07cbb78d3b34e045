//! Which files of a data set's repository are meant: by the configurations of its card (README.md), else by where files lie and what
//! they are called.

use std::path::Path;

use glob::{MatchOptions, Pattern};
use serde_json::Value;

use super::name::DataName;
use crate::error::{Error, Result};
use crate::files::unpacked;
use crate::say;

/// Kinds of files that are read, the best first: where a split is there in several, one of them is taken.
const KINDS: [&str; 6] = ["parquet", "jsonl", "ndjson", "json", "csv", "tsv"];

/// Words for splits, the word that is meant by each first.
const SPLITS: [&[&str]; 3] =
    [&["train", "training"], &["validation", "valid", "val", "dev"], &["test", "testing", "eval", "evaluation"]];

/// What is chosen where no configuration has another name.
const DEFAULT: &str = "default";

/// Which of `files` (paths in the repository) a name means; `card` is the text of the repository's README.md.
///
/// # Errors
/// A usage error that lists what there is, where that is not one configuration and split; if there is no file that is read.
pub fn choose(name: &DataName, files: &[&str], card: Option<&str>) -> Result<Vec<String>> {
    let configs = card.map(configs_of).unwrap_or_default();
    let mut sets = if configs.is_empty() { Vec::new() } else { by_card(&configs, files) };
    if sets.is_empty() {
        sets = by_name(files);
    }
    if sets.is_empty() {
        let shown: Vec<&str> = files.iter().copied().filter(|f| !f.starts_with('.')).take(12).collect();
        let found = if shown.is_empty() { "nothing".into() } else { shown.join(", ") };
        return Err(Error::new(format!(
            "{}: no data that is read, expected files that end in {} (gzip too); found {found}; the hub may have it as Parquet: \
             hf:{}@refs/convert/parquet",
            name.repo,
            KINDS.map(|k| format!(".{k}")).join(", "),
            name.repo.id
        )));
    }
    let config = config_of(name, &sets)?;
    let splits: Vec<&Set> = sets.iter().filter(|s| s.config == config).collect();
    let set = split_of(name, config, &splits)?;
    Ok(one_kind(name, set))
}

/// The files of one split of one configuration.
#[derive(Debug)]
struct Set {
    config: String,
    /// It is what is meant where no configuration is named.
    default: bool,
    split: String,
    files: Vec<String>,
}

fn config_of<'a>(name: &DataName, sets: &'a [Set]) -> Result<&'a str> {
    let mut all: Vec<&str> = Vec::new();
    for set in sets {
        if !all.contains(&set.config.as_str()) {
            all.push(&set.config);
        }
    }
    let found = match &name.config {
        Some(asked) => all.iter().find(|c| *c == asked),
        None => {
            let marked = sets.iter().find(|s| s.default).map(|s| s.config.as_str());
            let only = if all.len() == 1 { all.first() } else { None };
            marked.and_then(|m| all.iter().find(|c| **c == m)).or(only).or_else(|| all.iter().find(|c| **c == DEFAULT))
        }
    };
    found.copied().ok_or_else(|| {
        let asked = match &name.config {
            Some(asked) => format!("no configuration {asked:?}"),
            None => "several configurations, expected the name of one".into(),
        };
        Error::usage(format!(
            "hf:{}: {asked}; found {}; write hf:{}/{}",
            name.repo,
            listed(&all),
            name.repo,
            all.first().unwrap_or(&DEFAULT)
        ))
    })
}

fn split_of<'a>(name: &DataName, config: &str, splits: &[&'a Set]) -> Result<&'a Set> {
    let asked = name.split.as_deref();
    let by = |word: &str| splits.iter().copied().find(|s| s.split == word);
    let found = match asked {
        Some(word) => by(word)
            .or_else(|| by(meant(word)?))
            .or_else(|| splits.iter().copied().find(|s| meant(&s.split) == Some(word))),
        None => by("train").or(if splits.len() == 1 { splits.first().copied() } else { None }),
    };
    found.ok_or_else(|| {
        let all: Vec<&str> = splits.iter().map(|s| s.split.as_str()).collect();
        let which = if config == DEFAULT { String::new() } else { format!("/{config}") };
        Error::usage(format!(
            "hf:{}{which}: no split {:?}; found {}; write hf:{}{which}:{}",
            name.repo,
            asked.unwrap_or("train"),
            listed(&all),
            name.repo,
            all.first().unwrap_or(&"train")
        ))
    })
}

fn listed(words: &[&str]) -> String {
    let shown = words[..words.len().min(20)].join(", ");
    if words.len() > 20 { format!("{shown} and {} more", words.len() - 20) } else { shown }
}

/// The files of the best kind.
fn one_kind(name: &DataName, set: &Set) -> Vec<String> {
    let of = |kind: &str| -> Vec<String> { set.files.iter().filter(|f| kind_of(f) == Some(kind)).cloned().collect() };
    let files = KINDS.iter().map(|kind| of(kind)).find(|files| !files.is_empty()).unwrap_or_default();
    let left: Vec<&str> = set.files.iter().filter(|f| !files.contains(f)).map(String::as_str).collect();
    if !left.is_empty() {
        say::note(&format!(
            "hf:{}: {} is read; left out, the same in another form: {}",
            name.repo,
            listed(&[&files[0]]),
            listed(&left)
        ));
    }
    files
}

/// The ending of a file that is read, without `.gz`.
fn kind_of(path: &str) -> Option<&'static str> {
    let name = unpacked(Path::new(path)).file_name()?.to_str()?.to_ascii_lowercase();
    let described = ["dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json", "config.json"];
    if name.starts_with('.') || described.contains(&name.as_str()) {
        return None;
    }
    let ending = name.rsplit_once('.')?.1;
    KINDS.into_iter().find(|k| *k == ending)
}

/// A configuration of a card.
#[derive(Debug, PartialEq)]
struct Config {
    name: String,
    default: bool,
    dir: String,
    /// Patterns of each split; empty: what lies in `dir`, by its names.
    splits: Vec<(String, Vec<String>)>,
}

/// The configurations that a card's front matter lists.
fn configs_of(card: &str) -> Vec<Config> {
    let Some(front) = card.strip_prefix("---").and_then(|rest| rest.split_once("\n---")).map(|(front, _)| front) else {
        return Vec::new();
    };
    let Ok(value) = serde_saphyr::from_str::<Value>(front) else { return Vec::new() };
    let configs = value["configs"].as_array().cloned().unwrap_or_default();
    configs.iter().map(config_of_card).collect()
}

fn config_of_card(v: &Value) -> Config {
    let text = |v: &Value| match v {
        Value::String(s) => s.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    };
    let patterns = |v: &Value| match v {
        Value::Array(list) => list.iter().map(text).collect(),
        Value::Null => Vec::new(),
        one => vec![text(one)],
    };
    let files = &v["data_files"];
    let splits = match files {
        Value::Object(map) => map.iter().map(|(split, p)| (split.clone(), patterns(p))).collect(),
        Value::Array(list) if list.iter().any(Value::is_object) => {
            list.iter().map(|item| (text(&item["split"]), patterns(&item["path"]))).collect()
        }
        Value::Null => Vec::new(),
        plain => vec![("train".into(), patterns(plain))],
    };
    let name = text(&v["config_name"]);
    Config {
        default: v["default"] == true,
        name: if name.is_empty() { DEFAULT.into() } else { name },
        dir: text(&v["data_dir"]).trim_matches('/').trim_start_matches("./").to_string(),
        splits,
    }
}

fn by_card(configs: &[Config], files: &[&str]) -> Vec<Set> {
    let mut sets = Vec::new();
    for config in configs {
        let below =
            |file: &str| config.dir.is_empty() || file.strip_prefix(&config.dir).is_some_and(|f| f.starts_with('/'));
        if config.splits.is_empty() {
            let inside: Vec<&str> = files.iter().copied().filter(|f| below(f)).collect();
            for set in merged(by_name(&inside)) {
                sets.push(Set { config: config.name.clone(), default: config.default, ..set });
            }
        }
        for (split, patterns) in &config.splits {
            let fits = |file: &&&str| kind_of(file).is_some() && patterns.iter().any(|p| matches(p, &config.dir, file));
            let found: Vec<String> = files.iter().filter(fits).map(ToString::to_string).collect();
            if !found.is_empty() {
                sets.push(Set {
                    config: config.name.clone(),
                    default: config.default,
                    split: split.clone(),
                    files: found,
                });
            }
        }
    }
    sets
}

/// Sets of the same split as one, whatever their configurations.
fn merged(sets: Vec<Set>) -> Vec<Set> {
    let mut out: Vec<Set> = Vec::new();
    for set in sets {
        match out.iter_mut().find(|s| s.split == set.split) {
            Some(known) => known.files.extend(set.files),
            None => out.push(set),
        }
    }
    out
}

/// Whether a pattern of a card means a file: a path, one with `*`, or a folder.
fn matches(pattern: &str, dir: &str, file: &str) -> bool {
    let pattern = pattern.trim_start_matches("./");
    let pattern = if dir.is_empty() { pattern.to_string() } else { format!("{dir}/{pattern}") };
    let options = MatchOptions { require_literal_separator: true, ..MatchOptions::default() };
    let fits = |p: &str| p == file || Pattern::new(p).is_ok_and(|p| p.matches_with(file, options));
    fits(&pattern) || fits(&format!("{}/**/*", pattern.trim_end_matches('/')))
}

/// Sets by folders and names: `en/train-00000-of-00002.parquet` is of configuration `en` and split `train`.
fn by_name(files: &[&str]) -> Vec<Set> {
    let mut found: Vec<(String, Option<String>, &str)> = Vec::new();
    for file in files.iter().copied().filter(|f| kind_of(f).is_some()) {
        let mut parts: Vec<&str> = file.split('/').collect();
        let name = parts.pop().unwrap_or_default();
        let in_folder = parts.iter().rev().find_map(|p| split_in(p));
        let split = split_of_name(name, parts.last() == Some(&"data")).or(in_folder.map(String::from));
        let named: Vec<&str> = parts
            .iter()
            .enumerate()
            .filter(|(i, p)| split_in(p).is_none() && !(*i == 0 && **p == "data"))
            .map(|(_, p)| *p)
            .collect();
        let config = if named.is_empty() { DEFAULT.to_string() } else { named.join("/") };
        found.push((config, split, file));
    }
    let mut sets: Vec<Set> = Vec::new();
    for (config, split, file) in &found {
        // Beside files that say their split, one that says none is no training data.
        let says = |f: &&(String, Option<String>, &str)| f.0 == *config && f.1.is_some();
        if split.is_none() && found.iter().any(|f| says(&f)) {
            continue;
        }
        let (config, split) = (config.clone(), split.clone().unwrap_or_else(|| "train".into()));
        match sets.iter_mut().find(|s| s.config == config && s.split == split) {
            Some(set) => set.files.push((*file).into()),
            None => sets.push(Set { config, default: false, split, files: vec![(*file).into()] }),
        }
    }
    apart(sets)
}

/// Of a set whose files are called each in its own way, each is a configuration of its own name, and all of them are the set's.
fn apart(sets: Vec<Set>) -> Vec<Set> {
    let mut out = Vec::new();
    for set in sets {
        let mut stems: Vec<&str> = set.files.iter().map(|f| stem(f)).collect();
        stems.sort_unstable();
        stems.dedup();
        let whole = stems.len() < 2 || stems.iter().any(|s| split_in(s).is_some() || is_number(s));
        if !whole {
            for stem in &stems {
                let files: Vec<String> = set.files.iter().filter(|f| self::stem(f) == *stem).cloned().collect();
                let config = if set.config == DEFAULT { (*stem).to_string() } else { format!("{}/{stem}", set.config) };
                out.push(Set { config, default: false, split: set.split.clone(), files });
            }
        } else {
            out.push(set);
        }
    }
    out
}

/// A file's name without folder, endings and the numbers of a piece: `a` of `x/a-00000-of-00002.jsonl.gz`.
fn stem(file: &str) -> &str {
    let name = file.rsplit('/').next().unwrap_or(file);
    let name = name.split('.').next().unwrap_or(name);
    shard(name).unwrap_or(name).trim_end_matches(|c: char| c.is_ascii_digit() || "-_".contains(c))
}

fn is_number(text: &str) -> bool {
    text.chars().all(|c| c.is_ascii_digit())
}

/// What stands before `-00000-of-00002`.
fn shard(name: &str) -> Option<&str> {
    let (front, tail) = name.split_once("-of-")?;
    let (split, number) = front.rsplit_once('-')?;
    let digits = |s: &str| s.len() >= 4 && s.bytes().all(|b| b.is_ascii_digit());
    (digits(number) && tail.get(..4).is_some_and(digits)).then_some(split)
}

/// The split that a file's name says; in a folder `data` a numbered piece is of the split before the number, whatever its word.
fn split_of_name(name: &str, in_data: bool) -> Option<String> {
    let stem = name.split('.').next().unwrap_or(name);
    if let Some(split) = shard(stem).filter(|s| in_data || split_in(s).is_some()) {
        return Some(split.into());
    }
    split_in(stem).map(String::from)
}

/// The split that a word of `text` means.
fn split_in(text: &str) -> Option<&'static str> {
    text.split(|c: char| !c.is_ascii_alphabetic()).find_map(meant)
}

fn meant(word: &str) -> Option<&'static str> {
    let word = word.to_ascii_lowercase();
    SPLITS.iter().find(|words| words.contains(&word.as_str())).map(|words| words[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(name: &str, files: &[&str], card: Option<&str>) -> Result<Vec<String>> {
        choose(&DataName::parse(name).unwrap().unwrap(), files, card)
    }

    fn error(name: &str, files: &[&str], card: Option<&str>) -> String {
        chosen(name, files, card).unwrap_err().to_string()
    }

    #[test]
    fn usual_names() {
        let of = |name: &str, files: &[&str]| chosen(name, files, None).unwrap();
        let files = [
            "README.md",
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
            "data/test-00000-of-00001.parquet",
        ];
        assert_eq!(of("hf:o/r", &files), files[1..3]);
        assert_eq!(of("hf:o/r:test", &files), files[3..]);
        assert!(error("hf:o/r:dev", &files, None).contains("no split \"dev\"; found train, test"));
        assert_eq!(of("hf:o/r:val", &["train.jsonl", "valid.jsonl"]), ["valid.jsonl"]);
        assert_eq!(of("hf:o/r", &["databricks-dolly-15k.jsonl"]), ["databricks-dolly-15k.jsonl"]);
        assert_eq!(
            of("hf:o/r", &["data/train-00000-of-00001-a09b.parquet"]),
            ["data/train-00000-of-00001-a09b.parquet"]
        );
        let named = ["data/test_sft-00000-of-00001.parquet", "data/train_sft-00000-of-00001.parquet"];
        assert_eq!(of("hf:o/r:train_sft", &named), named[1..]);
        assert!(error("hf:o/r", &named, None).contains("no split \"train\"; found test_sft, train_sft"));
        let converted =
            ["en/train/0000.parquet", "en/train/0001.parquet", "fr/train/0000.parquet", "fr/test/0000.parquet"];
        assert_eq!(of("hf:o/r@refs/convert/parquet/en", &converted), converted[..2]);
        assert_eq!(of("hf:o/r/fr:test", &converted), converted[3..]);
        let e = error("hf:o/r", &converted, None);
        assert!(e.contains("several configurations, expected the name of one; found en, fr; write hf:o/r/en"), "{e}");
        assert_eq!(of("hf:o/r", &["extra.jsonl", "train.jsonl"]), ["train.jsonl"]);
        // Files of names of their own.
        let files = ["chat.jsonl", "math.jsonl"];
        assert_eq!(of("hf:o/r/math", &files), ["math.jsonl"]);
        assert!(error("hf:o/r", &files, None).contains("found chat, math"));
        let numbered = ["part-0.csv.gz", "part-1.csv.gz"];
        assert_eq!(of("hf:o/r", &numbered), numbered);
        // The same in two forms is read once.
        assert_eq!(of("hf:o/r", &["train.json", "train.parquet", "dataset_infos.json"]), ["train.parquet"]);
        let e = error("hf:o/r", &["a.arrow", ".gitattributes"], None);
        assert!(
            e.contains("no data that is read") && e.contains("found a.arrow;") && e.contains("@refs/convert/parquet"),
            "{e}"
        );
    }

    #[test]
    fn configurations_of_the_card() {
        let card = "---\nlicense: mit\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/train-*\n  - split: test\n    \
                    path: [en/a.jsonl, en/b.jsonl]\n- config_name: fr\n  default: true\n  data_files: fr/**\n- config_name: de\n  data_dir: de\n---\n# Text\n";
        let files = [
            "README.md",
            "de/test.csv",
            "de/train.csv",
            "en/a.jsonl",
            "en/b.jsonl",
            "en/c.jsonl",
            "en/train-0.parquet",
            "fr/x/y.jsonl",
        ];
        let of = |name: &str| chosen(name, &files, Some(card)).unwrap();
        assert_eq!(of("hf:o/r/en"), ["en/train-0.parquet"]);
        assert_eq!(of("hf:o/r/en:test"), ["en/a.jsonl", "en/b.jsonl"]);
        assert_eq!(of("hf:o/r"), ["fr/x/y.jsonl"], "the one marked default");
        assert_eq!(of("hf:o/r/de:test"), ["de/test.csv"]);
        let e = error("hf:o/r/es", &files, Some(card));
        assert!(e.contains("no configuration \"es\"; found en, fr, de"), "{e}");
        // A map of splits, and a card without configurations.
        let card = "---\nconfigs:\n  - config_name: default\n    data_files: {train: 'a*.json', test: b.json}\n---\n";
        assert_eq!(chosen("hf:o/r:test", &["a1.json", "b.json"], Some(card)).unwrap(), ["b.json"]);
        for card in ["---\nlicense: mit\n---\n", "no front matter", "---\nconfigs: [\n---\n", "---\nconfigs: 7\n---\n"]
        {
            assert_eq!(chosen("hf:o/r", &["train.csv"], Some(card)).unwrap(), ["train.csv"], "{card}");
        }
    }
}
