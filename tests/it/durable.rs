//! What a crash of the machine may not take: every file that a command reports as written is synced before it gets its name, and so
//! is the folder that the name stands in. The program's own calls are read, through a library that is loaded into it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::program::{Workplace, first_rows};
use crate::runs::MODEL;

/// One call, in the order of the calls.
#[derive(Debug, PartialEq)]
enum Call {
    Sync(PathBuf),
    Rename(PathBuf, PathBuf),
    Mkdir(PathBuf),
}

fn calls(log: &str) -> Vec<Call> {
    let call = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["sync", path] => Call::Sync(path.into()),
            ["rename", from, to] => Call::Rename(from.into(), to.into()),
            ["mkdir", path] => Call::Mkdir(path.into()),
            _ => panic!("{line}: not a call; the paths of this test have no blanks"),
        }
    };
    log.lines().map(call).collect()
}

/// What would be lost, call by call: each rule holds for all folders below `root`.
fn unsafe_calls(calls: &[Call], root: &Path) -> Vec<String> {
    let mut wrong = BTreeSet::new();
    fn synced(calls: &[Call], path: &Path) -> bool {
        calls.iter().any(|c| matches!(c, Call::Sync(p) if p == path))
    }
    // Under its name, or under the temporary one that it had before.
    let written = |calls: &[Call], path: &Path| {
        synced(calls, path)
            || (0..calls.len())
                .any(|i| matches!(&calls[i], Call::Rename(from, to) if to == path && synced(&calls[..i], from)))
    };
    for (i, call) in calls.iter().enumerate() {
        let (before, after) = (&calls[..i], &calls[i + 1..]);
        match call {
            Call::Rename(from, to) if to.starts_with(root) => {
                if !synced(after, to.parent().unwrap()) {
                    wrong.insert(format!("the name of {} is never synced", to.display()));
                }
                // What an earlier run synced is only given another name here; what is gone again needs nothing.
                let made = before.contains(&Call::Mkdir(from.clone()));
                if !to.exists() || (to.is_dir() && !made) {
                    continue;
                }
                if !synced(before, from) {
                    wrong.insert(format!("{} gets its name before its content is synced", to.display()));
                }
                // A folder: each file in it, under the name it had then.
                if to.is_dir() {
                    for entry in walk(to) {
                        let was = from.join(entry.strip_prefix(to).unwrap());
                        if !written(before, &was) {
                            wrong.insert(format!("{} is not synced before its folder has its name", entry.display()));
                        }
                    }
                }
            }
            Call::Mkdir(path) if path.starts_with(root) && path.exists() && !synced(after, path.parent().unwrap()) => {
                wrong.insert(format!("the new folder {} is never synced", path.display()));
            }
            _ => {}
        }
    }
    // A file without a rename would be written in place: a crash could leave half of it.
    let named: BTreeSet<&PathBuf> =
        calls.iter().filter_map(|c| if let Call::Rename(_, to) = c { Some(to) } else { None }).collect();
    for file in walk(root) {
        let whole = file.ancestors().take_while(|p| p.starts_with(root)).any(|p| named.contains(&p.to_path_buf()));
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        // Logs grow line by line; pictures are drawn from them.
        let may = ["metrics.jsonl", ".lock", "loss.svg", "loss.png", "loss-dark.png"].contains(&&*name);
        if !(whole || may || name.starts_with("events.out.tfevents")) {
            wrong.insert(format!("{} is written in place", file.display()));
        }
    }
    wrong.into_iter().collect()
}

/// All files below a folder.
fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(walk(&path)) } else { files.push(path) }
    }
    files
}

/// Runs lines of shell with the library loaded, and gives the calls of `ringtune`.
fn traced(w: &Workplace, line: &str) -> Vec<Call> {
    let library = w.path("sync_log.so");
    if !library.exists() {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/sync_log.c");
        let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(source).arg("-ldl").status();
        assert!(built.unwrap().success(), "cc cannot build the library");
    }
    let log = w.path("calls");
    let _ = std::fs::remove_file(&log);
    let outcome = w.shell(&format!("SYNC_LOG={} LD_PRELOAD={} ringtune {line}", log.display(), library.display()));
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    calls(&std::fs::read_to_string(log).unwrap())
}

#[test]
fn a_run_syncs_what_it_reports() {
    let w = Workplace::new();
    w.write("rows.jsonl", first_rows("data/demo/chat.jsonl", 40));
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join(MODEL).display().to_string();
    let sft = format!(
        "sft --model_path {model} --dataset_paths rows.jsonl --max_seq_len 64 --lora_r 4 --threads 1 --save_steps 3 \
         --save_total_limit 2 --eval_steps 3 --learning_rate 5e-3 --no-tensorboard --quiet --merge_adapters \
         --output_dir new/deep/out"
    );
    let calls = traced(&w, &format!("{sft} --max_steps 8"));
    assert_eq!(unsafe_calls(&calls, &w.path("new")), Vec::<String>::new());
    // The rules were not held for want of calls.
    let named = |path: &str| calls.iter().any(|c| matches!(c, Call::Rename(_, to) if *to == w.path(path)));
    for path in ["checkpoint-6", "merged", "adapter_model.safetensors", "trainer_state.json", "adapter_config.json"] {
        assert!(named(&format!("new/deep/out/{path}")), "{path}: {calls:?}");
    }
    assert!(calls.contains(&Call::Mkdir(w.path("new/deep"))), "{calls:?}");
    assert_eq!(unsafe_calls(&calls, &w.path("cache")), Vec::<String>::new());

    // Going back: the newer checkpoints are moved aside, and that lasts too.
    let mut all = calls;
    all.extend(traced(&w, &format!("{sft} --max_steps 8 --resume_from_checkpoint new/deep/out/checkpoint-3")));
    assert_eq!(unsafe_calls(&all, &w.path("new")), Vec::<String>::new());
    let aside = w.path("new/deep/out/abandoned-6");
    let moved = all.iter().position(|c| matches!(c, Call::Rename(_, to) if *to == aside));
    // Before anything is written that the next start would look at beside them.
    let next = all[moved.unwrap() + 1..]
        .iter()
        .find(|c| !matches!(c, Call::Rename(_, to) if to.starts_with(aside.parent().unwrap())));
    assert_eq!(next, Some(&Call::Sync(w.path("new/deep/out"))), "{all:?}");

    let line = format!("merge --model-path new/deep/out --base-model {model} --output-dir other/merged");
    let calls = traced(&w, &line);
    assert_eq!(unsafe_calls(&calls, &w.path("other")), Vec::<String>::new());
    assert!(calls.iter().any(|c| matches!(c, Call::Rename(_, to) if *to == w.path("other/merged"))));
}
