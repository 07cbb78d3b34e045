//! kernels/README.md against the kernels: every file and entry stands in its table, with who calls it, its test and its bench; what ptxas says of
//! each is what the table of registers has (`gate` asks).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use ringtune::cuda;

/// Rows of the table with this heading, as cells; words in backticks are names.
fn table(heading: &str) -> Vec<Vec<String>> {
    let text = fs::read_to_string(crate::skip::root().join("kernels/README.md")).unwrap();
    let mut lines = text.lines().skip_while(|line| *line != heading);
    assert!(lines.next().is_some(), "kernels/README.md has no table {heading}");
    let rows = lines.skip(1).take_while(|line| line.starts_with('|'));
    rows.map(|row| row.trim_matches('|').split('|').map(|cell| cell.trim().to_string()).collect()).collect()
}

/// The names of a cell.
fn names(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

/// Kernels of files that are compiled by themselves.
fn kernels() -> Vec<Vec<String>> {
    let rows = table("| file | entries | formula | called by | test | bench |");
    rows.into_iter().filter(|row| !row[0].contains("common/")).collect()
}

/// The checkout, where there is one: a machine with a GPU has the tests alone.
fn here() -> bool {
    crate::skip::root().join("kernels/README.md").is_file()
}

#[test]
fn every_kernel_stands_in_the_table() {
    if !here() {
        return;
    }
    let mut expected = BTreeSet::new();
    for cc in [80, 86, 89, 90, 100, 120] {
        for (kernel, _) in cuda::configurations(cc) {
            let file = kernel.source.name.strip_prefix("kernels/").unwrap();
            expected.insert((file.to_string(), kernel.entry.to_string()));
        }
    }
    let (mut files, mut entries) = (BTreeSet::new(), BTreeSet::new());
    let rows = kernels();
    for row in &rows {
        let (of, list) = (names(&row[0]), names(&row[1]));
        files.extend(of.iter().map(|file| file.to_string()));
        entries.extend(list.iter().map(|entry| entry.to_string()));
        for file in of {
            let own: BTreeSet<&str> = expected.iter().filter(|(f, _)| f == file).map(|(_, e)| e.as_str()).collect();
            assert!(!own.is_empty() && own.iter().all(|entry| list.contains(entry)), "{file}: {own:?}, found {list:?}");
        }
        assert!(row[2].len() > 20, "{}: a formula, found {:?}", row[0], row[2]);
    }
    assert_eq!(entries, expected.iter().map(|(_, entry)| entry.clone()).collect());
    // Every file there is, by itself or in what all include.
    let root = crate::skip::root();
    let of = |folder: &str| -> BTreeSet<String> {
        let all = fs::read_dir(root.join(folder)).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        all.filter(|name| name.ends_with(".cu") || name.ends_with(".cuh")).collect()
    };
    assert_eq!(files, of("kernels"));
    let text = fs::read_to_string(root.join("kernels/README.md")).unwrap();
    for name in of("kernels/common") {
        let stem = name.strip_suffix(".cuh").unwrap();
        let words = |c: char| !c.is_ascii_alphanumeric() && c != '_';
        let all = text.lines().filter(|line| line.contains("common/")).flat_map(|line| line.split(words));
        assert!(all.into_iter().any(|word| word == stem), "common/{name} does not stand in kernels/README.md");
    }
}

#[test]
fn callers_tests_and_benches_of_the_table_exist() {
    if !here() {
        return;
    }
    let root = crate::skip::root();
    let text = |path: &Path| fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let calls = text(&root.join("tests/cuda/main.rs"));
    let mut cases = String::new();
    for entry in fs::read_dir(root.join("src/commands/bench")).unwrap() {
        cases += &text(&entry.unwrap().path());
    }
    for row in kernels() {
        for file in names(&row[0]) {
            let caller = names(&row[3]).into_iter().find(|caller| {
                let source = text(&root.join(caller));
                source.contains(&format!("source!(\"kernels/{file}\")"))
                    || names(&row[1]).iter().any(|entry| source.contains(&format!("{entry}\"")))
            });
            assert!(caller.is_some() || !names(&row[3]).is_empty(), "{file}: nobody of {} has its source", row[3]);
            let header = text(&root.join("kernels").join(file));
            for word in ["\n// Launch", "\n// Cost", "\n// Numerics", "\n// Test: "] {
                assert!(header.contains(word), "{file}: its header has no line {word}");
            }
            let tests = header.lines().find_map(|line| line.strip_prefix("// Test: ")).unwrap();
            let files =
                tests.split([' ', ',', ';']).filter(|word| word.contains(".rs")).map(|w| w.trim_end_matches('.'));
            let mut folder = "tests/common";
            for file in files {
                let path = if let Some((of, _)) = file.rsplit_once('/') {
                    folder = if of == "tests/cuda" { "tests/cuda" } else { "tests/common" };
                    root.join(file)
                } else {
                    root.join(folder).join(file)
                };
                assert!(path.is_file(), "{}: its header names {file}, which is not there", row[0]);
            }
        }
        let tests = names(&row[4]);
        assert!(!tests.is_empty(), "{}: no test", row[0]);
        for test in tests {
            let module = test.rsplit('/').next().unwrap().trim_end_matches(".rs");
            assert!(calls.contains(&format!("mod {module};")), "{}: no module {module} in tests/cuda/main.rs", row[0]);
        }
        let benches = names(&row[5]);
        assert!(!benches.is_empty(), "{}: no bench", row[0]);
        for bench in benches {
            let there = cases.contains(&format!("\"{bench}\"")) || cases.contains(&format!("\"{bench} "));
            assert!(there, "{}: `ringtune bench` has no case of {bench}", row[0]);
        }
    }
}

/// Registers and shared memory of an entry over all its configurations, as the table has them.
pub fn cell(registers: &[usize], shared: &[usize]) -> String {
    let span = |all: &[usize], word: fn(usize) -> String| {
        let (least, most) = (all.iter().min().unwrap(), all.iter().max().unwrap());
        if least == most { word(*most) } else { format!("{} to {}", word(*least), word(*most)) }
    };
    let bytes = |n: usize| match n {
        n if n < 1024 => format!("{n} B"),
        n => format!("{} KiB", n.div_ceil(1024)),
    };
    format!("{}; {}", span(registers, |n| n.to_string()), span(shared, bytes))
}

/// Architectures that the table of registers has.
pub const COLUMNS: [&str; 3] = ["sm_80", "sm_90a", "sm_120"];

/// Holds the column of an architecture in the table to what ptxas says of every entry.
pub fn hold_figures(target: &str, found: &BTreeMap<String, String>) {
    let heading = "| entry | sm_80 | sm_90a | sm_120 |";
    let column = heading.split('|').position(|name| name.trim() == target).expect("a column") - 1;
    if !here() {
        return;
    }
    let rows = table(heading);
    let said: BTreeMap<String, &str> =
        rows.iter().map(|row| (names(&row[0])[0].to_string(), row[column].as_str())).collect();
    let wrong: Vec<String> = found
        .iter()
        .filter(|(entry, cell)| said.get(*entry) != Some(&cell.as_str()))
        .map(|(entry, cell)| format!("{entry}: {cell}, in kernels/README.md {:?}", said.get(entry)))
        .collect();
    assert!(wrong.is_empty(), "{target}:\n{}", wrong.join("\n"));
    for (entry, cell) in said {
        assert!(
            found.contains_key(&entry) || cell == "-",
            "{target}: {entry} is not built, in kernels/README.md {cell}"
        );
    }
}
