//! Folders of the user that ringtune writes to or looks into.

use std::path::PathBuf;

fn var(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from)
}

/// The user's cache folder for ringtune: `$XDG_CACHE_HOME/ringtune` or `~/.cache/ringtune`; `None` where neither variable is set.
pub fn user_cache() -> Option<PathBuf> {
    var("XDG_CACHE_HOME").map(|p| p.join("ringtune")).or_else(|| var("HOME").map(|p| p.join(".cache/ringtune")))
}

/// Where what can be made again is kept unless a folder is named: `$RINGTUNE_CACHE`, [`user_cache`], or a folder beside the working
/// directory.
pub fn cache() -> PathBuf {
    var("RINGTUNE_CACHE").or_else(user_cache).unwrap_or_else(|| PathBuf::from(".ringtune-cache"))
}
