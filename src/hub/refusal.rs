//! What a refusal of the hub means, and what to do about it.

use super::client::Refusal;
use super::name::{Kind, Repo};
use crate::error::Error;

/// What a message about a refusal needs to know.
pub(super) struct Asked<'a> {
    pub repo: &'a Repo,
    /// The file that was asked for; `None`: the repository.
    pub file: Option<&'a str>,
    pub endpoint: &'a str,
    /// Whether a token was sent.
    pub token: bool,
}

const TOKEN: &str =
    "set HF_TOKEN to a token of yours (https://huggingface.co/settings/tokens), or log in with `hf auth login`";

impl Asked<'_> {
    /// The message.
    pub fn refused(&self, r: &Refusal) -> Error {
        let Self { repo, file, endpoint, token } = self;
        let (kind, page) = (kind(repo.kind), repo.page(endpoint));
        let status = if r.code.is_empty() { r.status.to_string() } else { format!("{}, {}", r.status, r.code) };
        let hint = if *token {
            "the token that was sent may not read it".to_string()
        } else {
            format!("no token was sent: {TOKEN}")
        };
        let file = file.map(|f| format!("{f}: ")).unwrap_or_default();
        let text = match (r.code.as_str(), r.status) {
            ("GatedRepo", _) if *token => format!(
                "gated ({status}): the account of the token that was sent has no access; accept the licence, or ask for access, at {page}, then \
                 run the command again"
            ),
            ("GatedRepo", _) => {
                format!("gated ({status}): accept the licence at {page}, then {TOKEN}, and run the command again")
            }
            ("RevisionNotFound", _) => {
                format!("no revision {:?} ({status}); expected a branch, a tag or a commit of {page}", repo.revision)
            }
            ("EntryNotFound", _) | ("", 404) if !file.is_empty() => {
                format!("no such file at this revision ({status}); see {page}")
            }
            ("RepoNotFound", _) | (_, 401 | 404) => format!(
                "no such {kind} on {endpoint} ({status}); check the name; if it is private or gated, {hint}{}",
                other_kind(repo)
            ),
            (_, 403) => format!("access denied ({status}); {hint}"),
            _ => format!("the hub answered {status}; expected 200"),
        };
        let said = if r.message.is_empty() || r.code == "RepoNotFound" {
            String::new()
        } else {
            format!("; the hub says: {}", r.message)
        };
        Error::new(format!("{repo}: {file}{text}{said}"))
    }
}

fn other_kind(repo: &Repo) -> &'static str {
    match repo.kind {
        Kind::Model => "; a data set is written hf:org/name and given to --dataset-paths",
        Kind::Dataset => "",
    }
}

pub(super) fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Model => "model",
        Kind::Dataset => "data set",
    }
}
