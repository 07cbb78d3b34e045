//! The floors of ARCHITECTURE.md: every `crate::` path in src is read, and an upward edge fails.

use std::fs;
use std::path::{Path, PathBuf};

/// Modules by floor; a module imports from lower floors and from itself.
const FLOORS: &[&[&str]] = &[
    &["error", "rng", "dirs", "files", "machine", "words"],
    &["tensor", "batch", "backend"],
    &["cpu", "cuda", "data", "datasets"],
    &["model", "comm"],
    &["optim", "hf", "checkpoint"],
    &["settings", "generate", "log", "eval", "train"],
    &["cli", "commands"],
];

fn floor(module: &str) -> Option<usize> {
    FLOORS.iter().position(|f| f.contains(&module))
}

/// Modules of floor 2 and 3 do not know each other; those of another floor may, as long as no circle comes of it. Backends are
/// chosen by commands alone: what lies between works over any of them, but for the collectives of CUDA.
fn allowed(from: &str, to: &str) -> bool {
    let (Some(a), Some(b)) = (floor(from), floor(to)) else {
        return false;
    };
    if ["cpu", "cuda"].contains(&to) && (3..=5).contains(&a) {
        return from == "comm" && to == "cuda";
    }
    from == to || b < a || (a == b && ![2, 3].contains(&a))
}

fn rust_files(dir: &Path, out: &mut Vec<PathBuf>) {
    let mut entries: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            rust_files(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

/// The code of a file: comments cut off, and nothing from a final `mod tests` on, which may look anywhere.
fn code(text: &str) -> String {
    let text = text.split("\n#[cfg(test)]\nmod ").next().unwrap_or("");
    let lines = text.lines().map(|l| l.split("//").next().unwrap_or(""));
    lines.collect::<Vec<_>>().join("\n")
}

/// Top-level modules that `code` reaches through `crate::`, also inside `use crate::{a, b::c}`.
fn edges(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (i, _) in code.match_indices("crate::") {
        if code[..i].ends_with(['_', '$']) || code[..i].ends_with(char::is_alphanumeric) {
            continue;
        }
        let rest = &code[i + "crate::".len()..];
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 0usize;
            let mut item = String::new();
            for c in group.chars() {
                match c {
                    '}' if depth == 0 => break,
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    ',' if depth == 0 => {
                        found.push(std::mem::take(&mut item));
                        continue;
                    }
                    _ => {}
                }
                item.push(c);
            }
            found.push(item);
        } else {
            found.push(rest.into());
        }
    }
    let first = |s: String| s.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    // `crate::bail!` and `crate::ensure!` are macros of `error`.
    let name = |s: String| match first(s).as_str() {
        "bail" | "ensure" => "error".to_string(),
        other => other.to_string(),
    };
    found.into_iter().map(name).filter(|s| !s.is_empty()).collect()
}

#[test]
fn no_module_imports_from_a_higher_floor() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    rust_files(&src, &mut files);
    assert!(files.len() > 20, "src was not read");
    let mut wrong = Vec::new();
    let mut n_edges = 0;
    for file in &files {
        let relative = file.strip_prefix(&src).unwrap();
        let module = relative.components().next().unwrap().as_os_str().to_str().unwrap();
        let module = module.trim_end_matches(".rs");
        if module == "main" || module == "lib" {
            continue;
        }
        if floor(module).is_none() {
            wrong.push(format!("src/{}: {module} stands on no floor", relative.display()));
        }
        for to in edges(&code(&fs::read_to_string(file).unwrap())) {
            n_edges += 1;
            if !allowed(module, &to) {
                wrong.push(format!("src/{}: {module} imports {to}", relative.display()));
            }
        }
    }
    assert!(n_edges > 30, "only {n_edges} edges were seen");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn serde_types_stay_where_files_are_read() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    rust_files(&src, &mut files);
    for file in files {
        let relative = file.strip_prefix(&src).unwrap().to_str().unwrap().to_string();
        let text = code(&fs::read_to_string(&file).unwrap());
        let derives = text.contains("Serialize") || text.contains("Deserialize");
        let home = ["settings/", "checkpoint/", "hf/", "data/", "datasets/", "model/config.rs"]
            .iter()
            .any(|h| relative.starts_with(h));
        assert!(
            home || !derives,
            "src/{relative}: serde types belong to settings, checkpoint, hf, model::config, data and datasets"
        );
    }
}

#[test]
fn edges_are_found_in_every_spelling() {
    let text = "use crate::error::Result;\nuse crate::{data, model::{a, b}};\n// crate::cli\nlet x = crate::train::y(); crate::bail!(\"\");";
    assert_eq!(edges(&code(text)), ["error", "data", "model", "train", "error"]);
    assert!(
        allowed("model", "backend") && !allowed("model", "cpu") && !allowed("data", "cpu") && !allowed("comm", "train")
    );
}
