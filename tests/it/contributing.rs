//! CONTRIBUTING.md against the tree: its table of environment variables has each of them, and none that nobody reads.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::program::repository;

/// Names without a prefix of ours that the program or a script reads.
const FOREIGN: [&str; 51] = [
    "ALL_PROXY",
    "ARCHS",
    "BUDGET",
    "CARGO_TARGET_DIR",
    "CLICOLOR",
    "CLICOLOR_FORCE",
    "COLUMNS",
    "CONDA_PREFIX",
    "CUDA_HOME",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_PATH",
    "CURL_CA_BUNDLE",
    "FORCE_COLOR",
    "HF_ENDPOINT",
    "HF_TOKEN",
    "HOME",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "LD_LIBRARY_PATH",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_RUN_ID",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MPI",
    "MUTANTS_DIR",
    "NCCL_NVLS_ENABLE",
    "NCCL_SOCKET_IFNAME",
    "NO_COLOR",
    "NO_PROXY",
    "PROGRAMS",
    "RANDOM_CASES",
    "RANK",
    "REQUESTS_CA_BUNDLE",
    "SEED",
    "SOURCE_DATE_EPOCH",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
    "STEPS",
    "TERM",
    "TEST_LIMIT",
    "TEST_THREADS",
    "TRAIN_LIMIT",
    "VIRTUAL_ENV",
    "WORLD_SIZE",
    "XDG_CACHE_HOME",
];

fn ours(name: &str) -> bool {
    ["RINGTUNE_", "VGPU_", "HOSTILE_"].iter().any(|p| name.len() > p.len() && name.starts_with(p))
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
}

/// Files with one of these extensions below `dir`, build outputs left out.
fn files(dir: &Path, extensions: &[&str], out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
        if entry.is_dir() {
            if entry.file_name().is_none_or(|n| n != "target") {
                files(&entry, extensions, out);
            }
        } else if entry.extension().is_some_and(|e| extensions.iter().any(|x| e == *x)) {
            out.push(entry);
        }
    }
}

/// Names that Rust code has as whole strings, and that shell scripts expand or set.
fn named(path: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(path).unwrap();
    let wanted = |name: &&str| is_name(name) && (ours(name) || FOREIGN.contains(name));
    if path.extension().is_some_and(|e| e == "rs") {
        return text.split('"').filter(wanted).map(String::from).collect();
    }
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(wanted).map(String::from).collect()
}

#[test]
fn every_environment_variable_stands_in_the_table() {
    let root = repository();
    let mut sources = vec![root.join(".ci/run")];
    for dir in ["src", "launcher", "tests", "benches", "fuzz", "scripts"] {
        files(&root.join(dir), &["rs", "sh"], &mut sources);
    }
    // This file names the foreign ones itself.
    sources.retain(|p| !p.ends_with("it/contributing.rs"));
    let found: BTreeSet<String> = sources.iter().flat_map(|p| named(p)).collect();
    assert!(found.len() > 30, "only {found:?}");

    let text = fs::read_to_string(root.join("CONTRIBUTING.md")).unwrap();
    let section = text.split("## Environment variables").nth(1).expect("CONTRIBUTING.md has the section");
    let section = section.split("\n## ").next().unwrap();
    // The names stand in the first column.
    let rows = section.lines().filter_map(|l| l.strip_prefix("| ")?.split(" | ").next());
    let table: BTreeSet<String> =
        rows.flat_map(|cell| cell.split('`')).filter(|t| is_name(t)).map(String::from).collect();

    let missing: Vec<_> = found.difference(&table).collect();
    let stale: Vec<_> = table.difference(&found).collect();
    assert!(missing.is_empty(), "read by the code, not in CONTRIBUTING.md: {missing:?}");
    assert!(stale.is_empty(), "in CONTRIBUTING.md, read by nothing: {stale:?}");
}
