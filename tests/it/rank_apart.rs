//! Ranks whose machines have no file system in common: here each runs in a folder of its own and is given a relative output folder.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use ringtune::checkpoint::manifest;

use crate::rank_failures::free_port;
use crate::ringrun_program::{Training, succeed};
use crate::runs::{MODEL, metrics, rows, same_file};

const ADAPTER: &str = "adapter_model.safetensors";

/// Two ranks as torchrun starts them, each in the folder of its number; what each printed, and whether it ended well.
fn apart(t: &Training, more: &[&str]) -> [(Output, String); 2] {
    let port = free_port();
    let out = t.dir.join("out").display().to_string();
    let words = t.words("out", 2).into_iter().map(|word| match word {
        word if word == MODEL => std::fs::canonicalize(MODEL).unwrap().display().to_string(),
        word if word == out => "out".into(),
        word => word,
    });
    let words: Vec<String> = words.collect();
    let start = |rank: usize| {
        let (dir, number) = (t.dir.join(rank.to_string()), rank.to_string());
        std::fs::create_dir_all(&dir).unwrap();
        let mut c = Command::new(env!("CARGO_BIN_EXE_ringtune"));
        c.args(&words).args(more).current_dir(dir);
        c.envs([("RANK", number.as_str()), ("WORLD_SIZE", "2"), ("LOCAL_RANK", &number), ("LOCAL_WORLD_SIZE", "2")]);
        c.envs([("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", &port), ("TORCHELASTIC_RUN_ID", "apart")]);
        c.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    [0, 1].map(start).map(|child: Child| {
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output, said)
    })
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Said at the start, by name; no checkpoint is lost: the main rank writes what the others hold, the files of one rank. What is not there on the
/// other machine cannot be gone on from, which is said too, and with a copy it can.
#[test]
fn ranks_that_do_not_see_one_folder_are_named_and_lose_no_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let at = |name: &str| -> PathBuf { dir.path().join(name) };
    let (main, other) = (at("0").join("out"), at("1").join("out"));
    for (zero, flags) in [("1", &["--no_lora", "--mixed_precision", "bf16"][..]), ("0", &["--lora_dropout", "0.1"])] {
        let with = |steps| Training { flags: [flags, &["--zero", zero]].concat(), ..Training::new(dir.path(), steps) };
        let one = format!("one-{zero}");
        succeed(with(6).alone(&one));
        let outputs = apart(&with(6), &[]);
        assert!(outputs.iter().all(|(o, _)| o.status.success()), "{}{}", outputs[0].1, outputs[1].1);
        let said = &outputs[0].1;
        assert_eq!(said.matches("rank 1 on host ").count(), 1, "{said}");
        assert!(said.contains(" does not see out, where rank 0 writes: ") && said.contains("or a copy"), "{said}");
        let weights = if zero == "1" { "model.safetensors" } else { ADAPTER };
        for name in
            [weights.to_string(), format!("checkpoint-6/{weights}"), "checkpoint-6/optimizer.safetensors".into()]
        {
            same_file(&at(&one).join(&name), &main.join(&name));
        }
        assert_eq!(metrics(&at(&one)), metrics(&main));
        manifest::list(&main).unwrap().iter().for_each(|(_, path)| drop(manifest::verify(path).unwrap()));
        let left = std::fs::read_dir(&main).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        assert_eq!(left.filter(|name| name.ends_with(".tmp")).count(), 0);
        assert!(!other.exists(), "the other rank writes nothing");
        if zero == "0" {
            return; // Goes on as the other.
        }
        // From the third step on.
        let resume = ["--resume_from_checkpoint", "out/checkpoint-3"];
        let outputs = apart(&with(6), &resume);
        let said: String = outputs.iter().map(|(_, said)| said.as_str()).collect();
        assert!(outputs.iter().all(|(o, _)| !o.status.success()), "{said}");
        let missing = "out/checkpoint-3: rank 0 goes on from this checkpoint, and it is not on host ";
        assert!(said.contains("rank 1 on host ") && said.contains(missing) && said.contains("copy it"), "{said}");
        copy(&main.join("checkpoint-6"), &other.join("checkpoint-3"));
        let outputs = apart(&with(6), &resume);
        let said: String = outputs.iter().map(|(_, said)| said.as_str()).collect();
        assert!(outputs.iter().all(|(o, _)| !o.status.success()), "{said}");
        assert!(said.contains("the manifest of the checkpoint to go on from differs between ranks"), "{said}");
        std::fs::remove_dir_all(&other).unwrap();
        copy(&main.join("checkpoint-3"), &other.join("checkpoint-3"));
        let outputs = apart(&with(6), &resume);
        assert!(outputs.iter().all(|(o, _)| o.status.success()), "{}{}", outputs[0].1, outputs[1].1);
        same_file(&at(&one).join(weights), &main.join(weights));
        [main.clone(), other.clone()].iter().for_each(|dir| std::fs::remove_dir_all(dir).unwrap());
    }
}
