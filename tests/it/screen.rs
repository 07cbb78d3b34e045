//! What a terminal shows: lines within its width, colours where they are wanted, words that people use.

use std::process::Command;

use crate::program::{Workplace, first_rows, repository};
use crate::runs::MODEL;
use crate::terminal::{Terminal, plain};

fn place() -> Workplace {
    let w = Workplace::new();
    w.write("a/long/folder/of/rows/that/somebody/made/rows.jsonl", first_rows("data/demo/chat.jsonl", 40));
    w.write("more.jsonl", first_rows("data/demo/define.jsonl", 40));
    std::os::unix::fs::symlink(repository().join(MODEL), w.path("model")).unwrap();
    w
}

fn ringtune(w: &Workplace, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringtune"));
    command.args(line.split(' ')).current_dir(w.path("")).env("RINGTUNE_CACHE", w.path("cache"));
    for name in ["COLUMNS", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE"] {
        command.env_remove(name);
    }
    command.env("TERM", "xterm-256color");
    command
}

const DATA: &str = "--model_path model --dataset_paths a/long/folder/of/rows/that/somebody/made/rows.jsonl more.jsonl \
                    --dataset_weights 0.25 0.75 --max_seq_len 64 --output_dir out";

#[test]
fn a_run_and_its_check_fit_a_terminal_of_eighty_columns() {
    let w = place();
    for line in [format!("check --preview 0 {DATA}"), format!("sft --max_steps 3 --eval_steps 2 {DATA}")] {
        let (status, screen) = Terminal::start(ringtune(&w, &line), 80).end();
        assert!(status.success(), "{screen}");
        assert!(screen.contains("\x1b["), "a terminal gets colour: {screen}");
        let lines = plain(&screen);
        // Tables begin with two blanks; sentences (`FILE: what is to be known`) are the terminal's to break.
        let fitting = |l: &&String| {
            (l.starts_with("  ") && !l.contains(": ")) || l.starts_with("step ") || l.starts_with("eval ")
        };
        let wide: Vec<&String> = lines.iter().filter(fitting).filter(|l| l.chars().count() > 80).collect();
        assert!(wide.is_empty(), "{wide:#?}");
        if line.starts_with("sft") {
            let steps: Vec<&String> = lines.iter().filter(|l| l.starts_with("step ")).collect();
            assert_eq!(steps.len(), 3, "{lines:#?}");
            assert!(steps.iter().all(|l| l.contains("| loss ") && l.contains("| lr ")), "{steps:?}");
            assert!(lines.iter().any(|l| l.contains("dataset_weights") && l.ends_with("--dataset-weights")));
            assert!(lines.iter().any(|l| l.contains("more have their defaults")), "{lines:#?}");
            assert!(!lines.iter().any(|l| l.contains("adam_beta1")));
        }
    }
}

#[test]
fn colours_go_where_they_are_wanted() {
    let w = place();
    let coloured = |line: &str, vars: &[(&str, &str)], terminal: bool| {
        let mut command = ringtune(&w, line);
        command.envs(vars.iter().copied());
        let said = match terminal {
            true => Terminal::start(command, 80).end().1,
            false => {
                let output = command.output().unwrap();
                String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
            }
        };
        assert!(said.len() > 20, "{said}");
        said.contains("\x1b[")
    };
    // An error of ours, one that clap found, a help, a result.
    for line in ["sft --bf16", "merge --model_path", "sft --help", "templates"] {
        assert!(coloured(line, &[], true), "{line}");
        assert!(!coloured(line, &[("NO_COLOR", "1")], true), "{line}");
        assert!(!coloured(line, &[("TERM", "dumb")], true), "{line}");
        assert!(!coloured(line, &[], false), "{line}");
        assert!(coloured(line, &[("FORCE_COLOR", "1")], false), "{line}");
        assert!(coloured(line, &[("CLICOLOR_FORCE", "1")], false), "{line}");
        assert!(!coloured(line, &[("FORCE_COLOR", "0")], false), "{line}");
        assert!(!coloured(line, &[("FORCE_COLOR", "1"), ("NO_COLOR", "1")], false), "{line}");
    }
}

#[test]
fn a_pipe_gets_whole_lines_and_columns_say_how_wide_it_is() {
    let w = place();
    let run = |out: &str, columns: Option<&str>| {
        let mut command = ringtune(&w, &format!("sft --max_steps 1 --verbose {DATA}-{out}"));
        if let Some(n) = columns {
            command.env("COLUMNS", n);
        }
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let whole = run("a", None);
    let step = whole.lines().find(|l| l.starts_with("step ")).unwrap();
    assert!(step.contains("% valid") && step.contains("FLOP/s"), "{step}");
    assert!(whole.lines().any(|l| l.contains("rows.jsonl more.jsonl")), "paths are whole: {whole}");
    assert!(whole.contains("adam_beta1"), "--verbose shows all: {whole}");
    let narrow = run("b", Some("60"));
    assert!(narrow.lines().filter(|l| l.starts_with("  ")).all(|l| l.chars().count() <= 60), "{narrow}");
    assert!(narrow.lines().any(|l| l.starts_with("step ") && l.contains("loss") && l.len() <= 60), "{narrow}");
}

/// What is said of problems stands first and last, where the eye is.
#[test]
fn check_begins_and_ends_with_its_verdict() {
    let w = place();
    w.write("bad.jsonl", "{\"prompt\": \"a\"}\n{\"prompt\": \"a\", \"response\": \"b\"}\n");
    let said = |line: &str| {
        let output = ringtune(&w, line).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let good = said(&format!("check {DATA}"));
    assert!(good.starts_with("no problem found, "), "{good}");
    assert!(good.trim_end().lines().last().unwrap().starts_with("no problem found, "), "{good}");
    let bad = said("check --model_path model --dataset_paths bad.jsonl --max_seq_len 64 --output_dir out");
    let lines: Vec<&str> = bad.lines().collect();
    assert!(lines[0].starts_with("1 problem, "), "{bad}");
    assert!(lines[1].starts_with("problem [bad-row] bad.jsonl:1: "), "{bad}");
    assert_eq!((lines[lines.len() - 1], lines[lines.len() - 2]), (lines[0], lines[1]), "{bad}");
}

/// A model that was tuned a little, so that its answers are of some length.
fn talker() -> Workplace {
    crate::tuned::tuned(&[])
}

fn chat(w: &Workplace) -> Terminal {
    let line = "generate --model-path out --greedy --max-new-tokens 8";
    let mut terminal = Terminal::start(ringtune(w, line), 80);
    terminal.wait_for("/help lists", 0);
    terminal
}

/// Editing, history, commands and endings of a conversation at a terminal; its answers are those of a pipe.
#[test]
fn a_conversation_at_a_terminal() {
    use std::os::unix::fs::PermissionsExt;
    let w = talker();
    let piped = w.shell("printf 'What is AI?\\nAre you sure?\\n' | ringtune generate --model-path out --chat --greedy --max-new-tokens 8");
    let answers: Vec<&str> = piped.stdout.lines().collect();
    let [first, second] = answers[..] else { panic!("{}", piped.stdout) };
    assert!(!first.is_empty(), "{}", piped.stdout);
    let mut t = chat(&w);
    // A slip is mended with the key for it.
    t.press("What is AJ\x7fI?\r");
    let mut at = t.wait_for(first, 0);
    at = t.wait_for("> ", at);
    t.press("Are you sure?\r");
    at = t.wait_for(second, at);
    for (keys, answer) in [
        ("/help\r", "/system TEXT"),
        ("/sytem be brief\r", "/sytem: unknown; did you mean /system?"),
        ("/what\r", "/what: unknown (/help lists what there is)"),
        ("/system Be brief.\r", "begun anew with this system turn"),
        ("/system\r", "begun anew without a system turn"),
        ("\x03", "Ctrl-D or /quit ends"),
        ("/reset\r", "forgotten"),
    ] {
        at = t.wait_for("> ", at);
        t.press(keys);
        at = t.wait_for(answer, at);
    }
    at = t.wait_for("> ", at);
    // The first turn is searched for in the history.
    t.press("\x12What is\r");
    at = t.wait_for(first, at);
    t.wait_for("> ", at);
    t.press("\x04");
    let (status, screen) = t.end();
    assert!(status.success(), "{screen}");
    let history = w.path("cache/chat_history");
    assert_eq!(std::fs::metadata(&history).unwrap().permissions().mode() & 0o777, 0o600);
    let text = std::fs::read_to_string(&history).unwrap();
    assert!(text.contains("What is AI?") && text.contains("Are you sure?"), "{text}");
    // The next conversation has it too.
    let mut t = chat(&w);
    t.wait_for("> ", 0);
    t.press("\x12sure\r");
    let at = t.wait_for("Are you sure?", 0);
    t.wait_for("> ", at);
    t.press("/quit\r");
    assert!(t.end().0.success());
}

/// Ctrl-C ends an answer under way and not the program.
#[test]
fn an_answer_is_stopped_and_the_conversation_goes_on() {
    let w = talker();
    let line = "generate --model-path base --tokenizer-path spm.model --prompt-template plain --temperature 1 --max-new-tokens 480 --threads 1";
    let mut t = Terminal::start(ringtune(&w, line), 80);
    let mut at = t.wait_for("/help lists", 0);
    let mut stopped = false;
    // An answer may be over before the key arrives; then the next one is tried.
    for _ in 0..20 {
        at = t.wait_for("> ", at);
        t.press("word\r");
        at = t.wait_for("word", at);
        t.wait_for(" ", at + 3);
        t.press("\x03");
        at = t.wait_for("> ", at);
        stopped |= t.screen.contains("(stopped)");
        if stopped {
            break;
        }
    }
    assert!(stopped, "{}", t.screen);
    t.press("/quit\r");
    let (status, screen) = t.end();
    assert!(status.success(), "{screen}");
}

/// However little memory a limit leaves, what is refused is an error with advice, not an abort.
#[test]
fn refused_memory_is_an_error_with_advice() {
    let w = Workplace::new();
    w.write("rows.jsonl", first_rows("data/demo/chat.jsonl", 200));
    let model = repository().join("tests/data/model/tiny-llama-tied");
    let mut refused = 0;
    for kib in [110_000, 150_000, 220_000, 260_000, 300_000, 340_000] {
        let line = format!(
            "ulimit -v {kib}; RUST_BACKTRACE=0 exec ringtune sft --model-path {} --dataset-paths rows.jsonl --output-dir out-{kib} \
             --max-seq-len 128 --max-steps 1",
            model.display()
        );
        let outcome = w.shell(&line);
        if outcome.stderr.contains("memory allocation of") {
            refused += 1;
            assert_eq!(outcome.code, Some(1), "{}", outcome.stderr);
            assert!(
                outcome.stderr.contains("bytes more: out of memory") && outcome.stderr.contains("--recompute layer")
            );
        }
    }
    assert!(refused > 0, "no limit was too low");
}

/// Ranks and ringrun write to one place: a line that is two writes is cut where a rank is killed, and the next one is glued to its half.
#[cfg(target_os = "linux")]
#[test]
fn every_line_on_stderr_is_one_write() {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::{FromRawFd, OwnedFd};

    let w = place();
    let rows = first_rows("data/demo/chat.jsonl", 3);
    w.write("val.jsonl", rows);
    // Notes, warnings, remarks; an error; ranks of which one dies.
    let train = format!("sft --max_steps 3 --save_steps 2 --lora_r 70 --val_paths val.jsonl {DATA}");
    let bad = format!("sft {}", DATA.replace("model_path model", "model_path nowhere"));
    let program = env!("CARGO_BIN_EXE_ringtune");
    let ranks = format!("-n 2 {program} {train}");
    for (name, line, fault) in [
        ("ringtune", train.as_str(), ""),
        ("ringtune", &bad, ""),
        ("ringrun", &ranks, "rank=1 step=2 at=reduce do=kill"),
    ] {
        let _ = std::fs::remove_dir_all(w.path("out"));
        // A packet is a write.
        let (mut ends, kind) = ([0; 2], libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC);
        // SAFETY: two descriptors are written to where there is room for two.
        let made = unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) };
        assert_eq!(made, 0);
        // SAFETY: just opened, and nobody else has them.
        let [own, theirs] = ends.map(|end| unsafe { OwnedFd::from_raw_fd(end) });
        let mut command = ringtune(&w, line);
        if name == "ringrun" {
            let mut other = Command::new(crate::ringrun_program::ringrun());
            other
                .args(line.split(' '))
                .current_dir(w.path(""))
                .env("RINGTUNE_CACHE", w.path("cache"))
                .env("RINGTUNE_FAULT", fault);
            command = other;
        }
        let mut child = command.stdout(std::process::Stdio::null()).stderr(theirs).spawn().unwrap();
        drop(command);
        let (mut own, mut packet, mut said) = (File::from(own), vec![0; 1 << 16], Vec::new());
        while let Ok(n @ 1..) = own.read(&mut packet) {
            said.push(String::from_utf8_lossy(&packet[..n]).into_owned());
        }
        child.wait().unwrap();
        assert!(said.len() >= if line == bad { 1 } else { 4 }, "{said:#?}");
        assert!(said.iter().all(|line| line.ends_with('\n')), "{said:#?}");
    }
}
