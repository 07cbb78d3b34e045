//! `ringtune report`: the numbers of the runs' files, several runs in one page, cut and missing files, and no markup from data.

use std::fs;

use serde_json::{Value, json};

use crate::program::{Outcome, Workplace, first_rows};

const MODEL: &str = "tests/data/model/tiny-llama-tied";

/// A folder with a model and rows.
pub fn place() -> Workplace {
    let w = Workplace::new();
    for file in ["config.json", "model.safetensors"] {
        w.copy(&format!("{MODEL}/{file}"), &format!("model/{file}"));
    }
    w.copy("tests/data/tokenizer/spm4k.model", "spm.model");
    w.write("rows.jsonl", first_rows("data/demo/chat.jsonl", 40));
    w.write("more.jsonl", first_rows("data/demo/define.jsonl", 40));
    w
}

fn ran(outcome: Outcome) -> Outcome {
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    outcome
}

pub fn sft(w: &Workplace, output: &str, more: &[&str]) {
    let mut words = vec![
        "sft",
        "--model_path",
        "model",
        "--tokenizer_path",
        "spm.model",
        "--dataset_paths",
        "rows.jsonl",
        "more.jsonl",
        "--output_dir",
        output,
        "--max_seq_len",
        "64",
        "--max_steps",
        "6",
        "--save_steps",
        "3",
        "--eval_steps",
        "3",
        "--per_device_train_batch_size",
        "2",
        "--val_fraction",
        "0.2",
    ];
    words.extend(more);
    ran(w.run(&words));
}

fn lines(w: &Workplace, file: &str) -> Vec<Value> {
    let text = fs::read_to_string(w.path(file)).unwrap();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

/// The numbers that hovering shows.
fn data(page: &str) -> Value {
    let text = page.split("<script type=\"application/json\" id=\"data\">").nth(1).unwrap();
    serde_json::from_str(text.split("</script>").next().unwrap()).unwrap()
}

/// No address outside the page: it has to open on a machine without a network.
fn stands_alone(page: &str) {
    for word in ["src=", "href=", "@import", "url(", "fetch(", "<link"] {
        assert!(!page.contains(word), "{word} is in the page");
    }
    let svg = page.matches("http://www.w3.org/2000/svg").count();
    assert_eq!(page.matches("://").count(), svg, "only the name of the SVG namespace looks like an address");
    let pairs = ["svg", "section", "table", "main", "dl", "script", "g"];
    for tag in pairs {
        let open = page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
        assert_eq!(open, page.matches(&format!("</{tag}>")).count(), "<{tag}> is not closed");
    }
    assert!(!page.contains("NaN") && !page.contains("inf\""));
}

#[test]
fn a_run_is_shown_with_its_numbers() {
    let w = place();
    sft(
        &w,
        "out",
        &[
            "--do_gen_test",
            "--num_gen_samples",
            "2",
            "--max_new_tokens",
            "5",
            "--lora_r",
            "4",
            "--dataset_weights",
            "0.7",
            "0.3",
        ],
    );
    let outcome = ran(w.run(&["report", "out"]));
    assert_eq!(outcome.stdout, "out/report.html\n");
    let page = fs::read_to_string(w.path("out/report.html")).unwrap();
    stands_alone(&page);
    let metrics = lines(&w, "out/metrics.jsonl");
    let evals: Vec<&Value> = metrics.iter().filter(|v| v.get("eval_loss").is_some()).collect();
    let numbers = data(&page);
    let curves = &numbers[0]["lines"];
    let of = |key: &str| metrics.iter().filter_map(|v| v.get("loss").and(v[key].as_f64())).collect::<Vec<f64>>();
    assert_eq!(curves["lr"][""]["y"], json!(of("lr")));
    assert_eq!(curves["loss"]["training"]["step"], json!([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
    assert_eq!(
        curves["loss"]["validation"]["y"],
        json!(evals.iter().map(|v| v["eval_loss"].as_f64().unwrap()).collect::<Vec<_>>())
    );
    let total: f64 = of("tokens").iter().sum();
    assert_eq!(curves["lr"][""]["tokens"][5].as_f64(), Some(total));
    let last = evals.last().unwrap()["eval_loss"].as_f64().unwrap();
    assert!(
        page.contains(&format!("<dt>validation loss</dt><dd>{last:.4}</dd>")),
        "the last validation loss is not there"
    );
    // Seven charts by step and by tokens, each for a screen and for a phone.
    assert_eq!(page.matches("<svg class=\"chart\"").count(), 28);
    for part in [
        "Loss (nats",
        "Learning rate",
        "Gradient norm",
        "Tokens a second",
        "Supervised share",
        "Accuracy",
        "Mix of the data",
        "rows.jsonl",
        "Settings",
        "<th>lora_r</th>",
        "--lora-r",
        "Environment",
        "trained parameters",
        "memory: weights",
        "Checkpoints",
        "checkpoint-6",
        ">best<",
        "Generation test",
        "<dt>greedy</dt>",
    ] {
        assert!(page.contains(part), "{part} is not in the page");
    }
    let record: Value = serde_json::from_slice(&fs::read(w.path("out/run.json")).unwrap()).unwrap();
    let asked = record["mix"][0]["shares"]["samples"]["requested"].as_f64().unwrap();
    assert!((asked - 0.7).abs() < 1e-9);
    assert!(page.contains("asked for 70.0%"));
    let samples: Value = serde_json::from_slice(&fs::read(w.path("out/samples.json")).unwrap()).unwrap();
    assert_eq!(samples["samples"].as_array().unwrap().len(), 2);
    assert_eq!(page.matches("<dt>prompt</dt>").count(), 2);
    assert!(record["parameters"]["trained"].as_u64().unwrap() > 0 && record["settings"].as_array().unwrap().len() > 30);
}

#[test]
fn several_runs_share_the_charts_and_differences_are_marked() {
    let w = place();
    sft(&w, "runs/a", &["--lora_r", "4"]);
    sft(&w, "runs/b", &["--lora_r", "8", "--learning_rate", "1e-3"]);
    let outcome = ran(w.run(&["report", "runs", "--output", "both.html"]));
    assert_eq!(outcome.stdout, "both.html\n");
    let page = fs::read_to_string(w.path("both.html")).unwrap();
    stands_alone(&page);
    let numbers = data(&page);
    let names: Vec<&str> = numbers.as_array().unwrap().iter().map(|r| r["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["a", "b"]);
    let first_chart = page.split("<svg class=\"chart\"").nth(1).unwrap().split("</svg>").next().unwrap();
    for class in ["<g class=\"r0 c0\">", "<g class=\"r1 c1\">"] {
        assert_eq!(first_chart.matches(class).count(), 2, "training and validation of each run");
    }
    assert!(page.contains("<label for=\"run-1\">"));
    let row = |name: &str| {
        let at = page.find(&format!("<th>{name}</th>")).unwrap_or_else(|| panic!("{name} is not in the page"));
        page[..at].rsplit("<tr class=").next().unwrap().to_string()
    };
    for (name, class) in [
        ("lora_r", "\"differs\">"),
        ("learning_rate", "\"differs\">"),
        ("output_dir", "\"differs\">"),
        ("seed", "\"same\">"),
    ] {
        assert_eq!(row(name), class, "{name}");
    }
    // Runs of one name are told apart by their folders.
    fs::create_dir_all(w.path("other")).unwrap();
    fs::rename(w.path("runs/b"), w.path("other/a")).unwrap();
    ran(w.run(&["report", "runs/a", "other/a"]));
    let names = data(&fs::read_to_string(w.path("report.html")).unwrap());
    assert_eq!((&names[0]["name"], &names[1]["name"]), (&json!("runs/a"), &json!("other/a")));
}

#[test]
fn cut_and_missing_files_are_said() {
    let w = Workplace::new();
    let line = |step: u64| json!({"step": step, "loss": 2.0, "lr": 1e-4, "tokens": 10, "supervised": 5}).to_string();
    w.write("r/metrics.jsonl", format!("{}\n{}\n{{\"step\": 3, \"lo", line(1), line(2)));
    let outcome = ran(w.run(&["report", "r"]));
    assert!(outcome.stderr.contains("the last line of metrics.jsonl is not complete"), "{}", outcome.stderr);
    let page = fs::read_to_string(w.path("r/report.html")).unwrap();
    stands_alone(&page);
    assert!(
        page.contains("not complete")
            && page.contains("run.json is not there")
            && page.contains("trainer_state.json is not there")
    );
    assert_eq!(data(&page)[0]["lines"]["loss"]["training"]["step"], json!([1.0, 2.0]));
    assert!(!page.contains("<h2>Settings</h2>") && !page.contains("<h2>Generation test</h2>"));
    w.write("r/run.json", "{\"settings\": ");
    ran(w.run(&["report", "r"]));
    let page = fs::read_to_string(w.path("r/report.html")).unwrap();
    assert!(page.contains("run.json: invalid JSON"));
    // A run that has not made its first step.
    w.write("new/metrics.jsonl", "");
    ran(w.run(&["report", "new"]));
    stands_alone(&fs::read_to_string(w.path("new/report.html")).unwrap());
    for dir in ["nothing", "cache"] {
        fs::create_dir_all(w.path("cache")).unwrap();
        let outcome = w.run(&["report", dir]);
        assert_eq!(outcome.code, Some(1), "{}", outcome.stderr);
        for part in [dir, "expected metrics.jsonl", "found"] {
            assert!(outcome.error().contains(part), "{}", outcome.stderr);
        }
    }
    assert_eq!(w.run(&["report"]).code, Some(2));
}

#[test]
fn nothing_in_a_file_becomes_markup() {
    let w = Workplace::new();
    let evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'&\u{0}\u{2028}{% x %}";
    let dir = "r<b>&\"'";
    let metrics = json!({"step": 1, "loss": 2.0, "tokens": 10, "supervised": 5, "lr": 1e-4});
    let eval = json!({"step": 1, "eval_loss": 2.0, format!("eval_{evil}_loss"): 2.0, "eval_b_loss": 2.5});
    let skipped = json!({"step": 2, "skipped": evil, "why": evil, "samples": [evil]});
    w.write(&format!("{dir}/metrics.jsonl"), format!("{metrics}\n{eval}\n{skipped}\n"));
    let record = json!({
        "program": evil, "device": evil, "machine": {"processor": evil, "system": evil}, "memory": {evil: 5}, "warnings": [evil],
        "mix": [{"name": evil, "rows": 3, "shares": {"samples": {"requested": 2.0, "achieved": -1.0}}}],
        "settings": [{"name": evil, "value": evil, "origin": evil}],
    });
    w.write(&format!("{dir}/run.json"), record.to_string());
    let sample = json!({"prompt": evil, "reference": evil, "greedy": evil, "sampled": {"text": evil}});
    w.write(&format!("{dir}/samples.json"), json!({"samples": [sample], "greedy": evil}).to_string());
    ran(w.run(&["report", dir, "--output", "report.html"]));
    let page = fs::read_to_string(w.path("report.html")).unwrap();
    assert_eq!(page.matches("<script").count(), 2, "the page's own two");
    for word in ["<img", "<b>&", "alert(1)</script>", "onerror=alert(2)>", "\u{0}"] {
        assert!(!page.contains(word), "{word:?} is in the page");
    }
    assert!(page.matches("&lt;img src=x onerror=alert(2)&gt;").count() > 10);
    assert!(page.contains("width:0.0%") && page.contains("left:100.0%"));
    assert_eq!(data(&page)[0]["name"], dir);
}
