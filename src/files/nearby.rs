//! What was meant by a path that is not there.

use std::path::{Component, Path, PathBuf};

/// The path that exists and differs from `path` in one name, by little: `data/rows.jsonl` for `data/rosw.jsonl`. What stands below that
/// name has to be there too.
pub fn near(path: &Path) -> Option<PathBuf> {
    let names: Vec<Component> = path.components().collect();
    let mut there = PathBuf::new();
    let (mut above, mut at) = (PathBuf::from("."), 0);
    for (i, name) in names.iter().enumerate() {
        there.push(name);
        if std::fs::symlink_metadata(&there).is_err() {
            at = i;
            break;
        }
        above.clone_from(&there);
    }
    let Component::Normal(wrong) = names.get(at)? else { return None };
    let wrong = wrong.to_str()?.to_lowercase();
    let below: PathBuf = names[at + 1..].iter().collect();
    let prefix: PathBuf = names[..at].iter().collect();
    // Joined to nothing a name would end in a slash, and be no file.
    let whole = |path: PathBuf| if below.as_os_str().is_empty() { path } else { path.join(&below) };
    let entries = std::fs::read_dir(above).ok()?.flatten().take(10_000);
    let likeness = |name: &str| strsim::jaro_winkler(&wrong, &name.to_lowercase());
    let near = |name: &str| strsim::osa_distance(&wrong, &name.to_lowercase()) <= 2 || likeness(name) > 0.93;
    let mut found: Vec<(f64, PathBuf)> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        // What begins with a dot is nobody's to name, but for who named such a thing.
        .filter(|name| {
            near(name) && versions(name) == versions(&wrong) && name.starts_with('.') == wrong.starts_with('.')
        })
        .map(|name| (likeness(&name), whole(prefix.join(&name))))
        .filter(|(_, path)| path.exists())
        .collect();
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    found.into_iter().next().map(|f| f.1)
}

/// `; did you mean PATH?`, where there is one; of several names in one word, how they are given.
pub fn hint(path: &Path) -> String {
    let names = path.to_str().unwrap_or_default();
    let several = |by: char| names.contains(by) && names.split(by).all(|name| Path::new(name.trim()).exists());
    if [',', ' ', ';'].into_iter().any(several) {
        return "; several names are given as words of their own, with spaces between them".into();
    }
    near(path).map_or_else(String::new, |near| format!("; did you mean {}?", near.display()))
}

/// The digits of a name: another number is another thing, not a slip.
pub fn versions(name: &str) -> String {
    name.chars().filter(char::is_ascii_digit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_found_and_other_numbers_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        };
        ["data/rows.jsonl", "model/tiny/config.json", "out/checkpoint-500/a"].iter().for_each(|name| make(name));
        let said = |name: &str| hint(&dir.path().join(name)).replace(&format!("{}/", dir.path().display()), "");
        assert_eq!(said("data/rosw.jsonl"), "; did you mean data/rows.jsonl?");
        assert_eq!(said("dta/rows.jsonl"), "; did you mean data/rows.jsonl?");
        assert_eq!(said("modle/tiny"), "; did you mean model/tiny?");
        assert_eq!(said("Model/tiny"), "; did you mean model/tiny?");
        assert_eq!(said("modle/huge"), "", "what stands below has to be there");
        assert_eq!(said("out/checkpoint-400"), "", "another number is no slip");
        assert_eq!(said("elsewhere"), "");
        assert_eq!(near(Path::new("")), None);
        let both = ["data/rows.jsonl", "model/tiny"].map(|name| dir.path().join(name).display().to_string());
        for by in [",", ", ", " "] {
            assert!(hint(Path::new(&both.join(by))).contains("words of their own"), "{by:?}");
        }
        assert_eq!(hint(Path::new(&format!("{},{}", both[0], dir.path().join("elsewhere").display()))), "");
    }
}
