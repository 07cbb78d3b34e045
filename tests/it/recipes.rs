//! docs/recipes.md: every command is one that the programs understand, and what it would train is checked on a small model.

use std::ffi::OsString;
use std::fs;

use crate::program::{Workplace, code_blocks, first_rows, repository};

/// The commands of the page, a line each.
fn commands() -> Vec<String> {
    let text = fs::read_to_string(repository().join("docs/recipes.md")).unwrap();
    let lines = code_blocks(&text, "bash").join("\n").replace("\\\n", " ");
    lines.lines().map(|l| l.trim().to_string()).filter(|l| !l.is_empty()).collect()
}

/// The words of a line; the page quotes nothing but prompts.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    for (i, part) in line.split('"').enumerate() {
        match i % 2 {
            0 => words.extend(part.split_whitespace().map(String::from)),
            _ => words.push(part.into()),
        }
    }
    words
}

/// The words from `ringtune` on, after those of ringrun, which it has to understand.
fn of_ringtune(line: &str) -> Vec<String> {
    let words = words(line);
    if words[0] == "ringrun" {
        let all = words.iter().map(OsString::from);
        let options = launcher::options::try_parse(all).unwrap_or_else(|e| panic!("{line}\n{e}"));
        return options.program.iter().map(|w| w.to_str().unwrap().to_string()).collect();
    }
    words
}

#[test]
fn every_command_is_understood() {
    let commands = commands();
    assert!(commands.len() >= 14, "{commands:#?}");
    for line in &commands {
        let words = of_ringtune(line);
        assert_eq!(words[0], "ringtune", "{line}");
        ringtune::cli::command().try_get_matches_from(&words).unwrap_or_else(|e| panic!("{line}\n{e}"));
    }
}

/// What `check` says of each training, on a small model and few rows in the places of those that are named.
#[test]
fn every_training_would_start() {
    let w = Workplace::new();
    for file in ["config.json", "model.safetensors"] {
        w.copy(&format!("tests/data/model/tiny-llama-tied/{file}"), &format!("model/{file}"));
    }
    w.copy("tests/data/tokenizer/spm4k.model", "spm.model");
    w.write("data.jsonl", first_rows("data/demo/chat.jsonl", 400));
    w.copy("data/demo/pretrain_valid.txt", "data/demo/pretrain_train.txt");
    let mut checked = 0;
    for line in commands() {
        let words = of_ringtune(&line);
        let Some(command @ ("sft" | "pretrain" | "check")) = words.get(1).map(String::as_str) else { continue };
        let mut flags: Vec<&str> = vec!["check"];
        flags.extend((command == "pretrain").then_some("--pretrain"));
        let (mut rest, mut tokenizer) = (words[2..].iter().map(String::as_str), false);
        while let Some(word) = rest.next() {
            flags.push(word);
            let other = match word {
                "--model-path" => "model",
                "--tokenizer-path" => "spm.model",
                "--dataset-paths" if command != "pretrain" => "data.jsonl",
                // What the small model reaches.
                "--max-seq-len" => "128",
                "--prompt-template" => "chatml",
                "--device-memory" => "80GB",
                _ => continue,
            };
            tokenizer |= word == "--tokenizer-path";
            rest.next();
            flags.push(other);
        }
        if !tokenizer {
            flags.extend(["--tokenizer-path", "spm.model"]);
        }
        let ranks = ranks_of(&line);
        flags.extend(["--ranks", &ranks, "--device", "cpu"]);
        let outcome = w.run(&flags);
        assert_eq!(outcome.code, Some(0), "{line}\n{flags:?}\n{}{}", outcome.stdout, outcome.stderr);
        checked += 1;
    }
    assert!(checked >= 9, "only {checked} trainings were found");
}

/// How many ranks a line starts.
fn ranks_of(line: &str) -> String {
    if !line.starts_with("ringrun") {
        return "1".into();
    }
    let options = launcher::options::try_parse(words(line).iter().map(OsString::from)).unwrap();
    (options.ranks * options.node.map_or(1, |node| node.count)).to_string()
}
