//! `--report_to mlflow` against a local server that keeps what it is sent and answers as the REST API does.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::program::{Outcome, Workplace};
use crate::report::place;

/// What was asked: path with query, header of who asks, body.
#[derive(Clone, Debug)]
struct Asked {
    path: String,
    who: String,
    body: Value,
}

/// What becomes of a server after some answers.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    /// Nobody listens any more.
    Gone,
    /// Connections are taken and left without an answer.
    Mute,
    /// It answers this status.
    Says(u16),
}

#[derive(Default)]
struct Server {
    asked: Vec<Asked>,
    experiments: Vec<String>,
    runs: usize,
    /// Answers that say 503 before it is well.
    ill: usize,
    /// Batches of metrics that are answered by 503 and forgotten.
    ill_batches: usize,
    /// What becomes of it once it has taken so many batches of metrics.
    fate: Option<(usize, Fate)>,
}

impl Server {
    fn fate(&self) -> Option<Fate> {
        let batches = self.asked.iter().filter(|a| a.body["metrics"].is_array()).count();
        self.fate.filter(|(after, _)| batches >= *after).map(|(_, fate)| fate)
    }
}

/// Answers on the loopback interface until the process ends.
fn serve(server: Server) -> (String, Arc<Mutex<Server>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("http://{}", listener.local_addr().unwrap());
    let server = Arc::new(Mutex::new(server));
    let kept = Arc::clone(&server);
    std::thread::spawn(move || {
        let mut left_alone = Vec::new();
        for stream in listener.incoming() {
            let mut server = kept.lock().unwrap();
            match server.fate() {
                Some(Fate::Mute) => left_alone.push(stream.unwrap()),
                _ => answer(stream.unwrap(), &mut server),
            }
            if server.fate() == Some(Fate::Gone) {
                return;
            }
        }
    });
    (uri, server)
}

fn read(stream: &mut TcpStream) -> Option<Asked> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte).ok()? == 0 {
            return None;
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let header = |name: &str| {
        let found = head.lines().find_map(|l| l.split_once(": ").filter(|(n, _)| n.eq_ignore_ascii_case(name)));
        found.map_or(String::new(), |(_, value)| value.to_string())
    };
    let mut body = vec![0; header("content-length").parse().unwrap_or(0)];
    stream.read_exact(&mut body).unwrap();
    assert!(body.len() < 1_000_000, "a request of {} bytes", body.len());
    let path =
        head.split(' ').nth(1).unwrap().strip_prefix("/api/2.0/mlflow/").expect("the path of the API").to_string();
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    Some(Asked { path, who: header("authorization"), body })
}

fn answer(mut stream: TcpStream, server: &mut Server) {
    let Some(asked) = read(&mut stream) else { return };
    let name = asked.body["name"].as_str().unwrap_or_default().to_string();
    let refused = if let Some(Fate::Says(status)) = server.fate() { status } else { 0 };
    let (status, body) = match asked.path.split('?').next().unwrap() {
        _ if refused > 0 => (refused, json!({"error_code": "ON_PURPOSE", "message": "so it is"})),
        _ if server.ill > 0 => {
            server.ill -= 1;
            (503, json!({"error_code": "TEMPORARILY_UNAVAILABLE", "message": "later"}))
        }
        "runs/log-batch" if server.ill_batches > 0 && asked.body["metrics"].is_array() => {
            server.ill_batches -= 1;
            // Nothing of it was taken.
            let body = r#"{"error_code": "TEMPORARILY_UNAVAILABLE"}"#;
            let _ =
                write!(stream, "HTTP/1.1 503 x\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
            return;
        }
        "experiments/get-by-name" => match &server.experiments[..] {
            [] => (404, json!({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such experiment"})),
            [one, ..] => (200, json!({"experiment": {"experiment_id": "7", "name": one}})),
        },
        "experiments/create" => {
            server.experiments.push(name);
            (200, json!({"experiment_id": "7"}))
        }
        "runs/create" => {
            server.runs += 1;
            (200, json!({"run": {"info": {"run_id": format!("run{}", server.runs)}}}))
        }
        "runs/log-batch" => {
            let n = |key: &str| asked.body[key].as_array().map_or(0, Vec::len);
            assert!(n("metrics") <= 1000 && n("params") <= 100, "a batch beyond the limits");
            (200, json!({}))
        }
        "runs/update" => (200, json!({"run_info": {}})),
        other => panic!("{other} is no path of the API"),
    };
    server.asked.push(asked);
    let text = body.to_string();
    // The client may be gone.
    let _ = write!(stream, "HTTP/1.1 {status} x\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{text}", text.len());
}

fn sft(w: &Workplace, uri: &str, environment: &str, more: &str) -> Outcome {
    let usual = [("--max_steps", 6), ("--save_steps", 3), ("--eval_steps", 3)];
    let steps = usual
        .iter()
        .filter(|(flag, _)| !more.contains(flag))
        .map(|(flag, n)| format!("{flag} {n} "))
        .collect::<String>();
    w.shell(&format!(
        "env -u MLFLOW_RUN_ID -u MLFLOW_TRACKING_TOKEN NO_PROXY=127.0.0.1 MLFLOW_TRACKING_URI={uri} {environment} ringtune sft \
         --model_path model --tokenizer_path spm.model --dataset_paths rows.jsonl more.jsonl --output_dir out --max_seq_len 64 \
         --per_device_train_batch_size 2 --val_fraction 0.2 --quiet {steps}{more}"
    ))
}

/// The paths that were asked for, without their queries.
fn paths(asked: &[Asked]) -> Vec<&str> {
    asked.iter().map(|a| a.path.split('?').next().unwrap()).collect()
}

/// Metrics of a name, by step.
fn values(asked: &[Asked], name: &str) -> Vec<(u64, f64)> {
    let all = asked.iter().flat_map(|a| a.body["metrics"].as_array().into_iter().flatten());
    let of_name = all.filter(|m| m["key"] == name);
    of_name.map(|m| (m["step"].as_u64().unwrap(), m["value"].as_f64().unwrap())).collect()
}

#[test]
fn a_run_and_its_resumption_are_one_run_there() {
    let w = place();
    let (uri, server) = serve(Server::default());
    let who = "MLFLOW_EXPERIMENT_NAME='a b' MLFLOW_TRACKING_USERNAME=me MLFLOW_TRACKING_PASSWORD=secret";
    let outcome = sft(&w, &format!("{uri}/"), who, "--report_to mlflow,json");
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(!outcome.stderr.contains("MLflow"), "{}", outcome.stderr);
    let asked = std::mem::take(&mut server.lock().unwrap().asked);
    assert_eq!(asked[0].path, "experiments/get-by-name?experiment_name=a%20b");
    assert_eq!(asked[1].body, json!({"name": "a b"}));
    assert_eq!(paths(&asked)[..3], ["experiments/get-by-name", "experiments/create", "runs/create"]);
    assert!(asked.iter().all(|a| a.who == "Basic bWU6c2VjcmV0"), "{asked:?}");
    assert_eq!((&asked[2].body["experiment_id"], &asked[2].body["run_name"]), (&json!("7"), &json!("out")));
    let end = asked.last().unwrap();
    assert_eq!((end.path.as_str(), &end.body["status"]), ("runs/update", &json!("FINISHED")));
    assert!(asked[3..].iter().all(|a| a.body["run_id"] == "run1"), "{asked:?}");
    // Every setting, and the figures of metrics.jsonl.
    let params: Vec<&Value> = asked.iter().flat_map(|a| a.body["params"].as_array().into_iter().flatten()).collect();
    let has = |key: &str, value: &str| params.iter().any(|p| p["key"] == key && p["value"] == value);
    assert!(params.len() > 40 && has("max_steps", "6") && has("report_to", "mlflow json"), "{params:?}");
    let metrics: Vec<Value> = std::fs::read_to_string(w.path("out/metrics.jsonl"))
        .unwrap()
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let of = |key: &str| {
        let lines = metrics.iter().filter_map(|v| Some((v["step"].as_u64()?, v[key].as_f64()?)));
        lines.collect::<Vec<_>>()
    };
    assert_eq!(values(&asked, "train/loss"), of("loss"));
    assert_eq!(values(&asked, "eval/loss"), of("eval_loss"));
    assert_eq!(values(&asked, "eval/rows_loss"), of("eval_rows_loss"));
    assert_eq!(values(&asked, "train/tokens_per_second").len(), 6);
    // The loss of a step lies between those of its data sets, which are there where the step had rows of them.
    let (rows, more) = (values(&asked, "train/rows_loss"), values(&asked, "train/more_loss"));
    assert!(rows.len() + more.len() > 6 && !rows.is_empty() && !more.is_empty(), "{rows:?} {more:?}");
    for (step, loss) in of("loss") {
        let own: Vec<f64> = rows.iter().chain(&more).filter(|v| v.0 == step).map(|v| v.1).collect();
        let (low, high) = (own.iter().copied().fold(f64::INFINITY, f64::min), own.iter().copied().fold(0.0, f64::max));
        assert!(low - 1e-5 <= loss && loss <= high + 1e-5, "step {step}: {loss} of {own:?}");
    }

    // From its third step on again: the same run there, whose settings stand.
    std::fs::remove_dir_all(w.path("out/checkpoint-6")).unwrap();
    let resume = "--report_to mlflow,json --resume_from_checkpoint auto";
    let outcome = sft(&w, &uri, "MLFLOW_EXPERIMENT_NAME='a b' MLFLOW_TRACKING_TOKEN=t0ken", resume);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let asked = std::mem::take(&mut server.lock().unwrap().asked);
    assert_eq!(paths(&asked)[0], "runs/update");
    assert_eq!((&asked[0].body["run_id"], &asked[0].body["status"]), (&json!("run1"), &json!("RUNNING")));
    assert!(asked.iter().all(|a| a.who == "Bearer t0ken" && a.body["run_id"] == "run1" && a.body["params"].is_null()));
    assert_eq!(values(&asked, "train/loss").iter().map(|v| v.0).collect::<Vec<_>>(), [4, 5, 6]);
    assert_eq!(asked.last().unwrap().body["status"], "FINISHED");
}

#[test]
fn a_failed_run_says_so_in_the_run_that_was_named() {
    let w = place();
    let (uri, server) = serve(Server { ill: 1, ..Server::default() });
    // A step that fails is the last one; the server is ill at first, and what waited is sent when it is well.
    let more = "--report_to mlflow --max_bad_steps 1 --learning_rate 1e38 --max_grad_norm 0 --no_lora";
    let outcome = sft(&w, &uri, "MLFLOW_RUN_ID=given", more);
    assert_eq!(outcome.code, Some(1), "{}", outcome.stderr);
    assert_eq!(outcome.stderr.matches("MLflow").count(), 1, "{}", outcome.stderr);
    assert!(
        outcome.stderr.contains("status 503: TEMPORARILY_UNAVAILABLE, later; the run goes on"),
        "{}",
        outcome.stderr
    );
    let asked = std::mem::take(&mut server.lock().unwrap().asked);
    assert!(asked.iter().all(|a| a.body["run_id"] == "given"), "{asked:?}");
    assert!(asked.iter().any(|a| a.body["params"].is_array()) && !values(&asked, "train/loss").is_empty(), "{asked:?}");
    assert_eq!(asked.last().unwrap().body["status"], "FAILED");
}

/// What a server did not take for a while is sent again when it does: every step once, in order.
#[test]
fn values_that_were_refused_for_a_while_are_sent_later() {
    let w = place();
    let (uri, server) = serve(Server { ill_batches: 1, ..Server::default() });
    // So many steps fill a batch, which is sent at once and refused.
    let outcome = sft(&w, &uri, "", "--report_to mlflow --max_steps 170 --save_steps 170 --eval_steps 170");
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(said(&outcome).iter().all(|line| !line.ends_with("the end of the run")), "{}", outcome.stderr);
    let server = server.lock().unwrap();
    let steps: Vec<u64> = values(&server.asked, "train/loss").iter().map(|v| v.0).collect();
    assert_eq!((steps, server.ill_batches), ((1..=170).collect(), 0));
    assert_eq!(server.asked.last().unwrap().body["status"], "FINISHED");
}

/// The lines that speak of the server.
fn said(outcome: &Outcome) -> Vec<&str> {
    outcome.stderr.lines().filter(|l| l.contains("MLflow")).collect()
}

#[test]
fn a_server_that_says_nothing_keeps_nobody_waiting() {
    let w = place();
    // Connections wait in its queue and nobody takes them.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("http://{}", listener.local_addr().unwrap());
    let start = Instant::now();
    let outcome = sft(&w, &uri, "", "--report_to mlflow,json");
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let lines = said(&outcome);
    assert!(lines.last().unwrap().contains("(no answer for 5 s): ") && lines.len() <= 2, "{lines:?}");
    assert!(lines.last().unwrap().ends_with(" values, the end of the run"), "{lines:?}");
    assert!(w.path("out/metrics.jsonl").exists() && start.elapsed() < Duration::from_secs(120));
    drop(listener);
    // Nobody is there at all: that is known at once, said once, and how much was not sent.
    std::fs::remove_dir_all(w.path("out")).unwrap();
    let outcome = sft(&w, &uri, "", "--report_to mlflow");
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let lines = said(&outcome);
    assert!(lines.len() == 2 && lines[0].contains("Connection refused"), "{lines:?}");
    assert!(lines[1].ends_with(" values, the end of the run") && !lines[1].contains(" 0 values"), "{lines:?}");
}

/// However a server fails, from its first answer on or in the midst of a run: the training ends as it would without it, in the same bits, and
/// no more is said than why and, at the end, how much was not sent.
#[test]
fn a_server_that_fails_changes_nothing_but_a_line() {
    let w = place();
    let weights = || std::fs::read(w.path("out/adapter_model.safetensors")).unwrap();
    // So many steps fill a batch, which is sent at once.
    let long = "--max_steps 170 --save_steps 170 --eval_steps 170";
    let undisturbed = sft(&w, "http://127.0.0.1:1", "", &format!("--report_to none {long}"));
    assert_eq!(undisturbed.code, Some(0), "{}", undisturbed.stderr);
    let expected = weights();
    for (after, fate, why) in [
        (0, Fate::Says(401), "status 401: ON_PURPOSE, so it is"),
        (0, Fate::Says(500), "status 500: ON_PURPOSE, so it is"),
        (1, Fate::Says(401), "status 401: ON_PURPOSE, so it is"),
        (1, Fate::Says(500), "status 500: ON_PURPOSE, so it is"),
        (1, Fate::Gone, "Connection refused"),
        (1, Fate::Mute, "no answer for 5 s"),
    ] {
        std::fs::remove_dir_all(w.path("out")).unwrap();
        let (uri, server) = serve(Server { fate: Some((after, fate)), ..Server::default() });
        let outcome = sft(&w, &uri, "", &format!("--report_to mlflow {long}"));
        assert_eq!(outcome.code, Some(0), "{fate:?}: {}", outcome.stderr);
        assert!(weights() == expected, "{fate:?}: other weights");
        let lines = said(&outcome);
        assert!((1..=2).contains(&lines.len()), "{fate:?} after {after}: {lines:?}");
        assert!(lines.iter().any(|line| line.contains(why)), "{fate:?} after {after}: {lines:?}");
        assert!(lines.last().unwrap().ends_with("the end of the run"), "{fate:?} after {after}: {lines:?}");
        // What was sent before is there.
        let asked = std::mem::take(&mut server.lock().unwrap().asked);
        let taken = asked.iter().filter(|a| a.body["metrics"].is_array()).count();
        assert!(taken >= after, "{fate:?}: {asked:?}");
    }
}

/// A run that is stopped says so; one that is killed cannot, and is the same run there when it goes on.
#[test]
fn a_stopped_run_is_killed_there_and_a_killed_one_goes_on() {
    let w = place();
    let (uri, server) = serve(Server::default());
    let ends_by = |signal: &str, more: &str| {
        // It has begun there, and taken more steps than it had before.
        let line = format!(
            "env -u MLFLOW_RUN_ID -u MLFLOW_TRACKING_TOKEN NO_PROXY=127.0.0.1 MLFLOW_TRACKING_URI={uri} ringtune sft --model_path model \
             --tokenizer_path spm.model --dataset_paths rows.jsonl --output_dir out --max_seq_len 64 --max_steps 100000 --save_steps 5 \
             --per_device_train_batch_size 2 --lr_scheduler_type constant --quiet --report_to mlflow,json {more} & pid=$!
             before=$(cat out/metrics.jsonl 2>/dev/null | wc -l)
             until [ -e out/mlflow.json ] && [ $(cat out/metrics.jsonl 2>/dev/null | wc -l) -gt $((before + 6)) ]; do
                 kill -0 $pid || exit 9; sleep 0.02
             done
             kill -{signal} $pid; wait $pid"
        );
        let outcome = w.shell(&line);
        (outcome.code, std::mem::take(&mut server.lock().unwrap().asked))
    };
    let status = |asked: &[Asked]| -> Vec<String> {
        let updates = asked.iter().filter(|a| a.path == "runs/update");
        updates.map(|a| a.body["status"].as_str().unwrap().to_string()).collect()
    };
    let (code, asked) = ends_by("TERM", "");
    assert_eq!((code, status(&asked)), (Some(75), vec!["KILLED".to_string()]));
    let (code, asked) = ends_by("KILL", "--resume_from_checkpoint auto");
    assert_eq!((code, status(&asked)), (Some(128 + 9), vec!["RUNNING".to_string()]));
    let (code, asked) = ends_by("INT", "--resume_from_checkpoint auto");
    assert_eq!((code, status(&asked)), (Some(75), vec!["RUNNING".to_string(), "KILLED".to_string()]));
    assert!(asked.iter().all(|a| a.body["run_id"] == "run1"), "{asked:?}");
}
