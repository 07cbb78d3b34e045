//! Drawn settings through the program: pretraining, fine-tuning, evaluation, generation, merging, each on the device and on the CPU. What
//! one of them refuses, the other does in the same words.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use ringtune::hf::SaveDType;
use ringtune::hf::config::to_json;
use serde_json::Value;

use super::draw::{Dice, shape};
use crate::train::ringtune;

/// Devices, the one under test first.
const DEVICES: [&str; 2] = ["cuda", "cpu"];

/// The largest relative difference of the first step's figures, and of the losses of later ones: in bf16 small models with large updates part.
const NEAR: [(&str, [f64; 2]); 2] = [("no", [1e-4, 1e-3]), ("bf16", [2e-2, 0.1])];

/// A folder of a case.
struct Place<'a> {
    dir: &'a Path,
    /// What was run so far, for messages.
    said: Vec<String>,
    wrong: Vec<String>,
}

/// All numbers that a run has logged under these names, in order.
fn figures(run: &Path) -> Vec<(String, f64)> {
    let files: Vec<PathBuf> = [run.to_path_buf(), run.join("model")].map(|dir| dir.join("metrics.jsonl")).into();
    let text = files.iter().find_map(|path| fs::read_to_string(path).ok()).unwrap_or_default();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let of = |v: Value| {
        ["loss", "grad_norm", "eval_loss"]
            .into_iter()
            .filter_map(move |name| Some((name.to_string(), v[name].as_f64()?)))
    };
    lines.flat_map(of).collect()
}

/// The last line that says what went wrong.
fn reason(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    text.lines().rfind(|line| line.starts_with("error")).unwrap_or("").to_string()
}

impl Place<'_> {
    fn path(&self, name: &str) -> String {
        self.dir.join(name).to_str().unwrap().to_string()
    }

    /// Runs a command on both devices, each with its own `--output-dir`; whether it succeeded on both.
    fn both(&mut self, name: &str, words: &[String], out: Option<&str>) -> (bool, [String; 2]) {
        let outputs = DEVICES.map(|device| {
            let mut all: Vec<&str> = words.iter().map(String::as_str).collect();
            let folder = self.path(&format!("{name}.{device}"));
            if let Some(flag) = out {
                all.extend([flag, &folder]);
            }
            all.extend(["--device", device]);
            ringtune(&all, &[])
        });
        self.said.push(words.join(" "));
        let [ours, cpu] = [&outputs[0], &outputs[1]];
        let clean = |text: String| DEVICES.iter().fold(text, |text, d| text.replace(&format!("{name}.{d}"), name));
        let [our_reason, cpu_reason] = [ours, cpu].map(|o| clean(reason(o)));
        let panicked = String::from_utf8_lossy(&ours.stderr).contains("panicked");
        if ours.status.code() != cpu.status.code() || our_reason != cpu_reason || panicked {
            self.wrong.push(format!(
                "{name}: exit {:?} {our_reason:?}, on the CPU {:?} {cpu_reason:?}",
                ours.status.code(),
                cpu.status.code()
            ));
        }
        let text = [ours, cpu].map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
        (ours.status.success() && cpu.status.success(), text)
    }

    /// Holds the figures of a run to the CPU's.
    fn alike(&mut self, name: &str, precision: &str) {
        let [ours, cpu] = DEVICES.map(|device| figures(&self.dir.join(format!("{name}.{device}"))));
        let near = NEAR.iter().find(|(named, _)| *named == precision).expect("a precision").1;
        let names = |all: &[(String, f64)]| all.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        if names(&ours) != names(&cpu) || ours.is_empty() {
            self.wrong.push(format!("{name}: figures {ours:?}, on the CPU {cpu:?}"));
            return;
        }
        // A loss and a norm of the first step come first; later norms say what losses say.
        for (i, ((what, a), (_, b))) in ours.iter().zip(&cpu).enumerate() {
            let near = if i < 2 { near[0] } else { near[1] };
            let apart = (a - b).abs();
            if (apart.is_nan() || apart > near * b.abs() + 1e-9) && (i < 2 || what != "grad_norm") {
                self.wrong.push(format!("{name}: {what} {a}, on the CPU {b}, of {ours:?} and {cpu:?}"));
                return;
            }
        }
    }
}

/// Conversations: of a word each, usual ones, ones longer than a row.
fn rows(dice: &mut Dice) -> String {
    let words = ["river", "stone", "a", "light and", "what is", "the green", "seven", "."];
    let n = dice.of(&[2, 9, 40, 300]);
    let longest = dice.of(&[1, 4, 30, 120]);
    let mut text = String::new();
    for i in 0..n {
        let some = |dice: &mut Dice| {
            let n = dice.within(1, longest);
            (0..n).map(|_| dice.of(&words)).collect::<Vec<_>>().join(" ")
        };
        let (prompt, response) = (some(dice), some(dice));
        text += &format!("{}\n", serde_json::json!({"prompt": format!("{prompt} {i}"), "response": response}));
    }
    text
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(String::from).collect()
}

/// One case; the commands, and what is wrong.
pub fn run(seed: u64) -> (Vec<String>, Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    let mut place = Place { dir: folder.path(), said: Vec::new(), wrong: Vec::new() };
    let dice = &mut Dice::new(1_000_000 + seed);
    let mut config = to_json(&shape(dice), SaveDType::F32);
    for key in ["vocab_size", "unpadded_vocab_size"] {
        config.as_object_mut().unwrap().remove(key);
    }
    fs::write(place.dir.join("model.json"), config.to_string()).unwrap();
    place.said.push(config.to_string());
    let precision = dice.of(&["no", "bf16", "bf16"]);
    let length = dice.of(&[2, 16, 63, 64, 65, 130]);
    let common = |dice: &mut Dice| {
        format!(
            "--seed {} --mixed-precision {precision} --per-device-train-batch-size {} --gradient-accumulation-steps {} --max-grad-norm {} \
             --weight-decay {} --recompute {} --lr-scheduler-type {} --warmup-steps {} --{}packing --no-tensorboard --quiet",
            dice.within(0, 99),
            dice.of(&[1, 2, 3, 7]),
            dice.of(&[1, 2]),
            dice.of(&["0", "1", "0.01"]),
            dice.of(&["0", "0.1"]),
            dice.of(&["none", "attention", "layer"]),
            dice.of(&["cosine", "linear", "constant", "wsd"]),
            dice.within(0, 2),
            dice.of(&["", "no-"]),
        )
    };
    let line = format!(
        "pretrain --model-config {} --tokenizer-path tests/data/tokenizer/spm4k.model --dataset-paths data/demo/pretrain_valid.txt \
         --val-fraction 0.01 --max-steps 2 --max-seq-len {length} --learning-rate 1e-3 --eval-strategy no {}",
        place.path("model.json"),
        common(dice)
    );
    let (done, _) = place.both("pretrain", &words(&line), Some("--output-dir"));
    if !done {
        return (place.said, place.wrong);
    }
    place.alike("pretrain", precision);

    fs::write(place.dir.join("rows.jsonl"), rows(dice)).unwrap();
    let length = dice.of(&[2, 16, 63, 64, 65, 130, 700]);
    let kind = if dice.one_in(3) {
        "--no-lora".to_string()
    } else {
        format!(
            "--lora-r {} --lora-dropout {} --lora-targets {} --loraplus-lr-ratio {} --{}use-rslora{}",
            dice.of(&[1, 3, 7, 8, 16, 65]),
            dice.of(&["0", "0.1", "0.5", "0.99"]),
            dice.of(&["q,k,v,o,gate,up,down", "q,v", "down", "o,up", "gate"]),
            dice.of(&["1", "16"]),
            dice.of(&["", "no-"]),
            dice.of(&["", " --merge-adapters"]),
        )
    };
    let line = format!(
        "sft --model-path {} --dataset-paths {} --prompt-template {} --max-steps 3 --max-seq-len {length} --overflow {} --learning-rate 1e-3 \
         --val-fraction 0.2 --eval-steps 2 {kind} {} {}",
        place.path("pretrain.cpu/model/final"),
        place.path("rows.jsonl"),
        dice.of(&["chatml", "plain", "alpaca", "zephyr"]),
        dice.of(&["truncate", "drop"]),
        dice.of(&["", "--pad-vocab-to 4223", "--do-gen-test --num-gen-samples 1 --max-new-tokens 2"]),
        common(dice)
    );
    let (done, _) = place.both("sft", &words(&line), Some("--output-dir"));
    if !done {
        return (place.said, place.wrong);
    }
    place.alike("sft", precision);

    let run = place.path("sft.cpu");
    let line = format!(
        "eval --model-path {run} --dataset-paths {} --max-seq-len {length} --mixed-precision {precision}",
        place.path("rows.jsonl")
    );
    if let (true, text) = place.both("eval", &words(&line), None) {
        let loss = text.map(|text| text.split_whitespace().filter_map(|w| w.parse::<f64>().ok()).collect::<Vec<_>>());
        let near = if precision == "no" { 2e-3 } else { 2e-2 };
        let far = loss[0].len() != loss[1].len()
            || loss[0].iter().zip(&loss[1]).any(|(a, b)| (a - b).abs() > near * b.abs() + 0.51);
        if far {
            place.wrong.push(format!("eval: {loss:?}"));
        }
    }
    let line =
        format!("generate --model-path {run} --greedy --raw --max-new-tokens 3 --mixed-precision {precision} river a");
    let (done, text) = place.both("generate", &words(&line), None);
    if done && precision == "no" && text[0] != text[1] {
        place.wrong.push(format!("generate: {text:?}"));
    }
    if kind != "--no-lora" {
        place.both("merge", &words(&format!("merge --model-path {run}")), Some("--output-dir"));
    }
    (place.said, place.wrong)
}
