//! What is shipped: the tarball of `make dist` starts where nothing else is, and the Dockerfile copies what there is.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::program::{Workplace, repository};
use crate::ringrun_program::ringrun;

fn dist(out: &Path) -> String {
    // Builds ringrun beside the program under test, where it is missing.
    let programs = ringrun().parent().unwrap().to_path_buf();
    let mut script = Command::new(repository().join("scripts/dist.sh"));
    let output = script.arg(out).env("PROGRAMS", programs).env("ARCHS", "").env("SOURCE_DATE_EPOCH", "1700000000");
    let output = output.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{stderr}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_tarball_starts_in_an_empty_environment_and_is_the_same_twice() {
    let w = Workplace::new();
    let said = dist(&w.path("one"));
    dist(&w.path("two"));
    let file = |dir: &str, end: &str| {
        let mut all = fs::read_dir(w.path(dir)).unwrap().map(|e| e.unwrap().path());
        all.find(|p| p.to_str().unwrap().ends_with(end)).unwrap_or_else(|| panic!("no *{end} in {dir}"))
    };
    let archive = file("one", ".tar.gz");
    let name = archive.file_name().unwrap().to_str().unwrap().strip_suffix(".tar.gz").unwrap().to_string();
    assert!(name.starts_with(&format!("ringtune-{}-", env!("CARGO_PKG_VERSION"))), "{name}");
    assert!(fs::read(&archive).unwrap() == fs::read(file("two", ".tar.gz")).unwrap(), "two packings differ");
    assert!(said.contains("; glibc 2.") && said.contains(" or newer"), "{said}");

    let run = |program: &str, words: &[&str]| {
        let output = Command::new(program).args(words).current_dir(w.path("one")).output().unwrap();
        assert!(output.status.success(), "{program} {words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    run("sha256sum", &["-c", &format!("{name}.tar.gz.sha256")]);
    let listed = run("tar", &["--numeric-owner", "-tvzf", &format!("{name}.tar.gz")]);
    assert!(listed.lines().all(|l| l.contains(" 0/0 ") && l.contains(" 2023-11-14 ")), "{listed}");
    run("tar", &["-xzf", &format!("{name}.tar.gz")]);
    let at = |path: &str| w.path("one").join(&name).join(path);
    for path in [
        "INSTALL.txt",
        "README.md",
        "completions/ringtune",
        "completions/_ringrun",
        "completions/ringrun.fish",
        "share/man/man1/ringtune-sft.1",
        "share/man/man1/ringrun.1",
        "licences/LICENSE-MIT",
        "licences/LICENSE-APACHE",
        "configs/tiny.json",
    ] {
        assert!(fs::metadata(at(path)).is_ok_and(|m| m.len() > 0), "{path} is missing in {listed}");
    }
    let crates = fs::read_to_string(at("licences/THIRD-PARTY.txt")).unwrap();
    for part in ["\nclap v", "\nsafetensors v", "Apache License", "Permission is hereby granted"] {
        assert!(crates.contains(part), "{part:?} is not in THIRD-PARTY.txt");
    }
    let install = fs::read_to_string(at("INSTALL.txt")).unwrap();
    assert!(install.contains("glibc 2.") && install.contains("libstdc++.so.6"), "{install}");

    // Nothing of this machine is around it but its system's libraries.
    let alone = |program: &str, words: &[&str]| {
        let output = Command::new(at(program)).args(words).env_clear().current_dir("/").output().unwrap();
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    assert_eq!(alone("bin/ringtune", &["--version"]).trim(), concat!("ringtune ", env!("CARGO_PKG_VERSION")));
    assert!(alone("bin/ringtune", &["templates"]).contains("<|im_start|>"));
    // ringrun finds the program beside it.
    let ranks = alone("bin/ringrun", &["-n", "2", "--oversubscribe", "ringtune", "--version"]);
    assert!(ranks.contains("ringtune "), "{ranks}");
    let stripped = fs::metadata(at("bin/ringrun")).unwrap().len();
    assert!(stripped < fs::metadata(ringrun()).unwrap().len(), "stripped");
}

/// The instructions of the Dockerfile, comments left out, lines joined.
fn instructions() -> Vec<(String, String)> {
    let text = fs::read_to_string(repository().join("Dockerfile")).unwrap().replace("\\\n", " ");
    let lines = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
    lines.map(|l| l.split_once(' ').map(|(a, b)| (a.to_string(), b.trim().to_string())).unwrap()).collect()
}

#[test]
fn the_dockerfile_has_two_targets_and_copies_what_there_is() {
    let ignored: Vec<String> = fs::read_to_string(repository().join(".dockerignore"))
        .unwrap()
        .lines()
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
        .map(String::from)
        .collect();
    let is_left_out = |path: &str| ignored.iter().any(|i| path == i || path.starts_with(&format!("{i}/")));
    let mut stages: Vec<String> = Vec::new();
    let mut packages = BTreeSet::new();
    for (instruction, words) in instructions() {
        let words: Vec<&str> = words.split_whitespace().collect();
        match instruction.as_str() {
            "FROM" => {
                assert!(words.len() == 3 && words[1] == "AS" && words[0].contains(':'), "{words:?}");
                stages.push(words[2].into());
            }
            "COPY" => match words[0].strip_prefix("--from=") {
                Some(stage) => assert!(stages[..stages.len() - 1].iter().any(|s| s == stage), "{words:?}"),
                None => {
                    for path in words[..words.len() - 1].iter().filter(|p| **p != ".") {
                        assert!(repository().join(path).exists() && !is_left_out(path), "COPY {path}");
                    }
                }
            },
            "RUN" if words[0] == "apt-get" => {
                let from = words.iter().position(|w| *w == "--no-install-recommends").unwrap() + 1;
                packages.extend(words[from..].iter().take_while(|w| **w != "&&").map(|w| w.to_string()));
            }
            "RUN" => {
                let script = words.join(" ");
                assert!(Command::new("sh").args(["-n", "-c", &script]).status().unwrap().success(), "{script}");
                assert!(script.contains("cargo build --release --locked"), "{script}");
            }
            "WORKDIR" | "ENV" | "ENTRYPOINT" | "CMD" => {}
            other => panic!("{other}: no instruction of this file"),
        }
    }
    assert_eq!(stages, ["build", "cpu", "cuda"]);
    // What the build needs is what scripts/bootstrap.sh installs.
    let bootstrap = fs::read_to_string(repository().join("scripts/bootstrap.sh")).unwrap();
    for package in packages.iter().filter(|p| !["ca-certificates", "libstdc++6"].contains(&p.as_str())) {
        assert!(bootstrap.lines().any(|l| l.starts_with("need ") && l.ends_with(&format!(" {package}"))), "{package}");
    }
    // What the sources have built in reaches the build.
    for path in ["Cargo.toml", "Cargo.lock", "src", "kernels", "configs", "launcher", "tests/it/main.rs", "tests/vgpu"]
    {
        assert!(repository().join(path).exists() && !is_left_out(path), "{path} is left out");
    }
}

/// What crates.io takes is 10 MB, packed; not even unpacked is it as much.
#[test]
fn the_package_is_small_and_has_what_the_build_reads() {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["package", "--list", "--allow-dirty", "--offline", "--package", "ringtune"]).current_dir(repository());
    let output = cargo.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let listed = String::from_utf8(output.stdout).unwrap();
    let size = |path: &str| fs::metadata(repository().join(path)).map_or(0, |m| m.len());
    let total: u64 = listed.lines().map(size).sum();
    assert!((1 << 20..10_000_000).contains(&total), "{total} bytes:\n{listed}");
    for path in ["src/main.rs", "kernels/fold.cu", "configs/tiny.json", "LICENSE-MIT", "README.md"] {
        assert!(listed.lines().any(|l| l == path), "{path} is missing in\n{listed}");
    }
}
