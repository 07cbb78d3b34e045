//! Files that are not what their names say, places that cannot be written, and limits of the shell: an answer in words, at once.

use std::os::unix::fs::symlink;

use crate::bad_input::{fails, good};
use crate::program::{Outcome, Workplace};

const SFT: &str = "sft --model_path model --tokenizer_path spm.model --dataset_paths rows.jsonl --max_steps 1 --quiet";

fn run(w: &Workplace, line: &str) -> Outcome {
    w.run(&line.split(' ').collect::<Vec<_>>())
}

#[test]
fn a_file_without_an_end_is_refused() {
    let w = good();
    let device = ["expected a file that can be read again, found a device"];
    fails(&run(&w, &format!("{} --output_dir out", SFT.replace("spm.model", "/dev/zero"))), 1, &device);
    let template = ["--prompt_template", "/dev/zero", "hi"];
    let generate = ["generate", "--model_path", "model", "--tokenizer_path", "spm.model"];
    fails(&w.run(&[&generate[..], &template].concat()), 1, &device);
    fails(&w.run(&["sft", "--config_path", "/dev/zero"]), 1, &device);
    fails(&w.run(&[&generate[..], &["--prompt_file", "/dev/zero"]].concat()), 1, &device);
    fails(&run(&w, "inspect tokens --tokenizer spm.model --strings /dev/zero"), 1, &device);
    // A file as long as what does not end is held to the length of its kind.
    std::fs::File::create(w.path("long.jinja")).unwrap().set_len(5 << 20).unwrap();
    let long = w.run(&[&generate[..], &["--prompt_template", "long.jinja", "hi"]].concat());
    fails(&long, 1, &["prompt template", "long.jinja: longer than 4194304 bytes"]);
}

#[test]
fn what_lies_under_a_models_names_is_said() {
    let w = good();
    let path = w.path("model/model.safetensors");
    std::fs::remove_file(&path).unwrap();
    symlink("../blobs/0123", &path).unwrap();
    fails(
        &run(&w, &format!("{SFT} --output_dir out")),
        1,
        &["model.safetensors: a link to ../blobs/0123, where nothing is; fetch or copy that file"],
    );
    std::fs::remove_file(&path).unwrap();
    symlink("model.safetensors", &path).unwrap();
    fails(&run(&w, &format!("{SFT} --output_dir out")), 1, &["model.safetensors: Too many levels of symbolic links"]);
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    fails(
        &run(&w, &format!("{SFT} --output_dir out")),
        1,
        &["model.safetensors: expected a file that can be read again, found a folder"],
    );
    // The tokenizer beside the model.
    let w = good();
    symlink("gone", w.path("model/tokenizer.model")).unwrap();
    fails(
        &w.run(&["generate", "--model_path", "model", "hi"]),
        1,
        &["model/tokenizer.model: a link to gone, where nothing is"],
    );
}

#[test]
fn an_output_folder_that_cannot_be_one_says_what_is_there() {
    let w = good();
    w.write("file", "x");
    symlink("nowhere", w.path("dangling")).unwrap();
    for (dir, found) in [
        ("file", "file is a file"),
        ("file/below", "file is a file"),
        ("dangling", "dangling is a link to nowhere, where nothing is"),
    ] {
        let outcome = run(&w, &format!("{SFT} --output_dir {dir}"));
        fails(&outcome, 1, &[&format!("{dir}: cannot create the folder: "), found, "name another one"]);
    }
}

#[test]
fn check_reads_the_weights() {
    for (value, shown) in [(f32::NAN, "NaN"), (f32::NEG_INFINITY, "-inf")] {
        let w = good();
        crate::runs::change_tensor(&w.path("model/model.safetensors"), "model.norm.weight", |_, bytes| {
            // The upper half of an f32 is a bf16.
            let (width, value) = (bytes.len() / 64, value.to_le_bytes());
            let at = bytes.len() - width;
            bytes[at..].copy_from_slice(&value[4 - width..]);
        });
        let outcome =
            run(&w, "check --model_path model --tokenizer_path spm.model --dataset_paths rows.jsonl --output_dir out");
        assert_eq!(outcome.code, Some(1), "{}", outcome.stdout);
        assert!(
            outcome.stdout.contains("model.norm.weight: value at row 0, column 63 is")
                && outcome.stdout.contains(shown),
            "{}",
            outcome.stdout
        );
    }
}

#[test]
fn texts_of_wide_units_are_named_by_their_width() {
    let w = good();
    for (bytes, name) in [
        (&b"\xff\xfe\0\0{\0\0\0"[..], "UTF-32"),
        (b"\0\0\xfe\xff\0\0\0{", "UTF-32"),
        (b"{\0\0\0\"\0\0\0", "UTF-32"),
        (b"\0\0\0{\0\0\0\"", "UTF-32"),
        (b"\xff\xfe{\0", "UTF-16"),
        (b"\xfe\xff\0{", "UTF-16"),
        (b"{\0\"\0", "UTF-16"),
    ] {
        w.write("wide.jsonl", bytes);
        fails(
            &w.run(&["convert", "wide.jsonl", "to.jsonl"]),
            1,
            &[&format!("{name} text"), &format!("iconv -f {name} -t UTF-8")],
        );
    }
    w.write("config.json", b"\xff\xfe\0\0{\0\0\0");
    fails(&w.run(&["sft", "--config_path", "config.json"]), 1, &["UTF-32"]);
}

#[test]
fn a_message_is_never_as_long_as_what_it_speaks_of() {
    let w = good();
    let long = "k".repeat(500_000);
    for row in [
        format!("{{\"{long}\": 1}}"),
        format!("{{\"{long}\": [1]}}"),
        format!("{{\"{long}\": 1, \"{long}\": 2}}"),
        format!("{{\"prompt\": \"a\", \"response\": \"b\", \"train\": \"{long}\"}}"),
        format!("{{\"prompt\": \"a\", \"response\": \"b\", \"weight\": \"{long}\"}}"),
        format!("{{\"messages\": [{{\"role\": \"{long}\", \"content\": \"a\"}}]}}"),
        format!("{{\"messages\": [{{\"role\": \"user\", \"content\": [{{\"type\": \"{long}\"}}]}}]}}"),
    ] {
        w.write("long.jsonl", &row);
        let outcome = w.run(&["convert", "long.jsonl", "to.jsonl"]);
        fails(&outcome, 1, &["long.jsonl:1"]);
        assert!(outcome.stderr.len() < 2000, "{} bytes: {:.300}", outcome.stderr.len(), outcome.stderr);
    }
    // A key that is not read is named in a line.
    w.write("long.jsonl", format!("{{\"prompt\": \"a\", \"response\": \"b\", \"{long}\": \"c\"}}\n"));
    let outcome = w.run(&["convert", "long.jsonl", "to.jsonl"]);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(outcome.stderr.len() + outcome.stdout.len() < 2000);
}

#[test]
fn a_comma_before_the_end_of_an_array_is_one() {
    let w = good();
    let row = "{\"prompt\": \"a\", \"response\": \"b\"}";
    w.write("array.json", format!("[{row},{row},]"));
    let outcome = w.run(&["convert", "array.json", "to.jsonl"]);
    fails(&outcome, 1, &["a comma behind the last element?", "element 3 of the array"]);
    assert!(!outcome.stderr.contains("truncated"), "{}", outcome.stderr);
    w.write("array.json", format!("[{row},{row}"));
    fails(&w.run(&["convert", "array.json", "to.jsonl"]), 1, &["truncated"]);
}

#[test]
fn the_limits_of_a_shell_end_a_run_in_words() {
    let w = good();
    let outcome = w.shell(&format!("ulimit -f 200; ringtune {SFT} --save_steps 1 --output_dir small"));
    fails(&outcome, 1, &["the limit on the size of a file (ulimit -f) is reached"]);
    let left: Vec<String> = std::fs::read_dir(w.path("small"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains(".tmp"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    let outcome = w.shell(&format!("ulimit -n 9; ringtune {SFT} --save_steps 1 --output_dir few"));
    fails(&outcome, 1, &["Too many open files", "ulimit -n"]);
}

#[test]
fn help_that_cannot_be_written_is_an_error() {
    let w = good();
    for words in ["--help", "--version", "sft --help"] {
        let outcome = w.shell(&format!("ringtune {words} > /dev/full"));
        fails(&outcome, 1, &["standard output: No space left on device"]);
        let outcome = w.shell(&format!("bash -c 'ringtune {words} | head -c 1 > first; exit ${{PIPESTATUS[0]}}'"));
        assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""));
    }
}

/// A name that was meant for something else loses nothing: what is written replaces its own kind alone.
#[test]
fn files_of_another_kind_are_not_written_over() {
    let w = good();
    let rows = std::fs::read(w.path("rows.jsonl")).unwrap();
    let train = format!("{SFT} --output_dir out --trace");
    let pack = "pack --tokenizer_path spm.model --dataset_paths rows.jsonl --max_seq_len 64 --output";
    let eval =
        "eval --model_path model --tokenizer_path spm.model --dataset_paths rows.jsonl --max_eval_samples 2 --output";
    let done = run(&w, &format!("{SFT} --output_dir done"));
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    symlink("rows.jsonl", w.path("link.jsonl")).unwrap();
    std::fs::hard_link(w.path("rows.jsonl"), w.path("hard.jsonl")).unwrap();
    for (line, kind, own) in [
        (&train[..], "trace", "trace.json"),
        (pack, "token file", "rows.tok"),
        (eval, "report of eval", "eval.json"),
        ("report done --output", "report", "page.html"),
    ] {
        for name in ["rows.jsonl", "link.jsonl", "hard.jsonl", "model/config.json", "done/adapter_config.json"] {
            let before = std::fs::read(w.path(name)).unwrap();
            fails(
                &run(&w, &format!("{line} {name}")),
                2,
                &[name, &format!("is there and is no {kind}"), "it would be lost"],
            );
            assert_eq!(std::fs::read(w.path(name)).unwrap(), before);
        }
        // Its own kind, twice.
        for _ in 0..2 {
            let _ = std::fs::remove_dir_all(w.path("out"));
            let outcome = run(&w, &format!("{line} {own}"));
            assert_eq!(outcome.code, Some(0), "{line} {own}: {}", outcome.stderr);
        }
    }
    assert_eq!(std::fs::read(w.path("rows.jsonl")).unwrap(), rows);
    // In a folder that the run makes.
    assert_eq!(run(&w, &format!("{SFT} --output_dir fresh --trace fresh/trace.json")).code, Some(0));
    assert!(w.path("fresh/trace.json").exists());
}

/// Chat templates come with models: none ends the program but with an error.
#[test]
fn templates_that_go_too_deep_or_ask_too_much_are_errors() {
    let w = good();
    let marked = "{% generation %}{{ messages[1].content }}{% endgeneration %}";
    for (template, words) in [
        ("{{ \"abc\"[::-9223372036854775808] }}".to_string(), "what the engine cannot do"),
        (format!("{{{{ {}1 }}}}", "-".repeat(59_000)), "line 1: a tag of 59001 names, numbers, texts and signs"),
        (format!("\n\n{{{{ 1{} }}}}", "+1".repeat(29_000)), "line 3: a tag of 58001"),
        (format!("{{% if {}true %}}a{{% endif %}}", "not ".repeat(9_000)), "line 1: a tag of 9002"),
        ("{% set ns=namespace() %}{% set ns.a=ns %}{{ ns }}".to_string(), "deeper than can be rendered"),
        (
            "{% set ns=namespace(a=[]) %}{% for i in range(90000) %}{% set ns.a=[ns.a] %}{% endfor %}{{ ns.a }}"
                .to_string(),
            "deeper than can be rendered",
        ),
    ] {
        w.write("t.jinja", format!("{template}{marked}"));
        let outcome = run(&w, &format!("{SFT} --output_dir out --prompt_template t.jinja"));
        assert_eq!(outcome.code, Some(1), "{:.200}: {}", template, outcome.stderr);
        assert!(
            outcome.stderr.contains(words) && !outcome.stderr.contains("panicked"),
            "{:.200}: {}",
            template,
            outcome.stderr
        );
    }
    // A long text, and as many words as templates have, are taken.
    let long = format!("{{{{ '{}' }}}}{{{{ 1{} }}}}{marked}", "- not ".repeat(9000), "+1".repeat(900));
    w.write("t.jinja", long);
    let outcome =
        run(&w, &format!("{SFT} --output_dir out --max_seq_len 512 --overflow drop --prompt_template t.jinja"));
    assert!(!outcome.stderr.contains("t.jinja"), "{}", outcome.stderr);
}

/// What a run finished is its user's, with checkpoints or without: the next one needs another folder, and says so before it reads data.
#[test]
fn a_finished_run_is_not_written_over() {
    let w = good();
    let once = format!("{SFT} --save_strategy no --output_dir out");
    assert_eq!(run(&w, &once).code, Some(0));
    let before = std::fs::read(w.path("out/adapter_model.safetensors")).unwrap();
    for more in ["", " --no_lora", " --resume_from_checkpoint auto"] {
        let outcome = run(&w, &format!("{once}{more}"));
        fails(
            &outcome,
            2,
            &["out: an earlier run finished here (out/adapter_model.safetensors)", "another --output-dir"],
        );
        assert!(!outcome.stderr.contains("tokenis") || more.contains("resume"), "{}", outcome.stderr);
        assert_eq!(std::fs::read(w.path("out/adapter_model.safetensors")).unwrap(), before);
    }
    let text = "pretrain --model_config model/config.json --tokenizer_path spm.model --dataset_paths text.txt --max_steps 1 \
                --max_seq_len 64 --save_strategy no --quiet --output_dir new";
    w.write("text.txt", "one two three four five six seven\n\n".repeat(60));
    assert_eq!(run(&w, text).code, Some(0));
    fails(&run(&w, text), 2, &["an earlier run finished here (new/", "/final/model.safetensors)"]);
}
