//! Names of the hub: `org/name[@revision]` of a model, `hf:org/name[@revision][/config][:split]` of a data set.

use std::fmt;

use crate::error::{Error, Result};

/// What a repository holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Weights, configuration, tokenizer.
    Model,
    /// Rows.
    Dataset,
}

/// A repository at a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repo {
    /// What it holds.
    pub kind: Kind,
    /// `org/name`.
    pub id: String,
    /// Branch, tag or commit.
    pub revision: String,
}

/// What of a data set is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataName {
    /// Where it is.
    pub repo: Repo,
    /// Which configuration (subset); `None`: the default one.
    pub config: Option<String>,
    /// Which split; `None`: `train`.
    pub split: Option<String>,
}

/// The branch that is meant where none is named.
pub const MAIN: &str = "main";

/// Begins a name that is the hub's whatever lies here.
pub const PREFIX: &str = "hf:";

impl Repo {
    fn of(kind: Kind, id: &str, revision: Option<&str>) -> Option<Self> {
        let parts: Vec<&str> = id.split('/').collect();
        let revision = revision.unwrap_or(MAIN);
        let whole = parts.len() <= 2 && id.len() <= 96 && parts.iter().all(|p| is_part(p)) && is_revision(revision);
        whole.then(|| Self { kind, id: id.into(), revision: revision.into() })
    }

    /// A model by `org/name[@revision]`, `hf:` before it or not; without it a name of two parts that is no name of a file.
    /// `None`: it is spelled like no name of the hub.
    pub fn model(text: &str) -> Option<Self> {
        let (bare, by_prefix) = match text.strip_prefix(PREFIX) {
            Some(rest) => (rest.trim_start_matches("//"), true),
            None => (text, false),
        };
        let (id, revision) = split_revision(bare);
        let file = FILES.iter().any(|e| id.to_ascii_lowercase().ends_with(e));
        if !by_prefix && (file || id.split('/').count() != 2) {
            return None;
        }
        Self::of(Kind::Model, id, revision)
    }

    /// Name of its folder in the cache: `models--org--name`.
    pub fn folder(&self) -> String {
        format!("{}s--{}", self.kind.word(), self.id.replace('/', "--"))
    }

    /// Whether the revision is a commit, which never changes.
    pub fn is_pinned(&self) -> bool {
        is_commit(&self.revision)
    }

    /// Address of what the hub says of it at the revision, files with sizes.
    pub fn api(&self, endpoint: &str) -> String {
        format!("{endpoint}/api/{}s/{}/revision/{}?blobs=true", self.kind.word(), self.id, quoted(&self.revision, ""))
    }

    /// Address of a file at a commit.
    pub fn file(&self, endpoint: &str, commit: &str, path: &str) -> String {
        format!("{}/resolve/{}/{}", self.page(endpoint), quoted(commit, ""), quoted(path, "/"))
    }

    /// Address of the page that people see.
    pub fn page(&self, endpoint: &str) -> String {
        match self.kind {
            Kind::Model => format!("{endpoint}/{}", self.id),
            Kind::Dataset => format!("{endpoint}/datasets/{}", self.id),
        }
    }

    /// What `ringtune download` is given to have it.
    pub fn typed(&self) -> String {
        match self.kind {
            Kind::Model => self.to_string(),
            Kind::Dataset => format!("{PREFIX}{self}"),
        }
    }

    /// What Python's tool is given to have it.
    pub fn typed_hf(&self) -> String {
        let kind = if self.kind == Kind::Dataset { " --repo-type dataset" } else { "" };
        let revision = if self.revision == MAIN { String::new() } else { format!(" --revision {}", self.revision) };
        format!("hf download {}{kind}{revision}", self.id)
    }
}

impl Kind {
    /// As addresses and folders have it, without the plural's s.
    pub fn word(self) -> &'static str {
        match self {
            Kind::Model => "model",
            Kind::Dataset => "dataset",
        }
    }
}

impl fmt::Display for Repo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id)?;
        if self.revision == MAIN { Ok(()) } else { write!(f, "@{}", self.revision) }
    }
}

impl DataName {
    /// A data set by `hf:org/name[@revision][/config][:split]`; `None` without the prefix.
    ///
    /// # Errors
    /// A usage error where what follows the prefix is no such name.
    pub fn parse(text: &str) -> Result<Option<Self>> {
        let Some(rest) = text.strip_prefix(PREFIX) else { return Ok(None) };
        let rest = rest.trim_start_matches("//");
        let rest = rest.strip_prefix("datasets/").unwrap_or(rest);
        let wrong = || Error::usage(format!("{text}: expected hf:org/name[@revision][/config][:split]"));
        let (path, split) = match rest.rsplit_once(':') {
            Some((path, split)) if !split.is_empty() => (path, Some(split.to_string())),
            Some(_) => return Err(wrong()),
            None => (rest, None),
        };
        let (id, revision, config) = match path.split_once('@') {
            Some((id, tail)) => {
                // Git's own names have slashes of their own: refs/pr/1, refs/convert/parquet.
                let parts = if tail.starts_with("refs/") { 3 } else { 1 };
                let end = tail.match_indices('/').nth(parts - 1).map_or(tail.len(), |(i, _)| i);
                (id, Some(&tail[..end]), tail[end..].trim_start_matches('/'))
            }
            None => {
                let end = path.match_indices('/').nth(1).map_or(path.len(), |(i, _)| i);
                (&path[..end], None, path[end..].trim_start_matches('/'))
            }
        };
        let config = (!config.is_empty()).then(|| config.to_string());
        let repo = Repo::of(Kind::Dataset, id, revision).ok_or_else(wrong)?;
        Ok(Some(Self { repo, config, split }))
    }
}

/// Endings that are a file's.
const FILES: [&str; 12] =
    [".model", ".json", ".jsonl", ".safetensors", ".gguf", ".bin", ".pt", ".jinja", ".txt", ".parquet", ".csv", ".tok"];

fn split_revision(text: &str) -> (&str, Option<&str>) {
    text.split_once('@').map_or((text, None), |(id, revision)| (id, Some(revision)))
}

fn is_part(part: &str) -> bool {
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
    let inside = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    let (first, last) = (part.chars().next(), part.chars().last());
    edge(first) && edge(last) && part.chars().all(inside) && !part.contains("--") && !part.contains("..")
}

fn is_revision(text: &str) -> bool {
    let inside = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '/' | '+');
    let part = |p: &str| !p.is_empty() && !p.starts_with('.');
    text.len() <= 200 && text.chars().all(inside) && text.split('/').all(part) && !text.contains("..")
}

/// Whether a revision is a whole commit hash.
pub fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Percent-encodes what is no letter, digit or `-._~`, nor in `keep`.
fn quoted(text: &str, keep: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for b in text.bytes() {
        let c = char::from(b);
        if c.is_ascii_alphanumeric() || "-._~".contains(c) || (b.is_ascii() && keep.contains(c)) {
            out.push(c);
        } else {
            out.push_str(&format!("%{b:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_by_name() {
        let name = |text: &str| Repo::model(text).map(|r| r.to_string());
        for good in ["meta-llama/Llama-3.2-1B", "org/name@v1.0", "o/n@refs/pr/3", "_a/b_"] {
            assert_eq!(name(good).as_deref(), Some(good));
        }
        assert_eq!(name("hf:org/name").as_deref(), Some("org/name"));
        assert_eq!(name("hf://org/name@main").as_deref(), Some("org/name"));
        assert_eq!(name("hf:gpt2").as_deref(), Some("gpt2"));
        for bad in [
            "gpt2",
            "/a/b",
            "./a",
            "../a",
            "a/b/c",
            "a/",
            "a//b",
            "~/m",
            "data/spm32k.model",
            "a/b.JSON",
            "a/..",
            "a/.b",
            "a--b/c",
            "a/b@",
            "a/b@../x",
            "a b/c",
            "a/b@x y",
            "hf:",
            "hf:a/b/c",
            "a/-b",
            "a\\b/c",
        ] {
            assert_eq!(name(bad), None, "{bad}");
        }
    }

    #[test]
    fn data_sets_by_name() {
        let parts = |text: &str| {
            let n = DataName::parse(text).unwrap().unwrap();
            (n.repo.to_string(), n.config.unwrap_or_default(), n.split.unwrap_or_default())
        };
        let want = |id: &str, config: &str, split: &str| (id.to_string(), config.to_string(), split.to_string());
        assert_eq!(parts("hf:org/rows"), want("org/rows", "", ""));
        assert_eq!(parts("hf:org/rows:test"), want("org/rows", "", "test"));
        assert_eq!(parts("hf:org/rows/en/deep:train_sft"), want("org/rows", "en/deep", "train_sft"));
        assert_eq!(parts("hf://datasets/org/rows@v2/en"), want("org/rows@v2", "en", ""));
        assert_eq!(
            parts("hf:o/r@refs/convert/parquet/default:train"),
            want("o/r@refs/convert/parquet", "default", "train")
        );
        assert_eq!(parts("hf:o/r@refs/pr/1"), want("o/r@refs/pr/1", "", ""));
        assert_eq!(DataName::parse("org/rows").unwrap(), None);
        for bad in ["hf:", "hf:org/rows:", "hf:../x", "hf:a b/c", "hf:org/rows@"] {
            assert_eq!(DataName::parse(bad).unwrap_err().exit_code(), 2, "{bad}");
        }
    }

    #[test]
    fn addresses() {
        let repo = Repo::model("org/name@refs/pr/1").unwrap();
        assert_eq!(repo.api("http://h"), "http://h/api/models/org/name/revision/refs%2Fpr%2F1?blobs=true");
        assert_eq!(repo.file("http://h", "abc", "a b/c#.json"), "http://h/org/name/resolve/abc/a%20b/c%23.json");
        let rows = DataName::parse("hf:org/rows").unwrap().unwrap().repo;
        assert_eq!(rows.file("http://h", "abc", "x.csv"), "http://h/datasets/org/rows/resolve/abc/x.csv");
        assert_eq!((rows.folder().as_str(), repo.folder().as_str()), ("datasets--org--rows", "models--org--name"));
        assert_eq!(rows.typed_hf(), "hf download org/rows --repo-type dataset");
    }
}
