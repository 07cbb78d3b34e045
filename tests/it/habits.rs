//! What people type who come from other tools: it works, or the answer is the exact thing to type.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::program::{Workplace, first_rows, repository};
use crate::runs::MODEL;

/// Settings as other tools write them, and as they are written here.
const FILES: [(&str, &str); 7] = [
    (
        "axolotl.yml",
        "base_model: tiny\ndatasets:\n  - path: rows.jsonl\n    type: alpaca\nsequence_len: 2048\nsample_packing: true\n\
         adapter: lora\nlora_r: 8\nmicro_batch_size: 2\nnum_epochs: 1\nbf16: auto\ngradient_checkpointing: true\noutput_dir: out\n",
    ),
    (
        "factory.yaml",
        "model_name_or_path: tiny\nstage: sft\nfinetuning_type: lora\nlora_target: all\nlora_rank: 8\ndataset_path: rows.jsonl\n\
         template: llama3\ncutoff_len: 2048\noutput_dir: out\nval_size: 0.1\nplot_loss: true\n",
    ),
    (
        "whole.yml",
        "base_model: tiny\nadapter:\nsample_packing: false\nbf16: true\nfp16:\nwandb_watch:\noutput_dir: out\n",
    ),
    (
        "where.yml",
        "model_path: ${PWD}/tiny\ndataset_paths: [\"$PWD/rows.jsonl\"]\nmax_seq_len: 64\nmax_steps: 1\noutput_dir: out\nval_fraction: 0\n",
    ),
    ("nowhere.yml", "model_path: tiny\ndataset_paths: rows.jsonl\noutput_dir: ${RINGTUNE_NOWHERE}/out\n"),
    ("dataset_info.json", "{\"mine\": {\"file_name\": \"rows.jsonl\"}}"),
    (
        "good.yml",
        "model_path: tiny\ndataset_paths: rows.jsonl\nmax_seq_len: 64\nmax_steps: 1\noutput_dir: out\nval_fraction: 0\n",
    ),
];

/// A folder with what the lines of the table name; `runs` are finished ones.
fn habitat(runs: Option<&Workplace>) -> Workplace {
    let w = Workplace::new();
    w.write("rows.jsonl", first_rows("data/demo/chat.jsonl", 12));
    FILES.iter().for_each(|(name, text)| w.write(name, text));
    for entry in std::fs::read_dir(repository().join("tests/data/habits")).unwrap() {
        let path = entry.unwrap().path();
        w.write(path.file_name().unwrap().to_str().unwrap(), std::fs::read(&path).unwrap());
    }
    let models = repository().join(MODEL);
    w.write("models/note", "");
    for (to, link) in [(models.clone(), "tiny"), (models, "models/tiny")] {
        symlink(to, w.path(link)).unwrap();
    }
    for name in runs.iter().flat_map(|_| ["run", "yesterday"]) {
        symlink(runs.unwrap().path(name), w.path(name)).unwrap();
    }
    w
}

/// Lines of the table in tests/data/habits.tsv: each ends as it says, with the answer that it says, in moments.
#[test]
fn lines_that_people_of_other_tools_type_work_or_are_answered() {
    let runs = habitat(None);
    for (name, more) in [("run", "--merge_adapters --max_steps 1"), ("yesterday", "--max_steps 2")] {
        let line = format!(
            "ringtune sft --model_path tiny --dataset_paths rows.jsonl --output_dir {name} --max_seq_len 64 --quiet {more}"
        );
        let outcome = runs.shell(&line);
        assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    }
    let table = std::fs::read_to_string(repository().join("tests/data/habits.tsv")).unwrap();
    let lines: Vec<&str> = table.lines().filter(|l| !l.is_empty() && !l.starts_with('#')).collect();
    assert!(lines.len() >= 40, "{} lines", lines.len());
    let (next, wrong) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from).min(8) {
            scope.spawn(|| {
                while let Some(line) = lines.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let [code, typed, answer] = line.split('\t').collect::<Vec<_>>()[..] else { panic!("{line}") };
                    let w = habitat(Some(&runs));
                    let outcome = w.shell(typed);
                    let said = format!("{}{}", outcome.stdout, outcome.stderr);
                    if outcome.code != code.parse().ok() || !said.contains(&answer.replace("\\n", "\n")) {
                        wrong.lock().unwrap().push(format!("{line}\nended with {:?}:\n{said}", outcome.code));
                    }
                    for word in ["Some(", "None", "Os {", "(os error", "panicked"] {
                        assert!(!said.contains(word), "{typed}: {word} in\n{said}");
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{} of {} lines:\n{}", wrong.len(), lines.len(), wrong.join("\n\n"));
}

fn place() -> (Workplace, String) {
    let w = Workplace::new();
    w.write("rows.jsonl", first_rows("data/demo/chat.jsonl", 12));
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join(MODEL);
    let sft = format!(
        "ringtune sft --model_path {} --dataset_paths rows.jsonl --output_dir out --max_seq_len 64 --quiet --no_tensorboard",
        model.display()
    );
    (w, sft)
}

/// Each flag of another tool, and what the one line of the error says to type.
#[test]
fn flags_of_other_tools_are_answered_with_what_to_type() {
    let (w, sft) = place();
    for (typed, answer) in [
        ("--bf16", "write --mixed_precision bf16"),
        ("--bf16 true", "write --mixed_precision bf16"),
        ("--fp16", "its range is too small for gradients; write --mixed_precision bf16"),
        ("--torch_dtype bfloat16", "write --mixed_precision bf16"),
        ("--tf32 true", "products are made in what mixed_precision says; leave it out"),
        ("--bf16 False", "it is off; leave it out"),
        ("--finetuning_type full", "write --no_lora"),
        ("--finetuning_type freeze", "LoRA (the default) and all weights (no_lora)"),
        ("--full_finetuning True", "write --no_lora"),
        ("--random_state 3407", "write --seed 3407"),
        ("--save_method merged_16bit", "with merge_adapters the merged model too"),
        ("--dataset_dir data", "name the files themselves in dataset_paths"),
        ("--gradient_checkpointing", "write --recompute layer"),
        ("--gradient-checkpointing true", "write --recompute layer"),
        ("--use_mlflow true", "write --report_to mlflow"),
        ("--mlflow_tracking_uri http://x", "MLFLOW_TRACKING_URI"),
        ("--wandb_project x", "wandb sync --sync-tensorboard"),
        ("--optim adamw_torch_fused", "AdamW with f32 moments is the one optimiser; leave it out"),
        ("--load_in_4bit", "weights are not quantised"),
        ("--quantization_bit 4", "weights are not quantised"),
        ("--overwrite_output_dir", "resume_from_checkpoint auto takes a run up"),
        ("--validation_file dev.jsonl", "write --val_paths"),
        ("--val_size 0.1", "write --val_fraction"),
        ("--val_set_size 0.05", "write --val_fraction"),
        ("--logging_dir logs", "TensorBoard files are in runs/"),
        ("--cutoff_len 512", "write --max_seq_len"),
        ("--sequence_len 512", "write --max_seq_len"),
        ("--template llama3", "write --prompt_template"),
        ("--finetuning_type lora", "LoRA is the default"),
        ("--adapter lora", "LoRA is the default"),
        ("--stage sft", "the command says it"),
        ("--do_train", "the command says it"),
        ("--attn_implementation flash_attention_2", "this is always so here; leave it out"),
        ("--flash_attn fa2", "this is always so here; leave it out"),
        ("--use_liger_kernel", "this is always so here; leave it out"),
        ("--deepspeed z3.json", "`ringrun -n N ringtune sft …` starts N ranks"),
        ("--dataloader_num_workers 4", "limit all of it with threads"),
        ("--preprocessing_num_workers 16", "limit all of it with threads"),
        ("--dataset alpaca_en", "write --dataset_paths"),
        ("--dataset_name x", "write --dataset_paths"),
        ("--sample_packing", "write --packing"),
        ("--pad_to_sequence_len", "rows are packed and never padded"),
        ("--group_by_length", "rows are packed and never padded"),
        ("--train_on_inputs", "answers alone are trained"),
        ("--device_map auto", "write --device cuda"),
        ("--no_cuda", "write --device cpu"),
        ("--push_to_hub", "files are written here"),
        ("--neftune_noise_alpha 5", "not supported; leave it out"),
        ("--lora_target_linear true", "all seven products are the default"),
        ("--metric_for_best_model loss", "the lowest eval_loss is the best"),
        ("--lerning_rate 1e-4", "did you mean --learning_rate?"),
        ("--zzz", "`ringtune sft --help` lists those it has"),
        ("--dataloader_pin", "`ringtune sft --help` lists those it has"),
    ] {
        let outcome = w.shell(&format!("{sft} {typed}"));
        assert_eq!(outcome.code, Some(2), "{typed}: {}", outcome.stderr);
        let error = outcome.error();
        let name = typed.split(' ').next().unwrap();
        assert!(error.starts_with(&format!("{name}: no flag of ringtune sft; ")), "{typed}: {error}");
        assert!(error.contains(answer), "{typed}: expected {answer:?} in {error}");
        assert!(!w.path("out").exists());
    }
    // A flag is offered to those commands alone that have it.
    let outcome = w.shell("ringtune merge --gradient_checkpointing");
    assert!(outcome.error().contains("`ringtune merge --help` lists those it has"), "{}", outcome.stderr);
    // Keys of a config file get the same answers.
    for (key, answer) in
        [("gradient_checkpointing", "write \"recompute\": \"layer\""), ("cutoff_len", "write \"max_seq_len\"")]
    {
        w.write("c.json", format!("{{\"{key}\": 1}}"));
        let outcome = w.shell(&format!("{sft} --config_path c.json"));
        assert!(outcome.error().contains(&format!("unknown key \"{key}\"; {answer}")), "{}", outcome.stderr);
    }
}

/// Where figures go is a setting here; a service that is not called is answered with the way to it.
#[test]
fn report_to_takes_words_of_other_tools() {
    let (w, sft) = place();
    for typed in ["--report_to wandb", "--report-to tensorboard,wandb", "--report_to json wandb"] {
        let outcome = w.shell(&format!("{sft} {typed}"));
        assert_eq!(outcome.code, Some(2), "{typed}: {}", outcome.stderr);
        let expected = "--report-to: expected some of tensorboard, mlflow, json, none, found \"wandb\"; other services are not called: \
                        `wandb sync --sync-tensorboard OUTPUT_DIR/runs`";
        assert!(outcome.error().starts_with(expected), "{typed}: {}", outcome.error());
    }
    w.write("c.json", "{\"report_to\": [\"wandb\"]}");
    let outcome = w.shell(&format!("{sft} --config_path c.json"));
    assert!(outcome.error().contains("`wandb sync --sync-tensorboard"), "{}", outcome.stderr);
    let outcome = w.shell(&format!("{sft} --report_to none,json"));
    assert!(outcome.code == Some(2) && outcome.error().contains("none stands alone"), "{}", outcome.stderr);
    let outcome = w.shell(&format!("env -u MLFLOW_TRACKING_URI {sft} --report_to mlflow"));
    assert!(outcome.code == Some(2) && outcome.error().contains("MLFLOW_TRACKING_URI: expected"), "{}", outcome.stderr);
    // Each place where it was asked for, and nowhere else.
    let sft = sft.replace(" --no_tensorboard", " --max_steps 1");
    for (i, (typed, tensorboard, json)) in [
        ("", true, true),
        ("--report_to none", false, false),
        ("--report_to json", false, true),
        ("--report_to=tensorboard", true, false),
        ("--report_to json,tensorboard --no_tensorboard", false, true),
    ]
    .into_iter()
    .enumerate()
    {
        let out = format!("out-{i}");
        let outcome = w.shell(&format!("{} {typed}", sft.replace("--output_dir out", &format!("--output_dir {out}"))));
        assert_eq!(outcome.code, Some(0), "{typed}: {}", outcome.stderr);
        let there = |name: &str| w.path(&format!("{out}/{name}")).exists();
        assert_eq!((there("runs"), there("metrics.jsonl")), (tensorboard, json), "{typed}");
        assert!(!outcome.stderr.contains("warning"), "{typed}: {}", outcome.stderr);
    }
}

/// What works as it is typed elsewhere.
#[test]
fn habits_that_work_as_they_are() {
    let (w, sft) = place();
    // Half an epoch of 12 rows, one after the other, is 6 steps.
    let epochs = "--num_train_epochs 0.5 --packing false --per_device_train_batch_size 1 --val_fraction 0";
    for (i, (typed, key, value)) in [
        ("--packing false --max_steps 1", "packing", "false"),
        ("--packing=False --max_steps 1", "packing", "false"),
        ("--packing true --max_steps 1", "packing", "true"),
        ("--use_lora true --max_steps 1", "use_lora", "true"),
        ("--use_lora=no --max_steps 1", "use_lora", "false"),
        ("--lora_target_modules all-linear --max_steps 1", "lora_targets", "all-linear"),
        ("--micro_batch_size 4 --max_steps 1", "per_device_train_batch_size", "4"),
        ("--lr 1e-4 --max_steps 1", "learning_rate", "1e-4"),
        (epochs, "num_train_epochs", "0.5"),
    ]
    .into_iter()
    .enumerate()
    {
        let outcome =
            w.shell(&format!("{} {typed}", sft.replace("--output_dir out", &format!("--output_dir out-{i}"))));
        assert_eq!(outcome.code, Some(0), "{typed}: {}", outcome.stderr);
        let run = std::fs::read_to_string(w.path(&format!("out-{i}/run.json"))).unwrap();
        let run: serde_json::Value = serde_json::from_str(&run).unwrap();
        let setting = run["settings"].as_array().unwrap().iter().find(|s| s["name"] == key).unwrap();
        assert_eq!(setting["value"], value, "{typed}");
        if typed == epochs {
            assert_eq!(run["max_steps"], 6, "{run:#}");
        }
    }
}

#[test]
fn all_that_is_missing_is_said_at_once() {
    let w = Workplace::new();
    let error = |line: &str| w.shell(line).error().to_string();
    assert_eq!(
        error("ringtune sft"),
        "--model-path, --dataset-paths, --output-dir are required (or \"model_path\", \"dataset_paths\", \"output_dir\" in the \
         config file)"
    );
    assert_eq!(
        error("ringtune sft --model-path m --dataset-paths d"),
        "--output-dir is required (or \"output_dir\" in the config file)"
    );
    assert!(
        error("ringtune pretrain --output-dir o")
            .starts_with("--model-config, --tokenizer-path, --dataset-paths are required")
    );
}

/// Shells and `man` know every command.
#[test]
fn completions_and_man_pages_name_every_command() {
    let w = Workplace::new();
    let commands: Vec<String> =
        ringtune::cli::command().get_subcommands().map(|c| c.get_name().to_string()).filter(|n| n != "help").collect();
    for shell in ["bash", "zsh", "fish"] {
        let outcome = w.run(&["completions", shell]);
        assert_eq!(outcome.code, Some(0), "{shell}: {}", outcome.stderr);
        for word in commands.iter().map(String::as_str).chain(["dataset-paths"]) {
            assert!(outcome.stdout.contains(word), "{shell}: {word}");
        }
    }
    assert_eq!(w.run(&["completions", "dash"]).code, Some(2));
    let outcome = w.run(&["man", "pages"]);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    for name in &commands {
        let page = std::fs::read_to_string(w.path(&format!("pages/ringtune-{name}.1"))).unwrap();
        assert!(page.contains("NAME") && page.contains(name.as_str()), "{name}");
    }
    let page = std::fs::read_to_string(w.path("pages/ringtune-sft.1")).unwrap();
    assert!(page.contains("dataset\\-paths"), "{page}");
    assert!(w.path("pages/ringtune-inspect-rows.1").is_file());
    // And those of the launcher.
    let page = std::fs::read_to_string(w.path("pages/ringrun.1")).unwrap();
    assert!(page.contains("hang\\-timeout"), "{page}");
    for shell in ["bash", "zsh", "fish"] {
        let outcome = w.run(&["completions", shell, "ringrun"]);
        assert!(outcome.code == Some(0) && outcome.stdout.contains("hang-timeout"), "{shell}: {}", outcome.stderr);
    }
}

/// A run goes on to more steps than were planned, and says what that does to the learning rate; what else differs is refused with what it
/// was and is.
#[test]
fn a_run_that_is_made_longer_goes_on() {
    let (w, sft) = place();
    let run = |more: &str| w.shell(&format!("{sft} --per_device_train_batch_size 2 {more}"));
    assert_eq!(run("--max_steps 4").code, Some(0));
    let longer = run("--max_steps 8 --resume_from_checkpoint auto");
    assert_eq!(longer.code, Some(0), "{}", longer.stderr);
    let line = longer.stdout.lines().find(|l| l.starts_with("max_steps was 4, is 8: ")).unwrap();
    assert!(line.contains("the learning rate follows the schedule of 8 steps; that of step 5 is "), "{line}");
    assert!(longer.stdout.contains("step 8/8"), "{}", longer.stdout);
    let other = run("--max_steps 9 --seed 1 --resume_from_checkpoint auto");
    assert!(other.error().contains("config differs from the checkpoint's (seed was 42, is 1)"), "{}", other.stderr);
    // More epochs are more steps.
    let epochs = run("--num_train_epochs 3 --resume_from_checkpoint auto");
    assert!(epochs.stdout.contains("max_steps was 8, is "), "{}{}", epochs.stdout, epochs.stderr);
}

#[test]
fn settings_that_do_no_good_are_said() {
    let (w, sft) = place();
    let wide = w.shell(&format!("{sft} --max_steps 1 --lora_r 64"));
    assert_eq!(wide.code, Some(0), "{}", wide.stderr);
    assert!(
        wide.stderr.contains("warning: lora_r 64: the narrowest product it is put on has 32 rows"),
        "{}",
        wide.stderr
    );
}
