//! The floors of ARCHITECTURE.md: every path in src is read, and an upward edge or a circle of files fails.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The modules of each floor, as the table of ARCHITECTURE.md has them: rows `| 2 | `cpu`, `cuda` | what |`.
fn floors() -> Vec<Vec<String>> {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("ARCHITECTURE.md")).unwrap();
    let section = page.split("## Floors").nth(1).expect("ARCHITECTURE.md has the section");
    let rows = section.split("\n## ").next().unwrap().lines().filter_map(|line| line.strip_prefix("| "));
    let rows: Vec<Vec<&str>> = rows.map(|row| row.split(" | ").collect()).collect();
    let floors: Vec<_> = rows.iter().filter(|row| row[0].parse::<usize>().is_ok()).collect();
    assert!(floors.iter().enumerate().all(|(i, row)| row[0] == i.to_string()), "floors count from 0: {floors:?}");
    let names = |row: &&Vec<&str>| row[1].split('`').skip(1).step_by(2).map(String::from).collect();
    floors.iter().map(names).collect()
}

fn floor(module: &str, floors: &[Vec<String>]) -> Option<usize> {
    floors.iter().position(|f| f.iter().any(|m| m == module))
}

/// Modules of floor 2 and 3 do not know each other; those of another floor may, as long as no circle comes of it. Backends are
/// chosen by commands alone: what lies between works over any of them, but for the collectives of CUDA.
fn allowed(from: &str, to: &str, floors: &[Vec<String>]) -> bool {
    let (Some(a), Some(b)) = (floor(from, floors), floor(to, floors)) else {
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

/// What `code` names through `crate::` or `super::`, a path for each leaf of a group: `use crate::{a, b::{c, d}}` is
/// `crate::a`, `crate::b::c`, `crate::b::d`.
fn paths(code: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for root in ["crate::", "super::"] {
        for (i, _) in code.match_indices(root) {
            // `$crate`, `my_crate`, and a `super` that follows another one and was read with it.
            if !code[..i].ends_with(['_', '$', ':']) && !code[..i].ends_with(char::is_alphanumeric) {
                tree(&code[i..], &[], &mut found);
            }
        }
    }
    found
}

/// Reads one branch of a use tree, adds its leaves below `parents` to `found`, and returns what follows it.
fn tree<'a>(text: &'a str, parents: &[String], found: &mut Vec<Vec<String>>) -> &'a str {
    let mut path = parents.to_vec();
    let mut rest = text.trim_start();
    loop {
        if let Some(group) = rest.strip_prefix('{') {
            rest = group;
            while !rest.trim_start().starts_with('}') && !rest.trim_start().is_empty() {
                rest = tree(rest, &path, found).trim_start();
                rest = rest.strip_prefix(',').unwrap_or(rest);
            }
            let rest = rest.trim_start();
            return rest.strip_prefix('}').unwrap_or(rest);
        }
        let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        path.push(rest[..end].to_string());
        rest = &rest[end..];
        match rest.strip_prefix("::") {
            Some(more) => rest = more,
            None => break,
        }
    }
    found.push(path);
    // ` as name`, up to the comma or the end of the group.
    if parents.is_empty() { rest } else { &rest[rest.find([',', '}']).unwrap_or(rest.len())..] }
}

/// The top-level module of a path that begins with `crate`; `crate::bail!` and `crate::ensure!` are macros of `error`.
fn top(path: &[String]) -> Option<&str> {
    match path {
        [root, name, ..] if root == "crate" => Some(match name.as_str() {
            "bail" | "ensure" => "error",
            other => other,
        }),
        _ => None,
    }
}

/// `src/a/b.rs` and `src/a/b/mod.rs` are the module `["a", "b"]`.
fn module(relative: &Path) -> Vec<String> {
    let mut names: Vec<String> = relative.with_extension("").iter().map(|n| n.to_str().unwrap().to_string()).collect();
    if names.last().is_some_and(|n| n == "mod") {
        names.pop();
    }
    names
}

/// Every module with what it hands on from its children: for `pub use files::{Metrics, x as y}`, `Metrics` and `x`.
type Modules = BTreeMap<Vec<String>, Vec<Vec<String>>>;

/// The paths of `pub use child::Name` in a module's code.
fn handed_on(code: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for (i, begin) in code.match_indices("pub use ") {
        let path = code[i + begin.len()..].trim_start_matches("self::");
        if !path.starts_with("crate::") && !path.starts_with("super::") {
            tree(path, &[], &mut found);
        }
    }
    found
}

/// The file among `modules` that a path named in the file `from` leads to: the longest module that begins it, or the child
/// from which that module hands the name on.
fn target<'a>(path: &[String], from: &[String], modules: &'a Modules) -> Option<&'a Vec<String>> {
    let supers = path.iter().take_while(|s| *s == "super").count();
    let mut whole = match supers {
        0 => path[1..].to_vec(),
        n => [&from[..from.len().checked_sub(n)?], &path[n..]].concat(),
    };
    loop {
        let (module, names) = modules.iter().filter(|(m, _)| whole.starts_with(m)).max_by_key(|(m, _)| m.len())?;
        let name = whole.get(module.len());
        let Some(child) = names.iter().find(|p| p.len() > 1 && p.last() == name) else {
            return Some(module);
        };
        whole = [module, child].into_iter().flatten().cloned().collect();
    }
}

/// A circle in a graph of files, as the files along it; `None` where there is none.
fn circle(edges: &BTreeMap<Vec<String>, BTreeSet<Vec<String>>>) -> Option<Vec<String>> {
    fn visit<'a>(
        at: &'a Vec<String>,
        edges: &'a BTreeMap<Vec<String>, BTreeSet<Vec<String>>>,
        way: &mut Vec<&'a Vec<String>>,
        done: &mut BTreeSet<&'a Vec<String>>,
    ) -> Option<Vec<String>> {
        if let Some(i) = way.iter().position(|m| *m == at) {
            let around = way[i..].iter().copied().chain([at]);
            return Some(around.map(|m| m.join("::")).collect());
        }
        if !done.insert(at) {
            return None;
        }
        way.push(at);
        let found = edges.get(at).into_iter().flatten().find_map(|to| visit(to, edges, way, done));
        way.pop();
        found
    }
    let mut done = BTreeSet::new();
    edges.keys().find_map(|from| visit(from, edges, &mut Vec::new(), &mut done))
}

/// Every file of src as its module, with its code.
fn sources() -> Vec<(Vec<String>, String)> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    rust_files(&src, &mut files);
    assert!(files.len() > 20, "src was not read");
    let read = |file: PathBuf| {
        let name = module(file.strip_prefix(&src).unwrap());
        (name, code(&fs::read_to_string(&file).unwrap()))
    };
    files.into_iter().map(read).filter(|(name, _)| name != &["main"] && name != &["lib"]).collect()
}

#[test]
fn no_module_imports_from_a_higher_floor() {
    let (mut wrong, mut n_edges, floors) = (Vec::new(), 0, floors());
    assert!(floors.len() > 5, "the table of floors was not read: {floors:?}");
    let (mut stood_on, sources) = (BTreeSet::new(), sources());
    for (file, code) in &sources {
        let (module, at) = (file[0].as_str(), file.join("::"));
        stood_on.insert(module);
        if floor(module, &floors).is_none() {
            wrong.push(format!("{at}: {module} stands on no floor"));
        }
        for path in paths(code) {
            let Some(to) = top(&path) else { continue };
            n_edges += 1;
            if !allowed(module, to, &floors) {
                wrong.push(format!("{at}: {module} imports {to}"));
            }
        }
    }
    wrong.extend(
        floors.iter().flatten().filter(|m| !stood_on.contains(m.as_str())).map(|m| format!("{m}: no such module")),
    );
    assert!(n_edges > 30, "only {n_edges} edges were seen");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Two files that need each other are one idea in two rooms, or hide a third. A module and its children are one room.
#[test]
fn no_files_import_each_other_in_a_circle() {
    let sources = sources();
    let modules: Modules = sources.iter().map(|(m, code)| (m.clone(), handed_on(code))).collect();
    let mut edges: BTreeMap<Vec<String>, BTreeSet<Vec<String>>> = BTreeMap::new();
    for (from, code) in &sources {
        let to = paths(code).into_iter().filter_map(|path| target(&path, from, &modules).cloned());
        let to = to.filter(|to| !to.starts_with(from) && !from.starts_with(to));
        edges.insert(from.clone(), to.collect());
    }
    assert!(edges.values().map(BTreeSet::len).sum::<usize>() > 300, "edges were not seen");
    if let Some(files) = circle(&edges) {
        panic!("a circle of files: {}", files.join(" -> "));
    }
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
        let home = ["settings/", "checkpoint/", "hf/", "data/", "datasets/", "tables/", "model/config.rs"]
            .iter()
            .any(|h| relative.starts_with(h));
        assert!(
            home || !derives,
            "src/{relative}: serde types belong to settings, checkpoint, hf, model::config, data, datasets and tables"
        );
    }
}

#[test]
fn nothing_prints_but_say() {
    let ways = ["print!(", "println!(", "eprint!(", "eprintln!(", "dbg!(", "io::stdout", "io::stderr"];
    let mut wrong = Vec::new();
    for (file, code) in sources().into_iter().filter(|(file, _)| file != &["say"]) {
        wrong.extend(ways.iter().filter(|w| code.contains(**w)).map(|w| format!("{}: {w}", file.join("::"))));
    }
    assert!(wrong.is_empty(), "only src/say.rs prints:\n{}", wrong.join("\n"));
}

/// ringrun is small and needs neither model nor device to build; of the program only what joins ranks knows it.
#[test]
fn the_launcher_stands_apart() {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("launcher/Cargo.toml")).unwrap();
    let needs = text.split("[dependencies]").nth(1).unwrap().split("\n[").next().unwrap();
    let needs: Vec<&str> = needs.lines().filter_map(|l| Some(l.split_once(" = ")?.0)).collect();
    assert_eq!(needs, ["blake3", "clap", "libc", "serde_json", "signal-hook"]);
    let knows = |(_, code): &&(Vec<String>, String)| code.contains("launcher::");
    let who: BTreeSet<String> = sources().iter().filter(knows).map(|(file, _)| file[0].clone()).collect();
    assert_eq!(who, BTreeSet::from(["comm".to_string()]));
}

#[test]
fn edges_are_found_in_every_spelling() {
    let text = "use crate::error::Result;\nuse crate::{data, model::{a as x, b::{self, C}}};\n// crate::cli\n\
                let x = crate::train::y(); crate::bail!(\"\"); use super::super::q::R; $crate::no; my_crate::no;";
    let found: Vec<String> = paths(&code(text)).iter().map(|p| p.join("::")).collect();
    let want = "crate::error::Result crate::data crate::model::a crate::model::b::self crate::model::b::C crate::train::y \
                crate::bail super::super::q::R";
    assert_eq!(found, want.split_whitespace().collect::<Vec<_>>());
    assert_eq!(top(&paths("crate::bail!()")[0]), Some("error"));
    let floors = floors();
    let may = |from, to| allowed(from, to, &floors);
    assert!(may("model", "backend") && !may("model", "cpu") && !may("data", "cpu") && !may("comm", "train"));
}

#[test]
fn circles_are_found_and_named() {
    let m = |name: &str| name.split("::").map(String::from).collect::<Vec<_>>();
    let handed = handed_on("pub use x::{Made as Other, self};\npub use self::y::Y;\npub use crate::b::B;");
    assert_eq!(handed.iter().map(|p| p.join("::")).collect::<Vec<_>>(), ["x::Made", "x::self", "y::Y"]);
    let modules: Modules =
        [(m("a"), handed), (m("a::x"), vec![]), (m("a::y"), vec![]), (m("b"), vec![])].into_iter().collect();
    let to = |path: &str, from: &str| target(&m(path), &m(from), &modules).map(|m| m.join("::"));
    assert_eq!(to("crate::a::x::Thing", "b").as_deref(), Some("a::x"));
    assert_eq!(to("crate::a::Thing", "b").as_deref(), Some("a"));
    assert_eq!(to("crate::a::Made", "b").as_deref(), Some("a::x"));
    assert_eq!(to("super::Y::new", "a::x").as_deref(), Some("a::y"));
    assert_eq!(to("super::y::f", "a::x").as_deref(), Some("a::y"));
    assert_eq!(to("super::super::b", "a::x").as_deref(), Some("b"));
    let edges = |list: &[(&str, &str)]| {
        let mut all: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
        list.iter().for_each(|(from, to)| {
            all.entry(m(from)).or_default().insert(m(to));
        });
        all
    };
    assert_eq!(circle(&edges(&[("a::x", "b"), ("b", "a::y"), ("a::x", "a::y")])), None);
    let found = circle(&edges(&[("a::x", "b"), ("b", "a::y"), ("a::y", "a::x")]));
    assert_eq!(found.unwrap(), ["a::x", "b", "a::y", "a::x"]);
}
